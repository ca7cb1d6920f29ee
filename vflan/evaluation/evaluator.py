"""evaluate(): asks a run the questions of benchmarks, caches the answers, judges and scores them.

results.py reads the cached answers again: for single tasks, or to compare two runs.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
import torch

from vflan.config import folder_name, output_path, resolve, shown
from vflan.data.images import stamp
from vflan.escape import for_terminal
from vflan.evaluation.answer_cache import (
    Answer,
    ask_and_keep,
    hash_model,
    hash_questions,
    hash_weights,
    keep_scores,
)
from vflan.evaluation.benchmarks import BENCHMARKS
from vflan.evaluation.benchmarks.benchmark import Benchmark, Metric, out_of, valid
from vflan.evaluation.generation import answering
from vflan.evaluation.stats import bootstrap
from vflan.training.distributed import check_cores, check_count
from vflan.training.run import Run

if TYPE_CHECKING:
    from vflan.evaluation.judge import Judge, Judgement
    from vflan.evaluation.released_model import ReleasedModel

    AnyRun = Run | str | os.PathLike
    Folder = str | os.PathLike | None
    Judges = Judge | dict[str, Judge] | None

COLUMNS = "run benchmark metric value low high n seed baseline judge problems".split()
# `plain` has no place for a question.
TEMPLATES = ("vicuna_v1", "own")
YES_NO = ("yes", "Yes", "no", "No")
LETTERS = tuple("ABCDEFGHabcdefgh")
LETTER_BENCHMARKS = ("mmbench", "mmbench_cn", "seed", "scienceqa", "mmmu")
CHOICES = {"pope": YES_NO, "mme": YES_NO} | dict.fromkeys(LETTER_BENCHMARKS, LETTERS)
OPTION = r"(?m)(?:^|\s)\(?{}[.)]"  # how an option of that letter begins


def evaluate(
    run: AnyRun | None,
    benchmarks: str | Sequence[str] | None = None,
    folder: Folder = None,
    batch_size: int = 64,
    model: Any = None,
    name: str | None = None,
    template: str | None = None,
    one_pass: bool | dict[str, Sequence[str]] = False,
    num_processes: int = 1,
    judge: Judges = None,
    memory: float | None = None,
) -> pd.DataFrame:
    """Scores of a run, a table of COLUMNS with one row for each metric.

    Values are from 0 to 100; low and high are a 95 % bootstrap over pictures; baseline is the
    majority answer's value. problems counts questions without an answer and failed judgements,
    which the mean leaves out; ValueError if nothing else is left. Answers are cached in
    <run>/answers/NAME.jsonl: an interrupted evaluation continues, and a finished one is scored
    again without loading the model. Scores are added to <run>/scores.csv.

    run: a Run or its folder; or any LLaVA-1.5, as a Hugging Face folder, a folder in LLaVA's own
    layout or a hub id ("llava-hf/llava-1.5-7b-hf"), with the processor that comes with it.
    template: `vicuna_v1`, or `own`, the model's chat template (None: `own` if that is not
    Vicuna's). benchmarks: names or .py files (default: all that `folder` holds). folder: of the
    benchmarks (default: the recipe's). model, name: evaluate another model under its own name, one
    with a swapped part for instance (Tables 6 and 7); or a ServedModel, for which run may be None
    (then give folder; answers go to runs/served/NAME). one_pass: answer yes/no and letter questions
    from one forward pass, by the likeliest of the allowed words (True: the benchmarks of CHOICES;
    or {benchmark: words}). num_processes: each loads the model, and they share the questions.
    judge: one for all benchmarks that need it, or {benchmark: judge}; None: the rule judge of the
    mini world. memory: bytes that each process may take beside the weights (None: what is free);
    a batch is made smaller if `batch_size` questions do not fit.
    """
    run, served = open_run(run), hasattr(model, "answering")
    template = template or getattr(run, "template", "vicuna_v1")
    if template not in TEMPLATES:
        known = " or ".join(TEMPLATES)
        raise ValueError(f"{template!r} is no template for questions: take {known}.")
    if served and one_pass:
        raise ValueError("A served model answers in full: leave one_pass out.")
    name = _check_name(run, model, name, folder, num_processes)
    # Everything is read and checked before the model is loaded.
    folder = resolve(folder or run.recipe.benchmarks)
    home = Path(run.folder) if run else output_path(f"runs/served/{name}")
    tests = [load_benchmark(key, folder, judge, one_pass) for key in names_of(benchmarks, folder)]
    weights = model.fingerprint if served else hash_model(model) if model else None
    shared = dict(model=weights or hash_weights(getattr(run, "weights", home / "model")))
    shared |= dict(template="the server's" if served else template)
    answer_folder = home / "answers" / (name if name and run else "")
    with asking(run, model, num_processes, (batch_size, template, memory)) as ask:
        replies = [test.ask(answer_folder, ask, **shared) for test in tests]
    # Scoring comes after all asking, so that a local judge has the memory for itself.
    label, seed = name or run.recipe.name, run.recipe.seed if run else 0
    return _score_all(label, seed, tests, replies, home / "scores.csv")


def _score_all(label, seed, tests, replies, path) -> pd.DataFrame:
    """The scores of all benchmarks, added to the file at `path`."""
    tables, errors = [], []
    for test, answers in zip(tests, replies):
        try:
            tables.append(score_answers(label, test, answers, seed))
        except ValueError as error:
            errors.append(error)
    # The scores of the other benchmarks are kept before the first error is raised.
    scores = pd.concat(tables, ignore_index=True) if tables else pd.DataFrame(columns=COLUMNS)
    if tables:
        keep_scores(path, scores)
    if errors:
        raise errors[0]
    return scores


def open_run(run: AnyRun | None) -> Run | ReleasedModel | None:
    """The run in a folder, or the model of others there; a Run stays as it is."""
    if not isinstance(run, (str, os.PathLike)):
        return run
    if (resolve(run) / "recipe.json").is_file():
        return Run.open(run)
    from vflan.evaluation.released_model import ReleasedModel

    model = ReleasedModel(str(run))
    # Names the folder, and says what is missing there, before anything is read.
    model.weights  # noqa: B018
    return model


def _check_name(run, model, name, folder, num_processes) -> str | None:
    """The name for the answers of a given model; ValueError for arguments that do not fit."""
    served = hasattr(model, "answering")
    check_count(num_processes)
    if num_processes > 1 and not torch.cuda.is_available():
        check_cores(num_processes)
    name = name or (model.folder_name if served else None)
    # The name becomes a folder; that of a sweep's arm may have several parts.
    for part in name.split("/") if isinstance(name, str) else ():
        folder_name(part)
    if (model is None) != (name is None):
        raise ValueError(
            "To evaluate a model of your own give both model= and name=: its answers are cached "
            "under that name."
        )
    if num_processes > 1 and served:
        raise ValueError("A served model is asked by one process: raise its `workers` instead.")
    if num_processes > 1 and model is not None:
        raise ValueError(
            "Set num_processes=1: other processes cannot load a model that is in memory here."
        )
    if run is None and not (served and folder):
        raise ValueError(
            "Without a run give model=ServedModel(...) and folder=, the folder of the benchmarks."
        )
    return name


def names_of(benchmarks: str | Sequence[str] | None, folder: Path) -> list[str]:
    """Names from names and .py files of benchmarks (which are registered); None: all present."""
    if not benchmarks:
        return present(folder)
    return BENCHMARKS.names(benchmarks)


def present(folder: str | os.PathLike) -> list[str]:
    """The names of the benchmarks whose folder exists; FileNotFoundError if there is none."""
    names = [name for name in BENCHMARKS if (Path(folder) / name).is_dir()]
    if not names:
        raise FileNotFoundError(
            f"No benchmark in {shown(Path(folder))} - run notebooks/01_data_exploration.ipynb, or "
            "give folder=."
        )
    return names


def scorable(folder: str | os.PathLike) -> list[str]:
    """Those of `present` that are scored without a model as judge; says which are left out."""
    needing = [
        name
        for name in present(folder)
        if BENCHMARKS[name].judged and needs_model(BENCHMARKS[name].load(folder))
    ]
    if needing:
        print(
            f"Not asked here, because a model has to judge the answers: {', '.join(needing)}. "
            "vflan.evaluate(run, benchmarks, judge=...) scores them."
        )
    return [name for name in present(folder) if name not in needing]


def needs_model(samples: list[dict]) -> bool:
    """Whether the questions of a judged benchmark bring no rule that can judge their answers."""
    return samples[0].get("judge") != "rule" and not samples[0].get("lexicon")


@dataclass(frozen=True)
class LoadedBenchmark:
    """A benchmark with its questions, ready to be asked and scored."""

    benchmark: Benchmark
    samples: list[dict]
    questions: list[dict]  # with image, text and, for one pass, choices
    decoding: str
    judge: Judge | None  # None: the benchmark's own rule reads the answers
    baseline: dict[str, float]  # metric -> value of the majority answer

    def ask(self, folder: Path, ask: Callable, model: str, template: str) -> list[Answer]:
        """The answer to each question, cached in `folder`; model: a hash of the weights."""
        path, tokens = folder / f"{self.benchmark.name}.jsonl", self.benchmark.max_new_tokens
        header = dict(model=model, questions=hash_questions(self.samples, self.questions))
        header |= dict(template=template, decoding=self.decoding, max_new_tokens=tokens)
        generate = partial(ask, max_new_tokens=tokens)
        return ask_and_keep(path, header, self.samples, self.questions, generate)

    def measure(
        self, texts: Sequence[str | None], given: dict[int, Judgement] | None = None
    ) -> tuple[dict[str, Metric], dict[int, Judgement]]:
        """({metric: Metric}, {index: Judgement}) of the questions that were answered.

        texts: the answer to each question; None where nobody answered. Such a question is left
        out, with all that are scored together with it (the rotations of MMBench). given: judgements
        of an earlier call, so that the judge is not asked. ValueError if nothing is left, or if no
        judgement can be used.
        """
        unit = self.benchmark.unit
        failed = {unit(s) for s, text in zip(self.samples, texts) if text is None}
        kept = [i for i, sample in enumerate(self.samples) if unit(sample) not in failed]
        if not kept:
            raise ValueError(f"{self.benchmark.name}: no question was answered: no score.")
        samples, texts = [self.samples[i] for i in kept], [texts[i] for i in kept]
        if self.judge is None:
            return self.benchmark.items(samples, texts, None), {}
        found = self._judge(kept, samples, texts) if given is None else given
        if found and not any(map(valid, found.values())):
            raise ValueError(
                f"{self.benchmark.name}: the judge gave no score that can be used "
                f"({why_failed(next(iter(found.values())))})."
            )
        judgements = [found.get(i) for i in kept]
        items = self.benchmark.items(samples, texts, judgements)
        return items, {i: j for i, j in zip(kept, judgements) if j is not None}

    def _judge(self, kept, samples, texts) -> dict[int, Judgement]:
        """{index: Judgement} of the answers that a judge has to decide on: no rule reads them."""
        from vflan.evaluation.judge import judge_all

        rows = list(zip(kept, samples, texts))
        if self.rules_come_first:
            rows = [(i, s, text) for i, s, text in rows if self.benchmark.parse(text, s) is None]
        found = judge_all(self.judge, [s for _, s, _ in rows], [text for *_, text in rows])
        return {i: judgement for (i, *_), judgement in zip(rows, found)}

    @property
    def rules_come_first(self) -> bool:
        """Whether a judge decides only where the benchmark's rules read nothing (MMBench)."""
        # A benchmark of one's own need not be of our class.
        return bool(getattr(self.benchmark, "measure_with_judge", None))


def load_benchmark(
    key: str, folder: Path, judge: Judges = None, one_pass: bool | dict = False
) -> LoadedBenchmark:
    """A benchmark ready to be asked: unreadable files and a missing judge raise before that."""
    benchmark = BENCHMARKS[key]
    samples = benchmark.load(folder)
    questions = [{"image": s["image"], "text": benchmark.prompt(s)} for s in samples]
    # One missing picture is a problem of its question; if all are missing, the folder is wrong.
    pictures = {question["image"] for question in questions} - {None}
    if pictures and not any(map(stamp, pictures)):
        which = f"None of the {len(pictures)} pictures of {key} exists"
        raise FileNotFoundError(f"{which}; the first: {min(pictures)}")
    if isinstance(one_pass, dict):
        # A mistyped name would be ignored in silence.
        BENCHMARKS.names(one_pass)
    # The words are part of the header: answers of other words are not the same answers.
    decoding = "greedy"
    if words := (CHOICES if one_pass is True else one_pass or {}).get(key):
        questions = [q | {"choices": allowed(words, q["text"])} for q in questions]
        decoding = "one pass: " + " ".join(words)
    judge = choose_judge(benchmark, samples, folder, judge)
    baseline = score_majority(benchmark, samples, judge)
    return LoadedBenchmark(benchmark, samples, questions, decoding, judge, baseline)


def allowed(words: Sequence[str], prompt: str) -> list[str]:
    """The words that may answer a prompt: a letter only if it names an option, as `A.` or `(a)`.

    [] for a question without options, which is answered in full.
    """
    options = [w for w in words if len(w) > 1 or re.search(OPTION.format(re.escape(w)), prompt)]
    return options if len(options) > 1 else []


@contextmanager
def asking(
    run: Run | None, model: Any, num_processes: int, settings: tuple[int, str, float | None]
) -> Iterator[Callable]:
    """A function ask(questions, max_new_tokens) that yields (index, Answer).

    The model is loaded at the first call, so not at all if every answer is cached. settings:
    (batch_size, template, memory).
    """

    # Cached, so that all benchmarks share one loaded model.
    @cache
    def load():
        return run.load_model() if model is None else model, run.processor()

    def ask(questions, max_new_tokens):
        return answering(*load(), questions, max_new_tokens, *settings)

    if hasattr(model, "answering"):
        yield model.answering
    elif num_processes > 1:
        from vflan.evaluation.parallel import working

        with working(run, num_processes, *settings) as ask_together:
            yield ask_together
    else:
        yield ask
        # A local judge may need the memory.
        load.cache_clear()


# ----------------------------------------------------------------------------------------- scores


def choose_judge(
    benchmark: Benchmark, samples: list[dict], folder: Path, judge: Judges
) -> Judge | None:
    """The judge of a benchmark, with its prompt; None if the benchmark's own rule reads answers.

    A dict may name a judge for a benchmark that has a rule of its own; a single judge is used only
    where one is needed. ValueError if a judge or the references that it needs are missing.
    """
    if isinstance(judge, dict):
        # A mistyped name would be ignored in silence.
        BENCHMARKS.names(judge)
        judge = judge.get(benchmark.name)
    elif not benchmark.judged:
        judge = None
    # A twin of a benchmark in the mini world may bring its own rule.
    if judge is None and (not benchmark.judged or samples[0].get("judge") == "rule"):
        return None
    from vflan.evaluation.judge import RuleJudge, prompt_for

    if judge is None and (lexicon := samples[0].get("lexicon")):
        return RuleJudge(lexicon)
    if judge is None:
        raise ValueError(
            f"{benchmark.name} needs a judge: give judge=EndpointJudge(...) or LocalJudge(...) of "
            "vflan.judge, or name the benchmarks without it."
        )
    # A judge compares with the reference.
    if missing := [s["question_id"] for s in samples if s.get("label") is None]:
        raise ValueError(
            f"{benchmark.name}: {len(missing)} questions have no reference to judge by (first: "
            f"{missing[0]}): put the released reference answers beside the question file."
        )
    # A judge without a prompt takes the benchmark's; a judge of another class has none.
    if getattr(judge, "prompt", judge) is None:
        return replace(judge, prompt=prompt_for(benchmark.name, folder))
    return judge


def score_majority(
    benchmark: Benchmark, samples: list[dict], judge: Judge | None
) -> dict[str, float]:
    """{metric: value of the majority answer}; {} for a model as judge, which would cost calls."""
    if judge is None:
        return benchmark.baseline(samples)
    from vflan.evaluation.judge import RuleJudge, judge_all

    if not isinstance(judge, RuleJudge):
        return {}
    answers = benchmark.blind(samples)
    items = benchmark.items(samples, answers, judge_all(judge, samples, answers))
    return {key: metric.value() for key, metric in items.items()}


def why_failed(judgement: Judgement) -> str:
    """Why a judgement cannot be averaged, "" if it can."""
    if valid(judgement):
        return ""
    if judgement.score is None:
        return judgement.reason
    return f"{judgement.score:g} of {out_of(judgement):g} is no score from 0 to 10"


def score_answers(
    run: str, test: LoadedBenchmark, answers: Sequence[Answer], seed: int = 0
) -> pd.DataFrame:
    """One row for each metric: its interval, the majority baseline, the judge and the problems."""
    benchmark = test.benchmark
    problems = [(i, a.reason) for i, a in enumerate(answers) if a.finish == "error"]
    texts = [None if answer.finish == "error" else answer.text for answer in answers]
    try:
        items, judgements = test.measure(texts)
    except ValueError as error:
        raise ValueError(f"{error} {problems[0][1]}" if problems else str(error)) from None
    judged_by = ""
    if benchmark.judged or judgements:
        from vflan.evaluation.judge import RULES, title

        judged_by = title(test.judge, list(judgements.values())) if judgements else RULES
    failed = [(i, reason) for i, j in judgements.items() if (reason := why_failed(j))]
    problems += [(i, f"judge: {reason}") for i, reason in failed]
    if problems:
        i, reason = problems[0]
        first = for_terminal(f"question {test.samples[i]['question_id']}: {reason}")
        count = f"{len(problems)} problems in {len(texts)} questions"
        print(f"{run}, {benchmark.name}: {count}; the first, {first}")
    rows = []
    for name, metric in items.items():
        baseline = test.baseline.get(name, float("nan"))
        interval = score_interval(metric)
        rows.append(
            [run, benchmark.name, name, *interval, seed, baseline, judged_by, len(problems)]
        )
    return pd.DataFrame(rows, columns=COLUMNS)


def score_interval(metric: Metric) -> tuple[float, float, float, int]:
    """(value, low, high, n) of a Metric."""
    interval = bootstrap(100 * metric.num, metric.cluster, den=metric.den, groups=metric.group)
    return *interval, int((metric.den > 0).sum())
