"""Training: `train` for people, `fit` for each process. Plain PyTorch and Accelerate, the loop on one screen."""

import argparse
import json
import math
import os
import shutil
import sys
import time
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import nn
from torch.distributed.checkpoint import state_dict as dcp

from vflan import model as models
from vflan.batches import Pictures, feed, plan, prepare
from vflan.learner import Learner
from vflan.recipe import Recipe, differences, resolve, shown
from vflan.runs import Run, launch, read_json, write_json

_FULL = dcp.StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True, strict=False)


def train(recipe: Recipe, init: Run | str | None = None, num_processes: int = 1) -> Run:
    """Train a recipe, from the weights of `init` (a Run) if given, and return its Run.

    A finished run is read, not trained again; the same folder asked for with another recipe is an error that names the
    fields. With `num_processes` > 1 child processes do the work, on the same global batches.
    """
    run, start = Run(recipe.folder), _started_from(init)
    if (run.folder / "recipe.json").is_file():
        old = read_json(run.folder / "recipe.json") | read_json(run.folder / "init.json")
        changed = differences(old, recipe.to_dict() | start)
        if changed and (run.finished or _checkpoint(run).exists()):
            where = shown(run.folder)
            raise ValueError(
                f"{where} holds another recipe's run:\n{changed}\nGive this one a new name, or delete {where}."
            )
        if run.finished:
            return run
        if changed:
            shutil.rmtree(run.folder)
    if recipe.global_batch % num_processes:
        raise ValueError(
            f"global_batch={recipe.global_batch} cannot be shared out evenly over {num_processes} processes."
        )
    run.folder.mkdir(parents=True, exist_ok=True)
    write_json(run.folder / "recipe.json", recipe.to_dict())
    write_json(run.folder / "init.json", start)
    if num_processes == 1:
        with torch.random.fork_rng():  # the caller's random numbers are the caller's
            fit(run.folder)
    else:
        launch(run.folder, num_processes)
    if not run.finished:
        raise RuntimeError(f"{shown(run.folder)}: training ended without a finished run.")
    return run


def fit(folder, num_processes: int | None = None) -> None:
    """Train the run that `folder` describes; every process of a distributed run calls this."""
    run, clock = Run.open(folder), time.perf_counter()
    recipe, init = run.recipe, read_json(run.folder / "init.json").get("init")
    accelerator = _accelerator(recipe)
    world, rank, device = accelerator.num_processes, accelerator.process_index, accelerator.device
    if num_processes not in (None, world):
        raise RuntimeError(f"{num_processes} processes were asked for, but {world} found each other.")
    if run.finished:
        return

    model = models.load_model(recipe, init)
    processor = models.load_processor(recipe, model)
    models.freeze(model, recipe)
    with accelerator.main_process_first():
        data = prepare(recipe, processor.tokenizer, model.config, run.folder, judge=accelerator.is_main_process)
    pictures = Pictures(data, model.to(device), processor, recipe)
    learner, sharded = Learner(model, recipe), _is_sharded(recipe, world)
    if sharded:
        models.shard(learner, recipe)
    else:
        learner = accelerator.prepare(learner)
    optimizer, frozen = _optimizer(model, recipe), _fingerprint_frozen(model)
    batches = plan(data, recipe)
    first = _resume(run, learner, optimizer, sharded) if _checkpoint(run).exists() else 0
    log = _Log(run, len(batches), first, accelerator.is_main_process)

    learner.train()
    steps = feed(data, pictures, batches, recipe, rank, world, first)
    for step, (rows, parts) in enumerate(zip(batches[first:], steps), first):
        torch.manual_seed(hash((recipe.seed, step, rank)))  # for dropout: a resumed run repeats it exactly
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * learning_rate(step, len(batches), recipe)
        tokens, total = int(data.supervised[rows].sum()), torch.zeros((), device=device)
        for i, (part, weight) in enumerate(parts, 1):
            last = i == len(parts)
            if sharded:
                learner.set_requires_gradient_sync(last)
            with nullcontext() if last or sharded else accelerator.no_sync(learner), accelerator.autocast():
                loss = learner(*data.batch(part, device), pictures(part)) / weight
                accelerator.backward(loss * world)  # gradients are averaged over processes
            total += loss.detach()
        total = accelerator.reduce(total).item()
        if not math.isfinite(total):
            names = ", ".join(data.ids[row] for row in rows)
            raise FloatingPointError(f"The loss is {total} in step {step + 1}, samples {names}.")
        if recipe.max_grad_norm:
            nn.utils.clip_grad_norm_([w for w in learner.parameters() if w.requires_grad], recipe.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        log(step + 1, total, optimizer.param_groups[0]["lr"], tokens)
        if recipe.save_every and (step + 1) % recipe.save_every == 0 and step + 1 < len(batches):
            _save(run, learner, optimizer, step + 1, accelerator, sharded)
    log.close()

    assert _fingerprint_frozen(model) == frozen, "a frozen part moved during training"
    whole = dcp.get_model_state_dict(learner, options=replace(_FULL, ignore_frozen_params=False)) if sharded else None
    if accelerator.is_main_process:
        if sharded:
            model = models.load_model(recipe, init).float()
            model.load_state_dict({name.removeprefix("model."): weight for name, weight in whole.items()})
        summary = dict(seconds=round(time.perf_counter() - clock, 1), processes=world, sharded=sharded)
        summary |= dict(rows=len(data.ids), bad=data.bad, repaired=data.repaired)
        _finish(run, recipe, model, processor, init, log, summary)
    accelerator.wait_for_everyone()


def learning_rate(step: int, steps: int, recipe: Recipe) -> float:
    """Share of the peak in `step` (from 0): a linear rise over ceil(warmup_ratio * steps), then half a cosine to zero."""
    warmup = math.ceil(recipe.warmup_ratio * steps)
    if step < warmup:
        return step / warmup
    if recipe.schedule == "constant":
        return 1.0
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def _optimizer(model, recipe):
    projector, groups = {id(w) for w in models.parts(model)["projector"].parameters()}, {}
    for weight in model.parameters():
        if weight.requires_grad:
            groups.setdefault((id(weight) in projector, weight.ndim > 1), []).append(weight)
    peak = {True: recipe.lr if recipe.projector_lr is None else recipe.projector_lr, False: recipe.lr}
    decay = {True: recipe.weight_decay, False: 0.0}  # norms and biases do not decay
    options = [dict(params=w, peak=peak[ours], weight_decay=decay[matrix]) for (ours, matrix), w in groups.items()]
    if recipe.optimizer == "adamw_8bit":
        from bitsandbytes.optim import AdamW8bit

        return AdamW8bit(options, lr=recipe.lr)
    return torch.optim.AdamW(options, lr=recipe.lr, fused=True)


def _accelerator(recipe) -> Accelerator:
    AcceleratorState._reset_state()  # a notebook trains several recipes in one process
    half = models.compute_dtype(recipe) == torch.bfloat16
    return Accelerator(cpu=not torch.cuda.is_available(), mixed_precision="bf16" if half else "no")


def _is_sharded(recipe, world: int) -> bool:
    """A fully tuned language model needs 16 bytes a weight, too much for one GPU from 7B on: it is shared out."""
    wanted = torch.cuda.is_available() or os.environ.get("VFLAN_SHARD") == "1"  # the variable: to test it on CPUs
    return wanted and world > 1 and "language_model" in recipe.tune and not recipe.lora_r


def _fingerprint_frozen(model) -> str:
    return models.fingerprint((name, w) for name, w in model.named_parameters() if not w.requires_grad)


def _checkpoint(run) -> Path:
    return run.folder / "checkpoint.pt"


def _save(run, learner, optimizer, step, accelerator, sharded):
    if sharded:
        weights, moments = dcp.get_state_dict(learner, optimizer, options=_FULL)
    else:  # by hand: torch's own helper stumbles over 8-bit layers
        weights = {name: weight for name, weight in learner.named_parameters() if weight.requires_grad}
        moments = optimizer.state_dict()
    if accelerator.is_main_process:
        scratch = _checkpoint(run).with_suffix(".part")
        torch.save(dict(step=step, weights=weights, moments=moments), scratch)
        scratch.replace(_checkpoint(run))
    accelerator.wait_for_everyone()


def _resume(run, learner, optimizer, sharded) -> int:
    saved = torch.load(_checkpoint(run), map_location="cpu", weights_only=True)
    weights, moments = saved["weights"], saved["moments"]
    if sharded:
        dcp.set_state_dict(learner, optimizer, model_state_dict=weights, optim_state_dict=moments, options=_FULL)
    else:
        learner.load_state_dict(weights, strict=False)
        optimizer.load_state_dict(moments)
    return saved["step"]


def _finish(run, recipe, model, processor, init, log, summary):
    """Write the model, then what is worth knowing of the run; done.json comes last, and whole."""
    scratch, losses = run.folder / ".model", [line["loss"] for line in log.lines()]
    for folder in (scratch, run.folder / "model"):
        shutil.rmtree(folder, ignore_errors=True)
    summary |= dict(steps=len(losses), tokens=log.tokens, first_loss=losses[0], last_loss=float(np.mean(losses[-10:])))
    summary["parts"] = {name: models.fingerprint(part) for name, part in models.parts(model).items()}
    models.export(model, processor, recipe, scratch, init)
    scratch.replace(run.folder / "model")
    write_json(run.folder / "done.json", summary)
    _checkpoint(run).unlink(missing_ok=True)


class _Log:
    """metrics.jsonl, and one live line: a bar on a terminal, elsewhere a plain line a minute at most."""

    def __init__(self, run, steps, first, active):
        self.name, self.steps, self.active, self.path = run.name, steps, active, run.folder / "metrics.jsonl"
        self.began = self.said = time.perf_counter()
        if active:
            kept = self.lines()[:first] if first else []
            self.path.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")
            self.tokens = sum(line["tokens"] for line in kept)
            self.file, self.bar = self.path.open("a", buffering=1, encoding="utf-8"), None
            if sys.stderr.isatty():
                from tqdm import tqdm

                self.bar = tqdm(total=steps, initial=first, desc=run.name)

    def lines(self):
        return [json.loads(line) for line in self.path.read_text(encoding="utf-8").splitlines()]

    def __call__(self, step, loss, lr, tokens):
        if not self.active:
            return
        now = time.perf_counter()
        line = dict(step=step, loss=round(loss, 6), lr=lr, tokens=tokens, seconds=round(now - self.began, 3))
        self.file.write(json.dumps(line) + "\n")
        self.tokens += tokens
        if self.bar is not None:
            self.bar.set_postfix(loss=f"{loss:.3f}", refresh=False)
            self.bar.update()
        elif now - self.said > 60:
            self.said = now
            print(f"{self.name}: step {step} of {self.steps}, loss {loss:.3f}", flush=True)

    def close(self):
        if self.active:
            self.file.close()
            if self.bar is not None:
                self.bar.close()


def _started_from(init) -> dict:
    """What a run remembers of the run it begins with: where it is, and which weights were in it."""
    if init is None:
        return dict(init=None, init_weights=None)
    if not isinstance(init, Run) and not (resolve(init) / "recipe.json").is_file():  # LLaVA's own file or folder
        projector = models.read_projector(init).items()
        return dict(init=shown(resolve(init)), init_weights=dict(projector=models.fingerprint(projector)))
    init = init if isinstance(init, Run) else Run.open(init)
    if not init.finished:
        raise ValueError(f"{shown(init.folder)} is not finished; train it to the end before starting from it.")
    return dict(init=shown(init.folder), init_weights=init.summary["parts"])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m vflan.train", description="Train the run that a folder describes.")
    parser.add_argument("folder")
    parser.add_argument("--processes", type=int, default=None, help="fail unless so many processes take part")
    arguments = parser.parse_args()
    fit(arguments.folder, arguments.processes)
