"""Intervals and tests for scores, by resampling whole pictures.

Questions about one picture are not independent: a model that misreads the picture fails them together. Every interval
here therefore resamples clusters (pictures), never single questions. NumPy only, a fixed seed, no loops over rounds.
"""

from functools import lru_cache

import numpy as np

ROUNDS = 2000
BLOCK = 20_000_000  # numbers drawn at a time, as there may be many clusters


def resampled(num, den=None, clusters=None, groups=None, seed=0, rounds=ROUNDS):
    """The score and its bootstrap replicates: mean over groups of sum(num) / sum(den).

    num, den: (n,) per item; `den` of ones gives a plain mean. F1 is 2 tp / (2 tp + fp + fn), so it fits as well.
    groups: (n,) labels whose ratios are averaged with equal weight (a macro average); None: a single group.
    clusters: (n,) picture of each item; None: every item is its own cluster.
    Returns (value, (rounds,) replicates). A ratio with an empty denominator counts as 0 in the value; a group that a
    replicate did not draw at all is left out of that replicate.
    """
    tops, bottoms, sizes = tables(num, den, clusters, groups)
    value = float(ratio(tops.sum(0), bottoms.sum(0)))
    return value, np.concatenate(
        [ratio(w @ tops, w @ bottoms, w @ sizes) for w in draws(len(tops), seed, rounds)]
    )


def tables(num, den, clusters, groups):
    """Sums of num, of den and of ones, each (clusters, groups)."""
    num = np.asarray(num, float)
    if not len(num):
        raise ValueError("There is nothing to score: no items were given.")
    den = np.ones_like(num) if den is None else np.asarray(den, float)
    cluster = np.unique(
        np.arange(len(num)) if clusters is None else np.asarray(clusters), return_inverse=True
    )[1]
    group = np.unique(
        np.zeros(len(num)) if groups is None else np.asarray(groups), return_inverse=True
    )[1]
    k, g = cluster.max() + 1, group.max() + 1
    if len({len(num), len(den), len(cluster), len(group)}) > 1:
        raise ValueError("Values, weights, clusters and groups must have one entry for each item.")
    return [
        np.bincount(cluster * g + group, weights=w, minlength=k * g).reshape(k, g)
        for w in (num, den, np.ones(len(num)))
    ]


def ratio(top, bottom, drawn=1.0):
    """(..., groups) -> (...): the mean over the groups that were drawn; an empty denominator counts as 0."""
    value, there = (
        np.divide(top, bottom, out=np.zeros_like(top), where=bottom > 0),
        np.broadcast_to(drawn, top.shape) > 0,
    )
    return (value * there).sum(-1) / np.maximum(there.sum(-1), 1)


def draws(k, seed, rounds):
    """Yields (some rounds, k) times that each of k clusters was drawn, `rounds` in all, a block at a time."""
    if k * rounds <= BLOCK // 4:
        yield _drawn(k, seed, rounds)
        return
    rng, block = np.random.default_rng(seed), max(1, BLOCK // k)
    for start in range(0, rounds, block):
        yield rng.multinomial(k, np.full(k, 1 / k), size=min(block, rounds - start))


@lru_cache(8)  # the metrics of a benchmark have the same pictures
def _drawn(k, seed, rounds):
    """(rounds, k) such numbers, as floats: what they multiply are floats too."""
    return np.random.default_rng(seed).multinomial(k, np.full(k, 1 / k), size=rounds).astype(float)


def bootstrap(values, clusters=None, seed=0, den=None, groups=None, level=0.95, rounds=ROUNDS):
    """(mean, low, high): the score and its percentile interval, in the units of `values`."""
    value, replicates = resampled(values, den, clusters, groups, seed, rounds)
    low, high = np.quantile(replicates, [(1 - level) / 2, (1 + level) / 2])
    return value, float(low), float(high)


def paired(a, b, clusters=None, seed=0, groups=None, level=0.95, rounds=ROUNDS, den=(None, None)):
    """(difference a - b, low, high, p) of two models on the same items; den: their two denominators, for ratios like F1.

    The interval resamples clusters for both at once, so what both find hard cancels. p is a two-sided permutation test:
    were the models alike, exchanging their answers about a picture would change nothing; it is the share of such
    exchanges that differ at least as much, and never below 1 / (rounds + 1).
    """
    a, b = np.asarray(a, float), np.asarray(b, float)
    if a.shape != b.shape:
        raise ValueError(f"A paired test needs the same items in both: got {len(a)} and {len(b)}.")
    (top_a, bottom_a, sizes), (top_b, bottom_b, _) = (
        tables(x, d, clusters, groups) for x, d in zip((a, b), den)
    )
    value = float(ratio(top_a.sum(0), bottom_a.sum(0)) - ratio(top_b.sum(0), bottom_b.sum(0)))
    replicates = np.concatenate(
        [ratio(w @ top_a, w @ bottom_a, w @ sizes) - ratio(w @ top_b, w @ bottom_b, w @ sizes)
         for w in draws(len(sizes), seed, rounds)]
    )  # fmt: skip
    low, high = np.quantile(replicates, [(1 - level) / 2, (1 + level) / 2])
    rng, step, extreme = np.random.default_rng(seed), max(1, BLOCK // len(sizes)), 1
    for start in range(0, rounds, step):
        swap = rng.integers(0, 2, (min(step, rounds - start), len(sizes))).astype(float)
        tops, bottoms = swap @ (top_b - top_a), swap @ (bottom_b - bottom_a)
        exchanged = ratio(top_a.sum(0) + tops, bottom_a.sum(0) + bottoms)
        exchanged = exchanged - ratio(top_b.sum(0) - tops, bottom_b.sum(0) - bottoms)
        extreme += int((np.abs(exchanged) >= abs(value) - 1e-9).sum())
    return value, float(low), float(high), extreme / (rounds + 1)


T975 = (
    12.706,
    4.303,
    3.182,
    2.776,
    2.571,
    2.447,
    2.365,
    2.306,
    2.262,
    2.228,
)  # Student's t for 1..10 degrees of freedom


def combine(values):
    """(mean, low, high) over seeds, 95 %, by Student's t: the spread of training runs, which no bootstrap of one run
    shows.

    One seed has no spread: its low and high are NaN, not the value itself.
    """
    values = np.asarray(values, float)
    if len(values) < 2:
        return float(values.mean()), float("nan"), float("nan")
    t = T975[len(values) - 2] if len(values) - 2 < len(T975) else 1.96 + 2.5 / (len(values) - 1)
    half = t * values.std(ddof=1) / np.sqrt(len(values))
    return float(values.mean()), float(values.mean() - half), float(values.mean() + half)


def over_seeds(scores):
    """Scores of several seeds -> one row a (run, benchmark, metric) with mean, low, high and the number of seeds.

    With one seed the bootstrap interval of that run is kept; the column `seeds` says which of the two it is.
    """
    rows = []
    for key, part in scores.groupby(["run", "benchmark", "metric"], sort=False):
        mean, low, high = combine(part.value)
        if len(part) == 1:
            low, high = part.low.iloc[0], part.high.iloc[0]
        rows.append([*key, mean, low, high, int(part.n.iloc[0]), len(part), part.baseline.mean()])
    return type(scores)(
        rows,
        columns=["run", "benchmark", "metric", "value", "low", "high", "n", "seeds", "baseline"],
    )
