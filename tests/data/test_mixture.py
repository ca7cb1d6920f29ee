"""Which rows a run trains on: drawn by hash, shared out over tasks, and written down."""

import json
from collections import Counter

import numpy as np
import pytest
from datasets import Dataset, concatenate_datasets

from vflan.config import Recipe, differences, replace
from vflan.data.mixture import diverse, mix, mixture_record, recipe_samples, subset, task_flags
from vflan.data.samples import load_samples

TURNS = [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "a dot"}]


def make(folder, sizes, name="rows.json"):
    """Samples of tasks with so many rows each, one of every task after another."""
    left, rows = dict(sizes), []
    while any(left.values()):
        for task in (task for task in left if left[task]):
            left[task] -= 1
            rows.append({"id": len(rows), "task_name": task, "conversations": TURNS})
    (folder / name).write_text(json.dumps(rows))
    return load_samples(folder / name)


@pytest.fixture
def six(tmp_path):
    return make(tmp_path, {f"t{i}": 10 for i in range(6)})


@pytest.fixture
def uneven(tmp_path):
    return make(tmp_path, {"small": 10, "middle": 90, "large": 900})


def ids(samples):
    return samples["id"][:]


def counts(samples):
    return Counter(samples["task_name"])


def test_mix_is_the_same_on_any_machine(six):
    assert ids(mix(six, 2, 3, seed=0)) == ["4", "22", "26", "34", "38", "50"]


def test_mix_draws_the_given_numbers_and_a_larger_mixture_contains_the_smaller(six):
    small, large = mix(six, 2, 3, seed=1), mix(six, 4, 5, seed=1)
    assert len(small) == 6 and len(set(small["task_name"])) == 2
    assert set(small["id"]) < set(large["id"]) and len(large) == 20
    assert ids(mix(six, 2, 3, seed=2)) != ids(small)
    assert len(mix(six, 3, 1000)) == 30  # a task gives what it has
    assert set(subset(six, 5)["id"]) < set(subset(six, 20)["id"])
    with pytest.raises(ValueError, match="hold 6 tasks"):
        mix(six, 7)


def test_a_selection_is_mixed_like_the_same_rows_in_a_file(six, tmp_path):
    kept = [row for row in range(60) if row % 6 != 2][::-1]  # backwards, and a task has gone
    selected, written = six.select(kept), load_samples(save(tmp_path, six.select(kept).to_list()))
    both = concatenate_datasets([six.select(kept[:30]), six.select(kept[30:])])
    for draw in (
        lambda s: mix(s, 3, 4),
        lambda s: mix(s, total=20),
        lambda s: mix(s, None, 2),
        lambda s: subset(s, 7),
    ):
        assert ids(draw(selected)) == ids(draw(written)) == ids(draw(both))
    with pytest.raises(ValueError, match="hold 5 tasks"):
        mix(selected, 6)


def test_rows_without_a_task_are_a_task_of_their_own():
    samples = Dataset.from_dict({"id": ["a", "b", "c"], "task_name": ["x", None, None]})
    assert len(mix(samples)) == 3 and ids(mix(samples, 1)) in (["a"], ["b", "c"])
    assert len(mix(samples.select([]))) == 0


def save(folder, rows):
    path = folder / "selected.json"
    path.write_text(json.dumps(rows))
    return path


def test_without_a_temperature_the_tasks_share_in_proportion_to_their_sizes(uneven):
    assert counts(mix(uneven, total=100)) == {"small": 1, "middle": 9, "large": 90}


def test_a_higher_temperature_makes_the_shares_more_equal(uneven):
    shares = np.sqrt([10, 90, 900])
    expected = dict(
        zip(["small", "middle", "large"], np.rint(43 * shares / shares.sum()).astype(int))
    )
    assert (
        counts(mix(uneven, total=43, temperature=2))
        == expected
        == {"small": 3, "middle": 10, "large": 30}
    )
    even = counts(mix(uneven, total=27, temperature=1e9))
    assert set(even.values()) == {9}


def test_a_task_too_small_gives_all_and_the_others_share_the_rest(uneven):
    assert counts(mix(uneven, total=300, temperature=1e9)) == {
        "small": 10,
        "middle": 90,
        "large": 200,
    }
    assert counts(mix(uneven, total=1000, temperature=5)) == {
        "small": 10,
        "middle": 90,
        "large": 900,
    }
    assert counts(mix(uneven, None, 100, total=120, temperature=1e9)) == {
        "small": 10,
        "middle": 55,
        "large": 55,
    }


def test_weights_decide_the_shares_and_zero_leaves_a_task_out(uneven):
    assert counts(mix(uneven, total=40, weights={"large": 3, "small": 0})) == {
        "middle": 10,
        "large": 30,
    }
    assert counts(mix(uneven, total=40, weights={"small": 4})) == {
        "small": 10,
        "middle": 15,
        "large": 15,
    }


def test_a_larger_total_contains_the_rows_of_a_smaller_one(uneven):
    for shares in ({"temperature": 3}, {"weights": {"small": 0.3}}, {}):
        drawn = [set(ids(mix(uneven, total=total, **shares))) for total in range(1, 60)]
        assert [len(rows) for rows in drawn] == list(range(1, 60))
        assert all(small < large for small, large in zip(drawn, drawn[1:]))


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"temperature": 2}, "say with total= how many"),
        ({"total": 5, "temperature": 2, "weights": {"small": 1}}, "give one of them"),
        ({"total": 5, "temperature": 0}, "a number above 0"),
        (
            {"total": 5, "weights": {"smal": 1}},
            "'smal', which the samples do not hold; the closest is 'small'",
        ),
        ({"total": 5, "weights": {"small": -1}}, "at least 0"),
        (
            {"total": 5, "weights": dict.fromkeys(["small", "middle", "large"], 0)},
            "can give 1 to 0 rows",
        ),
        ({"total": 1001}, "can give 1 to 1000 rows"),
        ({"total": 0}, "can give 1 to 1000 rows"),
        ({"num_tasks": -1}, "num_tasks=-1, but the samples hold 3 tasks"),
        ({"per_task": -1}, "per_task=-1: at least 0"),
        ({"exclude": ["small", "middle", "large"]}, "no task is left"),
    ],
)
def test_an_impossible_mixture_is_an_error_that_says_why(uneven, arguments, message):
    with pytest.raises(ValueError, match=message):
        mix(uneven, **arguments)


def test_tasks_are_left_out_by_name_or_by_flag(tmp_path):
    names = [
        "VQAv2",
        "LFW+face_recognition",
        "ImageNet-A+image_classification",
        "STL-10+Image_Classification",
        "mine",
    ]
    samples = make(tmp_path, dict.fromkeys(names, 2))
    assert set(mix(samples, exclude=["faces"])["task_name"]) == set(names) - {names[1]}
    assert set(mix(samples, exclude=["benchmark", "mine"])["task_name"]) == {
        names[0],
        names[1],
        names[3],
    }
    assert set(mix(samples, exclude="overlaps")["task_name"]) == {names[0], names[1], names[4]}
    assert len(mix(samples, exclude=["GQA"])) == 10  # a released task that this file does not hold
    with pytest.raises(ValueError, match="exclude='benchmarks'.*closest is 'benchmark'"):
        mix(samples, exclude=["benchmarks"])
    with pytest.raises(ValueError, match="closest is 'mine'"):
        mix(samples, exclude=["miner"])
    assert task_flags()["cinic-10+object_presence_animal"] == {"overlaps"}


def recipe(folder, **changes):
    return Recipe(
        "r", "base", "v", "l", str(folder / "rows.json"), str(folder), str(folder), **changes
    )


def test_a_recipe_can_set_all_of_it(uneven, tmp_path):
    make(tmp_path, {"chat": 5}, "more.json")
    more = (str(tmp_path / "more.json") + "#2",)
    mixed = recipe(
        tmp_path, temperature=1e9, num_samples=30, exclude=("middle",), more_samples=more
    )
    assert counts(recipe_samples(mixed)) == {"small": 10, "large": 20, "chat": 2}
    mixed = recipe(tmp_path, task_weights=("large=2", "middle=0"), num_samples=15)
    assert counts(recipe_samples(mixed)) == {"small": 5, "large": 10}
    assert ids(recipe_samples(recipe(tmp_path, num_samples=9))) == ids(subset(uneven, 9))
    with pytest.raises(ValueError, match="num_samples=-1"):
        subset(uneven, -1)
    assert Recipe.from_dict(json.loads(json.dumps(mixed.to_dict()))) == mixed


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"temperature": 2}, "say with num_samples how many"),
        ({"task_weights": "VQAv2=2"}, "say with num_samples how many"),
        ({"task_weights": ("a=2",), "temperature": 2, "num_samples": 3}, "give one of them"),
        ({"task_weights": ("VQAv2",), "num_samples": 3}, "write it as task=weight"),
        ({"task_weights": ("VQAv2=two",), "num_samples": 3}, "write it as task=weight"),
        ({"temperature": 0, "num_samples": 3}, "temperature=0: a number of at least 0.1"),
    ],
)
def test_a_recipe_with_missing_or_contradictory_values_is_refused(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        recipe(tmp_path, **changes)


def test_a_recipe_of_an_older_version_is_equal(tmp_path):
    new = recipe(tmp_path).to_dict()
    old = {
        key: value
        for key, value in new.items()
        if key not in ("exclude", "temperature", "task_weights")
    }
    assert differences(old, new) == ""
    assert "exclude" in differences(old, new | {"exclude": ["faces"]})


def test_the_record_describes_every_row_that_was_drawn(uneven, tmp_path):
    make(tmp_path, {"chat": 5}, "more.json")
    (tmp_path / "images").mkdir()
    more = str(tmp_path / "more.json")
    mixed = recipe(tmp_path, per_task=20, num_samples=30, more_samples=(f"{more}#2", more))
    record = mixture_record(mixed, recipe_samples(mixed))
    assert (
        record["rows"] == 37
        and sum(record["tasks"].values()) == 37
        and record["tasks"]["chat"] == 7
    )
    assert record["files"] == [
        {"file": mixed.samples, "rows": 30},
        {"file": more, "rows": 2},
        {"file": more, "rows": 5},
    ]
    assert json.loads(json.dumps(record)) == record
    for other in (replace(mixed, seed=1), replace(mixed, num_samples=29)):
        assert mixture_record(other, recipe_samples(other))["order"] != record["order"]


def test_the_hash_of_the_record_depends_on_the_order_but_not_on_the_machine(six, tmp_path):
    mixed = recipe(tmp_path)
    rows = [row | {"image": f"{row['id']}.png"} for row in six.to_list()]
    orders = []
    for folder in ("here", "there"):
        (tmp_path / folder / "images").mkdir(parents=True)
        samples = load_samples(save(tmp_path / folder, rows))
        orders.append(mixture_record(mixed, samples)["order"])
        backwards = samples.select(range(59, -1, -1))
        assert mixture_record(mixed, backwards)["order"] != orders[-1]
        assert mixture_record(mixed, backwards.select(range(59, -1, -1)))["order"] == orders[-1]
    assert orders[0] == orders[1]
    rows[7]["image"] = "other.png"
    assert mixture_record(mixed, load_samples(save(tmp_path / "here", rows)))["order"] != orders[0]


def test_a_diverse_choice_takes_rows_of_every_cluster(tmp_path):
    """90 rows of three kinds and 10 of another: a random tenth has about one of the rare ones."""

    def turns(q, a):
        return [{"from": "human", "value": q}, {"from": "gpt", "value": a}]

    rows = [
        dict(
            id=str(i),
            task_name="t",
            conversations=turns("What color is the sky today?", f"blue {i % 3}"),
        )
        for i in range(90)
    ]
    rows += [
        dict(
            id=f"r{i}",
            task_name="t",
            conversations=turns("Read the text on the sign.", f"exit {i}"),
        )
        for i in range(10)
    ]
    samples = load_samples(save(tmp_path, rows), None)
    chosen = diverse(samples, 8, clusters=4)
    assert len(chosen) == 8 and sum(name.startswith("r") for name in chosen["id"]) == 2
    assert chosen["id"] == diverse(samples, 8, clusters=4)["id"]
    seen = np.zeros((100, 4), np.float32)
    seen[:3, 0] = 9.0  # three of the ninety show something else
    by_picture = diverse(samples, 40, features=seen, clusters=12)
    assert {"0", "1", "2"} <= set(by_picture["id"])
    with pytest.raises(ValueError, match="there are 100 samples"):
        diverse(samples, 101)


def test_a_diverse_choice_may_contain_bad_rows(tmp_path):
    odd = [[], None, [{"from": "gpt", "value": None}], [{"from": "gpt", "value": ["x"]}], "text"]
    rows = [{"id": i, "conversations": turns} for i, turns in enumerate([TURNS] * 9 + odd)]
    samples = load_samples(save(tmp_path, rows), None)
    assert len(diverse(samples, 6, clusters=3)) == 6
    by_hand = Dataset.from_list(rows[:9] + [{"id": 9, "conversations": None}] + rows[11:12])
    assert len(diverse(by_hand, 4, clusters=2)) == 4


def test_a_file_without_rows_is_named(uneven, tmp_path):
    (tmp_path / "none.json").write_text("[]")
    none = str(tmp_path / "none.json")
    for changes in ({"samples": none}, {"samples": none, "num_samples": 3}):
        with pytest.raises(ValueError, match="none.json holds no rows, so there is nothing"):
            recipe_samples(replace(recipe(tmp_path), **changes))
    with pytest.raises(ValueError, match="none.json holds no rows"):
        recipe_samples(recipe(tmp_path, more_samples=(none,)))


def test_a_further_file_with_too_few_rows_is_named(uneven, tmp_path):
    entry = f"{tmp_path / 'rows.json'}#1001"
    with pytest.raises(ValueError, match="more_samples='.*rows.json#1001', but .* 1000 rows"):
        recipe_samples(recipe(tmp_path, more_samples=(entry,)))
