"""Answers on disk: every one is written as it comes, and belongs to one model, one set of questions, one way to decode.

<run>/answers/NAME.jsonl    first line: whose answers these are; then one line an answer, in the order they came
"""

import hashlib
import json
import os
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import pandas as pd
from filelock import FileLock, Timeout

from vflan.config import shown
from vflan.data.images import picture_trouble
from vflan.progress import counted


class Answer(NamedTuple):
    """What was said, and why it ended: `stop` (by itself), `length` (cut), `choice` (one pass), `error` (see reason)."""

    text: str
    finish: str
    reason: str = ""


def ask_and_keep(path, header, samples, asked, ask):
    """The Answer to every question, from the file at `path` where it has one, else from `ask`, written down as it comes.

    header: what the answers depend on; ValueError if the file was made with another. asked: mappings with `text` and
    `image`. ask(list of them) yields (index, Answer). One process at a time asks: a second one waits, then reads. What
    failed is asked again, unless its picture still cannot be read.
    """
    with alone(path):
        answers = read_answers(path, header, asked)
        todo = [
            i
            for i in range(len(asked))
            if i not in answers or _worth_another_try(answers[i], asked[i])
        ]
        if todo:
            with path.open("a", encoding="utf-8") as file:
                said = ask([asked[i] for i in todo])
                for j, answer in counted(said, f"answering {path.stem}", len(todo), "questions"):
                    i = todo[j]
                    answers[i] = answer
                    row = {
                        "i": i,
                        "question_id": samples[i]["question_id"],
                        "prompt": asked[i]["text"],
                    }
                    row |= {
                        "answer": answer.text,
                        "finish": answer.finish,
                        "bytes": size_of(asked[i]["image"]),
                    }
                    row |= {"reason": answer.reason} if answer.reason else {}
                    file.write(json.dumps(row, ensure_ascii=False) + "\n")
                    file.flush()
    return [answers[i] for i in range(len(asked))]


def read_answers(path, header, asked):
    """{index: Answer} of the kept file, which is begun with its header if it is not there."""
    rows = read_rows(path, mend=True)
    if not rows:
        path.write_text(json.dumps(header) + "\n", encoding="utf-8")
        return {}
    first, *rows = rows
    other = [
        f"{key} ({first.get(key)}, now {header[key]})"
        for key in header
        if first.get(key) != header[key]
    ]
    if other:
        raise ValueError(
            f"{shown(path)} holds answers of another {' and another '.join(other)}: move the file away or delete it "
            "to ask again, or evaluate with what it was made with."
        )
    changed = [
        row
        for row in rows
        if row["finish"] != "error" and _changed(row["bytes"], asked[row["i"]]["image"])
    ]
    if changed:
        raise ValueError(
            f"{shown(path)} holds {len(changed)} answers about pictures that have changed since (first: "
            f"{Path(asked[changed[0]['i']]['image']).name}): put the old pictures back, or delete the file to ask again."
        )
    return {row["i"]: Answer(row["answer"], row["finish"], row.get("reason", "")) for row in rows}


def read_rows(path, mend=False):
    """The rows of a JSON Lines file, header included; [] if it is not there. A last line that was cut off is left out.

    mend: cut it off in the file too, so that one may append; only for who holds the lock, since a line may be half
    written by somebody else.
    """
    if not path.exists():
        return []
    data = path.read_bytes()
    whole = data.rfind(b"\n") + 1
    if mend and whole < len(data):
        os.truncate(path, whole)
    rows = []
    for number, line in enumerate(
        data[:whole].decode().split("\n")[:-1], 1
    ):  # a line separator may stand in an answer
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            raise ValueError(
                f"{shown(path)}, line {number} is damaged: delete that line, or the file."
            ) from None
    return rows


@contextmanager
def alone(path):
    """Holds the lock of a file; says so if another process has it, and waits. A killed process holds nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path.with_name(f".{path.name}.lock"))
    try:
        lock.acquire(timeout=0)
    except Timeout:
        print(f"Another process is writing {shown(path)}: waiting for it.", flush=True)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def size_of(image):
    """Bytes of a picture's file; None without a picture or without the file."""
    return os.path.getsize(image) if image and os.path.exists(image) else None


def fingerprint_of_questions(samples, asked):
    """A short hash of what is asked: ids, prompts, allowed answers, names of pictures. Labels may be corrected later."""
    digest = hashlib.sha256()
    for s, a in zip(samples, asked, strict=True):
        image = a["image"] and Path(a["image"]).name
        digest.update(json.dumps([s["question_id"], a["text"], image, a.get("choices")]).encode())
    return digest.hexdigest()[:16]


def fingerprint_of_folder(folder):
    """A short hash of the weights in a folder, from at most 17 MiB of each file: a model may have 26 GB."""
    files = sorted(p for p in Path(folder).glob("**/*") if p.suffix in (".safetensors", ".bin"))
    if not files:
        raise FileNotFoundError(f"{folder} holds no weights: train the run first.")
    digest, block = hashlib.sha256(), 1 << 20
    for path in files:
        size = path.stat().st_size
        digest.update(f"{path.name} {size}".encode())
        with path.open("rb") as file:
            for start in sorted({min(size * i // 16, max(0, size - block)) for i in range(17)}):
                file.seek(start)
                digest.update(file.read(block))
    return digest.hexdigest()[:16]


def _worth_another_try(answer, question):
    return answer.finish == "error" and not (
        question["image"] and picture_trouble(str(question["image"]))
    )


def _changed(size, image):
    now = size_of(image)  # scoring again needs neither the model nor the pictures
    return size is not None and now is not None and size != now


def keep_scores(path, scores):
    """Add scores to a csv; rows of the same run, benchmark, metric, seed and judge are replaced where they stand."""
    with alone(path):
        if path.exists():
            old = pd.read_csv(path, dtype={"judge": str})
            for column, blank in (("judge", ""), ("problems", 0)):  # older files have neither
                old[column] = old[column].fillna(blank) if column in old else blank
            both, key = (
                pd.concat([old, scores], ignore_index=True),
                ["run", "benchmark", "metric", "seed", "judge"],
            )
            place = both.groupby(
                key, sort=False
            ).ngroup()  # groups are numbered as they first appear
            scores = both.iloc[place.argsort(kind="stable")].drop_duplicates(key, keep="last")
        part = path.with_suffix(".part")
        scores.to_csv(part, index=False, float_format="%.4f")
        part.replace(path)
