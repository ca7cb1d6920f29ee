"""The pages for those who change, cite or set up vflan: their examples run, and what they name exists."""

import importlib
import inspect
import re
import tomllib
from pathlib import Path

import pytest
import yaml

import vflan
from vflan.world import tasks

HOME = Path(__file__).resolve().parent.parent
PAGE = (HOME / "CONTRIBUTING.md").read_text(encoding="utf-8")


def example(title):
    (section,) = re.findall(rf"^## {title}\n(.*?)(?=^## |\Z)", PAGE, re.MULTILINE | re.DOTALL)
    (code,) = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    return code


def test_the_task_kind_of_the_page_is_drawn_and_put_into_the_collection(monkeypatch, capsys):
    monkeypatch.setattr(tasks, "KINDS", kinds := dict(tasks.KINDS))
    before = len(kinds)
    exec(example("A task kind of the mini world"), {})
    assert len(kinds) == before + 1 and kinds["shape_and_texture"].split == "heldout"
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 3 and all(
        re.fullmatch(r"Name the surface of the \w+\. -> \w+", line) for line in said
    )
    assert "shape_and_texture" in set(tasks.table().task_name)


def test_the_benchmark_of_the_page_scores_as_the_page_says(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    code = example("A benchmark")
    exec(code, {})
    scores, majority = capsys.readouterr().out.splitlines()
    assert scores == re.search(r"# (\{.*\})", code)[1] and majority in code.rsplit("#", 1)[1]


def test_the_preset_of_the_page_is_one(tmp_path):
    (tmp_path / "mine.py").write_text(example("A preset"))
    mine = vflan.preset(str(tmp_path / "mine.py"))
    assert (mine.base.lora_r, mine.base.lora_alpha, mine.projector.lora_r) == (64, 128, 0)
    assert {recipe.runs for recipe in mine} == {"runs/lora_7b_small"}


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
