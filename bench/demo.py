"""What the two commands cost here: `make demo` and `make test` in a fresh clone of the last commit.

    python -m bench.demo                      # everything, into bench/results/demo.json
    python -m bench.demo --only demo_minutes demo_peak_gb

Installing is timed on its own (setup_minutes): it depends on the network more than on us. Peak memory is that of the
process tree, sampled twice a second; pages that processes share count once for each, so the truth is a little lower.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

from vflan.book import Watch

HOME = Path(__file__).resolve().parent.parent
RESULT = HOME / "bench" / "results" / "demo.json"
# name: (unit, target); the rate has no target, it says what the minutes were measured on
CHECKS = {
    "setup_minutes": ("min", None),
    "demo_minutes": ("min", 20),
    "demo_peak_gb": ("GB", 6),
    "again_minutes": ("min", 1),
    "test_minutes": ("min", 25),
    "matmul_gflops": ("GFLOPS fp32, 1 thread", None),
}


def matmul_gflops(n=1024, seconds=2.0):
    """The rate of an n x n fp32 matrix product on one thread: the best of what `seconds` allow, in GFLOPS."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    a, b = torch.rand(n, n), torch.rand(n, n)
    best, end = float("inf"), time.monotonic() + seconds
    while time.monotonic() < end:
        start = time.perf_counter()
        a @ b
        best = min(best, time.perf_counter() - start)
    torch.set_num_threads(threads)
    return 2 * n**3 / best / 1e9


def command(target, folder, log):
    """Run `make target` in `folder` and return its Watch; a failure ends the benchmark with the end of the log."""
    environment = {key: value for key, value in os.environ.items() if key not in ("VFLAN_HOME", "VIRTUAL_ENV")}
    with open(log, "w") as out:
        process = subprocess.Popen(["make", target], cwd=folder, stdout=out, stderr=out, env=environment)
        with Watch(process.pid) as watch:
            code = process.wait()
    if code:
        tail = "\n".join(Path(log).read_text().splitlines()[-20:])
        sys.exit(f"make {target} failed after {watch.minutes:.1f} minutes:\n{tail}")
    return watch


def measure(names, keep=None):
    """The values of the named checks. demo and test run in a fresh clone (in `keep`, if given), so that nothing is left over
    from before; `again_minutes` is a second `make demo`, after a first one in the same clone."""
    values = {}
    if "matmul_gflops" in names:
        values["matmul_gflops"] = matmul_gflops()
    with tempfile.TemporaryDirectory() as folder:
        clone = Path(keep or folder) / "vflan"
        if set(names) - {"matmul_gflops"}:
            if clone.exists():  # kept from an earlier call: only what is new is fetched
                subprocess.run(["git", "-C", clone, "pull", "--quiet"], check=True)
                command("setup", clone, f"{folder}/setup.log")
            else:
                subprocess.run(["git", "clone", "--quiet", HOME, clone], check=True)
                values["setup_minutes"] = command("setup", clone, f"{folder}/setup.log").minutes
        if {"demo_minutes", "demo_peak_gb"} & set(names):
            watch = command("demo", clone, f"{folder}/demo.log")
            values.update(demo_minutes=watch.minutes, demo_peak_gb=watch.peak_gb)
        if "again_minutes" in names:
            values["again_minutes"] = command("demo", clone, f"{folder}/again.log").minutes
        if "test_minutes" in names:
            values["test_minutes"] = command("test", clone, f"{folder}/test.log").minutes
    return values


def check(name, value, commit):
    unit, target = CHECKS[name]
    holds = None if target is None else value <= target
    return {"name": name, "value": round(value, 2), "unit": unit, "target": target, "holds": holds, "commit": commit}


def merge(old, new):
    """Checks of an earlier run on this machine, with those measured now in their place, in the order of CHECKS."""
    by_name = {row["name"]: row for row in [*old, *new]}
    return [by_name[name] for name in CHECKS if name in by_name]


def machine():
    cpu = next((line.split(":")[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")), "")
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    load = os.getloadavg()[0]
    return {"cpu": cpu, "cores": os.cpu_count(), "memory_gb": round(memory, 1), "load_at_start": round(load, 1)}


def _lines(path):
    return Path(path).read_text().splitlines() if Path(path).exists() else []


def main():
    parser = argparse.ArgumentParser(prog="python -m bench.demo", description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=CHECKS, default=list(CHECKS), help="measure only these")
    parser.add_argument("--keep", help="clone into this folder, or use the clone there, and leave it")
    names, keep = parser.parse_args().only, parser.parse_args().keep
    here = machine()
    git = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=HOME, capture_output=True, text=True, check=True)
    checks = [check(name, value, git.stdout.strip()) for name, value in measure(names, keep).items()]
    old = json.loads(RESULT.read_text()) if RESULT.exists() else {"machine": here, "checks": []}
    same = all(old["machine"][key] == here[key] for key in ("cpu", "cores"))
    record = {
        "machine": here,
        "versions": {"python": platform.python_version(), **{p: version(p) for p in ("torch", "transformers")}},
        "command": " ".join(["python -m bench.demo", *("FOLDER" if arg == keep else arg for arg in sys.argv[1:])]),
        "checks": merge(old["checks"] if same else [], checks),
    }
    RESULT.parent.mkdir(parents=True, exist_ok=True)
    RESULT.write_text(json.dumps(record, indent=1) + "\n")
    for row in checks:
        target = "" if row["target"] is None else f"(at most {row['target']}: {'yes' if row['holds'] else 'NO'})"
        print(f"{row['name']:14} {row['value']:8.2f} {row['unit']} {target}")


if __name__ == "__main__":
    main()
