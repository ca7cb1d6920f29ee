"""Families of bench.bad_input that attack: names, files, servers, hubs and texts.

Each is judged by what can be seen from outside: which files exist before and after, what a program
other than ours reads in a file, which processes start. A family yields calls, as bad_input's do.
"""

import csv
import io
import json
import os
import platform
import socket
import struct
import threading
import time
import traceback
import unicodedata
import warnings
import zipfile
import zlib
from functools import partial
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from markdown_it import MarkdownIt
from PIL import Image

import vflan
from vflan.config import Recipe
from vflan.data import http_client
from vflan.escape import for_markdown, for_terminal, from_sheet, write_sheet
from vflan.evaluation.judge import GRADE, EndpointJudge

PARTS = [
    "..", ".", "/", "\\", "a", "run", " ", "\0", "\n", "\x1b[2J", "\u202e", "\u200b", "~", "~root",
    "$HOME", "*", "?", ":", "con", "é" * 60, "x" * 120, "\ud800", "-rf", ".git", "%2e%2e", "\u2024",
    "\uff0f", "|", ";", "`id`", "model", "base",
]  # fmt: skip


def tree(folder):
    """{path: content} of everything below a folder; links by their target."""
    return {
        str(path): os.readlink(path) if path.is_symlink() else path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_symlink() or path.is_file()
    }


# -------------------------------------------------------------------------------------------- names


def names(draw, folder, n):
    """Names and places of runs. What is taken lies in its folder, is printable, and is a name."""
    folder.mkdir(parents=True)
    values = dict(stage="base", vision_tower="v", language_model="l", samples="s", images="i")

    def made(name, runs):
        recipe = Recipe(name=name, runs=runs, tune=("projector",), global_batch=8, **values)
        place, home = recipe.folder, Path(os.path.abspath(os.path.expanduser(runs or ".")))
        odd = [char for char in name if unicodedata.category(char) in ("Cc", "Cf", "Cs")]
        if odd or not 0 < len(name) <= 100 or name in (".", "..") or "/" in name:
            return "unaccounted", f"{name!r} was taken"
        if place.name != name or place.parent.resolve() != home.resolve():
            return "unaccounted", f"{name!r} in {runs!r} leads to {place}"

    for _ in range(n):
        name = "".join(draw.choice(PARTS) for _ in range(draw.choice((1, 1, 2, 3))))
        runs = str(folder / "runs") if draw.random() < 0.8 else draw.choice(PARTS)
        yield partial(made, name, runs)


# -------------------------------------------------------------------------------------------- files


def odd_files(draw, folder, n):
    """Samples that are no file, that never end, that become large, or that say a thing twice."""
    folder.mkdir(parents=True)
    (folder / "images").mkdir()
    Image.new("RGB", (40, 30), "red").save(folder / "images" / "a.png")
    row = {"id": "1", "image": "a.png", "conversations": [
        {"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "red"}]}  # fmt: skip
    text = json.dumps([row])
    deep = "[" * 100_000 + "]" * 100_000
    twice = text.replace('"id"', '"id": "0", "id"')
    contents = [
        b"", b"\0" * 5000, b"\xef\xbb\xbf" + text.encode(), text.encode("utf-16"), deep.encode(),
        zlib.compress(text.encode()), f"[{'9' * 100_000}]".encode(), text.encode() * 2,
        twice.encode(), b"[NaN, Infinity]", b'{"a": ' * 50_000, b"null", b"[]", b"{}", b'"text"',
        json.dumps({"data": [row]}).encode(), json.dumps([row] * 3)[:-20].encode(),
        text.replace("a.png", "../../secret.png").encode(), b"PK\3\4" + bytes(3000),
        (text[:-1] + "," * 40_000 + "]").encode(), b"PAR1" + bytes(900) + b"PAR1",
    ]  # fmt: skip
    pipe, loop = folder / "pipe.json", folder / "loop.json"
    os.mkfifo(pipe)
    loop.symlink_to(loop)
    links = {"/dev/zero": "zero", "/dev/stdin": "stdin", "/dev/null": "null", "/proc/kmsg": "kmsg"}
    for target, name in links.items():
        (folder / f"{name}.json").symlink_to(target)
    places = [pipe, loop, folder, *(folder / f"{name}.json" for name in links.values())]
    server = socket.socket(socket.AF_UNIX)
    server.bind(str(folder / "socket.json"))
    places.append(folder / "socket.json")
    large = folder / "large.parquet"
    turns = pa.array([row["conversations"]])
    table = pa.table({"id": ["x" * 1000], "image": ["a.png"], "conversations": turns})
    pq.write_table(table.take([0] * 20_000), large, compression="zstd", use_dictionary=True)
    parquet = large.read_bytes()

    def read(path):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            report = vflan.check(vflan.load_samples(path, folder / "images"))
        return ("named", str(report)) if len(report.bad) else None

    for number in range(n):
        if number % 4 == 0:
            yield partial(read, draw.choice(places))
            continue
        ending = draw.choice((".json", ".jsonl", ".parquet", ""))
        content = draw.choice(contents)
        if number % 16 == 1:
            content, ending = parquet, ".parquet"
        if draw.random() < 0.5:
            at = draw.randrange(len(content) + 1)
            content = content[:at] + draw.randbytes(draw.randrange(40)) + content[at:]
        path = folder / f"rows-{number}{ending}"
        path.write_bytes(content)
        yield partial(read, path)
        path.unlink()
    server.close()


def bombs(draw, folder, n):
    """Zips and pictures of a few kilobytes that unpack to gigabytes, and say that they do not."""
    (folder / "images").mkdir(parents=True)
    picture = io.BytesIO()
    Image.new("RGB", (40, 30), "red").save(picture, "PNG")
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "red"}]
    rows = [{"id": name, "image": name, "conversations": turns} for name in ("a.png", "bomb.png")]
    (folder / "rows.json").write_text(json.dumps(rows))

    def archive(size, stated):
        """A zip whose member unpacks to `size` bytes where the directory says `stated`."""
        out = io.BytesIO()
        with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as packed:
            packed.writestr("a.png", picture.getvalue())
            with packed.open("bomb.png", "w", force_zip64=True) as member:
                for _ in range(size >> 20):
                    member.write(bytes(1 << 20))
            if draw.random() < 0.3:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    packed.writestr("a.png", b"another")  # a name that stands twice
        data = bytearray(out.getvalue())
        entry = data.rfind(b"PK\1\2", 0, data.rfind(b"bomb.png"))
        struct.pack_into("<I", data, entry + 24, stated)
        return bytes(data)

    def png(chunk):
        """A PNG with a chunk of text or a profile that unpacks to a hundred megabytes."""
        body = chunk + b"k\0\0" + zlib.compress(bytes(100 << 20), 9)
        head, tail = picture.getvalue()[:33], picture.getvalue()[33:]
        whole = struct.pack(">I", len(body) - 4) + body + struct.pack(">I", zlib.crc32(body))
        return head + whole + tail

    sizes = [(300, 1000), (300, 300 << 20), (600, 2**32 - 2), (20, 5), (64, 0)]
    archives = [archive(mega << 20, stated) for mega, stated in sizes]
    pictures = [png(kind) for kind in (b"zTXt", b"iCCP")]
    frames = [Image.new("RGB", (300, 300), (i, 0, 0)) for i in range(60)]
    for kind in ("GIF", "TIFF", "WEBP"):
        out = io.BytesIO()
        frames[0].save(out, kind, save_all=True, append_images=frames[1:])
        pictures.append(out.getvalue())
    for size in ((12_000, 12_000), (30_000, 1_400), (100_000, 500)):
        out = io.BytesIO()
        Image.new("L", size).save(out, "PNG", compress_level=9)
        pictures.append(out.getvalue())

    def read(images):
        report = vflan.check(vflan.load_samples(folder / "rows.json", images))
        return ("named", str(report)) if len(report.bad) else None

    for number in range(n):
        if number % 2:
            path = folder / f"images-{number}.zip"
            path.write_bytes(draw.choice(archives))
        else:
            path = folder / f"images-{number}"
            path.mkdir()
            for name in ("a.png", "bomb.png"):
                (path / name).write_bytes(draw.choice(pictures))
        yield partial(read, path)


# ------------------------------------------------------------------------------------------ servers


class Server(threading.Thread):
    """Answers each connection with pieces of bytes: (seconds to wait, bytes) pairs."""

    def __init__(self, pieces):
        super().__init__(daemon=True)
        self.pieces, self.asked = pieces, b""
        self.socket = socket.create_server(("127.0.0.1", 0))
        self.port = self.socket.getsockname()[1]
        self.start()

    def run(self):
        while True:
            try:
                connection = self.socket.accept()[0]
            except OSError:
                return
            threading.Thread(target=self.answer, args=[connection], daemon=True).start()

    def answer(self, connection):
        try:
            with connection:
                self.asked += connection.recv(1 << 20)
                for wait, piece in self.pieces():
                    time.sleep(wait)
                    connection.sendall(piece)
        except OSError:
            pass  # the client had enough

    def close(self):
        self.socket.close()


def servers(draw, folder, n):
    """Judges that send garbage, send slowly, send without end, or send the questions elsewhere."""
    folder.mkdir(parents=True)
    os.environ |= {"OPENAI_API_KEY": "sk-secret-of-the-bench", "NO_PROXY": "127.0.0.1"}
    body = {"id": "1", "model": "m", "choices": [{"index": 0, "finish_reason": "stop", "message": {
        "role": "assistant", "content": "0.5"}}]}  # fmt: skip
    good = json.dumps(body).encode()
    gzip = zlib.compressobj(9, zlib.DEFLATED, 31)
    bomb = gzip.compress(bytes(64 << 20)) + gzip.flush()
    elsewhere = Server(lambda: [(0, b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")])

    def head(status=200, length=None, more=""):
        size = f"Content-Length: {length}\r\n" if length is not None else ""
        kind = "Content-Type: application/json\r\n"
        return f"HTTP/1.1 {status} x\r\n{kind}{size}{more}\r\n".encode()

    def twisted_reply():
        at = draw.randrange(len(good))
        data = good[:at] + draw.randbytes(draw.randrange(30)) + good[at:]
        return [(0, head(length=len(data)) + data)]

    def endless(piece):
        while True:
            yield 0, piece

    port = elsewhere.port
    kinds = [
        twisted_reply,
        twisted_reply,
        lambda: [(0, draw.randbytes(200))],
        lambda: [(0, head(length=len(good)) + good)],
        lambda: [(0, head(status=draw.choice((400, 401, 403, 404, 413, 500))) + b"<html>no")],
        lambda: [(0, head(429, 0, f"Retry-After: {draw.choice((55, -1, 10**9, 'soon'))}\r\n"))],
        lambda: [(0, head(length=10**12))] + [(0.3, b"{")] * 60,
        lambda: [(0.4, bytes([byte])) for byte in head(length=len(good)) + good],
        lambda: endless(b"x" * 100_000),
        lambda: (piece for piece in [(0, head()), *[(0, b" " * 100_000)] * 400]),
        lambda: [(0, head(length=len(bomb), more="Content-Encoding: gzip\r\n") + bomb)],
        lambda: [(0, head(307, 0, f"Location: http://localhost:{port}/v1/chat/completions\r\n"))],
        lambda: [(0, head(302, 0, "Location: file:///etc/passwd\r\n"))],
        lambda: [(0, head(200, more="X: " + "y" * 100_000 + "\r\n"))],
        lambda: [],
    ]

    def judged(number, kind):
        server = Server(kind)
        os.environ["OPENAI_BASE_URL"] = f"http://127.0.0.1:{server.port}/v1"
        try:
            judge = EndpointJudge("m", GRADE, cache=folder / f"{number}", timeout=1.0, retries=1)
            verdicts = judge.judge_all([("What?", "red", "blue", {})])
        finally:
            server.close()
        if elsewhere.asked:
            elsewhere.asked = b""
            return "unaccounted", "the question went to another host"
        kept = "".join(path.read_text() for path in folder.rglob("*.jsonl"))
        if os.environ["OPENAI_API_KEY"] in kept:
            return "unaccounted", "the key was kept"
        return None if verdicts[0].score is not None else ("named", verdicts[0].reason or "none")

    for number in range(n):
        yield partial(judged, number, draw.choice(kinds))
    elsewhere.close()


# --------------------------------------------------------------------------------------------- hubs


def hubs(draw, folder, n):
    """Listings of a hub that lie about names, sizes and kinds; nothing is written elsewhere."""
    from tests.data.test_download import REPO, Hub

    folder.mkdir(parents=True)
    guard = folder / "guard"
    guard.mkdir()
    (guard / "thesis.txt").write_text("mine")
    good = {"annotation_191-task_1k.json": b"[]" * 10, "image_191-task_1k.zip": bytes(5000)}
    hub = Hub(dict(good), REPO)
    http_client.FIRST_WAIT = 0.01  # between tries: a real hub is given minutes
    os.environ |= dict(HF_ENDPOINT=hub.endpoint, NO_PROXY="127.0.0.1", HF_HUB_DISABLE_XET="1")
    odd = [None, -1, 10**18, "12", 1.5, True, [], {}, "", "left out", "../x", "f" * 40]

    def fetched(number):
        target = guard / f"data-{number}"
        before = tree(guard)
        try:
            vflan.fetch("vision_flan_191", target)
        finally:
            after = tree(guard)
            new = {path for path in after if path not in before or after[path] != before[path]}
            outside = [path for path in new if not Path(path).is_relative_to(target)]
            if outside or set(before) - set(after):
                raise AssertionError(f"written outside: {outside}")

    for number in range(n):
        hub.files, hub.lies, hub.answers, hub.tail = dict(good), {}, {}, b""
        hub.served = dict(good)
        for _ in range(draw.choice((1, 1, 2))):
            name = draw.choice(list(good))
            key = draw.choice(("path", "size", "oid", "type", "lfs"))
            value = draw.choice(odd)
            if key == "path":
                parts = [draw.choice(PARTS) for _ in range(3)]
                value = "".join(parts).encode("utf-8", "replace").decode() + name
            hub.lies[name] = {**hub.lies.get(name, {}), key: value}
        if draw.random() < 0.15:
            hub.tail = b"more than was said"
        if draw.random() < 0.15:
            page = draw.choice((b"<html>log in", b"[", b"{}", b"null", b'[{"type": "file"}]'))
            address = f"/api/datasets/{REPO}/tree/{'0123456789' * 4}"
            hub.answers[address] = partial(_say, hub, page)
        yield partial(fetched, number)


def _say(hub, page, request):
    hub.send(request, 200, page)


# -------------------------------------------------------------------------------------------- texts

_MARKDOWN = MarkdownIt("gfm-like", {"html": True, "linkify": False})
PIECES = [
    "![x](http://a/b.png)", "[x](javascript:alert(1))", "<img src=x onerror=alert(1)>", "# head",
    "\n\n# head\n", "|", "`", "**", "__", "_a_", "<script>", "&lt;", "$x^2$", "http://a.b",
    "www.a.b", "=1+1", "+1", "-1", "@x", "\t=1", "\r=1", "'=1", "'", '"', ",", "\n", "\x1b[31m",
    "\u202e", "é", "- a", "1. a", ">", "---", "~~x~~", "\\", "task", "color of", "<!--", "-->",
    "[^1]", "\0", "\u2028",
]  # fmt: skip


def texts(draw, folder, n):
    """Foreign text in Markdown, in a sheet and on a terminal, as another program reads it."""
    folder.mkdir(parents=True)
    plain = {"paragraph_open", "paragraph_close", "inline", "text", "softbreak", "text_special"}

    def markdown(text):
        line = for_markdown(text)
        used = {token.type for token in _MARKDOWN.parse(line)}
        used |= {child.type for token in _MARKDOWN.parse(line) for child in token.children or ()}
        if used - plain or "\n" in line:
            return "unaccounted", f"{text!r} becomes {sorted(used - plain)}"

    def sheet(text):
        path = folder / "sheet.csv"
        write_sheet(pd.DataFrame({"name": [text, "plain"], "value": [1.0, 2.0]}), path, "%.2f")
        with open(path, newline="", encoding="utf-8", errors="surrogatepass") as file:
            cells = [row[0] for row in csv.reader(file)][1:]
        if len(cells) != 2 or cells[0][:1] in ("=", "+", "-", "@", "\t", "\r"):
            return "unaccounted", f"{text!r} becomes the cell {cells!r}"
        back = from_sheet(pd.read_csv(path, keep_default_na=False, dtype={"name": str}))
        if back.name[0] != text:
            return "unaccounted", f"{text!r} comes back as {back.name[0]!r}"

    def terminal(text):
        line = for_terminal(text)
        if any(ord(char) < 32 and char not in "\n\t" or char in "\x7f\x9b\u202e" for char in line):
            return "unaccounted", f"{text!r} becomes {line!r}"

    for number in range(n):
        text = "".join(draw.choice(PIECES) for _ in range(draw.randrange(1, 6)))
        if number % 3 == 1:
            text = text.replace("\0", "")
        yield partial((markdown, sheet, terminal)[number % 3], text)


FAMILIES = {names: 1500, odd_files: 500, bombs: 60, servers: 240, hubs: 240, texts: 1800}


# ------------------------------------------------------------------------------------ what is begun

STARTS = ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.fork", "os.forkpty")


class Watcher:
    """An audit hook: which processes were started, and which files outside were opened to write."""

    def __init__(self, allowed):
        self.allowed = [os.path.realpath(path) for path in allowed]
        self.started, self.written, self.on = [], [], False
        platform.processor()  # Python asks `uname -p` once, whatever the input

    def __call__(self, event, args):
        if not self.on:
            return
        if event in STARTS:
            stack = traceback.extract_stack()
            # A preset file is Python, which a process of its own runs: that one is meant.
            if any(frame.filename.endswith("preset_file.py") for frame in stack):
                return
            frame = stack[-4]
            self.started.append(f"{event} {args[:1]} in {frame.filename}:{frame.lineno}")
        elif event == "open" and isinstance(args[0], str) and self.writes(args):
            path = os.path.realpath(args[0])
            if not any(path.startswith(place) for place in self.allowed):
                self.written.append(path)

    @staticmethod
    def writes(args):
        mode, flags = args[1], args[2]
        by_mode = isinstance(mode, str) and set(mode) & set("wax+")
        return by_mode or isinstance(flags, int) and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
