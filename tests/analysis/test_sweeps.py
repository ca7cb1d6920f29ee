"""Sweeps: arms run in parallel, finished ones are read, and mistakes show before training."""

import json
import subprocess
import sys
import time

import psutil
import pytest

import vflan
from vflan.analysis.sweeps import estimated_rows, longest_first, with_samples
from vflan.config import replace, write_json


@pytest.fixture
def small(recipe, tmp_path):
    """(a projector recipe, a base recipe, a folder with one benchmark of eight questions)."""
    folder = tmp_path / "benchmarks"
    (folder / "heldin").mkdir(parents=True)
    (folder / "images").symlink_to(tmp_path / "images")
    question = dict(text="What color is it?", label="red", category="color")
    rows = [question | dict(question_id=str(i), image=f"{i}.png") for i in range(8)]
    (folder / "heldin" / "questions.jsonl").write_text(
        "".join(json.dumps(row) + "\n" for row in rows)
    )
    base = replace(recipe, name="base", max_steps=2, benchmarks=str(folder))
    return (
        replace(base, name="projector", stage="projector", tune=("projector",), template="plain"),
        base,
        folder,
    )


def test_arms_are_trained_asked_and_read_again(small, monkeypatch):
    projector, base, _ = small
    arms = {
        "projector": vflan.Arm(projector),
        "few": vflan.Arm(replace(base, name="few", num_tasks=2), init="projector"),
        "few/old-projector": vflan.Swap("few", "projector", "projector"),
    }
    done = vflan.sweep(arms, [0, 3], jobs=1)
    assert {(r.run, r.seed) for r in done.scores.itertuples()} == {
        (a, s) for a in arms for s in (0, 3)
    }
    assert [done.runs["few", seed].name for seed in (0, 3)] == ["few", "few-seed3"]
    assert (
        done.runs["few", 3].folder.joinpath("init.json").read_text().count("projector-seed3") == 1
    )
    items = done.items("few/old-projector", 0, "heldin")["accuracy"]
    assert len(items.num) == 8
    with pytest.raises(KeyError):
        done.items("few", 0, "pope")
    assert done.trained == {(label, seed) for label in ("projector", "few") for seed in (0, 3)}
    assert {label for label, *_ in done.answered} == set(arms)

    monkeypatch.setattr(
        sys.modules["vflan.training.trainer"], "fit", lambda *_: pytest.fail("trained again")
    )
    again = vflan.sweep(arms, [0, 3], jobs=1)
    assert again.scores.value.equals(done.scores.value)
    assert not again.trained and not again.answered


def test_side_by_side_gives_the_same_weights_as_one_after_the_other(small, tmp_path):
    projector, base, _ = small
    arms = lambda runs: {  # noqa: E731
        "projector": vflan.Arm(replace(projector, runs=str(tmp_path / runs))),
        "a": vflan.Arm(replace(base, name="a", runs=str(tmp_path / runs)), init="projector"),
        "the same": vflan.Arm(replace(base, name="a", runs=str(tmp_path / runs)), init="projector"),
    }
    one, two = (vflan.sweep(arms(name), jobs=jobs) for name, jobs in (("one", 1), ("two", 2)))
    for label in ("projector", "a", "the same"):
        assert one.runs[label, 0].summary["parts"] == two.runs[label, 0].summary["parts"]
    assert list(one.scores.value) == list(two.scores.value)


def test_the_processes_that_train_an_arm_answer_for_it_too(small, monkeypatch):
    """And say the same as one; forked, for this process holds no GPU."""
    monkeypatch.setattr(sys.modules["vflan.evaluation.parallel"], "START", "fork")
    projector, _, _ = small
    real, asked = sys.modules["vflan.evaluation.parallel"].working, []

    def working(run, num_processes, *more):
        asked.append(num_processes)
        return real(run, num_processes, *more)

    monkeypatch.setattr(sys.modules["vflan.evaluation.parallel"], "working", working)
    two = vflan.sweep({"projector": vflan.Arm(projector)}, jobs=1, num_processes=2)
    kept = two.runs["projector", 0].folder / "answers" / "heldin.jsonl"
    answers = sorted(kept.read_text().splitlines()[1:])
    kept.unlink()
    one = vflan.sweep({"projector": vflan.Arm(projector)}, jobs=1)
    assert (
        asked == [2] and sorted(kept.read_text().splitlines()[1:]) == answers and len(answers) == 8
    )
    assert list(one.scores.value) == list(two.scores.value)


def test_the_longest_critical_path_starts_first():
    waiting = {"short": [], "first": [], "second": ["first"], "third": ["second"], "long": []}
    rows = {"short": 2, "first": 1, "second": 1, "third": 5, "long": 4}
    order = ["first", "second", "third", "long", "short"]
    assert longest_first(waiting, rows) == order


def test_the_rows_of_an_arm_come_from_its_recipe(small):
    _, base, _ = small
    whole = replace(base, max_steps=None)

    def rows(recipe, **fields):
        return estimated_rows(vflan.Arm(replace(recipe, **fields))) - 1_000

    assert rows(base, max_steps=5, global_batch=4) == 20
    assert rows(whole, num_tasks=3, per_task=10, epochs=2.0) == 60
    assert rows(whole, num_samples=40) == 40
    assert rows(whole) > 10_000


def test_fewer_samples_are_seen_as_often_and_more_in_as_many_steps(small):
    """Chat of the presets: 1,000 conversations, eight passes of 16, or 128 steps of 64."""
    chat = vflan.preset("tiny").chat
    amounts = {n: with_samples(chat, n) for n in (30, 100, 1000, 3000, 9000)}
    assert amounts[1000] == chat
    assert {n: recipe.num_samples for n, recipe in amounts.items()} == {n: n for n in amounts}
    steps = {n: recipe.max_steps for n, recipe in amounts.items() if n != 1000}
    # 15 and 50 of 500 steps; all 3,000 fit into 500 steps; 9,000 once are 563.
    assert steps == {30: 15, 100: 50, 3000: 500, 9000: 563}
    published = vflan.preset("full_13b").chat
    assert with_samples(published, 100).max_steps == 13
    assert with_samples(published, 158_000).max_steps == 2469
    everything = vflan.replace(chat, num_samples=None)
    assert with_samples(everything, 50).max_steps is None


def test_an_arm_that_fails_is_named_and_what_was_done_stays(small, tmp_path):
    projector, base, _ = small
    lost = replace(base, name="lost", samples=str(tmp_path / "nowhere.json"))
    arms = {"projector": vflan.Arm(projector), "lost": vflan.Arm(lost, init="projector")}
    with pytest.raises(RuntimeError, match="'lost' of seed 0.*nowhere.json"):
        vflan.sweep(arms, benchmarks=(), jobs=2)
    assert vflan.Run.open(projector.folder).finished


SCRIPT = """
import json, sys, vflan
if __name__ == "__main__":
    recipe = vflan.Recipe(**json.load(open(sys.argv[1])))
    other = vflan.replace(recipe, name="other")
    vflan.sweep({"endless": vflan.Arm(recipe), "other": vflan.Arm(other)}, benchmarks=(), jobs=2)
"""


@pytest.mark.usefixtures("alone")
def test_a_sweep_that_is_killed_leaves_no_process_behind(small, tmp_path):
    endless = replace(small[0], name="endless", max_steps=100_000)
    write_json(tmp_path / "recipe.json", endless.to_dict())
    (tmp_path / "script.py").write_text(SCRIPT)
    sweep = subprocess.Popen(
        [sys.executable, "script.py", "recipe.json"], cwd=tmp_path, stderr=subprocess.DEVNULL
    )
    until = time.monotonic() + 240
    while (
        not (endless.folder / "metrics.jsonl").exists()
        and sweep.poll() is None
        and time.monotonic() < until
    ):
        time.sleep(0.1)
    begun = psutil.Process(sweep.pid).children(recursive=True)
    try:
        assert (endless.folder / "metrics.jsonl").exists() and len(begun) >= 3
        # a machine short of memory kills like this; 100,000 steps would train for hours
        sweep.kill()
        assert psutil.wait_procs(begun, timeout=30)[1] == []
    finally:
        for process in begun:
            if process.is_running():
                process.kill()
        sweep.kill()
        sweep.wait()


def test_mistakes_are_named_before_anything_is_trained(small):
    projector, base, _ = small
    first, arm = vflan.Arm(projector), vflan.Arm(base, init="projecter")
    with pytest.raises(ValueError, match="base needs 'projecter'"):
        vflan.sweep({"projector": first, "base": arm})
    with pytest.raises(ValueError, match="one and two would be trained in the same folder"):
        vflan.sweep({"one": vflan.Arm(base), "two": vflan.Arm(replace(base, lr=2 * base.lr))})
    with pytest.raises(ValueError, match="start from each other"):
        vflan.sweep({"x": vflan.Arm(base, init="y"), "y": vflan.Arm(projector, init="x")})
    with pytest.raises(ValueError, match="start from each other: a, b"):
        swaps = {"a": vflan.Swap("b", "projector", "x"), "b": vflan.Swap("a", "projector", "x")}
        vflan.sweep({"projector": first} | swaps)
    with pytest.raises(ValueError, match="vision_tower.*projector"):
        vflan.sweep({"projector": first, "odd": vflan.Swap("projector", "tower", "projector")})
    assert not projector.folder.exists()


def test_a_label_that_cannot_be_a_folder_is_refused_before_anything_is_trained(small):
    projector, base, _ = small
    arms = {
        "projector": vflan.Arm(projector),
        "../x": vflan.Swap("projector", "projector", "projector"),
    }
    with pytest.raises(ValueError, match="label='..': it becomes a folder"):
        vflan.sweep(arms, jobs=1)
    assert not projector.folder.exists()


def test_a_sweep_without_an_arm_or_a_seed_says_so(small):
    projector, _, _ = small
    for arms, seeds in (({}, [0]), ({"x": vflan.Swap("y", "projector", "y")}, [0])):
        with pytest.raises(ValueError, match="at least one Arm and one seed"):
            vflan.sweep(arms, seeds)
    with pytest.raises(ValueError, match="at least one Arm and one seed"):
        vflan.sweep({"projector": vflan.Arm(projector)}, [])


def test_a_swap_is_no_start_of_another_arm(small):
    """Its model is not kept: the other arm would start from the run without the exchange."""
    projector, base, _ = small
    arms = {
        "projector": vflan.Arm(projector),
        "base": vflan.Arm(base, init="projector"),
        "old": vflan.Swap("base", "projector", "projector"),
    }
    for wrong in (
        vflan.Arm(replace(base, name="more"), init="old"),
        vflan.Swap("old", "language_model", "projector"),
        vflan.Swap("projector", "projector", "old"),
    ):
        with pytest.raises(ValueError, match="wrong needs 'old', a Swap"):
            vflan.sweep(arms | {"wrong": wrong})
    assert not projector.folder.exists()


def test_two_arms_never_keep_their_scores_under_one_name(small):
    projector, _, _ = small
    arm, swap = vflan.Arm(projector), vflan.Swap("own", "projector", "own")
    with pytest.raises(ValueError, match="a b and a-b would keep their scores under one name"):
        vflan.sweep({"own": arm, "a b": swap, "a-b": swap})
    with pytest.raises(ValueError, match="own and projector would keep their scores"):
        vflan.sweep({"projector": swap, "own": arm})
    assert not projector.folder.exists()


def test_arms_that_are_asked_nothing_are_asked_nothing(small):
    projector, _, _ = small
    arms = {
        "projector": vflan.Arm(projector),
        "same": vflan.Swap("projector", "projector", "projector"),
    }
    done = vflan.sweep(arms, benchmarks=(), jobs=1)
    assert not (done.runs["projector", 0].folder / "answers").exists()
    assert done.scores.empty and "value" in done.scores


def test_one_arm_after_the_other_also_names_the_one_that_fails(small, tmp_path):
    lost = replace(small[0], name="lost", samples=str(tmp_path / "nowhere.json"))
    with pytest.raises(RuntimeError, match="'lost' of seed 0 failed: FileNotFoundError.*nowhere"):
        vflan.sweep({"lost": vflan.Arm(lost)}, benchmarks=(), jobs=1)
