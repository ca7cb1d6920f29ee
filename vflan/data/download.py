"""Downloads data sets from the Hugging Face hub into the folders where vflan looks for them.

    vflan download vision_flan_191
    vflan download --list

Files are downloaded over plain HTTP directly into their folder, so nothing is stored twice, and a
killed download continues where it stopped: the hub's own client keeps no partial file between two
calls.
"""

from __future__ import annotations

import difflib
import errno
import hashlib
import json
import os
import shutil
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

from filelock import FileLock, Timeout
from huggingface_hub import HfApi, constants, errors, hf_hub_url
from huggingface_hub.file_download import http_get
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils import build_hf_headers

from vflan.config import output_path, shown
from vflan.io import set_aside
from vflan.progress import progress


@dataclass(frozen=True)
class HubSet:
    """A data set on the hub, from hub_sets.json.

    repo: its repository. folder: where it goes, relative to the project folder. files: paths in the
    repository that vflan reads; * matches anything. then: what is left to do after the download.
    licence: as far as it is known; data/README.md says more.
    """

    repo: str
    folder: str
    files: list[str]
    then: str
    licence: str


_SETS_FILE = Path(__file__).with_name("hub_sets.json")
SETS = {name: HubSet(**entry) for name, entry in json.loads(_SETS_FILE.read_bytes()).items()}


def fetch(name: str, folder: str | os.PathLike | None = None) -> Path:
    """Download a set (a key of SETS) into its folder under data/, or `folder`; returns the folder.

    The size and checksum of every file are compared with the hub's, also if the file is there
    already: a second call checks all files, and downloads what is missing or damaged. After an
    interruption, the next call continues. HF_ENDPOINT names a mirror. ValueError,
    FileNotFoundError, PermissionError, ConnectionError and OSError say what to do.
    """
    if name not in SETS:
        near = difflib.get_close_matches(name, SETS, n=1, cutoff=0.0)[0]
        options = f"the closest is {near!r}, and all are {', '.join(SETS)}"
        raise ValueError(f"There is no set {name!r}; {options}.")
    repo, folder = SETS[name].repo, output_path(folder or SETS[name].folder)
    endpoint = (os.environ.get("HF_ENDPOINT") or constants.ENDPOINT).rstrip("/")
    kept = "What has been downloaded is kept"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # Two processes must not write the same partial file.
        with FileLock(folder / ".fetch.lock", timeout=0):
            commit, files = _listing(HfApi(endpoint=endpoint), SETS[name])
            missing = [file for file in files if not _is_whole(folder / file.path, file)]
            _check_space(name, folder, missing)
            where = {"repo_type": "dataset", "revision": commit, "endpoint": endpoint}
            for file in missing:
                _download(hf_hub_url(repo, file.path, **where), file, folder / file.path)
    except Timeout:
        problem = "another fetch is running there; wait for it to end."
        raise OSError(f"{shown(folder)}: {problem}") from None
    except errors.GatedRepoError:
        how = f"do so at {endpoint}/datasets/{repo}, run `hf auth login`, and fetch again."
        raise PermissionError(f"{repo} asks you to accept its terms first: {how}") from None
    except errors.RepositoryNotFoundError:
        how = f"data/README.md says what else is known of {name}."
        raise FileNotFoundError(f"{endpoint} has no dataset {repo}, or hides it; {how}") from None
    # HTTPError is the base of all network errors.
    except (errors.OfflineModeIsEnabled, errors.HTTPError) as error:
        reason = str(error).strip().split("\n")[0]
        how = f"{kept}: check the network (or name a mirror in HF_ENDPOINT) and fetch again."
        raise ConnectionError(
            f"{endpoint} cannot be reached, or broke off ({reason}). {how}"
        ) from None
    except OSError as error:
        # Disk full, or quota exceeded; any other error speaks for itself.
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        problem = f"The disk of {shown(folder)} is full. {kept}: free some space and fetch again."
        raise OSError(problem) from None
    return folder


def _listing(api: HfApi, hub_set: HubSet) -> tuple[str, list[RepoFile]]:
    """The current commit, and the set's files in it.

    All files are downloaded from this commit, so that a change on the hub cannot mix two versions.
    """
    commit = api.dataset_info(hub_set.repo).sha
    tree = api.list_repo_tree(hub_set.repo, repo_type="dataset", revision=commit, recursive=True)
    tree = [file for file in tree if isinstance(file, RepoFile)]
    for pattern in hub_set.files:
        if not any(fnmatch(file.path, pattern) for file in tree):
            page = f"{api.endpoint}/datasets/{hub_set.repo}/tree/main"
            raise FileNotFoundError(f"{hub_set.repo} no longer holds {pattern}; look at {page}.")
    return commit, [f for f in tree if any(fnmatch(f.path, pattern) for pattern in hub_set.files)]


def _download(url: str, file: RepoFile, target: Path) -> None:
    """One file, complete and verified, or nothing; a partial file is continued."""
    part = _part(file, target)
    part.parent.mkdir(parents=True, exist_ok=True)
    # Not compressed, because sizes and ranges are those of the file itself.
    headers = build_hf_headers() | {"Accept-Encoding": "identity"}
    display = {"displayed_filename": file.path, "tqdm_class": _bar}
    while True:
        # Appends, so that the bytes of an interrupted download are not fetched again.
        with open(part, "ab") as out:
            start = out.tell()
            if start < file.size:
                http_get(url, out, resume_size=start, headers=headers, **display)
        if part.stat().st_size < file.size:
            kept = "What has been downloaded is kept: fetch again."
            raise ConnectionError(f"{file.path} broke off. {kept}")
        if _is_whole(part, file):
            # A damaged file, another version, or the user's own: it is renamed, not deleted.
            if os.path.lexists(target):
                set_aside(target)
            part.replace(target)
            return
        part.unlink()
        # If a part was continued, that part may have been damaged: try once from the start.
        if not start:
            problem = "its checksum is not the one that the hub states. Fetch again later."
            raise OSError(f"{file.path} arrived damaged: {problem}")


def _part(file: RepoFile, target: Path) -> Path:
    """The partial file. Its name has the checksum, so that another version never continues it."""
    return target.with_name(f".{target.name}.{_checksum(file)[:12]}.part")


def _checksum(file: RepoFile) -> str:
    return file.lfs.sha256 if file.lfs else file.blob_id


def _is_whole(path: Path, file: RepoFile) -> bool:
    """Whether the file at `path` is the hub's: same size and SHA-256, or git's SHA-1 if small."""
    if not path.is_file() or path.stat().st_size != file.size:
        return False
    # What the hub states: SHA-256 for files in LFS, else git's hash of a blob.
    digest = hashlib.sha256() if file.lfs else hashlib.sha1(f"blob {file.size}\0".encode())
    with open(path, "rb") as content, progress(f"checking {file.path}", file.size, "B") as bar:
        while block := content.read(2**20):
            digest.update(block)
            bar.update(len(block))
    return digest.hexdigest() == _checksum(file)


def _check_space(name: str, folder: Path, missing: list[RepoFile]) -> None:
    """OSError if the disk has no space for what is not downloaded yet."""
    needed = 0
    for file in missing:
        part = _part(file, folder / file.path)
        done = part.stat().st_size if part.exists() else 0
        needed += max(0, file.size - done)
    free = shutil.disk_usage(folder).free
    if needed > free:
        sizes = f"{needed / 1e9:.1f} GB more in {shown(folder)}, where {free / 1e9:.1f} GB are free"
        raise OSError(f"{name} needs {sizes}: free some space, or give another folder.")


def _bar(desc: str, total: int | None, initial: int = 0, **_):
    """Called by `http_get` like the class of a tqdm bar."""
    return progress(f"downloading {desc}", total or 0, "B", initial)
