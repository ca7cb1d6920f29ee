"""MMMU: college questions in 30 subjects, multiple choice and open, on the validation set (900 questions).

    mmmu/    the hub's parquet files (SUBJECT/validation-*.parquet), or a json or jsonl of their rows with image_1 as a
             file name in images/; answer_dict_val.json (the authors') for labels that the questions lack

Answers are read as the authors' script reads them, with one exception: where it finds no option it picks one at random,
and here that answer is wrong, so that a score can be repeated. LLaVA-1.5 sees one picture: the first. The paper does not
name its split; the values it prints for other models are those of the test set, whose answers are not public. Questions
without an answer are left out, as in the script.
"""

import ast
import re

from vflan.evaluation.benchmarks.benchmark import Benchmark, metrics
from vflan.evaluation.benchmarks.files import LETTER, SHORT, find, pictures_in, read_rows
from vflan.evaluation.benchmarks.vqa import write_json

LETTERS = "ABCDEFGHI"
KEYS = ("could be ", "so ", "is ", "thus ", "therefore ", "final ", "answer ", "result ")


def parse(answer, sample):
    """The letter chosen, or None; for an open question the phrases and numbers that the answer may mean."""
    if is_open(sample):
        return parse_open(str(answer))
    return parse_choice(str(answer), sample.get("options") or [], sample.get("letters", LETTERS))


def is_open(sample):
    return sample.get("question_type", "multiple-choice") != "multiple-choice"


def parse_choice(answer, options, letters):
    """'(B)' anywhere, else 'B' as a word, else (in answers of six words or more) an option's text; the last one said."""
    for mark in ",.!?;:'":
        answer = answer.strip(mark)
    said = f" {answer} "
    letters = letters[: len(options) or None]
    places = {x: said.rfind(f"({x})") for x in letters}
    if max(places.values()) < 0:
        places = {x: said.rfind(f" {x} ") for x in letters}
    if max(places.values()) < 0 and len(said.split()) > 5:
        places = {x: said.lower().rfind(str(o).lower()) for x, o in zip(letters, options)} or places
    best = max(places, key=places.get)
    return best if places[best] >= 0 else None


def normalized(text):
    """[number, to two decimals] or [lower-case text]; a single letter with a space before or after, so that it does not
    match inside words."""
    text = text.strip()
    try:
        return [round(float(text.replace(",", "")), 2)]
    except (ValueError, OverflowError):
        text = text.lower()
        return [" " + text, text + " "] if len(text) == 1 else [text]


def parse_open(answer):
    """Phrases after 'is', 'answer', '=' ... (the shortest in each line), or the whole answer; and the numbers in them."""
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
    numbers = [n for p in phrases for pattern in (
        r"-?\b\d{1,3}(?:,\d{3})+\b",
        r"-?\d+(?:\.\d+)?[eE][+-]?\d+",
        r"-?(?:\d+\.\d+|\.\d+|\d+\b)(?![eE][+-]?\d+)(?![,\d])",
    ) for n in re.findall(pattern, p)]  # fmt: skip
    return list(dict.fromkeys(x for text in phrases + numbers for x in normalized(text)))


def right(answer, sample):
    """The letter is the right one; of an open question, some right text stands in a phrase, or a number equals it."""
    said, label = parse(answer, sample), sample["label"]
    labels = label if isinstance(label, list) else [label]
    if not is_open(sample):
        return said in labels
    wanted = [x for text in labels for x in normalized(str(text))]
    texts = [w for w in wanted if isinstance(w, str)]
    return any(any(w in s for w in texts) if isinstance(s, str) else s in wanted for s in said)


def read(path, labels, keep):
    files = sorted(path.rglob("validation-*.parquet")) if path.is_dir() else [path]
    data = [row for file in files for row in rows_of(file)]
    image = pictures_in(path if path.is_dir() else path.parent, "images")
    found = find(labels, "answer_dict_val.json")
    gold = read_rows(found) if found and found != path else {}
    samples = []
    for row in data:
        own = gold.get(row["id"], {})
        options = row.get("options") or []
        options = ast.literal_eval(options) if isinstance(options, str) else list(options)
        kind = row.get("question_type", own.get("question_type", "multiple-choice"))
        label = own.get("ground_truth", row.get("ground_truth", row.get("answer")))
        try:
            label = (
                ast.literal_eval(label) if kind == "open" and str(label).startswith("[") else label
            )
        except (ValueError, SyntaxError):
            pass  # a label that merely begins with a bracket
        picture = row.get("image_1") if row.get("image_1") is not None else row.get("image")
        samples.append(dict(question_id=row["id"], text=prompt(row.get("question", ""), options, kind), label=label,
                            options=options, question_type=kind, category="_".join(row["id"].split("_")[1:-1]) or "all",
                            image=keep(picture["bytes"]) if isinstance(picture, dict) else image(picture)))  # fmt: skip
    return samples


def rows_of(path):
    """The rows of a file; a json of answers, id -> {question_type, ground_truth}, is good enough to score with."""
    data = read_rows(path)
    return [v | {"id": k} for k, v in data.items()] if isinstance(data, dict) else data


def prompt(question, options, kind):
    """The prompt of MMMU's own LLaVA-1.5 setting."""
    if kind != "multiple-choice":
        return question + SHORT
    return "\n".join([question] + [f"({x}) {o}" for x, o in zip(LETTERS, options)]) + "\n" + LETTER


def known(sample):
    return sample["label"] not in (None, "", "?", [])  # '?' stands in the hub's test set


def items(samples, answers):
    """accuracy over all questions, by subject, and of both sorts."""
    good = [right(a, s) for s, a in zip(samples, answers)]
    found = metrics("accuracy", good, samples, pooled=True)
    sorts = [s | {"category": "open" if is_open(s) else "multiple_choice"} for s in samples]
    return found | {k: m for k, m in metrics("accuracy", good, sorts).items() if k != "accuracy"}


def often(samples):
    """The most frequent letter; the first of the labels of an open question counts as its answer."""
    labels = [str(s["label"][0] if isinstance(s["label"], list) else s["label"]) for s in samples]
    letters = [x for x, s in zip(labels, samples) if not is_open(s)] or ["A"]
    most = max(sorted(set(letters)), key=letters.count)
    numbers = [x for x, s in zip(labels, samples) if is_open(s)] or [""]
    other = max(sorted(set(numbers)), key=numbers.count)
    return [other if is_open(s) else most for s in samples]


def upload(samples, answers, path):
    """The json id -> answer of the authors' script and server: the letter read, or the open answer as it stands."""
    write_json(path, {s["question_id"]: (a or "") if is_open(s) else parse(a or "", s) or ""
                      for s, a in zip(samples, answers)})  # fmt: skip


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
