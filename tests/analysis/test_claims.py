"""Verdicts come from intervals, floors from means; nothing holds by default."""

import json
import re
from types import SimpleNamespace

import pandas as pd
import pytest

from vflan import claims, config
from vflan.evaluation.evaluator import COLUMNS


def scores(*rows):
    """A table like evaluate's; row: (run, seed, benchmark, metric, value, margin, majority)."""
    return pd.DataFrame(
        [[r, b, m, v, v - h, v + h, 100, s, z, "", 0] for r, s, b, m, v, h, z in rows],
        columns=COLUMNS,
    )


def verdict(*values):
    """The verdict on `a > b` for ((a, b) of each seed), intervals of +-2."""
    rows = [
        (run, s, "mme", "score", v, 2, 25)
        for s, pair in enumerate(values)
        for run, v in zip("ab", pair)
    ]
    return claims.compare(scores(*rows), [("a is higher", "a", "b", "mme", "score")]).verdict[0]


def test_a_claim_holds_only_if_the_intervals_are_apart_in_every_seed():
    assert verdict((60, 50)) == "holds"
    assert verdict((53, 50)) == "open"
    assert verdict((50, 60)) == "opposite"
    assert verdict((60, 50), (70, 50)) == "holds"
    assert verdict((60, 50), (51, 50)) == "open"
    assert verdict((60, 50), (50, 60)) == "open"


def test_a_comparison_with_a_run_that_is_not_there_stays_open():
    found = claims.compare(
        scores(("a", 0, "mme", "score", 60, 2, 25)), [("c", "a", "b", "mme", "score")]
    )
    assert found.verdict[0] == "open" and pd.isna(found.difference[0])


def test_a_comparison_shows_values_intervals_and_the_mean_difference():
    rows = [("a", 0, "mme", "score", 60, 2, 25), ("b", 0, "mme", "score", 50, 1, 25)]
    row = claims.compare(scores(*rows), [("c", "a", "b", "mme", "score")]).iloc[0]
    assert (row["first"], row["second"], row.difference) == (
        "60.0 [58.0, 62.0]",
        "50.0 [49.0, 51.0]",
        10.0,
    )


def held(table):
    return dict(zip(table.claim, table.holds))


def test_floors_are_judged_on_the_mean_of_the_seeds():
    low, high = (
        ("base", 0, "heldin", "accuracy", 78, 2, 30),
        ("base", 1, "heldin", "accuracy", 83, 2, 30),
    )
    assert held(claims.floors(scores(low, high))) == {"Base answers held-in tasks": True}
    assert held(claims.floors(scores(low))) == {"Base answers held-in tasks": False}


def test_floors_count_from_the_majority_answer_and_from_the_stage_before():
    rows = [
        ("projector", 0, "mmbench", "accuracy", 50, 2, 33),
        ("base", 0, "heldout", "accuracy", 55, 2, 33),
        ("base", 0, "mmbench", "accuracy", 55, 2, 33),
    ]
    assert list(held(claims.floors(scores(*rows))).values()) == [True, False, None]


def test_a_floor_over_a_stage_that_was_not_scored_does_not_hold():
    assert list(
        held(claims.floors(scores(("chat", 0, "llava_bench", "format", 99, 1, 0)))).values()
    ) == [False]


@pytest.mark.parametrize("ratio, holds", [(43, False), (44, True), (56, True), (57, False)])
def test_saying_yes_half_of_the_time_has_two_sides(ratio, holds):
    table = claims.floors(scores(("base", 0, "pope", "yes_ratio/random", ratio, 1, 100)))
    assert list(table.holds) == [holds]


def test_always_yes_with_one_seed_and_never_with_another_is_no_balance():
    rows = [("base", s, "pope", "yes_ratio/random", 100 * s, 0, 100) for s in (0, 1)]
    assert list(claims.floors(scores(*rows)).holds) == [False]


def test_digits_are_shown_but_not_judged():
    table = claims.floors(scores(("base", 0, "forgetting", "accuracy/digits", 40, 1, 10)))
    assert list(table.holds) == [None]


def test_the_projector_has_to_halve_its_loss():
    none = scores(("chat", 0, "mme", "score", 1, 1, 1))
    assert list(claims.floors(none, {0: (4.0, 1.0), 1: (4.0, 2.0)}).holds) == [True]
    assert list(claims.floors(none, {0: (4.0, 2.5)}).holds) == [False]


def test_the_table_is_in_the_order_of_the_runs_and_means_over_seeds():
    rows = [
        ("b", 0, "mme", "score", 50, 2, 25),
        ("a", 0, "mme", "score", 60, 2, 25),
        ("a", 1, "mme", "score", 70, 2, 25),
    ]
    table = claims.table(scores(*rows), {"MME": ("mme", None)})
    assert table.MME.to_dict() == {"b": 50, "a": 65} and list(table.index) == ["b", "a"]


def test_kept_answers_stand_beside_their_questions(tmp_path):
    folder, run = tmp_path / "benchmarks", SimpleNamespace(folder=tmp_path / "run", name="run")
    (folder / "heldin").mkdir(parents=True)
    questions = [{"question_id": str(i), "text": f"q{i}", "label": "yes"} for i in range(2)]
    (folder / "heldin" / "questions.jsonl").write_text("\n".join(map(json.dumps, questions)))
    with pytest.raises(FileNotFoundError, match="no answers to heldin"):
        claims.answered(run, "heldin", folder)
    (run.folder / "answers").mkdir(parents=True)
    kept = [
        {"model": "x"},
        {"i": 1, "answer": "one", "finish": "stop"},
        {"i": 0, "answer": "7", "finish": "length"},
    ]  # in the order they came
    (run.folder / "answers" / "heldin.jsonl").write_text("\n".join(map(json.dumps, kept)) + "\n")
    assert [(s["text"], s["answer"]) for s in claims.answered(run, "heldin", folder)] == [
        ("q0", "7"),
        ("q1", "one"),
    ]
    (run.folder / "answers" / "heldin.jsonl").write_text(
        "\n".join(map(json.dumps, kept[:2])) + "\n"
    )
    with pytest.raises(FileNotFoundError, match="run lacks 1 answers to heldin"):
        claims.answered(run, "heldin", folder)
    others = [row | {"question_id": f"other {row['i']}"} for row in kept[1:]]
    (run.folder / "answers" / "heldin.jsonl").write_text(
        "\n".join(map(json.dumps, [kept[0], *others])) + "\n"
    )
    with pytest.raises(ValueError, match="run answered other questions of heldin"):
        claims.answered(run, "heldin", folder)


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A project folder whose committed scores know two seeds of a run."""
    committed = scores(
        *[("base", s, "mme", m, 10 * s + 40, 2, 25) for s in (0, 1) for m in ("score", "accuracy")]
    )
    (tmp_path / "data" / "results").mkdir(parents=True)
    committed.to_csv(tmp_path / "data" / "results" / "tiny.csv", index=False)
    monkeypatch.setattr(config, "ROOT", tmp_path)
    monkeypatch.setattr(claims, "READ", [])
    return tmp_path


def test_a_seed_that_ran_stands_beside_the_committed_ones_that_did_not(project):
    ran = scores(("base", 0, "mme", "score", 63, 2, 25))
    row = claims.beside(ran).loc["mme", "score", "base"]
    assert dict(row) == {
        "seed 0, run here": 63,
        "seed 1, committed": 50,
    }  # the committed seed 0 gives way
    assert list(claims.beside(ran, changes={"max_steps": 4}).columns) == ["seed 0, run here"]
    assert list(claims.beside(ran, "lora_7b").columns) == ["seed 0, run here"]


def test_the_committed_verdicts_are_not_those_of_a_preset_file_of_ones_own():
    assert len(claims.committed("06", "tiny_frozen")) == len(claims.committed("06")) > 0
    assert claims.committed("06", "mine/tiny.py").empty


def test_a_notebook_lists_what_it_ran_and_what_it_read(project, capsys):
    runs = {(name, 0): SimpleNamespace(folder=project / name) for name in ("base", "chat")}
    claims.beside(scores(("base", 0, "mme", "score", 63, 2, 25)))
    done = SimpleNamespace(runs=runs, trained={("chat", 0)}, answered={("chat", 0, "pope")})
    claims.account(done, live="small")
    parts = re.split(r"^(?=\w)", capsys.readouterr().out, flags=re.MULTILINE)
    said = {part[:17].strip(): part[17:].strip() for part in parts if part}
    assert said["trained here"] == "chat" and said["asked here"] == "chat (pope)"
    assert said["read, runs"] == "base"
    assert said["read, committed"] == "data/results/tiny.csv"
    assert "make paper" in said["not run here"]
    claims.account(done)
    assert "not run here" not in capsys.readouterr().out


def test_published_scores_keep_the_seeds_that_did_not_run(tmp_path):
    from vflan.tools.publish import with_other_seeds

    for name, rows in (("new", [(0, 70)]), ("old", [(0, 60), (1, 50)])):
        table = scores(*[("base", seed, "mme", "score", value, 2, 25) for seed, value in rows])
        table.to_csv(tmp_path / f"{name}.csv", index=False)
    kept = with_other_seeds(tmp_path / "new.csv", tmp_path / "old.csv")
    assert list(zip(kept.seed, kept.value)) == [("0", "70"), ("1", "50")]
