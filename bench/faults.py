"""Interrupts long work with faults, starts it again, and compares it with undisturbed work.

    python -m bench.faults                       # over 400 faults, into bench/results/faults.json
    python -m bench.faults --share 0.1 --kinds kill full_disk

Each piece of work runs in a process of its own, in a folder of its own, and writes down what came
out: hashes of files, rows, weights and losses bit by bit, scores. A fault is survived if no half
file was taken for a whole one on the way, what stopped said why in one sentence, and the work,
begun again, ends with the same as work that nothing happened to. Disks that fill up and folders
that cannot be written are small tmpfs mounts, which need root.
"""

import argparse
import errno
import fcntl
import hashlib
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from http.server import HTTPServer
from pathlib import Path

import nbformat
from nbformat.v4 import new_code_cell, new_notebook

import vflan
from bench.bad_input import damaged
from bench.record import write
from bench.resume import make_recipe
from tests.chat_server import ChatServer, said
from tests.data.test_download import REPO, Hub
from vflan import config, world
from vflan.config import replace, write_json
from vflan.evaluation.judge import EndpointJudge
from vflan.models.llava import fingerprint
from vflan.tools import notebooks as book
from vflan.training.checkpointing import list_checkpoints
from vflan.training.run import Run
from vflan.world.twins import write_twins

PATIENCE = 300  # seconds that any piece of work may take
SENTENCES = (
    "disk is full",
    "No space left",
    "not enough room",
    "Read-only",
    "read-only",
    "cannot be written",
    "already",
    "another process",
    "another fetch",
    "is being",
    "free",
)


class Workshop:
    """What all work shares, and the pieces of work: each takes a folder and returns what came out,
    as json.
    """

    def __init__(self, folder):
        self.folder = folder
        self.recipe = replace(
            make_recipe(folder / "shared"), max_steps=40, evaluate_every=20, save_every=4
        )
        rows = json.loads(Path(self.recipe.samples).read_text())
        vflan.save_samples(
            [row | {"id": f"{i}"} for i in range(400) for row in rows],
            folder / "shared" / "many.json",
        )
        (folder / "questions" / "images").mkdir(parents=True)
        write_twins(folder / "questions", seed=3, questions=1.5)
        with_judge = folder / "questions" / "mm_vet"
        lines = [
            json.loads(line) for line in (with_judge / "questions.jsonl").read_text().splitlines()
        ]
        (with_judge / "questions.jsonl").write_text(
            "\n".join(json.dumps(row | {"judge": None}) for row in lines)
        )
        self.run = vflan.train(
            replace(self.recipe, name="trained", runs=str(folder / "shared" / "runs"))
        )
        HTTPServer.handle_error = lambda *_: None  # a client that was killed hangs up
        self.hub = Hub(
            {
                "annotation_191-task_1k.json": b"[]" * 10,
                "image_191-task_1k.zip": bytes(range(256)) * 65_536,
            },
            REPO,
        )
        self.slow = 0.0
        self.server = ChatServer(self.reply)
        threading.Thread(
            target=self.server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True
        ).start()
        os.environ |= dict(
            HF_ENDPOINT=self.hub.endpoint,
            NO_PROXY="127.0.0.1",
            HF_HUB_DISABLE_XET="1",
            OPENAI_BASE_URL=self.server.url,
            OPENAI_API_KEY="none",
        )

    def reply(self, body, number):
        time.sleep(self.slow if number % 3 else 0.004)
        return said(
            str(
                int(hashlib.sha256(json.dumps(body["messages"]).encode()).hexdigest(), 16) % 11 / 10
            )
        )

    # ---- the pieces of work

    def fetch(self, home):
        folder = vflan.fetch("vision_flan_191", home / "data")
        return {
            path.name: digest(path)
            for path in sorted(folder.iterdir())
            if not path.name.startswith(".")
        }

    def convert(self, home):
        samples = vflan.load_samples(self.folder / "shared" / "many.json", self.recipe.images)
        return hashlib.sha256(json.dumps(samples[:]).encode()).hexdigest()

    def check(self, home):
        report = vflan.check(
            vflan.load_samples(
                self.folder / "questions" / "pictures.json", self.folder / "questions" / "images"
            )
        )
        return [str(report), report.bad.to_csv(), report.duplicates.to_csv()]

    def train(self, home, processes=1, **more):
        run = vflan.train(
            replace(self.recipe, name="mine", runs=str(home / "runs"), **more),
            num_processes=processes,
        )
        left = [
            path.name
            for path in run.folder.iterdir()
            if path.name.startswith(".") and path.name != ".lock"
        ]
        return [run.summary["parts"], list(run.metrics().loss), run.heldout().to_csv(), left]

    def load(self, home):
        """A finished run, and what its model is."""
        trained = self.train(home)
        run = Run(home / "runs" / "mine")
        model, processor = run.load_model(), run.processor()
        text = json.dumps([processor.tokenizer("What color?")["input_ids"], str(model.config)])
        return [*trained, fingerprint(model), hashlib.sha256(text.encode()).hexdigest()]

    def train_lora(self, home):
        return self.train(home, lora_r=4, lora_alpha=8, lora_dropout=0.3)

    def train_on_a_slow_disk(self, home):
        def fsync(file, real=os.fsync):
            time.sleep(0.03)
            real(file)

        os.fsync = fsync
        return self.train(home)

    def train_with_two(self, home):
        return self.train(home, processes=2)

    def evaluate(self, home, judge=None, names=("vqav2", "gqa", "seed")):
        folder = home / "trained"
        if not folder.exists():
            shutil.rmtree(home / "copy", ignore_errors=True)
            shutil.copytree(self.run.folder, home / "copy")
            (home / "copy").rename(folder)
        scores = vflan.evaluate(
            Run(folder), list(names), self.folder / "questions", batch_size=4, judge=judge
        )
        answers = [answers_of(folder / "answers" / f"{name}.jsonl") for name in names]
        return [scores.to_csv(), answers]

    def judge(self, home):
        return self.evaluate(
            home,
            EndpointJudge("judge", cache=home / "verdicts", timeout=0.5, retries=1),
            ("mm_vet",),
        )[0]

    def press(self, home):
        notebooks = home / "notebooks"
        notebooks.mkdir(exist_ok=True)
        for name in ("01_one", "02_two"):
            text = (
                "import time\nfor i in range(5):\n    time.sleep(0.05)\nprint(open('x').read() "
                "if False else 'done')"
            )
            cells = [
                new_code_cell('preset = "tiny"\nchanges = {}', metadata={"tags": ["parameters"]}),
                new_code_cell(text),
            ]
            notebook = new_notebook(cells=cells)
            for number, cell in enumerate(notebook.cells):
                cell.id = f"{name}-{number}"
            nbformat.write(notebook, notebooks / f"{name}.ipynb")
        config.ROOT = home
        os.chdir(home)
        book.run_notebooks("tiny", notebooks=notebooks)
        pressed = [
            nbformat.read(path, 4)
            for path in sorted((home / "runs/tiny/notebooks").glob("*.ipynb"))
        ]
        return [[cell.get("outputs") for cell in notebook.cells] for notebook in pressed]

    def build(self, home):
        folder = world.build(
            home / "world", seed=5, captions=60, per_kind=4, conversations=20, questions=0.05
        )
        return {
            str(path.relative_to(folder)): digest(path)
            for path in sorted(folder.rglob("*"))
            if path.is_file() and path.suffix != ".lock"
        }

    def export(self, home):
        folder = home / "out"
        # An export is there whole or not at all; one that is there is not written again.
        if not folder.exists():
            self.run.export(folder)
        return {
            str(p.relative_to(folder)): digest(p) for p in sorted(folder.rglob("*")) if p.is_file()
        }

    def sweep(self, home):
        short = replace(self.recipe, runs=str(home / "runs"), max_steps=8)
        arms = {
            "a": vflan.Arm(replace(short, name="a")),
            "b": vflan.Arm(replace(short, name="b"), init="a"),
        }
        done = vflan.sweep(arms, [0], ["gqa"], self.folder / "questions", jobs=2)
        return [done.scores.to_csv(), [run.summary["parts"] for run in done.runs.values()]]


def answers_of(path):
    """[index, answer] pairs of a file; of an index that comes twice, the last counts."""
    rows = {}
    for line in path.read_bytes().splitlines():
        try:
            row = json.loads(line)
            rows[row["i"]] = row["answer"]
        except (ValueError, KeyError):
            pass  # the header, or a line that was damaged and asked again
    return sorted(map(list, rows.items()))


def digest(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def start(shop, work, home, shift=0.0, before=None):
    """The id of a new process that does the work in `home` and, at the end, writes what came out
    into home.json.

    before: called in the new process first; it takes something away from it.
    """
    child = os.fork()
    if child:
        return child
    os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    log = os.open(f"{home}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    home.mkdir(exist_ok=True)
    for name, module in list(sys.modules.items()):
        if name.startswith("vflan") and isinstance(getattr(module, "CACHE", None), Path):
            module.CACHE = home / "cache"
    os.environ["VFLAN_CACHE"] = str(home / "cache")
    if shift:
        time.time = lambda real=time.time: real() + shift
    status = 1
    try:
        if before:
            before()
        came_out = getattr(shop, work)(home)
        write_json(Path(f"{home}.json"), json.loads(json.dumps(came_out)))
        status = 0
    except BaseException as trouble:
        print(
            f"\n{type(trouble).__name__}: {' '.join(str(trouble).split())}",
            file=sys.stderr,
            flush=True,
        )
    finally:  # also where the words could not be written: a child never goes on with our work
        os._exit(status)


def end(child, patience=PATIENCE):
    """The exit status; a child that is still there after `patience` seconds is killed, and that is
    an error.
    """
    until = time.monotonic() + patience
    while True:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > until:
            os.killpg(child, signal.SIGKILL)
            os.waitpid(child, 0)
            raise AssertionError(f"it did not end within {patience} s")
        time.sleep(0.003)


def words(home):
    """What the last process of a folder said at its end."""
    path = Path(f"{home}.log")
    lines = (
        [line for line in path.read_text(errors="replace").splitlines() if line.strip()]
        if path.exists()
        else []
    )
    return lines[-1] if lines else ""


def whole(shop, work, home, expected, shift=0.0):
    """Do the work (again) to its end, and look whether the same comes out."""
    Path(f"{home}.json").unlink(missing_ok=True)
    if code := end(start(shop, work, home, shift)):
        raise AssertionError(f"begun again, it ended with {code}: {words(home)[:300]}")
    if (came_out := json.loads(Path(f"{home}.json").read_text())) != expected:
        pairs = zip(came_out, expected) if isinstance(expected, list) else [(came_out, expected)]
        odd = next(
            (f"{one!s:.300} instead of {other!s:.300}" for one, other in pairs if one != other),
            "more or less of it",
        )
        raise AssertionError(f"something else came out: {odd}")


def struck(shop, work, home, draw, length, what=signal.SIGKILL):
    """Start the work and strike it at a random moment; False if it was done before."""
    child = start(shop, work, home)
    time.sleep(draw.uniform(0.02, length))
    try:
        (os.killpg if what == signal.SIGKILL else os.kill)(child, what)
    except ProcessLookupError:
        pass
    return end(child, 30) != 0


# ------------------------------------------------------------------------------------------- faults


def kill(shop, work, home, draw, expected, length):
    """SIGKILL to the process and all that it started, once to three times."""
    hit = [struck(shop, work, home, draw, length) for _ in range(draw.choice((1, 1, 2, 3)))]
    whole(shop, work, home, expected)
    return any(hit)


def interrupt(shop, work, home, draw, expected, length):
    """Ctrl-C."""
    hit = struck(shop, work, home, draw, length, signal.SIGINT)
    if hit and "KeyboardInterrupt" not in Path(f"{home}.log").read_text(errors="replace"):
        raise AssertionError(f"it was interrupted and said: {words(home)[:300]}")
    whole(shop, work, home, expected)
    return hit


def mounted(home, size):
    home.mkdir(exist_ok=True)
    subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", home],
        check=True,
        capture_output=True,
    )


def full_disk(shop, work, home, draw, expected, length, room):
    """A disk that fills up during the work; then enough free space."""
    mounted(home, max(16_384, int(room * draw.uniform(0.05, 0.9))))
    try:
        hit = bool(end(start(shop, work, home)))
        if hit and not any(sentence in words(home) for sentence in SENTENCES):
            raise AssertionError(f"a full disk, and it said: {words(home)[:300]}")
        subprocess.run(["mount", "-o", "remount,size=512m", home], check=True)
        whole(shop, work, home, expected)
        return hit or work in ("convert", "check")  # these go on without what they would have kept
    finally:
        subprocess.run(["umount", home], check=True)


def read_only(shop, work, home, draw, expected, length):
    """A folder that becomes read-only during the work."""
    mounted(home, "512m")
    try:
        struck(shop, work, home, draw, length)
        subprocess.run(["mount", "-o", "remount,ro", home], check=True)
        hit = bool(end(start(shop, work, home)))
        if hit and not any(sentence in words(home) for sentence in SENTENCES):
            raise AssertionError(f"a read-only folder, and it said: {words(home)[:300]}")
        subprocess.run(["mount", "-o", "remount,rw", home], check=True)
        whole(shop, work, home, expected)
        return True
    finally:
        subprocess.run(["umount", home], check=True)


def two_at_once(shop, work, home, draw, expected, length):
    """The same work twice in the same folder at the same time: each is done, waits, or refuses in a
    sentence.
    """
    first = start(shop, work, home)
    time.sleep(draw.uniform(0, length / 2))
    second = start(shop, work, home)
    codes = [end(first), end(second)]
    if all(codes):
        raise AssertionError(f"neither came to its end: {words(home)[:300]}")
    if any(codes) and not any(
        sentence in Path(f"{home}.log").read_text() for sentence in SENTENCES
    ):
        raise AssertionError(
            f"one failed without saying that the other was there: {words(home)[:300]}"
        )
    whole(shop, work, home, expected)
    return True


def clock_moved(shop, work, home, draw, expected, length):
    """Killed; then all files get another date, and the clock goes wrong by up to ten years."""
    struck(shop, work, home, draw, length)
    date = draw.choice((86_400 * 366, time.time() + 10**8, time.time() - 10**6))
    for path in [*home.rglob("*")] if home.exists() else ():
        if path.is_file():
            os.utime(path, (date, date))
    whole(shop, work, home, expected, shift=draw.choice((-3e8, 3e8, -3600)))
    return True


def damaged_checkpoint(shop, work, home, draw, expected, length):
    """Killed after a checkpoint; then a file of the newest one is cut off, changed or lost."""
    child, folder = start(shop, work, home), home / "runs" / "mine"
    while not list_checkpoints(folder):
        if os.waitpid(child, os.WNOHANG)[0]:
            return False
        time.sleep(0.005)
    time.sleep(draw.uniform(0, 0.3))
    os.killpg(child, signal.SIGKILL)
    end(child)
    newest = list_checkpoints(folder)
    if newest:
        file = draw.choice([path for path in newest[0].rglob("*") if path.is_file()])
        file.write_bytes(damaged(file.read_bytes(), draw)) if draw.random() < 0.8 else file.unlink()
    whole(shop, work, home, expected)
    return bool(newest)


def slow_judge(shop, work, home, draw, expected, length):
    """A judge that times out on two of three replies; later it answers."""
    shop.slow = 0.7
    try:
        code = end(start(shop, work, home))
    finally:
        shop.slow = 0.0
    if code and "call again" not in words(home):
        raise AssertionError(f"it said: {words(home)[:300]}")
    whole(shop, work, home, expected)
    return True


def kernel(shop, work, home, draw, expected, length):
    """Interrupt Kernel while a notebook trains; then the same cell again in the same kernel."""
    from jupyter_client.manager import start_new_kernel

    home.mkdir()
    write_json(
        home / "recipe.json", replace(shop.recipe, name="mine", runs=str(home / "runs")).to_dict()
    )
    cell = (
        "import json, vflan\nrecipe = "
        f"vflan.Recipe(**json.load(open({str(home / 'recipe.json')!r})))\n"
        "run = vflan.train(recipe)\nprint(json.dumps([run.summary['parts'], "
        "list(run.metrics().loss)]))"
    )
    manager, client = start_new_kernel(kernel_name="python3")
    try:
        asked = client.execute(cell)
        until = time.monotonic() + PATIENCE
        while not (home / "runs" / "mine" / "metrics.jsonl").exists() and time.monotonic() < until:
            time.sleep(0.02)
        time.sleep(draw.uniform(0, length / 2))
        manager.interrupt_kernel()
        while (reply := client.get_shell_msg(timeout=PATIENCE))["parent_header"].get(
            "msg_id"
        ) != asked:
            pass
        hit, printed = reply["content"].get("ename") == "KeyboardInterrupt", []

        def hear(message):
            if message["content"].get("name") == "stdout":
                printed.append(message["content"]["text"])

        while reply := client.execute_interactive(cell, timeout=PATIENCE, output_hook=hear)[
            "content"
        ]:
            # A kernel turns down what reaches it just after an error: press again.
            if reply["status"] != "aborted":
                break
        if reply["status"] != "ok":
            raise AssertionError(f"the cell, run again: {reply['ename']}: {reply['evalue']}")
        parts, losses = json.loads("".join(printed).splitlines()[-1])
        if [parts, losses] != expected[:2]:
            raise AssertionError("something else came out")
        return hit
    finally:
        manager.shutdown_kernel(now=True)


def bit_flip(shop, work, home, draw, expected, length):
    """A bit of a file that is kept is another one: the work is done again, or the file is named."""
    whole(shop, work, home, expected)
    kept = [path for path in sorted(home.rglob("*")) if path.is_file() and path.stat().st_size]
    kept = [path for path in kept if path.suffix not in (".lock", ".log") and path.name[0] != "."]
    file = draw.choice([path for path in kept if path.name not in NOT_SEALED])
    data = bytearray(file.read_bytes())
    at, sound = draw.randrange(len(data)), bytes(data)
    data[at] ^= 1 << draw.randrange(8)
    file.write_bytes(data)
    if end(start(shop, work, home)):
        if not any(name in words(home) for name in (file.name, file.parent.name, str(home.name))):
            raise AssertionError(f"{file.name} was changed, and it said: {words(home)[:300]}")
        file.write_bytes(sound)
    whole(shop, work, home, expected)
    return True


# What a person may edit, and what tells about a run without being used again.
NOT_SEALED = ("recipe.json", "init.json", "metrics.jsonl", "heldout.jsonl", "samples.jsonl")
NOT_SEALED += ("scores.csv", "README.md", "machine.json", "mixture.json")


def _without(shop, work, home, expected, before, said):
    """Do the work in a process that lacks something; then with it. `said`: words of the reason."""
    hit = bool(end(start(shop, work, home, before=before)))
    if hit and not any(word in words(home) for word in said):
        raise AssertionError(f"it said: {words(home)[:300]}")
    whole(shop, work, home, expected)
    return True


def no_locks(shop, work, home, draw, expected, length):
    """A file system that has no locks, or whose lock server does not answer."""
    code = draw.choice((errno.ENOSYS, errno.ENOLCK))

    def refuse(*_):
        raise OSError(code, os.strerror(code))

    def before():
        fcntl.flock = fcntl.lockf = refuse

    return _without(shop, work, home, expected, before, ("lock",))


def file_limit(shop, work, home, draw, expected, length):
    """A limit for the size of files (ulimit -f)."""
    limit = draw.choice((0, 100, 3_000, 30_000, 300_000))

    def before():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))

    # Standard error is a file too, so what it said may be cut.
    log = Path(f"{home}.log")
    hit = bool(end(start(shop, work, home, before=before)))
    text = log.read_text(errors="replace") if log.exists() else ""
    if hit and limit >= 3_000 and "Traceback" in text:
        raise AssertionError(f"it said: {words(home)[:300]}")
    whole(shop, work, home, expected)
    return True


def full_output(shop, work, home, draw, expected, length):
    """Standard output and standard error are a full disk; the work is done all the same."""

    def before():
        full = os.open("/dev/full", os.O_WRONLY)
        os.dup2(full, 1)
        os.dup2(full, 2)

    if code := end(start(shop, work, home, before=before)):
        raise AssertionError(f"it ended with {code}")
    whole(shop, work, home, expected)
    return True


def others_files(shop, work, home, draw, expected, length):
    """The folder of a run holds somebody's files: they are there afterwards, whatever happens."""
    folder = home / "runs" / "mine"
    folder.mkdir(parents=True)
    mine = {"thesis.txt": b"mine", "figures/one.png": b"picture", "model/notes.md": b"notes"}
    mine = {name: mine[name] for name in draw.sample(sorted(mine), draw.choice((1, 2, 3)))}
    for name, text in mine.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(text)
    if draw.random() < 0.5:  # a start that failed, of another recipe
        write_json(folder / "recipe.json", shop.recipe.to_dict() | {"name": "mine", "lr": 0.5})
    hit = bool(end(start(shop, work, home)))
    for name, text in mine.items():
        if not (folder / name).is_file() or (folder / name).read_bytes() != text:
            raise AssertionError(f"{name} is gone or changed")
    if hit and not any(name.split("/")[0] in words(home) for name in mine):
        raise AssertionError(f"it said: {words(home)[:300]}")
    shutil.rmtree(folder)
    whole(shop, work, home, expected)
    return True


KINDS = {  # fault: (how it is done, {work: how often})
    "kill": (
        kill,
        dict(
            fetch=15,
            convert=12,
            check=12,
            train=14,
            train_lora=10,
            train_on_a_slow_disk=10,
            train_with_two=4,
            evaluate=16,
            judge=12,
            press=8,
            build=10,
            export=8,
            sweep=4,
        ),
    ),
    "interrupt": (interrupt, dict(train=6, evaluate=6, check=4, convert=4, fetch=4)),
    "kernel": (kernel, dict(train=3)),
    "full_disk": (
        full_disk,
        dict(train=5, evaluate=5, convert=3, check=2, fetch=3, build=3, export=3),
    ),
    "read_only": (read_only, dict(train=3, evaluate=3, convert=2, check=2, fetch=2)),
    "two_at_once": (two_at_once, dict(train=4, evaluate=3, convert=3, check=2, fetch=3, build=3)),
    "clock_moved": (clock_moved, dict(train=4, evaluate=3, convert=2, check=2, fetch=2)),
    "damaged_checkpoint": (damaged_checkpoint, dict(train=8, train_lora=4)),
    "slow_judge": (slow_judge, dict(judge=4)),
    "bit_flip": (bit_flip, dict(convert=14, check=10, evaluate=30, judge=10, load=16)),
    "no_locks": (no_locks, dict(train=4, evaluate=4, convert=3, check=3, fetch=2, sweep=2)),
    "file_limit": (file_limit, dict(train=5, evaluate=5, convert=4, check=4, fetch=4, export=4)),
    "full_output": (full_output, dict(train=4, train_with_two=2, evaluate=4, check=3, sweep=2)),
    "others_files": (others_files, dict(train=24)),
}


def main():
    parser = argparse.ArgumentParser(
        prog="python -m bench.faults", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--share", type=float, default=1.0, help="of the faults, for a look")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    asked = parser.parse_args()
    print(f"seed {asked.seed}", flush=True)
    counts, lost = Counter(), []
    with tempfile.TemporaryDirectory() as scratch:
        scratch = Path(scratch)
        shop = Workshop(scratch / "shop")
        rows = [
            {
                "id": path.stem,
                "image": path.name,
                "conversations": [
                    {"from": "human", "value": "<image>\nWhat?"},
                    {"from": "gpt", "value": "that"},
                ],
            }
            for path in sorted((shop.folder / "questions" / "images").iterdir())
        ]
        vflan.save_samples(rows, shop.folder / "questions" / "pictures.json")
        straight = {}
        for kind in asked.kinds:
            strike, works = KINDS[kind]
            for work, times in works.items():
                if work not in straight:
                    home, began = scratch / f"straight-{work}", time.monotonic()
                    if end(start(shop, work, home)):
                        sys.exit(
                            f"{work} failed undisturbed:\n{Path(f'{home}.log').read_text()[-3000:]}"
                        )
                    size = sum(
                        path.stat().st_blocks * 512 for path in home.rglob("*") if path.is_file()
                    )
                    straight[work] = (
                        json.loads(Path(f"{home}.json").read_text()),
                        time.monotonic() - began,
                        size,
                    )
                expected, length, room = straight[work]
                more = dict(room=room) if kind == "full_disk" else {}
                began, hits = time.monotonic(), 0
                for number in range(max(1, round(times * asked.share))):
                    draw = random.Random(f"{kind} {work} {number} {asked.seed}")
                    home = scratch / f"{kind}-{work}-{number}"
                    try:
                        for _ in range(4):  # a fault that came too late is none: once more
                            if hit := strike(shop, work, home, draw, expected, length, **more):
                                break
                            shutil.rmtree(home, ignore_errors=True)
                        hits += bool(hit)
                    except Exception as trouble:
                        hits += 1
                        lost.append(
                            f"{kind}, {work}, {number}: {type(trouble).__name__}: {trouble}"
                        )
                        print(lost[-1], flush=True)
                    shutil.rmtree(home, ignore_errors=True)
                counts[kind] += hits
                print(
                    f"{kind:20} {work:22} {hits:3} faults, {time.monotonic() - began:.0f} s",
                    flush=True,
                )
    checks = {
        "faults": ("faults", 400, None),
        "lost": ("faults that lost something or did not end in a clear sentence", None, 0),
        **{
            kind: (f"faults: {' '.join(strike.__doc__.split('.')[0].split())}", 1, None)
            for kind, (strike, _) in KINDS.items()
        },
    }
    values = dict(faults=sum(counts.values()), lost=len(lost), **counts)
    if asked.share == 1 and len(asked.kinds) == len(KINDS):
        write(
            "faults",
            checks,
            values,
            f"python -m bench.faults {' '.join(sys.argv[1:])}".strip(),
            seed=asked.seed,
        )
    else:
        print(values)


if __name__ == "__main__":
    main()
