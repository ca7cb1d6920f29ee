"""A preset's results as one HTML page that opens offline: scores, claims, figures, answers, recipe, versions, machine.

All of it comes from files and is escaped by the template; no script may run on the page, which a content policy says too. The
executed notebooks are rendered beside their files, with nothing in them that could run.
"""

import base64
import io
import logging
import os
import platform
import re
import subprocess
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import bleach
import nbformat
import pandas as pd
import psutil
from bleach.css_sanitizer import CSSSanitizer
from jinja2 import Environment
from markupsafe import Markup
from nbconvert import HTMLExporter
from pygments.formatters import HtmlFormatter

from vflan.analysis.claims import answered
from vflan.analysis.tables import STAGES
from vflan.config import DEFAULTS, commit, read_json
from vflan.data.images import read_picture

ASKED = ("heldin", "heldout", "pope", "llava_bench")  # of these some answers are shown
PACKAGES = ("torch", "transformers", "peft", "accelerate", "datasets")
TAGS = set(
    "div pre span table thead tbody tr th td p br hr img h1 h2 h3 h4 h5 h6 dl dt dd sub sup".split()
)
SHOWN = {"text/plain", "text/html", "text/markdown", "image/png", "image/jpeg"}
LOOK = """
body { font: 16px/1.5 system-ui, sans-serif; margin: 2em auto; max-width: 68em; padding: 0 1em; color: #222; background: #fff }
h1, h2 { line-height: 1.2 } h2 { margin-top: 2em; border-bottom: 1px solid #ddd }
.wide { overflow-x: auto } table { border-collapse: collapse; font-size: 14px; font-variant-numeric: tabular-nums }
th, td { text-align: left; vertical-align: top; padding: .25em .8em .25em 0; border-bottom: 1px solid #eee; max-width: 24em }
td { overflow-wrap: anywhere } .yes, .holds { color: #06623b } .no, .opposite { color: #a3201d; font-weight: bold }
figure { margin: 2em 0 } img { max-width: 100% } td img { min-width: 48px } figcaption, .note, .prompt { color: #555; font-size: 14px }
pre { overflow-x: auto; white-space: pre-wrap; background: #f7f7f7; padding: .6em; font-size: 13px }
"""
PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>{{ title }}</title><style>{{ look }}</style></head><body>
{% if body %}{{ body }}{% else %}
<h1>{{ title }}</h1>
<p class="note">{{ facts | join(" · ") }}</p>
{% for name, note, columns, rows in tables %}
<h2>{{ name }}</h2>
<div class="wide"><table><thead><tr>{% for c in columns %}<th>{{ c }}</th>{% endfor %}</tr></thead><tbody>
{% for row in rows %}<tr>{% for c in row %}<td{% if columns[loop.index0] in ("holds", "verdict") %} class="{{ c }}"{% endif %}>
{%- if c.link %}<a href="{{ c.link }}">{{ c.text }}</a>{% elif c.picture %}<img alt="" src="{{ c.picture }}">{% else %}
{{- c }}{% endif %}</td>{% endfor %}</tr>
{% endfor %}</tbody></table></div>
{% if note %}<p class="note">{{ note }}</p>{% endif %}
{% endfor %}
{% if figures %}<h2>Figures</h2>{% endif %}
{% for data, words in figures %}<figure><img alt="{{ words }}" src="{{ data }}"><figcaption>{{ words }}</figcaption></figure>
{% endfor %}{% endif %}
</body></html>
"""


def write_report(preset, out, record, home, scores=None, figures=(), runs=None) -> Path:
    """`out`/report.html of a pressed preset, and an HTML page beside each executed notebook; returns the page's path.

    record: as in book.json. home: the project folder. scores: (note, columns, rows). figures: (PNG, caption). runs: the
    folder of runs and of their `results` (runs/<preset>).
    """
    runs = runs or home / "runs" / preset
    tables = [("Scores", *scores)] if scores else []
    stages = {name: runs / name for name in STAGES if (runs / name / "recipe.json").is_file()}
    for title, file in (("Floors", "floors.csv"), ("Claims of the paper", "claims.csv")):
        if (runs / "results" / file).is_file():
            frame = pd.read_csv(runs / "results" / file)
            tables.append((title, "", list(frame.columns), frame.itertuples(index=False)))
    for title, columns, rows in (answer_rows(stages, home), run_rows(stages), recipe_rows(stages)):
        if rows:
            tables.append((title, "", columns, rows))
    pages = [notebook_page(path) for path in sorted((out / "notebooks").glob("*.ipynb"))]
    cost = {row["name"]: (row["minutes"], row["peak_gb"]) for row in record["notebooks"]}
    links = [
        SimpleNamespace(link=page.relative_to(out).as_posix(), text=page.stem) for page in pages
    ]
    rows = [[link, *cost.get(link.text, ())] for link in links]
    tables.append(("Notebooks, as executed", "", ["notebook", "minutes", "most memory, GB"], rows))
    facts = [
        f"Python {platform.python_version()}",
        *(f"{package} {version(package)}" for package in PACKAGES),
    ]
    facts += [f"commit {commit() or 'unknown'}", *machine()]
    facts += [f"{record['minutes']:.1f} minutes", f"at most {record['peak_gb']:.1f} GB"]
    facts += [f"{key} = {value}" for key, value in record["parameters"].items()]
    values = dict(
        facts=facts, figures=[(embedded(path.read_bytes()), words) for path, words in figures]
    )
    values["tables"] = [
        (*head, [[_shown(cell) for cell in row] for row in rows]) for *head, rows in tables
    ]
    (page := out / "report.html").write_text(_page(f"vflan: {preset}", **values), encoding="utf-8")
    return page


def answer_rows(stages, home, each=3):
    """The same questions to every stage: `each` of some benchmarks, evenly over their files."""
    rows = []
    for name in ASKED:
        said = {}
        for stage, folder in stages.items():
            questions = home / read_json(folder / "recipe.json").get("benchmarks", "")
            with suppress(FileNotFoundError, KeyError):  # not asked, or not to the end
                said[stage] = answered(SimpleNamespace(folder=folder, name=stage), name, questions)
        first = next(iter(said.values()), [])
        for i in range(0, len(first), -(-len(first) // each) or 1):
            ask = first[i]
            rows.append([_picture(ask.get("image")), ask.get("category", ""), ask["text"], ask.get("label"),
                         *(said[stage][i]["answer"] if stage in said else "" for stage in STAGES)])  # fmt: skip
    return "Some answers", ["picture", "task", "question", "reference", *STAGES.values()], rows


def run_rows(stages):
    """What the three runs were: done.json."""
    keys = ("rows", "steps", "tokens", "seconds", "processes", "first_loss", "last_loss")
    done = {name: read_json(folder / "done.json") for name, folder in stages.items()}
    return (
        "Runs",
        ["run", *keys],
        [[name, *(about.get(key) for key in keys)] for name, about in done.items()],
    )


def recipe_rows(stages):
    """The recipes side by side, without the fields that stand at their default in all of them."""
    recipes = [read_json(folder / "recipe.json") for folder in stages.values()]
    keys = dict.fromkeys([*(recipes[0] if recipes else ()), *DEFAULTS])
    rows = [[key, *(recipe.get(key, DEFAULTS.get(key)) for recipe in recipes)] for key in keys]
    rows = [row for row in rows if any(value != DEFAULTS.get(row[0]) for value in row[1:])]
    return "Recipe", ["field", *(STAGES[name] for name in stages)], rows


def notebook_page(path) -> Path:
    """The notebook at `path` as a page beside it, without scripts, styles or frames of its own; made again if it changed."""
    page = path.with_suffix(".html")
    if page.is_file() and page.stat().st_mtime_ns >= path.stat().st_mtime_ns:
        return page
    notebook, quiet = nbformat.read(path, 4), logging.getLogger(__name__)
    quiet.setLevel(logging.ERROR)  # it would miss words for every picture
    for output in (
        output for cell in notebook.cells for output in cell.get("outputs", []) if "data" in output
    ):
        output.data = {kind: value for kind, value in output.data.items() if kind in SHOWN}
    body, _ = HTMLExporter(
        template_name="basic", exclude_anchor_links=True, log=quiet
    ).from_notebook_node(notebook)
    safe = dict(
        tags=TAGS | bleach.ALLOWED_TAGS,
        attributes=_may,
        protocols={"http", "https", "mailto", "data"},
    )
    body = re.sub(
        r"(?is)<(style|script)\b.*?</\1\s*>", "", body
    )  # bleach would leave their words to be read
    body = Markup(bleach.clean(body, strip=True, css_sanitizer=CSSSanitizer(), **safe))
    page.write_text(
        _page(path.stem, body=body, more=HtmlFormatter().get_style_defs("pre")), encoding="utf-8"
    )
    return page


def machine() -> list[str]:
    """Processor, cores, memory and GPUs of this machine, as far as it tells."""
    cpu = Path("/proc/cpuinfo")
    names = (
        re.findall(r"^model name\s*:\s*(.*)$", cpu.read_text(), re.MULTILINE)
        if cpu.is_file()
        else []
    )
    memory = f"{psutil.virtual_memory().total / 1e9:.0f} GB"
    told = [names[0] if names else platform.machine(), f"{os.cpu_count()} cores", memory]
    with suppress(OSError, subprocess.CalledProcessError):
        asked = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
        told += subprocess.run(
            asked, capture_output=True, text=True, check=True
        ).stdout.splitlines()
    return told


def embedded(png: bytes) -> str:
    """A picture as a data URI."""
    return "data:image/png;base64," + base64.b64encode(png).decode()


def _picture(path, side=96):
    if not path:
        return ""
    try:
        image, buffer = read_picture(path), io.BytesIO()
    except OSError:
        return "(cannot be opened)"
    image.thumbnail((side, side))
    image.save(buffer, "PNG")
    return SimpleNamespace(picture=embedded(buffer.getvalue()))


def _may(tag, name, value):
    """Whether a tag of a notebook's page keeps an attribute."""
    if name in ("href", "src"):
        return (
            value.startswith("data:image/")
            if tag == "img"
            else tag == "a" and not value.startswith("data:")
        )
    return name in ("class", "id", "alt", "width", "height", "colspan", "rowspan", "style")


def _page(title, more="", **values):
    empty = dict(body="", facts=[], tables=[], figures=[])
    page = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string(PAGE)
    return page.render(title=title, look=Markup(LOOK + more), **empty | values)


def _shown(value):
    """A cell as people read it."""
    if value is None or value != value:  # NaN
        return ""
    if isinstance(value, bool):
        return ("no", "yes")[value]
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return f"{value:.6g}" if isinstance(value, float) else value
