"""vflan score NAME --questions FILE [--labels FILE_OR_FOLDER] --answers FILE [--reviews FILE ...]

Scores a file of answers, from any model, with the files that the benchmark's authors and LLaVA released.
Prints one json object: the metrics in percent (MME's points on their own scale), `n` questions scored, and `problems`:
how many answers are missing, belong to no question (unknown), are there twice (duplicate) or empty, how many labels are
not known, how many lines are not json. Their ids are listed on stderr.
"""

import json
import sys
import warnings
import zipfile
from pathlib import Path

import numpy as np

from vflan.evaluation.benchmarks import BENCHMARKS
from vflan.evaluation.benchmarks.benchmark import in_words, valid
from vflan.evaluation.benchmarks.files import match, name_picture, read_answers, read_rows

COUNTED = ("missing", "unknown", "duplicate", "empty", "unknown_label", "unreadable_line")
MORE_NAMES = {"accuracy_plus": "acc_plus"}


def score_files(name, questions, answers=None, labels=None, reviews=()):
    """(dict of metrics with `n` and `problems`, {problem: [which]})."""
    benchmark = BENCHMARKS[name]
    samples = benchmark.questions(questions, labels, keep=name_picture)
    found = {trouble: [] for trouble in COUNTED}
    said = None
    if answers and benchmark.reviews and not reviews and is_review(answers):
        answers, reviews = None, (answers,)
    if answers:
        with in_words(Path(answers), name):
            rows, found["unreadable_line"] = read_answers(answers)
        said, troubles = match(samples, rows)
        found |= troubles
    elif not reviews:
        raise ValueError(f"{name} needs --answers{' or --reviews' if benchmark.reviews else ''}.")
    if reviews and not benchmark.reviews:
        raise ValueError(f"{name} has no judge: leave --reviews out.")
    found |= benchmark.problems(samples, said)
    if said and not any(a is not None for a in said):
        raise ValueError(f"{answers} answers none of the {len(samples)} questions of {questions}.")
    runs = [scored(benchmark, samples, said, file) for file in reviews] or [
        scored(benchmark, samples, said)
    ]
    out = {key: float(np.mean([r[key] for r in runs])) if isinstance(value, float) else value
           for key, value in runs[0].items() if all(key in r for r in runs)}  # fmt: skip
    if not out.get("n", 1):
        raise ValueError(f"None of the {len(samples)} questions of {questions} can be scored: give their labels with --labels"
                         f" ({benchmark.source}).")  # fmt: skip
    if len(runs) > 1 and benchmark.headline in out:
        out["runs"] = [r[benchmark.headline] for r in runs]
    failed = [r.pop("failed_judgement", 0) for r in runs]
    out.pop("failed_judgement", None)
    counts = {trouble: len(ids) for trouble, ids in found.items() if ids or trouble in COUNTED}
    return out | {
        "problems": counts | ({"failed_judgement": sum(failed)} if reviews else {})
    }, found


def scored(benchmark, samples, said, reviews=None):
    """The metrics of one set of answers and, where there are reviews, of one file of them."""
    judgements = benchmark.reviews(reviews, samples) if reviews else None
    if isinstance(judgements, dict):
        return judgements  # a table of results: nothing is left to compute
    answers = said or [""] * len(samples)
    metrics = benchmark.items(samples, answers, judgements)
    if judgements and not said:  # reviews alone say nothing about how the answers are written
        metrics = {k: m for k, m in metrics.items() if k not in ("format", "words", "rule")}
    out = {}
    for name, metric in metrics.items():
        head, *tail = name.split("/")
        for key in dict.fromkeys((head, MORE_NAMES.get(head, head))):
            out["_".join((key, *tail))] = metric.value()
    out["n"] = sum(benchmark.known(s) and (a is not None or benchmark.missing == "wrong")
                   for s, a in zip(samples, answers))  # fmt: skip
    if judgements:
        out["n"], out["failed_judgement"] = (
            sum(map(valid, judgements)),
            sum(not valid(j) for j in judgements),
        )
    return out


def is_review(path):
    """Whether a file holds a judge's verdicts and not answers."""
    rows = read_rows(path) if Path(path).is_file() else []
    row = next(iter(rows.values() if isinstance(rows, dict) else rows), None)
    return isinstance(row, dict) and bool({"tuple", "score", "total"} & row.keys())


def run(name, questions, answers=None, labels=None, reviews=()):
    """What `vflan score` does: print the result as one json object, remarks on stderr; returns the exit status."""
    try:
        (name,) = BENCHMARKS.names(name)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            result, found = score_files(name, questions, answers, labels, reviews)
    except (OSError, ValueError, zipfile.BadZipFile) as trouble:
        return stop(str(trouble))
    except (KeyError, TypeError, AttributeError, IndexError) as trouble:
        return stop(f"A file of {name} is not in a shape that is known ({type(trouble).__name__}: {trouble}); "
                    "data/README.md lists the released files.")  # fmt: skip
    for warning in caught:
        print(f"note: {warning.message}", file=sys.stderr)
    for trouble, ids in found.items():
        if ids:
            print(
                f"{len(ids)} {trouble}: {', '.join(map(str, ids[:20]))}{' ...' * (len(ids) > 20)}",
                file=sys.stderr,
            )
    print(json.dumps(result, ensure_ascii=False))
    return 0


def stop(sentence):
    print(" ".join(sentence.split()), file=sys.stderr)
    return 1
