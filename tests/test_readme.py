"""What the pages say is true: links, commands, names, numbers, promises, tables."""

import ast
import importlib.util
import json
import re
import shlex
import shutil
import subprocess
from functools import cache
from pathlib import Path
from textwrap import dedent

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
from vflan.world.tasks import KINDS

HOME = Path(__file__).resolve().parent.parent
# Every page in Markdown, as a path relative to the project.
PAGES = sorted(
    path.relative_to(HOME).as_posix()
    for pattern in ("*.md", "docs/*.md", "data/*.md", "notebooks/**/*.md", "figures/**/*.md")
    for path in HOME.glob(pattern)
)
# The list of changes names modules and commands that are gone.
TODAY = [page for page in PAGES if page != "CHANGELOG.md"]
RESULTS = (HOME / "data/results/tiny.csv").exists()
COLUMNS = ["run", "benchmark", "metric", "value", "low", "high", "n", "seed", "baseline"]


@cache
def text_of(page):
    return (HOME / page).read_text(encoding="utf-8")


def matches(pattern, pages=TODAY):
    """[(page, match)] of a pattern on all pages, each once, in order."""
    return sorted({(p, m) for p in pages for m in re.findall(pattern, text_of(p), re.MULTILINE)})


def python_of(page):
    """The blocks of Python on a page."""
    blocks = re.findall(r"^ *```python\n(.*?)^ *```$", text_of(page), re.MULTILINE | re.DOTALL)
    return [dedent(block) for block in blocks]


def anchors(page):
    """The addresses that GitHub gives to the headings of a page."""
    heads = re.findall(r"^#+ (.*)$", text_of(page), re.MULTILINE)
    plain = [re.sub(r"\]\([^)]*\)", "", head) for head in heads]
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in plain}


# -------------------------------------------------------------------------------------- the pages


@pytest.mark.parametrize("page, link", matches(r"\]\(([^)\s]+)\)", PAGES))
def test_every_link_is_relative_and_leads_somewhere(page, link):
    if "://" in link:
        return
    file, _, anchor = link.partition("#")
    target = (HOME / page).parent / file if file else HOME / page
    if not RESULTS and not target.exists() and re.search("figures/|notebooks/", link):
        pytest.skip("the notebooks were not published yet: data/results/tiny.csv is missing")
    assert not file.startswith("/") and target.exists()
    if anchor:
        assert anchor in anchors(target.resolve().relative_to(HOME).as_posix())


@pytest.mark.parametrize("page, alternative", matches(r"!\[([^\]]*)\]\(", PAGES))
def test_every_picture_has_a_text_in_its_place(page, alternative):
    assert len(alternative) >= 20


@pytest.mark.parametrize("page", PAGES)
def test_no_placeholder_is_left(page):
    assert re.findall(r"\bREPO\b|\bTODO\b|\bFIXME\b|\bXXX\b", text_of(page)) == []


@pytest.mark.parametrize("preset, page", [("tiny", ""), ("tiny_frozen", "tiny_frozen/")])
def test_the_pages_of_figures_are_what_the_figures_give(preset, page, tmp_path):
    shutil.copytree(HOME / "figures" / preset, folder := tmp_path / preset)
    tables.write_gallery(preset, folder, tmp_path / page / "README.md")
    assert (tmp_path / page / "README.md").read_text() == text_of(f"figures/{page}README.md")


def prose(page):
    """The lines of a page that are neither a table, a picture, a heading nor code."""
    text = re.sub(r"^ *```.*?^ *```$", "", text_of(page), flags=re.MULTILINE | re.DOTALL)
    return [line for line in text.splitlines() if not re.match(r"[|!#]|    ", line)]


@pytest.mark.parametrize("page", PAGES)
def test_no_line_of_prose_is_longer_than_120_characters(page):
    # A picture's text and place stand on one line.
    lines = [line for line in prose(page) if not line.startswith("![")]
    assert [line for line in lines if len(line) > 120] == []


def test_the_readme_is_short():
    assert len(text_of("README.md").splitlines()) <= 150


def test_the_readme_links_every_page_of_docs():
    direct = set(re.findall(r"\]\((docs/\w+\.md)", text_of("README.md")))
    assert direct == {page for page in PAGES if page.startswith("docs/")}


# ------------------------------------------------------------------------- commands and file names


@pytest.mark.parametrize("page, target", matches(r"(?:`|^    )make (\w[\w-]*)"))
def test_every_make_target_exists(page, target):
    assert re.search(rf"^{target}:", (HOME / "Makefile").read_text(), re.MULTILINE)


@pytest.mark.parametrize("page, module", matches(r"python -m ((?:vflan|bench)[\w.]*)"))
def test_every_module_that_is_run_exists_and_can_be_run(page, module):
    spec = importlib.util.find_spec(module)
    if spec and spec.submodule_search_locations:  # a package is run by its __main__
        spec = importlib.util.find_spec(f"{module}.__main__")
    assert spec and '__name__ == "__main__"' in Path(spec.origin).read_text(encoding="utf-8")


def commands():
    """[(page, command line)] of vflan, in code spans and in indented blocks, without comments."""
    spans = matches(r"`(vflan [a-z][^`]*)`") + matches(r"^    (vflan [a-z].*)$")
    return [(page, re.sub(r"\s+# .*", "", line)) for page, line in spans]


@pytest.mark.parametrize("page, line", commands())
def test_every_command_line_of_vflan_names_a_command_and_its_options(page, line):
    _, name, *arguments = shlex.split(line)
    command = typer.main.get_command(app).commands[name]
    known = {option for parameter in command.params for option in parameter.opts}
    assert {word for word in arguments if word.startswith("-")} <= known


def test_the_pages_show_the_commands_that_a_reader_needs():
    shown = {line.split()[1] for _, line in commands()}
    assert {"notebooks", "doctor", "download", "check", "train", "score", "publish"} <= shown


@pytest.mark.parametrize(
    "page, name", matches(r"`((?:tests|data|vflan|examples|bench|docs|figures)/[\w./-]+)`")
)
def test_every_file_that_a_page_names_exists(page, name):
    places = [HOME / name, HOME / "vflan" / name]  # data/decontamination.py is in vflan/
    # Real data, the mini world and caches are made or downloaded; git does not hold them.
    made = re.match(r"data/(cache|frozen|benchmarks|tiny/(samples|benchmarks))(/|$)", name)
    assert made or any(place.exists() for place in places)


def test_papermill_lines_name_notebooks_parameters_and_presets_that_exist():
    lines = matches(r"^(?:    )?papermill (\S+) \S+(.*)$")
    assert len({page for page, _ in lines}) > 1
    for _, (notebook, options) in lines:
        assert (HOME / notebook).exists()
        assert set(re.findall(r"-p (\w+)|-y \"\{?(\w+):", options)) <= {
            ("preset", ""),
            ("num_processes", ""),
            ("projector", ""),
            ("", "changes"),
            ("", "seeds"),
        }
        assert set(re.findall(r"preset (\w+)", options)) <= set(preset_names())
        assert set(re.findall(r"[{,] ?(\w+):", options)) <= {*_FIELDS, "seeds"}


# ------------------------------------------------------------------------------------- the Python

BLOCKS = [(page, code) for page in TODAY for code in python_of(page)]


@pytest.mark.parametrize("page, code", BLOCKS, ids=range(len(BLOCKS)))
def test_python_compiles_and_names_only_what_vflan_has(page, code):
    known_of = {"vflan": vflan.__all__, "p": Preset._fields}
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            known = known_of.get(node.value.id)
            assert known is None or node.attr in known
        if isinstance(node, ast.ImportFrom) and node.module.startswith("vflan"):
            module = importlib.import_module(node.module)
            assert all(hasattr(module, alias.name) for alias in node.names)
        called = getattr(node, "func", None)
        if getattr(called, "attr", getattr(called, "id", "")) == "replace":
            assert {keyword.arg for keyword in node.keywords} - {None} <= set(_FIELDS)


def test_the_example_is_five_lines_that_end_in_scores():
    *_, last = example = [
        line for line in python_of("README.md")[0].splitlines() if " = vflan." in line
    ]
    assert len(example) == 5 and last.startswith("scores = vflan.evaluate(chat)")
    assert re.search(r"DataFrame: (.*)", last)[1].split(", ") == [*COLUMNS, "judge", "problems"]


@pytest.mark.parametrize("page, name", matches(r"\bvflan\.([A-Za-z]\w*)(?!\w|/|\.mplstyle)"))
def test_every_name_of_vflan_in_the_text_exists(page, name):
    assert name in vflan.__all__ or importlib.util.find_spec(f"vflan.{name}")


def test_the_preset_of_the_text_is_one(tmp_path):
    (code,) = (code for code in python_of("docs/real_data.md") if "def preset():" in code)
    (tmp_path / "mine.py").write_text(code)
    mine, published = vflan.preset(str(tmp_path / "mine.py")), vflan.preset("full_13b")
    assert mine.base.samples.endswith("vision_flan.json") and mine.base.lr == published.base.lr
    assert [r.samples for r in (mine.projector, mine.chat)] == [
        r.samples for r in (published.projector, published.chat)
    ]
    assert {r.runs for r in mine}.isdisjoint({r.runs for r in published})


def test_every_preset_has_its_row():
    named = re.findall(r"\(vflan/presets/(\w+)\.py\)", text_of("README.md"))
    assert sorted(named) == sorted(preset_names())


def test_the_list_of_rooms_is_the_one_that_is_tested():
    section = text_of("README.md").split("## The code")[1]
    (block,) = re.findall(r"(?:^    \w+ {2,}.*\n)+", section, re.MULTILINE)
    assert [line.split()[0] for line in block.splitlines()] == ROOMS


def test_every_file_of_the_package_has_its_line_in_the_architecture():
    sections = re.split(r"^## ", text_of("docs/architecture.md"), flags=re.MULTILINE)
    for section in sections:
        listed = set(re.findall(r"^\| `([\w./]+)` \|", section, re.MULTILINE))
        room = re.match(r"(vflan/\w+)/$", section.splitlines()[0])
        outside = section.startswith("Outside the rooms")
        if not room and not outside:
            continue
        folder = HOME / (room[1] if room else "vflan")
        there = {path.name for path in folder.iterdir() if path.suffix == ".py" or path.is_dir()}
        there -= {"__init__.py", "__main__.py", "__pycache__"}
        if outside:  # the rooms have sections of their own
            there -= {
                part.split("/")[1] for part in re.findall(r"^vflan/\w+", "\n".join(sections), re.M)
            }
        assert {name.rstrip("/") for name in listed} == there, folder


# ------------------------------------------------------------------------- promises and numbers


def test_every_promise_names_a_test_that_is_there():
    rows = re.findall(
        r"^\| (.+?) \| \[\w+\.py\]\(\.\./tests/([\w/]+\.py)\): `(\w+)` \| (.*?) \|$",
        text_of("docs/guarantees.md"),
        re.MULTILINE,
    )
    assert len(rows) == text_of("docs/guarantees.md").count("](../tests/") >= 20
    benches = {path.stem: json.loads(path.read_text()) for path in measured()}
    for _, file, name, figures in rows:
        assert f"def {name}(" in (HOME / "tests" / file).read_text(encoding="utf-8"), name
        for group in filter(None, figures.split("; ")):
            bench, names = group.split(": ")
            assert set(names.split(", ")) <= {row["name"] for row in benches[bench]["checks"]}


def measured():
    return sorted((HOME / "bench/results").glob("*.json"))


def value(bench, name):
    """What a bench measured."""
    record = json.loads((HOME / f"bench/results/{bench}.json").read_text(encoding="utf-8"))
    return next(row["value"] for row in record["checks"] if row["name"] == name)


def words(page):
    """The text of a page in one line."""
    return " ".join(text_of(page).split())


def test_the_numbers_of_the_readme_are_measured():
    text = words("README.md")
    assert f"LoRA trains {value('gpu', 'lora_speedup'):.1f} times" in text
    assert f"evaluation is {value('gpu', 'evaluate_speedup'):.0f} times" in text
    assert f"in {value('demo', 'demo_minutes'):.0f} minutes" in text
    # Twenty benchmarks of the papers, and two of the mini world's own.
    assert len(set(vflan.BENCHMARKS) - {"heldin", "heldout"}) == 20 and "**Twenty" in text
    claims = pd.read_csv(HOME / "data/claims.csv", dtype={"claim": str}).claim
    assert claims.str.isdigit().sum() == 10 and "**Ten claims" in text


def test_the_numbers_of_the_gpu_are_measured():
    text = words("docs/measurements.md")
    for name, shown in {
        "lora_tokens_s": "{:,.0f}",
        "full_tokens_s": "{:,.0f}",
        "baseline_tokens_s": "{:,.0f}",
        "lora_mfu": "{:.2f}",
        "full_mfu": "{:.2f}",
        "lora_gb": "{:.1f}",
        "full_gb": "{:.1f}",
        "qlora_gb": "{:.1f} GB with rows",
        "qlora_tokens_s": "{:,.0f} tokens/s",
        "evaluate_questions_s": "{:.0f} questions a second",
        "evaluate_speedup": "{:.0f} times",
        "single_questions_s": "it answers {:.0f} a second",
        "packed_error_fp32": "{:.1e}",
    }.items():
        number = shown.format(value("gpu", name)).replace("e-07", "e-7")
        assert number in text.split("## On a GPU")[1], name


def test_the_claims_in_words_are_the_verdicts():
    found = pd.read_csv(HOME / "data/results/claims_tiny.csv", dtype={"claim": str})
    found, text = found.set_index("claim"), words("docs/results.md")
    whole = found[found.index.str.isdigit()].verdict.value_counts()
    counts = whole["holds"], whole["holds weakly"], whole["does not hold at this scale"]
    assert counts == (8, 1, 1)
    assert "Eight of the ten claims hold, one holds weakly, and one does not." in text
    assert f"is {found.effect['5a']:.0f} points (5a)" in text
    assert f"as Chat has {found.effect['5b']:.0f} (5b)" in text
    assert f"by {found.effect['4c']:.0f} points (4c)" in text
    assert f"correlate by {found.effect['7b'] / 100:.3f} (7b)" in text
    seeds = pd.to_numeric(found.n_seeds)
    assert seeds["1"] == 10 and seeds.min() == 6
    # The means behind the sentences.
    scores = pd.read_csv(HOME / "data/results/tiny_sweeps.csv")
    mean = scores.groupby(["run", "benchmark", "metric"]).value.mean().round(0).astype(int)
    mmbench = [mean[run, "mmbench", "accuracy"] for run in ("base", "chat")]
    assert "MMBench falls from {} to {}".format(*mmbench) in text
    assert f"100 bring {mean['chat-100', 'llava_bench', 'format']} % of answers" in text
    read = [mean[run, "textocr", "recall"] for run in ("from-projector-3000", "base", "chat")]
    assert "reads {} % of the words in pictures, Base {} %, Chat {} %".format(*read) in text
    named = [mean[run, "wit", "coverage_capitalised"] for run in ("base", "chat")]
    assert "of the entities, Base {} %, Chat {} %".format(*named) in text


def test_the_numbers_of_the_mini_world_are_those_of_the_code():
    stated = re.findall(r"`([A-Z]+)` = ([\d.]+)", text_of("docs/decisions.md"))
    assert {name for name, _ in stated} == {"INVENT", "RECOLOR", "DENY"}
    assert all(getattr(chats, name) == float(rate) for name, rate in stated)
    new_in_both = [k for k in KINDS.values() if k.split == "heldout" and not k.in_text]
    assert len(new_in_both) == 8 and "The eight kinds that are new in both" in words(
        "docs/decisions.md"
    )


# -------------------------------------------------------------------------------------- the figure


def figure_script():
    spec = importlib.util.spec_from_file_location("figure", HOME / "docs/architecture_figure.py")
    spec.loader.exec_module(module := importlib.util.module_from_spec(spec))
    return module


def test_the_committed_figure_is_what_its_script_draws():
    assert (HOME / "docs/architecture.svg").read_bytes() == figure_script().figure().encode()


def test_the_figure_shows_what_the_recipes_train(monkeypatch):
    script = figure_script()
    assert script.figure().count(">trained<") == 5 and script.figure().count(">frozen<") == 4
    recipes = [vflan.replace(r, tune=("projector",)) for r in vflan.preset("full_13b")]
    monkeypatch.setattr(script, "preset", lambda name: recipes)
    assert script.figure().count(">trained<") == 3


def test_no_text_of_the_figure_leaves_it():
    """A character is at most 0.66 of its size wide, which holds for bold DejaVu Sans."""
    script = figure_script()
    texts = re.findall(
        r'<text x="([\d.]+)" y="([\d.]+)" font-size="(\d+)"(.*?)>(.*?)<', script.figure()
    )
    assert len(texts) > 30
    for x, y, size, style, words in texts:
        width = 0.66 * int(size) * len(words)
        left = float(x) - (width / 2 if "middle" in style else 0)
        assert left >= 0 and left + width <= script.WIDTH and float(y) <= script.HEIGHT, words


# -------------------------------------------------------------------------------------- the tables


def test_the_tables_are_what_the_results_give(tmp_path):
    if not tables.page_tables(HOME):
        pytest.skip("no results yet: make publish writes data/results, make bench bench/results")
    listed = subprocess.run(
        ["git", "ls-files", "-z"], cwd=HOME, capture_output=True, text=True
    ).stdout.split("\0")
    sources = (*tables.PAGES, "data/results/", "bench/results/")
    for name in (name for name in listed if name.startswith(sources)):
        if (HOME / name).exists():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(HOME / name, tmp_path / name)
    filled = tables.fill_pages(tmp_path)
    assert filled == ["scores", "floors", "claims", "verdicts", "cost", "bench"]
    for page in tables.PAGES:
        assert (tmp_path / page).read_text(encoding="utf-8") == text_of(page), (
            "run vflan publish --readme"
        )


def scores(*rows):
    """Rows (run, benchmark, metric, value, seed) with an interval of +-2 and a baseline of 50."""
    return pd.DataFrame(
        [(r, b, m, v, v - 2, v + 2, 100, seed, 50) for r, b, m, v, seed in rows], columns=COLUMNS
    )


@pytest.fixture
def home(tmp_path):
    (tmp_path / "docs").mkdir()
    for page, names in {
        "README.md": ["scores", "verdicts"],
        "docs/results.md": ["floors", "claims"],
        "docs/measurements.md": ["cost"],
    }.items():
        between = [f"<!-- {name}:begin -->\nold\n<!-- {name}:end -->\n" for name in names]
        (tmp_path / page).write_text("above\n" + "between\n".join(between) + "end\n")
    (tmp_path / "data/results").mkdir(parents=True)
    (tmp_path / "bench/results").mkdir(parents=True)
    return tmp_path


def test_without_results_the_pages_stay_as_they_are(home, tmp_path_factory):
    before = [(home / page).read_text() for page in tables.PAGES]
    assert tables.fill_pages(home) == []
    assert [(home / page).read_text() for page in tables.PAGES] == before
    assert tables.fill_pages(tmp_path_factory.mktemp("empty")) == []


def test_tables_are_filled_between_their_markers_and_only_there(home):
    made_up = scores(
        ("base", "pope", "f1", 80.0, 0),
        ("base-seed1", "pope", "f1", 90.0, 1),
        ("base", "pope", "yes_ratio", 50.0, 0),
        ("chat", "pope", "f1", 70.0, 0),
        ("elsewhere", "pope", "f1", 1.0, 7),
        ("base", "heldin", "accuracy", 95.0, 0),
        ("projector", "mme", "score", 51.26, 0),
        ("base", "forgetting", "accuracy", 60.0, 0),
    )
    made_up.to_csv(home / "data/results/tiny.csv", index=False)
    judged = floors(made_up)
    judged.to_csv(home / "data/results/tiny_floors.csv", index=False)
    assert tables.fill_pages(home) == ["scores", "floors"]
    text, results = (home / "README.md").read_text(), (home / "docs/results.md").read_text()
    assert "| held-in tasks accuracy, % | 50.0 |  | 95.0 [93.0, 97.0] |  |  |  |" in text
    assert (
        "| POPE F1 | 50.0 |  | 85.0 [78.0, 92.0] | 70.0 [68.0, 72.0] | 85.9 | 86.1 |" in text
    )  # the mean of two seeds
    assert (
        "| MME score | 50.0 | 51.3 [49.3, 53.3] |  |  | 76.9 | 74.5 |" in text
    )  # the paper's points as percent
    assert "(87.2) | (84.0) |" in text  # known second-hand
    assert "Seeds: 0, 1 (mean" in text and "elsewhere" not in text
    assert "| Base answers held-in tasks | 80 or more | 95.0 | 95.0 | 50.0 |  | yes |" in results
    assert f"1 of {len(judged)} floors hold." in results
    assert (
        text.startswith("above\n<!-- scores:begin -->\n| benchmark |")
        and "old\n<!-- scores" not in text
    )
    assert text.endswith(
        "<!-- scores:end -->\nbetween\n<!-- verdicts:begin -->\nold\n<!-- verdicts:end -->\nend\n"
    )
    tables.fill_pages(home)
    assert (home / "README.md").read_text() == text  # the same results fill the same page


def test_the_verdicts_are_grouped_and_wrapped(home):
    rows = [
        ("1", "More tasks help", 17.16, "holds"),
        ("1a", "A part of it", 1.0, "holds"),
        ("2", "More is said " * 12, -3.0, "does not hold at this scale"),
        ("3", "Order matters", 4.0, "holds"),
    ]
    found = pd.DataFrame(rows, columns=["claim", "statement", "effect", "verdict"])
    text = tables.verdicts_markdown(found)
    assert text.startswith("- **Holds: 2.** (1) More tasks help: +17.2; (3) Order matters: +4.0.\n")
    assert "- **Does not hold at this scale: 1.** (2) More" in text and "A part" not in text
    assert all(len(line) <= 120 for line in text.splitlines()) and len(text.splitlines()) > 2


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
    assert tables.fill_pages(home) == ["cost"]
    text = (home / "docs/measurements.md").read_text().replace("\n", " ")
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
    text = text.replace("\n", " ")
    assert "| data: open_seconds | 2.5 | s | at most 1 | **no** |" in text
    assert (
        "| data: gpu | not measured | s | at most 1 |  |" in text
        and "`python -m bench.data` at abc1234" in text
    )


@pytest.mark.parametrize("twice", [False, True])
def test_a_table_without_a_place_or_with_two_is_an_error_that_names_it(home, twice):
    scores(("base", "pope", "f1", 80.0, 0)).to_csv(home / "data/results/tiny.csv", index=False)
    before = (home / "README.md").read_text()
    (home / ("docs/results.md" if twice else "README.md")).write_text(before if twice else "none")
    with pytest.raises(ValueError, match="scores:begin"):
        tables.fill_pages(home)


def test_the_tables_can_be_filled_without_running_anything(home, monkeypatch, capsys):
    monkeypatch.setattr(tables, "ROOT", home)
    main(["publish", "--readme"])
    assert capsys.readouterr().out == "filled: nothing, there are no results yet\n"
