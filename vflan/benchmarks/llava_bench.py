"""LLaVA-Bench: open questions (conversation, detail, reasoning), judged. The paper's judge is GPT-4; here a rule judge.

Beside the judge's score stand the things it is made of, so that one can see *why* a model moved: `format` (answers
written out in sentences), `content` (F1 of colour-shape pairs), `hallucination` (pairs said that are not there) and
`words`.
"""

import json
from collections import Counter
from pathlib import Path

import numpy as np

from vflan.benchmarks.benchmark import Benchmark, Metric, load_questions, metrics
from vflan.judge import RuleJudge, facts, is_long_form


def load(folder):
    """The questions; each carries the `lexicon` of <folder>/llava_bench/lexicon.json, with which its answers are
    read."""
    path = Path(folder) / "llava_bench" / "lexicon.json"
    samples = load_questions(folder, "llava_bench")
    lexicon = json.loads(path.read_text(encoding="utf-8"))
    return [s | {"lexicon": lexicon} for s in samples]


def parse(answer, sample):
    """dict: the colour-shape pairs said that are `right` and `wrong`, those `wanted`, and whether it is `long_form`."""
    right, wrong, wanted = facts(sample["label"], answer, sample, sample["lexicon"])
    return {"right": right, "wrong": wrong, "wanted": wanted, "long_form": is_long_form(answer)}


def judge(samples, answers):
    """A Judgement for each answer."""
    return [
        RuleJudge(s["lexicon"]).judge(s["text"], s["label"], answer, s)
        for s, answer in zip(samples, answers, strict=True)
    ]


def items(samples, answers):
    read = [parse(a, s) for s, a in zip(samples, answers)]
    score = np.array([j.score / 10 for j in judge(samples, answers)])
    right, wrong = (np.array([len(r[key]) for r in read], float) for key in ("right", "wrong"))
    wanted = np.array([len(r["wanted"]) for r in read], float)
    hit = np.array([sum(p in r["right"] for p in r["wanted"]) for r in read], float)
    one = np.ones(len(samples))
    pooled = metrics("all", one, samples)["all"]

    def ratio(
        num, den=one
    ):  # over all questions together: most single answers name too few pairs for a ratio of their own
        return Metric(np.asarray(num, float), den, np.zeros(len(samples)), pooled.cluster)

    return metrics("score", score, samples) | {
        "format": ratio([r["long_form"] for r in read]),
        "content": ratio(2 * hit, hit + wrong + wanted),
        "hallucination": ratio(wrong, right + wrong),
        "words": ratio([len(str(a).split()) / 100 for a in answers]),
    }


def most_common_reference(samples):
    """Every question of a category answered with the reference that occurs most often there, whatever the picture."""
    best = {
        c: Counter(s["label"] for s in samples if s["category"] == c).most_common(1)[0][0]
        for c in {s["category"] for s in samples}
    }
    return [best[s["category"]] for s in samples]


LLAVA_BENCH = Benchmark(
    "llava_bench", "score", parse, items, load, blind=most_common_reference, max_new_tokens=128, paper="LLaVA-Bench"
)
