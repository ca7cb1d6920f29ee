"""POPE: is there an X in the image?

    pope/    llava_pope_test.jsonl (LLaVA); coco_pope_random.json, _popular and _adversarial (the
             authors'; of the random file the one with 2,910 lines); val2014/ or images/ (COCO)

Questions are about objects that are present, and about random, popular and adversarial absent ones.
Answers are parsed as in the official script, oddities included, so that numbers compare: 'Yes,
there is no doubt' counts as no, and 'NO' as yes. Labels are looked up by category, picture and
question, never by order. The official script joins by order; with the wrong release of the random
file it reports an F1 of .46 for answers worth .87. A missing answer would shift all others there;
here it is left out and counted.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np

from vflan.evaluation.benchmarks.benchmark import Benchmark, Metric, metrics
from vflan.evaluation.benchmarks.files import bare_question, pictures_in, read_rows

# Of the label files that belong to LLaVA's questions.
SHA256 = {
    "coco_pope_random.json": "c16b65d2df6d70bb0814c8a4375833d39cdb09928fd936d3fc546491efa37f35",
    "coco_pope_popular.json": "5b16653023bf4f64d57eb0d168259de6627f5cde7538b85ebed3cc33034aa6cc",
    "coco_pope_adversarial.json": (
        "1d8f0906a9b50c05640f6f23abfac97523be2a1bed28f7eadc63b811699b2d26"
    ),
}


def parse(answer: str, sample: dict | None = None) -> str:
    """'yes' or 'no': the first sentence without commas says no if it has the word No, no or not,
    and else yes.
    """
    words = str(answer).split(".")[0].replace(",", "").split(" ")
    return "no" if {"No", "no", "not"} & set(words) else "yes"


def read(path: Path, labels: Path, keep: Callable) -> list[dict]:
    """LLaVA's questions with the labels of the authors' three files."""
    image = pictures_in(path.parent, "val2014", "images")
    names = "coco_pope_*.json", "coco_pope_*.json.gz"
    files = [labels] if labels.is_file() else sorted(f for n in names for f in labels.glob(n))
    if not files:
        raise FileNotFoundError(
            f"{labels}/coco_pope_random.json, _popular and _adversarial are not there: POPE's "
            "labels (RUCAIBox/POPE; sha256 of the random one: "
            f"{SHA256['coco_pope_random.json']})."
        )
    label_of = {}
    for file in files:
        if SHA256.get(file.name, digest(file)) != digest(file):
            warnings.warn(
                f"{file} is not the file that LLaVA's questions belong to: its sha256 should be "
                f"{SHA256[file.name]}.",
                stacklevel=2,
            )
        stem = file.name.split(".")[0]
        category = stem.rsplit("_", 1)[1] if stem.startswith("coco_pope_") else None
        rows = read_rows(file)
        for row in rows if isinstance(rows, list) else [rows]:
            label_of[category, row["image"], bare_question(row["text"])] = row["label"]
    samples = []
    for row in read_rows(path):
        keys = (
            (category, row["image"], bare_question(row["text"]))
            for category in (row["category"], None)
        )
        label = next((label_of[key] for key in keys if key in label_of), None)
        samples.append(row | {"label": label, "image": image(row["image"])})
    return samples


def digest(path: Path) -> str:
    """The sha256 of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def known(sample: dict) -> bool:
    """Whether the label is yes or no."""
    return str(sample["label"]).lower() in ("yes", "no")


def items(samples: list[dict], answers: list[str]) -> dict[str, Metric]:
    """accuracy, precision, recall, F1 and the share of yes, over the three categories."""
    answered_yes = np.array([parse(a) for a in answers]) == "yes"
    is_yes = np.array([s["label"].lower() for s in samples]) == "yes"
    tp, fp, fn = answered_yes & is_yes, answered_yes & ~is_yes, ~answered_yes & is_yes
    return (
        metrics("accuracy", answered_yes == is_yes, samples)
        | metrics("precision", tp, samples, den=tp | fp)
        | metrics("recall", tp, samples, den=tp | fn)
        | metrics("f1", 2 * tp, samples, den=2.0 * tp + fp + fn)
        | metrics("yes_ratio", answered_yes, samples)
    )


def yes(samples: list[dict]) -> list[str]:
    """The answer yes to every question."""
    return ["yes"] * len(samples)


POPE = Benchmark(
    name="pope",
    title="POPE",
    paper="POPE",
    headline="f1",
    parse=parse,
    measure=items,
    read=read,
    released=("llava_pope_test.jsonl",),
    source="LLaVA's eval.zip, labels from RUCAIBox/POPE",
    size=8910,
    known=known,
    blind=yes,
)
