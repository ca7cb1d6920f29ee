"""Which files the hub lists in a data set, each checked before anything is written.

A hub, its mirror or a network's login page may answer anything. Of the files that vflan wants, a
name must stay inside the folder that it is joined to, and a size and a checksum must be possible;
one that is not refuses the whole list. The list itself has an end: pages, files and seconds are
counted. Every refusal is one sentence.
"""

from __future__ import annotations

import json
import re
import time
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatch
from typing import Any
from urllib.parse import parse_qsl, urlsplit

import httpx2
from huggingface_hub.utils import build_hf_headers, hf_raise_for_status

from vflan.data.http_client import PASSING, BoundedClient, wait

MAX_FILE_BYTES, MAX_NAME_BYTES, MAX_PATH_BYTES = 1 << 42, 200, 1000
MAX_PAGES, MAX_FILES, LISTING_SECONDS = 1000, 10_000, 120.0
# Tries of a request that fails for a while, and the longest wait between two.
TRIES, LONGEST_WAIT = 5, 30.0


@dataclass(frozen=True)
class HubFile:
    """A file that the hub lists. checksum: SHA-256 for files in LFS, else git's SHA-1 of a blob."""

    path: str
    size: int
    checksum: str


def read_listing(
    client: BoundedClient, endpoint: str, repo: str, patterns: list[str]
) -> tuple[str, list[HubFile]]:
    """(the current commit, the files in it that match one of the patterns).

    FileNotFoundError if nothing matches a pattern; ConnectionError if the reply is no list;
    ValueError for a file that cannot be what it is said to be.
    """
    api, end = f"{endpoint}/api/datasets/{repo}", time.monotonic() + LISTING_SECONDS
    info = _ask(client, endpoint, api, {}, end)[0]
    commit = info.get("sha") if isinstance(info, dict) else None
    # The commit becomes part of addresses.
    if not isinstance(commit, str) or not re.fullmatch("[0-9a-f]{40}", commit):
        raise _no_list(endpoint)
    files, found = {}, set()
    for entry in _entries(client, endpoint, f"{api}/tree/{commit}", end):
        matched = {pattern for pattern in patterns if fnmatch(entry["path"], pattern)}
        if not matched:
            continue
        found |= matched
        if trouble := _trouble(entry) or ("listed twice" if entry["path"] in files else ""):
            name = f"{entry['path'][:30]!a}"
            raise ValueError(
                f"{endpoint} lists a file that cannot be right, {name} ({trouble}): nothing was "
                "downloaded; check HF_ENDPOINT, or fetch again later."
            )
        files[entry["path"]] = HubFile(entry["path"], entry["size"], _checksum(entry))
        if len(files) > MAX_FILES:
            raise ConnectionError(_endless(endpoint, f"{MAX_FILES:,} files"))
    for pattern in patterns:
        if pattern not in found:
            page = f"{endpoint}/datasets/{repo}/tree/main"
            raise FileNotFoundError(f"{repo} no longer holds {pattern}; look at {page}.")
    return commit, list(files.values())


def raise_for_status(response: httpx2.Response) -> None:
    """The hub's own error for a status of 400 or more. The body is not read: it may be endless."""
    if response.status_code >= 400:
        told = ("x-error-code", "x-error-message")
        headers = {name: response.headers[name] for name in told if name in response.headers}
        request = response.request
        hf_raise_for_status(httpx2.Response(response.status_code, headers=headers, request=request))


def _entries(client: BoundedClient, endpoint: str, tree: str, end: float) -> Iterator[dict]:
    """The files of all pages, as the hub describes them; `path` is a string."""
    params, seen = {"recursive": "true", "expand": "false"}, []
    while params not in seen:
        seen.append(params)
        if len(seen) > MAX_PAGES:
            raise ConnectionError(_endless(endpoint, f"{MAX_PAGES:,} pages"))
        page, response = _ask(client, endpoint, tree, params, end)
        if not isinstance(page, list):
            raise _no_list(endpoint)
        for entry in page:
            if not isinstance(entry, dict) or not isinstance(entry.get("path"), str):
                raise _no_list(endpoint)
            if entry.get("type") == "file":
                yield entry
        # A mirror may name the hub here. Only the place in the list is taken from this address, so
        # that no other host is asked.
        try:
            following = response.links.get("next", {}).get("url")
            if not following:
                return
            params = dict(parse_qsl(urlsplit(following).query))
        except ValueError:
            raise _no_list(endpoint) from None
    raise ConnectionError(_endless(endpoint, "one page, the same again and again"))


def _ask(
    client: BoundedClient, endpoint: str, url: str, params: dict[str, str], end: float
) -> tuple[Any, httpx2.Response]:
    """(what the JSON says, the response). Statuses that may pass are tried again."""
    for number in range(TRIES):
        if time.monotonic() > end:
            raise ConnectionError(_endless(endpoint, f"{LISTING_SECONDS:.0f} seconds"))
        response = client.get(url, params=params, headers=build_hf_headers())
        if response.status_code not in PASSING or number == TRIES - 1:
            break
        wait(number, response.headers, LONGEST_WAIT)
    raise_for_status(response)
    try:
        return json.loads(response.content), response
    # RecursionError: brackets in brackets, thousands of them.
    except (ValueError, RecursionError):
        raise _no_list(endpoint) from None


def _no_list(endpoint: str) -> ConnectionError:
    return ConnectionError(
        f"{endpoint} sent no list of files: is HF_ENDPOINT a hub, or does your network ask for a "
        "login first? Open that address in a browser, and fetch again."
    )


def _endless(endpoint: str, what: str) -> str:
    return (
        f"The list of files of {endpoint} has no end (it was cut off after {what}): nothing was "
        "downloaded; check HF_ENDPOINT, or fetch again later."
    )


def _trouble(entry: dict) -> str:
    """Why an entry cannot be right, "" if it can."""
    size, checksum = entry.get("size"), _checksum(entry)
    if trouble := path_trouble(entry["path"]):
        return trouble
    # bool is an int in Python.
    if not isinstance(size, int) or isinstance(size, bool):
        return "it has no size"
    if not 0 <= size <= MAX_FILE_BYTES:
        return "an impossible size"
    # The name of the partial file holds a part of it.
    digits = 64 if entry.get("lfs") else 40
    if not isinstance(checksum, str) or not re.fullmatch(f"[0-9a-f]{{{digits}}}", checksum):
        return "it has no checksum"
    return ""


def _checksum(entry: dict) -> Any:
    lfs = entry.get("lfs")
    return lfs.get("oid") if isinstance(lfs, dict) else entry.get("oid")


def path_trouble(path: str) -> str:
    """Why a listed path must not be joined to a folder, on this system or on Windows; or ""."""
    # C: control and format characters, halves of pairs, unassigned; Zl, Zp: line separators.
    if any(unicodedata.category(c)[0] == "C" or c in "\u2028\u2029" for c in path):
        return "a control character in its name"
    if "\\" in path or ":" in path:
        return "a backslash or colon in its name"
    names = path.split("/")
    if path.startswith("/") or "" in names:
        return "an absolute or empty path"
    if "." in names or ".." in names:
        return "it leads out of its folder"
    # Our own lock and partial files begin with a dot.
    if any(name.startswith(".") for name in names):
        return "a hidden file"
    if max(len(name.encode()) for name in names) > MAX_NAME_BYTES:
        return f"a name of more than {MAX_NAME_BYTES} bytes"
    if len(path.encode()) > MAX_PATH_BYTES:
        return f"a path of more than {MAX_PATH_BYTES} bytes"
    return ""
