"""Kinds of task that name a class, choose an option or judge a sentence."""

from __future__ import annotations

from collections.abc import Sequence

from numpy.random import Generator

from vflan.world.scene import (
    BACKGROUNDS,
    COLORS,
    CONDITIONS,
    PLACES,
    SHAPES,
    TEXTURES,
    Scene,
    pick,
)
from vflan.world.tasks.collection import YES_NO, Question, choices, kind, listed, one, unique, yes
from vflan.world.words import NUMBERS, join

# ----------------------------------------------------------------------------------- classification


@kind("scene", scenes="", options=BACKGROUNDS)
def background(scene: Scene, rng: Generator) -> Question:
    return f"Classify the background. Choose from {join(BACKGROUNDS)}.", scene.background


@kind("scene", scenes="", options=YES_NO)
def is_background(scene: Scene, rng: Generator) -> Question:
    right = rng.random() < 0.5
    name = (
        scene.background if right else pick(rng, [b for b in BACKGROUNDS if b != scene.background])
    )
    return f"Is the background of the picture {name}?", yes(right)


@kind("image quality", scenes="", options=CONDITIONS)
def quality(scene: Scene, rng: Generator) -> Question:
    return f"Judge the quality of the picture. Choose from {join(CONDITIONS)}.", scene.condition


@kind("image quality", scenes="", options=YES_NO)
def is_clear(scene: Scene, rng: Generator) -> Question:
    return "Is the picture clear?", yes(scene.condition == "clear")


@kind("image type", scenes="any", options=("objects", "text", "number", "chart"))
def picture_type(scene: Scene, rng: Generator) -> Question:
    return "What does the picture show? Choose from objects, text, number and chart.", scene.kind


@kind("image type", scenes="any", options=YES_NO)
def is_chart(scene: Scene, rng: Generator) -> Question:
    return "Is the picture a chart?", yes(scene.kind == "chart")


@kind("general object", scenes="single")
def main_object(scene: Scene, rng: Generator) -> Question:
    return f"Classify the object. Choose from {join(SHAPES)}.", scene.things[0].shape


@kind("general object", scenes="single")
def main_color(scene: Scene, rng: Generator) -> Question:
    return f"Classify the color of the object. Choose from {join(COLORS)}.", scene.things[0].color


@kind("texture", scenes="single", options=TEXTURES)
def main_texture(scene: Scene, rng: Generator) -> Question:
    (thing,) = scene.things
    return f"Classify the texture of the object. Choose from {join(TEXTURES)}.", thing.texture


@kind("texture")
def all_textures(scene: Scene, rng: Generator) -> Question:
    return "List the textures in the picture.", listed([t.texture for t in scene.things], TEXTURES)


# ------------------------------------------------------------- multiple choice, image-text matching


def letters(
    question: str, rng: Generator, right: str, values: Sequence[str], n: int = 4
) -> tuple[str, str]:
    """The question with n lettered options, and the letter of the right one."""
    options, letter = choices(rng, right, values, n)
    return f"{question} {options} Answer with the letter.", letter


@kind("multiple choice", options=tuple("abcd"))
def choose_color(scene: Scene, rng: Generator) -> Question:
    if t := one(rng, unique(scene, "shape")):
        return letters(f"What is the color of the {t.shape}?", rng, t.color, COLORS)


@kind("multiple choice", options=tuple("abcd"))
def choose_shape(scene: Scene, rng: Generator) -> Question:
    if t := one(rng, scene.things):
        return letters(f"Which shape is drawn at {PLACES[t.place]}?", rng, t.shape, SHAPES)


@kind("multiple choice", options=tuple("abcd"))
def choose_background(scene: Scene, rng: Generator) -> Question:
    return letters("What is the background?", rng, scene.background, BACKGROUNDS)


@kind("multiple choice", split="heldout", options=tuple("abcd"))
def choose_place(scene: Scene, rng: Generator) -> Question:
    if t := one(rng, unique(scene, "shape")):
        return letters(f"Where is the {t.shape}?", rng, PLACES[t.place], PLACES)


@kind("multiple choice", options=tuple("abcd"))
def choose_present(scene: Scene, rng: Generator) -> Question:
    shape = one(rng, scene.things).shape
    missing = [x for x in SHAPES if all(t.shape != x for t in scene.things)]
    if len(missing) >= 3:
        return letters("Which shape is in the picture?", rng, shape, [shape, *missing])


@kind("image-text matching", options=YES_NO)
def statement_color(scene: Scene, rng: Generator) -> Question:
    if t := one(rng, unique(scene, "shape")):
        right = rng.random() < 0.5
        color = t.color if right else pick(rng, [c for c in COLORS if c != t.color])
        return f"Does this text match the picture? The {t.shape} is {color}.", yes(right)


@kind("image-text matching", options=YES_NO)
def statement_count(scene: Scene, rng: Generator) -> Question:
    right = rng.random() < 0.5
    n = (
        len(scene.things)
        if right
        else pick(rng, [i for i in range(1, 6) if i != len(scene.things)])
    )
    noun = "object" if n == 1 else "objects"
    return f"Does this text match the picture? It shows {NUMBERS[n]} {noun}.", yes(right)


@kind("image-text matching", split="heldout", in_text=False, options=YES_NO)
def statement_shape(scene: Scene, rng: Generator) -> Question:
    if t := one(rng, unique(scene, "color")):
        right = rng.random() < 0.5
        shape = t.shape if right else pick(rng, [x for x in SHAPES if x != t.shape])
        return f"Does this text match the picture? The {t.color} object is a {shape}.", yes(right)
