"""Held-in and held-out tasks: exact match, and a lenient score for answers in sentences."""

from __future__ import annotations

from vflan.evaluation.benchmarks.benchmark import (
    Benchmark,
    Metric,
    clean,
    first_sentence,
    metrics,
)
from vflan.evaluation.benchmarks.reading import affirms


def parse(answer: str, sample: dict | None = None) -> str:
    """The answer in the form in which it is compared: lower case, single spaces, no full stop."""
    return clean(answer)


def lenient(answer: str, label: str) -> bool:
    """Whether the first sentence of `answer` contains `label` as whole words.

    Yes and no must be its first word. 'The star is red.' is right for 'red'; 'There is no doubt,
    yes.' is wrong for 'no'.
    """
    sentence, label = clean(first_sentence(answer)), clean(label)
    if label in ("yes", "no"):
        words = sentence.replace(",", " ").split()
        return bool(words) and words[0].strip(".:;!") == label
    return affirms(sentence, label)


def items(samples: list[dict], answers: list[str]) -> dict[str, Metric]:
    """`accuracy`: exact match of the cleaned answer; `lenient`: the answer contains the label."""
    exact = [parse(a) == clean(s["label"]) for s, a in zip(samples, answers)]
    loose = [e or lenient(a, s["label"]) for e, s, a in zip(exact, samples, answers)]
    return metrics("accuracy", exact, samples) | metrics("lenient", loose, samples)


HELDIN, HELDOUT = (
    Benchmark(name, "accuracy", parse, items, title=title, missing="wrong", max_new_tokens=24)
    for name, title in (("heldin", "held-in tasks"), ("heldout", "held-out tasks"))
)
