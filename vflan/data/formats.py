"""The rows of a samples file: a json array, json lines, an object that holds rows, or parquet.

Each reader gives some rows at a time, so that a file of a gigabyte needs little memory. A file that
would need much all the same, for its size or for one row, is refused (limits.py).

Of a key that an object of json gives twice, the last value counts, as for all readers of json. The
row says so, and `check` lists it as repaired; an object of rows by name must not repeat one.
"""

from __future__ import annotations

import codecs
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import chain, repeat
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from vflan.data.containers import picture_column
from vflan.data.conversation import kind_of
from vflan.data.images import shortened
from vflan.data.limits import MAX_BYTES, MAX_ROW, open_at_once, unpacked_limit
from vflan.data.parquet_pages import Pages, Unreadable, flat_bytes, leaves
from vflan.data.rows import MEDIA, TWICE, Resolved

# Bytes of json read at a time; their rows become one batch of the table.
_BLOCK = 1 << 23
# Bytes of parquet that become Python objects at a time, and values in it, of which each may become
# an object of 200 bytes.
_PART, _PART_VALUES = 1 << 25, 1 << 21


def read_rows(path: Path) -> Iterator[tuple[list, int]]:
    """(some rows as json values, bytes read so far), again and again.

    ValueError: the file is damaged, or holds no list of rows.
    """
    # Some files of the system, such as /proc/kmsg, have no size and are waited for.
    if not path.stat().st_size:
        yield [], 0
        return
    # By content, because files in the hub's cache may have no suffix.
    with open(path, "rb", opener=open_at_once) as file:
        is_parquet = file.read(4) == b"PAR1"
    yield from _parquet(path) if is_parquet else _json(path)


# ------------------------------------------------------------------------------------- json


def _json(path: Path) -> Iterator[tuple[list, int]]:
    """(some rows, bytes read so far) of a json array, of json lines, or of an object."""
    with open(path, "rb", opener=open_at_once) as file:
        blocks = _blocks(file, path)
        # The first character that is not space tells an array.
        first = next((block for block in blocks if block.strip()), "")
        if first.lstrip().startswith("["):
            read = _array
        elif not first or _is_lines(first):
            read = _lines
        else:
            # One json value, or lines that are damaged or longer than a block.
            read, first, blocks = _one_value, _whole(first, blocks, path), []
        for rows in read(chain([first], blocks), path):
            yield rows, file.tell()


def _whole(first: str, blocks: Iterable[str], path: Path) -> str:
    """The rest of a file behind its first block; ValueError if it is too long to be one value."""
    parts, size = [first], len(first)
    for block in blocks:
        parts.append(block)
        size += len(block)
        if size > MAX_BYTES:
            raise ValueError(
                f"{path} holds one json object of more than {MAX_BYTES:,} characters: "
                "write its rows as an array, or one row a line."
            )
    return "".join(parts)


def _is_lines(block: str) -> bool:
    """Whether a block begins with a json value on a line of its own, and more lines follow."""
    line, _, rest = block.lstrip().partition("\n")
    try:
        _decode(line)
    except (ValueError, RecursionError):
        return False
    return bool(rest.strip())


def _one_value(blocks: Iterable[str], path: Path) -> Iterator[list]:
    """The rows in a file that is one json value: a row, or an object with one list of rows, or
    {id: row}.

    Unlike an array, it is held in memory as a whole. ValueError: it is something else.
    """
    text = "".join(blocks)
    try:
        value = _decode(text)
    except (ValueError, RecursionError):
        yield from _lines([text], path)
        return
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds {kind_of(value)}; a list of rows is needed.")
    rows = _rows_of(value, path)
    # Some at a time, because an Arrow array of texts ends at two gigabytes.
    yield from (rows[start : start + 4096] for start in range(0, len(rows), 4096))


def _object(pairs: list[tuple[str, Any]]) -> dict:
    """An object of json; `TWICE` names the keys that it gives more than once."""
    value = dict(pairs)
    if len(value) < len(pairs):
        counts = Counter(name for name, _ in pairs)
        value[TWICE] = ", ".join(name for name, count in counts.items() if count > 1)
    return value


_decoder = json.JSONDecoder(object_pairs_hook=_object)
_decode = _decoder.decode


def _rows_of(value: dict, path: Path) -> list:
    if _is_row(value):
        return [value]
    if TWICE in value:
        raise ValueError(f"{path} gives {value[TWICE]:.200} twice; give each a key of its own.")
    lists = [name for name, inside in value.items() if isinstance(inside, list)]
    if len(lists) == 1 and all(isinstance(row, dict) for row in value[lists[0]]):
        return value[lists[0]]
    if value and all(isinstance(row, dict) and _is_row(row) for row in value.values()):
        return [{"id": name} | row for name, row in value.items()]
    names = f"{', '.join(lists if len(lists) > 1 else value):.200}" or "nothing in it"
    what = f"{len(lists)} lists, {names}" if len(lists) > 1 else names
    raise ValueError(f"{path} holds an object with {what}; a list of rows is needed.")


def _is_row(value: dict) -> bool:
    return "conversations" in value or "messages" in value


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
    decode = _decoder.raw_decode
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
        if len(text) - at > MAX_ROW:
            where = f"line {line + text.count(chr(10), 0, at)}"
            raise ValueError(f"{path}, {where}: a row of more than {MAX_ROW:,} characters.")
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
                rows += [_decode(line)] if line.strip() else []
            except (ValueError, RecursionError) as error:
                problem = f"line {number} is not json ({getattr(error, 'msg', error)})"
                raise ValueError(f"{path}, {problem}; download or write it again.") from None
        if len(rest) > MAX_ROW:
            where = f"line {number + 1}"
            raise ValueError(f"{path}, {where}: a row of more than {MAX_ROW:,} characters.")
        yield rows


# ---------------------------------------------------------------------------------- parquet


class _Batches:
    """The batches of a parquet file, as long as they stay within the limits."""

    def __init__(self, file, path: Path):
        self.file, self.pages, self.read = file, Pages(path), 0
        self.limit = unpacked_limit(path.stat().st_size)

    def __call__(self, step: int, group: int, columns: list[str]) -> Iterator[pa.RecordBatch]:
        """Some rows of a row group, again and again: at most `step`, and few of long ones."""
        for batch in self.file.iter_batches(step, [group], columns):
            flat = [leaf for column in batch.columns for leaf in leaves(column)]
            size, values = sum(map(flat_bytes, flat)), max(map(len, flat))
            self.read += size
            if self.read > self.limit:
                raise Unreadable(f"unpacks to more than {self.limit:,} bytes")
            if values > _PART_VALUES:
                rows = "a row" if batch.num_rows == 1 else f"{batch.num_rows} rows together"
                raise Unreadable(f"has {values:,} values in {rows}")
            rows = max(1, batch.num_rows * _PART // max(1, size))
            for start in range(0, batch.num_rows, rows):
                yield batch.slice(start, rows)


def _parquet(path: Path) -> Iterator[tuple[list, int]]:
    """(some rows, bytes read so far); an image inside the file is named by its row, not read."""
    import pyarrow.parquet as pq

    size, number = path.stat().st_size, 0
    try:
        with pq.ParquetFile(path) as file:
            batches, (columns, image, is_list) = _Batches(file, path), _columns(file)
            read = _listed_images if is_list else _images
            for group in range(file.num_row_groups):
                batches.pages.check(group, [*columns, image])
                for rows, images in read(batches, group, image, columns):
                    for row, (name, is_inside) in zip(rows, images):
                        row["image"] = Resolved(f"{path}::{number}") if is_inside else name
                        number += 1
                    yield rows, size * number // max(1, file.metadata.num_rows)
    except Unreadable as error:
        raise ValueError(f"{path} {error}.") from None
    # A damaged file raises ArrowInvalid, OSError, UnicodeDecodeError, KeyError and others.
    except Exception as error:
        problem = f"{path} is not a whole parquet file ({error}); download it again."
        raise ValueError(problem) from None


def _columns(file) -> tuple[list[str], str, bool]:
    """(the columns to read, the column of images, whether that one is a list)."""
    types = {field.name: field.type for field in file.schema_arrow}
    columns = {"id", "task_name", "conversations", "messages", "system", "images", *MEDIA}
    columns &= {*types}
    if columns.isdisjoint(["conversations", "messages"]):
        problem = f"has no column conversations, only {shortened(', '.join(types))}"
        raise Unreadable(f"{problem}; give a set in LLaVA's form")
    image = picture_column(types)
    columns -= {image}
    counts = Counter(file.schema_arrow.names)
    if twice := [name for name in (*sorted(columns), image) if counts[name] > 1]:
        raise Unreadable(f"has the column {twice[0]} twice; remove one")
    kind = types.get(image, pa.null())
    # Of the nested types, all but a struct are lists of some kind.
    return sorted(columns), image, pa.types.is_nested(kind) and not pa.types.is_struct(kind)


def _images(
    batches: _Batches, group: int, image: str, columns: list[str]
) -> Iterator[tuple[list, Iterator]]:
    """(some rows, (name, whether the image is in the file) of each), of one row group.

    The column `image` is a name, the bytes of the file, or the hub's struct of bytes and path.
    """
    file = batches.file
    paths = {file.schema.column(i).path for i in range(len(file.schema))}
    is_bytes = image in paths and _is_binary(file.schema_arrow.field(image).type)
    data = image if is_bytes else f"{image}.bytes"
    names = [leaf for leaf in (image, f"{image}.path") if leaf in paths and leaf != data]
    # A struct that names no image, for instance one of a URL: `check` says what it is.
    if not names and data not in paths and image in file.schema_arrow.names:
        names = [image]
    embedded = _is_embedded(batches, group, data) if data in paths else repeat(False)
    # A row may hold a whole video, so only a few rows are read at a time.
    step = 64 if {"images", *MEDIA} & {*columns} else 4096
    for batch in batches(step, group, [*columns, *names]):
        rows = batch.to_pylist()
        given = [row.pop(image, None) for row in rows]
        named = [each.get("path", each) if isinstance(each, dict) else each for each in given]
        yield rows, zip(named, embedded)


def _listed_images(
    batches: _Batches, group: int, image: str, columns: list[str]
) -> Iterator[tuple[list, list]]:
    """`_images` where the column is a list. It has to be read to know how long each list is."""
    for batch in batches(64, group, [*columns, image]):
        rows = batch.to_pylist()
        yield rows, [_only_image(row.pop(image, None)) for row in rows]


def _only_image(given: list | None) -> tuple[list[str], bool]:
    """(the names in a list of images, whether its one image is in the file)."""
    names, data = [], []
    for each in filter(None, given or ()):
        name, inside = (
            (each.get("path"), each.get("bytes")) if isinstance(each, dict) else (each, None)
        )
        if isinstance(name, bytes):
            name, inside = None, name
        if name or inside:
            names.append(name or "a picture")
            data.append(inside)
    return names, len(data) == 1 and bool(data[0])


def _is_binary(kind: pa.DataType) -> bool:
    checks = pa.types.is_binary, pa.types.is_large_binary, pa.types.is_binary_view
    return any(check(kind) for check in checks)


def _is_embedded(batches: _Batches, group: int, data: str) -> Iterator[bool]:
    """Whether each row of a row group holds the bytes of its image in the column `data`."""
    rows = batches.file.metadata.row_group(group).num_rows
    nulls = next(chunk.nulls for chunk in batches.pages.groups[group] if chunk.name == data)
    # The statistics usually answer for the whole group; else the images have to be read.
    if nulls in (0, rows):
        yield from repeat(nulls == 0, rows)
        return
    for batch in batches.file.iter_batches(64, [group], [data]):
        column = batch.column(0)
        is_struct = pa.types.is_struct(column.type)
        column = pc.struct_field(column, "bytes") if is_struct else column
        yield from column.is_valid().to_pylist()
