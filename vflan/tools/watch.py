"""Minutes and memory of whatever runs inside a `with` block, child processes included."""

from __future__ import annotations

import threading
import time

import psutil

LOOKS = 8  # of the cheap kind to each exact one


def tree_gb(pid: int | None = None, exact: bool = True) -> float:
    """Memory in GB that a process (default: this one) and all its children hold now.

    exact: on Linux, a page that several processes share is divided among them (PSS), so it counts
    once. Otherwise, and on other systems, it counts once for each of them (RSS), which is quicker.
    """
    total = 0
    try:
        root = psutil.Process(pid)
        processes = [root, *root.children(recursive=True)]
    except psutil.NoSuchProcess:
        return 0.0
    for process in processes:
        try:
            if exact and psutil.LINUX:
                total += process.memory_full_info().pss
            else:
                total += process.memory_info().rss
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            pass  # it ended after the list was made, or it is another user's
    return total / 1e9


class Watch:
    """Measure a block: `with Watch() as watch:`, and afterwards watch.minutes and watch.peak_gb.

    pid: the process whose tree is measured; default: this one. every: seconds between two looks,
    so a shorter peak of memory can be missed.
    """

    def __init__(self, pid: int | None = None, every: float = 0.5):
        self.pid, self.every, self.peak_gb, self.minutes = pid, every, 0.0, 0.0
        self._stop = threading.Event()

    def __enter__(self) -> Watch:
        self._start = time.monotonic()
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()
        return self

    def _look(self):
        # An exact look costs milliseconds a process; a quick one tells whether it is worth it.
        looks, highest = 0, 0.0
        while True:
            quick = tree_gb(self.pid, exact=False)
            if quick > highest or looks % LOOKS == 0:
                highest = max(highest, quick)
                self.peak_gb = max(self.peak_gb, tree_gb(self.pid))
            looks += 1
            if self._stop.wait(self.every):
                return

    def __exit__(self, *_) -> None:
        self._stop.set()
        self._thread.join()
        self.minutes = (time.monotonic() - self._start) / 60
