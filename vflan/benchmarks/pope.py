"""POPE: is there an X in the image? Asked about present objects and about random, popular and adversarial absent ones.

Read as the official script reads it, oddities included, so that numbers compare: 'Yes, there is no doubt' counts as no,
and 'NO' as yes. Labels are looked up by category, picture and question, never by order: with the wrong release of the
random file the official script joins by order and reports an F1 of .46 for answers worth .87.
"""

from pathlib import Path

import numpy as np

from vflan.benchmarks.benchmark import Benchmark, load_questions, metrics, read_jsonl

FORMAT = "\nAnswer the question using a single word or phrase."


def parse(answer, sample=None):
    """'yes' or 'no': the first sentence without commas says no if it has the word No, no or not, and else yes."""
    words = str(answer).split(".")[0].replace(",", "").split(" ")
    return "no" if {"No", "no", "not"} & set(words) else "yes"


def load(folder):
    """<folder>/pope/questions.jsonl, or else the released files: llava_pope_test.jsonl beside coco_pope_*.json."""
    here = Path(folder) / "pope"
    if (here / "questions.jsonl").exists() or not (here / "llava_pope_test.jsonl").exists():
        return load_questions(folder, "pope")
    labels = {}
    for path in sorted(here.glob("coco_pope_*.json")):
        for row in read_jsonl(path):
            labels[path.stem.rsplit("_", 1)[1], row["image"], row["text"]] = row["label"]
    samples = []
    for row in read_jsonl(here / "llava_pope_test.jsonl"):
        key = row["category"], row["image"], row["text"].split("\n")[0]
        if key not in labels:
            raise ValueError(
                f"POPE question {row['question_id']} has no label in coco_pope_{row['category']}.json: {key[2]}"
            )
        image = str((here / "images" / row["image"]).absolute())  # COCO val2014 pictures, not part of the release
        samples.append(row | {"question_id": str(row["question_id"]), "label": labels[key], "image": image})
    return samples


def items(samples, answers):
    said = np.array([parse(a) for a in answers]) == "yes"
    true = np.array([s["label"].lower() for s in samples]) == "yes"
    tp, fp, fn = said & true, said & ~true, ~said & true
    return (
        metrics("accuracy", said == true, samples)
        | metrics("precision", tp, samples, den=tp | fp)
        | metrics("recall", tp, samples, den=tp | fn)
        | metrics("f1", 2 * tp, samples, den=2.0 * tp + fp + fn)
        | metrics("yes_ratio", said, samples)
    )


POPE = Benchmark("pope", "f1", parse, items, load, blind=lambda samples: ["yes"] * len(samples), paper="POPE")
