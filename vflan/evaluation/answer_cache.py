"""Answers on disk: each is written as soon as it arrives, so an interrupted evaluation loses none.

<run>/answers/NAME.jsonl    a header (model, questions, decoding), then one line for each answer

Each line ends with a checksum: an answer of which the disk lost a bit is asked again. Lines without
one are of earlier versions; they are used unless they are no JSON, or name another question.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, TextIO

import pandas as pd
from filelock import Timeout

from vflan.config import read_json, shown
from vflan.data.images import content_sum, picture_trouble
from vflan.escape import for_terminal, from_sheet, write_sheet
from vflan.io import explain_writing, hold, read_line, say, sealed_line, set_aside
from vflan.progress import counted

if TYPE_CHECKING:
    from torch import nn

FINISHES = ("stop", "length", "choice", "error")
SCORE_KEY = ["run", "benchmark", "metric", "seed", "judge"]
SCORE_NUMBERS = ("value", "low", "high", "baseline", "n", "seed", "problems")
SCORE_NAMES = ("run", "benchmark", "metric", "judge")
# A file of weights is hashed in blocks of this size, in so many at least.
BLOCK_BYTES, BLOCKS = 1 << 20, 17


class Answer(NamedTuple):
    """An answer, and why it ended.

    finish: `stop` (the end token), `length` (cut off), `choice` (one pass), `error` (see reason).
    """

    text: str
    finish: str
    reason: str = ""


def ask_and_keep(
    path: Path,
    header: dict,
    samples: list[dict],
    questions: list[dict],
    ask: Callable[[list[dict]], Iterable[tuple[int, Answer]]],
) -> list[Answer]:
    """The Answer to each question: from the file at `path`, else from `ask`, and then added to it.

    header: what the answers depend on; ValueError if the file has another. questions: dicts with
    `text` and `image`. ask(questions) yields (index, Answer). Only one process asks at a time: a
    second one waits, and then reads the file. Failed questions are asked again, unless the picture
    still cannot be read.
    """
    # The lock is held while asking: a second process would otherwise ask the same questions.
    kept = "All answers so far are kept: evaluate again"
    with explain_writing(path, kept), locked(path):
        answers = read_answers(path, header, samples, questions)
        missing = [
            i
            for i, question in enumerate(questions)
            if i not in answers or _can_retry(answers[i], question)
        ]
        if missing:
            replies = ask([questions[i] for i in missing])
            replies = counted(replies, f"answering {path.stem}", len(missing), "questions")
            with path.open("a", encoding="utf-8") as file:
                for number, answer in replies:
                    i = missing[number]
                    answers[i], text = answer, questions[i]["text"]
                    # Picture and prompt show later whether the question is still the same.
                    row = dict(i=i, question_id=samples[i]["question_id"], prompt=text)
                    row |= dict(answer=answer.text, finish=answer.finish)
                    row |= dict(picture=content_sum(questions[i]["image"]))
                    append_row(file, row | ({"reason": answer.reason} if answer.reason else {}))
    return [answers[i] for i in range(len(questions))]


def read_answers(
    path: Path, header: dict, samples: list[dict], questions: list[dict]
) -> dict[int, Answer]:
    """{index: Answer} of a file of answers. A file that does not exist is created with its header.

    Damaged lines are left out, so that their questions are asked again; a file without a sound
    header is renamed. ValueError if the header differs, or if a picture has changed since its
    question was answered: its content (CRC-32; of a picture in a zip, as the zip's directory has
    it), or its size for the answers of earlier versions.
    """
    old, rows = read_kept(path, mend=True)
    if old is None:
        set_aside(path)
    # The header comes first, so that a killed process leaves no answers without it.
    if not old:
        path.write_text(sealed_line(header), encoding="utf-8")
        return {}
    # Answers to other questions, or of another model, must never be scored as ours.
    changes = [f"{k} ({old.get(k)}, now {v})" for k, v in header.items() if old.get(k) != v]
    if changes:
        raise ValueError(
            f"{shown(path)} holds answers of another {' and another '.join(changes)}: move the "
            "file away or delete it to ask again, or evaluate with the old settings."
        )
    # The questions are those of the header, so that a row with another one is a damaged row.
    rows = [row for row in rows if is_about(row, samples, questions)]
    # Scoring again needs neither the model nor the pictures, so a missing picture is no change.
    answered = [row for row in rows if row["finish"] != "error"]
    stale = [image for row in answered if _has_changed(row, image := questions[row["i"]]["image"])]
    if stale:
        raise ValueError(
            f"{shown(path)} holds {len(stale)} answers about pictures that have changed since "
            f"(first: {Path(stale[0]).name}): restore the old pictures, or delete the file to ask "
            "again."
        )
    return {row["i"]: Answer(row["answer"], row["finish"], row.get("reason", "")) for row in rows}


def read_kept(path: Path, mend: bool = False) -> tuple[dict | None, list[dict]]:
    """(header, sound rows) of a file of answers, ({}, []) if there is none; see `read_cache`.

    The header is None if it is damaged: nobody knows of which model the answers are.
    """
    header, *lines = read_cache(path, mend) or [{}]
    rows = [row for row in lines if row and _is_answer(row)]
    if damaged := len(lines) - len(rows):
        say(f"{shown(path)}: {damaged} damaged lines are not used.")
    return (None if header and "i" in header else header), rows


def read_cache(path: Path, mend: bool = False) -> list[dict | None]:
    """The rows of a JSON Lines file, header included, None for a damaged one; [] if there is no
    file. An incomplete last line is left out.

    mend: also cut the incomplete line off in the file, so that rows can be appended. Only the
    process that holds the lock may do so, because another process may be writing that line.
    """
    if not path.exists():
        return []
    # A killed process may have left half a row behind the last line break.
    data = path.read_bytes()
    end = data.rfind(b"\n") + 1
    if mend and end < len(data):
        os.truncate(path, end)
    # Not splitlines(): an answer may contain another line separator.
    return [read_line(line) for line in data[:end].split(b"\n")[:-1]]


def append_row(file: TextIO, row: dict) -> None:
    """Writes and flushes a row of a JSON Lines file: a killed process loses at most this row."""
    file.write(sealed_line(row))
    file.flush()


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Holds the lock of a file. If another process holds it, prints a line and waits.

    The system releases the lock of a process that is killed.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = path.with_name(f".{path.name}.lock")
    with ExitStack() as held:
        try:
            held.enter_context(hold(lock, timeout=0))
        except Timeout:
            where = for_terminal(shown(path))
            say(f"Another process is writing {where}: waiting for it.", sys.stdout)
            held.enter_context(hold(lock))
        yield


def hash_questions(samples: list[dict], questions: list[dict]) -> str:
    """A short hash of ids, prompts, allowed answers and picture names; labels may be corrected."""
    digest = hashlib.sha256()
    for sample, question in zip(samples, questions, strict=True):
        # Only the name: the folder of the benchmarks may be moved.
        image = question["image"] and Path(question["image"]).name
        parts = [sample["question_id"], question["text"], image, question.get("choices")]
        digest.update(json.dumps(parts).encode())
    return digest.hexdigest()[:16]


def hash_weights(folder: str | Path) -> str:
    """A short hash of the weights in a folder; FileNotFoundError if there are none.

    Every byte counts, so a 13B model's 26 GB are read, once a process while the files stay as they
    are. For a run whose model was deleted (`Run.keep`), done.json knows the hash.
    """
    if known := read_json(Path(folder).parent / "done.json").get("weights"):
        return known
    files = sorted(p for p in Path(folder).glob("**/*") if p.suffix in (".safetensors", ".bin"))
    if not files:
        raise FileNotFoundError(f"{folder} holds no weights: train the run first.")
    status = [path.stat() for path in files]
    return _hash_files(tuple((p, s.st_size, s.st_mtime_ns) for p, s in zip(files, status)))


@cache
def _hash_files(files: tuple[tuple[Path, int, int], ...]) -> str:
    """files: path, size and time of each."""
    digest = hashlib.sha256()
    for path, size, _ in files:
        digest.update(f"{path.name} {size}".encode())
        # At least BLOCKS, as in earlier versions, and so many that they touch or overlap.
        steps = max(BLOCKS - 1, math.ceil(size / BLOCK_BYTES))
        last = max(0, size - BLOCK_BYTES)
        starts = {min(size * block // steps, last) for block in range(steps + 1)}
        with path.open("rb") as file:
            for start in sorted(starts):
                file.seek(start)
                digest.update(file.read(BLOCK_BYTES))
    return digest.hexdigest()[:16]


def hash_model(model: nn.Module) -> str:
    """A short hash of a model in memory, from at most 4096 values of every tensor."""
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        flat = tensor.detach().flatten()
        sampled = flat[:: max(1, flat.numel() // 4096)][:4096]
        digest.update(name.encode() + sampled.double().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def keep_scores(path: Path, scores: pd.DataFrame) -> None:
    """Adds scores to a csv file. A row with the same SCORE_KEY as an old one takes its place."""
    kept = "The scores before are kept, and so are all answers: evaluate again"
    with explain_writing(path, kept), locked(path):
        if path.exists() and (old := _sound_scores(path)) is not None:
            both = pd.concat([old, scores], ignore_index=True)
            # Groups are numbered as they first appear, so sorting by number keeps the old order.
            place = both.groupby(SCORE_KEY, sort=False).ngroup()
            both = both.iloc[place.argsort(kind="stable")]
            scores = both.drop_duplicates(SCORE_KEY, keep="last")
        # Replaced as a whole: a reader never sees half a table.
        part = path.with_suffix(".part")
        write_sheet(scores, part, float_format="%.4f")
        part.replace(path)


def read_scores(path: Path) -> pd.DataFrame:
    """The table of a csv file of `keep_scores`: names are text, even `007`, `NA` and `=1`."""
    numbers, names = dict.fromkeys(SCORE_NUMBERS, ""), dict.fromkeys(SCORE_NAMES, str)
    scores = from_sheet(pd.read_csv(path, dtype=names, na_values=numbers, keep_default_na=False))
    # Files of earlier versions have neither column.
    for column, blank in (("judge", ""), ("problems", 0)):
        scores[column] = scores[column].fillna(blank) if column in scores else blank
    return scores


def _sound_scores(path: Path) -> pd.DataFrame | None:
    """The scores in a csv file; None if it is damaged, and then it is renamed."""
    try:
        scores = read_scores(path)
    # Rows of different lengths, or bytes that are not UTF-8.
    except ValueError:
        scores = pd.DataFrame()
    if {*SCORE_KEY, "value"} <= set(scores) <= {*SCORE_NUMBERS, *SCORE_NAMES}:
        return scores
    set_aside(path)
    return None


def _can_retry(answer: Answer, question: dict) -> bool:
    image = question["image"]
    return answer.finish == "error" and not (image and picture_trouble(str(image)))


def _is_answer(row: dict) -> bool:
    """Whether a row has what an answer needs: a damaged one without checksum may lack it."""
    is_known = row.get("finish") in FINISHES and isinstance(row.get("answer"), str)
    return is_known and type(row.get("i")) is int and isinstance(row.get("reason", ""), str)


def is_about(row: dict, samples: list[dict], questions: list[dict]) -> bool:
    """Whether a row answers the question that its number names."""
    if not 0 <= (i := row["i"]) < len(questions):
        return False
    name, text = samples[i]["question_id"], questions[i]["text"]
    return str(row.get("question_id", name)) == str(name) and row.get("prompt", text) == text


def _has_changed(row: dict, image: str | None) -> bool:
    if not image:
        return False
    if "picture" in row:
        before, now = row["picture"], content_sum(image)
    else:
        # An answer of an earlier version knows the size of a picture that is a file.
        before, now = row.get("bytes"), os.path.getsize(image) if os.path.exists(image) else None
    return None not in (before, now) and before != now
