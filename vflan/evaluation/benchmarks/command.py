"""vflan score NAME --questions FILE [--labels FILE_OR_FOLDER] --answers FILE [--reviews FILE ...]

Scores a file of answers, from any model, with the files that the benchmark's authors and LLaVA
released. Prints one json object: the metrics in percent (MME's points on their own scale), the
number `n` of questions scored, and `problems`: how many answers are missing, belong to no question
(unknown), occur twice (duplicate) or are empty, how many labels are unknown, and how many lines are
no json. Their ids are listed on stderr. Of several runs of a judge, in one file or several, the
mean is printed, with `runs` and their standard deviation `std`.
"""

from __future__ import annotations

import json
import sys
import warnings
import zipfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from vflan.escape import for_terminal
from vflan.evaluation.benchmarks import BENCHMARKS
from vflan.evaluation.benchmarks.benchmark import Benchmark, in_words, labelled, valid
from vflan.evaluation.benchmarks.files import (
    UnreadableFile,
    match,
    name_picture,
    read_answers,
    read_rows,
)

COUNTED = ("missing", "unknown", "duplicate", "empty", "unknown_label", "unreadable_line")
MORE_NAMES = {"accuracy_plus": "acc_plus"}


def score_files(
    name: str,
    questions: str,
    answers: str | None = None,
    labels: str | None = None,
    reviews: Sequence[str] = (),
    model: str | None = None,
) -> tuple[dict, dict[str, list]]:
    """(metrics with `n` and `problems`, {problem: [question ids or line numbers]}).

    model: the row of a table of results. A result without any metric is an error, never an empty
    success: the sentence says which file is missing.
    """
    benchmark = BENCHMARKS[name]
    samples = benchmark.questions(questions, labels, keep=name_picture)
    problems = {problem: [] for problem in COUNTED}
    texts, count = None, f"None of the {len(samples)} questions of {questions}"
    if answers and benchmark.reviews and not reviews and is_review(answers):
        answers, reviews = None, (answers,)
    _check_options(benchmark, answers, reviews, model)
    if answers:
        with in_words(Path(answers), name):
            rows, problems["unreadable_line"] = read_answers(answers)
        texts, mismatches = match(samples, rows)
        problems |= mismatches
        if not any(text is not None for text in texts):
            raise ValueError(
                f"{answers} answers none of the {len(samples)} questions of {questions}."
            )
    if labels and not any(map(labelled, samples)):
        raise ValueError(f"{count} has a label in {labels} ({benchmark.source}).")
    problems |= benchmark.problems(samples, texts)
    runs = _runs(benchmark, samples, texts, reviews, model)
    failed = [r.pop("failed_judgement", 0) for r in runs]
    out = _mean(runs, benchmark.headline)
    if not out.get("n", 1) or not any(isinstance(value, float) for value in out.values()):
        if reviews:
            raise ValueError(f"{count} has a verdict in {', '.join(map(str, reviews))}.")
        if out.get("n") and any(map(labelled, samples)):
            raise ValueError(f"{count} can be scored: too few are answered for any metric.")
        raise ValueError(
            f"{count} can be scored: give their labels with --labels ({benchmark.source})."
        )
    _say_what_is_missing(benchmark, out)
    counts = {problem: len(ids) for problem, ids in problems.items() if ids or problem in COUNTED}
    judged = {"failed_judgement": sum(failed)} if reviews else {}
    return out | {"problems": counts | judged}, problems


def _check_options(benchmark: Benchmark, answers, reviews, model) -> None:
    """ValueError for options that do not fit the benchmark, or each other."""
    if reviews and not benchmark.reviews:
        raise ValueError(f"{benchmark.name} has no judge: leave --reviews out.")
    if not answers and not reviews:
        either = " or --reviews" if benchmark.reviews else ""
        raise ValueError(f"{benchmark.name} needs --answers{either}.")
    if model and not reviews:
        raise ValueError("--model names a row of a table of results: give the table as --reviews.")


def _runs(benchmark: Benchmark, samples, texts, reviews, model) -> list[dict]:
    """The metrics of each run of the judge in each file of reviews; without files, of one run."""
    if not reviews:
        return [scored(benchmark, samples, texts)]
    runs = []
    for file in reviews:
        with in_words(Path(file), benchmark.name):
            found = benchmark.reviews(Path(file), samples, model)
        # A table of results: nothing is left to compute.
        tables = [found] if isinstance(found, dict) else []
        runs += tables or [scored(benchmark, samples, texts, verdicts) for verdicts in found]
    return runs


def _mean(runs: list[dict], headline: str) -> dict:
    """The mean of each metric over the runs of a judge.

    Of several runs also `runs`, the headline of each, and `std`, their standard deviation as
    MM-Vet's authors compute it.
    """
    out = {
        key: float(np.mean([r[key] for r in runs])) if isinstance(value, float) else value
        for key, value in runs[0].items()
        if all(key in r for r in runs)
    }
    if len(runs) > 1 and headline in out:
        out["runs"] = [r[headline] for r in runs]
        out["std"] = float(np.std(out["runs"]))
    return out


def _say_what_is_missing(benchmark: Benchmark, out: dict) -> None:
    """Warn if the published metric is not among the results."""
    if benchmark.headline in out:
        return
    if benchmark.judged:
        source = "it comes from a judge: give its verdicts with --reviews"
    elif benchmark.upload:
        source = "without labels only the server can score it (vflan upload writes its file)"
    else:
        source = "no question that it counts can be scored"
    warnings.warn(f"There is no `{benchmark.headline}`: {source}.", stacklevel=2)


def scored(
    benchmark: Benchmark,
    samples: list[dict],
    texts: list[str | None] | None,
    judgements: list | None = None,
) -> dict:
    """The metrics of one set of answers and, where there are judgements, of one run of a judge."""
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
    try:
        rows = read_rows(path) if Path(path).is_file() else []
    except UnreadableFile:
        return False  # a line of answers may be damaged; `read_answers` counts it
    row = next(iter(rows.values() if isinstance(rows, dict) else rows), None)
    return isinstance(row, dict) and bool({"tuple", "score", "total"} & row.keys())


def run(
    name: str,
    questions: str,
    answers: str | None = None,
    labels: str | None = None,
    reviews: Sequence[str] = (),
    model: str | None = None,
) -> int:
    """What `vflan score` does; returns the exit status.

    The result is printed as one json object, notes go to stderr.
    """
    try:
        (name,) = BENCHMARKS.names(name)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            result, problems = score_files(name, questions, answers, labels, reviews, model)
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        return stop(str(error))
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        return stop(
            f"A file of {name} is not in a known shape ({type(error).__name__}: {error}); "
            "data/README.md lists the released files."
        )
    for warning in caught:
        print(f"note: {for_terminal(warning.message)}", file=sys.stderr)
    for problem, ids in problems.items():
        if ids:
            first_ids = ", ".join(map(str, ids[:20])) + " ..." * (len(ids) > 20)
            print(f"{len(ids)} {problem}: {for_terminal(first_ids)}", file=sys.stderr)
    print(json.dumps(result, ensure_ascii=False))
    return 0


def stop(sentence: str) -> int:
    """Print an error on stderr; returns the exit status 1."""
    print(for_terminal(" ".join(sentence.split())), file=sys.stderr)
    return 1
