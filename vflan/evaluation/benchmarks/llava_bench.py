"""LLaVA-Bench (In-the-Wild): open questions, judged against GPT-4's answer.

    llava_bench/    questions.jsonl, context.jsonl, answers_gpt4.jsonl (LLaVA), images/

Categories are conversation, detail and complex reasoning. The papers' judge is GPT-4. It reads a
description of the picture and scores GPT-4's own answer and the model's from 1 to 10; the score is
the ratio of the two means. Released reviews (one json a line, with `tuple`) are read as judgements;
failed ones ([-1, -1]) are left out and counted. Questions without an answer or a judgement are left
out. In the mini world a rule judge replaces GPT-4. Its score comes with the parts that explain it:
`format` (answers in sentences), `content` (F1 of colour-shape pairs), `hallucination` (pairs that
are not in the picture) and `words`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path

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


def read(path: Path, labels: Path, keep: Callable) -> list[dict]:
    """Our questions, or the released ones.

    Released ones get GPT-4's answer as `label` and the description of the picture as `context`.
    """
    here, rows = path.parent, read_rows(path)
    if rows and "label" in rows[0]:
        return read_questions(path)
    image = pictures_in(here, "images")
    answer_file, reference = find(labels, "answers_gpt4.jsonl", "*gpt4*.jsonl"), {}
    if answer_file and answer_file != path:
        reference = {str(r["question_id"]): r["text"] for r in read_rows(answer_file)}
    context_file, context = find(here, "context.jsonl"), {}
    if context_file and context_file != path:
        context = {r["image"]: r["caption"] for r in read_rows(context_file)}
    return [
        q
        | {
            "label": q.get("label", reference.get(str(q["question_id"]))),
            "context": context.get(q.get("image"), ""),
            "category": q.get("category", "").removeprefix("llava_bench_"),
            "image": image(q.get("image")),
        }
        for q in rows
    ]


def parse(answer: str, sample: dict) -> dict:
    """The colour-shape pairs of an answer that are `right` and `wrong`, and those `wanted`.

    `long_form` says whether it is written in sentences. Released questions have only `long_form`,
    because their facts are not known.
    """
    right, wrong, wanted = [], [], []
    if "lexicon" in sample:
        right, wrong, wanted = facts(sample["label"], answer, sample, sample["lexicon"])
    return {"right": right, "wrong": wrong, "wanted": wanted, "long_form": is_long_form(answer)}


def judge(samples: list[dict], answers: list[str]) -> list[Judgement]:
    """A Judgement by the rules of the mini world for each answer; None for a released question."""
    return [
        RuleJudge(s["lexicon"]).judge(s["text"], s["label"], answer, s) if "lexicon" in s else None
        for s, answer in zip(samples, answers, strict=True)
    ]


def reviews(
    path: Path, samples: list[dict], model: str | None = None
) -> list[list[Judgement | None]]:
    """One run: a Judgement (or None) for each sample, from a released file of GPT-4's reviews.

    A review has `tuple` [reference, model], or the two numbers in the first line of `content`; the
    reference's becomes `out_of`. model: ValueError, because such a file is about one model.
    """
    if model:
        raise ValueError(f"{path} is about one model: leave --model out.")
    by_question = {}
    for row in read_rows(path):
        pair = numbers(" ".join(map(str, row.get("tuple") or ()))) or numbers(
            row.get("content", "")
        )
        verdict = Judgement(pair[1], row.get("content", ""), pair[0]) if len(pair) == 2 else None
        by_question[str(row["question_id"])] = verdict
    return [[by_question.get(str(s["question_id"])) for s in samples]]


def numbers(text: str) -> list[float]:
    """The numbers in the first line; [] if it holds anything else."""
    try:
        return [float(x) for x in str(text).split("\n")[0].replace(",", " ").split()]
    except ValueError:
        return []


def items(
    samples: list[dict], answers: list[str], judgements: list | None = None
) -> dict[str, Metric]:
    if judgements is None:
        judgements = judge(samples, answers)
    judged = [(s, j) for s, j in zip(samples, judgements) if valid(j)]
    measured = verdicts([s for s, _ in judged], [j for _, j in judged]) if judged else {}
    read = [parse(a, s) for s, a in zip(samples, answers)]
    right, wrong = (np.array([len(r[key]) for r in read], float) for key in ("right", "wrong"))
    wanted = np.array([len(r["wanted"]) for r in read], float)
    hit = np.array([sum(p in r["right"] for p in r["wanted"]) for r in read], float)
    one = np.ones(len(samples))
    pooled = metrics("all", one, samples)["all"]

    # Over all questions at once: most answers name too few pairs for a ratio of their own.
    def ratio(num, den=one):
        return Metric(np.asarray(num, float), den, np.zeros(len(samples)), pooled.cluster)

    measured["format"] = ratio([r["long_form"] for r in read])
    if wanted.any():
        measured["content"] = ratio(2 * hit, hit + wrong + wanted)
        measured["hallucination"] = ratio(wrong, right + wrong)
    return measured | {"words": ratio([len(str(a).split()) / 100 for a in answers])}


def verdicts(samples: list[dict], judgements: list) -> dict[str, Metric]:
    """score: the model's marks divided by the reference's (or by 10), over all questions.

    Both means are given too, times ten. In the mini world score is the mean over categories.
    """
    marks, best = [j.score for j in judgements], [out_of(j) for j in judgements]
    if "lexicon" in samples[0]:
        return metrics("score", marks, samples, den=best)
    means = {"answer_mean": marks, "reference_mean": best}
    means = {
        name: metrics(name, np.array(of) / 10, samples, pooled=True)[name]
        for name, of in means.items()
    }
    return metrics("score", marks, samples, den=best, pooled=True) | means


def most_common_reference(samples: list[dict]) -> list[str]:
    """For each question the most frequent reference of its category, whatever the picture."""
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
