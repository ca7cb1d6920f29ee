"""MME: two yes/no questions an image, one with each answer; a sub-task scores accuracy plus accuracy of whole pairs.

    mme/    llava_mme.jsonl (LLaVA) beside MME_Benchmark_release_version/ (the authors': TASK/[questions_answers_YN/]*.txt
            and pictures), or eval_tool/Your_Results/TASK.txt for the labels

`perception` (ten tasks, at most 2000) and `cognition` (four, at most 800) are on the official scale, `total` is the sum
over all tasks that were asked; `score` is the same on a scale of 0 to 100, which the mini world and the paper can share.
An image without two answered questions is left out, and counted: the official script stops there.
"""

from pathlib import Path

import numpy as np

from vflan.config import folder_name
from vflan.evaluation.benchmarks.benchmark import Benchmark, Metric, metrics
from vflan.evaluation.benchmarks.files import SHORT, asked, mme_rows, pictures_in, read_rows
from vflan.evaluation.benchmarks.pope import known, yes

PERCEPTION = "existence count position color posters celebrity scene landmark artwork OCR".split()
COGNITION = "commonsense_reasoning numerical_calculation text_translation code_reasoning".split()
RELEASE = "MME_Benchmark_release_version"


def parse(answer, sample=None):
    """'yes', 'no' or 'other': exactly that, or whichever stands in the first four characters (the official rule)."""
    answer = str(answer).lower()
    head = answer if answer in ("yes", "no") else answer[:4]
    return "yes" if "yes" in head else "no" if "no" in head else "other"


def gold(folder):
    """[(task, picture's name without ending, question, answer)] of MME's release, or of its folder of TASK.txt."""
    folder, found = Path(folder), []
    for name in (RELEASE, f"{RELEASE}/{RELEASE}", "eval_tool/Your_Results", "."):
        root = folder / name
        for task in sorted(
            p
            for p in (root.iterdir() if root.is_dir() else ())
            if p.name not in (RELEASE, "eval_tool")
        ):
            if task.suffix == ".txt":
                found += [
                    (task.stem, r["id"].split("/")[1], r["prompt"], r["gold"])
                    for r in mme_rows(task)
                ]
            elif task.is_dir():
                texts = task / "questions_answers_YN"
                for path in sorted((texts if texts.is_dir() else task).glob("*.txt")):
                    lines = (
                        line.split("\t")
                        for line in path.read_text(encoding="utf-8-sig").splitlines()
                    )
                    found += [
                        (task.name, path.stem, cells[0], cells[1].strip())
                        for cells in lines
                        if len(cells) == 2
                    ]
        if found:
            break
    return found


def read(path, labels, keep):
    here = path if path.is_dir() else path.parent
    image = pictures_in(here, RELEASE, f"{RELEASE}/{RELEASE}", "images")
    right = {(task, stem, asked(question)): answer for task, stem, question, answer in gold(labels)}
    if path.is_dir():
        rows = [dict(question_id=f"{task}/{stem}", image=f"{task}/{stem}.jpg", category=task,
                     text=question.replace("Please answer yes or no.", "").strip() + SHORT)
                for task, stem, question, _ in gold(path)]  # fmt: skip
    else:
        rows = read_rows(path)
    samples = []
    for row in rows:
        task, stem = (
            row["question_id"].split("/")[0],
            row["question_id"].split("/")[-1].split(".")[0],
        )
        samples.append(row | {"label": right.get((task, stem, asked(row["text"]))), "image": image(row["image"]),
                              "category": task, "aliases": [f"{task}/{stem}"]})  # fmt: skip
    return samples


def by_picture(samples):
    """The indices of each picture's questions."""
    groups = {}
    for i, s in enumerate(samples):
        groups.setdefault((s["category"], str(s["image"])), []).append(i)
    return list(groups.values())


def find_unpaired(samples, answers):
    """Those of `samples` that can be scored but whose picture has not exactly two such questions."""
    good = [
        s for i, s in enumerate(samples) if known(s) and (answers is None or answers[i] is not None)
    ]
    return [good[i] for members in by_picture(good) if len(members) != 2 for i in members]


def items(samples, answers):
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

    found = {"total": points(tasks)}
    if set(tasks) <= {*PERCEPTION, *COGNITION}:  # the mini world has tasks of its own
        parts = {"perception": PERCEPTION, "cognition": COGNITION} | {
            f"total/{task}": [task] for task in tasks
        }
        found |= {
            name: points(here)
            for name, part in parts.items()
            if (here := [t for t in tasks if t in part])
        }
    single = metrics("accuracy", [right[i] for members in pairs for i in members], rows)
    return single | metrics("accuracy_plus", both, heads) | score | found


def upload(samples, answers, folder):
    """MME's result folder, TASK.txt each, as its calculation.py reads it: file, question, right answer, answer."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    for task in dict.fromkeys(s["category"] for s in samples):
        lines = []
        for s, a in zip(samples, answers):
            if s["category"] == task:
                question = s["text"].removesuffix(SHORT) + " Please answer yes or no."
                answer = " ".join(str(a or "").split())  # a tab or a line break would end the cell
                lines.append(
                    "\t".join(
                        (Path(s["image"]).stem + ".txt", question, s["label"].capitalize(), answer)
                    )
                    + "\n"
                )
        (Path(folder) / f"{folder_name(task, 'task')}.txt").write_text(
            "".join(lines), encoding="utf-8"
        )


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
)
