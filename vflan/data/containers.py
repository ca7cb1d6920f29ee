"""Pictures inside containers: a zip and a parquet file, read in place.

Nothing is unpacked beyond `limits.MAX_BYTES`, whatever the container says. What cannot be opened is
tried once: the first error is raised again for each further picture of it.
"""

from __future__ import annotations

import bz2
import os
import threading
import warnings
import zipfile
import zlib
from bisect import bisect_right
from collections.abc import Callable, Iterable
from functools import lru_cache, wraps
from itertools import chain

from vflan.data.limits import MAX_BYTES
from vflan.data.parquet_pages import Pages

# Entries in the list of a row's pictures.
MAX_LISTED = 1000


def _once(size: int) -> Callable:
    """`lru_cache` that keeps errors too: a damaged file of a million pictures is opened once.

    Errors of the system are not kept: the disk may answer, or memory be free, the next time.
    """

    def decorate(function):
        @lru_cache(size)
        def outcome(*arguments):
            try:
                return function(*arguments), None
            except Exception as error:
                if isinstance(error, MemoryError) or getattr(error, "errno", None):
                    raise
                return None, error

        @wraps(function)
        def call(*arguments):
            value, error = outcome(*arguments)
            if error is not None:
                raise error.with_traceback(None)
            return value

        return call

    return decorate


# --------------------------------------------------------------------------------------- zip


class Archive:
    """A zip that is read in place.

    Members are read by position (pread), so that threads and forked processes share no file offset.
    Of several members with one name the last counts, as when `unzip -o` unpacks them.
    """

    def __init__(self, path: str):
        if not os.path.getsize(path):
            raise zipfile.BadZipFile("an empty file")
        self.file = open(path, "rb")  # closed with the last reader
        with zipfile.ZipFile(self.file) as archive:
            infos = [info for info in archive.infolist() if not info.is_dir()]
        self.members = {info.filename: info for info in infos}
        if repeated := len(infos) - len(self.members):
            names = (i.filename for i in infos if self.members[i.filename] is not i)
            warnings.warn(
                f"{path} holds {repeated} members whose name comes again later, the first: "
                f"{next(names)!r:.200}; the last one counts.",
                stacklevel=2,
            )
        # The released zip has all images in one folder that the samples do not name.
        tops = {name.partition("/")[0] for name in self.members} - {"__MACOSX"}
        self.top = f"{tops.pop()}/" if len(tops) == 1 else ""

    def find(self, member: str, others: Iterable[str] = ()) -> zipfile.ZipInfo | None:
        """The entry of a member, or else of the first of the `others` that is there."""
        for name in chain([member], others):
            for path in (name, self.top + name):
                if path in self.members:
                    return self.members[path]
        return None

    def read(self, info: zipfile.ZipInfo) -> bytes:
        """The bytes of a member; ValueError or BadZipFile says why they cannot be had."""
        if info.flag_bits & 1:
            raise ValueError("encrypted")
        if max(info.file_size, info.compress_size) > MAX_BYTES:
            raise ValueError(f"unpacks to {info.file_size:,} bytes")
        head = os.pread(self.file.fileno(), 30, info.header_offset)
        if len(head) < 30 or not head.startswith(b"PK\3\4"):
            raise zipfile.BadZipFile("the archive is damaged here; download it again")
        # The data follows a header of 30 bytes, the member's name, and an extra field.
        name_length, extra_length = (int.from_bytes(head[at : at + 2], "little") for at in (26, 28))
        start = info.header_offset + 30 + name_length + extra_length
        packed = os.pread(self.file.fileno(), info.compress_size, start)
        data = _unpack(packed, info)
        if zlib.crc32(data) != info.CRC:
            raise zipfile.BadZipFile("its checksum is wrong")
        return data


def _unpack(packed: bytes, info: zipfile.ZipInfo) -> bytes:
    """A member unpacked, to as many bytes as the directory states and no more.

    zipfile itself unpacks all there is, and cuts it afterwards.
    """
    if info.compress_type == zipfile.ZIP_STORED:
        return packed
    if info.compress_type == zipfile.ZIP_DEFLATED:
        unpacker = zlib.decompressobj(-15)
    elif info.compress_type == zipfile.ZIP_BZIP2:
        unpacker = bz2.BZ2Decompressor()
    else:
        method = zipfile.compressor_names.get(info.compress_type, info.compress_type)
        raise ValueError(f"packed by {method}: pack it again by deflate, as zip programs do")
    try:
        data = unpacker.decompress(packed, max_length=info.file_size + 1)
    # bz2 raises OSError for data that is no bz2.
    except OSError as error:
        raise zipfile.BadZipFile(str(error)) from None
    if len(data) > info.file_size:
        raise zipfile.BadZipFile(f"unpacks to more than its {info.file_size:,} bytes")
    if not unpacker.eof:
        raise EOFError("its packed data ends early")
    return data


@_once(16)
def _archive(path: str, mtime_ns: int, size: int) -> Archive:
    return Archive(path)


def archive(path: str, mtime_ns: int, size: int) -> Archive:
    """The zip at a path, opened once for each time and size of the file."""
    # The first thread reads the table of contents; the others wait for it.
    with _lock:
        return _archive(path, mtime_ns, size)


# ----------------------------------------------------------------------------------- parquet


@_once(64)
def _row_groups(path: str, mtime_ns: int, size: int):
    """(metadata, the first row of each row group, Pages) of a parquet file."""
    import pyarrow.parquet as pq

    metadata, starts = pq.read_metadata(path), [0]
    for group in range(metadata.num_row_groups):
        starts.append(starts[-1] + metadata.row_group(group).num_rows)
    return metadata, starts, Pages(path)


# Two row groups are kept: rows are mostly read in order.
@_once(2)
def _pictures_of(path: str, mtime_ns: int, size: int, group: int):
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    metadata, _, pages = _row_groups(path, mtime_ns, size)
    # Without Arrow's threads, because they do not exist in a forked process; and without mmap,
    # because some file systems do not have it.
    with pq.ParquetFile(path, metadata=metadata, pre_buffer=False) as file:
        name = picture_column(file.schema_arrow.names)
        pages.check(group, [name])
        column = file.read_row_group(group, columns=[name], use_threads=False)[name]
    return column if not pa.types.is_struct(column.type) else pc.struct_field(column, "bytes")


def embedded(path: str, mtime_ns: int, size: int, row: int) -> bytes | None:
    """The bytes of the picture in a row of a parquet file; None if there is none."""
    with _lock:
        starts = _row_groups(path, mtime_ns, size)[1]
        if row >= starts[-1]:
            return None
        group = bisect_right(starts, row) - 1
        value = _pictures_of(path, mtime_ns, size, group)[row - starts[group]]
    if hasattr(value, "values") and value.is_valid and len(value) > MAX_LISTED:
        raise ValueError(f"a list of {len(value):,} pictures")
    value = value.as_py()
    # A list, of which `load_samples` accepts only those with one image.
    value = next(filter(None, value), None) if isinstance(value, list) else value
    return value.get("bytes") if isinstance(value, dict) else value


def picture_column(names: Iterable[str]) -> str:
    """Which column of a parquet file holds the images."""
    return "images" if "images" in names and "image" not in names else "image"


def _renew_lock() -> None:
    global _lock
    _lock = threading.Lock()


_renew_lock()
# A forked process may inherit the lock held by a thread that does not exist there.
if hasattr(os, "register_at_fork"):  # Windows has no fork
    os.register_at_fork(after_in_child=_renew_lock)
