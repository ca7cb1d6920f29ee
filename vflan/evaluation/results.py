"""Results from cached answers: metrics, single answers, tasks, differences of runs, upload files.

No model is loaded here, and no question is asked again.
"""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING

import pandas as pd

from vflan.config import resolve, shown
from vflan.evaluation.answer_cache import is_about, read_kept
from vflan.evaluation.benchmarks import BENCHMARKS
from vflan.evaluation.benchmarks.benchmark import labelled, valid
from vflan.evaluation.benchmarks.files import find
from vflan.evaluation.evaluator import load_benchmark, open_run, score_interval, why_failed
from vflan.evaluation.released_model import ReleasedModel
from vflan.evaluation.stats import paired

if TYPE_CHECKING:
    from vflan.evaluation.benchmarks.benchmark import Benchmark, Metric
    from vflan.evaluation.evaluator import AnyRun, Folder, Judges


def kept_items(
    run: AnyRun,
    benchmark: str,
    folder: Folder = None,
    name: str | None = None,
    judge: Judges = None,
) -> tuple[dict[str, Metric], dict[str, float]]:
    """({metric: Metric}, {metric: baseline}) from cached answers; no model is loaded or asked.

    FileNotFoundError if the evaluation is not finished.
    """
    test, texts = _read_answers(run, benchmark, folder, name, judge)
    return test.measure(texts)[0], test.baseline


def _read_answers(run, benchmark, folder, name, judge):
    """(LoadedBenchmark, the text of each answer)."""
    run = open_run(run)
    test = load_benchmark(benchmark, resolve(folder or run.recipe.benchmarks), judge)
    return test, _read_texts(run, benchmark, test.samples, name)


def _read_texts(run, benchmark, samples, name=None, complete=True) -> list[str | None]:
    """The texts of all cached answers, None where nobody answered.

    FileNotFoundError if there are fewer than samples, unless they need not be `complete`;
    ValueError if they are answers to other questions.
    """
    path = Path(run.folder) / "answers" / (name or "") / f"{benchmark}.jsonl"
    # A question that was asked again has two rows; the last counts.
    rows = {row["i"]: row for row in read_kept(path)[1]}
    questions = [{"text": BENCHMARKS[benchmark].prompt(sample)} for sample in samples]
    if not all(is_about(row, samples, questions) for row in rows.values()):
        raise ValueError(
            f"{shown(path)} answers other questions than these: give the folder of the benchmarks "
            "from which they were asked."
        )
    if complete and (missing := len(samples) - len(rows)):
        raise FileNotFoundError(
            f"{shown(path)} lacks {missing} answers: vflan.evaluate asks the questions."
        )
    given = (rows.get(i, {"finish": "error"}) for i in range(len(samples)))
    return [None if row["finish"] == "error" else row["answer"] for row in given]


def write_upload(
    benchmark: str,
    run: AnyRun,
    folder: Folder = None,
    out: Folder = None,
    all_questions: Folder = None,
    allow_missing: bool = False,
    name: str | None = None,
) -> Path:
    """Writes cached answers in the form that a benchmark's server takes; returns the file.

    For MME the result is a folder. folder: of the benchmarks (default: the recipe's). out: the file
    to write, or a folder for it. all_questions: the file of all of VQAv2's test2015 (default:
    beside the questions); ids that were not asked are uploaded as ''. A question without an answer,
    because it was not asked or failed, is a FileNotFoundError; with allow_missing it is uploaded as
    ''. name: of another model, as in `evaluate`. ValueError for a benchmark without such a file.
    """
    if benchmark not in BENCHMARKS or not BENCHMARKS[benchmark].upload:
        known = ", ".join(name for name, b in BENCHMARKS.items() if b.upload)
        raise ValueError(f"There is no upload file for {benchmark!r}; there is one for {known}.")
    # The server scores the answers, so that even MM-Vet needs no judge here.
    test, run = BENCHMARKS[benchmark], _open_answers(run)
    if not (folder or run.recipe):
        raise ValueError(f"{run.folder} is no run of ours: give --folder, that of the benchmarks.")
    folder = resolve(folder or run.recipe.benchmarks)
    with warnings.catch_warnings():
        # The labels of a test set are on the server.
        warnings.filterwarnings("ignore", message=".*no usable label")
        samples = test.load(folder)
    texts = _read_texts(run, benchmark, samples, name, complete=not allow_missing)
    failed = texts.count(None)
    if failed == len(texts) or (failed and not allow_missing):
        raise FileNotFoundError(
            f"{benchmark}: {failed} of {len(texts)} questions have no answer: vflan.evaluate asks "
            "them again. What cannot be answered is uploaded as '' with --allow-missing."
        )
    more = {}
    if every := _all_questions(test, folder / benchmark, samples, all_questions):
        more = {"every": every}
    usual = test.upload_name or f"{benchmark}_upload.json"
    path = Path(out or Path(run.folder) / "answers" / (name or "") / usual)
    if path.is_dir() and Path(usual).suffix:
        path = path / usual
    path.parent.mkdir(parents=True, exist_ok=True)
    test.upload(samples, texts, path, **more)
    return path


def _open_answers(run: AnyRun):
    """A run, or what has its `folder`: the answers of a served or a released model.

    Such a model is not opened: its weights would be looked for, or downloaded.
    """
    if not isinstance(run, (str, os.PathLike)) or (resolve(run) / "recipe.json").is_file():
        return open_run(run)
    for folder in (resolve(run), ReleasedModel(str(run)).folder):
        if (folder / "answers").is_dir():
            return SimpleNamespace(folder=folder, recipe=None)
    raise FileNotFoundError(f"{run} holds no answers: vflan.evaluate asks the questions.")


def _all_questions(test: Benchmark, here: Path, samples: list[dict], given: Folder) -> Path | None:
    """The file of all questions that the server wants an answer to; None if `samples` are all.

    FileNotFoundError if it is needed and not there: the server refuses a part of its test set.
    """
    if given and not test.upload_all:
        raise ValueError(f"{test.name} has no further questions: leave --all-questions out.")
    # Questions of the mini world, or with labels, are scored here.
    if given or not test.upload_all or any(labelled(sample) for sample in samples):
        return Path(given) if given else None
    if found := find(here, *test.upload_all):
        return found
    raise FileNotFoundError(
        f"{shown(here / test.upload_all[0])} is not there: the server wants an answer to each "
        "question of its whole test set. Put the file there, or name it with --all-questions."
    )


def judged_answers(
    run: AnyRun,
    benchmark: str,
    folder: Folder = None,
    name: str | None = None,
    judge: Judges = None,
) -> list[dict]:
    """The questions of a benchmark, each with the cached `answer`, `right` and `reason`.

    right: whether the answer scores half of the points or more, by the judge or by the benchmark's
    own rule; each question counts by itself, without its rotations or its pair. None if the judge
    failed, or if the question has no label. reason: the judge's. No model is asked again.
    """
    test, texts = _read_answers(run, benchmark, folder, name, judge)
    rows = []
    judgements = test.measure(texts)[1] if test.judge else {}
    for i, (sample, text) in enumerate(zip(test.samples, texts)):
        judgement = judgements.get(i)
        if text is None:
            right, reason = None, "no answer"
        elif judgement is None:
            right, reason = _is_right(test.benchmark, sample, text), ""
        elif reason := why_failed(judgement):
            right = None
        else:
            right = 2 * judgement.score >= judgement.out_of
            reason = f"{judgement.score:g} of {judgement.out_of:g}: {judgement.reason}"
        row = dict(benchmark=benchmark, answer=text, right=right, reason=reason)
        rows.append(sample | row)
    return rows


def _is_right(benchmark, sample, text) -> bool | None:
    if not (labelled(sample) and benchmark.known(sample)):
        return None
    items = benchmark.items([sample], [text])
    metric = items.get("accuracy") or items.get(benchmark.headline)
    # A benchmark that scores pairs has no metric for a single question.
    if metric is None:
        return benchmark.parse(text, sample) == benchmark.parse(str(sample["label"]), sample)
    return metric.value() >= 50


def per_task(
    run: AnyRun,
    benchmark: str = "heldout",
    metric: str | None = None,
    folder: Folder = None,
    name: str | None = None,
) -> pd.DataFrame:
    """One row for each task (category) of a benchmark: task, value, low, high, n, baseline.

    For held-out tasks and for forgetting. metric: default is the benchmark's headline.
    """
    metric = metric or BENCHMARKS[benchmark].headline
    items, baseline = kept_items(run, benchmark, folder, name)
    # A benchmark with one category has no metric for each of them.
    tasks = {key: m for key, m in items.items() if key.startswith(f"{metric}/")}
    tasks = tasks or {metric: items[metric]}
    rows = [
        [key.removeprefix(f"{metric}/"), *score_interval(m), baseline.get(key, float("nan"))]
        for key, m in tasks.items()
    ]
    return pd.DataFrame(rows, columns="task value low high n baseline".split())


def difference(
    run: AnyRun, other: AnyRun, benchmark: str, folder: Folder = None, judge: Judges = None
) -> pd.DataFrame:
    """Two runs on the same questions: benchmark, metric, difference, low, high, p, n.

    The difference is the value of `run` minus that of `other`. The interval resamples pictures for
    both at once; p is a permutation test that swaps the two runs picture by picture.
    """
    (test, texts), (other_test, other_texts) = (
        _read_answers(r, benchmark, folder, None, judge) for r in (run, other)
    )
    # A question that either run left without an answer counts for neither.
    pairs = [(a, b) if None not in (a, b) else (None, None) for a, b in zip(texts, other_texts)]
    mine, judged = test.measure([a for a, _ in pairs])
    theirs, other_judged = other_test.measure([b for _, b in pairs])
    both = [*judged.items(), *other_judged.items()]
    failed = {i for i, judgement in both if not valid(judgement)}
    # Neither does one that either judge failed on: the means leave it out, and the rest are pairs.
    if failed and not test.rules_come_first:
        pairs = [(None, None) if i in failed else pair for i, pair in enumerate(pairs)]
        mine, _ = test.measure([a for a, _ in pairs], judged)
        theirs, _ = other_test.measure([b for _, b in pairs], other_judged)
    rows = []
    for key, a in mine.items():
        # The same pictures are drawn for both runs, so what is hard for both cancels.
        b, both = theirs[key], dict(clusters=a.cluster, groups=a.group)
        result = paired(100 * a.num, 100 * b.num, den=(a.den, b.den), **both)
        rows.append([benchmark, key, *result, len(a.num)])
    return pd.DataFrame(rows, columns="benchmark metric difference low high p n".split())
