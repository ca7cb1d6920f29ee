"""The benchmarks of a run: who answers, what is kept, how it is scored and judged; and two runs on the same questions."""

import os
import re
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import pandas as pd

from vflan.config import folder_name, output_path, resolve, shown
from vflan.data.images import stamp
from vflan.evaluation import judge as judges
from vflan.evaluation.answer_cache import (
    ask_and_keep,
    hash_weights,
    hash_questions,
    keep_scores,
    read_rows,
)
from vflan.evaluation.benchmarks import BENCHMARKS
from vflan.evaluation.benchmarks.benchmark import Benchmark
from vflan.evaluation.generation import answering, fingerprint_of_model
from vflan.evaluation.parallel import working
from vflan.evaluation.served_model import ServedModel
from vflan.evaluation.stats import bootstrap, paired
from vflan.training.run import Run

COLUMNS = "run benchmark metric value low high n seed baseline judge problems".split()
YES_NO = ("yes", "Yes", "no", "No")
LETTERS = tuple("ABCDEFGHabcdefgh")
CHOICES = {"pope": YES_NO, "mme": YES_NO} | {
    name: LETTERS for name in ("mmbench", "mmbench_cn", "seed", "scienceqa", "mmmu")
}


def evaluate(run, benchmarks=None, folder=None, batch_size=64, model=None, name=None, template="vicuna_v1",
             one_pass=False, num_processes=1, judge=None, memory=None):  # fmt: skip
    """Scores of a run as a DataFrame: run, benchmark, metric, value, low, high, n, seed, baseline, judge, problems.

    run: a Run or its folder. benchmarks: names (default: all that `folder` holds). folder: the recipe's if not given.
    model, name: evaluate another model under another name, one with a swapped part for instance (Tables 6 and 7); or a
    ServedModel, with which run may be None (give folder; answers go to runs/served/NAME).
    one_pass: answer yes/no and letter questions from one forward pass, by the likeliest of the allowed words (True: the
    benchmarks of CHOICES; or {benchmark: words}). num_processes: how many load the model and share the questions.
    judge: for the benchmarks that need one, and {benchmark: judge} to choose for each (one that has its own rule is then
    judged instead); None: the rule judge of the mini world. memory: bytes that each process may take beside the weights
    (None: what is free); a batch is made smaller where `batch_size` questions do not fit.
    Answers are kept in <run>/answers/NAME.jsonl as they come: an interrupted evaluation goes on where it stopped, and a
    finished one is scored again without loading the model. Scores are kept in <run>/scores.csv.
    Values are on a scale of 0 to 100; low and high are a 95 % bootstrap over pictures; baseline is the majority
    answer's; problems counts questions without an answer and failed judgements, which are left out of the mean.
    """
    run = Run.open(run) if isinstance(run, (str, os.PathLike)) else run
    served = isinstance(model, ServedModel)
    name = name or (model.folder_name if served else None)
    for part in (
        name.split("/") if isinstance(name, str) else ()
    ):  # a sweep's names may have several
        folder_name(part)
    if (model is None) != (name is None):
        raise ValueError(
            "To evaluate a model of your own give both model= and name=: its answers are kept under that name."
        )
    if num_processes > 1 and model is not None:
        raise ValueError("num_processes=1, please: other processes cannot load a model that lives in this one."
                         if not served else "A served model is asked by one process: raise its `workers` instead.")  # fmt: skip
    if run is None and not (served and folder):
        raise ValueError(
            "Without a run give model=ServedModel(...) and folder=, the folder of the benchmarks."
        )
    folder = resolve(folder or run.recipe.benchmarks)
    home = Path(run.folder) if run else output_path(f"runs/served/{name}")
    tests = [questions_of(key, folder, judge, one_pass) for key in names_of(benchmarks, folder)]
    weights = model.fingerprint if served else fingerprint_of_model(model) if model else None
    weights = weights or hash_weights(home / "model")
    answers = []
    with asking(run, model, num_processes, batch_size, template, memory) as ask:
        for test in tests:
            tokens = test.benchmark.max_new_tokens
            header = {"model": weights, "questions": hash_questions(test.samples, test.asked),
                      "template": "the server's" if served else template, "decoding": test.decoding,
                      "max_new_tokens": tokens}  # fmt: skip
            path = (
                home / "answers" / (name if name and run else "") / f"{test.benchmark.name}.jsonl"
            )
            answers.append(
                ask_and_keep(
                    path,
                    header,
                    test.samples,
                    test.asked,
                    lambda todo, tokens=tokens: ask(todo, tokens),
                )
            )
    label, seed = name or run.recipe.name, run.recipe.seed if run else 0
    scores = [score_table(label, test, said, seed) for test, said in zip(tests, answers)]
    scores = pd.concat(scores, ignore_index=True)
    keep_scores(home / "scores.csv", scores)
    return scores


def names_of(benchmarks, folder):
    """The names of the benchmarks asked for (names, or .py files that define some), or of all that are there."""
    return BENCHMARKS.names(benchmarks or present(folder))


def present(folder):
    """The names of the benchmarks whose folder is there."""
    found = [name for name in BENCHMARKS if (Path(folder) / name).is_dir()]
    if not found:
        raise FileNotFoundError(
            f"No benchmark in {shown(Path(folder))} - run notebooks/01_data_exploration.ipynb, or give folder=."
        )
    return found


@dataclass(frozen=True)
class Questions:
    """A benchmark as it is asked and scored."""

    benchmark: Benchmark
    samples: list
    asked: list  # mappings with image, text and, for one pass, choices
    decoding: str
    judge: object  # None: the benchmark's own rule reads the answers
    blind: dict  # metric -> value of the majority answer


def questions_of(key, folder, judge=None, one_pass=False):
    """The Questions of a benchmark; a file or label that cannot be read and a missing judge show here, before asking."""
    benchmark = BENCHMARKS[key]
    samples = benchmark.load(folder)
    asked = [{"image": s["image"], "text": benchmark.prompt(s)} for s in samples]
    pictures = {a["image"] for a in asked} - {None}
    if pictures and not any(map(stamp, pictures)):
        raise FileNotFoundError(
            f"None of the {len(pictures)} pictures of {key} is there; the first: {min(pictures)}"
        )
    decoding = "greedy"
    if words := (CHOICES if one_pass is True else one_pass or {}).get(key):
        asked = [a | {"choices": allowed(words, a["text"])} for a in asked]
        decoding = "one pass: " + " ".join(words)
    judge = judge_of(benchmark, samples, folder, judge)
    return Questions(
        benchmark, samples, asked, decoding, judge, baseline(benchmark, samples, judge)
    )


def allowed(words, prompt):
    """The words that may answer a prompt: letters only if the prompt has an option of that name, as `A.` or `(a)`.

    A question without options has none and is answered in full.
    """
    named = [
        w for w in words if len(w) > 1 or re.search(rf"(?m)(?:^|\s)\(?{re.escape(w)}[.)]", prompt)
    ]
    return named if len(named) > 1 else []


@contextmanager
def asking(run, model, num_processes, batch_size, template, memory=None):
    """ask(questions, max_new_tokens) -> (index, Answer) as they come; whoever answers is loaded once, at the first call."""

    @cache
    def loaded():
        return run.load_model() if model is None else model, run.processor()

    if isinstance(model, ServedModel):
        yield model.answering
    elif num_processes > 1:
        with working(run, num_processes, batch_size, template, memory) as ask:
            yield ask
    else:
        yield lambda questions, tokens: answering(
            *loaded(), questions, tokens, batch_size, template, memory
        )
        loaded.cache_clear()  # a judge may need the memory


# ------------------------------------------------------------------------------------------------------ scores


def judge_of(benchmark, samples, folder, judge):
    """The judge of a benchmark with its prompt, or None where an answer is read by the benchmark's own rule."""
    chosen = (
        judge.get(benchmark.name)
        if isinstance(judge, dict)
        else judge
        if benchmark.judged
        else None
    )
    if chosen is not None:
        if without := [s["question_id"] for s in samples if s.get("label") is None]:
            raise ValueError(f"{benchmark.name}: {len(without)} questions have no reference to judge by (first: "
                             f"{without[0]}): the released reference answers belong beside the question file.")  # fmt: skip
        bare = getattr(chosen, "prompt", chosen) is None
        return replace(chosen, prompt=judges.prompt_for(benchmark.name, folder)) if bare else chosen
    if (
        not benchmark.judged or samples[0].get("judge") == "rule"
    ):  # the latter: a twin that brings its own rule
        return None
    if lexicon := samples[0].get("lexicon"):
        return judges.RuleJudge(lexicon)
    raise ValueError(
        f"{benchmark.name} needs a judge: give judge=EndpointJudge(...) or LocalJudge(...) of vflan.judge, or name the "
        "benchmarks without it."
    )


def baseline(benchmark, samples, judge):
    """{metric: value of the majority answer}; a judge who has to be asked is not bothered with it ({})."""
    if judge is None:
        return benchmark.baseline(samples)
    if not isinstance(judge, judges.RuleJudge):
        return {}
    blind = benchmark.blind(samples)
    return {
        key: m.value()
        for key, m in items_of(
            benchmark, samples, blind, judges.judge_all(judge, samples, blind)
        ).items()
    }


def items_of(benchmark, samples, texts, judgements):
    """{metric: Metric}; failed judgements weigh nothing. A benchmark with a rule of its own is judged right or wrong."""
    return benchmark.items(samples, texts, judgements)


def score_table(run, test, answers, seed=0):
    """One row a metric, with its interval, the majority baseline, who judged, and how many questions had no answer."""
    texts, failed = (
        [a.text for a in answers],
        [(i, a.reason) for i, a in enumerate(answers) if a.finish == "error"],
    )
    judgements, by = None, judges.RULES if test.benchmark.judged else ""
    if test.judge is not None:
        judgements = judges.judge_all(test.judge, test.samples, texts)
        failed += [(i, f"judge: {j.reason}") for i, j in enumerate(judgements) if j.score is None]
        by = judges.title(test.judge, judgements)
    if failed:
        i, why = failed[0]
        print(f"{run}, {test.benchmark.name}: {len(failed)} problems in {len(texts)} questions; the first, question "
              f"{test.samples[i]['question_id']}: {why}")  # fmt: skip
    rows = []
    for name, metric in items_of(test.benchmark, test.samples, texts, judgements).items():
        chance = test.blind.get(name, float("nan"))
        rows.append(
            [run, test.benchmark.name, name, *interval(metric), seed, chance, by, len(failed)]
        )
    return pd.DataFrame(rows, columns=COLUMNS)


def interval(metric):
    """(value, low, high, n) of a Metric."""
    found = bootstrap(100 * metric.num, metric.cluster, den=metric.den, groups=metric.group)
    return *found, int((metric.den > 0).sum())


# --------------------------------------------------------------------------------------- from the kept answers


def kept_items(run, benchmark, folder=None, name=None, judge=None):
    """{metric: Metric} of the answers that a finished evaluation kept; nothing is loaded and nobody is asked again."""
    test, texts = _kept_answers(run, benchmark, folder, name, judge)
    judgements = judges.judge_all(test.judge, test.samples, texts) if test.judge else None
    return items_of(test.benchmark, test.samples, texts, judgements), test.blind


def _kept_answers(run, benchmark, folder, name, judge):
    """(Questions, the answer to each)."""
    run = Run.open(run) if isinstance(run, (str, os.PathLike)) else run
    path = Path(run.folder) / "answers" / (name or "") / f"{benchmark}.jsonl"
    test = questions_of(benchmark, resolve(folder or run.recipe.benchmarks), judge)
    said = {row["i"]: row["answer"] for row in read_rows(path)[1:]}
    if missing := len(test.samples) - len(said):
        raise FileNotFoundError(
            f"{shown(path)} lacks {missing} answers: vflan.evaluate asks the questions."
        )
    return test, [said[i] for i in range(len(said))]


def write_upload(benchmark, run, folder=None, out=None):
    """Write the kept answers of a run in the form that a benchmark's server takes; returns the file (MME: the folder).

    folder: of the benchmarks (the recipe's). ValueError for a benchmark that takes no such file, FileNotFoundError where
    an answer is missing.
    """
    if benchmark not in BENCHMARKS or not BENCHMARKS[benchmark].upload:
        served = ", ".join(name for name, b in BENCHMARKS.items() if b.upload)
        raise ValueError(f"There is no upload file for {benchmark!r}; there is one for {served}.")
    run = Run.open(run) if isinstance(run, (str, os.PathLike)) else run
    test, texts = _kept_answers(run, benchmark, folder, None, None)
    ending = {"mme": "", "mmbench": ".xlsx", "mmbench_cn": ".xlsx", "seed": ".jsonl"}.get(
        benchmark, ".json"
    )
    path = Path(out or Path(run.folder) / "answers" / f"{benchmark}_upload{ending}")
    BENCHMARKS[benchmark].upload(test.samples, texts, path)
    return path


def judged_answers(run, benchmark, folder=None, name=None, judge=None):
    """The questions of a benchmark as list[dict], each with the kept `answer`, whether it is `right`, and the judge's `reason`.

    Right is what scores half of the points or more, of the judge's or of the benchmark's own rule, each question alone: its
    other rotations or its pair do not count here. None where the judge failed. Nobody is asked again.
    """
    test, texts = _kept_answers(run, benchmark, folder, name, judge)
    judgements = (
        judges.judge_all(test.judge, test.samples, texts) if test.judge else [None] * len(texts)
    )
    rows = []
    for sample, text, judgement in zip(test.samples, texts, judgements):
        if judgement is None:
            right, reason = _is_right(test.benchmark, sample, text), ""
        elif judgement.score is None:
            right, reason = None, judgement.reason
        else:
            right = 2 * judgement.score >= judgement.out_of
            reason = f"{judgement.score:g} of {judgement.out_of:g}: {judgement.reason}"
        rows.append(
            sample | {"benchmark": benchmark, "answer": text, "right": right, "reason": reason}
        )
    return rows


def _is_right(benchmark, sample, text):
    found = benchmark.items([sample], [text])
    metric = found.get("accuracy") or found.get(benchmark.headline)
    if metric is None:  # it scores pairs
        return benchmark.parse(text, sample) == benchmark.parse(str(sample["label"]), sample)
    return metric.value() >= 50


def per_task(run, benchmark="heldout", metric=None, folder=None, name=None):
    """One row a task (category) of a benchmark: task, value, low, high, n, baseline; for held-out tasks and forgetting."""
    metric = metric or BENCHMARKS[benchmark].headline
    items, blind = kept_items(run, benchmark, folder, name)
    tasks = {key: m for key, m in items.items() if key.startswith(f"{metric}/")} or {
        metric: items[metric]
    }
    rows = []
    for key, m in tasks.items():
        rows.append([key.removeprefix(f"{metric}/"), *interval(m), blind.get(key, float("nan"))])
    return pd.DataFrame(rows, columns=["task", "value", "low", "high", "n", "baseline"])


def difference(run, other, benchmark, folder=None, judge=None):
    """Two runs on the same questions, one row a metric: value of `run` minus that of `other`, its interval, p, n.

    The interval resamples pictures for both at once; p is a permutation test that swaps the two runs picture by picture.
    """
    (mine, _), (theirs, _) = (kept_items(r, benchmark, folder, judge=judge) for r in (run, other))
    rows = []
    for key, a in mine.items():
        b = theirs[key]
        found = paired(100 * a.num, 100 * b.num, a.cluster, groups=a.group, den=(a.den, b.den))
        rows.append([benchmark, key, *found, len(a.num)])
    return pd.DataFrame(
        rows, columns=["benchmark", "metric", "difference", "low", "high", "p", "n"]
    )
