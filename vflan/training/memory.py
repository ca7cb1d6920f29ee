"""What a run will need, before it starts: memory, steps, tokens, hours, energy, and what to change.

A pass is counted (footprint.py); what the optimizer and several processes add is arithmetic. The
sums agree with the measured memory of tiny models on a CPU (tests/training/test_memory.py); figures
for GPUs were not measured. Hours and energy rest on `share` and on the published rates and powers
of the GPUs, and are no better than these.
"""

from __future__ import annotations

import html
import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import psutil
from huggingface_hub import try_to_load_from_cache

from vflan.config import Recipe, one_recipe, replace, resolve
from vflan.data.conversation import IGNORE_INDEX, encode_many
from vflan.data.mixture import recipe_samples
from vflan.models import image_features
from vflan.models import llava as models
from vflan.models.cache_size import sizes
from vflan.training import batching, distributed
from vflan.training.footprint import count

# The share of a GPU's peak rate that training reaches, recomputed activations included. LLaVA-1.5's
# 3.5 h and 10 h for 7B on 8 A100 come to 0.42 and 0.3.
SHARE = 0.4
# Bytes of each GPU for CUDA itself, the buffers of its libraries, and gaps between tensors.
RESERVE = 2e9
# An evaluation question in tokens: before the picture, after it, and of the answer; and
# vflan.evaluate's batch.
BEFORE, ASKED, NEW, BATCH = 35, 60, 64, 64
# Of each GPU (memory in GiB, TFLOP/s, W); rows of published files; deciles of text lengths.
GPUS, ROWS, TEXT = json.loads(Path(__file__).with_name("planning.json").read_bytes()).values()
# "cpu" is this machine's memory and fp32; its rate would say little about small models.
GPUS["cpu"] = (None, None, None)
# The lengths of so many rows are read, and so many packed steps are laid out; others are alike.
ROWS_READ, STEPS_PACKED = 4000, 64


@dataclass(frozen=True)
class _Layout:
    steps: int
    passes: int  # of one process in a step, at most
    shape: tuple[int, int, int, int]  # of the largest pass: rows, length, pictures, answer tokens
    pictures: int  # distinct ones
    rows: np.ndarray  # of all steps


@dataclass(frozen=True, eq=False)
class Plan:
    """What `plan` returns: prints as text, and in a notebook as a table.

    Numbers are computed when they are read. Counting a pass takes some seconds.
    """

    recipe: Recipe
    gpus: int
    gpu: str
    share: float
    data: SimpleNamespace  # of _load_rows
    notes: tuple[str, ...]  # what was assumed

    @property
    def room(self) -> float:
        """Bytes that one GPU has."""
        gib = GPUS[self.gpu][0]
        return psutil.virtual_memory().total / self.gpus if gib is None else gib * 2**30

    @property
    def peak(self) -> float:
        """Bytes of one GPU while training, with the reserve."""
        return sum(self.memory.values())

    @property
    def needs(self) -> float:
        """Bytes that one GPU must have, to train and then to answer one question at a time."""
        return max(self.peak, sum(self.answering.values()))

    @property
    def fits(self) -> bool:
        """Whether training fits, and answering after it."""
        return self.needs <= self.room

    @property
    def steps(self) -> int:
        """The number of steps."""
        return self._layout.steps

    @property
    def passes(self) -> int:
        """Forward passes of one GPU in a step, at most."""
        return self._layout.passes

    @property
    def widest(self) -> int:
        """Positions of the largest pass."""
        rows, length, *_ = self._layout.shape
        return rows * length

    @property
    def tokens(self) -> int:
        """Positions that all steps train on, with those of pictures, without padding."""
        return int(self.data.lengths[self._layout.rows].sum())

    @cached_property
    def hours(self) -> float | None:
        """Hours of training; None if the rate of the machine is not known."""
        rate = GPUS[self.gpu][1]
        speed = self.gpus * (rate or 0) * 1e12 * self.share
        return self._operations() / speed / 3600 if rate else None

    @property
    def kwh(self) -> float | None:
        """Energy of the boards; None if the rate of the machine is not known."""
        return self.hours * self.gpus * GPUS[self.gpu][2] / 1000 if self.hours else None

    @cached_property
    def at_once(self) -> int:
        """Questions on as many pictures that one GPU answers together; 0: not even one fits."""
        left = self.room - sum(self.answering.values())
        return max(0, min(BATCH, int(left / self.answering["question"]) + 1))

    @cached_property
    def changes(self) -> tuple[str, ...]:
        """If training does not fit: which changes were tried, and the memory they need."""
        return self._find_changes() if self.peak > self.room else ()

    def _lines(self):
        where = f"{self.gpus} x {self.gpu}" if self._on_gpu else "this machine's memory"
        verdict = "fits into" if self.fits else "does NOT fit into"
        cost = "" if self.hours is None else f", {self.hours:,.1f} hours, {self.kwh:,.1f} kWh"
        sizes = f"{self.peak / 1e9:.2f} of {self.room / 1e9:.1f} GB each"
        yield f"{self.recipe.name} {verdict} {where}: {sizes}"
        yield f"{self.steps:,} steps, {self.tokens / 1e6:,.1f} M tokens{cost}"
        yield f"a step: at most {self.passes} passes of at most {self.widest:,} positions on each"
        weights, question = self.answering["weights"] / 1e9, self.answering["question"] / 1e9
        batch = f"{self.at_once} at once, one a picture" if self.at_once else "too much"
        yield f"evaluation: {weights:.2f} GB of weights and {question:.2f} GB a question: {batch}"

    def __str__(self) -> str:
        parts = [f"  {part:12}{size / 1e9:9.2f} GB" for part, size in self.memory.items()]
        tried = ["tried:", *(f"  {change}" for change in self.changes)] if self.changes else []
        return "\n".join([*self._lines(), *parts, *tried, *self.notes])

    __repr__ = __str__

    def _repr_html_(self) -> str:
        sizes = {part: [round(size / 1e9, 2)] for part, size in self.memory.items()}
        table = pd.DataFrame(sizes, index=["GB"]).to_html()
        lines = [html.escape(line) for line in (*self._lines(), *self.changes, *self.notes)]
        return f"<b>{lines[0]}</b>{table}{'<br>'.join(lines[1:])}"

    @property
    def _on_gpu(self):
        return self.gpu != "cpu"

    @property
    def _half(self):
        return self._on_gpu and self.recipe.precision == "bf16"

    @property
    def _sharding(self):
        return distributed.sharding(self.recipe, self.gpus, self._on_gpu)

    @cached_property
    def _layout(self):
        data, recipe = self.data, self.recipe
        train_rows = np.arange(len(data.ids) - recipe.heldout_rows)
        steps = batching.batch_order(data, recipe, train_rows)
        shape, passes = (0, 0, 0, 0), 0
        # Packing a step takes time, so only some are packed; padded batches are all looked at.
        for rows in steps[:: max(1, len(steps) // STEPS_PACKED) if data.packed else 1]:
            for parts in batching.micro_batches(data, rows, recipe, self.gpus):
                passes = max(passes, len(parts))
                shapes = [shape, *map(self._shape, parts)]
                shape = max(shapes, key=lambda each: (each[0] * each[1], each[3]))
        pictures = len(np.unique(data.picture[data.picture >= 0]))
        shape = tuple(map(int, shape))
        return _Layout(len(steps), passes, shape, pictures, np.concatenate(steps))

    def _shape(self, rows):
        lengths = self.data.lengths[rows]
        size = (1, lengths.sum()) if self.data.packed else (len(rows), lengths.max())
        pictures = (self.data.picture[rows] >= 0).sum()
        return *size, pictures, self.data.supervised[rows].sum()

    @cached_property
    def _footprint(self):
        return count(self.recipe, self._half, self._sharding != "none", self._layout.shape)

    @cached_property
    def memory(self) -> dict[str, float]:
        """{part: bytes} of one GPU when their sum is largest; exchange is what sharding adds."""
        memory, model = self._state(), self._footprint
        memory |= dict(activations=model.activations, logits=model.logits)
        if self._sharding == "none" and self._layout.passes == 1:
            # In the only pass of a step, gradients grow while the activations they need are freed.
            memory["activations"] = model.peak - memory["gradients"] - model.logits
        # The tower reads its pictures before the pass begins, when there are no gradients yet.
        in_pass = sum(memory[part] for part in ("gradients", "activations", "logits"))
        if model.tower_pass > in_pass:
            memory |= dict(gradients=0, activations=model.tower_pass, logits=0)
        memory["features"] = model.picture * (self._held_pictures() + self._layout.shape[2])
        return memory | (dict(reserve=RESERVE) if self._on_gpu else {})

    def _state(self):
        """Return {part: bytes} of weights, gradients and optimizer, and of exchanging them."""
        model, kind, world = self._footprint, self._sharding, self.gpus
        size, trained = 2 if self._half else 4, model.trained
        gradients, moments, exchange = 4 * trained, 8 * trained, 0
        weights, all_weights = model.weights, model.body + model.outer + model.tower
        if self.recipe.optimizer == "adamw_8bit":
            # Two moments of one byte each, and for each a scale for 256 of them.
            moments = (2 + 8 / 256) * trained
        if kind == "fsdp2":
            gradients, moments = gradients / world, moments / world
            weights -= (1 - 1 / world) * model.outside_tower
            # Gathered in the precision of the pass: all weights outside of layers, and two layers;
            # and one layer's gradients, in fp32 too.
            exchange = size * model.outer + (3 * size + 4) * model.layer
        elif kind != "none":
            # As DeepSpeed documents it: weights and gradients in bf16, and an fp32 copy beside the
            # moments. Its buffers have fixed sizes.
            weights = size * all_weights / (world if kind == "zero3" else 1)
            gradients, moments = size * trained / world, 12 * trained / world
            buffer = min(1e9, all_weights) if kind == "zero3" else 2 * min(5e8, trained)
            exchange = size * buffer
        elif world > 1:
            # DDP's buckets hold each gradient a second time.
            exchange = 4 * trained
        return dict(weights=weights, gradients=gradients, optimiser=moments, exchange=exchange)

    def _held_pictures(self):
        """Return how many pictures' features stay on the device beside those of the pass."""
        pictures = self._layout.pictures
        small = self._footprint.picture * pictures <= image_features.MAX_KEPT_BYTES
        per_step = max(image_features.TOWER_BATCH, self.recipe.global_batch // self.gpus)
        if not self._on_gpu:
            return pictures if small else min(pictures, per_step)
        # Features of a small set, or of one on disk, are kept in the main memory.
        return 0 if small or self.recipe.feature_cache else min(pictures, per_step)

    @cached_property
    def answering(self) -> dict[str, float]:
        """{part: bytes} of one GPU that evaluates: weights, a question with picture, reserve."""
        recipe, model, size = self.recipe, self._footprint, 2 if self._half else 4
        patches, unit = models.picture_tokens(recipe), sizes(models.shapes(recipe)[1], size)
        # A quantised layer has a scale for each 64 weights.
        per_weight = recipe.bits / 8 + 1 / 64 if recipe.bits < 16 else size
        weights = model.body * per_weight + size * (model.outer + model.tower)
        asking = unit.asking(BEFORE + patches, [(1, ASKED)], NEW)
        question = max(asking, unit.reading(1, BEFORE, patches))
        reserve = dict(reserve=RESERVE) if self._on_gpu else {}
        return dict(weights=weights, question=question) | reserve

    def _operations(self):
        """Return the floating-point operations of all steps, recomputed ones included."""
        data, rows, text = self.data, self._layout.rows, self.data.text
        lengths, shown = data.lengths[rows].astype(float), (data.picture[rows] >= 0).sum()
        # Forward and the gradients of activations take 2 operations a weight each.
        full = "language_model" in self.recipe.tune and not self.recipe.lora_r
        for_weights, again = 2 if full else 0, 2 if self.recipe.gradient_checkpointing else 0
        total = (4 + for_weights + again) * self._footprint.body * lengths.sum()
        # Causal attention computes half of T x T.
        attention = text.num_hidden_layers * text.hidden_size * (lengths**2).sum()
        total += (6 + again) * attention
        answer_tokens = data.supervised[rows].sum()
        total += (4 + for_weights) * text.vocab_size * text.hidden_size * answer_tokens
        # The projector is too small to matter.
        return total + 2 * self._footprint.tower * (data.patches + 1) * shown

    def _find_changes(self):
        """Try changes, each on top of the last; those that keep the result come first."""
        recipe, data, lines = self.recipe, self.data, []

        def fits(changes, gpus=self.gpus):
            other = Plan(replace(recipe, **changes), gpus, self.gpu, self.share, data, ())
            size, fit = other.peak, other.peak <= self.room
            words = [f"{name}={value!r}" for name, value in changes.items()]
            words += [f"gpus={gpus}"] if gpus != self.gpus else []
            lines.append(f"{', '.join(words)}: {size / 1e9:.1f} GB{', fits' if fit else ''}")
            return fit

        changes = dict(gradient_checkpointing=True)
        if not recipe.gradient_checkpointing and fits(changes):
            return tuple(lines)
        changes |= dict(pack_tokens=None) if data.packed else dict(micro_batch=1)
        if (recipe.pack_tokens if data.packed else recipe.micro_batch > 1) and fits(changes):
            return tuple(lines)
        tunes_language_model = "language_model" in recipe.tune
        if tunes_language_model and not recipe.lora_r:
            for gpus in (2, 4, 8, 16, 32, 64):
                possible = gpus > self.gpus and recipe.global_batch % gpus == 0 and self._on_gpu
                if possible and fits(changes, gpus):
                    break
            fits(changes | dict(optimizer="adamw_8bit", sharding="auto"))
            fits(changes | dict(lora_r=128, lora_alpha=256))
        if tunes_language_model and recipe.bits > 4:
            lora = dict(lora_r=recipe.lora_r or 128, lora_alpha=recipe.lora_alpha or 256)
            fits(changes | lora | dict(bits=4, optimizer="adamw_8bit", sharding="auto"))
        return tuple(lines)


def plan(recipe: Recipe, gpus: int = 1, gpu: str = "A100-80G", share: float = SHARE) -> Plan:
    """Estimate what training `recipe` needs on `gpus` of a kind in GPUS ("cpu": this machine).

    Nothing is downloaded and no weight is read. Lengths are those of the samples if these and the
    tokenizer are on this machine, and otherwise like LLaVA-1.5's. share: of the GPUs' peak rate
    that training reaches, recomputed activations included. ValueError names the known kinds, and a
    batch that cannot be divided.
    """
    one_recipe(recipe)
    if gpu not in GPUS:
        raise ValueError(f"There is no gpu={gpu!r} in the list; known ones are {', '.join(GPUS)}.")
    if not (isinstance(gpus, int) and gpus > 0 and 0 < share <= 1):
        rule = "gpus is a whole number from 1, and share is above 0 and at most 1"
        raise ValueError(f"gpus={gpus!r}, share={share!r}: {rule}.")
    distributed.rows_per_process(recipe, gpus)
    packed = recipe.packing == "packed" or recipe.packing == "auto" and gpu != "cpu"
    recipe = replace(recipe, packing="packed" if packed else "padded")
    data, notes = _load_rows(recipe)
    _, rate, watts = GPUS[gpu]
    if rate:
        speed = f"{share:.0%} of {rate} TFLOP/s"
        notes += (f"assumed: {speed}; {watts} W for a board alone; no GPU was measured",)
    return Plan(recipe, gpus, gpu, share, data, notes)


def _load_rows(recipe):
    """Return the recipe's rows as `batching.batch_order` takes them, and what was assumed."""
    vision, text = models.shapes(recipe)
    patches, path = (vision.image_size // vision.patch_size) ** 2, resolve(recipe.samples)
    samples = recipe_samples(recipe) if path.exists() else None
    rows = len(samples) if samples else recipe.num_samples or ROWS.get(path.name)
    if not rows:
        raise ValueError(
            f"{recipe.samples} is not there, and its number of rows is unknown: set num_samples."
        )
    random = np.random.default_rng(0)
    if measured := samples and _has_tokenizer(recipe.language_model):
        lengths, learned, picture = _measure_lengths(samples, recipe, patches)
        notes = (f"lengths: those of {len(lengths):,} of {rows:,} rows",)
        sampled = rows > ROWS_READ
        chosen = random.integers(len(lengths), size=rows) if sampled else np.arange(len(lengths))
    else:
        lengths, learned, picture = _assume_lengths(rows, recipe, patches, random)
        where = "samples or tokenizer are not on this machine"
        notes = (f"assumed: lengths like LLaVA-1.5's, {rows:,} rows; {where}",)
        chosen = np.arange(rows)
    if rows > ROWS_READ or not measured:
        # It is not known which rows share a picture: each has its own.
        picture = np.where(picture[chosen] < 0, -1, chosen)
    columns = dict(lengths=lengths[chosen], supervised=learned[chosen], picture=picture, ids=chosen)
    packed = recipe.packing == "packed"
    return SimpleNamespace(**columns, packed=packed, patches=patches, text=text), notes


def _has_tokenizer(source):
    # A local folder, or a model of the hub that has been downloaded.
    if resolve(source).is_dir():
        return True
    return isinstance(try_to_load_from_cache(source, "tokenizer_config.json"), str)


def _measure_lengths(samples, recipe, patches):
    """Return lengths, answer tokens and picture numbers of up to ROWS_READ rows."""
    indices = np.linspace(0, len(samples) - 1, min(len(samples), ROWS_READ)).astype(int)
    some = samples.select(indices)
    encoded = encode_many(some["conversations"][:], models.load_tokenizer(recipe), recipe.template)
    rows, numbers = [], {}
    for image, result in zip(some["image"][:], encoded):
        if isinstance(result, ValueError):
            # Training leaves out bad rows.
            continue
        (ids, labels), extra = result, patches - 1 if image else 0
        labels = labels[: max(0, recipe.max_length - extra)]
        learned = sum(label != IGNORE_INDEX for label in labels)
        picture = numbers.setdefault(image, len(numbers)) if image else -1
        if learned:
            rows.append((min(len(ids) + extra, recipe.max_length), learned, picture))
    return np.array(rows).T


def _assume_lengths(rows, recipe, patches, random):
    plain = recipe.template == "plain"
    picture = np.where(random.random(rows) < 0.06 * (not plain), -1, 0)
    shares = np.linspace(0, 1, 11)
    with_picture, text_only = (np.interp(random.random(rows), shares, each) for each in TEXT)
    if plain:
        text = random.integers(9, 41, rows)
        learned = text - 1
    else:
        text = np.where(picture < 0, text_only, with_picture).astype(int)
        # Long texts are about half answers, short ones end with a short answer.
        learned = np.where(text > 90, text // 2, text // 16 + 1)
    lengths = np.minimum(text + patches * (picture >= 0), recipe.max_length)
    return lengths, learned, picture
