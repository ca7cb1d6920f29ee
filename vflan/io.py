"""What may be deleted: only what vflan wrote. Every deletion of a folder in this package goes through this file.

A run folder is known by its recipe.json and by the names that vflan writes into it; a folder that is
written whole (an export, a set of the mini world) is built beside its place, under a mark of its own.
Links are never followed: a link is somebody's, and what it points to is never touched.
"""

import os
import shutil
import sys
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path

from filelock import FileLock, Timeout

from vflan.config import shown

# All that vflan, and the libraries that it calls, write into a run folder, as patterns of `foreign`.
MODEL = (
    *("config.json", "generation_config.json", "processor_config.json", "preprocessor_config.json"),
    *("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json"),
    *("added_tokens.json", "vocab.json", "vocab.txt", "merges.txt", "chat_template.*"),
    *("adapter_config.json", "*.safetensors", "*.safetensors.index.json"),
)
CHECKPOINT = ("checkpoint.json", ".checkpoint.json.*", "[0-9]*.pt", "zero/*")
CHECKPOINTS = tuple(f"{step}/{name}" for step in ("step-[0-9]*", ".part") for name in CHECKPOINT)
BEGINNING = (".lock", ".recipe.json.*", ".init.json.*")  # may be there before recipe.json is
RUN = (
    *BEGINNING,
    *(f"{name}.json" for name in ("recipe", "init", "mixture", "done")),
    *(f".{name}.json.*" for name in ("mixture", "done")),
    *(f"{name}.jsonl" for name in ("bad", "repaired", "metrics", "heldout", "samples")),
    *(f".{name}.part" for name in ("metrics", "heldout", "samples")),
    *("scores.csv", "scores.part", ".scores.csv.lock", "answers/*.jsonl", "answers/*.lock"),
    *("tensorboard/*", "wandb/*"),
    *(f"{folder}/{name}" for folder in ("model", ".model", "adapter") for name in MODEL),
    *(f"checkpoints/{name}" for name in CHECKPOINTS),
)

MARK = ".vflan"  # in a folder that is being written: it is ours, and whoever holds its lock writes


def foreign(folder: Path, ours) -> list[str]:
    """The paths inside `folder`, relative to it, that no pattern of `ours` matches; links are foreign.

    A pattern is `fnmatch`'s on the whole relative path, in which `*` also stands for `/`. Folders
    count only if they are empty: a folder is ours when the files in it are.
    """
    found, todo = [], [folder]
    while todo:
        with os.scandir(todo.pop()) as entries:
            for entry in entries:
                name = Path(entry.path).relative_to(folder).as_posix()
                if entry.is_dir(follow_symlinks=False):
                    todo.append(Path(entry.path))
                elif entry.is_symlink() or not any(fnmatch(name, pattern) for pattern in ours):
                    found.append(name)
    return sorted(found)


def named(files: list[str]) -> str:
    """The first three of some files, and how many more there are."""
    more = f" and {len(files) - 3} more" if len(files) > 3 else ""
    return ", ".join(files[:3]) + more


def make_folder(folder: Path) -> None:
    """Make a folder and those above it; one sentence if a file, or a link that leads nowhere, is in the way."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        above = (
            path
            for path in (folder, *folder.parents)
            if os.path.lexists(path) and not path.is_dir()
        )
        where = shown(next(above, folder))
        raise NotADirectoryError(
            f"{where} is no folder, but one is needed there: move it away, or choose another name."
        ) from None


def clear(path: Path, ours) -> None:
    """Delete what vflan wrote at `path`; whatever else is there is set aside under a new name, and reported."""
    if not os.path.lexists(path):
        return
    if path.is_symlink() or not path.is_dir() or foreign(path, ours):
        set_aside(path)
    else:
        shutil.rmtree(path, ignore_errors=True)


def set_aside(path: Path) -> Path:
    """Rename a file, folder or link to the first free `NAME.old-N` beside it, say so, and return where it is now."""
    number = 1
    while os.path.lexists(kept := path.with_name(f"{path.name}.old-{number}")):
        number += 1
    path.rename(kept)
    print(
        f"{shown(path)} is not what vflan writes there: it is now {kept.name}, nothing was deleted.",
        file=sys.stderr,
        flush=True,
    )
    return kept


@contextmanager
def whole_folder(folder: Path, part: Path):
    """A new folder `part` to write in; it becomes `folder` at the end, or is deleted if anything fails.

    `folder` must not be there, or be empty. What a killed process left in `part` is deleted if it
    bears our mark and nobody writes there. FileExistsError names what is in the way.
    """
    if folder.is_symlink() or folder.exists() and not folder.is_dir():
        raise FileExistsError(f"{shown(folder)} is a file or a link; name a new folder.")
    if folder.exists() and any(folder.iterdir()):
        raise FileExistsError(f"{shown(folder)} is not empty; name a new folder.")
    if os.path.lexists(part):
        _delete_left_over(part)
    make_folder(part)
    with FileLock(part / MARK):
        try:
            yield part
        except BaseException:
            shutil.rmtree(part, ignore_errors=True)
            raise
    (part / MARK).unlink(missing_ok=True)
    part.rename(folder)


def _delete_left_over(part: Path) -> None:
    if (
        part.is_symlink()
        or not part.is_dir()
        or any(part.iterdir())
        and not (part / MARK).is_file()
    ):
        raise FileExistsError(
            f"{shown(part)} is in the way, and vflan did not mark it as its own: "
            "look at it, and move it away or delete it."
        )
    try:
        with FileLock(part / MARK, timeout=0):
            shutil.rmtree(part)
    except Timeout:
        raise FileExistsError(
            f"{shown(part)} is being written by another process; wait for it."
        ) from None
