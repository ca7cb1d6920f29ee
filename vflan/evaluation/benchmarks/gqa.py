"""GQA: compositional questions, exact match.

    gqa/    llava_gqa_testdev_balanced.jsonl (LLaVA), images/,
            testdev_balanced_questions.json (the authors')

An answer is right if it equals the label, both in lower case and without a full stop at the end.
LLaVA's converter writes answers so, and the official script compares them with the labels as they
stand: there an answer to a label with a capital is never right. `official_accuracy` is the number
of that script. It is only given where the two can differ. The script refuses a set with missing
answers; here they are left out and counted.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from vflan.evaluation.benchmarks.benchmark import Benchmark, Metric, labelled, metrics
from vflan.evaluation.benchmarks.files import SHORT, find, pictures_in, read_rows
from vflan.evaluation.benchmarks.vqa import write_json


def parse(answer: str, sample: dict | None = None) -> str:
    """An answer or a label in lower case, without a full stop at the end."""
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
        ids = [str(s["question_id"]) for s in samples]
        samples = [s | (row(id, by_id[id]) if id in by_id else {}) for id, s in zip(ids, samples)]
    return samples


def row(id: str, question: dict) -> dict:
    """The id, label and category (structure) of a question in the authors' file."""
    kind = (question.get("types") or {}).get("structural", "query")
    return dict(question_id=id, label=question.get("answer"), category=kind)


def items(samples: list[dict], answers: list[str]) -> dict[str, Metric]:
    """`accuracy`, of all and by structure, and of open questions ('query') and binary ones;
    `official_accuracy` if a label differs from its parsed form.
    """
    labels = [str(s["label"]) for s in samples]
    right = [parse(a) == parse(label) for a, label in zip(answers, labels)]
    measured = metrics("accuracy", right, samples, pooled=True)
    if any(parse(label) != label for label in labels):
        as_is = [parse(a) == label for a, label in zip(answers, labels)]
        name = "official_accuracy"
        measured[name] = metrics(name, as_is, samples, pooled=True)[name]
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
    upload_name="testdev_balanced_predictions.json",  # which eval.py looks for
)
