"""A run is a folder that remembers: recipe, metrics, the model as Hugging Face files, and a marker written last."""

import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from vflan.recipe import ROOT, Recipe, read_json, replace, resolve, shown, write_json

PATIENCE = 5  # seconds that the processes of a killed run may need to go


@dataclass(frozen=True)
class Run:
    """What `train` returns.

    recipe.json, init.json (what it started from), bad.jsonl (rows left out, with reasons), repaired.jsonl (rows trained on but for a
    part, such as what lies beyond max_length), metrics.jsonl (one line a step: step, loss, lr, tokens, seconds, useful, fill,
    tokens_per_second, peak_gb), heldout.jsonl and samples.jsonl (if rows are held out),
    checkpoints/ (while it is unfinished; see `at`), model/ (`AutoModelForImageTextToText` and `AutoProcessor` load it),
    adapter/ (of a LoRA run: what it learned, as PEFT's files), mixture.json (the rows it drew, by file and by task),
    done.json (written last, so that a half-written run is never taken for a finished one).
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
        """The folder's name, which is the recipe's."""
        return self.folder.name

    @property
    def recipe(self) -> Recipe:
        """What it was, or is, trained by: recipe.json."""
        return Recipe.from_dict(read_json(self.folder / "recipe.json"))

    @property
    def finished(self) -> bool:
        """Whether it was trained to its end and its model is whole: done.json is there."""
        return (self.folder / "done.json").is_file()

    @property
    def summary(self) -> dict:
        """done.json: steps, seconds, tokens, first and last loss, rows, hashes of the parts; empty while unfinished."""
        return read_json(self.folder / "done.json")

    def metrics(self):
        """One row a step, as a DataFrame."""
        return self._table("metrics", ["step", "loss"])

    def heldout(self):
        """The loss on held-out rows as a DataFrame: step, task (`all` for all of them), loss (a token), tokens."""
        return self._table("heldout", ["step", "task", "loss", "tokens"])

    def sample_answers(self):
        """What the model said to the same held-out questions: step, id, task, question, answer, reference."""
        return self._table("samples", ["step", "id", "task", "question", "answer", "reference"])

    def _table(self, name, columns):
        import pandas as pd

        path = self.folder / f"{name}.jsonl"
        whole = path.is_file() and path.stat().st_size
        try:
            return pd.read_json(path, lines=True) if whole else pd.DataFrame(columns=columns)
        except ValueError:
            raise ValueError(f"{shown(path)} is damaged: put back a whole copy, or delete it.") from None

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
        """The model's `LlavaProcessor`: tokenizer with chat template, and picture preparation by Pillow."""
        from transformers import AutoProcessor

        from vflan.model import read_pretrained

        self._must_be_finished()
        return read_pretrained(AutoProcessor, self.folder / "model", backend="pil")

    def at(self, step: int | None = None) -> "Run":
        """The run as its newest checkpoint (that of `step`, if given) left it, made a finished run `NAME-stepN` beside it.

        For a look at a run that still trains, or was killed: it loads, answers and is evaluated like any other.
        """
        from vflan import checkpoints
        from vflan import model as models

        found = checkpoints.newest(self.folder, step)
        if found is None:
            which = "a checkpoint" if step is None else f"a checkpoint of step {step}"
            raise FileNotFoundError(
                f"{self.name} has not {which}; a run with save_every keeps its last two while it trains."
            )
        path, about = found
        recipe, start = self.recipe, read_json(self.folder / "init.json")
        other = Run(self.folder.with_name(f"{self.name}-step{about['step']}"))
        if not other.finished:
            whole = replace(recipe, bits=16)  # what was learned is put on the weights that were quantised
            model = checkpoints.learned(whole, start.get("init"), checkpoints.weights(path))
            other.folder.mkdir(exist_ok=True)
            write_json(other.folder / "recipe.json", replace(recipe, name=other.name).to_dict())
            write_json(other.folder / "init.json", start)
            lines = (self.folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
            (other.folder / "metrics.jsonl").write_text("".join(lines[: about["step"]]), encoding="utf-8")
            other.finish(model, models.load_processor(whole, model), whole, start.get("init"), steps=about["step"])
        return other

    def export(self, folder, merge: bool = True) -> Path:
        """Write a folder for others, with a model card and a card of the data; prints how to serve it, returns the folder.

        `transformers.pipeline("image-text-to-text")`, vLLM and `push` take it as it is. With merge=False, of a LoRA run:
        the adapter alone, for `PeftModel.from_pretrained` on the model that the run began with.
        """
        from vflan.share import export

        self._must_be_finished()
        return export(self, folder, merge)

    def push(self, repo: str, private: bool = True, merge: bool = True) -> str:
        """Upload what `export` writes to the Hugging Face hub as "user/name" and return the page's address.

        The token comes from HF_TOKEN or `hf auth login`. Private at first: look at the card, and at the licences of the data.
        """
        from vflan.share import push

        self._must_be_finished()
        return push(self, repo, private, merge)

    def finish(self, model, processor, recipe, init, **summary) -> None:
        """Write the model, then done.json with a summary of the run: last, and whole."""
        from vflan import checkpoints
        from vflan import model as models

        scratch, metrics = self.folder / ".model", self.metrics()
        summary |= dict(tokens=int(metrics.tokens.sum()), first_loss=float(metrics.loss.iloc[0]))
        summary |= dict(last_loss=float(metrics.loss.iloc[-10:].mean()))
        summary["parts"] = {name: models.fingerprint(part) for name, part in models.parts(model).items()}
        with checkpoints.full_disk_is_told(self.folder):
            for folder in (scratch, self.folder / "model", self.folder / "adapter"):
                shutil.rmtree(folder, ignore_errors=True)
            if recipe.lora_r:
                models.save_adapter(model, recipe, self.folder / "adapter")
            models.export(model, processor, recipe, scratch, init)
            checkpoints.flush(scratch)
            scratch.replace(self.folder / "model")
            write_json(self.folder / "done.json", summary)
        shutil.rmtree(self.folder / "checkpoints", ignore_errors=True)

    @contextmanager
    def alone(self):
        """Hold the folder for this process; RuntimeError if another is training here. A process that dies lets go of it."""
        import fcntl

        with (self.folder / ".lock").open("a+") as file:
            end = time.monotonic() + PATIENCE
            while True:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if time.monotonic() > end:
                        file.seek(0)
                        raise RuntimeError(
                            f"{shown(self.folder)} is being trained by {file.read() or 'another process'}; "
                            "wait for it, or give this run another name."
                        ) from None
                    time.sleep(0.1)
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}")
            file.flush()
            for half in self.folder.glob(".*.json.*"):  # of a process that died while it wrote one
                half.unlink(missing_ok=True)
            yield

    def _must_be_finished(self):
        if not self.finished:
            raise FileNotFoundError(
                f"{self.name} is not finished; train it to the end first, or take its last checkpoint: run.at()."
            )


def launch(folder: Path, num_processes: int) -> None:
    """Train the run in `folder` with several processes on this machine; their lines appear here as they are written.

    The printed command is what one pastes into a cluster script (with torch.distributed.run's own options for more machines).
    """
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(num_processes)]
    command += ["-m", "vflan.train", str(folder), "--processes", str(num_processes)]
    print(" ".join(["python", *command[1:-3], shown(Path(folder)), *command[-2:]]), flush=True)
    paths = [str(Path(__file__).resolve().parent.parent), os.environ.get("PYTHONPATH")]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "VFLAN_HOME": str(ROOT)}
    env |= {"VFLAN_ENDS_WITH_STDIN": "1"}  # which ends with us, however we end
    env.setdefault("OMP_NUM_THREADS", "1")
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    child, tail = subprocess.Popen(command, text=True, env=env, **pipes), []
    try:
        for line in child.stdout:
            print(line, end="", file=sys.stderr, flush=True)  # not stdout: a notebook would keep the timings
            tail = [*tail, line][-30:]
    finally:  # an interrupted cell takes its children with it
        if child.poll() is None and sys.exc_info()[0] is not None:
            child.terminate()
        child.stdin.close()
        status = child.wait()
    if status:
        raise RuntimeError(
            f"Training with {num_processes} processes failed (exit {status}); its last lines:\n{''.join(tail)}"
        )


def end_with_parent() -> None:
    """In a process that `launch` started: end at once when the launching one is gone, so that nobody trains on unseen."""
    if os.environ.get("VFLAN_ENDS_WITH_STDIN"):

        def wait():
            os.read(0, 1)
            os._exit(1)

        threading.Thread(target=wait, daemon=True).start()
