"""How a kind of task is declared, and the small functions that many kinds share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from vflan.world.scene import BACKGROUNDS, Scene, Thing, pick

Question = tuple[str, str] | None  # (instruction, answer); None if it does not fit the scene
YES_NO = ("yes", "no")
# category -> group, as in the paper's appendix
GROUPS = {
    "perception": "question answering",
    "counting": "question answering",
    "spatial reasoning": "question answering",
    "comparison": "question answering",
    "outside knowledge": "question answering",
    "reading": "question answering",
    "charts": "question answering",
    "scene": "classification",
    "image quality": "classification",
    "image type": "classification",
    "general object": "classification",
    "texture": "classification",
    "multiple choice": "classification",
    "image-text matching": "classification",
    "object presence": "classification",
    "region description": "generation",
    "transcription": "generation",
    "visual dialogue": "generation",
    "rationale": "generation",
}
# What has to be known and cannot be seen: who lives on a background, what has a colour.
ANIMAL = dict(zip(BACKGROUNDS, ("camel", "cow", "fish", "owl")))
FRUIT = {
    "red": "cherry",
    "green": "lime",
    "blue": "blueberry",
    "yellow": "lemon",
    "purple": "plum",
    "orange": "mango",
    "white": "coconut",
    "black": "olive",
}


@dataclass(frozen=True)
class Kind:
    """A kind of task; see the docstring of `vflan.world.tasks` for `split` and `in_text`."""

    name: str
    category: str
    make: Callable[[Scene, np.random.Generator], Question]
    scenes: str = "objects"  # the kind of scene that it is asked about
    split: str = "train"
    in_text: bool = True
    options: tuple = ()  # the answers between which the data set is balanced

    @property
    def group(self) -> str:
        """Question answering, classification or generation."""
        return GROUPS[self.category]

    @property
    def image_first(self) -> bool:
        """Whether the picture comes before the instruction, as for half of the released data."""
        return sum(map(ord, self.name)) % 2 == 0


KINDS: dict[str, Kind] = {}


def kind(category: str, **more) -> Callable:
    """A decorator that adds a function to the collection, under the function's name.

    more: fields of Kind. ValueError for a category that is not in GROUPS, and for a name that is
    already used: the data of the other kind would be replaced without a word.
    """
    if category not in GROUPS:
        raise ValueError(f"There is no category {category!r}; known are {', '.join(GROUPS)}.")

    def declare(make: Callable) -> Callable:
        name, module = make.__name__, make.__module__
        # A notebook cell may be run again, so a notebook may replace its own kind.
        if name in KINDS and not module == KINDS[name].make.__module__ == "__main__":
            raise ValueError(
                f"There is already a kind {name!r}, in {KINDS[name].make.__module__}: choose "
                "another name for the function."
            )
        KINDS[name] = Kind(name, category, make, **more)
        return make

    return declare


# --------------------------------------------------------------------------------- shared by kinds


def unique(scene: Scene, *attributes: str) -> list[Thing]:
    """The objects that are the only ones with their combination of attributes."""

    def key(thing: Thing) -> tuple:
        return tuple(getattr(thing, attribute) for attribute in attributes)

    keys = [key(thing) for thing in scene.things]
    return [thing for thing in scene.things if keys.count(key(thing)) == 1]


def one(rng: np.random.Generator, things: Sequence[Thing]) -> Thing | None:
    """One of the objects, or None if there is none."""
    return pick(rng, things) if things else None


def two(rng: np.random.Generator, things: Sequence[Thing]) -> tuple[Thing, Thing] | None:
    """Two different objects, or None if there are fewer."""
    if len(things) < 2:
        return None
    i, j = rng.permutation(len(things))[:2]
    return things[i], things[j]


def yes(flag: bool) -> str:
    """The answer to a question that is answered yes or no."""
    return "yes" if flag else "no"


def absent(
    scene: Scene, attribute: str, values: Sequence[str], rng: np.random.Generator
) -> str | None:
    """A value of an attribute that no object has, or None if all values occur."""
    present = {getattr(thing, attribute) for thing in scene.things}
    missing = [value for value in values if value not in present]
    return pick(rng, missing) if missing else None


def presence(
    scene: Scene, rng: np.random.Generator, attribute: str, values: Sequence[str]
) -> tuple[str, str] | None:
    """(value, "yes") for a value that occurs or (value, "no") for one that does not, half each."""
    if rng.random() < 0.5:
        return (getattr(one(rng, scene.things), attribute), "yes") if scene.things else None
    value = absent(scene, attribute, values, rng)
    return value and (value, "no")


def listed(values: Sequence[str], order: Sequence[str]) -> str:
    """Distinct values in the fixed order of the vocabulary: "red, blue"."""
    return ", ".join(value for value in order if value in set(values))


def choices(
    rng: np.random.Generator, right: str, values: Sequence[str], n: int = 4
) -> tuple[str, str]:
    """n lettered options, the right one among them: ("(a) red (b) blue ...", its letter)."""
    wrong = [value for value in values if value != right]
    options = [wrong[i] for i in rng.permutation(len(wrong))[: n - 1]]
    place = int(rng.integers(n))
    options.insert(place, right)
    text = " ".join(f"({letter}) {option}" for letter, option in zip("abcd", options))
    return text, "abcd"[place]
