"""SEED-Bench: multiple choice about images (types 1 to 9) and about the middle frame of a video (10 to 12).

    seed/    llava-seed-bench.jsonl (LLaVA) beside SEED-Bench.json (the authors'), SEED-Bench-image/,
             SEED-Bench-video-image/; or a TSV or parquet with index, question, A to D, answer, image (base64 or bytes)

An answer is right if it equals the letter exactly. A missing one is wrong, as in LLaVA's script. From SEED-Bench.json
alone the frame of a video question is looked for under its question id, as .png.
"""

import json

from vflan.evaluation.benchmarks.benchmark import Benchmark, metrics
from vflan.evaluation.benchmarks.files import LETTER, find, pictures_in, read_rows
from vflan.evaluation.benchmarks.mmbench import lettered

TYPES = dict(enumerate(
    "scene_understanding instance_identity instance_attribute instance_location instance_counting spatial_relation "
    "instance_interaction visual_reasoning text_recognition action_recognition action_prediction "
    "procedure_understanding".split(), 1))  # fmt: skip


def parse(answer, sample=None):
    """The answer as it stands: nothing but 'B' is B."""
    return str(answer)


def known(sample):
    return sample["label"] in tuple(sample.get("letters", "ABCD"))


def read(path, labels, keep):
    data = read_rows(path, na=True)
    image = pictures_in(path.parent)
    if isinstance(data, dict):
        return [by_authors(q) | {"image": image(where(q))} for q in data["questions"]]
    if data and "index" in data[0]:
        return [dict(question_id=r["index"], text=r["question"] + lettered(r) + LETTER, label=r.get("answer"),
                     category=r.get("category") or "all", data_type=r.get("data_type") or "image",
                     image=keep(content(r["image"]))) for r in data]  # fmt: skip
    found = find(labels, "SEED-Bench.json")
    theirs = (
        {str(q["question_id"]): by_authors(q) for q in read_rows(found)["questions"]}
        if found
        else {}
    )
    return [q | {k: v for k, v in theirs.get(str(q["question_id"]), {}).items() if k != "text"}
            | {"image": image(q.get("image"))} for q in data]  # fmt: skip


def by_authors(q):
    options = "".join(
        f"\n{x}. {q[f'choice_{x.lower()}']}" for x in "ABCD" if f"choice_{x.lower()}" in q
    )
    return dict(question_id=q["question_id"], text=f"{q.get('question', '')}{options}{LETTER}", label=q["answer"],
                category=TYPES.get(q["question_type_id"], str(q["question_type_id"])), data_type=q["data_type"])  # fmt: skip


def where(q):
    video = q["data_type"] == "video"
    return (
        f"SEED-Bench-video-image/{q['question_id']}.png"
        if video
        else f"SEED-Bench-image/{q['data_id']}"
    )


def content(image):
    """The picture's bytes or base64 in a cell of a table: it may be one, or a list with one, or {'bytes': ...}."""
    while isinstance(image, (list, tuple)) or hasattr(image, "tolist"):
        image = image[0]
    return image["bytes"] if isinstance(image, dict) else image


def items(samples, answers):
    """accuracy of all questions and of each type; image and video apart."""
    right = [parse(a) == s["label"] for s, a in zip(samples, answers)]
    kinds = [dict(s, category=s.get("data_type", "image")) for s in samples]
    found = metrics("accuracy", right, samples, pooled=True)
    whole = found.pop("accuracy")
    parts = {k: m for k, m in metrics("accuracy", right, kinds).items() if k != "accuracy"}
    return {"accuracy": whole} | parts | found


def upload(samples, answers, path):
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
)
