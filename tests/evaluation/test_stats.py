"""Intervals have their coverage, and a picture counts once, however many questions it has."""

from math import comb

import numpy as np
import pytest

from vflan import stats
from vflan.evaluation.stats import bootstrap, paired, resampled


def test_the_mean_is_exact_and_the_interval_repeats():
    values = [0.1, 0.2, 0.53, 0.88, 1.29]
    mean, low, high = bootstrap(values)
    assert mean == pytest.approx(0.6) and 0.1 <= low < mean < high <= 1.3
    assert bootstrap(values) == (mean, low, high) != bootstrap(values, seed=1, rounds=100)


def test_cached_draws_and_draws_in_blocks_give_the_same_interval(monkeypatch):
    values, pictures = np.random.default_rng(0).random(300), np.arange(300) // 3
    kept = bootstrap(values, pictures, rounds=500)
    monkeypatch.setattr(stats, "BLOCK", 100 * 70)  # 70 of the 500 rounds at a time
    assert (
        bootstrap(values, pictures, rounds=500)
        == kept
        != bootstrap(values, pictures, rounds=500, seed=1)
    )


def test_the_interval_is_as_wide_as_theory_says():
    values = np.random.default_rng(0).random(400) < 0.3
    mean, low, high = bootstrap(values)
    expected = 2 * 1.96 * np.sqrt(mean * (1 - mean) / 400)
    assert high - low == pytest.approx(expected, rel=0.08)


def test_repeating_a_question_about_the_same_picture_adds_no_certainty():
    values = (np.random.default_rng(0).random(100) < 0.5).astype(float)
    pictures = np.arange(100)
    once = bootstrap(values, pictures)
    tenfold = bootstrap(np.repeat(values, 10), np.repeat(pictures, 10))
    assert tenfold == pytest.approx(once)
    naive = bootstrap(np.repeat(values, 10))
    assert naive[2] - naive[1] < 0.5 * (once[2] - once[1])


def test_ninety_five_of_a_hundred_intervals_contain_the_true_value():
    rng = np.random.default_rng(0)
    held = 0
    for trial in range(200):
        easiness = rng.beta(2, 2, 60)  # pictures differ, their questions share it
        values = rng.random((60, 4)) < easiness[:, None]
        _, low, high = bootstrap(
            values.ravel(), np.repeat(np.arange(60), 4), seed=trial, rounds=500
        )
        held += low <= 0.5 <= high
    assert 0.90 <= held / 200 <= 0.99


def test_groups_weigh_the_same_and_empty_ratios_count_as_zero():
    value, _, _ = bootstrap([1, 1, 1, 0], groups=["a", "a", "a", "b"])
    assert value == 0.5
    assert bootstrap([0, 0], den=[0, 0])[0] == 0
    f1, low, high = bootstrap([2, 2, 0, 0], den=[2, 2, 1, 0])
    assert f1 == pytest.approx(0.8) and low < f1 <= high


def test_a_group_that_was_not_drawn_does_not_drag_a_replicate_to_zero():
    _, replicates = resampled([1, 1, 1], groups=["a", "b", "c"])
    assert (replicates == 1).all()


def test_pairing_sees_a_small_difference_that_separate_intervals_miss():
    rng = np.random.default_rng(0)
    hard = rng.random(500)
    a, b = hard < 0.55, hard < 0.50
    difference, low, high, p = paired(a, b)
    assert difference == pytest.approx(a.mean() - b.mean()) and low > 0 and p < 0.01
    assert bootstrap(a)[1] < bootstrap(b)[2]
    assert paired(a, a)[3] == 1
    same = paired(rng.random(300) < 0.5, rng.random(300) < 0.5)
    assert same[3] > 0.05 and same[1] < 0 < same[2]


def test_the_permutation_test_agrees_with_mcnemars_exact_one():
    """One question a picture: the sign test on the questions that only one of the two got right."""
    a = np.array([1] * 12 + [0] * 3 + [1] * 40 + [0] * 45, float)
    b = np.array([0] * 12 + [1] * 3 + [1] * 40 + [0] * 45, float)
    exact = 2 * sum(comb(15, k) for k in range(4)) / 2**15
    assert paired(a, b, rounds=20_000)[3] == pytest.approx(exact, rel=0.15)


def test_chance_is_called_a_difference_about_one_time_in_twenty():
    rng, found = np.random.default_rng(0), 0
    for trial in range(200):
        easiness = np.repeat(rng.beta(2, 2, 40), 5)  # pictures differ; questions on one share it
        a, b = (rng.random(200) < easiness for _ in range(2))
        found += paired(a, b, np.repeat(np.arange(40), 5), seed=trial, rounds=300)[3] < 0.05
    assert found <= 20


def test_ratios_are_compared_as_ratios():
    """F1 is 2 tp / (2 tp + fp + fn): the difference is of the two F1, not of their numerators."""
    num_a, den_a, num_b, den_b = [2, 2, 0, 2], [2, 2, 1, 2], [2, 0, 0, 0], [2, 1, 1, 2]
    difference, low, high, p = paired(num_a, num_b, den=(den_a, den_b))
    assert difference == pytest.approx(6 / 7 - 2 / 6) and low <= difference <= high and 0 < p <= 1


def test_wrong_shapes_are_named():
    with pytest.raises(ValueError, match="same items"):
        paired([1, 0], [1])
    with pytest.raises(ValueError, match="nothing to score"):
        bootstrap([])
    with pytest.raises(ValueError, match="one entry for each item"):
        bootstrap([1, 0], clusters=["x"])


def test_many_pictures_do_not_need_much_memory_and_give_the_same_interval():
    values = np.random.default_rng(0).random(5000) < 0.3
    in_blocks = bootstrap(values, rounds=6000)  # 5000 x 6000 draws are more than one block
    assert in_blocks[0] == values.mean()
    assert in_blocks[2] - in_blocks[1] == pytest.approx(2 * 1.96 * np.sqrt(0.21 / 5000), rel=0.05)
