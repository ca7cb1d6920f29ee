"""Runs the notebooks in order, cleans the executed ones, and reports where everything is.

    vflan notebooks tiny                            # all of them, about as long as a coffee
    vflan notebooks tiny --notebooks 03 05 -p changes '{"max_steps": 40, "runs": "runs/mine"}'
    vflan notebooks full_13b -p num_processes 8 --out my_run

All output goes to the folder of runs, runs/<preset> or the `runs` of `changes`: notebooks/,
figures/, results/, minutes and memory in book.json, and one page with everything, report.html. No
file that git tracks changes; vflan.tools.publish copies what the authors publish.
"""

from __future__ import annotations

import ast
import difflib
import functools
import glob
import hashlib
import json
import os
import platform
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import nbformat

from vflan import config
from vflan.analysis.tables import mean_scores, pictures, score_rows, write_gallery
from vflan.evaluation.answer_cache import read_scores
from vflan.tools.clean import clean_file
from vflan.tools.execute import Stopped as Stopped
from vflan.tools.execute import measured_run
from vflan.tools.keeping import check_keep, keep_in_all
from vflan.tools.parameters import absolute, checked, is_small
from vflan.tools.report import write_report
from vflan.tools.watch import Watch
from vflan.training.distributed import end_with_parent
from vflan.training.run import Run

# Which earlier notebooks' runs each one reads. The others can run beside it.
NEEDS = {"03": ["02"], "04": ["03"], "05": ["04"], "06": ["02"], "07": ["05"], "08": ["05", "06"]}


def run_notebooks(
    preset: str = "tiny",
    only=(),
    parameters: dict | None = None,
    out: str | os.PathLike | None = None,
    notebooks: str | os.PathLike | None = None,
    say: Callable[[str], None] | None = None,
    again: bool = False,
    keep: str = "model",
) -> dict:
    """Run the notebooks of a preset in order and return the record that book.json holds.

    preset: a name or a .py file. only: beginnings of notebook names. parameters: papermill's; a
    text is read as the value that it shows. out: folder for the executed notebooks, book.json and
    the report; default: the folder of runs. again: also run the notebooks that are up to date.
    keep: what stays of the models of this call's runs (`Run.keep`), but of those of the preset.

    Raises ValueError or FileNotFoundError for a wrong argument, before anything runs or is
    written, and Stopped when a notebook fails.
    """
    say = say or functools.partial(print, flush=True)
    name = config.folder_name(Path(preset).stem, "preset")
    check_keep(keep)
    work = _prepare(preset, only, dict(parameters or {}), out, notebooks)
    stages = [recipe.name for recipe in config.preset(preset)]
    record = {
        "preset": name,
        "parameters": {k: v for values in work.parameters.values() for k, v in values.items()},
        "python": platform.python_version(),
        "cores": os.cpu_count(),
        "threads": os.environ.get("OMP_NUM_THREADS", "default"),
        "notebooks": [],
    }
    # the tiny models train on one core
    jobs = min(2, os.cpu_count() or 1) if work.is_small else 1
    width = max(len(source.stem) for source in work.sources)
    # a process for each, because papermill changes the working directory of the one it runs in
    with Watch() as whole, ProcessPoolExecutor(jobs, get_context("spawn"), end_with_parent) as pool:
        start = functools.partial(work.start, pool, again)
        for source, cost in in_parallel(work.sources, start, jobs):
            row = work.finish(source, cost) if cost else work.rows[source.stem]
            record["notebooks"] = sorted([*record["notebooks"], row], key=lambda row: row["name"])
            work.write_book(record)
            keep_in_all(work.no_longer_needed(source, jobs), keep, stages)
            shown = f"{cost[0]:6.1f} min  {cost[1]:5.1f} GB" if cost else "up to date".rjust(20)
            size = work.target(source).stat().st_size // 1000
            say(f"{source.stem:{width}}  {shown}  {size:4d} KB")
    # a short peak falls between two looks of one watch, but perhaps not of another
    peak = max([whole.peak_gb, *(row["peak_gb"] for row in record["notebooks"])])
    record.update(minutes=round(whole.minutes, 2), peak_gb=round(peak, 2))
    work.write_book(record)
    _print_results(record, work.out, work.folder, say)
    return record


def find_notebooks(folder: str | os.PathLike, only=()) -> list[Path]:
    """The numbered notebooks of `folder` in order.

    only: beginnings of their names ("03", "05_eval") to choose by. Raises FileNotFoundError if
    there is no notebook, ValueError if there is none with such a name.
    """
    sources = sorted(Path(folder).glob("[0-9][0-9]_*.ipynb"))
    if not sources:
        raise FileNotFoundError(f"{folder} holds no notebook named like 01_name.ipynb")
    for start in only:
        if not any(path.name.startswith(start) for path in sources):
            names = ", ".join(path.stem for path in sources)
            raise ValueError(f"no notebook starts with {start!r}; there are {names}")
    return [path for path in sources if not only or path.name.startswith(tuple(only))]


# ------------------------------------------------------------------------- what is to be done


@dataclass
class _Work:
    """The notebooks of one call, and what is known of them from earlier calls."""

    sources: list[Path]
    parameters: dict[Path, dict]  # of each notebook
    folder: Path  # of runs, figures and results
    out: Path  # of executed notebooks, book.json and report
    is_small: bool = False  # whether the preset's models are the mini world's

    def __post_init__(self):
        book = config.read_json(self.out / "book.json")
        self.rows = {row["name"]: row for row in book.get("notebooks", [])}
        self.keys = {source: source_key(source, self.parameters[source]) for source in self.sources}
        self.texts = {source: source.read_text("utf-8") for source in self.sources}
        self.files_before = {}  # of each notebook that was started: figures and results
        self.runs_before, self.made = set(self.finished_runs()), {}  # runs that each notebook made

    def target(self, source):
        return self.out / "notebooks" / source.name

    def start(self, pool, again, source):
        """Begin to run a notebook and return its Future; None if it is up to date."""
        if not again and self.is_up_to_date(source):
            return None
        self.files_before[source] = _figures_and_results(self.folder)
        return pool.submit(measured_run, source, self.target(source), self.parameters[source])

    def is_up_to_date(self, source):
        """Whether nothing that a notebook depends on has changed, and its output is still there."""
        row = self.rows.get(source.stem, {})
        if not self.target(source).is_file() or row.get("key") != self.keys[source]:
            return False
        if not {"files", "runs"} <= row.keys():  # book.json of an earlier version
            return False
        files = all((self.folder / file).is_file() for file in row["files"])
        return files and set(row["runs"]) <= set(self.finished_runs())

    def finished_runs(self):
        return sorted(done.parent.name for done in self.folder.glob("*/done.json"))

    def no_longer_needed(self, source, jobs):
        """The runs of this call whose models no other notebook needs once `source` has ended."""
        earlier = self.runs_before.union(*self.made.values())
        self.made[source] = set(self.finished_runs()) - earlier
        left = set(self.sources) - self.made.keys()
        if jobs > 1 and left:  # one that runs now may have made, or need, any of them
            return []
        needed = set().union(*(_needs(other, self.sources) for other in left))
        names = set().union(*(self.made[other] for other in self.made.keys() - needed))
        return [Run(self.folder / name) for name in sorted(names)]

    def finish(self, source, cost):
        """Clean an executed notebook and return its row of book.json."""
        minutes, peak_gb = cost
        self.rows[source.stem] = {
            "name": source.stem,
            "minutes": round(minutes, 2),
            "peak_gb": round(peak_gb, 2),
            "kb": clean_file(self.target(source)) // 1000,
            "key": self.keys[source],
            "runs": self.finished_runs(),
            "parameters": self.parameters[source],
            "files": {file: digest_of(self.folder / file) for file in self.files_of(source)},
        }
        return self.rows[source.stem]

    def files_of(self, source):
        """The figures and results that a notebook wrote."""
        before, now = self.files_before[source], _figures_and_results(self.folder)
        changed = [file for file, time in now.items() if before.get(file) != time]
        # a file that only another notebook names was written by that one, which ran beside it
        others = "".join(self.texts[other] for other in self.files_before if other != source)
        own = self.texts[source]
        return [f for f in changed if Path(f).stem in own or Path(f).stem not in others]

    def write_book(self, record):
        """Write book.json: the record with the rows of all notebooks that ever ran here."""
        rows = [self.rows[name] for name in sorted(self.rows)]
        config.write_json(self.out / "book.json", {**record, "notebooks": rows})


def _prepare(preset, only, given, out, notebooks):
    """Check all arguments of `run_notebooks`; only then make the folder of the output."""
    if "preset" in given:
        name = given["preset"]
        raise ValueError(f"the preset is no parameter: write vflan notebooks {name}, without -p")
    # an installed package has its own notebooks, unless the working directory has some
    sources = find_notebooks(notebooks or config.resolve("notebooks"), only)
    given_parameters(sources, given)
    for field in ("samples", "images"):
        if given.get(field):
            given[field] = absolute(field, given[field])
    recipes = config.preset(preset, given.get("changes", {}))
    folder = config.resolve(recipes.base.runs)
    # the notebooks say "tiny" themselves: nothing is injected, so they stay as committed
    if preset != "tiny" and any("preset" in parameter_names(source) for source in sources):
        given["preset"] = preset
        if preset.endswith(".py"):  # a notebook runs in a folder of its own
            path = Path(preset) if Path(preset).exists() else config.resolve(preset)
            given["preset"] = str(path.resolve())
    out = Path(out or folder).resolve()
    if out / "notebooks" == sources[0].parent.resolve():
        raise ValueError(
            f"out={out}: the executed notebooks would replace their sources; name another folder."
        )
    work = _Work(sources, given_parameters(sources, given), folder, out, is_small(recipes))
    (out / "notebooks").mkdir(parents=True, exist_ok=True)
    return work


def parameter_names(notebook: Path) -> list[str]:
    """The names that the parameters cell of a notebook assigns."""
    cells = nbformat.read(notebook, 4).cells
    texts = [cell.source for cell in cells if "parameters" in cell.metadata.get("tags", [])]
    statements = ast.parse("\n".join(texts)).body
    return [line.targets[0].id for line in statements if isinstance(line, ast.Assign)]


def given_parameters(sources: list[Path], given: dict) -> dict[Path, dict]:
    """{notebook: those of the `given` parameters that it has}, texts read as values.

    Raises ValueError for a parameter that none of the notebooks has, or a wrong value.
    """
    names = {source: parameter_names(source) for source in sources}
    known = list(dict.fromkeys(name for some in names.values() for name in some))
    for name in given:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"there are {', '.join(known) or 'none'}."
            hint = f"did you mean {near[0]!r}?" if near else hint
            raise ValueError(f"no notebook that would run has a parameter {name!r}; {hint}")
    values = {name: checked(**{name: value})[0] for name, value in given.items()}
    return {
        source: {name: value for name, value in values.items() if name in own}
        for source, own in names.items()
    }


def source_key(source: Path, parameters: dict) -> str:
    """A short hash of what an executed notebook depends on.

    That is its cells, the parameters with the files that they name (a preset's, one's own samples),
    the package with its texts, the tables in data/ and the shipped backbones.
    """
    cells = [(cell.cell_type, cell.source) for cell in nbformat.read(source, 4).cells]
    given = [cells, parameters]
    # a path in the parameters is absolute here; sizes and times, since samples may be large
    paths = [value for value in parameters.values() if isinstance(value, str) and value[:1] == "/"]
    # but not these, which may be hub ids
    names = filter(None, map(parameters.get, ("projector", "other_language_model")))
    paths += [str(config.resolve(name)) for name in names]
    paths = [[path] if Path(path).exists() else sorted(glob.glob(path)) for path in paths]
    if states := [Path(file).stat() for files in paths for file in files]:
        given.append([(state.st_size, state.st_mtime_ns) for state in states])
    digest = hashlib.sha256(json.dumps(given, default=str).encode())
    package = Path(__file__).parents[1]
    # captions.json and the like; what a wheel ships is named below
    texts = [file for file in package.rglob("*.json") if "shipped" not in file.parts]
    tables = sorted(table.name for table in (config.SHIPPED / "data").glob("*.csv"))
    data = [config.resolve(f"data/{name}") for name in (*tables, "tiny/backbones.json")]
    code = package.rglob("*.py")
    templates = (Path(__file__).parent / "templates").glob("*.*")
    for file in [*sorted([*code, *texts, *templates]), *data]:
        digest.update(file.read_bytes() if file.is_file() else b"")
    return digest.hexdigest()[:16]


def digest_of(path: Path) -> str:
    """A short hash of a file."""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()[:16]


def _figures_and_results(folder):
    """{path within a folder of runs: time of writing} of its figures and results."""
    paths = [path for kind in ("figures", "results") for path in (folder / kind).glob("[!.]*.*")]
    return {path.relative_to(folder).as_posix(): path.stat().st_mtime_ns for path in sorted(paths)}


# -------------------------------------------------------------------------------- the running


def in_parallel(
    sources: list[Path], start: Callable[[Path], Future | None], jobs: int
) -> Iterator[tuple[Path, object]]:
    """Run notebooks as soon as those that they need have ended; yield (notebook, result) pairs.

    start: returns the Future of a notebook, or None if it need not run (the result is then None).
    jobs: how many run at a time. After a failure no notebook starts; those that run may end, then
    the error is raised.
    """
    waiting, running, ended, error = list(sources), {}, set(), None
    while waiting or running:
        for source in list(waiting):
            if error is None and len(running) < jobs and _needs(source, sources) <= ended:
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


def _needs(source, sources):
    """The notebooks that a notebook reads from; all before it, if that is not known."""
    before = sources[: sources.index(source)]
    numbers = NEEDS.get(source.name[:2])
    return {path for path in before if numbers is None or path.name[:2] in numbers}


def _print_results(record, out, folder, say):
    """Print where everything is and the scores, and write the report."""

    def short(path):
        return os.path.relpath(path) if Path(path).is_relative_to(Path.cwd()) else str(path)

    preset, page = record["preset"], folder / "figures" / "README.md"
    say(f"\n{record['minutes']:.1f} minutes, at most {record['peak_gb']:.1f} GB")
    say(f"notebooks  {short(out / 'notebooks')}")
    say(f"figures    {short(page)} ({write_gallery(preset, page.parent, page)})")
    scores, table = folder / "results" / "scores.csv", None
    if scores.exists():
        is_new = any("results/scores.csv" in row.get("files", ()) for row in record["notebooks"])
        values = read_scores(scores)
        table = score_rows(values)
        say(f"scores     {short(scores)}{'' if is_new else ' (of an earlier run)'}")
        say(f"\n{mean_scores(values).to_string(na_rep='')}")
    else:
        say(f"scores     none yet: {short(scores)} is written by notebooks/05_evaluation.ipynb")
    figures = pictures(page.parent)
    report = write_report(preset, out, record, config.ROOT, table, figures, folder)
    say(f"\nreport     {short(report)}")
