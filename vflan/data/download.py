"""Downloads data sets from the Hugging Face hub into the folders where vflan looks for them.

    vflan download vision_flan_191
    vflan download --list

Files are downloaded over plain HTTP directly into their folder, so nothing is stored twice, and a
killed download continues where it stopped: the hub's own client keeps no partial file between two
calls. The hub is not trusted: hub_listing.py checks what it lists, and nothing is written outside
the folder, beyond a file's size, or at less than SLOWEST.
"""

from __future__ import annotations

import difflib
import errno
import hashlib
import json
import os
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import httpx2
from filelock import Timeout
from huggingface_hub import constants, errors, get_token, hf_hub_url
from huggingface_hub.utils import build_hf_headers

from vflan.config import output_path, shown
from vflan.data.http_client import PASSING, BoundedClient, Refused, wait
from vflan.data.hub_listing import LONGEST_WAIT, TRIES, HubFile, raise_for_status, read_listing
from vflan.io import explain_writing, hold, make_folder, set_aside
from vflan.progress import progress

LOCK = ".fetch.lock"
# Seconds for a request of the list, and between two pieces of a file.
PATIENCE = 30.0
# A connection that brings fewer bytes a second, over so many seconds, is given up.
SLOWEST, WINDOW = 10_000, 30.0
# So many bytes show that a connection is worth another try.
PROGRESS_BYTES = 1 << 20


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
        make_folder(folder)
        _refuse_links(folder, [])
        # Two processes must not write the same partial file.
        written = explain_writing(folder, f"{kept}: fetch again")
        with written, hold(folder / LOCK, timeout=0), _client() as client:
            commit, files = read_listing(client, endpoint, repo, SETS[name].files)
            missing = [file for file in files if not _is_whole(folder / file.path, file)]
            _refuse_links(folder, missing)
            _check_space(name, folder, missing)
            where = {"repo_type": "dataset", "revision": commit, "endpoint": endpoint}
            for file in missing:
                url = hf_hub_url(repo, file.path, **where)
                _download(client, url, file, folder / file.path)
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
    except (errors.OfflineModeIsEnabled, errors.HTTPError, httpx2.InvalidURL, Refused) as error:
        reason = str(error).strip().split("\n")[0]
        # A server may repeat what it was sent, at any length.
        reason = reason.replace(get_token() or "\n", "...")[:200]
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


def _client() -> BoundedClient:
    if constants.is_offline_mode():
        raise errors.OfflineModeIsEnabled("HF_HUB_OFFLINE is set")
    # The hub keeps large files on other hosts.
    return BoundedClient(PATIENCE, elsewhere=True)


def _refuse_links(folder: Path, files: list[HubFile]) -> None:
    """OSError if what is to be written lies outside the folder, or where a link leads.

    The folder itself may be a link. A whole file may be one too: it is only read.
    """
    root = os.path.realpath(folder)
    for path in [folder / LOCK, *(_part(file, folder / file.path) for file in files)]:
        if path.is_symlink():
            raise OSError(f"{shown(path)} is a link, where vflan writes a file: move it away.")
    for path in (folder / file.path for file in files):
        for above in path.relative_to(folder).parents:
            # A file, or a link to nothing or to itself.
            if os.path.lexists(folder / above) and not (folder / above).is_dir():
                problem = "is no folder, but one is needed there: move it away."
                raise NotADirectoryError(f"{shown(folder / above)} {problem}")
        if not Path(os.path.realpath(path)).is_relative_to(root):
            raise OSError(
                f"{shown(path)} is a link out of its folder, or lies behind one, and would be "
                "written there: move the link away, or give another folder."
            )


def _download(client: BoundedClient, url: str, file: HubFile, target: Path) -> None:
    """One file, complete and verified, or nothing; a partial file is continued."""
    part = _part(file, target)
    make_folder(part.parent)
    while True:
        # Appends, so that the bytes of an interrupted download are not fetched again.
        with open(part, "ab") as out:
            start = out.tell()
            _transfer(client, url, file, out)
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


def _transfer(client: BoundedClient, url: str, file: HubFile, out: BinaryIO) -> None:
    """Append what is missing of a file, over several connections if they break."""
    failures = 0
    with progress(f"downloading {file.path}", file.size, "B", out.tell()) as bar:
        while (start := out.tell()) < file.size:
            response = None
            try:
                response = _open(client, url, start)
                _receive(client, response, file, out, bar)
                problem = ConnectionError(
                    f"{file.path} broke off. What has been downloaded is kept: fetch again."
                )
            except httpx2.TransportError as error:
                problem = error
            except errors.HfHubHTTPError as error:
                if error.response is None or error.response.status_code not in PASSING:
                    raise
                problem = error
            finally:
                if response is not None:
                    response.close()
            if out.tell() >= file.size:
                return
            # A few bytes a connection must not go on for ever.
            failures = 0 if out.tell() - start >= PROGRESS_BYTES else failures + 1
            if failures > TRIES:
                raise problem
            wait(failures, {} if response is None else response.headers, LONGEST_WAIT)


def _open(client: BoundedClient, url: str, start: int) -> httpx2.Response:
    """The response with a file from byte `start` on, whatever its status; not yet read."""
    # Not compressed, because sizes and ranges are those of the file itself.
    headers = build_hf_headers() | {"Accept-Encoding": "identity"}
    headers |= {"Range": f"bytes={start}-"} if start else {}
    return client.send(client.build_request("GET", url, headers=headers), stream=True)


def _receive(
    client: BoundedClient, response: httpx2.Response, file: HubFile, out: BinaryIO, bar
) -> None:
    """Write what one connection brings, at most up to the file's size."""
    raise_for_status(response)
    if out.tell() and response.status_code == 200:
        # The server does not know ranges, and starts again.
        out.seek(0)
        out.truncate()
    left, since, received = file.size - out.tell(), time.monotonic(), 0
    for chunk in client.chunks(response):
        # A server may send more than it has said, without end.
        out.write(chunk[:left])
        bar.update(len(chunk[:left]))
        left, received = left - len(chunk), received + len(chunk)
        if left <= 0:
            return
        seconds = time.monotonic() - since
        if seconds > WINDOW:
            if received < SLOWEST * seconds:
                raise ConnectionError(
                    f"{file.path} comes too slowly ({received / seconds:,.0f} bytes a second). "
                    "What has been downloaded is kept: fetch again later, or name a mirror in "
                    "HF_ENDPOINT."
                )
            since, received = time.monotonic(), 0


def _part(file: HubFile, target: Path) -> Path:
    """The partial file. Its name has the checksum, so that another version never continues it."""
    return target.with_name(f".{target.name}.{file.checksum[:12]}.part")


def _is_whole(path: Path, file: HubFile) -> bool:
    """Whether the file at `path` is the hub's: same size and SHA-256, or git's SHA-1 if small."""
    if not path.is_file() or path.stat().st_size != file.size:
        return False
    # What the hub states: SHA-256 for files in LFS, else git's hash of a blob.
    in_lfs = len(file.checksum) == 64
    blob = f"blob {file.size}\0".encode()
    digest = hashlib.sha256() if in_lfs else hashlib.sha1(blob, usedforsecurity=False)
    with open(path, "rb") as content, progress(f"checking {file.path}", file.size, "B") as bar:
        while block := content.read(2**20):
            digest.update(block)
            bar.update(len(block))
    return digest.hexdigest() == file.checksum


def _check_space(name: str, folder: Path, missing: list[HubFile]) -> None:
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
