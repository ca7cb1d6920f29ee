"""Intervals and tests for scores, by resampling whole pictures.

Questions about one picture are not independent: a model that misreads the picture fails them
together. Every interval here therefore resamples clusters (pictures), never single questions. The
code uses NumPy only, a fixed seed, and no loop over rounds.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache

import numpy as np
from numpy.typing import ArrayLike

ROUNDS = 2000
BLOCK = 20_000_000  # numbers drawn at a time, because there may be many clusters


def resampled(
    num: ArrayLike,
    den: ArrayLike | None = None,
    clusters: ArrayLike | None = None,
    groups: ArrayLike | None = None,
    seed: int = 0,
    rounds: int = ROUNDS,
) -> tuple[float, np.ndarray]:
    """The score and its bootstrap replicates: mean over groups of sum(num) / sum(den).

    num, den: (n,), one entry for each item. A `den` of ones gives a plain mean; F1 fits as
    2 tp / (2 tp + fp + fn). clusters: (n,) the picture of each item; None: each item is its own
    cluster. groups: (n,) labels whose ratios are averaged with equal weight (a macro average);
    None: a single group. Returns (value, (rounds,) replicates). A ratio with an empty denominator
    counts as 0; a group that a replicate did not draw is left out of that replicate.
    """
    tops, bottoms, sizes = tables(num, den, clusters, groups)  # each (clusters, groups)
    value = float(ratio(tops.sum(0), bottoms.sum(0)))
    # A replicate weights each cluster by how often it was drawn.
    blocks = draws(len(tops), seed, rounds)  # each (rounds of the block, clusters)
    return value, np.concatenate([ratio(w @ tops, w @ bottoms, w @ sizes) for w in blocks])


def tables(
    num: ArrayLike, den: ArrayLike | None, clusters: ArrayLike | None, groups: ArrayLike | None
) -> list[np.ndarray]:
    """Sums of num, of den and of ones, each (clusters, groups). ValueError for unequal lengths."""
    num = np.asarray(num, float)
    n = len(num)
    if not n:
        raise ValueError("There is nothing to score: no items were given.")
    den = np.ones(n) if den is None else np.asarray(den, float)
    clusters = np.arange(n) if clusters is None else np.asarray(clusters)
    groups = np.zeros(n) if groups is None else np.asarray(groups)
    # Number clusters and groups from 0.
    cluster, group = (np.unique(labels, return_inverse=True)[1] for labels in (clusters, groups))
    if {len(den), len(cluster), len(group)} != {n}:
        raise ValueError("Values, weights, clusters and groups must have one entry for each item.")
    shape = cluster.max() + 1, group.max() + 1
    # One number for each (cluster, group), so that one bincount sums them all.
    cell = cluster * shape[1] + group
    sums = [np.bincount(cell, w, minlength=shape[0] * shape[1]) for w in (num, den, np.ones(n))]
    return [values.reshape(shape) for values in sums]


def ratio(top: np.ndarray, bottom: np.ndarray, drawn: ArrayLike = 1.0) -> np.ndarray:
    """(..., groups) -> (...): the mean over the groups that were drawn.

    An empty denominator counts as 0.
    """
    # A group without items in this replicate does not pull the mean to 0.
    value = np.divide(top, bottom, out=np.zeros_like(top), where=bottom > 0)
    present = np.broadcast_to(drawn, top.shape) > 0
    return (value * present).sum(-1) / np.maximum(present.sum(-1), 1)


def draws(k: int, seed: int, rounds: int) -> Iterator[np.ndarray]:
    """Yields (rounds of a block, k): how often each of k clusters was drawn; `rounds` in all."""
    # Few clusters: keep the draws for the next metric. Many: draw them in blocks.
    if k * rounds <= BLOCK // 4:
        yield _draw(k, seed, rounds)
        return
    rng, block = np.random.default_rng(seed), max(1, BLOCK // k)
    for start in range(0, rounds, block):
        yield rng.multinomial(k, np.full(k, 1 / k), size=min(block, rounds - start))


# The metrics of a benchmark have the same pictures, so they share the draws.
@lru_cache(8)
def _draw(k: int, seed: int, rounds: int) -> np.ndarray:
    """(rounds, k) such counts. As floats, because they are multiplied with floats."""
    return np.random.default_rng(seed).multinomial(k, np.full(k, 1 / k), size=rounds).astype(float)


def bootstrap(
    values: ArrayLike,
    clusters: ArrayLike | None = None,
    seed: int = 0,
    den: ArrayLike | None = None,
    groups: ArrayLike | None = None,
    level: float = 0.95,
    rounds: int = ROUNDS,
) -> tuple[float, float, float]:
    """(mean, low, high): the score and its percentile interval, in the units of `values`."""
    value, replicates = resampled(values, den, clusters, groups, seed, rounds)
    return value, *_percentiles(replicates, level)


def paired(
    a: ArrayLike,
    b: ArrayLike,
    clusters: ArrayLike | None = None,
    seed: int = 0,
    groups: ArrayLike | None = None,
    level: float = 0.95,
    rounds: int = ROUNDS,
    den: tuple[ArrayLike | None, ArrayLike | None] = (None, None),
) -> tuple[float, float, float, float]:
    """(difference a - b, low, high, p) of two models on the same items.

    den: their two denominators, for ratios like F1. The interval resamples clusters for both at
    once, so what is hard for both cancels. p is a two-sided permutation test: if the models were
    alike, exchanging their answers about a picture would change nothing. p is the share of such
    exchanges that differ at least as much, and never below 1 / (rounds + 1). ValueError if the
    items differ in number.
    """
    a, b = np.asarray(a, float), np.asarray(b, float)
    if a.shape != b.shape:
        raise ValueError(f"A paired test needs the same items in both: got {len(a)} and {len(b)}.")
    top_a, bottom_a, sizes = tables(a, den[0], clusters, groups)
    top_b, bottom_b, _ = tables(b, den[1], clusters, groups)
    value = float(ratio(top_a.sum(0), bottom_a.sum(0)) - ratio(top_b.sum(0), bottom_b.sum(0)))
    # The same draws for both models.
    replicates = [
        ratio(w @ top_a, w @ bottom_a, w @ sizes) - ratio(w @ top_b, w @ bottom_b, w @ sizes)
        for w in draws(len(sizes), seed, rounds)
    ]
    low, high = _percentiles(np.concatenate(replicates), level)
    rng, step = np.random.default_rng(seed), max(1, BLOCK // len(sizes))
    # The observed pairing is itself one of the possible exchanges.
    extreme = 1
    for start in range(0, rounds, step):
        shape = min(step, rounds - start), len(sizes)
        swap = rng.integers(0, 2, shape).astype(float)  # 1: the models exchange this cluster
        tops, bottoms = swap @ (top_b - top_a), swap @ (bottom_b - bottom_a)  # (step, groups)
        exchanged = ratio(top_a.sum(0) + tops, bottom_a.sum(0) + bottoms)
        exchanged = exchanged - ratio(top_b.sum(0) - tops, bottom_b.sum(0) - bottoms)
        # The tolerance keeps equal differences equal despite rounding.
        extreme += int((np.abs(exchanged) >= abs(value) - 1e-9).sum())
    return value, low, high, extreme / (rounds + 1)


def _percentiles(replicates: np.ndarray, level: float) -> tuple[float, float]:
    low, high = np.quantile(replicates, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
