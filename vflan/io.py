"""Deletes only what vflan wrote. Every deletion of a folder in this package goes through this file.

A run folder is known by its recipe.json and by the names that vflan writes into it. A folder that
is written whole (an export, a set of the mini world) is built beside its place, in a folder with a
mark of its own. Links are never followed: a user made them, so their targets are never touched.
"""

import os
import shutil
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path

from filelock import FileLock, Timeout

from vflan.config import shown

# Everything that vflan, and the libraries that it calls, write into a run folder. The patterns are
# those of `foreign`.
MODEL = (
    *("config.json", "generation_config.json", "processor_config.json", "preprocessor_config.json"),
    *("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json"),
    *("added_tokens.json", "vocab.json", "vocab.txt", "merges.txt", "chat_template.*"),
    *("adapter_config.json", "*.safetensors", "*.safetensors.index.json"),
)
CHECKPOINT = ("checkpoint.json", ".checkpoint.json.*", "[0-9]*.pt", "zero/*")
CHECKPOINTS = tuple(f"{step}/{name}" for step in ("step-[0-9]*", ".part") for name in CHECKPOINT)
# These may exist before recipe.json does.
BEGINNING = (".lock", ".recipe.json.*", ".init.json.*")
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

# The lock file in a folder that vflan is writing. It shows that the folder is ours.
MARK = ".vflan"


def foreign(folder: Path, patterns: Iterable[str]) -> list[str]:
    """The relative paths inside `folder` that no pattern matches; links are always foreign.

    A pattern is matched by `fnmatch` on the whole relative path, so that `*` also matches `/`.
    Folders count only if they are empty: a folder is ours when the files in it are.
    """
    names, folders = [], [folder]
    while folders:
        with os.scandir(folders.pop()) as entries:
            for entry in entries:
                name = Path(entry.path).relative_to(folder).as_posix()
                if entry.is_dir(follow_symlinks=False):
                    folders.append(Path(entry.path))
                elif entry.is_symlink() or not any(fnmatch(name, each) for each in patterns):
                    names.append(name)
    return sorted(names)


def named(files: list[str]) -> str:
    """The first three of some files, and how many more there are."""
    more = f" and {len(files) - 3} more" if len(files) > 3 else ""
    return ", ".join(files[:3]) + more


def make_folder(folder: Path) -> None:
    """Make a folder and its parents; NotADirectoryError names a file or broken link in the way."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        paths = [path for path in (folder, *folder.parents) if os.path.lexists(path)]
        blocking = next((path for path in paths if not path.is_dir()), folder)
        raise NotADirectoryError(
            f"{shown(blocking)} is no folder, but one is needed there: "
            "move it away, or choose another name."
        ) from None


def clear(path: Path, patterns: Iterable[str]) -> None:
    """Delete what vflan wrote at `path`; anything else there is renamed and reported."""
    if not os.path.lexists(path):
        return
    if path.is_symlink() or not path.is_dir() or foreign(path, patterns):
        set_aside(path)
    else:
        shutil.rmtree(path, ignore_errors=True)


def set_aside(path: Path) -> Path:
    """Rename a file, folder or link to the first free `NAME.old-N`, report and return that path."""
    number = 1
    while os.path.lexists(new_path := path.with_name(f"{path.name}.old-{number}")):
        number += 1
    path.rename(new_path)
    message = f"{shown(path)} is not what vflan writes there: it is now {new_path.name}"
    print(f"{message}, nothing was deleted.", file=sys.stderr, flush=True)
    return new_path


@contextmanager
def whole_folder(folder: Path, part: Path) -> Iterator[Path]:
    """A new folder `part` to write in; it becomes `folder` at the end, or is deleted on an error.

    `folder` must be missing or empty. What a killed process left in `part` is deleted if it has our
    mark and no process is writing there. FileExistsError names what is in the way.
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
    """Delete the unfinished folder of a killed process."""
    is_folder = part.is_dir() and not part.is_symlink()
    is_ours = is_folder and ((part / MARK).is_file() or not any(part.iterdir()))
    if not is_ours:
        raise FileExistsError(
            f"{shown(part)} is in the way, and vflan did not mark it as its own: "
            "look at it, and move it away or delete it."
        )
    try:
        with FileLock(part / MARK, timeout=0):
            shutil.rmtree(part)
    except Timeout:
        problem = f"{shown(part)} is being written by another process; wait for it."
        raise FileExistsError(problem) from None
