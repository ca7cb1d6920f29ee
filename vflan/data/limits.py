"""How much one file may take, whatever it says about itself.

A small file can ask for much memory: a picture by its size in pixels, a zip member or a parquet
page by what it unpacks to, a parquet dictionary by how often it is used, json by one endless line.
And a name need not be a file's: a pipe waits for ever, a device has no end. What a file states is
compared with a limit first; then no more than that is read and unpacked.
"""

from __future__ import annotations

import os
import stat
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from vflan.config import DEFAULTS

# One piece: the file of a picture, a zip member, a json value, the rows of a small parquet file.
MAX_BYTES = 1 << 28
# A large parquet file may unpack to this many times its bytes.
MAX_RATIO = 100
# A row of json.
MAX_ROW = 1 << 26
# Pixels of a picture, see `read_picture`; a recipe may say another number.
MAX_PIXELS = DEFAULTS["max_pixels"]
# Decoded pictures and their copies, over all threads of a process.
DECODED_BYTES = 2 << 30


def unpacked_limit(packed: int) -> int:
    """To how many bytes so many bytes of a parquet file may unpack."""
    return max(MAX_BYTES, MAX_RATIO * packed)


def no_file(path: Path) -> str:
    """What is at a path in place of a regular file, in words; "" for a regular file."""
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError:
        return "a link to nothing" if os.path.islink(path) else "no such file"
    # For instance a link to itself, a folder that may not be read, a name that is too long.
    except (OSError, ValueError) as error:
        return getattr(error, "strerror", None) or str(error)
    kinds = {stat.S_ISREG: "", stat.S_ISDIR: "a folder", stat.S_ISFIFO: "a pipe"}
    kinds |= {stat.S_ISSOCK: "a socket", stat.S_ISCHR: "a device", stat.S_ISBLK: "a device"}
    return next((what for is_kind, what in kinds.items() if is_kind(mode)), "no file")


def read_limited(path: str | os.PathLike) -> bytes:
    """The content of a regular file. ValueError: it is none, or has more than MAX_BYTES."""
    with open(path, "rb", opener=open_at_once) as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise ValueError("no regular file")
        if status.st_size > MAX_BYTES:
            raise ValueError(f"a file of {status.st_size:,} bytes, more than {MAX_BYTES:,}")
        # Not to the end, because the file may grow.
        return file.read(status.st_size)


def open_at_once(path: str, flags: int) -> int:
    """An opener for `open`: without its flag, it waits until somebody writes into a pipe."""
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))


class ByteBudget:
    """Bytes that the threads of a process may hold together; a thread waits for its share."""

    def __init__(self, total: int):
        self.total, self.used, self.changed = total, 0, threading.Condition()
        # A forked process has none of the threads that hold something here.
        if hasattr(os, "register_at_fork"):  # Windows has no fork
            os.register_at_fork(after_in_child=self._renew)

    def _renew(self) -> None:
        self.used, self.changed = 0, threading.Condition()

    @contextmanager
    def hold(self, size: int) -> Iterator[None]:
        """Hold so many bytes for a block. It must not be used inside another such block."""
        with self.changed:
            # What is larger than the whole budget goes alone.
            self.changed.wait_for(lambda: not self.used or self.used + size <= self.total)
            self.used += size
        try:
            yield
        finally:
            with self.changed:
                self.used -= size
                self.changed.notify_all()


DECODED = ByteBudget(DECODED_BYTES)
