"""A Run is a folder: recipe, metrics, the model as Hugging Face files, and done.json at the end."""

from __future__ import annotations

import errno
import html
import os
import re
import socket
import threading
import time
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from vflan import io
from vflan.config import Recipe, differences, read_json, replace, resolve, shown, write_json

if TYPE_CHECKING:
    from collections.abc import Iterator

    import pandas as pd
    from matplotlib.figure import Figure
    from torch import nn
    from transformers import LlavaProcessor

# A recipe.json with these fields is vflan's.
MARKERS = {"name", "stage", "vision_tower", "language_model"}
PATIENCE = 5  # seconds to wait for the processes of a killed run to exit
_HELD = set()  # (process, thread, folder) of the locks held here


@dataclass(frozen=True)
class Run:
    """A training run: what `train` returns. Its folder holds

    - recipe.json, init.json: what it trains, and the weights it started from
    - mixture.json: the rows it drew, by file and by task
    - bad.jsonl: rows left out, with reasons; repaired.jsonl: rows of which a part was left out,
      such as what is beyond max_length
    - metrics.jsonl: one line a step: step, loss, lr, tokens, seconds, useful, fill, pictures,
      tokens_per_second, peak_gb
    - heldout.jsonl, samples.jsonl: losses and answers on held-out rows, if the recipe holds rows
      out
    - checkpoints/: while it is unfinished; see `at`
    - rows/: while it is unfinished, its tokenised rows, if it has several processes or checkpoints
    - model/: for `AutoModelForImageTextToText` and `AutoProcessor`; adapter/: a LoRA run's adapter
      as PEFT's files
    - done.json: written last, so that a partial run never passes for a finished one
    """

    folder: Path

    @classmethod
    def open(cls, folder: str | Path) -> Run:
        """Open the run in a folder, relative to the project folder.

        FileNotFoundError if there is no recipe.json.
        """
        run = cls(resolve(folder))
        if not (run.folder / "recipe.json").is_file():
            raise FileNotFoundError(
                f"{folder}: there is no run; train it first (vflan.train, or its notebook)."
            )
        return run

    @property
    def name(self) -> str:
        """The name of the folder, which is that of the recipe."""
        return self.folder.name

    @property
    def recipe(self) -> Recipe:
        """The recipe that it is trained by: recipe.json."""
        return Recipe.from_dict(read_json(self.folder / "recipe.json"))

    @property
    def finished(self) -> bool:
        """Whether training ended and the model is complete: done.json exists."""
        return (self.folder / "done.json").is_file()

    @property
    def summary(self) -> dict:
        """done.json: steps, seconds, tokens, rows, losses, hashes of parts; {} if unfinished."""
        return read_json(self.folder / "done.json")

    def _repr_html_(self) -> str:
        """A small table, for notebooks."""
        summary = self.summary
        values = dict(run=self.name, stage=read_json(self.folder / "recipe.json").get("stage", ""))
        values |= dict(steps=summary.get("steps", "not finished"), rows=summary.get("rows", ""))
        loss = summary.get("last_loss")
        values |= {"last loss": "" if loss is None else f"{loss:.4f}", "folder": shown(self.folder)}
        cells = [(html.escape(key), html.escape(str(value))) for key, value in values.items()]
        rows = "".join(f"<tr><th>{key}</th><td>{value}</td></tr>" for key, value in cells)
        return f"<table>{rows}</table>"

    def metrics(self) -> pd.DataFrame:
        """One row a step."""
        return self._table("metrics", ["step", "loss"])

    def heldout(self) -> pd.DataFrame:
        """Losses on held-out rows: step, task (or `all`), loss (mean over tokens), tokens."""
        return self._table("heldout", ["step", "task", "loss", "tokens"])

    def sample_answers(self) -> pd.DataFrame:
        """Answers to held-out questions: step, id, task, question, answer, reference."""
        return self._table("samples", ["step", "id", "task", "question", "answer", "reference"])

    def _table(self, name, columns):
        import pandas as pd

        path = self.folder / f"{name}.jsonl"
        # A run that has just started has empty files, which pandas refuses.
        if not path.is_file() or not path.stat().st_size:
            return pd.DataFrame(columns=columns)
        try:
            # Elsewhere a text of digits, such as an id or an answer, is not a number.
            return pd.read_json(path, lines=True, dtype=name == "metrics")
        except ValueError:
            message = f"{shown(path)} is damaged: restore it from a copy, or delete it."
            raise ValueError(message) from None

    def load_model(self) -> nn.Module:
        """Load the trained model, on the GPU if there is one."""
        import torch

        from vflan.models.llava import load_model

        self._require_finished()
        recipe = self.recipe
        model = load_model(recipe, self)
        # The loader has already put a quantised model on the GPU.
        if torch.cuda.is_available() and model.device.type == "cpu":
            model.to("cuda")
        if recipe.precision == "bf16" and recipe.device != "cpu" and model.device.type == "cpu":
            from vflan.training.gpus import find_problem

            words = "was trained in bf16 and now computes in fp32, on the CPU"
            io.say(f"{self.name} {words}: {find_problem()}")
        return model

    def processor(self) -> LlavaProcessor:
        """Load the processor: tokenizer with chat template, and image preparation by Pillow."""
        from transformers import AutoProcessor

        from vflan.models.weights import read_pretrained

        self._require_finished()
        return read_pretrained(AutoProcessor, self.folder / "model", backend="pil")

    def at(self, step: int | None = None) -> Run:
        """Make a finished run `NAME-stepN` of the newest checkpoint, or of that of `step`.

        Use it to look at a run that still trains or was killed: it loads, answers and is evaluated
        like any other.
        """
        from vflan.models import llava as models
        from vflan.training import checkpointing

        checkpoint = checkpointing.newest(self.folder, step)
        if checkpoint is None:
            which = "a checkpoint" if step is None else f"a checkpoint of step {step}"
            raise FileNotFoundError(
                f"{self.name} has not {which}; "
                "with save_every, a run keeps its last two while it trains."
            )
        path, step = checkpoint[0], checkpoint[1]["step"]
        recipe, record = self.recipe, read_json(self.folder / "init.json")
        init, other = record.get("init"), Run(self.folder.with_name(f"{self.name}-step{step}"))
        # `start` refuses a folder of that name with other contents, and reuses one made before.
        with other.start(replace(recipe, name=other.name), record):
            if not other.finished:
                # Trained weights go into the model as it was before quantisation.
                unquantised = replace(recipe, bits=16)
                weights = checkpointing.read_weights(path)
                model = checkpointing.trained_model(unquantised, init, weights)
                metrics = (self.folder / "metrics.jsonl").read_text(encoding="utf-8")
                lines = "".join(metrics.splitlines(keepends=True)[:step])
                (other.folder / "metrics.jsonl").write_text(lines, encoding="utf-8")
                processor = models.load_processor(unquantised, model)
                other.finish(model, processor, unquantised, init, steps=step)
        return other

    def plot(self) -> Figure:
        """Draw the loss over the steps so far (vflan.analysis.plots.loss_curve)."""
        from vflan.analysis.plots import loss_curve

        return loss_curve(self)

    def export(self, folder: str | Path, merge: bool = True) -> Path:
        """Write a folder for others, with a model card and a data card, and return it.

        Prints how to serve it. `transformers.pipeline("image-text-to-text")`, vLLM and `push` take
        the folder as it is. merge=False exports only the adapter of a LoRA run, for
        `PeftModel.from_pretrained` on the model that the run started from.
        """
        from vflan.tools.export import export_run

        self._require_finished()
        return export_run(self, folder, merge)

    def push(self, repo: str, private: bool = True, merge: bool = True) -> str:
        """Upload the export to the Hugging Face hub as "user/name"; return the address of its page.

        The token comes from HF_TOKEN or `hf auth login`. Keep it private until you have read the
        card and the licences of the data.
        """
        from vflan.tools.export import push_run

        self._require_finished()
        return push_run(self, repo, private, merge)

    def keep(self, what: str) -> Run:
        """Delete the weights of this finished run, except `what`: model, adapter or nothing.

        Recipe, losses, answers and scores stay, and so does what belongs to the model but is small.
        A run that has lost its model is scored again from its answers; it answers no new question,
        and no other run starts from it. "adapter" is for LoRA runs: adapters and projector stay.
        """
        from vflan.tools.keeping import keep_only

        self._require_finished()
        keep_only(self, what)
        return self

    def finish(
        self,
        model: nn.Module,
        processor: LlavaProcessor,
        recipe: Recipe,
        init: str | None,
        **summary: object,
    ) -> None:
        """Write the model, then done.json with a summary, and delete the checkpoints."""
        from vflan.models import llava as models
        from vflan.models.weights import sign
        from vflan.training.checkpointing import flush

        scratch, metrics = self.folder / ".model", self.metrics()
        # A projector that was trained elsewhere has no steps here.
        summary |= dict(tokens=0, first_loss=None, last_loss=None)
        if len(metrics):
            first, tokens = float(metrics.loss.iloc[0]), int(metrics.tokens.sum())
            # One step's loss depends on its rows; the mean of ten says more.
            last = float(metrics.loss.iloc[-10:].mean())
            summary |= dict(tokens=tokens, first_loss=first, last_loss=last)
        parts = models.parts(model).items()
        summary["parts"] = {name: models.fingerprint(part) for name, part in parts}
        with explain_full_disk(self.folder):
            # A killed process may have left parts of a model here.
            for folder in (scratch, self.folder / "model", self.folder / "adapter"):
                io.clear(folder, io.MODEL)
            if recipe.lora_r:
                models.save_adapter(model, recipe, self.folder / "adapter")
            models.export(model, processor, recipe, scratch, init)
            written = {"model": scratch}
            if recipe.lora_r:
                written["adapter"] = self.folder / "adapter"
            # The weights reach the disk before the model's rename, which comes before done.json.
            for folder in written.values():
                flush(folder)
            # With these, a bit that the disk loses is noticed when the model is loaded.
            summary["files"] = {
                f"{part}/{name}": digest
                for part, folder in written.items()
                for name, digest in io.digests(folder).items()
            }
            scratch.replace(self.folder / "model")
            write_json(self.folder / "done.json", sign(summary))
        io.clear(self.folder / "checkpoints", io.CHECKPOINTS)
        io.clear(self.folder / "rows", io.ROWS)

    @contextmanager
    def lock(self, reenter: bool = False) -> Iterator[None]:
        """Hold the folder for this process; RuntimeError if another one trains here.

        The system releases the lock of a process that dies. reenter: a thread that holds it already
        may enter again.
        """
        holder = (os.getpid(), threading.get_ident(), os.path.realpath(self.folder))
        if reenter and holder in _HELD:
            yield
            return
        lock = self.folder / ".lock"
        not_ours = f"{shown(lock)} is not vflan's lock file: move it away, or choose another name."
        if lock.is_symlink() or lock.exists() and not lock.is_file():
            raise FileExistsError(not_ours)
        with lock.open("a+", encoding="utf-8", errors="replace") as file:
            self._acquire(file)
            # Only a file with our own line in it is overwritten.
            file.seek(0)
            if not re.match(r"process \d+ on |$", file.read(200)):
                raise FileExistsError(not_ours)
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}")
            file.flush()
            # Delete the JSON files that a killed process was writing.
            for partial in self.folder.glob(".*.json.*"):
                if re.fullmatch(r"\.(recipe|init|mixture|done)\.json\.\d+", partial.name):
                    partial.unlink(missing_ok=True)
            _HELD.add(holder)
            try:
                yield
            finally:
                _HELD.discard(holder)

    def _acquire(self, file):
        # Not filelock: it truncates the file at each attempt, and with it the name of the process
        # that holds the lock.
        import fcntl

        deadline = time.monotonic() + PATIENCE
        while True:
            try:
                with io.explain_no_locks(self.folder):
                    return fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if time.monotonic() > deadline:
                    file.seek(0)
                    holder = file.read() or "another process"
                    raise RuntimeError(
                        f"{shown(self.folder)} is being trained by {holder}; "
                        "wait for it, or give this run another name."
                    ) from None
                time.sleep(0.1)

    @contextmanager
    def start(self, recipe: Recipe, init_record: dict) -> Iterator[None]:
        """Lock the folder and write recipe.json and init.json (`init_record`) into it.

        A finished run of the same recipe stays as it is. What is left of another recipe's failed
        start is deleted. ValueError if the folder holds another recipe's run, FileExistsError if it
        holds files that vflan did not write; then nothing is changed.
        """
        # A finished run is only read, which needs no lock.
        if self.finished and not self._changes(recipe, init_record):
            yield
            return
        self._check_folder(recipe, init_record)
        io.make_folder(self.folder)
        with self.lock():
            # Another process may have started a run here before we had the lock.
            changes = self._check_folder(recipe, init_record)
            if not self.finished:
                if changes:
                    self._delete_failed_start()
                write_json(self.folder / "recipe.json", recipe.to_dict())
                write_json(self.folder / "init.json", init_record)
            yield

    def start_record(self) -> dict:
        """Return recipe.json and init.json merged; {} without them."""
        return read_json(self.folder / "recipe.json") | read_json(self.folder / "init.json")

    def _changes(self, recipe, init_record) -> str:
        """List how `recipe` and `init_record` differ from the files here; empty if they do not."""
        before = self.start_record()
        return differences(before, recipe.to_dict() | init_record) if before else ""

    def _check_folder(self, recipe, init_record) -> str:
        """Return how this recipe differs from the files here; raise if it must not start here."""
        where = shown(self.folder)
        if not self.folder.is_dir():
            return ""
        # Without our recipe.json, the folder may hold nothing but what a killed start left.
        if not MARKERS <= read_json(self.folder / "recipe.json").keys():
            if files := io.foreign(self.folder, io.BEGINNING):
                raise FileExistsError(
                    f"{where} is not a run of vflan: it holds {io.named(files)}. "
                    "Nothing was changed; give this run another name, or move these files away."
                )
            return ""
        changes = self._changes(recipe, init_record)
        if not changes:
            return ""
        # Trained steps are never deleted, only a start that failed before the first checkpoint.
        if self.finished or any((self.folder / "checkpoints").glob("step-*")):
            raise ValueError(
                f"{where} holds another recipe's run:\n{changes}\n"
                f"Give this one a new name, or delete {where}."
            )
        linked = self.folder.is_symlink()
        if files := [str(self.folder)] if linked else io.foreign(self.folder, io.RUN):
            raise FileExistsError(
                f"{where} holds the start of another recipe's run, and files that vflan did not "
                f"write or that are behind a link: {io.named(files)}. Nothing was deleted; "
                f"give this run another name, or move them away.\n{changes}"
            )
        return changes

    def _delete_failed_start(self):
        for path in self.folder.iterdir():
            # `clear` deletes only files that match our patterns for this folder.
            if path.is_dir():
                inside = f"{path.name}/"
                io.clear(
                    path, [name.removeprefix(inside) for name in io.RUN if name.startswith(inside)]
                )
            elif path.name != ".lock":
                path.unlink()

    def _require_finished(self):
        if not self.finished:
            raise FileNotFoundError(
                f"{self.name} is not finished; "
                "train it to the end, or use its last checkpoint: run.at()."
            )


@contextmanager
def explain_full_disk(folder: Path) -> Iterator[None]:
    """Turn the many errors of a full disk into one OSError, and delete partial files.

    folder: the run folder that the block writes into.
    """
    try:
        yield
    except Exception as error:
        if not (limit := io.no_room(error)):
            raise
        from vflan.training.checkpointing import list_checkpoints

        io.clear(folder / ".model", io.MODEL)
        io.clear(folder / "checkpoints" / ".part", io.CHECKPOINT)
        io.clear(folder / ".rows", io.ROWS)
        state = "it has no checkpoint yet"
        if checkpoints := list_checkpoints(folder):
            state = f"its last checkpoint, {checkpoints[0].name}, is intact"
        cause, cure = limit.capitalize().split(": ")
        sentence = (
            f"{cause}: cannot write more to {shown(folder)}; {state}. "
            f"{cure.capitalize()} and train it again"
        )
        raise OSError(errno.ENOSPC, sentence) from None
