"""How fast `vflan.train` is, compared with a plain baseline on the same rows, model and machine.

    python -m bench.train                 # on the CPU, into bench/results/train.json
    python -m bench.train --tiny          # toy sizes, to try the code; nothing is written

GPUs are measured by bench.gpu.

The baseline is what one would write without us: Hugging Face's `Trainer` around
`LlavaForConditionalGeneration`, a padding collator, pictures read by two workers, and LLaVA-1.5's
sampler (batches of one modality, lengths dealt evenly). It is given our token ids, so tokenising
costs neither of the two anything. Each run is a process of its own, ours and the baseline's in
turn; the speed-up is the median over the pairs. Useful tokens: all that are not padding, a
picture's positions among them. The clock runs from the first look at a picture to the end of the
last step. Peak memory: the most that the process ever had resident (imports included, the
baseline's workers not), on a GPU the most that PyTorch had allocated.
"""

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from importlib import import_module
from pathlib import Path

HOME = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(HOME))  # `python bench/train.py` works too

import numpy as np  # noqa: E402

from bench.record import matmul_gflops, write  # noqa: E402
from vflan.config import Recipe, replace  # noqa: E402

# name: (unit, at least, at most)
CHECKS = {
    "speedup_mini": ("x the baseline's useful tokens/s", 1.5, None),
    "speedup_real_lengths": ("x the baseline's useful tokens/s", 2.5, None),
    "memory_ratio": ("of the baseline's peak memory", None, 0.6),
    "pack_fill": ("useful positions / (packed rows x the widest of the step)", 0.97, None),
    "packed_loss_error": ("packed against one by one: loss, gradients, fp32", None, 1e-5),
    "equal_loss_error": ("our loss against the baseline's, same rows and weights", None, 1e-4),
    "matmul_gflops": ("GFLOPS fp32, 1 thread", None, None),
}
SEED = 0
VOCABULARY = 32_000
TINY = dict(hidden=32, layers=2, wide=64, heads=2, tower=(3, 32, 48, 12))
# tower: layers, width, pixels, pixels of a patch; 336 / 14 gives 576 positions a picture, as in
# LLaVA-1.5; "words_only" has a tower only because its processor needs one
BODIES = {
    "small": dict(hidden=256, layers=4, wide=688, heads=4, tower=(3, 128, 336, 14)),
    "larger": dict(hidden=384, layers=6, wide=1024, heads=6, tower=(4, 192, 336, 14)),
    "tiny": TINY,
    "words_only": dict(hidden=32, layers=1, wide=64, heads=2, tower=(1, 32, 336, 14)),
}


# ------------------------------------------------------------------------------- what is trained on


def lengths(n, seed=SEED):
    """A mix like LLaVA-1.5's: per row whether it has a picture, and (question words, answer words)
    of its turns.

    40 % ask one thing and get a short answer, 54 % have several turns or a long answer, 6 % are
    text only, up to 2,048 tokens.
    """
    draw, rows = np.random.default_rng(seed), []
    for kind in draw.choice(3, n, p=[0.40, 0.54, 0.06]):
        if kind == 0:
            turns = [(draw.integers(8, 40), draw.integers(1, 6))]
        elif kind == 1 and draw.random() < 0.3:
            turns = [(draw.integers(8, 30), int(draw.lognormal(np.log(110), 0.5)))]
        elif kind == 1:
            turns = [
                (draw.integers(5, 20), draw.integers(1, 25))
                for _ in range(1 + draw.geometric(0.18))
            ]
        else:
            turns = [
                (draw.integers(10, 80), int(draw.lognormal(np.log(190), 0.7)))
                for _ in range(draw.integers(1, 7))
            ]
        rows.append((kind != 2, turns))
    return rows


def real_lengths(folder, rows, body):
    """A Recipe over synthetic rows of those lengths: random words of a 32,000-word vocabulary, a
    photograph-sized JPEG each.
    """
    from PIL import Image

    draw, samples = np.random.default_rng(SEED), []
    (folder / "images").mkdir(parents=True)
    words = lambda n: " ".join(f"w{i}" for i in draw.integers(0, VOCABULARY - 100, n))  # noqa: E731
    for i, (picture, turns) in enumerate(lengths(rows)):
        talk = [
            dict([("from", who), ("value", words(n))])
            for turn in turns
            for who, n in zip(("human", "gpt"), turn)
        ]
        row = dict(id=str(i), task_name="words", conversations=talk)
        if picture:
            blurred = Image.fromarray(draw.integers(0, 256, (12, 16, 3), dtype=np.uint8)).resize(
                (640, 480)
            )
            blurred.save(folder / "images" / f"{i}.jpg")
            talk[0]["value"], row["image"] = f"<image>\n{talk[0]['value']}", f"{i}.jpg"
        samples.append(row)
    (folder / "samples.json").write_text(json.dumps(samples))
    make_body(folder, **BODIES[body])
    return Recipe(
        name="real",
        stage="base",
        vision_tower=str(folder / "tower"),
        language_model=str(folder / "language_model"),
        samples=str(folder / "samples.json"),
        images=str(folder / "images"),
        runs=str(folder / "runs"),
        tune=("projector", "language_model"),
        lr=1e-4,
        global_batch=16,
        micro_batch=4,
        packing="packed",
        pack_tokens=3072,  # about as many forward passes a step as the baseline has
        seed=SEED,
    )


def make_body(folder, hidden, layers, wide, heads, tower):
    """Folders of a random CLIP tower and Llama of this shape, with a tokenizer that knows 32,000
    words.
    """
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import (
        CLIPImageProcessorPil,
        CLIPVisionConfig,
        CLIPVisionModel,
        LlamaConfig,
        LlamaForCausalLM,
        PreTrainedTokenizerFast,
    )
    from transformers.utils import logging

    from vflan.data.conversation import SYSTEM

    logging.disable_progress_bar()

    known = [
        "<unk>",
        "<s>",
        "</s>",
        "<image>",
        *dict.fromkeys(f"{SYSTEM} USER ASSISTANT : , . '".split()),
    ]
    known += [mark for mark in (".", ",", "'", "s", "user", "assistant") if mark not in known]
    known += [f"w{i}" for i in range(VOCABULARY - len(known))]
    tokenizer = Tokenizer(
        models.WordLevel({word: i for i, word in enumerate(known)}, unk_token="<unk>")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="<unk>",
        extra_special_tokens={"image_token": "<image>"},
    ).save_pretrained(folder / "language_model")
    depth, width, pixels, patch = tower
    torch.manual_seed(SEED)
    eyes = CLIPVisionConfig(
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=depth,
        num_attention_heads=max(2, width // 64),
        image_size=pixels,
        patch_size=patch,
    )
    mouth = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=hidden,
        intermediate_size=wide,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        max_position_embeddings=4096,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    big = hidden > 1024  # a 7B is drawn where it is fast, and kept in 16 bits
    where, kind = (
        ("cuda", torch.bfloat16) if big and torch.cuda.is_available() else ("cpu", torch.float32)
    )
    for part, make, config in (
        ("tower", CLIPVisionModel, eyes),
        ("language_model", LlamaForCausalLM, mouth),
    ):
        torch.set_default_dtype(kind)
        with torch.device(where):
            model = make(config)
        torch.set_default_dtype(torch.float32)
        model.save_pretrained(folder / part)
    CLIPImageProcessorPil(
        size={"shortest_edge": pixels}, crop_size={"height": pixels, "width": pixels}
    ).save_pretrained(folder / "tower")


def mini_world(folder, rows):
    """The mini world's base recipe over rows of its three stages, in their proportion."""
    from vflan.config import preset, resolve

    base, draw, mix = preset("tiny").base, np.random.default_rng(SEED), []
    for stage in ("captions", "flan", "chat"):
        path = resolve(base.samples).with_name(f"{stage}.json")
        if not path.is_file():
            sys.exit(
                f"{path.relative_to(HOME)} is not there: run notebooks/01_data_exploration.ipynb "
                "first."
            )
        mix += json.loads(path.read_text())
    folder.mkdir(parents=True)
    chosen = [mix[i] for i in sorted(draw.choice(len(mix), rows, replace=False))]
    (folder / "samples.json").write_text(json.dumps(chosen))
    samples, images = str(folder / "samples.json"), str(resolve(base.images))
    return replace(
        base, name="mini", samples=samples, images=images, runs=str(folder / "runs"), seed=SEED
    )


# --------------------------------------------------------------------- the two runs, a process each


def ours(recipe):
    """Data, when each step of `vflan.train` ended (seconds from the start of its loop), the rows of
    each, and the run.
    """
    import torch

    import vflan
    from vflan.models import llava as models
    from vflan.training.batching import batch_order

    # Not by `import`: vflan.train as an attribute is a function.
    module, kept = import_module("vflan.training.trainer"), []
    module.prepare = lambda *arguments, prepare=module.prepare, **more: (
        kept.append(prepare(*arguments, **more)) or kept[0]
    )
    if models.compute_dtype(recipe) == torch.bfloat16:
        models.export = lambda model, processor, recipe, folder, init: Path(
            folder
        ).mkdir()  # 13 GB that nobody reads
    run = vflan.train(recipe)
    batches = [rows.tolist() for rows in batch_order(kept[0], recipe)]
    return kept[0], run.metrics().seconds.tolist(), batches, run


def loaded(recipe):
    """Model, processor and data as training has them."""
    from vflan.models import llava as models
    from vflan.training.batching import prepare

    model, processor = models.load_model(recipe), models.load_processor(recipe)
    with tempfile.TemporaryDirectory() as folder:
        return model, processor, prepare(recipe, processor.tokenizer, model.config, Path(folder))


def baseline(recipe, order=None):
    """The same for the baseline, and its model; with `order` it takes the rows in this order in
    place of its sampler's.
    """
    import torch
    from transformers import Trainer, TrainerCallback, TrainingArguments

    from vflan.data.images import read_picture
    from vflan.models import llava as models

    model, processor, data = loaded(recipe)
    models.freeze(model, recipe)
    model.config.use_cache = model.config.text_config.use_cache = False
    # Else Trainer takes a 4-bit model for one that cannot learn.
    model._hf_peft_config_loaded = bool(recipe.lora_r)
    share, times = recipe.global_batch // recipe.micro_batch, []
    order = llava_order(data, recipe.micro_batch, share) if order is None else order

    def collate(rows):
        ids, labels = zip(*(map(torch.from_numpy, data.row(row)) for row in rows))
        pad = torch.nn.utils.rnn.pad_sequence
        batch = dict(
            input_ids=pad(ids, batch_first=True, padding_value=0).long(),
            labels=pad(labels, batch_first=True, padding_value=-100).long(),
            attention_mask=pad(
                [torch.ones(len(row), dtype=torch.long) for row in ids], batch_first=True
            ),
        )
        shown = [
            read_picture(str(data.pictures[data.picture[row]]))
            for row in rows
            if data.picture[row] >= 0
        ]
        return batch | (
            dict(processor.image_processor(shown, return_tensors="pt")) if shown else {}
        )

    class Clock(TrainerCallback):
        def on_train_begin(self, *_, **__):
            times.append(time.perf_counter())

        on_step_end = on_train_begin

    class Plain(Trainer):
        def _get_train_sampler(self, *_):
            return order

        def create_optimizer(self, *_):
            self.optimizer = import_module("vflan.training.trainer")._optimizer(model, recipe)
            for group in self.optimizer.param_groups:
                group["lr"] = group["peak"]
            return self.optimizer

    if recipe.gradient_checkpointing:
        model.model.language_model.activation_checkpointing_enable({"use_reentrant": False})
    arguments = TrainingArguments(
        output_dir=str(recipe.folder.with_name("baseline")),
        per_device_train_batch_size=recipe.micro_batch,
        gradient_accumulation_steps=share,
        max_steps=recipe.max_steps or -1,
        num_train_epochs=1,
        learning_rate=recipe.lr,
        lr_scheduler_type="constant",
        max_grad_norm=0,
        bf16=models.compute_dtype(recipe) == torch.bfloat16,
        use_cpu=not torch.cuda.is_available(),
        dataloader_num_workers=2,
        remove_unused_columns=False,
        report_to="none",
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
        seed=SEED,
    )
    Plain(
        model, arguments, collate, train_dataset=range(len(data.ids)), callbacks=[Clock()]
    ).train()
    size = recipe.global_batch
    steps = [order[i : i + size] for i in range(0, len(order), size)]
    return data, [moment - times[0] for moment in times[1:]], steps, model


def llava_order(data, batch, world, seed=SEED):
    """LLaVA-1.5's sampler in our words: stretches of one modality as large as a global batch, in
    each of them the rows dealt to the micro-batches, longest first to the one with least, by the
    number of text tokens (a picture counts nothing).
    """
    draw, whole, rest = np.random.default_rng(seed), [], []
    text = data.lengths - (data.image_tokens - 1) * (data.picture >= 0)
    for rows in (np.flatnonzero(data.picture >= 0), np.flatnonzero(data.picture < 0)):
        rows = draw.permutation(rows)
        cut = len(rows) // (batch * world) * batch * world
        whole += np.split(rows[:cut], cut // (batch * world)) if cut else []
        rest += rows[cut:].tolist()
    whole = [whole[i] for i in draw.permutation(len(whole))] + [np.array(rest, dtype=int)]
    order = []
    for rows in whole:
        parts = [[] for _ in range(math.ceil(len(rows) / batch))]
        for row in rows[np.argsort(-text[rows])]:
            open_ = [part for part in parts if len(part) < batch]
            min(open_, key=lambda part: text[part].sum() if part else 0).append(int(row))
        order += [row for part in parts for row in part]
    return order


def child(kind, recipe, warm):
    """Train once and say how it went, as json on the last line; the first `warm` steps are not
    timed.
    """
    from vflan.training.metrics import peak_gb

    data, ends, steps, left = ours(recipe) if kind == "ours" else baseline(recipe)
    peak = float(left.metrics().peak_gb.max()) if kind == "ours" else peak_gb()
    seconds = ends[-1] - (ends[warm - 1] if warm else 0)
    rows = [row for step in steps[warm : len(ends)] for row in step]
    found = dict(
        seconds=seconds,
        steps=len(ends) - warm,
        tokens=int(data.lengths[rows].sum()),
        supervised=int(data.supervised[rows].sum()),
        peak_gb=peak,
        fill=padded_fill(data, steps[warm : len(ends)], recipe) if kind == "baseline" else None,
        work=work(data, rows, recipe),
    )
    print(json.dumps(found), flush=True)


def padded_fill(data, steps, recipe):
    """Useful positions among those that a padded forward pass computes."""
    size = recipe.micro_batch
    parts = [step[i : i + size] for step in steps for i in range(0, len(step), size)]
    return float(
        sum(data.lengths[part].sum() for part in parts)
        / sum(len(part) * data.lengths[part].max() for part in parts)
    )


def work(data, rows, recipe, shapes=None):
    """The floating-point operations that these rows need and no more: 2 a weight and position
    forward, 2 for the gradient of the inputs, 2 for that of the weights (LoRA: of the adapters
    only); the head at learned positions, the tower once and forward only, attention within a
    conversation and to the left. Recomputing and padding are not work. shapes: the configurations
    of tower and language model; None: those of the recipe.
    """
    from vflan.models import llava as models

    tower, body = shapes or models.shapes(recipe)
    wide, layers = body.hidden_size, body.num_hidden_layers
    group = body.num_key_value_heads / body.num_attention_heads
    layer = wide * wide * (2 + 2 * group) + 3 * wide * body.intermediate_size
    adapters = recipe.lora_r * layers * (9 * wide + 2 * group * wide + 3 * body.intermediate_size)
    each = 6 if not recipe.lora_r else 4
    tokens, pictures = data.lengths[rows].astype(float), (data.picture[rows] >= 0).sum()
    total = each * layers * layer * tokens.sum() + 6 * adapters * tokens.sum()
    total += each * wide * body.vocab_size * data.supervised[rows].sum()
    total += 6 * layers * wide * (tokens**2).sum()  # 2 products of T x T / 2, thrice
    eye = 4 * tower.hidden_size**2 + 2 * tower.hidden_size * tower.intermediate_size
    seen = data.image_tokens + 1
    total += (
        2 * (tower.num_hidden_layers - 1) * (eye + 2 * seen * tower.hidden_size) * seen * pictures
    )
    return float(total + 6 * (tower.hidden_size + wide) * wide * data.image_tokens * pictures)


def start(kind, recipe, warm=0):
    """Run `child` in a process of its own."""
    recipe = replace(recipe, name=f"{recipe.name}-{time.time_ns()}")
    command = [
        sys.executable,
        "-m",
        "bench.train",
        "--child",
        kind,
        json.dumps(recipe.to_dict()),
        str(warm),
    ]
    environment = os.environ | {
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),
        "VFLAN_HOME": str(HOME),
    }
    done = subprocess.run(command, cwd=HOME, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{kind} of {recipe.name} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


# -------------------------------------------------------------------------------------- the figures


def beside(recipe, repeats, gflops, warm=0):
    """(speed-up, memory ratio, what to note) of ours over the baseline: `repeats` runs of each, in
    turn.
    """
    runs = {"ours": [], "baseline": []}
    for _ in range(repeats):
        for kind, found in runs.items():
            found.append(start(kind, recipe, warm))
            print(
                f"  {kind}: {found[-1]['tokens'] / found[-1]['seconds']:.0f} tokens/s", flush=True
            )

    def rate(run, what="tokens"):
        return run[what] / run["seconds"]

    pairs = list(zip(runs["ours"], runs["baseline"]))
    memory = statistics.median(a["peak_gb"] / b["peak_gb"] for a, b in pairs)
    note = {
        kind: dict(
            useful_tokens_s=round(statistics.median(map(rate, found)), 1),
            learned_tokens_s=round(statistics.median(rate(run, "supervised") for run in found), 1),
            steps_s=round(statistics.median(rate(run, "steps") for run in found), 3),
            share_of_matmul_rate=round(
                statistics.median(rate(run, "work") for run in found) / gflops / 1e9, 3
            ),
            peak_gb=round(statistics.median(run["peak_gb"] for run in found), 3),
        )
        for kind, found in runs.items()
    }
    note["baseline"]["fill"] = round(runs["baseline"][0]["fill"], 3)
    note["ratios"] = [round(rate(a) / rate(b), 2) for a, b in pairs]
    return statistics.median(rate(a) / rate(b) for a, b in pairs), memory, note


def fills(rows=8192, batch=128, budget=8192):
    """How full packed rows are on the bench's length mix: against the widest of each step (the
    figure) and the budget; and how full padded micro-batches of 16 are, in our order and in
    LLaVA's.
    """
    from types import SimpleNamespace

    from vflan.training.batching import batch_order, pack

    mix = lengths(rows)
    # the template's own words: 36 before the first question, 3 around each later one, an end token
    # for each answer
    size = np.array(
        [36 + 576 * seen + sum(5 + q + a for q, a in turns) for seen, turns in mix]
    ).clip(max=2048)
    picture = np.array([0 if seen else -1 for seen, _ in mix])
    data = SimpleNamespace(ids=range(rows), lengths=size, picture=picture, image_tokens=576)
    packed = Recipe(
        "fill", "base", "", "", "", "", "", global_batch=batch, micro_batch=16, packing="packed"
    )
    padded = replace(packed, packing="padded")
    widest = slots = useful = 0
    for step in batch_order(data, packed):
        groups = pack(size[step], budget)
        useful += size[step].sum()
        slots += len(groups) * budget
        widest += len(groups) * max(size[step][group].sum() for group in groups)
    order = llava_order(data, 16, batch // 16)
    theirs = [order[i : i + batch] for i in range(0, rows, batch)]
    note = dict(
        rows_a_step=batch,
        budget=budget,
        mean_length=round(float(size.mean()), 1),
        against_the_budget=round(float(useful / slots), 4),
        padded_in_our_order=round(padded_fill(data, batch_order(data, padded), padded), 4),
        padded_in_llavas_order=round(padded_fill(data, theirs, padded), 4),
        padding_in_packed_rows=0,
    )
    return float(useful / widest), note


def packed_error(recipe, rows=6):
    """The largest difference between a packed row and its conversations one by one: of the mean
    loss and of its gradients.
    """
    from vflan.models import llava as models
    from vflan.models.image_features import Pictures
    from vflan.models.loss import Learner

    model, processor, data = loaded(recipe)
    models.freeze(model, recipe)
    net, pictures = Learner(model, recipe), Pictures(data, model, processor, recipe)
    text = np.flatnonzero(data.picture < 0)[:1]
    rows = np.concatenate([np.flatnonzero(data.picture >= 0)[: rows - len(text)], text])
    tokens, found = data.supervised[rows].sum(), []
    for parts in ([rows], [[row] for row in rows]):
        net.zero_grad()
        loss = 0.0
        for part in parts:
            piece = net(*data.batch(part, "cpu"), pictures(part)) / tokens
            piece.backward()
            loss += piece.item()
        found.append((loss, [w.grad.clone() for w in net.parameters() if w.grad is not None]))
    (loss, gradients), (alone, others) = found
    assert len(gradients) == len(others) > 0
    return max(
        [abs(loss - alone), *((a - b).abs().max().item() for a, b in zip(gradients, others))]
    )


def losses(recipe, model, processor, data, rows):
    """(ours, the baseline's) mean loss over rows with one model."""
    import torch

    from vflan.data.images import read_picture
    from vflan.models.image_features import Pictures
    from vflan.models.loss import Learner

    with torch.no_grad():
        mine = total = 0.0
        for row in rows:
            ids, labels = (torch.from_numpy(column)[None].long() for column in data.row(row))
            which = data.picture[row]
            shown = [read_picture(str(data.pictures[which]))] if which >= 0 else None
            pixels = dict(processor.image_processor(shown, return_tensors="pt")) if shown else {}
            total += (
                model(input_ids=ids, labels=labels, **pixels).loss.item() * data.supervised[row]
            )
        net, pictures = Learner(model, recipe), Pictures(data, model, processor, recipe)
        mine = net(*data.batch(rows, "cpu"), pictures(rows)).item()
    tokens = data.supervised[rows].sum()
    return mine / tokens, total / tokens


def equal_losses(recipe, steps=6):
    """The two losses on the same rows before training, and after the same steps; what is left of
    the difference is rounding.
    """
    import vflan
    from vflan.training.batching import batch_order

    recipe = replace(recipe, name="equal", schedule="constant", warmup_ratio=0.0, max_steps=steps)
    model, processor, data = loaded(recipe)
    rows, order = list(range(16)), [int(row) for step in batch_order(data, recipe) for row in step]
    first = losses(recipe, model, processor, data, rows)
    mine = vflan.train(recipe).load_model()
    *_, theirs = baseline(recipe, order)
    last = (
        losses(recipe, mine, processor, data, rows)[0],
        losses(recipe, theirs.eval(), processor, data, rows)[1],
    )
    print("the same rows, before training:", *first, f"; after the same {steps} steps:", *last)
    return abs(first[0] - first[1]), dict(before=first, after=last, steps=steps)


def main():
    parser = argparse.ArgumentParser(
        prog="python -m bench.train", description=__doc__.splitlines()[0]
    )
    parser.add_argument(
        "--tiny",
        action="store_true",
        help="a toy model everywhere, to try the code; nothing is written",
    )
    parser.add_argument("--repeats", type=int, default=3, help="runs of each, in turn")
    parser.add_argument(
        "--rows",
        type=int,
        nargs=2,
        default=(1600, 64),
        help="rows of the mini world and of real lengths",
    )
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        kind, recipe, warm = options.child
        return child(kind, Recipe.from_dict(json.loads(recipe)), int(warm))
    import torch

    torch.set_num_threads(1)
    values, notes = {}, {"seed": SEED}
    mini, real = (320, 32) if options.tiny else options.rows
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        values["matmul_gflops"] = gflops = matmul_gflops()
        values["pack_fill"], notes["fill"] = fills()
        recipe = mini_world(folder / "mini", mini)
        values["equal_loss_error"], notes["equal_loss"] = equal_losses(recipe)
        values["speedup_mini"], _, notes["mini"] = beside(recipe, options.repeats, gflops)
        for body, rows in (("small", real), ("larger", real // 2)):
            shape = "tiny" if options.tiny else body
            recipe = real_lengths(folder / body, rows, shape)
            if body == "small":
                values["packed_loss_error"] = packed_error(recipe)
            repeats = options.repeats if body == "small" else 1
            speedup, memory, note = beside(recipe, repeats, gflops)
            notes[f"real_lengths_{body}"] = note | dict(body=BODIES[shape], rows=rows)
            if body == "small":
                values["speedup_real_lengths"], values["memory_ratio"] = speedup, memory
            else:
                notes[f"real_lengths_{body}"] |= dict(
                    speedup=round(speedup, 2), memory_ratio=round(memory, 2)
                )
    if options.tiny:
        print(json.dumps(dict(values=values, notes=notes), indent=1))
    else:
        write(
            "train",
            CHECKS,
            values,
            f"python -m bench.train {' '.join(sys.argv[1:])}".strip(),
            **notes,
        )


if __name__ == "__main__":
    main()
