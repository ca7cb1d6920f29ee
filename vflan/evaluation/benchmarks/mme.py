"""MME: two yes/no questions an image, one with each answer.

    mme/    llava_mme.jsonl (LLaVA), MME_Benchmark_release_version/ (the authors':
            TASK/[questions_answers_YN/]*.txt and pictures), or eval_tool/Your_Results/TASK.txt
            for the labels (eval_tool itself can be given as labels too)

A sub-task scores its accuracy plus the accuracy of whole pairs. `perception` (ten tasks, at most
2000) and `cognition` (four, at most 800) are on the official scale; `total` is the sum over all
tasks in the set. `score` is the total on a scale of 0 to 100, which makes the mini world and the
paper comparable. An image without two answered questions is left out and counted; the official
script stops there.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np

from vflan.config import folder_name
from vflan.evaluation.benchmarks.benchmark import Benchmark, Metric, metrics
from vflan.evaluation.benchmarks.files import (
    SHORT,
    bare_question,
    mme_rows,
    pictures_in,
    read_rows,
    read_text,
)
from vflan.evaluation.benchmarks.pope import known, yes

PERCEPTION = "existence count position color posters celebrity scene landmark artwork OCR".split()
COGNITION = "commonsense_reasoning numerical_calculation text_translation code_reasoning".split()
RELEASE = "MME_Benchmark_release_version"


def parse(answer: str, sample: dict | None = None) -> str:
    """'yes', 'no' or 'other', by the official rule: the first four characters contain it."""
    answer = str(answer).lower()
    head = answer if answer in ("yes", "no") else answer[:4]
    return "yes" if "yes" in head else "no" if "no" in head else "other"


def gold(folder: Path) -> list[tuple[str, str, str, str]]:
    """(task, picture name without ending, question, answer) of MME's release or its TASK.txt."""
    if Path(folder).is_file():
        return gold_of_task(Path(folder))
    for name in (RELEASE, f"{RELEASE}/{RELEASE}", "eval_tool/Your_Results", "Your_Results", "."):
        root = Path(folder) / name
        entries = root.iterdir() if root.is_dir() else ()
        tasks = sorted(path for path in entries if path.name not in (RELEASE, "eval_tool"))
        if rows := [row for task in tasks for row in gold_of_task(task)]:
            return rows
    return []


def gold_of_task(task: Path) -> list[tuple[str, str, str, str]]:
    """The rows of one TASK.txt, or of the folder of a task; none for any other file."""
    if task.suffix == ".txt":
        rows = mme_rows(task)
        return [(task.stem, r["id"].split("/")[1], r["prompt"], r["gold"]) for r in rows]
    if not task.is_dir():
        return []
    texts = task / "questions_answers_YN"
    rows = []
    for path in sorted((texts if texts.is_dir() else task).glob("*.txt")):
        for line in read_text(path).splitlines():
            cells = line.split("\t")
            if len(cells) == 2:
                rows.append((task.name, path.stem, cells[0], cells[1].strip()))
    return rows


def read(path: Path, labels: Path, keep: Callable) -> list[dict]:
    """The questions of LLaVA's file or of the release; labels by task, picture and question."""
    here = path if path.is_dir() else path.parent
    image = pictures_in(here, RELEASE, f"{RELEASE}/{RELEASE}", "images")
    right = {
        (task, stem, bare_question(question)): answer
        for task, stem, question, answer in gold(labels)
    }
    if path.is_dir():
        rows = [
            dict(
                question_id=f"{task}/{stem}",
                image=f"{task}/{stem}.jpg",
                category=task,
                text=question.replace("Please answer yes or no.", "").strip() + SHORT,
            )
            for task, stem, question, _ in gold(path)
        ]
    else:
        rows = read_rows(path)
    samples = []
    for row in rows:
        parts = row["question_id"].split("/")
        task, stem = parts[0], parts[-1].split(".")[0]
        samples.append(
            row
            | {
                "label": right.get((task, stem, bare_question(row["text"]))),
                "image": image(row["image"]),
                "category": task,
                # LLaVA's answers have the ending of the picture, result files have none.
                "aliases": [f"{task}/{stem}{ending}" for ending in ("", ".jpg", ".png")],
            }
        )
    return samples


def by_picture(samples: list[dict]) -> list[list[int]]:
    """The indices of each picture's questions."""
    groups = {}
    for i, s in enumerate(samples):
        groups.setdefault((s["category"], str(s["image"])), []).append(i)
    return list(groups.values())


def find_unpaired(samples: list[dict], answers: list[str | None] | None) -> list[dict]:
    """The samples that can be scored, but whose picture does not have exactly two of them."""
    good = [
        s for i, s in enumerate(samples) if known(s) and (answers is None or answers[i] is not None)
    ]
    return [good[i] for members in by_picture(good) if len(members) != 2 for i in members]


def items(samples: list[dict], answers: list[str]) -> dict[str, Metric]:
    """accuracy, accuracy_plus (both questions of a picture right), score and the points."""
    pairs = [members for members in by_picture(samples) if len(members) == 2]
    if not pairs:
        return {}
    right = np.array([parse(a) == s["label"].lower() for s, a in zip(samples, answers)], float)
    rows = [samples[i] for members in pairs for i in members]
    heads = [samples[first] for first, _ in pairs]
    both = np.array([right[members].all() for members in pairs], float)
    mean = np.array([right[members].mean() for members in pairs])
    score = metrics("score", (mean + both) / 2, heads)
    tasks = list(dict.fromkeys(s["category"] for s in heads))

    def points(tasks):
        """The sum over tasks of 100 x accuracy + 100 x accuracy of pairs."""
        part = score["score"].where(np.isin(score["score"].group, tasks))
        return Metric(part.num * 2 * len(tasks), part.den, part.group, part.cluster)

    measured = {"total": points(tasks)}
    if set(tasks) <= {*PERCEPTION, *COGNITION}:  # the mini world has tasks of its own
        parts = {"perception": PERCEPTION, "cognition": COGNITION}
        parts |= {f"total/{task}": [task] for task in tasks}
        for name, part in parts.items():
            if present := [task for task in tasks if task in part]:
                measured[name] = points(present)
    single = metrics("accuracy", [right[i] for members in pairs for i in members], rows)
    return single | metrics("accuracy_plus", both, heads) | score | measured


def upload(samples: list[dict], answers: list[str], folder: Path) -> None:
    """MME's result folder with one TASK.txt a task, as its calculation.py reads it.

    Columns: file, question, right answer, answer. ValueError for a question without picture or
    label, because both are columns.
    """
    if lacking := [s["question_id"] for s in samples if not (s["image"] and s["label"])]:
        raise ValueError(
            f"mme: {len(lacking)} questions have no picture or no label (first: {lacking[0]}): its "
            "result files need both."
        )
    Path(folder).mkdir(parents=True, exist_ok=True)
    for task in dict.fromkeys(s["category"] for s in samples):
        lines = []
        for s, a in zip(samples, answers):
            if s["category"] == task:
                question = s["text"].removesuffix(SHORT) + " Please answer yes or no."
                answer = " ".join(str(a or "").split())  # a tab or a line break would end the cell
                file = Path(s["image"]).stem + ".txt"
                cells = (file, question, s["label"].capitalize(), answer)
                lines.append("\t".join(cells) + "\n")
        path = Path(folder) / f"{folder_name(task, 'task')}.txt"
        path.write_text("".join(lines), encoding="utf-8")


MME = Benchmark(
    name="mme",
    title="MME",
    paper="MME",
    headline="score",
    parse=parse,
    measure=items,
    read=read,
    released=("llava_mme.jsonl",),
    source="LLaVA's eval.zip, labels and pictures from MME's authors",
    size=2374,
    known=known,
    find_unpaired=find_unpaired,
    blind=yes,
    upload=upload,
    upload_name="mme_upload",
)
