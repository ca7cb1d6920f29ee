"""What can be said about a scene: captions, running text and prose; exact by construction."""

from __future__ import annotations

from collections.abc import Sequence

from numpy.random import Generator

from vflan.world.scene import PLACES, Scene, Thing

NUMBERS = ("no", "one", "two", "three", "four", "five")


def note(thing: Thing, rng: Generator | None = None) -> str:
    """The five words of an object and a full stop.

    With `rng` they are in random order, so that only nearness shows that they belong together.
    """
    words = [PLACES[thing.place], thing.size, thing.texture, thing.color, thing.shape]
    if rng is not None:
        rng.shuffle(words)
    return " ".join(words) + "."


def describe(scene: Scene, rng: Generator | None = None) -> str:
    """The scene as running text, the form in which the tiny language model reads scenes.

    Without `rng` it is the caption of the projector stage: background and condition, then every
    object in reading order with its place and attributes. With `rng` objects are in random order,
    and half of the time the words of each object too.
    """
    if scene.kind == "handwritten":
        return f"digit {scene.text}."
    parts = [f"{scene.background} {scene.condition}."]
    things = list(scene.things)
    shuffled = rng is not None and rng.random() < 0.5
    if rng is not None:
        rng.shuffle(things)
    parts += [note(thing, rng if shuffled else None) for thing in things]
    if scene.kind in ("text", "number"):
        parts.append(f"{scene.kind} " + " ".join(scene.text) + ".")
    if scene.kind == "chart":
        parts += ["chart."] + [f"{color} {height}." for color, height in scene.bars]
    return " ".join(parts)


def phrase(thing: Thing, article: bool = True) -> str:
    """'a small red striped star'; the texture 'plain' is left out."""
    texture = [thing.texture] if thing.texture != "plain" else []
    words = [thing.size, thing.color, *texture, thing.shape]
    return ("a " if article else "") + " ".join(words)


def join(parts: Sequence[str]) -> str:
    """'x', 'x and y', 'x, y and z'."""
    return parts[0] if len(parts) == 1 else ", ".join(parts[:-1]) + " and " + parts[-1]


def side(a: Thing, b: Thing) -> str:
    """Where a is, seen from b: 'left of', 'right of', 'above' or 'below' (columns first)."""
    if a.column != b.column:
        return "left of" if a.column < b.column else "right of"
    return "above" if a.row < b.row else "below"


def sentences(things: Sequence[Thing], background: str, condition: str = "clear") -> list[str]:
    """Prose about objects, as a list of sentences."""
    out = [f"The picture shows {join([phrase(t) for t in things])} on a {background} background."]
    for a, b in zip(things, things[1:]):
        out.append(f"The {a.color} {a.shape} is {side(a, b)} the {b.color} {b.shape}.")
    out.append(f"In total there {'is' if len(things) == 1 else 'are'} {NUMBERS[len(things)]} "
               f"{'object' if len(things) == 1 else 'objects'} in the scene.")  # fmt: skip
    if condition != "clear":
        out.append(f"The picture itself looks {condition}.")
    return out
