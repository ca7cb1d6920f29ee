"""Kinds of task about objects: their looks, places and number, and what is known of them."""

from collections.abc import Callable, Sequence

from numpy.random import Generator

from vflan.world.scene import COLORS, PLACES, SHAPES, SIZES, TEXTURES, Scene, pick
from vflan.world.tasks.collection import (
    ANIMAL,
    FRUIT,
    YES_NO,
    Question,
    kind,
    one,
    presence,
    two,
    unique,
    yes,
)
from vflan.world.words import NUMBERS

# --------------------------------------------------------------------------------------- perception


@kind("perception")
def color_of(scene: Scene, rng: Generator) -> Question:
    if t := one(rng, unique(scene, "shape")):
        return f"What is the color of the {t.shape}?", t.color


@kind("perception", split="heldout")
def color_at(scene: Scene, rng: Generator) -> Question:
    if t := one(rng, scene.things):
        return f"What color is the object at {PLACES[t.place]}?", t.color


@kind("perception")
def shape_at(scene: Scene, rng: Generator) -> Question:
    if t := one(rng, scene.things):
        return f"Which shape is drawn at {PLACES[t.place]}?", t.shape


@kind("perception")
def shape_of_color(scene: Scene, rng: Generator) -> Question:
    if t := one(rng, unique(scene, "color")):
        return f"Which shape is {t.color}?", t.shape


@kind("perception")
def where_is(scene: Scene, rng: Generator) -> Question:
    if t := one(rng, unique(scene, "shape")):
        return f"Where is the {t.shape}?", PLACES[t.place]


@kind("perception", split="heldout")
def where_color(scene: Scene, rng: Generator) -> Question:
    if t := one(rng, unique(scene, "color")):
        return f"Where is the {t.color} object?", PLACES[t.place]


@kind("perception", options=SIZES)
def size_of(scene: Scene, rng: Generator) -> Question:
    if t := one(rng, unique(scene, "shape")):
        return f"Is the {t.shape} small or large?", t.size


@kind("perception", options=TEXTURES)
def texture_of(scene: Scene, rng: Generator) -> Question:
    if t := one(rng, unique(scene, "shape")):
        return f"What is the texture of the {t.shape}?", t.texture


@kind("perception", split="heldout", options=TEXTURES)
def texture_at(scene: Scene, rng: Generator) -> Question:
    if t := one(rng, scene.things):
        return f"What is the texture of the object at {PLACES[t.place]}?", t.texture


@kind("perception", split="heldout", in_text=False, options=TEXTURES)
def texture_of_color(scene: Scene, rng: Generator) -> Question:
    if t := one(rng, unique(scene, "color")):
        return f"What is the texture of the {t.color} object?", t.texture


@kind("perception", split="heldout", in_text=False, options=SIZES)
def size_of_color(scene: Scene, rng: Generator) -> Question:
    if t := one(rng, unique(scene, "color")):
        return f"Is the {t.color} object small or large?", t.size


# ---------------------------------------------------------------------------------- object presence


@kind("object presence", options=YES_NO)
def exist_shape(scene: Scene, rng: Generator) -> Question:
    if p := presence(scene, rng, "shape", SHAPES):
        return f"Is there a {p[0]} in the picture? Answer yes or no.", p[1]


@kind("object presence", options=YES_NO)
def exist_color(scene: Scene, rng: Generator) -> Question:
    if p := presence(scene, rng, "color", COLORS):
        return f"Is there a {p[0]} object in the picture? Answer yes or no.", p[1]


@kind("object presence", options=YES_NO)
def exist_texture(scene: Scene, rng: Generator) -> Question:
    if p := presence(scene, rng, "texture", TEXTURES):
        return f"Is there a {p[0]} object in the picture? Answer yes or no.", p[1]


@kind("object presence", options=YES_NO)
def exist_pair(scene: Scene, rng: Generator) -> Question:
    t = one(rng, scene.things)
    if rng.random() < 0.5:
        return f"Is there a {t.color} {t.shape} in the picture? Answer yes or no.", "yes"
    color = pick(rng, [u.color for u in scene.things] if rng.random() < 0.6 else COLORS)
    if all((u.color, u.shape) != (color, t.shape) for u in scene.things):
        return f"Is there a {color} {t.shape} in the picture? Answer yes or no.", "no"


@kind("object presence", split="heldout", in_text=False, options=YES_NO)
def anything_at(scene: Scene, rng: Generator) -> Question:
    full = [PLACES[t.place] for t in scene.things]
    if rng.random() < 0.5:
        return f"Is there anything at {pick(rng, full)}?", "yes"
    return f"Is there anything at {pick(rng, [p for p in PLACES if p not in full])}?", "no"


# ----------------------------------------------------------------------------------------- counting


@kind("counting", options=NUMBERS[1:])
def count_all(scene: Scene, rng: Generator) -> Question:
    return "How many objects are in the picture?", NUMBERS[len(scene.things)]


def count(
    scene: Scene, rng: Generator, attribute: str, values: Sequence[str]
) -> tuple[str, str] | None:
    """(value, how many objects have it, as a word), or None for more than three."""
    # Mostly a value that occurs: otherwise nearly every answer would be "no".
    present = [getattr(t, attribute) for t in scene.things]
    value = pick(rng, present if rng.random() < 0.75 else values)
    n = sum(getattr(t, attribute) == value for t in scene.things)
    return (value, NUMBERS[n]) if n <= 3 else None


@kind("counting", options=NUMBERS[:3])
def count_color(scene: Scene, rng: Generator) -> Question:
    if c := count(scene, rng, "color", COLORS):
        return f"How many {c[0]} objects are in the picture?", c[1]


@kind("counting", options=NUMBERS[:3])
def count_shape(scene: Scene, rng: Generator) -> Question:
    if c := count(scene, rng, "shape", SHAPES):
        return f"How many objects are a {c[0]}?", c[1]


@kind("counting", options=NUMBERS[:4])
def count_size(scene: Scene, rng: Generator) -> Question:
    if c := count(scene, rng, "size", SIZES):
        return f"How many {c[0]} objects are in the picture?", c[1]


@kind("counting", split="heldout", options=NUMBERS[:4])
def count_texture(scene: Scene, rng: Generator) -> Question:
    if c := count(scene, rng, "texture", TEXTURES):
        return f"How many {c[0]} objects are in the picture?", c[1]


# -------------------------------------------------------------------------------- spatial reasoning


def relation(scene: Scene, rng: Generator, text: str, holds: Callable) -> Question:
    """Whether a relation holds between two objects; None where `holds` returns None."""
    if pair := two(rng, unique(scene, "shape")):
        if (h := holds(*pair)) is not None:
            return text.format(pair[0].shape, pair[1].shape), yes(h)


@kind("spatial reasoning", options=YES_NO)
def above(scene: Scene, rng: Generator) -> Question:
    def holds(a, b):
        return None if a.row == b.row else a.row < b.row

    return relation(scene, rng, "Is the {} above the {}?", holds)


@kind("spatial reasoning")
def row_of(scene: Scene, rng: Generator) -> Question:
    if t := one(rng, unique(scene, "shape")):
        return f"In which row, a, b, c or d, is the {t.shape}?", "abcd"[t.row]


@kind("spatial reasoning")
def column_of(scene: Scene, rng: Generator) -> Question:
    if t := one(rng, unique(scene, "shape")):
        return f"In which column, 1, 2, 3 or 4, is the {t.shape}?", "1234"[t.column]


@kind("spatial reasoning")
def topmost(scene: Scene, rng: Generator) -> Question:
    rows = sorted(scene.things, key=lambda t: t.row)
    if len(rows) > 1 and rows[0].row < rows[1].row:
        return "Which shape is highest in the picture?", rows[0].shape


@kind("spatial reasoning", split="heldout", in_text=False)
def row_of_color(scene: Scene, rng: Generator) -> Question:
    if t := one(rng, unique(scene, "color")):
        return f"In which row, a, b, c or d, is the {t.color} object?", "abcd"[t.row]


@kind("spatial reasoning", split="heldout", in_text=False, options=YES_NO)
def is_at(scene: Scene, rng: Generator) -> Question:
    if t := one(rng, unique(scene, "shape")):
        right = rng.random() < 0.5
        place = PLACES[t.place] if right else pick(rng, [p for p in PLACES if p != PLACES[t.place]])
        return f"Is the {t.shape} at {place}?", yes(right)


# --------------------------------------------------------------------------------------- comparison


@kind("comparison", options=(*SIZES, "equal"))
def more_small_or_large(scene: Scene, rng: Generator) -> Question:
    small = sum(t.size == "small" for t in scene.things)
    large = len(scene.things) - small
    answer = "equal" if small == large else "small" if small > large else "large"
    return "Are there more small or more large objects? Answer small, large or equal.", answer


# -------------------------------------------------------------------------------- outside knowledge


@kind("outside knowledge")
def animal(scene: Scene, rng: Generator) -> Question:
    return "Which animal lives in a place with this background?", ANIMAL[scene.background]


@kind("outside knowledge")
def fruit(scene: Scene, rng: Generator) -> Question:
    if t := one(rng, unique(scene, "shape")):
        return f"Name a fruit that has the color of the {t.shape}.", FRUIT[t.color]


@kind("outside knowledge", split="heldout", in_text=False)
def fruit_at(scene: Scene, rng: Generator) -> Question:
    if t := one(rng, scene.things):
        question = f"Name a fruit that has the color of the object at {PLACES[t.place]}."
        return question, FRUIT[t.color]
