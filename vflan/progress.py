"""One live line for whatever takes long: reading, checking, fetching, tokenising, training, answering, judging.

A person sees a bar, on a terminal or in a notebook. Where nobody watches (papermill, nbval, a log file) a plain line a
minute goes to stderr, none in the first minute; and never any under a cell whose output nbval compares.
"""

import sys
import time

from tqdm.auto import tqdm

DELAY, EVERY = 3, 60  # seconds until a bar appears, and between two plain lines


def progress(what: str, total: int, unit: str = "", initial: int = 0, **style):
    """A bar, to be used in `with`: `update(n)` as things are done, `set_postfix_str(text)` for what else to say.

    total, initial: of all and done before, counted in `unit`; "B" is shown in kB, MB, GB. style: tqdm's, for the bar.
    """
    if not _watched():
        return Lines(what, total, unit, initial)
    scale = dict(unit="B", unit_scale=True) if unit == "B" else dict(unit=f" {unit}")
    style = scale | dict(delay=DELAY, leave=False, dynamic_ncols=True) | style
    return tqdm(total=total, desc=what, initial=initial, **style)


def counted(items, what: str, total: int, unit: str = "", each: int = 1):
    """The items as they come, `each` so many of `total`, with such a bar."""
    with progress(what, total, unit) as bar:
        for item in items:
            yield item
            bar.update(each)


class Lines:
    """What `progress` gives where nobody watches."""

    def __init__(self, what, total, unit="", initial=0):
        self.what, self.total, self.unit, self.initial, self.n, self.postfix = (
            what,
            total,
            unit,
            initial,
            initial,
            "",
        )
        self.began = self.said = time.perf_counter()

    def update(self, n=1):
        self.n += n
        now = time.perf_counter()
        if now - self.said >= EVERY and self.n > self.initial:
            self.said = now
            left = (now - self.began) / (self.n - self.initial) * max(0, self.total - self.n)
            if not _is_checked():
                parts = [
                    f"{self.what}: {self._amount()}",
                    self.postfix,
                    f"{left / 60:.0f} min left",
                ]
                print(", ".join(filter(None, parts)), file=sys.stderr, flush=True)

    def set_postfix_str(self, text, refresh=True):
        self.postfix = text

    def close(self):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def _amount(self):
        if self.unit == "B":
            return f"{tqdm.format_sizeof(self.n)}B of {tqdm.format_sizeof(self.total)}B"
        return f"{self.n:,} of {self.total:,} {self.unit}".rstrip()


def _kernel():
    """The notebook kernel that this process is, if it is one."""
    ipython = sys.modules.get("IPython")
    return getattr(ipython.get_ipython(), "kernel", None) if ipython else None


def _watched() -> bool:
    """Whether a person is there: a terminal; or a notebook whose cells may ask for input, as no robot's may."""
    kernel = _kernel()
    return sys.stderr.isatty() if kernel is None else bool(getattr(kernel, "_allow_stdin", False))


def _is_checked() -> bool:
    """Whether nbval compares what the running cell prints."""
    kernel = _kernel()
    return kernel is not None and "NBVAL_CHECK_OUTPUT" in kernel.get_parent().get(
        "content", {}
    ).get("code", "")
