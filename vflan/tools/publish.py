"""For the authors: copies what a finished run made to the tracked places, and fills the tables of README.md and docs/.

vflan publish tiny            # after `make demo`: notebooks, figures, scores
vflan publish tiny_frozen     # after `make paper`: the claims
vflan publish --readme        # copy nothing: fill the tables of the pages from the tracked results
"""

import shutil
from typing import NamedTuple

import pandas as pd

from vflan import config
from vflan.analysis import tables
from vflan.analysis.claims import ledger
from vflan.tools.notebooks import LIMIT, digest_of, find_notebooks, fingerprint


class Place(NamedTuple):
    """What is published of a preset: which notebooks and where to, and each results file with its name in data/results."""

    notebooks: str
    only: tuple
    results: dict
    page: str  # that lists the figures
    seeds: int = 0  # each claim has to be measured with as many
    free: tuple = ()  # parameters that the run may have: more work, not other work


PLACES = {
    "tiny": Place(
        "notebooks",
        (),
        {"scores.csv": "tiny.csv", "floors.csv": "tiny_floors.csv"},
        "figures/README.md",
    ),
    "tiny_frozen": Place(
        "notebooks/paper",
        ("06", "07", "08"),
        {"claims.csv": "claims_tiny.csv", "sweeps.csv": "tiny_sweeps.csv"},
        "figures/tiny_frozen/README.md",
        5,
        ("preset", "seeds", "beyond", "budget", "instances", "live", "jobs", "num_processes"),
    ),
}


def publish(preset):
    """Copy the results, figures and notebooks of a preset's run to data/results, figures/ and notebooks/; fill the pages.

    Returns the paths written. ValueError, before anything is copied, for a run that is not whole, not up to date, was
    made with other parameters, or was changed since.
    """
    if preset not in PLACES:
        raise ValueError(f"{preset!r} is not published; these are: {', '.join(PLACES)}.")
    place, home = PLACES[preset], config.ROOT
    folder = config.resolve(config.preset(preset).base.runs)
    sources = find_notebooks(home / "notebooks", place.only)
    rows = {row["name"]: row for row in config.read_json(folder / "book.json").get("notebooks", [])}
    for source in sources:
        _ready(source, rows.get(source.stem, {}), folder, place)
    made = {}
    for source in sources:
        for file, mark in rows[source.stem]["files"].items():
            made.setdefault(file, set()).add(
                mark
            )  # several notebooks add to a file; the last one left it as it is
    for file, marks in made.items():
        if not (folder / file).is_file() or digest_of(folder / file) not in marks:
            raise ValueError(
                f"{config.shown(folder / file)} is not as a notebook left it: run the notebooks again with --again."
            )
    if missing := [file for file in place.results if f"results/{file}" not in made]:
        raise ValueError(
            f"the run made no results/{missing[0]}: run the notebooks again with --again."
        )
    if place.seeds:
        _whole(pd.read_csv(folder / "results" / "claims.csv", dtype={"claim": str}), place, sources)

    figures, written = home / "figures" / preset, []
    for old in figures.glob("*.[ps][nv]g"):
        old.unlink()
    copies = [
        (folder / "notebooks" / source.name, home / place.notebooks / source.name)
        for source in sources
    ]
    copies += [
        (folder / "results" / own, home / "data" / "results" / name)
        for own, name in place.results.items()
    ]
    copies += [
        (folder / file, figures / file.removeprefix("figures/"))
        for file in made
        if file.startswith("figures/")
    ]
    for source, target in copies:
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.name == "scores.csv" and target.is_file():
            with_other_seeds(source, target).to_csv(target, index=False)
        else:
            shutil.copyfile(source, target)
        written.append(target)
    tables.write_gallery(preset, figures, home / place.page)
    tables.fill_pages(home)
    return written


def with_other_seeds(source, target):
    """The scores of `source`, then those of `target` whose seed did not run: the demo trains one, and shows the others."""
    # as texts, so that no number is written anew
    fresh, old = (pd.read_csv(path, dtype=str, keep_default_na=False) for path in (source, target))
    return pd.concat([fresh, old[~old.seed.isin(fresh.seed)]], ignore_index=True)


def _ready(source, row, folder, place):
    """ValueError unless a notebook ran to its end in this version, without parameters that change what it says."""
    again = f"run vflan notebooks {folder.name} first"
    if "files" not in row or not (folder / "notebooks" / source.name).is_file():
        raise ValueError(
            f"{source.stem} has not run to its end in {config.shown(folder)}: {again}."
        )
    if odd := [name for name in row["parameters"] if name not in place.free]:
        raise ValueError(
            f"{source.stem} ran with {odd[0]}={row['parameters'][odd[0]]!r}: {again} without it."
        )
    if row["key"] != fingerprint(source, row["parameters"]):
        raise ValueError(f"{source.stem} or the package has changed since it ran: {again}.")
    if (size := (folder / "notebooks" / source.name).stat().st_size) > LIMIT:
        raise ValueError(
            f"{source.name} is {size // 1000} KB, more than {LIMIT // 1000}: draw smaller figures."
        )


def _whole(found, place, sources):
    """ValueError unless every claim of these notebooks was measured with enough seeds."""
    claims, seeds = ledger(), dict(zip(found.claim, found.n_seeds))
    for claim in claims[claims.notebook.isin([source.name[:2] for source in sources])].claim:
        if seeds.get(claim, 0) < place.seeds:
            raise ValueError(
                f"claim {claim} has {seeds.get(claim, 0)} seeds, {place.seeds} are needed: this is a short trial."
            )
