"""What results look like on a page: the tables of the project's pages and of the report, and the list of figures."""

import json
import re
import textwrap
from pathlib import Path

import pandas as pd
from PIL import Image

from vflan.config import ROOT
from vflan.evaluation.benchmarks import BENCHMARKS

# Pages with generated tables, between markers such as <!-- scores:begin --> and <!-- scores:end -->.
PAGES = ("README.md", "docs/results.md", "docs/measurements.md")
STAGES = {"projector": "projector", "base": "Base", "chat": "Chat"}  # run -> column


def caption(picture):
    """What a figure says of itself: the description in the PNG, else its file name read aloud."""
    with Image.open(picture) as image:
        said = getattr(image, "text", {}).get("Description")
    words = re.sub(
        r"^(fig|table)(\w*?)_",
        lambda m: f"{'Figure' if m[1] == 'fig' else 'Table'} {m[2]}: ",
        picture.stem,
    )
    return said or words.replace("_", " ")


def pictures(folder):
    """The PNG figures of a folder, [(path, caption)], Figure 4 before Figure 10."""
    return [(path, caption(path)) for path in sorted(Path(folder).glob("*.png"), key=_by_number)]


def write_gallery(preset, folder, page):
    """List the figures of `folder` with their captions on a page in markdown; returns how many they are."""
    lines = [
        f"# Figures of the {preset} preset",
        "",
        "Drawn by the notebooks; this page is generated.",
        "",
    ]
    for picture, text in (found := pictures(folder)):
        lines += [f"![{text}]({picture.relative_to(page.parent).as_posix()})", "", text, ""]
    page.parent.mkdir(parents=True, exist_ok=True)
    page.write_text("\n".join(lines), encoding="utf-8")
    return len(found)


def _by_number(path):
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", path.stem)]


# -------------------------------------------------------------------------------------------- the tables of the pages

COSTS = {
    "setup_minutes": "`make setup`, minutes to install",
    "demo_minutes": "`make demo`, minutes without installing",
    "demo_peak_gb": "`make demo`, most memory held at a time, GB",
    "again_minutes": "a second `make demo`, minutes",
    "notebooks_test_minutes": "`make notebooks-test` after it, minutes",
    "test_minutes": "`make test`, minutes",
    "changed_files": "tracked files that are changed after all of them",
    "matmul_gflops": "the machine: fp32 matrix product on one thread, GFLOPS",
}


def markdown(columns, rows):
    """A table as markdown; what is missing (None, NaN) stays empty."""
    cells = [["" if cell is None or cell != cell else str(cell) for cell in row] for row in rows]
    return "\n".join(f"| {' | '.join(row)} |" for row in [columns, ["---"] * len(columns), *cells])


def headlines(scores):
    """{"POPE F1": rows of that metric} for each benchmark in `scores`: its headline, under the name that all tables print.

    The rows' runs are without the ending that tells a seed.
    """
    from vflan.analysis import plots  # matplotlib comes with it

    scores, found = scores.assign(run=scores.run.str.replace(r"-seed\d+$", "", regex=True)), {}
    for name, benchmark in BENCHMARKS.items():
        rows = scores[(scores.benchmark == name) & (scores.metric == benchmark.headline)]
        if len(rows):
            unit = plots.UNITS.get(benchmark.headline, benchmark.headline)
            found[f"{plots.TITLES[name]} {unit}"] = rows
    return found


def score_table(scores):
    """The headlines as one row a run and one column a benchmark, the mean over seeds."""
    table = {
        title: rows.groupby("run", sort=False).value.mean()
        for title, rows in headlines(scores).items()
    }
    runs = scores.run.str.replace(r"-seed\d+$", "", regex=True).unique()
    return pd.DataFrame(table).reindex(runs).dropna(how="all").round(1)


def score_rows(scores):
    """(note, columns, rows) of Table 2 in this world: benchmarks by stages, beside the majority answer and the paper's 13B.

    A cell is the mean over seeds, and in brackets the lowest and highest end of the seeds' intervals.
    """
    from vflan.analysis import plots  # matplotlib comes with it

    table = []
    for title, rows in headlines(scores).items():
        cells = [title, f"{rows.baseline.mean():.1f}"]
        for run in STAGES:
            own = rows[rows.run == run]
            cells.append(
                f"{own.value.mean():.1f} [{own.low.min():.1f}, {own.high.max():.1f}]"
                if len(own)
                else None
            )
        paper = BENCHMARKS[rows.benchmark.iloc[0]].paper
        for stage in ("Base", "Chat"):
            value, confirmed = plots.printed("Table 2", f"Vision-Flan {stage}", paper) or (
                None,
                True,
            )
            cells.append(value and (f"{value:.1f}" if confirmed else f"({value:.1f})"))
        table.append(cells)
    columns = ["benchmark", "majority answer", *STAGES.values(), "paper's Base", "paper's Chat"]
    runs = scores.run.str.replace(r"-seed\d+$", "", regex=True)
    seeds = sorted(scores[runs.isin(STAGES)].seed.unique())
    note = f"Intervals: 95 %, over pictures. Seeds: {', '.join(map(str, seeds))}"
    if len(seeds) > 1:
        note += " (mean; outer ends of the intervals)"
    note += ". Round brackets: a second source."
    return note, columns, table


def scores_markdown(scores):
    """Table 2 of the mini world, as `score_rows` makes it."""
    note, columns, rows = score_rows(scores)
    return f"{markdown(columns, rows)}\n\n{note}"


def floors_markdown(floors):
    """The floors of vflan.claims with their verdicts, and how many hold."""
    judged = floors.holds.astype(str)
    rows = floors.assign(holds=judged.map({"True": "yes", "False": "**no**"}).fillna("not judged"))
    held = f"{(judged == 'True').sum()} of {judged.isin(['True', 'False']).sum()} floors hold."
    return f"{markdown(list(rows.columns), rows.itertuples(index=False))}\n\n{held}"


def claims_markdown(found):
    """The whole claims of the ledger with their verdicts; parts of a claim stand in the file and in the notebooks."""
    rows = []
    for row in found[found.claim.str.isdigit()].itertuples():
        interval = f"{row.effect:+.1f} [{row.low:.1f}, {row.high:.1f}]"
        rows.append(
            [row.claim, row.statement, row.n_seeds, interval, f"{row.smallest:g}", row.verdict]
        )
    return markdown(
        ["", "claim", "seeds", "effect, points", "smallest that counts", "verdict"], rows
    )


def verdicts_markdown(found):
    """The whole claims, one item for each verdict, with the effect of each claim in points."""
    items = []
    for verdict, rows in found[found.claim.str.isdigit()].groupby("verdict", sort=False):
        claims = [f"({row.claim}) {row.statement}: {row.effect:+.1f}" for row in rows.itertuples()]
        items.append(_wrap(f"- **{verdict.capitalize()}: {len(rows)}.** {'; '.join(claims)}."))
    return "\n".join(items)


def _wrap(text):
    """The text in lines of at most 120 characters; those of a list item are indented."""
    indent = "  " if text.startswith("- ") else ""
    return textwrap.fill(
        text, 120, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
    )


def cost_markdown(record):
    """What bench.demo measured, as a table, and what it was measured on."""
    rows = [
        [COSTS.get(row["name"], row["name"]), f"{row['value']:.1f}", row["target"]]
        for row in record["checks"]
    ]
    return f"{markdown(['', 'measured', 'limit'], rows)}\n\n{measured_on(record, 'demo')}"


def bench_markdown(records):
    """The figures of every other bench, {name: record}, as one table: value, limit, and whether the limit is met."""
    rows, notes = [], []
    for name, record in records.items():
        for row in record["checks"]:
            value = row["value"] if isinstance(row["value"], str) else f"{row['value']:,.6g}"
            verdict = {True: "yes", False: "**no**", None: ""}[row["holds"]]
            rows.append([f"{name}: {row['name']}", value, row["unit"], row["target"], verdict])
        notes.append(measured_on(record, name))
    return "\n\n".join([markdown(["figure", "measured", "unit", "limit", "met"], rows), *notes])


def measured_on(record, name):
    """The command, commit, machine and package versions of a measurement."""
    machine, versions = record["machine"], record["versions"]
    at = ", ".join(dict.fromkeys(row["commit"] for row in record["checks"]))
    note = f"Measured by `python -m bench.{name}` at {at} on {machine['cpu']}, {machine['cores']} cores, "
    note += f"{machine['memory_gb']} GB, load {machine['load_at_start']} at the start; "
    note += ", ".join(f"{package} {version}" for package, version in versions.items()) + "."
    return _wrap(note)


def page_tables(home: Path | str | None = None) -> dict[str, str]:
    """{marker: markdown} for the result files below `home` (the project folder, if None)."""
    home, tables = Path(home or ROOT), {}
    results = home / "data" / "results"
    if (results / "tiny.csv").exists():
        tables["scores"] = scores_markdown(pd.read_csv(results / "tiny.csv"))
    if (results / "tiny_floors.csv").exists():
        tables["floors"] = floors_markdown(pd.read_csv(results / "tiny_floors.csv"))
    if (results / "claims_tiny.csv").exists():
        verdicts = pd.read_csv(results / "claims_tiny.csv", dtype={"claim": str})
        tables["claims"] = claims_markdown(verdicts)
        tables["verdicts"] = verdicts_markdown(verdicts)
    files = sorted((home / "bench" / "results").glob("*.json"))
    records = {file.stem: json.loads(file.read_text(encoding="utf-8")) for file in files}
    if "demo" in records:
        tables["cost"] = cost_markdown(records.pop("demo"))
    if records:
        tables["bench"] = bench_markdown(records)
    return tables


def fill_pages(home: Path | str | None = None) -> list[str]:
    """Put each table between its markers on one of `PAGES`; returns the markers filled.

    A table whose result file is missing leaves its page as it is. Raises ValueError when the markers of a table are
    on no page or on two.
    """
    home = Path(home or ROOT)
    texts = {
        page: (home / page).read_text(encoding="utf-8") for page in PAGES if (home / page).exists()
    }
    tables = page_tables(home) if texts else {}
    for name, table in tables.items():
        begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
        pages = [page for page, text in texts.items() if begin in text or end in text]
        if len(pages) != 1 or texts[pages[0]].count(begin) != 1 or texts[pages[0]].count(end) != 1:
            raise ValueError(
                f"{begin} and {end} must stand once on one of {', '.join(PAGES)}, around the table"
            )
        before, rest = texts[pages[0]].split(begin)
        texts[pages[0]] = f"{before}{begin}\n{table}\n{end}{rest.split(end)[1]}"
    for page, text in texts.items():
        (home / page).write_text(text, encoding="utf-8")
    return list(tables)
