"""What a run trains on: some tasks, some samples of each, several files together."""

import csv
import difflib
import hashlib
from collections import Counter
from collections.abc import Iterable, Mapping

import numpy as np
import pyarrow as pa
from datasets import Dataset, concatenate_datasets

from vflan.config import resolve
from vflan.data.samples import load_samples


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
    """Some tasks, some samples of each, in the order of the file; the same on any machine.

    Chosen by hash, not by a shuffled list: 10 tasks are among the 20 of the same seed, 100 samples among the 200, and the rows of a
    small `total` among those of a larger one, so the points of a sweep differ by what was added only. A task with fewer than
    `per_task` samples gives all (as in the paper).

    With `total` the tasks share out so many rows: in proportion to n ** (1 / temperature), where n is what a task has (at most
    `per_task`), or to `weights` (1 for a task that is not named, 0 leaves one out). Without either in proportion to n. A task too
    small for its share gives all, and the others share the rest.

    `exclude` names tasks, or flags of data/tasks.csv: "benchmark" (the source is a benchmark's val or test set), "overlaps" (kin of
    the papers' evaluation sets), "faces". Flags are known for the names of Vision-Flan only. ValueError says what does not fit.
    """
    tasks = rows_by_task(samples)
    if exclude:
        out = _excluded(exclude, tasks)
        tasks = {task: rows for task, rows in tasks.items() if task not in out}
        if not tasks:
            raise ValueError(f"exclude={exclude}: no task is left.")
    if num_tasks and num_tasks > len(tasks):
        raise ValueError(f"num_tasks={num_tasks}, but the samples hold {len(tasks)} tasks.")
    if total is None and (temperature is not None or weights is not None):
        raise ValueError("temperature and weights share out rows: say with total= how many.")
    if temperature is not None and weights is not None:
        raise ValueError("temperature and weights both decide the shares: give one of them.")
    chosen = sorted(tasks, key=lambda task: _draw(seed, task))[:num_tasks]
    counts = {
        task: len(tasks[task]) if per_task is None else min(per_task, len(tasks[task]))
        for task in chosen
    }
    if total is not None:
        counts = _share(total, counts, _weights(counts, temperature, weights, tasks))
    rows = [_some(tasks[task], counts[task], seed, task) for task in chosen]
    return samples.select(np.sort(np.concatenate(rows)) if rows else [])


def subset(samples: Dataset, num_samples: int, seed: int = 0) -> Dataset:
    """A random subset in the order of the file, nested and machine-independent like `mix`."""
    if num_samples > len(samples):
        raise ValueError(f"num_samples={num_samples}, but there are {len(samples)} samples.")
    return samples.select(np.sort(_some(np.arange(len(samples)), num_samples, seed, "subset")))


def diverse(
    samples: Dataset, num_samples: int, features=None, clusters: int = 200, seed: int = 0
) -> Dataset:
    """Rows chosen to differ, in the order of the file: k-means over what a row says and shows, then the clusters take turns.

    features: (n, width) of the pictures, one row a sample (the vision tower's, averaged over patches); None: by text alone.
    Text is TF-IDF of words and pairs of words, reduced to 64 numbers. Each cluster gives its most central rows first.
    """
    from sklearn.cluster import MiniBatchKMeans
    from sklearn.decomposition import TruncatedSVD
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.preprocessing import normalize

    if num_samples > len(samples):
        raise ValueError(f"num_samples={num_samples}, but there are {len(samples)} samples.")
    texts = [" ".join(turn["value"] for turn in turns) for turns in samples["conversations"][:]]
    words = TfidfVectorizer(
        ngram_range=(1, 2), min_df=2, token_pattern=r"[^\s.,?!]+"
    ).fit_transform(texts)
    said = normalize(
        TruncatedSVD(min(64, words.shape[1] - 1), random_state=seed).fit_transform(words)
    )
    if features is not None:
        seen = np.asarray(features, np.float32) - np.mean(features, 0, dtype=np.float32)
        said = np.hstack([said, normalize(seen)])
    means = MiniBatchKMeans(min(clusters, num_samples), random_state=seed, n_init=3).fit(said)
    distance = ((said - means.cluster_centers_[means.labels_]) ** 2).sum(1)
    order = np.lexsort((distance, means.labels_))
    label = means.labels_[order]
    rank = np.arange(len(order)) - np.searchsorted(
        label, label
    )  # 0 for each cluster's most central row
    return samples.select(np.sort(order[np.lexsort((label, rank))[:num_samples]]))


def recipe_samples(recipe) -> Dataset:
    """The rows a recipe trains on, bad ones included: its samples, mixed and drawn, then its further files."""
    samples = load_samples(resolve(recipe.samples), resolve(recipe.images))
    shares = dict(temperature=recipe.temperature, weights=recipe.weights or None)
    shared = any(value is not None for value in shares.values())
    if shared or recipe.num_tasks or recipe.per_task or recipe.exclude:
        shares["total"] = recipe.num_samples if shared else None
        samples = mix(
            samples,
            recipe.num_tasks,
            recipe.per_task,
            recipe.seed,
            exclude=recipe.exclude,
            **shares,
        )
    if recipe.num_samples and not shared:
        samples = subset(samples, recipe.num_samples, recipe.seed)
    drawn = ((extra, count) for _, extra, count in _more_samples(recipe))
    more = [subset(extra, count, recipe.seed) if count else extra for extra, count in drawn]
    return concatenate_datasets([samples, *more]) if more else samples


def mixture_record(recipe, samples: Dataset) -> dict:
    """What the run folder keeps of `recipe_samples(recipe)`: rows, rows of each file and of each task, and a hash of the rows in
    their order (id, task, file name of the picture), equal on any machine. Bad rows count: bad.jsonl names those left out.
    """
    more = [(file, count or len(extra)) for file, extra, count in _more_samples(recipe)]
    files = [(recipe.samples, len(samples) - sum(count for _, count in more)), *more]
    order, tasks = hashlib.blake2b(digest_size=16), Counter()
    for start in range(0, len(samples), 10_000):
        part = _columns(
            samples, range(start, min(start + 10_000, len(samples))), ["id", "task_name", "image"]
        )
        names, of_task, images = (part[column].to_pylist() for column in part.column_names)
        tasks.update(of_task)
        for name, task, image in zip(names, of_task, images):
            picture = image.replace("\\", "/").rpartition("/")[2] if image else ""
            order.update(f"{name}\x1f{task}\x1f{picture}\x1e".encode())
    files = [{"file": file, "rows": rows} for file, rows in files]
    return {
        "rows": len(samples),
        "files": files,
        "tasks": dict(sorted(tasks.items())),
        "order": order.hexdigest(),
    }


def released_tasks() -> dict[str, dict[str, str]]:
    """The rows of data/tasks.csv by released task name: source, group, category, licence, flags and the rest."""
    with open(resolve("data/tasks.csv"), encoding="utf-8", newline="") as file:
        return {row["task_name"]: row for row in csv.DictReader(file) if row["task_name"]}


def task_flags() -> dict[str, set[str]]:
    """The flags of every released task name."""
    return {task: set(row["flags"].split()) for task, row in released_tasks().items()}


def _more_samples(recipe):
    """Each further file of a recipe: its name, its rows, how many are drawn (None: all)."""
    for entry in recipe.more_samples:
        name, _, count = entry.partition("#")
        file = resolve(name)
        own = file.parent / "images"
        yield (
            name,
            load_samples(file, own if own.is_dir() else resolve(recipe.images)),
            int(count) if count else None,
        )


def rows_by_task(samples: Dataset) -> dict[str, np.ndarray]:
    """Row numbers of each task, ascending. The names stay in Arrow: a million strings would not be small."""
    names = (
        samples.data.column("task_name")
        .fill_null("")
        .dictionary_encode()
        .unify_dictionaries()
        .combine_chunks()
    )
    codes = names.indices.to_numpy(zero_copy_only=False)
    if (
        samples._indices is not None
    ):  # a selection; taking its strings through datasets costs a minute and gigabytes
        codes = codes[samples._indices.column(0).to_numpy()]
    rows = np.argsort(codes, kind="stable")
    starts = np.searchsorted(codes[rows], np.arange(len(names.dictionary) + 1))
    held = zip(names.dictionary.to_pylist(), starts, starts[1:])
    return {
        task: rows[start:end] for task, start, end in held if end > start
    }  # a selection may hold none of a task


def _columns(samples: Dataset, rows: range, names: list[str]) -> pa.Table:
    """Some columns of consecutive rows, as Arrow keeps them."""
    if samples._indices is None:
        return samples.data.table.select(names).slice(rows.start, len(rows))
    return samples.data.table.select(names).take(
        samples._indices.column(0).slice(rows.start, len(rows))
    )


def _excluded(exclude: Iterable[str], tasks: Iterable[str]) -> set[str]:
    """The task names that `exclude` means."""
    flags, found = task_flags(), set()
    words = set().union(*flags.values())
    for name in [exclude] if isinstance(exclude, str) else exclude:
        if name in words:
            found |= {task for task, has in flags.items() if name in has}
        elif name in flags or name in tasks:
            found.add(name)
        else:
            known = [*sorted(words), *tasks, *flags]
            raise ValueError(f"exclude={name!r}: no such task or flag; {_closest(name, known)}")
    return found


def _weights(sizes: dict, temperature, weights, tasks) -> dict[str, float]:
    """A task's weight in the sharing; sizes: {task: rows it can give}."""
    if weights is None:
        temperature = 1 if temperature is None else temperature
        if not temperature > 0:
            raise ValueError(
                f"temperature={temperature}: a number above 0 is needed; 1 keeps the proportions."
            )
        return {task: size ** (1 / temperature) for task, size in sizes.items()}
    for task, weight in weights.items():
        if task not in tasks:
            raise ValueError(
                f"weights name the task {task!r}, which the samples do not hold; {_closest(task, tasks)}"
            )
        if not 0 <= weight < float("inf"):
            raise ValueError(
                f"The weight of {task!r} is {weight}: a number of at least 0 is needed."
            )
    return {task: weights.get(task, 1) for task in sizes}


def _share(total: int, sizes: dict[str, int], weights: dict[str, float]) -> dict[str, int]:
    """Rows of each task: `total` in proportion to the weights, none more than its size.

    Webster's rule (each share rounded to the nearest whole number), because with it no task loses a row when the total grows. In
    whole numbers, so that no machine rounds differently.
    """
    open_to = sum(size for task, size in sizes.items() if weights[task])
    if not 0 < total <= open_to:
        raise ValueError(f"total={total}, but the chosen tasks can give 1 to {open_to} rows.")
    one, top = 10**18, max(weights.values())
    parts = {
        task: max(1, round(weight / top * 10**9)) if weight else 0
        for task, weight in weights.items()
    }

    def rounded(level):
        return {
            task: min(sizes[task], (2 * level * parts[task] + one) // (2 * one))
            if parts[task]
            else 0
            for task in sizes
        }

    low, high = (
        0,
        2 * one * max(sizes.values()),
    )  # the level of the water: at `high` every task is full
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if sum(rounded(middle).values()) <= total else (low, middle)
    counts, above = rounded(low), rounded(high)
    tied = sorted(
        (task for task in sizes if above[task] > counts[task]), key=lambda task: _draw(0, task)
    )
    for task in tied[
        : total - sum(counts.values())
    ]:  # at this level several would get their next row at once
        counts[task] += 1
    return counts


def _closest(name: str, known: Iterable[str]) -> str:
    return f"the closest is {difflib.get_close_matches(name, list(known), n=1, cutoff=0.0)[0]!r}."


def _some(rows: np.ndarray, count: int, seed: int, key: str) -> np.ndarray:
    if count >= len(rows):
        return rows
    draws = b"".join(_draw(seed, f"{key}/{row}") for row in rows.tolist())
    return rows[np.argsort(np.frombuffer(draws, ">u8"), kind="stable")[:count]]


def _draw(seed: int, text: str) -> bytes:
    return hashlib.blake2b(f"{seed}/{text}".encode(), digest_size=8).digest()
