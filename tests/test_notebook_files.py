"""The notebooks as files: shape, prose, size; two of them run on real records if present."""

import ast
import contextlib
import io
import re
from pathlib import Path

import nbformat
import papermill
import pytest

from vflan import world
from vflan.config import ROOT
from vflan.tools.clean import LIMIT
from vflan.tools.notebooks import find_notebooks

NOTEBOOKS = find_notebooks(ROOT / "notebooks")


@pytest.fixture(params=NOTEBOOKS, ids=lambda path: path.stem)
def notebook(request):
    nb = nbformat.read(request.param, 4)
    nbformat.validate(nb)
    return nb


def code(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def set_apart(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "markdown"]


def test_the_parameters_are_literals_in_one_tagged_cell_near_the_top(notebook):
    tagged = [
        i for i, cell in enumerate(notebook.cells) if "parameters" in cell.metadata.get("tags", [])
    ]
    assert tagged == [2], "papermill needs one cell tagged parameters, after title and picture"
    values = {}
    for line in ast.parse(notebook.cells[2].source).body:
        # a derived value would not follow an override
        values[line.targets[0].id] = ast.literal_eval(line.value)
    assert list(values.items())[:3] == [("preset", "tiny"), ("num_processes", 1), ("changes", {})]


def test_one_training_a_stage_is_the_default(notebook):
    """What a notebook trains is what `vflan.plan` shows beside it, at 7B as in the mini world."""
    names = [line.split(" = ")[0] for line in notebook.cells[1].source.splitlines()]
    assert "seeds" not in names or "seeds = [0]" in notebook.cells[1].source


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_papermill_explains_every_parameter(path):
    for name, parameter in papermill.inspect_notebook(str(path)).items():
        assert len(parameter["help"]) > 10, f"{name} wants a line of comment behind it"


def test_it_opens_with_a_title_and_one_question(notebook):
    first = notebook.cells[0]
    assert first.cell_type == "markdown" and first.source.startswith("# ")
    question = re.findall(r"^\*\*.+?\*\*$", first.source, re.MULTILINE | re.DOTALL)
    assert len(question) == 1 and question[0].endswith("?**")
    for word in ("Paper:", "Reads:", "Writes:"):
        assert word in first.source


def test_it_opens_with_a_picture(notebook):
    assert "plots.opening(" in notebook.cells[1].source
    (output,) = notebook.cells[1].outputs
    assert {"image/jpeg", "image/svg+xml"} & output.data.keys()


def test_it_imports_few_names_of_vflan(notebook):
    """At most eight, all from `vflan` itself: a reader need not know the rooms."""
    text = "\n".join(cell.source for cell in code(notebook)[1:])
    names = [
        (node.module, alias.name)
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.ImportFrom) and node.module.startswith("vflan")
        for alias in node.names
    ]
    assert {module for module, _ in names} == {"vflan"} and len(names) <= 8, names


SOLUTION = re.compile(r"```python\n(.*?)```\s+```text\n(.*?)```", re.DOTALL)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_the_solutions_of_the_exercises_print_what_they_say(path, monkeypatch):
    nb = nbformat.read(path, 4)
    (cell,) = (c.source for c in set_apart(nb) if c.source.startswith("## Exercises"))
    solutions = SOLUTION.findall(cell)
    assert len(solutions) == cell.count("**Exercise ") == cell.count("<details>") >= 2
    monkeypatch.chdir(ROOT)
    world.build_for("tiny")
    for number, (source, printed) in enumerate(solutions, 1):
        with contextlib.redirect_stdout(io.StringIO()) as said:
            exec(compile(source, f"exercise {number}", "exec"), {"__name__": "exercise"})
        assert said.getvalue().strip() == printed.strip(), f"exercise {number}"


def test_it_opens_anywhere_and_holds_no_widget_state(notebook):
    assert notebook.metadata.kernelspec.name == "python3"
    assert "widgets" not in notebook.metadata and "papermill" not in notebook.metadata


def test_code_comes_in_small_pieces_between_prose(notebook):
    cells = code(notebook)
    lines = [sum(bool(line.strip()) for line in cell.source.splitlines()) for cell in cells]
    assert max(lines) <= 20, f"a cell of {max(lines)} lines: move it into the package"
    assert 20 <= len(notebook.cells) <= 55
    prose, source = (
        sum(len(cell.source) for cell in some) for some in (set_apart(notebook), cells)
    )
    assert prose >= 0.35 * (prose + source), "too little prose"


def test_what_the_paper_says_stands_apart_and_is_answered(notebook):
    prose = [cell.source for cell in set_apart(notebook)]
    assert any(re.search(r"^> ", text, re.MULTILINE) for text in prose), (
        "the paper's claims are blockquotes"
    )
    assert any("the paper says" in text.lower() and text.startswith("## ") for text in prose)


@pytest.mark.parametrize("path", NOTEBOOKS[5:], ids=lambda path: path.stem)
def test_the_long_notebooks_read_what_is_committed_and_train_one_small_arm(path):
    nb = nbformat.read(path, 4)
    assert 'live = "small"' in nb.cells[2].source
    cells = [cell.source for cell in nb.cells]
    verdicts = next(i for i, text in enumerate(cells) if "shown_verdicts(claims.committed" in text)
    training = next(i for i, text in enumerate(cells) if "vflan.sweep(" in text)
    assert verdicts < training, "the committed verdicts come before anything is trained"


@pytest.mark.parametrize("path", NOTEBOOKS[1:], ids=lambda path: path.stem)
def test_a_notebook_that_trains_ends_with_what_it_ran_and_what_it_read(path):
    nb = nbformat.read(path, 4)
    sweeps = {
        name for cell in code(nb) for name in re.findall(r"(\w+) = vflan\.sweep\(", cell.source)
    }
    (listed,) = (cell.source for cell in code(nb) if "claims.account(" in cell.source)
    listed = listed[listed.index("claims.account(") :]
    assert sweeps <= set(re.findall(r"\w+", listed))


def test_outputs_hold_no_error_and_no_path_of_a_machine(notebook):
    for cell in code(notebook):
        for output in cell.outputs:
            assert output.output_type != "error"
            text = str(
                [
                    output.get("text"),
                    *[v for k, v in output.get("data", {}).items() if k.startswith("text/")],
                ]
            )
            assert str(Path.home()) + "/" not in text and str(ROOT) + "/" not in text


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_is_small_enough_for_github(path):
    assert path.stat().st_size < LIMIT


# ---------------------------------------------------------------------- on real records


@pytest.fixture
def records(shared, monkeypatch):
    """The path of real records with pictures, for a kernel with this checkout and one thread."""
    path = shared / "vision_flan_samples" / "annotation.json"
    if not path.is_file():
        pytest.skip("needs shared/vision_flan_samples beside the repository")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    return str(path)


def run(start, target, **parameters):
    import papermill

    (path,) = (path for path in NOTEBOOKS if path.name.startswith(start))
    options = dict(kernel_name="python3", progress_bar=False, cwd=str(path.parent))
    papermill.execute_notebook(str(path), str(target), parameters=parameters, **options)
    return "\n".join(
        output.get("text", "") or output.get("data", {}).get("text/plain", "")
        for cell in code(nbformat.read(target, 4))
        for output in cell.outputs
    )


def test_notebook_01_shows_real_records(records, tmp_path):
    said = run("01", tmp_path / "01.ipynb", samples=records)
    assert (
        "158 rows: 158 fine" in said
        and "158 samples of 158 tasks; 0 of them are in no list" in said
    )


def test_notebook_03_tunes_on_real_records(records, tmp_path):
    world.build(
        tmp_path / "world", captions=10, per_kind=1, conversations=5, questions=0.1
    )  # few questions to answer
    small = dict(
        runs=str(tmp_path), benchmarks=str(tmp_path / "world" / "benchmarks"), num_samples=160
    )
    small |= dict(max_steps=24, global_batch=8, micro_batch=8)
    images = str(Path(records).with_name("images"))
    files = dict(samples=records, images=images)
    said = run("03", tmp_path / "03.ipynb", **files, changes=small, seeds=[0])
    assert "158 samples of 158 tasks" in said and (tmp_path / "own-base" / "done.json").is_file()
