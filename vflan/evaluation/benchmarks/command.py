"""vflan score NAME --questions FILE [--labels FILE_OR_FOLDER] --answers FILE [--reviews FILE ...]

Scores a file of answers, from any model, with the files that the benchmark's authors and LLaVA
released. Prints one json object: the metrics in percent (MME's points on their own scale), the
number `n` of questions scored, and `problems`: how many answers are missing, belong to no question
(unknown), occur twice (duplicate) or are empty, how many labels are unknown, and how many lines are
no json. Their ids are listed on stderr.
"""

from __future__ import annotations

import json
import sys
import warnings
import zipfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from vflan.evaluation.benchmarks import BENCHMARKS
from vflan.evaluation.benchmarks.benchmark import Benchmark, in_words, valid
from vflan.evaluation.benchmarks.files import match, name_picture, read_answers, read_rows

COUNTED = ("missing", "unknown", "duplicate", "empty", "unknown_label", "unreadable_line")
MORE_NAMES = {"accuracy_plus": "acc_plus"}


def score_files(
    name: str,
    questions: str,
    answers: str | None = None,
    labels: str | None = None,
    reviews: Sequence[str] = (),
) -> tuple[dict, dict[str, list]]:
    """(metrics with `n` and `problems`, {problem: [question ids or line numbers]})."""
    benchmark = BENCHMARKS[name]
    samples = benchmark.questions(questions, labels, keep=name_picture)
    problems = {problem: [] for problem in COUNTED}
    texts = None
    if answers and benchmark.reviews and not reviews and is_review(answers):
        answers, reviews = None, (answers,)
    if answers:
        with in_words(Path(answers), name):
            rows, problems["unreadable_line"] = read_answers(answers)
        texts, mismatches = match(samples, rows)
        problems |= mismatches
    elif not reviews:
        raise ValueError(f"{name} needs --answers{' or --reviews' if benchmark.reviews else ''}.")
    if reviews and not benchmark.reviews:
        raise ValueError(f"{name} has no judge: leave --reviews out.")
    problems |= benchmark.problems(samples, texts)
    if texts and not any(a is not None for a in texts):
        raise ValueError(f"{answers} answers none of the {len(samples)} questions of {questions}.")
    runs = [scored(benchmark, samples, texts, file) for file in reviews] or [
        scored(benchmark, samples, texts)
    ]
    out = {
        key: float(np.mean([r[key] for r in runs])) if isinstance(value, float) else value
        for key, value in runs[0].items()
        if all(key in r for r in runs)
    }
    if not out.get("n", 1):
        raise ValueError(
            f"None of the {len(samples)} questions of {questions} can be scored: give their "
            f"labels with --labels ({benchmark.source})."
        )
    if len(runs) > 1 and benchmark.headline in out:
        out["runs"] = [r[benchmark.headline] for r in runs]
    failed = [r.pop("failed_judgement", 0) for r in runs]
    out.pop("failed_judgement", None)
    counts = {problem: len(ids) for problem, ids in problems.items() if ids or problem in COUNTED}
    return out | {
        "problems": counts | ({"failed_judgement": sum(failed)} if reviews else {})
    }, problems


def scored(
    benchmark: Benchmark,
    samples: list[dict],
    texts: list[str | None] | None,
    reviews: str | None = None,
) -> dict:
    """The metrics of one set of answers and, where there are reviews, of one file of them."""
    judgements = benchmark.reviews(reviews, samples) if reviews else None
    if isinstance(judgements, dict):
        return judgements  # a table of results: nothing is left to compute
    answers = texts or [""] * len(samples)
    metrics = benchmark.items(samples, answers, judgements)
    if judgements and not texts:  # reviews alone say nothing about how the answers are written
        metrics = {k: m for k, m in metrics.items() if k not in ("format", "words", "rule")}
    out = {}
    for name, metric in metrics.items():
        head, *tail = name.split("/")
        for key in dict.fromkeys((head, MORE_NAMES.get(head, head))):
            out["_".join((key, *tail))] = metric.value()
    out["n"] = sum(
        benchmark.known(s) and (a is not None or benchmark.missing == "wrong")
        for s, a in zip(samples, answers)
    )
    if judgements:
        out["n"], out["failed_judgement"] = (
            sum(map(valid, judgements)),
            sum(not valid(j) for j in judgements),
        )
    return out


def is_review(path: str) -> bool:
    """Whether a file holds a judge's verdicts and not answers."""
    rows = read_rows(path) if Path(path).is_file() else []
    row = next(iter(rows.values() if isinstance(rows, dict) else rows), None)
    return isinstance(row, dict) and bool({"tuple", "score", "total"} & row.keys())


def run(
    name: str,
    questions: str,
    answers: str | None = None,
    labels: str | None = None,
    reviews: Sequence[str] = (),
) -> int:
    """What `vflan score` does; returns the exit status.

    The result is printed as one json object, notes go to stderr.
    """
    try:
        (name,) = BENCHMARKS.names(name)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            result, problems = score_files(name, questions, answers, labels, reviews)
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        return stop(str(error))
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        return stop(
            f"A file of {name} is not in a known shape ({type(error).__name__}: {error}); "
            "data/README.md lists the released files."
        )
    for warning in caught:
        print(f"note: {warning.message}", file=sys.stderr)
    for problem, ids in problems.items():
        if ids:
            first_ids = ", ".join(map(str, ids[:20])) + " ..." * (len(ids) > 20)
            print(f"{len(ids)} {problem}: {first_ids}", file=sys.stderr)
    print(json.dumps(result, ensure_ascii=False))
    return 0


def stop(sentence: str) -> int:
    """Print an error on stderr; returns the exit status 1."""
    print(" ".join(sentence.split()), file=sys.stderr)
    return 1
