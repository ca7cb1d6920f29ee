"""For the authors: copies a finished run to the tracked places and fills the pages' tables.

vflan publish tiny            # after `make demo`: notebooks, figures, scores
vflan publish tiny_frozen     # after `make paper`: the claims
vflan publish --readme        # only fill the tables of the pages from the tracked results
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import NamedTuple

import pandas as pd

from vflan import config
from vflan.analysis import tables
from vflan.analysis.claims import ledger
from vflan.tools.clean import LIMIT
from vflan.tools.notebooks import digest_of, find_notebooks, source_key


class Place(NamedTuple):
    """What is published of a preset, and where to."""

    notebooks: str  # folder of the executed notebooks
    only: tuple[str, ...]  # beginnings of their names, () for all
    results: dict[str, str]  # {results file of the run: its name in data/results}
    page: str  # that lists the figures
    seeds: int = 0  # each claim must be measured with as many
    free: tuple[str, ...] = ()  # parameters that change the amount of work, not what it shows


_DEMO = {"scores.csv": "tiny.csv", "floors.csv": "tiny_floors.csv"}
_CLAIMS = {"claims.csv": "claims_tiny.csv", "sweeps.csv": "tiny_sweeps.csv"}
_FREE = ("preset", "seeds", "beyond", "budget", "instances", "live", "jobs", "num_processes")
_PAGE = "figures/tiny_frozen/README.md"
PLACES = {
    "tiny": Place("notebooks", (), _DEMO, "figures/README.md"),
    "tiny_frozen": Place("notebooks/paper", ("06", "07", "08"), _CLAIMS, _PAGE, 5, _FREE),
}


def publish_run(preset: str) -> list[Path]:
    """Copy a preset's results, figures and notebooks to data/results, figures/ and notebooks/.

    Also fills the tables of the pages. Returns the paths written. Raises ValueError, before
    anything is copied, for a run that is incomplete or out of date, had other parameters, or was
    changed since.
    """
    if preset not in PLACES:
        raise ValueError(f"{preset!r} is not published; these are: {', '.join(PLACES)}.")
    place, home = PLACES[preset], config.ROOT
    folder = config.resolve(config.preset(preset).base.runs)
    sources = find_notebooks(home / "notebooks", place.only)
    rows = {row["name"]: row for row in config.read_json(folder / "book.json").get("notebooks", [])}
    for source in sources:
        _check_notebook(source, rows.get(source.stem, {}), folder, place)
    made = _check_files(folder, [rows[source.stem]["files"] for source in sources], place)
    if place.seeds:
        verdicts = pd.read_csv(folder / "results" / "claims.csv", dtype={"claim": str})
        check_seeds(verdicts, place, sources)

    figures = home / "figures" / preset
    for old in figures.glob("*.[ps][nv]g"):
        old.unlink()
    copies = {folder / "notebooks" / s.name: home / place.notebooks / s.name for s in sources}
    copies |= {folder / "results" / file: home / "data" / "results" / name
               for file, name in place.results.items()}  # fmt: skip
    copies |= {folder / file: figures / file.removeprefix("figures/")
               for file in made if file.startswith("figures/")}  # fmt: skip
    for source, target in copies.items():
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.name == "scores.csv" and target.is_file():
            with_other_seeds(source, target).to_csv(target, index=False)
        else:
            shutil.copyfile(source, target)
    tables.write_gallery(preset, figures, home / place.page)
    tables.fill_pages(home)
    return list(copies.values())


def with_other_seeds(source: Path, target: Path) -> pd.DataFrame:
    """The scores of `source`, then those of `target` with seeds that `source` lacks.

    The demo trains one seed and shows the others beside it.
    """
    # read as text, so that no number is rounded or written differently
    new, old = (pd.read_csv(path, dtype=str, keep_default_na=False) for path in (source, target))
    return pd.concat([new, old[~old.seed.isin(new.seed)]], ignore_index=True)


def _check_notebook(source, row, folder, place):
    """ValueError unless the notebook ran to its end, in this version, with parameters to publish.

    row: its entry in book.json.
    """
    executed, first = folder / "notebooks" / source.name, f"run vflan notebooks {folder.name} first"
    if "files" not in row or not executed.is_file():
        where = config.shown(folder)
        raise ValueError(f"{source.stem} has not run to its end in {where}: {first}.")
    if other := [name for name in row["parameters"] if name not in place.free]:
        value = f"{other[0]}={row['parameters'][other[0]]!r}"
        raise ValueError(f"{source.stem} ran with {value}: {first} without it.")
    if row["key"] != source_key(source, row["parameters"]):
        raise ValueError(f"{source.stem} or the package has changed since it ran: {first}.")
    if (size := executed.stat().st_size) > LIMIT:
        sizes = f"{size // 1000} KB, more than {LIMIT // 1000}"
        raise ValueError(f"{source.name} is {sizes}: draw smaller figures.")


def _check_files(folder, files_of, place):
    """The files that the notebooks made; ValueError if one is missing or was changed since.

    files_of: {file: digest} of each notebook.
    """
    # several notebooks may add to a file; it must be as one of them left it
    digests: dict[str, set] = {}
    for files in files_of:
        for file, digest in files.items():
            digests.setdefault(file, set()).add(digest)
    again = "run the notebooks again with --again."
    for file, known in digests.items():
        if not (folder / file).is_file() or digest_of(folder / file) not in known:
            path = config.shown(folder / file)
            raise ValueError(f"{path} is not as a notebook left it: {again}")
    if missing := [file for file in place.results if f"results/{file}" not in digests]:
        raise ValueError(f"the run made no results/{missing[0]}: {again}")
    return list(digests)


def check_seeds(verdicts: pd.DataFrame, place: Place, sources: list[Path]) -> None:
    """ValueError unless every claim of these notebooks was measured with enough seeds."""
    claims, seeds = ledger(), dict(zip(verdicts.claim, verdicts.n_seeds))
    for claim in claims[claims.notebook.isin([source.name[:2] for source in sources])].claim:
        if (count := seeds.get(claim, 0)) < place.seeds:
            needs = f"{place.seeds} are needed: this is a short trial"
            raise ValueError(f"claim {claim} has {count} seeds, {needs}.")
