"""Deletes the model of a finished run, which is most of what the run takes on the disk."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from vflan.config import shown, write_json
from vflan.evaluation.answer_cache import hash_weights
from vflan.io import MODEL, foreign, named
from vflan.models.weights import sign
from vflan.training.run import Run

KEEPS = ("model", "adapter", "nothing")
WEIGHTS = ("*.safetensors", "*.safetensors.index.json")


def check_keep(what: str) -> None:
    """Raise ValueError for a word that `Run.keep` does not know."""
    if what not in KEEPS:
        raise ValueError(f"keep={what!r}: choose one of {', '.join(KEEPS)}.")


def keep_only(run: Run, what: str) -> None:
    """Delete the weights that `what` does not name; see `Run.keep`."""
    check_keep(what)
    if what == "model":
        return
    model, adapter = run.folder / "model", run.folder / "adapter"
    if what == "adapter" and not any(adapter.glob("*.safetensors")):
        raise ValueError(
            f"{run.name} has no adapter, because it was not tuned with LoRA or kept nothing; "
            "keep the model, or nothing."
        )
    folders = [model] if what == "adapter" else [model, adapter]
    with run.lock(reenter=True):
        # Everything is looked at before anything is deleted.
        files = [file for folder in folders for file in _weights_of(folder)]
        done = run.summary
        # Cached answers are recognised by this hash. Written first, so that a process killed below
        # leaves no run that passes for complete.
        done.setdefault("weights", hash_weights(model))
        gone = {file.relative_to(run.folder).as_posix() for file in files}
        sums = {name: each for name, each in done.get("files", {}).items() if name not in gone}
        write_json(run.folder / "done.json", sign(done | dict(files=sums, kept=what)))
        for file in files:
            file.unlink()


def keep_in_all(runs: Iterable[Run], what: str, stages: Iterable[str]) -> None:
    """Apply `Run.keep` to finished runs, but not to the `stages`, from which others start.

    "adapter": a run without LoRA keeps its model.
    """
    for run in runs:
        is_stage = run.name.partition("-seed")[0] in stages
        if is_stage or "kept" in run.summary or what == "adapter" and not run.recipe.lora_r:
            continue
        run.keep(what)


def _weights_of(folder: Path) -> list[Path]:
    """The files of weights that vflan wrote into a folder; FileExistsError if it holds others."""
    if folder.is_symlink():
        raise FileExistsError(f"{shown(folder)} is a link, so nothing was deleted there.")
    if not folder.is_dir():
        return []
    if others := foreign(folder, MODEL):
        raise FileExistsError(
            f"{shown(folder)} holds files that vflan did not write: {named(others)}. "
            "Nothing was deleted; move them away."
        )
    return sorted(file for pattern in WEIGHTS for file in folder.glob(pattern))
