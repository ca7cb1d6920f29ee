"""The papers' printed numbers and task lists (data/paper.csv, data/tasks.csv), and names to print.

No matplotlib and no torch here: tables and plots both read this module.
"""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd

from vflan.config import resolve
from vflan.evaluation.benchmarks import BENCHMARKS

NO_GROUP = "no group"  # of tasks that no list places
Scores = pd.DataFrame  # a table of vflan.evaluate: one row for each run, seed and metric
TITLES = BENCHMARKS.titles()  # {benchmark: its name in figures and tables}
CAPTIONS = json.loads((Path(__file__).parents[1] / "captions.json").read_text(encoding="utf-8"))
UNITS = {"f1": "F1", "score": "score", "accuracy": "accuracy, %", "yes_ratio": "share of yes, %"}
UNITS |= {"format": "answers, %", "hallucination": "pairs, %", "words": "words"}
UNITS |= {"recall": "words found, %", "coverage_capitalised": "names, %"}


def paper() -> pd.DataFrame:
    """data/paper.csv, the printed numbers of both papers, all as text.

    Columns: paper, item, row, column, value, unit, confirmed, note.
    """
    return pd.read_csv(resolve("data/paper.csv"), keep_default_na=False)


def task_list() -> pd.DataFrame:
    """data/tasks.csv: the 205 task names of the project's site and their place in the paper."""
    return pd.read_csv(resolve("data/tasks.csv"), keep_default_na=False)


def paper_tasks() -> pd.DataFrame:
    """The 188 tasks of the paper's lists, a row each.

    Four of them match two released names each; those are counted once.
    """
    tasks = task_list()
    return tasks[tasks.in_paper != "no"].drop_duplicates("note")


def printed(item: str, row: str, column: str) -> tuple[float, bool] | None:
    """(value, confirmed) of a number that the Vision-Flan paper prints, None if it is unknown.

    The value is on a scale of 0 to 100; MME is in percent of its 2000 points. `confirmed` is True
    if the number was read in the paper, False if it is known second-hand only.
    """
    table = paper()
    place = (table.item == item) & (table.row == row) & (table.column == column)
    match = table[(table.paper == "vision-flan") & place]
    if match.empty:
        return None
    value = float(match.value.iloc[0])
    return value / 20 if column == "MME" else value, match.confirmed.iloc[0] == "yes"


def headline(scores: Scores, benchmark: str, metric: str | None = None) -> Scores:
    """The rows of one metric of a benchmark (by default its headline), in the order of the runs."""
    metric = metric or BENCHMARKS[benchmark].headline
    return scores[(scores.benchmark == benchmark) & (scores.metric == metric)]


def unit(benchmark: str, metric: str | None = None) -> str:
    """What an axis of a benchmark's metric (by default its headline) is labelled with."""
    metric = metric or BENCHMARKS[benchmark].headline
    name = UNITS.get(metric, metric)
    return f"{name}, % of maximum" if benchmark == "mme" and metric == "score" else name
