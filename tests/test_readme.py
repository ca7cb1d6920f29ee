"""README.md says nothing that the repository does not hold: links, commands, names, the import list, and its tables."""

import ast
import importlib.util
import json
import re
import shutil
import subprocess
from pathlib import Path

import pandas as pd
import pytest
import typer
from test_layout import ROOMS

import vflan
from vflan.__main__ import app, main
from vflan.analysis import tables
from vflan.analysis.claims import floors
from vflan.config import _FIELDS, Preset, preset_names
from vflan.world import chats

HOME = Path(__file__).resolve().parent.parent
PAGE = (HOME / "README.md").read_text(encoding="utf-8")
PYTHON = re.findall(r"^ *```python\n(.*?)^ *```$", PAGE, re.MULTILINE | re.DOTALL)
RESULTS = (HOME / "data/results/tiny.csv").exists()
LINKS = sorted({link for link in re.findall(r"\]\(([^)#\s]+)", PAGE) if "://" not in link})
COLUMNS = ["run", "benchmark", "metric", "value", "low", "high", "n", "seed", "baseline"]


def dedent(code):
    return re.sub(r"^ {3}", "", code, flags=re.MULTILINE) if code.startswith("   ") else code


@pytest.mark.parametrize("link", LINKS)
def test_every_local_link_leads_somewhere(link):
    if not RESULTS and link.startswith(("notebooks/", "figures/")) and not (HOME / link).exists():
        pytest.skip("the notebooks have not been pressed yet: data/results/tiny.csv is not there")
    assert (HOME / link).exists()


def test_every_promise_names_a_test_that_is_there():
    rows = re.findall(
        r"^\| (.+?) \| \[\w+\.py\]\(tests/([\w/]+\.py)\): `(\w+)` \| (.*?) \|$", PAGE, re.MULTILINE
    )
    assert len(rows) >= 15
    for _, file, name, _ in rows:
        assert f"def {name}(" in (HOME / "tests" / file).read_text(encoding="utf-8"), (
            f"{file}: {name}"
        )


@pytest.mark.parametrize(
    "target", sorted(set(re.findall(r"(?:`|^    )make (\w+)", PAGE, re.MULTILINE)))
)
def test_every_make_target_exists(target):
    assert re.search(rf"^{target}:", (HOME / "Makefile").read_text(), re.MULTILINE)


@pytest.mark.parametrize(
    "module", sorted(set(re.findall(r"python -m ((?:vflan|bench)[\w.]*)", PAGE)))
)
def test_every_module_that_is_run_exists_and_can_be_run(module):
    spec = importlib.util.find_spec(module)
    if spec and spec.submodule_search_locations:  # a package is run by its __main__
        spec = importlib.util.find_spec(f"{module}.__main__")
    assert spec and '__name__ == "__main__"' in Path(spec.origin).read_text(encoding="utf-8")


def test_every_command_of_the_text_is_one():
    pages = [
        PAGE,
        *(
            (HOME / name).read_text(encoding="utf-8")
            for name in ("CONTRIBUTING.md", "data/README.md")
        ),
    ]
    named = {
        name for page in pages for name in re.findall(r"(?:`|^    )vflan (\w+)", page, re.MULTILINE)
    }
    assert {"notebooks", "doctor"} <= named <= set(typer.main.get_command(app).commands)


def test_papermill_lines_name_notebooks_parameters_and_presets_that_exist():
    lines = re.findall(r"papermill (\S+) \S+(.*)", PAGE)
    assert len(lines) > 1
    for notebook, options in lines:
        assert notebook in LINKS
        assert set(re.findall(r"-p (\w+)|-y \"(\w+):", options)) <= {
            ("preset", ""),
            ("num_processes", ""),
            ("", "changes"),
        }
        assert set(re.findall(r"preset (\w+)", options)) <= set(preset_names())
        assert set(re.findall(r"[{,] ?(\w+):", options)) <= set(_FIELDS)


@pytest.mark.parametrize("code", PYTHON, ids=range(len(PYTHON)))
def test_python_compiles_and_names_only_what_vflan_has(code):
    for node in ast.walk(ast.parse(dedent(code))):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            known = {"vflan": vflan.__all__, "p": Preset._fields}.get(node.value.id)
            assert known is None or node.attr in known
            assert (
                callable(getattr(vflan, node.attr, None))
                or node.value.id != "vflan"
                or node.attr == "world"
            )
        if (
            isinstance(node, ast.Call)
            and getattr(node.func, "attr", getattr(node.func, "id", "")) == "replace"
        ):
            assert {keyword.arg for keyword in node.keywords} - {None} <= set(_FIELDS)


def test_the_example_is_five_lines_that_end_in_scores():
    *_, last = example = [line for line in PYTHON[0].splitlines() if " = vflan." in line]
    assert len(example) == 5 and last.startswith("scores = vflan.evaluate(chat)")
    assert re.search(r"DataFrame: (.*)", last)[1].split(", ") == [*COLUMNS, "judge", "problems"]


def test_names_in_the_text_exist():
    for name in set(re.findall(r"\bvflan\.([A-Za-z]\w*)", PAGE)):
        assert name in vflan.__all__ or importlib.util.find_spec(f"vflan.{name}"), name


def test_the_preset_of_the_text_is_one(tmp_path):
    (code,) = (code for code in PYTHON if "def preset():" in code)
    (tmp_path / "mine.py").write_text(code)
    mine, published = vflan.preset(str(tmp_path / "mine.py")), vflan.preset("full_13b")
    assert mine.base.samples.endswith("vision_flan.json") and mine.base.lr == published.base.lr
    assert [r.samples for r in (mine.projector, mine.chat)] == [
        r.samples for r in (published.projector, published.chat)
    ]
    assert {r.runs for r in mine}.isdisjoint({r.runs for r in published})


def test_every_preset_has_its_row():
    assert set(re.findall(r"\(vflan/presets/(\w+)\.py\)", PAGE)) == set(preset_names())


def test_the_import_list_is_the_one_that_is_tested():
    (block,) = re.findall(
        r"(?:^    \w+ {2,}.*\n)+", PAGE.split("## How it is laid out")[1], re.MULTILINE
    )[:1]
    assert [line.split()[0] for line in block.splitlines()] == ROOMS


def test_the_stated_error_rates_are_those_of_the_code():
    stated = re.findall(r"`([A-Z]+)` = ([\d.]+)", PAGE)
    assert {name for name, _ in stated} == {"INVENT", "RECOLOR", "DENY"}
    assert all(getattr(chats, name) == float(rate) for name, rate in stated)


# ----------------------------------------------------------------------------------------------------------- the tables


def test_the_tables_are_what_the_results_give(tmp_path):
    if not tables.readme_tables(HOME):
        pytest.skip(
            "there are no results yet: make publish writes data/results/tiny.csv, make bench bench/results/demo.json"
        )
    listed = subprocess.run(
        ["git", "ls-files", "-z"], cwd=HOME, capture_output=True, text=True
    ).stdout.split("\0")
    for kept in [
        name for name in listed if name.startswith(("README.md", "data/results/", "bench/results/"))
    ]:
        if (HOME / kept).exists():
            (tmp_path / kept).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(HOME / kept, tmp_path / kept)
    tables.fill_readme(tmp_path)
    assert (tmp_path / "README.md").read_text(encoding="utf-8") == PAGE, (
        "run vflan publish --readme"
    )


def scores(*rows):
    """Rows (run, benchmark, metric, value, seed) with an interval of +-2 and a baseline of 50."""
    return pd.DataFrame(
        [(r, b, m, v, v - 2, v + 2, 100, seed, 50) for r, b, m, v, seed in rows], columns=COLUMNS
    )


@pytest.fixture
def home(tmp_path):
    (tmp_path / "README.md").write_text(
        "above\n<!-- scores:begin -->\nold\n<!-- scores:end -->\nbetween\n<!-- cost:begin -->\nold\n<!-- cost:end -->\nend\n"
    )
    (tmp_path / "data/results").mkdir(parents=True)
    (tmp_path / "bench/results").mkdir(parents=True)
    return tmp_path


def test_without_results_the_page_stays_as_it_is(home, tmp_path_factory):
    before = (home / "README.md").read_text()
    assert tables.fill_readme(home) == [] and (home / "README.md").read_text() == before
    assert tables.fill_readme(tmp_path_factory.mktemp("empty")) == []


def test_tables_are_filled_between_their_markers_and_only_there(home):
    made_up = scores(
        ("base", "pope", "f1", 80.0, 0), ("base-seed1", "pope", "f1", 90.0, 1), ("base", "pope", "yes_ratio", 50.0, 0),
        ("chat", "pope", "f1", 70.0, 0), ("elsewhere", "pope", "f1", 1.0, 7), ("base", "heldin", "accuracy", 95.0, 0),
        ("projector", "mme", "score", 51.26, 0), ("base", "forgetting", "accuracy", 60.0, 0),
    )  # fmt: skip
    made_up.to_csv(home / "data/results/tiny.csv", index=False)
    judged = floors(made_up)
    judged.to_csv(home / "data/results/tiny_floors.csv", index=False)
    assert tables.fill_readme(home) == ["scores"]
    text = (home / "README.md").read_text()
    assert "| held-in tasks accuracy, % | 50.0 |  | 95.0 [93.0, 97.0] |  |  |  |" in text
    assert (
        "| POPE F1 | 50.0 |  | 85.0 [78.0, 92.0] | 70.0 [68.0, 72.0] | 85.9 | 86.1 |" in text
    )  # the mean of two seeds
    assert (
        "| MME score | 50.0 | 51.3 [49.3, 53.3] |  |  | 76.9 | 74.5 |" in text
    )  # the paper's points as percent
    assert "(87.2) | (84.0) |" in text  # known second-hand
    assert "Seeds trained: 0, 1;" in text and "elsewhere" not in text
    assert "| Base answers held-in tasks | 80 or more | 95.0 | 95.0 | 50.0 |  | yes |" in text
    assert f"1 of {len(judged)} floors hold." in text
    assert (
        text.startswith("above\n<!-- scores:begin -->\n| benchmark |")
        and "old\n<!-- scores" not in text
    )
    assert text.endswith(
        "<!-- scores:end -->\nbetween\n<!-- cost:begin -->\nold\n<!-- cost:end -->\nend\n"
    )
    tables.fill_readme(home)
    assert (home / "README.md").read_text() == text  # the same results fill the same page


def test_a_floor_that_fails_stands_out_and_one_that_is_shown_is_not_judged():
    made_up = scores(
        ("base", "heldin", "accuracy", 30.0, 0), ("base", "forgetting", "accuracy/digits", 9.0, 0)
    )
    text = tables.floors_markdown(floors(made_up))
    assert (
        "| **no** |" in text and "| not judged |" in text and text.endswith("0 of 1 floors hold.")
    )


def test_the_cost_says_what_it_was_measured_on(home):
    checks = [
        dict(
            name="demo_minutes",
            value=12.34,
            unit="min",
            target="at most 30",
            holds=True,
            commit="abc1234",
        ),
        dict(
            name="matmul_gflops", value=40.0, unit="GFLOPS", target="", holds=None, commit="abc1234"
        ),
    ]
    machine = dict(cpu="some CPU", cores=2, memory_gb=8.0, load_at_start=0.1)
    record = dict(machine=machine, versions=dict(python="3.11.9", torch="2.13.0"), checks=checks)
    (home / "bench/results/demo.json").write_text(json.dumps(record))
    assert tables.fill_readme(home) == ["cost"]
    text = (home / "README.md").read_text()
    assert "| `make demo`, minutes without installing | 12.3 | at most 30 |" in text
    assert (
        "GFLOPS | 40.0 |  |" in text
        and "abc1234 on some CPU, 2 cores, 8.0 GB" in text
        and "torch 2.13.0." in text
    )


def test_a_bench_that_fails_or_was_not_run_says_so():
    row = dict(unit="s", target="at most 1", commit="abc1234")
    checks = [
        dict(name="open_seconds", value=2.5, holds=False, **row),
        dict(name="gpu", value="not measured", holds=None, **row),
    ]
    machine = dict(cpu="some CPU", cores=2, memory_gb=8.0, load_at_start=0.1)
    text = tables.bench_markdown(
        {"data": dict(machine=machine, versions=dict(torch="2.13.0"), checks=checks)}
    )
    assert "| data: open_seconds | 2.5 | s | at most 1 | **no** |" in text
    assert (
        "| data: gpu | not measured | s | at most 1 |  |" in text
        and "`python -m bench.data` at abc1234" in text
    )


def test_a_page_without_its_markers_is_an_error_that_names_them(home):
    scores(("base", "pope", "f1", 80.0, 0)).to_csv(home / "data/results/tiny.csv", index=False)
    (home / "README.md").write_text("no markers")
    with pytest.raises(ValueError, match="scores:begin"):
        tables.fill_readme(home)


def test_the_tables_can_be_filled_without_running_anything(home, monkeypatch, capsys):
    monkeypatch.setattr(tables, "ROOT", home)
    main(["publish", "--readme"])
    assert capsys.readouterr().out == "README.md: no results yet, nothing filled\n"
