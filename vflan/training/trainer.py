"""Training: people call `train`, each process runs `fit`, and `_fit` holds the loop.

Plain PyTorch and Accelerate. One step is: set the learning rate, add up the gradients of the
micro-batches, clip, update, log; then validate and save if it is time.
"""

from __future__ import annotations

import gc
import json
import math
import os
import re
import time
import traceback
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch
from accelerate.utils import broadcast_object_list
from torch import nn

from vflan.config import Recipe, one_recipe, read_json, replace, resolve, shown
from vflan.models import llava as models
from vflan.models.image_features import Pictures
from vflan.models.loss import Learner
from vflan.training import checkpointing, distributed
from vflan.training.batching import batch_order, feed, prepare
from vflan.training.kept_rows import rows_of_run
from vflan.training.metrics import Log
from vflan.training.run import Run, explain_full_disk

if TYPE_CHECKING:
    from pathlib import Path


def train(recipe: Recipe, init: Run | str | None = None, num_processes: int = 1) -> Run:
    """Train a recipe, from the weights of `init` if given, and return its Run.

    A finished run is read, not trained again. A run that was killed goes on from its last
    checkpoint. ValueError names the fields if the folder holds a run of another recipe. With
    `num_processes` > 1, child processes train on the same global batches. A script started by
    torchrun, on one machine or on several that share the run's folder, trains with the processes it
    has.

    init: a finished Run or its folder, or a projector file or folder as LLaVA writes it.
    """
    one_recipe(recipe)
    run, started = Run(recipe.folder), distributed.world_size()
    distributed.check_processes(recipe, started if started > 1 else num_processes)
    # A finished run is only read, which needs no GPU.
    if not run.finished:
        distributed.check_device(recipe)
    if started > 1:
        _train_under_torchrun(run, recipe, init)
        return run
    with run.start(recipe, _describe_init(init)):
        if not run.finished and num_processes == 1:
            # Training must not change the caller's random numbers.
            with torch.random.fork_rng(), _free_memory_after():
                fit(run.folder)
    if not run.finished and num_processes > 1:
        # The main process of the children takes the lock that was just released.
        distributed.launch(run.folder, num_processes)
    if not run.finished:
        raise RuntimeError(f"{shown(run.folder)}: training ended without a finished run.")
    return run


def take_projector(recipe: Recipe, source: Run | str | os.PathLike | None = None) -> Run:
    """The run of a projector stage whose projector was trained elsewhere: no step is taken here.

    source: LLaVA's `mm_projector.bin`, the folder or hub id of one, or of a whole LLaVA-1.5, of
    which only the projector is taken. None: `recipe.pretrained`, as the run NAME-pretrained, so
    that NAME itself can still be trained. init.json names the source and holds the hash of its
    weights; done.json has 0 steps. ValueError if the projector does not fit between the recipe's
    backbones, or if the run was already trained here.
    """
    one_recipe(recipe)
    if source is None:
        recipe, source = pretrained_stage(recipe), recipe.pretrained
    run, (vision, text) = Run(recipe.folder), models.shapes(recipe)
    # Before the run's folder is made and the backbones are loaded.
    models.fitting_projector(source, vision.hidden_size, text.hidden_size)
    with run.start(recipe, _describe_init(source)):
        if not run.finished:
            with _free_memory_after():
                # Nothing learns, so that the weights are written as they came, never quantised.
                whole = replace(recipe, bits=16)
                model = models.swap_part(models.load_model(whole), "projector", source)
                processor = models.load_processor(whole, model)
                counts = dict(steps=0, rows=0, heldout=0, bad=0, repaired=0, seconds=0.0)
                run.finish(model, processor, whole, None, processes=1, **counts)
    return run


def pretrained_stage(recipe: Recipe) -> Recipe:
    """The recipe of the run that takes `recipe.pretrained`; ValueError if it names none."""
    if not recipe.pretrained:
        raise ValueError(
            f"{recipe.name} names no projector in `pretrained`: give take_projector one."
        )
    name = re.sub(r"(-seed\d+)?$", r"-pretrained\1", recipe.name, count=1)
    return replace(recipe, name=name)


def _train_under_torchrun(run, recipe, init):
    accelerator = distributed.make_accelerator(recipe, run.folder)
    # The main process holds the lock until the run is finished; its `fit` enters it again.
    with ExitStack() as lock:
        with accelerator.main_process_first():
            if accelerator.is_main_process:
                lock.enter_context(run.start(recipe, _describe_init(init)))
        with torch.random.fork_rng(), _free_memory_after():
            fit(run.folder)


@contextmanager
def _free_memory_after():
    """Make sure that no model trained in this block stays alive, even if an exception is kept.

    Accelerate puts `forward` into a reference cycle, which only the garbage collector frees. A
    notebook keeps the last exception with its frames, and those hold the model.
    """
    try:
        yield
    except BaseException as error:
        while error is not None:
            traceback.clear_frames(error.__traceback__)
            error = error.__cause__ or error.__context__
        raise
    finally:
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def fit(folder: str | Path, num_processes: int | None = None) -> None:
    """Train the run described in `folder`. Every process of a distributed run calls this.

    num_processes: how many are expected; RuntimeError if another number is there.
    """
    run = Run.open(folder)
    recipe = run.recipe
    begun = json.loads(os.environ.get("VFLAN_BEGUN") or "{}") or run.start_record()
    distributed.check_processes(recipe, distributed.world_size())
    accelerator = distributed.make_accelerator(recipe, run.folder)
    main = accelerator.is_main_process
    if num_processes not in (None, accelerator.num_processes):
        raise RuntimeError(
            f"{num_processes} processes were requested, "
            f"but {accelerator.num_processes} are connected."
        )
    _check_same_recipe(run, begun)
    if run.finished:
        return
    distributed.check_device(recipe)
    with run.lock(reenter=True) if main else nullcontext(), explain_full_disk(run.folder):
        # Before the lock, another process may have finished this run or started another recipe.
        if main:
            _check_same_recipe(run, begun)
        finished = [run.finished]
        broadcast_object_list(finished)
        if not finished[0]:
            try:
                _fit(run, recipe, accelerator)
            finally:
                # After an error too: the next run of this process would log to this one.
                for tracker in accelerator.trackers:
                    tracker.finish()


def _check_same_recipe(run, begun):
    if run.start_record() != begun:
        raise RuntimeError(
            f"{shown(run.folder)} now holds another recipe; choose another name for this run."
        )


def _fit(run, recipe, accelerator):
    clock, init = time.perf_counter(), read_json(run.folder / "init.json").get("init")
    world, rank, device = accelerator.num_processes, accelerator.process_index, accelerator.device

    # Model and data. The main process makes the rows, and all read them from the run's folder.
    model = distributed.load_for_training(recipe, init, accelerator)
    processor = models.load_processor(recipe, model)
    models.freeze(model, recipe)
    with accelerator.main_process_first():
        make = partial(prepare, recipe, processor.tokenizer, model.config, run.folder)
        data = rows_of_run(run.folder, recipe, processor.tokenizer, make, accelerator)
    # Replicate or shard the model. Its frozen parts are hashed now and again after training.
    pictures, state = _distribute(model, processor, data, recipe, accelerator)
    learner, optimizer, frozen = state.learner, state.optimizer, _fingerprint_frozen(model)

    # The seed alone decides the batches, so a resumed run sees the same ones.
    train_rows, validate = _hold_out(run, recipe, state, data, processor)
    batches = batch_order(data, recipe, train_rows)
    metadata = checkpointing.describe(recipe, state, data, batches)
    first = checkpointing.resume(run.folder, state, metadata)
    log = Log(run.folder, len(batches), first, accelerator)
    log.begin(recipe)
    if validate and recipe.evaluate_every and not first:
        validate(0, log)

    learner.train()
    steps = feed(data, pictures, batches, recipe, rank, world, first)
    for step, (rows, micro_batches) in enumerate(zip(batches[first:], steps), first):
        start, last = time.perf_counter(), step + 1 == len(batches)
        # Dropout depends on seed, step and rank only, so a resumed run repeats it exactly.
        _seed(hash((recipe.seed, step, rank)), device)
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * learning_rate(step, len(batches), recipe)

        loss, positions = _accumulate_gradients(state, data, pictures, rows, micro_batches, step)
        # DeepSpeed clips gradients itself.
        if recipe.max_grad_norm and not state.sharding.startswith("zero"):
            weights = [weight for weight in learner.parameters() if weight.requires_grad]
            nn.utils.clip_grad_norm_(weights, recipe.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()

        sizes = data.sizes(rows) | dict(positions=positions, seconds=time.perf_counter() - start)
        log.step(step + 1, loss, optimizer.param_groups[0]["lr"], **sizes)
        if validate and (last or _is_due(recipe.evaluate_every, step)):
            validate(step + 1, log)
        # A sharded model is exported from its last checkpoint, which is therefore always written.
        final = last and (recipe.save_every or state.sharding != "none")
        if final or _is_due(recipe.save_every, step):
            log.sync()
            checkpointing.save_checkpoint(run.folder, step + 1, state, metadata)
    log.close()

    _check_frozen(model, frozen)
    summary = dict(seconds=round(time.perf_counter() - clock, 1), processes=world)
    summary |= dict(sharding=state.sharding, steps=len(batches), rows=len(train_rows))
    summary |= dict(heldout=len(data.ids) - len(train_rows), bad=data.bad, repaired=data.repaired)
    if accelerator.is_main_process:
        _finish(run, recipe, init, state, processor, summary)
    accelerator.wait_for_everyone()


def _distribute(model, processor, data, recipe, accelerator):
    """Put the model on the devices; return the picture features and the TrainState."""
    # A sharded model moves to the devices shard by shard, but each process keeps the whole tower.
    replicated = distributed.sharding(recipe, accelerator.num_processes) == "none"
    (model if replicated else models.parts(model)["vision_tower"]).to(accelerator.device)
    # Pictures hashes the tower, so it comes before weights are wrapped or sharded.
    pictures = Pictures(data, model, processor, recipe)
    learner = Learner(model, recipe)
    make_optimizer = partial(_optimizer, model, recipe)
    return pictures, distributed.distribute(accelerator, learner, make_optimizer, recipe)


def _hold_out(run, recipe, state, data, processor):
    """Return the rows to train on and the validator of the others (None if no row is held out)."""
    if not recipe.heldout_rows:
        return np.arange(len(data.ids)), None
    from vflan.training.validation import Validator, hold_out, task_names

    train_rows, heldout_rows = hold_out(data.ids, recipe.heldout_rows)
    # The validator has its own Pictures, because the features already in memory decide which
    # training pictures go through the tower together, and thereby the last bits of the result.
    pictures = Pictures(data, state.model, processor, recipe)
    tasks, tokenizer = task_names(recipe, run.folder), processor.tokenizer
    return train_rows, Validator(heldout_rows, data, pictures, tasks, recipe, tokenizer, state)


def _accumulate_gradients(state, data, pictures, rows, micro_batches, step):
    """Run forward and backward over a step's micro-batches; return (loss, positions).

    Both are sums over all processes. loss: mean over the step's supervised tokens; positions:
    tokens computed, padding included.
    """
    accelerator = state.accelerator
    if not data.supervised[rows].sum():
        names = _sample_names(data, rows)
        raise ValueError(f"There is no supervised token in step {step + 1}, samples {names}.")
    sums = torch.zeros(2, device=accelerator.device)
    for i, (part, divisor) in enumerate(micro_batches, 1):
        batch = data.batch(part, accelerator.device)
        with state.forward_pass(last=i == len(micro_batches)):
            loss = state.learner(*batch, pictures(part)) / divisor
            # Processes average their gradients, but `divisor` counts the tokens of all: undo it.
            accelerator.backward(loss * accelerator.num_processes)
        sums += torch.stack([loss.detach().float(), sums.new_tensor(batch[0].numel())])
    loss, positions = accelerator.reduce(sums).tolist()
    if not math.isfinite(loss):
        names = _sample_names(data, rows)
        raise FloatingPointError(f"The loss is {loss} in step {step + 1}, samples {names}.")
    return loss, positions


def learning_rate(step: int, steps: int, recipe: Recipe) -> float:
    """Return the share of the peak learning rate in `step` (counted from 0).

    It rises linearly over ceil(warmup_ratio * steps), then falls to zero along half a cosine. A
    run of a single step has no warm-up: its only rate would be 0, and it would learn nothing.
    """
    warmup = math.ceil(recipe.warmup_ratio * steps) if steps > 1 else 0
    if step < warmup:
        return step / warmup
    if recipe.schedule == "constant":
        return 1.0
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def _optimizer(model, recipe):
    in_projector = {id(weight) for weight in models.parts(model)["projector"].parameters()}
    groups = {}
    for weight in model.parameters():
        if weight.requires_grad:
            groups.setdefault((id(weight) in in_projector, weight.ndim > 1), []).append(weight)
    projector_lr = recipe.lr if recipe.projector_lr is None else recipe.projector_lr
    options = []
    for (projector, is_matrix), weights in groups.items():
        peak = projector_lr if projector else recipe.lr
        # Norms and biases do not decay.
        decay = recipe.weight_decay if is_matrix else 0.0
        options.append(dict(params=weights, peak=peak, weight_decay=decay))
    if recipe.optimizer == "adamw_8bit":
        from bitsandbytes.optim import AdamW8bit

        return AdamW8bit(options, lr=recipe.lr)
    return torch.optim.AdamW(options, lr=recipe.lr, fused=True)


def _seed(value: int, device) -> None:
    # torch.manual_seed also calls every absent device, and formats a traceback for each: slow.
    on_cpu = torch.device(device).type == "cpu"
    (torch.default_generator if on_cpu else torch).manual_seed(value)


def _is_due(every: int, step: int) -> bool:
    return bool(every) and (step + 1) % every == 0


def _sample_names(data, rows) -> str:
    return ", ".join(data.ids[row] for row in rows)


def _fingerprint_frozen(model) -> dict[str, str]:
    """Return a hash of the frozen weights of each part."""
    hashes = {}
    for part, module in models.parts(model).items():
        named = module.named_parameters()
        frozen = [(name, weight) for name, weight in named if not weight.requires_grad]
        hashes[part.replace("_", " ")] = models.fingerprint(frozen)
    return hashes


def _check_frozen(model, before):
    moved = [part for part, now in _fingerprint_frozen(model).items() if now != before[part]]
    if moved:
        raise RuntimeError(
            f"A frozen part moved during training: {', '.join(moved)}. The run is not finished, "
            "because its recipe does not tune that part."
        )


def _finish(run, recipe, init, state, processor, summary):
    model = state.model
    if state.sharding != "none":
        # This process holds one shard only; the last checkpoint holds all of them.
        weights = checkpointing.read_weights(checkpointing.list_checkpoints(run.folder)[0])
        model = checkpointing.trained_model(recipe, init, weights)
    run.finish(model, processor, recipe, init, **summary)


def _describe_init(init) -> dict:
    """Return what a run records of its start: the path, and hashes of the weights there."""
    if init is None:
        return dict(init=None, init_weights=None)
    if not isinstance(init, Run) and not (resolve(init) / "recipe.json").is_file():
        # A projector file or a model folder, as LLaVA writes them.
        projector = models.fingerprint(models.read_projector(init).items())
        return dict(init=shown(resolve(init)), init_weights=dict(projector=projector))
    init = init if isinstance(init, Run) else Run.open(init)
    if not init.finished:
        raise ValueError(f"{shown(init.folder)} is not finished; train it to the end first.")
    return dict(init=shown(init.folder), init_weights=init.summary["parts"])
