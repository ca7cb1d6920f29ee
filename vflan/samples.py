"""Samples on disk: read and write LLaVA json."""

import json
import os
from pathlib import Path

import pyarrow as pa
from datasets import Dataset

from vflan.pictures import OUTSIDE

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
