"""Sweeps: many runs that differ in a field or two, trained and evaluated in parallel.

    arms = {
        "projector": Arm(p.projector),
        "few": Arm(replace(base, num_tasks=8, name="few"), init="projector"),
    }
    done = vflan.sweep(arms, seeds=[0, 1, 2], benchmarks=["pope", "mme"])
    done.scores  # the table of vflan.evaluate; the column `run` holds the arm's label

The arms are a dict, which a loop can fill. A finished run is read, not trained again, and a killed
one continues.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from dataclasses import dataclass, field
from functools import cached_property, partial
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pandas as pd
import torch

from vflan.config import Recipe, folder_name, for_seed, replace, resolve, shown
from vflan.evaluation.answer_cache import read_scores
from vflan.evaluation.benchmarks import BENCHMARKS
from vflan.evaluation.benchmarks.benchmark import Metric
from vflan.evaluation.evaluator import COLUMNS, evaluate, present
from vflan.evaluation.parallel import forking
from vflan.evaluation.results import kept_items
from vflan.io import say
from vflan.models import llava as models
from vflan.training.distributed import end_with_parent
from vflan.training.run import Run
from vflan.training.trainer import pretrained_stage, take_projector, train

Key = tuple[str, int]  # (label, seed)


@dataclass(frozen=True)
class Arm:
    """A run to train: its recipe, and what it starts from.

    init: the label of an Arm, a Run, or the Path of weights of others; a text is always a label.
    """

    recipe: Recipe
    init: str | Run | Path | None = None
    benchmarks: tuple[str, ...] | None = None  # None: those of the sweep

    def needs(self) -> list[str]:
        """The labels that must be arms of the same sweep."""
        return [self.init] if isinstance(self.init, str) else []


@dataclass(frozen=True)
class Swap:
    """The run of the Arm `of` with one part taken from elsewhere; nothing is trained (Tables 6, 7).

    part: projector or language_model. source: the label of an Arm, or else the folder or hub id of
    a causal language model of the same shape.
    """

    of: str
    part: str
    source: str
    benchmarks: tuple[str, ...] | None = None

    def needs(self) -> list[str]:
        """The labels that must be arms of the same sweep; `source` need not be one."""
        return [self.of]


@dataclass(frozen=True)
class Sweep:
    """What a sweep made."""

    runs: dict[Key, Run]  # of a Swap: the run whose part was exchanged
    asked: dict[str, list[str]] = field(repr=False)  # label -> benchmarks
    answers_as: dict[str, str | None] = field(repr=False)  # label -> name of its answers, if a Swap
    folder: Path  # of the benchmarks
    # What this call trained and asked; everything else was read from finished runs.
    trained: frozenset[Key] = frozenset()
    answered: frozenset[tuple[str, int, str]] = frozenset()  # (label, seed, benchmark)
    _items: dict = field(default_factory=dict, repr=False)

    @cached_property
    def scores(self) -> pd.DataFrame:
        """The table of `vflan.evaluate` for all arms and seeds; `run` is the label."""
        tables = []
        for (label, seed), run in self.runs.items():
            if self.asked[label]:
                table = read_scores(run.folder / "scores.csv")
                is_own = table.run == (self.answers_as[label] or run.recipe.name)
                table = table[is_own & table.benchmark.isin(self.asked[label])]
                tables.append(table.assign(run=label, seed=seed))
        return pd.concat(tables, ignore_index=True) if tables else pd.DataFrame(columns=COLUMNS)

    def items(self, label: str, seed: int, benchmark: str) -> dict[str, Metric]:
        """{metric: Metric} of one arm on one benchmark, question by question.

        KeyError for an arm that was not asked.
        """
        key = label, seed, benchmark
        if benchmark not in self.asked[label]:
            raise KeyError(f"{label} was not asked {benchmark}")
        if key not in self._items:
            run, name = self.runs[label, seed], self.answers_as[label]
            self._items[key] = kept_items(run, benchmark, self.folder, name)[0]
        return self._items[key]


def sweep(
    arms: Mapping[str, Arm | Swap],
    seeds: Iterable[int] = (0,),
    benchmarks: Iterable[str] | None = None,
    folder: str | Path | None = None,
    jobs: int | None = None,
    num_processes: int = 1,
    keep: str = "model",
) -> Sweep:
    """Train and evaluate all arms with all seeds.

    arms: {label: Arm or Swap}; an arm may start from another arm, of the same seed. seeds: every
    arm is trained with each, in a folder of its own (`for_seed`). benchmarks, folder: as for
    `evaluate`; benchmarks=() asks nothing. jobs: how many arms at once, each on one thread; by
    default one for each core, but one on a machine with GPUs. num_processes: how many processes
    train an arm and answer for it (a Swap uses one). keep: what stays of the model of an arm that
    this call trains and asks and that no other arm needs (`Run.keep`): model, adapter (without
    LoRA the model), or nothing.

    Mistakes in the arms raise ValueError before anything is trained. Each finished arm is reported
    on stderr. If an arm fails, no new one starts, and a RuntimeError names it.
    """
    keys = [(label, seed) for seed in seeds for label in arms]
    recipes = [arm.recipe for arm in arms.values() if isinstance(arm, Arm)]
    if not keys or not recipes:
        raise ValueError("A sweep needs at least one Arm and one seed.")
    folder = resolve(folder or recipes[0].benchmarks)
    names = present(folder) if benchmarks is None else BENCHMARKS.names(benchmarks)
    asked = {label: names if arm.benchmarks is None else BENCHMARKS.names(arm.benchmarks)
             for label, arm in arms.items()}  # fmt: skip
    _check(arms, asked, folder, keep)
    waiting = {(label, seed): [(need, seed) for need in needed(arms, label)]
               for label, seed in keys}  # fmt: skip
    order = longest_first(waiting, {key: estimated_rows(arms[key[0]]) for key in keys})

    runs = {key: run_of(arms, *key) for key in keys}
    answers_as = {label: label.replace(" ", "-") if isinstance(arm, Swap) else None
                  for label, arm in arms.items()}  # fmt: skip
    # recorded before anything runs, so that a notebook can say what it ran and what it read
    trained = [k for k in keys if isinstance(arms[k[0]], Arm) and not runs[k].finished]
    answered = [(*key, name) for key in keys for name in asked[key[0]]
                if not _answers(runs[key], answers_as[key[0]], name).is_file()]  # fmt: skip

    needed_folders = {runs[need].folder for needs in waiting.values() for need in needs}

    def task(label, seed):
        arm, rest = arms[label], dict(benchmarks=asked[label], folder=str(folder))
        if isinstance(arm, Swap):
            source = str(runs[arm.source, seed].folder) if arm.source in arms else arm.source
            run = str(runs[label, seed].folder)
            return partial(swap_and_ask, run, arm.part, source, answers_as[label], **rest)
        init = runs[arm.init, seed] if isinstance(arm.init, str) else arm.init
        recipe = for_seed(arm.recipe, seed)
        is_needed = runs[label, seed].folder in needed_folders
        if (label, seed) in trained and asked[label] and not is_needed:
            rest["keep"] = keep
        return partial(train_and_ask, recipe, init, num_processes=num_processes, **rest)

    tasks = {key: task(*key) for key in order}
    _do_all(tasks, waiting, min(jobs or default_jobs(), len(tasks)))
    return Sweep(runs, asked, answers_as, folder, frozenset(trained), frozenset(answered))


def projector_arm(
    recipe: Recipe,
    projector: str,
    seeds: Iterable[int],
    benchmarks: tuple[str, ...] | None = None,
) -> Arm:
    """The arm of the projector stage: the `projector` of others, the recipe's own, or trained here.

    projector: LLaVA's `mm_projector.bin`, its folder or hub id. It becomes a finished run for each
    seed (`take_projector`), which the sweep reads, asks and starts from like any other. Without it,
    `recipe.pretrained` is taken so, as the run `<name>-pretrained`; the recipe is trained if it
    names none.
    """
    if not projector and not recipe.pretrained:
        return Arm(recipe, benchmarks=benchmarks)
    if not projector:
        projector, recipe = recipe.pretrained, pretrained_stage(recipe)
    for seed in seeds:
        take_projector(for_seed(recipe, seed), projector)
    return Arm(recipe, Path(projector), benchmarks)


def spread(recipe: Recipe, instances: int, tasks: int) -> Recipe:
    """The recipe on `instances` samples, the same number from each of `tasks` tasks (Table 3).

    It trains for one pass over `instances`. A task that has fewer samples gives all of them, and
    the samples are repeated until the pass is full. The run's name holds both numbers.
    """
    steps = recipe.max_steps or math.ceil(instances / recipe.global_batch)
    name = f"tasks-{tasks}-of-{instances}"
    return replace(recipe, name=name, num_tasks=tasks, per_task=instances // tasks, max_steps=steps)


def with_samples(recipe: Recipe, number: int) -> Recipe:
    """A second stage on `number` random samples in place of its own (Figures 5 to 8).

    Fewer are seen as often as its own are. More are seen in as many steps, so that they are other
    samples and not a longer training, but each at least once.
    """
    own, batch = recipe.num_samples, recipe.global_batch
    if own in (None, number):
        return replace(recipe, num_samples=number)
    steps = recipe.max_steps or math.ceil(recipe.epochs * own / batch)
    once = math.ceil(number / batch)
    steps = math.ceil(steps * number / own) if number < own else max(steps, once)
    return replace(recipe, num_samples=number, max_steps=steps)


def default_jobs() -> int:
    """How many arms are trained at once: one for each core, or one where there is a GPU."""
    if torch.cuda.is_available() or not hasattr(os, "sched_getaffinity"):
        return 1
    return len(os.sched_getaffinity(0))


# ---------------------------------------------------------------------- what is done, and when


def _check(arms, asked, folder, keep):
    """Raise for mistakes that would otherwise only show when much has been trained."""
    if keep not in ("model", "adapter", "nothing"):
        raise ValueError(f"keep={keep!r}: choose one of model, adapter, nothing.")
    folders = {}
    answers = {(label, arm.recipe.name): label
               for label, arm in arms.items() if isinstance(arm, Arm)}  # fmt: skip
    for label, arm in arms.items():
        for need in arm.needs():
            if need not in arms:
                raise ValueError(f"{label} needs {need!r}, which is no arm of this sweep.")
        if isinstance(arm, Swap):
            if arm.part not in models.PARTS:
                known = ", ".join(models.PARTS)
                raise ValueError(f"{label}: there is no part {arm.part!r}; a model has {known}.")
            name = label.replace(" ", "-")
            for part in name.split("/"):
                folder_name(part, "label")
            if (other := answers.setdefault((arm.of, name), label)) != label:
                raise ValueError(
                    f"{other} and {label} would keep their scores under one name: rename one label."
                )
        else:
            # two labels may share a run, but not one folder for two different runs
            other = folders.setdefault(arm.recipe.folder, label)
            if (arms[other].recipe, arms[other].init) != (arm.recipe, arm.init):
                both = f"{other} and {label}"
                raise ValueError(f"{both} would be trained in the same folder: rename one recipe.")
    try:
        TopologicalSorter({label: needed(arms, label) for label in arms}).prepare()
    except CycleError as error:
        names = ", ".join(sorted(set(error.args[1])))
        raise ValueError(f"These arms start from each other: {names}.") from None
    for label in arms:
        if swaps := [need for need in needed(arms, label) if isinstance(arms[need], Swap)]:
            raise ValueError(
                f"{label} needs {swaps[0]!r}, a Swap, whose model is not kept: name an Arm."
            )
    for name in sorted({name for names in asked.values() for name in names}):
        if not BENCHMARKS[name].is_in(folder):
            place = shown(folder / name)
            raise FileNotFoundError(
                f"{place} does not exist: it should hold the questions of {name}."
            )


def needed(arms: Mapping[str, Arm | Swap], label: str) -> list[str]:
    """The labels that have to be done before this one.

    These are the arms that it starts from, and the first label that has the same run.
    """
    arm = arms[label]
    if isinstance(arm, Swap):
        return [arm.of, *([arm.source] if arm.source in arms else [])]
    same = (other for other, a in arms.items()
            if isinstance(a, Arm) and a.recipe.folder == arm.recipe.folder)  # fmt: skip
    first = next(same)
    return [*arm.needs(), *([first] if first != label else [])]


def run_of(arms: Mapping[str, Arm | Swap], label: str, seed: int) -> Run:
    """The run of an arm; of a Swap the run whose part is exchanged."""
    arm = arms[label]
    if isinstance(arm, Swap):
        return run_of(arms, arm.of, seed)
    return Run(for_seed(arm.recipe, seed).folder)


def estimated_rows(arm: Arm | Swap) -> int:
    """Roughly how many samples an arm reads.

    Answering all benchmarks counts as a thousand, as it does in the mini world.
    """
    if isinstance(arm, Swap):
        return 1_000
    recipe = arm.recipe
    if recipe.max_steps:
        return 1_000 + recipe.max_steps * recipe.global_batch
    rows = recipe.num_samples or (recipe.num_tasks or 0) * (recipe.per_task or 0)
    return 1_000 + recipe.epochs * (rows or 100_000)  # a whole file has many rows


def longest_first(waiting: Mapping, rows: Mapping) -> list:
    """The keys of `waiting`, longest critical path first, so that no core waits for the last arm.

    waiting: {key: keys that must be done before it}. rows: {key: its own work}.
    """
    path = dict(rows)  # the work of a key and of the longest chain of keys that wait for it
    for key in reversed(list(TopologicalSorter(waiting).static_order())):
        for need in waiting[key]:
            path[need] = max(path[need], rows[need] + path[key])
    return sorted(waiting, key=lambda key: -path[key])


# ---------------------------------------------------------------------- doing it


def _answers(run, name, benchmark):
    return run.folder / "answers" / (name or "") / f"{benchmark}.jsonl"


def train_and_ask(
    recipe: Recipe,
    init: str | Run | Path | None,
    benchmarks: list[str],
    folder: str,
    num_processes: int,
    keep: str = "model",
) -> None:
    """Train an arm, evaluate it, and keep so much of its model."""
    run = train(recipe, init=init, num_processes=num_processes)
    if benchmarks:
        evaluate(run, benchmarks, folder, num_processes=num_processes)
    if keep == "nothing" or recipe.lora_r:
        run.keep(keep)


def swap_and_ask(
    run: str, part: str, source: str, name: str, benchmarks: list[str], folder: str
) -> None:
    """Evaluate a run with one part taken from `source`, a run's folder or a language model."""
    # Without names, evaluate would ask all benchmarks.
    if not benchmarks:
        return
    run = Run.open(run)
    other = Run.open(source) if (resolve(source) / "recipe.json").is_file() else source
    model = models.swap_part(run.load_model(), part, other)
    evaluate(run, benchmarks, folder, model=model, name=name)


def _do_all(tasks: dict[Key, Callable], waiting, jobs):
    """Do all tasks, `jobs` at once, in the order of `tasks` as far as `waiting` allows."""
    began, done, running, failed = time.monotonic(), set(), {}, None

    def finish(key):
        done.add(key)
        minutes = (time.monotonic() - began) / 60
        say(f"[{len(done)}/{len(tasks)}] {key[0]}, seed {key[1]} ({minutes:.1f} min)")

    if jobs == 1:
        for key, task in tasks.items():
            try:
                task()
            except Exception as error:
                raise _failure(key, error) from error
            finish(key)
        return
    # workers do not know the benchmarks that a notebook registered
    packed = BENCHMARKS.pack(
        {name for task in tasks.values() for name in task.keywords["benchmarks"]}
    )
    environment = dict(os.environ)
    with ProcessPoolExecutor(jobs, forking(), _one_thread, (environment,)) as pool:
        if packed:
            # raises before anything is trained if a worker cannot load them
            pool.submit(_with_benchmarks, packed).result()
        todo = list(tasks)
        while todo or running:
            ready = [key for key in todo if done.issuperset(waiting[key])]
            for key in [] if failed else ready[: jobs - len(running)]:
                todo.remove(key)
                running[pool.submit(_with_benchmarks, packed, tasks[key])] = key
            if not running:
                break
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                key = running.pop(future)
                if error := future.exception():
                    failed = failed or (key, error)
                else:
                    finish(key)
    if failed:
        raise _failure(*failed) from failed[1]


def _failure(key, error):
    reason = f"{type(error).__name__}: {error}"
    return RuntimeError(f"The arm {key[0]!r} of seed {key[1]} failed: {reason}")


def _with_benchmarks(packed, task=None):
    """In a worker: register the benchmarks that were sent with the task, then do it."""
    BENCHMARKS.unpack(packed)
    if task:
        task()


def _one_thread(environment):
    """Start a worker of a sweep: one thread, and it exits with the notebook, also a killed one."""
    end_with_parent()
    # the fork server may have started with another environment
    os.environ |= environment | {"OMP_NUM_THREADS": "1"}
    torch.set_num_threads(1)
