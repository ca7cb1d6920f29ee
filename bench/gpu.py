"""One command measures a rented GPU: does it work, how fast is it, how much memory does it take.

    python -m bench.gpu            # on a GPU: at most 8 minutes, into bench/results/gpu.json
    python -m bench.gpu --dry      # on a CPU, tiny shapes, two minutes: does the script itself run

It needs PyTorch, transformers, peft and accelerate, and nothing else: no weights, no data set, no
network. The 7B model has random weights that are made on the device. What only some steps need
(datasets, bitsandbytes) is imported where it is used; `--packages FOLDER` puts a folder with them
on the path. A step that fails, or that outlasts its time box, is recorded with its reason, and the
next one begins. Every figure is written the moment it is known, to $OUT/gpu.json where OUT is set.

MFU is the share of the measured bf16 matmul rate that went into the arithmetic which the rows need
and no more (bench.train.work): recomputed activations and padding do not count.
"""

import argparse
import gc
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
import types
from contextlib import contextmanager, nullcontext
from importlib import import_module
from pathlib import Path

HOME = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(HOME))

from bench.record import machine, row  # noqa: E402

# name: (unit, at least, at most)
CHECKS = {
    "matmul_tflops": ("TFLOPS, bf16 product of 8192 x 8192", None, None),
    "tiny_works": ("1: the tiny preset trains on this device, bf16 and fp32", 1, None),
    "packed_error_fp32": ("packed against one by one: loss and gradients, fp32", None, 1e-4),
    "packed_error_bf16": ("the same in bf16, relative to the largest gradient", None, 0.05),
    "answers_equal_fp32": (
        "share of batched answers equal to those of one by one, fp32",
        1.0,
        None,
    ),
    "answers_equal_bf16": ("the same in bf16, where near ties may fall the other way", 0.9, None),
    "full_mfu": ("of the measured matmul rate", 0.55, None),
    "full_tokens_s": ("useful tokens/s, 7B, all weights", None, None),
    "full_gb": ("GB at the most", None, None),
    "lora_mfu": ("of the measured matmul rate", 0.55, None),
    "lora_tokens_s": ("useful tokens/s, 7B, LoRA", None, None),
    "lora_gb": ("GB at the most", None, None),
    "evaluate_speedup": ("x questions/s of batch-1 generate(), POPE's shape", 12, None),
    "evaluate_questions_s": ("questions/s, 7B, POPE's shape", None, None),
    "single_questions_s": ("questions/s, 7B, one question a picture", None, None),
    "qlora_gb": ("GB at the most, 7B, rows of 2,048 tokens", None, 16),
    "qlora_tokens_s": ("useful tokens/s, 7B in 4 bits", None, None),
    "resume_equal": ("1: a resumed run ends with the same bits", None, None),
    "resume_error": ("largest difference of a weight, resumed against uninterrupted", None, None),
    "baseline_tokens_s": ("useful tokens/s of Hugging Face's Trainer, 7B, LoRA", None, None),
    "lora_speedup": ("x the baseline's useful tokens/s", None, None),
}
BOXES = dict(matmul=30, tiny=60, packed=45, answers=45, full=90, lora=110)
BOXES |= dict(evaluation=60, qlora=60, resume=30, baseline=60, ways=150)
SEED = 0


class Figures:
    """What is known so far, in the form of every bench's record, on disk after every figure."""

    def __init__(self, path, about, card):
        """Figures of an earlier call on the same kind of card stay until they are measured
        again.
        """
        self.path, self.about, self.rows, self.notes = path, about, {}, dict(failed={})
        kept = HOME / "bench" / "results" / "gpu.json"
        old = json.loads(kept.read_text()) if kept.is_file() else {}
        if card and old.get("notes", {}).get("card") == card:
            self.rows, self.notes = {row["name"]: row for row in old["checks"]}, old["notes"]
        self.failed = self.notes["failed"]
        self.commit = subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], cwd=HOME, capture_output=True, text=True
        )

    def value(self, name):
        return self.rows.get(name, {}).get("value")

    def put(self, name=None, value=None, **notes):
        if name:
            self.rows[name] = row(name, value, *CHECKS[name], self.commit.stdout.strip())
            print(f"{name:24} {self.rows[name]['value']}", flush=True)
        self.notes |= notes
        record = dict(
            self.about, notes=self.notes, checks=[self.rows[n] for n in CHECKS if n in self.rows]
        )
        scratch = self.path.with_name(f".{self.path.name}")
        scratch.write_text(json.dumps(record, indent=1) + "\n")
        scratch.replace(self.path)


class Late(Exception):
    """A step has outlasted its time box."""


@contextmanager
def box(seconds):
    """Raise Late in the block after so many seconds (a kernel that already runs is waited for)."""

    def late(*_):
        raise Late(f"not finished within {seconds:.0f} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def sync():
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()


def free():
    """Let go of everything that the last step made, and begin to count the peak anew."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def seconds_of(function, repeats=3):
    """The median of some timed calls after one that warms up."""
    function()
    times = []
    for _ in range(repeats):
        sync()
        start = time.perf_counter()
        function()
        sync()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


@contextmanager
def profiled(path):
    """Write the kernels that took most time in the block to a file."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as watched:
        yield
    path.write_text(
        watched.key_averages().table(
            sort_by="cuda_time_total", row_limit=40, max_name_column_width=80
        )
    )


class Bench:
    """The steps, and what they share: the device, shapes, rows, a model of random weights."""

    def __init__(self, figures, folder, dry):
        import torch

        from bench.train import real_lengths
        from vflan.config import replace
        from vflan.models import llava as models

        self.figures, self.folder, self.dry, self.rate = figures, folder, dry, None
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.half = torch.bfloat16 if self.device.type == "cuda" else torch.float32
        # the processor is that of 336 pixels and 32,000 words; the weights are made on the device
        rows = 24 if dry else 128
        recipe = real_lengths(folder / "real", rows, "words_only")
        self.recipe = replace(
            recipe,
            precision="bf16",
            device="auto" if self.device.type == "cuda" else "cpu",
            global_batch=rows // 4,
            micro_batch=2,
            max_bad_share=0.1,
            pack_tokens=2048 if dry else 8192,
        )
        self._processor = models.load_processor(self.recipe)
        self.samples = json.loads((folder / "real" / "samples.json").read_text())

    # --------------------------------------------------------------------------------------- shared

    def model(self, layers=None, width=None, bits=16, dtype=None):
        """A LLaVA-1.5 of the 7B shape (or of fewer layers, or narrower), random weights, made on
        the device.
        """
        import torch
        from transformers import CLIPVisionConfig, LlamaConfig, LlavaForConditionalGeneration

        from vflan.models import llava as models

        small = dict(layers=2, width=64) if self.dry else dict(layers=32, width=4096)
        layers, width = layers or small["layers"], width or small["width"]
        text = LlamaConfig(
            vocab_size=32_001,
            hidden_size=width,
            intermediate_size=11008 * width // 4096,
            num_hidden_layers=layers,
            num_attention_heads=max(2, width // 128),
            max_position_embeddings=4096,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
        )
        eye = (2, 32) if self.dry else (24, 1024) if width == 4096 else (4, 256)
        vision = CLIPVisionConfig(
            hidden_size=eye[1],
            intermediate_size=4 * eye[1],
            num_hidden_layers=eye[0],
            num_attention_heads=max(2, eye[1] // 64),
            image_size=336,
            patch_size=14,
        )
        config = models._llava_config(
            vision, text, self.processor().tokenizer.convert_tokens_to_ids("<image>")
        )
        torch.manual_seed(SEED)
        torch.set_default_dtype(dtype or self.half)
        try:
            with self.device:
                model = LlavaForConditionalGeneration(config)
        finally:
            torch.set_default_dtype(torch.float32)
        if bits == 4:
            quantise(model.model.language_model, self.half)
        model.generation_config.update(do_sample=False, eos_token_id=2, pad_token_id=0)
        return model.eval()

    def processor(self):
        return self._processor

    def data(self, config, samples=None):
        """Our rows as training has them after reading, without `datasets`."""
        import numpy as np

        from vflan.data.conversation import IGNORE_INDEX, encode_many
        from vflan.models.loss import packs
        from vflan.training.batching import Data

        samples = self.samples if samples is None else samples
        turns = [row["conversations"] for row in samples]
        encoded = encode_many(turns, self.processor().tokenizer, self.recipe.template)
        wide, numbers, picture, tokens, learned = config.image_seq_length, {}, [], [], []
        for sample, (ids, labels) in zip(samples, encoded):
            room = self.recipe.max_length - (wide - 1 if sample.get("image") else 0)
            name = (
                str(self.folder / "real" / "images" / sample["image"])
                if sample.get("image")
                else None
            )
            picture.append(numbers.setdefault(name, len(numbers)) if name else -1)
            tokens.append(np.array(ids[:room], dtype=np.int32))
            learned.append(np.array(labels[:room]) != IGNORE_INDEX)
        picture, lengths = np.array(picture), np.array([len(ids) for ids in tokens])
        start, text = np.concatenate([[0], np.cumsum(lengths)]), np.dtypes.StringDType()
        learned = np.concatenate(learned)
        return Data(
            ids=np.array([row["id"] for row in samples], dtype=text),
            tokens=np.concatenate(tokens),
            learned=learned,
            start=start,
            pictures=np.array(list(numbers), dtype=text),
            picture=picture,
            lengths=lengths + (wide - 1) * (picture >= 0),
            supervised=np.add.reduceat(learned, start[:-1], dtype=np.int64),
            image_tokens=wide,
            image_token_id=config.image_token_id,
            packed=packs(self.recipe),
        )

    def trained(self, recipe, model, warm=2):
        """(useful tokens/s, MFU, peak GB) of vflan's own training of a model in memory; the first
        steps are not timed.
        """
        import torch

        import vflan
        from bench.train import work
        from vflan.models import llava as models
        from vflan.training.batching import batch_order
        from vflan.training.run import Run

        module, data = import_module("vflan.training.trainer"), self.data(model.config)
        shapes = model.config.vision_config, model.config.text_config
        swaps = [
            (models, "load_model", lambda *_: model),
            (models, "load_processor", lambda *_: self.processor()),
            (module, "prepare", lambda *_, **__: data),
            # hashing 13 GB on one core, thrice, is not what is measured; nor is writing them
            (models, "fingerprint", lambda weights: "not hashed here"),
            (Run, "finish", lambda run, *_, **__: (run.folder / "done.json").write_text("{}")),
        ]
        recipe = recipe.__class__(**{**recipe.__dict__, "name": f"gpu-{time.time_ns()}"})
        with patched(swaps):
            run = vflan.train(recipe)
        metrics, batches = run.metrics(), batch_order(data, recipe)
        rows = [row for step in batches[warm:] for row in step]
        seconds = metrics.seconds.iloc[-1] - metrics.seconds.iloc[warm - 1]
        rate = data.lengths[rows].sum() / seconds
        flops = work(data, rows, recipe, shapes) / seconds
        peak = float(metrics.peak_gb.max()) if torch.cuda.is_available() else None
        note = dict(
            steps=len(batches) - warm,
            rows=len(rows),
            seconds=round(float(seconds), 2),
            ends_s=metrics.seconds.round(1).tolist(),
            fill=round(float(metrics.fill.mean()), 3),
            tflops=round(flops / 1e12, 1),
        )
        return (
            float(rate),
            float(flops / 1e12 / self.rate) if self.rate else float("nan"),
            peak,
            note,
        )

    # ---------------------------------------------------------------------------------------- steps

    def matmul(self):
        """The rate that all shares are of: a bf16 product of 8192 x 8192 (dry: fp32, 512), the
        median of 30.
        """
        import torch

        n = 512 if self.dry else 8192
        a, b = (torch.randn(n, n, device=self.device, dtype=self.half) for _ in range(2))
        seconds = seconds_of(lambda: a @ b, 30)
        self.rate = 2 * n**3 / seconds / 1e12
        self.figures.put("matmul_tflops", self.rate)

    def tiny(self):
        """The tiny preset as people run it, through files: does it work on this device at all?"""
        from vflan import world

        folder = world.build(
            self.folder / "world", captions=120, per_kind=4, conversations=40, questions=0.05
        )
        self.world, losses = folder, {}
        for precision in ("fp32", "bf16"):
            run = self.tiny_run(f"tiny-{precision}", precision=precision, max_steps=8)
            losses[precision] = [round(loss, 4) for loss in run.metrics().loss]
            model = run.load_model()
            assert model.device.type == self.device.type, f"the model loads onto {model.device}"
        self.figures.put(
            "tiny_works",
            int(all(loss[-1] < loss[0] for loss in losses.values())),
            tiny_losses=losses,
        )

    def tiny_run(self, name, **changes):
        import vflan
        from vflan.config import replace

        base, sets = vflan.preset("tiny").base, self.world / "samples"
        recipe = replace(
            base,
            name=name,
            runs=str(self.folder / "runs"),
            samples=str(sets / "flan.json"),
            images=str(sets / "images"),
            max_bad_share=0.5,
            device=self.recipe.device,
            **changes,
        )
        return vflan.train(recipe)

    def packed(self):
        """Packed rows against the same rows one by one: loss and gradients, fp32 and bf16, 4
        layers.
        """
        import torch

        for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
            if dtype != torch.float32 and self.dry:
                continue
            self.figures.put(f"packed_error_{name}", *self.packed_error(dtype))
            free()

    def packed_error(self, dtype, attention=None, rows=6):
        import numpy as np
        import torch

        from vflan.config import replace
        from vflan.models.image_features import Pictures
        from vflan.models.loss import Learner

        recipe = replace(self.recipe, precision="fp32" if dtype == torch.float32 else "bf16")
        model = self.model(
            layers=None if self.dry else 4, width=None if self.dry else 1024, dtype=dtype
        )
        model.requires_grad_(False)
        for part in (model.model.multi_modal_projector, model.model.language_model):
            part.requires_grad_(True)
        net, data = Learner(model, recipe), self.data(model.config)
        if attention:
            model.model.language_model.set_attn_implementation(attention)
        pictures = Pictures(data, model, self.processor(), recipe)
        text = np.flatnonzero(data.picture < 0)[:1]
        rows = np.concatenate([np.flatnonzero(data.picture >= 0)[: rows - len(text)], text])
        tokens, found = int(data.supervised[rows].sum()), []
        for parts in ([rows], [rows[i : i + 1] for i in range(len(rows))]):
            net.zero_grad()
            loss = 0.0
            for part in parts:
                piece = net(*data.batch(part, self.device), pictures(part)) / tokens
                piece.backward()
                loss += piece.item()
            found.append(
                (loss, [w.grad.float().clone() for w in net.parameters() if w.grad is not None])
            )
        (loss, gradients), (alone, others) = found
        scale = 1.0 if dtype == torch.float32 else max(float(g.abs().max()) for g in others)
        return (
            max(
                [
                    abs(loss - alone),
                    *(float((a - b).abs().max()) / scale for a, b in zip(gradients, others)),
                ]
            ),
        )

    def ways(self):
        """Where a step's time goes, on layers of 7B's width: forward, backward and optimiser of one
        packed row, by attention, compiled or not, with or without recomputing activations.
        """
        layers = 2 if self.dry else 8
        table = self.figures.notes["ways"] = []
        for kind, attention, compiled, recompute in WAYS:
            try:
                table.append(self.way(kind, layers, attention, compiled, recompute))
            except Late:
                raise
            except Exception as trouble:
                why = f"{type(trouble).__name__}: {trouble}".splitlines()[0][:200]
                trouble.__traceback__ = None
                table.append(
                    dict(
                        kind=kind,
                        attention=attention,
                        compiled=compiled,
                        recompute=recompute,
                        failed=why,
                    )
                )
            print(json.dumps(table[-1]), flush=True)
            self.figures.put()
            free()

    def way(self, kind, layers, attention, compiled, recompute):
        import torch

        import vflan.training.trainer  # noqa: F401
        from vflan.config import replace
        from vflan.models import llava as models
        from vflan.models.image_features import Pictures
        from vflan.models.loss import Learner
        from vflan.training.batching import pack

        changes = dict(gradient_checkpointing=recompute, compile=compiled and not self.dry)
        changes |= dict(LORA) if kind != "full" else dict(optimizer=self.optimizer())
        changes |= dict(bits=4, optimizer=self.optimizer()) if kind == "qlora" else {}
        recipe = replace(self.recipe, **changes)
        model = self.model(layers=layers, bits=4 if kind == "qlora" else 16)
        with patched([thrifty()] if kind == "full" else []):
            models.freeze(model, recipe)
        net, data = Learner(model, recipe), self.data(model.config)
        if attention and not self.dry:
            model.model.language_model.set_attn_implementation(attention)
        net.train()
        optimizer = sys.modules["vflan.training.trainer"]._optimizer(model, recipe)
        groups, pictures = (
            pack(data.lengths, recipe.pack_tokens),
            Pictures(data, model, self.processor(), recipe),
        )
        ready = [(data.batch(group, self.device), pictures(group)) for group in groups[:3]]
        times = {"forward": [], "backward": [], "optimizer": []}
        turns = 4 if self.dry else 6
        for turn in range(turns):
            batch, features = ready[turn % len(ready)]
            watched = profiled(
                self.figures.path.parent / f"profile-{kind}{'-compiled' if compiled else ''}.txt"
            )
            with watched if turn == turns - 1 and not self.dry else nullcontext():
                for part in times:
                    sync()
                    start = time.perf_counter()
                    if part == "forward":
                        with torch.autocast(
                            self.device.type, self.half, enabled=self.half == torch.bfloat16
                        ):
                            loss = net(*batch, features)
                    elif part == "backward":
                        (loss / 1000).backward()
                    else:
                        optimizer.step()
                        optimizer.zero_grad()
                    sync()
                    times[part].append(time.perf_counter() - start)
        ms = {part: round(1e3 * statistics.median(found[2:-1]), 1) for part, found in times.items()}
        peak = (
            round(torch.cuda.max_memory_allocated() / 1e9, 1) if torch.cuda.is_available() else None
        )
        first = round(times["forward"][0] + times["backward"][0], 1)
        return dict(
            kind=kind,
            attention=model.model.language_model.config._attn_implementation,
            compiled=compiled,
            recompute=recompute,
            layers=layers,
            positions=ready[0][0][0].numel(),
            ms=ms,
            gb=peak,
            first_pass_s=first,
        )

    def answers(self):
        """Batched answers of the mini world against one by one."""
        from bench.evaluate import one_by_one, pope_shaped, together
        from vflan.evaluation.benchmarks import BENCHMARKS
        from vflan.training.run import Run

        run = Run.open(self.folder / "runs" / "tiny-fp32")
        model, processor = run.load_model(), run.processor()
        folder, asked = self.world / "benchmarks", []
        for name in ("heldin", "pope", "llava_bench"):
            benchmark = BENCHMARKS[name]
            rows = benchmark.load(folder)[: 10 if self.dry else 40]
            asked += [{"image": s["image"], "text": benchmark.prompt(s)} for s in rows]
        asked += pope_shaped(
            sorted({q["image"] for q in asked if q["image"]})[: 2 if self.dry else 6]
        )
        for name, dtype in (("fp32", "float"), ("bf16", "bfloat16")):
            if name == "bf16" and self.dry:
                continue
            model = getattr(model, dtype)()
            pairs = list(
                zip(together(model, processor, asked, 16), one_by_one(model, processor, asked, 16))
            )
            self.figures.put(
                f"answers_equal_{name}",
                sum(a == b for a, b in pairs) / len(pairs),
                answers=len(pairs),
            )

    def full(self):
        """All of 7B's language model. On one card of 80 GB weights and moments are 16-bit (fp32
        masters are 81 GB).
        """
        from vflan.config import replace

        recipe = replace(self.recipe, optimizer=self.optimizer(), **self.how)
        with patched([thrifty()]):
            found = self.trained(recipe, self.model())
        self.write("full", found, optimizer=recipe.optimizer, weights="bf16", **self.how)

    def lora(self):
        from vflan.config import replace

        recipe = replace(self.recipe, **self.how, **LORA)
        found = self.trained(recipe, self.model())
        self.write("lora", found, **self.how)

    def qlora(self):
        """7B in 4 bits, rows of 2,048 positions, as preset qlora_7b."""
        from vflan.config import replace

        changes = dict(
            bits=4, gradient_checkpointing=True, optimizer="adamw_8bit", pack_tokens=None, **LORA
        )
        changes |= dict(max_steps=3)
        recipe = replace(self.recipe, **changes)
        rate, _, peak, note = self.trained(recipe, self.model(bits=4))
        self.figures.put("qlora_gb", peak)
        self.figures.put("qlora_tokens_s", rate, qlora=note)

    def optimizer(self):
        try:
            import bitsandbytes  # noqa: F401

            return "adamw_8bit"
        except ImportError:
            return "adamw"

    def write(self, name, found, **more):
        rate, mfu, peak, note = found
        self.figures.put(f"{name}_mfu", mfu)
        self.figures.put(f"{name}_tokens_s", rate)
        self.figures.put(f"{name}_gb", peak, **{name: note | more})

    def evaluation(self):
        """Questions/s at 7B: POPE's shape (17.8 questions a picture) batched and one at a time, and
        one question a picture.
        """
        import torch

        from bench.evaluate import one_by_one, pope_shaped, together

        model, processor = self.model(), self.processor()
        pictures = sorted(map(str, (self.folder / "real" / "images").iterdir()))
        asked = pope_shaped(pictures[: 2 if self.dry else 24])
        with torch.inference_mode():
            seconds = seconds_of(lambda: together(model, processor, asked, 3), 1)
            self.figures.put("evaluate_questions_s", len(asked) / seconds)
            some = asked[:: max(1, len(asked) // 24)]
            slow = seconds_of(lambda: one_by_one(model, processor, some, 3), 1)
            self.figures.put("evaluate_speedup", slow / len(some) * len(asked) / seconds)
            alone = [
                {"image": path, "text": "What is in the picture?"}
                for path in pictures[: 4 if self.dry else 64]
            ]
            self.figures.put(
                "single_questions_s",
                len(alone) / seconds_of(lambda: together(model, processor, alone, 8), 1),
            )
        if torch.cuda.is_available():
            self.figures.put(evaluation_gb=round(torch.cuda.max_memory_allocated() / 1e9, 1))

    def resume(self):
        """A run that fails after its checkpoint and goes on, against one that does not fail."""
        from vflan.models import llava as models
        from vflan.training.metrics import Log

        steps = dict(max_steps=8, save_every=4, precision="fp32")
        whole, real = self.tiny_run("whole", **steps), Log.step

        def fails(log, step, *arguments, **more):
            real(log, step, *arguments, **more)
            if step == 6:
                raise KeyboardInterrupt

        with patched([(Log, "step", fails)]):
            try:
                self.tiny_run("broken", **steps)
            except KeyboardInterrupt:
                pass
        broken = self.tiny_run("broken", **steps)
        a, b = (dict(run.load_model().state_dict()) for run in (whole, broken))
        error = max(float((a[name] - b[name]).abs().max()) for name in a)
        self.figures.put(
            "resume_equal", int(models.fingerprint(a.items()) == models.fingerprint(b.items()))
        )
        self.figures.put("resume_error", error)

    def baseline(self):
        """Hugging Face's Trainer on the same rows: LoRA, padded, micro-batches of 2, as bench.train
        has it on a CPU.
        """
        import bench.train as train
        from vflan.config import replace

        recipe = replace(self.recipe, gradient_checkpointing=True, max_steps=3, **LORA)
        model = self.model()
        found = model, self.processor(), self.data(model.config)
        with patched([(train, "loaded", lambda *_: found)]):
            data, ends, steps, _ = train.baseline(recipe)
        rows = [row for step in steps[1 : len(ends)] for row in step]
        rate = float(data.lengths[rows].sum() / (ends[-1] - ends[0]))
        self.figures.put("baseline_tokens_s", rate)
        if ours := self.figures.value("lora_tokens_s"):
            self.figures.put("lora_speedup", ours / rate)


# kind, attention (None: what vflan takes), compiled, activations recomputed
WAYS = [
    ("lora", "by_conversation", False, True),
    ("lora", None, False, True),
    ("lora", None, True, True),
    ("lora", None, True, False),
    ("full", None, False, True),
    ("full", None, True, True),
    ("full", None, True, False),
    ("qlora", None, False, True),
]
LORA = dict(lora_r=128, lora_alpha=256, lora_dropout=0.05, lr=2e-4)


def thrifty():
    """A `freeze` after which what learns stays in the weights' own dtype, in place of fp32 master
    weights.
    """
    import torch

    from vflan.models import llava as models

    def freeze(model, recipe, real=models.freeze):
        real(model, recipe)
        for weight in model.parameters():
            if weight.requires_grad and torch.cuda.is_available():
                weight.data = weight.data.bfloat16()

    return models, "freeze", freeze


def quantise(module, dtype):
    """Put nf4 layers in place of the linear ones, one after the other, so that only one is there in
    both forms.
    """
    import bitsandbytes as bnb
    from torch import nn

    for name, child in list(module.named_children()):
        if isinstance(child, nn.Linear):
            # Made without a weight of its own: to draw one on the CPU for each layer takes a
            # minute.
            layer = bnb.nn.Linear4bit(
                child.in_features,
                child.out_features,
                bias=False,
                compute_dtype=dtype,
                quant_type="nf4",
                compress_statistics=True,
                device="meta",
            )
            layer.weight = bnb.nn.Params4bit(
                child.weight.data, requires_grad=False, quant_type="nf4"
            )
            setattr(module, name, layer.to(child.weight.device))
        else:
            quantise(child, dtype)


@contextmanager
def patched(swaps):
    """(object, name, value): the values in place for the length of the block."""
    before = [(thing, name, getattr(thing, name)) for thing, name, _ in swaps]
    for thing, name, value in swaps:
        setattr(thing, name, value)
    try:
        yield
    finally:
        for thing, name, value in before:
            setattr(thing, name, value)


def guards():
    """Stand-ins for what this machine may lack; what they stand in for is not measured."""
    try:
        import datasets  # noqa: F401
    except ImportError:
        lacking = types.ModuleType("datasets")
        lacking.Dataset = type("Dataset", (), {})
        lacking.concatenate_datasets = None
        sys.modules["datasets"] = lacking
    from transformers import PreTrainedModel

    # Its name before transformers 5.2x.
    if not hasattr(PreTrainedModel, "activation_checkpointing_enable"):
        PreTrainedModel.activation_checkpointing_enable = (
            PreTrainedModel.gradient_checkpointing_enable
        )


def versions():
    from importlib.metadata import PackageNotFoundError, version

    found = {"python": sys.version.split()[0]}
    for name in ("torch", "transformers", "peft", "accelerate", "datasets", "bitsandbytes"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not there"
    return found


def main():
    parser = argparse.ArgumentParser(
        prog="python -m bench.gpu", description=__doc__.splitlines()[0]
    )
    parser.add_argument(
        "--dry", action="store_true", help="tiny shapes, on a CPU if there is no GPU"
    )
    parser.add_argument("--only", nargs="+", choices=list(BOXES), help="these steps")
    parser.add_argument("--eager", action="store_true", help="full and lora without compile=True")
    parser.add_argument(
        "--recompute", action="store_true", help="full and lora with gradient_checkpointing=True"
    )
    parser.add_argument("--minutes", type=float, default=8.0, help="no step begins after so many")
    parser.add_argument("--packages", help="a folder of packages to add to the path")
    parser.add_argument(
        "--out", help="the file of figures ($OUT/gpu.json, or bench/results/gpu.json)"
    )
    options = parser.parse_args()
    if options.packages and Path(options.packages).is_dir():
        sys.path.append(options.packages)
    os.environ.setdefault("OMP_NUM_THREADS", "1" if options.dry else "8")
    import torch

    if not (options.dry or torch.cuda.is_available()):
        sys.exit("There is no GPU that PyTorch can use here: take --dry, or a machine with one.")
    with tempfile.TemporaryDirectory() as folder:
        os.environ.setdefault("VFLAN_CACHE", str(Path(folder) / "cache"))
        guards()
        out = options.out or (f"{os.environ['OUT']}/gpu.json" if os.environ.get("OUT") else None)
        default = (
            Path(folder) / "gpu.json" if options.dry else HOME / "bench" / "results" / "gpu.json"
        )
        card = torch.cuda.get_device_name(0) if torch.cuda.is_available() else "no GPU"
        memory = round(torch.cuda.mem_get_info()[1] / 1e9, 1) if torch.cuda.is_available() else None
        cpu = machine()
        about = dict(
            machine=cpu | dict(cpu=f"{card} beside {cpu['cpu']}"),
            versions=versions(),
            command="python -m bench.gpu",
        )
        figures = Figures(Path(out) if out else default, about, "" if options.dry else card)
        figures.notes |= dict(card=card, gpu_memory_gb=memory, seed=SEED)
        started, bench = time.monotonic(), Bench(figures, Path(folder), options.dry)
        bench.how = dict(
            compile=not (options.eager or options.dry), gradient_checkpointing=options.recompute
        )
        for name in options.only or BOXES:
            left = options.minutes * 60 - (time.monotonic() - started)
            start, why = time.monotonic(), None
            figures.failed.pop(name, None)
            try:
                if left < 10:
                    raise Late(f"the {options.minutes:g} minutes are over")
                with box(min(BOXES[name], left)):
                    getattr(bench, name)()
            except (Exception, KeyboardInterrupt) as trouble:
                # the trace goes to stderr and its frames, which hold the step's tensors, are let go
                why = f"{type(trouble).__name__}: {trouble}".strip().splitlines()[0][:300]
                traceback.print_exc()
                trouble.__traceback__ = None
            if why:
                figures.failed[name] = why
            print(
                f"-- {name}: {time.monotonic() - start:.1f} s{', ' + why if why else ''}",
                flush=True,
            )
            figures.put(**{f"{name}_seconds": round(time.monotonic() - start, 1)})
            free()
        sys.exit(f"Steps that failed: {', '.join(figures.failed)}." if figures.failed else 0)


if __name__ == "__main__":
    main()
