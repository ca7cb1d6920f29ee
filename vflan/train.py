"""Training: `train` for people, `fit` for each process. Plain PyTorch and Accelerate, the loop on one screen."""

import argparse
import json
import math
import os
import shutil
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_state_dict,
)
from torch.nn.functional import cross_entropy

from vflan import model as models
from vflan.conversation import IGNORE_INDEX, encode, expand
from vflan.recipe import ROOT, Recipe, differences
from vflan.runs import Run, launch, read_json, write_json
from vflan.samples import check, read_picture, recipe_samples

MAX_KEPT_BYTES = 4 << 30  # frozen-tower features up to this size are computed once and kept in memory
_FEATURES: dict = {}  # (tower, picture preparation) -> picture -> features, shared by the runs of a sweep


def train(recipe: Recipe, init: Run | str | None = None, num_processes: int = 1) -> Run:
    """Train a recipe, from the weights of `init` (a Run) if given, and return its Run.

    A finished run is read, not trained again; the same folder asked for with another recipe is an error that names the fields. With
    `num_processes` > 1 the work is done by torch.distributed in child processes, with the same global batches.
    """
    run, start = Run(recipe.folder), _started_from(init)
    if (run.folder / "recipe.json").is_file():
        old = read_json(run.folder / "recipe.json") | read_json(run.folder / "init.json")
        changed = differences(old, recipe.to_dict() | start)
        if changed and (run.finished or _checkpoint(run.folder).exists()):
            raise ValueError(
                f"{_shown(run.folder)} holds a run of another recipe:\n{changed}\nGive this one another name, or delete that folder."
            )
        if run.finished:
            return run
        if changed:
            shutil.rmtree(run.folder)
    if recipe.global_batch % num_processes:
        raise ValueError(
            f"global_batch={recipe.global_batch} cannot be shared out over {num_processes} processes evenly."
        )
    run.folder.mkdir(parents=True, exist_ok=True)
    write_json(run.folder / "recipe.json", recipe.to_dict())
    write_json(run.folder / "init.json", start)
    if num_processes == 1:
        fit(run.folder)
    else:
        launch(run.folder, num_processes)
    if not run.finished:
        raise RuntimeError(f"{_shown(run.folder)}: training ended without a finished run.")
    return run


def fit(folder, num_processes: int | None = None) -> None:
    """Train the run that `folder` describes; every process of a distributed run calls this."""
    run = Run.open(folder)
    recipe, init = run.recipe, read_json(run.folder / "init.json").get("init")
    accelerator = _accelerator(recipe)
    if num_processes not in (None, accelerator.num_processes):
        raise RuntimeError(
            f"{num_processes} processes were asked for, but {accelerator.num_processes} found each other."
        )
    clock = time.perf_counter()
    if accelerator.is_main_process:
        (run.folder / "done.json").unlink(missing_ok=True)

    model, processor = models.load_model(recipe, init), models.load_processor(recipe)
    models.freeze(model, recipe)
    with accelerator.main_process_first():
        data = prepare(recipe, processor.tokenizer, model.config, run.folder, accelerator.is_main_process)
    model.to(accelerator.device)
    pictures = Pictures(data, model, processor, recipe)
    learner, sharded = Learner(model, recipe), _is_sharded(recipe, accelerator)
    if sharded:
        models.shard(learner, recipe)
    else:
        learner = accelerator.prepare(learner)
    optimizer, frozen = _optimizer(model, recipe), models.fingerprint(_still(model))
    batches = plan(data, recipe)
    first = _resume(run.folder, learner, optimizer) if _checkpoint(run.folder).exists() else 0
    log = _Log(run, len(batches), accelerator.is_main_process, first)

    learner.train()
    world, rank = accelerator.num_processes, accelerator.process_index
    for step, rows in enumerate(batches[first:], first):
        torch.manual_seed(hash((recipe.seed, step, rank)))  # for dropout: a resumed run repeats it exactly
        lr = learning_rate(step, len(batches), recipe)
        for group in optimizer.param_groups:
            group["lr"] = group["base_lr"] * lr
        tokens = int(data.supervised[rows].sum())  # of the whole global batch, so every token weighs the same
        total = torch.zeros((), device=accelerator.device)
        mine = rows[rank::world]
        micro = [mine[i : i + recipe.micro_batch] for i in range(0, len(mine), recipe.micro_batch)]
        for i, part in enumerate(micro):
            last = i == len(micro) - 1
            if sharded:
                learner.set_requires_gradient_sync(last)
            with nullcontext() if last or sharded else accelerator.no_sync(learner), accelerator.autocast():
                loss = learner(*data.batch(part, accelerator.device), pictures(part)) / tokens
                accelerator.backward(loss * world)  # gradients are averaged over processes
            total += loss.detach()
        total = accelerator.reduce(total).item()
        if not math.isfinite(total):
            raise FloatingPointError(
                f"The loss is {total} in step {step + 1}, samples {', '.join(data.ids[r] for r in rows)}."
            )
        if recipe.max_grad_norm:
            nn.utils.clip_grad_norm_([w for w in learner.parameters() if w.requires_grad], recipe.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        log(step + 1, total, optimizer.param_groups[0]["lr"], tokens)
        if recipe.save_every and (step + 1) % recipe.save_every == 0 and step + 1 < len(batches):
            _save(run.folder, learner, optimizer, step + 1, accelerator)

    assert models.fingerprint(_still(model)) == frozen, "a frozen part moved during training"
    state = (
        get_model_state_dict(learner, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
        if sharded
        else None
    )
    log.close()
    if accelerator.is_main_process:
        state = (
            {name.removeprefix("model."): weight for name, weight in state.items()} if sharded else model.state_dict()
        )
        _finish(run, recipe, model, processor, init, state, log, data, world, sharded, time.perf_counter() - clock)
    accelerator.wait_for_everyone()


class Learner(nn.Module):
    """What is trained: from padded ids and picture features to the summed loss of the supervised tokens.

    Rows are padded on the right, and a causal model never looks right, so no mask is needed. Logits (the largest tensor of the
    original) are computed at supervised positions only.
    """

    def __init__(self, model, recipe):
        super().__init__()
        self.model = model
        self.checkpointing = recipe.gradient_checkpointing
        if self.checkpointing:
            model.model.language_model.gradient_checkpointing_enable({"use_reentrant": False})

    def forward(self, input_ids, at, keep, targets, features):
        """input_ids (B, T); at (pictures, 2): row and first position of each picture; keep: positions in B*T; -> loss, a scalar."""
        inner = self.model.model
        embeds = inner.language_model.get_input_embeddings()(input_ids)
        projector = inner.multi_modal_projector
        if features is not None:
            pictures = projector(features.to(projector.linear_1.weight.dtype)).to(embeds.dtype)
            embeds = embeds.clone() if embeds.is_leaf else embeds
            embeds[at[:, :1], at[:, 1:] + torch.arange(pictures.shape[1], device=at.device)] = pictures
        else:  # a batch of text still touches the projector: every process must have a gradient for every weight
            embeds = embeds + 0 * sum(weight.sum() for weight in projector.parameters())
        hidden = inner.language_model(inputs_embeds=embeds, use_cache=False).last_hidden_state
        logits = self.model.lm_head(hidden.flatten(0, 1)[keep])
        return cross_entropy(logits.float(), targets, reduction="sum")


@dataclass(frozen=True)
class Data:
    """Every usable row as ids, tokenised once: `tokens[i]` (length), `keep[i]` positions that predict `targets[i]`."""

    ids: list[str]
    tokens: list[np.ndarray]
    keep: list[np.ndarray]
    targets: list[np.ndarray]
    images: list[str | None]
    image_at: np.ndarray  # -1 for text-only rows
    lengths: np.ndarray
    supervised: np.ndarray
    bad: int
    repaired: int

    def batch(self, rows, device):
        """The first four arguments of `Learner.forward` for some rows."""
        width = max(self.lengths[row] for row in rows)
        input_ids = np.zeros((len(rows), width), dtype=np.int64)
        for i, row in enumerate(rows):
            input_ids[i, : self.lengths[row]] = self.tokens[row]
        at = np.array(
            [(i, self.image_at[row]) for i, row in enumerate(rows) if self.images[row]], dtype=np.int64
        ).reshape(-1, 2)
        keep = np.concatenate([self.keep[row] + i * width for i, row in enumerate(rows)])
        targets = np.concatenate([self.targets[row] for row in rows])
        return [torch.from_numpy(array).to(device, non_blocking=True) for array in (input_ids, at, keep, targets)]


def prepare(recipe: Recipe, tokenizer, config, folder: Path, judge: bool = True) -> Data:
    """Check and tokenise the recipe's samples. Bad rows are left out and listed in bad.jsonl; too many stop the run before it starts."""
    samples, listing = recipe_samples(recipe), folder / "bad.jsonl"
    if not judge:  # another process of this run has just written the verdicts
        verdicts = [json.loads(line) for line in listing.read_text(encoding="utf-8").splitlines()]
        bad, repaired = {v["row"]: v["reason"] for v in verdicts}, 0
    else:
        report = check(samples)
        bad, repaired = dict(zip(report.bad.row, report.bad.reason)), len(report.repaired)
    num_image_tokens, rows = config.image_seq_length, []
    for row, (name, image, turns) in enumerate(zip(samples["id"][:], samples["image"][:], samples["conversations"][:])):
        if row in bad:
            continue
        try:
            ids, labels = expand(*encode(turns, tokenizer, recipe.template), num_image_tokens, config.image_token_id)
            ids, labels = np.array(ids[: recipe.max_length]), np.array(labels[: recipe.max_length])
            keep = np.flatnonzero(labels[1:] != IGNORE_INDEX)
            if not len(keep):
                raise ValueError(f"no answer token within max_length={recipe.max_length}")
        except ValueError as trouble:
            bad[row] = str(trouble)
            continue
        at = int(np.argmax(ids == config.image_token_id)) if image else -1
        rows.append((name, ids, keep, labels[1:][keep], image, at, len(ids), len(keep)))
    if judge:
        names = samples["id"][:]
        lines = [
            json.dumps(dict(row=row, id=names[row], reason=bad[row]), ensure_ascii=False) + "\n" for row in sorted(bad)
        ]
        listing.write_text("".join(lines), encoding="utf-8")
    if len(bad) > recipe.max_bad_share * len(samples) or not rows:
        some = "".join(f"\n  row {row} ({samples[row]['id']}): {bad[row]}" for row in sorted(bad)[:5])
        raise ValueError(
            f"{len(bad)} of {len(samples)} samples are bad, more than max_bad_share={recipe.max_bad_share} allows; "
            f"all are listed in {_shown(listing)}.{some}"
        )
    *columns, image_at, lengths, supervised = zip(*rows)
    return Data(*columns, np.array(image_at), np.array(lengths), np.array(supervised), len(bad), repaired)


class Pictures:
    """Picture features for rows of a batch, (pictures, patches, width).

    The tower is frozen, so one look at a picture is enough: the features of a small set are computed once and kept. A large
    set's pictures are read and encoded as they come.
    """

    def __init__(self, data, model, processor, recipe):
        self.data, self.model, self.prepare = data, model, processor.image_processor
        self.pool = ThreadPoolExecutor(4)
        distinct = list(dict.fromkeys(path for path in data.images if path))
        vision = model.config.vision_config
        size = len(distinct) * model.config.image_seq_length * vision.hidden_size * model.dtype.itemsize
        self.table = None
        if distinct and size <= MAX_KEPT_BYTES:
            key = (models.fingerprint(models.parts(model)["vision_tower"]), str(self.prepare.to_dict()))
            known = _FEATURES.setdefault(key, {})
            names = [(path, os.stat(path).st_mtime_ns) for path in distinct]
            new = [name for name in names if name not in known]
            for i in range(0, len(new), 64):
                for name, features in zip(new[i : i + 64], self.look([path for path, _ in new[i : i + 64]])):
                    known[name] = features.clone()
            self.table = torch.stack([known[name] for name in names])
            where = {path: i for i, path in enumerate(distinct)}
            self.where = [where.get(path) for path in data.images]

    @torch.no_grad()
    def look(self, paths):
        pixels = self.prepare(list(self.pool.map(read_picture, paths)), return_tensors="pt")["pixel_values"]
        return models.image_features(self.model, pixels.to(self.model.device))

    def __call__(self, rows):
        rows = [row for row in rows if self.data.images[row]]
        if not rows:
            return None
        if self.table is None:
            return self.look([self.data.images[row] for row in rows])
        return self.table[[self.where[row] for row in rows]]


def plan(data: Data, recipe: Recipe) -> list[np.ndarray]:
    """The rows of every global batch of the run, decided by the seed alone.

    Each epoch is shuffled, cut into stretches of 32 batches, and sorted by length inside each (text-only rows apart), so that a batch
    holds like lengths; then the batches are shuffled. The last batch of the run is filled up from the start of its epoch.
    """
    rows, size = len(data.ids), recipe.global_batch
    steps = recipe.max_steps or max(1, math.ceil(rows * recipe.epochs / size))
    batches, epoch = [], 0
    while len(batches) < steps:
        draw = np.random.Generator(np.random.PCG64([recipe.seed, epoch]))
        order = np.resize(draw.permutation(rows), math.ceil(rows / size) * size)
        key = data.lengths[order] + (data.image_at[order] < 0) * 10**6
        stretches = range(0, len(order), 32 * size)
        order = order[np.concatenate([s + np.argsort(key[s : s + 32 * size], kind="stable") for s in stretches])]
        batches += [order[i * size : (i + 1) * size] for i in draw.permutation(len(order) // size)]
        epoch += 1
    return batches[:steps]


def learning_rate(step: int, steps: int, recipe: Recipe) -> float:
    """The share of the peak used in `step` (from 0): linear warm-up over ceil(ratio * steps), then half a cosine to zero."""
    warmup = math.ceil(recipe.warmup_ratio * steps)
    if step < warmup:
        return step / warmup
    if recipe.schedule == "constant":
        return 1.0
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def _optimizer(model, recipe):
    projector = set(map(id, models.parts(model)["projector"].parameters()))
    groups = {}
    for weight in model.parameters():
        if weight.requires_grad:
            ours, decayed = id(weight) in projector, weight.ndim > 1
            groups.setdefault((ours, decayed), []).append(weight)
    options = [
        dict(
            params=weights,
            base_lr=recipe.projector_lr if ours and recipe.projector_lr is not None else recipe.lr,
            weight_decay=recipe.weight_decay if decayed else 0.0,
        )
        for (ours, decayed), weights in groups.items()
    ]
    if recipe.optimizer == "adamw_8bit":
        from bitsandbytes.optim import AdamW8bit

        return AdamW8bit(options, lr=recipe.lr)
    return torch.optim.AdamW(options, lr=recipe.lr, fused=True)


def _accelerator(recipe) -> Accelerator:
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state()  # a notebook trains several recipes in one process
    half = models.compute_dtype(recipe) == torch.bfloat16
    return Accelerator(cpu=not torch.cuda.is_available(), mixed_precision="bf16" if half else "no")


def _is_sharded(recipe, accelerator) -> bool:
    """A whole language model in training needs 16 bytes a weight: too much for one GPU from 7B on, so it is shared out."""
    wanted = (
        torch.cuda.is_available() or os.environ.get("VFLAN_SHARD") == "1"
    )  # the variable lets the tests try it on CPUs
    return wanted and accelerator.num_processes > 1 and "language_model" in recipe.tune and not recipe.lora_r


def _still(model):
    return [(name, weight) for name, weight in model.named_parameters() if not weight.requires_grad]


def _checkpoint(folder: Path) -> Path:
    return folder / "checkpoint.pt"


_FULL = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True, strict=False)


def _save(folder, learner, optimizer, step, accelerator):
    weights, moments = get_state_dict(learner, optimizer, options=_FULL)
    if accelerator.is_main_process:
        scratch = folder / ".checkpoint.pt"
        torch.save(dict(step=step, weights=weights, moments=moments), scratch)
        scratch.replace(_checkpoint(folder))
    accelerator.wait_for_everyone()


def _resume(folder, learner, optimizer) -> int:
    saved = torch.load(_checkpoint(folder), map_location="cpu", weights_only=True)
    set_state_dict(
        learner,
        optimizer,
        model_state_dict=saved["weights"],
        optim_state_dict=saved["moments"],
        options=_FULL,
    )
    return saved["step"]


def _finish(run, recipe, model, processor, init, state, log, data, world, sharded, seconds):
    """Write the model, then what is worth knowing of the run; done.json comes last, and whole."""
    scratch = run.folder / ".model"
    for folder in (scratch, run.folder / "model"):
        shutil.rmtree(folder, ignore_errors=True)
    found = models.fingerprints(state)
    models.export(model, processor, recipe, scratch, init, state)
    scratch.replace(run.folder / "model")
    losses = [line["loss"] for line in log.lines()]
    summary = dict(steps=len(losses), seconds=round(seconds, 1), tokens=log.tokens, processes=world, sharded=sharded)
    summary |= dict(rows=len(data.ids), bad=data.bad, repaired=data.repaired)
    summary |= dict(first_loss=losses[0], last_loss=float(np.mean(losses[-10:])), parts=found)
    write_json(run.folder / "done.json", summary)
    _checkpoint(run.folder).unlink(missing_ok=True)


class _Log:
    """metrics.jsonl, and one live line: a bar on a terminal, elsewhere (notebooks, log files) a plain line a minute at most."""

    def __init__(self, run, steps, active, first):
        self.run, self.steps, self.active = run, steps, active
        self.path, self.tokens, self.clock, self.said = (
            run.folder / "metrics.jsonl",
            0,
            time.perf_counter(),
            time.perf_counter(),
        )
        if not active:
            return
        kept = self.lines()[:first] if first else []
        self.path.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")
        self.tokens = sum(line["tokens"] for line in kept)
        self.file, self.bar = self.path.open("a", encoding="utf-8"), None
        if sys.stderr.isatty():
            from tqdm import tqdm

            self.bar = tqdm(total=steps, initial=first, desc=run.name)

    def lines(self):
        return [json.loads(line) for line in self.path.read_text(encoding="utf-8").splitlines()]

    def __call__(self, step, loss, lr, tokens):
        self.tokens += tokens
        if not self.active:
            return
        now = time.perf_counter()
        line = dict(step=step, loss=round(loss, 6), lr=lr, tokens=tokens, seconds=round(now - self.clock, 3))
        self.file.write(json.dumps(line) + "\n")
        if self.bar is not None:
            self.bar.update()
            self.bar.set_postfix(loss=f"{loss:.3f}", refresh=False)
        elif now - self.said > 60:
            self.said = now
            print(f"{self.run.name}: step {step} of {self.steps}, loss {loss:.3f}", flush=True)

    def close(self):
        if self.active:
            self.file.close()
            if self.bar is not None:
                self.bar.close()


def _started_from(init) -> dict:
    """What a run remembers of the run it began with: where it is, and which weights were in it."""
    if init is None:
        return dict(init=None, init_weights=None)
    init = init if isinstance(init, Run) else Run.open(init)
    if not init.finished:
        raise ValueError(f"{_shown(init.folder)} is not finished; train it to the end before starting from it.")
    return dict(init=_shown(init.folder), init_weights=init.summary["parts"])


def _shown(path: Path) -> str:
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else str(path)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m vflan.train", description="Train the run that a folder describes.")
    parser.add_argument("folder")
    parser.add_argument("--processes", type=int, default=None, help="fail unless so many processes take part")
    arguments = parser.parse_args()
    fit(arguments.folder, arguments.processes)
