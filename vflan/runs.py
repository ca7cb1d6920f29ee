"""A run is a folder that remembers: recipe, metrics, the model as Hugging Face files, and a marker written last."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from vflan.recipe import ROOT, Recipe, resolve


@dataclass(frozen=True)
class Run:
    """What `train` returns.

    recipe.json, init.json (what it started from), bad.jsonl (rows left out, with reasons), metrics.jsonl (one line a step: step, loss,
    lr, tokens, seconds), model/ (`AutoModelForImageTextToText` and `AutoProcessor` load it), done.json (written last, so
    that a half-written run is never taken for a finished one).
    """

    folder: Path

    @classmethod
    def open(cls, folder) -> "Run":
        """The run in a folder (relative to the project folder); it must have a recipe.json."""
        run = cls(resolve(folder))
        if not (run.folder / "recipe.json").is_file():
            raise FileNotFoundError(
                f"{folder}: no run there; train it first (vflan.train, or the notebook that makes it)."
            )
        return run

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def recipe(self) -> Recipe:
        return Recipe.from_dict(read_json(self.folder / "recipe.json"))

    @property
    def finished(self) -> bool:
        return (self.folder / "done.json").is_file()

    @property
    def summary(self) -> dict:
        """done.json: steps, seconds, tokens, first and last loss, rows, hashes of the parts; empty while unfinished."""
        return read_json(self.folder / "done.json")

    def metrics(self):
        """One row a step, as a DataFrame."""
        import pandas as pd

        path = self.folder / "metrics.jsonl"
        return (
            pd.read_json(path, lines=True)
            if path.is_file() and path.stat().st_size
            else pd.DataFrame(columns=["step", "loss"])
        )

    def load_model(self):
        """The trained model, on the GPU where there is one (a quantised model is put there by its loader)."""
        import torch

        from vflan.model import load_model

        self._must_be_finished()
        model = load_model(self.recipe, self)
        if torch.cuda.is_available() and model.device.type == "cpu":
            model.to("cuda")
        return model

    def processor(self):
        from transformers import AutoProcessor

        self._must_be_finished()
        return AutoProcessor.from_pretrained(self.folder / "model", backend="pil")

    def _must_be_finished(self):
        if not self.finished:
            raise FileNotFoundError(f"{self.folder.name} is not finished; train it to the end first.")


def read_json(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def write_json(path: Path, value) -> None:
    """Whole or not at all: a reader never sees half a file."""
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    scratch.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    scratch.replace(path)


def launch(folder: Path, num_processes: int) -> None:
    """Train the run in `folder` with several processes on this machine; their lines appear here as they are written.

    The printed command is what one pastes into a cluster script (with torch.distributed.run's own options for more machines).
    """
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(num_processes)]
    command += ["-m", "vflan.train", str(folder), "--processes", str(num_processes)]
    shown = Path(folder).relative_to(ROOT) if Path(folder).is_relative_to(ROOT) else folder
    print(" ".join(["python", *command[1:-3], str(shown), *command[-2:]]), flush=True)
    paths = [str(Path(__file__).resolve().parent.parent), os.environ.get("PYTHONPATH")]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "VFLAN_HOME": str(ROOT)}
    env.setdefault("OMP_NUM_THREADS", "1")
    child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=env)
    tail = []
    try:
        for line in child.stdout:
            print(line, end="", flush=True)
            tail = [*tail, line][-30:]
    finally:  # an interrupted cell takes its children with it
        if child.poll() is None and sys.exc_info()[0] is not None:
            child.terminate()
        status = child.wait()
    if status:
        raise RuntimeError(
            f"Training with {num_processes} processes failed (exit {status}); its last lines:\n{''.join(tail)}"
        )
