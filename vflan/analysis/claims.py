"""From scores to verdicts: what is claimed, what was measured, whether it holds. Computed, never assumed.

The ledger (data/claims.csv) writes down each claim of the paper before it is measured: which runs are compared, by what,
and the smallest effect that counts. `verdicts` measures them, question by question, over several seeds. Scores are the table
of vflan.evaluate, with one row for each seed of a run.
"""

import re
import textwrap
from functools import cache
from pathlib import Path
from zlib import crc32

import numpy as np
import pandas as pd
from scipy.stats import t as student

from vflan.config import output_folder, resolve
from vflan.config import preset as recipes
from vflan.config import shown as shown_path
from vflan.evaluation.answer_cache import keep_scores, read_rows
from vflan.evaluation.benchmarks import BENCHMARKS
from vflan.evaluation.benchmarks.benchmark import Metric
from vflan.evaluation.stats import draws, ratio, tables

# What the mini world has to show before any comparison in it is worth reading: a model that sees, an alignment that
# aligns. (claim, run, benchmark, metric, rule, bound); "before" is the stage that the run started from.
BEFORE = {"base": "projector", "chat": "base"}
FLOORS = [
    ("Base answers held-in tasks", "base", "heldin", "accuracy", "at least", 80),
    ("Base answers held-out tasks better than the majority answer", "base", "heldout", "accuracy", "over majority", 12),
    ("Base answers held-out tasks better than the projector stage", "base", "heldout", "accuracy", "over before", 15),
    *[(f"Base sees what is there, POPE {s}", "base", "pope", f"accuracy/{s}", "at least", 90)
      for s in ("random", "popular", "adversarial")],
    *[(f"Base says yes about half of the time, POPE {s}", "base", "pope", f"yes_ratio/{s}", "within", (44, 56))
      for s in ("random", "popular", "adversarial")],
    ("Base still classifies objects", "base", "forgetting", "accuracy/objects", "at least", 85),
    ("Base reads handwritten digits (shown beside, no floor)", "base", "forgetting", "accuracy/digits", "shown", None),
    ("Chat writes in sentences where Base did not", "chat", "llava_bench", "format", "over before", 30),
    ("Chat still answers held-in tasks, read leniently", "chat", "heldin", "lenient", "over before", -8),
]  # fmt: skip


def seeds_of(scores, run, benchmark, metric):
    """The rows of one metric of one run, indexed by seed."""
    found = scores[
        (scores.run == run) & (scores.benchmark == benchmark) & (scores.metric == metric)
    ]
    return found.set_index("seed").sort_index()


def answered(run, benchmark, folder, name=None):
    """The questions of a benchmark, each with the `answer` that vflan.evaluate kept for the run (under `name`)."""
    path = Path(run.folder) / "answers" / (name or "") / f"{benchmark}.jsonl"
    if not path.is_file():
        raise FileNotFoundError(
            f"{run.name} has no answers to {benchmark} yet: vflan.evaluate asks the questions."
        )
    said = {row["i"]: row["answer"] for row in read_rows(path)[1:]}
    return [
        sample | {"answer": said[i]} for i, sample in enumerate(BENCHMARKS[benchmark].load(folder))
    ]


def table(scores, columns):
    """Runs by columns, the mean over seeds. columns: {title: (benchmark, metric)}; metric None is the headline."""
    found = {}
    for title, (benchmark, metric) in columns.items():
        metric = metric or BENCHMARKS[benchmark].headline
        own = scores[(scores.benchmark == benchmark) & (scores.metric == metric)]
        found[title] = own.groupby("run").value.mean()
    return pd.DataFrame(found).reindex(scores.run.unique()).round(1)


def shown(rows):
    """`81.2 [79.0, 83.1]` for each seed, apart by a slash."""
    return " / ".join(f"{r.value:.1f} [{r.low:.1f}, {r.high:.1f}]" for r in rows.itertuples())


def compare(scores, pairs):
    """One row a comparison: both values with their intervals, the difference, and which of the two is higher.

    pairs: [(claim, a, b, benchmark, metric)], where the claim is that run `a` scores higher than run `b`. The verdict
    is `holds` if a's interval lies wholly above b's, `opposite` if wholly below, and that for every seed; else `open`.
    One seed's interval tells how well the questions measure one trained model; it knows nothing of the next training.
    """
    rows = []
    for claim, a, b, benchmark, metric in pairs:
        one, two = (seeds_of(scores, run, benchmark, metric) for run in (a, b))
        both = one.index.intersection(two.index)
        above, below = one.low[both] > two.high[both], one.high[both] < two.low[both]
        verdict = (
            "holds"
            if len(both) and above.all()
            else "opposite"
            if len(both) and below.all()
            else "open"
        )
        difference = (one.value[both] - two.value[both]).mean()
        rows.append(
            [claim, f"{benchmark} {metric}", shown(one), shown(two), round(difference, 1), verdict]
        )
    return pd.DataFrame(
        rows, columns=["claim", "measured as", "first", "second", "difference", "verdict"]
    )


def wanted(rule, bound, majority, before):
    """(low, high, in words): what a measured value has to lie between."""
    if rule == "at least":
        return bound, 100, f"{bound} or more"
    if rule == "within":
        return *bound, f"{bound[0]} to {bound[1]}"
    if rule == "over majority":
        return majority + bound, 100, f"majority + {bound}"
    if rule == "over before":
        return (
            before + bound,
            float("inf"),
            f"stage before {'+' if bound > 0 else '-'} {abs(bound)}",
        )
    return 0, 100, ""  # shown, not judged


def floors(scores, losses=None):
    """The FLOORS as a table: claim, what is needed, the mean over seeds, each seed, majority, stage before, holds.

    losses: {seed: (first, last)} of the projector stage; the loss on captions has to fall by half. A floor whose
    benchmark was not run is left out. Holds is judged on the mean over seeds, a range on each
    seed; `shown` rows are not judged (None).
    """
    rows = []
    for claim, run, benchmark, metric, rule, bound in FLOORS:
        own = seeds_of(scores, run, benchmark, metric)
        if not len(own):
            continue
        before = seeds_of(scores, BEFORE[run], benchmark, metric)
        mean, majority, earlier = own.value.mean(), own.baseline.mean(), before.value.mean()
        low, high, needs = wanted(rule, bound, majority, earlier)
        judged = (
            own.value if rule == "within" else [mean]
        )  # a bias to yes and one to no are no balance
        holds = None if rule == "shown" else all(low <= value <= high for value in judged)
        rows.append(
            [
                claim,
                needs,
                mean,
                " / ".join(f"{v:.1f}" for v in own.value),
                majority,
                earlier,
                holds,
            ]
        )
    if losses:
        first, last = (sum(pair[i] for pair in losses.values()) / len(losses) for i in (0, 1))
        each = " / ".join(f"{pair[1]:.2f}" for pair in losses.values())
        row = [
            "The projector learns captions: the loss falls",
            "half of the first",
            last,
            each,
            None,
            first,
        ]
        rows.append([*row, bool(last <= first / 2)])
    columns = ["claim", "needs", "measured", "each seed", "majority", "stage before", "holds"]
    return pd.DataFrame(rows, columns=columns).round(2)


# ----------------------------------------------------------------------------------------------------------- the ledger

READ = []  # committed files that this process has read: a notebook lists them at its end
HOLDS, WEAKLY, NOT, FEW = "holds", "holds weakly", "does not hold at this scale", "not enough runs"
MIN_SEEDS, ROUNDS, LEVEL = 3, 2000, 0.95
VERDICTS = "claim statement comparison metric n_seeds effect low high smallest verdict".split()


def ledger(path=None):
    """The claims as a DataFrame: claim, statement, item (of the paper), comparison, metric, direction, smallest, notebook,
    either_way (what lets it come out one way or the other).

    A claim that is a number is counted in the correction for many claims; one with a letter (`1a`) is a part of it, shown
    beside. comparison: labels of runs with signs and weights, `chat - 0.9 base`. metric: `benchmark:metric`, several are
    averaged. direction: `above`, the effect is at least `smallest` and surely more than 0; `over` and
    `below`, it is surely more or surely less than `smallest`.
    """
    table = pd.read_csv(path or resolve("data/claims.csv"), dtype=str, keep_default_na=False)
    table["smallest"] = table.smallest.astype(float)
    if odd := sorted(set(table.direction) - {"above", "over", "below"}):
        raise ValueError(f"direction {odd[0]!r} in the ledger: write above, over or below.")
    if table.claim.duplicated().any():
        raise ValueError(
            f"claim {table.claim[table.claim.duplicated()].iloc[0]} stands twice in the ledger."
        )
    return table


def terms(comparison):
    """[(weight, label), ...] of a comparison: `chat - 0.9 base` is [(1, chat), (-0.9, base)]."""
    found, sign, weight = [], 1.0, 1.0
    for word in comparison.split():
        if word in "+-":
            sign = -1.0 if word == "-" else 1.0
        elif re.fullmatch(r"\d*\.?\d+", word):
            weight = float(word)
        else:
            found.append((sign * weight, word))
            sign, weight = 1.0, 1.0
    return found


def verdicts(items, seeds, claims=None, rounds=ROUNDS):
    """The ledger with what was measured: a row a claim, the columns VERDICTS.

    items(label, seed, benchmark) -> {metric: Metric} of a run's kept answers (a Sweep's `items`), KeyError where there are
    none; a claim that lacks a run gets the seeds that have all of them. claims: some rows of `ledger()`; the correction
    always counts all of its whole claims.

    The effect is paired: each seed's runs are compared on the same questions, and the seeds are averaged. Its standard error
    has two levels, the spread of the seeds and a bootstrap over pictures; the interval is Student's t with the degrees of
    freedom of both (Welch and Satterthwaite), at 95 % corrected for the number of claims (Bonferroni). `holds` is said of
    that interval, `holds weakly` if only the uncorrected one says so; below three seeds nothing is said.
    """
    whole, scored, rows = int(ledger().claim.str.isdigit().sum()), resampler(items, rounds), []
    for claim in (ledger() if claims is None else claims).itertuples():
        effects, parts = measured(scored, seeds, terms(claim.comparison), claim.metric.split())
        value = float(np.mean(effects)) if effects else float("nan")
        low, high = interval(effects, parts, 1 - (1 - LEVEL) / whole)
        sure = verdict(value, low, high, claim.direction, claim.smallest)
        weak = verdict(value, *interval(effects, parts, LEVEL), claim.direction, claim.smallest)
        said = FEW if len(effects) < MIN_SEEDS else HOLDS if sure else WEAKLY if weak else NOT
        rows.append([claim.claim, claim.statement, claim.comparison, claim.metric, len(effects), value, low, high,
                     claim.smallest, said])  # fmt: skip
    return pd.DataFrame(rows, columns=VERDICTS).round(2)


def verdict(value, low, high, direction, smallest):
    """Whether an effect with this interval is what was claimed."""
    sure = dict(above=low > 0 and value >= smallest, over=low > smallest, below=high < smallest)
    return bool(sure[direction])


def resampler(items, rounds=ROUNDS):
    """scored(label, seed, measure) -> (value, (rounds,) replicates over pictures drawn anew), each computed once.

    A picture is drawn or not for all seeds and runs at once, since all were asked about the same ones.
    """

    @cache
    def weights(benchmark, pictures):
        return np.concatenate(list(draws(pictures, crc32(benchmark.encode()), rounds))).astype(
            float
        )

    @cache
    def scored(label, seed, measure):
        benchmark, _, metric = measure.partition(":")
        m = items(label, seed, benchmark)[metric]
        top, bottom, sizes = tables(100 * m.num, m.den, m.cluster, m.group)
        drawn = weights(benchmark, len(top))
        return float(ratio(top.sum(0), bottom.sum(0))), ratio(
            drawn @ top, drawn @ bottom, drawn @ sizes
        )

    return scored


def measured(scored, seeds, runs, measures):
    """([effect of each seed that has all runs], (rounds,) replicates of their mean).

    runs: [(weight, label)]; measures: `benchmark:metric`.
    """
    effects, replicates = [], 0.0
    for seed in seeds:
        try:
            parts = [
                (weight, *scored(label, seed, measure))
                for measure in measures
                for weight, label in runs
            ]
        except KeyError:
            continue
        effects.append(sum(weight * value for weight, value, _ in parts) / len(measures))
        replicates += sum(weight * drawn for weight, _, drawn in parts) / len(measures)
    return effects, replicates / max(1, len(effects))


def interval(effects, replicates, level):
    """(low, high) of the mean effect at this level; NaN below two seeds, whose spread nobody knows."""
    if len(effects) < 2:
        return float("nan"), float("nan")
    seeds, questions = np.var(effects, ddof=1) / len(effects), float(np.var(replicates))
    total = seeds + questions
    freedom = total**2 / (seeds**2 / (len(effects) - 1) + questions**2 / 1000) if total else 1.0
    half = float(student.ppf((1 + level) / 2, freedom)) * total**0.5
    return float(np.mean(effects) - half), float(np.mean(effects) + half)


def keep_verdicts(path, found):
    """Add verdicts to a csv; rows of the same claim are replaced, and the file is in the ledger's order."""
    path = Path(path)
    if path.exists():
        found = pd.concat(
            [pd.read_csv(path, dtype={"claim": str}), found.assign(claim=found.claim.astype(str))]
        )
        found = found.drop_duplicates("claim", keep="last")
    order = {claim: i for i, claim in enumerate(ledger().claim)}
    found = found.sort_values("claim", key=lambda column: column.map(order))
    path.parent.mkdir(parents=True, exist_ok=True)
    found.to_csv(path, index=False)
    return found


# ------------------------------------------------------------------------------------------- what a notebook says of it


def number(value):
    """A Metric of a single number from 0 to 1, a correlation for instance, which has no questions to resample."""
    return Metric(np.array([value], float), np.ones(1), np.zeros(1), np.zeros(1))


def publish(preset, found, scores, changes=None):
    """Keep the verdicts and scores of a notebook's runs in the folder `results` of their runs: claims.csv and sweeps.csv.

    `make publish` copies them to data/results, where `committed` reads them.
    """
    folder = output_folder(resolve(recipes(preset, changes or {}).base.runs), "results")
    keep_verdicts(folder / "claims.csv", found)
    keep_scores(folder / "sweeps.csv", scores)


def committed(notebook, preset="tiny"):
    """The committed verdicts of a notebook's claims ("06"), an empty table where there are none yet."""
    # the frozen mini world speaks for `tiny`
    path = resolve(f"data/results/claims_{Path(preset).stem.removesuffix('_frozen')}.csv")
    if not path.exists():
        return pd.DataFrame(columns=VERDICTS)
    READ.append(shown_path(path))
    table = pd.read_csv(path, dtype={"claim": str})
    return table[table.claim.isin(ledger().query("notebook == @notebook").claim)]


def beside(scores, preset="tiny", changes=None):
    """Headline scores, a row a benchmark and run: seeds that were run here, and beside them the other committed ones.

    The committed seeds are read from data/results; a trial with `changes` is another experiment and has none beside it.
    """
    path = resolve(f"data/results/{Path(preset).stem}.csv")
    tables = [scores.assign(source=[f"seed {seed}, run here" for seed in scores.seed])]
    if path.is_file() and not changes:
        other = pd.read_csv(path)
        other = other[~other.seed.isin(scores.seed) & other.run.isin(scores.run)]
        tables.append(other.assign(source=[f"seed {seed}, committed" for seed in other.seed]))
        READ.append(shown_path(path))
    both = pd.concat(tables, ignore_index=True)
    headline = both.benchmark.map(
        {name: benchmark.headline for name, benchmark in BENCHMARKS.items()}
    )
    both = both[(both.metric == headline) & both.benchmark.isin(scores.benchmark)]
    index = ["benchmark", "metric", "run"]
    return both.pivot_table(index=index, columns="source", values="value", sort=False).round(1)


def account(*sweeps, live="all"):
    """Print what a notebook ran live, what it read, and what it left out: a line each, wrapped.

    sweeps: the Sweeps of the notebook, in order. live: "small" where only a part of the arms was run.
    """
    runs, trained, answered = set(), set(), {}
    for sweep in sweeps:
        runs |= {shown_path(run.folder) for run in sweep.runs.values()}
        trained |= {shown_path(sweep.runs[key].folder) for key in sweep.trained}
        for label, _, name in sorted(sweep.answered):
            answered.setdefault(label, []).append(name)
    lines = [("trained here", sorted(trained))]
    lines += [
        (
            "asked here",
            [f"{label} ({', '.join(dict.fromkeys(names))})" for label, names in answered.items()],
        )
    ]
    lines += [("read, runs", sorted(runs - trained)), ("read, committed", sorted(set(READ)))]
    if live == "small":
        lines.append(("not run here", ['the other arms and seeds: live = "all", or make paper']))
    for how, what in lines:
        text = ", ".join(dict.fromkeys(what)) or "nothing"
        print(
            textwrap.fill(
                text,
                112,
                initial_indent=f"{how:17}",
                subsequent_indent=" " * 17,
                break_on_hyphens=False,
            )
        )


def shown_verdicts(found):
    """Verdicts as a notebook shows them: claim, seeds, effect, interval, the smallest that counts, verdict."""
    table = found.assign(
        interval=[
            f"[{r.low:.1f}, {r.high:.1f}]" if r.n_seeds > 1 else "" for r in found.itertuples()
        ]
    )
    return table.set_index("claim")[
        ["statement", "n_seeds", "effect", "interval", "smallest", "verdict"]
    ]


def reading(found, long):
    """One line a whole claim: the verdict of the long form where there is one, else that of these runs.

    found: the verdicts of these runs, or None where they were not judged (a notebook with live="small").
    """
    rows = long if found is None else found
    for row in rows[rows.claim.str.isdigit()].itertuples():
        other = long[long.claim == row.claim]
        if found is None:
            source = "committed long form"
        elif row.verdict == FEW and len(other):
            row, source = next(other.itertuples()), "committed long form"
        else:
            source = "these runs"
        if not row.n_seeds:
            yield f"{row.claim}. {row.statement}: needs runs that only the long form has (make paper)"
            continue
        interval = f", interval {row.low:.1f} to {row.high:.1f}" if row.low == row.low else ""
        seeds = f"{row.n_seeds} seed{'s' if row.n_seeds != 1 else ''}"
        yield f"{row.claim}. {row.statement}: {row.verdict} ({source}, {seeds}: {row.effect:+.1f}{interval})"
