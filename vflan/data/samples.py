"""Samples on disk: every released format, converted once into an Arrow table that is memory-mapped.

A sample is a row of four columns: id, image, task_name and conversations. `load_samples` reads a
json array, json lines, an object of rows or parquet; `save_samples` writes a json array.
"""

from __future__ import annotations

import glob
import hashlib
import json
import os
import re
import warnings
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset

from vflan.config import CACHE
from vflan.data.conversation import IMAGE
from vflan.data.formats import read_rows
from vflan.data.image_names import image_resolver, images_root
from vflan.data.images import OUTSIDE
from vflan.data.limits import no_file
from vflan.data.rows import SCHEMA, record_batch, replace_surrogates
from vflan.io import hold, is_sealed, seal
from vflan.progress import progress

# Version of the cached table: raise it when the conversion changes, and every table is made again.
_LAYOUT = 4


def load_samples(path: str | os.PathLike, images: str | os.PathLike | None = None) -> Dataset:
    """Samples in LLaVA's form as a memory-mapped table.

    `path` is a json array, json lines, a parquet file, a folder of parquet files, or a pattern for
    some of them. Columns: id, image (the string that `read_picture` takes; None for text only),
    task_name, conversations (a list of {from, value}). Rows with `messages` of {role, content} are
    read too, and so are an object with one list of rows, and one of id -> row. What else a row says
    becomes a reason in its last turn, for which `check` reports it (vflan/data/rows.py).

    `images` is the folder or zip that image names are relative to. By default it is the folder
    `images` beside the file, else the only image*.zip there, else the folder of the file. That zip
    is also used if `images` names a folder that does not exist.

    The first call converts the file into data/cache and marks each image name that leaves the
    folder; nothing else is checked here, see `check`. A table that is not as it was written is made
    again: its checksum is compared at each call, at the speed of reading it. FileNotFoundError: no
    such file. ValueError: the file is damaged, holds no list of rows, or holds several splits.
    """
    parts, root = _parts(Path(path)), images_root(Path(path), images)
    # The name of the table depends on the paths, so that a changed file replaces its table. The key
    # inside depends on sizes and times, so that a table of the old file is not used.
    source = [*map(str, parts), str(root)]
    digest = hashlib.blake2b(json.dumps(source).encode(), digest_size=8).hexdigest()
    # A name may have 255 bytes, and a character four.
    table = CACHE / "samples" / f"{parts[0].stem[:50]}-{digest}.arrow"
    state = [[status.st_size, status.st_mtime_ns] for status in map(os.stat, parts)]
    key = json.dumps([_LAYOUT, source, state]).encode()
    samples = _open(table, key)
    if samples is not None:
        return samples
    try:
        table.parent.mkdir(parents=True, exist_ok=True)
        # If several processes open the file at once, one converts it and the others wait.
        with hold(table.with_suffix(".lock")):
            samples = _open(table, key)
            if samples is None:
                _convert(parts, root, key, table)
                samples = _open(table, key)
        if samples is None:
            raise OSError("the converted table cannot be read back")
        return samples
    except OSError as error:
        # Not the cache is at fault, but a file of samples that may not be read.
        if str(error.filename) in source:
            raise
        reason = error.strerror or error
        warnings.warn(
            f"{table.parent} cannot be used ({reason}), so {path} is held in memory; "
            "set VFLAN_CACHE to a folder with free space.",
            stacklevel=2,
        )
    return Dataset(pa.Table.from_batches(_batches(parts, root), SCHEMA))


def save_samples(
    rows: Iterable[dict], path: str | os.PathLike, images: str | os.PathLike | None = None
) -> Path:
    """Write rows (dicts, or a Dataset) as a LLaVA json array with one row a line; returns the path.

    Image names inside `images`, a folder or a zip, become relative to it. The file is complete or
    not written at all.
    """
    path = Path(path)
    inside = tuple(f"{Path(images).resolve()}{mark}" for mark in (os.sep, "::")) if images else ()
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        # Row by row: `rows` may be a generator, or a data set that does not fit into memory.
        with open(scratch, "w", encoding="utf-8") as file:
            for number, row in enumerate(rows):
                row = {key: value for key, value in row.items() if value is not None}
                if isinstance(row.get("image"), str | os.PathLike):
                    name = str(row["image"]).removeprefix(OUTSIDE)
                    prefix = next((prefix for prefix in inside if name.startswith(prefix)), "")
                    row["image"] = name.removeprefix(prefix)
                file.write((",\n" if number else "[\n") + json.dumps(row, ensure_ascii=False))
            file.write("\n]\n" if file.tell() else "[]\n")
        scratch.replace(path)
    finally:
        scratch.unlink(missing_ok=True)
    return path


def texture(samples: Dataset) -> pd.DataFrame:
    """One row a sample: task_name, turns, question and answer (words of the first), image.

    `image` is where the first question has its image token: first, last, inside, or none. An empty
    conversation counts 0 words. The texts are counted in Arrow, some thousand rows at a time, so
    that the full set's 1,664,261 rows take seconds and little memory.
    """
    if not len(samples):
        return pd.DataFrame(columns=["task_name", "turns", "question", "answer", "image"])
    parts = []
    for batch in samples.with_format("arrow").iter(batch_size=1 << 15):
        turns = batch["conversations"].combine_chunks()
        count = pc.fill_null(pc.list_value_length(turns), 0).to_numpy()  # (rows,)
        text = pc.utf8_trim_whitespace(pc.fill_null(pc.struct_field(turns.flatten(), "value"), ""))
        text = text if len(text) else pa.array([""])  # no row has a turn
        # `text` holds the turns of all rows one after another: find each row's first and second.
        start = np.cumsum(count) - count
        last = max(0, len(text) - 1)
        question, answer = (text.take(np.clip(start + turn, 0, last)) for turn in (0, 1))
        has_image = pc.match_substring(question, IMAGE)
        place = pc.if_else(pc.ends_with(question, IMAGE), "last", "inside")
        place = pc.if_else(pc.starts_with(question, IMAGE), "first", place)
        question = pc.replace_substring(question, IMAGE, " ")
        words = [pc.count_substring_regex(texts, r"\S+") for texts in (question, answer)]
        columns = {
            "task_name": batch["task_name"].combine_chunks(),
            "turns": count,
            "question": np.where(count > 0, words[0], 0),
            "answer": np.where(count > 1, words[1], 0),
            "image": np.where(count > 0, pc.if_else(has_image, place, "none"), "none"),
        }
        parts.append(pd.DataFrame({name: np.asarray(column) for name, column in columns.items()}))
    return pd.concat(parts, ignore_index=True)


def _parts(path: Path) -> list[Path]:
    """The files to read, in order."""
    # Links are not followed: in the hub's cache they lead to files without a suffix.
    path = Path(os.path.abspath(path))
    if os.path.isfile(path):
        return [path]
    is_folder = os.path.isdir(path)
    names = path.rglob("*.parquet") if is_folder else glob.glob(str(path), recursive=True)
    parts = sorted(Path(name) for name in names if not os.path.isdir(name))
    # A device has no end, a pipe waits for ever, and a link to nothing would be lost in silence.
    if odd := next(filter(no_file, parts), None):
        raise FileNotFoundError(f"{odd}: {no_file(odd)} in place of a samples file.")
    if not parts:
        lack = "no parquet file in this folder" if is_folder else "no such samples file"
        how = "data/README.md says how to get it (tiny: notebook 01 makes it)."
        raise FileNotFoundError(f"{path}: {lack}; {how}")
    splits = _splits(parts)
    if len(splits) > 1:
        example = f"{path}/**/{splits[max(splits)]}*.parquet"
        names = ", ".join(sorted(splits))
        raise ValueError(f"{path} holds the splits {names}; name one, as in {example}.")
    return parts


def _splits(parts: list[Path]) -> dict[str, str]:
    """{split: how the paths of its files begin}, by the names of files, else of their folders.

    The second as in the hub's own conversion of a set: default/train/0000.parquet.
    """
    found, shared = {}, os.path.commonpath([part.parent for part in parts])
    for part in parts:
        folder = part.relative_to(shared).parent.name
        if match := re.match("train|val|dev|test", part.name):
            found[match[0]] = match[0]
        elif match := re.fullmatch("(partial-)?(train|val|dev|test)(idation)?[0-9]*", folder):
            found[match[2]] = f"{folder}/"
    return found


# ----------------------------------------------------------------------------- the cached table


def _open(table: Path, key: bytes) -> Dataset | None:
    """The memory-mapped table; None if there is none, it is damaged, or it is of another file."""
    try:
        # Of a table with a flipped bit, Arrow would show another text, or end the process.
        if not is_sealed(table):
            return None
        # `_convert` writes the key into the metadata of the schema.
        with pa.memory_map(str(table)) as file:
            if (pa.ipc.open_stream(file).schema.metadata or {}).get(b"vflan") != key:
                return None
        return Dataset.from_file(str(table))
    except (OSError, ValueError, pa.ArrowException):
        return None


def _convert(parts: list[Path], root: Path, key: bytes, table: Path) -> None:
    """Write the table under another name, then rename it: a killed process leaves no half table."""
    _delete_partial_tables(table.parent)
    scratch = table.with_suffix(".part")
    try:
        with open(scratch, "wb") as file:
            with pa.ipc.new_stream(file, SCHEMA.with_metadata({"vflan": key})) as writer:
                for batch in _batches(parts, root):
                    writer.write_batch(batch)
            # On the disk before the rename, so that a power cut leaves no empty table.
            file.flush()
            os.fsync(file.fileno())
        seal(scratch)
        scratch.replace(table)
    finally:
        scratch.unlink(missing_ok=True)


def _delete_partial_tables(folder: Path) -> None:
    """Delete what killed conversions left, but not what is being written or is another user's."""
    for partial in folder.glob(f"*-{'[0-9a-f]' * 16}.part"):
        with suppress(OSError), hold(partial.with_suffix(".lock"), timeout=0):
            partial.unlink(missing_ok=True)


def _batches(parts: list[Path], root: Path) -> Iterator[pa.RecordBatch]:
    """The rows of all files in Arrow's form, some thousand at a time."""
    resolve, number = image_resolver(root), 0
    size = sum(part.stat().st_size for part in parts)
    with progress(f"reading {parts[0].name}", size, "B") as bar:
        for part in parts:
            done = 0
            for rows, position in read_rows(part):
                try:
                    yield record_batch(rows, number, resolve)
                except UnicodeEncodeError:
                    # Rare: only now look at each string for half a surrogate pair.
                    yield record_batch(replace_surrogates(rows), number, resolve)
                number += len(rows)
                bar.update(position - done)
                done = position
