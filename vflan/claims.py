"""From scores to verdicts: what is claimed, what was measured, whether it holds. Computed, never assumed.

Scores are the table of vflan.evaluate, with one row for each seed of a run.
"""

from pathlib import Path

import pandas as pd

from vflan.benchmarks import BENCHMARKS
from vflan.kept import read_rows

# What the mini world has to show before any comparison in it is worth reading: a model that sees, an alignment that
# aligns. (claim, run, benchmark, metric, rule, bound); "before" is the stage that the run started from.
BEFORE = {"base": "projector", "chat": "base"}
FLOORS = [
    ("Base answers held-in tasks", "base", "heldin", "accuracy", "at least", 80),
    ("Base answers held-out tasks better than the majority answer", "base", "heldout", "accuracy", "over majority", 12),
    ("Base answers held-out tasks better than the projector stage", "base", "heldout", "accuracy", "over before", 12),
    *[(f"Base sees what is there, POPE {s}", "base", "pope", f"accuracy/{s}", "at least", 88)
      for s in ("random", "popular", "adversarial")],
    *[(f"Base says yes about half of the time, POPE {s}", "base", "pope", f"yes_ratio/{s}", "within", (42, 58))
      for s in ("random", "popular", "adversarial")],
    ("Base still classifies objects", "base", "forgetting", "accuracy/objects", "at least", 85),
    ("Base reads handwritten digits (shown beside, no floor)", "base", "forgetting", "accuracy/digits", "shown", None),
    ("Chat writes in sentences where Base did not", "chat", "llava_bench", "format", "over before", 30),
    ("Chat still answers held-in tasks, read leniently", "chat", "heldin", "lenient", "over before", -8),
]  # fmt: skip


def seeds_of(scores, run, benchmark, metric):
    """The rows of one metric of one run, indexed by seed."""
    found = scores[(scores.run == run) & (scores.benchmark == benchmark) & (scores.metric == metric)]
    return found.set_index("seed").sort_index()


def answered(run, benchmark, folder, name=None):
    """The questions of a benchmark, each with the `answer` that vflan.evaluate kept for the run (under `name`)."""
    path = Path(run.folder) / "answers" / (name or "") / f"{benchmark}.jsonl"
    if not path.is_file():
        raise FileNotFoundError(f"{run.name} has no answers to {benchmark} yet: vflan.evaluate asks the questions.")
    said = {row["i"]: row["answer"] for row in read_rows(path)[1:]}
    return [sample | {"answer": said[i]} for i, sample in enumerate(BENCHMARKS[benchmark].load(folder))]


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
        verdict = "holds" if len(both) and above.all() else "opposite" if len(both) and below.all() else "open"
        difference = (one.value[both] - two.value[both]).mean()
        rows.append([claim, f"{benchmark} {metric}", shown(one), shown(two), round(difference, 1), verdict])
    return pd.DataFrame(rows, columns=["claim", "measured as", "first", "second", "difference", "verdict"])


def wanted(rule, bound, majority, before):
    """(low, high, in words): what a measured value has to lie between."""
    if rule == "at least":
        return bound, 100, f"{bound} or more"
    if rule == "within":
        return *bound, f"{bound[0]} to {bound[1]}"
    if rule == "over majority":
        return majority + bound, 100, f"majority + {bound}"
    if rule == "over before":
        return before + bound, float("inf"), f"stage before {'+' if bound > 0 else '-'} {abs(bound)}"
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
        judged = own.value if rule == "within" else [mean]  # a bias to yes and one to no are no balance
        holds = None if rule == "shown" else all(low <= value <= high for value in judged)
        rows.append([claim, needs, mean, " / ".join(f"{v:.1f}" for v in own.value), majority, earlier, holds])
    if losses:
        first, last = (sum(pair[i] for pair in losses.values()) / len(losses) for i in (0, 1))
        each = " / ".join(f"{pair[1]:.2f}" for pair in losses.values())
        row = ["The projector learns captions: the loss falls", "half of the first", last, each, None, first]
        rows.append([*row, bool(last <= first / 2)])
    columns = ["claim", "needs", "measured", "each seed", "majority", "stage before", "holds"]
    return pd.DataFrame(rows, columns=columns).round(2)
