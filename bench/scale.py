"""Effects over the size of the language model: claims 3 to 7 and 10 on the dev world.

    python -m bench.scale make 64 224      # language models of other widths, and their projectors
    python -m bench.scale run 64 128 224   # seeds 0, 1, 2, into data/results/scale.csv
    python -m bench.scale run smol --language-model FOLDER --seeds 0

Our own language models have the same five layers, tokenizer and lessons, and differ in width: 64
(0.3 M parameters), 128 (the shipped one, 1.1 M) and 224 (3.2 M). `smol` is SmolLM2-135M-Instruct
(examples/smollm2.py makes the folder). Each has a projector of its own, and all have the recipes of
their preset: nothing is tuned for a size. The world is `tiny`, where the settings were chosen, so
this shows a direction and judges nothing; the claims are judged on the frozen world.
"""

import argparse
import dataclasses
import shutil
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from safetensors import safe_open

from bench.power import CASES, MAIN, make_arms
from vflan import preset, sweep
from vflan.analysis import claims
from vflan.analysis.sweeps import needed
from vflan.config import replace, resolve
from vflan.world import build_for
from vflan.world.backbones import FOLDER, make_projector, note_record
from vflan.world.language_model import make_language_model

SHOWN = ("3", "4", "5", "6", "7", "10")
RESULTS = resolve("data/results/scale.csv")
COLUMNS = ["model", "parameters", "claim", "n_seeds", "effect", "low", "high", "each"]


def folder_of(width):
    """Where the language model of a width lies, with its projector."""
    return FOLDER if width == 128 else resolve(f"runs/scale/{width}")


def make(width):
    """Pretrain the language model of one width, then its projector; what is there stays."""
    folder = folder_of(width)
    if width == 128 or (folder / "projector" / "mm_projector.safetensors").is_file():
        print(f"{folder} is there")
        return
    torch.set_num_threads(1)
    if not (folder / "language_model" / "model.safetensors").is_file():
        ignored = shutil.ignore_patterns("model.safetensors", "config.json")
        shutil.copytree(FOLDER / "vision_tower", folder / "vision_tower", dirs_exist_ok=True)
        shutil.copytree(
            FOLDER / "language_model", folder / "language_model", ignore=ignored, dirs_exist_ok=True
        )
        log = partial(print, f"width {width}:")
        note_record(folder, language_model=make_language_model(folder, width=width, log=log))
    note_record(folder, projector=make_projector(folder))


def recipes(model, language_model):
    """The preset whose language model is to be measured."""
    changes = {"runs": f"runs/scale/{model}/runs"}
    if model == "smol":
        return preset("smol", changes, language_model=language_model)
    folder = folder_of(int(model))
    changes |= {"language_model": str(folder / "language_model")}
    p = preset("tiny", changes)
    projector = str(folder / "projector" / "mm_projector.safetensors")
    return p._replace(projector=replace(p.projector, pretrained=projector))


def parameters_of(folder):
    """Number of weights in a folder of safetensors."""
    count = 0
    for file in Path(folder).glob("*.safetensors"):
        with safe_open(file, "pt") as weights:
            count += sum(np.prod(weights.get_slice(k).get_shape()) for k in weights.keys())
    return int(count)


def used(ledger):
    """{label: benchmarks} of what some claims compare."""
    asked = {}
    for row in ledger.itertuples():
        for _, label in claims.terms(row.comparison):
            asked.setdefault(label, set()).update(m.split(":")[0] for m in row.metric.split())
    return asked


def measure(model, language_model, seeds):
    """Train and ask what the shown claims compare; one row for each claim."""
    p, ledger = recipes(model, language_model), claims.ledger()
    ledger = ledger[ledger.claim.isin(SHOWN)]
    asked, every = used(ledger), make_arms(p, seeds)
    labels, before = set(asked), set()
    while labels != before:
        before, labels = labels, labels.union(*(needed(every, label) for label in labels))
    folder = build_for("tiny")
    done = {}
    # Two folders of benchmarks; an arm is asked what its claims need, and nothing else.
    for name, known in {"benchmarks": MAIN, "benchmarks_more": CASES}.items():
        arms = {
            label: dataclasses.replace(
                arm, benchmarks=tuple(sorted(asked.get(label, set()).intersection(known)))
            )
            for label, arm in every.items()
            if label in labels
        }
        done[name] = sweep(arms, seeds, known, folder / name)

    def items(label, seed, benchmark):
        part = "benchmarks_more" if benchmark in CASES else "benchmarks"
        return done[part].items(label, seed, benchmark)

    score, rows = claims.resampler(items), []
    size = parameters_of(p.base.language_model)
    for row in ledger.itertuples():
        runs, measures = claims.terms(row.comparison), row.metric.split()
        effects, replicates = claims.paired_effects(score, seeds, runs, measures)
        low, high = claims.effect_interval(effects, replicates, claims.LEVEL)
        each = " ".join(f"{effect:.2f}" for effect in effects)
        rows.append([model, size, row.claim, len(effects), np.mean(effects), low, high, each])
    return pd.DataFrame(rows, columns=COLUMNS).round(2)


def keep(measured):
    """Put the rows of one model into data/results/scale.csv, in place of its earlier ones."""
    if RESULTS.is_file():
        old = pd.read_csv(RESULTS, dtype={"model": str, "claim": str})
        measured = pd.concat([old[~old.model.isin(measured.model)], measured])
    measured = measured.sort_values("parameters", kind="stable")
    measured.to_csv(RESULTS, index=False)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("make", "run"))
    parser.add_argument("models", nargs="+", help="widths (64, 128, 224), or smol")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--language-model", default="", help="the folder of smol's language model")
    args = parser.parse_args()
    if "smol" in args.models and (args.what == "make" or not args.language_model):
        parser.error("smol: examples/smollm2.py makes it; run needs --language-model FOLDER.")
    for model in args.models:
        if args.what == "make":
            make(int(model))
        else:
            measured = measure(model, args.language_model, args.seeds)
            print(measured.to_string(index=False))
            keep(measured)


if __name__ == "__main__":
    main()
