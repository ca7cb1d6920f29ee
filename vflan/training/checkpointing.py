"""Checkpoints: everything a killed run needs to continue bit for bit. None is ever incomplete.

A run's `checkpoints` folder keeps the last two, each in a folder `step-N`. It holds one file of
tensors for every process that has weights of its own (a sharded run: its own rows of each weight),
and checkpoint.json with the step, the recipe, the code, a hash of the data in training order, and
the checksums of the files. Random numbers depend only on seed, step and rank; learning rate and
rows depend only on the step. So none of these needs saved state.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import zlib
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from accelerate.utils import broadcast_object_list, gather_object
from torch.distributed.tensor import DTensor, Shard

from vflan.config import Recipe, read_json, shown, write_json
from vflan.io import CHECKPOINT, clear, say
from vflan.models import llava as models
from vflan.models.weights import load_tensors

if TYPE_CHECKING:
    from torch import nn

    from vflan.training.batching import Batches, Data
    from vflan.training.distributed import TrainState

KEPT = 2  # the one before stays, in case the newest turns out to be damaged


def describe(recipe: Recipe, state: TrainState, data: Data, batches: Batches) -> dict:
    """Return what a checkpoint records, beside step and files, to recognise its run."""
    # The hash covers every row's tokens and the order of the steps, of a very long run the first.
    digest = hashlib.sha256("\0".join(data.ids).encode())
    for column in (data.tokens, data.learned, data.start):
        digest.update(column.tobytes())
    for rows in batches.beginning:
        digest.update(np.asarray(rows, dtype=np.int64).tobytes() + b"\0")
    processes = state.accelerator.num_processes
    record = dict(data=digest.hexdigest(), recipe=recipe.to_dict())
    return record | dict(processes=processes, sharding=state.sharding)


def versions() -> dict[str, str]:
    """Return a hash of this package's source and PyTorch's version, which decide the last bits."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parents[1].rglob("*.py")):
        digest.update(path.read_bytes())
    return dict(code=digest.hexdigest()[:12], torch=torch.__version__)


def _conditions() -> dict[str, str | int]:
    """What decides the last bits, beside the machine: sums on a CPU are shared among threads."""
    return versions() | dict(threads=torch.get_num_threads())


def save_checkpoint(folder: Path, step: int, state: TrainState, metadata: dict) -> None:
    """Write checkpoint `step` of the run in `folder`. Every process calls this."""
    home, accelerator = folder / "checkpoints", state.accelerator
    scratch, target = home / ".part", home / f"step-{step:08d}"
    # The main process makes the folder in which all processes write.
    if accelerator.is_main_process:
        clear(scratch, CHECKPOINT)
        scratch.mkdir(parents=True)
    accelerator.wait_for_everyone()
    # Each process hashes its own files, so that nobody reads the shards of the others.
    written = _write(scratch, state)
    files = gather_object([(str(path.relative_to(scratch)), _checksum(path)) for path in written])
    if accelerator.is_main_process:
        record = metadata | _conditions() | dict(step=step, files=dict(files))
        write_json(scratch / "checkpoint.json", record | dict(crc=_crc(record)))
        # All files reach the disk before the rename: a crash leaves no partial checkpoint.
        flush(scratch)
        # The target exists only if it was damaged and the run went back to an earlier checkpoint.
        clear(target, CHECKPOINT)
        scratch.replace(target)
        flush(home)
        for old in list_checkpoints(folder)[KEPT:]:
            clear(old, CHECKPOINT)
    accelerator.wait_for_everyone()


def _write(scratch, state) -> list[Path]:
    """Write this process's files. They hold plain tensors, so that loading them runs no code."""
    accelerator = state.accelerator
    if state.sharding.startswith("zero"):
        # DeepSpeed writes in its own format.
        where = str(scratch / "zero")
        state.learner.save_checkpoint(where, tag="state", exclude_frozen_parameters=True)
        accelerator.wait_for_everyone()
        files = [path for path in scratch.rglob("*") if path.is_file()]
        return files if accelerator.is_main_process else []
    # Replicas are equal, so one of them is enough.
    if state.sharding == "none" and not accelerator.is_main_process:
        return []
    trained = _trained_weights(state.model)
    sharded = all(isinstance(weight, DTensor) for weight in trained.values())
    if state.sharding != "none" and not sharded:
        raise RuntimeError("The weights are not sharded now, so this process cannot save its part.")
    # The state dict holds the learning rates as they are, and two moments of each weight.
    moments = state.optimizer.state_dict()
    moments["state"] = {
        i: {key: _local(value) for key, value in values.items()}
        for i, values in moments["state"].items()
    }
    weights = {name: _local(weight) for name, weight in trained.items()}
    path = scratch / f"{accelerator.process_index}.pt"
    with path.open("wb") as file:
        torch.save(dict(weights=weights, moments=moments), file)
        file.flush()
        os.fsync(file.fileno())
    return [path]


def flush(path: Path) -> None:
    """Wait until a file, or a folder and everything in it, is on the disk."""
    for each in [*path.rglob("*"), path]:
        file = os.open(each, os.O_RDONLY)
        try:
            os.fsync(file)
        finally:
            os.close(file)


def list_checkpoints(folder: Path) -> list[Path]:
    """List a run's checkpoint folders, newest first, without checking them."""
    steps = (folder / "checkpoints").glob("step-*")
    return sorted((path for path in steps if re.fullmatch(r"step-\d{8,}", path.name)), reverse=True)


def newest(folder: Path, step: int | None = None) -> tuple[Path, dict] | None:
    """Find the newest intact checkpoint (or that of `step`): its folder and its checkpoint.json.

    Those with wrong checksums are reported and skipped. None if no checkpoint is left.
    """
    for path in list_checkpoints(folder):
        if step is not None and path.name != f"step-{step:08d}":
            continue
        # A file may be missing, cut short, or changed on the disk.
        try:
            record = read_json(path / "checkpoint.json")
            # Checkpoints of earlier versions have none.
            if record.pop("crc", None) not in (None, _crc(record)):
                raise ValueError("a bit of it changed")
            files = [(name, path / name, checksum) for name, checksum in record["files"].items()]
            bad = [name for name, f, sum_ in files if not f.is_file() or _checksum(f) != sum_]
        except (ValueError, KeyError, OSError):
            bad = ["checkpoint.json"]
        if not bad:
            return path, record
        say(f"{shown(path)} is damaged ({bad[0]}); trying the one before.")
    return None


def resume(folder: Path, state: TrainState, metadata: dict) -> int:
    """Restore the newest intact checkpoint; return the number of steps done (0 without one).

    ValueError if the data, or the sharding of ZeRO, is not that of the checkpoint.
    """
    main = state.accelerator.is_main_process
    # One process decides for all: on a shared disk, the others might see other files.
    message = [newest(folder) if main else None]
    broadcast_object_list(message)
    if message[0] is None:
        return 0
    path, before = message[0]
    where = f"{shown(folder)}, {path.name}"
    if before["data"] != metadata["data"]:
        raise ValueError(
            f"{where}: the samples, or their tokens, changed since this run began; "
            f"restore them, or delete {shown(folder)} to train again."
        )
    kind, processes = before["sharding"], before["processes"]
    same = (kind, processes) == (metadata["sharding"], metadata["processes"])
    # Our own shards can be distributed again over other processes; DeepSpeed's cannot.
    if not same and "zero" in kind + metadata["sharding"]:
        raise ValueError(
            f"{where} was written with sharding={kind!r} by {processes} processes; "
            "resume with the same."
        )
    if main:
        now = _conditions().items()
        # A checkpoint of an earlier version does not say how many threads wrote it.
        other = [(key, before[key], v) for key, v in now if before.get(key, v) != v]
        changes = "; ".join(f"{key} {old}, now {new}" for key, old, new in other)
        note = f" Since then, {changes}: the last bits may differ." if other else ""
        say(f"{folder.name} resumes after step {before['step']}.{note}")
    _restore(path, state)
    return before["step"]


def _restore(path, state) -> None:
    """Load weights and moments, over any number of processes (ZeRO: as many as before)."""
    if state.sharding.startswith("zero"):
        where = str(path / "zero")
        state.learner.load_checkpoint(where, tag="state", load_module_strict=False)
        return
    saved, trained = _read(path), _trained_weights(state.model)
    if other := trained.keys() ^ saved[0]["weights"].keys():
        raise ValueError(f"{shown(path)} holds the weights of another model ({min(other)}, ...).")
    with torch.no_grad():
        for name, weight in trained.items():
            weight.copy_(_shard_like(weight, [part["weights"][name] for part in saved]))
    # The optimizer numbers its weights in the order of its groups.
    moments = saved[0]["moments"]
    order = [weight for group in state.optimizer.param_groups for weight in group["params"]]
    for i, values in moments["state"].items():
        for key, value in values.items():
            if torch.is_tensor(value):
                shards = [part["moments"]["state"][i][key] for part in saved]
                values[key] = _shard_like(order[i], shards)
    state.optimizer.load_state_dict(moments)


def read_weights(path: Path) -> dict[str, torch.Tensor]:
    """Read the trained weights of a checkpoint: by name, unsharded, on the CPU."""
    if (path / "zero").is_dir():
        from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint as read

        whole = read(str(path / "zero"), exclude_frozen_parameters=True)
        return {name.removeprefix("model."): weight for name, weight in whole.items()}
    saved = _read(path)
    names = saved[0]["weights"]
    return {name: torch.cat([part["weights"][name] for part in saved]) for name in names}


def trained_model(recipe: Recipe, init: str | None, weights: dict[str, torch.Tensor]) -> nn.Module:
    """Load trained weights into the model that a run starts from; adapters stay unmerged."""
    # `freeze` adds the adapters, whose weights the checkpoint holds.
    model = models.load_model(recipe, init)
    models.freeze(model, recipe)
    if unknown := model.load_state_dict(weights, strict=False).unexpected_keys:
        raise RuntimeError(f"{unknown[0]} was trained but has no place in the model.")
    return model


def _trained_weights(model):
    return {name: weight for name, weight in model.named_parameters() if weight.requires_grad}


def _crc(record: dict) -> int:
    return zlib.crc32(json.dumps(record, sort_keys=True).encode())


def _checksum(path):
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _read(path):
    """Open the files of all processes, in order of rank; tensors are read when they are used."""
    files = sorted(path.glob("*.pt"), key=lambda file: int(file.stem))
    return [load_tensors(file) for file in files]


def _local(value):
    value = value.to_local() if isinstance(value, DTensor) else value
    return value.detach() if torch.is_tensor(value) else value


def _shard_like(weight, shards):
    """Put a saved tensor, which may be in shards of rows, into the layout of `weight`."""
    if not shards[0].ndim or not (isinstance(weight, DTensor) or len(shards) > 1):
        return shards[0].clone()
    start, stop = 0, sum(len(shard) for shard in shards)
    if isinstance(weight, DTensor):
        # FSDP2 divides rows as torch.chunk does: equal shards, the last ones shorter or empty.
        if weight.placements != (Shard(0),):
            raise RuntimeError(f"A weight is not shared out by rows, but as {weight.placements}.")
        size = math.ceil(stop / weight.device_mesh.size())
        start = min(stop, weight.device_mesh.get_local_rank() * size)
        stop = min(stop, start + size)
    # Slice each saved shard, so that only this process's own rows are read from the disk.
    slices, offset = [], 0
    for shard in shards:
        slices.append(shard[max(0, start - offset) : max(0, stop - offset)])
        offset += len(shard)
    rows = torch.cat(slices)  # (rows of this process, ...)
    if not isinstance(weight, DTensor):
        return rows
    layout = dict(device_mesh=weight.device_mesh, placements=weight.placements, run_check=False)
    layout |= dict(shape=weight.shape, stride=weight.stride())
    return DTensor.from_local(rows.to(weight.device), **layout)
