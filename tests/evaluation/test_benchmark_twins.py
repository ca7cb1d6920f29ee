"""Each benchmark has its twin in the mini world: the right answers score 100, and its pictures are
set aside.
"""

import pytest

from vflan import world
from vflan.evaluation.benchmarks import BENCHMARKS
from vflan.world.twins import TWINS


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("more")
    (folder / "images").mkdir()
    world.write_twins(folder, seed=0, questions=0.25)
    return folder


def gold(sample):
    return sample["label"].replace("<AND>", " and ")


def test_every_benchmark_of_the_papers_has_a_twin():
    assert set(BENCHMARKS) - set(TWINS) == {
        "heldin",
        "heldout",
        "pope",
        "mme",
        "mmbench",
        "llava_bench",
        "forgetting",
    }


@pytest.mark.parametrize("name", TWINS)
def test_right_answers_score_100_and_blind_ones_less(folder, name):
    benchmark = BENCHMARKS[name]
    samples = benchmark.load(folder)
    scores = benchmark.score(samples, [gold(s) for s in samples])
    assert scores[benchmark.headline] == 100 > benchmark.baseline(samples)[benchmark.headline]
    assert benchmark.problems(samples, pictures=True) == {}


@pytest.fixture(scope="module")
def core(tmp_path_factory):
    folder = tmp_path_factory.mktemp("core")
    (folder / "images").mkdir()
    world.write_benchmarks(folder, seed=0, questions=0.05)
    return folder


@pytest.mark.parametrize(
    "name", ["heldin", "heldout", "pope", "mme", "mmbench", "llava_bench", "forgetting"]
)
def test_the_benchmarks_of_the_notebooks_are_read_and_their_labels_score_best(core, name):
    benchmark = BENCHMARKS[name]
    samples = benchmark.load(core)
    score = benchmark.score(samples, [s["label"] for s in samples])[benchmark.headline]
    assert (
        score >= (99 if name != "llava_bench" else 90)
        and benchmark.problems(samples, pictures=True) == {}
    )
    assert ("lexicon" in samples[0]) == (name == "llava_bench")


def test_forgetting_is_the_mean_of_the_four_sets(folder):
    samples = BENCHMARKS["forgetting"].load(folder)
    assert {s["category"] for s in samples} == {"cifar10", "cifar100", "mnist", "miniimagenet"}
    scores = BENCHMARKS["forgetting"].score(
        samples, [s["label"] if s["category"] == "mnist" else "?" for s in samples]
    )
    assert scores["accuracy"] == 25


def test_people_mostly_agree_and_some_questions_have_no_answer(folder):
    vizwiz, vqa = BENCHMARKS["vizwiz"].load(folder), BENCHMARKS["vqav2"].load(folder)
    assert all(
        s["answers"].count(s["label"]) >= 4 and len(set(s["answers"])) <= 6 for s in vizwiz + vqa
    )
    assert {s["category"] for s in vizwiz} == {"other", "unanswerable"}


def test_scienceqa_asks_with_and_without_a_picture(folder):
    samples = BENCHMARKS["scienceqa"].load(folder)
    assert {bool(s["image"]) for s in samples} == {True, False}
    assert all(s["text"].startswith("Context: ") for s in samples if not s["image"])


def test_the_same_seed_writes_the_same_questions(folder, tmp_path):
    (tmp_path / "images").mkdir()
    world.write_twins(tmp_path, seed=0, questions=0.25)
    for name in TWINS:
        assert (tmp_path / name / "questions.jsonl").read_bytes() == (
            folder / name / "questions.jsonl"
        ).read_bytes()
