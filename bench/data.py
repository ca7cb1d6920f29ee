"""What it costs to open Vision-Flan's full 1,664,261 records, compared with json.load.

    python -m bench.data                  # full size, into bench/results/data.json
                                          # (about ten minutes, 3 GB of disk)
    python -m bench.data --rows 100000    # a trial: prints the numbers, scaled to full size

The file is made here, seeded, in the form of vision_flan.json: 187 tasks of one written instruction
each, one turn, short answers, about 590 bytes a record as the released file has. Each figure comes
from a fresh process, whose peak is the kernel's own (VmHWM). The pictures are not there: opening
looks at names only.

open_rss_mb is the peak once the table is open. Reading then maps pages of the table, which belong
to the page cache and are shared: thousand_rows_rss_mb counts them (64 KB to 1 MB around each look,
as the kernel likes), its note _anon_mb is what the process owns.
"""

import argparse
import json
import multiprocessing
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from bench.record import HOME, write

ROWS, TASKS, SEED = 1_664_261, 187, 0
CHECKS = {
    "open_seconds": ("s", None, 1),
    "open_rss_mb": ("MB", None, 300),
    "thousand_rows_rss_mb": ("MB", None, None),
    "convert_seconds": ("s", None, 180),
    "convert_rss_mb": ("MB", None, 1500),
    "eight_open_pss_mb": ("MB", None, None),
    "eight_open_rss_mb": ("MB", None, None),
    "json_load_seconds": ("s", None, None),
    "json_load_rss_mb": ("MB", None, None),
}
GROW = ("convert_seconds", "json_load_seconds")  # with the rows
WORDS = (
    "the a of in on is are which what image picture shown object color category following label "
    "choose correct answer people animal street vehicle indoor outdoor left right between describe "
    "question options given based text scene"
).split()
WORDS += "café naïve Zürich façade".split()  # names in the answers are not all ASCII


def make(path, rows):
    """Write `rows` records resembling Vision-Flan's, the tasks one after the other."""
    draw = random.Random(SEED)
    instructions = [" ".join(draw.choices(WORDS, k=draw.randint(8, 76))) for _ in range(TASKS)]
    phrases = [" ".join(draw.choices(WORDS, k=draw.randint(0, 20))) for _ in range(5000)]
    answers = [
        " ".join(draw.choices(WORDS, k=min(200, int(draw.paretovariate(0.9)) + 1)))
        for _ in range(5000)
    ]
    with open(path, "w", encoding="utf-8") as file:
        for i in range(rows):
            task = i * TASKS // rows
            name = f"dataset_{task // 2}+task_{task}"
            asked, said = f"{instructions[task]} {draw.choice(phrases)}", draw.choice(answers)
            turns = [f"<image>\n{asked}" if task % 2 else f"{asked}\n<image>", said]
            row = {
                "id": f"{name}_{i}",
                "image": f"{name}_{i}_COCO_train2014_{draw.randrange(10**6):012}.jpg",
                "task_name": name,
            }
            row["conversations"] = [
                {"from": who, "value": text} for who, text in zip(("human", "gpt"), turns)
            ]
            file.write(("[" if i == 0 else ", ") + json.dumps(row, ensure_ascii=False))
        file.write("]")


def memory():
    """This process in MB: its peak, and what it holds now, of its own (anon) and of files."""
    lines = [line.split() for line in Path("/proc/self/status").read_text().splitlines()]
    kb = {line[0].rstrip(":"): int(line[1]) for line in lines if len(line) == 3 and line[2] == "kB"}
    return {
        "peak": kb["VmHWM"] / 1024,
        **{part: kb[f"Rss{part}"] / 1024 for part in ("Anon", "File")},
    }


def baseline(path):
    """json.load, as LLaVA reads its samples."""
    start = time.perf_counter()
    with open(path, encoding="utf-8") as file:
        rows = json.load(file)
    return {"seconds": time.perf_counter() - start, "rows": len(rows), **memory()}


def opening(path, together=None):
    """Open, then read 1,000 random rows. With `together`, a barrier, wait before measuring until
    all have done so.
    """
    start = time.perf_counter()
    from vflan.data.samples import load_samples

    imported, before = time.perf_counter(), memory()
    samples = load_samples(path)
    opened, held = time.perf_counter(), memory()
    draw = random.Random(SEED)
    texts = [
        samples[draw.randrange(len(samples))]["conversations"][0]["value"] for _ in range(1000)
    ]
    read = time.perf_counter()
    out = {
        "import": imported - start,
        "seconds": opened - imported,
        "row_us": (read - opened) * 1000,
        "rows": len(samples),
    }
    out |= {
        "torch": "torch" in sys.modules,
        "imported": before["peak"],
        "words": sum(map(len, texts)),
        **memory(),
    }
    out["opened"] = held["peak"]
    if together:
        together.wait()
        out |= mapped()
        together.wait()
    return out


def mapped():
    """MB that this process maps (rss) and its part of them when shared pages are divided among
    their users (pss); the table's apart.
    """
    found, table = dict.fromkeys(("rss", "pss", "table_rss", "table_pss"), 0), False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        name, *rest = line.split()
        if not name.endswith(":"):
            table = line.endswith(".arrow")
        elif name in ("Rss:", "Pss:"):
            found[name[:-1].lower()] += int(rest[0]) / 1024
            found[f"table_{name[:-1].lower()}"] += table * int(rest[0]) / 1024
    return found


def _sharing(path, together, queue):
    queue.put(opening(path, together))


def eight(path):
    """The sums of `mapped` over eight processes that hold the file open at once, none of them the
    child of another that did.
    """
    fresh = multiprocessing.get_context("spawn")
    together, queue = fresh.Barrier(8, timeout=300), fresh.Queue()
    children = [fresh.Process(target=_sharing, args=(path, together, queue)) for _ in range(8)]
    for child in children:
        child.start()
    found = [queue.get(timeout=600) for _ in children]
    for child in children:
        child.join()
    return {key: sum(one[key] for one in found) for key in ("pss", "rss", "table_pss", "table_rss")}


def fresh(what, path, cache):
    """The result of one of the functions above in a process of its own."""
    environment = os.environ | {"VFLAN_CACHE": str(cache)}
    command = [sys.executable, "-m", "bench.data", "--child", what, str(path)]
    done = subprocess.run(
        command, cwd=HOME, env=environment, stdout=subprocess.PIPE, text=True, check=True
    )
    found = json.loads(done.stdout.splitlines()[-1])
    print(what, {key: round(value, 3) for key, value in found.items()}, flush=True)
    return found


def main():
    parser = argparse.ArgumentParser(
        prog="python -m bench.data", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--rows", type=int, default=ROWS)
    parser.add_argument(
        "--folder",
        help="for the generated file, which is deleted at the end (default: the temporary folder)",
    )
    parser.add_argument("--child", nargs=2, metavar=("WHAT", "PATH"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(
            json.dumps(
                {"baseline": baseline, "opening": opening, "eight": eight}[args.child[0]](
                    args.child[1]
                )
            )
        )
        return
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        path, cache = Path(folder) / "vision_flan.json", Path(folder) / "cache"
        make(path, args.rows)
        size = path.stat().st_size / 1e6
        print(f"{args.rows:,} rows, {size:,.0f} MB", flush=True)
        slow = fresh("baseline", path, cache)
        first, again = fresh("opening", path, cache), fresh("opening", path, cache)
        shared = fresh("eight", path, cache)
        table = sum(file.stat().st_size for file in cache.rglob("*.arrow")) / 1e6
    assert slow["rows"] == first["rows"] == again["rows"] == args.rows and not again["torch"]
    values = {
        "open_seconds": again["seconds"],
        "open_rss_mb": again["opened"],
        "thousand_rows_rss_mb": again["peak"],
    }
    values |= {"convert_seconds": first["seconds"], "convert_rss_mb": first["opened"]}
    values |= {"eight_open_pss_mb": shared["pss"], "eight_open_rss_mb": shared["rss"]}
    values |= {"json_load_seconds": slow["seconds"], "json_load_rss_mb": slow["peak"]}
    notes = {f"eight_{part}_mb": round(shared[part]) for part in ("table_pss", "table_rss")}
    notes |= {"rows": args.rows, "json_mb": round(size), "table_mb": round(table), "seed": SEED}
    notes |= {f"thousand_rows_{part.lower()}_mb": round(again[part]) for part in ("Anon", "File")}
    notes |= {
        "import_seconds": round(again["import"], 2),
        "import_rss_mb": round(again["imported"]),
        "row_us": round(again["row_us"]),
    }
    if args.rows == ROWS:
        write("data", CHECKS, values, "python -m bench.data", **notes)
    else:
        whole = {
            name: round(seconds * ROWS / args.rows)
            for name, seconds in values.items()
            if name in GROW
        }
        print(json.dumps(values | notes | {"at_full_size_seconds": whole}, indent=1))


if __name__ == "__main__":
    main()
