"""VQAv2, VizWiz and TextVQA: short answers, compared with those of ten people.

The score is the soft accuracy of the VQA challenge.

    vqav2/    llava_vqav2_mscoco_test-dev2015.jsonl (LLaVA), test2015/ (COCO); or the authors'
              v2_OpenEnded_mscoco_val2014_questions.json, v2_mscoco_val2014_annotations.json,
              val2014/
    vizwiz/   llava_test.jsonl (LLaVA), test/; or val.json (VizWiz), val/
    textvqa/  llava_textvqa_val_v051_ocr.jsonl (LLaVA), TextVQA_0.5.1_val.json, train_images/

The labels of the VQAv2 and VizWiz test sets are on a server. `upload` writes the file that it
takes, and only the share of answers 'unanswerable' is scored here. VQAv2's server wants an answer
to every question of test2015, of which test-dev is a part; LLaVA's list of them is
llava_vqav2_mscoco_test2015.jsonl. In VQAv2 a missing answer is uploaded as '' and is wrong, as in
LLaVA's script. The scripts of the other two stop or skip it, so there it is left out and counted.
TextVQA's labels are public, so a question without them cannot be scored.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable
from functools import lru_cache, partial
from pathlib import Path

from vflan.evaluation.benchmarks.benchmark import Benchmark, Metric, metrics
from vflan.evaluation.benchmarks.files import (
    SHORT,
    UNSURE,
    bare_question,
    find,
    pictures_in,
    read_rows,
)

NUMBERS = dict(
    zip("zero one two three four five six seven eight nine ten".split(), map(str, range(11)))
) | {"none": "0"}
PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
CONTRACTED = (
    "ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've "
    "hasn't haven't he'd he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am "
    "mightn't mightn't've might've mustn't must've needn't not've o'clock oughtn't 'ow's'at "
    "shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's "
    "someone'd someone'd've someone'll someone's something'd something'd've something'll "
    "that's there'd there'd've there're there's they'd they'd've they'll they're they've 'twas "
    "wasn't we'd've we've weren't what'll what're what's what've when's where'd where's "
    "where've who'd who'd've who'll who's who've why'll why're why's won't would've wouldn't "
    "wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're you've"
).split()
# 'dont' -> "don't": every spelling that lacks one apostrophe is mapped to the full form. One entry
# of the official table maps the other way round.
CONTRACTIONS = {
    w[:i] + w[i + 1 :]: w for w in CONTRACTED for i, letter in enumerate(w) if letter == "'"
}
CONTRACTIONS["somebody'd"] = "somebodyd"


@lru_cache(1 << 18)
def normalize(answer: str) -> str:
    """An answer as the EvalAI server compares it, with all oddities of its script.

    Lower case; no commas and question marks; "'s" is a word of its own. Other punctuation is
    dropped if it touches a space anywhere in the answer; otherwise it becomes a space ('yes/no' ->
    'yes no'). The first 32 full stops are dropped unless a digit follows (the script passes a flag
    as the count). Numbers to ten become digits, articles are dropped.
    """
    text = str(answer).lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    before = text = text.replace("\n", " ").replace("\t", " ").strip()
    for mark in PUNCTUATION:
        text = text.replace(mark, "" if mark + " " in before or " " + mark in before else " ")
    words = re.sub(r"\.(?!\d)", "", text, count=32).lower().split()
    words = [w for w in (NUMBERS.get(w, w) for w in words) if w not in ("a", "an", "the")]
    return " ".join(CONTRACTIONS.get(w, w) for w in words)


def parse(answer: str, sample: dict | None = None) -> str:
    return normalize(str(answer))


def soft_accuracy(answer: str, references: list[str]) -> float:
    """0 to 1, by how many of ten people gave this answer.

    It is min(1, people / 3), averaged over leaving out each of the ten.
    """
    given, n = normalize(str(answer)), len(references)
    m = sum(normalize(str(r)) == given for r in references)
    return (m * min(1, (m - 1) / 3) + (n - m) * min(1, m / 3)) / n if m else 0.0


def known(sample: dict) -> bool:
    """Whether there are ten references, as the official scripts require.

    A test set without references is uploaded, not scored.
    """
    if "answers" not in sample:
        return True
    return isinstance(sample["answers"], list) and len(sample["answers"]) == 10


def known_here(sample: dict) -> bool:
    """`known`, for a benchmark whose labels are public."""
    return "answers" in sample and known(sample)


def items(samples: list[dict], answers: list[str]) -> dict[str, Metric]:
    """accuracy, also by answer type, if there are references; the share of 'unanswerable'."""
    rows = [(s, a) for s, a in zip(samples, answers) if "answers" in s]
    measured = {}
    if rows:
        measured = metrics(
            "accuracy",
            [soft_accuracy(a, s["answers"]) for s, a in rows],
            [s for s, _ in rows],
            pooled=True,
        )
    unsure = [normalize(a) == "unanswerable" for a in answers]
    return measured | {
        "unanswerable": metrics("unanswerable", unsure, samples, pooled=True)["unanswerable"]
    }


def with_answers(sample: dict, annotation: dict) -> dict:
    """A sample with `answers`, `label` (the most frequent one) and `category` (the answer type)."""
    if annotation is None:
        return sample | {"answers": [], "label": None}
    references = [
        str(a["answer"] if isinstance(a, dict) else a) for a in annotation.get("answers") or ()
    ]
    most = max(references, key=references.count) if references else None
    return sample | {
        "answers": references,
        "label": annotation.get("multiple_choice_answer", most),
        "category": annotation.get("answer_type", sample.get("category")),
    }


def listed(data: object, key: str) -> list[dict]:
    """The rows of a json file: a list, or the list under a key."""
    return data.get(key, []) if isinstance(data, dict) else data


def read_vqav2(path: Path, labels: Path, keep: Callable) -> list[dict]:
    data = read_rows(path)
    image = pictures_in(path.parent, "test2015", "val2014", "images")
    if isinstance(data, dict) and "questions" in data:
        split = "val2014" if "val2014" in path.name else data.get("data_subtype", "test2015")
        samples = [
            dict(
                question_id=q["question_id"],
                text=q["question"] + SHORT,
                category="all",
                image=image(f"COCO_{split}_{q['image_id']:012}.jpg"),
            )
            for q in data["questions"]
        ]
    else:
        samples = [dict(q, image=image(q.get("image")), category="all") for q in data]
    if file := find(labels, "v2_mscoco_*_annotations.json", "*annotations*.json"):
        by_id = {str(a["question_id"]): a for a in listed(read_rows(file), "annotations")}
        samples = [with_answers(s, by_id.get(str(s["question_id"]))) for s in samples]
    return samples


def read_vizwiz(path: Path, labels: Path, keep: Callable) -> list[dict]:
    image = pictures_in(path.parent, "test", "val", "images")
    samples = []
    for i, q in enumerate(read_rows(path)):
        text = q["text"] if "text" in q else q["question"] + UNSURE + SHORT
        sample = dict(
            question_id=q.get("question_id", q["image"]),
            text=text,
            category="all",
            image=image(q["image"]),
            aliases=[q["image"], str(i)] if "question_id" not in q else [q["image"]],
        )
        samples.append(with_answers(sample, q) if "answers" in q else sample)
    file = find(labels, "val.json", "*val*.json") if labels != path.parent else None
    if file and file != path:
        by_image = {a["image"]: a for a in read_rows(file)}
        samples = [with_answers(s, by_image.get(s["aliases"][0])) for s in samples]
    return samples


def read_textvqa(path: Path, labels: Path, keep: Callable) -> list[dict]:
    """Labels are looked up by picture and question, as in LLaVA's script."""
    data = read_rows(path)
    image = pictures_in(path.parent, "train_images", "images")
    if isinstance(data, dict):
        by_key = {(a["image_id"], bare_question(a["question"])): a for a in data["data"]}
        return [
            with_answers(
                dict(
                    question_id=a["image_id"],
                    text=a["question"] + SHORT,
                    category="all",
                    image=image(f"{a['image_id']}.jpg"),
                    aliases=[a["question_id"]],
                ),
                by_key[a["image_id"], bare_question(a["question"])] | {"answer_type": "all"},
            )
            for a in data["data"]
        ]
    samples = [dict(q, image=image(q.get("image")), category="all") for q in data]
    if file := find(labels, "TextVQA_0.5.1_val.json", "TextVQA*.json"):
        rows = listed(read_rows(file), "data")
        by_key = {
            (str(a["image_id"]), bare_question(a["question"])): a | {"answer_type": "all"}
            for a in rows
        }
        samples = [
            with_answers(s, by_key.get((str(s["question_id"]), bare_question(s["text"]))))
            for s in samples
        ]
    return samples


def upload_vqav2(
    samples: list[dict], answers: list[str], path: Path, every: Path | None = None
) -> None:
    """EvalAI's json: a list of {question_id, answer}.

    every: the question file of all of test2015, LLaVA's or the authors'. The server also needs its
    other ids, which get ''; test-std is then near 0. ValueError if it lacks a question that was
    answered.
    """
    answer_of = {s["question_id"]: normalize(a or "") for s, a in zip(samples, answers)}
    ids = list(answer_of)
    if every:
        ids = [str(q["question_id"]) for q in listed(read_rows(every), "questions")]
        if others := answer_of.keys() - set(ids):
            raise ValueError(
                f"{every} lacks {len(others)} of the questions that were answered (first: "
                f"{min(others)}): it is not the list of their whole test set."
            )
    rows = [
        {"question_id": int(id) if id.isdigit() else id, "answer": answer_of.get(id, "")}
        for id in ids
    ]
    write_json(path, rows)


def upload_vizwiz(samples: list[dict], answers: list[str], path: Path) -> None:
    """VizWiz' json: a list of {image, answer}. ValueError for a question without a picture."""
    if lacking := [s["question_id"] for s in samples if not s["image"]]:
        raise ValueError(
            f"VizWiz' file names a question by its picture, which question {lacking[0]} lacks."
        )
    rows = [
        {"image": Path(s["image"]).name, "answer": normalize(a or "")}
        for s, a in zip(samples, answers)
    ]
    write_json(path, rows)


def write_json(path: Path, data: object) -> None:
    with open(path, "w", encoding="utf-8") as file:
        json.dump(data, file, ensure_ascii=False)


def often(samples: list[dict]) -> list[str]:
    """For each question the most frequent answer of people to questions of its category."""
    counts_of = {}
    for s in samples:
        counts_of.setdefault(s["category"], Counter()).update(
            normalize(r) for r in s.get("answers", ["unanswerable"])
        )
    best = {
        kind: counts.most_common(1)[0][0] if counts else "" for kind, counts in counts_of.items()
    }
    return [best[s["category"]] for s in samples]


family = partial(
    Benchmark, headline="accuracy", parse=parse, measure=items, known=known, blind=often
)
VQAV2 = family(
    "vqav2",
    title="VQAv2",
    read=read_vqav2,
    upload=upload_vqav2,
    upload_all=("llava_vqav2_mscoco_test2015.jsonl", "v2_OpenEnded_mscoco_test2015_questions.json"),
    missing="wrong",
    paper="VQAv2",
    released=("llava_vqav2_mscoco_test-dev2015.jsonl", "v2_OpenEnded_mscoco_*_questions.json"),
    source="LLaVA's eval.zip, or visualqa.org",
)
VIZWIZ = family(
    "vizwiz",
    title="VizWiz",
    read=read_vizwiz,
    upload=upload_vizwiz,
    paper="VizWiz",
    released=("llava_test.jsonl", "val.json"),
    source="LLaVA's eval.zip, or vizwiz.org",
)
TEXTVQA = family(
    "textvqa",
    title="TextVQA",
    read=read_textvqa,
    known=known_here,
    paper="TextVQA",
    size=5000,
    released=("llava_textvqa_val_v051_ocr.jsonl", "TextVQA_0.5.1_val.json"),
    source="LLaVA's eval.zip with the labels of textvqa.org: TextVQA_0.5.1_val.json",
)
