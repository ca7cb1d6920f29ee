"""Which rows a run trains on: some tasks, some samples of each, several files together."""

from __future__ import annotations

import csv
import difflib
import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from datasets import Dataset, concatenate_datasets

from vflan.config import resolve
from vflan.data.samples import load_samples

if TYPE_CHECKING:
    from pathlib import Path

    import pyarrow as pa

    from vflan.config import Recipe


def mix(
    samples: Dataset,
    num_tasks: int | None = None,
    per_task: int | None = None,
    seed: int = 0,
    *,
    temperature: float | None = None,
    weights: Mapping[str, float] | None = None,
    total: int | None = None,
    exclude: Iterable[str] = (),
) -> Dataset:
    """Some tasks and some samples of each, in the order of the file; the same on any machine.

    Rows are drawn by hash, not from a shuffled list. So 10 tasks are among the 20 of the same seed,
    100 samples among the 200, and the rows of a small `total` among those of a larger one: the
    points of a sweep differ only by what was added. A task with fewer than `per_task` samples gives
    all it has, as in the paper.

    `total` rows are shared among the tasks in proportion to n ** (1 / temperature), where n is the
    size of the task (at most `per_task`), or to `weights` (1 for a task without one; 0 leaves it
    out). Without both, in proportion to n. A task too small for its share gives all it has, and the
    others share the rest.

    `exclude` names tasks, or flags of data/tasks.csv: "benchmark" (the source is a benchmark's val
    or test set), "overlaps" (related to the papers' evaluation sets), "faces". Only Vision-Flan's
    task names have flags. ValueError says which argument does not fit.
    """
    tasks = rows_by_task(samples)
    if exclude:
        excluded = _excluded_tasks(exclude, tasks)
        tasks = {task: rows for task, rows in tasks.items() if task not in excluded}
        if not tasks:
            raise ValueError(f"exclude={exclude}: no task is left.")
    if not 0 <= (num_tasks or 0) <= len(tasks):
        raise ValueError(f"num_tasks={num_tasks}, but the samples hold {len(tasks)} tasks.")
    if (per_task or 0) < 0:
        raise ValueError(f"per_task={per_task}: at least 0 is needed.")
    if total is None and (temperature is not None or weights is not None):
        raise ValueError("temperature and weights share out rows: say with total= how many.")
    if temperature is not None and weights is not None:
        raise ValueError("temperature and weights both decide the shares: give one of them.")
    # Sorting by hash and taking the first is what makes a small mixture part of a larger one.
    chosen = sorted(tasks, key=lambda task: hash_draw(seed, task))[:num_tasks]
    most = len(samples) if per_task is None else per_task
    counts = {task: min(most, len(tasks[task])) for task in chosen}
    if total is not None:
        counts = _share(total, counts, _weights(counts, temperature, weights, tasks))
    rows = [_draw_rows(tasks[task], counts[task], seed, task) for task in chosen]
    return samples.select(np.sort(np.concatenate(rows)) if rows else [])


def subset(samples: Dataset, num_samples: int, seed: int = 0) -> Dataset:
    """A random subset in the order of the file, nested and machine-independent like `mix`."""
    if not 0 <= num_samples <= len(samples):
        raise ValueError(f"num_samples={num_samples}, but there are {len(samples)} samples.")
    return samples.select(np.sort(_draw_rows(np.arange(len(samples)), num_samples, seed, "subset")))


def diverse(
    samples: Dataset,
    num_samples: int,
    features: np.ndarray | None = None,
    clusters: int = 200,
    seed: int = 0,
) -> Dataset:
    """Rows chosen to differ, in the order of the file: k-means clusters give rows in turn.

    Text is TF-IDF of words and pairs of words, reduced to 64 numbers. features: (samples, width) of
    the images, for instance the vision tower's, averaged over patches; None: by text only. Each
    cluster gives its most central rows first.
    """
    from sklearn.cluster import MiniBatchKMeans
    from sklearn.decomposition import TruncatedSVD
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.preprocessing import normalize

    if num_samples > len(samples):
        raise ValueError(f"num_samples={num_samples}, but there are {len(samples)} samples.")
    # A bad row may lack a text, or turns: it counts as the text that it has.
    many = [[turn or {} for turn in turns or ()] for turns in samples["conversations"][:]]
    texts = [" ".join(turn.get("value") or "" for turn in turns) for turns in many]
    tfidf = TfidfVectorizer(ngram_range=(1, 2), min_df=2, token_pattern=r"[^\s.,?!]+")
    words = tfidf.fit_transform(texts)  # (samples, terms)
    svd = TruncatedSVD(min(64, words.shape[1] - 1), random_state=seed)
    points = normalize(svd.fit_transform(words))  # (samples, 64)
    if features is not None:
        # Centred, because all images share a large mean, which would hide their differences.
        centred = np.asarray(features, np.float32) - np.mean(features, 0, dtype=np.float32)
        points = np.hstack([points, normalize(centred)])  # (samples, 64 + width)
    # (samples,) cluster of each row, and its squared distance from the centre.
    means = MiniBatchKMeans(min(clusters, num_samples), random_state=seed, n_init=3).fit(points)
    distance = ((points - means.cluster_centers_[means.labels_]) ** 2).sum(1)  # (samples,)
    # Sort by cluster and distance; the rank is the place in the cluster, 0 for the most central.
    order = np.lexsort((distance, means.labels_))
    label = means.labels_[order]
    rank = np.arange(len(order)) - np.searchsorted(label, label)
    # By rank first: every cluster gives its most central row, then every one its next.
    return samples.select(np.sort(order[np.lexsort((label, rank))[:num_samples]]))


def recipe_samples(recipe: Recipe) -> Dataset:
    """The rows a recipe trains on, bad ones included: its samples, drawn, and its further files.

    ValueError: one of the files holds no rows, or fewer than the recipe draws from it.
    """
    samples = _some_rows(recipe.samples, resolve(recipe.samples), resolve(recipe.images))
    shares = {"temperature": recipe.temperature, "weights": recipe.weights or None}
    is_shared = any(value is not None for value in shares.values())
    if is_shared or recipe.num_tasks or recipe.per_task or recipe.exclude:
        total = recipe.num_samples if is_shared else None
        sizes = recipe.num_tasks, recipe.per_task, recipe.seed
        samples = mix(samples, *sizes, exclude=recipe.exclude, total=total, **shares)
    if recipe.num_samples and not is_shared:
        samples = subset(samples, recipe.num_samples, recipe.seed)
    more = [
        subset(extra, count, recipe.seed) if count else extra
        for _, extra, count in _more_samples(recipe)
    ]
    return concatenate_datasets([samples, *more]) if more else samples


def mixture_record(recipe: Recipe, samples: Dataset) -> dict[str, Any]:
    """What the run folder keeps of `recipe_samples(recipe)`, bad rows included.

    rows; files: rows of each file; tasks: rows of each task; order: a hash of the rows in their
    order (id, task, file name of the image), the same on any machine. bad.jsonl names the bad rows.
    """
    more = [(file, count or len(extra)) for file, extra, count in _more_samples(recipe)]
    files = [(recipe.samples, len(samples) - sum(count for _, count in more)), *more]
    order, tasks = hashlib.blake2b(digest_size=16), Counter()
    for part in table_parts(samples, ["id", "task_name", "image"]):
        names, task_names, images = (column.to_pylist() for column in part.columns)
        tasks.update(task_names)
        for name, task, image in zip(names, task_names, images):
            picture = image.replace("\\", "/").rpartition("/")[2] if image else ""
            order.update(f"{name}\x1f{task}\x1f{picture}\x1e".encode())
    return {
        "rows": len(samples),
        "files": [{"file": file, "rows": rows} for file, rows in files],
        "tasks": dict(sorted(tasks.items())),
        "order": order.hexdigest(),
    }


def table_parts(samples: Dataset, columns: list[str]) -> Iterator[pa.Table]:
    """The rows in their order as Arrow tables, 10,000 at a time.

    `datasets` gives them too, of a selection ten times as slowly.
    """
    table = samples.data.table.select(columns)
    # A selection keeps the whole table and the numbers of its rows.
    selected = None if samples._indices is None else samples._indices.column(0)
    for start in range(0, len(samples), 10_000):
        whole = selected is None
        yield table.slice(start, 10_000) if whole else table.take(selected.slice(start, 10_000))


def released_tasks() -> dict[str, dict[str, str]]:
    """The rows of data/tasks.csv by released task name: source, category, licence, flags ..."""
    with open(resolve("data/tasks.csv"), encoding="utf-8", newline="") as file:
        return {row["task_name"]: row for row in csv.DictReader(file) if row["task_name"]}


def task_flags() -> dict[str, set[str]]:
    """The flags of every released task name."""
    return {task: set(row["flags"].split()) for task, row in released_tasks().items()}


def rows_by_task(samples: Dataset) -> dict[str, np.ndarray]:
    """{task: its row numbers, ascending}."""
    # The names stay in Arrow as codes: a million Python strings would take much memory.
    names = samples.data.column("task_name").fill_null("").dictionary_encode()
    names = names.unify_dictionaries().combine_chunks()
    codes = names.indices.to_numpy(zero_copy_only=False)  # (rows of the table,)
    # A selection: taking its strings through `datasets` costs a minute and gigabytes.
    if samples._indices is not None:
        codes = codes[samples._indices.column(0).to_numpy()]  # (rows,)
    rows = np.argsort(codes, kind="stable")
    tasks = names.dictionary.to_pylist()
    starts = np.searchsorted(codes[rows], np.arange(len(tasks) + 1))
    # The dictionary may name tasks of which the selection has no row.
    parts = zip(tasks, starts, starts[1:])
    return {task: rows[start:end] for task, start, end in parts if end > start}


def closest(name: str, known: Iterable[str]) -> str:
    """The end of an error message: which known name is most similar."""
    return f"the closest is {difflib.get_close_matches(name, list(known), n=1, cutoff=0.0)[0]!r}."


def hash_draw(seed: int, text: str) -> bytes:
    """Eight bytes to sort by: a random order that depends on nothing but the seed and the text."""
    return hashlib.blake2b(f"{seed}/{text}".encode(), digest_size=8).digest()


def _draw_rows(rows: np.ndarray, count: int, seed: int, key: str) -> np.ndarray:
    if count >= len(rows):
        return rows
    draws = b"".join(hash_draw(seed, f"{key}/{row}") for row in rows.tolist())
    return rows[np.argsort(np.frombuffer(draws, ">u8"), kind="stable")[:count]]


def _more_samples(recipe: Recipe) -> Iterator[tuple[str, Dataset, int | None]]:
    """Each further file of a recipe: its name, its rows, how many are drawn (None: all)."""
    for entry in recipe.more_samples:
        # An entry is "file" or "file#count".
        name, _, count = entry.partition("#")
        file = resolve(name)
        beside = file.parent / "images"
        images = beside if beside.is_dir() else resolve(recipe.images)
        rows = _some_rows(name, file, images)
        if count and int(count) > len(rows):
            raise ValueError(f"more_samples={entry!r}, but the file holds {len(rows)} rows.")
        yield name, rows, int(count) if count else None


def _some_rows(name: str, file: Path, images: Path) -> Dataset:
    samples = load_samples(file, images)
    if not len(samples):
        raise ValueError(f"{name} holds no rows, so there is nothing to train on.")
    return samples


def _excluded_tasks(exclude: Iterable[str], tasks: Iterable[str]) -> set[str]:
    flags, excluded = task_flags(), set()
    all_flags = set().union(*flags.values())
    for name in [exclude] if isinstance(exclude, str) else exclude:
        if name in all_flags:
            excluded |= {task for task, its_flags in flags.items() if name in its_flags}
        elif name in flags or name in tasks:
            excluded.add(name)
        else:
            known = [*sorted(all_flags), *tasks, *flags]
            raise ValueError(f"exclude={name!r}: no such task or flag; {closest(name, known)}")
    return excluded


def _weights(sizes: dict[str, int], temperature, weights, tasks) -> dict[str, float]:
    """The weight of each task for `_share`. sizes: {task: rows it can give}."""
    if weights is None:
        temperature = 1 if temperature is None else temperature
        if not temperature > 0:
            need = "a number above 0 is needed; 1 keeps the proportions."
            raise ValueError(f"temperature={temperature}: {need}")
        return {task: size ** (1 / temperature) for task, size in sizes.items()}
    for task, weight in weights.items():
        if task not in tasks:
            problem = f"weights name the task {task!r}, which the samples do not hold"
            raise ValueError(f"{problem}; {closest(task, tasks)}")
        if not 0 <= weight < float("inf"):
            raise ValueError(f"The weight of {task!r} is {weight}: at least 0 is needed.")
    return {task: weights.get(task, 1) for task in sizes}


def _share(total: int, sizes: dict[str, int], weights: dict[str, float]) -> dict[str, int]:
    """Rows of each task: `total` in proportion to the weights, none more than its size.

    Webster's rule (each share is rounded to the nearest whole number), because with it no task
    loses a row when the total grows. In whole numbers, so that every machine rounds alike.
    """
    available = sum(size for task, size in sizes.items() if weights[task])
    if not 0 < total <= available:
        raise ValueError(f"total={total}, but the chosen tasks can give 1 to {available} rows.")
    # Weights as whole numbers; a weight above 0 stays above 0.
    one, largest = 10**18, max(weights.values())
    shares = {
        task: max(1, round(weight / largest * 10**9)) if weight else 0
        for task, weight in weights.items()
    }

    def rows_at(level):
        """Each share times level / one, rounded to the nearest whole number, at most its size."""
        rounded = {task: (2 * level * share + one) // (2 * one) for task, share in shares.items()}
        return {task: min(size, rounded[task]) for task, size in sizes.items()}

    # Binary search for the highest level that needs at most `total` rows. At `high` all are full.
    low, high = 0, 2 * one * max(sizes.values())
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if sum(rows_at(middle).values()) <= total else (low, middle)
    counts, above = rows_at(low), rows_at(high)
    # Some tasks would get their next row at the same level: a fixed order decides.
    tied = [task for task in sizes if above[task] > counts[task]]
    for task in sorted(tied, key=lambda task: hash_draw(0, task))[: total - sum(counts.values())]:
        counts[task] += 1
    return counts
