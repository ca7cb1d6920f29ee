"""Downloading from the hub, with a server on this machine that speaks the hub's protocol."""

import errno
import hashlib
import json
import os
import posixpath
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from time import sleep
from urllib.parse import unquote

import pytest
from filelock import FileLock
from huggingface_hub import constants, hf_hub_download

import vflan.data.download  # noqa: F401
from tests.conftest import serve
from vflan.__main__ import main
from vflan.data.download import SETS, fetch

module = sys.modules["vflan.data.download"]  # vflan.fetch itself is the function
COMMIT = "0123456789" * 4
REPO = "Vision-Flan/vision-flan_191-task_1k"
ZIP = bytes(range(256)) * 4096 * 24  # 24 MiB: the client writes 10 MiB at a time
JSON = json.dumps([{"id": "é"}]).encode()


class Hub:
    """A stand-in for the hub: dataset info, file tree, and files (large ones after a redirect)."""

    def __init__(self, files, repo=REPO):
        self.files, self.repo, self.served, self.log = files, repo, dict(files), []
        # Byte positions at which the connection breaks, each once.
        self.cuts = []
        self.stall_at, self.gated, self.down = None, False, None
        self.stalled = threading.Event()
        # What a hub of no good says: {path: changed fields of its entry}; {address: a function that
        # answers the request}; a tail of the files that it sends.
        self.lies, self.answers, self.tail, self.tokens = {}, {}, b"", []
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self):
                hub.answer(self)

            do_HEAD = do_GET

        self.server, self.endpoint = serve(Handler)

    def tree(self):
        for path, data in self.files.items():
            entry = {"type": "file", "path": path, "size": len(data)}
            entry["oid"] = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
            if path.endswith(".zip"):
                sha = hashlib.sha256(data).hexdigest()
                entry |= {
                    "oid": "f" * 40,
                    "lfs": {"oid": sha, "size": len(data), "pointerSize": 134},
                }
            entry |= self.lies.get(path, {})
            yield {key: value for key, value in entry.items() if value != "left out"}

    def answer(self, request):
        path = unquote(request.path.split("?")[0])
        self.tokens.append(request.headers.get("Authorization"))
        if path in self.answers:
            return self.answers[path](request)
        if self.down:
            return self.send(request, self.down, b"{}")
        if path == f"/api/datasets/{self.repo}":
            return self.send(request, 200, json.dumps({"id": self.repo, "sha": COMMIT}).encode())
        if path == f"/api/datasets/{self.repo}/tree/{COMMIT}":
            return self.send(request, 200, json.dumps(list(self.tree())).encode())
        for prefix in (f"/datasets/{self.repo}/resolve/{COMMIT}/", "/cdn/"):
            name = path.removeprefix(prefix)
            if path.startswith(prefix) and name in self.files:
                return self.file(request, name, prefix == "/cdn/")
        self.send(request, 404, b"{}", {"X-Error-Code": "RepoNotFound"})

    def file(self, request, name, cdn):
        if self.gated:
            return self.send(request, 403, b"", {"X-Error-Code": "GatedRepo"})
        (entry,) = (entry for entry in self.tree() if entry["path"] == name)
        if self.tail and (cdn or "lfs" not in entry):
            return self.send(request, 200, self.served[name] + self.tail)
        tag = entry["lfs"]["oid"] if "lfs" in entry else entry["oid"]
        headers = {"ETag": f'"{tag}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        if "lfs" in entry and not cdn:
            more = {
                "Location": f"/cdn/{name}",
                "X-Linked-Etag": f'"{tag}"',
                "X-Linked-Size": str(entry["size"]),
            }
            return self.send(request, 302, b"", headers | more)
        data, start = self.served[name], 0
        if byte_range := request.headers.get("Range"):
            start = int(byte_range.removeprefix("bytes=").rstrip("-"))
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        if request.command == "GET":
            self.log.append((name, start))
        self.send(request, 206 if byte_range else 200, data[start:], headers, start)

    def send(self, request, status, data, headers=None, start=0):
        request.send_response(status)
        for key, value in ({"Content-Length": str(len(data))} | (headers or {})).items():
            request.send_header(key, value)
        request.end_headers()
        if request.command == "HEAD":
            return
        stops = [
            at
            for at in (*self.cuts[:1], self.stall_at)
            if at is not None and start <= at < start + len(data)
        ]
        if not stops:
            return request.wfile.write(data)
        request.wfile.write(data[: stops[0] - start])
        request.wfile.flush()
        if stops[0] == self.stall_at:
            self.stalled.set()
            sleep(60)
        self.cuts.pop(0)
        request.close_connection = True


@pytest.fixture
def hub(monkeypatch):
    hub = Hub(
        {"annotation_191-task_1k.json": JSON, "image_191-task_1k.zip": ZIP, "README.md": b"hello"}
    )
    monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    # The client waits between two tries.
    monkeypatch.setattr("vflan.data.http_client.FIRST_WAIT", 0.001)
    monkeypatch.setattr("vflan.data.http_client.LAST_WAIT", 0.002)
    yield hub
    hub.server.shutdown()
    hub.server.server_close()


def names(folder):
    return sorted(path.name for path in folder.iterdir() if path.name != ".fetch.lock")


def assert_whole(folder):
    # No partial file is left.
    assert names(folder) == ["annotation_191-task_1k.json", "image_191-task_1k.zip"]
    assert (folder / "annotation_191-task_1k.json").read_bytes() == JSON
    assert (folder / "image_191-task_1k.zip").read_bytes() == ZIP


def test_the_stand_in_speaks_the_hubs_protocol(hub, tmp_path):
    for name, data in hub.files.items():
        more = dict(repo_type="dataset", revision=COMMIT, endpoint=hub.endpoint, local_dir=tmp_path)
        assert Path(hf_hub_download(REPO, name, **more)).read_bytes() == data


def test_a_set_is_fetched_whole_and_only_what_vflan_reads(hub, tmp_path):
    assert fetch("vision_flan_191", tmp_path / "new" / "folder") == tmp_path / "new" / "folder"
    assert_whole(tmp_path / "new" / "folder")


def test_files_that_exist_are_not_fetched_again(hub, tmp_path):
    fetch("vision_flan_191", tmp_path)
    (tmp_path / "annotation_191-task_1k.json").unlink()
    hub.log.clear()
    fetch("vision_flan_191", tmp_path)
    assert hub.log == [("annotation_191-task_1k.json", 0)]
    assert_whole(tmp_path)


def test_after_a_broken_connection_the_download_continues_where_it_stopped(hub, tmp_path):
    hub.cuts = [15 * 2**20]
    fetch("vision_flan_191", tmp_path)
    assert [start for name, start in hub.log if name.endswith(".zip")] == [0, 15 * 2**20]
    assert_whole(tmp_path)


def test_a_connection_that_keeps_breaking_is_an_error_and_the_next_call_continues(hub, tmp_path):
    hub.cuts = [15 * 2**20] * 20
    with pytest.raises(ConnectionError, match="broke off.*is kept.*fetch again") as error:
        fetch("vision_flan_191", tmp_path)
    assert "\n" not in str(error.value) and not (tmp_path / "image_191-task_1k.zip").exists()
    hub.cuts, hub.log[:] = [], []
    fetch("vision_flan_191", tmp_path)
    assert hub.log == [("image_191-task_1k.zip", 15 * 2**20)]
    assert_whole(tmp_path)


def test_a_killed_fetch_continues_and_its_partial_file_is_never_used(hub, tmp_path):
    hub.stall_at = 15 * 2**20
    command = [
        sys.executable,
        "-m",
        "vflan",
        "download",
        "vision_flan_191",
        "--folder",
        str(tmp_path),
    ]
    home = Path(__file__).resolve().parents[2]
    child = subprocess.Popen(command, cwd=home, env=os.environ | {"HF_HUB_DISABLE_XET": "1"})
    try:
        assert hub.stalled.wait(120)
        (part,) = tmp_path.glob(".image*.part")
        while part.stat().st_size < 10 * 2**20:
            sleep(0.01)
    finally:
        child.send_signal(signal.SIGKILL)
        child.wait()
    assert not (tmp_path / "image_191-task_1k.zip").exists()
    hub.stall_at, hub.log[:], there = None, [], part.stat().st_size
    fetch("vision_flan_191", tmp_path)
    assert hub.log == [("image_191-task_1k.zip", there)]
    assert_whole(tmp_path)


@pytest.mark.parametrize("name", ["annotation_191-task_1k.json", "image_191-task_1k.zip"])
def test_a_file_with_a_corrupt_byte_is_fetched_again(hub, tmp_path, name, capsys):
    fetch("vision_flan_191", tmp_path)
    damaged = bytearray(hub.files[name])
    damaged[len(damaged) // 2] ^= 1
    (tmp_path / name).write_bytes(damaged)
    hub.log.clear()
    fetch("vision_flan_191", tmp_path)
    assert hub.log == [(name, 0)]
    # It may be the user's own file, an edited one for instance: it is kept and reported.
    assert (
        tmp_path / f"{name}.old-1"
    ).read_bytes() == damaged and ".old-1" in capsys.readouterr().err
    (tmp_path / f"{name}.old-1").unlink()
    assert_whole(tmp_path)


def test_a_damaged_partial_file_is_fetched_from_the_start(hub, tmp_path):
    (entry,) = (entry for entry in hub.tree() if "lfs" in entry)
    part = tmp_path / f".image_191-task_1k.zip.{entry['lfs']['oid'][:12]}.part"
    part.write_bytes(b"?" * 2**20)
    fetch("vision_flan_191", tmp_path)
    assert [start for name, start in hub.log if name.endswith(".zip")] == [2**20, 0]
    assert_whole(tmp_path)


def test_a_download_killed_just_before_its_end_fetches_nothing_more(hub, tmp_path):
    (entry,) = (entry for entry in hub.tree() if "lfs" in entry)
    (tmp_path / f".image_191-task_1k.zip.{entry['lfs']['oid'][:12]}.part").write_bytes(ZIP)
    fetch("vision_flan_191", tmp_path)
    assert [name for name, _ in hub.log] == ["annotation_191-task_1k.json"]
    assert_whole(tmp_path)


def test_a_file_that_arrives_damaged_is_an_error(hub, tmp_path):
    hub.served["annotation_191-task_1k.json"] = JSON[:-1] + b"}"
    with pytest.raises(OSError, match="annotation_191-task_1k.json arrived damaged"):
        fetch("vision_flan_191", tmp_path)
    assert names(tmp_path) == []


def test_an_unknown_set_is_an_error_that_names_the_closest(tmp_path):
    with pytest.raises(
        ValueError, match="no set 'vision_flan_192'; the closest is 'vision_flan_191'"
    ):
        fetch("vision_flan_192", tmp_path)


def test_no_network_is_an_error_in_one_sentence(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with pytest.raises(
        ConnectionError, match="^http://127.0.0.1:9 cannot be reached.*HF_ENDPOINT.*again.$"
    ):
        fetch("vision_flan_191", tmp_path)


def test_a_hub_that_is_down_a_missing_set_and_a_missing_file_have_different_errors(hub, tmp_path):
    hub.down = 500
    with pytest.raises(ConnectionError, match="500"):
        fetch("vision_flan_191", tmp_path)
    hub.down, hub.repo = None, "somebody/else"
    with pytest.raises(FileNotFoundError, match=f"has no dataset {REPO}"):
        fetch("vision_flan_191", tmp_path)
    hub.repo = REPO
    del hub.files["image_191-task_1k.zip"]
    with pytest.raises(FileNotFoundError, match="no longer holds image_191-task_1k.zip"):
        fetch("vision_flan_191", tmp_path)


def test_a_set_behind_a_licence_says_where_to_accept_it(hub, tmp_path):
    hub.gated = True
    with pytest.raises(PermissionError, match="accept its terms first: do so at .*hf auth login"):
        fetch("vision_flan_191", tmp_path)


def test_a_disk_that_is_too_small_is_an_error_before_anything_is_fetched(
    hub, tmp_path, monkeypatch
):
    usage = type("usage", (), {"free": 20 * 10**6})
    monkeypatch.setattr(module.shutil, "disk_usage", lambda folder: usage)
    with pytest.raises(
        OSError, match="needs 0.0 GB more .*free some space, or give another folder"
    ):
        fetch("vision_flan_191", tmp_path)
    assert hub.log == []
    # Most of it is there, and the rest fits.
    (entry,) = (entry for entry in hub.tree() if "lfs" in entry)
    (tmp_path / f".image_191-task_1k.zip.{entry['lfs']['oid'][:12]}.part").write_bytes(
        ZIP[: 10 * 2**20]
    )
    fetch("vision_flan_191", tmp_path)


def test_a_disk_that_fills_up_is_an_error_in_one_sentence(hub, tmp_path, monkeypatch):
    def full(*args, **more):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(module, "_receive", full)
    with pytest.raises(
        OSError, match="is full. What has been downloaded is kept: free some space and fetch again"
    ):
        fetch("vision_flan_191", tmp_path)


# --------------------------------------------------------------------------- a hub of no good


@pytest.fixture
def shards(hub):
    """The hub with a set whose files have patterns for names: `*` matches anything."""
    hub.repo = SETS["vision_flan"].repo
    hub.files = {"vision_flan.json": b"[]", "shard_1.zip": b"zip", "run.sh": b"ls"}
    hub.served = hub.files
    return hub


def refused(tmp_path, *match, error=(OSError, ValueError)):
    """Fetches into tmp_path/a/b, which fails in one sentence and writes no file, outside either."""
    folder, start = tmp_path / "a" / "b", time.monotonic()
    before = everything(tmp_path)
    with pytest.raises(error) as problem:
        fetch("vision_flan", folder)
    text = str(problem.value)
    assert "\n" not in text and text.endswith(".") and len(text) < 400
    assert all(part in text for part in match), text
    assert time.monotonic() - start < 15
    assert everything(tmp_path) == before


def everything(folder):
    """{path: content} of all files and links, without the lock."""
    paths = [path for path in folder.rglob("*") if path.is_symlink() or path.is_file()]
    return {
        path: os.readlink(path) if path.is_symlink() else path.read_bytes()
        for path in paths
        if path.name != ".fetch.lock"
    }


OUTSIDE = [
    ("../../evil.sh", "leads out"), ("a/../../../evil.sh", "leads out"), ("..", "leads out"),
    ("./evil.sh", "leads out"), ("a/./evil.sh", "leads out"), ("a//evil.sh", "absolute or empty"),
    ("/{tmp}/evil.sh", "absolute"), ("a/evil.sh/", "absolute or empty"),
    ("C:evil.sh", "colon"), ("C:/evil.sh", "colon"), ("C:\\evil.sh", "backslash"),
    ("..\\..\\evil.sh", "backslash"), ("evil\0.sh", "control"), ("evil\n.sh", "control"),
    ("evil\x1b[2J.sh", "control"), ("evil\u202ehs.sh", "control"), ("e\x9b.sh", "control"),
    ("evil\u2028.sh", "control"), ("\ud800.sh", "control"),
    ("e" * 198 + ".sh", "200 bytes"), ("é" * 99 + ".sh", "200 bytes"),
    ("/".join("e" * 100 for _ in range(10)) + ".sh", "1000 bytes"),
    (".evil.sh", "hidden"), (".git/evil.sh", "hidden"),
]  # fmt: skip


@pytest.mark.parametrize("path, reason", OUTSIDE, ids=[ascii(path)[:30] for path, _ in OUTSIDE])
def test_a_download_writes_only_inside_its_folder(shards, tmp_path, path, reason):
    """Whatever the hub lists: the path must be plain names, on Windows too."""
    path = path.format(tmp=str(tmp_path).lstrip("/")) if "{tmp}" in path else path
    # A name like `..` has to match the set's pattern.
    path = path if path.endswith(".sh") else f"{path}/.sh"
    shards.files[path] = b"evil"
    # The hub sends the file too, also where the client shortens its address.
    address = posixpath.normpath(f"/datasets/{shards.repo}/resolve/{COMMIT}/{path}")
    shards.answers[address] = lambda request: shards.send(request, 200, b"evil")
    refused(tmp_path, reason, "nothing was downloaded", error=ValueError)
    assert shards.log == []


def test_names_at_the_limit_and_in_folders_are_downloaded(shards, tmp_path):
    names = ["é" * 98 + "e.sh", "a/b c/d.sh", "e..sh", "shard_1/a../x.sh"]
    shards.files |= dict.fromkeys(names, b"ok")
    fetch("vision_flan", tmp_path)
    assert [(tmp_path / name).read_bytes() for name in names] == [b"ok"] * 4


def test_a_name_that_no_pattern_wants_refuses_nothing(shards, tmp_path):
    shards.files |= {"../../readme.md": b"", ".gitattributes": b""}
    fetch("vision_flan", tmp_path / "a" / "b")
    assert set(path.name for path in everything(tmp_path)) == {
        "vision_flan.json", "shard_1.zip", "run.sh"
    }  # fmt: skip


@pytest.mark.parametrize("exists", [True, False])
def test_a_link_out_of_the_folder_is_not_written_to(shards, tmp_path, exists):
    folder, outside = tmp_path / "a" / "b", tmp_path / "outside"
    folder.mkdir(parents=True)
    outside.mkdir()
    if exists:
        (outside / "run.sh").write_text("mine")
    (folder / "run.sh").symlink_to(outside / "run.sh")
    refused(tmp_path, "run.sh is a link out of its folder", error=OSError)
    (folder / "run.sh").unlink()
    (folder / "sub").symlink_to(outside)
    shards.files["sub/run.sh"] = b"evil"
    refused(tmp_path, "sub/run.sh is a link out of its folder, or lies behind one", error=OSError)
    (folder / "sub").unlink()
    (folder / "sub").symlink_to("sub")
    refused(tmp_path, "sub is no folder, but one is needed there", error=OSError)


@pytest.mark.parametrize("name", [".fetch.lock", ".run.sh.{}.part"])
def test_a_link_in_the_place_of_a_lock_or_partial_file_is_not_written_to(shards, tmp_path, name):
    folder, mine = tmp_path / "a" / "b", tmp_path / "mine"
    folder.mkdir(parents=True)
    mine.write_text("mine")
    (entry,) = (entry for entry in shards.tree() if entry["path"] == "run.sh")
    (folder / name.format(entry["oid"][:12])).symlink_to(mine)
    refused(tmp_path, "is a link, where vflan writes a file: move it away", error=OSError)
    assert mine.read_text() == "mine"


def test_a_folder_or_a_whole_file_that_is_a_link_is_used(shards, tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "shard").write_bytes(b"zip")
    (tmp_path / "data").symlink_to(tmp_path / "disk")
    (tmp_path / "disk" / "shard_1.zip").symlink_to(tmp_path / "shard")
    fetch("vision_flan", tmp_path / "data")
    assert (tmp_path / "disk" / "run.sh").read_bytes() == b"ls"
    assert (tmp_path / "disk" / "shard_1.zip").is_symlink()
    assert sorted(name for name, _ in shards.log) == ["run.sh", "vision_flan.json"]


@pytest.mark.parametrize(
    "lie, reason",
    [({"size": size}, "impossible size") for size in (-1, 1 << 60, 10**400)]
    + [({"size": size}, "no size") for size in (None, "left out", "12", True, 1.5, 1e30, [3], {})]
    + [({"oid": oid}, "no checksum") for oid in ("left out", None, 5, "../../evil", "A" * 40)]
    + [({"lfs": lfs}, "no checksum") for lfs in ({"oid": "f" * 40}, {}, [1], "x", {"oid": 1})],
    ids=lambda value: str(value)[:30],
)  # fmt: skip
def test_a_size_or_checksum_that_cannot_be_refuses_the_list(shards, tmp_path, lie, reason):
    if lie == {"lfs": {}}:
        lie = {"lfs": {}, "oid": "left out"}
    shards.lies["run.sh"] = lie
    refused(tmp_path, "'run.sh'", reason, error=ValueError)
    assert shards.log == []


def test_a_file_that_is_listed_twice_refuses_the_list(shards, tmp_path):
    shards.files["again.sh"] = b"ls"
    shards.lies["again.sh"] = {"path": "run.sh"}
    refused(tmp_path, "listed twice", error=ValueError)


INFO = f"/api/datasets/{SETS['vision_flan'].repo}"
TREE = f"{INFO}/tree/{COMMIT}"
NO_LIST = [
    b"<!DOCTYPE html><html>Log in to the network</html>", b"", b"null", b"5", b"{}", b"[", b"\xff",
    b"[" * 200_000, b'{"error": "no"}', b'["a.sh"]', b'[{"type": "file"}]',
    b'[{"type": "file", "path": 3}]', b'{"sha": "main"}', b'{"sha": "../../x"}', b'{"sha": 5}',
]  # fmt: skip


@pytest.mark.parametrize("data", NO_LIST, ids=lambda data: str(data[:30]))
@pytest.mark.parametrize("where", [INFO, TREE])
def test_a_page_in_the_place_of_the_list_is_an_error_in_one_sentence(shards, tmp_path, where, data):
    shards.answers[where] = lambda request: shards.send(request, 200, data)
    refused(tmp_path, "sent no list of files", error=ConnectionError)


def pages(hub, next_of, page_of=lambda number: b"[]"):
    """The list in pages: next_of(number) is the address of the page after page `number`."""
    asked = []

    def answer(request):
        asked.append(request.path)
        number = len(asked)
        following = next_of(number)
        link = {"Link": f'<{following}>; rel="next"'} if following else {}
        hub.send(request, 200, page_of(number), link)

    hub.answers[TREE] = answer
    return asked


def test_a_list_on_several_pages_is_read_whole_and_from_no_other_host(shards, tmp_path):
    entries = list(shards.tree())
    asked = pages(
        shards,
        lambda n: f"https://elsewhere.invalid{TREE}?recursive=true&cursor=p%3D{n}" if n < 3 else "",
        lambda n: json.dumps(entries[n - 1 : n]).encode(),
    )
    fetch("vision_flan", tmp_path)
    assert sorted(path.name for path in everything(tmp_path)) == sorted(shards.files)
    assert len(asked) == 3 and asked[2].endswith("cursor=p%3D2")


@pytest.mark.parametrize(
    "cursor, most", [(lambda n: "same", 3), (lambda n: n % 3, 5), (lambda n: n, 21)]
)
def test_a_list_without_end_is_an_error(shards, tmp_path, monkeypatch, cursor, most):
    monkeypatch.setattr("vflan.data.hub_listing.MAX_PAGES", 20)
    asked = pages(shards, lambda n: f"{TREE}?cursor={cursor(n)}")
    refused(tmp_path, "has no end", error=ConnectionError)
    assert len(asked) <= most


def test_a_list_that_takes_for_ever_is_an_error(shards, tmp_path, monkeypatch):
    monkeypatch.setattr("vflan.data.hub_listing.LISTING_SECONDS", 0.5)
    pages(shards, lambda n: sleep(0.1) or f"{TREE}?cursor={n}")
    refused(tmp_path, "has no end", error=ConnectionError)


def test_a_list_of_too_many_files_is_an_error(shards, tmp_path, monkeypatch):
    monkeypatch.setattr("vflan.data.hub_listing.MAX_FILES", 5)
    shards.files |= {f"{i}.sh": b"" for i in range(5)}
    refused(tmp_path, "has no end", "5 files", error=ConnectionError)


def test_a_list_of_too_many_bytes_is_an_error(shards, tmp_path):
    shards.answers[TREE] = lambda request: shards.send(request, 200, b" " * (9 << 20))
    refused(tmp_path, "more than 8 MB", error=ConnectionError)


def trickle(request, length=1000):
    """Answers a request with one byte every twentieth of a second."""
    request.send_response(200)
    request.send_header("Content-Length", str(length))
    request.end_headers()
    try:
        for _ in range(200):
            request.wfile.write(b" ")
            sleep(0.05)
    except OSError:
        pass  # the client had enough
    request.close_connection = True


@pytest.mark.parametrize("where", [INFO, TREE])
def test_a_list_of_one_byte_now_and_then_does_not_hang(shards, tmp_path, monkeypatch, where):
    monkeypatch.setattr(module, "PATIENCE", 0.5)
    shards.answers[where] = trickle
    refused(tmp_path, "no whole reply in 0.5 seconds", "fetch again", error=ConnectionError)


def test_a_file_of_one_byte_now_and_then_does_not_hang(shards, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "WINDOW", 0.5)
    del shards.files["vision_flan.json"], shards.files["shard_1.zip"]
    path = f"/datasets/{shards.repo}/resolve/{COMMIT}/"
    monkeypatch.setitem(SETS, "vision_flan", replace(SETS["vision_flan"], files=["*.sh"]))
    shards.files["run.sh"] = b" " * 1000
    shards.answers[path + "run.sh"] = trickle
    start = time.monotonic()
    with pytest.raises(ConnectionError, match="^run.sh comes too slowly .* fetch again later"):
        fetch("vision_flan", tmp_path)
    assert time.monotonic() - start < 5
    # What came is kept, and the next call continues.
    del shards.answers[path + "run.sh"]
    fetch("vision_flan", tmp_path)
    assert (tmp_path / "run.sh").read_bytes() == b" " * 1000 and shards.log[-1][1] > 0


def test_connections_that_bring_a_byte_each_come_to_an_end(shards, tmp_path, monkeypatch):
    tries = []

    def one_byte(request):
        tries.append(request.headers.get("Range"))
        request.send_response(206 if tries[-1] else 200)
        request.send_header("Content-Length", "1000")
        request.end_headers()
        request.wfile.write(b" ")
        request.close_connection = True

    shards.files["run.sh"] = b" " * 1000
    shards.answers[f"/datasets/{shards.repo}/resolve/{COMMIT}/run.sh"] = one_byte
    with pytest.raises(ConnectionError, match="broke off"):
        fetch("vision_flan", tmp_path)
    assert len(tries) == 6


def test_a_file_that_is_sent_without_end_fills_no_disk(hub, tmp_path):
    hub.tail = b"x" * (8 << 20)
    fetch("vision_flan_191", tmp_path)
    assert_whole(tmp_path)


def test_a_server_that_knows_no_ranges_starts_again(hub, tmp_path):
    hub.cuts = [15 * 2**20]
    hub.tail = b"x"
    fetch("vision_flan_191", tmp_path)
    assert_whole(tmp_path)


def test_a_busy_hub_is_asked_again_but_not_for_ever(shards, tmp_path, monkeypatch):
    monkeypatch.setattr("vflan.data.hub_listing.LONGEST_WAIT", 0.01)
    asked = []

    def busy(request):
        asked.append(request.path)
        shards.send(request, 429, b"{}", {"Retry-After": "3600"})

    shards.answers[TREE] = busy
    refused(tmp_path, "429", error=ConnectionError)
    assert len(asked) == 5


def test_the_token_goes_to_no_other_host(shards, tmp_path, monkeypatch):
    """The hub keeps large files elsewhere: there, nothing is said about who asks."""
    other = Hub(shards.files, shards.repo)
    monkeypatch.setenv("HF_TOKEN", "hf_mine")
    for name in shards.files:
        path = f"/datasets/{shards.repo}/resolve/{COMMIT}/{name}"
        to = {"Location": f"{other.endpoint}/cdn/{name}"}
        shards.answers[path] = lambda request, to=to: shards.send(request, 302, b"", to)
    try:
        fetch("vision_flan", tmp_path)
    finally:
        other.server.shutdown()
        other.server.server_close()
    assert sorted(path.name for path in everything(tmp_path)) == sorted(shards.files)
    assert set(shards.tokens) == {"Bearer hf_mine"} and other.tokens == [None] * 3


def test_a_token_that_the_hub_repeats_is_not_shown(shards, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_mine")
    told = {"X-Error-Message": "no, hf_mine may not " + "x" * 5000}
    shards.answers[TREE] = lambda request: shards.send(request, 403, b"[1]", told)
    with pytest.raises(ConnectionError, match="403 Forbidden: no, ... may not") as error:
        fetch("vision_flan", tmp_path)
    assert "hf_mine" not in str(error.value) and len(str(error.value)) < 500


@pytest.mark.parametrize("address", ["hub.invalid", "http://[", "ftp://127.0.0.1", "http://a b/"])
def test_an_endpoint_that_is_no_address_is_an_error_in_one_sentence(tmp_path, monkeypatch, address):
    monkeypatch.setenv("HF_ENDPOINT", address)
    refused(tmp_path, "cannot be reached", "HF_ENDPOINT", error=ConnectionError)


def test_offline_nothing_is_asked(shards, tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    refused(tmp_path, "HF_HUB_OFFLINE is set", error=ConnectionError)
    assert shards.tokens == []


def test_two_fetches_into_one_folder_do_not_mix(hub, tmp_path):
    with (
        FileLock(tmp_path / ".fetch.lock"),
        pytest.raises(OSError, match="another fetch is running"),
    ):
        fetch("vision_flan_191", tmp_path)


def test_no_bar_is_drawn_without_a_terminal(hub, tmp_path, capfd):
    fetch("vision_flan_191", tmp_path)
    assert capfd.readouterr() == ("", "")


def test_the_command_lists_the_sets_and_an_error_is_one_sentence(capsys):
    assert main(["download", "--list"]) == 0
    listed = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in listed] == list(SETS) and REPO in listed[0]
    assert main(["download", "mnist"]) == 1
    assert "There is no set 'mnist'" in capsys.readouterr().err
