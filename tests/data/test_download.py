"""Downloading from the hub, with a server on this machine that speaks the hub's protocol."""

import errno
import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from time import sleep

import pytest
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
            yield entry

    def answer(self, request):
        path = request.path.split("?")[0]
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
    monkeypatch.setattr("huggingface_hub.file_download.time.sleep", lambda seconds: None)
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
    assert [start for name, start in hub.log if name.endswith(".zip")] == [0, 10 * 2**20]
    assert_whole(tmp_path)


def test_a_connection_that_keeps_breaking_is_an_error_and_the_next_call_continues(hub, tmp_path):
    hub.cuts = [15 * 2**20] * 20
    with pytest.raises(ConnectionError, match="broke off.*is kept.*fetch again") as error:
        fetch("vision_flan_191", tmp_path)
    assert "\n" not in str(error.value) and not (tmp_path / "image_191-task_1k.zip").exists()
    hub.cuts, hub.log[:] = [], []
    fetch("vision_flan_191", tmp_path)
    assert hub.log == [("image_191-task_1k.zip", 10 * 2**20)]
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
    hub.stall_at, hub.log[:] = None, []
    fetch("vision_flan_191", tmp_path)
    assert hub.log == [("image_191-task_1k.zip", 10 * 2**20)]
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

    monkeypatch.setattr(module, "http_get", full)
    with pytest.raises(
        OSError, match="is full. What has been downloaded is kept: free some space and fetch again"
    ):
        fetch("vision_flan_191", tmp_path)


def test_two_fetches_into_one_folder_do_not_mix(hub, tmp_path):
    with (
        module.FileLock(tmp_path / ".fetch.lock"),
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
