"""Each metric equals a slow and obvious re-implementation of the official script, on random
answers.
"""

import numpy as np
import pytest

from vflan.evaluation.benchmarks import BENCHMARKS
from vflan.evaluation.benchmarks.mme import COGNITION, PERCEPTION
from vflan.evaluation.benchmarks.vqa import normalize
from vflan.evaluation.judge import Judgement

SEEDS = range(5)


def draw(seed, options, n):
    rng = np.random.default_rng(seed)
    return [str(options[i]) for i in rng.integers(len(options), size=n)]


def rows(n, **columns):
    """n samples with one column of values each; pictures are shared by three questions."""
    base = [
        {"question_id": str(i), "text": "?", "image": f"{i // 3}.png", "category": "all"}
        for i in range(n)
    ]
    return [row | {key: values[i] for key, values in columns.items()} for i, row in enumerate(base)]


@pytest.mark.parametrize("seed", SEEDS)
def test_pope_equals_counting(seed):
    samples = rows(
        90, label=draw(seed, ["yes", "no"], 90), category=draw(seed + 9, ["random", "popular"], 90)
    )
    answers = draw(seed + 5, ["Yes", "No", "no, it is not", "Yes. No"], 90)
    scores, f1 = BENCHMARKS["pope"].score(samples, answers), []
    for category in ("random", "popular"):
        tp = fp = tn = fn = 0
        for s, a in zip(samples, answers):
            if s["category"] == category:
                parsed = (
                    "no"
                    if {"No", "no", "not"} & set(a.split(".")[0].replace(",", "").split(" "))
                    else "yes"
                )
                tp += parsed == "yes" == s["label"]
                tn += parsed == "no" == s["label"]
                fp += parsed == "yes" != s["label"]
                fn += parsed == "no" != s["label"]
        precision, recall = tp / (tp + fp), tp / (tp + fn)
        f1.append(200 * precision * recall / (precision + recall))
        assert scores[f"f1/{category}"] == pytest.approx(f1[-1])
        assert scores[f"accuracy/{category}"] == pytest.approx(
            100 * (tp + tn) / (tp + tn + fp + fn)
        )
        assert scores[f"precision/{category}"] == pytest.approx(100 * precision)
        assert scores[f"recall/{category}"] == pytest.approx(100 * recall)
        assert scores[f"yes_ratio/{category}"] == pytest.approx(
            100 * (tp + fp) / (tp + tn + fp + fn)
        )
    assert scores["f1"] == pytest.approx(np.mean(f1))


@pytest.mark.parametrize("seed", SEEDS)
def test_mme_equals_the_sum_over_tasks(seed):
    samples = [
        {
            "question_id": f"{t}/{i}",
            "text": "?",
            "image": f"{t}/{i // 2}",
            "category": t,
            "label": ["Yes", "No"][i % 2],
        }
        for t in PERCEPTION + COGNITION
        for i in range(20)
    ]
    answers = draw(seed, ["Yes", "No", "yes, it is", "maybe", "no"], len(samples))
    scores, expected = BENCHMARKS["mme"].score(samples, answers), {}
    for task in PERCEPTION + COGNITION:
        right = [
            (a.lower()[:3] if a.lower()[:3] == "yes" else a.lower()[:2]) == s["label"].lower()
            for s, a in zip(samples, answers)
            if s["category"] == task
        ]
        pairs = [right[i] and right[i + 1] for i in range(0, len(right), 2)]
        expected[task] = 100 * np.mean(right) + 100 * np.mean(pairs)
        assert scores[f"total/{task}"] == pytest.approx(expected[task])
    assert scores["perception"] == pytest.approx(sum(expected[t] for t in PERCEPTION))
    assert scores["cognition"] == pytest.approx(sum(expected[t] for t in COGNITION))
    assert (
        scores["total"]
        == pytest.approx(scores["perception"] + scores["cognition"])
        == pytest.approx(28 * scores["score"])
    )
    best = BENCHMARKS["mme"].score(samples, [s["label"] for s in samples])
    assert (best["perception"], best["cognition"]) == pytest.approx((2000, 800))


@pytest.mark.parametrize("seed", SEEDS)
def test_mmbench_equals_asking_whether_all_rotations_are_right(seed):
    samples = [
        {
            "question_id": str(q + 1_000_000 * k),
            "rotation_of": str(q),
            "label": "ABCD"[(q + k) % 4],
            "exact": True,
            "image": str(q),
            "text": "?\nA. red\nB. blue\nC. green\nD. white",
            "category": f"c{q % 3}",
        }
        for k in range(2)
        for q in range(30)
    ]
    wrong = draw(seed, [0, 0, 0, 1], 60)
    answers = ["Z" if w == "1" else s["label"] for s, w in zip(samples, wrong)]
    scores = BENCHMARKS["mmbench"].score(samples, answers)
    right = {s["question_id"]: a == s["label"] for s, a in zip(samples, answers)}
    both = [right[str(q)] and right[str(q + 1_000_000)] for q in range(30)]
    assert scores["accuracy"] == pytest.approx(100 * np.mean(both))
    assert scores["accuracy/c1"] == pytest.approx(100 * np.mean(both[1::3]))
    # The published single pass is of the questions in their first order.
    first = [right[str(q)] for q in range(30)]
    assert scores["single_pass"] == pytest.approx(100 * np.mean(first))


def test_mmbench_of_the_release_wants_the_letter_alone_and_says_what_lenient_reading_gives():
    sample = {
        "question_id": "1",
        "rotation_of": "1",
        "label": "B",
        "exact": True,
        "text": "?\nA. red\nB. blue",
        "image": "x",
        "category": "c",
    }
    assert [
        BENCHMARKS["mmbench"].score([sample], [a])["accuracy"] for a in ("B", "B.", "b", "blue")
    ] == [100, 0, 0, 0]
    assert [
        BENCHMARKS["mmbench"].score([sample], [a])["lenient"] for a in ("B", "B.", "b", "blue", "A")
    ] == [100] * 4 + [0]


@pytest.mark.parametrize("seed", SEEDS)
def test_vqa_equals_leaving_one_person_out(seed):
    words = ["red", "two", "2", "The red", "no", "unanswerable", "none"]
    answers = draw(seed, words, 60)
    samples = rows(
        60,
        answers=[draw(100 * seed + i, words, 10) for i in range(60)],
        category=draw(seed + 3, ["other", "number"], 60),
    )
    values = []
    for s, a in zip(samples, answers):
        gold = [normalize(x) for x in s["answers"]]
        left_out = [min(1, (gold[:i] + gold[i + 1 :]).count(normalize(a)) / 3) for i in range(10)]
        values.append(sum(left_out) / 10)
    for name in ("vqav2", "textvqa", "vizwiz"):
        scores = BENCHMARKS[name].score(samples, answers)
        assert scores["accuracy"] == pytest.approx(100 * np.mean(values))
        for kind in ("other", "number"):
            part = [v for v, s in zip(values, samples) if s["category"] == kind]
            assert scores[f"accuracy/{kind}"] == pytest.approx(100 * np.mean(part))
        assert scores["unanswerable"] == pytest.approx(
            100 * np.mean([a == "unanswerable" for a in answers])
        )


@pytest.mark.parametrize("seed", SEEDS)
def test_gqa_counts_questions_alike(seed):
    samples = rows(
        60,
        label=draw(seed, ["yes", "no", "dog"], 60),
        category=draw(seed + 1, ["query", "verify", "choose"], 60),
    )
    answers = draw(seed + 2, ["Yes", "no.", "Dog", "dog "], 60)
    right = [a.rstrip(".").lower() == s["label"] for s, a in zip(samples, answers)]
    scores = BENCHMARKS["gqa"].score(samples, answers)
    assert scores["accuracy"] == pytest.approx(100 * np.mean(right))
    for kind, names in (
        ("open", ["query"]),
        ("binary", ["verify", "choose"]),
        ("choose", ["choose"]),
    ):
        part = [r for r, s in zip(right, samples) if s["category"] in names]
        assert scores[f"accuracy/{kind}"] == pytest.approx(100 * np.mean(part))


@pytest.mark.parametrize("seed", SEEDS)
def test_scienceqa_reports_the_picture_half_and_the_whole(seed):
    samples = rows(
        60, label=draw(seed, "ABC", 60), image=[f"{i}.png" if i % 3 else None for i in range(60)]
    )
    answers = draw(seed + 1, ["A", "B. x", "The answer is C.", "c"], 60)
    read = {"A": "A", "B. x": "B", "The answer is C.": "C", "c": None}
    right = [read[a] == s["label"] for s, a in zip(samples, answers)]
    scores = BENCHMARKS["scienceqa"].score(samples, answers)
    assert scores["accuracy"] == pytest.approx(100 * np.mean(right))
    assert scores["img_accuracy"] == pytest.approx(
        100 * np.mean([r for r, s in zip(right, samples) if s["image"]])
    )
    assert scores["text_accuracy"] == pytest.approx(100 * np.mean(right[::3]))


@pytest.mark.parametrize("seed", SEEDS)
def test_seed_counts_images_videos_and_types(seed):
    samples = rows(
        60,
        label=draw(seed, "ABCD", 60),
        data_type=draw(seed + 4, ["image", "video"], 60),
        category=draw(seed + 5, ["x", "y"], 60),
    )
    answers = draw(seed + 1, ["A", "B", "C", "d"], 60)
    right = np.array([a == s["label"] for s, a in zip(samples, answers)])
    scores = BENCHMARKS["seed"].score(samples, answers)
    assert scores["accuracy"] == pytest.approx(100 * right.mean())
    for key, column in (("image", "data_type"), ("video", "data_type"), ("x", "category")):
        assert scores[f"accuracy/{key}"] == pytest.approx(
            100 * right[[s[column] == key for s in samples]].mean()
        )


@pytest.mark.parametrize("seed", SEEDS)
def test_llava_bench_is_the_ratio_of_means_without_failed_reviews(seed):
    rng = np.random.default_rng(seed)
    samples = rows(
        60, label=["x"] * 60, category=[["conv", "detail", "complex"][i % 3] for i in range(60)]
    )
    pairs = rng.integers(1, 11, (60, 2)).astype(float)
    reviews = [None if i % 10 == 0 else Judgement(b, "", a) for i, (a, b) in enumerate(pairs)]
    kept = [i for i in range(60) if reviews[i]]
    scores = BENCHMARKS["llava_bench"].score(samples, [""] * 60, reviews)
    assert scores["score"] == pytest.approx(100 * pairs[kept, 1].mean() / pairs[kept, 0].mean())
    assert scores["answer_mean"] == pytest.approx(10 * pairs[kept, 1].mean())
    assert scores["reference_mean"] == pytest.approx(10 * pairs[kept, 0].mean())
    conv = [i for i in kept if i % 3 == 0]
    assert scores["score/conv"] == pytest.approx(
        100 * pairs[conv, 1].mean() / pairs[conv, 0].mean()
    )


BAD = [
    Judgement(float("nan"), ""),
    Judgement(-1, ""),
    Judgement(-1.0, "", -1.0),
    Judgement(5.0, "", 0.0),
    Judgement(100, ""),
    Judgement(None, ""),
    None,
]


@pytest.mark.parametrize("mark", BAD)
@pytest.mark.parametrize("name", ["llava_bench", "mm_vet", "forgetting", "cifar10"])
def test_a_failed_judgement_is_left_out_and_not_averaged_in(name, mark):
    samples = rows(2, label=["x", "y"], capability=[["rec"], ["rec"]])
    benchmark = BENCHMARKS[name]
    assert (
        benchmark.score(samples, ["a", "b"], [Judgement(5.0, ""), mark])[benchmark.headline] == 50
    )
    assert benchmark.headline not in benchmark.score(samples, ["a", "b"], [mark, mark])


def test_judgements_must_be_one_for_each_question():
    with pytest.raises(ValueError, match="2 questions, but 1 judgements"):
        BENCHMARKS["mm_vet"].score(rows(2, label=["x", "y"]), ["a", "b"], [None])


@pytest.mark.parametrize("seed", SEEDS)
def test_mm_vet_averages_marks_by_capability(seed):
    caps = [[["rec"], ["ocr", "rec"], ["math", "ocr"]][i % 3] for i in range(60)]
    samples = rows(60, label=["x"] * 60, capability=caps)
    marks = np.random.default_rng(seed).integers(0, 11, 60) / 10
    scores = BENCHMARKS["mm_vet"].score(samples, [""] * 60, [Judgement(10 * m, "") for m in marks])
    assert scores["total"] == pytest.approx(100 * marks.mean())
    for name in ("rec", "ocr", "math"):
        assert scores[name] == pytest.approx(100 * marks[[name in c for c in caps]].mean())
    assert scores["ocr_rec"] == pytest.approx(100 * marks[1::3].mean())


@pytest.mark.parametrize("seed", SEEDS)
def test_mmmu_counts_questions_alike(seed):
    kinds = draw(seed, ["multiple-choice", "open"], 60)
    labels = ["B" if k != "open" else "4.5" for k in kinds]
    samples = rows(
        60,
        question_type=kinds,
        label=labels,
        options=[["x", "y", "z"] if k != "open" else [] for k in kinds],
        category=draw(seed + 2, ["Math", "Art"], 60),
    )
    answers = draw(seed + 1, ["(B)", "A", "it is 4.50", "B", "5"], 60)
    right = np.array(
        [a in ("(B)", "B") if k != "open" else a == "it is 4.50" for k, a in zip(kinds, answers)]
    )
    scores = BENCHMARKS["mmmu"].score(samples, answers)
    assert scores["accuracy"] == pytest.approx(100 * right.mean())
    assert scores["accuracy/Math"] == pytest.approx(
        100 * right[[s["category"] == "Math" for s in samples]].mean()
    )
    assert scores["accuracy/open"] == pytest.approx(
        100 * right[[k == "open" for k in kinds]].mean()
    )


@pytest.mark.parametrize("seed", SEEDS)
def test_forgetting_averages_over_sets(seed):
    samples = rows(
        60, label=draw(seed, ["cat", "dog"], 60), category=draw(seed + 1, ["cifar10", "mnist"], 60)
    )
    answers = draw(seed + 2, ["A cat.", "dog", "cat or dog", "It is a dog. No cat."], 60)
    read = {"A cat.": "cat", "dog": "dog", "cat or dog": None, "It is a dog. No cat.": "dog"}
    parts = [
        np.mean([read[a] == s["label"] for s, a in zip(samples, answers) if s["category"] == kind])
        for kind in ("cifar10", "mnist")
    ]
    assert BENCHMARKS["forgetting"].score(samples, answers)["accuracy"] == pytest.approx(
        100 * np.mean(parts)
    )


def test_a_class_that_nobody_has_is_still_a_wrong_answer():
    sample = rows(1, label=["cat"], classes=[["cat", "dog"]])
    assert BENCHMARKS["cifar10"].score(sample, ["cat or dog"])["accuracy"] == 0
    assert BENCHMARKS["cifar10"].score(sample, ["cat"])["accuracy"] == 100
    nested = rows(1, label=["pickup truck"], classes=[["truck", "pickup truck"]])
    assert BENCHMARKS["cifar100"].score(nested, ["A pickup truck"])["accuracy"] == 100


@pytest.mark.parametrize("seed", SEEDS)
def test_textocr_counts_words_as_often_as_they_are_there(seed):
    words = ["STOP", "stop", "go,", "10%", "the"]
    samples = rows(20, label=[" ".join(draw(seed * 50 + i, words, 4)) for i in range(20)])
    answers = [" ".join(draw(seed * 70 + i, words, 3)) for i in range(20)]
    hits = expected = 0
    for s, a in zip(samples, answers):
        parsed = [w.lower().strip(",") for w in a.split()]
        for w in (w.lower().strip(",") for w in s["label"].split()):
            expected += 1
            if w in parsed:
                parsed.remove(w)
                hits += 1
    scores = BENCHMARKS["textocr"].score(samples, answers)
    assert scores["recall"] == pytest.approx(100 * hits / expected) and scores[
        "words"
    ] == pytest.approx(3)


def test_wit_says_which_finder_found_the_entities():
    samples = rows(2, label=["The Eiffel Tower in Paris.", "A Camel of Ludwig van Beethoven"])
    scores = BENCHMARKS["wit"].score(samples, ["the eiffel tower", "A Camel, not Paris"])
    assert scores["coverage_capitalised"] == pytest.approx(
        100 * 1 / 3
    )  # 'Camel of Ludwig van Beethoven' is one run
    assert scores["entities"] == 1 and all(
        k in ("coverage_capitalised", "entities") or "spacy" in k for k in scores
    )


# ------------------------------------------------------------------ questions that cannot be scored


@pytest.mark.parametrize(
    "name, label, unknown",
    [
        ("pope", "yes", "maybe"),
        ("mme", "yes", ""),
        ("scienceqa", "A", "Z"),
        ("seed", "B", "b"),
        ("gqa", "dog", None),
        ("mmmu", "A", "?"),
        ("heldin", "x", " "),
        ("vqav2", None, None),
        ("cifar10", "cat", None),
    ],
)
def test_a_label_that_is_not_known_is_counted_and_not_scored(name, label, unknown):
    samples = rows(4, label=[label, label, label, unknown], image=["a", "a", "b", "b"])
    if name == "vqav2":
        samples = [s | {"answers": ["x"] * (10 if i < 3 else 9)} for i, s in enumerate(samples)]
    answers = ["x" if label is None else label] * 4
    benchmark = BENCHMARKS[name]
    assert benchmark.problems(samples, answers)["unknown_label"] == ["3"]
    metric = benchmark.items(samples, answers)[benchmark.headline]
    assert metric.value() == 100 and len(metric.num) == (1 if name == "mme" else 3)


@pytest.mark.parametrize(
    "name",
    [
        n
        for n in BENCHMARKS
        if n not in ("mme", "mm_vet", "llava_bench", "wit", "mmbench", "mmbench_cn")
    ],
)
def test_a_missing_answer_is_wrong_or_left_out_as_the_docstring_says(name):
    labels = {"pope": "yes", "scienceqa": "A", "seed": "A", "mmmu": "A"}
    label = labels.get(name, "cat")
    samples = rows(4, label=[label] * 4, answers=[[label] * 10] * 4)
    metrics = BENCHMARKS[name].items(samples, [label, None, label, label])
    assert metrics[BENCHMARKS[name].headline].value() == (
        75 if BENCHMARKS[name].missing == "wrong" else 100
    )
    assert BENCHMARKS[name].problems(samples, [label, None, " ", label]) == {
        "missing": ["1"],
        "empty": ["2"],
    }


def test_nothing_to_score_is_no_crash():
    assert [
        b.score(rows(2, label=[None, None], answers=[[], []]), ["a", "b"])
        for b in BENCHMARKS.values()
        if b.name not in ("mm_vet", "llava_bench", "wit")
    ]
    assert BENCHMARKS["pope"].score(rows(2, label=["yes", "no"]), [None, None]) == {}


def test_pictures_that_do_not_open_are_named(tmp_path):
    (tmp_path / "bad.png").write_text("no picture")
    samples = rows(
        2, label=["a", "b"], image=[str(tmp_path / "bad.png"), str(tmp_path / "none.png")]
    )
    bad, none = BENCHMARKS["heldin"].problems(samples, pictures=True)["unreadable_picture"]
    assert bad.startswith("0: undecodable picture") and none.startswith("1: missing picture")
