"""Samples on disk: every released format, converted once into an Arrow table that is memory-mapped.

A sample is a row of four columns: id, image, task_name and conversations. `load_samples` reads a
json array, json lines or parquet; `save_samples` writes a json array.
"""

from __future__ import annotations

import codecs
import glob
import hashlib
import json
import os
import re
import warnings
from collections.abc import Callable, Iterable, Iterator
from itertools import chain, repeat
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset
from filelock import FileLock, Timeout

from vflan.config import CACHE
from vflan.data.conversation import IMAGE
from vflan.data.images import OUTSIDE, image_resolver, images_root
from vflan.progress import progress

_TURN = pa.struct([("from", pa.string()), ("value", pa.string())])
_TEXTS = [(name, pa.string()) for name in ("id", "image", "task_name")]
_SCHEMA = pa.schema([*_TEXTS, ("conversations", pa.list_(_TURN))])
# Version of the cached table: raise it when the conversion changes, and every table is made again.
_LAYOUT = 1
# The last bytes of an Arrow stream that was written to its end.
_END = b"\xff\xff\xff\xff\0\0\0\0"
# Bytes of json read at a time; their rows become one batch of the table.
_BLOCK = 1 << 23


def load_samples(path: str | os.PathLike, images: str | os.PathLike | None = None) -> Dataset:
    """Samples in LLaVA's form as a memory-mapped table.

    `path` is a json array, json lines, a parquet file, a folder of parquet files, or a pattern for
    some of them. Columns: id, image (the string that `read_picture` takes; None for text only),
    task_name, conversations (a list of {from, value}).

    `images` is the folder or zip that image names are relative to. By default it is the folder
    `images` beside the file, else the only image*.zip there, else the folder of the file. That zip
    is also used if `images` names a folder that does not exist.

    The first call converts the file into data/cache and marks each image name that leaves the
    folder; nothing else is checked here, see `check`. FileNotFoundError: no such file. ValueError:
    the file is damaged, has no conversations, or holds several splits.
    """
    parts, root = _parts(Path(path)), images_root(Path(path), images)
    # The name of the table depends on the paths, so that a changed file replaces its table. The key
    # inside depends on sizes and times, so that a table of the old file is not used.
    source = [*map(str, parts), str(root)]
    digest = hashlib.blake2b(json.dumps(source).encode(), digest_size=8).hexdigest()
    table = CACHE / "samples" / f"{parts[0].stem[:80]}-{digest}.arrow"
    state = [[status.st_size, status.st_mtime_ns] for status in map(os.stat, parts)]
    key = json.dumps([_LAYOUT, source, state]).encode()
    samples = _open(table, key)
    if samples is not None:
        return samples
    try:
        table.parent.mkdir(parents=True, exist_ok=True)
        # If several processes open the file at once, one converts it and the others wait.
        with FileLock(table.with_suffix(".lock")):
            samples = _open(table, key)
            if samples is None:
                _convert(parts, root, key, table)
                samples = _open(table, key)
        if samples is None:
            raise OSError("the converted table cannot be read back")
        return samples
    # filelock raises NotImplementedError if the file system cannot lock files.
    except (OSError, NotImplementedError) as error:
        reason = getattr(error, "strerror", None) or error
        warnings.warn(
            f"{table.parent} cannot be used ({reason}), so {path} is held in memory; "
            "set VFLAN_CACHE to a folder with free space.",
            stacklevel=2,
        )
    return Dataset(pa.Table.from_batches(_batches(parts, root), _SCHEMA))


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
                if "image" in row:
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
    parts = []
    for batch in samples.with_format("arrow").iter(batch_size=1 << 15):
        turns = batch["conversations"].combine_chunks()
        count = pc.fill_null(pc.list_value_length(turns), 0).to_numpy()  # (rows,)
        text = pc.utf8_trim_whitespace(pc.fill_null(pc.struct_field(turns.flatten(), "value"), ""))
        # `text` holds the turns of all rows one after another: find each row's first and second.
        start = np.cumsum(count) - count
        last = max(0, len(text) - 1)
        question, answer = (text.take(np.clip(start + turn, 0, last)) for turn in (0, 1))
        has_image = pc.match_substring(question, IMAGE)
        place = pc.if_else(pc.ends_with(question, IMAGE), "last", "inside")
        place = pc.if_else(pc.starts_with(question, IMAGE), "first", place)
        words = [pc.count_substring_regex(texts, r"\S+") for texts in (question, answer)]
        columns = {
            "task_name": batch["task_name"].combine_chunks(),
            "turns": count,
            "question": np.where(count > 0, pc.subtract(words[0], has_image.cast("int32")), 0),
            "answer": np.where(count > 1, words[1], 0),
            "image": np.where(count > 0, pc.if_else(has_image, place, "none"), "none"),
        }
        parts.append(pd.DataFrame({name: np.asarray(column) for name, column in columns.items()}))
    return pd.concat(parts, ignore_index=True)


def _parts(path: Path) -> list[Path]:
    """The files to read, in order."""
    # Links are not followed: in the hub's cache they lead to files without a suffix.
    path = Path(os.path.abspath(path))
    if path.is_file():
        return [path]
    is_folder = path.is_dir()
    names = path.rglob("*.parquet") if is_folder else glob.glob(str(path), recursive=True)
    parts = sorted(map(Path, names))
    if not parts:
        lack = "no parquet file in this folder" if is_folder else "no such samples file"
        how = "data/README.md says how to get it (tiny: notebook 01 makes it)."
        raise FileNotFoundError(f"{path}: {lack}; {how}")
    matches = [re.match("train|val|dev|test", part.name) for part in parts]
    splits = sorted({match[0] for match in matches if match})
    if len(splits) > 1:
        example = f"{path}/**/{splits[-1]}*.parquet"
        raise ValueError(f"{path} holds the splits {', '.join(splits)}; name one, as in {example}.")
    return parts


# ----------------------------------------------------------------------------- the cached table


def _open(table: Path, key: bytes) -> Dataset | None:
    """The memory-mapped table; None if there is none, it is damaged, or it is of another file."""
    try:
        with open(table, "rb") as file:
            file.seek(-len(_END), os.SEEK_END)
            if file.read() != _END:
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
            with pa.ipc.new_stream(file, _SCHEMA.with_metadata({"vflan": key})) as writer:
                for batch in _batches(parts, root):
                    writer.write_batch(batch)
            # On the disk before the rename, so that a power cut leaves no empty table.
            file.flush()
            os.fsync(file.fileno())
        scratch.replace(table)
    finally:
        scratch.unlink(missing_ok=True)


def _delete_partial_tables(folder: Path) -> None:
    """Delete what killed conversions left; the lock of a running one is held."""
    for partial in folder.glob(f"*-{'[0-9a-f]' * 16}.part"):
        try:
            with FileLock(partial.with_suffix(".lock"), blocking=False):
                partial.unlink(missing_ok=True)
        except Timeout:
            pass


def _batches(parts: list[Path], root: Path) -> Iterator[pa.RecordBatch]:
    """The rows of all files in Arrow's form, some thousand at a time."""
    resolve, number = image_resolver(root), 0
    size = sum(part.stat().st_size for part in parts)
    with progress(f"reading {parts[0].name}", size, "B") as bar:
        for part in parts:
            # By content, because files in the hub's cache may have no suffix.
            with open(part, "rb") as file:
                is_parquet = file.read(4) == b"PAR1"
            done = 0
            for rows, position in _parquet(part) if is_parquet else _json(part):
                try:
                    yield _batch(rows, number, resolve)
                except UnicodeEncodeError:
                    # Rare: only now look at each string for half a surrogate pair.
                    yield _batch(_replace_surrogates(rows), number, resolve)
                number += len(rows)
                bar.update(position - done)
                done = position


def _batch(rows: list, first: int, resolve: Callable[[str], str]) -> pa.RecordBatch:
    """Json objects as the four columns; a value of the wrong type becomes one `check` reports."""
    ids, images, tasks, ends, roles, values = [], [], [], [0], [], []
    for number, row in enumerate(rows, first):
        row = row if isinstance(row, dict) else {}
        name, image, turns = row.get("id"), row.get("image"), row.get("conversations")
        ids.append(str(number if name is None else name))
        if image is not None and not isinstance(image, _Resolved):
            image = resolve(str(image))
        images.append(image)
        tasks.append(str(row.get("task_name") or ""))
        for turn in turns if isinstance(turns, list) else ():
            turn = turn if isinstance(turn, dict) else {}
            role, value = turn.get("from"), turn.get("value")
            roles.append(role if isinstance(role, str) else None)
            values.append(value if isinstance(value, str) else None)
        ends.append(len(roles))
    # Flat arrays and offsets: much faster than lists of dicts.
    roles, values = (pa.array(texts, pa.string()) for texts in (roles, values))
    turns = pa.StructArray.from_arrays([roles, values], ["from", "value"])
    columns = [pa.array(column, pa.string()) for column in (ids, images, tasks)]
    columns.append(pa.ListArray.from_arrays(pa.array(ends, pa.int32()), turns))
    return pa.RecordBatch.from_arrays(columns, schema=_SCHEMA)


class _Resolved(str):
    """An image name that `read_picture` can take as it is."""


def _replace_surrogates(rows: list) -> list:
    """Half a surrogate pair, which json may hold and UTF-8 may not, becomes U+FFFD."""
    text = json.dumps(rows, ensure_ascii=False)
    return json.loads(text.encode("utf-16", "surrogatepass").decode("utf-16", "replace"))


# --------------------------------------------------------------------------------- file formats


def _json(path: Path) -> Iterator[tuple[list, int]]:
    """(some rows, bytes read so far) of a json array, or of json lines."""
    with open(path, "rb") as file:
        blocks = _blocks(file, path)
        # The first character that is not space tells an array from json lines.
        first = next((block for block in blocks if block.strip()), "")
        read = _array if first.lstrip().startswith("[") else _lines
        for rows in read(chain([first], blocks), path):
            yield rows, file.tell()


def _blocks(file, path: Path) -> Iterator[str]:
    """The text of a file in blocks; a character that two blocks share comes with the second."""
    decoder, block = codecs.getincrementaldecoder("utf-8-sig")(), b"-"
    while block:
        block = file.read(_BLOCK)
        try:
            yield decoder.decode(block, final=not block)
        except UnicodeDecodeError as error:
            position = file.tell() - len(error.object) + error.start
            problem = f"byte {position} is not UTF-8 text; download it again."
            raise ValueError(f"{path} is not whole: {problem}") from None


_skip_space = re.compile(r"[ \t\r\n]*").match  # what json allows between values
# What an array expects after a character: {(expected now, character): expected next}.
_NEXT = {
    ("[", "["): "value or ]",
    ("value or ]", "]"): "end",
    (", or ]", ","): "value",
    (", or ]", "]"): "end",
}


def _array(blocks: Iterable[str], path: Path) -> Iterator[list]:
    """The elements of a json array, a list for each block of text.

    json.load would hold the whole file and all its objects in memory. Here only an element that is
    cut by the end of a block is kept, and parsed again with the next block.
    """
    decode = json.JSONDecoder().raw_decode
    text, at, expected = "", 0, "["
    start, line = 0, 1  # position of `text` in the file
    for block in chain(blocks, [None]):
        is_last = block is None
        start, line = start + at, line + text.count("\n", 0, at)
        text, at, rows = text[at:] + (block or ""), 0, []
        try:
            while (at := _skip_space(text, at).end()) < len(text):
                mark = text[at]
                if expected == "value" or expected == "value or ]" and mark != "]":
                    row, end = decode(text, at)
                    if end == len(text) and not is_last and not isinstance(row, dict | list | str):
                        break  # a number may go on in the next block
                    rows.append(row)
                    at, expected = end, ", or ]"
                elif (expected, mark) in _NEXT:
                    at, expected = at + 1, _NEXT[expected, mark]
                else:
                    problem = "Extra data" if expected == "end" else f"Expecting {expected}"
                    raise json.JSONDecodeError(problem, text, at)
            if is_last and expected != "end":
                raise json.JSONDecodeError(f"Expecting {expected}", text, at)
        except (ValueError, RecursionError) as error:
            where = getattr(error, "pos", at)
            # An error near the end of the block, or an open string, may end with the next block.
            is_cut = where > len(text) - 16 or str(error).startswith("Unterminated")
            if is_last or not is_cut:
                problem = getattr(error, "msg", error)
                where = f"line {line + text.count(chr(10), 0, where)}, character {start + where}"
                message = f"{path} is not whole json ({problem}: {where}); download it again."
                raise ValueError(message) from None
        yield rows


def _lines(blocks: Iterable[str], path: Path) -> Iterator[list]:
    """The rows of json lines. Only \\n ends a line: answers may hold U+2028."""
    rest, number = "", 0
    for block in chain(blocks, ["\n"]):
        *lines, rest = (rest + block).split("\n")
        rows = []
        for line in lines:
            number += 1
            try:
                rows += [json.loads(line)] if line.strip() else []
            except (ValueError, RecursionError) as error:
                problem = f"line {number} is not json ({getattr(error, 'msg', error)})"
                raise ValueError(f"{path}, {problem}; download or write it again.") from None
        yield rows


def _parquet(path: Path) -> Iterator[tuple[list, int]]:
    """(some rows, bytes read so far); an image inside the file is named by its row, not read."""
    import pyarrow.parquet as pq

    size, number = path.stat().st_size, 0
    try:
        with pq.ParquetFile(path) as file:
            leaves = [file.schema.column(i).path for i in range(len(file.schema))]
            types = {field.name: field.type for field in file.schema_arrow}
            if "conversations" not in types:
                problem = f"has no column conversations, only {', '.join(types)}"
                raise ValueError(f"{path} {problem}; give a set in LLaVA's form.")
            # `image` is a name, the bytes of the file, or the hub's struct of bytes and path.
            is_bytes = pa.types.is_binary(types.get("image", pa.null()))
            data = "image" if is_bytes else "image.bytes"
            names = [leaf for leaf in ("image", "image.path") if leaf in leaves and leaf != data]
            columns = ["id", "task_name", "conversations", *names]
            for group in range(file.num_row_groups):
                embedded = _is_embedded(file, group, data) if data in leaves else repeat(False)
                for batch in file.iter_batches(4096, [group], columns):
                    rows = batch.to_pylist()
                    for row, inside in zip(rows, embedded):
                        name = row.get("image")
                        name = name.get("path") if isinstance(name, dict) else name
                        row["image"] = _Resolved(f"{path}::{number}") if inside else name
                        number += 1
                    yield rows, size * number // file.metadata.num_rows
    except pa.ArrowInvalid as error:
        problem = f"{path} is not a whole parquet file ({error}); download it again."
        raise ValueError(problem) from None


def _is_embedded(file, group: int, data: str) -> Iterator[bool]:
    """Whether each row of a row group holds the bytes of its image in the column `data`."""
    metadata = file.metadata.row_group(group)
    columns = map(metadata.column, range(metadata.num_columns))
    statistics = next(c for c in columns if c.path_in_schema == data).statistics
    nulls = statistics.null_count if statistics and statistics.has_null_count else None
    # The statistics usually answer for the whole group; else the images have to be read.
    if nulls in (0, metadata.num_rows):
        yield from repeat(nulls == 0, metadata.num_rows)
        return
    for batch in file.iter_batches(64, [group], [data]):
        column = batch.column("image")
        is_struct = pa.types.is_struct(column.type)
        column = pc.struct_field(column, "bytes") if is_struct else column
        yield from column.is_valid().to_pylist()
