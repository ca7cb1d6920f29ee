"""The press: runs the notebooks in order, lays the executed ones out clean, and says where everything is.

    vflan notebooks tiny                                   # all notebooks, about as long as a coffee
    vflan notebooks tiny --notebooks 03 05 -p changes '{"max_steps": 40, "runs": "runs/mine"}'
    vflan notebooks full_13b -p num_processes 8 --out my_run

All that comes out lies in the folder of runs, runs/<preset> or the `runs` of `changes`: notebooks/, figures/, results/, minutes and
memory in book.json, and one page with everything, report.html. No file that git tracks changes; vflan.tools.publish copies what the
authors publish.
"""

import ast
import base64
import difflib
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
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from multiprocessing import get_context
from pathlib import Path

import nbformat
import pandas as pd
import psutil
from PIL import Image

from vflan import config
from vflan.analysis.tables import pictures, score_rows, score_table, write_gallery
from vflan.config import ROOT, folder_name, resolve
from vflan.tools.parameters import checked
from vflan.tools.report import write_report
from vflan.tools.stable import tag
from vflan.training.distributed import end_with_parent

LIMIT = (
    400_000  # bytes a committed notebook may have: beyond it, GitHub shows it slowly and diffs hurt
)
# what a kernel is told first: the process that a sweep forks from loads while the notebook does
SOON = "from vflan.evaluation.parallel import forking; forking(soon=True)"
# Which runs of earlier notebooks each one reads. The tiny models train on one core, so two notebooks run at a time.
NEEDS = {"03": ["02"], "04": ["03"], "05": ["04"], "06": ["02"], "07": ["05"], "08": ["05", "06"]}
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
            raise ValueError(
                f"no notebook starts with {start!r}; there are {', '.join(p.stem for p in known)}"
            )
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
    places = [
        (ROOT, ""),
        (sys.prefix, ".venv"),
        (sys.base_prefix, "python"),
        (tempfile.gettempdir(), "temp"),
    ]
    places.append((Path.home(), "~"))
    for place, name in places:
        place = str(place).rstrip("/")
        if place:
            text = text.replace(place + "/", name + "/" if name else "")
            text = re.sub(re.escape(place) + r"(?![\w.-])", name or ".", text)
    text = re.sub(r"\b0x[0-9a-f]{6,}\b", "0x...", text)
    text = re.sub(r"^[^\n]*\r(?!\n)", "", text, flags=re.MULTILINE)
    return re.sub(
        r"^.*\d+%\|.*\|.*\n?", "", text, flags=re.MULTILINE
    )  # a tqdm bar printed to stdout


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
    if (
        WIDGET in output.data
    ):  # its text/plain is only "VBox(children=...)"; the static picture stands before it
        return None
    output.metadata = {}
    output.data = {
        kind: _plain(value) if kind.startswith("text/") else value
        for kind, value in output.data.items()
    }
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
            "language_info": {
                "file_extension": ".py",
                "mimetype": "text/x-python",
                "name": "python",
            },
        }
    )
    count = 0
    for cell in notebook.cells:
        tags = cell.metadata.get("tags")
        cell.metadata = nbformat.from_dict({"tags": tags} if tags else {})
        cell.source = cell.source.rstrip(
            "\n"
        )  # papermill ends the cell that it adds with an empty line
        if cell.cell_type != "code":
            continue
        if cell.source.strip():
            count += 1
        cell.execution_count = count if cell.source.strip() else None
        outputs = []
        for output in filter(None, (_clean_output(o, count) for o in cell.outputs)):
            if outputs and output.output_type == outputs[-1].output_type == "stream":
                outputs[
                    -1
                ].text += (
                    output.text
                )  # a slow cell prints in pieces; how many depends on the machine
            else:
                outputs.append(output)
        cell.outputs = outputs
    return tag(notebook)


def shrink(notebook, quality, scale):
    """The notebook with its pictures as JPEGs where those are smaller, of `scale` times the width, in full colour.

    Fewer colours would make smaller files, but here pictures are about colours.
    """
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            data = output.get("data", {})
            for kind in {"image/png", "image/jpeg"} & data.keys():
                picture = Image.open(io.BytesIO(base64.b64decode(data[kind]))).convert("RGB")
                size = round(scale * picture.width), round(scale * picture.height)
                # no subsampling, which would mix the colours of neighbours
                picture.resize(size).save(
                    buffer := io.BytesIO(), "JPEG", quality=quality, subsampling=0
                )
                if len(small := base64.b64encode(buffer.getvalue()).decode()) < len(data[kind]):
                    del data[kind]
                    data["image/jpeg"] = small
    return notebook


def lay_out(path):
    """Clean the executed notebook at `path` in place and return its size in bytes; a large one gets JPEGs, smaller ones if need be."""
    notebook = clean(nbformat.read(path, as_version=4))
    text = nbformat.writes(notebook)
    for quality, scale in ((92, 1), (80, 1), (80, 0.75), (75, 0.6)):
        if len(text.encode()) > LIMIT:
            text = nbformat.writes(shrink(nbformat.from_dict(notebook), quality, scale))
    Path(path).write_text(text + "\n", encoding="utf-8")
    return len(text.encode()) + 1


def run_notebook(source, target, parameters):
    """Execute one notebook with papermill, in its own folder as Jupyter and nbval do, and write it to `target`."""
    import papermill
    from nbclient.exceptions import DeadKernelError
    from papermill.exceptions import PapermillException

    options = [
        "--IPKernelApp.log_level=50"
    ]  # no remarks on how the kernel is connected, or was stopped
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
        raise Stopped(
            f"{source.name} stopped in cell [{error.exec_count}] - {sentence}\nread on in {target}"
        ) from None
    except DeadKernelError:
        raise Stopped(
            f"{source.name} lost its kernel, most likely for want of memory; see {target}"
        ) from None
    except PapermillException as error:
        raise Stopped(f"{source.name} could not be run: {error}") from None


def measured_run(source, target, parameters):
    """Run one notebook; returns (minutes, peak_gb), the memory being that of this process and all its children."""
    with Watch() as watch:
        run_notebook(source, target, parameters)
    return watch.minutes, watch.peak_gb


# ------------------------------------------------------------------------------------------------------------ the press


def needed(source, sources):
    """Which of `sources` have to end before `source` starts: those that it reads, or, if that is not known, all before it."""
    before = sources[: sources.index(source)]
    numbers = NEEDS.get(source.name[:2])
    return {path for path in before if numbers is None or path.name[:2] in numbers}


def in_parallel(sources, start, jobs):
    """Start every notebook as soon as those that it needs have ended; yields (notebook, the result of `start`) as they end.

    start: a function of one notebook that returns a Future, or None if nothing has to run. jobs: how many run at one time.
    After a failure nothing new starts; what runs may finish, then the error is raised.
    """
    waiting, running, ended, error = list(sources), {}, set(), None
    while waiting or running:
        for source in list(waiting):
            if error is None and len(running) < jobs and needed(source, sources) <= ended:
                waiting.remove(source)
                if (future := start(source)) is not None:
                    running[future] = source
                else:
                    ended.add(source)
                    yield source, None
        for future in wait(running, return_when=FIRST_COMPLETED).done:
            source = running.pop(future)
            if future.exception() is None:
                ended.add(source)
                yield source, future.result()
            else:
                error = error or future.exception()
        if error is not None and not running:
            raise error


def fingerprint(source, parameters):
    """What an executed notebook depends on: its own cells, the parameters, the package and the shipped backbones."""
    cells = [(c.cell_type, c.source) for c in nbformat.read(source, 4).cells]
    digest = hashlib.sha256(json.dumps([cells, parameters], default=str).encode())
    code = sorted(Path(__file__).parents[1].rglob("*.py"))
    for file in [*code, resolve("data/tiny/backbones.json")]:
        digest.update(file.read_bytes() if file.is_file() else b"")
    return digest.hexdigest()[:16]


def parameter_names(notebook):
    """The names that the parameters cell of a notebook assigns."""
    cells = [
        c.source
        for c in nbformat.read(notebook, 4).cells
        if "parameters" in c.metadata.get("tags", [])
    ]
    return [
        line.targets[0].id
        for line in ast.parse("\n".join(cells)).body
        if isinstance(line, ast.Assign)
    ]


def given_parameters(sources, given):
    """{notebook: its parameters} of `given`, understood; ValueError for one that none of the notebooks has.

    A parameter that only some of them have goes to those.
    """
    names = {source: parameter_names(source) for source in sources}
    known = list(dict.fromkeys(name for some in names.values() for name in some))
    for name in given:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = (
                f"did you mean {near[0]!r}?" if near else f"there are {', '.join(known) or 'none'}."
            )
            raise ValueError(f"no notebook that would run has a parameter {name!r}; {hint}")
    values = {name: checked(**{name: value})[0] for name, value in given.items()}
    return {
        source: {name: values[name] for name in values if name in own}
        for source, own in names.items()
    }


def made(folder):
    """{path within the folder: time of writing} of the figures and results in a folder of runs."""
    found = [path for kind in ("figures", "results") for path in (folder / kind).glob("[!.]*.*")]
    return {path.relative_to(folder).as_posix(): path.stat().st_mtime_ns for path in sorted(found)}


def digest_of(path):
    """A short hash of a file."""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()[:16]


def up_to_date(row, key, target, folder):
    """Whether a notebook need not run again: nothing that it depends on has changed, and what it made is still there."""
    there = {done.parent.name for done in folder.glob("*/done.json")}
    files = "files" in row and all((folder / file).is_file() for file in row["files"])
    return (
        target.is_file()
        and files
        and row.get("key") == key
        and set(row.get("runs", ["-"])) <= there
    )


def press(preset="tiny", only=(), parameters=None, out=None, notebooks=None, say=None, again=False):
    """Run the notebooks of a preset in order and return the record that is kept in book.json.

    preset: a name or a .py file. only: starts of notebook names. parameters: papermill parameters; a text is read as the
    value that it shows. out: folder for the executed notebooks, book.json and the report (the folder of runs). A notebook
    of which nothing has changed since it ran is not run again unless `again` is set. Raises ValueError or FileNotFoundError
    before anything runs or is written if it is asked for what there is not, and Stopped at the first notebook that fails.
    """
    say = say or functools.partial(print, flush=True)
    given, name = dict(parameters or {}), folder_name(Path(preset).stem, "preset")
    if "preset" in given:
        raise ValueError(
            f"the preset stands alone, not behind -p: vflan notebooks {given['preset']}"
        )
    home = (
        ROOT / "notebooks"
    )  # an installed package has its own, until somebody puts some in the working directory
    sources = find_notebooks(notebooks or (home if home.is_dir() else resolve("notebooks")), only)
    own = given_parameters(sources, given)
    folder = config.resolve(config.preset(preset, given.get("changes", {})).base.runs)
    if (
        preset != "tiny"
    ):  # tiny is what the notebooks say themselves: nothing is injected, so they stay as committed
        given["preset"] = preset
        if preset.endswith(".py"):  # a notebook runs in a folder of its own
            given["preset"] = str(
                (Path(preset) if Path(preset).exists() else config.resolve(preset)).resolve()
            )
        own = given_parameters(
            sources, given if any("preset" in parameter_names(s) for s in sources) else {}
        )
    out = Path(out or folder).resolve()
    if (out / "notebooks") == sources[0].parent.resolve():
        raise ValueError(
            f"out={out}: the executed notebooks would replace their sources; name another folder."
        )
    (out / "notebooks").mkdir(parents=True, exist_ok=True)
    old = (
        json.loads((out / "book.json").read_text("utf-8")) if (out / "book.json").is_file() else {}
    )
    rows = {row["name"]: row for row in old.get("notebooks", [])}
    record = {
        "preset": name,
        "parameters": {key: value for values in own.values() for key, value in values.items()},
        "python": platform.python_version(),
        "cores": os.cpu_count(),
        "threads": os.environ.get("OMP_NUM_THREADS", "default"),
        "notebooks": [],
    }
    width = max(len(source.stem) for source in sources)
    jobs = min(2, os.cpu_count() or 1) if preset.startswith("tiny") else 1
    before, texts = {}, {source: source.read_text("utf-8") for source in sources}
    keys = {source: fingerprint(source, own[source]) for source in sources}

    def start(source):
        target, row = out / "notebooks" / source.name, rows.get(source.stem, {})
        if not again and up_to_date(row, keys[source], target, folder):
            return None
        before[source] = made(folder)
        return pool.submit(measured_run, source, target, own[source])

    # a process for each, because papermill changes the working directory of the one it runs in
    with Watch() as whole, ProcessPoolExecutor(jobs, get_context("spawn"), end_with_parent) as pool:
        for source, cost in in_parallel(sources, start, jobs):
            target = out / "notebooks" / source.name
            if cost is not None:
                minutes, peak_gb = cost
                beside = "".join(
                    text for other, text in texts.items() if other != source and other in before
                )
                files = [
                    file for file, when in made(folder).items() if before[source].get(file) != when
                ]
                files = [
                    f for f in files if Path(f).stem in texts[source] or Path(f).stem not in beside
                ]
                row = {
                    "name": source.stem,
                    "minutes": round(minutes, 2),
                    "peak_gb": round(peak_gb, 2),
                }
                row |= {"kb": lay_out(target) // 1000, "key": keys[source]}
                row |= {"runs": sorted(done.parent.name for done in folder.glob("*/done.json"))}
                row |= {
                    "parameters": own[source],
                    "files": {file: digest_of(folder / file) for file in files},
                }
                rows[source.stem] = row
            record["notebooks"] = sorted(
                [*record["notebooks"], rows[source.stem]], key=lambda row: row["name"]
            )
            _keep(out, record, rows)
            cost = f"{minutes:6.1f} min  {peak_gb:5.1f} GB" if cost else "up to date".rjust(20)
            say(f"{source.stem:{width}}  {cost}  {target.stat().st_size // 1000:4d} KB")
    peak = max(
        [whole.peak_gb, *(row["peak_gb"] for row in record["notebooks"])]
    )  # short peaks fall between two looks
    record.update(minutes=round(whole.minutes, 2), peak_gb=round(peak, 2))
    _keep(out, record, rows)
    _report(name, out, folder, record, say)
    return record


def _keep(out, record, rows):
    """Write book.json: the record with the rows of all notebooks that ever ran in this folder."""
    config.write_json(
        out / "book.json", {**record, "notebooks": [rows[name] for name in sorted(rows)]}
    )


def _report(name, out, folder, record, say):
    def short(path):
        return os.path.relpath(path) if Path(path).is_relative_to(Path.cwd()) else str(path)

    page, scores = folder / "figures" / "README.md", folder / "results" / "scores.csv"
    say(f"\n{record['minutes']:.1f} minutes, at most {record['peak_gb']:.1f} GB")
    say(f"notebooks  {short(out / 'notebooks')}")
    say(f"figures    {short(page)} ({write_gallery(name, page.parent, page)})")
    table = None
    if scores.exists():
        written = any("results/scores.csv" in row.get("files", ()) for row in record["notebooks"])
        values = pd.read_csv(scores)
        say(f"scores     {short(scores)}{'' if written else ' (of an earlier run)'}")
        say(f"\n{score_table(values).to_string(na_rep='')}")
        table = score_rows(values)
    else:
        say(f"scores     none yet: {short(scores)} is written by notebooks/05_evaluation.ipynb")
    found = pictures(page.parent)
    say(f"\nreport     {short(write_report(name, out, record, ROOT, table, found, folder))}")
