"""A run is a folder that remembers: recipe, metrics, the model as Hugging Face files, and a marker written last."""

import os
import re
import socket
import threading
import time
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from vflan.config import Recipe, differences, read_json, replace, resolve, shown, write_json
from vflan.io import BEGINNING, CHECKPOINTS, MODEL, RUN, clear, foreign, make_folder, named

MARKERS = {
    "name",
    "stage",
    "vision_tower",
    "language_model",
}  # fields by which a recipe.json is one of ours
_HELD = set()  # (process, thread, folder) of the locks that are held here
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
            raise ValueError(
                f"{shown(path)} is damaged: put back a whole copy, or delete it."
            ) from None

    def load_model(self):
        """The trained model, on the GPU where there is one (a quantised model is put there by its loader)."""
        import torch

        from vflan.models.llava import load_model

        self._must_be_finished()
        model = load_model(self.recipe, self)
        if torch.cuda.is_available() and model.device.type == "cpu":
            model.to("cuda")
        return model

    def processor(self):
        """The model's `LlavaProcessor`: tokenizer with chat template, and picture preparation by Pillow."""
        from transformers import AutoProcessor

        from vflan.models.llava import read_pretrained

        self._must_be_finished()
        return read_pretrained(AutoProcessor, self.folder / "model", backend="pil")

    def at(self, step: int | None = None) -> "Run":
        """The run as its newest checkpoint (that of `step`, if given) left it, made a finished run `NAME-stepN` beside it.

        For a look at a run that still trains, or was killed: it loads, answers and is evaluated like any other.
        """
        from vflan.models import llava as models
        from vflan.training import checkpointing

        found = checkpointing.newest(self.folder, step)
        if found is None:
            which = "a checkpoint" if step is None else f"a checkpoint of step {step}"
            raise FileNotFoundError(
                f"{self.name} has not {which}; a run with save_every keeps its last two while it trains."
            )
        path, about = found
        recipe, start = self.recipe, read_json(self.folder / "init.json")
        other = Run(self.folder.with_name(f"{self.name}-step{about['step']}"))
        written = replace(recipe, name=other.name)
        with other.begun(written, start):
            if not other.finished:
                whole = replace(
                    recipe, bits=16
                )  # what was learned is put on the weights that were quantised
                model = checkpointing.learned(whole, start.get("init"), checkpointing.weights(path))
                lines = (
                    (self.folder / "metrics.jsonl")
                    .read_text(encoding="utf-8")
                    .splitlines(keepends=True)
                )
                (other.folder / "metrics.jsonl").write_text(
                    "".join(lines[: about["step"]]), encoding="utf-8"
                )
                processor = models.load_processor(whole, model)
                other.finish(model, processor, whole, start.get("init"), steps=about["step"])
        return other

    def export(self, folder, merge: bool = True) -> Path:
        """Write a folder for others, with a model card and a card of the data; prints how to serve it, returns the folder.

        `transformers.pipeline("image-text-to-text")`, vLLM and `push` take it as it is. With merge=False, of a LoRA run:
        the adapter alone, for `PeftModel.from_pretrained` on the model that the run began with.
        """
        from vflan.tools.export import export

        self._must_be_finished()
        return export(self, folder, merge)

    def push(self, repo: str, private: bool = True, merge: bool = True) -> str:
        """Upload what `export` writes to the Hugging Face hub as "user/name" and return the page's address.

        The token comes from HF_TOKEN or `hf auth login`. Private at first: look at the card, and at the licences of the data.
        """
        from vflan.tools.export import push

        self._must_be_finished()
        return push(self, repo, private, merge)

    def finish(self, model, processor, recipe, init, **summary) -> None:
        """Write the model, then done.json with a summary of the run: last, and whole."""
        from vflan.models import llava as models
        from vflan.training import checkpointing

        scratch, metrics = self.folder / ".model", self.metrics()
        summary |= dict(tokens=int(metrics.tokens.sum()), first_loss=float(metrics.loss.iloc[0]))
        summary |= dict(last_loss=float(metrics.loss.iloc[-10:].mean()))
        summary["parts"] = {
            name: models.fingerprint(part) for name, part in models.parts(model).items()
        }
        with checkpointing.full_disk_is_told(self.folder):
            for folder in (scratch, self.folder / "model", self.folder / "adapter"):
                clear(folder, MODEL)
            if recipe.lora_r:
                models.save_adapter(model, recipe, self.folder / "adapter")
            models.export(model, processor, recipe, scratch, init)
            checkpointing.flush(scratch)
            scratch.replace(self.folder / "model")
            write_json(self.folder / "done.json", summary)
        clear(self.folder / "checkpoints", CHECKPOINTS)

    @contextmanager
    def alone(self, again: bool = False):
        """Hold the folder for this process; RuntimeError if another is training here. A process that dies lets go of it.

        again: in a thread that holds it already, go on holding it.
        """
        import fcntl

        me = (os.getpid(), threading.get_ident(), os.path.realpath(self.folder))
        if again and me in _HELD:
            yield
            return
        lock = self.folder / ".lock"
        if lock.is_symlink() or lock.exists() and not lock.is_file():
            raise FileExistsError(
                f"{shown(lock)} is not vflan's lock file: move it away, or choose another name."
            )
        with lock.open("a+", encoding="utf-8", errors="replace") as file:
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
            file.seek(0)
            if not re.match(r"process \d+ on |$", file.read(200)):
                raise FileExistsError(
                    f"{shown(lock)} is not vflan's lock file: move it away, or choose another name."
                )
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}")
            file.flush()
            for half in self.folder.glob(".*.json.*"):  # of a process that died while it wrote one
                if re.fullmatch(r"\.(recipe|init|mixture|done)\.json\.\d+", half.name):
                    half.unlink(missing_ok=True)
            _HELD.add(me)
            try:
                yield
            finally:
                _HELD.discard(me)

    @contextmanager
    def begun(self, recipe: Recipe, start: dict):
        """Hold the folder, in which `recipe` is written down to be trained from `start` (init.json).

        Looked at under the lock: a finished run of the same recipe stays as it is. One sentence, and
        not a byte is changed, if the folder holds another recipe's run (ValueError) or files that
        vflan did not write (FileExistsError). The rest of a start that failed is deleted.
        """
        if self.finished and not self._changes(recipe, start):  # reading it needs no lock
            yield
            return
        self._refuse(recipe, start)
        make_folder(self.folder)
        with self.alone():
            changed = self._refuse(recipe, start)  # once more: another process may have come first
            if not self.finished:
                for path in self.folder.iterdir() if changed else ():
                    if path.is_dir():
                        clear(
                            path,
                            [
                                pattern.partition("/")[2]
                                for pattern in RUN
                                if pattern.startswith(f"{path.name}/")
                            ],
                        )
                    elif path.name != ".lock":
                        path.unlink()
                write_json(self.folder / "recipe.json", recipe.to_dict())
                write_json(self.folder / "init.json", start)
            yield

    def _changes(self, recipe, start) -> str:
        """What tells the recipe and start that are written down here from these; empty where there is none."""
        old = self.written()
        return differences(old, recipe.to_dict() | start) if old else ""

    def written(self) -> dict:
        """recipe.json and init.json together; empty where there is neither."""
        return read_json(self.folder / "recipe.json") | read_json(self.folder / "init.json")

    def _refuse(self, recipe, start) -> str:
        """The changes, if this recipe may be written down here; else the sentence that says why it may not."""
        where = shown(self.folder)
        if not self.folder.is_dir():
            return ""
        known = read_json(self.folder / "recipe.json")
        if not MARKERS <= known.keys():
            if others := foreign(self.folder, BEGINNING):
                raise FileExistsError(
                    f"{where} is no run of vflan: it holds {named(others)}. Nothing was changed; give this run "
                    "another name, or move these files away."
                )
            return ""
        if not (changed := self._changes(recipe, start)):
            return ""
        if self.finished or any((self.folder / "checkpoints").glob("step-*")):
            raise ValueError(
                f"{where} holds another recipe's run:\n{changed}\nGive this one a new name, or delete {where}."
            )
        if others := [str(self.folder)] if self.folder.is_symlink() else foreign(self.folder, RUN):
            raise FileExistsError(
                f"{where} holds the start of another recipe's run, and what vflan did not write or reaches through a "
                f"link: {named(others)}. Nothing was deleted; give this run another name, or move that away.\n{changed}"
            )
        return changed

    def _must_be_finished(self):
        if not self.finished:
            raise FileNotFoundError(
                f"{self.name} is not finished; train it to the end first, or take its last checkpoint: run.at()."
            )
