"""Which cells nbval compares, and that it notices a wrong stored number."""

import subprocess
import sys

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_notebook, new_output

from vflan.config import ROOT
from vflan.tools import notebooks, stable

NOTEBOOKS = notebooks.find_notebooks(ROOT / "notebooks")


def notebook(*sources, tags=()):
    """Cells that have all printed the same line; the last one has the tags."""
    printed = [new_output("stream", name="stdout", text="3 samples\n")]
    cells = [new_code_cell(source, outputs=printed, execution_count=1) for source in sources]
    cells[-1].metadata["tags"] = list(tags)
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3"}}
    return new_notebook(cells=cells, metadata=kernel)


def is_checked(*sources, tags=()):
    tagged = stable.tag(notebook(*sources, tags=tags))
    return stable.CHECK in tagged.cells[-1].metadata.get("tags", [])


@pytest.mark.parametrize(
    "before, shown",
    [
        ("run = vflan.train(recipe)", "print(run)"),
        ("run = vflan.train(recipe)", "print(f'{run.summary}')"),
        ("run = vflan.train(recipe)\nrows = []\nrows.append(run)", "rows"),
        ("run = vflan.train(recipe)\nrows = {}\nrows['a'] = run", "len(rows)"),
        ("def score():\n    return vflan.evaluate(run)", "score()"),
        ("done = vflan.sweep(arms)\nfor run in done:\n    pass", "if run:\n    print('better')"),
        ("a = vflan.sweep(arms)", "b = 0\nfor _ in range(2):\n    print(b)\n    b = a"),
        ("if run := vflan.train(recipe):\n    pass", "print(run)"),
        ("print(run := vflan.train(recipe))", "print(run)"),
        ("", "import time\nprint(time.perf_counter())"),
        ("", "list(map(vflan.answer, models))"),
        ("", "%matplotlib inline"),
        ("", "print(3)\nplots.save(fig);"),  # nbval would see the path that the semicolon hides
    ],
)
def test_what_comes_from_training_or_the_clock_is_not_compared(before, shown):
    assert not is_checked(before, shown)


@pytest.mark.parametrize(
    "before, shown",
    [
        ("data = vflan.load_samples(path)", "print(len(data))"),
        ("run = vflan.train(recipe)\nrun = 3", "print(run)"),
        ("run = vflan.train(recipe)", "fig = plots.loss(run)\nplots.paper()"),
        ("import plots\nplots.save(vflan.train(recipe))", "plots.paper()"),
        ("run = vflan.train(recipe)", "[run for run in (1, 2)]"),
        ("print(vflan.train(recipe))", "print(3)"),
        ("", "p.chat, look.answer"),
    ],
)
def test_what_is_the_same_everywhere_is_compared(before, shown):
    assert is_checked(before, shown)


def test_a_person_has_the_last_word_and_tagging_twice_changes_nothing():
    assert is_checked("run = vflan.train(recipe)", "print(run)", tags=[stable.ALWAYS])
    assert not is_checked("print(3)", tags=[stable.NEVER])
    assert not is_checked("print(vflan.train(recipe))", tags=[stable.CHECK])
    once = stable.tag(notebook("print(3)", tags=["parameters"]))
    assert once.cells[0].metadata.tags == ["parameters", stable.CHECK]
    assert stable.tag(once).cells[0].metadata.tags == ["parameters", stable.CHECK]


def test_a_cell_that_only_draws_has_nothing_to_compare():
    drawn = notebook("plots.gallery(data)")
    drawn.cells[0].outputs = [
        new_output("display_data", {"image/png": "AAAA", "text/plain": "<Figure>"})
    ]
    assert stable.count_compared(stable.tag(drawn)) == (0, 0)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem[:2])
def test_each_notebook_carries_the_tags_of_the_rule_on_a_third_of_its_cells(path):
    kept = nbformat.read(path, 4)
    compared, total = stable.count_compared(kept)
    assert compared >= total / 3 > 0
    tags = [cell.metadata.get("tags") for cell in kept.cells]
    assert [cell.metadata.get("tags") for cell in stable.tag(kept).cells] == tags, "vflan tag"


# ---------------------------------------------------------------------- nbval itself


@pytest.fixture
def judged(tmp_path):
    """run(printed, stored): nbval's verdict on a cell that prints one and has stored the other."""

    def run(printed, stored):
        nb = notebook(f"print({printed!r})")
        nb.cells[0].outputs[0].text = stored + "\n"
        nbformat.write(stable.tag(nb), tmp_path / "01_small.ipynb")
        # a process of its own: nbval adds its options to pytest before the first file is read
        options = "-p no:cacheprovider -p no:xdist --nbval-lax --nbval-sanitize-with".split()
        options += [ROOT / "tests/nbval_sanitize.cfg", "--rootdir", tmp_path]
        command = [sys.executable, "-m", "pytest", *options, tmp_path / "01_small.ipynb"]
        done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
        assert done.returncode in (0, 1), done.stdout + done.stderr
        if "Cell outputs differ" in done.stdout:
            return "fails"
        return "broken" if done.returncode else "passes"

    return run


def test_nbval_notices_a_wrong_stored_number(judged):
    assert judged("26500 samples", "26500 samples") == "passes"
    assert judged("26500 samples", "999 samples") == "fails"


def test_times_paths_and_last_digits_may_differ(judged):
    printed = "loaded /somewhere/else/vflan/data/x.json in 3.2 s, loss 0.12345 at 0x7f00aabb"
    assert judged(printed, "loaded data/x.json in 17 s, loss 0.12399 at 0x7f99ccdd") == "passes"
    assert judged(printed, "loaded data/y.json in 17 s, loss 0.12399 at 0x7f99ccdd") == "fails"
