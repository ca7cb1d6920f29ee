"""Lenient readers: they read what was said, and nothing where an answer denies or names several."""

import pytest

from vflan.evaluation.benchmarks import BENCHMARKS
from vflan.evaluation.benchmarks.reading import affirms, choose

ANIMALS = {"a": "cat", "b": "dog", "c": "horse"}


@pytest.mark.parametrize(
    "answer, letter",
    [
        # the letter alone
        ("b", "b"),
        ("B.", "b"),
        ("(b)", "b"),
        ("[B]", "b"),
        ("'B'", "b"),
        ("**B**", "b"),
        ("(b) dog", "b"),
        ("b) dog", "b"),
        ("b: dog", "b"),
        ("A: cat", "a"),
        # a model that does not stop
        ("b b b b b b", "b"),
        ("a a small cat", "a"),
        ("c c c, a dog.", "c"),
        # a stated letter
        ("The answer is (b).", "b"),
        ("The answer is\nB", "b"),
        ("I think the answer is B.", "b"),
        ("Answer is **B. dog**", "b"),
        ("The correct option is B: dog", "b"),
        ("option c is right", "c"),
        ("Option A", "a"),
        ("I would choose B", "b"),
        ("选项B", "b"),
        ("答案是B", "b"),
        ("A cat lies there too, but the answer is B.", "b"),
        # an option's text; "a" before a word is an article
        ("dog", "b"),
        ("A dog", "b"),
        ("The answer is a dog.", "b"),
        ("The answer is A dog", "b"),
        ("It is not a cat but a dog.", "b"),
        ("It is a cat, not a dog", "a"),
        ("I don't think it is a dog. It is a horse.", "c"),
        # no choice
        ("There is no dog.", None),
        ("It isn't a cat.", None),
        ("The dog is not there", None),
        ("The answer is not B.", None),
        ("I would not choose B", None),
        ("Option B is wrong.", None),
        ("Option B isn’t right.", None),
        ("Option A is incorrect, so the answer is B.", "b"),
        ("The answer is A or B", None),
        ("a small horseshoe", None),
        ("b c b c", None),
        ("a cat and a dog", None),
        ("None of them", None),
        ("D", None),
        ("", None),
    ],
)
def test_a_choice_is_what_the_answer_chooses(answer, letter):
    assert choose(answer, ANIMALS) == letter


def test_an_option_inside_a_longer_one_is_not_chosen():
    options = {"a": "star", "b": "red star", "c": "star fish"}
    assert choose("It shows a red star.", options) == "b"
    assert choose("It shows a star.", options) == "a"
    assert choose("A star and a red star.", options) is None


@pytest.mark.parametrize(
    "answer, word, affirmed",
    [
        ("the star is red", "red", True),
        ("the star is not red", "red", False),
        ("there isn't any red star", "red", False),
        ("there isn’t any red star", "red", False),
        ("red is wrong", "red", False),
        ("i do not see a star there", "star", False),
        ("without a star", "star", False),
        ("red is not the color", "red", False),
        ("it is not blue, it is red", "red", True),
        ("it is not blue, it is red", "blue", False),
        ("not blue but red", "red", True),
        ("it's red rather than blue", "blue", False),
        ("the red star is not blue", "red", True),
        ("no, it is red", "red", True),
        ("there is not one star but three", "three", True),
        ("no", "no", True),
        ("no parking", "no parking", True),
        ("a reddish star", "red", False),
    ],
)
def test_a_word_that_is_denied_is_not_affirmed(answer, word, affirmed):
    assert affirms(answer, word) is affirmed


def question(text, label, **more):
    return {
        "question_id": "1",
        "image": None,
        "text": text,
        "label": label,
        "category": "x",
        **more,
    }


def lenient(name, answer, sample):
    return BENCHMARKS[name].score([sample], [answer])["lenient"]


def test_denials_are_wrong_in_every_lenient_reading():
    star = question("What is the color of the star?", "red")
    assert lenient("heldout", "The star is red.", star) == 100
    assert lenient("heldout", "The star is not red.", star) == 0
    animals = question("Which?\nA. cat\nB. dog\nC. horse", "B", exact=True)
    assert lenient("mmbench", "The answer is a dog.", animals) == 100
    assert lenient("mmbench", "There is no dog.", animals) == 0
    digit = question("What is the digit?", "seven", classes=["six", "seven"])
    assert BENCHMARKS["forgetting"].score([digit], ["It is not a seven."])["accuracy"] == 0
    assert BENCHMARKS["forgetting"].score([digit], ["It is a seven, not a six."])["accuracy"] == 100


def test_answers_that_choose_nothing_are_counted():
    animals = question("Which?\nA. cat\nB. dog\nC. horse", "B", exact=True)
    rows = [animals | {"question_id": str(i)} for i in range(3)]
    problems = BENCHMARKS["mmbench"].problems(rows, ["B", "There is no dog.", ""])
    assert problems["unread"] == ["1"] and problems["empty"] == ["2"]
