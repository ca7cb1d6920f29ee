"""Training: `train` for people, `fit` for each process. Plain PyTorch and Accelerate, the loop on one screen."""

import gc
import json
import math
import os
import sys
import time
import traceback
from contextlib import ExitStack, contextmanager, nullcontext

import torch
from accelerate.utils import broadcast_object_list
from torch import nn

from vflan.config import Recipe, one_recipe, read_json, resolve, shown
from vflan.models import llava as models
from vflan.models.loss import Learner
from vflan.training import checkpointing, distributed
from vflan.training.batching import Pictures, feed, plan, prepare
from vflan.training.distributed import launch
from vflan.training.metrics import Log
from vflan.training.run import Run
from vflan.training.validation import HeldOut, hold_out, task_names


def train(recipe: Recipe, init: Run | str | None = None, num_processes: int = 1) -> Run:
    """Train a recipe, from the weights of `init` (a Run) if given, and return its Run.

    A finished run is read, not trained again; one that was killed goes on from its last checkpoint; the same folder asked
    for with another recipe is an error that names the fields. With `num_processes` > 1 child processes do the work, on the
    same global batches. A script that torchrun has started, on one machine or on several that share the run's folder,
    trains with the processes it has.
    """
    one_recipe(recipe)
    run, together = Run(recipe.folder), distributed.world_size()
    if together > 1:
        distributed.check_processes(recipe, together)
        with (
            ExitStack() as held
        ):  # until the run is finished: the main process's `fit` holds the same lock
            with distributed.make_accelerator(recipe, run.folder).main_process_first():
                if os.environ["RANK"] == "0":
                    held.enter_context(run.begun(recipe, _started_from(init)))
            fit(run.folder)
        return run
    distributed.check_processes(recipe, num_processes)
    with run.begun(recipe, _started_from(init)):
        if not run.finished and num_processes == 1:
            # the caller's random numbers are the caller's
            with torch.random.fork_rng(), _memory_given_back():
                fit(run.folder)
    if not run.finished and num_processes > 1:
        launch(run.folder, num_processes)  # whose main process takes the lock
    if not run.finished:
        raise RuntimeError(f"{shown(run.folder)}: training ended without a finished run.")
    return run


@contextmanager
def _memory_given_back():
    """After this block no model that was trained in it is alive, though an error came out of it and is kept.

    Accelerate binds `forward` into a circle that only the collector finds, and it may not look for a long time; a
    notebook keeps the last error with its frames, which hold the model.
    """
    try:
        yield
    except BaseException as trouble:
        while trouble is not None:
            traceback.clear_frames(trouble.__traceback__)
            trouble = trouble.__cause__ or trouble.__context__
        raise
    finally:
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def fit(folder, num_processes: int | None = None) -> None:
    """Train the run that `folder` describes; every process of a distributed run calls this."""
    run = Run.open(folder)
    recipe, begun = run.recipe, json.loads(os.environ.get("VFLAN_BEGUN") or "{}") or run.written()
    distributed.check_processes(recipe, distributed.world_size())
    accelerator = distributed.make_accelerator(recipe, run.folder)
    if num_processes not in (None, accelerator.num_processes):
        raise RuntimeError(
            f"{num_processes} processes were asked for, but {accelerator.num_processes} found each other."
        )
    taken = f"{shown(run.folder)} was taken by another recipe; give this run a name of its own."
    if run.written() != begun:
        raise RuntimeError(taken)
    if run.finished:
        return
    with (
        run.alone(again=True) if accelerator.is_main_process else nullcontext(),
        checkpointing.full_disk_is_told(run.folder),
    ):
        # between the first look and the lock another process may have finished it, or begun another recipe
        if accelerator.is_main_process and run.written() != begun:
            raise RuntimeError(taken)
        finished = [run.finished]
        broadcast_object_list(finished)
        if not finished[0]:
            _fit(run, recipe, accelerator)


def _fit(run, recipe, accelerator):
    clock, init = time.perf_counter(), read_json(run.folder / "init.json").get("init")
    world, rank, device = accelerator.num_processes, accelerator.process_index, accelerator.device
    model = models.load_model(recipe, init)
    processor = models.load_processor(recipe, model)
    models.freeze(model, recipe)
    with accelerator.main_process_first():
        data = prepare(
            recipe, processor.tokenizer, model.config, run.folder, judge=accelerator.is_main_process
        )
    # what is shared out is put on the devices piece by piece; the tower each process keeps whole
    alone = distributed.sharding(recipe, world) == "none"
    (model if alone else models.parts(model)["vision_tower"]).to(device)
    pictures = Pictures(data, model, processor, recipe)
    spread = distributed.distribute(
        accelerator, Learner(model, recipe), lambda: _optimizer(model, recipe), recipe
    )
    learner, optimizer, frozen = spread.learner, spread.optimizer, _fingerprint_frozen(model)
    kept, heldout = hold_out(data.ids, recipe.heldout_rows)
    batches = plan(data, recipe, kept)
    about = dict(
        data=checkpointing.plan_hash(data, batches),
        recipe=recipe.to_dict(),
        processes=world,
        sharding=spread.sharding,
    )
    first = _resume(run, spread, about)
    log, look = Log(run.folder, len(batches), first, accelerator), None
    log.begin(recipe)
    if recipe.heldout_rows:
        # pictures of their own: what is held decides which of those to train on go through the tower together
        own = Pictures(data, model, processor, recipe)
        look = HeldOut(
            heldout, data, own, task_names(recipe, run.folder), recipe, processor.tokenizer, spread
        )
        if recipe.evaluate_every and not first:
            look(0, log)

    learner.train()
    steps = feed(data, pictures, batches, recipe, rank, world, first)
    for step, (rows, parts) in enumerate(zip(batches[first:], steps), first):
        began = time.perf_counter()
        _seed(
            hash((recipe.seed, step, rank)), device
        )  # for dropout: a resumed run repeats it exactly
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * learning_rate(step, len(batches), recipe)
        tokens = int(data.supervised[rows].sum())
        if not tokens:
            raise ValueError(
                f"There is no supervised token in step {step + 1}, samples {_names(data, rows)}."
            )
        sums = torch.zeros(2, device=device)
        for i, (part, weight) in enumerate(parts, 1):
            batch = data.batch(part, device)
            with spread.forward_pass(last=i == len(parts)):
                loss = learner(*batch, pictures(part)) / weight
                accelerator.backward(loss * world)  # gradients are averaged over processes
            sums += torch.stack([loss.detach().float(), sums.new_tensor(batch[0].numel())])
        total, positions = accelerator.reduce(sums).tolist()
        if not math.isfinite(total):
            raise FloatingPointError(
                f"The loss is {total} in step {step + 1}, samples {_names(data, rows)}."
            )
        if recipe.max_grad_norm and not spread.sharding.startswith(
            "zero"
        ):  # DeepSpeed clips itself
            nn.utils.clip_grad_norm_(
                [w for w in learner.parameters() if w.requires_grad], recipe.max_grad_norm
            )
        optimizer.step()
        optimizer.zero_grad()
        rates = dict(
            useful=int(data.lengths[rows].sum()),
            positions=positions,
            seconds=time.perf_counter() - began,
        )
        log.step(step + 1, total, optimizer.param_groups[0]["lr"], tokens, **rates)
        last = step + 1 == len(batches)
        if look and (last or _due(recipe.evaluate_every, step)):
            look(step + 1, log)
        if _due(recipe.save_every, step) or last and (recipe.save_every or not alone):
            log.sync()
            checkpointing.save(run.folder, step + 1, spread, **about)
    log.close()

    moved = [part for part, now in _fingerprint_frozen(model).items() if now != frozen[part]]
    assert not moved, f"a frozen part moved during training: {', '.join(moved)}"
    if accelerator.is_main_process:
        if not alone:  # each process holds a piece; the last checkpoint holds them all
            model = checkpointing.learned(
                recipe, init, checkpointing.weights(checkpointing.found(run.folder)[0])
            )
        summary = dict(
            seconds=round(time.perf_counter() - clock, 1), processes=world, sharding=spread.sharding
        )
        summary |= dict(
            steps=len(batches),
            rows=len(kept),
            heldout=len(heldout),
            bad=data.bad,
            repaired=data.repaired,
        )
        run.finish(model, processor, recipe, init, **summary)
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
    peak = {
        True: recipe.lr if recipe.projector_lr is None else recipe.projector_lr,
        False: recipe.lr,
    }
    decay = {True: recipe.weight_decay, False: 0.0}  # norms and biases do not decay
    options = [
        dict(params=w, peak=peak[ours], weight_decay=decay[matrix])
        for (ours, matrix), w in groups.items()
    ]
    if recipe.optimizer == "adamw_8bit":
        from bitsandbytes.optim import AdamW8bit

        return AdamW8bit(options, lr=recipe.lr)
    return torch.optim.AdamW(options, lr=recipe.lr, fused=True)


def _seed(value: int, device) -> None:
    """torch.manual_seed; on a CPU its generator alone, since the calls for absent devices format a traceback each."""
    if torch.device(device).type == "cpu":
        torch.default_generator.manual_seed(value)
    else:
        torch.manual_seed(value)


def _due(every: int, step: int) -> bool:
    return bool(every) and (step + 1) % every == 0


def _names(data, rows) -> str:
    return ", ".join(data.ids[row] for row in rows)


def _fingerprint_frozen(model) -> dict[str, str]:
    """For each part a hash of its weights that must stand still, under the part's name in words."""
    still = {
        part: [
            (name, weight) for name, weight in module.named_parameters() if not weight.requires_grad
        ]
        for part, module in models.parts(model).items()
    }
    return {part.replace("_", " "): models.fingerprint(weights) for part, weights in still.items()}


def _resume(run, spread, about) -> int:
    """The step to begin with: that after the newest whole checkpoint, whose weights and moments are put in place; else 0."""
    found = [None]
    if spread.accelerator.is_main_process:
        found = [checkpointing.newest(run.folder)]
    broadcast_object_list(found)
    if found[0] is None:
        return 0
    path, then = found[0]
    where = f"{shown(run.folder)}, {path.name}"
    if then["data"] != about["data"]:
        raise ValueError(
            f"{where}: the samples, or how they are tokenised, are not those it began with; "
            f"put them back, or delete {shown(run.folder)} to train anew."
        )
    before, now = ((each["sharding"], each["processes"]) for each in (then, about))
    if before != now and (before[0] + now[0]).count(
        "zero"
    ):  # the others' pieces can be laid out anew
        raise ValueError(
            f"{where} was written with sharding={before[0]!r} by {before[1]} processes; go on with the same."
        )
    if spread.accelerator.is_main_process:
        other = [
            f"{key} {then[key]}, now {now}"
            for key, now in checkpointing.versions().items()
            if then[key] != now
        ]
        changed = (
            f" It was written by other code ({'; '.join(other)}): the last bits may differ."
            if other
            else ""
        )
        print(
            f"{run.name} goes on after step {then['step']}.{changed}", file=sys.stderr, flush=True
        )
    checkpointing.restore(path, spread)
    return then["step"]


def _started_from(init) -> dict:
    """What a run remembers of the run it begins with: where it is, and which weights were in it."""
    if init is None:
        return dict(init=None, init_weights=None)
    if (
        not isinstance(init, Run) and not (resolve(init) / "recipe.json").is_file()
    ):  # LLaVA's own file or folder
        projector = models.read_projector(init).items()
        return dict(
            init=shown(resolve(init)), init_weights=dict(projector=models.fingerprint(projector))
        )
    init = init if isinstance(init, Run) else Run.open(init)
    if not init.finished:
        raise ValueError(
            f"{shown(init.folder)} is not finished; train it to the end before starting from it."
        )
    return dict(init=shown(init.folder), init_weights=init.summary["parts"])
