"""Writes what a bench measured to bench/results/NAME.json, with machine, versions and commit."""

import json
import os
import platform
import subprocess
import time
from importlib.metadata import version
from pathlib import Path

HOME = Path(__file__).resolve().parent.parent
RESULTS = HOME / "bench" / "results"


def write(name, checks, values, command, **notes):
    """Write `values` to results/NAME.json and print them.

    Numbers of an earlier run on this machine stay if they were not measured now. checks: {figure:
    (unit, at least or None, at most or None)}, in the order of the file. None as a value means that
    it could not be measured here; its row says "not measured". notes: seeds, sizes, what was
    compared.
    """
    git = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"],
        cwd=HOME,
        capture_output=True,
        text=True,
        check=True,
    )
    rows = {
        figure: row(figure, value, *checks[figure], git.stdout.strip())
        for figure, value in values.items()
    }
    path, here = RESULTS / f"{name}.json", machine()
    if path.exists():
        old = json.loads(path.read_text())
        if all(old["machine"][key] == here[key] for key in ("cpu", "cores")):
            rows = {r["name"]: r for r in old["checks"]} | rows
            notes = old.get("notes", {}) | notes
    versions = {
        "python": platform.python_version(),
        **{p: version(p) for p in ("torch", "transformers", "datasets")},
    }
    record = {"machine": here, "versions": versions, "command": command}
    record |= {"notes": notes} if notes else {}
    # Of another bench that writes into the same file.
    others = [figure for figure in rows if figure not in checks]
    record["checks"] = [rows[figure] for figure in [*checks, *others] if figure in rows]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=1) + "\n")
    for r in (rows[figure] for figure in values):
        judged = "" if r["holds"] is None else f"({r['target']}: {'yes' if r['holds'] else 'NO'})"
        print(f"{r['name']:24} {r['value']!s:>12} {r['unit']} {judged}")


def row(name, value, unit, least, most, commit):
    bounds = [("at least", least), ("at most", most)]
    target = " and ".join(f"{word} {bound}" for word, bound in bounds if bound is not None)
    if value is None:
        return {
            "name": name,
            "value": "not measured",
            "unit": unit,
            "target": target,
            "holds": None,
            "commit": commit,
        }
    holds = (
        bool((least is None or value >= least) and (most is None or value <= most))
        if target
        else None
    )
    value = float(f"{value:.4g}") if isinstance(value, float) else value
    return {
        "name": name,
        "value": value,
        "unit": unit,
        "target": target,
        "holds": holds,
        "commit": commit,
    }


def machine():
    cpu = next(
        (
            line.split(":")[1].strip()
            for line in _lines("/proc/cpuinfo")
            if line.startswith("model name")
        ),
        "",
    )
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    load = os.getloadavg()[0]
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "memory_gb": round(memory, 1),
        "load_at_start": round(load, 1),
    }


def matmul_gflops(n=1024, seconds=2.0):
    """The rate of an n x n fp32 matrix product on one thread: the best of what `seconds` allow, in
    GFLOPS.
    """
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


def _lines(path):
    return Path(path).read_text().splitlines() if Path(path).exists() else []
