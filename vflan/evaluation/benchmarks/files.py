"""Benchmark files on disk: question, label and answer files in the released formats."""

from __future__ import annotations

import base64
import csv
import gzip
import hashlib
import io
import json
import os
import re
import warnings
import zlib
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, Any

from vflan.config import CACHE
from vflan.data.limits import unpacked_limit
from vflan.data.parquet_pages import Pages

ID_KEYS = ("question_id", "questionId", "index", "id", "image")
TEXT_KEYS = ("prediction", "text", "response", "pred_answer", "pred", "output", "answer")
FORMATS = (  # LLaVA-1.5's format prompts: the last line of a question
    "Answer the question using a single word or phrase.",
    "Answer with the option's letter from the given choices directly.",
    "When the provided information is insufficient, respond with 'Unanswerable'.",
    "请直接回答选项字母。",
)
SHORT, LETTER, UNSURE, LETTER_CN = ("\n" + line for line in FORMATS)


class UnreadableFile(ValueError):
    """A file that cannot be read, in a sentence that names it."""


def read_rows(path: str | Path, na: bool = False) -> list | dict:
    """The content of a json, jsonl, tsv, csv, xlsx or parquet file, usually a list of dicts.

    What other programs do to a file on its way changes nothing: a byte order mark, gzip (whatever
    the file is called), \\r\\n, a comma after the last row or after each line, empty rows of a
    table. Cells of tables are strings. With `na`, empty cells and N/A, null, None ... become '', as
    pandas (and so the official scripts) read them by default. UnreadableFile names the file, and
    the line that cannot be read.
    """
    path = Path(path)
    if path.is_dir():
        raise UnreadableFile(f"{path} is a folder: name the file in it.")
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not there.")
    kind = path.name.removesuffix(".gz").rsplit(".", 1)[-1].lower()
    if kind not in ("tsv", "csv", "xlsx", "parquet"):
        return json_rows(path, read_text(path))
    try:
        return read_table(path, kind, na)
    except UnreadableFile:
        raise
    except Exception as error:  # pandas, openpyxl and pyarrow have many errors of their own
        reason = f"{type(error).__name__}: {str(error)[:200]}"
        raise UnreadableFile(f"{path} is damaged, or is no {kind} file ({reason}).") from error


def parts_of(path: Path) -> list[Path]:
    """All files of the split of which the hub's file is one: test-00000-of-00002.parquet ..."""
    part = re.fullmatch(r"(.+-)\d{5}(-of-(\d{5})\.parquet)", path.name)
    if not part:
        return [path]
    return [path.with_name(f"{part[1]}{number:05}{part[2]}") for number in range(int(part[3]))]


def open_bytes(path: Path) -> IO[bytes]:
    """An open file; gzip is unpacked, whatever the file is called."""
    with path.open("rb") as file:
        packed = file.read(2) == b"\x1f\x8b"
    return gzip.open(path) if packed else path.open("rb")


def read_bytes(path: Path) -> bytes:
    """The bytes of a file, unpacked if need be. UnreadableFile if they are far more than it has."""
    limit = unpacked_limit(path.stat().st_size)
    with open_bytes(path) as file:
        raw = file.read(limit + 1)
    if len(raw) > limit:
        raise UnreadableFile(f"{path} unpacks to more than {limit:,} bytes.")
    return raw


def read_text(path: Path) -> str:
    """The text of a file in UTF-8, or in UTF-16 with its byte order mark; unpacked if need be."""
    try:
        raw = read_bytes(path)
        wide = raw[:2] in (b"\xff\xfe", b"\xfe\xff")  # as PowerShell writes what is redirected
        return raw.decode("utf-16" if wide else "utf-8-sig")
    except (gzip.BadGzipFile, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise UnreadableFile(f"{path} is damaged ({error}); download it again.") from None


def json_rows(path: Path, text: str, broken: list[int] | None = None) -> list | dict:
    """The content of a text: one json value, or one object a line.

    One line of a .jsonl is one row, but ScienceQA's script gives that name to one large object.
    broken: see `json_lines`.
    """
    by_line = path.name.removesuffix(".gz").endswith(".jsonl")
    start = text.lstrip()
    if not by_line or start.startswith("[") or not _is_json(start.split("\n", 1)[0]):
        try:
            return _value(_without_last_comma(text))
        except json.JSONDecodeError as trouble:
            # Several objects, one a line: POPE's label files are called .json.
            if not by_line and trouble.msg != "Extra data":
                raise UnreadableFile(
                    f"{path} is not whole json ({trouble}); download it again."
                ) from None
    return json_lines(path, text, broken)


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except RecursionError:
        raise json.JSONDecodeError("brackets in brackets without end", text, 0) from None


def _is_json(line: str) -> bool:
    try:
        _value(line.strip().rstrip(","))
    except json.JSONDecodeError:
        return False
    return True


def _without_last_comma(text: str) -> str:
    """A json text without the comma after its last row, which json forbids."""
    body = text.rstrip()
    end = body[-1:] if body.endswith(("]", "}")) else ""
    return body.removesuffix(end).rstrip().removesuffix(",") + end


def json_lines(path: Path, text: str, broken: list[int] | None = None) -> list:
    """The objects of a text with one object a line.

    A line that is not json is an error, or its number is added to `broken`.
    """
    rows = []
    for number, line in enumerate(text.split("\n"), 1):  # not splitlines(): answers may hold U+2028
        # Files with byte order marks may have been joined.
        line = line.strip().removeprefix("\ufeff").rstrip(",")
        try:
            # A list with one object a line has its brackets on lines of their own.
            rows += [_value(line)] if line not in ("", "[", "]") else []
        except json.JSONDecodeError as trouble:
            if broken is None:
                raise UnreadableFile(
                    f"{path}, line {number} is not json ({trouble.msg}); download it again."
                ) from None
            broken.append(number)
    return rows


def read_table(path: Path, kind: str, na: bool = False) -> list[dict]:
    """The rows of a tsv, csv, xlsx or parquet file; see `read_rows` for `na`."""
    import pandas as pd

    if kind == "parquet":
        pages = Pages(path)
        for group, columns in enumerate(pages.groups):
            pages.check(group, {column.name.split(".")[0] for column in columns})
        return pd.read_parquet(path).to_dict("records")
    if kind == "xlsx":
        try:
            import openpyxl  # noqa: F401
        except ImportError:
            raise UnreadableFile(
                f"{path} needs openpyxl to be read: pip install openpyxl, or save it as csv."
            ) from None
        frame = pd.read_excel(path, engine="openpyxl", dtype=str, keep_default_na=na)
    else:
        separator = "\t" if kind == "tsv" else ","
        options = dict(sep=separator, dtype=str, keep_default_na=na, encoding="utf-8-sig")
        with warnings.catch_warnings(record=True) as caught, open_bytes(path) as file:
            warnings.simplefilter("always", pd.errors.ParserWarning)
            # Otherwise a comma after each row would move all cells one column to the left.
            frame = pd.read_csv(file, index_col=False, **options)
        if caught:
            _check_width(path, separator)
    rows = frame.fillna("").to_dict("records")
    return [row for row in rows if any(row.values())]


def _check_width(path: Path, separator: str) -> None:
    """UnreadableFile if a row has more cells than the header, and they are not empty."""
    csv.field_size_limit(1 << 30)  # pictures
    with io.TextIOWrapper(open_bytes(path), encoding="utf-8-sig", newline="") as file:
        rows = csv.reader(file, delimiter=separator)
        width = len(next(rows))
        for row in rows:
            if any(row[width:]):
                raise UnreadableFile(
                    f"{path}, line {rows.line_num} has more cells than the first line."
                )


def find(labels: str | Path, *names: str) -> Path | None:
    """`labels` if it is a file, else the first file in it with one of the names (globs).

    A file may be packed: NAME.gz is found as NAME.
    """
    labels = Path(labels)
    if labels.is_file():
        return labels
    both = [pattern for name in names for pattern in (name, f"{name}.gz")]
    return next((path for name in both for path in sorted(labels.glob(name))), None)


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
    # A file of which the disk lost a bit is written again.
    if not path.exists() or path.read_bytes() != data:
        path.parent.mkdir(parents=True, exist_ok=True)
        # The processes of a sweep read the same benchmark at the same time.
        part = path.with_name(f".{path.name}.{os.getpid()}")
        part.write_bytes(data)
        part.replace(path)
    return str(path)


def name_picture(data: bytes | str) -> str:
    """A name for a picture that is not opened.

    Scoring only needs to know which questions share a picture.
    """
    return hashlib.sha256(data.encode() if isinstance(data, str) else data).hexdigest()[:32]


# ------------------------------------------------------------------------------------------ answers


def read_answers(path: str | Path) -> tuple[list[dict], list]:
    """(rows, bad lines); a row has `id`, `text`, `prompt` and `gold` (or None).

    Reads JSON Lines with question_id and text, and the benchmarks' own formats: a json list
    (VQAv2, VizWiz, GQA, TextVQA), a json object id -> answer (MM-Vet, MMMU, ScienceQA), the
    `_output.jsonl` of ScienceQA's script, a table (MMBench's xlsx, tsv, csv), MMMU's folder of
    SUBJECT/output.json, and MME's folder of TASK.txt (file, question, right answer, answer,
    separated by tabs). An answer that failed, or is null, is no answer. Bad lines are numbers; in a
    folder "FILE:number".
    """
    path, broken = Path(path), []
    if path.is_dir():
        return _answers_in(path)
    if not path.is_file() or path.name.removesuffix(".gz").endswith((".csv", ".tsv", ".xlsx")):
        content = read_rows(path)
    else:
        content = json_rows(path, read_text(path), broken)
    if isinstance(content, dict):
        content = _listed_answers(content)
    rows = [row for row in map(_answer, content if isinstance(content, list) else ()) if row]
    if not rows:
        raise ValueError(f"{path} holds no answers: each needs a question_id and a text.")
    return rows, broken


def _answers_in(folder: Path) -> tuple[list[dict], list]:
    """What `read_answers` returns, for a folder."""
    for tasks in (folder.glob("*.txt"), folder.glob("Your_Results/*.txt")):
        if rows := [row for task in sorted(tasks) for row in mme_rows(task)]:
            return rows, []
    names = ("merge.jsonl", "*.jsonl", "*.jsonl.gz", "*/output.json")
    parts = next(filter(None, (sorted(folder.glob(name)) for name in names)), [])
    if not parts:
        raise FileNotFoundError(
            f"{folder} holds no answers: neither *.jsonl nor MME's TASK.txt nor MMMU's "
            "SUBJECT/output.json."
        )
    rows, broken = [], []
    for part in parts:
        more, bad = read_answers(part)
        rows += more
        broken += [f"{part.relative_to(folder)}:{number}" for number in bad]
    return rows, broken


def _listed_answers(content: dict) -> list:
    """The answers of a json object, one for each question."""
    if first(content, ("question_id", "questionId")) is not None:
        return [content]  # a single answer
    if all(isinstance(content.get(key), list) for key in ("correct", "incorrect")):
        return content["correct"] + content["incorrect"]  # ScienceQA's script sorts them so
    content = content.get("outputs", content)
    return [
        v | {"id": k} if isinstance(v, dict) else {"id": k, "text": v} for k, v in content.items()
    ]


def _answer(row: object) -> dict | None:
    """One answer; None for a row that is none, for instance because the question failed."""
    if not isinstance(row, dict) or row.get("finish") == "error":
        return None
    id = first(row, ID_KEYS)
    # The first key that is there: MMMU's `answer` is the label, also where `response` is null.
    text = row.get(next((key for key in TEXT_KEYS if key in row), ""))
    if id is None or text is None:
        return None
    # A table that was saved again may say 7.0 for 7.
    id = re.sub(r"^(-?\d+)\.0$", r"\1", str(id))
    return {"id": id, "text": str(text), "prompt": row.get("prompt"), "gold": None}


def first(row: dict, keys: Sequence[str]) -> object:
    """The value of the first key that a row has; None if it has none."""
    return next((row[k] for k in keys if row.get(k) is not None), None)


def mme_rows(path: Path) -> list[dict]:
    """MME's result file of one task: file, question, right answer, answer, separated by tabs."""
    rows = []
    for line in read_text(path).split("\n"):
        cells = line.rstrip("\r").split("\t")
        if len(cells) >= 3:
            rows.append(
                {
                    "id": f"{path.stem}/{cells[0].split('.')[0]}",
                    "prompt": cells[1],
                    "gold": cells[2].strip(),
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
    """Those of the candidates that ask what the answer's prompt asks.

    Without a prompt: all of them, if they are copies of one question; else none.
    """
    asked = [bare_question(samples[i]["text"]) for i in candidates]
    if not row["prompt"]:
        return candidates if len(set(asked)) == 1 else []
    question = bare_question(row["prompt"])
    return [i for i, other in zip(candidates, asked) if other == question]
