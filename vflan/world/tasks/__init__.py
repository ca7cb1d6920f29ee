"""The task collection: kinds of task in the paper's three groups, each with one instruction.

A kind is a small function (scene, rng) -> (instruction, answer), or None if the question does not
fit the scene. It is declared with its category, its split and whether the language model meets it
in text:

    split    train     trained with pictures (held-in)
             heldout   never seen with a picture; for evaluation only
    in_text  True      the language model met this kind in text, about scenes described in words, as
                       Vicuna has met most things
             False     new in both, with wordings that no training text has

A new file in this folder that declares kinds is found by itself. A notebook, or a file elsewhere,
adds its kinds by declaring them before `vflan.world.build` is called.
"""

from __future__ import annotations

import hashlib
from dataclasses import replace
from importlib import import_module
from pkgutil import iter_modules
from typing import TYPE_CHECKING

import numpy as np

from vflan.world.scene import CONDITIONS, Scene, held, pick, rng_of, sample_scene
from vflan.world.tasks.collection import (
    ANIMAL,
    FRUIT,
    GROUPS,
    KINDS,
    YES_NO,
    Kind,
    absent,
    choices,
    kind,
    listed,
    one,
    presence,
    two,
    unique,
    yes,
)

if TYPE_CHECKING:
    import pandas as pd

__all__ = [
    "ANIMAL", "ASKED", "FRUIT", "GROUPS", "KINDS", "SHIPPED", "YES_NO", "Kind", "absent",
    "added_kinds", "alike", "choices", "kind", "kinds", "listed", "one", "presence", "sample",
    "scene_for", "table", "two", "unique", "yes",
]  # fmt: skip

# The order of the kinds is the order of the rows in the generated files, so it never changes.
for _name in ("objects", "reading", "classification", "generation"):
    import_module(f"{__name__}.{_name}")
SHIPPED = frozenset(KINDS)  # the kinds that the language model in data/tiny was pretrained for
for _name in sorted(module.name for module in iter_modules(__path__)):
    import_module(f"{__name__}.{_name}")

# Kinds whose questions the benchmarks ask in the same words. They stay as declared in every draw,
# so that it does not depend on chance whether a benchmark's wording was trained.
ASKED = (
    *("exist_shape", "main_object", "handwritten_digit", "above"),
    *("statement_color", "statement_count", "is_background"),
    *("has_letter", "first_letter", "first_digit"),
    *("choose_color", "choose_shape", "choose_background", "choose_place", "choose_present"),
)


def kinds(redraw: int | None = None) -> list[Kind]:
    """All kinds in their order.

    redraw: a seed; another set of kinds, of equal number, is then held out among those that are
    known from text. Kinds that are new in both, and kinds of your own, stay as they are declared.
    """
    if redraw is None:
        return list(KINDS.values())
    free = [k for name, k in KINDS.items() if k.in_text and name in SHIPPED and name not in ASKED]
    number = sum(k.split == "heldout" for k in free)
    order = rng_of("held-out kinds", redraw).permutation(len(free))
    heldout = {free[i].name for i in order[:number]}
    split = {k.name: "heldout" if k.name in heldout else "train" for k in free}
    return [replace(k, split=split.get(k.name, k.split)) for k in KINDS.values()]


def added_kinds() -> dict[str, str]:
    """{name: hash of what it asks} of the kinds that do not come with vflan.

    `vflan.world.build` writes it into built.json and builds again when it changes.
    """
    hashes = {}
    for name, added in KINDS.items():
        if name not in SHIPPED:
            declared = added.category, added.split, added.in_text, added.options
            text = repr((*declared, sample(added, 20, "added kind")))
            hashes[name] = hashlib.sha256(text.encode()).hexdigest()[:16]
    return hashes


# ------------------------------------------------------------------------------------ the data set


def scene_for(task: Kind, rng: np.random.Generator, seed: int, odd_ink: bool = False) -> Scene:
    """A scene that a kind can ask about; kinds with rare answers get scenes that offer them.

    odd_ink: draw handwritten digits from those that are set aside for evaluation.
    """
    if task.scenes == "single":
        return sample_scene(rng, "objects", 1, seed=seed)
    scenes = task.scenes
    if scenes == "any" and task.name == "is_chart":  # half of the pictures are charts
        scenes = pick(rng, ("chart", pick(rng, ("objects", "text", "number"))))
    elif scenes == "any":
        scenes = pick(rng, ("objects", "text", "number", "chart"))
    elif scenes == "":
        scenes = pick(rng, ("objects", "text", "number", "chart"), (0.7, 0.1, 0.1, 0.1))
    scene = sample_scene(rng, scenes, seed=seed, odd_ink=odd_ink)
    if task.category == "image quality":
        share = (0.25,) * 4 if task.name == "quality" else (0.5, 1 / 6, 1 / 6, 1 / 6)
        scene = replace(scene, condition=pick(rng, CONDITIONS, share))
    if task.category in ("comparison", "counting") and len(scene.things) > 1 and rng.random() < 0.5:
        scene = alike(scene, rng)
    return scene


def alike(scene: Scene, rng: np.random.Generator) -> Scene:
    """The scene with one object made to look like another: counts above one are rare otherwise."""
    things = list(scene.things)
    i, j = (int(k) for k in rng.permutation(len(things))[:2])
    for attribute in ("color", "size", "texture"):
        if rng.random() < 0.7:
            things[j] = replace(things[j], **{attribute: getattr(things[i], attribute)})
    if rng.random() < 0.3:
        things[j] = replace(things[j], shape=things[i].shape)
    return replace(scene, things=tuple(things))


def sample(
    task: Kind, n: int, *key: str | int, evaluation: bool = False
) -> list[tuple[Scene, str, str]]:
    """n (scene, instruction, answer) of a kind, balanced over `task.options`; the key decides all.

    No answer of a kind with options gets more than its equal share and two. With `evaluation` the
    scenes are those that `scene.held` sets aside, otherwise the rest: a training set and a test set
    share no scene. ValueError for a kind that gives no question for any of 10,000 scenes: the
    search would not end.
    """
    rows, counts, i = [], {}, 0
    limit = n / max(1, len(task.options)) + 2
    while len(rows) < n:
        if not rows and i == 10_000:
            raise ValueError(f"The kind {task.name!r} gave no question for any of {i:,} scenes.")
        i += 1
        rng = rng_of(task.name, i, *key)
        scene = scene_for(task, rng, seed=int(rng.integers(2**40)), odd_ink=evaluation)
        if held(scene) != evaluation:
            continue
        question = task.make(scene, rng)
        label = question and question[1].split(",")[0]
        # After 200 tries a row the balance is given up: a rare answer must not block the data set.
        full = task.options and counts.get(label, 0) >= limit and i < 200 * n
        if question is None or full:
            continue
        counts[label] = counts.get(label, 0) + 1
        rows.append((scene, *question))
    return rows


def table(redraw: int | None = None) -> pd.DataFrame:
    """The collection as a table, one row a kind, with an example.

    Columns: task_name, group, category, split, in_text, instruction, answer.
    """
    import pandas as pd

    rows = []
    for k in kinds(redraw):
        _, instruction, answer = sample(k, 1, "table")[0]
        rows.append(
            {
                "task_name": k.name,
                "group": k.group,
                "category": k.category,
                "split": k.split,
                "in_text": k.in_text,
                "instruction": instruction,
                "answer": answer,
            }
        )
    return pd.DataFrame(rows)
