"""GQA: compositional questions, exact match.

    gqa/    llava_gqa_testdev_balanced.jsonl (LLaVA), images/,
            testdev_balanced_questions.json (the authors')

An answer is right if it equals the label in lower case and without a full stop at its end. The
official script refuses a set with missing answers; here they are left out and counted.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from vflan.evaluation.benchmarks.benchmark import Benchmark, Metric, labelled, metrics
from vflan.evaluation.benchmarks.files import SHORT, find, pictures_in, read_rows
from vflan.evaluation.benchmarks.vqa import write_json


def parse(answer: str, sample: dict | None = None) -> str:
    """Lower case, without a full stop at the end."""
    return str(answer).rstrip(".").lower()


def read(path: Path, labels: Path, keep: Callable) -> list[dict]:
    """The questions of the authors' file, or LLaVA's with the authors' labels."""
    data = read_rows(path)
    image = pictures_in(path.parent, "images", "data/images")
    if isinstance(data, dict):
        return [
            row(id, q) | dict(text=q["question"] + SHORT, image=image(f"{q['imageId']}.jpg"))
            for id, q in data.items()
        ]
    samples = [dict(q, image=image(q.get("image")), category="query") for q in data]
    if file := find(labels, "testdev_balanced_questions.json", "*questions.json"):
        by_id = read_rows(file)
        samples = [
            s
            | (row(s["question_id"], by_id[s["question_id"]]) if s["question_id"] in by_id else {})
            for s in samples
        ]
    return samples


def row(id: str, question: dict) -> dict:
    """The id, label and category (structure) of a question in the authors' file."""
    kind = (question.get("types") or {}).get("structural", "query")
    return dict(question_id=id, label=question.get("answer"), category=kind)


def items(samples: list[dict], answers: list[str]) -> dict[str, Metric]:
    """`accuracy`, of all and by structure, and of open questions ('query') and binary ones."""
    right = [parse(a) == s["label"] for s, a in zip(samples, answers)]
    measured = metrics("accuracy", right, samples, pooled=True)
    by_kind = [s | {"category": "open" if s["category"] == "query" else "binary"} for s in samples]
    return measured | {
        k: m for k, m in metrics("accuracy", right, by_kind).items() if k != "accuracy"
    }


def upload(samples: list[dict], answers: list[str], path: Path) -> None:
    """The list of {questionId, prediction} that the authors' eval.py reads."""
    write_json(
        path,
        [
            {"questionId": s["question_id"], "prediction": parse(a or "")}
            for s, a in zip(samples, answers)
        ],
    )


GQA = Benchmark(
    name="gqa",
    title="GQA",
    paper="GQA",
    headline="accuracy",
    parse=parse,
    measure=items,
    read=read,
    released=("llava_gqa_testdev_balanced.jsonl", "testdev_balanced_questions.json"),
    source="LLaVA's eval.zip, and the questions of the GQA project",
    size=12578,
    known=labelled,
    upload=upload,
)
