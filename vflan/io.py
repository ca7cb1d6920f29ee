"""Deletes only what vflan wrote. Every deletion of a folder in this package goes through this file.

A run folder is known by its recipe.json and by the names that vflan writes into it. A folder that
is written whole (an export, a set of the mini world) is built beside its place, in a folder with a
mark of its own. Links are never followed: a user made them, so their targets are never touched.

It also holds what all files need on a machine that fails: checksums, which show a bit that the disk
lost; locks; and a sentence for each limit of a machine.
"""

import errno
import json
import math
import os
import re
import shutil
import sys
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, TextIO

import xxhash
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
ROWS = ("rows.json", ".rows.json.*", "[a-z]*.npy")
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
    *(f"{folder}/{name}" for folder in ("rows", ".rows") for name in ROWS),
)

# The lock file in a folder that vflan is writing. It shows that the folder is ours.
MARK = ".vflan"

# A sealed file ends with the digest of what is before it, of so many bytes.
SEAL = 16
# A line of JSON with a checksum: what is before it, and the checksum.
_SUMMED = re.compile(rb'(\{.*), "crc": "([0-9a-f]{8})"\}', re.DOTALL)
# How a file system says that it cannot lock.
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
# How Python, safetensors, sqlite and torch say that a file may not grow, or that the disk is full.
# torch's writer only says that a position is wrong, in both cases; NumPy, how many values it wrote.
_TOO_LARGE = ("File too large", "os error 27")
_NO_SPACE = (
    "No space left",
    "uota exceeded",
    "os error 28",
    "os error 122",
    "database or disk is full",
)
_NOT_WRITTEN = ("file write failed", "unexpected pos", "requested and")
# The same for memory, and for a file system without mmap.
_NO_MEMORY = re.compile(
    r"allocate memory|[Uu]nable to allocate|alloc of size|os error 12\b|map segment"
    r"|start new thread|^MemoryError"
)
# Bytes of address space with which torch and its libraries can be imported (a build for the CPU).
_NEEDED = 2 * 10**9
_NO_MMAP = re.compile(r"unable to mmap|os error 19\b|Errno 19\b")


def foreign(folder: Path, patterns: Iterable[str]) -> list[str]:
    """The relative paths inside `folder` that no pattern matches; links are always foreign.

    A pattern is matched by `fnmatch` on the whole relative path, so that `*` also matches `/`.
    Folders are not listed: a folder is ours when the files in it are, and when it is empty.
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


def say(text: str, file: TextIO | None = None) -> None:
    """Print a line on the way, on stderr by default. A line that cannot be written ends no work.

    The disk of a log may be full, and a reader of a pipe may be gone.
    """
    with suppress(OSError, ValueError):
        print(text, file=file or sys.stderr, flush=True)


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
    # A disk that is read-only, /proc, a name that is too long.
    except OSError as error:
        sentence = f"{shown(folder)} cannot be made ({error.strerror}); choose another folder"
        raise OSError(error.errno, sentence) from None


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
    say(f"{message}, nothing was deleted.")
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
    with hold(part / MARK):
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
        with hold(part / MARK, timeout=0):
            shutil.rmtree(part)
    except Timeout:
        problem = f"{shown(part)} is being written by another process; wait for it."
        raise FileExistsError(problem) from None


# -------------------------------------------------------------------------------- bits that flip


def digest(path: str | os.PathLike, leave_out: int = 0) -> bytes:
    """XXH3 of a file without its last bytes, in SEAL bytes; it costs no more than to read it."""
    summed, left = xxhash.xxh3_128(), os.stat(path).st_size - leave_out
    with open(path, "rb") as file:
        while left > 0 and (block := file.read(min(left, 1 << 20))):
            summed.update(block)
            left -= len(block)
    return summed.digest()


def digests(folder: Path) -> dict[str, str]:
    """{relative path: `digest` in hexadecimal} of the files in a folder; {} if there is none."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): digest(path).hex() for path in files}


def seal(path: Path) -> None:
    """Append the digest of a file to it; readers of Arrow streams and NumPy's arrays ignore it."""
    end = digest(path)
    with path.open("ab") as file:
        file.write(end)


def is_sealed(path: Path) -> bool:
    """Whether every bit of a sealed file is as it was written. OSError if it cannot be read."""
    with path.open("rb") as file:
        file.seek(-SEAL, os.SEEK_END)
        return file.read() == digest(path, leave_out=SEAL)


def sealed_line(row: dict[str, Any]) -> str:
    """A row as a line of JSON whose last entry, `crc`, is the CRC-32 of the line without it."""
    text = json.dumps(row, ensure_ascii=False)
    return f'{text[:-1]}, "crc": "{zlib.crc32(text.encode()):08x}"}}\n'


def read_line(line: bytes) -> dict[str, Any] | None:
    """The row in a line of JSON, None for a damaged one.

    A line without `crc` was written by an earlier version: its JSON is read, but not compared.
    """
    if (found := _SUMMED.fullmatch(line)) and zlib.crc32(found[1] + b"}") != int(found[2], 16):
        return None
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(row, dict) or (row.pop("crc", None) and not found):
        return None
    return row


# --------------------------------------------------------------------------- locks and limits


@contextmanager
def hold(path: Path, timeout: float = -1) -> Iterator[None]:
    """Hold a lock file; Timeout if another process holds it for so many seconds.

    OSError if the file system cannot lock. A file that only exists is no lock: it would stay when
    its process is killed.
    """
    lock = FileLock(path, timeout=timeout, fallback_to_soft=False)
    with explain_no_locks(path.parent):
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


@contextmanager
def explain_no_locks(folder: Path) -> Iterator[None]:
    """Turn the error of a file system that cannot lock files into one sentence."""
    try:
        yield
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        raise OSError(
            error.errno,
            f"{shown(folder)} is on a file system that cannot lock files, and two processes could "
            "write there at once: mount it with locks (Lustre: -o flock), or take a folder on "
            "another disk",
        ) from None


def no_room(error: BaseException) -> str:
    """Whether an error says that a file cannot grow: "cause: what to do", "" for another error."""
    text = str(error)
    full = any(words in text for words in _NO_SPACE)
    unknown = any(words in text for words in _NOT_WRITTEN)
    is_limited = _limit("RLIMIT_FSIZE") < math.inf
    if any(words in text for words in _TOO_LARGE) or (unknown and not full and is_limited):
        return "a file may not grow larger here: raise the limit (ulimit -f)"
    return "the disk is full: free some space" if full or unknown else ""


def _limit(name: str) -> float:
    """The limit of this process for a resource, such as RLIMIT_AS; infinite if there is none."""
    try:
        import resource
    # Windows has no such limits.
    except ImportError:
        return math.inf
    limit = resource.getrlimit(getattr(resource, name))[0]
    return math.inf if limit == resource.RLIM_INFINITY else limit


def require_memory() -> None:
    """MemoryError if a limit leaves too little to import torch, which then fails in many ways."""
    if (allowed := _limit("RLIMIT_AS")) < _NEEDED:
        raise MemoryError(
            f"{allowed / 1e9:.1f} GB of memory are allowed here (ulimit -v), and "
            f"{_NEEDED // 10**9} GB are needed to start: raise the limit."
        )


def machine_limit(error: BaseException) -> str:
    """Which limit of the machine an error reports, and what to do; "" for any other error.

    Each library has words and classes of its own, so that the words are looked for.
    """
    if limit := no_room(error):
        return limit
    text = str(error) or type(error).__name__
    if _NO_MEMORY.search(text):
        return (
            "there is not enough memory, or a limit forbids more (ulimit -v): end other programs, "
            "or raise the limit"
        )
    if _NO_MMAP.search(text):
        return "this file system cannot map files into memory: copy the folder to a local disk"
    return ""


@contextmanager
def explain_writing(path: Path, kept: str) -> Iterator[None]:
    """Turn the error of a file at `path` that cannot grow into one sentence; `kept` ends it."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        sentence = f"Cannot write more to {shown(path)}, for {no_room(error)}. {kept}"
        raise OSError(error.errno, sentence) from None
