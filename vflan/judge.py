"""Judges of open answers: (question, reference, answer, sample) -> Judgement(score 0 to 10, reason).

The paper's judge is GPT-4, which sees a description of the picture and rates helpfulness, relevance, accuracy and
detail. `RuleJudge` stands in for it where the truth is known as facts: it reads what was said about colours and
shapes, compares it with what is there, and says why. It is exact, free and blind to style beyond whole sentences; it
is no GPT-4.
"""

import re
from dataclasses import dataclass
from typing import Protocol

VERBS = set(
    "is are was were be has have shows show see sees can could may might must will looks look lies lie stands stand "
    "sits sit contains contain makes make belong there's it's i'm".split()
)


@dataclass(frozen=True)
class Judgement:
    score: float  # 0 to 10
    reason: str


class Judge(Protocol):
    def judge(self, question: str, reference: str, answer: str, sample: dict) -> Judgement: ...


def words(text):
    """Lower-case words, with '.' ending a sentence and ',' kept, since they end a phrase."""
    return re.findall(r"[a-z0-9]+(?:'[a-z]+)?|[.,;!?]", str(text).lower())


def mentions(text, lexicon):
    """The (colour, shape) pairs that `text` speaks of, in order, each once.

    'a small red striped star' and 'the star is red' both speak of (red, star). A shape without a colour, and a pair
    that is denied ('there is no red star', 'without a red star'), are left out.
    """
    shapes = {form: s for s in lexicon["shapes"] for form in (s, s + "s", s + "es")}
    colors, tokens, found = set(lexicon["colors"]), words(text), []
    for i, token in enumerate(tokens):
        if token not in shapes:
            continue
        color, denied = None, False
        for back in reversed(tokens[max(0, i - 5) : i]):
            if back in shapes or back in ".,;!?":
                break
            if back in colors and color is None:
                color = back
            if back in ("no", "not", "without", "neither", "nor") or back.endswith("n't"):
                denied = True
        if color is None:  # the star (in the picture) is (not) red
            phrase = tokens[i + 1 : i + 6]
            phrase = phrase[: next((k for k, w in enumerate(phrase) if w in shapes or w in ".,;!?"), 5)]
            at = next((k for k, w in enumerate(phrase) if w in ("is", "are")), 5)
            color = next((w for w in phrase[at + 1 : at + 3] if w in colors), None)
            denied = denied or "not" in phrase
        if color and not denied and (color, shapes[token]) not in found:
            found.append((color, shapes[token]))
    return found


def is_long_form(answer):
    """Whether an answer is written out: it ends as a sentence does; each sentence has a verb and four words or more."""
    answer = str(answer).strip()
    if not answer.endswith((".", "!", "?")):
        return False
    sentences = [words(s) for s in re.split(r"[.!?]+(?:\s+|$)", answer) if s.strip()]
    return bool(sentences) and all(len(s) >= 4 and VERBS & set(s) for s in sentences)


def facts(reference, answer, sample, lexicon):
    """(right, wrong, wanted): pairs said and true, said and untrue, and asked for.

    True is what the sample's facts say; asked for is what the reference mentions, since a short question about one star
    does not want the whole picture.
    """
    truth = {tuple(pair) for pair in sample.get("facts", [])}
    said = mentions(answer, lexicon)
    wanted = [pair for pair in mentions(reference, lexicon) if not truth or pair in truth]
    return [p for p in said if p in truth], [p for p in said if p not in truth], wanted


def overlap(reference, answer):
    """F1 of the words of two texts, 0 to 1; the measure of content where a reference names no colour with a shape."""
    a, b = ([w for w in words(t) if w.isalnum() and w not in ("a", "an", "the")] for t in (reference, answer))
    common = sum(min(a.count(w), b.count(w)) for w in set(a))
    return 2 * common / (len(a) + len(b)) if a or b else 0.0


@dataclass(frozen=True)
class RuleJudge:
    """6 points for content, 2 for whole sentences, 2 for saying nothing untrue (only an answer that says something).

    Content is the share of the asked-for pairs that are named, or the overlap with the reference where it names none.
    Each untrue pair costs its share of all pairs named.
    """

    lexicon: dict

    def judge(self, question, reference, answer, sample):
        if not str(answer).strip():
            return Judgement(0.0, "no answer")
        right, wrong, wanted = facts(reference, answer, sample, self.lexicon)
        if wanted:
            named = [p for p in wanted if p in right]
            content, why = len(named) / len(wanted), f"names {len(named)} of {len(wanted)} objects"
        else:
            content = overlap(reference, answer)
            why = f"{round(100 * content)} % of the words agree"
        untrue = len(wrong) / len(right + wrong) if wrong else 0.0
        form = is_long_form(answer)
        score = 6 * content + 2 * form * min(1, 2 * content) + 2 * (1 - untrue) * min(1, 2 * content)
        why += ", whole sentences" if form else ", no whole sentences"
        if wrong:
            why += ", not there: " + ", ".join(" ".join(p) for p in wrong)
        return Judgement(round(score, 2), why)
