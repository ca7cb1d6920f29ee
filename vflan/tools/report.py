"""A preset's results as one HTML page that opens offline.

It shows scores, claims, figures, answers, recipes, versions and the machine. All of it is read from
files and escaped by templates/report.html; no script runs on the page, which a content policy
states too. The executed notebooks become pages beside their files, cleaned in the same way.
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
from jinja2 import Environment, FileSystemLoader
from markupsafe import Markup
from nbconvert import HTMLExporter
from pygments.formatters import HtmlFormatter

from vflan.analysis.claims import answered
from vflan.analysis.tables import STAGES
from vflan.config import DEFAULTS, commit, read_json
from vflan.tools.widgets.elements import picture

BENCHMARKS_SHOWN = ("heldin", "heldout", "pope", "llava_bench")  # some answers to each are shown
PACKAGES = ("torch", "transformers", "peft", "accelerate", "datasets")
# What is left of a notebook's page: tags, and kinds of outputs.
TAGS = "div pre span table thead tbody tr th td p br hr img h1 h2 h3 h4 h5 h6 dl dt dd sub sup"
OUTPUTS = {"text/plain", "text/html", "text/markdown", "image/png", "image/jpeg"}
_LOADER = FileSystemLoader(Path(__file__).parent / "templates")
_ENVIRONMENT = Environment(loader=_LOADER, autoescape=True, trim_blocks=True, lstrip_blocks=True)

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
    tables = [("Scores", *scores)] if scores else []
    for title, file in (("Floors", "floors.csv"), ("Claims of the paper", "claims.csv")):
        if (runs / "results" / file).is_file():
            frame = pd.read_csv(runs / "results" / file)
            tables.append((title, "", list(frame.columns), frame.itertuples(index=False)))
    for title, columns, rows in (answer_rows(stages, home), run_rows(stages), recipe_rows(stages)):
        if rows:
            tables.append((title, "", columns, rows))
    cost = {row["name"]: (row["minutes"], row["peak_gb"]) for row in record["notebooks"]}
    links = []
    for path in sorted((out / "notebooks").glob("*.ipynb")):
        address = notebook_page(path).relative_to(out).as_posix()
        link = Markup('<a href="{}">{}</a>').format(address, path.stem)
        links.append([link, *cost.get(path.stem, ())])
    columns = ["notebook", "minutes", "most memory, GB"]
    tables.append(("Notebooks, as executed", "", columns, links))

    facts = [f"Python {platform.python_version()}"]
    facts += [f"{package} {version(package)}" for package in PACKAGES]
    facts += [f"commit {commit() or 'unknown'}", *hardware()]
    facts += [f"{record['minutes']:.1f} minutes", f"at most {record['peak_gb']:.1f} GB"]
    facts += [f"{key} = {value}" for key, value in record["parameters"].items()]
    cells = [(*head, [[_text(cell) for cell in row] for row in rows]) for *head, rows in tables]
    pngs = [(base64.b64encode(path.read_bytes()).decode(), words) for path, words in figures]
    text = _render(title=f"vflan: {preset}", facts=facts, tables=cells, figures=pngs)
    (out / "report.html").write_text(text, encoding="utf-8")
    return out / "report.html"


def answer_rows(stages: dict[str, Path], home: Path, each: int = 3) -> Table:
    """All stages' answers to about `each` questions of some benchmarks, evenly over their files."""
    rows = []
    for name in BENCHMARKS_SHOWN:
        answers = {}
        for stage, folder in stages.items():
            questions = home / read_json(folder / "recipe.json").get("benchmarks", "")
            run = SimpleNamespace(folder=folder, name=stage)
            with suppress(FileNotFoundError, KeyError):  # not asked, or not to the end
                answers[stage] = answered(run, name, questions)
        first = next(iter(answers.values()), [])
        for i in range(0, len(first), -(-len(first) // each) or 1):
            image, text = first[i].get("image"), first[i]["text"]
            cells = [picture(image) if image else "", first[i].get("category", ""), text]
            cells.append(first[i].get("label"))
            replies = (answers[stage][i]["answer"] if stage in answers else "" for stage in STAGES)
            rows.append([*cells, *replies])
    return "Some answers", ["picture", "task", "question", "reference", *STAGES.values()], rows


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
    code_style = Markup(HtmlFormatter().get_style_defs("pre"))
    text = _render(title=path.stem, body=Markup(body), more_style=code_style)
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
    return _ENVIRONMENT.get_template("report.html").render(values)


def _text(value):
    """A cell as text for people: no NaN, yes or no, short numbers."""
    if value is None or value != value:  # NaN
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return f"{value:.6g}" if isinstance(value, float) else value
