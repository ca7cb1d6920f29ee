"""Minutes and memory of whatever runs inside a `with` block, child processes included."""

from __future__ import annotations

import threading
import time

import psutil


def tree_gb(pid: int | None = None) -> float:
    """Memory in GB that a process (default: this one) and all its children hold now.

    Pages that processes share count once for each of them.
    """
    total = 0
    try:
        root = psutil.Process(pid)
        processes = [root, *root.children(recursive=True)]
    except psutil.NoSuchProcess:
        return 0.0
    for process in processes:
        try:
            total += process.memory_info().rss
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            pass  # it ended after the list was made
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
        while True:
            self.peak_gb = max(self.peak_gb, tree_gb(self.pid))
            if self._stop.wait(self.every):
                return

    def __exit__(self, *_) -> None:
        self._stop.set()
        self._thread.join()
        self.minutes = (time.monotonic() - self._start) / 60
