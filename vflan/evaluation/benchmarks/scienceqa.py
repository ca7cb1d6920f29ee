"""ScienceQA: school questions with lettered options. The papers report the half with a picture.

    scienceqa/    llava_test_CQM-A.json (LLaVA); problems.json and pid_splits.json (the authors');
                  images/test/

`img_accuracy` is the published number, `accuracy` that of all questions of the test set. A missing
answer is wrong, as in LLaVA's script. An answer without a letter in one of the allowed forms is
wrong too (some harnesses guess there).
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np

from vflan.evaluation.benchmarks.benchmark import Benchmark, Metric, metrics
from vflan.evaluation.benchmarks.files import LETTER, find, pictures_in, read_rows

LETTERS = "ABCDE"


def parse(answer: str, sample: dict | None = None) -> str | None:
    """The letter, or None: 'B', 'B. ...', or 'The answer is B.' exactly once.

    Any character may follow the letter in the last form. Letters are A to E, or those of the
    sample's `letters`.
    """
    answer, letters = str(answer), (sample or {}).get("letters", LETTERS)
    if len(answer) == 1 and answer in letters:
        return answer
    if len(answer) >= 3 and answer[0] in letters and answer[1:3] == ". ":
        return answer[0]
    matches = re.findall(
        r"The answer is ([a-z])." if letters.islower() else r"The answer is ([A-Z]).", answer
    )
    return matches[0] if len(matches) == 1 and matches[0] in letters else None


def read(path: Path, labels: Path, keep: Callable) -> list[dict]:
    """LLaVA's json, with the labels of problems.json or of its own; or problems.json itself."""
    data, samples = read_rows(path), []
    image = pictures_in(path.parent, "images/test", "images", "test")
    if isinstance(data, dict):
        splits = find(labels, "pid_splits.json")
        chosen = read_rows(splits)["test"] if splits and splits != path else list(data)
        rows = [
            dict(
                question_id=id,
                text=question(data[id]) + LETTER,
                image=f"{id}/image.png" if data[id].get("image") else None,
            )
            for id in chosen
        ]
        problems = data
    else:
        rows = []
        for q in data:
            human, *answers = (turn["value"] for turn in q["conversations"])
            text = human.replace("<image>", "").strip()
            text = text if text.endswith(LETTER) else text + LETTER
            rows.append(
                dict(
                    question_id=q["id"],
                    text=text,
                    image=q.get("image"),
                    label=parse(answers[0]) if answers else None,
                )
            )
        file = find(labels, "problems.json")
        problems = read_rows(file) if file and file != path else {}
    for row in rows:
        problem = problems.get(str(row["question_id"]))
        if problem and isinstance(problem.get("answer"), int):
            row["label"] = (
                LETTERS[problem["answer"]] if 0 <= problem["answer"] < len(LETTERS) else None
            )
        samples.append(
            row | {"image": image(row["image"]), "category": "image" if row["image"] else "text"}
        )
    return samples


def question(problem: dict) -> str:
    """A problem of the authors' file in the shape of LLaVA's: hint, question, options."""
    hint = [f"Context: {problem['hint']}"] if problem.get("hint") else []
    return "\n".join(
        hint + [problem["question"]] + [f"{x}. {c}" for x, c in zip(LETTERS, problem["choices"])]
    )


def known(sample: dict) -> bool:
    """Whether the label is one of the letters."""
    return sample["label"] in tuple(sample.get("letters", LETTERS))


def items(samples: list[dict], answers: list[str]) -> dict[str, Metric]:
    """Accuracy of questions with a picture, of all, and of those without."""
    right = [parse(a, s) == s["label"] for s, a in zip(samples, answers)]
    with_picture = np.array([bool(s["image"]) for s in samples])
    whole = metrics("accuracy", right, samples, pooled=True)["accuracy"]
    parts = {
        "img_accuracy": with_picture,
        "accuracy": with_picture | True,
        "text_accuracy": ~with_picture,
    }
    return {name: whole.where(mask) for name, mask in parts.items() if mask.any()}


SCIENCEQA = Benchmark(
    name="scienceqa",
    title="ScienceQA",
    paper="SQA-I",
    headline="img_accuracy",
    parse=parse,
    measure=items,
    read=read,
    released=("llava_test_CQM-A.json", "problems.json"),
    source="LLaVA's eval.zip, and data/scienceqa of the ScienceQA repository",
    size=4241,
    known=known,
    missing="wrong",
)
