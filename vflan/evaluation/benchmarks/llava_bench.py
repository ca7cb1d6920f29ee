"""LLaVA-Bench (In-the-Wild): open questions (conversation, detail, complex reasoning), judged beside GPT-4's answer.

    llava_bench/    questions.jsonl, context.jsonl, answers_gpt4.jsonl (LLaVA), images/

The papers' judge is GPT-4: it reads a description of the picture and gives GPT-4's own answer and the model's two
numbers from 1 to 10; the score is the ratio of their means. Released reviews (one json a line, with `tuple`) are read
as judgements; those that failed ([-1, -1]) are left out and counted, not averaged in. Questions without an answer or a
judgement are left out. In the mini world a rule judge stands in, and beside its score stand the things it is made of,
so that one can see *why* a model moved: `format` (answers written out in sentences), `content` (F1 of colour-shape
pairs), `hallucination` (pairs said that are not there) and `words`.
"""

from collections import Counter
from dataclasses import dataclass

import numpy as np

from vflan.evaluation.benchmarks.benchmark import (
    Benchmark,
    Metric,
    metrics,
    out_of,
    read_questions,
    valid,
)
from vflan.evaluation.benchmarks.files import find, pictures_in, read_rows
from vflan.evaluation.judge import Judgement, RuleJudge, facts, is_long_form


@dataclass(frozen=True)
class Review(Judgement):
    """A judge's verdict on two answers: `score` for the model's, `out_of` for the reference's."""

    out_of: float = 10.0


def read(path, labels, keep):
    """Our questions; or the released ones with GPT-4's answer as `label` and the description of the picture as `context`."""
    here, rows = path.parent, read_rows(path)
    if rows and "label" in rows[0]:
        return read_questions(path)
    image = pictures_in(here, "images")
    found = find(labels, "answers_gpt4.jsonl", "*gpt4*.jsonl")
    reference = (
        {str(r["question_id"]): r["text"] for r in read_rows(found)}
        if found and found != path
        else {}
    )
    context = find(here, "context.jsonl")
    context = (
        {r["image"]: r["caption"] for r in read_rows(context)}
        if context and context != path
        else {}
    )
    return [q | {"label": q.get("label", reference.get(str(q["question_id"]))), "context": context.get(q.get("image"), ""),
                 "category": q.get("category", "").removeprefix("llava_bench_"), "image": image(q.get("image"))}
            for q in rows]  # fmt: skip


def parse(answer, sample):
    """dict: the colour-shape pairs said that are `right` and `wrong`, those `wanted`, and whether it is `long_form`;
    of the released questions, which have no such facts, `long_form` only."""
    if "lexicon" not in sample:
        return {"right": [], "wrong": [], "wanted": [], "long_form": is_long_form(answer)}
    right, wrong, wanted = facts(sample["label"], answer, sample, sample["lexicon"])
    return {"right": right, "wrong": wrong, "wanted": wanted, "long_form": is_long_form(answer)}


def judge(samples, answers):
    """A Judgement for each answer, by the rules of the mini world; None for a released question, which they cannot
    read."""
    return [
        RuleJudge(s["lexicon"]).judge(s["text"], s["label"], answer, s) if "lexicon" in s else None
        for s, answer in zip(samples, answers, strict=True)
    ]


def reviews(path, samples):
    """A Review (or None) for each sample from a released file of GPT-4's: `tuple` [reference, model], or else the two
    numbers in the first line of `content`."""
    found = {}
    for row in read_rows(path):
        pair = row.get("tuple") or numbers(row.get("content", ""))
        review = Review(pair[1], row.get("content", ""), pair[0]) if len(pair) == 2 else None
        found[str(row["question_id"])] = review
    return [found.get(str(s["question_id"])) for s in samples]


def numbers(text):
    try:
        return [float(x) for x in str(text).split("\n")[0].replace(",", " ").split()]
    except ValueError:
        return []


def items(samples, answers, judgements=None):
    if judgements is None:
        judgements = judge(samples, answers)
    judged = [(s, j) for s, j in zip(samples, judgements) if valid(j)]
    found = verdicts([s for s, _ in judged], [j for _, j in judged]) if judged else {}
    read = [parse(a, s) for s, a in zip(samples, answers)]
    right, wrong = (np.array([len(r[key]) for r in read], float) for key in ("right", "wrong"))
    wanted = np.array([len(r["wanted"]) for r in read], float)
    hit = np.array([sum(p in r["right"] for p in r["wanted"]) for r in read], float)
    one = np.ones(len(samples))
    pooled = metrics("all", one, samples)["all"]

    def ratio(
        num, den=one
    ):  # over all questions together: most single answers name too few pairs for a ratio of their own
        return Metric(np.asarray(num, float), den, np.zeros(len(samples)), pooled.cluster)

    found["format"] = ratio([r["long_form"] for r in read])
    if wanted.any():
        found["content"] = ratio(2 * hit, hit + wrong + wanted)
        found["hallucination"] = ratio(wrong, right + wrong)
    return found | {"words": ratio([len(str(a).split()) / 100 for a in answers])}


def verdicts(samples, judgements):
    """score: the model's marks over the reference's (or over 10), all questions together, and both means, times ten;
    in the mini world the average over categories."""
    marks, best = [j.score for j in judgements], [out_of(j) for j in judgements]
    if "lexicon" in samples[0]:
        return metrics("score", marks, samples, den=best)
    means = {"answer_mean": marks, "reference_mean": best}
    means = {
        name: metrics(name, np.array(of) / 10, samples, pooled=True)[name]
        for name, of in means.items()
    }
    return metrics("score", marks, samples, den=best, pooled=True) | means


def most_common_reference(samples):
    """Every question of a category answered with the reference that occurs most often there, whatever the picture."""
    best = {
        c: Counter(str(s["label"]) for s in samples if s["category"] == c).most_common(1)[0][0]
        for c in {s["category"] for s in samples}
    }
    return [best[s["category"]] for s in samples]


LLAVA_BENCH = Benchmark(
    name="llava_bench",
    title="LLaVA-Bench",
    paper="LLaVA-Bench",
    headline="score",
    parse=parse,
    measure=items,
    read=read,
    released=("questions.jsonl",),
    source="LLaVA's llava-bench-in-the-wild",
    size=60,
    known=lambda sample: True,
    blind=most_common_reference,
    judged=True,
    reviews=reviews,
    max_new_tokens=128,
)
