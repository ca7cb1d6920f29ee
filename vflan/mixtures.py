"""What a run trains on: some tasks, some samples of each, several files together."""

import hashlib

from datasets import Dataset, concatenate_datasets

from vflan.recipe import resolve
from vflan.samples import load_samples


def mix(samples: Dataset, num_tasks: int | None = None, per_task: int | None = None, seed: int = 0) -> Dataset:
    """Some tasks, some samples of each, in the order of the file; the same on any machine.

    Chosen by hash, not by a shuffled list: 10 tasks are among the 20 of the same seed and 100 samples among the 200, so the points of
    a sweep differ by what was added only. A task with fewer than `per_task` samples gives all (as in the paper).
    """
    tasks = {}
    for row, task in enumerate(samples["task_name"][:]):
        tasks.setdefault(task, []).append(row)
    if num_tasks and num_tasks > len(tasks):
        raise ValueError(f"num_tasks={num_tasks}, but the samples hold {len(tasks)} tasks.")
    chosen = sorted(tasks, key=lambda task: _draw(seed, task))[:num_tasks]
    rows = [row for task in chosen for row in _some(tasks[task], per_task, seed, task)]
    return samples.select(sorted(rows))


def subset(samples: Dataset, num_samples: int, seed: int = 0) -> Dataset:
    """A random subset in the order of the file, nested and machine-independent like `mix`."""
    if num_samples > len(samples):
        raise ValueError(f"num_samples={num_samples}, but there are {len(samples)} samples.")
    return samples.select(sorted(_some(range(len(samples)), num_samples, seed, "subset")))


def recipe_samples(recipe) -> Dataset:
    """The rows a recipe trains on, bad ones included: its samples, mixed and drawn, then its further files."""
    samples = load_samples(resolve(recipe.samples), resolve(recipe.images))
    if recipe.num_tasks or recipe.per_task:
        samples = mix(samples, recipe.num_tasks, recipe.per_task, recipe.seed)
    if recipe.num_samples:
        samples = subset(samples, recipe.num_samples, recipe.seed)
    more = []
    for entry in recipe.more_samples:
        file, _, count = entry.partition("#")
        file = resolve(file)
        own = file.parent / "images"
        extra = load_samples(file, own if own.is_dir() else resolve(recipe.images))
        more.append(subset(extra, int(count), recipe.seed) if count else extra)
    return concatenate_datasets([samples, *more]) if more else samples


def _some(rows, count: int | None, seed: int, key: str) -> list[int]:
    return list(rows) if count is None else sorted(rows, key=lambda row: _draw(seed, f"{key}/{row}"))[:count]


def _draw(seed: int, text: str) -> bytes:
    return hashlib.blake2b(f"{seed}/{text}".encode(), digest_size=8).digest()
