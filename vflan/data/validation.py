"""The doctor: every row and every picture judged by the rules that training uses."""

import hashlib
import html
import os
import sqlite3
import warnings
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import pandas as pd
from datasets import Dataset

from vflan.config import CACHE
from vflan.data import decontamination as contamination
from vflan.data.conversation import IGNORE_INDEX, IMAGE, audit, encode_many
from vflan.data.images import picture_bytes, read_picture, stamp
from vflan.io import set_aside
from vflan.progress import progress

ROWS, PICTURES = 1000, 256  # read at a time
# What is remembered of a sound picture: hashes of its file and of its pixels, and two small views of it.
LOOK = np.dtype(
    [
        ("file", "V16"),
        ("pixels", "V16"),
        ("views", np.uint8, (2, contamination.SIDE, contamination.SIDE, 3)),
    ]
)
SHELF = "pictures-1.sqlite"  # in CACHE; the number is that of the format

MATCH = ["row", "id", "task_name", "picture", "benchmark", "question_id", "kind", "distance"]
QUESTION = ["question", "rows", "benchmark", "question_id", "asked", "kind"]


@dataclass(frozen=True)
class Report:
    """What `check` found: `rows` = `ok` + len(`bad`). `repaired` rows are trained on, less the named part (and count as ok).

    Nothing is removed by itself: `samples.select(...)` and `mix(exclude=...)` do that.
    """

    rows: int
    ok: int
    bad: pd.DataFrame  # row, id, reason
    repaired: pd.DataFrame  # row, id, reason
    duplicates: (
        pd.DataFrame
    )  # picture, same_as (the first with these pixels), rows that show it; not bad by themselves
    by_task: pd.DataFrame  # task_name, rows, ok, bad, repaired, duplicates, contaminated
    contamination: pd.DataFrame | None = (
        None  # a line for each row and evaluation picture alike; None: not asked for
    )
    questions: pd.DataFrame | None = (
        None  # questions that a benchmark asks too, whatever the picture, rare ones first
    )
    unread: tuple[str, ...] = ()  # why evaluation pictures could not be compared

    @property
    def reasons(self) -> pd.Series:
        """How many bad rows for each kind of reason."""
        return self.bad.reason.map(_kind).value_counts()

    @property
    def contaminated(self) -> list[int]:
        """The rows whose picture is in a benchmark, ascending."""
        return [] if self.contamination is None else sorted(set(self.contamination.row))

    def __str__(self):
        lines = [
            f"{self.rows} rows: {self.ok} fine, {len(self.bad)} bad, {len(self.repaired)} of the fine ones repaired"
        ]
        lines += [f"  {count} x {reason}" for reason, count in self.reasons.items()]
        if len(self.duplicates):
            lines.append(
                f"{len(self.duplicates)} pictures repeat another one's content under another name"
            )
        if self.contamination is not None:
            lines.append(
                f"{len(self.contaminated)} rows show a picture of a benchmark; "
                f"{len(self.questions)} questions are asked by a benchmark too"
            )
        if self.unread:
            lines.append(
                f"{len(self.unread)} evaluation pictures could not be compared, first: {self.unread[0]}"
            )
        return "\n".join(lines)

    __repr__ = __str__

    def _repr_html_(self):
        tables = [
            ("Bad rows", self.bad),
            ("Tasks", self.by_task),
            ("Contamination", self.contamination),
        ]
        shown = [f"<pre>{html.escape(str(self))}</pre>"]
        for title, table in tables:
            if table is not None and len(table):
                more = f", the first 10 of {len(table)}" if len(table) > 10 else ""
                shown.append(
                    f"<b>{title}{more}</b>{table.head(10).to_html(index=False, escape=True)}"
                )
        return "\n".join(shown)


def check(
    samples: Dataset,
    tokenizer=None,
    max_length: int = 2048,
    template: str = "vicuna_v1",
    image_tokens: int = 576,
    against=None,
    threads: int | None = None,
) -> Report:
    """Judge every row by the rules that training uses: a bad row gets one reason, each distinct picture is decoded once.

    With a `tokenizer` a row is bad too if no answer token lies within `max_length`, a picture counting as `image_tokens`.
    With `against` (a folder of benchmarks, or {name: questions}) pictures and questions that are also in a benchmark are
    reported. Pictures found sound are remembered in the cache until they change, so that a check that was cut off goes on
    where it was. `threads` decode pictures (all cores unless given).
    """
    threads = threads or os.cpu_count() or 1
    names = _distinct_pictures(samples)
    looks, troubles = look_at(names, threads)
    twins, duplicates = _first_alike(looks, troubles), {}
    asked, copies, unread = [], {}, ()
    if against is not None:
        asked = contamination.benchmark_questions(against)
        copies, unread = _copies(names, looks, troubles, asked, threads)
    of_picture, of_key = _by(asked, lambda q: [q["image"]]), _by(asked, lambda q: q["keys"])

    bad, repaired, found, shared, tasks = [], [], [], {}, {}
    rows = _rows(samples, tokenizer, template)
    for row, (name, image, task, turns, encoded) in enumerate(rows):
        number = names.get(image) if image else None
        room = max_length - (image_tokens - 1 if image else 0)  # the picture is one of the ids
        reason, lost = _verdict(turns, image, troubles.get(number, ""), encoded, room, max_length)
        tally = tasks.setdefault(task or "", np.zeros(6, int))
        tally += (1, not reason, bool(reason), bool(lost), number in twins, number in copies)
        if reason:
            bad.append((row, name, reason))
        elif lost:
            repaired.append((row, name, lost))
        if number in twins:
            duplicates.setdefault(number, []).append(row)
        if asked:
            texts = [
                t["value"].replace(IMAGE, "").strip()
                for t in turns
                if t.get("from") == "human" and t.get("value")
            ]
            for other, kind, distance in copies.get(number, ()):
                found += _matches(
                    (row, name, task, image), of_picture[other], texts, kind, distance
                )
            for text in texts:
                if not of_key.keys().isdisjoint(contamination.question_keys(text)):
                    shared[text] = shared.get(text, 0) + 1
    listed = list(names)
    copied = [(listed[number], listed[twins[number]], rows) for number, rows in duplicates.items()]
    counts = ["rows", "ok", "bad", "repaired", "duplicates", "contaminated"]
    return Report(
        len(samples),
        len(samples) - len(bad),
        pd.DataFrame(bad, columns=["row", "id", "reason"]),
        pd.DataFrame(repaired, columns=["row", "id", "reason"]),
        pd.DataFrame(copied, columns=["picture", "same_as", "rows"]),
        pd.DataFrame(
            [(task, *tally) for task, tally in tasks.items()], columns=["task_name", *counts]
        ),
        None if against is None else pd.DataFrame(found, columns=MATCH),
        None if against is None else _question_table(shared, of_key),
        tuple(unread),
    )


def look_at(names: Iterable[str], threads: int = 1) -> tuple[np.ndarray, dict[int, str]]:
    """(n,) LOOKs of pictures, and {index: why it cannot be used}. Sound pictures are remembered by name and stamp."""
    names = list(names)
    looks, troubles = np.zeros(len(names), LOOK), {}
    with (
        closing(_shelf()) as shelf,
        ThreadPoolExecutor(threads) as pool,
        progress("checking pictures", len(names), "pictures") as bar,
    ):
        for start in range(0, len(names), PICTURES):
            part = names[start : start + PICTURES]
            keys = [name.encode("utf-8", "surrogatepass") for name in part]
            marks = "?" + ",?" * (len(part) - 1)
            query = f"select name, stamp, look from pictures where name in ({marks})"
            known = {key: (mark, look) for key, mark, look in shelf.execute(query, keys)}
            # on a network disk asking for the time takes as long as reading
            stamps = [repr(found) if found else "" for found in pool.map(stamp, part)]
            new = []
            for i, (key, mark) in enumerate(zip(keys, stamps)):
                if mark and known.get(key, ("",))[0] == mark:
                    looks[start + i] = np.frombuffer(known[key][1], LOOK)[0]
                else:
                    new.append(i)
            for i, (look, trouble) in zip(new, pool.map(_look, [part[i] for i in new])):
                if trouble:
                    troubles[start + i] = trouble
                else:
                    looks[start + i] = look
            sound = [i for i in new if start + i not in troubles and stamps[i]]
            with shelf:  # one transaction: a kill loses at most this part
                rows = [(keys[i], stamps[i], looks[start + i].tobytes()) for i in sound]
                shelf.executemany("replace into pictures values (?, ?, ?)", rows)
            bar.update(len(part))
    return looks, troubles


def _look(name: str):
    """(LOOK, "") of a picture that training can read, else (None, why not)."""
    try:
        picture = read_picture(name)
        look = np.zeros((), LOOK)
        look["file"] = hashlib.blake2b(picture_bytes(name), digest_size=16).digest()
        pixels = np.asarray(picture)
        look["pixels"] = hashlib.blake2b(
            pixels, digest_size=16, salt=repr(pixels.shape).encode()[:16]
        ).digest()
        look["views"] = contamination.views(picture)
        return look, ""
    except OSError as trouble:  # read_picture says why
        return None, str(trouble)


def _shelf() -> sqlite3.Connection:
    file = CACHE / SHELF
    try:
        CACHE.mkdir(parents=True, exist_ok=True)
        return _with_table(sqlite3.connect(file, timeout=600))
    except (OSError, sqlite3.OperationalError) as trouble:  # no right to write there
        warnings.warn(
            f"{file} cannot be written ({trouble}): a check that is cut off will start anew",
            stacklevel=4,
        )
        return _with_table(sqlite3.connect(":memory:"))
    except (
        sqlite3.DatabaseError
    ):  # no database, after a disk was full, say: it can all be made again
        set_aside(file)
        return _shelf()


def _with_table(shelf: sqlite3.Connection) -> sqlite3.Connection:
    try:
        with shelf:
            shelf.execute(
                "create table if not exists pictures (name blob primary key, stamp text, look blob)"
            )
            shelf.execute("delete from pictures where 0")  # fails where only reading is allowed
    except sqlite3.Error:
        shelf.close()
        raise
    return shelf


def _distinct_pictures(samples: Dataset) -> dict[str, int]:
    """Each picture's name and number, in the order of the rows."""
    names = {}
    for batch in samples.select_columns(["image"]).with_format(None).iter(ROWS):
        for name in batch["image"]:
            if name:
                names.setdefault(name, len(names))
    return names


def _rows(samples: Dataset, tokenizer, template):
    """Yields (id, image, task_name, conversations, encoded), a part of the rows in memory at a time."""
    columns = ["id", "image", "task_name", "conversations"]
    with progress("checking rows", len(samples), "rows") as bar:
        for batch in samples.select_columns(columns).with_format(None).iter(ROWS):
            *plain, many = (batch[column] for column in columns)
            many = [[turn or {} for turn in turns or []] for turns in many]
            encoded = (
                encode_many(many, tokenizer, template)
                if tokenizer is not None
                else [None] * len(many)
            )
            yield from zip(*plain, many, encoded)
            bar.update(len(many))


def _verdict(turns, image, trouble, encoded, room, max_length) -> tuple[str, str]:
    """(why a row is bad, what of it is left out): at most one of the two is not empty. `room`: ids that fit."""
    try:
        found = audit(turns)
        if found.has_image != bool(image):
            raise ValueError(
                "image token without a picture"
                if found.has_image
                else "picture without an image token"
            )
        if trouble:
            raise ValueError(trouble)
        lost = list(found.dropped)
        if isinstance(encoded, ValueError):
            raise encoded
        if encoded is not None:
            lost += filter(None, [cut(np.array(encoded[1]), room, max_length)])
    except ValueError as reason:
        return str(reason), ""
    return "", "left out: " + "; ".join(lost) if lost else ""


def cut(labels: np.ndarray, room: int, max_length: int) -> str:
    """What of a row's answers lies beyond its first `room` ids, "" if nothing does; ValueError if all of them do."""
    learned = np.flatnonzero(labels != IGNORE_INDEX)
    beyond = int((learned >= room).sum())
    if beyond == len(learned):
        raise ValueError(f"too long at max_length: no answer token within max_length={max_length}")
    return f"{beyond} answer tokens beyond max_length={max_length}" if beyond else ""


def _kind(reason: str) -> str:
    first = reason.split(":")[0]
    if "image token" in first:
        return "image token count"
    if reason.endswith("one caption"):
        return "no single caption"
    return "unknown role" if first.startswith("unknown role") else first


def _first_alike(looks: np.ndarray, troubles: dict) -> dict[int, int]:
    """{number: the first picture with the same pixels} of sound pictures that are not that first one."""
    seen, twins = {}, {}
    for number, pixels in enumerate(looks["pixels"].tolist()):
        if number not in troubles:
            first = seen.setdefault(pixels, number)
            if first != number:
                twins[number] = first
    return twins


def _copies(names: dict[str, int], looks, troubles, asked, threads):
    """{number: [(evaluation picture, kind, distance)]}, and why evaluation pictures could not be compared."""
    others = list(dict.fromkeys(q["image"] for q in asked if q["image"]))
    other_looks, other_troubles = look_at(others, threads)
    copies, exact = {}, set()
    for kind, field in (("same file", "file"), ("same pixels", "pixels")):
        known = _by(range(len(others)), lambda j, field=field: [other_looks[field][j].tobytes()])
        for i, content in enumerate(looks[field].tolist()):
            for j in known.get(content, ()):
                if i not in troubles and j not in other_troubles and (i, j) not in exact:
                    exact.add((i, j))
                    copies.setdefault(i, []).append((others[j], kind, 0.0))
    for (i, j), distance in _compared(
        list(names), looks["views"], others, other_looks["views"], threads
    ):
        if distance <= 1 and (i, j) not in exact:
            copies.setdefault(i, []).append((others[j], "near picture", distance))
    return copies, other_troubles.values()


def _compared(names, looks, others, other_looks, threads):
    """Yields ((i, j), distance) for the pictures with like views, which are opened again for this."""
    pairs = list(contamination.candidates(looks, other_looks).items())
    fine = lru_cache(4096)(lambda name: contamination.Fine(read_picture(name)))

    def compare(pair):
        (i, j), ways = pair
        return (i, j), contamination.distance(fine(names[i]), fine(others[j]), ways)

    with (
        ThreadPoolExecutor(threads) as pool,
        progress("comparing pictures", len(pairs), "pairs") as bar,
    ):
        for start in range(0, len(pairs), PICTURES):
            part = pairs[start : start + PICTURES]
            yield from pool.map(compare, part)
            bar.update(len(part))


def _by(things, keys) -> dict:
    """{key: the things that have it}."""
    out = {}
    for thing in things:
        for key in keys(thing):
            out.setdefault(key, []).append(thing)
    return out


def _matches(sample, questions, texts, kind, distance):
    """A line for each benchmark with this picture: the question that the row asks too, or else the first one on it."""
    mine = frozenset().union(*map(contamination.question_keys, texts))
    for benchmark, own in _by(questions, lambda q: [q["benchmark"]]).items():
        same = next((q for q in own if q["keys"] & mine), None)
        shown = (same or own[0])["question_id"], "same question on it" if same else kind
        yield (*sample, benchmark, *shown, distance)


def _question_table(shared: dict[str, int], of_key: dict) -> pd.DataFrame:
    """Distinct questions that a benchmark asks too; `rows` says how often here and `asked` how often there."""
    lines = []
    for text, rows in shared.items():
        keys = contamination.question_keys(text)
        hits = {id(q): q for key in keys for q in of_key.get(key, ())}.values()
        for benchmark, own in _by(hits, lambda q: [q["benchmark"]]).items():
            same = next((q for q in own if q["keys"] == keys), None)
            kind = "same words" if same else "nearly the same words"
            lines.append((text, rows, benchmark, (same or own[0])["question_id"], len(own), kind))
    lines.sort(key=lambda line: line[1] * line[4])
    return pd.DataFrame(lines, columns=QUESTION)
