"""The parameters of the notebooks: text becomes values, and a wrong value is refused clearly."""

from __future__ import annotations

import glob
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vflan.config import ROOT, SHIPPED, Preset, Recipe, read_changes, read_value, resolve
from vflan.data.image_names import images_root


def _is_whole(value, least=1):
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _all_whole(value, least=1):
    is_list = isinstance(value, (list, tuple)) and len(value) > 0
    return is_list and all(_is_whole(number, least) for number in value)


def _are_seeds(value):
    return _all_whole(value, least=0) and len(set(value)) == len(value)


# Where the presets' mini worlds are drawn (vflan.world.WORLDS); the first holds the backbones too.
_WORLDS = "data/tiny", "data/frozen"
# The language models of the mini world, which train on a core of a laptop.
_SMALL = "data/tiny/language_model", "data/tiny/second_language_model"

# {name: (what the value has to be, its test)}; a notebook's other parameters may be anything.
_COUNT = "a whole number of at least 1", _is_whole
_COUNTS = "a list of whole numbers of at least 1", _all_whole
_SOME = "a whole number of at least 1, or None", lambda value: value is None or _is_whole(value)
_TEXT = "a text", lambda value: isinstance(value, str)
KINDS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "preset": _TEXT,
    "num_processes": _COUNT,
    "samples": _TEXT,
    "images": _TEXT,
    "seeds": ("a list of different whole numbers, [0, 1] for instance", _are_seeds),
    "jobs": _SOME,
    "budget": _SOME,
    "budgets": _COUNTS,
    "num_tasks": _COUNTS,
    "instances": _COUNTS,
    "beyond": ("True or False", lambda value: isinstance(value, bool)),
    "live": ('"small" or "all"', lambda value: value in ("small", "all")),
    "projector": _TEXT,
    "other_language_model": (
        "a folder, a hub id or None",
        lambda value: value is None or isinstance(value, str),
    ),
}
_TEXTS = ("preset", "samples", "images", "projector", "live")  # a text such as "12" stays one


def checked(**values: Any) -> list:
    """The values of notebook parameters, in the order given, as the notebook needs them.

    A text, as `papermill -r` or a shell passes it, becomes the value that it shows: "2" is 2,
    "[0, 1]" a list. ValueError for a value of the wrong kind, and for `changes` that are no fields
    of Recipe.
    """
    return [_checked(name, value) for name, value in values.items()]


def _checked(name, value):
    if name == "changes":
        return read_changes(value)
    if isinstance(value, str) and name not in _TEXTS:
        value = read_value(value)
    if name == "seeds" and _is_whole(value, least=0):
        value = [value]
    needs, is_right = KINDS.get(name, ("", lambda value: True))
    if not is_right(value):
        raise ValueError(f"{name}={value!r}: {needs} is needed.")
    return list(value) if isinstance(value, tuple) else value


def data_paths(recipe: Recipe, samples: str = "", images: str = "") -> tuple[Path, Path]:
    """(samples, folder or zip of their pictures) that a notebook's parameters name.

    A relative path starts at the project folder. Without `samples` they are the recipe's. Without
    `images`, pictures of `samples` are looked for beside it, as `load_samples` does.
    FileNotFoundError: `images` is not there.
    """
    path = resolve(samples or recipe.samples)
    folder = resolve(images) if images else None if samples else resolve(recipe.images)
    if images and not folder.exists():
        raise FileNotFoundError(f"images={images}: no such folder or zip.")
    return path, images_root(path, folder)


def absolute(name: str, value: str) -> str:
    """A path that was given on the command line as one that a notebook finds from its folder.

    A relative path starts at the working directory, else at the project folder. `value` may be a
    pattern. FileNotFoundError: nothing is there.
    """
    for path in (Path(value).expanduser().absolute(), resolve(value)):
        if path.exists() or glob.glob(str(path), recursive=True):
            return str(path)
    raise FileNotFoundError(f"{name}={value}: no such file or folder.")


def in_mini_world(path: str) -> bool:
    """Whether a recipe's path leads into a mini world of the presets, drawn already or not."""
    homes = [home / world for home in (ROOT, SHIPPED) for world in _WORLDS]
    return any(resolve(path).is_relative_to(home) for home in homes)


def is_small(recipes: Preset) -> bool:
    """Whether a preset trains the mini world's language models, whatever its name and its data."""
    small = {resolve(path) for path in _SMALL}
    return all(resolve(recipe.language_model) in small for recipe in recipes)
