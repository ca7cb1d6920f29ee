"""The pages for those who change, cite or set up vflan: their examples run, and what they name
exists.
"""

import importlib
import inspect
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pandas as pd
import pytest
import yaml

import vflan
from vflan.analysis.sweeps import Arm
from vflan.config import replace, write_json
from vflan.evaluation.benchmarks import BENCHMARKS
from vflan.evaluation.benchmarks.benchmark import Benchmark, clean, metrics
from vflan.evaluation.evaluator import COLUMNS
from vflan.tools.cards import model_card
from vflan.training.run import Run
from vflan.world import tasks

HOME = Path(__file__).resolve().parent.parent
PAGE = (HOME / "CONTRIBUTING.md").read_text(encoding="utf-8")


def examples(title):
    """The Python blocks of a section of the page."""
    (section,) = re.findall(rf"^## {title}\n(.*?)(?=^## |\Z)", PAGE, re.MULTILINE | re.DOTALL)
    return re.findall(r"```python\n(.*?)```", section, re.DOTALL)


@pytest.fixture
def notebook_folder(tmp_path, monkeypatch):
    """An empty folder to work in, as a notebook's; files of it can be imported until the test
    ends.
    """
    folder = tmp_path / "notebook"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(folder)
    before, known = set(sys.modules), dict(BENCHMARKS)
    yield folder
    for name in set(sys.modules) - before:
        if name.startswith("my_"):
            del sys.modules[name]
    for name in set(BENCHMARKS) - set(known):
        del BENCHMARKS[name]
    for name in set(tasks.KINDS) - tasks.SHIPPED:
        del tasks.KINDS[name]


# ------------------------------------------------------------------------- a kind of the mini world


def test_the_kind_of_the_page_gets_into_the_world(notebook_folder, capsys):
    file, use = examples("A task kind of the mini world")
    (notebook_folder / "my_kinds.py").write_text(file)
    small = "absolute(), captions=2, per_kind=1, conversations=2, questions=0.05)"
    exec(use.replace("absolute())", small), {})
    *questions, count = capsys.readouterr().out.splitlines()
    shape = r"Name the surface of the \w+\. -> \w+"
    assert len(questions) == 3 and all(re.fullmatch(shape, line) for line in questions)
    assert int(count.split()[0]) > 0
    assert "shape_and_texture" in set(tasks.table().task_name)


def test_a_world_is_built_again_when_a_kind_of_ones_own_changes(notebook_folder):
    def build():
        return vflan.world.build(
            notebook_folder / "data", captions=2, per_kind=1, conversations=2, questions=0.05
        )

    def new_kind(scene, rng):
        return "How many?", answer

    answer = "one"
    questions = build() / "benchmarks" / "heldout" / "questions.jsonl"
    tasks.kind("counting", split="heldout", in_text=False)(new_kind)
    assert "new_kind" not in questions.read_text()
    build()
    assert questions.read_text().count("How many?") > 0
    answer = "two"
    build()
    assert '"label": "two"' in questions.read_text()


def test_a_kind_with_a_name_in_use_or_an_unknown_category_is_refused():
    def color_of(scene, rng):
        return "?", "!"

    shipped = tasks.KINDS["color_of"]
    with pytest.raises(ValueError, match="already a kind 'color_of', in vflan.world.tasks.objects"):
        tasks.kind("perception")(color_of)
    with pytest.raises(ValueError, match="no category 'colours'; known are perception"):
        tasks.kind("colours")
    assert tasks.KINDS["color_of"] is shipped


def test_a_notebook_cell_that_declares_a_kind_can_be_run_twice(notebook_folder):
    code = "@kind('perception', in_text=False)\ndef mine(scene, rng):\n    return 'a', 'b'\n"
    for _ in range(2):
        exec(code, {"__name__": "__main__", "kind": tasks.kind})
    assert "mine" in tasks.added_kinds()


# ------------------------------------------------------------------------------------- a benchmark


@pytest.fixture
def colours(notebook_folder):
    """The folder of a notebook after the first two steps of the benchmark's walk."""
    file, questions, _ = examples("A benchmark")
    (notebook_folder / "my_benchmark.py").write_text(file)
    exec(questions, {})
    return notebook_folder


def test_the_benchmark_of_the_page_scores_as_the_page_says(capsys, colours):
    scores, majority = capsys.readouterr().out.splitlines()
    code = examples("A benchmark")[1]
    assert scores == re.search(r"# (\{.*\})", code)[1] and majority in code.rsplit("#", 1)[1]


def test_the_benchmark_of_the_page_is_evaluated_swept_and_exported(colours, recipe):
    base = replace(recipe, max_steps=2, benchmarks=str(colours / "benchmarks"))
    run = vflan.train(base)
    arms = {name: Arm(replace(base, name=name)) for name in ("one", "two")}
    names = {"run": run, "arms": arms, "folder": colours / "benchmarks"}
    exec(examples("A benchmark")[2].replace("arms,", "arms, jobs=2,"), names)
    for name in ("base", "one", "two"):
        scores = pd.read_csv(Path(recipe.runs) / name / "scores.csv")
        assert set(scores.benchmark) == {"colours"} and "accuracy/star" in set(scores.metric)
    assert vflan.plots.TITLES["colours"] == "My colours"

    # A process that does not know the benchmark shows what is stored.
    exported = str(colours / "exported")
    script = f"import vflan; vflan.Run.open({str(run.folder)!r}).export({exported!r})"
    environment = os.environ | {"PYTHONPATH": str(HOME)}
    subprocess.run([sys.executable, "-c", script], check=True, env=environment)
    card = (colours / "exported" / "README.md").read_text()
    assert "It was not evaluated" not in card and "| colours | accuracy |" in card
    assert "accuracy/star" not in card


def test_a_benchmark_defined_in_a_notebook_reaches_the_processes_of_a_sweep(colours, recipe):
    """Functions of __main__ cannot be imported there, so their code is sent."""
    code = examples("A benchmark")[0] + '\nvflan.BENCHMARKS["colours"] = COLOURS\n'
    exec(code, {"__name__": "__main__", "vflan": vflan})
    base = replace(recipe, max_steps=1)
    arms = {name: Arm(replace(base, name=name)) for name in ("one", "two")}
    done = vflan.sweep(arms, benchmarks=["colours"], folder=colours / "benchmarks", jobs=2)
    assert len(done.scores[done.scores.metric == "accuracy"]) == 2


@pytest.mark.parametrize(
    "trouble, sentence",
    [
        ("cannot be sent", "'mine' cannot be sent to the processes of a sweep .*jobs=1"),
        ("cannot be loaded", "cannot be loaded in another process .*my_lost.*jobs=1"),
        ("has no questions", "mine does not exist: .*the questions of mine"),
        ("is not known", "There is no benchmark 'mine'; known are .*BENCHMARKS\\['mine'\\]"),
    ],
)
def test_a_sweep_refuses_a_benchmark_before_it_trains(colours, recipe, trouble, sentence):
    parse = clean
    if trouble == "cannot be sent":
        parse = (word for word in ())  # a generator has a state that no process can take over
    if trouble == "cannot be loaded":
        (colours / "my_lost.py").write_text("def parse(answer, sample=None):\n    return answer\n")
        parse = importlib.import_module("my_lost").parse
        (colours / "my_lost.py").unlink()

    def items(samples, answers):
        return metrics("accuracy", [True] * len(samples), samples)

    if trouble != "is not known":
        BENCHMARKS["mine"] = Benchmark("mine", "accuracy", parse, items)
    if trouble != "has no questions":
        (colours / "benchmarks" / "colours").rename(colours / "benchmarks" / "mine")
    arms = {name: Arm(replace(recipe, name=name, max_steps=1)) for name in ("one", "two")}
    with pytest.raises((ValueError, FileNotFoundError), match=sentence):
        vflan.sweep(arms, benchmarks=["mine"], folder=colours / "benchmarks", jobs=2)
    assert not list(Path(recipe.runs).glob("*/recipe.json"))


@pytest.mark.parametrize(
    "code, sentence",
    [
        ("x = 1", "defines no Benchmark"),
        ("import lost_module", "cannot be run: ModuleNotFoundError"),
        (
            "from vflan.evaluation.benchmarks.benchmark import Benchmark\n"
            'MINE = Benchmark("pope", "accuracy", str, str)',
            "'pope' is a benchmark of vflan; choose another name",
        ),
    ],
)
def test_a_file_without_a_benchmark_of_its_own_is_refused(notebook_folder, code, sentence):
    Path("my_benchmark.py").write_text(code)
    pope = BENCHMARKS["pope"]
    with pytest.raises(ValueError, match=sentence):
        BENCHMARKS.names(["my_benchmark.py"])
    with pytest.raises(FileNotFoundError, match="no_such_file.py"):
        BENCHMARKS.names("no_such_file.py")
    assert BENCHMARKS["pope"] is pope


def test_a_benchmark_is_registered_under_its_own_name_only():
    with pytest.raises(ValueError, match="cannot hold a benchmark named 'pope'"):
        BENCHMARKS["mine"] = BENCHMARKS["pope"]
    with pytest.raises(ValueError, match="has to be a Benchmark"):
        BENCHMARKS["mine"] = str
    with pytest.raises(KeyError, match="There is no benchmark 'mine'; known are heldin"):
        BENCHMARKS["mine"]
    assert "mine" not in BENCHMARKS


def test_the_card_of_a_run_has_the_stored_metrics_of_a_benchmark_that_is_not_known(recipe):
    run = Run(recipe.folder)
    run.folder.mkdir(parents=True)
    write_json(run.folder / "recipe.json", recipe.to_dict())
    rows = [
        [run.name, "unheard", m, 50.0, 40.0, 60.0, 2, 0, 10.0, "", 0] for m in ("hits", "hits/a")
    ]
    pd.DataFrame(rows, columns=COLUMNS).to_csv(run.folder / "scores.csv", index=False)
    card = str(model_card(run, "mine"))
    assert "| unheard | hits | 50.0 |" in card and "hits/a" not in card


# --------------------------------------------------------------------------------------- a preset


def test_the_preset_of_the_page_is_one(tmp_path):
    (code,) = examples("A preset")
    (tmp_path / "my_preset.py").write_text(code)
    mine = vflan.preset(str(tmp_path / "my_preset.py"))
    assert (mine.base.lora_r, mine.base.lora_alpha, mine.projector.lora_r) == (64, 128, 0)
    assert {recipe.runs for recipe in mine} == {"runs/lora_7b_small"}


# ---------------------------------------------------------------------------------------- the pages


@pytest.mark.parametrize("page", ["CONTRIBUTING.md", "CHANGELOG.md"])
def test_every_local_link_of_the_pages_leads_somewhere(page):
    text = (HOME / page).read_text(encoding="utf-8")
    for link in re.findall(r"\]\(([^)#\s]+)", text):
        assert "://" in link or (HOME / link).exists(), link
    for name in re.findall(r"`((?:tests|data|vflan|examples)/[\w./]+\.\w+)`", text):
        assert (HOME / name).exists(), name


def test_the_changelog_names_the_version_of_the_package():
    version = tomllib.loads((HOME / "pyproject.toml").read_text())["project"]["version"]
    heads = re.findall(r"^## (.*)$", (HOME / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert heads[0] == "Unreleased" and heads[1].split()[0] == version


def test_the_citation_is_whole_and_names_the_papers_of_the_readme():
    cited = yaml.safe_load((HOME / "CITATION.cff").read_text(encoding="utf-8"))
    assert {
        "cff-version",
        "message",
        "title",
        "authors",
    } <= cited.keys()  # what the format requires
    assert (
        cited["license"]
        == tomllib.loads((HOME / "pyproject.toml").read_text())["project"]["license"]
    )
    readme = (HOME / "README.md").read_text(encoding="utf-8")
    papers = [cited["preferred-citation"], *cited["references"]]
    assert len(papers) == len(re.findall(r"^@article", readme, re.MULTILINE))
    for paper in papers:
        assert paper["title"] in readme and {"type", "title", "authors"} <= paper.keys()
        (number,) = (entry["value"].removeprefix("arXiv:") for entry in paper["identifiers"])
        assert f"arXiv:{number}" in readme
        for author in paper["authors"]:
            assert f"{author['family-names']}, {author['given-names']}" in " ".join(readme.split())


def public():
    """(name, object) of every public name, and of every public method of the classes among them."""
    for name in vflan.__all__:
        value = getattr(vflan, name)
        yield name, value
        if inspect.isclass(value):
            for method, of in vars(value).items():
                if not method.startswith("_") and (
                    inspect.isroutine(of) or isinstance(of, property | classmethod)
                ):
                    yield f"{name}.{method}", of
        if inspect.ismodule(value):
            for function, of in vars(value).items():
                if (
                    not function.startswith("_")
                    and inspect.isfunction(of)
                    and of.__module__ == value.__name__
                ):
                    yield f"{name}.{function}", of


def test_every_public_name_says_what_it_is():
    importlib.import_module("vflan.training.trainer")
    silent = [
        name
        for name, value in public()
        if not isinstance(value, dict) and not (inspect.getdoc(value) or "").strip()
    ]
    assert silent == []
