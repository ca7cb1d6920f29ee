"""check(): every row and every image judged by the rules that training uses."""

from __future__ import annotations

import hashlib
import html
import math
import os
import sqlite3
import warnings
import zlib
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from datasets import Dataset

from vflan.config import CACHE
from vflan.data.conversation import IGNORE_INDEX, audit, encode_many
from vflan.data.images import SIDE, decoded, picture_bytes, stamp, views
from vflan.data.limits import MAX_PIXELS
from vflan.io import set_aside
from vflan.progress import progress

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Rows, and images, that are read at a time.
ROWS, PICTURES = 1000, 256
# What the cache keeps of a sound image: hashes of its file and of its pixels, two small views, and
# its longer side. An image that `max_pixels` made smaller has the side _REDUCED: it is read again.
_FIELDS = [("file", "V16"), ("pixels", "V16"), ("views", np.uint8, (2, SIDE, SIDE, 3))]
_FIELDS += [("side", np.uint32)]
_REDUCED = 2**32 - 1
FINGERPRINT = np.dtype(_FIELDS)
# In CACHE; the number is the version of the format. A CRC-32 stands behind each FINGERPRINT.
CACHE_FILE = "pictures-3.sqlite"
# sqlite's codes for missing rights, memory, space, locks and the like.
_NOT_DAMAGED = (
    *(sqlite3.SQLITE_PERM, sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED, sqlite3.SQLITE_NOMEM),
    *(sqlite3.SQLITE_READONLY, sqlite3.SQLITE_IOERR, sqlite3.SQLITE_FULL, sqlite3.SQLITE_CANTOPEN),
)
# In SQL: the hash of an image's file, with which a FINGERPRINT begins.
_CONTENT = "substr(look, 1, 16)"


@dataclass(frozen=True)
class Report:
    """What `check` found; nothing is removed: `samples.select` and `mix(exclude=...)` do that.

    rows, ok: how many there are, and how many can be trained on: `rows` = `ok` + len(`bad`).
    bad: row, id, reason.
    repaired: row, id, reason. These rows count as ok: they are trained on without the named part.
    duplicates: picture, same_as (the first image with these pixels), rows that show it. Not bad.
    by_task: task_name, rows, ok, bad, repaired, duplicates, contaminated.
    contamination: a line for each row and similar evaluation image; None if not asked for.
    questions: questions that a benchmark asks too, about any image, rare ones first; or None.
    unread: why evaluation images could not be compared.
    """

    rows: int
    ok: int
    bad: pd.DataFrame
    repaired: pd.DataFrame
    duplicates: pd.DataFrame
    by_task: pd.DataFrame
    contamination: pd.DataFrame | None = None
    questions: pd.DataFrame | None = None
    unread: tuple[str, ...] = ()

    @property
    def reasons(self) -> pd.Series:
        """How many rows are bad for each kind of reason."""
        return self.bad.reason.map(_kind).value_counts()

    @property
    def contaminated(self) -> list[int]:
        """The rows whose image is in a benchmark, or near one of its images, ascending."""
        return [] if self.contamination is None else sorted(set(self.contamination.row))

    def __str__(self) -> str:
        counts = (
            f"{self.ok} fine, {len(self.bad)} bad, {len(self.repaired)} of the fine ones repaired"
        )
        lines = [f"{self.rows} rows: {counts}"]
        lines += [f"  {count} x {reason}" for reason, count in self.reasons.items()]
        if len(self.duplicates):
            what = "pictures repeat another one's content under another name"
            lines.append(f"{len(self.duplicates)} {what}")
        if self.contamination is not None:
            what = "rows have a picture that is one of a benchmark's, or near one"
            asked = f"{len(self.questions)} questions are asked by a benchmark too"
            lines.append(f"{len(self.contaminated)} {what}; {asked}")
        if self.unread:
            what = "evaluation pictures could not be compared, first:"
            lines.append(f"{len(self.unread)} {what} {self.unread[0]}")
        return "\n".join(lines)

    __repr__ = __str__

    def _repr_html_(self) -> str:
        parts = [f"<pre>{html.escape(str(self))}</pre>"]
        tables = {"Bad rows": self.bad, "Tasks": self.by_task, "Contamination": self.contamination}
        for title, table in tables.items():
            if table is not None and len(table):
                more = f", the first 10 of {len(table)}" if len(table) > 10 else ""
                # Names come from the samples: they are escaped, so that no html of theirs is run.
                shown = table.head(10).to_html(index=False, escape=True)
                parts.append(f"<b>{title}{more}</b>{shown}")
        return "\n".join(parts)


def check(
    samples: Dataset,
    tokenizer: PreTrainedTokenizerBase | None = None,
    max_length: int = 2048,
    template: str = "vicuna_v1",
    image_tokens: int = 576,
    against: str | os.PathLike | dict[str, list[dict]] | None = None,
    threads: int | None = None,
    max_pixels: int = MAX_PIXELS,
) -> Report:
    """Judge every row by the rules of training: a bad row gets one reason, an image is read once.

    With a `tokenizer`, a row is also bad if no token of its answers lies within `max_length`; an
    image counts as `image_tokens`. With `against`, a folder of benchmarks or {name: questions},
    images and questions that are also in a benchmark are reported.

    Sound images are cached until their content changes, so that an interrupted check continues
    where it stopped, and a copied folder is not decoded again. `threads` decode images; by default
    as many as there are cores. max_pixels: of an image, as in a recipe, see `read_picture`.
    """
    threads = threads or os.cpu_count() or 1
    pictures = _distinct_pictures(samples)
    prints, troubles = fingerprints(pictures, threads, max_pixels)
    twins, overlap = _first_alike(prints, troubles), None
    if against is not None:
        # Imported here because training checks its rows too, but needs no benchmark.
        from vflan.data.decontamination import Overlap

        overlap = Overlap(against, list(pictures), prints, troubles, threads, max_pixels)

    bad, repaired, duplicates, tasks = [], [], {}, {}
    rows = _rows(samples, tokenizer, template)
    for row, (name, image, task, turns, encoded) in enumerate(rows):
        number = pictures.get(image) if image else None
        # The image is one of the ids, and will be widened to image_tokens.
        room = max_length - (image_tokens - 1 if image else 0)
        trouble = troubles.get(number, "")
        reason, left_out = _verdict(turns, image, trouble, encoded, room, max_length)
        if reason:
            bad.append((row, name, reason))
        elif left_out:
            repaired.append((row, name, left_out))
        if number in twins:
            duplicates.setdefault(number, []).append(row)
        is_copy = overlap is not None and overlap.add((row, name, task, image), number, turns)
        # The counts of by_task, from rows to contaminated.
        tally = tasks.setdefault(task or "", np.zeros(6, int))
        tally += (1, not reason, bool(reason), bool(left_out), number in twins, is_copy)
    listed = list(pictures)
    same = [(listed[number], listed[twins[number]], by) for number, by in duplicates.items()]
    counts = ["task_name", "rows", "ok", "bad", "repaired", "duplicates", "contaminated"]
    return Report(
        len(samples),
        len(samples) - len(bad),
        pd.DataFrame(bad, columns=["row", "id", "reason"]),
        pd.DataFrame(repaired, columns=["row", "id", "reason"]),
        pd.DataFrame(same, columns=["picture", "same_as", "rows"]),
        pd.DataFrame([(task, *tally) for task, tally in tasks.items()], columns=counts),
        *(overlap.tables() if overlap else ()),
    )


def cut(labels: np.ndarray, room: int, max_length: int) -> str:
    """How much of a row's answers lies beyond its first `room` ids, "" if nothing does.

    labels: (ids,). ValueError: all answers lie beyond.
    """
    learned = np.flatnonzero(labels != IGNORE_INDEX)
    beyond = int((learned >= room).sum())
    if beyond == len(learned):
        raise ValueError(f"too long at max_length: no answer token within max_length={max_length}")
    return f"{beyond} answer tokens beyond max_length={max_length}" if beyond else ""


# ---------------------------------------------------------------------------------- the rows


def _distinct_pictures(samples: Dataset) -> dict[str, int]:
    """{image name: number}, in the order in which the rows show them."""
    names = {}
    for batch in samples.select_columns(["image"]).with_format(None).iter(ROWS):
        for name in batch["image"]:
            if name:
                names.setdefault(name, len(names))
    return names


def _rows(samples: Dataset, tokenizer, template: str) -> Iterator[tuple]:
    """(id, image, task_name, conversations, encoded) of each row; ROWS of them are in memory."""
    columns = ["id", "image", "task_name", "conversations"]
    with progress("checking rows", len(samples), "rows") as bar:
        for batch in samples.select_columns(columns).with_format(None).iter(ROWS):
            *texts, many = (batch[column] for column in columns)
            many = [[turn or {} for turn in turns or []] for turns in many]
            encoded = [None] * len(many)
            if tokenizer is not None:
                # One call of the tokenizer for all rows of the batch.
                encoded = encode_many(many, tokenizer, template)
            yield from zip(*texts, many, encoded)
            bar.update(len(many))


def _verdict(turns, image, trouble, encoded, room, max_length) -> tuple[str, str]:
    """(why a row is bad, what of it is left out); at most one of them is not empty.

    trouble: why the image cannot be used. encoded: ids and labels, a ValueError, or None if there
    is no tokenizer. room: how many ids fit.
    """
    try:
        audited = audit(turns)
        if audited.has_image and not image:
            raise ValueError("image token without a picture")
        if image and not audited.has_image:
            raise ValueError("picture without an image token")
        if trouble:
            raise ValueError(trouble)
        left_out = list(audited.dropped)
        if isinstance(encoded, ValueError):
            raise encoded
        if encoded is not None:
            left_out += filter(None, [cut(np.array(encoded[1]), room, max_length)])
    except ValueError as reason:
        return str(reason), ""
    return "", "left out: " + "; ".join(left_out) if left_out else ""


def _kind(reason: str) -> str:
    first = reason.split(":")[0]
    if "image token" in first:
        return "image token count"
    if reason.endswith("one caption"):
        return "no single caption"
    return "unknown role" if first.startswith("unknown role") else first


def _first_alike(prints: np.ndarray, troubles: dict[int, str]) -> dict[int, int]:
    """{number: number of the first image with the same pixels}, without those first ones."""
    first_of, twins = {}, {}
    for number, pixels in enumerate(prints["pixels"].tolist()):
        if number not in troubles:
            first = first_of.setdefault(pixels, number)
            if first != number:
                twins[number] = first
    return twins


# -------------------------------------------------------------------------------- the images


def fingerprints(
    names: Iterable[str], threads: int = 1, max_pixels: int = MAX_PIXELS
) -> tuple[np.ndarray, dict[int, str]]:
    """FINGERPRINTs of images, (n,), and {index: why an image cannot be used}.

    Sound images are cached by name and `stamp`, and by what is in their files.
    """
    names = list(names)
    prints, troubles = np.zeros(len(names), FINGERPRINT), {}
    with (
        closing(_Cache(max_pixels)) as cache,
        ThreadPoolExecutor(threads) as pool,
        progress("checking pictures", len(names), "pictures") as bar,
    ):
        for start in range(0, len(names), PICTURES):
            part = names[start : start + PICTURES]
            # Names as bytes, because a file name need not be valid UTF-8.
            keys = [name.encode("utf-8", "surrogatepass") for name in part]
            # In threads, because a network disk needs as long for the time of a file as to read it.
            stamps = [repr(mark).encode() if mark else b"" for mark in pool.map(stamp, part)]
            known = {(row[0], row[1]): row[2] for row in cache.find("name", keys)}
            new = []
            for i, pair in enumerate(zip(keys, stamps)):
                if pair in known:
                    prints[start + i] = known[pair]
                else:
                    new.append(i)
            sound = []
            for i, (fingerprint, trouble) in zip(new, _look(cache, pool, [part[i] for i in new])):
                # Troubles are not cached: the image may be downloaded before the next check.
                if trouble:
                    troubles[start + i] = trouble
                    continue
                prints[start + i] = fingerprint
                if stamps[i]:
                    sound.append((keys[i], stamps[i], fingerprint.tobytes()))
            cache.add(sound)
            bar.update(len(part))
    return prints, troubles


def _look(cache: _Cache, pool: ThreadPoolExecutor, names: list[str]) -> list[tuple]:
    """(FINGERPRINT, "") of each image that training can read, else (None, why not)."""
    hashes = list(pool.map(_hash_file, names))
    # A picture whose name or time is new may be known by its content, which needs no decoding.
    known = {row[2]["file"].tobytes(): row[2] for row in cache.find(_CONTENT, hashes)}
    new = [(name, file) for name, file in zip(names, hashes) if file not in known]
    read = pool.map(partial(_read, max_pixels=cache.max_pixels), *zip(*new)) if new else iter(())
    return [(known[file], "") if file in known else next(read) for file in hashes]


def _hash_file(name: str) -> bytes:
    """A hash of an image's file, b"" if there is none that can be read."""
    try:
        return hashlib.blake2b(picture_bytes(name), digest_size=16).digest()
    except OSError:
        return b""


def _read(name: str, file: bytes, max_pixels: int) -> tuple[np.ndarray | None, str]:
    """(FINGERPRINT, "") of an image that training can read, else (None, why not).

    file: the hash of its file.
    """
    fingerprint = np.zeros((), FINGERPRINT)
    fingerprint["file"] = file
    try:
        with decoded(name, max_pixels) as picture:
            pixels = np.asarray(picture)
            # The shape is part of the hash: the same bytes in another shape are another image.
            shape = repr(pixels.shape).encode()[:16]
            digest = hashlib.blake2b(pixels, digest_size=16, salt=shape).digest()
            fingerprint["pixels"], fingerprint["views"] = digest, views(picture)
            fingerprint["side"] = _REDUCED if "reduced" in picture.info else max(picture.size)
    except OSError as error:
        return None, str(error)
    return fingerprint, ""


class _Cache:
    """FINGERPRINTs in a file of sqlite; what is damaged there is left out and made again."""

    def __init__(self, max_pixels: int):
        self.file, self.max_pixels = _open_cache(), max_pixels

    def find(self, what: str, keys: list[bytes]) -> list[tuple[bytes, bytes, np.void]]:
        """(name, stamp, FINGERPRINT) of the sound rows in which `what` is one of `keys`."""
        marks = ",".join("?" * len(keys))
        # The text holds a column and question marks; the keys are given beside it.
        query = f"select name, stamp, look from pictures where {what} in ({marks})"  # noqa: S608
        rows = self._do(lambda: self.file.execute(query, keys).fetchall())
        size = FINGERPRINT.itemsize
        found = [
            (*row[:2], np.frombuffer(row[2][:size], FINGERPRINT)[0])
            for row in rows
            if _is_whole(row)
        ]
        # A larger image may have too many pixels now.
        return [row for row in found if row[2]["side"] <= math.isqrt(self.max_pixels)]

    def add(self, rows: list[tuple[bytes, bytes, bytes]]) -> None:
        """Add (name, stamp, FINGERPRINT) in one transaction: a killed process loses at most it."""
        summed = [(name, mark.decode(), look + _sum(name, mark, look)) for name, mark, look in rows]

        def write():
            with self.file:
                self.file.executemany("replace into pictures values (?, ?, ?)", summed)

        self._do(write)

    def _do(self, work: Callable) -> Any:
        """The result of `work`; after an error it is done again, with a new file or in memory."""
        for _ in range(2):
            try:
                return work()
            except sqlite3.DatabaseError as error:
                self.close()
                self.file = _other_cache(error)
        return work()

    def close(self) -> None:
        self.file.close()


def _sum(name: bytes, mark: bytes, look: bytes) -> bytes:
    return zlib.crc32(name + mark + look).to_bytes(4, "little")


def _is_whole(row: tuple) -> bool:
    """Whether a row is as it was written: of a damaged one, even the types may be others."""
    if not all(isinstance(value, bytes) for value in row):
        return False
    name, mark, look = row
    size = FINGERPRINT.itemsize
    return len(look) == size + 4 and look[size:] == _sum(name, mark, look[:size])


def _open_cache() -> sqlite3.Connection:
    try:
        CACHE.mkdir(parents=True, exist_ok=True)
        return _connect(CACHE / CACHE_FILE)
    except (OSError, sqlite3.DatabaseError) as error:
        return _other_cache(error)


def _other_cache(error: Exception) -> sqlite3.Connection:
    """A cache after an error: a new file if the old one is damaged, else one in memory."""
    file = CACHE / CACHE_FILE
    code = getattr(error, "sqlite_errorcode", None) or 0
    if isinstance(error, OSError) or code & 0xFF in _NOT_DAMAGED:
        consequence = "an interrupted check will start from the beginning"
        warnings.warn(f"{file} cannot be written ({error}): {consequence}", stacklevel=4)
        return _connect(":memory:")
    # The file is damaged, for instance because the disk was full. It can be made again.
    try:
        set_aside(file)
    # Another process was faster, or the folder is read-only.
    except OSError as failure:
        return _other_cache(failure)
    return _open_cache()


def _connect(file: Path | str) -> sqlite3.Connection:
    cache = sqlite3.connect(file, timeout=600)
    # A damaged text need not be UTF-8.
    cache.text_factory = bytes
    columns = "name blob primary key, stamp text, look blob"
    try:
        with cache:
            cache.execute(f"create table if not exists pictures ({columns})")
            cache.execute(f"create index if not exists content on pictures ({_CONTENT})")
            # Deletes nothing, but fails if the file is read-only.
            cache.execute("delete from pictures where 0")
    except sqlite3.Error:
        cache.close()
        raise
    return cache
