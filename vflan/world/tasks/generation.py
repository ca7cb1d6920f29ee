"""Kinds of task whose answer is a description, a table, several facts or a reason."""

from __future__ import annotations

from numpy.random import Generator

from vflan.world.scene import PLACES, SHAPES, Scene, Thing
from vflan.world.tasks.collection import YES_NO, Question, kind, one, presence, unique

# --------------------------------------------------------------------------------------- generation


def pair(t: Thing) -> str:
    return f"{t.color} {t.shape}"


@kind("region description")
def describe_place(scene: Scene, rng: Generator) -> Question:
    if t := one(rng, scene.things):
        return (
            f"Describe the object at {PLACES[t.place]}.",
            f"{t.size} {t.texture} {t.color} {t.shape}",
        )


@kind("region description")
def describe_shape(scene: Scene, rng: Generator) -> Question:
    if t := one(rng, unique(scene, "shape")):
        return (
            f"Describe the {t.shape}.",
            f"{t.size} {t.texture} {t.color} {t.shape} at {PLACES[t.place]}",
        )


@kind("region description", split="heldout", in_text=False)
def describe_color(scene: Scene, rng: Generator) -> Question:
    if t := one(rng, unique(scene, "color")):
        return f"Describe the {t.color} object.", f"{t.size} {t.texture} {t.color} {t.shape}"


@kind("transcription", scenes="chart")
def transcribe_chart(scene: Scene, rng: Generator) -> Question:
    return "Write the chart as a table.", ", ".join(
        f"{color} {height}" for color, height in scene.bars
    )


@kind("visual dialogue")
def color_and_place(scene: Scene, rng: Generator) -> Question:
    if t := one(rng, unique(scene, "shape")):
        return f"What color is the {t.shape}, and where is it?", f"{t.color}, {PLACES[t.place]}"


@kind("visual dialogue", split="heldout")
def size_and_color(scene: Scene, rng: Generator) -> Question:
    if t := one(rng, unique(scene, "shape")):
        return f"What size is the {t.shape}, and what color?", f"{t.size}, {t.color}"


@kind("rationale", options=YES_NO)
def explain_presence(scene: Scene, rng: Generator) -> Question:
    if p := presence(scene, rng, "shape", SHAPES):
        if p[1] == "no":
            return f"Is there a {p[0]}? Give a reason.", f"no, there is no {p[0]}"
        if t := next((t for t in unique(scene, "shape") if t.shape == p[0]), None):
            return f"Is there a {p[0]}? Give a reason.", f"yes, it is at {PLACES[t.place]}"
