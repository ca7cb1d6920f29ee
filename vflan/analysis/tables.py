"""Results on a page: the tables of the project's pages and of the report, the list of figures."""

from __future__ import annotations

import json
import re
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from urllib.parse import quote

import pandas as pd

from vflan.analysis.claims import FEW, HOLDS, NOT, READ, WEAKLY
from vflan.analysis.plots.reference import CAPTIONS, TITLES, UNITS, Scores, headline, printed
from vflan.config import ROOT, resolve, shown
from vflan.data.images import open_picture
from vflan.escape import for_markdown
from vflan.evaluation.answer_cache import read_scores
from vflan.evaluation.benchmarks import BENCHMARKS

# Pages with generated tables, each between <!-- NAME:begin --> and <!-- NAME:end -->.
PAGES = ("README.md", "docs/results.md", "docs/measurements.md")
STAGES = {"projector": "projector", "base": "Base", "chat": "Chat"}  # run -> column
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

# ---------------------------------------------------------------------- the list of figures


def caption(picture: Path) -> str:
    """A figure's description in the PNG, else in captions.json, else its file name in words."""
    with open_picture(picture) as image:
        description = getattr(image, "text", {}).get("Description")
    kinds = {"fig": "Figure", "table": "Table"}
    name = re.sub(r"^(fig|table)(\d\w*?)_", lambda m: f"{kinds[m[1]]} {m[2]}: ", picture.stem)
    return description or CAPTIONS.get(picture.stem) or name.replace("_", " ")


def pictures(folder: str | Path) -> list[tuple[Path, str]]:
    """The PNG figures of a folder, [(path, caption)], in the order of the paper; others follow."""
    order = {name: place for place, name in enumerate(CAPTIONS)}

    def place(path):
        number = [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", path.stem)]
        return order.get(path.stem, len(order)), number  # Figure 4 before Figure 10

    return [(path, caption(path)) for path in sorted(Path(folder).glob("*.png"), key=place)]


def write_gallery(preset: str, folder: str | Path, page: Path) -> int:
    """Write a markdown page with the figures of `folder` and captions; returns their number."""
    figures = pictures(folder)
    title = f"# Figures of the {for_markdown(preset)} preset"
    parts = [title, "Drawn by the notebooks; this page is generated."]
    for path, text in figures:
        words, address = for_markdown(text), quote(path.relative_to(page.parent).as_posix())
        parts += [f"![{words}]({address})", words]
    page.parent.mkdir(parents=True, exist_ok=True)
    page.write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    return len(figures)


# ---------------------------------------------------------------------- tables of scores


def _without_seeds(scores):
    """The scores with run names that do not tell a seed: `base-seed3` is `base`."""
    return scores.assign(run=scores.run.str.replace(r"-seed\d+$", "", regex=True))


def headlines(scores: Scores) -> dict[str, Scores]:
    """{"POPE F1": its rows}: the headline metric of each benchmark in `scores`.

    The runs of the rows have names without a seed.
    """
    rows_of, scores = {}, _without_seeds(scores)
    for name, benchmark in BENCHMARKS.items():
        if len(rows := headline(scores, name)):
            rows_of[f"{TITLES[name]} {UNITS.get(benchmark.headline, benchmark.headline)}"] = rows
    return rows_of


def mean_scores(scores: Scores) -> pd.DataFrame:
    """The headlines, a row for each run and a column for each benchmark: the mean over seeds."""
    means = {title: rows.groupby("run", sort=False).value.mean()
             for title, rows in headlines(scores).items()}  # fmt: skip
    runs = _without_seeds(scores).run.unique()
    return pd.DataFrame(means).reindex(runs).dropna(how="all").round(1)


def summary(
    scores: Scores, floors: pd.DataFrame | None = None, verdicts: pd.DataFrame | None = None
) -> list[str]:
    """What came out, in at most three sentences: Base, Chat, then the floors or claims.

    A stage is called better or worse than the one before it on a benchmark if their intervals do
    not overlap in any seed.
    """
    sentences = []
    for stage, before, name in (
        ("base", "projector", "the projector stage"),
        ("chat", "base", "Base"),
    ):
        if words := _changes(scores, stage, before):
            sentences.append(f"Beside {name}, {STAGES[stage]} is {words}.")
    if verdicts is not None and len(whole := verdicts[verdicts.claim.astype(str).str.isdigit()]):
        counts = whole.verdict.value_counts(sort=False)
        parts = ", ".join(f"{count} {verdict}" for verdict, count in counts.items())
        sentences.append(f"Of the paper's {len(whole)} claims measured: {parts}.")
    elif floors is not None and len(judged := floors.holds.astype(str).loc[lambda f: f != ""]):
        held = int((judged == "True").sum())
        sentences.append(f"{held} of {judged.isin(['True', 'False']).sum()} floors hold.")
    return sentences


def _changes(scores, stage, before):
    """In words, how a stage compares with the one before it; "" if no benchmark has both.

    "better on 2 of 3 benchmarks (most on MME score: 76.2 after 46.1) and worse on 1 of 3 (...)".
    """
    count, moves = 0, {"better": {}, "worse": {}}
    for title, rows in headlines(scores).items():
        new, old = rows[rows.run == stage], rows[rows.run == before]
        if len(new) and len(old):
            count += 1
            values = new.value.mean(), old.value.mean()
            if new.low.min() > old.high.max():
                moves["better"][title] = values
            elif new.high.max() < old.low.min():
                moves["worse"][title] = values
    words = []
    for kind, own in moves.items():
        if own:
            title = max(own, key=lambda title: abs(own[title][0] - own[title][1]))
            most = "{}: {:.1f} after {:.1f}".format(title, *own[title])
            words.append(f"{kind} on {len(own)} of {count} benchmarks (most on {most})")
    if count and not words:
        words = [f"neither better nor worse on any of {count} benchmarks"]
    return " and ".join(words)


def score_rows(scores: Scores) -> tuple[str, list[str], list[list]]:
    """(note, columns, rows) of Table 2: benchmarks by stages, majority answer, the paper's 13B.

    A cell is the mean over seeds, and in brackets the outer ends of the seeds' intervals.
    """
    table = []
    for title, rows in headlines(scores).items():
        majority = rows.baseline.mean()  # NaN where a model judged
        cells = [title, None if pd.isna(majority) else f"{majority:.1f}"]
        for stage in STAGES:
            seeds = rows[rows.run == stage]
            interval = f"[{seeds.low.min():.1f}, {seeds.high.max():.1f}]"
            cells.append(f"{seeds.value.mean():.1f} {interval}" if len(seeds) else None)
        column = BENCHMARKS[rows.benchmark.iloc[0]].paper
        for stage in ("Base", "Chat"):
            value, confirmed = printed("Table 2", f"Vision-Flan {stage}", column) or (None, True)
            cells.append(value and (f"{value:.1f}" if confirmed else f"({value:.1f})"))
        table.append(cells)
    columns = ["benchmark", "majority answer", *STAGES.values(), "paper's Base", "paper's Chat"]
    seeds = sorted(scores[_without_seeds(scores).run.isin(STAGES)].seed.unique())
    means = " (mean; outer ends of the intervals)" if len(seeds) > 1 else ""
    note = f"Intervals: 95 %, over pictures. Seeds: {', '.join(map(str, seeds))}{means}."
    return f"{note} Round brackets: a second source.", columns, table


def compared_with_paper(
    item: str, rows: Mapping[str, str], scores: Scores | None = None
) -> pd.DataFrame:
    """A table of the paper with our number beside each of its own.

    item: the table's name in data/paper.csv. rows: {row of that table: our run}. scores: a table of
    vflan.evaluate; None: the committed long form, data/results/tiny_sweeps.csv. The value of ours
    is the mean over seeds of the benchmark's headline. MME is in percent of its 2000 points. A
    benchmark is left out where one of the two has no number at all.
    """
    if scores is None:
        path = resolve("data/results/tiny_sweeps.csv")
        READ.append(shown(path))
        scores = read_scores(path)
    columns = {}
    for name, benchmark in BENCHMARKS.items():
        own = _without_seeds(headline(scores, name)).groupby("run").value.mean()
        theirs = [printed(item, row, benchmark.paper) for row in rows]
        if any(theirs) and len(own.reindex(list(rows.values())).dropna()):
            columns[TITLES[name], "paper"] = [number and number[0] for number in theirs]
            columns[TITLES[name], "here"] = list(own.reindex(list(rows.values())))
    table = pd.DataFrame(columns, index=list(rows), dtype=float)
    return table.rename_axis(item).round(1)


def in_a_sentence(table: pd.DataFrame, first: str, last: str) -> str:
    """What `compared_with_paper` shows, as a sentence: from its row `first` to its row `last`."""
    parts = []
    for title in dict.fromkeys(name for name, _ in table):
        pairs = [(where, table.loc[first, (title, source)], table.loc[last, (title, source)])
                 for where, source in (("in the paper", "paper"), ("here", "here"))]  # fmt: skip
        known = [(where, a, b) for where, a, b in pairs if a == a and b == b]
        if len(known) == 2:
            numbers = ", ".join(f"{a:.1f} to {b:.1f} {where}" for where, a, b in known)
            parts.append(f"{title} goes from {numbers}")
    changes = "; ".join(parts) or "no benchmark has all four numbers"
    return f"From \u201c{first}\u201d to \u201c{last}\u201d, {changes}."


# ---------------------------------------------------------------------- tables in markdown


def markdown(columns: Sequence[str], rows: Iterable[Sequence]) -> str:
    """A table as markdown; a missing value (None, NaN) leaves its cell empty."""
    cells = [["" if pd.isna(cell) else str(cell) for cell in row] for row in rows]
    return "\n".join(f"| {' | '.join(row)} |" for row in [columns, ["---"] * len(columns), *cells])


def _wrap(text):
    """The text in lines of at most 120 characters; those of a list item are indented."""
    indent = "  " if text.startswith("- ") else ""
    whole_words = dict(break_long_words=False, break_on_hyphens=False)
    return textwrap.fill(text, 120, subsequent_indent=indent, **whole_words)


def scores_markdown(scores: Scores) -> str:
    """Table 2 of the mini world, as `score_rows` makes it."""
    note, columns, rows = score_rows(scores)
    rows = [[for_markdown(title), *cells] for title, *cells in rows]
    return f"{markdown(columns, rows)}\n\n{note}"


def floors_markdown(floors: pd.DataFrame) -> str:
    """The table of `claims.floors`, and how many of them hold."""
    judged = floors.holds.astype(str)
    rows = floors.map(lambda cell: for_markdown(cell) if isinstance(cell, str) else cell)
    rows = rows.assign(holds=judged.map({"True": "yes", "False": "**no**"}).fillna("not judged"))
    held = f"{(judged == 'True').sum()} of {judged.isin(['True', 'False']).sum()} floors hold."
    return f"{markdown(list(rows.columns), rows.itertuples(index=False))}\n\n{held}"


def claims_markdown(verdicts: pd.DataFrame) -> str:
    """The whole claims with their verdicts; their parts (`1a`) are left out."""
    rows = []
    for row in verdicts[verdicts.claim.str.isdigit()].itertuples():
        interval = f" [{row.low:.1f}, {row.high:.1f}]" if row.n_seeds > 1 else ""
        effect = f"{row.effect:+.1f}{interval}" if row.n_seeds else None
        smallest = f"{row.smallest:g}"
        words = for_markdown(row.statement)
        rows.append([row.claim, words, row.n_seeds, effect, smallest, for_markdown(row.verdict)])
    columns = ["", "claim", "seeds", "effect, points", "smallest that counts", "verdict"]
    return markdown(columns, rows)


def verdicts_markdown(verdicts: pd.DataFrame) -> str:
    """The whole claims, one item for each verdict, with the effect of each claim in points."""
    items = []
    whole = verdicts[verdicts.claim.str.isdigit()]
    for verdict in (HOLDS, WEAKLY, NOT, FEW):
        if (rows := whole[whole.verdict == verdict]).empty:
            continue
        words = [for_markdown(statement) for statement in rows.statement]
        claims = [f"({claim}) {text}" + ("" if pd.isna(effect) else f": {effect:+.1f}")
                  for claim, text, effect in zip(rows.claim, words, rows.effect)]  # fmt: skip
        items.append(_wrap(f"- **{verdict.capitalize()}: {len(rows)}.** {'; '.join(claims)}."))
    return "\n".join(items)


def cost_markdown(record: dict) -> str:
    """What bench.demo measured, and on which machine."""
    rows = [[COSTS.get(row["name"], row["name"]), f"{row['value']:.1f}", row["target"]]
            for row in record["checks"]]  # fmt: skip
    return f"{markdown(['', 'measured', 'limit'], rows)}\n\n{measured_on(record, 'demo')}"


def bench_markdown(records: Mapping[str, dict]) -> str:
    """The results of the other benches, {name: record}: value, limit, whether the limit is met."""
    rows, notes = [], []
    for name, record in records.items():
        for row in record["checks"]:
            value = row["value"] if isinstance(row["value"], str) else f"{row['value']:,.6g}"
            met = {True: "yes", False: "**no**", None: ""}[row["holds"]]
            rows.append([f"{name}: {row['name']}", value, row["unit"], row["target"], met])
        notes.append(measured_on(record, name))
    return "\n\n".join([markdown(["figure", "measured", "unit", "limit", "met"], rows), *notes])


def measured_on(record: dict, name: str) -> str:
    """The command, commit, machine and package versions of a measurement."""
    machine = record["machine"]
    commits = ", ".join(dict.fromkeys(row["commit"] for row in record["checks"]))
    versions = ", ".join(f"{package} {version}" for package, version in record["versions"].items())
    note = f"Measured by `python -m bench.{name}` at {commits} on {machine['cpu']}, "
    note += f"{machine['cores']} cores, {machine['memory_gb']} GB, "
    return _wrap(f"{note}load {machine['load_at_start']} at the start; {versions}.")


# ---------------------------------------------------------------------- the pages


def page_tables(home: Path | str | None = None) -> dict[str, str]:
    """{marker: markdown} for the result files below `home` (the project folder, if None)."""
    home, tables = Path(home or ROOT), {}
    results = home / "data" / "results"
    if (results / "tiny.csv").exists():
        tables["scores"] = scores_markdown(read_scores(results / "tiny.csv"))
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

    A table whose result file is missing leaves its page as it is. Raises ValueError when the
    markers of a table are on no page or on two.
    """
    home = Path(home or ROOT)
    files = [home / page for page in PAGES if (home / page).exists()]
    texts = {file: file.read_text(encoding="utf-8") for file in files}
    tables = page_tables(home) if texts else {}
    for name, table in tables.items():
        begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
        marked = [file for file, text in texts.items() if begin in text or end in text]
        text = texts[marked[0]] if len(marked) == 1 else ""
        if text.count(begin) != 1 or text.count(end) != 1:
            pages = ", ".join(PAGES)
            raise ValueError(f"{begin} and {end} must stand once on one of {pages}")
        before, after = text.partition(begin)[0], text.partition(end)[2]
        texts[marked[0]] = f"{before}{begin}\n{table}\n{end}{after}"
    for file, text in texts.items():
        file.write_text(text, encoding="utf-8")
    return list(tables)
