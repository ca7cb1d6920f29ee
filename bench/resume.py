"""Kills training runs at random moments, starts them again, and compares their weights.

    python -m bench.resume                # into bench/results/resume.json
    python -m bench.resume --kills 5 --pairs 0

The comparison is with the weights of a run that was never killed.

A small random LLaVA in fp32 on a CPU; rows with and without a picture, several epochs, held-out
rows looked at on the way; half of the runs tune in full, half with LoRA and dropout. Four kinds of
kill, all SIGKILL: at any moment of a run; while a checkpoint is being written (the disk made slow,
so that there is such a moment); one of two processes; and the process that started the two. At last
a disk (a small tmpfs, which needs root) that fills up in the middle of a checkpoint.
"""

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

import vflan
from bench.record import write
from tests.conftest import make_backbones, make_squares
from vflan.config import Recipe
from vflan.training.checkpointing import list_checkpoints
from vflan.training.run import Run

WAYS = {"full": {}, "lora": dict(lora_r=4, lora_alpha=8, lora_dropout=0.3)}
LAYOUTS = {"replicated": {}, "sharded": dict(sharding="fsdp2")}


def make_recipe(folder):
    make_backbones(folder)
    path = make_squares(folder, rows=48)
    rows = json.loads(path.read_text())
    for row in rows[::3]:
        del row["image"]
        row["conversations"][0]["value"] = "What is a square?"
    path.write_text(json.dumps(rows))
    return Recipe(
        name="straight",
        stage="base",
        vision_tower=str(folder / "vision_tower"),
        language_model=str(folder / "language_model"),
        samples=str(path),
        images=str(folder / "images"),
        runs=str(folder / "runs"),
        tune=("projector", "language_model"),
        lr=1e-3,
        max_grad_norm=1.0,
        global_batch=8,
        micro_batch=3,
        max_steps=80,
        save_every=5,
        heldout_rows=6,
        evaluate_every=40,
    )


def start(recipe, processes=1, slow_disk=0.0):
    """The id of a new process that trains the recipe; forked, so that it need not import everything
    anew.
    """
    child = os.fork()
    if child:
        return child
    os.setsid()
    log = os.open(f"{recipe.runs}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    if slow_disk:

        def fsync(file, real=os.fsync):
            time.sleep(slow_disk)
            real(file)

        os.fsync = fsync
    status = 1
    try:
        vflan.train(recipe, num_processes=processes)
        status = 0
    except BaseException as trouble:
        print(f"{type(trouble).__name__}: {trouble}", file=sys.stderr, flush=True)
    os._exit(status)


def end(child):
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def train(recipe, processes=1):
    """Train to the end; returns the run and how long it took, in seconds."""
    began = time.monotonic()
    if end(start(recipe, processes)):
        sys.exit(f"{recipe.name} failed:\n{Path(recipe.runs + '.log').read_text()[-3000:]}")
    return Run.open(recipe.folder), time.monotonic() - began


def same(run, straight):
    return run.summary["parts"] == straight.summary["parts"] and run.metrics().loss.equals(
        straight.metrics().loss
    )


def kill_at_any_moment(recipe, draw, length):
    """True once the run was killed; False if it came to its end first."""
    child = start(recipe)
    time.sleep(draw.uniform(0.1, length))
    os.kill(child, signal.SIGKILL)
    return end(child) == -signal.SIGKILL


def kill_while_writing(recipe, draw):
    child, part, whole = (
        start(recipe, slow_disk=0.1),
        recipe.folder / "checkpoints" / ".part",
        draw.randrange(1, 12),
    )
    while not (
        len(list_checkpoints(recipe.folder))
        and int(list_checkpoints(recipe.folder)[0].name[5:]) >= 5 * whole
        and part.exists()
    ):
        if os.waitpid(child, os.WNOHANG)[0]:
            return False
        time.sleep(0.005)
    time.sleep(draw.uniform(0, 0.3))
    os.kill(child, signal.SIGKILL)
    return end(child) == -signal.SIGKILL and part.exists()


def kill_of_two(recipe, draw, whom):
    """Kill one of the two workers, or the process that started them, some time after the first
    checkpoint.
    """
    child, after = start(recipe, processes=2), draw.randrange(5, 60, 5)
    while not (
        list_checkpoints(recipe.folder)
        and int(list_checkpoints(recipe.folder)[0].name[5:]) >= after
    ):
        if os.waitpid(child, os.WNOHANG)[0]:
            return False
        time.sleep(0.01)
    time.sleep(draw.uniform(0, 0.2))
    below = psutil.Process(child).children(recursive=True)
    workers = [
        process
        for process in below
        if {"vflan", "train"} <= set(process.cmdline())
        and "torch.distributed.run" not in process.cmdline()
    ]
    os.kill(child if whom == "parent" else draw.choice(workers).pid, signal.SIGKILL)
    alive = end(child) == 0
    gone, left = psutil.wait_procs(below, timeout=30)
    if left:
        sys.exit(f"{len(left)} processes of a killed run are still there")
    return not alive


def full_disk(recipe, folder):
    """1 if a run on a disk that fills up ends in one sentence, keeps its last checkpoint and, given
    room, ends as one that never stopped; 0 if not; None if no small disk can be had here.
    """
    disk = folder / "disk"
    disk.mkdir()
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1600k", "tmpfs", disk], capture_output=True
    ).returncode:
        return None
    try:
        straight, _ = train(vflan.replace(recipe, name="roomy"))
        recipe = vflan.replace(recipe, name="small", runs=str(disk / "runs"))
        log = Path(recipe.runs + ".log")
        (folder / "small.log").touch()
        failed = end(start(recipe))
        said = log.read_text() if log.exists() else ""
        sentence = [line for line in said.splitlines() if "disk is full" in line]
        kept = list_checkpoints(recipe.folder)
        subprocess.run(["mount", "-o", "remount,size=64m", disk], check=True)
        run, _ = train(recipe)
        print(sentence[-1] if sentence else said[-500:], flush=True)
        return int(
            bool(failed and sentence and kept) and run.summary["parts"] == straight.summary["parts"]
        )
    finally:
        subprocess.run(["umount", disk], check=True)


def main():
    parser = argparse.ArgumentParser(
        prog="python -m bench.resume", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--kills", type=int, default=20, help="of one process, at any moment")
    parser.add_argument(
        "--writing", type=int, default=4, help="of one process, while it writes a checkpoint"
    )
    parser.add_argument("--pairs", type=int, default=4, help="of runs of two processes")
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    draw = random.Random(asked.seed)
    kinds = [("moment", way) for _, way in zip(range(asked.kills), [*WAYS] * asked.kills)]
    kinds += [("writing", way) for _, way in zip(range(asked.writing), [*WAYS] * asked.writing)]
    pairs = [(whom, layout) for layout in LAYOUTS for whom in ("worker", "parent")] * asked.pairs
    kills, identical, counts = 0, 0, {}
    with tempfile.TemporaryDirectory() as folder:
        recipe = make_recipe(Path(folder))
        straight = {
            way: train(vflan.replace(recipe, name=way, **change)) for way, change in WAYS.items()
        }
        for layout in LAYOUTS if asked.pairs else ():
            straight[layout] = train(vflan.replace(recipe, name=layout, **LAYOUTS[layout]), 2)
        for number, (kind, way) in enumerate(kinds + pairs[: asked.pairs], 1):
            mine = vflan.replace(recipe, name=f"killed-{number}", **WAYS.get(way, LAYOUTS.get(way)))
            whole, length = straight[way]
            while True:
                shutil.rmtree(mine.folder, ignore_errors=True)
                if kind == "moment":
                    hit = kill_at_any_moment(mine, draw, length)
                elif kind == "writing":
                    hit = kill_while_writing(mine, draw)
                else:
                    hit = kill_of_two(mine, draw, kind)
                if hit:
                    break
            at = len(Run(mine.folder).metrics()) if (mine.folder / "metrics.jsonl").is_file() else 0
            equal = same(train(mine, 1 if way in WAYS else 2)[0], whole)
            kills, identical, counts[kind] = kills + 1, identical + equal, counts.get(kind, 0) + 1
            print(
                f"{number:3} {kind:8} {way:10} killed after step {at:3}: "
                f"{'identical' if equal else 'DIFFERENT'}",
                flush=True,
            )
        filled = full_disk(recipe, Path(folder))
    checks = {
        "kills": ("kills", 20, None),
        "identical": ("runs with the same bits as one never killed", kills, None),
        "kills_while_writing": ("kills while a checkpoint was written", 3, None),
        "kills_of_two_processes": ("kills of a run of two processes", 3, None),
        "full_disk": ("1: one sentence, last checkpoint whole, same bits in the end", 1, None),
    }
    values = dict(kills=kills, identical=identical, kills_while_writing=counts.get("writing", 0))
    values |= dict(
        kills_of_two_processes=counts.get("worker", 0) + counts.get("parent", 0), full_disk=filled
    )
    write(
        "resume",
        checks,
        values,
        f"python -m bench.resume {' '.join(sys.argv[1:])}".strip(),
        seed=asked.seed,
    )


if __name__ == "__main__":
    main()
