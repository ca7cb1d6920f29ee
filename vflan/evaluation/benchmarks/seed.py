"""SEED-Bench: multiple choice about images (types 1 to 9) and middle frames of videos (10 to 12).

    seed/    llava-seed-bench.jsonl (LLaVA), SEED-Bench.json (the authors'), SEED-Bench-image/,
             SEED-Bench-video-image/; or a TSV or parquet with index, question, A to D, answer,
             image (base64 or bytes)

An answer is right if it equals the letter exactly. A missing one is wrong, as in LLaVA's script.
Where only SEED-Bench.json is given, the frame of a video question is <question id>.png.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from vflan.evaluation.benchmarks.benchmark import Benchmark, Metric, metrics
from vflan.evaluation.benchmarks.files import LETTER, find, parts_of, pictures_in, read_rows
from vflan.evaluation.benchmarks.mmbench import lettered

TYPES = dict(
    enumerate(
        "scene_understanding instance_identity instance_attribute instance_location "
        "instance_counting spatial_relation instance_interaction visual_reasoning "
        "text_recognition action_recognition action_prediction "
        "procedure_understanding".split(),
        1,
    )
)


def parse(answer: str, sample: dict | None = None) -> str:
    """The answer unchanged: only 'B' is B."""
    return str(answer)


def known(sample: dict) -> bool:
    """Whether the label is one of the letters."""
    return sample["label"] in tuple(sample.get("letters", "ABCD"))


def read(path: Path, labels: Path, keep: Callable) -> list[dict]:
    """The questions of the authors' json, of a table, or of LLaVA's file (labels: the authors')."""
    first, *others = [read_rows(part, na=True) for part in parts_of(path)]
    data = sum(others, first)
    image = pictures_in(path.parent)
    if isinstance(data, dict):
        return [by_authors(q) | {"image": image(where(q))} for q in data["questions"]]
    if data and "index" in data[0]:
        return [
            dict(
                question_id=r["index"],
                text=r["question"] + lettered(r) + LETTER,
                label=r.get("answer"),
                category=r.get("category") or "all",
                data_type=r.get("data_type") or "image",
                image=keep(content(r["image"])),
            )
            for r in data
        ]
    file, labelled = find(labels, "SEED-Bench.json"), {}
    if file:
        labelled = {str(q["question_id"]): by_authors(q) for q in read_rows(file)["questions"]}
    samples = []
    for q in data:
        label = labelled.get(str(q["question_id"]), {})
        more = {key: value for key, value in label.items() if key != "text"}  # LLaVA's text stays
        samples.append(q | more | {"image": image(q.get("image"))})
    return samples


def by_authors(q: dict) -> dict:
    """A question of the authors' file as a sample."""
    by_number = {str(number): name for number, name in TYPES.items()}
    options = "".join(
        f"\n{x}. {q[f'choice_{x.lower()}']}" for x in "ABCD" if f"choice_{x.lower()}" in q
    )
    return dict(
        question_id=q["question_id"],
        text=f"{q.get('question', '')}{options}{LETTER}",
        label=q["answer"],
        category=by_number.get(str(q["question_type_id"]), str(q["question_type_id"])),
        data_type=q["data_type"],
    )


def where(q: dict) -> str:
    """The path of a question's picture in the release."""
    if q["data_type"] == "video":
        return f"SEED-Bench-video-image/{q['question_id']}.png"
    return f"SEED-Bench-image/{q['data_id']}"


def content(image: object) -> bytes | str:
    """A picture's bytes or base64; a cell may wrap it in a list or in {'bytes': ...}."""
    while isinstance(image, (list, tuple)) or hasattr(image, "tolist"):
        image = image[0]
    return image["bytes"] if isinstance(image, dict) else image


def items(samples: list[dict], answers: list[str]) -> dict[str, Metric]:
    """accuracy of all questions, of images and of videos, and of each type."""
    right = [parse(a) == s["label"] for s, a in zip(samples, answers)]
    by_medium = [dict(s, category=s.get("data_type", "image")) for s in samples]
    measured = metrics("accuracy", right, samples, pooled=True)
    whole = measured.pop("accuracy")
    parts = {k: m for k, m in metrics("accuracy", right, by_medium).items() if k != "accuracy"}
    return {"accuracy": whole} | parts | measured


def upload(samples: list[dict], answers: list[str], path: Path) -> None:
    """The leaderboard's JSON Lines: question_id, prediction."""
    with open(path, "w", encoding="utf-8") as file:
        for s, a in zip(samples, answers):
            file.write(json.dumps({"question_id": s["question_id"], "prediction": a or ""}) + "\n")


SEED = Benchmark(
    name="seed",
    title="SEED-Bench",
    paper="SEED",
    headline="accuracy",
    parse=parse,
    measure=items,
    read=read,
    released=("llava-seed-bench.jsonl", "SEED-Bench.json", "*.tsv", "*.parquet"),
    source="LLaVA's eval.zip, and SEED-Bench.json of its authors",
    size=19242,
    known=known,
    missing="wrong",
    upload=upload,
    upload_name="seed_upload.jsonl",
)
