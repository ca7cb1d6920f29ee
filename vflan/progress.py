"""One live line for slow work: reading, checking, downloading, training, answering, judging.

On a terminal and in a notebook it is a bar. Under papermill, nbval and in log files a plain line a
minute goes to stderr, from the second minute on; never under a cell whose output nbval compares.
"""

import sys
import time
from collections.abc import Iterable, Iterator
from typing import Any

from tqdm.auto import tqdm

from vflan.io import say

# Seconds until a bar appears, and between two plain lines.
DELAY, EVERY = 3, 60


def progress(what: str, total: int, unit: str = "", initial: int = 0, **style: Any):
    """A bar to use in `with`: `update(n)` counts, `set_postfix_str(text)` adds a text.

    total, initial: how much there is in all and is done already, in `unit`; "B" is shown as kB, MB
    or GB. style: options of tqdm for the bar.
    """
    if not is_watched():
        return Lines(what, total, unit, initial)
    scale = dict(unit="B", unit_scale=True) if unit == "B" else dict(unit=f" {unit}")
    style = scale | dict(delay=DELAY, leave=False, dynamic_ncols=True) | style
    return tqdm(total=total, desc=what, initial=initial, **style)


def counted(items: Iterable, what: str, total: int, unit: str = "", each: int = 1) -> Iterator[Any]:
    """The items, under a bar that counts `each` of `total` for every one, or what is left."""
    with progress(what, total, unit) as bar:
        for item in items:
            yield item
            bar.update(min(each, total - bar.n))


class Lines:
    """Plain lines on stderr in place of a bar, with the same methods."""

    def __init__(self, what: str, total: int, unit: str = "", initial: int = 0):
        self.what, self.total, self.unit = what, total, unit
        self.initial = self.n = initial
        self.postfix = ""
        self.start = self.last_line = time.perf_counter()

    def update(self, n: int = 1) -> None:
        """Count `n` more; print a line if the last one is a minute old."""
        self.n += n
        now = time.perf_counter()
        if now - self.last_line < EVERY or self.n <= self.initial:
            return
        self.last_line = now
        if not _is_compared():
            # What was done before this start says nothing about the speed of this one.
            seconds_each = (now - self.start) / (self.n - self.initial)
            minutes = seconds_each * max(0, self.total - self.n) / 60
            parts = [f"{self.what}: {self._amount()}", self.postfix, f"{minutes:.0f} min left"]
            say(", ".join(filter(None, parts)))

    def set_postfix_str(self, text: str, refresh: bool = True) -> None:
        """The text that the next line shows."""
        self.postfix = text

    def close(self) -> None:
        """Does nothing; tqdm has it."""

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def _amount(self) -> str:
        if self.unit == "B":
            return f"{tqdm.format_sizeof(self.n)}B of {tqdm.format_sizeof(self.total)}B"
        return f"{self.n:,} of {self.total:,} {self.unit}".rstrip()


def _kernel():
    """The notebook kernel that this process is, or None."""
    ipython = sys.modules.get("IPython")
    return getattr(ipython.get_ipython(), "kernel", None) if ipython else None


def is_watched() -> bool:
    """Whether a person watches: on a terminal, or in a notebook whose cells may ask for input.

    papermill and nbval allow no input.
    """
    kernel = _kernel()
    return sys.stderr.isatty() if kernel is None else bool(getattr(kernel, "_allow_stdin", False))


def _is_compared() -> bool:
    """Whether nbval compares the output of the running cell."""
    if (kernel := _kernel()) is None:
        return False
    code = kernel.get_parent().get("content", {}).get("code", "")
    return "NBVAL_CHECK_OUTPUT" in code
