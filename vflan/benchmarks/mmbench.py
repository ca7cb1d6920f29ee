"""MMBench: multiple choice, circular. A question counts as right only if it is answered right under every rotation."""

import re
from functools import partial

import numpy as np

from vflan.benchmarks.benchmark import Benchmark, Metric, clean, load_questions, metrics

OPTION = re.compile(r"(?:^|(?<=\s))(?:\(([a-h])\)|([A-H])[.)])\s*(.*?)(?=\s*(?:\([a-h]\)|(?<=\s)[A-H][.)]|\n|$))", re.S)


def options(text):
    """{letter: option} of a question: '(a) red (b) blue' on one line or 'A. red' on lines of their own."""
    text = re.sub(r"\banswer with the\b[^\n]*", "", text, flags=re.I)  # the format prompt is no part of the last option
    return {(m[1] or m[2]).lower(): clean(m[3]) for m in OPTION.finditer(text)}


def parse(answer, sample):
    """The letter chosen, or None. Understood: 'b', 'B.', '(b)', '(b) blue', 'b) blue', 'The answer is (b).', 'blue'.

    A bare 'a' inside a sentence is an article and no choice: 'a red star' picks the option 'a red star'.
    """
    answer = re.sub(r"\s+", " ", str(answer)).strip()
    choices = options(sample["text"])
    letters = "".join(choices) or "abcd"
    for pattern in (
        rf"\(?([{letters}])\)?[.:,)]?$",  # nothing but the letter
        rf"\(([{letters}])\)",  # (b) blue
        rf"([{letters}])[.:)](?:\s|$)",  # b. blue
        rf"(?:the )?(?:correct )?(?:answer|option|choice)(?: is)?:? \(?([{letters}])\)?[.:]?(?:\s|$)",
    ):
        if m := re.match(pattern, answer, re.I):
            return m[1].lower()
    said = clean(answer)
    exact = [letter for letter, option in choices.items() if option == said]
    named = exact or [k for k, o in choices.items() if o and re.search(rf"(?<!\w){re.escape(o)}(?!\w)", said)]
    return named[0] if len(named) == 1 else None


def items(samples, answers):
    right = np.array([parse(a, s) == s["label"].lower().strip("() ") for s, a in zip(samples, answers)], float)
    rotations = {}
    for i, s in enumerate(samples):
        rotations.setdefault(s["question_id"].rsplit("_", 1)[0], []).append(i)
    heads = [samples[members[0]] for members in rotations.values()]
    circular = np.array([right[members].all() for members in rotations.values()], float)
    by_category = metrics("accuracy", circular, heads)
    flat = by_category["accuracy"]  # the official overall figure counts questions, not categories
    by_category["accuracy"] = Metric(flat.num, flat.den, np.zeros(len(heads)), flat.cluster)
    single = metrics("single_pass", right, samples)["single_pass"]
    by_category["single_pass"] = Metric(single.num, single.den, np.zeros(len(samples)), single.cluster)
    return by_category


MMBENCH = Benchmark("mmbench", "accuracy", parse, items, partial(load_questions, name="mmbench"), paper="MMB")
