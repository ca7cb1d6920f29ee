"""What `make demo` and `make test` cost here, in a fresh clone of the last commit.

    python -m bench.demo                      # everything, into bench/results/demo.json
    python -m bench.demo --only demo_minutes demo_peak_gb

The clone must also be clean after them.

Installing is timed on its own (setup_minutes): it depends on the network more than on us. Peak
memory is that of the process tree, sampled up to twice a second. On Linux a page that processes
share counts once; elsewhere once for each of them, so the truth is a little lower.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from bench.record import matmul_gflops, write
from vflan.tools.watch import Watch

HOME = Path(__file__).resolve().parent.parent
# name: (unit, at least, at most); the rate has no target, it says what the minutes were measured on
CHECKS = {
    "setup_minutes": ("min", None, None),
    "demo_minutes": ("min", None, 10),
    "demo_peak_gb": ("GB", None, 4),
    "again_minutes": ("min", None, 1),
    "notebooks_test_minutes": ("min", None, None),
    "test_minutes": ("min", None, 8),
    "changed_files": ("tracked files that git sees changed at the end", None, 0),
    "matmul_gflops": ("GFLOPS fp32, 1 thread", None, None),
}


def command(target, folder, log):
    """Run `make target` in `folder` and return its Watch; a failure ends the benchmark with the end
    of the log.
    """
    environment = {
        key: value for key, value in os.environ.items() if key not in ("VFLAN_HOME", "VIRTUAL_ENV")
    }
    with open(log, "w") as out:
        process = subprocess.Popen(
            ["make", target], cwd=folder, stdout=out, stderr=out, env=environment
        )
        with Watch(process.pid) as watch:
            code = process.wait()
    if code:
        tail = "\n".join(Path(log).read_text().splitlines()[-20:])
        sys.exit(f"make {target} failed after {watch.minutes:.1f} minutes:\n{tail}")
    return watch


def measure(names, keep=None):
    """The values of the named checks. demo and test run in a fresh clone (in `keep`, if given), so
    that nothing is left over from before; `again_minutes` is a second `make demo`, after a first
    one in the same clone.
    """
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
        if "notebooks_test_minutes" in names:
            watch = command("notebooks-test", clone, f"{folder}/notebooks-test.log")
            values["notebooks_test_minutes"] = watch.minutes
        if "test_minutes" in names:
            values["test_minutes"] = command("test", clone, f"{folder}/test.log").minutes
        if "changed_files" in names:
            status = ["git", "-C", clone, "status", "--porcelain"]
            changed = subprocess.run(status, capture_output=True, text=True, check=True).stdout
            values["changed_files"] = len(changed.splitlines())
    return values


def main():
    parser = argparse.ArgumentParser(
        prog="python -m bench.demo", description=__doc__.splitlines()[0]
    )
    parser.add_argument(
        "--only", nargs="+", choices=CHECKS, default=list(CHECKS), help="measure only these"
    )
    parser.add_argument(
        "--keep", help="clone into this folder, or use the clone there, and leave it"
    )
    options = parser.parse_args()
    names, keep = options.only, options.keep
    shown = " ".join("FOLDER" if arg == keep else arg for arg in sys.argv[1:])
    write("demo", CHECKS, measure(names, keep), f"python -m bench.demo {shown}".strip())


if __name__ == "__main__":
    main()
