"""Checkpoints: all that a run needs to go on as if nothing had happened, whole or not there at all.

A run's `checkpoints` folder holds the last two, each a folder `step-N`: one file of tensors for every process that has a
part (a sharded run: each its own rows), and checkpoint.json with the step, the recipe, the code, a hash of the data in the
order of the plan, and the files' checksums. The random numbers of a step are decided by seed, step and process, and its
learning rate and rows by the step, so none of these has a state to keep.
"""

import errno
import hashlib
import math
import os
import re
import sys
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from accelerate.utils import gather_object
from torch.distributed.tensor import DTensor, Shard

from vflan.config import read_json, shown, write_json
from vflan.io import CHECKPOINT, MODEL, clear
from vflan.models import llava as models

KEPT = 2  # the one before stays, in case the newest turns out damaged


def save(folder: Path, step: int, spread, **about) -> None:
    """Write checkpoint `step` of the run in `folder`; every process calls this. `about` is kept in checkpoint.json."""
    home, accelerator = folder / "checkpoints", spread.accelerator
    scratch, place = home / ".part", home / f"step-{step:08d}"
    if accelerator.is_main_process:
        clear(scratch, CHECKPOINT)
        scratch.mkdir(parents=True)
    accelerator.wait_for_everyone()
    files = dict(
        gather_object(
            [(str(path.relative_to(scratch)), _digest(path)) for path in _write(scratch, spread)]
        )
    )
    if accelerator.is_main_process:
        write_json(scratch / "checkpoint.json", about | versions() | dict(step=step, files=files))
        flush(scratch)
        clear(place, CHECKPOINT)  # there only if it was found damaged
        scratch.replace(place)
        flush(home)
        for old in found(folder)[KEPT:]:
            clear(old, CHECKPOINT)
    accelerator.wait_for_everyone()


def found(folder: Path) -> list[Path]:
    """The folders of a run's checkpoints, newest first; not looked into."""
    steps = (folder / "checkpoints").glob("step-*")
    return sorted((path for path in steps if re.fullmatch(r"step-\d{8,}", path.name)), reverse=True)


def newest(folder: Path, step: int | None = None) -> tuple[Path, dict] | None:
    """The newest whole checkpoint (that of `step`, if given) and what its checkpoint.json says; None if there is none.

    One whose checksums are wrong is named and passed over.
    """
    for path in found(folder):
        if step is None or path.name == f"step-{step:08d}":
            try:
                about = read_json(path / "checkpoint.json")
                bad = [
                    name
                    for name, digest in about["files"].items()
                    if _digest(path / name) != digest
                ]
            except (ValueError, KeyError, OSError):
                bad = ["checkpoint.json"]
            if not bad:
                return path, about
            print(
                f"{shown(path)} is damaged ({bad[0]}); looking for the one before.",
                file=sys.stderr,
                flush=True,
            )
    return None


def restore(path: Path, spread) -> None:
    """Put a checkpoint's weights and moments back, over however many processes there now are (ZeRO: as many as before)."""
    if spread.sharding.startswith("zero"):
        spread.learner.load_checkpoint(str(path / "zero"), tag="state", load_module_strict=False)
        return
    saved = _read(path)
    learning = {
        name: weight for name, weight in spread.model.named_parameters() if weight.requires_grad
    }
    assert learning.keys() == saved[0]["weights"].keys(), (
        f"{path} holds the weights of another model"
    )
    with torch.no_grad():
        for name, weight in learning.items():
            weight.copy_(_like(weight, [part["weights"][name] for part in saved]))
    moments = saved[0]["moments"]
    order = [weight for group in spread.optimizer.param_groups for weight in group["params"]]
    for i, of in moments["state"].items():
        for key, value in of.items():
            if torch.is_tensor(value):
                of[key] = _like(order[i], [part["moments"]["state"][i][key] for part in saved])
    spread.optimizer.load_state_dict(moments)


def weights(path: Path) -> dict[str, torch.Tensor]:
    """The weights that a checkpoint's run has learned so far, by name, whole, on the CPU."""
    if (path / "zero").is_dir():
        from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

        whole = get_fp32_state_dict_from_zero_checkpoint(
            str(path / "zero"), exclude_frozen_parameters=True
        )
        return {name.removeprefix("model."): weight for name, weight in whole.items()}
    saved = _read(path)
    return {
        name: torch.cat([part["weights"][name] for part in saved]) for name in saved[0]["weights"]
    }


def learned(recipe, init, weights: dict):
    """The model that a run starts from, with what it has learned so far; adapters are not merged yet."""
    model = models.load_model(recipe, init)
    models.freeze(model, recipe)
    unknown = model.load_state_dict(weights, strict=False).unexpected_keys
    assert not unknown, f"{unknown[0]} was learned but has no place in the model"
    return model


def plan_hash(data, batches) -> str:
    """A hash of every row's tokens and of the order in which the whole plan takes them."""
    digest = hashlib.sha256("\0".join(data.ids).encode())
    for column in (data.tokens, data.learned, data.start):
        digest.update(column.tobytes())
    for rows in batches:
        digest.update(np.asarray(rows, dtype=np.int64).tobytes() + b"\0")
    return digest.hexdigest()


def versions() -> dict[str, str]:
    """What decides the last bits beside recipe and data: a hash of this package's source, and PyTorch's version."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parents[1].rglob("*.py")):
        digest.update(path.read_bytes())
    return dict(code=digest.hexdigest()[:12], torch=torch.__version__)


@contextmanager
def full_disk_is_told(folder: Path):
    """Around what writes into a run folder: a full disk ends in one sentence, and what was half written gives its room back."""
    try:
        yield
    except Exception as trouble:
        # safetensors and torch say it in their own words; torch's writer, cut off in the middle, only that it stands elsewhere
        words = ("No space left", "os error 28", "file write failed", "unexpected pos")
        full = getattr(trouble, "errno", None) in (errno.ENOSPC, errno.EDQUOT)
        if not full and not any(word in str(trouble) for word in words):
            raise
        clear(folder / ".model", MODEL)
        clear(folder / "checkpoints" / ".part", CHECKPOINT)
        last = found(folder)
        kept = (
            f"its last checkpoint, {last[0].name}, is whole" if last else "it has no checkpoint yet"
        )
        sentence = f"The disk is full: {shown(folder)} cannot be written further; {kept}. Make room and train it again"
        raise OSError(errno.ENOSPC, sentence) from None


def flush(path: Path) -> None:
    """Returns when a file, or a folder and all in it, is on the disk and not just on its way."""
    for each in [*path.rglob("*"), path]:
        file = os.open(each, os.O_RDONLY)
        try:
            os.fsync(file)
        finally:
            os.close(file)


def _write(scratch, spread) -> list[Path]:
    """This process's files: plain tensors only, so that loading them can run no code (DeepSpeed writes its own format)."""
    main, rank = spread.accelerator.is_main_process, spread.accelerator.process_index
    if spread.sharding.startswith("zero"):
        spread.learner.save_checkpoint(
            str(scratch / "zero"), tag="state", exclude_frozen_parameters=True
        )
        spread.accelerator.wait_for_everyone()
        return [path for path in scratch.rglob("*") if path.is_file()] if main else []
    if spread.sharding == "none" and not main:
        return []
    weights = {
        name: weight for name, weight in spread.model.named_parameters() if weight.requires_grad
    }
    assert spread.sharding == "none" or all(
        isinstance(weight, DTensor) for weight in weights.values()
    ), "not in pieces now"
    weights = {name: _local(weight) for name, weight in weights.items()}
    moments = spread.optimizer.state_dict()
    moments["state"] = {
        i: {key: _local(value) for key, value in of.items()} for i, of in moments["state"].items()
    }
    path = scratch / f"{rank}.pt"
    with path.open("wb") as file:
        torch.save(dict(weights=weights, moments=moments), file)
        file.flush()
        os.fsync(file.fileno())
    return [path]


def _digest(path):
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _read(path):
    """One entry for each process that wrote; the tensors stay on the disk until they are looked at."""
    files = sorted(path.glob("*.pt"), key=lambda file: int(file.stem))
    return [torch.load(file, map_location="cpu", weights_only=True, mmap=True) for file in files]


def _local(value):
    value = value.to_local() if isinstance(value, DTensor) else value
    return value.detach() if torch.is_tensor(value) else value


def _like(weight, parts):
    """A saved tensor, in parts by rows if it was sharded, laid out as `weight` is now."""
    if not parts[0].ndim or not (isinstance(weight, DTensor) or len(parts) > 1):
        return parts[0].clone()
    start, stop = 0, sum(len(part) for part in parts)
    if isinstance(weight, DTensor):  # FSDP2 shares out rows as torch.chunk does
        assert weight.placements == (Shard(0),)
        each = math.ceil(stop / weight.device_mesh.size())
        start = min(stop, weight.device_mesh.get_local_rank() * each)
        stop = min(stop, start + each)
    mine, at = [], 0
    for part in parts:  # a slice of each, so that nothing but this process's own rows is read
        mine.append(part[max(0, start - at) : max(0, stop - at)])
        at += len(part)
    mine = torch.cat(mine)
    if not isinstance(weight, DTensor):
        return mine
    layout = dict(device_mesh=weight.device_mesh, placements=weight.placements, run_check=False)
    return DTensor.from_local(
        mine.to(weight.device), shape=weight.shape, stride=weight.stride(), **layout
    )
