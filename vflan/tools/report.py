"""A preset's results as one HTML page that opens offline.

It begins with what came out, in three sentences and a figure; then come the scores, floors and
claims, the figures in the order of the paper, answers that changed between the stages, recipes,
the machine and the cost. All of it is read from files and escaped by templates/report.html; no
script runs on the page, which a content policy states too. The executed notebooks become pages
beside their files, cleaned in the same way.
"""

from __future__ import annotations

import base64
import logging
import os
import platform
import re
import subprocess
from collections.abc import Sequence
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import bleach
import nbformat
import pandas as pd
import psutil
from bleach.css_sanitizer import CSSSanitizer
from markupsafe import Markup
from nbconvert import HTMLExporter
from pygments.formatters import HtmlFormatter

from vflan.analysis.claims import answered
from vflan.analysis.tables import STAGES, summary
from vflan.config import DEFAULTS, commit, read_json
from vflan.tools.widgets.elements import picture, templates

BENCHMARKS_SHOWN = ("heldin", "heldout", "pope", "llava_bench")  # some answers to each are shown
FIRST_FIGURE = "table2"  # shown below the first sentences
NUMBERS = r"[\d.,+\-\[\]() %]"  # what a number and its interval are written with
PACKAGES = ("torch", "transformers", "peft", "accelerate", "datasets")
# What is left of a notebook's page: tags, and kinds of outputs.
TAGS = "div pre span table thead tbody tr th td p br hr img h1 h2 h3 h4 h5 h6 dl dt dd sub sup"
OUTPUTS = {"text/plain", "text/html", "text/markdown", "image/png", "image/jpeg"}

Table = tuple[str, list[str], list[list]]  # (title, columns, rows)


def write_report(
    preset: str,
    out: Path,
    record: dict,
    home: Path,
    scores: tuple[str, list, list] | None = None,
    figures: Sequence[tuple[Path, str]] = (),
    runs: Path | None = None,
) -> Path:
    """Write `out`/report.html, and an HTML page beside each executed notebook in `out`/notebooks.

    record: as in book.json. home: the project folder. scores: (note, columns, rows). figures: (PNG,
    caption). runs: the folder of runs and of their `results`; default: runs/<preset>. Returns the
    path of the report.
    """
    runs = runs or home / "runs" / preset
    stages = {name: runs / name for name in STAGES if (runs / name / "recipe.json").is_file()}
    found = {file: pd.read_csv(runs / "results" / f"{file}.csv", dtype={"claim": str})
             for file in ("scores", "floors", "claims")
             if (runs / "results" / f"{file}.csv").is_file()}  # fmt: skip
    lead = summary(found["scores"], found.get("floors"), found.get("claims")) if scores else []
    results = [("Scores", *scores)] if scores else []
    for title, file in (("Floors", "floors"), ("Claims of the paper", "claims")):
        if file in found:
            # how a claim is computed is in data/claims.csv
            frame = found[file].drop(columns=["comparison", "metric"], errors="ignore")
            results.append((title, "", list(frame.columns), frame.itertuples(index=False)))
    details = [answer_rows(stages, home), recipe_rows(stages), run_rows(stages)]
    details = [(title, "", columns, rows) for title, columns, rows in details if rows]
    details.append(("Notebooks, as executed", "", *notebook_rows(record, out)))

    facts = [f"Python {platform.python_version()}"]
    facts += [f"{package} {version(package)}" for package in PACKAGES]
    facts += [f"commit {commit() or 'unknown'}", *hardware()]
    # of the runs that made what is shown: this call may have had nothing left to run
    minutes = sum(row["minutes"] for row in record["notebooks"])
    peak = max((row["peak_gb"] for row in record["notebooks"]), default=record["peak_gb"])
    facts += [f"the notebooks took {minutes:.1f} minutes in all", f"at most {peak:.1f} GB each"]
    facts += [f"{key} = {value}" for key, value in record["parameters"].items()]
    pngs = [(base64.b64encode(path.read_bytes()).decode(), words) for path, words in figures]
    first = [png for png, (path, _) in zip(pngs, figures) if path.stem == FIRST_FIGURE]
    text = _render(
        title=f"vflan: {preset}",
        lead=lead,
        facts=facts,
        first=first,
        figures=[png for png in pngs if png not in first],
        results=_cells(results),
        details=_cells(details),
    )
    (out / "report.html").write_text(text, encoding="utf-8")
    return out / "report.html"


def _cells(tables):
    """Tables with their cells as text, and for each column whether it holds numbers."""
    shown = []
    for *head, columns, rows in tables:
        rows = [list(row) for row in rows]
        numeric = [all(_is_number(cell) for cell in cells) for cells in zip(*rows)]
        texts = [[_text(cell) for cell in row] for row in rows]
        shown.append((*head, list(zip(columns, numeric or [False] * len(columns))), texts))
    return shown


def _is_number(cell):
    """Whether a cell is a number, a number with its interval, or empty."""
    if cell is None or isinstance(cell, (int, float)):
        return not isinstance(cell, bool)
    return isinstance(cell, str) and not re.sub(NUMBERS, "", cell)


def notebook_rows(record: dict, out: Path) -> tuple[list[str], list[list]]:
    """(columns, rows): a link to the page of each executed notebook, and its cost."""
    cost = {row["name"]: (row["minutes"], row["peak_gb"]) for row in record["notebooks"]}
    links = []
    for path in sorted((out / "notebooks").glob("*.ipynb")):
        address = notebook_page(path).relative_to(out).as_posix()
        link = Markup('<a href="{}">{}</a>').format(address, path.stem)
        links.append([link, *cost.get(path.stem, (None, None))])
    return ["notebook", "minutes", "most memory, GB"], links


def answer_rows(stages: dict[str, Path], home: Path, each: int = 3) -> Table:
    """Answers to about `each` questions of some benchmarks that changed between the stages.

    They are spread evenly over the questions; where no answer changed, all questions are taken.
    """
    rows = []
    for name in BENCHMARKS_SHOWN:
        answers = {}
        for stage, folder in stages.items():
            benchmarks = read_json(folder / "recipe.json").get("benchmarks", "")
            questions = home / Path(benchmarks).expanduser()
            run = SimpleNamespace(folder=folder, name=stage)
            with suppress(FileNotFoundError, KeyError):  # not asked, or not to the end
                answers[stage] = answered(run, name, questions)
        replies = list(zip(*answers.values()))
        changed = [i for i, same in enumerate(replies) if len({_plain(row) for row in same}) > 1]
        chosen = changed or range(len(replies))
        for i in chosen[:: -(-len(chosen) // each) or 1]:
            question = replies[i][0]
            image = question.get("image")
            cells = [picture(image) if image else "", question.get("category", name)]
            cells += [question["text"], question.get("label")]
            texts = (answers[stage][i]["answer"] if stage in answers else "" for stage in STAGES)
            rows.append([*cells, *texts])
    columns = ["picture", "task", "question", "reference", *STAGES.values()]
    return "Answers that changed between the stages", columns, rows


def _plain(row):
    return row["answer"].strip(" .").lower()


def run_rows(stages: dict[str, Path]) -> Table:
    """Size, time and loss of each run, from done.json."""
    keys = ["rows", "steps", "tokens", "seconds", "processes", "first_loss", "last_loss"]
    done = {name: read_json(folder / "done.json") for name, folder in stages.items()}
    rows = [[name, *(summary.get(key) for key in keys)] for name, summary in done.items()]
    return "Runs", ["run", *keys], rows


def recipe_rows(stages: dict[str, Path]) -> Table:
    """The recipes side by side, without the fields that all of them leave at the default."""
    recipes = [read_json(folder / "recipe.json") for folder in stages.values()]
    keys = dict.fromkeys([*(recipes[0] if recipes else ()), *DEFAULTS])
    rows = [[key, *(recipe.get(key, DEFAULTS.get(key)) for recipe in recipes)] for key in keys]
    rows = [row for row in rows if any(value != DEFAULTS.get(row[0]) for value in row[1:])]
    return "Recipe", ["field", *(STAGES[name] for name in stages)], rows


def notebook_page(path: Path) -> Path:
    """Write the notebook at `path` as an HTML page beside it, unless its page is up to date.

    The page has no scripts, no frames and no styles but ours.
    """
    page = path.with_suffix(".html")
    if page.is_file() and page.stat().st_mtime_ns >= path.stat().st_mtime_ns:
        return page
    notebook = nbformat.read(path, 4)
    for output in (output for cell in notebook.cells for output in cell.get("outputs", [])):
        if "data" in output:
            output.data = {kind: value for kind, value in output.data.items() if kind in OUTPUTS}
    log = logging.getLogger(__name__)
    log.setLevel(logging.ERROR)  # it would warn that pictures have no alternative text
    exporter = HTMLExporter(template_name="basic", exclude_anchor_links=True, log=log)
    body, _ = exporter.from_notebook_node(notebook)
    # bleach removes these two tags, but would show the text between them
    body = re.sub(r"(?is)<(style|script)\b.*?</\1\s*>", "", body)
    body = bleach.clean(
        body,
        tags=bleach.ALLOWED_TAGS | set(TAGS.split()),
        attributes=_is_allowed,
        protocols={"http", "https", "mailto", "data"},
        css_sanitizer=CSSSanitizer(),
        strip=True,
    )
    # The style is pygments' own text, and bleach has cleaned the body.
    code_style = Markup(HtmlFormatter().get_style_defs("pre"))  # noqa: S704
    text = _render(title=path.stem, body=Markup(body), more_style=code_style)  # noqa: S704
    page.write_text(text, encoding="utf-8")
    return page


def _is_allowed(tag, name, value):
    """Whether a tag of a notebook's page keeps an attribute."""
    if name in ("href", "src"):
        is_data = value.startswith("data:")
        return value.startswith("data:image/") if tag == "img" else tag == "a" and not is_data
    return name in ("class", "id", "alt", "width", "height", "colspan", "rowspan", "style")


def hardware() -> list[str]:
    """Processor, cores, memory and GPUs of this machine, as far as they can be read."""
    names, cpu = [], Path("/proc/cpuinfo")
    if cpu.is_file():
        names = re.findall(r"^model name\s*:\s*(.*)$", cpu.read_text(), re.MULTILINE)
    memory = f"{psutil.virtual_memory().total / 1e9:.0f} GB"
    parts = [names[0] if names else platform.machine(), f"{os.cpu_count()} cores", memory]
    command = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    with suppress(OSError, subprocess.CalledProcessError):  # no driver, no GPU
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        parts += done.stdout.splitlines()
    return parts


def _render(**values):
    return templates.get_template("report.html").render(values)


def _text(value):
    """A cell as text for people: no NaN, yes or no, short numbers."""
    if value is None or value != value:  # NaN
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return f"{value:.6g}" if isinstance(value, float) else value
