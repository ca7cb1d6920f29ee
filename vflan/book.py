"""The press: runs the notebooks in order, lays the executed ones out clean, and says where everything is.

    python -m vflan.book tiny                                   # all notebooks, about as long as a coffee
    python -m vflan.book tiny --notebooks 03 05 -p changes '{"seed": 1}'
    python -m vflan.book full_13b -p num_processes 8 --out my_run
    python -m vflan.book tiny_frozen --notebooks 06 07 08 --write -p seeds '[10, 11]'   # `make paper` has the whole line
    python -m vflan.book --readme                               # run nothing: fill the tables of README.md from the results

The executed notebooks go to runs/<preset>/notebooks; minutes and memory to runs/<preset>/book.json; and all that came out stands
on one page, runs/<preset>/report.html.
"""

import argparse
import ast
import base64
import functools
import hashlib
import io
import json
import os
import platform
import re
import sys
import tempfile
import threading
import time
from pathlib import Path

import nbformat
import pandas as pd
import psutil
from PIL import Image

from vflan.benchmarks import BENCHMARKS
from vflan.recipe import ROOT
from vflan.report import STAGES, write_report
from vflan.stable import tag

WRITTEN = {
    "tiny": "notebooks",
    "tiny_frozen": "notebooks/paper",
}  # preset -> where its executed notebooks are committed
LIMIT = 300_000  # bytes a committed notebook may have: beyond it, GitHub shows it slowly and diffs hurt
# what a kernel is told first: the process that a sweep forks from loads while the notebook does
SOON = "from vflan.workers import forking; forking(soon=True)"
WIDGET = "application/vnd.jupyter.widget-view+json"


class Stopped(RuntimeError):
    """A notebook failed; the message names the notebook, the cell and the error."""


def find_notebooks(folder, only=()):
    """The numbered notebooks of `folder` in order; `only` picks some by the start of their names ("03", "05_eval")."""
    known = sorted(Path(folder).glob("[0-9][0-9]_*.ipynb"))
    if not known:
        raise FileNotFoundError(f"{folder} holds no notebook named like 01_name.ipynb")
    for start in only:
        if not any(path.name.startswith(start) for path in known):
            raise ValueError(f"no notebook starts with {start!r}; there are {', '.join(p.stem for p in known)}")
    return [path for path in known if not only or path.name.startswith(tuple(only))]


def tree_gb(pid=None):
    """Memory in GB that a process and all its children hold now (pages they share count once for each)."""
    try:
        root = psutil.Process(pid)
        processes = [root, *root.children(recursive=True)]
    except psutil.NoSuchProcess:
        return 0.0
    total = 0
    for process in processes:
        try:
            total += process.memory_info().rss
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            pass  # it ended between the two looks
    return total / 1e9


class Watch:
    """`with Watch() as w:` - afterwards w.minutes, and w.peak_gb: the most that a process tree held at one time."""

    def __init__(self, pid=None, every=0.5):
        self.pid, self.every, self.peak_gb, self.minutes = pid, every, 0.0, 0.0
        self._stop = threading.Event()

    def __enter__(self):
        self._start = time.monotonic()
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()
        return self

    def _look(self):
        while True:
            self.peak_gb = max(self.peak_gb, tree_gb(self.pid))
            if self._stop.wait(self.every):
                return

    def __exit__(self, *_):
        self._stop.set()
        self._thread.join()
        self.minutes = (time.monotonic() - self._start) / 60


def _plain(text):
    """Text without what differs from machine to machine: folders, object addresses, overwritten progress lines."""
    places = [(ROOT, ""), (sys.prefix, ".venv"), (sys.base_prefix, "python"), (tempfile.gettempdir(), "temp")]
    places.append((Path.home(), "~"))
    for place, name in places:
        place = str(place).rstrip("/")
        if place:
            text = text.replace(place + "/", name + "/" if name else "")
            text = re.sub(re.escape(place) + r"(?![\w.-])", name or ".", text)
    text = re.sub(r"\b0x[0-9a-f]{6,}\b", "0x...", text)
    text = re.sub(r"^[^\n]*\r(?!\n)", "", text, flags=re.MULTILINE)
    return re.sub(r"^.*\d+%\|.*\|.*\n?", "", text, flags=re.MULTILINE)  # a tqdm bar printed to stdout


def _clean_output(output, count):
    """One output without stderr, widgets and machine paths; None if nothing is left of it."""
    if output.output_type == "stream":
        if output.name == "stderr":
            return None
        output.text = _plain(output.text)
        return output if output.text else None
    if output.output_type == "error":
        output.traceback = [_plain(line) for line in output.traceback]
        return output
    if WIDGET in output.data:  # its text/plain is only "VBox(children=...)"; the static picture stands before it
        return None
    output.metadata = {}
    output.data = {kind: _plain(value) if kind.startswith("text/") else value for kind, value in output.data.items()}
    if output.output_type == "execute_result":
        output.execution_count = count
    return output


def clean(notebook):
    """An executed notebook made fit to commit: counts in order, no widget state, stderr, timings or machine paths.

    Works on a copy. Cells that say the same everywhere get the tag by which nbval compares them. The
    kernel's name is always python3, so that the notebook opens wherever vflan is installed.
    """
    notebook = nbformat.from_dict(notebook)
    notebook.metadata = nbformat.from_dict(
        {
            "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
            "language_info": {"file_extension": ".py", "mimetype": "text/x-python", "name": "python"},
        }
    )
    count = 0
    for cell in notebook.cells:
        tags = cell.metadata.get("tags")
        cell.metadata = nbformat.from_dict({"tags": tags} if tags else {})
        cell.source = cell.source.rstrip("\n")  # papermill ends the cell that it adds with an empty line
        if cell.cell_type != "code":
            continue
        if cell.source.strip():
            count += 1
        cell.execution_count = count if cell.source.strip() else None
        outputs = []
        for output in filter(None, (_clean_output(o, count) for o in cell.outputs)):
            if outputs and output.output_type == outputs[-1].output_type == "stream":
                outputs[-1].text += output.text  # a slow cell prints in pieces; how many depends on the machine
            else:
                outputs.append(output)
        cell.outputs = outputs
    return tag(notebook)


def shrink(notebook, colors=128):
    """The notebook with its PNG pictures reduced to a palette: a third of the size, hardly a difference to see."""
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            png = output.get("data", {}).get("image/png")
            if png:
                picture = Image.open(io.BytesIO(base64.b64decode(png))).convert("RGB").quantize(colors)
                buffer = io.BytesIO()
                picture.save(buffer, "PNG", optimize=True)
                if len(small := base64.b64encode(buffer.getvalue()).decode()) < len(png):
                    output["data"]["image/png"] = small
    return notebook


def lay_out(path):
    """Clean the executed notebook at `path` in place and return its size in bytes; large ones get pictures of fewer colours."""
    notebook = clean(nbformat.read(path, as_version=4))
    text = nbformat.writes(notebook)
    for colors in (128, 48, 16):
        if len(text.encode()) > LIMIT:
            text = nbformat.writes(shrink(notebook, colors))
    Path(path).write_text(text + "\n", encoding="utf-8")
    return len(text.encode()) + 1


def run_notebook(source, target, parameters):
    """Execute one notebook with papermill, in its own folder as Jupyter and nbval do, and write it to `target`."""
    import papermill
    from nbclient.exceptions import DeadKernelError
    from papermill.exceptions import PapermillException

    options = ["--IPKernelApp.log_level=50"]  # no remarks on how the kernel is connected, or was stopped
    if "vflan.sweep(" in source.read_text(encoding="utf-8"):
        options.append(f"--IPKernelApp.exec_lines={SOON}")
    try:
        papermill.execute_notebook(
            str(source),
            str(target),
            parameters=parameters,
            kernel_name="python3",
            language="python",
            extra_arguments=options,
            cwd=str(source.parent),
            progress_bar={"desc": source.stem, "leave": False} if sys.stderr.isatty() else False,
        )
    except papermill.PapermillExecutionError as error:
        sentence = f"{error.ename}: {error.evalue}".strip().splitlines()[0]
        raise Stopped(f"{source.name} stopped in cell [{error.exec_count}] - {sentence}\nread on in {target}") from None
    except DeadKernelError:
        raise Stopped(f"{source.name} lost its kernel, most likely for want of memory; see {target}") from None
    except PapermillException as error:
        raise Stopped(f"{source.name} could not be run: {error}") from None


def caption(picture):
    """What a figure says of itself: the description in the PNG, else its file name read aloud."""
    with Image.open(picture) as image:
        said = getattr(image, "text", {}).get("Description")
    words = re.sub(r"^(fig|table)(\w*?)_", lambda m: f"{'Figure' if m[1] == 'fig' else 'Table'} {m[2]}: ", picture.stem)
    return said or words.replace("_", " ")


def write_gallery(preset, folder=None):
    """List the figures of a preset with their captions; figures/README.md for tiny, else beside the figures."""
    folder = Path(folder or ROOT / "figures")
    page = folder / "README.md" if preset == "tiny" else folder / preset / "README.md"
    pictures = sorted((folder / preset).glob("*.png"), key=_by_number)
    lines = [f"# Figures of the {preset} preset", "", "Drawn by the notebooks; `vflan.book` writes this page.", ""]
    for picture in pictures:
        text = caption(picture)
        lines += [f"![{text}]({picture.relative_to(page.parent).as_posix()})", "", text, ""]
    page.parent.mkdir(parents=True, exist_ok=True)
    page.write_text("\n".join(lines), encoding="utf-8")
    return page, len(pictures)


def _by_number(path):
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", path.stem)]


def score_table(path):
    """Scores of a file as one row a run and one column a benchmark: its first metric, mean over seeds."""
    scores = pd.read_csv(path)
    headline = scores.groupby("benchmark", sort=False)["metric"].first()
    scores = scores[scores["metric"] == scores["benchmark"].map(headline)]
    table = scores.pivot_table(index="run", columns="benchmark", values="value", aggfunc="mean", sort=False)
    return table.round(1)


# -------------------------------------------------------------------------------------------- the tables of README.md

COSTS = {
    "setup_minutes": "`make setup`, minutes to install",
    "demo_minutes": "`make demo`, minutes without installing",
    "demo_peak_gb": "`make demo`, most memory held at a time, GB",
    "again_minutes": "a second `make demo`, minutes",
    "test_minutes": "`make test`, minutes",
    "matmul_gflops": "the machine: fp32 matrix product on one thread, GFLOPS",
}


def markdown(columns, rows):
    """A table as markdown; what is missing (None, NaN) stays empty."""
    cells = [["" if cell is None or cell != cell else str(cell) for cell in row] for row in rows]
    return "\n".join(f"| {' | '.join(row)} |" for row in [columns, ["---"] * len(columns), *cells])


def score_rows(scores):
    """(note, columns, rows) of Table 2 in this world: benchmarks by stages, beside the majority answer and the paper's 13B.

    A cell is the mean over seeds, and in brackets the lowest and highest end of the seeds' intervals.
    """
    from vflan import plots  # matplotlib comes with it

    runs, rows = scores.run.str.replace(r"-seed\d+$", "", regex=True), []
    for name, benchmark in BENCHMARKS.items():
        asked = (scores.benchmark == name) & (scores.metric == benchmark.headline)
        if not asked.any():
            continue
        unit = plots.UNITS.get(benchmark.headline, benchmark.headline)
        row = [f"{plots.TITLES.get(name, name)}, {unit}", f"{scores[asked].baseline.mean():.1f}"]
        for run in STAGES:
            own = scores[asked & (runs == run)]
            row.append(f"{own.value.mean():.1f} [{own.low.min():.1f}, {own.high.max():.1f}]" if len(own) else None)
        for stage in ("Base", "Chat"):
            value, confirmed = plots.printed("Table 2", f"Vision-Flan {stage}", benchmark.paper) or (None, True)
            row.append(value and (f"{value:.1f}" if confirmed else f"({value:.1f})"))
        rows.append(row)
    columns = ["benchmark", "majority answer", *STAGES.values(), "paper's Base", "paper's Chat"]
    seeds = sorted(scores[runs.isin(STAGES)].seed.unique())
    note = f"In square brackets 95 % intervals over pictures. Seeds trained: {', '.join(map(str, seeds))}"
    if len(seeds) > 1:
        note += "; their mean, and the lowest and highest end of their intervals"
    return f"{note}.", columns, rows


def scores_markdown(scores):
    """Table 2 of the mini world, as `score_rows` makes it."""
    note, columns, rows = score_rows(scores)
    return f"{markdown(columns, rows)}\n\n{note}"


def floors_markdown(floors):
    """The floors of vflan.claims with their verdicts, and how many hold."""
    judged = floors.holds.astype(str)
    rows = floors.assign(holds=judged.map({"True": "yes", "False": "**no**"}).fillna("not judged"))
    held = f"{(judged == 'True').sum()} of {judged.isin(['True', 'False']).sum()} floors hold."
    return f"{markdown(list(rows.columns), rows.itertuples(index=False))}\n\n{held}"


def claims_markdown(found):
    """The whole claims of the ledger with their verdicts; parts of a claim stand in the file and in the notebooks."""
    rows = []
    for row in found[found.claim.str.isdigit()].itertuples():
        interval = f"{row.effect:+.1f} [{row.low:.1f}, {row.high:.1f}]"
        rows.append([row.claim, row.statement, row.n_seeds, interval, f"{row.smallest:g}", row.verdict])
    return markdown(["", "claim", "seeds", "effect, points", "smallest that counts", "verdict"], rows)


def cost_markdown(record):
    """What bench.demo measured, as a table, and what it was measured on."""
    rows = [[COSTS.get(row["name"], row["name"]), f"{row['value']:.1f}", row["target"]] for row in record["checks"]]
    return f"{markdown(['', 'measured', 'wanted'], rows)}\n\n{measured_on(record, 'demo')}"


def bench_markdown(records):
    """The figures of every other bench, {name: record}, one table: what was measured, what was wanted, whether it holds."""
    rows, notes = [], []
    for name, record in records.items():
        for row in record["checks"]:
            value = row["value"] if isinstance(row["value"], str) else f"{row['value']:,.6g}"
            verdict = {True: "yes", False: "**no**", None: ""}[row["holds"]]
            rows.append([f"{name}: {row['name']}", value, row["unit"], row["target"], verdict])
        notes.append(measured_on(record, name))
    return "\n\n".join([markdown(["figure", "measured", "unit", "wanted", "holds"], rows), *notes])


def measured_on(record, name):
    """With what, at which commit and on which machine a bench was run."""
    machine, versions = record["machine"], record["versions"]
    at = ", ".join(dict.fromkeys(row["commit"] for row in record["checks"]))
    note = f"Measured by `python -m bench.{name}` at {at} on {machine['cpu']}, {machine['cores']} cores, "
    note += f"{machine['memory_gb']} GB, load {machine['load_at_start']} at the start; "
    return note + ", ".join(f"{package} {version}" for package, version in versions.items()) + "."


def readme_tables(home=None):
    """{marker: markdown} for the results that are there: `scores`, `claims`, `cost` and `bench`."""
    home, tables = Path(home or ROOT), {}
    scores, floors = (home / "data" / "results" / f"tiny{kind}.csv" for kind in ("", "_floors"))
    if scores.exists():
        tables["scores"] = scores_markdown(pd.read_csv(scores))
        if floors.exists():
            tables["scores"] += "\n\n" + floors_markdown(pd.read_csv(floors))
    verdicts = home / "data" / "results" / "claims_tiny.csv"
    if verdicts.exists():
        tables["claims"] = claims_markdown(pd.read_csv(verdicts, dtype={"claim": str}))
    files = sorted((home / "bench" / "results").glob("*.json"))
    records = {file.stem: json.loads(file.read_text(encoding="utf-8")) for file in files}
    if "demo" in records:
        tables["cost"] = cost_markdown(records.pop("demo"))
    if records:
        tables["bench"] = bench_markdown(records)
    return tables


def fill_readme(home=None):
    """Put the tables between their markers in README.md; returns the markers filled. Without results nothing changes."""
    page, tables = Path(home or ROOT) / "README.md", readme_tables(home)
    if not page.exists():
        return []
    text = page.read_text(encoding="utf-8")
    for name, table in tables.items():
        begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
        if text.count(begin) != 1 or text.count(end) != 1:
            raise ValueError(f"README.md needs {begin} and {end} once each, with the table between them")
        before, rest = text.split(begin)
        text = f"{before}{begin}\n{table}\n{end}{rest.split(end)[1]}"
    page.write_text(text, encoding="utf-8")
    return list(tables)


# ------------------------------------------------------------------------------------------------------------ the press


def fingerprint(source, parameters):
    """What an executed notebook depends on: its own cells, the parameters, the package and the shipped backbones."""
    cells = [(c.cell_type, c.source) for c in nbformat.read(source, 4).cells]
    digest = hashlib.sha256(json.dumps([cells, parameters], default=str).encode())
    for file in [*sorted((ROOT / "vflan").rglob("*.py")), ROOT / "data" / "tiny" / "backbones.json"]:
        digest.update(file.read_bytes() if file.is_file() else b"")
    return digest.hexdigest()[:16]


def up_to_date(row, key, target, out, name):
    """Whether a notebook need not run again: nothing that it depends on has changed, and what it made is still there."""
    there = {done.parent.name for done in out.glob("*/done.json")}
    made = target.is_file() and (ROOT / "figures" / name).is_dir()
    return made and row.get("key") == key and set(row.get("runs", ["-"])) <= there


def press(preset="tiny", only=(), parameters=None, out=None, write=False, notebooks=None, say=None, again=False):
    """Run the notebooks of a preset in order and return the record that is kept in book.json.

    preset: a name or a .py file. only: starts of notebook names. parameters: extra papermill parameters.
    out: folder for the executed notebooks and book.json (runs/<preset>). write: also replace the committed notebooks and
    fill the tables of README.md, possible for tiny without parameters only. A notebook of which nothing has changed since it
    ran is not run again unless `again` is set. Raises Stopped at the first notebook that fails.
    """
    name = Path(preset).stem
    say = say or functools.partial(print, flush=True)
    parameters = dict(parameters or {})
    if write and (preset not in WRITTEN or preset == "tiny" and parameters):
        raise ValueError(
            "--write replaces the committed notebooks: those of `tiny` without parameters, and of `tiny_frozen`"
        )
    if preset != "tiny":  # tiny is what the notebooks say themselves: nothing is injected, so they stay as committed
        parameters["preset"] = str(Path(preset).resolve()) if preset.endswith(".py") else preset
    out = Path(out or ROOT / "runs" / name).resolve()
    (out / "notebooks").mkdir(parents=True, exist_ok=True)
    old = json.loads((out / "book.json").read_text("utf-8")) if (out / "book.json").is_file() else {}
    known = {row["name"]: row for row in old.get("notebooks", [])}
    record = {
        "preset": name,
        "parameters": parameters,
        "python": platform.python_version(),
        "cores": os.cpu_count(),
        "threads": os.environ.get("OMP_NUM_THREADS", "default"),
        "notebooks": [],
    }
    sources = find_notebooks(notebooks or ROOT / "notebooks", only)
    width = max(len(source.stem) for source in sources)
    with Watch() as whole:
        for source in sources:
            target, key = out / "notebooks" / source.name, fingerprint(source, parameters)
            row, fresh = known.get(source.stem, {}), False
            if again or not up_to_date(row, key, target, out, name):
                with Watch() as watch:
                    run_notebook(source, target, parameters)
                runs = sorted(done.parent.name for done in out.glob("*/done.json"))
                row = {"name": source.stem, "minutes": round(watch.minutes, 2), "peak_gb": round(watch.peak_gb, 2)}
                row, fresh = row | {"kb": lay_out(target) // 1000, "key": key, "runs": runs}, True
            size = target.stat().st_size
            if write and size > LIMIT:
                raise Stopped(f"{source.name} is {size // 1000} KB, more than {LIMIT // 1000}: draw smaller figures")
            if write:
                place = ROOT / WRITTEN[preset] / source.name
                place.parent.mkdir(exist_ok=True)
                place.write_bytes(target.read_bytes())
            record["notebooks"].append(row)
            rows = {**known, **{r["name"]: r for r in record["notebooks"]}}
            kept = {**record, "notebooks": [rows[n] for n in sorted(rows)]}
            (out / "book.json").write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")
            cost = f"{row['minutes']:6.1f} min  {row['peak_gb']:5.1f} GB" if fresh else "up to date".rjust(20)
            say(f"{source.stem:{width}}  {cost}  {size // 1000:4d} KB")
    peak = max([whole.peak_gb, *(row["peak_gb"] for row in record["notebooks"])])  # short peaks fall between two looks
    record.update(minutes=round(whole.minutes, 2), peak_gb=round(peak, 2))
    kept = {**record, "notebooks": [rows[n] for n in sorted(rows)]}
    (out / "book.json").write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")
    if write:
        fill_readme()
    _report(name, out, record, say)
    return record


def _report(name, out, record, say):
    def short(path):
        return os.path.relpath(path) if Path(path).is_relative_to(Path.cwd()) else str(path)

    page, figures = write_gallery(name)
    scores = ROOT / "data" / "results" / f"{name}.csv"
    say(f"\n{record['minutes']:.1f} minutes, at most {record['peak_gb']:.1f} GB")
    say(f"notebooks  {short(out / 'notebooks')}")
    say(f"figures    {short(page)} ({figures})")
    if scores.exists():
        say(f"scores     {short(scores)}\n\n{score_table(scores).to_string(na_rep='')}")
    else:
        say(f"scores     none yet: {short(scores)} is written by notebooks/05_evaluation.ipynb")
    figures = [(path, caption(path)) for path in sorted((ROOT / "figures" / name).glob("*.png"), key=_by_number)]
    table = score_rows(pd.read_csv(scores)) if scores.exists() else None
    say(f"\nreport     {short(write_report(name, out, record, ROOT, table, figures))}")


def _value(text):
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def main(arguments=None):
    parser = argparse.ArgumentParser(prog="python -m vflan.book", description=__doc__.splitlines()[0])
    parser.add_argument("preset", nargs="?", default="tiny", help="a preset's name, or a .py file of your own")
    parser.add_argument("--notebooks", nargs="+", default=(), metavar="03", help="only these (start of the file name)")
    parser.add_argument("-p", nargs=2, action="append", default=[], metavar=("KEY", "VALUE"), help="notebook parameter")
    parser.add_argument("--out", help="folder for the executed notebooks (runs/<preset>)")
    parser.add_argument("--write", action="store_true", help="replace the committed notebooks with the executed ones")
    parser.add_argument("--readme", action="store_true", help="run nothing, only fill the tables of README.md")
    parser.add_argument("--again", action="store_true", help="run also the notebooks of which nothing has changed")
    given = parser.parse_args(arguments)
    try:
        if given.readme:
            return print("README.md:", ", ".join(fill_readme()) or "no results yet, nothing filled")
        parameters = {key: _value(value) for key, value in given.p}
        press(given.preset, given.notebooks, parameters, given.out, given.write, again=given.again)
    except (Stopped, ValueError, FileNotFoundError) as error:
        sys.exit(f"vflan.book: {error}")


if __name__ == "__main__":
    main()
