"""Results from cached answers: metrics, single answers, tasks, differences of runs, upload files.

No model is loaded here, and no question is asked again.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd

from vflan.config import resolve, shown
from vflan.evaluation.answer_cache import read_rows
from vflan.evaluation.benchmarks import BENCHMARKS
from vflan.evaluation.evaluator import load_benchmark, open_run, score_interval
from vflan.evaluation.stats import paired

if TYPE_CHECKING:
    from vflan.evaluation.benchmarks.benchmark import Metric
    from vflan.evaluation.evaluator import AnyRun, Folder, Judges

UPLOAD_ENDINGS = {"mme": "", "mmbench": ".xlsx", "mmbench_cn": ".xlsx", "seed": ".jsonl"}


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
    return test, _read_texts(run, benchmark, len(test.samples), name)


def _read_texts(run, benchmark, number, name=None) -> list[str | None]:
    """The texts of all cached answers, None where nobody answered.

    FileNotFoundError if there are fewer than `number`.
    """
    path = Path(run.folder) / "answers" / (name or "") / f"{benchmark}.jsonl"
    # The first row is the header. A question that was asked again has two rows; the last counts.
    texts = {
        row["i"]: None if row["finish"] == "error" else row["answer"] for row in read_rows(path)[1:]
    }
    if missing := number - len(texts):
        raise FileNotFoundError(
            f"{shown(path)} lacks {missing} answers: vflan.evaluate asks the questions."
        )
    return [texts[i] for i in range(number)]


def write_upload(benchmark: str, run: AnyRun, folder: Folder = None, out: Folder = None) -> Path:
    """Writes cached answers in the form that a benchmark's server takes; returns the file.

    For MME the result is a folder. folder: of the benchmarks (default: the recipe's). ValueError
    for a benchmark without such a file, FileNotFoundError if an answer is missing.
    """
    if benchmark not in BENCHMARKS or not BENCHMARKS[benchmark].upload:
        known = ", ".join(name for name, b in BENCHMARKS.items() if b.upload)
        raise ValueError(f"There is no upload file for {benchmark!r}; there is one for {known}.")
    # The server scores the answers, so that even MM-Vet needs no judge here.
    run = open_run(run)
    samples = BENCHMARKS[benchmark].load(resolve(folder or run.recipe.benchmarks))
    texts = _read_texts(run, benchmark, len(samples))
    if failed := texts.count(None):
        raise FileNotFoundError(
            f"{benchmark}: {failed} questions have no answer: vflan.evaluate asks them again."
        )
    ending = UPLOAD_ENDINGS.get(benchmark, ".json")
    path = Path(out or Path(run.folder) / "answers" / f"{benchmark}_upload{ending}")
    BENCHMARKS[benchmark].upload(samples, texts, path)
    return path


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
    failed. reason: the judge's. No model is asked again.
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
        elif judgement.score is None:
            right, reason = None, judgement.reason
        else:
            right = 2 * judgement.score >= judgement.out_of
            reason = f"{judgement.score:g} of {judgement.out_of:g}: {judgement.reason}"
        row = dict(benchmark=benchmark, answer=text, right=right, reason=reason)
        rows.append(sample | row)
    return rows


def _is_right(benchmark, sample, text) -> bool:
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
    mine, _ = test.measure([a for a, _ in pairs])
    theirs, _ = other_test.measure([b for _, b in pairs])
    rows = []
    for key, a in mine.items():
        # The same pictures are drawn for both runs, so what is hard for both cancels.
        b, both = theirs[key], dict(clusters=a.cluster, groups=a.group)
        result = paired(100 * a.num, 100 * b.num, den=(a.den, b.den), **both)
        rows.append([benchmark, key, *result, len(a.num)])
    return pd.DataFrame(rows, columns="benchmark metric difference low high p n".split())
