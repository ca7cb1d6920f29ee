"""Sweeps: many runs that differ in a field or two, trained and asked side by side, each of them cached by its folder.

    arms = {"few": Arm(replace(base, num_tasks=8, name="few"), init="projector"), "projector": Arm(p.projector)}
    done = vflan.sweep(arms, seeds=[0, 1, 2], benchmarks=["pope", "mme"])
    done.scores                                 # the table of vflan.evaluate, the column run holds the arm's label

A sweep is plain Python: a dict that a loop fills. What is finished is not done again, and what was killed goes on.
"""

import math
import os
import sys
import time
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path

import pandas as pd

from vflan.config import Recipe, folder_name, for_seed, replace, resolve, shown
from vflan.evaluation.benchmarks import BENCHMARKS
from vflan.evaluation.evaluator import evaluate, kept_items, present
from vflan.evaluation.parallel import forking
from vflan.models import llava as models
from vflan.training.distributed import end_with_parent
from vflan.training.run import Run
from vflan.training.trainer import train


@dataclass(frozen=True)
class Arm:
    """A run to train: its recipe and the label of the arm (or the Run) that it starts from."""

    recipe: Recipe
    init: str | Run | None = None
    benchmarks: tuple[str, ...] | None = None  # None: those of the sweep

    def needs(self):
        """The labels of the arms that have to be there."""
        return [self.init] if isinstance(self.init, str) else []


@dataclass(frozen=True)
class Swap:
    """The run of arm `of` with a part (projector, language_model) taken from arm `source` or a folder; nothing is trained.

    `source` is the label of an arm, or else the folder or hub id of a causal language model of the same shape.
    """

    of: str
    part: str
    source: str
    benchmarks: tuple[str, ...] | None = None

    def needs(self):
        """The labels of the arms that have to be there; `source` may be something else."""
        return [self.of]


@dataclass(frozen=True)
class Sweep:
    """What a sweep made. runs: {(label, seed): Run}; of a Swap the run whose part was exchanged."""

    runs: dict
    asked: dict = field(repr=False)  # (label, seed) -> benchmarks
    kept_as: dict = field(
        repr=False
    )  # (label, seed) -> the name of its answers, None for the run's own
    folder: Path = None  # of the benchmarks
    trained: frozenset = frozenset()  # (label, seed) of the arms that this call trained
    answered: frozenset = (
        frozenset()
    )  # (label, seed, benchmark) that this call asked; the rest was read

    @cached_property
    def scores(self):
        """The table of `vflan.evaluate` for all arms and seeds, from kept answers; `run` is the label."""
        tables = []
        for (label, seed), run in self.runs.items():
            if not self.asked[label, seed]:
                continue
            table = pd.read_csv(
                run.folder / "scores.csv", dtype={"judge": str}, keep_default_na=True
            )
            own = (
                table.run == (self.kept_as[label, seed] or run.recipe.name)
            ) & table.benchmark.isin(self.asked[label, seed])
            tables.append(table[own].assign(run=label, seed=seed, judge=table.judge.fillna("")))
        return pd.concat(tables, ignore_index=True)

    def items(self, label, seed, benchmark):
        """{metric: Metric} of one arm on one benchmark, question by question; KeyError for an arm that was not asked."""
        return self._items(label, seed, benchmark)

    @cached_property
    def _items(self):
        def read(label, seed, benchmark):
            if benchmark not in self.asked[label, seed]:
                raise KeyError(f"{label} was not asked {benchmark}")
            return kept_items(
                self.runs[label, seed], benchmark, self.folder, self.kept_as[label, seed]
            )[0]

        return cache(read)


def sweep(arms, seeds=(0,), benchmarks=None, folder=None, jobs=None, num_processes=1) -> Sweep:
    """Train and evaluate all arms of all seeds, and return the Sweep.

    arms: {label: Arm or Swap}; an arm may start from another arm of the same seed. seeds: each trains every arm again,
    under names that tell (`for_seed`). benchmarks, folder: as for `evaluate`; benchmarks=() asks nothing. jobs: how many
    arms at once, each on one thread (default: one for every core; one on a machine with GPUs, where `num_processes` share
    an arm: they train it and answer for it, but for a Swap). A line for each arm that is done goes to stderr. An arm that
    fails stops the sweep after those that are running; the error names it.
    """
    seeds, jobs = list(seeds), jobs or default_jobs()
    folder = resolve(
        folder or next(arm.recipe.benchmarks for arm in arms.values() if isinstance(arm, Arm))
    )
    benchmarks = tuple(present(folder) if benchmarks is None else BENCHMARKS.names(benchmarks))
    asked = {
        label: benchmarks if arm.benchmarks is None else tuple(BENCHMARKS.names(arm.benchmarks))
        for label, arm in arms.items()
    }
    todo = {(label, seed): arm for seed in seeds for label, arm in arms.items()}
    for (label, _), arm in todo.items():
        if unknown := [need for need in arm.needs() if need not in arms]:
            raise ValueError(f"{label} needs {unknown[0]!r}, which is no arm of this sweep.")
        if isinstance(arm, Swap) and arm.part not in models.PARTS:
            raise ValueError(
                f"{label}: there is no part {arm.part!r}; a model has {', '.join(models.PARTS)}."
            )
    if repeated := repeated_names(arms):
        raise ValueError(
            f"{repeated[0]} and {repeated[1]} would be trained in the same folder: give them other names."
        )
    runs = {key: run_of(arms, *key) for key in todo}
    kept_as = {
        (label, s): label.replace(" ", "-") if isinstance(a, Swap) else None
        for (label, s), a in todo.items()
    }
    for name in filter(None, kept_as.values()):  # said now, not when everything is trained
        for part in name.split("/"):
            folder_name(part, "label")
    waiting = {(label, seed): [(need, seed) for need in after(arms, label)] for label, seed in todo}
    if len(done := _in_order(waiting)) < len(waiting):
        raise ValueError(
            f"These arms start from each other: {', '.join(sorted({k[0] for k in waiting if k not in done}))}."
        )

    # A benchmark that cannot be asked should fail here, and not when everything is trained.
    names = {name for of_arm in asked.values() for name in of_arm}
    for name in sorted(names):
        if not BENCHMARKS[name].is_in(folder):
            raise FileNotFoundError(
                f"{shown(folder / name)} is not there: the questions of {name} belong in that folder."
            )
    jobs = min(jobs, len(todo))
    packed = BENCHMARKS.pack(names) if jobs > 1 else b""

    # looked up before anything runs, so that a notebook can say what it ran and what it read
    trained = {key for key, arm in todo.items() if isinstance(arm, Arm) and not runs[key].finished}
    answered = {
        (*key, name)
        for key in todo
        for name in asked[key[0]]
        if not (runs[key].folder / "answers" / (kept_as[key] or "") / f"{name}.jsonl").is_file()
    }

    def work(key):
        arm, (label, seed) = todo[key], key
        more = dict(benchmarks=asked[label], folder=str(folder))
        if isinstance(arm, Swap):
            source = str(runs[arm.source, seed].folder) if arm.source in arms else arm.source
            return swap_and_ask, dict(
                run=str(runs[key].folder), part=arm.part, source=source, name=kept_as[key], **more
            )
        init = runs[arm.init, seed] if isinstance(arm.init, str) else arm.init
        return train_and_ask, dict(
            recipe=for_seed(arm.recipe, seed), init=init, num_processes=num_processes, **more
        )

    _work_off(
        longest_first(done, waiting, {key: rows_of(todo[key]) for key in done}),
        waiting,
        work,
        jobs,
        packed,
    )
    benchmarks_of = {key: asked[key[0]] for key in todo}
    return Sweep(runs, benchmarks_of, kept_as, folder, frozenset(trained), frozenset(answered))


def spread(recipe, instances, tasks) -> Recipe:
    """The recipe on so many instances, the same number from each of so many tasks (Table 3), one pass over the budget.

    A task that has fewer gives all, and what there is is seen again until the budget is used up. The name tells both numbers.
    """
    steps = recipe.max_steps or math.ceil(instances / recipe.global_batch)
    name = f"tasks-{tasks}-of-{instances}"
    return replace(recipe, name=name, num_tasks=tasks, per_task=instances // tasks, max_steps=steps)


def default_jobs():
    """How many arms are trained at once: one a core, one where there is a GPU."""
    import torch

    return (
        1
        if torch.cuda.is_available()
        else len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else 1
    )


def after(arms, label):
    """The labels that have to be done before this one: what it starts from, and a first label of the same run."""
    arm = arms[label]
    if isinstance(arm, Swap):
        return [arm.of, *([arm.source] if arm.source in arms else [])]
    twin = next(
        other
        for other, a in arms.items()
        if isinstance(a, Arm) and a.recipe.folder == arm.recipe.folder
    )
    return [*arm.needs(), *([twin] if twin != label else [])]


def repeated_names(arms):
    """Two labels with the same run folder but other recipes or starts, or None."""
    seen = {}
    for label, arm in arms.items():
        if isinstance(arm, Arm):
            other = seen.setdefault(arm.recipe.folder, label)
            if (arms[other].recipe, arms[other].init) != (arm.recipe, arm.init):
                return other, label


def run_of(arms, label, seed):
    arm = arms[label]
    return (
        run_of(arms, arm.of, seed)
        if isinstance(arm, Swap)
        else Run(for_seed(arm.recipe, seed).folder)
    )


def train_and_ask(recipe, init, benchmarks, folder, num_processes):
    run = train(recipe, init=init, num_processes=num_processes)
    if benchmarks:
        evaluate(run, list(benchmarks), folder, num_processes=num_processes)


def swap_and_ask(run, part, source, name, benchmarks, folder):
    run = Run.open(run)
    other = Run.open(source) if (resolve(source) / "recipe.json").is_file() else source
    model = models.swap_part(run.load_model(), part, other)
    evaluate(run, list(benchmarks), folder, model=model, name=name)


def _in_order(waiting):
    """The keys so that each comes after those that it waits for; keys in a circle are left out."""
    order = []
    while ready := [
        k for k, needs in waiting.items() if k not in order and all(n in order for n in needs)
    ]:
        order += ready
    return order


def rows_of(arm):
    """About how many samples an arm reads; asking it all benchmarks counts as a thousand, as it does in the mini world."""
    if isinstance(arm, Swap):
        return 1_000
    recipe = arm.recipe
    rows = (
        recipe.num_samples or (recipe.num_tasks or 0) * (recipe.per_task or 0) or 100_000
    )  # a whole file: many
    return 1_000 + (
        recipe.max_steps * recipe.global_batch if recipe.max_steps else recipe.epochs * rows
    )


def longest_first(order, waiting, rows):
    """`order` such that what has most work behind it, counted in `rows`, comes first: else a core waits for the last arm."""
    behind = dict(rows)
    for key in reversed(order):  # those that wait for a key stand after it
        for need in waiting[key]:
            behind[need] = max(behind[need], rows[need] + behind[key])
    return sorted(order, key=lambda key: -behind[key])


def _work_off(order, waiting, work, jobs, packed=b""):
    """Do the work of all keys, `jobs` at once, none before those that it waits for.

    packed: benchmarks that the worker processes do not know, from `BENCHMARKS.pack`.
    """
    began, done, running, failed = time.monotonic(), set(), {}, None
    if jobs == 1:
        for key in order:
            task, arguments = work(key)
            task(**arguments)
            _say(key, len(done := done | {key}), len(order), began)
        return
    with ProcessPoolExecutor(
        jobs, mp_context=forking(), initializer=_one_thread, initargs=(dict(os.environ),)
    ) as pool:
        if packed:
            # Raises before anything is trained if a worker cannot load them.
            pool.submit(_with_benchmarks, packed).result()
        while len(done) < len(order):
            for key in order:
                free = key not in done and key not in running.values() and len(running) < jobs
                if free and not failed and all(need in done for need in waiting[key]):
                    task, arguments = work(key)
                    running[pool.submit(_with_benchmarks, packed, task, arguments)] = key
            if not running:
                break
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                key = running.pop(future)
                if future.exception():
                    failed = failed or (key, future.exception())
                else:
                    done.add(key)
                    _say(key, len(done), len(order), began)
    if failed:
        (label, seed), trouble = failed
        raise RuntimeError(
            f"The arm {label!r} of seed {seed} failed: {type(trouble).__name__}: {trouble}"
        ) from trouble


def _with_benchmarks(packed, task=None, arguments=None):
    """In a worker: register the benchmarks that were sent with the task, then do it."""
    BENCHMARKS.unpack(packed)
    if task:
        task(**arguments)


def _say(key, done, all_, began):
    minutes = (time.monotonic() - began) / 60
    print(
        f"[{done}/{all_}] {key[0]}, seed {key[1]} ({minutes:.1f} min)", file=sys.stderr, flush=True
    )


def _one_thread(environment):
    """Begin as a process of a sweep, on one thread; should the notebook be killed, it lets go of its run folder at once."""
    import torch

    end_with_parent()
    os.environ |= environment | {
        "OMP_NUM_THREADS": "1"
    }  # the process that was forked may have begun with another
    torch.set_num_threads(1)
