"""What a run logs while it trains: JSON lines, trackers, and a progress bar."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
import torch

from vflan.progress import progress

try:
    import resource
except ImportError:  # Windows
    resource = None

if TYPE_CHECKING:
    from accelerate import Accelerator

    from vflan.config import Recipe

FILES = ("metrics", "heldout", "samples")
TRACKED = ("loss", "lr", "fill", "tokens_per_second", "peak_gb")


class Log:
    """Writes metrics.jsonl, heldout.jsonl and samples.jsonl of a run folder, on the main process.

    Trackers get the same numbers. A progress bar goes to stderr, so that notebooks do not store
    timings.
    """

    def __init__(self, folder: Path, steps: int, first: int, accelerator: Accelerator):
        """Continue after step `first`: later lines are deleted, as their steps are trained again.

        0 deletes all lines.
        """
        self.folder, self.accelerator = folder, accelerator
        self.active, self.bar, self.files = accelerator.is_main_process, None, {}
        self.useful, self.busy, self.earlier_seconds = 0, 0.0, 0.0
        if not self.active:
            return
        # The steps after `first` are trained again, so their lines are cut.
        for name in FILES:
            path, scratch = folder / f"{name}.jsonl", folder / f".{name}.part"
            kept = [line for line in read_lines(path) if line["step"] <= first and first]
            scratch.write_text("".join(map(_to_json, kept)), encoding="utf-8")
            # A kill at this moment must leave the old file or the new one, not half of it.
            scratch.replace(path)
            self.files[name] = path.open("a", buffering=1, encoding="utf-8")
            if name == "metrics" and kept:
                self.earlier_seconds = kept[-1]["seconds"]
        self.began = time.perf_counter()
        self.bar = progress(folder.name, steps, "steps", first, leave=True)

    def begin(self, recipe: Recipe) -> None:
        """Send the recipe to the trackers, if there are any."""
        if recipe.trackers:
            # Trackers take simple values only; lists become text.
            fields = recipe.to_dict().items()
            simple = (int, float, str)
            config = {
                key: value if isinstance(value, simple) else str(value) for key, value in fields
            }
            options = dict(wandb=dict(name=recipe.name, dir=str(self.folder)))
            options |= dict(trackio=dict(name=recipe.name))
            self.accelerator.init_trackers("vflan", config=config, init_kwargs=options)

    def step(
        self,
        step: int,
        loss: float,
        lr: float,
        tokens: int,
        useful: int,
        positions: int,
        pictures: int,
        seconds: float,
    ) -> None:
        """Log one step.

        tokens: supervised ones; useful: all that are not padding; positions: with padding;
        pictures: rows with one.
        """
        if not self.active:
            return
        # Seconds count on over the parts of a run that was killed and resumed.
        elapsed = self.earlier_seconds + time.perf_counter() - self.began
        self.useful, self.busy = self.useful + useful, self.busy + seconds
        line = dict(step=step, loss=round(loss, 6), lr=lr, tokens=tokens, seconds=round(elapsed, 3))
        line |= dict(useful=useful, fill=round(useful / positions, 4), pictures=pictures)
        line |= dict(tokens_per_second=round(useful / seconds), peak_gb=round(peak_gb(), 3))
        self.files["metrics"].write(_to_json(line))
        self._track(step, {key: line[key] for key in TRACKED})
        # The bar shows the mean rate: that of one step depends on its lengths.
        rate, peak = f"{self.useful / self.busy:,.0f} tokens/s", f"peak {line['peak_gb']:.1f} GB"
        status = f"loss {loss:.3f}, {rate}, fill {line['fill']:.0%}, {peak}"
        self.bar.set_postfix_str(status, refresh=False)
        self.bar.update()

    def write(self, name: str, step: int, rows: list[dict]) -> None:
        """Write the rows of a validation: losses (`heldout`) or answers (`samples`)."""
        if self.active:
            self.files[name].write("".join(_to_json(dict(step=step) | row) for row in rows))
            losses = {f"heldout/{row['task']}": row["loss"] for row in rows if "loss" in row}
            self._track(step, losses)

    def _track(self, step, numbers):
        if self.accelerator.trackers and numbers:
            self.accelerator.log(numbers, step=step)

    def sync(self) -> None:
        """Put the lines on the disk: a checkpoint must not be newer than the lines of its steps."""
        for file in self.files.values():
            file.flush()
            os.fsync(file.fileno())

    def close(self) -> None:
        """Close files and the progress bar."""
        for file in self.files.values():
            file.close()
        if self.bar is not None:
            self.bar.close()


def read_lines(path: Path) -> list[dict]:
    """Read a .jsonl file ([] if there is none), without a last line that a crash cut off."""
    lines = path.read_text(encoding="utf-8").split("\n")[:-1] if path.is_file() else []
    return [json.loads(line) for line in lines]


def peak_gb() -> float:
    """Return the most memory this process has held, in GB: of the GPU, or else resident."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    if resource is None:
        return psutil.Process().memory_info().peak_wset / 1e9
    # Linux counts in kilobytes, macOS in bytes.
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def _to_json(line):
    return json.dumps(line, ensure_ascii=False) + "\n"
