"""What a row group of a parquet file unpacks to, found out before Arrow unpacks it.

Arrow trusts the file: it makes room for as many bytes and values as the header of a page states,
and writes a value of a dictionary as often as the page names it. 20 kB may become 5 GB so. The
footer says how much it will be, but it is the headers that decide, so they are read here. The
footer is read here too: pyarrow ends the process when it is asked about a damaged column.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from itertools import chain
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from vflan.data.limits import unpacked_limit

# Values of a column in one row group: each takes some bytes, even if it is null.
MAX_VALUES = 1 << 25
# Encodings that write a value from others: by its number in the dictionary, or by what it shares
# with the value before.
_DICTIONARY, _DELTA = {2, 8}, 7
# Of the kinds of pages: the field that holds the kind's own header, and the encoding's field in it.
_DATA, _INDEX, _DICTIONARY_PAGE, _DATA_V2 = 0, 1, 2, 3
_HEADERS = {_DATA: (5, 2), _DICTIONARY_PAGE: (7, 2), _DATA_V2: (8, 4)}
# Physical types.
_TEXT, _FIXED = 6, 7


class Unreadable(ValueError):
    """Why a whole parquet file cannot be used: a sentence that goes on from its name."""


class Chunk(NamedTuple):
    """A column of a row group. width: of values of a fixed width, else 0. start, size: in bytes.

    nulls: how many values are null, None if the file does not say.
    """

    name: str
    kind: int
    width: int
    values: int
    start: int
    size: int
    nulls: int | None = None


class Pages:
    """The pages of a parquet file, from its footer and their headers."""

    def __init__(self, path: str | os.PathLike):
        self.path = path
        with self._open() as data:
            end = len(data) - 8
            length = int.from_bytes(data[end : end + 4], "little")
            if not 0 < length <= end:
                raise ValueError("its footer is damaged")
            footer = _Thrift(data[end - length : end], 0).struct()
        # Elements of the schema that have no children are columns.
        leaves = [each for each in footer[2] if not each.get(5)]
        widths = [each.get(2, 0) if each.get(1) == _FIXED else 0 for each in leaves]
        self.groups = [
            [_chunk(column[3], width) for column, width in zip(group[1], widths, strict=True)]
            for group in footer.get(4, ())
        ]

    @contextmanager
    def _open(self) -> Iterator[bytes | mmap.mmap]:
        with open(self.path, "rb") as file:
            try:
                mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            except OSError:
                # Some file systems cannot map files.
                mapped = nullcontext(file.read())
            with mapped as data:
                yield data

    def check(self, group: int, columns: Iterable[str]) -> None:
        """Unreadable if a column of a row group unpacks to more than `unpacked_limit` allows."""
        with self._open() as data:
            for chunk in self.groups[group]:
                if any(f"{chunk.name}.".startswith(f"{column}.") for column in columns):
                    _check_column(self.path, data, group, chunk)


def _chunk(record: dict, width: int) -> Chunk:
    start, first = record[9], record.get(11, 0)
    start = first if 0 < first < start else start
    name = b".".join(record[3]).decode("utf-8", "replace")
    nulls = record.get(12, {}).get(3)
    return Chunk(name, record[1], width, record[5], start, record[7], nulls)


def _check_column(path, data, group: int, chunk: Chunk) -> None:
    limit = unpacked_limit(chunk.size)
    # Bytes of all pages, and at most how many bytes the values are that repeat others.
    size = values = repeated = dictionary = 0
    step = 1 << 16
    for kind, unpacked, count, encoding in _pages(data, chunk):
        size += unpacked
        if kind == _DICTIONARY_PAGE:
            dictionary = unpacked
            continue
        values += count
        if encoding in _DICTIONARY:
            repeated += count * (chunk.width or dictionary)
        elif encoding == _DELTA:
            repeated += count * (chunk.width or unpacked)
            step = 64
        if values > MAX_VALUES:
            problem = f"has more than {MAX_VALUES:,} values in {chunk.name}, row group {group}"
            raise Unreadable(problem)
        if size > limit:
            break
    if chunk.kind == _FIXED:
        size += repeated
    elif chunk.kind == _TEXT and size <= limit < size + repeated:
        # A few long values, or many short ones? Only the pages say.
        size = _text_bytes(path, group, chunk.name, step, limit)
    if size > limit:
        raise Unreadable(f"unpacks to more than {limit:,} bytes in {chunk.name}, row group {group}")


def _text_bytes(path, group: int, column: str, step: int, limit: int) -> int:
    """The bytes of all texts of a column, or a number above `limit`.

    Read as a dictionary, so that a text that comes again takes only four bytes. Arrow cannot do
    this for texts that share their beginnings: few of them are read at a time.
    """
    import pyarrow.parquet as pq

    size, as_dictionary = 0, [column] if step > 64 else None
    with pq.ParquetFile(path, read_dictionary=as_dictionary, pre_buffer=False) as file:
        for batch in file.iter_batches(step, [group], [column], use_threads=False):
            size += sum(map(flat_bytes, leaves(batch.column(0))))
            if size > limit:
                break
    return size


def flat_bytes(values: pa.Array) -> int:
    """The bytes of an array, where a text counts as often as a dictionary is asked for it."""
    if not pa.types.is_dictionary(values.type):
        return values.nbytes
    try:
        lengths = pc.fill_null(pc.binary_length(values.dictionary), 0).to_numpy()
    # A dictionary of numbers, which are short.
    except pa.ArrowNotImplementedError:
        return 8 * len(values)
    counts = np.bincount(values.indices.drop_null(), minlength=len(lengths))
    return int(counts @ lengths)


def leaves(values: pa.Array) -> Iterator[pa.Array]:
    """The arrays inside nested ones that hold the values."""
    if pa.types.is_struct(values.type):
        for child in values.flatten():
            yield from leaves(child)
    elif pa.types.is_map(values.type):
        yield from chain(leaves(values.keys), leaves(values.items))
    elif pa.types.is_nested(values.type):
        yield from leaves(values.flatten())
    else:
        yield values


def _pages(data: mmap.mmap, chunk: Chunk) -> Iterator[tuple[int, int, int, int]]:
    """(kind, unpacked bytes, values, encoding) of each page that Arrow would read."""
    at, end, seen = chunk.start, chunk.start + chunk.size, 0
    while at < end and seen < chunk.values:
        header = _Thrift(data, at)
        fields = header.struct()
        kind, unpacked, packed = (fields[number] for number in (1, 2, 3))
        count = encoding = 0
        if kind != _INDEX:
            inner, number = _HEADERS[kind]
            count, encoding = fields[inner][1], fields[inner][number]
        if min(unpacked, packed, count) < 0:
            raise ValueError("a page of a negative size")
        at = header.at + packed
        seen += count if kind != _DICTIONARY_PAGE else 0
        yield kind, unpacked, count, encoding


class _Thrift:
    """Reads values in thrift's compact protocol."""

    def __init__(self, data: bytes | mmap.mmap, at: int):
        self.data, self.at = data, at

    def byte(self) -> int:
        """The next byte."""
        self.at += 1
        return self.data[self.at - 1]

    def number(self) -> int:
        """An unsigned number, seven bits a byte."""
        value = shift = 0
        while (byte := self.byte()) > 127:
            value |= (byte & 127) << shift
            shift += 7
            if shift > 63:
                raise ValueError("a number is damaged")
        return value | byte << shift

    def signed(self) -> int:
        """A signed number, whose sign is its last bit."""
        number = self.number()
        return number >> 1 ^ -(number & 1)

    def struct(self) -> dict[int, Any]:
        """{number of the field: value}."""
        fields, name = {}, 0
        while head := self.byte():
            name = name + (head >> 4) if head >> 4 else self.signed()
            kind = head & 15
            # A truth is in the kind itself.
            fields[name] = kind == 1 if kind in (1, 2) else self.value(kind)
        return fields

    def value(self, kind: int) -> Any:
        """A value of a kind: number, text, list or struct."""
        if kind in (4, 5, 6):
            return self.signed()
        if kind == 12:
            return self.struct()
        if kind in (9, 10):
            head = self.byte()
            count = head >> 4 if head >> 4 < 15 else self.number()
            return [self.value(head & 15) for _ in range(count)]
        length = {1: 1, 2: 1, 3: 1, 7: 8}.get(kind)
        if kind == 8:
            length = self.number()
        if length is None:
            raise ValueError("a value is damaged")
        self.at += length
        return self.data[self.at - length : self.at]
