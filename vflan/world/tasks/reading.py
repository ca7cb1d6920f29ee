"""Kinds of task about letters, digits and charts."""

from numpy.random import Generator

from vflan.world.scene import LETTERS, Scene, pick
from vflan.world.tasks.collection import YES_NO, Question, kind, yes
from vflan.world.words import NUMBERS

# ------------------------------------------------------------------------------- letters and digits


@kind("reading", scenes="text")
def first_letter(scene: Scene, rng: Generator) -> Question:
    return "What is the first letter of the text?", scene.text[0]


@kind("reading", scenes="text", split="heldout")
def last_letter(scene: Scene, rng: Generator) -> Question:
    return "What is the last letter of the text?", scene.text[-1]


@kind("reading", scenes="text", options=NUMBERS[2:5])
def count_letters(scene: Scene, rng: Generator) -> Question:
    return "How many letters does the text have?", NUMBERS[len(scene.text)]


@kind("reading", scenes="text", options=YES_NO)
def has_letter(scene: Scene, rng: Generator) -> Question:
    there = rng.random() < 0.5
    letter = (
        pick(rng, list(scene.text))
        if there
        else pick(rng, [x for x in LETTERS if x not in scene.text])
    )
    return f"Does the text contain the letter {letter}?", yes(there)


@kind("reading", scenes="number")
def first_digit(scene: Scene, rng: Generator) -> Question:
    return "What is the first digit of the number?", scene.text[0]


@kind("reading", scenes="number", options=("even", "odd"))
def parity(scene: Scene, rng: Generator) -> Question:
    return "Is the number even or odd?", "odd" if int(scene.text) % 2 else "even"


@kind("reading", scenes="number", options=NUMBERS[1:4])
def count_digits(scene: Scene, rng: Generator) -> Question:
    return "How many digits does the number have?", NUMBERS[len(scene.text)]


@kind("reading", scenes="handwritten")
def handwritten_digit(scene: Scene, rng: Generator) -> Question:
    return "Which digit was written by hand?", scene.text


# ------------------------------------------------------------------------------------------- charts


@kind("charts", scenes="chart")
def bar_value(scene: Scene, rng: Generator) -> Question:
    color, height = pick(rng, scene.bars)
    return f"What is the value of the {color} bar?", str(height)


@kind("charts", scenes="chart")
def tallest_bar(scene: Scene, rng: Generator) -> Question:
    return "Which color is the tallest bar?", max(scene.bars, key=lambda b: b[1])[0]


@kind("charts", scenes="chart", split="heldout")
def shortest_bar(scene: Scene, rng: Generator) -> Question:
    return "Which color is the shortest bar?", min(scene.bars, key=lambda b: b[1])[0]


@kind("charts", scenes="chart", options=YES_NO)
def bar_taller(scene: Scene, rng: Generator) -> Question:
    i, j = rng.permutation(len(scene.bars))[:2]
    (color, height), (other, its_height) = scene.bars[i], scene.bars[j]
    return f"Is the {color} bar taller than the {other} bar?", yes(height > its_height)


@kind("charts", scenes="chart", options=NUMBERS[2:5])
def count_bars(scene: Scene, rng: Generator) -> Question:
    return "How many bars does the chart have?", NUMBERS[len(scene.bars)]
