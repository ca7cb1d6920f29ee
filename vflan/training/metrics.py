"""What a run writes while it runs: a line of json for each step and look, and one live line for people."""

import json
import os
import sys
import time

import psutil
import torch

from vflan.progress import progress

try:
    import resource
except ImportError:  # Windows
    resource = None

FILES = ("metrics", "heldout", "samples")


class Log:
    """metrics.jsonl, heldout.jsonl and samples.jsonl of a run folder, on the main process; trackers get the numbers too.

    And one live line, `progress`'s, which goes to stderr, so that no timing gets into a notebook's kept output.
    """

    def __init__(self, folder, steps, first, accelerator):
        """Lines of steps after `first`, where the run now goes on, are cut: they will be written again, at 0 all of them."""
        self.folder, self.accelerator = folder, accelerator
        self.active, self.bar, self.files = accelerator.is_main_process, None, {}
        self.useful, self.busy, self.before = 0, 0.0, 0.0
        if not self.active:
            return
        for name in FILES:
            path, scratch = folder / f"{name}.jsonl", folder / f".{name}.part"
            kept = [line for line in read_lines(path) if line["step"] <= first and first]
            scratch.write_text("".join(map(_json, kept)), encoding="utf-8")
            scratch.replace(path)  # whole or not at all: the next kill may come now
            self.files[name] = path.open("a", buffering=1, encoding="utf-8")
            if name == "metrics" and kept:
                self.before = kept[-1]["seconds"]
        self.began = time.perf_counter()
        self.bar = progress(folder.name, steps, "steps", first, leave=True)

    def begin(self, recipe):
        """Tell the trackers, if there are any, what is trained."""
        if recipe.trackers:
            config = {
                key: value if isinstance(value, (int, float, str)) else str(value)
                for key, value in recipe.to_dict().items()
            }
            names = {
                "wandb": {"name": recipe.name, "dir": str(self.folder)},
                "trackio": {"name": recipe.name},
            }
            self.accelerator.init_trackers("vflan", config=config, init_kwargs=names)

    def step(self, step, loss, lr, tokens, useful, positions, seconds):
        """One step: `tokens` are supervised, `useful` all tokens that are not padding, `positions` padding included."""
        if not self.active:
            return
        now = time.perf_counter()
        self.useful, self.busy = self.useful + useful, self.busy + seconds
        line = dict(
            step=step,
            loss=round(loss, 6),
            lr=lr,
            tokens=tokens,
            seconds=round(self.before + now - self.began, 3),
        )
        line |= dict(
            useful=useful,
            fill=round(useful / positions, 4),
            tokens_per_second=round(useful / seconds),
        )
        line["peak_gb"] = round(peak_gb(), 3)
        self.files["metrics"].write(_json(line))
        self.track(
            step, {key: line[key] for key in ("loss", "lr", "fill", "tokens_per_second", "peak_gb")}
        )
        says = f"loss {loss:.3f}, {self.useful / self.busy:,.0f} tokens/s, fill {line['fill']:.0%}, peak {line['peak_gb']:.1f} GB"
        self.bar.set_postfix_str(says, refresh=False)
        self.bar.update()

    def look(self, name, step, rows):
        """Lines about the held-out rows (heldout), or answers to them (samples)."""
        if self.active:
            self.files[name].write("".join(_json(dict(step=step) | row) for row in rows))
            self.track(
                step, {f"heldout/{row['task']}": row["loss"] for row in rows if "loss" in row}
            )

    def track(self, step, numbers):
        if self.accelerator.trackers and numbers:
            self.accelerator.log(numbers, step=step)

    def sync(self):
        """Put what was written on the disk: a checkpoint must not know more than the lines before it."""
        for file in self.files.values():
            file.flush()
            os.fsync(file.fileno())

    def close(self):
        for file in self.files.values():
            file.close()
        for tracker in self.accelerator.trackers:
            tracker.finish()
        if self.bar is not None:
            self.bar.close()


def read_lines(path) -> list[dict]:
    """The lines of a .jsonl file, none if there is none; one that a crash cut off is left out."""
    lines = path.read_text(encoding="utf-8").split("\n")[:-1] if path.is_file() else []
    return [json.loads(line) for line in lines]


def peak_gb() -> float:
    """The most memory that this process has held: of the GPU where there is one, else resident, in GB."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    if resource is None:
        return psutil.Process().memory_info().peak_wset / 1e9
    return (
        resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        * (1 if sys.platform == "darwin" else 1024)
        / 1e9
    )


def _json(line):
    return json.dumps(line, ensure_ascii=False) + "\n"
