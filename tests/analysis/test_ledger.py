"""The ledger and its verdicts: no effect, the opposite effect and too few runs must not hold."""

import threading
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest

from vflan import claims, config
from vflan.evaluation.benchmarks.benchmark import Metric
from vflan.evaluation.evaluator import COLUMNS


def metric(rng, right, pictures=60, each=3):
    """Answers to `each` questions on every picture, right with probability `right`."""
    n = pictures * each
    return Metric(
        (rng.random(n) < right).astype(float),
        np.ones(n),
        np.zeros(n),
        np.repeat(np.arange(pictures), each),
    )


def items(effect, seeds=5, spread=0.0, noise=0):
    """items() of two runs, `new` and `old`: `effect` apart, with `spread` between seeds."""
    rng = np.random.default_rng(noise)
    shift = rng.normal(0, spread, seeds)
    found = {}
    for seed in range(seeds):
        found["old", seed] = metric(rng, 0.5)
        found["new", seed] = metric(rng, np.clip(0.5 + effect + shift[seed], 0, 1))
    return lambda label, seed, benchmark: {"accuracy": found[label, seed]}


def claim(direction="above", smallest=3.0, comparison="new - old"):
    row = dict(claim="1", statement="more is better", comparison=comparison, metric="x:accuracy")
    row |= dict(direction=direction, smallest=smallest, item="", notebook="", either_way="")
    return pd.DataFrame([row])


def judge(found, seeds=5, **more):
    return claims.verdicts(found, range(seeds), claim(**more), rounds=200).iloc[0]


def test_a_clear_effect_holds_and_its_size_is_told():
    row = judge(items(0.3))
    assert row.verdict == claims.HOLDS and row.n_seeds == 5
    assert 22 < row.effect < 38 and row.low < 30 < row.high


@pytest.mark.parametrize("effect", [0.0, -0.3])
def test_no_effect_and_the_opposite_effect_do_not_hold(effect):
    assert judge(items(effect)).verdict == claims.NOT


def test_an_effect_that_is_too_small_to_count_does_not_hold():
    assert judge(items(0.1), smallest=25).verdict == claims.NOT


def test_too_few_runs_are_no_verdict():
    row = judge(items(0.3), seeds=2)
    assert row.verdict == claims.FEW and row.n_seeds == 2


def test_a_spread_between_seeds_that_hides_the_effect_is_seen():
    one, many = judge(items(0.12, spread=0.0)), judge(items(0.12, spread=0.3, noise=3))
    assert many.high - many.low > 2 * (one.high - one.low)
    assert many.verdict == claims.NOT


def test_below_says_that_an_effect_is_surely_small_and_over_that_it_is_surely_large():
    assert judge(items(0.0), direction="below", smallest=20).verdict == claims.HOLDS
    assert (
        judge(items(0.0), direction="below", smallest=0.5).verdict == claims.NOT
    )  # small, but not surely
    assert judge(items(0.4), direction="below", smallest=20).verdict == claims.NOT
    assert judge(items(0.4), direction="over", smallest=15).verdict == claims.HOLDS
    assert judge(items(0.1), direction="over", smallest=15).verdict == claims.NOT


def test_weakly_is_between():
    """Lowering the effect step by step finds one that only the uncorrected interval confirms."""
    seen = [
        judge(items(effect, spread=0.05, noise=1)).verdict for effect in np.linspace(0.3, 0.0, 31)
    ]
    order = [claims.HOLDS, claims.WEAKLY, claims.NOT]
    assert [v for i, v in enumerate(seen) if v not in seen[:i]] == order


def test_false_alarms_are_as_rare_as_promised():
    """Without an effect about 1 verdict in 40 is `holds weakly` (2.5 % lie above zero)."""
    said = [judge(items(0.0, spread=0.05, noise=n), smallest=0.0).verdict for n in range(100)]
    assert sum(v != claims.NOT for v in said) <= 7
    assert said.count(claims.HOLDS) <= 2


def test_the_interval_covers_the_truth():
    rows = [judge(items(0.1, spread=0.08, noise=n)) for n in range(100)]
    missed = sum(
        not row.low <= 10 <= row.high for row in rows
    )  # corrected for ten claims: about 1 in 200
    assert missed <= 4


def test_pairing_takes_out_what_is_hard_for_both():
    """The difference of runs that fail on the same pictures is surer than either score."""
    rng = np.random.default_rng(0)
    hard = np.repeat(rng.random(60) < 0.5, 3)
    right = {}
    for seed in range(5):
        flip = rng.random((2, len(hard))) < 0.02
        right["old", seed], right["new", seed] = hard ^ flip[0], hard ^ flip[1]
    found = lambda label, seed, _: {  # noqa: E731
        "accuracy": Metric(
            right[label, seed].astype(float),
            np.ones(180),
            np.zeros(180),
            np.repeat(np.arange(60), 3),
        )
    }
    alone = judge(found, comparison="new")
    both = judge(found)
    assert both.high - both.low < 0.4 * (alone.high - alone.low)


def test_a_seed_that_lacks_a_run_is_left_out():
    whole = items(0.3)

    def some(label, seed, benchmark):
        if (label, seed) == ("new", 4):
            raise KeyError(label)
        return whole(label, seed, benchmark)

    assert judge(some).n_seeds == 4


def test_comparisons_are_read_with_signs_and_weights():
    assert claims.terms("chat - 0.9 base") == [(1.0, "chat"), (-0.9, "base")]
    assert claims.terms("0.5 a-1 - 0.5 b + c") == [(0.5, "a-1"), (-0.5, "b"), (1.0, "c")]


def test_the_ledger_lists_ten_claims_each_with_what_could_decide_it():
    table = claims.ledger()
    whole = table[table.claim.str.isdigit()]
    assert list(whole.claim) == [str(i) for i in range(1, 11)]
    assert whole.either_way.str.len().min() > 40
    assert set(table.notebook) <= {"06", "07", "08"}
    assert all(claims.terms(c) for c in table.comparison) and all(
        ":" in m for row in table.metric for m in row.split()
    )


def test_a_ledger_with_a_mistake_is_refused(tmp_path):
    path = tmp_path / "claims.csv"
    claim(direction="upwards").to_csv(path, index=False)
    with pytest.raises(ValueError, match="'?upwards"):
        claims.ledger(path)
    pd.concat([claim(), claim()]).to_csv(path, index=False)
    with pytest.raises(ValueError, match="twice"):
        claims.ledger(path)


def test_verdicts_are_kept_by_claim(tmp_path):
    path = tmp_path / "claims.csv"
    first = claims.verdicts(items(0.3), range(5), claim(), rounds=50)
    claims.keep_verdicts(path, first)
    claims.keep_verdicts(path, first.assign(claim="2"))
    kept = claims.keep_verdicts(path, first.assign(effect=1.0))
    assert list(kept.claim) == ["1", "2"] and list(kept.effect)[0] == 1.0


def test_verdicts_of_two_notebooks_at_once_are_both_kept(tmp_path, monkeypatch):
    """The second begins while the first has read the file and not yet written it."""
    path, both = tmp_path / "claims.csv", []
    first = claims.verdicts(items(0.3), range(5), claim(), rounds=50)
    claims.keep_verdicts(path, first)
    real = claims.ledger().claim
    second = threading.Thread(target=claims.keep_verdicts, args=(path, first.assign(claim="3")))

    def read_csv(*args, **more):
        table = pd.read_csv(*args, **more)
        if not both:
            both.append(second.start())
            second.join(timeout=1)
        return table

    monkeypatch.setattr(claims, "pd", SimpleNamespace(read_csv=read_csv, concat=pd.concat))
    monkeypatch.setattr(claims, "ledger", lambda: SimpleNamespace(claim=real))
    claims.keep_verdicts(path, first.assign(claim="2"))
    second.join()
    assert list(pd.read_csv(path, dtype=str).claim) == ["1", "2", "3"]


def test_what_a_notebook_says_prefers_a_verdict_and_names_its_source():
    short, long = (claims.verdicts(items(0.3), range(n), claim(), rounds=50) for n in (1, 5))
    nothing = claims.verdicts(items(0.3), [], claim(), rounds=50)
    none = claims.committed("06").iloc[:0]
    assert "not enough runs (these runs, 1 seed: +" in next(claims.reading(short, none))
    assert "holds (committed long form, 5 seeds: +" in next(claims.reading(short, long))
    assert "holds (these runs, 5 seeds" in next(claims.reading(long, none))
    assert "make paper" in next(claims.reading(nothing, none))
    assert "holds (committed long form, 5 seeds: +" in next(claims.reading(None, long))


def test_what_changed_since_the_committed_run_is_told():
    now = claims.verdicts(items(0.3), range(5), claim(), rounds=50)
    before = now.assign(verdict=claims.NOT, effect=-1.25)
    (line,) = claims.changed(now, before)
    assert line.startswith("1. ") and line.endswith(f"now holds ({now.effect[0]:+.1f})")
    assert f"{claims.NOT} (-1.2) before" in line
    assert claims.changed(now, now) == ["The verdicts are those of the committed run."]
    assert claims.changed(now, now.iloc[:0]) == ["measured for the first time: 1"]


def test_verdicts_and_scores_are_kept_beside_the_runs_that_they_are_of(tmp_path, monkeypatch):
    monkeypatch.setattr(config, "ROOT", tmp_path)
    row = ["a", "x", "accuracy", 1.0, 0.0, 2.0, 9, 0, 0.0, "", 0]
    scores = pd.DataFrame([row], columns=COLUMNS)
    short, long = (claims.verdicts(items(0.3), range(n), claim(), rounds=50) for n in (1, 5))
    claims.publish("tiny_frozen", long, scores)
    claims.publish("tiny", short, scores, changes={"lr": 1, "runs": "runs/a trial"})
    found = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.csv")}
    assert found == {
        f"runs/{album}/results/{name}.csv"
        for album in ("tiny_frozen", "a trial")
        for name in ("claims", "sweeps")
    }
    kept = {path.parts[-3]: pd.read_csv(path).n_seeds[0] for path in tmp_path.rglob("claims.csv")}
    assert kept == {"tiny_frozen": 5, "a trial": 1}
