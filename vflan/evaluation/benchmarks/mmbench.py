"""MMBench and MMBench-CN: circular multiple choice; a question needs all rotations right.

    mmbench/       mmbench_dev_20230712.tsv (the authors'), pictures inside
    mmbench_cn/    mmbench_dev_cn_20231003.tsv (the same in Chinese)

To score, an upload sheet (.xlsx) will do as questions: it has all but the pictures and categories.

Rows whose `index` is equal modulo a million are rotations of one question. The official judge is a
server on which a language model reads the answers. Here an answer to the released file is right if
it is the letter and nothing else, which reproduces LLaVA-1.5-13B's published 67.7. `lenient` also
finds letters and options in sentences. With a judge, `judged` is the official procedure: rules read
the choice, and the judge decides where they read none. The test split has no answers: `upload`
writes the sheet for the server. A missing answer is wrong.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from vflan.evaluation.benchmarks.benchmark import (
    Benchmark,
    Metric,
    clean,
    labelled,
    metrics,
    out_of,
    valid,
)
from vflan.evaluation.benchmarks.files import FORMATS, LETTER, LETTER_CN, read_rows
from vflan.evaluation.benchmarks.reading import choose

if TYPE_CHECKING:
    import pandas as pd

OPTION = re.compile(
    r"(?:^|(?<=\s))(?:\(([a-h])\)|([A-H])[.)])\s*(.*?)(?=\s*(?:\([a-h]\)|(?<=\s)[A-H][.)]|\n|$))",
    re.S,
)


def options(text: str) -> dict[str, str]:
    """{letter: option} of a question: '(a) red (b) blue' on one line, or 'A. red' a line each."""
    # The format prompt must not become part of the last option.
    text = re.sub(rf"\banswer with the\b[^\n]*|{FORMATS[3]}", "", text, flags=re.I)
    return {(m[1] or m[2]).lower(): clean(m[3]) for m in OPTION.finditer(text)}


def parse(answer: str, sample: dict) -> str | None:
    """The letter chosen, or None, of 'b', 'B.', '(b) blue', 'The answer is (b).', 'blue' ...

    A bare 'a' inside a sentence is an article: 'a red star' chooses the option 'a red star'.
    """
    return choose(answer, options(sample["text"]))


def read(path: Path, labels: Path, keep: Callable, last: str = LETTER) -> list[dict]:
    """The rows of the authors' file; `last` is the format prompt at the end of each question."""
    rows = read_rows(path, na=True)
    pictures = {row["index"]: row.get("image", "") for row in rows}
    samples = []
    for row in rows:
        data = row.get("image", "")
        if len(data) <= 64:  # not a picture, but the index of the row that has it
            data = pictures.get(data, data)
        text = "\n".join(filter(None, [row.get("hint"), row["question"]])) + lettered(row) + last
        samples.append(
            dict(
                question_id=row["index"],
                text=text,
                label=row.get("answer", "").strip() or None,
                exact=True,
                image=keep(data) if data else None,
                category=row.get("category") or "all",
                rotation_of=str(int(row["index"]) % 1_000_000),
                row=row,
            )
        )
    return samples


def lettered(row: dict) -> str:
    """The options of a row, one a line: A to D, up to the first that is empty."""
    text = ""
    for letter in "ABCD":
        option = row.get(letter, "")
        if option.lower() in ("", "nan", "none"):
            break
        text += f"\n{letter}. {option}"
    return text


def rotated(sample: dict) -> str:
    """The question of which a sample is a rotation."""
    return sample.get("rotation_of") or sample["question_id"].rsplit("_", 1)[0]


def _order(sample: dict) -> tuple[int, str]:
    return len(sample["question_id"]), sample["question_id"]


def items(
    samples: list[dict], answers: list[str], judgements: Sequence | None = None
) -> dict[str, Metric]:
    """accuracy (circular, by category), single_pass, lenient (circular, by `parse`).

    single_pass is of the questions in their first order alone, as the authors publish it.
    judgements: a Judgement of 0 or 1 for each answer, or None. They add judged (circular): right by
    `parse`, or by a judgement where it reads nothing; wrong where neither reads anything.
    """
    label = [s["label"].lower().strip("() ") for s in samples]
    chosen = [parse(a, s) for a, s in zip(answers, samples)]
    loose = np.array([choice == right for choice, right in zip(chosen, label)], float)
    strict = [
        a == s["label"] if s.get("exact") else ok for a, s, ok in zip(answers, samples, loose)
    ]
    right = np.array(strict, float)
    rotations = {}
    for i, s in enumerate(samples):
        rotations.setdefault(rotated(s), []).append(i)
    # The question as its authors wrote it has the shortest id; a rotation adds a million, or _1.
    base = [min(members, key=lambda i: _order(samples[i])) for members in rotations.values()]
    heads = [samples[i] for i in base]

    def circular(right):
        return np.array([right[members].all() for members in rotations.values()], float)

    # Pooled, because the official number gives each question the same weight.
    measured = metrics("accuracy", circular(right), heads, pooled=True)
    measured["single_pass"] = metrics("single_pass", right[base], heads, pooled=True)["single_pass"]
    if any(s.get("exact") for s in samples):
        measured["lenient"] = metrics("lenient", circular(loose), heads, pooled=True)["lenient"]
    if judgements is not None:
        decided = [
            valid(j) and j.score >= out_of(j) / 2 if choice is None else ok
            for choice, ok, j in zip(chosen, loose, judgements)
        ]
        judged = circular(np.array(decided, float))
        measured["judged"] = metrics("judged", judged, heads, pooled=True)["judged"]
    return measured


def upload(samples: list[dict], answers: list[str], path: Path) -> None:
    """The server's sheet as .xlsx, or .tsv or .csv if `path` ends so.

    It is the released file without hint, picture and categories, with a column `prediction`.
    ValueError for questions that are not from a released file.
    """
    import pandas as pd

    if lacking := [s["question_id"] for s in samples if "row" not in s]:
        raise ValueError(
            f"MMBench's sheet repeats the rows of its released file, which question {lacking[0]} "
            "is not from."
        )
    drop = ("hint", "category", "source", "image", "comment", "l2-category", "prediction")
    sheet = pd.DataFrame([{k: v for k, v in s["row"].items() if k not in drop} for s in samples])
    sheet["index"] = sheet["index"].astype(int)
    sheet.insert(min(6, len(sheet.columns)), "prediction", [a or "" for a in answers])
    separators = {".tsv": "\t", ".csv": ","}
    if separator := separators.get(Path(path).suffix.lower()):
        sheet.to_csv(path, index=False, sep=separator)
    else:
        write_sheet(sheet, path)


def write_sheet(sheet: pd.DataFrame, path: Path) -> None:
    """An .xlsx file in which each text is a text: "=5" is no formula. ValueError: no openpyxl."""
    try:
        from openpyxl import Workbook
        from openpyxl.cell.cell import ILLEGAL_CHARACTERS_RE
    except ImportError:
        raise ValueError(
            f"{path} needs openpyxl to be written: pip install openpyxl, or end --out in .tsv."
        ) from None
    book = Workbook()
    page = book.active
    for row in [list(sheet.columns), *sheet.values.tolist()]:
        # Control characters, which the format forbids, say nothing.
        page.append([ILLEGAL_CHARACTERS_RE.sub("", x) if isinstance(x, str) else x for x in row])
    for cell in (cell for row in page.iter_rows() for cell in row):
        if cell.data_type == "f":
            cell.data_type = "s"
    book.save(path)


family = partial(
    Benchmark,
    headline="accuracy",
    parse=parse,
    measure=items,
    measure_with_judge=items,
    known=labelled,
    unit=rotated,
    missing="wrong",
    size=4377,
    upload=upload,
    source="the MMBench project (open-compass)",
)
MMBENCH = family(
    "mmbench",
    upload_name="mmbench_upload.xlsx",
    title="MMBench",
    read=read,
    paper="MMB",
    released=("mmbench_dev_20230712.tsv", "*.tsv"),
)
MMBENCH_CN = family(
    "mmbench_cn",
    upload_name="mmbench_cn_upload.xlsx",
    title="MMBench-CN",
    read=partial(read, last=LETTER_CN),
    paper="MMB-CN",
    released=("mmbench_dev_cn_20231003.tsv", "*.tsv"),
)
