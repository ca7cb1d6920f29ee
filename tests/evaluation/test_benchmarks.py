"""Each benchmark reads answers as its official script does, odd ones included, and scores them as
it does.
"""

import json
from pathlib import Path

import pytest

from vflan.evaluation.benchmarks import BENCHMARKS
from vflan.evaluation.benchmarks.benchmark import majority
from vflan.evaluation.benchmarks.files import json_lines
from vflan.evaluation.benchmarks.llava_bench import judge
from vflan.evaluation.benchmarks.mmbench import options
from vflan.evaluation.benchmarks.tasks import lenient
from vflan.evaluation.judge import Judgement, RuleJudge, is_long_form, mentions

SHARED = Path(__file__).resolve().parents[3] / "shared"
LEXICON = {
    "colors": ["red", "blue", "green", "white"],
    "shapes": ["star", "circle", "cross", "ring"],
}


def question(label, category="a", image="x.png", text="?", number="1", **more):
    return {
        "question_id": number,
        "image": image,
        "text": text,
        "label": label,
        "category": category,
    } | more


# ------------------------------------------------------------------------------------------ parsers


@pytest.mark.parametrize(
    "answer, read",
    [
        ("Yes", "yes"),
        ("No, there is not.", "no"),
        ("no", "no"),
        ("There is not a star", "no"),
        ("Yes. There is no other", "yes"),  # only the first sentence counts
        (
            "Yes, there is no doubt",
            "no",
        ),  # oddities of the official script, kept so that numbers compare
        ("NO", "yes"),
        ("", "yes"),
        ("nothing", "yes"),
    ],
)
def test_pope_is_read_as_the_official_script_reads_it(answer, read):
    assert BENCHMARKS["pope"].parse(answer, {}) == read


@pytest.mark.parametrize(
    "answer, read",
    [
        ("Yes", "yes"),
        ("yes, it is", "yes"),
        ("No.", "no"),
        ("a no", "no"),
        ("It is not", "other"),
        ("", "other"),
        ("the answer is yes", "other"),
        ("ayes", "yes"),
    ],
)
def test_mme_reads_the_first_four_characters(answer, read):
    assert BENCHMARKS["mme"].parse(answer, {}) == read


@pytest.mark.parametrize(
    "answer, read",
    [
        ("b", "b"),
        ("B", "b"),
        ("B.", "b"),
        ("(b)", "b"),
        ("(b) blue", "b"),
        ("b) blue", "b"),
        ("B: blue", "b"),
        ("blue", "b"),
        ("Blue.", "b"),
        ("The answer is (b).", "b"),
        ("Answer: B", "b"),
        ("It is blue, I think.", "b"),
        ("red or blue", None),
        ("", None),
        ("e", None),
        ("a red star", "a"),
        ("purple", None),
        ("I see a ring", None),
    ],
)
def test_mmbench_reads_letters_and_options(answer, read):
    text = "What color is it? (a) red (b) blue (c) green (d) white"
    assert BENCHMARKS["mmbench"].parse(answer, {"text": text}) == read


def test_an_article_is_no_choice():
    text = "Which is there? (a) a blue ring (b) a red star"
    assert BENCHMARKS["mmbench"].parse("a red star", {"text": text}) == "b"


def test_options_are_found_on_one_line_and_on_lines_of_their_own():
    expected = {"a": "red", "b": "dark blue"}
    assert options("Which? (a) red (b) dark blue Answer with the letter.") == expected
    assert (
        options("Which?\nA. red\nB. dark blue\nAnswer with the option's letter directly.")
        == expected
    )
    assert options("What is a star?") == {}


@pytest.mark.parametrize(
    "answer, label, right",
    [
        ("The star is red.", "red", True),
        ("It is reddish.", "red", False),
        ("Blue. Not red.", "red", False),
        ("Yes, there is.", "yes", True),
        ("There is no doubt, yes.", "no", False),
        ("No.", "no", True),
        ("", "red", False),
        ("They are at a1, b2.", "a1, b2", True),
        ("It shows 3.5 stars", "3.5", True),
        ("yes", "no", False),
    ],
)
def test_lenient_matching_takes_whole_words_of_the_first_sentence(answer, label, right):
    assert lenient(answer, label) is right


def test_forgetting_gives_nothing_for_naming_every_class():
    samples = [question("star"), question("circle"), question("five", "digits")]
    score = BENCHMARKS["forgetting"].score
    assert score(samples, ["It is a star.", "circle", "five"])["accuracy"] == 100
    assert score(samples, ["star or circle", "circle and star", "5"])["accuracy"] == 0
    assert score(samples, ["starling", "circle", "five"]) == {
        "accuracy": 75,
        "accuracy/a": 50,
        "accuracy/digits": 100,
    }


# ------------------------------------------------------------------------------------------- scores


def test_accuracy_is_averaged_over_kinds_not_over_questions():
    samples = [question("red")] * 3 + [question("two", "count")]
    scores = BENCHMARKS["heldin"].score(samples, ["Red.", "red", "the red one", "three"])
    assert scores["accuracy"] == pytest.approx(100 / 3) and scores["accuracy/a"] == pytest.approx(
        200 / 3
    )
    assert scores["lenient"] == 50


def test_pope_counts_by_hand():
    samples = [question("yes"), question("yes"), question("no"), question("no")]
    scores = BENCHMARKS["pope"].score(samples, ["Yes", "No", "Yes", "No"])
    assert scores == pytest.approx(dict(accuracy=50, precision=50, recall=50, f1=50, yes_ratio=50))
    assert BENCHMARKS["pope"].score(samples, ["No"] * 4)["f1"] == 0  # no division by zero
    assert BENCHMARKS["pope"].baseline(samples)["f1"] == pytest.approx(200 / 3)


def test_a_judge_decides_on_the_choices_of_mmbench_that_no_rule_reads():
    """All rotations of a question have to be right; by rule or by judgement."""
    text = "Which? (a) red (b) blue Answer with the letter."
    rows = [("1", "b"), ("1000001", "a"), ("2", "a"), ("1000002", "b")]
    more = dict(text=text, exact=True)
    samples = [question(k, number=i, rotation_of=i[-1], **more) for i, k in rows]
    answers = ["b", "Hard to say.", "It is red.", "Who knows?"]
    bench, yes, no = BENCHMARKS["mmbench"], Judgement(1.0, "Yes", 1.0), Judgement(0.0, "No", 1.0)
    plain = dict(accuracy=0.0, lenient=0.0)
    for judgements, value in (([yes, yes], 100), ([yes, no], 50), ([None, yes], 50)):
        verdicts = [None, judgements[0], None, judgements[1]]
        scores = bench.score(samples, answers, verdicts)
        assert scores["judged"] == value and plain.items() <= scores.items()
    assert "judged" not in bench.score(samples, answers)
    # A judgement on an answer that a rule reads changes nothing.
    assert bench.score(samples, answers, [no, yes, no, yes])["judged"] == 100


def test_mme_adds_accuracy_and_accuracy_of_whole_pairs():
    samples = [
        question(label, task, image)
        for task in ("color", "count")
        for image in "xyzw"
        for label in ("yes", "no")
    ]
    answers = ["yes", "no"] * 3 + ["yes", "yes"] + ["yes", "yes"] * 4
    scores = BENCHMARKS["mme"].score(samples, answers)
    assert scores["accuracy/color"] == 87.5 and scores["accuracy_plus/color"] == 75
    assert scores["accuracy/count"] == 50 and scores["accuracy_plus/count"] == 0
    assert scores["total"] == 87.5 + 75 + 50 and scores["score"] == scores["total"] / 4
    unpaired = BENCHMARKS["mme"].score(
        samples[:-1], answers[:-1]
    )  # the last picture of `count` has one question
    assert unpaired["accuracy/count"] == 50 and unpaired["accuracy/color"] == 87.5
    assert BENCHMARKS["mme"].problems(samples[:-1], answers[:-1])["unpaired"] == ["1"]
    assert BENCHMARKS["mme"].score(samples[:1], answers[:1]) == {}


def test_mmbench_wants_every_rotation_right():
    texts = ["? (a) red (b) blue", "? (a) blue (b) red"]
    samples = [
        question(label, "color", f"{q}.png", text, f"{q}_{k}")
        for q in range(2)
        for k, (text, label) in enumerate(zip(texts, "ab"))
    ]
    scores = BENCHMARKS["mmbench"].score(samples, ["a", "b", "a", "a"])
    assert scores["accuracy"] == 50 and scores["single_pass"] == 100
    assert (
        BENCHMARKS["mmbench"].baseline(samples)["accuracy"] == 0
    )  # one letter for all can never be circularly right


def test_the_majority_answer_is_that_of_each_category():
    samples = [question("red"), question("Red"), question("blue"), question("two", "count")]
    assert majority(samples) == ["red", "red", "red", "two"]
    assert BENCHMARKS["heldin"].baseline(samples)["accuracy"] == pytest.approx((200 / 3 + 100) / 2)


def test_missing_answers_are_an_error():
    with pytest.raises(ValueError, match="2 questions, but 1 answers"):
        BENCHMARKS["heldin"].score([question("red"), question("blue")], ["red"])


# ------------------------------------------------------------------------------------- open answers


@pytest.mark.parametrize(
    "text, pairs",
    [
        (
            "a small red striped star and a large blue circle.",
            [("red", "star"), ("blue", "circle")],
        ),
        ("The star is red. The ring is not blue.", [("red", "star")]),
        ("The star in the picture is red.", [("red", "star")]),
        ("Two red stars, blue crosses", [("red", "star"), ("blue", "cross")]),
        ("There is no red star, but a blue ring.", [("blue", "ring")]),
        ("I don't see a red star.", []),
        ("a star. red circle", [("red", "circle")]),
        ("The star is left of the blue circle.", [("blue", "circle")]),
        ("red star red star", [("red", "star")]),
        ("", []),
        ("restart the redstar", []),
    ],
)
def test_colours_are_read_with_the_shape_they_belong_to(text, pairs):
    assert mentions(text, LEXICON) == pairs


@pytest.mark.parametrize(
    "answer, long",
    [
        ("The picture shows a red star.", True),
        ("Yes, there is a star. It is red.", False),
        ("red star", False),
        ("Red.", False),
        ("The picture shows a red star", False),
        ("", False),
        ("There is a star! The star is quite red.", True),
        ("a red star on a sand background.", False),
    ],
)
def test_long_form_means_whole_sentences_with_a_verb(answer, long):
    assert is_long_form(answer) is long


def open_question(
    label="The picture shows a red star and a blue circle.", image="x.png", category="detail"
):
    return question(
        label,
        category,
        image,
        "Describe it.",
        facts=[["red", "star"], ["blue", "circle"]],
        lexicon=LEXICON,
    )


def test_the_judge_prefers_full_true_sentences_and_says_why():
    sample = open_question()
    answers = [
        "The picture shows a red star and a blue circle.",
        "red star, blue circle",
        "The picture shows a red star and a green ring.",
        "red star",
        "",
        "I like trains a lot.",
    ]
    marks = [RuleJudge(LEXICON).judge("?", sample["label"], a, sample) for a in answers]
    scores = [m.score for m in marks]
    assert scores[0] == 10 and scores == sorted(scores, reverse=True)[:1] + scores[1:]
    assert (
        scores[0] > scores[1] > scores[3] > scores[5] >= scores[4] == 0
        and scores[0] > scores[2] > scores[5]
    )
    assert "not there: green ring" in marks[2].reason and "1 of 2 objects" in marks[3].reason


def test_open_answers_are_measured_apart_for_form_content_and_invention():
    samples = [open_question(image="x.png"), open_question(image="y.png")]
    scores = BENCHMARKS["llava_bench"].score(
        samples, ["The picture shows a red star and a white ring.", "blue circle"]
    )
    assert scores["format"] == 50
    assert scores["hallucination"] == pytest.approx(100 / 3)  # the white ring among three pairs
    assert scores["content"] == pytest.approx(100 * 2 * 2 / (3 + 4))
    assert scores["words"] == pytest.approx((10 + 2) / 2)
    assert 0 < scores["score"] < 100 and len(judge(samples, ["", ""])) == 2


def test_a_short_question_is_judged_by_what_it_asks_for():
    sample = open_question(label="The star in the picture is red.", category="conversation")
    assert (
        RuleJudge(LEXICON)
        .judge("What color is the star?", sample["label"], "The star is red.", sample)
        .score
        == 10
    )
    number = open_question(label="There are two objects in the picture.", category="conversation")
    good, bad = (
        RuleJudge(LEXICON).judge("?", number["label"], a, number).score
        for a in ("There are two objects in the picture.", "I see many.")
    )
    assert good == 10 and bad < 3


# ------------------------------------------------------------------------------------------ folders


def test_questions_are_loaded_with_their_pictures(tmp_path):
    (tmp_path / "heldin").mkdir()
    rows = [
        {"question_id": 7, "image": "x.png", "text": "?", "label": "red", "category": "a"},
        {"question_id": 8, "text": "?", "label": "red"},
    ]
    (tmp_path / "heldin" / "questions.jsonl").write_text("\n".join(map(json.dumps, rows)))
    first, second = BENCHMARKS["heldin"].load(tmp_path)
    assert first["image"] == str(tmp_path / "images" / "x.png") and first["question_id"] == "7"
    assert second["image"] is None and BENCHMARKS["heldin"].prompt(second) == "?"


def test_a_missing_folder_and_a_broken_row_say_what_to_do(tmp_path):
    with pytest.raises(FileNotFoundError, match="01_data_exploration"):
        BENCHMARKS["pope"].load(tmp_path)
    (tmp_path / "mme").mkdir()
    (tmp_path / "mme" / "questions.jsonl").write_text('{"question_id": 1, "text": "?"}')
    with pytest.raises(ValueError, match="line 1: a question needs label"):
        BENCHMARKS["mme"].load(tmp_path)


# -------------------------------------------------------------------------------- the released POPE


@pytest.fixture(scope="module")
def released():
    folder = SHARED / "benchmarks"
    if not (folder / "pope" / "llava_pope_test.jsonl").exists():
        pytest.skip("needs POPE's released files beside the repository: shared/benchmarks/pope")
    answers = {
        str(r["question_id"]): r["text"]
        for r in json_lines("", (folder / "pope" / "llava-v1.5-13b.jsonl").read_text())
    }
    samples = BENCHMARKS["pope"].load(folder)
    return samples, [answers[s["question_id"]] for s in samples]


def test_released_answers_of_llava_13b_score_as_published(released):
    samples, answers = released
    assert len(samples) == 8910
    scores = BENCHMARKS["pope"].score(samples, answers)
    assert {k: round(v, 2) for k, v in scores.items() if k.startswith("f1")} == {
        "f1": 85.95,
        "f1/adversarial": 84.46,
        "f1/popular": 86.25,
        "f1/random": 87.14,
    }


@pytest.mark.filterwarnings("ignore:.*sha256 should be")
def test_labels_do_not_depend_on_the_order_of_the_files(released, tmp_path):
    samples, _ = released
    (tmp_path / "pope").mkdir()
    for path in (SHARED / "benchmarks" / "pope").glob("*pope*"):
        lines = path.read_text().splitlines()
        (tmp_path / "pope" / path.name).write_text(
            "\n".join(lines[::-1] if path.suffix == ".json" else lines)
        )
    with pytest.warns(
        UserWarning, match="sha256 should be"
    ):  # the files were changed, and that is said
        assert [s["label"] for s in BENCHMARKS["pope"].load(tmp_path)] == [
            s["label"] for s in samples
        ]
    path = tmp_path / "pope" / "coco_pope_random.json"
    path.write_text(path.read_text().split("\n", 1)[1])
    with pytest.warns(UserWarning, match="1 questions have no usable label"):
        shorter = BENCHMARKS["pope"].load(tmp_path)
    last = [s["question_id"] for s in shorter if s["category"] == "random"][-1]
    assert BENCHMARKS["pope"].problems(shorter) == {"unknown_label": [last]}
