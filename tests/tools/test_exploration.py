"""Notebook 01 on anybody's samples file: tasks of any name or none, odd rows, presets of one's own.

Its cells run in this process, one after another, on files of a few rows.
"""

import ast
import contextlib
import io
import json

import matplotlib.pyplot as plt
import nbformat
import pandas as pd
import pytest
from PIL import Image

from vflan import plots, world
from vflan.config import ROOT, preset
from vflan.data.samples import load_samples, texture
from vflan.data.validation import check
from vflan.tools import exploration
from vflan.tools.notebooks import find_notebooks, parameter_names
from vflan.tools.parameters import data_paths, is_small

NOTEBOOKS = find_notebooks(ROOT / "notebooks")
LONG = "a name of a task that goes on and on, " * 8


def shown(value):
    if hasattr(value, "_repr_html_"):
        value._repr_html_()  # what a browser would show must not fail either
    return str(value)


def run_cells(path, **parameters):
    """What the code cells of a notebook show, with these parameters, without a kernel."""
    out = io.StringIO()
    names = {"display": lambda *values: print(*map(shown, values), sep="\n")}
    cells = [cell for cell in nbformat.read(path, 4).cells if cell.cell_type == "code"]
    with contextlib.redirect_stdout(out):
        for cell in cells:
            body = ast.parse(cell.source).body
            if isinstance(body[-1], ast.Expr):  # what a notebook shows below the cell
                body[-1] = ast.Assign([ast.Name("value", ast.Store())], body[-1].value)
            tree = ast.fix_missing_locations(ast.Module(body, []))
            exec(compile(tree, path.name, "exec"), names)
            value = names.pop("value", None)
            if value is not None and not cell.source.rstrip().endswith(";"):
                print(shown(value))
            if "parameters" in cell.metadata.get("tags", []):
                names.update(parameters)
            plt.close("all")
    return out.getvalue()


def turns(question="<image>\nWhat is it?", answer="a boat"):
    return [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]


def sample(task, **more):
    row = {"id": "x", "image": "a.png", "task_name": task, "conversations": turns()}
    return {key: value for key, value in (row | more).items() if value != "absent"}


def tasks_named(names):
    return exploration.tasks_of(pd.DataFrame({"task_name": names}), world.table())


@pytest.fixture
def pictures(tmp_path):
    folder = tmp_path / "my pictures"
    folder.mkdir()
    Image.new("RGB", (9, 9), "red").save(folder / "a.png")
    return folder


@pytest.fixture
def look_at(tmp_path, pictures, monkeypatch):
    """Notebook 01 on rows: writes them to a file and returns what is shown."""

    def build(*_, **__):
        raise AssertionError("a file of one's own needs no mini world")

    monkeypatch.setattr(world, "build", build)
    runs = {"runs": str(tmp_path / "runs"), "samples": "gone.json", "benchmarks": ""}

    def look(rows, changes=runs, **parameters):
        file = tmp_path / "my rows.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        files = dict(samples=str(file), images=str(pictures))
        return run_cells(NOTEBOOKS[0], **files | {"changes": changes} | parameters)

    return look


def test_any_tasks_and_any_rows_are_shown_with_their_counts(look_at, tmp_path):
    """Own names, none, null, a number; rows without turns, text, picture; a preset of one's own."""
    rows = [
        sample("absent", conversations=[]),
        sample(None, conversations="absent"),
        sample("Boats", conversations=[*turns()[:1], {"from": "gpt", "value": None}]),
        sample("boats", image="nowhere.png"),
        sample("boats"),
        sample(7, image=None, conversations=turns("How are you?", "well, and you?")),
        sample(LONG),
    ]
    (tmp_path / "mine.py").write_text(
        "from vflan.config import Preset, replace\n"
        "from vflan.presets.tiny import preset as tiny\n\n\n"
        "def preset():\n"
        f"    return Preset(*(replace(r, runs={str(tmp_path)!r}, samples='gone', benchmarks='')\n"
        "                    for r in tiny()))\n"
    )
    said = look_at(rows, changes={}, preset=str(tmp_path / "mine.py"))
    assert "7 rows: 3 fine, 4 bad, 0 of the fine ones repaired" in said
    assert "7 samples of 5 tasks; 5 of them are in no list" in said
    assert "Groups and categories are not shown" in said
    assert "2 samples have no task_name and count as one task" in said
    assert "missing picture: nowhere.png" in said and "1 ids occur more than once" in said
    assert "3 rows have no answer" in said
    assert "picture without an image token" in said  # a sound row, broken on purpose
    assert "projector: gone is not here, so nothing of it is shown." in said
    assert "question answering" not in said.split("Table 1")[0]


def test_a_file_of_one_text_only_row_is_shown(look_at):
    said = look_at([sample("mine", image=None, conversations=turns("Hello.", "Hello to you."))])
    assert "1 rows: 1 fine" in said and "1 samples of 1 tasks" in said
    assert "tokens, 0 of them learned" not in said


def test_a_file_without_a_sound_row_is_shown(look_at):
    said = look_at([sample("mine", conversations=[])])
    assert "1 rows: 0 fine, 1 bad" in said and "No row of this file is sound" in said


def test_tasks_of_the_paper_and_others_are_placed_and_none_is_left_out():
    """Released names, of which three have no group; names in no list; names that differ in case."""
    listed = plots.task_list().query("task_name != ''")
    free = listed.task_name[listed.group == ""].tolist()[:3]
    known = listed.task_name[listed.group != ""].tolist()[:20]
    names = [*known, *free, known[0].lower(), "", *(f"task {i}" for i in range(300))]
    tasks = tasks_named(names * 2)
    assert sorted(tasks.task_name) == sorted(names) and set(tasks.samples) == {2}
    counts = exploration.task_counts(tasks)
    assert counts.tasks.sum() == len(names) and counts.samples.sum() == 2 * len(names)
    assert counts.loc[plots.NO_GROUP, "tasks"].to_dict() == {
        exploration.NOT_LISTED: 302,
        exploration.NOT_PLACED: 3,
    }
    said = exploration.tasks_in_words(tasks)
    assert "650 samples of 325 tasks; 302 of them are in no list" in said
    assert f"3 are in the list, which gives no group: {', '.join(free)}" in said
    assert "2 samples have no task_name" in said and "and 297 more" in said
    drawn = plots.task_bubbles({"mine": tasks})
    assert "305 of no group" in drawn.axes[0].get_title("left")
    plt.close("all")


@pytest.mark.parametrize("redraw", [None, world.WORLDS["tiny_frozen"]["redraw"]])
def test_the_tasks_of_both_mini_worlds_have_a_group(redraw):
    names = world.table(redraw).query("split == 'train'").task_name
    tasks = tasks_named([*names])
    assert len(exploration.placed(tasks)) == len(names) == 53
    assert list(exploration.beside_paper(tasks).what) == [
        "tasks",
        "fine categories",
        "most instances of a task",
        "largest group",
    ]


def test_names_from_a_file_reach_no_terminal_as_commands():
    tasks = tasks_named(["\x1b[2Jred", "color_of", LONG])
    said = exploration.tasks_in_words(tasks)
    assert "\x1b" not in said and max(map(len, said.splitlines())) < 200


def test_rows_to_look_at_are_those_that_training_takes(tmp_path, pictures):
    rows = [
        sample("a", conversations=[]),
        sample("a", image=None, conversations=turns("Hello.", "Hello.")),
        sample("a", image="nowhere.png"),
        sample("a"),
    ]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    samples = load_samples(tmp_path / "rows.json", pictures)
    assert [row["image"] is None for row in exploration.usable_part(samples, 9)] == [True, False]
    assert len(exploration.usable_part(samples, 9, with_picture=True)) == 1
    assert exploration.sound_sample(samples, check(samples))["image"].endswith("a.png")
    with pytest.raises(ValueError, match="No row can be trained on"):
        exploration.usable_part(samples.select([0, 2]), 2)
    assert exploration.extremes(samples, texture(samples)).text[0] == "a boat"


def test_an_empty_file_is_refused_in_a_sentence(tmp_path):
    (tmp_path / "none.json").write_text("[]")
    with pytest.raises(ValueError, match=r"none\.json holds no rows"):
        exploration.open_samples(preset("tiny").base, str(tmp_path / "none.json"))


def test_samples_and_images_are_found_together_or_apart(tmp_path, pictures):
    """Also what notebook 03 trains on: beside the file, in images/, in a zip, in a named folder."""
    assert {"samples", "images"} <= set(parameter_names(NOTEBOOKS[2]))
    base, file = preset("tiny").base, tmp_path / "rows.json"
    assert data_paths(base, str(file)) == (file, tmp_path)
    (tmp_path / "images").mkdir()
    assert data_paths(base, str(file)) == (file, tmp_path / "images")
    assert data_paths(base, str(file), str(pictures)) == (file, pictures)
    assert data_paths(base)[0] == ROOT / base.samples
    with pytest.raises(FileNotFoundError, match=r"images=.*no such folder or zip"):
        data_paths(base, str(file), str(tmp_path / "gone"))


def test_a_preset_is_known_by_its_recipes_and_not_by_its_name(tmp_path):
    """A file of one's own that reads the mini world gets it; one that is named like it does not."""
    assert world.worlds_of("tiny") == ["tiny"] and world.worlds_of("full_7b") == []
    assert world.worlds_of("tiny_frozen") == ["tiny_frozen"]
    mine = dict(samples="mine.json", benchmarks="mine")
    assert world.worlds_of(preset("tiny", mine)) == [] and is_small(preset("tiny", mine))
    both = dict(more_samples=["data/frozen/samples/chat.json#5"])
    assert world.worlds_of(preset("tiny", both)) == ["tiny", "tiny_frozen"]
    assert not is_small(preset("lora_7b"))
    decides_by_name = ("preset ==", "preset.startswith", "preset in")
    cells = [cell for path in NOTEBOOKS for cell in nbformat.read(path, 4).cells]
    code = [cell.source for cell in cells if cell.cell_type == "code"]
    assert [text for text in code if any(words in text for words in decides_by_name)] == []
