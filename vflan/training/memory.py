"""What a run will need, before it is started: memory by part, steps, tokens, hours and energy, and what to change.

What a pass holds is counted (footprint.py), what the optimiser and several processes add is arithmetic. The sums agree with
what tiny models were measured to hold on a CPU (tests/training/test_memory.py); figures for GPUs were not measured. Hours and energy
rest on `share` and on the boards' published rates and powers, and are no better than these.
"""

import html
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import pandas as pd
import psutil
from huggingface_hub import try_to_load_from_cache

from vflan.config import Recipe, one_recipe, replace, resolve
from vflan.data.conversation import IGNORE_INDEX, encode_many
from vflan.data.mixture import recipe_samples
from vflan.models import llava as models
from vflan.models.cache_size import sizes
from vflan.training import batching, distributed
from vflan.training.footprint import count

SHARE = 0.4  # of the peak rate, recomputing counted; LLaVA-1.5's 3.5 h and 10 h of 7B on 8 A100 come to 0.42 and 0.3
RESERVE = 2.0  # GB a GPU: CUDA itself, its libraries' buffers, and what lies unused between tensors
# a question of an evaluation in tokens: before the picture, after it, and of the answer; and vflan.evaluate's batch
BEFORE, ASKED, NEW, BATCH = 35, 60, 64, 64
GPUS = {  # memory in GiB, dense bf16 rate in TFLOP/s, board power in W, as the makers publish them
    "A100-40G": (40, 312, 400),
    "A100-80G": (80, 312, 400),
    "H100-80G": (80, 989, 700),
    "H200-141G": (141, 989, 700),
    "L4-24G": (24, 121, 72),
    "L40S-48G": (48, 362, 350),
    "A10-24G": (24, 125, 150),
    "A6000-48G": (48, 155, 300),
    "RTX3090-24G": (24, 71, 350),
    "RTX4090-24G": (24, 165, 450),
    "RTX5090-32G": (32, 210, 575),
    "cpu": (
        None,
        None,
        None,
    ),  # this machine's memory, fp32; its rate says little about small models
}
ROWS = {  # of the published files, for where they are not yet
    "annotation_191-task_1k.json": 186_103,
    "vision_flan.json": 1_664_261,
    "blip_laion_cc_sbu_558k.json": 558_128,
    "llava_instruct_150k.json": 157_712,
    "llava_v1_5_mix665k.json": 665_298,
}
# deciles of the text of bench/train.py's mix, in tokens: rows with a picture, and the 6 % without
TEXT = (
    (50, 59, 66, 74, 81, 105, 139, 172, 217, 304, 1131),
    (83, 330, 508, 697, 865, 1001, 1154, 1341, 1591, 1842, 3197),
)
READ, LAID_OUT = (
    4000,
    64,
)  # rows whose lengths are read, steps whose packed rows are laid out; the rest is taken to be alike


@dataclass(frozen=True)
class Plan:
    """What `plan` found; prints as text, in a notebook as a table. `hours` and `kwh` are None where no rate is known."""

    recipe: Recipe
    gpus: int
    gpu: str
    memory: dict[
        str, float
    ]  # bytes of one GPU by part when their sum is largest; exchange: what sharing it out takes
    room: float  # bytes that one GPU has
    steps: int
    passes: int  # forward passes of one GPU a step, at most
    widest: int  # positions of the largest of them
    tokens: int  # positions that all steps train on, the pictures' among them; no padding
    hours: float | None
    kwh: float | None
    changes: tuple[str, ...]  # if it does not fit: what was tried, and what that comes to
    notes: tuple[str, ...]  # what was assumed
    answering: dict[
        str, float
    ]  # bytes of one GPU that evaluates: weights, question (one with its picture), reserve
    at_once: int  # questions, each on its own picture, that are answered together there; 0: not even one fits

    @property
    def peak(self) -> float:
        """Bytes of one GPU, the reserve included."""
        return sum(self.memory.values())

    @property
    def needs(self) -> float:
        """Bytes that one GPU must have, to train and then to answer one question at a time at least."""
        return max(self.peak, sum(self.answering.values()))

    @property
    def fits(self) -> bool:
        """Whether training does, and answering after it."""
        return self.needs <= self.room

    def _lines(self):
        where = f"{self.gpus} x {self.gpu}" if self.gpu != "cpu" else "this machine's memory"
        verdict = "fits into" if self.fits else "does NOT fit into"
        cost = "" if self.hours is None else f", {self.hours:,.1f} hours, {self.kwh:,.1f} kWh"
        yield f"{self.recipe.name} {verdict} {where}: {self.peak / 1e9:.2f} of {self.room / 1e9:.1f} GB each"
        yield f"{self.steps:,} steps, {self.tokens / 1e6:,.1f} M tokens{cost}"
        yield f"a step: at most {self.passes} passes of at most {self.widest:,} positions on each"
        weights, question = self.answering["weights"] / 1e9, self.answering["question"] / 1e9
        some = f"{self.at_once} at once, one a picture" if self.at_once else "too much"
        yield f"evaluation: {weights:.2f} GB of weights and {question:.2f} GB a question: {some}"

    def __str__(self):
        parts = [f"  {part:12}{size / 1e9:9.2f} GB" for part, size in self.memory.items()]
        tried = ["tried:", *(f"  {change}" for change in self.changes)] if self.changes else []
        return "\n".join([*self._lines(), *parts, *tried, *self.notes])

    __repr__ = __str__

    def _repr_html_(self):
        table = pd.DataFrame(
            {part: [round(size / 1e9, 2)] for part, size in self.memory.items()}, index=["GB"]
        )
        lines = [html.escape(line) for line in (*self._lines(), *self.changes, *self.notes)]
        return f"<b>{lines[0]}</b>{table.to_html()}{'<br>'.join(lines[1:])}"


def plan(recipe: Recipe, gpus: int = 1, gpu: str = "A100-80G", share: float = SHARE) -> Plan:
    """What training `recipe` needs on `gpus` of a kind named in GPUS ("cpu": this machine), and whether that is there.

    Nothing is downloaded and no weight is read. Lengths are those of the samples where they and the tokenizer are on this
    machine, else like LLaVA-1.5's. `share`: of the boards' peak rate that training reaches, recomputing counted. ValueError
    names the known kinds, and what cannot be shared out.
    """
    one_recipe(recipe)
    if gpu not in GPUS:
        raise ValueError(f"There is no gpu={gpu!r} in the list; known ones are {', '.join(GPUS)}.")
    if not (isinstance(gpus, int) and gpus > 0 and 0 < share <= 1):
        raise ValueError(
            f"gpus={gpus!r}, share={share!r}: a whole number from 1, and a share above 0 and at most 1."
        )
    distributed.rows_per_process(recipe, gpus)
    packed = recipe.packing == "packed" or recipe.packing == "auto" and gpu != "cpu"
    recipe = replace(recipe, packing="packed" if packed else "padded")
    data, notes = _rows(recipe)
    work, (memory, rate, watts) = _layout(recipe, data, gpus), GPUS[gpu]
    limit = psutil.virtual_memory().total / gpus if memory is None else memory * 2**30
    memory = _memory(recipe, gpus, gpu, work)
    hours = None
    if rate:
        found, *_ = _counted(recipe, gpus, gpu, work)
        hours = _operations(recipe, data, work, found) / (gpus * rate * 1e12 * share) / 3600
        notes += (
            f"assumed: {share:.0%} of {rate} TFLOP/s; {watts} W a board and nothing beside it; no GPU was measured",
        )
    return Plan(
        recipe,
        gpus,
        gpu,
        memory,
        limit,
        steps=work.steps,
        passes=work.passes,
        widest=work.shape[0] * work.shape[1],
        tokens=int(data.lengths[work.rows].sum()),
        hours=hours,
        kwh=hours * gpus * watts / 1000 if rate else None,
        changes=_changes(recipe, gpus, gpu, data, limit) if sum(memory.values()) > limit else (),
        notes=notes,
        answering=(answering := _answering(recipe, gpus, gpu, work)),
        at_once=max(
            0, min(BATCH, int((limit - sum(answering.values())) / answering["question"]) + 1)
        ),
    )


def _answering(recipe, world, gpu, work) -> dict[str, float]:
    """{part: bytes} of a process that evaluates: the trained model in the width of its passes, and a question's cache."""
    found, _, size = _counted(recipe, world, gpu, work)
    text, wide = models.shapes(recipe)[1], models.picture_tokens(recipe)
    # a quantised layer has a scale for each 64 weights, as footprint counts it
    body = found["body"] * (recipe.bits / 8 + 1 / 64 if recipe.bits < 16 else size)
    weights = body + size * (found["outer"] + found["tower/weights"])
    each = sizes(text, size)
    question = max(each.asking(BEFORE + wide, [(1, ASKED)], NEW), each.reading(1, BEFORE, wide))
    return dict(weights=weights, question=question) | (
        dict(reserve=RESERVE * 1e9) if gpu != "cpu" else {}
    )


def _rows(recipe):
    """Lengths, learned tokens and pictures of the recipe's rows, as `batches.plan` takes them, and what was assumed."""
    vision, text = models.shapes(recipe)
    path, wide, draw = (
        resolve(recipe.samples),
        (vision.image_size // vision.patch_size) ** 2,
        np.random.default_rng(0),
    )
    samples = recipe_samples(recipe) if path.exists() else None
    rows = len(samples) if samples else recipe.num_samples or ROWS.get(path.name)
    if not rows:
        raise ValueError(
            f"{recipe.samples} is not there, and how many rows it has is not known: set num_samples."
        )
    source = recipe.language_model
    tokenizer = resolve(source).is_dir() or isinstance(
        try_to_load_from_cache(source, "tokenizer_config.json"), str
    )
    if samples and tokenizer:
        lengths, learned, picture = _read(samples, recipe, wide)
        notes = (f"lengths: those of {len(lengths):,} of {rows:,} rows",)
        chosen = draw.integers(len(lengths), size=rows) if rows > READ else np.arange(len(lengths))
    else:
        chosen = np.arange(rows)
        picture = np.where(draw.random(rows) < 0.06 * (recipe.template != "plain"), -1, 0)
        said = [np.interp(draw.random(rows), np.linspace(0, 1, 11), deciles) for deciles in TEXT]
        said = (
            draw.integers(9, 41, rows)
            if recipe.template == "plain"
            else np.where(picture < 0, *said[::-1]).astype(int)
        )
        learned = (
            np.where(said > 90, said // 2, said // 16 + 1)
            if recipe.template != "plain"
            else said - 1
        )
        lengths = np.minimum(said + wide * (picture >= 0), recipe.max_length)
        notes = (
            f"assumed: lengths like LLaVA-1.5's, {rows:,} rows; samples or tokenizer are not on this machine",
        )
    if rows > READ or not (samples and tokenizer):  # which rows share a picture is not known
        picture = np.where(picture[chosen] < 0, -1, chosen)
    data = dict(lengths=lengths[chosen], supervised=learned[chosen], picture=picture, ids=chosen)
    return SimpleNamespace(**data, packed=recipe.packing == "packed", wide=wide, text=text), notes


def _read(samples, recipe, wide):
    some = samples.select(np.linspace(0, len(samples) - 1, min(len(samples), READ)).astype(int))
    encoded = encode_many(some["conversations"][:], models.load_tokenizer(recipe), recipe.template)
    rows, numbers = [], {}
    for image, found in zip(some["image"][:], encoded):
        more = wide - 1 if image else 0
        if not isinstance(found, ValueError):  # a bad row, which training leaves out
            learned = sum(
                label != IGNORE_INDEX for label in found[1][: max(0, recipe.max_length - more)]
            )
            which = numbers.setdefault(image, len(numbers)) if image else -1
            rows += (
                [(min(len(found[0]) + more, recipe.max_length), learned, which)] if learned else []
            )
    return np.array(rows).T


def _layout(recipe, data, world):
    """The steps of the run: how many, their rows, and the largest forward pass of one process."""
    steps = batching.plan(data, recipe, np.arange(len(data.ids) - recipe.heldout_rows))
    shape, passes = (0, 0, 0, 0), 0  # rows, positions in each, pictures, learned tokens
    for rows in steps[:: max(1, len(steps) // LAID_OUT) if data.packed else 1]:
        for parts in batching.micro_batches(data, rows, recipe, world):
            passes = max(passes, len(parts))
            for part in parts:
                lengths, rest = (
                    data.lengths[part],
                    ((data.picture[part] >= 0).sum(), data.supervised[part].sum()),
                )
                wide = (1, lengths.sum()) if data.packed else (len(part), lengths.max())
                shape = max(shape, (*wide, *rest), key=lambda each: (each[0] * each[1], each[3]))
    pictures, rows = len(np.unique(data.picture[data.picture >= 0])), np.concatenate(steps)
    return SimpleNamespace(
        steps=len(steps), passes=passes, shape=tuple(map(int, shape)), pictures=pictures, rows=rows
    )


def _operations(recipe, data, work, found):
    """Floating-point operations of all steps, what gradient checkpointing computes again among them."""
    wide = data.text.hidden_size
    whole = (
        2 if "language_model" in recipe.tune and not recipe.lora_r else 0
    )  # gradients of the weights themselves
    again = 2 if recipe.gradient_checkpointing else 0
    lengths, shown = data.lengths[work.rows].astype(float), (data.picture[work.rows] >= 0).sum()
    total = (4 + whole + again) * found["body"] * lengths.sum()
    total += (
        (6 + again) * data.text.num_hidden_layers * wide * (lengths**2).sum()
    )  # causal: half of T x T
    total += (4 + whole) * data.text.vocab_size * wide * data.supervised[work.rows].sum()
    return (
        total + 2 * found["tower/weights"] * (data.wide + 1) * shown
    )  # the projector's part is too small to matter


def _counted(recipe, world, gpu, work):
    """What one pass holds, how processes share the model, and the bytes of a number in the passes."""
    how, half = (
        distributed.sharding(recipe, world, gpu != "cpu"),
        gpu != "cpu" and recipe.precision == "bf16",
    )
    return count(recipe, half, how != "none", work.shape), how, 2 if half else 4


def _memory(recipe, world, gpu, work) -> dict[str, float]:
    """{part: bytes} of one process at its fullest."""
    (found, how, size), on_gpu = _counted(recipe, world, gpu, work), gpu != "cpu"
    learning, rest = found["learning"], found["body"] + found["outer"] + found["tower/weights"]
    memory = dict(
        weights=found["weights"], gradients=4 * learning, optimiser=8 * learning, exchange=0
    )
    if recipe.optimizer == "adamw_8bit":
        memory["optimiser"] = (
            2 + 8 / 256
        ) * learning  # two moments, and for each a scale for 256 of them
    if (
        how == "fsdp2"
    ):  # copies in the passes' width: what is no layer, two layers; one layer's gradients, in fp32 too
        memory |= {part: memory[part] / world for part in ("gradients", "optimiser")}
        memory["weights"] -= (1 - 1 / world) * found["shared"]
        memory["exchange"] = size * found["outer"] + (3 * size + 4) * found["layer"]
    elif (
        how != "none"
    ):  # by DeepSpeed's own arithmetic: weights and gradients in bf16, an fp32 copy beside the moments
        cut = world if how == "zero3" else 1
        memory |= dict(
            weights=size * rest / cut,
            gradients=size * learning / world,
            optimiser=12 * learning / world,
        )
        memory["exchange"] = size * (min(1e9, rest) if how == "zero3" else 2 * min(5e8, learning))
    elif world > 1:
        memory["exchange"] = 4 * learning  # DDP's buckets hold each gradient a second time
    memory |= {part: found[f"again/{part}"] for part in ("activations", "logits")}
    if how == "none" and work.passes == 1:  # the gradients grow while what they need goes
        memory["activations"] += (
            found["first"] - memory["gradients"] - memory["activations"] - memory["logits"]
        )
    if found["tower"] > sum(
        memory[part] for part in ("gradients", "activations", "logits")
    ):  # it looks before all these
        memory |= dict(gradients=0, activations=found["tower"], logits=0)
    small = found["picture"] * work.pictures <= batching.MAX_KEPT_BYTES
    look = min(work.pictures, max(batching.TOWER_BATCH, recipe.global_batch // world))
    held = (
        (0 if small or recipe.feature_cache else look)
        if on_gpu
        else (work.pictures if small else look)
    )
    memory["features"] = found["picture"] * (
        held + work.shape[2]
    )  # kept on the device, and those of one pass
    return memory | (dict(reserve=RESERVE * 1e9) if on_gpu else {})


def _changes(recipe, world, gpu, data, room) -> tuple[str, ...]:
    """What would make it fit, as far as it was tried: first what changes no result, each on top of the one before."""
    said = []

    def tried(changes, number=world):
        other = replace(recipe, **changes)
        size = sum(_memory(other, number, gpu, _layout(other, data, number)).values())
        words = [f"{name}={value!r}" for name, value in changes.items()] + [f"gpus={number}"] * (
            number != world
        )
        said.append(f"{', '.join(words)}: {size / 1e9:.1f} GB{', fits' if size <= room else ''}")
        return size <= room

    less = dict(gradient_checkpointing=True)
    if not recipe.gradient_checkpointing and tried(less):
        return tuple(said)
    less |= dict(pack_tokens=None) if data.packed else dict(micro_batch=1)
    if (recipe.pack_tokens if data.packed else recipe.micro_batch > 1) and tried(less):
        return tuple(said)
    if "language_model" in recipe.tune and not recipe.lora_r:
        fair = [
            n
            for n in (2, 4, 8, 16, 32, 64)
            if n > world and recipe.global_batch % n == 0 and gpu != "cpu"
        ]
        any(tried(less, n) for n in fair)
        tried(less | dict(optimizer="adamw_8bit", sharding="auto"))
        tried(less | dict(lora_r=128, lora_alpha=256))
    if "language_model" in recipe.tune and recipe.bits > 4:
        lora = dict(lora_r=recipe.lora_r or 128, lora_alpha=recipe.lora_alpha or 256)
        tried(less | lora | dict(bits=4, optimizer="adamw_8bit", sharding="auto"))
    return tuple(said)
