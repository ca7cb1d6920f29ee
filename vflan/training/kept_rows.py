"""The tokenised rows of a run on disk: one process makes them once, and all processes map them.

<run>/rows/    an .npy file for each array of `Data`, and rows.json with the rest

They last until the run is finished. A resumed run reads them again, and compares its pictures with
those that it began with.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import tokenizers
import transformers

from vflan.config import Recipe, read_json, shown, write_json
from vflan.data.mixture import recipe_samples, table_parts
from vflan.data.validation import fingerprints
from vflan.io import ROWS, clear, is_sealed, seal
from vflan.models.loss import packs
from vflan.training.batching import Data
from vflan.training.checkpointing import flush, list_checkpoints, versions

if TYPE_CHECKING:
    from accelerate import Accelerator
    from transformers import PreTrainedTokenizerBase

_TEXT = np.dtypes.StringDType()
_PRINTS = "fingerprints"  # beside the arrays of Data: a hash of each picture's file


def rows_of_run(
    folder: Path,
    recipe: Recipe,
    tokenizer: PreTrainedTokenizerBase,
    make: Callable[[], Data],
    accelerator: Accelerator,
) -> Data:
    """The rows of the run in `folder`: `make()`, which only the main process calls.

    The others must come after it. A resumed run does not call it again, unless samples, tokenizer
    or code have changed; `checkpointing.resume` then compares what comes out. ValueError if a
    picture has changed since the run began.
    """
    home = folder / "rows"
    if not accelerator.is_main_process:
        return _data(_read(home))
    resumes = bool(list_checkpoints(folder))
    if accelerator.num_processes == 1 and not recipe.save_every and not resumes:
        # There is nobody else, and nothing to resume from.
        return make()
    key = _key(recipe, tokenizer)
    # A run without a checkpoint begins again, with rows and pictures as they are now.
    kept = _intact(home) if resumes else {}
    is_same = kept.get("key") == key
    data = _data(kept) if is_same else make()
    prints, troubles = fingerprints(data.pictures.tolist(), os.cpu_count() or 1, recipe.max_pixels)
    prints = np.ascontiguousarray(prints["file"])
    if kept:
        _compare_pictures(kept["arrays"], data, prints, troubles, folder)
    if not is_same:
        _write(home, key, data, prints)
    return _data(_read(home))


def _key(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> str:
    """A hash of what the rows depend on, beside the recipe, which a run folder never changes."""
    digest = hashlib.sha256(tokenizer.backend_tokenizer.to_str().encode())
    libraries = transformers.__version__, tokenizers.__version__
    digest.update(json.dumps([versions()["code"], libraries, packs(recipe)]).encode())
    samples = recipe_samples(recipe)
    for part in table_parts(samples, samples.column_names):
        for batch in part.combine_chunks().to_batches():
            digest.update(batch.serialize())
    return digest.hexdigest()


def _compare_pictures(before, data, prints, troubles, folder) -> None:
    """Raise ValueError if a row's picture is not the one of the first start.

    before: the arrays of that time. prints: hashes of the files now. Rows that differ in number,
    or in whether they have a picture, are left to `checkpointing.resume`: their tokens differ too.
    """
    if len(before["picture"]) != len(data.picture):
        return
    rows = np.flatnonzero((before["picture"] >= 0) & (data.picture >= 0))
    old, new = before["picture"][rows], data.picture[rows]
    changed = np.unique(new[before[_PRINTS][old] != prints[new]])
    if changed.size:
        first = troubles.get(int(changed[0])) or str(data.pictures[changed[0]])
        raise ValueError(
            f"{len(changed)} of {len(prints)} pictures changed since {shown(folder)} began (first: "
            f"{first}); restore them, or delete {shown(folder)} to train again."
        )


def _write(home: Path, key: str, data: Data, prints: np.ndarray) -> None:
    """Write the rows under another name, then rename the folder: a reader never sees a part."""
    scratch, texts, values, names = home.with_name(".rows"), {}, {}, []
    clear(scratch, ROWS)
    scratch.mkdir()
    for name, value in (vars(data) | {_PRINTS: prints}).items():
        if not isinstance(value, np.ndarray):
            values[name] = value
        elif value.dtype == _TEXT:
            texts[name] = value.tolist()
        else:
            names.append(name)
            np.save(scratch / f"{name}.npy", value)
            seal(scratch / f"{name}.npy")
    write_json(scratch / "rows.json", dict(key=key, arrays=names, texts=texts, values=values))
    flush(scratch)
    clear(home, ROWS)
    scratch.replace(home)


def _intact(home: Path) -> dict[str, Any]:
    """What `_read` returns; {} if a file is missing or a bit of it was lost."""
    try:
        record = _read(home)
        return record if all(map(is_sealed, home.glob("*.npy"))) else {}
    except (OSError, ValueError, KeyError):
        return {}


def _read(home: Path) -> dict[str, Any]:
    """rows.json, with the arrays themselves in place of their names."""
    record = read_json(home / "rows.json")
    return record | dict(arrays={name: _map(home / f"{name}.npy") for name in record["arrays"]})


def _map(path: Path) -> np.ndarray:
    """An array whose pages are read when they are used, and shared by all processes."""
    try:
        # A plain array: indexing a memmap costs more.
        return np.load(path, mmap_mode="r").view(np.ndarray)
    except OSError:
        # Some file systems cannot map files.
        return np.load(path)


def _data(record: dict[str, Any]) -> Data:
    texts = {name: np.array(value, dtype=_TEXT) for name, value in record["texts"].items()}
    arrays = {name: value for name, value in record["arrays"].items() if name != _PRINTS}
    return Data(**arrays, **texts, **record["values"])
