"""What a run will need, before it starts: memory, steps, tokens, hours, energy, and what to change.

A pass is counted (footprint.py); what the optimizer and several processes add is arithmetic. The
sums agree with the measured memory of tiny models on a CPU (tests/training/test_memory.py). Hours
and energy rest on `share` and on the published rates and powers of the GPUs. docs/real_data.md
compares them with LLaVA-1.5's published hours.
"""

from __future__ import annotations

import html
import math
from dataclasses import dataclass
from functools import cached_property
from itertools import zip_longest
from types import SimpleNamespace

import numpy as np
import pandas as pd
import psutil

from vflan.config import Recipe, one_recipe, replace
from vflan.models import image_features
from vflan.models import llava as models
from vflan.models.cache_size import sizes
from vflan.training import batching, distributed
from vflan.training.checkpointing import KEPT
from vflan.training.footprint import Footprint, count
from vflan.training.row_lengths import GPUS, load_rows

# The share of a GPU's peak rate that training reaches, recomputed activations and padding included.
# One number, fitted to the hours of LLaVA-1.5's four published runs on A100s, which tune a
# projector or everything.
SHARE = 0.5
# Of LoRA, and of any run with compile=True: measured at 7B on one H200 (bench/results/gpu.json).
LORA_SHARE, COMPILED_SHARE = 0.33, 0.48
# Bytes of each GPU for CUDA itself, the buffers of its libraries, and gaps between tensors.
RESERVE = 2e9
# An evaluation question in tokens: before the picture, after it, and of the answer; and
# vflan.evaluate's batch.
BEFORE, ASKED, NEW, BATCH = 35, 60, 64, 64
# Bytes of main memory of a process for Python, its libraries and CUDA's, beside the weights.
PROCESS = 2.5e9
# GPUS holds memory in GiB, TFLOP/s and W of each kind. "cpu" is this machine's memory and fp32; its
# rate would say little about small models.
GPUS["cpu"] = (None, None, None)
# So many packed steps are laid out; the others are alike.
STEPS_PACKED = 64


@dataclass(frozen=True)
class _Layout:
    steps: int
    passes: int  # of one process in a step, at most
    shape: tuple[int, int, int, int]  # of the largest pass: rows, length, pictures, answer tokens
    pictures: int  # distinct ones
    rows: np.ndarray  # of the steps that were looked at
    times: float  # how many times as many steps the run has
    # Positions that the GPUs could have computed, for each that the rows need: they pad, and wait
    # for the slowest of them.
    waste: float


@dataclass(frozen=True, eq=False)
class Plan:
    """What `plan` returns: prints as text, and in a notebook as a table.

    Numbers are computed when they are read. Counting a pass takes some seconds.
    """

    recipe: Recipe
    gpus: int
    gpu: str
    share: float
    data: SimpleNamespace  # of load_rows
    notes: tuple[str, ...]  # what was assumed
    dollars_per_hour: float | None = None  # of one GPU

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
        return int(self.data.lengths[self._layout.rows].sum() * self._layout.times)

    @cached_property
    def hours(self) -> float | None:
        """Hours of training; None if the rate of the machine is not known."""
        rate = GPUS[self.gpu][1]
        speed = self.gpus * (rate or 0) * 1e12 * self.share
        return self._operations() * self._layout.times / speed / 3600 if rate else None

    @cached_property
    def disk(self) -> dict[str, float]:
        """{part: bytes} of the run folder; the checkpoints are deleted when the run ends."""
        recipe, model = self.recipe, self.model
        size = 2 if self._half else 4
        parts = dict(model=size * (model.body + model.outer + model.tower))
        if recipe.lora_r:
            parts["adapter"] = 4 * model.trained
        # A sharded model is exported from its last checkpoint, so that there is always one.
        saves = math.ceil(self.steps / recipe.save_every) if recipe.save_every else 0
        saves = max(saves, self._sharding != "none")
        moments = 2 + 8 / 256 if recipe.optimizer == "adamw_8bit" else 8
        # One more than are kept, while it is written.
        parts["checkpoints"] = min(saves, KEPT + 1) * (4 + moments) * model.trained
        return parts

    @cached_property
    def host(self) -> float:
        """Bytes of main memory of all processes together, when the model has been loaded."""
        if not self._on_gpu:
            return self.peak * self.gpus
        # A quantised model is loaded onto the GPU layer by layer.
        model, weights = self.model, self.model.weights if self.recipe.bits == 16 else 0
        features = model.picture * self._layout.pictures
        small = features <= image_features.MAX_KEPT_BYTES
        # FSDP2: one process reads the model and sends the others their shares. Else each reads it.
        copies = 1 if self._sharding == "fsdp2" else self.gpus
        return copies * weights + self.gpus * (PROCESS + (features if small else 0))

    @property
    def kwh(self) -> float | None:
        """Energy of the boards; None if the rate of the machine is not known."""
        return self.hours * self.gpus * GPUS[self.gpu][2] / 1000 if self.hours else None

    @property
    def dollars(self) -> float | None:
        """Hours x GPUs x price of a GPU hour; None if one of them is not known."""
        known = self.hours is not None and self.dollars_per_hour is not None
        return self.hours * self.gpus * self.dollars_per_hour if known else None

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
        cost += "" if self.dollars is None else f", {self.dollars:,.0f} dollars"
        sizes = f"{self.peak / 1e9:.2f} of {self.room / 1e9:.1f} GB each"
        yield f"{self.recipe.name} {verdict} {where}: {sizes}"
        yield f"{self.steps:,} steps, {self.tokens / 1e6:,.1f} M tokens{cost}"
        yield f"a step: at most {self.passes} passes of at most {self.widest:,} positions on each"
        weights, question = self.answering["weights"] / 1e9, self.answering["question"] / 1e9
        batch = f"{self.at_once} at once, one a picture" if self.at_once else "too much"
        yield f"evaluation: {weights:.2f} GB of weights and {question:.2f} GB a question: {batch}"
        sizes = ", ".join(f"{part} {size / 1e9:,.1f}" for part, size in self.disk.items())
        yield f"disk, GB: {sizes} while it trains; main memory: {self.host / 1e9:,.1f} GB"

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
        # A run of millions of steps is like its beginning.
        some = steps.beginning
        shape, passes, useful, computed = (0, 0, 0, 0), 0, 0, 0
        # Packing a step takes time, so only some are packed; padded batches are all looked at.
        for rows in some[:: max(1, len(some) // STEPS_PACKED) if data.packed else 1]:
            slowest = []  # positions of each pass, on the GPU that has most
            for parts in batching.micro_batches(data, rows, recipe, self.gpus):
                passes = max(passes, len(parts))
                shapes = [*map(self._shape, parts)]
                shape = max([shape, *shapes], key=lambda each: (each[0] * each[1], each[3]))
                positions = [each[0] * each[1] for each in shapes]
                slowest = [max(pair) for pair in zip_longest(slowest, positions, fillvalue=0)]
            useful += data.lengths[rows].sum()
            computed += self.gpus * sum(slowest)
        pictures = len(np.unique(data.picture[data.picture >= 0]))
        shape = tuple(map(int, shape))
        waste, times = float(computed / useful), len(steps) / len(some)
        rows = np.concatenate(some)
        return _Layout(len(steps), passes, shape, pictures, rows, times, waste)

    def _shape(self, rows):
        lengths = self.data.lengths[rows]
        size = (1, lengths.sum()) if self.data.packed else (len(rows), lengths.max())
        pictures = (self.data.picture[rows] >= 0).sum()
        return *size, pictures, self.data.supervised[rows].sum()

    @cached_property
    def model(self) -> Footprint:
        """The counted model and its largest pass."""
        return count(self.recipe, self._half, self._sharding != "none", self._layout.shape)

    @cached_property
    def memory(self) -> dict[str, float]:
        """{part: bytes} of one GPU when their sum is largest; exchange is what sharding adds."""
        memory, model = self._state(), self.model
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
        model, kind, world = self.model, self._sharding, self.gpus
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
        small = self.model.picture * pictures <= image_features.MAX_KEPT_BYTES
        per_step = max(image_features.TOWER_BATCH, self.recipe.global_batch // self.gpus)
        if not self._on_gpu:
            return pictures if small else min(pictures, per_step)
        # Features of a small set, or of one on disk, are kept in the main memory.
        return 0 if small or self.recipe.feature_cache else min(pictures, per_step)

    @cached_property
    def answering(self) -> dict[str, float]:
        """{part: bytes} of one GPU that evaluates: weights, a question with picture, reserve."""
        recipe, model, size = self.recipe, self.model, 2 if self._half else 4
        patches, unit = models.picture_tokens(recipe), sizes(models.shapes(recipe)[1], size)
        # A quantised layer has a scale for each 64 weights.
        per_weight = recipe.bits / 8 + 1 / 64 if recipe.bits < 16 else size
        weights = model.body * per_weight + size * (model.outer + model.tower)
        asking = unit.asking(BEFORE + patches, [(1, ASKED)], NEW)
        question = max(asking, unit.reading(1, BEFORE, patches))
        reserve = dict(reserve=RESERVE) if self._on_gpu else {}
        return dict(weights=weights, question=question) | reserve

    def _operations(self):
        """Return floating-point operations of the layout's steps, recomputed ones included."""
        data, rows, text = self.data, self._layout.rows, self.data.text
        lengths, shown = data.lengths[rows].astype(float), (data.picture[rows] >= 0).sum()
        # Forward and the gradients of activations take 2 operations a weight each.
        full = "language_model" in self.recipe.tune and not self.recipe.lora_r
        for_weights, again = 2 if full else 0, 2 if self.recipe.gradient_checkpointing else 0
        total = (4 + for_weights + again) * self.model.body * lengths.sum()
        # Causal attention computes half of T x T.
        attention = text.num_hidden_layers * text.hidden_size * (lengths**2).sum()
        total += (6 + again) * attention
        answer_tokens = data.supervised[rows].sum()
        total += (4 + for_weights) * text.vocab_size * text.hidden_size * answer_tokens
        if self.recipe.lora_r:
            # Adapters compute forward and both gradients, like weights tuned in full.
            total += (6 + again) * self.model.trained * lengths.sum()
        # A projector alone is too small to matter. The tower reads each picture once, unpadded.
        tower = 2 * self.model.tower * (data.patches + 1) * shown
        return total * self._layout.waste + tower

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


def plan_recipe(recipe: Recipe, gpus: int, gpu: str, share: float | None) -> Plan:
    """Plan one run; `vflan.plan` describes the arguments."""
    one_recipe(recipe)
    gpu = "cpu" if recipe.device == "cpu" else gpu
    if gpu not in GPUS:
        raise ValueError(f"There is no gpu={gpu!r} in the list; known ones are {', '.join(GPUS)}.")
    share = usual_share(recipe) if share is None else share
    if not (isinstance(gpus, int) and gpus > 0 and 0 < share <= 1):
        rule = "gpus is a whole number from 1, and share is above 0 and at most 1"
        raise ValueError(f"gpus={gpus!r}, share={share!r}: {rule}.")
    distributed.rows_per_process(recipe, gpus)
    packed = recipe.packing == "packed" or recipe.packing == "auto" and gpu != "cpu"
    recipe = replace(recipe, packing="packed" if packed else "padded")
    data, notes = load_rows(recipe)
    _, rate, watts = GPUS[gpu]
    if rate:
        notes += (f"assumed: {share:.0%} of {rate} TFLOP/s; {watts} W for a board alone",)
    return Plan(recipe, gpus, gpu, share, data, notes)


def usual_share(recipe: Recipe) -> float:
    """The share of a GPU's peak rate that such a run is planned with."""
    if recipe.compile:
        return COMPILED_SHARE
    return LORA_SHARE if recipe.lora_r else SHARE
