"""Pictures: one string names one, in a folder, in a zip or in a parquet file. Read it, or say why it cannot be read."""

import io
import math
import os
import re
import stat
import threading
import unicodedata
import zipfile
import zlib
from bisect import bisect_right
from functools import lru_cache
from itertools import chain

from PIL import Image, UnidentifiedImageError

OUTSIDE = (
    "outside:"  # marks a picture path that leaves the images folder; such a file is never opened
)
MAX_MEMBER_BYTES = 1 << 28  # a zip member that unpacks to more is no picture
THIN = 300  # times as long as wide: cropping scales the short side to 336, and a line of pixels would fill the memory
INSIDE = re.compile(
    r"(.+?\.(zip|parquet))::(.+)", re.IGNORECASE | re.DOTALL
)  # (container, its kind, what in it)
_KINDS = ("jpg", "png", "gif", "jpeg", "JPG", "PNG", "GIF", "JPEG")


def read_picture(name: str | os.PathLike) -> Image.Image:
    """The picture as RGB: palette and transparent ones converted, rotation tags left alone, all as LLaVA does.

    `name` is a path, `/x/pictures.zip::member` or `/x/part.parquet::row`. Raises OSError with the reason of `picture_trouble`.
    """
    data = picture_bytes(name)
    try:
        with Image.open(io.BytesIO(data)) as picture:
            if not all(picture.size):
                raise ValueError("empty")
            short, long = sorted(picture.size)
            if long > THIN * short:
                raise ValueError(f"{picture.width} x {picture.height} pixels, too thin")
            if long**2 > 2 * (Image.MAX_IMAGE_PIXELS or math.inf):
                raise Image.DecompressionBombError(f"{long} x {long} pixels, padded to a square")
            return picture.convert("RGB")
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as trouble:
        raise OSError(f"too many pixels: {name} ({trouble})") from None
    except UnidentifiedImageError:
        raise OSError(f"undecodable picture: {name}") from None
    except Exception as trouble:  # Pillow raises OSError, SyntaxError, ValueError, struct.error ... for broken files
        said = str(trouble).lower()
        kind = next((kind for kind in ("truncated", "too thin") if kind in said), "undecodable")
        raise OSError(f"{kind} picture: {name} ({trouble})") from None


def picture_bytes(name: str | os.PathLike) -> bytes:
    """The picture's file as it is, not decoded. Raises OSError with the reason of `picture_trouble`."""
    name = os.fspath(name)
    if name.startswith(OUTSIDE):
        raise OSError(f"path outside the images folder: {name.removeprefix(OUTSIDE)}")
    try:
        found = _find(name)
        data = found[1]() if found else None
    except (
        EOFError,
        zlib.error,
        zipfile.BadZipFile,
    ) as trouble:  # what a damaged member raises, its checksum included
        raise OSError(f"truncated picture: {name} ({trouble})") from None
    except (
        Exception
    ) as trouble:  # no permission, a part that is no parquet file, an encrypted member ...
        raise OSError(f"undecodable picture: {name} ({trouble})") from None
    if data is None:
        raise FileNotFoundError(f"missing picture: {name}")
    return data


def picture_trouble(name: str | os.PathLike) -> str:
    """Why a picture cannot be used, its kind first ("missing picture: ..."); empty when it can."""
    return _trouble(os.fspath(name), stamp(name))


def stamp(name: str | os.PathLike) -> tuple:
    """What changes when the picture's content does, found without reading it; () for a picture that is not there."""
    try:
        found = _find(os.fspath(name))
    except Exception:  # an archive that cannot be read: picture_bytes says why
        return ()
    return found[0] if found else ()


@lru_cache(maxsize=1 << 16)
def _trouble(name: str, stamp: tuple) -> str:
    try:
        read_picture(name)
    except OSError as trouble:
        return str(trouble)
    return ""


def _find(name: str):
    """(stamp, a function that reads the bytes) of a picture; None when it is missing."""
    inside = INSIDE.fullmatch(name)
    if not inside:
        return _find_file(name)
    container, kind, member = inside.groups()
    status = _status(container)
    if status is None:
        return None
    key = container, status.st_mtime_ns, status.st_size
    if kind.lower() == "parquet":
        return (*key[1:], int(member)), lambda: _embedded(*key, int(member))
    with _lock:  # the first thread reads the archive's contents, the others wait for them
        archive = _archive(*key)
    info = archive.find(member)
    return info and ((key[1], info.CRC, info.file_size), lambda: archive.read(info))


def _find_file(path: str):
    status = _status(path)
    folder, base = os.path.split(path)
    if status is None and os.path.isdir(
        folder
    ):  # only a lost file is looked for under its other names
        for other in _other_names(base):
            path = os.path.join(folder, other)
            status = _status(path, os.lstat)  # a link might leave the folder
            if status:
                break
    return status and ((status.st_mtime_ns, status.st_size), lambda: _read(path))


def _status(path: str, look=os.stat):
    try:
        status = look(path)
    except (OSError, ValueError):  # ValueError: a null byte, or half a surrogate pair
        return None
    return status if stat.S_ISREG(status.st_mode) else None


def _read(path: str) -> bytes:
    with open(path, "rb") as file:
        return file.read()


def _other_names(name: str):
    """What a lost picture may be called instead.

    Re-downloaded pictures changed their extension (OCR-VQA); unzip writes what the locale lacks as #Uxxxx; some systems decompose
    accents; and a zip that does not say that its names are UTF-8 is read as code page 437.
    """
    stem, _, kind = name.rpartition(".")
    swapped = [f"{stem}.{other}" for other in _KINDS if other != kind] if kind in _KINDS else []
    for plain in (name, *swapped):
        if plain.isascii():
            yield plain
            continue
        for form in (plain, *(unicodedata.normalize(form, plain) for form in ("NFC", "NFD"))):
            for text in (form, form.encode(errors="replace").decode("cp437")):
                yield from (text, re.sub(r"[^\0-\x7f]", lambda c: f"#{_hex(ord(c[0]))}", text))


def _hex(code: int) -> str:
    return f"U{code:04x}" if code < 1 << 16 else f"L{code:06x}"


# ------------------------------------------------------------------------------------------------------------ archives


class _Archive:
    """A zip read in place. Members are read by position (pread), so threads and forked readers share nothing that moves."""

    def __init__(self, path: str):
        self.file = open(path, "rb")  # closed with the last reader
        with zipfile.ZipFile(self.file) as archive:
            self.members = {info.filename: info for info in archive.infolist() if not info.is_dir()}
        tops = {name.partition("/")[0] for name in self.members} - {"__MACOSX"}
        self.top = (
            f"{tops.pop()}/" if len(tops) == 1 else ""
        )  # the released one holds all in images_191task_1k/

    def find(self, member: str):
        names = chain([member], _other_names(member))
        return next(
            (
                self.members[t + name]
                for name in names
                for t in ("", self.top)
                if t + name in self.members
            ),
            None,
        )

    def read(self, info: zipfile.ZipInfo) -> bytes:
        if info.flag_bits & 1:
            raise ValueError("encrypted")
        if max(info.file_size, info.compress_size) > MAX_MEMBER_BYTES:
            raise ValueError(f"unpacks to {info.file_size:,} bytes")
        head = os.pread(self.file.fileno(), 30, info.header_offset)
        if len(head) < 30 or not head.startswith(b"PK\3\4"):
            raise zipfile.BadZipFile("the archive is damaged here; download it again")
        start = (
            info.header_offset
            + 30
            + int.from_bytes(head[26:28], "little")
            + int.from_bytes(head[28:], "little")
        )
        packed = io.BytesIO(os.pread(self.file.fileno(), info.compress_size, start))
        with zipfile.ZipExtFile(
            packed, "r", info
        ) as member:  # unpacks, and checks the checksum at the end
            return member.read()


_archive = lru_cache(maxsize=16)(lambda path, mtime_ns, size: _Archive(path))


@lru_cache(maxsize=64)
def _row_groups(path: str, mtime_ns: int, size: int):
    """(metadata, the first row of each row group) of a parquet file."""
    import pyarrow.parquet as pq

    metadata, starts = pq.read_metadata(path), [0]
    for group in range(metadata.num_row_groups):
        starts.append(starts[-1] + metadata.row_group(group).num_rows)
    return metadata, starts


@lru_cache(maxsize=2)  # rows that follow each other lie in one group
def _pictures_of(path: str, mtime_ns: int, size: int, group: int):
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    # no threads of Arrow's own: they would not survive a fork
    with pq.ParquetFile(
        path, metadata=_row_groups(path, mtime_ns, size)[0], memory_map=True, pre_buffer=False
    ) as file:
        column = file.read_row_group(group, columns=["image"], use_threads=False)["image"]
    return column if not pa.types.is_struct(column.type) else pc.struct_field(column, "bytes")


def _embedded(path: str, mtime_ns: int, size: int, row: int) -> bytes | None:
    with _lock:
        starts = _row_groups(path, mtime_ns, size)[1]
        if row >= starts[-1]:
            return None
        group = bisect_right(starts, row) - 1
        return _pictures_of(path, mtime_ns, size, group)[row - starts[group]].as_py()


def _unlock():
    global _lock
    _lock = threading.Lock()


_unlock()
if hasattr(os, "register_at_fork"):  # Windows has no fork
    os.register_at_fork(
        after_in_child=_unlock
    )  # a thread that does not exist in the child may hold it
