"""Benchmark files on disk: question, label and answer files in the released formats."""

from __future__ import annotations

import base64
import gzip
import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from vflan.config import CACHE

ID_KEYS = ("question_id", "questionId", "index", "id", "image")
TEXT_KEYS = ("prediction", "text", "response", "pred_answer", "pred", "output", "answer")
FORMATS = (  # LLaVA-1.5's format prompts: the last line of a question
    "Answer the question using a single word or phrase.",
    "Answer with the option's letter from the given choices directly.",
    "When the provided information is insufficient, respond with 'Unanswerable'.",
    "请直接回答选项字母。",
)
SHORT, LETTER, UNSURE, LETTER_CN = ("\n" + line for line in FORMATS)


def read_rows(path: str | Path, na: bool = False) -> list | dict:
    """The content of a json, jsonl, tsv, csv, xlsx or parquet file, usually a list of dicts.

    Cells of tables are strings. With `na`, empty cells and N/A, null, None ... become '', as pandas
    (and so the official scripts) read them by default. ValueError names the file, and the line that
    cannot be read.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not there.")
    kind = path.name.removesuffix(".gz").rsplit(".", 1)[-1].lower()
    if kind in ("tsv", "csv", "xlsx", "parquet"):
        return read_table(path, kind, na)
    raw = path.read_bytes()
    text = (gzip.decompress(raw) if path.suffix == ".gz" else raw).decode("utf-8-sig")
    if kind != "jsonl":
        try:
            return json.loads(text)
        except json.JSONDecodeError as trouble:
            # Several objects, one a line: POPE's label files are called .json.
            if trouble.msg != "Extra data":
                raise ValueError(
                    f"{path} is not whole json ({trouble}); download it again."
                ) from None
    return json_lines(path, text)


def json_lines(path: Path, text: str, broken: list[int] | None = None) -> list:
    """The objects of a text with one object a line.

    A line that is not json is an error, or its number is added to `broken`.
    """
    rows = []
    for number, line in enumerate(text.split("\n"), 1):  # not splitlines(): answers may hold U+2028
        try:
            rows += [json.loads(line)] if line.strip() else []
        except json.JSONDecodeError as trouble:
            if broken is None:
                raise ValueError(
                    f"{path}, line {number} is not json ({trouble.msg}); download it again."
                ) from None
            broken.append(number)
    return rows


def read_table(path: Path, kind: str, na: bool = False) -> list[dict]:
    """The rows of a tsv, csv, xlsx or parquet file; see `read_rows` for `na`."""
    import pandas as pd

    if kind == "parquet":
        return pd.read_parquet(path).to_dict("records")
    if kind == "xlsx":
        try:
            read = partial(pd.read_excel, engine="openpyxl")
            import openpyxl  # noqa: F401
        except ImportError:
            raise ValueError(
                f"{path} needs openpyxl to be read: pip install openpyxl, or save it as csv."
            ) from None
    else:
        read = partial(pd.read_csv, sep="\t" if kind == "tsv" else ",")
    return read(path, dtype=str, keep_default_na=na).fillna("").to_dict("records")


def find(labels: str | Path, *names: str) -> Path | None:
    """`labels` if it is a file, else the first file in it with one of the names (globs)."""
    labels = Path(labels)
    if labels.is_file():
        return labels
    return next((p for name in names for p in sorted(labels.glob(name))), None)


def pictures_in(folder: Path, *names: str) -> Callable[[str | None], str | None]:
    """A function from the name of a picture to its absolute path.

    Pictures are in the first of the sub-folders that exists, or in `folder` itself.
    """
    root = next((folder / name for name in names if (folder / name).is_dir()), folder).absolute()
    return lambda name: str(root / name) if name else None


def keep_picture(data: bytes | str) -> str:
    """Write a picture (bytes or base64) to the cache, once for each content; returns the path."""
    data = base64.b64decode(data) if isinstance(data, str) else data
    path = CACHE / "pictures" / f"{hashlib.sha256(data).hexdigest()[:32]}.png"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(".part")
        part.write_bytes(data)
        part.replace(path)
    return str(path)


def name_picture(data: bytes | str) -> str:
    """A name for a picture that is not opened.

    Scoring only needs to know which questions share a picture.
    """
    return hashlib.sha256(data.encode() if isinstance(data, str) else data).hexdigest()[:32]


# ------------------------------------------------------------------------------------------ answers


def read_answers(path: str | Path) -> tuple[list[dict], list[int]]:
    """(rows, numbers of bad lines); a row has `id`, `text`, `prompt` and `gold` (or None).

    Reads JSON Lines with question_id and text, and the benchmarks' own upload formats: a json list
    (VQAv2, VizWiz, GQA, TextVQA), a json object id -> answer (MM-Vet, MMMU, ScienceQA), a table
    (MMBench's xlsx, tsv, csv), and MME's folder of TASK.txt (file, question, right answer, answer,
    separated by tabs).
    """
    path, broken = Path(path), []
    if path.is_dir():
        tasks = sorted(path.glob("*.txt"))
        if tasks:
            return [row for task in tasks for row in mme_rows(task)], broken
        parts = sorted(path.glob("merge.jsonl")) or sorted(path.glob("*.jsonl"))
        if not parts:
            raise FileNotFoundError(f"{path} holds no answers: neither *.jsonl nor MME's TASK.txt.")
        return [row for part in parts for row in read_answers(part)[0]], broken
    text = (
        path.read_text(encoding="utf-8-sig") if path.suffix == ".jsonl" and path.is_file() else ""
    )
    if text and not text.lstrip().startswith("["):
        content = json_lines(path, text, broken)
    else:
        content = json.loads(text) if text else read_rows(path)
    if isinstance(content, dict) and first(content, ("question_id", "questionId")) is not None:
        content = [content]  # a single answer
    elif isinstance(content, dict):
        content = content.get("outputs", content)
        content = [
            v | {"id": k} if isinstance(v, dict) else {"id": k, "text": v}
            for k, v in content.items()
        ]
    rows = []
    for row in content if isinstance(content, list) else ():
        id, text = (first(row, keys) for keys in (ID_KEYS, TEXT_KEYS))
        if id is not None and text is not None:
            rows.append(
                {"id": str(id), "text": str(text), "prompt": row.get("prompt"), "gold": None}
            )
    if not rows:
        raise ValueError(f"{path} holds no answers: each needs a question_id and a text.")
    return rows, broken


def first(row: object, keys: Sequence[str]) -> object:
    """The value of the first key that a row has; None if it has none, or is not a dict."""
    return (
        next((row[k] for k in keys if row.get(k) is not None), None)
        if isinstance(row, dict)
        else None
    )


def mme_rows(path: Path) -> list[dict]:
    """MME's result file of one task: file, question, right answer, answer, separated by tabs."""
    rows = []
    for line in path.read_text(encoding="utf-8-sig").split("\n"):
        cells = line.rstrip("\r").split("\t")
        if len(cells) >= 3:
            rows.append(
                {
                    "id": f"{path.stem}/{cells[0].split('.')[0]}",
                    "prompt": cells[1],
                    "gold": cells[2],
                    "text": "\t".join(cells[3:]),
                }
            )
    return rows


def bare_question(prompt: object) -> str:
    """The question of a prompt in lower case, without picture token, OCR tokens and format prompts.

    TextVQA's prompts have three forms, which are read as in LLaVA's script: the question is before
    or after the line 'Reference OCR token: ...', or between 'Question:' and 'Short answer:'.
    """
    text = str(prompt).replace("<image>", "")
    if text.startswith("OCR tokens: ") and (
        m := re.search(r"Question: (.*?) Short answer:", text, re.S)
    ):
        text = m[1]
    for line in FORMATS:
        text = text.replace(line, "")
    lines = (line for line in text.split("\n") if not line.startswith("Reference OCR token:"))
    return " ".join(" ".join(lines).replace("Please answer yes or no.", "").lower().split())


def match(samples: list[dict], rows: list[dict]) -> tuple[list[str | None], dict[str, list]]:
    """(answers, problems): the answer to each sample or None, and {problem: [question ids]}.

    An answer belongs to a question by its id. Where several questions share an id (TextVQA and MME
    number their pictures), the prompt of the answer decides. Without prompts, answers are taken in
    order if there are as many as questions; `paired_by_order` lists their ids. Of two answers to
    one question the later counts, as in the official scripts.
    """
    by_id, answers = {}, [None] * len(samples)
    problems = {"unknown": [], "duplicate": [], "paired_by_order": []}
    for i, sample in enumerate(samples):
        for id in {str(sample["question_id"]), *map(str, sample.get("aliases", ()))}:
            by_id.setdefault(id, []).append(i)
    groups = {}
    for row in rows:
        groups.setdefault(row["id"], []).append(row)
    for id, group in groups.items():
        candidates = by_id.get(id, [])
        if len(candidates) == 1:
            pairs = [(row, candidates) for row in group]
        elif _same_order(group, candidates):
            problems["paired_by_order"] += [id] * len(group)
            pairs = [(row, [i]) for row, i in zip(group, candidates)]
        else:
            pairs = [(row, _same_question(row, samples, candidates)) for row in group]
        times_asked = Counter(tuple(places) for _, places in pairs)
        used = Counter()
        for row, places in pairs:
            if not places:
                problems["unknown"].append(id)
                continue
            key = tuple(places)
            if len(places) > 1 and times_asked[key] == len(places):
                # The same question was asked several times and answered as often.
                places = [places[used[key]]]
            elif used[key]:
                problems["duplicate"].append(id)
            used[key] += 1
            for i in places:
                answers[i] = row["text"]
                if row["gold"] is not None and samples[i].get("label") is None:
                    samples[i]["label"] = row["gold"]
    return answers, problems


def _same_order(rows: list[dict], candidates: list[int]) -> bool:
    """Whether answers can only be paired by order, and can be: no prompts, and the same number."""
    has_prompt = any(row["prompt"] for row in rows)
    return bool(candidates) and not has_prompt and len(rows) == len(candidates)


def _same_question(row: dict, samples: list[dict], candidates: list[int]) -> list[int]:
    """Those of the candidates whose question is the one in the answer's prompt."""
    question = bare_question(row["prompt"])
    return [i for i in candidates if bare_question(samples[i]["text"]) == question]
