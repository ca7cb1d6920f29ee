"""Images: one string names an image in a folder, in a zip or in a parquet file.

`image_names.py` makes these strings from the names in a samples file; `read_picture` reads one, or
says why it cannot be read; `views` shrinks one to a few pixels that tell whether two may be alike.
`open_picture` is the only place in vflan that lets Pillow open a file, and `eight_bits` the only
one that scales wider values.
"""

from __future__ import annotations

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
from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache
from itertools import chain
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, UnidentifiedImageError

# Prefix of an image name that leaves the images folder; such a file is never opened.
OUTSIDE = "outside:"
# A zip member that unpacks to more bytes is refused.
MAX_MEMBER_BYTES = 1 << 28
# Largest ratio of the sides: cropping scales the short side to 336 pixels, so that an image one
# pixel wide would fill the memory.
THIN = 300
# An image in a container: groups are the container, its kind, and what is inside.
INSIDE = re.compile(r"(.+?\.(zip|parquet))::(.+)", re.IGNORECASE | re.DOTALL)
# The formats that Pillow may try, whatever a file is called. All its others stay closed: some start
# a program (EPS and PDF start Ghostscript), and a file of that kind needs only the name x.jpg.
FORMATS = ("JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF")
OTHER_FORMAT = "not a JPEG, PNG, GIF, WebP, BMP or TIFF picture"
_SUFFIXES = ("jpg", "png", "gif", "jpeg", "JPG", "PNG", "GIF", "JPEG")

# Side of a view in pixels, and what is cropped from each side, as a share of width and height.
SIDE, CROP = 8, 0.05
# Boxes (left, top, right, bottom) as shares of width and height.
WHOLE, INNER = (0.0, 0.0, 1.0, 1.0), (CROP, CROP, 1 - CROP, 1 - CROP)


def open_picture(file: str | os.PathLike | BinaryIO) -> Image.Image:
    """The image in a file of one of FORMATS, told by its content; its pixels are not decoded yet.

    UnidentifiedImageError, an OSError, if it is of another format.
    """
    try:
        return Image.open(file, formats=FORMATS)
    except UnidentifiedImageError:
        raise UnidentifiedImageError(OTHER_FORMAT) from None


def eight_bits(picture: Image.Image) -> Image.Image:
    """`picture` itself, or mode L with 0 to 255 where its values are wider (modes I;16, I and F).

    Pillow's `convert` would clip such values at 255, so that most pictures become white and equal.
    16 bits are divided by 257, the range of their type, as Pillow reads 16-bit colours. The types
    of I and F say nothing: these values belong to the smallest of the usual ranges that holds them
    all, 0 to 1 (F only), 0 to 255 or 0 to 65,535, and else their own range becomes 0 to 255.
    ValueError: a value is no number.
    """
    if not picture.mode.startswith(("I", "F")):
        return picture
    values = np.asarray(picture, np.float32)  # (height, width)
    low, high = float(values.min()), float(values.max())
    if not math.isfinite(high - low):
        raise ValueError("a pixel is not a number")
    usual = {"I": (255, 65535), "F": (1, 255, 65535)}.get(picture.mode, (65535,))
    fitting = [top for top in usual if low >= 0 and high <= top]
    low, high = (0, fitting[0]) if fitting else (low, high)
    scaled = (values - low) * (255 / ((high - low) or 1))
    return Image.fromarray(scaled.round().astype(np.uint8))


def as_rgb(picture: Image.Image) -> Image.Image:
    """The image as training sees its colours: RGB, without palette and transparency."""
    return eight_bits(picture).convert("RGB")


def shortened(text: str, most: int = 300) -> str:
    """`text` for a message: of a long one its beginning, and how long it is."""
    return text if len(text) <= most else f"{text[: most // 5]}... ({len(text):,} characters)"


def read_picture(name: str | os.PathLike) -> Image.Image:
    """The image as RGB. Palette and transparency are converted, rotation tags ignored (as LLaVA).

    Wider values than 8 bits are scaled, see `eight_bits`.

    `name` is a path, `/x/pictures.zip::member` or `/x/part.parquet::row`. OSError: the image cannot
    be used, with the reason that `picture_trouble` gives.
    """
    data = picture_bytes(name)
    name = shortened(os.fspath(name))
    try:
        with open_picture(io.BytesIO(data)) as picture:
            if not all(picture.size):
                raise ValueError("empty")
            short, long = sorted(picture.size)
            if long > THIN * short:
                raise ValueError(f"{picture.width} x {picture.height} pixels, too thin")
            # Pillow's limit is for the image itself; training pads it to a square.
            if long**2 > 2 * (Image.MAX_IMAGE_PIXELS or math.inf):
                raise Image.DecompressionBombError(f"{long} x {long} pixels, padded to a square")
            return as_rgb(picture)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise OSError(f"too many pixels: {name} ({error})") from None
    # Pillow raises OSError, SyntaxError, ValueError, struct.error and others for broken files.
    except Exception as error:
        message = str(error).lower()
        kind = next((kind for kind in ("truncated", "too thin") if kind in message), "undecodable")
        raise OSError(f"{kind} picture: {name} ({error})") from None


def picture_bytes(name: str | os.PathLike) -> bytes:
    """The image's file, not decoded. OSError: with the reason that `picture_trouble` gives."""
    name = os.fspath(name)
    if name.startswith(OUTSIDE):
        outside = shortened(name.removeprefix(OUTSIDE))
        raise OSError(f"path outside the images folder: {outside}")
    path, name = name, shortened(name)
    try:
        source = _find(path)
        data = source[1]() if source else None
    # A damaged zip member raises one of these, also if only its checksum is wrong.
    except (EOFError, zlib.error, zipfile.BadZipFile) as error:
        raise OSError(f"truncated picture: {name} ({error})") from None
    # For instance no permission, a file that is not parquet, an encrypted member.
    except Exception as error:
        raise OSError(f"undecodable picture: {name} ({error})") from None
    if data is None:
        raise FileNotFoundError(f"missing picture: {name}")
    return data


def picture_trouble(name: str | os.PathLike) -> str:
    """Why an image cannot be used, "" if it can. The kind comes first: "missing picture: ..."."""
    return _trouble(os.fspath(name), stamp(name))


def stamp(name: str | os.PathLike) -> tuple:
    """A tuple that changes when the image's content does, () if there is none. Reads no image."""
    try:
        source = _find(os.fspath(name))
    except Exception:
        return ()  # the archive cannot be read: picture_bytes says why
    return source[0] if source else ()


def content_sum(name: str | os.PathLike | None) -> int | None:
    """CRC-32 of an image's file, None if there is none that can be read.

    A zip holds it in its directory; another image is read, once until its stamp changes.
    """
    mark = stamp(name) if name else ()
    return _content_sum(os.fspath(name), mark) if mark else None


@lru_cache(maxsize=1 << 16)
def _content_sum(name: str, stamp: tuple) -> int | None:
    inside = INSIDE.fullmatch(name)
    if inside and inside[2].lower() == "zip":
        return stamp[1]
    try:
        return zlib.crc32(picture_bytes(name))
    except OSError:
        return None


# The stamp is part of the key, so that an image that changes is read again.
@lru_cache(maxsize=1 << 16)
def _trouble(name: str, stamp: tuple) -> str:
    try:
        read_picture(name)
    except OSError as error:
        return str(error)
    return ""


def views(picture: Image.Image) -> np.ndarray:
    """uint8 (2, 8, 8, 3): the whole image, and what a 5 % crop on each side leaves, both 8 x 8."""
    boxes = [resize_box(picture, box, SIDE, Image.Resampling.BOX) for box in (WHOLE, INNER)]
    return np.stack([np.asarray(box) for box in boxes])


def resize_box(picture: Image.Image, box, side: int, how: Image.Resampling) -> Image.Image:
    """The part of an image inside `box` (shares of width and height), resized to side x side."""
    width, height = picture.size
    box = (box[0] * width, box[1] * height, box[2] * width, box[3] * height)
    gap = 3.0 if how == Image.Resampling.BOX else None
    return picture.resize((side, side), how, box=box, reducing_gap=gap)


# ------------------------------------------------------------------------- finding an image


def _find(name: str) -> tuple[tuple, Callable[[], bytes]] | None:
    """(stamp, function that reads the bytes) of an image; None if it is missing."""
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
    # The first thread reads the table of contents; the others wait for it.
    with _lock:
        archive = _archive(*key)
    info = archive.find(member)
    return info and ((key[1], info.CRC, info.file_size), lambda: archive.read(info))


def _find_file(path: str) -> tuple[tuple, Callable[[], bytes]] | None:
    status = _status(path)
    folder, base = os.path.split(path)
    # Other names are tried only for a file that does not exist.
    if status is None and os.path.isdir(folder):
        for other in _other_names(base):
            path = os.path.join(folder, other)
            # lstat, so that links are not accepted: one might leave the folder.
            status = _status(path, os.lstat)
            if status:
                break
    return status and ((status.st_mtime_ns, status.st_size), Path(path).read_bytes)


def _status(path: str, stat_function=os.stat) -> os.stat_result | None:
    try:
        status = stat_function(path)
    # ValueError: the name holds a null byte, or half a surrogate pair.
    except (OSError, ValueError):
        return None
    return status if stat.S_ISREG(status.st_mode) else None


def _other_names(name: str) -> Iterator[str]:
    """Names that tools may have given to an image that is missing under its own.

    Images downloaded again have other suffixes (OCR-VQA); unzip writes characters that the locale
    lacks as #Uxxxx; some systems decompose accents; and names in a zip that does not declare UTF-8
    are read as code page 437.
    """
    stem, _, suffix = name.rpartition(".")
    suffixes = [other for other in _SUFFIXES if other != suffix] if suffix in _SUFFIXES else []
    for candidate in (name, *(f"{stem}.{other}" for other in suffixes)):
        if candidate.isascii():
            yield candidate
            continue
        composed, decomposed = (unicodedata.normalize(form, candidate) for form in ("NFC", "NFD"))
        for text in (candidate, composed, decomposed):
            for spelling in (text, text.encode(errors="replace").decode("cp437")):
                yield spelling
                yield re.sub(r"[^\0-\x7f]", _escape, spelling)


def _escape(character: re.Match) -> str:
    code = ord(character[0])
    return f"#U{code:04x}" if code < 1 << 16 else f"#L{code:06x}"


# ------------------------------------------------------------------------------- containers


class _Archive:
    """A zip that is read in place.

    Members are read by position (pread), so that threads and forked processes share no file offset.
    """

    def __init__(self, path: str):
        self.file = open(path, "rb")  # closed with the last reader
        with zipfile.ZipFile(self.file) as archive:
            self.members = {info.filename: info for info in archive.infolist() if not info.is_dir()}
        # The released zip has all images in one folder that the samples do not name.
        tops = {name.partition("/")[0] for name in self.members} - {"__MACOSX"}
        self.top = f"{tops.pop()}/" if len(tops) == 1 else ""

    def find(self, member: str) -> zipfile.ZipInfo | None:
        for name in chain([member], _other_names(member)):
            for path in (name, self.top + name):
                if path in self.members:
                    return self.members[path]
        return None

    def read(self, info: zipfile.ZipInfo) -> bytes:
        if info.flag_bits & 1:
            raise ValueError("encrypted")
        if max(info.file_size, info.compress_size) > MAX_MEMBER_BYTES:
            raise ValueError(f"unpacks to {info.file_size:,} bytes")
        head = os.pread(self.file.fileno(), 30, info.header_offset)
        if len(head) < 30 or not head.startswith(b"PK\3\4"):
            raise zipfile.BadZipFile("the archive is damaged here; download it again")
        # The data follows a header of 30 bytes, the member's name, and an extra field.
        name_length, extra_length = (int.from_bytes(head[at : at + 2], "little") for at in (26, 28))
        start = info.header_offset + 30 + name_length + extra_length
        packed = io.BytesIO(os.pread(self.file.fileno(), info.compress_size, start))
        # ZipExtFile unpacks, and compares the checksum at the end.
        with zipfile.ZipExtFile(packed, "r", info) as member:
            return member.read()


@lru_cache(maxsize=16)
def _archive(path: str, mtime_ns: int, size: int) -> _Archive:
    return _Archive(path)


@lru_cache(maxsize=64)
def _row_groups(path: str, mtime_ns: int, size: int):
    """(metadata, the first row of each row group) of a parquet file."""
    import pyarrow.parquet as pq

    metadata, starts = pq.read_metadata(path), [0]
    for group in range(metadata.num_row_groups):
        starts.append(starts[-1] + metadata.row_group(group).num_rows)
    return metadata, starts


# Two row groups are kept: rows are mostly read in order.
@lru_cache(maxsize=2)
def _pictures_of(path: str, mtime_ns: int, size: int, group: int):
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    metadata = _row_groups(path, mtime_ns, size)[0]
    # Without Arrow's threads, because they do not exist in a forked process.
    with pq.ParquetFile(path, metadata=metadata, memory_map=True, pre_buffer=False) as file:
        name = picture_column(file.schema_arrow.names)
        column = file.read_row_group(group, columns=[name], use_threads=False)[name]
    return column if not pa.types.is_struct(column.type) else pc.struct_field(column, "bytes")


def _embedded(path: str, mtime_ns: int, size: int, row: int) -> bytes | None:
    with _lock:
        starts = _row_groups(path, mtime_ns, size)[1]
        if row >= starts[-1]:
            return None
        group = bisect_right(starts, row) - 1
        value = _pictures_of(path, mtime_ns, size, group)[row - starts[group]].as_py()
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
