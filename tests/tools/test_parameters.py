"""The parameters of the notebooks, as Python, papermill and a shell pass them."""

import ast

import nbformat
import pytest

from vflan.config import ROOT, preset
from vflan.tools.notebooks import find_notebooks, parameter_names
from vflan.tools.parameters import KINDS, checked

NOTEBOOKS = find_notebooks(ROOT / "notebooks")


@pytest.mark.parametrize(
    "name, text, value",
    [
        ("num_processes", "2", 2),
        ("seeds", "[0, 1]", [0, 1]),
        ("seeds", "3", [3]),
        ("seeds", (0, 1), [0, 1]),
        ("jobs", "None", None),
        ("budget", "null", None),
        ("beyond", "true", True),
        ("changes", '{"gradient_checkpointing": true}', {"gradient_checkpointing": True}),
        ("changes", "{'gradient_checkpointing': True}", {"gradient_checkpointing": True}),
        ("changes", "", {}),
        ("samples", "12", "12"),
        ("my_own", "[1]", [1]),
        ("my_own", "word", "word"),
    ],
)
def test_text_becomes_the_value_that_it_shows(name, text, value):
    assert checked(**{name: text}) == [value]


@pytest.mark.parametrize(
    "name, value",
    [
        ("num_processes", "zwei"), ("num_processes", 0), ("num_processes", True),
        ("num_processes", 1.5), ("seeds", []), ("seeds", "[0, 0]"), ("seeds", "[-1]"),
        ("seeds", "0, one"), ("jobs", 0), ("beyond", 1), ("budgets", "[0]"), ("live", "some"),
        ("preset", 7), ("samples", None),
    ],
)  # fmt: skip
def test_a_value_of_the_wrong_kind_is_refused_with_its_name(name, value):
    with pytest.raises(ValueError, match=f"^{name}=.* is needed"):
        checked(**{name: value})


def test_changes_are_fields_of_a_recipe():
    for wrong in ("lr", '{"l r": 1}', [1], 3):
        with pytest.raises(ValueError):
            checked(changes=wrong)
    assert preset("tiny", "{'max_steps': 3}").base.max_steps == 3


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_every_parameter_of_a_notebook_is_known_and_its_default_passes(path):
    names = parameter_names(path)
    assert set(names) <= {*KINDS, "changes"}
    cell = next(
        c for c in nbformat.read(path, 4).cells if "parameters" in c.metadata.get("tags", [])
    )
    values = [ast.literal_eval(line.value) for line in ast.parse(cell.source).body]
    assert checked(**dict(zip(names, values))) == values
