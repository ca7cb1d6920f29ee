"""Pictures on disk: read one, and say why one cannot be read."""

import os
from functools import cache
from pathlib import Path

from PIL import Image, UnidentifiedImageError

OUTSIDE = "outside:"  # marks a picture path that leaves the images folder; such a file is never opened


def picture_trouble(path: str) -> str:
    """Why a picture cannot be used; empty when it can."""
    if path.startswith(OUTSIDE):
        return f"path outside the images folder: {path.removeprefix(OUTSIDE)}"
    try:
        stat = os.stat(path)
    except (OSError, ValueError):  # ValueError: a name that no file can have
        return f"missing picture: {path}"
    return _decode_trouble(path, stat.st_mtime_ns, stat.st_size)


def read_picture(path: str) -> Image.Image:
    """The picture as RGB. Palette and transparent ones are converted as LLaVA does."""
    with Image.open(path) as picture:
        return picture.convert("RGB")


def picture_bytes(name: str) -> bytes:
    """The picture's file."""
    return Path(name).read_bytes()


def stamp(name: str) -> tuple:
    """What changes when the picture does: time of change in ns and size. OSError when it is not there."""
    stat = os.stat(name)
    return stat.st_mtime_ns, stat.st_size


@cache
def _decode_trouble(path: str, mtime_ns: int, size: int) -> str:
    try:
        with Image.open(path) as picture:
            picture.load()
            return "" if min(picture.size) > 0 else f"undecodable picture: {path} is empty"
    except UnidentifiedImageError:
        return f"undecodable picture: {path}"
    except Image.DecompressionBombError as trouble:
        return f"too many pixels: {path} ({trouble})"
    except Exception as trouble:  # Pillow raises OSError, SyntaxError, ValueError, struct.error ... for broken files
        return f"{'truncated' if 'truncated' in str(trouble) else 'undecodable'} picture: {path} ({trouble})"
