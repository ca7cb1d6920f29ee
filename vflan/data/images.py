"""Images: one string names an image in a folder, in a zip or in a parquet file.

`image_names.py` makes these strings from the names in a samples file; `read_picture` reads one, or
says why it cannot be read; `views` shrinks one to a few pixels that tell whether two may be alike.
`open_picture` is the only place in vflan that lets Pillow open a file, and `eight_bits` the only
one that scales wider values. limits.py says how much memory a picture may take.
"""

from __future__ import annotations

import io
import math
import os
import re
import stat
import unicodedata
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import lru_cache
from typing import BinaryIO

import numpy as np
from PIL import Image, UnidentifiedImageError

from vflan.data.containers import archive, embedded
from vflan.data.limits import DECODED, MAX_PIXELS, read_limited

# Prefix of an image name that leaves the images folder; such a file is never opened.
OUTSIDE = "outside:"
# Largest ratio of the sides: cropping scales the short side to 336 pixels, so that an image one
# pixel wide would fill the memory.
THIN = 300
# An image in a container: groups are the container, its kind, and what is inside.
INSIDE = re.compile(r"(.+?\.(zip|parquet))::(.+)", re.IGNORECASE | re.DOTALL)
# Bytes that a decoded picture and its copies take: for each pixel; for each of the square to which
# it is padded, when it is prepared for the vision tower; and for each pixel of a JPEG that is
# decoded at a reduced size, whose coefficients may have to be held as a whole.
_COPIES, _PREPARED, _COEFFICIENTS = 16, 24, 6
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
    values = np.array(picture, np.float32)  # (height, width)
    low, high = float(values.min()), float(values.max())
    if not math.isfinite(high - low):
        raise ValueError("a pixel is not a number")
    usual = {"I": (255, 65535), "F": (1, 255, 65535)}.get(picture.mode, (65535,))
    fitting = [top for top in usual if low >= 0 and high <= top]
    low, high = (0, fitting[0]) if fitting else (low, high)
    # In place, because a large picture has few copies then.
    values -= low
    values *= 255 / ((high - low) or 1)
    return Image.fromarray(values.round(out=values).astype(np.uint8))


def as_rgb(picture: Image.Image) -> Image.Image:
    """The image as training sees its colours: RGB, without palette and transparency."""
    return eight_bits(picture).convert("RGB")


def shortened(text: str, most: int = 300) -> str:
    """`text` for a message: of a long one its beginning, and how long it is."""
    return text if len(text) <= most else f"{text[: most // 5]}... ({len(text):,} characters)"


def read_picture(name: str | os.PathLike, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """The image as RGB. Palette and transparency are converted, rotation tags ignored (as LLaVA).

    Wider values than 8 bits are scaled, see `eight_bits`. Of several frames the first is read.

    `name` is a path, `/x/pictures.zip::member` or `/x/part.parquet::row`. OSError: the image cannot
    be used, with the reason that `picture_trouble` gives; it has more than `max_pixels`, for
    instance. A JPEG of more is decoded at 1/2, 1/4 or 1/8 of its size, unless it is progressive;
    and an image is reduced if the square to which training pads it would have more.
    """
    with decoded(name, max_pixels) as picture:
        return picture


@contextmanager
def decoded(
    name: str | os.PathLike, max_pixels: int = MAX_PIXELS, padded: bool = False
) -> Iterator[Image.Image]:
    """`read_picture` for a block in which the picture is copied: other threads may have to wait.

    All blocks together hold `limits.DECODED_BYTES` at most. padded: the block pads the picture to a
    square and prepares it for the vision tower. Such blocks must not be nested.
    """
    data = picture_bytes(name)
    name = shortened(os.fspath(name))
    with ExitStack() as stack:
        with _naming(name):
            picture = stack.enter_context(open_picture(io.BytesIO(data)))
            whole, side = math.prod(picture.size), math.isqrt(max_pixels)
            _fit(picture, max_pixels)
            size = _COPIES * math.prod(picture.size)
            if padded:
                size = max(size, _PREPARED * min(max(picture.size), side) ** 2)
            if math.prod(picture.size) < whole:
                size += _COEFFICIENTS * whole
        stack.enter_context(DECODED.hold(size))
        with _naming(name):
            rgb = as_rgb(picture)
            factor = math.ceil(max(rgb.size) / side)
            rgb = rgb.reduce(factor) if factor > 1 else rgb
            if math.prod(rgb.size) < whole:
                rgb.info["reduced"] = True
        yield rgb


@contextmanager
def _naming(name: str) -> Iterator[None]:
    """Whatever Pillow raises becomes an OSError that begins with its kind and names the image."""
    try:
        yield
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise OSError(f"too many pixels: {name} ({error})") from None
    # Pillow raises OSError, SyntaxError, ValueError, struct.error and others for broken files.
    except Exception as error:
        message = str(error).lower()
        kind = next((kind for kind in ("truncated", "too thin") if kind in message), "undecodable")
        raise OSError(f"{kind} picture: {name} ({error})") from None


def _fit(picture: Image.Image, max_pixels: int) -> None:
    """Let a large JPEG be decoded at a smaller size; DecompressionBombError for one too large."""
    if not all(picture.size):
        raise ValueError("empty")
    short, long = sorted(picture.size)
    if long > THIN * short:
        raise ValueError(f"{picture.width} x {picture.height} pixels, too thin")
    # Pillow's limit is for the image itself; training pads it to a square.
    if long**2 > 2 * (Image.MAX_IMAGE_PIXELS or math.inf):
        raise Image.DecompressionBombError(f"{long} x {long} pixels, padded to a square")
    side = math.isqrt(max_pixels)
    # MPO: the JPEG of a phone or camera with more pictures behind the first.
    is_jpeg = picture.format in ("JPEG", "MPO")
    if long > side and is_jpeg and "progressive" not in picture.info:
        # The decoder knows 1/2, 1/4 and 1/8: the first that is small enough.
        scale = 1 << (math.ceil(long / side) - 1).bit_length()
        picture.draft(None, tuple(max(1, length // scale) for length in picture.size))
    # A tile of a TIFF is unpacked as a whole, and may be larger than the picture.
    tags = getattr(picture, "tag_v2", {})
    tile = tags.get(322, 0), tags.get(323, 0)
    for width, height in (picture.size, tile):
        if width * height > max_pixels:
            problem = f"{width} x {height} pixels, more than max_pixels={max_pixels:,}"
            raise Image.DecompressionBombError(problem)


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
        return (*key[1:], int(member)), lambda: embedded(*key, int(member))
    members = archive(*key)
    info = members.find(member, _other_names(member))
    return info and ((key[1], info.CRC, info.file_size), lambda: members.read(info))


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
    return status and ((status.st_mtime_ns, status.st_size), lambda: read_limited(path))


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
