"""What a language model is asked when it judges an answer, and how its reply is read.

A reply that cannot be read is no score: neither 0 nor 100.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

Score = tuple[float, float]  # (score, out_of)


@dataclass(frozen=True)
class Prompt:
    """What a judge is asked. Fields of `text`: context question reference answer rule role.

    read: reply -> (score, out_of), or None if it cannot be read. rules: category -> (role, rule);
    the category "" is for all others.
    """

    name: str
    text: str
    read: Callable[[str], Score | None]
    max_tokens: int
    rules: dict[str, tuple[str, str]] = field(default_factory=lambda: {"": ("Answer", "")})

    def fill(self, question: str, reference: str, answer: str, sample: dict) -> str:
        """The prompt for one answer. The picture is described by `context`, else by `facts`."""
        role, rule = self.rules.get(sample.get("category"), self.rules[""])
        facts = ", ".join(" ".join(fact) for fact in sample.get("facts", []))
        fields = dict(context=sample.get("context") or facts, rule=rule, role=role)
        return self.text.format(question=question, reference=reference, answer=answer, **fields)

    @property
    def hash(self) -> str:
        """Eight hex digits that change with the prompt; they are part of a judge's title."""
        parts = json.dumps([self.text, self.rules, self.max_tokens])
        return hashlib.sha256(parts.encode()).hexdigest()[:8]


# ---------------------------------------------------------------------------------- reading replies

_NUMBER = r"-?\d+(?:\.\d+)?"
# "8", "8/10" or "8 out of 10". A number that continues (a date, a range, 1st) is no score.
_SCORE = rf"({_NUMBER})(?:\s*(?:/|out of)\s*10(?:\.0+)?)?(?![\w/%-]|[.,]\d)"
_ONE = re.compile(rf"[\W_]*?{_SCORE}\W*", re.I)
_PAIR = re.compile(rf"[\W_]*?{_SCORE}[\s,;|&*()\[\]]+{_SCORE}(?P<rest>.*)", re.I)
_LABELLED = re.compile(rf"\b[a-z]+[ \t]*#?([12])\b[\s*_]*(?::|=|is\b|gets\b)[\s*_]*{_SCORE}", re.I)
_GRADE = re.compile(
    r"(?:[*_(\[\s]*)(?:\W*(?:the )?(?:score|grade)\W*(?:is\b)?\W*)?(\d+(?:[.,]\d+)?)(.*)",
    re.I | re.S,
)
_SCALE = re.compile(r"\s*(?:/|out of|of)\s*(\d+(?:\.\d+)?)(?![\w/]|[.,]\d)", re.I)
# 1st, a range, a date, a second number: the number before it is no grade.
_CONTINUES = re.compile(r"\w|[-/–]\s*\w|[.,]\d|\s*(?:to|or|and)\s+\d")


def read_pair(reply: str) -> Score | None:
    """(the candidate's, the reference's) score, each from 1 to 10, or None.

    Two bare numbers at the beginning of the first line, the reference's first; or one score for
    each label ("Answer 1: 8", "Answer 2: 9"). "8/10" is one score on its scale.
    """
    by_label: dict[str, set[float]] = {"1": set(), "2": set()}
    for label, score in _LABELLED.findall(reply):
        by_label[label].add(float(score))
    line, *more = reply.strip().split("\n")
    # One number on each of two lines counts as two bare numbers.
    if more and _ONE.fullmatch(line):
        line = f"{line} {more[0]}"
    bare = _PAIR.fullmatch(line)
    scores = []
    if any(by_label.values()):
        # A label with two different scores is not clear.
        if len(by_label["1"]) == len(by_label["2"]) == 1:
            scores = [*by_label["1"], *by_label["2"]]
    elif bare and not re.search(r"\d", bare["rest"]):
        scores = [float(bare[1]), float(bare[2])]
    return (scores[1], scores[0]) if scores and all(1 <= s <= 10 for s in scores) else None


def read_grade(reply: str) -> Score | None:
    """(grade, 1) of a reply that begins with one grade: from 0 to 1, or on its scale ("7/10")."""
    match = _GRADE.match(reply.strip())
    if not match:
        return None
    grade, rest = float(match[1].replace(",", ".")), match[2]
    is_whole = not re.search(r"[.,]", match[1])
    if scale := _SCALE.match(rest):
        grade, rest = grade / max(float(scale[1]), 1e-9), rest[scale.end() :]
    elif percent := re.match(r"\s?%", rest):
        grade, rest = grade / 100, rest[percent.end() :]
    # "1. The answer misses it." begins a list.
    elif is_whole and re.match(r"[.):]\s*\w", rest):
        return None
    if _CONTINUES.match(rest):
        return None
    return (grade, 1.0) if 0 <= grade <= 1 else None


def read_yes_no(reply: str) -> Score | None:
    """(1 or 0, 1) of a reply whose first word is yes or no; else None."""
    match = re.match(r"\W*(yes|no)\b", reply, re.I)
    return (float(match[1].lower() == "yes"), 1.0) if match else None


# ------------------------------------------------------------------------------------------ prompts

_COMPARE = (
    "You compare two answers to a question about a picture. You cannot see it; the context "
    "describes it. Give each answer a score from 1 (worst) to 10 (best) for being helpful, to "
    "the point, true to the picture and detailed enough. Neither order nor length earns "
    "anything by itself. Write nothing but the two scores on the first line, that of answer 1, "
    "a space, that of answer 2; give your reasons from the second line on."
)
# The sections are those of the released reviews, which the benchmark's own rules refer to.
_PAIR_TEXT = (
    "[Context]\n{context}\n\n[Question]\n{question}\n\n"
    "[{role} 1]\n{reference}\n\n[End of {role} 1]\n\n[{role} 2]\n{answer}\n\n[End of {role} 2]\n\n"
    "[System]\n{rule}\n\n"
)
_GRADE_TEXT = (
    "Grade an answer to a question about a picture that you cannot see.\nQuestion: {question}\n"
    "Correct answer: {reference}\nAnswer to grade: {answer}\nIn the correct answer <AND> joins "
    "parts that are all needed, <OR> joins parts of which one is enough. Reply with one number "
    "only, from 0.0 (wrong) to 1.0 (right) in steps of 0.1: the share of what is needed that "
    "the answer gives correctly."
)
_YES_NO_TEXT = (
    "Question: {question}\nCorrect answer: {reference}\nPrediction: {answer}\n"
    "Does the prediction give the correct answer? Reply with Yes or No only."
)
PAIR = Prompt("pair", _PAIR_TEXT, read_pair, 1024, {"": ("Answer", _COMPARE)})
GRADE = Prompt("grade", _GRADE_TEXT, read_grade, 8)
YES_NO = Prompt("yes_no", _YES_NO_TEXT, read_yes_no, 5)
# Every other benchmark asks whether the answer is right.
PROMPTS = {"llava_bench": PAIR, "mm_vet": GRADE}


def prompt_for(benchmark: str, folder: str | Path) -> Prompt:
    """The Prompt of a benchmark.

    For LLaVA-Bench with its own rules, if <folder>/llava_bench/rule.json exists; ValueError if that
    file has none.
    """
    path = Path(folder) / benchmark / "rule.json"
    if benchmark != "llava_bench" or not path.is_file():
        return PROMPTS.get(benchmark, YES_NO)
    prefix = "llava_bench_"
    # The released file also has rules for other tasks than this benchmark.
    released = json.loads(path.read_text(encoding="utf-8"))
    rules = {
        name.removeprefix(prefix): (rule["role"], rule["prompt"])
        for name, rule in released.items()
        if name.startswith(prefix)
    }
    if not rules:
        raise ValueError(
            f"{path} has no rule whose name begins with {prefix}: is it the benchmark's rule.json?"
        )
    return replace(PAIR, rules=PAIR.rules | rules)
