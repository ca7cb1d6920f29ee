"""How small an effect the declared seeds of `make paper` would show: the claims on the dev world.

    python -m bench.power              # seeds 0, 1, 2 of `tiny`, into bench/results/power.json

Trains and asks the runs of notebooks 06 to 08 on `tiny`, where the settings were chosen, and
measures each claim of the ledger. The spread of its effect between seeds and over pictures gives
the smallest effect that the declared number of seeds, and twice as many questions, show four times
in five: the interval, corrected for many claims, then lies above 0. Run it before the frozen world.
"""

import argparse
from functools import cache

import numpy as np
from scipy.stats import t as student

from bench.record import write
from vflan import Arm, Swap, preset, replace, sweep
from vflan.analysis import claims
from vflan.analysis.movement import moved
from vflan.analysis.sweeps import projector_arm, spread, with_samples
from vflan.world import WORLDS, build_for

SEEDS = {"06": 10, "07": 6, "08": 6}  # of `make paper`, by notebook
TASKS, COUNTS, BUDGETS = 53, (2, 8, 24, 53), (3000, 1500)
MAIN = ("heldin", "heldout", "mmbench", "mme", "pope", "llava_bench", "forgetting")
CASES = ("mm_vet", "textocr", "wit")
SHOWN = 0.8  # how often an effect of the smallest size is to be shown


def make_arms(p, seeds):
    """The arms of notebooks 06 to 08 that the ledger compares, under its labels."""
    arms = {"projector": projector_arm(p.projector, "", seeds), "base": Arm(p.base, "projector")}
    for budget, size in zip(BUDGETS, ("large", "small")):
        for count, many in zip(COUNTS, ("fewest", "few", "more", "all")):
            arms[f"{many}-{size}"] = Arm(spread(p.base, budget, count), "projector")
    arms["chat"] = Arm(p.chat, "base")
    for number in (100, p.chat.num_samples, 3000):
        more = replace(with_samples(p.chat, number), name=f"chat-{number}")
        if number != p.chat.num_samples:
            arms[f"chat-{number}"] = Arm(more, "base")
        alone = replace(more, name=f"chat-{number}-from-projector")
        arms[f"from-projector-{number}"] = Arm(alone, "projector")
    mixed = {"one-stage": p.chat.num_samples}
    mixed["one-stage-share"] = round(TASKS * p.base.per_task * 1000 / 1_664_261)
    for label, number in mixed.items():
        more = (f"{p.chat.samples}#{number}",)
        arms[label] = Arm(replace(p.base, name=label, more_samples=more), "projector")
    arms["both"] = arms["base"]
    for part in ("projector", "language_model"):
        recipe = replace(p.base, name=f"only-{part}", tune=(part,))
        arms[recipe.name] = Arm(recipe, "projector")
    for run in ("base", "chat"):
        arms[f"{run}/old-projector"] = Swap(run, "projector", "projector")
    for run in ("base", "only-projector"):
        other = "data/tiny/second_language_model"
        arms[f"{run}/other-lm"] = Swap(run, "language_model", other)
    return arms


def smallest_shown(effects, replicates, seeds, level):
    """The effect, in points, that `seeds` seeds of the frozen world show so often as SHOWN says."""
    pictures = float(np.var(replicates)) / WORLDS["tiny_frozen"].get("questions", 1)
    error, freedom = claims.standard_error(np.var(effects, ddof=1), pictures, seeds)
    sure, often = student.ppf([(1 + level) / 2, SHOWN], freedom)
    return float((sure + often) * error)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--runs", default="runs/power")
    args = parser.parse_args()
    if len(args.seeds) < 2:
        parser.error("--seeds: at least two are needed; one seed has no spread.")
    folder = build_for("tiny")
    arms = make_arms(preset("tiny", {"runs": args.runs}), args.seeds)
    done = sweep(arms, args.seeds, MAIN, folder / "benchmarks")
    more = sweep(arms, args.seeds, CASES, folder / "benchmarks_more")

    @cache
    def items(label, seed, benchmark):
        if benchmark == "weights":
            pair = done.runs["projector", seed], done.runs[label, seed]
            return {"correlation": claims.number(moved(*pair, "projector")[0])}
        return (more if benchmark in CASES else done).items(label, seed, benchmark)

    ledger, score = claims.ledger(), claims.resampler(items)
    level = 1 - (1 - claims.LEVEL) / int(ledger.claim.str.isdigit().sum())
    checks, values, effects = {}, {}, {}
    for row in ledger.itertuples():
        runs, measures = claims.terms(row.comparison), row.metric.split()
        each, replicates = claims.paired_effects(score, args.seeds, runs, measures)
        name, seeds = f"claim_{row.claim}", SEEDS[row.notebook]
        unit = f"points that {seeds} seeds show four times in five; {row.smallest:g} count"
        checks[name] = (unit, None, None)
        values[name] = smallest_shown(each, replicates, seeds, level)
        effects[row.claim] = [round(effect, 2) for effect in each]
        print(f"{row.claim:4} {np.mean(each):+7.2f}  {effects[row.claim]}  {row.statement}")
    write("power", checks, values, "python -m bench.power", seeds=args.seeds, effects=effects)


if __name__ == "__main__":
    main()
