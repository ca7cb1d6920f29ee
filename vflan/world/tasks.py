"""The task collection: kinds of task in the paper's three groups, each with one expert-style instruction.

A kind is a small function (scene, rng) -> (instruction, answer), or None where the scene does not offer the question. It is
declared with its category, its split and whether the language model meets it in text:

    split    train     tuned on with pictures (held-in)
             heldout   never seen with a picture; for evaluation only
    in_text  True      the language model met the kind in text, about scenes described in words, as Vicuna has met most things
             False     new in both, in wording too
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

from vflan.world.scene import (
    BACKGROUNDS,
    COLORS,
    CONDITIONS,
    LETTERS,
    PLACES,
    SHAPES,
    SIZES,
    TEXTURES,
    held,
    pick,
    rng_of,
    sample_scene,
)  # fmt: skip
from vflan.world.words import NUMBERS, join

YES_NO = ("yes", "no")
GROUPS = {  # category -> group, as in the paper's appendix
    "perception": "question answering", "counting": "question answering", "spatial reasoning": "question answering",
    "comparison": "question answering", "outside knowledge": "question answering", "reading": "question answering",
    "charts": "question answering",
    "scene": "classification", "image quality": "classification", "image type": "classification",
    "general object": "classification", "texture": "classification", "multiple choice": "classification",
    "image-text matching": "classification",
    "object presence": "classification",
    "region description": "generation", "transcription": "generation",
    "visual dialogue": "generation", "rationale": "generation",
}  # fmt: skip
ANIMAL = dict(zip(BACKGROUNDS, ("camel", "cow", "fish", "owl")))
FRUIT = dict(red="cherry", green="lime", blue="blueberry", yellow="lemon", purple="plum", orange="mango",
             white="coconut", black="olive")  # fmt: skip


@dataclass(frozen=True)
class Kind:
    name: str
    category: str
    make: Callable
    scenes: str = "objects"  # the kind of scene it is asked about
    split: str = "train"
    in_text: bool = True
    options: tuple = ()  # the answers between which the data set is balanced

    @property
    def group(self):
        return GROUPS[self.category]

    @property
    def image_first(self):
        return sum(map(ord, self.name)) % 2 == 0  # about half, as in the released data


KINDS: dict[str, Kind] = {}


def kind(category, **more):
    def declare(make):
        KINDS[make.__name__] = Kind(make.__name__, category, make, **more)
        return make

    return declare


# Kinds whose questions the benchmarks ask in the same words: whether they are trained on is no matter of chance.
ASKED = ("exist_shape", "main_object", "handwritten_digit", "above", "statement_color", "statement_count", "is_background",
         "has_letter", "first_letter", "first_digit", "choose_color", "choose_shape", "choose_background", "choose_place",
         "choose_present")  # fmt: skip


def kinds(redraw=None):
    """All kinds. With a seed `redraw`, the kinds that are held out though known from text are another draw, of equal number.

    The kinds that are new in both, which the language model never met, stay held out.
    """
    if redraw is None:
        return list(KINDS.values())
    free = [k for k in KINDS.values() if k.in_text and k.name not in ASKED]
    n = sum(k.split == "heldout" for k in free)
    out = {free[i].name for i in rng_of("held-out kinds", redraw).permutation(len(free))[:n]}
    split = {k.name: "heldout" if k.name in out else "train" for k in free}
    return [replace(k, split=split.get(k.name, k.split)) for k in KINDS.values()]


# ---------------------------------------------------------------------------------------------------------- small words


def unique(scene, *attributes):
    """Objects that are the only ones with their combination of attributes."""

    def key(t):
        return tuple(getattr(t, a) for a in attributes)

    keys = [key(t) for t in scene.things]
    return [t for t in scene.things if keys.count(key(t)) == 1]


def one(rng, things):
    return pick(rng, things) if things else None


def two(rng, things):
    if len(things) < 2:
        return None
    i, j = rng.permutation(len(things))[:2]
    return things[i], things[j]


def yes(flag):
    return "yes" if flag else "no"


def absent(scene, attribute, values, rng):
    present = {getattr(t, attribute) for t in scene.things}
    missing = [v for v in values if v not in present]
    return pick(rng, missing) if missing else None


def listed(values, order):
    """Distinct values in the fixed order of the vocabulary: 'red, blue'."""
    return ", ".join(v for v in order if v in set(values))


def choices(rng, right, values, n=4):
    """Lettered options with the right one among them: ('(a) red (b) blue ...', letter)."""
    wrong = [v for v in values if v != right]
    options = [wrong[i] for i in rng.permutation(len(wrong))[: n - 1]]
    at = int(rng.integers(n))
    options.insert(at, right)
    return " ".join(f"({letter}) {o}" for letter, o in zip("abcd", options)), "abcd"[at]


# --------------------------------------------------------------------------------------- question answering: perception


@kind("perception")
def color_of(s, r):
    if t := one(r, unique(s, "shape")):
        return f"What is the color of the {t.shape}?", t.color


@kind("perception", split="heldout")
def color_at(s, r):
    if t := one(r, s.things):
        return f"What color is the object at {PLACES[t.place]}?", t.color


@kind("perception")
def shape_at(s, r):
    if t := one(r, s.things):
        return f"Which shape is drawn at {PLACES[t.place]}?", t.shape


@kind("perception")
def shape_of_color(s, r):
    if t := one(r, unique(s, "color")):
        return f"Which shape is {t.color}?", t.shape


@kind("perception")
def where_is(s, r):
    if t := one(r, unique(s, "shape")):
        return f"Where is the {t.shape}?", PLACES[t.place]


@kind("perception", split="heldout")
def where_color(s, r):
    if t := one(r, unique(s, "color")):
        return f"Where is the {t.color} object?", PLACES[t.place]


@kind("perception", options=SIZES)
def size_of(s, r):
    if t := one(r, unique(s, "shape")):
        return f"Is the {t.shape} small or large?", t.size


@kind("perception", options=TEXTURES)
def texture_of(s, r):
    if t := one(r, unique(s, "shape")):
        return f"What is the texture of the {t.shape}?", t.texture


@kind("perception", split="heldout", options=TEXTURES)
def texture_at(s, r):
    if t := one(r, s.things):
        return f"What is the texture of the object at {PLACES[t.place]}?", t.texture


@kind("perception", split="heldout", in_text=False, options=TEXTURES)
def texture_of_color(s, r):
    if t := one(r, unique(s, "color")):
        return f"What is the texture of the {t.color} object?", t.texture


@kind("perception", split="heldout", in_text=False, options=SIZES)
def size_of_color(s, r):
    if t := one(r, unique(s, "color")):
        return f"Is the {t.color} object small or large?", t.size


# -------------------------------------------------------------------------------------- classification: object presence


def presence(s, r, attribute, values):
    """A value that is there or one that is not, half of the time each; partners of what is there are the likely absent."""
    if r.random() < 0.5:
        return (getattr(one(r, s.things), attribute), "yes") if s.things else None
    value = absent(s, attribute, values, r)
    return value and (value, "no")


@kind("object presence", options=YES_NO)
def exist_shape(s, r):
    if p := presence(s, r, "shape", SHAPES):
        return f"Is there a {p[0]} in the picture? Answer yes or no.", p[1]


@kind("object presence", options=YES_NO)
def exist_color(s, r):
    if p := presence(s, r, "color", COLORS):
        return f"Is there a {p[0]} object in the picture? Answer yes or no.", p[1]


@kind("object presence", options=YES_NO)
def exist_texture(s, r):
    if p := presence(s, r, "texture", TEXTURES):
        return f"Is there a {p[0]} object in the picture? Answer yes or no.", p[1]


@kind("object presence", options=YES_NO)
def exist_pair(s, r):
    t = one(r, s.things)
    if r.random() < 0.5:
        return f"Is there a {t.color} {t.shape} in the picture? Answer yes or no.", "yes"
    color = pick(r, [u.color for u in s.things] if r.random() < 0.6 else COLORS)
    if all((u.color, u.shape) != (color, t.shape) for u in s.things):
        return f"Is there a {color} {t.shape} in the picture? Answer yes or no.", "no"


@kind("object presence", split="heldout", in_text=False, options=YES_NO)
def anything_at(s, r):
    full = [PLACES[t.place] for t in s.things]
    if r.random() < 0.5:
        return f"Is there anything at {pick(r, full)}?", "yes"
    return f"Is there anything at {pick(r, [p for p in PLACES if p not in full])}?", "no"


# ----------------------------------------------------------------------------------------- question answering: counting


@kind("counting", options=NUMBERS[1:])
def count_all(s, r):
    return "How many objects are in the picture?", NUMBERS[len(s.things)]


def count(s, r, attribute, values):
    value = pick(r, [getattr(t, attribute) for t in s.things] if r.random() < 0.75 else values)
    n = sum(getattr(t, attribute) == value for t in s.things)
    return (value, NUMBERS[n]) if n <= 3 else None


@kind("counting", options=NUMBERS[:3])
def count_color(s, r):
    if c := count(s, r, "color", COLORS):
        return f"How many {c[0]} objects are in the picture?", c[1]


@kind("counting", options=NUMBERS[:3])
def count_shape(s, r):
    if c := count(s, r, "shape", SHAPES):
        return f"How many objects are a {c[0]}?", c[1]


@kind("counting", options=NUMBERS[:4])
def count_size(s, r):
    if c := count(s, r, "size", SIZES):
        return f"How many {c[0]} objects are in the picture?", c[1]


@kind("counting", split="heldout", options=NUMBERS[:4])
def count_texture(s, r):
    if c := count(s, r, "texture", TEXTURES):
        return f"How many {c[0]} objects are in the picture?", c[1]


# -------------------------------------------------------------------------------- question answering: spatial reasoning


def relation(s, r, text, holds):
    if pair := two(r, unique(s, "shape")):
        if (h := holds(*pair)) is not None:
            return text.format(pair[0].shape, pair[1].shape), yes(h)


@kind("spatial reasoning", options=YES_NO)
def above(s, r):
    return relation(
        s, r, "Is the {} above the {}?", lambda a, b: None if a.row == b.row else a.row < b.row
    )


@kind("spatial reasoning")
def row_of(s, r):
    if t := one(r, unique(s, "shape")):
        return f"In which row, a, b, c or d, is the {t.shape}?", "abcd"[t.row]


@kind("spatial reasoning")
def column_of(s, r):
    if t := one(r, unique(s, "shape")):
        return f"In which column, 1, 2, 3 or 4, is the {t.shape}?", "1234"[t.column]


@kind("spatial reasoning")
def topmost(s, r):
    rows = sorted(s.things, key=lambda t: t.row)
    if len(rows) > 1 and rows[0].row < rows[1].row:
        return "Which shape is highest in the picture?", rows[0].shape


@kind("spatial reasoning", split="heldout", in_text=False)
def row_of_color(s, r):
    if t := one(r, unique(s, "color")):
        return f"In which row, a, b, c or d, is the {t.color} object?", "abcd"[t.row]


@kind("spatial reasoning", split="heldout", in_text=False, options=YES_NO)
def is_at(s, r):
    if t := one(r, unique(s, "shape")):
        right = r.random() < 0.5
        place = PLACES[t.place] if right else pick(r, [p for p in PLACES if p != PLACES[t.place]])
        return f"Is the {t.shape} at {place}?", yes(right)


# --------------------------------------------------------------------------------------- question answering: comparison


@kind("comparison", options=(*SIZES, "equal"))
def more_small_or_large(s, r):
    small = sum(t.size == "small" for t in s.things)
    large = len(s.things) - small
    answer = "equal" if small == large else "small" if small > large else "large"
    return "Are there more small or more large objects? Answer small, large or equal.", answer


# -------------------------------------------------------------------------------- question answering: outside knowledge


@kind("outside knowledge")
def animal(s, r):
    return "Which animal lives in a place with this background?", ANIMAL[s.background]


@kind("outside knowledge")
def fruit(s, r):
    if t := one(r, unique(s, "shape")):
        return f"Name a fruit that has the color of the {t.shape}.", FRUIT[t.color]


@kind("outside knowledge", split="heldout", in_text=False)
def fruit_at(s, r):
    if t := one(r, s.things):
        return f"Name a fruit that has the color of the object at {PLACES[t.place]}.", FRUIT[
            t.color
        ]


# ----------------------------------------------------------------------------- question answering: reading, and numbers


@kind("reading", scenes="text")
def first_letter(s, r):
    return "What is the first letter of the text?", s.text[0]


@kind("reading", scenes="text", split="heldout")
def last_letter(s, r):
    return "What is the last letter of the text?", s.text[-1]


@kind("reading", scenes="text", options=NUMBERS[2:5])
def count_letters(s, r):
    return "How many letters does the text have?", NUMBERS[len(s.text)]


@kind("reading", scenes="text", options=YES_NO)
def has_letter(s, r):
    there = r.random() < 0.5
    letter = pick(r, list(s.text)) if there else pick(r, [x for x in LETTERS if x not in s.text])
    return f"Does the text contain the letter {letter}?", yes(there)


@kind("reading", scenes="number")
def first_digit(s, r):
    return "What is the first digit of the number?", s.text[0]


@kind("reading", scenes="number", options=("even", "odd"))
def parity(s, r):
    return "Is the number even or odd?", "odd" if int(s.text) % 2 else "even"


@kind("reading", scenes="number", options=NUMBERS[1:4])
def count_digits(s, r):
    return "How many digits does the number have?", NUMBERS[len(s.text)]


@kind("reading", scenes="handwritten")
def handwritten_digit(s, r):
    return "Which digit was written by hand?", s.text


# ------------------------------------------------------------------------------------------- question answering: charts


@kind("charts", scenes="chart")
def bar_value(s, r):
    color, height = pick(r, s.bars)
    return f"What is the value of the {color} bar?", str(height)


@kind("charts", scenes="chart")
def tallest_bar(s, r):
    return "Which color is the tallest bar?", max(s.bars, key=lambda b: b[1])[0]


@kind("charts", scenes="chart", split="heldout")
def shortest_bar(s, r):
    return "Which color is the shortest bar?", min(s.bars, key=lambda b: b[1])[0]


@kind("charts", scenes="chart", options=YES_NO)
def bar_taller(s, r):
    i, j = r.permutation(len(s.bars))[:2]
    return f"Is the {s.bars[i][0]} bar taller than the {s.bars[j][0]} bar?", yes(
        s.bars[i][1] > s.bars[j][1]
    )


@kind("charts", scenes="chart", options=NUMBERS[2:5])
def count_bars(s, r):
    return "How many bars does the chart have?", NUMBERS[len(s.bars)]


# ------------------------------------------------------------------------------------------------------- classification


@kind("scene", scenes="", options=BACKGROUNDS)
def background(s, r):
    return f"Classify the background. Choose from {join(BACKGROUNDS)}.", s.background


@kind("scene", scenes="", options=YES_NO)
def is_background(s, r):
    right = r.random() < 0.5
    name = s.background if right else pick(r, [b for b in BACKGROUNDS if b != s.background])
    return f"Is the background of the picture {name}?", yes(right)


@kind("image quality", scenes="", options=CONDITIONS)
def quality(s, r):
    return f"Judge the quality of the picture. Choose from {join(CONDITIONS)}.", s.condition


@kind("image quality", scenes="", options=YES_NO)
def is_clear(s, r):
    return "Is the picture clear?", yes(s.condition == "clear")


@kind("image type", scenes="any", options=("objects", "text", "number", "chart"))
def picture_type(s, r):
    return "What does the picture show? Choose from objects, text, number and chart.", s.kind


@kind("image type", scenes="any", options=YES_NO)
def is_chart(s, r):
    return "Is the picture a chart?", yes(s.kind == "chart")


@kind("general object", scenes="single")
def main_object(s, r):
    return f"Classify the object. Choose from {join(SHAPES)}.", s.things[0].shape


@kind("general object", scenes="single")
def main_color(s, r):
    return f"Classify the color of the object. Choose from {join(COLORS)}.", s.things[0].color


@kind("texture", scenes="single", options=TEXTURES)
def main_texture(s, r):
    return f"Classify the texture of the object. Choose from {join(TEXTURES)}.", s.things[0].texture


@kind("texture")
def all_textures(s, r):
    return "List the textures in the picture.", listed([t.texture for t in s.things], TEXTURES)


# --------------------------------------------------------------------------------------- multiple choice, and matching


def letters(question, rng, right, values, n=4):
    options, letter = choices(rng, right, values, n)
    return f"{question} {options} Answer with the letter.", letter


@kind("multiple choice", options=tuple("abcd"))
def choose_color(s, r):
    if t := one(r, unique(s, "shape")):
        return letters(f"What is the color of the {t.shape}?", r, t.color, COLORS)


@kind("multiple choice", options=tuple("abcd"))
def choose_shape(s, r):
    if t := one(r, s.things):
        return letters(f"Which shape is drawn at {PLACES[t.place]}?", r, t.shape, SHAPES)


@kind("multiple choice", options=tuple("abcd"))
def choose_background(s, r):
    return letters("What is the background?", r, s.background, BACKGROUNDS)


@kind("multiple choice", split="heldout", options=tuple("abcd"))
def choose_place(s, r):
    if t := one(r, unique(s, "shape")):
        return letters(f"Where is the {t.shape}?", r, PLACES[t.place], PLACES)


@kind("multiple choice", options=tuple("abcd"))
def choose_present(s, r):
    shape = one(r, s.things).shape
    missing = [x for x in SHAPES if all(t.shape != x for t in s.things)]
    if len(missing) >= 3:
        return letters("Which shape is in the picture?", r, shape, [shape, *missing])


@kind("image-text matching", options=YES_NO)
def statement_color(s, r):
    if t := one(r, unique(s, "shape")):
        right = r.random() < 0.5
        color = t.color if right else pick(r, [c for c in COLORS if c != t.color])
        return f"Does this text match the picture? The {t.shape} is {color}.", yes(right)


@kind("image-text matching", options=YES_NO)
def statement_count(s, r):
    right = r.random() < 0.5
    n = len(s.things) if right else pick(r, [i for i in range(1, 6) if i != len(s.things)])
    return (
        f"Does this text match the picture? It shows {NUMBERS[n]} {'object' if n == 1 else 'objects'}.",
        yes(right),
    )


@kind("image-text matching", split="heldout", in_text=False, options=YES_NO)
def statement_shape(s, r):
    if t := one(r, unique(s, "color")):
        right = r.random() < 0.5
        shape = t.shape if right else pick(r, [x for x in SHAPES if x != t.shape])
        return f"Does this text match the picture? The {t.color} object is a {shape}.", yes(right)


# ----------------------------------------------------------------------------------------------------------- generation


def pair(t):
    return f"{t.color} {t.shape}"


@kind("region description")
def describe_place(s, r):
    if t := one(r, s.things):
        return (
            f"Describe the object at {PLACES[t.place]}.",
            f"{t.size} {t.texture} {t.color} {t.shape}",
        )


@kind("region description")
def describe_shape(s, r):
    if t := one(r, unique(s, "shape")):
        return (
            f"Describe the {t.shape}.",
            f"{t.size} {t.texture} {t.color} {t.shape} at {PLACES[t.place]}",
        )


@kind("region description", split="heldout", in_text=False)
def describe_color(s, r):
    if t := one(r, unique(s, "color")):
        return f"Describe the {t.color} object.", f"{t.size} {t.texture} {t.color} {t.shape}"


@kind("transcription", scenes="chart")
def transcribe_chart(s, r):
    return "Write the chart as a table.", ", ".join(f"{color} {height}" for color, height in s.bars)


@kind("visual dialogue")
def color_and_place(s, r):
    if t := one(r, unique(s, "shape")):
        return f"What color is the {t.shape}, and where is it?", f"{t.color}, {PLACES[t.place]}"


@kind("visual dialogue", split="heldout")
def size_and_color(s, r):
    if t := one(r, unique(s, "shape")):
        return f"What size is the {t.shape}, and what color?", f"{t.size}, {t.color}"


@kind("rationale", options=YES_NO)
def explain_presence(s, r):
    if p := presence(s, r, "shape", SHAPES):
        if p[1] == "no":
            return f"Is there a {p[0]}? Give a reason.", f"no, there is no {p[0]}"
        if t := next((t for t in unique(s, "shape") if t.shape == p[0]), None):
            return f"Is there a {p[0]}? Give a reason.", f"yes, it is at {PLACES[t.place]}"


# --------------------------------------------------------------------------------------------------------- the data set


def scene_for(kind, rng, seed, odd_ink=False):
    """A scene on which a kind can be asked; kinds with rare answers get scenes that hold them."""
    if kind.scenes == "single":
        return sample_scene(rng, "objects", 1, seed=seed)
    scenes = kind.scenes
    if scenes == "any":
        scenes = pick(rng, ("chart", pick(rng, ("objects", "text", "number")))) if kind.name == "is_chart" else \
            pick(rng, ("objects", "text", "number", "chart"))  # fmt: skip
    if scenes == "":
        scenes = pick(rng, ("objects", "text", "number", "chart"), (0.7, 0.1, 0.1, 0.1))
    scene = sample_scene(rng, scenes, seed=seed, odd_ink=odd_ink)
    if kind.category == "image quality":
        share = (0.25,) * 4 if kind.name == "quality" else (0.5, 1 / 6, 1 / 6, 1 / 6)
        scene = replace(scene, condition=pick(rng, CONDITIONS, share))
    if kind.category in ("comparison", "counting") and len(scene.things) > 1 and rng.random() < 0.5:
        scene = alike(scene, rng)
    return scene


def alike(scene, rng):
    """Let one object copy the look of another, so that 'same' and counts above one are not rare."""
    things = list(scene.things)
    i, j = (int(k) for k in rng.permutation(len(things))[:2])
    for attribute in ("color", "size", "texture"):
        if rng.random() < 0.7:
            things[j] = replace(things[j], **{attribute: getattr(things[i], attribute)})
    if rng.random() < 0.3:
        things[j] = replace(things[j], shape=things[i].shape)
    return replace(scene, things=tuple(things))


def sample(kind, n, *key, evaluation=False):
    """n (scene, instruction, answer) of a kind, answers balanced over `kind.options`; deterministic in the key.

    No answer of a kind with options gets more than its equal share (and two). With `evaluation` the scenes are those that
    `scene.held` sets aside, else the others: a training set and a test set share no scene.
    """
    out, counts, i = [], {}, 0
    limit = n / max(1, len(kind.options)) + 2
    while len(out) < n:
        i += 1
        rng = rng_of(kind.name, i, *key)
        scene = scene_for(kind, rng, seed=int(rng.integers(2**40)), odd_ink=evaluation)
        if held(scene) != evaluation:
            continue
        made = kind.make(scene, rng)
        label = made and made[1].split(",")[0]
        if made is None or (kind.options and counts.get(label, 0) >= limit and i < 200 * n):
            continue
        counts[label] = counts.get(label, 0) + 1
        out.append((scene, *made))
    return out


def table(redraw=None):
    """A DataFrame of the collection: task_name, group, category, split, in_text, instruction, answer (an example each)."""
    import pandas as pd

    rows = []
    for k in kinds(redraw):
        _, instruction, answer = sample(k, 1, "table")[0]
        rows.append(dict(task_name=k.name, group=k.group, category=k.category, split=k.split, in_text=k.in_text,
                         instruction=instruction, answer=answer))  # fmt: skip
    return pd.DataFrame(rows)
