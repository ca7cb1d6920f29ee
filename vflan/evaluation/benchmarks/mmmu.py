"""MMMU: college questions in 30 subjects, multiple choice and open; validation set, 900 questions.

    mmmu/    the hub's parquet files (SUBJECT/validation-*.parquet), or a json or jsonl of their
             rows with image_1 as a file name in images/; answer_dict_val.json (the authors') for
             labels that the questions lack

Answers are parsed as in the authors' script, with one exception. Where it finds no option, the
script picks one at random; here that answer is wrong, so that a score can be repeated. LLaVA-1.5
sees only the first picture. The paper does not name its split. The values that it prints for other
models are those of the test set, whose answers are not public. Questions without an answer are left
out, as in the script.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from vflan.evaluation.benchmarks.benchmark import Benchmark, Metric, metrics
from vflan.evaluation.benchmarks.files import LETTER, SHORT, find, pictures_in, read_rows
from vflan.evaluation.benchmarks.vqa import write_json

LETTERS = "ABCDEFGHI"
KEYS = ("could be ", "so ", "is ", "thus ", "therefore ", "final ", "answer ", "result ")


def parse(answer: str, sample: dict) -> str | list:
    """The letter chosen, or None; for an open question, phrases and numbers that may be meant."""
    if is_open(sample):
        return parse_open(str(answer))
    return parse_choice(str(answer), sample.get("options") or [], sample.get("letters", LETTERS))


def is_open(sample: dict) -> bool:
    """Whether a question has no options."""
    return sample.get("question_type", "multiple-choice") != "multiple-choice"


def parse_choice(answer: str, options: list[str], letters: str) -> str | None:
    """The last '(B)', else the last 'B' as a word, else the last text of an option.

    Texts of options count only in answers of six words or more.
    """
    for mark in ",.!?;:'":
        answer = answer.strip(mark)
    text = f" {answer} "
    letters = letters[: len(options) or None]
    places = {x: text.rfind(f"({x})") for x in letters}
    if max(places.values()) < 0:
        places = {x: text.rfind(f" {x} ") for x in letters}
    if max(places.values()) < 0 and len(text.split()) > 5:
        places = {x: text.lower().rfind(str(o).lower()) for x, o in zip(letters, options)} or places
    best = max(places, key=places.get)
    return best if places[best] >= 0 else None


def normalized(text: str) -> list:
    """[number, to two decimals] or [lower-case text].

    A single letter gets a space before or after it, so that it does not match inside words.
    """
    text = text.strip()
    try:
        return [round(float(text.replace(",", "")), 2)]
    except (ValueError, OverflowError):
        text = text.lower()
        return [" " + text, text + " "] if len(text) == 1 else [text]


def parse_open(answer: str) -> list:
    """Phrases after 'is', 'answer', '=' ..., or the whole answer; and the numbers in them.

    Each line gives its shortest phrase.
    """
    answer = answer.strip().strip(".").lower()
    parts, phrases = re.split(r"\.\s(?=[A-Z])|\n", answer), []
    for i, part in enumerate(parts):
        keys = (*KEYS, "=") if i == len(parts) - 1 else KEYS
        shortest = ""
        for tail in (part.split(key)[-1].strip() for key in keys if key in part):
            if not shortest or len(tail) < len(shortest):
                shortest = tail
        if shortest and shortest not in tuple(":,.!?;'"):
            phrases.append(shortest)
    phrases = phrases or [answer]
    numbers = [
        n
        for p in phrases
        for pattern in (
            r"-?\b\d{1,3}(?:,\d{3})+\b",
            r"-?\d+(?:\.\d+)?[eE][+-]?\d+",
            r"-?(?:\d+\.\d+|\.\d+|\d+\b)(?![eE][+-]?\d+)(?![,\d])",
        )
        for n in re.findall(pattern, p)
    ]
    return list(dict.fromkeys(x for text in phrases + numbers for x in normalized(text)))


def right(answer: str, sample: dict) -> bool:
    """Whether the letter is right; for an open question, whether a phrase contains a right text, or
    a number is equal to one.
    """
    read_as, label = parse(answer, sample), sample["label"]
    labels = label if isinstance(label, list) else [label]
    if not is_open(sample):
        return read_as in labels
    accepted = [x for text in labels for x in normalized(str(text))]
    texts = [w for w in accepted if isinstance(w, str)]
    return any(any(w in s for w in texts) if isinstance(s, str) else s in accepted for s in read_as)


def read(path: Path, labels: Path, keep: Callable) -> list[dict]:
    """The questions of the hub's parquet files, or of a json of their rows."""
    files = sorted(path.rglob("validation-*.parquet")) if path.is_dir() else [path]
    data = [row for file in files for row in rows_of(file)]
    image = pictures_in(path if path.is_dir() else path.parent, "images")
    answer_file = find(labels, "answer_dict_val.json")
    gold = read_rows(answer_file) if answer_file and answer_file != path else {}
    samples = []
    for row in data:
        answer = gold.get(row["id"], {})
        options = row.get("options") or []
        options = ast.literal_eval(options) if isinstance(options, str) else list(options)
        kind = row.get("question_type", answer.get("question_type", "multiple-choice"))
        label = answer.get("ground_truth", row.get("ground_truth", row.get("answer")))
        if kind == "open" and str(label).startswith("["):
            # A list of right answers, unless the answer itself begins with a bracket.
            with suppress(ValueError, SyntaxError):
                label = ast.literal_eval(label)
        picture = row.get("image_1") if row.get("image_1") is not None else row.get("image")
        samples.append(
            dict(
                question_id=row["id"],
                text=prompt(row.get("question", ""), options, kind),
                label=label,
                options=options,
                question_type=kind,
                category="_".join(row["id"].split("_")[1:-1]) or "all",
                image=keep(picture["bytes"]) if isinstance(picture, dict) else image(picture),
            )
        )
    return samples


def rows_of(path: Path) -> list[dict]:
    """The rows of a file. A json id -> {question_type, ground_truth} suffices for scoring."""
    data = read_rows(path)
    return [v | {"id": k} for k, v in data.items()] if isinstance(data, dict) else data


def prompt(question: str, options: list[str], kind: str) -> str:
    """The prompt of MMMU's own LLaVA-1.5 setting."""
    if kind != "multiple-choice":
        return question + SHORT
    return "\n".join([question] + [f"({x}) {o}" for x, o in zip(LETTERS, options)]) + "\n" + LETTER


def known(sample: dict) -> bool:
    """Whether there is a label; the hub's test set has '?' instead."""
    return sample["label"] not in (None, "", "?", [])


def items(samples: list[dict], answers: list[str]) -> dict[str, Metric]:
    """accuracy of all questions, of each subject, and of multiple-choice and open questions."""
    correct = [right(a, s) for s, a in zip(samples, answers)]
    measured = metrics("accuracy", correct, samples, pooled=True)
    by_kind = [s | {"category": "open" if is_open(s) else "multiple_choice"} for s in samples]
    return measured | {
        k: m for k, m in metrics("accuracy", correct, by_kind).items() if k != "accuracy"
    }


def often(samples: list[dict]) -> list[str]:
    """The most frequent letter, or the most frequent first label of open questions."""
    labels = [str(s["label"][0] if isinstance(s["label"], list) else s["label"]) for s in samples]
    letters = [x for x, s in zip(labels, samples) if not is_open(s)] or ["A"]
    most = max(sorted(set(letters)), key=letters.count)
    numbers = [x for x, s in zip(labels, samples) if is_open(s)] or [""]
    other = max(sorted(set(numbers)), key=numbers.count)
    return [other if is_open(s) else most for s in samples]


def upload(samples: list[dict], answers: list[str], path: Path) -> None:
    """The json id -> answer of the authors' script and server: the letter, or the open answer."""
    write_json(
        path,
        {
            s["question_id"]: (a or "") if is_open(s) else parse(a or "", s) or ""
            for s, a in zip(samples, answers)
        },
    )


MMMU = Benchmark(
    name="mmmu",
    title="MMMU",
    paper="MMMU",
    headline="accuracy",
    parse=parse,
    measure=items,
    read=read,
    released=("*/validation-*.parquet", "*val*.jsonl", "*val*.json"),
    source="the hub dataset MMMU/MMMU",
    size=900,
    known=known,
    blind=often,
    upload=upload,
)
