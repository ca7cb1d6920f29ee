"""Samples on disk: read and write LLaVA json, check every row and picture, draw mixtures of tasks."""

import hashlib
import json
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pandas as pd
import pyarrow as pa
from datasets import Dataset, concatenate_datasets
from PIL import Image, UnidentifiedImageError

from vflan.conversation import audit

OUTSIDE = "outside:"  # marks a picture path that leaves the images folder; such a file is never opened
_SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("image", pa.string()),
        ("task_name", pa.string()),
        ("conversations", pa.list_(pa.struct([("from", pa.string()), ("value", pa.string())]))),
    ]
)


def load_samples(path: str | os.PathLike, images: str | os.PathLike | None = None) -> Dataset:
    """Samples of a LLaVA json file (one array, or one object a line) as an Arrow table.

    Columns: id, image (absolute path, None for text-only), task_name, conversations (list of {from, value}). Pictures are looked for
    in `images`; by default in the folder `images` beside the file, or beside the file itself. Nothing is judged here: see `check`.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(
            f"{path}: no such samples file; data/README.md says how to get it (tiny: notebook 01 makes it)."
        )
    beside = path.parent / "images"
    root = Path(images or (beside if beside.is_dir() else path.parent)).resolve()
    return Dataset(pa.Table.from_pylist([_row(row, i, root) for i, row in enumerate(_read(path))], schema=_SCHEMA))


def save_samples(rows, path: str | os.PathLike, images: str | os.PathLike | None = None) -> Path:
    """Write rows (dicts, or a Dataset) as LLaVA json, whole or not at all; pictures inside `images` become relative to it."""
    path, root = Path(path), Path(images).resolve() if images else None
    out = []
    for row in rows:
        row = {key: value for key, value in row.items() if value is not None}
        if root and "image" in row and Path(row["image"]).is_relative_to(root):
            row["image"] = Path(row["image"]).relative_to(root).as_posix()
        out.append(row)
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    scratch.write_text(json.dumps(out, ensure_ascii=False, indent=1), encoding="utf-8")
    scratch.replace(path)
    return path


@dataclass(frozen=True)
class Report:
    """What `check` found: `rows` = `ok` + len(`bad`). `repaired` rows are trained on, less the named part (and count as ok)."""

    rows: int
    ok: int
    bad: pd.DataFrame  # row, id, reason
    repaired: pd.DataFrame  # row, id, reason

    @property
    def reasons(self) -> pd.Series:
        """How many bad rows for each kind of reason."""
        return self.bad.reason.str.split(":").str[0].value_counts()

    def __str__(self):
        lines = [
            f"{self.rows} rows: {self.ok} fine, {len(self.bad)} bad, {len(self.repaired)} of the fine ones repaired"
        ]
        return "\n".join(lines + [f"  {count} x {reason}" for reason, count in self.reasons.items()])

    __repr__ = __str__


def check(samples: Dataset) -> Report:
    """Judge every row by the rules that training uses; each bad row gets one reason, each picture is decoded once."""
    images, conversations = samples["image"][:], samples["conversations"][:]
    distinct = list(dict.fromkeys(path for path in images if path))
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:  # Pillow decodes outside Python's lock
        verdicts = dict(zip(distinct, pool.map(picture_trouble, distinct, chunksize=64)))
    bad, repaired = [], []
    for row, (image, turns, name) in enumerate(zip(images, conversations, samples["id"][:])):
        try:
            found = audit(turns)
            if found.has_image != bool(image):
                raise ValueError(
                    "image token without a picture" if found.has_image else "picture without an image token"
                )
            if image and verdicts[image]:
                raise ValueError(verdicts[image])
            if found.dropped:
                repaired.append((row, name, "left out: " + "; ".join(found.dropped)))
        except ValueError as trouble:
            bad.append((row, name, str(trouble)))
    columns = ["row", "id", "reason"]
    frames = pd.DataFrame(bad, columns=columns), pd.DataFrame(repaired, columns=columns)
    return Report(len(images), len(images) - len(bad), *frames)


def picture_trouble(path: str) -> str:
    """Why a picture cannot be used; empty when it can."""
    if path.startswith(OUTSIDE):
        return f"path outside the images folder: {path.removeprefix(OUTSIDE)}"
    try:
        stat = os.stat(path)
    except OSError:
        return f"missing picture: {path}"
    return _decode_trouble(path, stat.st_mtime_ns, stat.st_size)


def read_picture(path: str) -> Image.Image:
    """The picture as RGB. Palette and transparent ones are converted as LLaVA does."""
    with Image.open(path) as picture:
        return picture.convert("RGB")


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
    from vflan.recipe import resolve

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


def _read(path: Path):
    text = path.read_text(encoding="utf-8-sig")
    if text.lstrip().startswith("["):
        try:
            return json.loads(text)
        except json.JSONDecodeError as trouble:
            raise ValueError(f"{path} is not whole json ({trouble}); download it again.") from None
    rows = []
    for number, line in enumerate(text.split("\n"), 1):  # not splitlines(): answers may hold U+2028
        try:
            rows += [json.loads(line)] if line.strip() else []
        except json.JSONDecodeError as trouble:
            raise ValueError(
                f"{path}, line {number} is not json ({trouble.msg}); download or write it again."
            ) from None
    return rows


def _row(row, number: int, root: Path) -> dict:
    """A raw json object in the four columns; what has the wrong type becomes what `check` will name."""
    row = row if isinstance(row, dict) else {}
    turns = row.get("conversations")
    turns = [turn if isinstance(turn, dict) else {} for turn in turns] if isinstance(turns, list) else []
    text = {key: [t.get(key) if isinstance(t.get(key), str) else None for t in turns] for key in ("from", "value")}
    return {
        "id": str(row.get("id", number)),
        "image": _picture(row["image"], root) if row.get("image") is not None else None,
        "task_name": str(row.get("task_name") or ""),
        "conversations": [{"from": role, "value": value} for role, value in zip(text["from"], text["value"])],
    }


def _picture(name, root: Path) -> str:
    path = (root / str(name)).resolve()
    return str(path) if path.is_relative_to(root) and path != root else f"{OUTSIDE}{name}"


@cache
def _decode_trouble(path: str, mtime_ns: int, size: int) -> str:
    try:
        with Image.open(path) as picture:
            picture.load()
            return "" if min(picture.size) > 0 else f"undecodable picture: {path} is empty"
    except UnidentifiedImageError:
        return f"undecodable picture: {path}"
    except Exception as trouble:  # Pillow raises OSError, SyntaxError, ValueError, struct.error ... for broken files
        return f"{'truncated' if 'truncated' in str(trouble) else 'undecodable'} picture: {path} ({trouble})"


def _some(rows, count: int | None, seed: int, key: str) -> list[int]:
    return list(rows) if count is None else sorted(rows, key=lambda row: _draw(seed, f"{key}/{row}"))[:count]


def _draw(seed: int, text: str) -> bytes:
    return hashlib.blake2b(f"{seed}/{text}".encode(), digest_size=8).digest()
