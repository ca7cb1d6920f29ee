"""What notebook 01 says about a samples file: its tasks, its examples, its sound and odd rows.

The file may be anybody's. Its tasks may have any name or none, its rows may lack turns, a text or a
picture. Groups and categories are shown for tasks that a list places; every other task and row is
counted under a name of its own, and none is left out in silence.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from datasets import Dataset

from vflan.analysis.plots import NO_GROUP, paper, paper_tasks, task_list
from vflan.config import resolve, shown
from vflan.data.conversation import audit
from vflan.data.images import read_picture
from vflan.data.mixture import mixture_record, recipe_samples
from vflan.data.samples import load_samples
from vflan.escape import for_terminal
from vflan.evaluation.benchmarks import BENCHMARKS
from vflan.tools.parameters import data_paths

if TYPE_CHECKING:
    from vflan.config import Preset, Recipe
    from vflan.data.validation import Report

# The categories of tasks without a group.
NOT_LISTED, NOT_PLACED = "in no list", "listed without a group"


def open_samples(recipe: Recipe, samples: str = "", images: str = "") -> Dataset:
    """The samples that the parameters of a notebook name, else those of the recipe.

    ValueError: the file holds no rows.
    """
    path, folder = data_paths(recipe, samples, images)
    data = load_samples(path, folder)
    if not len(data):
        raise ValueError(f"{shown(path)} holds no rows, so there is nothing to show.")
    return data


def similar_pictures(
    samples: Dataset, report: Report | None, folder: str, most: int = 3
) -> list[dict]:
    """Pairs of a sample and a benchmark's question whose pictures are alike, for `plots.gallery`.

    report: of `check(samples, against=folder)`. Returns sample, question, sample, question ...
    """
    if report is None or not len(report.contamination):
        return []
    rows, pairs = report.contamination.drop_duplicates("row").head(most), []
    for found in rows.itertuples():
        questions = BENCHMARKS[found.benchmark].load(resolve(folder))
        asked = next(q for q in questions if str(q["question_id"]) == str(found.question_id))
        benchmark = f"{found.benchmark}, {found.kind}"
        pairs += [samples[int(found.row)], dict(asked, category=benchmark)]
    return pairs


# ------------------------------------------------------------------------------------- its tasks


def tasks_of(look: pd.DataFrame, mini_world: pd.DataFrame) -> pd.DataFrame:
    """One row a task of a file: task_name, samples, group, category; in the order of the list.

    The list is the mini world's or Vision-Flan's (data/tasks.csv), whichever names more of the
    file's tasks. A task that it does not name, or does not place, has the group NO_GROUP, and the
    category says which of the two. look: `texture` of the samples. mini_world: `world.table()`.
    """
    tasks = look.task_name.value_counts().rename("samples").rename_axis("task_name").reset_index()
    # The released list has rows without a name: tasks of the paper that were not released.
    lists = [table[table.task_name != ""] for table in (mini_world, task_list())]
    known = max(lists, key=lambda table: tasks.task_name.isin(table.task_name).sum())
    known = known.drop_duplicates("task_name").set_index("task_name")
    for column in ("group", "category"):
        tasks[column] = tasks.task_name.map(known[column])
    is_listed = tasks.task_name.isin(known.index)
    no_group = tasks.group.isna() | (tasks.group == "")
    tasks.loc[no_group, "category"] = np.where(is_listed[no_group], NOT_PLACED, NOT_LISTED)
    tasks.loc[no_group, "group"] = NO_GROUP
    place = {name: number for number, name in enumerate(known.index)}
    order = tasks.task_name.map(place).fillna(len(place)).argsort(kind="stable")
    return tasks.iloc[order].reset_index(drop=True)


def placed(tasks: pd.DataFrame) -> pd.DataFrame:
    """The tasks that have a group."""
    return tasks[tasks.group != NO_GROUP]


def tasks_in_words(tasks: pd.DataFrame) -> str:
    """How many tasks there are, and what is not known of them. tasks: `tasks_of` the samples."""
    names = {kind: tasks.task_name[tasks.category == kind] for kind in (NOT_LISTED, NOT_PLACED)}
    counts = f"{tasks.samples.sum():,} samples of {len(tasks)} tasks"
    lines = [f"{counts}; {len(names[NOT_LISTED])} of them are in no list"]
    if len(names[NOT_PLACED]):
        listed = _some_names(names[NOT_PLACED])
        lines.append(f"{len(names[NOT_PLACED])} are in the list, which gives no group: {listed}")
    if placed(tasks).empty:
        lines.append(
            "Groups and categories are not shown, here and below: no task is one of Vision-Flan's "
            "or of the mini world's."
        )
    elif len(names[NOT_LISTED]):
        lines.append(f'in no list, shown as "{NO_GROUP}": {_some_names(names[NOT_LISTED])}')
    if unnamed := tasks.samples[tasks.task_name == ""].sum():
        lines.append(f"{unnamed:,} samples have no task_name and count as one task")
    return "\n".join(lines)


def _some_names(names: Iterable[str], most: int = 5) -> str:
    """The first names, long ones cut, and how many more there are."""
    names = [for_terminal(name) for name in names]
    names = [name if len(name) <= 60 else f"{name[:59]}\u2026" for name in names]
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(name or "(no name)" for name in names[:most]) + more


def task_counts(tasks: pd.DataFrame) -> pd.DataFrame:
    """Tasks and samples by group and category; by task name where no task has a group."""
    if placed(tasks).empty:
        return tasks.sort_values("samples", ascending=False)[["task_name", "samples"]]
    sums = dict(tasks=("task_name", "size"), samples=("samples", "sum"))
    return tasks.groupby(["group", "category"]).agg(**sums)


def beside_paper(tasks: pd.DataFrame) -> pd.DataFrame:
    """Section 2 of the paper beside a file: what, paper, here, verdict.

    Categories and groups are compared only where a task has one.
    """
    own, groups = placed(tasks), paper_tasks().group.value_counts()
    printed = paper().query("item == 'Section 2' and row == 'dataset'").set_index("column").value
    printed = printed.astype(float)
    rows = [("tasks", printed["tasks"], len(tasks))]
    if len(own):
        rows.append(("fine categories", printed["fine categories"], own.category.nunique()))
    rows.append(("most instances of a task", printed["cap per task"], tasks.samples.max()))
    if len(own):
        rows.append(("largest group", groups.idxmax(), own.group.value_counts().idxmax()))
    table = pd.DataFrame(rows, columns=["what", "paper", "here"])
    return table.assign(verdict=[_verdict(theirs, ours) for _, theirs, ours in rows])


def _verdict(theirs, ours):
    if isinstance(theirs, float):
        return f"{ours / theirs:.0%} of the paper's"
    return "same" if theirs == ours else "differs"


# -------------------------------------------------------------------------------------- its rows


def sound_rows(report: Report) -> np.ndarray:
    """The numbers of the rows that training takes as they are, ascending."""
    return np.setdiff1d(np.arange(report.rows), [*report.bad.row, *report.repaired.row])


def sound_sample(samples: Dataset, report: Report) -> dict | None:
    """The first sound row that shows a picture, else the first sound one; None if all are bad.

    It is looked for among the first 1,000 sound rows.
    """
    rows = (samples[int(row)] for row in sound_rows(report)[:1000])
    first = next(rows, None)
    if first is None or first["image"]:
        return first
    return next((row for row in rows if row["image"]), first)


def usable_part(samples: Dataset, n: int, with_picture: bool = False) -> Dataset:
    """The first `n` rows that training takes: to look at, where nothing has been checked yet.

    There are fewer where the samples have no more. with_picture: only rows that show one.
    ValueError: there is none.
    """
    rows = []
    for number, row in enumerate(samples):
        if len(rows) == n:
            break
        try:
            has_image = audit(row["conversations"]).has_image
            if has_image:
                read_picture(row["image"] or "")
        except (OSError, ValueError):
            continue  # `train` counts such rows and names them
        if has_image == bool(row["image"]) and (has_image or not with_picture):
            rows.append(number)
    if not rows:
        what = " and shows a picture" if with_picture else ""
        raise ValueError(f"No row can be trained on{what}; vflan.check(samples) says why.")
    return samples.select(rows)


def broken_copies(sample: dict) -> Dataset:
    """A sound row, broken in four ways: no answer, an empty one, no `<image>`, no such picture."""
    question, answer = sample["conversations"][:2]
    silent = [question, answer | {"value": ""}]
    lost = [question | {"value": "What is this?"}, answer]
    rows = [sample | {"conversations": turns} for turns in ([question], silent, lost)]
    return Dataset.from_list([*rows, sample | {"image": "nowhere.png"}])


def examples(look: pd.DataFrame, tasks: pd.DataFrame, n: int = 8) -> list[int]:
    """The numbers of the first rows of `n` tasks: up to three of each group, then any others."""
    first = look.task_name.drop_duplicates()
    chosen = first.isin(tasks.groupby("group").task_name.head(3))
    rows = [*first.index[chosen], *first.index[~chosen]]
    return sorted(rows[:n])


def first_questions(samples: Dataset) -> pd.Series:
    """The first question of each row, without `<image>`; "" for a row without turns."""
    texts = [turns[0]["value"] if turns else "" for turns in samples["conversations"][:]]
    return pd.Series(texts, dtype=object).str.replace("<image>", "").str.strip()


def extremes(samples: Dataset, look: pd.DataFrame) -> pd.DataFrame:
    """The longest answer, the longest question and the most turns: what, task, text."""
    rows = []
    columns = {"answer": "longest answer", "question": "longest question", "turns": "most turns"}
    for column, what in columns.items():
        sample = samples[int(look[column].idxmax())]
        texts = [turn["value"] for turn in sample["conversations"]]
        number = 0 if column == "question" else 1
        text = texts[number] if number < len(texts) else "(no such turn)"
        rows.append((what, sample["task_name"], text))
    return pd.DataFrame(rows, columns=["what", "task", "text"])


# ------------------------------------------------------------------------- the sets of a preset


def drawn_rows(recipes: Preset) -> Iterator[str]:
    """A line for each stage of a preset: the rows that it draws, or which file is not there."""
    for recipe in recipes:
        if not _is_there(recipe):
            yield f"{recipe.stage:9} {recipe.samples} is not here"
            continue
        record = mixture_record(recipe, recipe_samples(recipe))
        counts = f"{record['rows']:6,} rows of {len(record['tasks'])} tasks"
        yield f"{recipe.stage:9} {counts}, in the order {record['order'][:12]}"


def stage_samples(recipes: Preset) -> list[Dataset]:
    """The whole files of a preset's stages; one that is not there is left out, with a line."""
    sets = []
    for recipe in recipes:
        if _is_there(recipe):
            sets.append(load_samples(resolve(recipe.samples), resolve(recipe.images)))
        else:
            print(f"{recipe.stage}: {recipe.samples} is not here, so nothing of it is shown.")
    return [samples for samples in sets if len(samples)]


def _is_there(recipe):
    try:
        load_samples(resolve(recipe.samples), resolve(recipe.images))
    except FileNotFoundError:
        return False
    return True
