"""From image names in a samples file to the strings that `read_picture` takes.

A name that leaves the images folder is marked here, and no such file is ever opened.
"""

from __future__ import annotations

import os
import posixpath
import zipfile
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

from vflan.data.images import INSIDE, OUTSIDE
from vflan.data.limits import no_file


def images_root(path: Path, images: str | os.PathLike | None) -> Path:
    """The folder or zip that image names are relative to."""
    folder = path if path.is_dir() else path.parent
    zips, beside = list(folder.glob("image*.zip")), folder / "images"
    if images is None:
        images = beside if beside.is_dir() else zips[0] if len(zips) == 1 else folder
    elif not os.path.exists(images) and len(zips) == 1 and Path(images).suffix != ".zip":
        # The folder that a recipe names was never unpacked: read the zip in its place.
        images = zips[0]
    root = Path(os.path.realpath(images))
    # What is no regular file, or has no size, is not opened: it might be waited for.
    lack = no_file(root) if _is_zip(root) else ""
    if _is_zip(root) and not lack and not (root.stat().st_size and zipfile.is_zipfile(root)):
        lack = "not a whole zip archive"
    if lack:
        raise ValueError(f"{root}: {lack}; download it again, or name its unpacked folder.")
    return root


def _is_zip(root: Path) -> bool:
    return root.suffix.lower() == ".zip" and not root.is_dir()


def image_resolver(root: Path) -> Callable[[str], str]:
    """A function from an image name in the file to the string that `read_picture` takes.

    A name that leaves the folder or zip gets the prefix OUTSIDE, and is never opened.
    """
    if not _is_zip(root):
        return _folder_resolver(os.path.join(root, ""))

    def resolve(name):
        member = posixpath.normpath(name)
        leaves = member in (".", "..") or member.startswith(("/", "../"))
        return f"{OUTSIDE}{name}" if leaves else f"{root}::{member}"

    return resolve


def _folder_resolver(base: str) -> Callable[[str], str]:
    """`image_resolver` for a folder; `base` is its real path and ends in a slash.

    A folder directly in `base` may be a link: the user put it there, so that its images may be on
    another disk. No other link may lead out, be it deeper, or an image, or one from inside such a
    folder.
    """

    # Following links for each image is slow on a network disk: list each folder once instead.
    @lru_cache(maxsize=1 << 16)
    def place_and_links(folder):
        """Where `folder` is, spelled from `base` where it is inside, and which links it holds."""
        place, links = _inside(base, os.path.realpath(folder), folder), ()
        if place:
            try:
                with os.scandir(place) as entries:
                    links = {entry.name for entry in entries if entry.is_symlink()}
            except OSError:
                pass  # no such folder: its images will be reported as missing
        return place, links

    def resolve(name):
        if "\0" in name:
            return base + name  # no file can have this name: it will be reported as missing
        # `save_samples` writes an image in a zip or parquet file of this folder as container::name.
        inside = INSIDE.fullmatch(name) if "::" in name else None
        path = os.path.join(base, inside[1] if inside else name)
        folder, file = os.path.split(path)
        place, links = place_and_links(folder)
        is_plain = file not in links and file not in ("", ".", "..")
        if is_plain:
            path = place and os.path.join(place, file)
        else:
            path = _inside(base, os.path.realpath(path), path)
        if not path:
            return f"{OUTSIDE}{name}"
        return f"{path}::{inside[3]}" if inside else path

    return resolve


def _inside(base: str, real: str, path: str) -> str:
    """`real`, the real path of `path`, as a path that begins with `base`; "" if it is outside.

    It is inside if it is in `base`, or in the folder that the link at the start of `path` names.
    """
    if os.path.join(real, "").startswith(base):
        return real
    spelled = os.path.normpath(path)
    top = spelled.removeprefix(base).partition("/")[0] if spelled.startswith(base) else ""
    link = os.path.join(base, top)
    # A link to an image is none of the user's folders; one to a disk that is not there may be.
    if not top or not os.path.islink(link) or os.path.isfile(link):
        return ""
    target = os.path.join(os.path.realpath(link), "")
    whole = os.path.join(real, "")
    return os.path.join(link, real[len(target) :]) if whole.startswith(target) else ""
