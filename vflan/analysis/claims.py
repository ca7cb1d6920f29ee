"""From scores to verdicts: what the paper claims, what was measured, and whether the claim holds.

The ledger (data/claims.csv) states each claim of the paper before anything is measured: which runs
are compared, by which metric, and the smallest effect that counts. `verdicts` measures the claims,
question by question, over several seeds. Scores are tables of vflan.evaluate, with one row for each
seed of a run.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from zlib import crc32

import numpy as np
import pandas as pd
from scipy.stats import t as student

from vflan.analysis.plots.reference import Scores, headline
from vflan.config import output_folder, resolve
from vflan.config import preset as recipes
from vflan.config import shown as shown_path
from vflan.evaluation.answer_cache import keep_scores, locked, read_kept, read_scores
from vflan.evaluation.benchmarks import BENCHMARKS
from vflan.evaluation.benchmarks.benchmark import Metric
from vflan.evaluation.stats import draws, ratio, tables

Items = Callable[[str, int, str], Mapping[str, Metric]]  # (label, seed, benchmark) -> metrics


def seeds_of(scores: Scores, run: str, benchmark: str, metric: str) -> pd.DataFrame:
    """The rows of one metric of one run, indexed by seed."""
    rows = headline(scores, benchmark, metric)
    return rows[rows.run == run].set_index("seed").sort_index()


def answered(run, benchmark: str, folder: str | Path, name: str | None = None) -> list[dict]:
    """The questions of a benchmark, each with the `answer` of a run that vflan.evaluate saved.

    run: anything with .folder and .name. folder: of the benchmarks. name: the name under which the
    answers were saved, None for the run's own. FileNotFoundError if there are none, ValueError if
    they are answers to other questions.
    """
    path = Path(run.folder) / "answers" / (name or "") / f"{benchmark}.jsonl"
    if not path.is_file():
        raise FileNotFoundError(
            f"{run.name} has no answers to {benchmark} yet: call vflan.evaluate first."
        )
    rows = {row["i"]: row for row in read_kept(path)[1]}
    samples = BENCHMARKS[benchmark].load(folder)
    ids = {i: str(sample["question_id"]) for i, sample in enumerate(samples)}
    if any(str(row.get("question_id", ids.get(i))) != ids.get(i) for i, row in rows.items()):
        raise ValueError(f"{run.name} answered other questions of {benchmark} than these.")
    if missing := len(ids.keys() - rows):
        raise FileNotFoundError(
            f"{run.name} lacks {missing} answers to {benchmark}: call vflan.evaluate again."
        )
    return [sample | {"answer": rows[i]["answer"]} for i, sample in enumerate(samples)]


def table(scores: Scores, columns: Mapping[str, tuple[str, str | None]]) -> pd.DataFrame:
    """Runs by columns, each cell the mean over seeds.

    columns: {title: (benchmark, metric)}, where None as metric is the headline.
    """
    rows = {title: headline(scores, *column) for title, column in columns.items()}
    means = {title: part.groupby("run").value.mean() for title, part in rows.items()}
    return pd.DataFrame(means).reindex(scores.run.unique()).round(1)


def compare(scores: Scores, pairs: Iterable[tuple[str, str, str, str, str]]) -> pd.DataFrame:
    """One row for each comparison: both values with intervals, their difference, and a verdict.

    pairs: (claim, a, b, benchmark, metric), which claims that run `a` scores higher than run `b`.
    The verdict is `holds` if a's interval is wholly above b's in every seed, `opposite` if it is
    wholly below, else `open`. The interval of one seed says how well the questions measure one
    trained model; it says nothing about another training.
    """
    rows = []
    for claim, a, b, benchmark, metric in pairs:
        first, second = (seeds_of(scores, run, benchmark, metric) for run in (a, b))
        seeds = first.index.intersection(second.index)
        verdict = "open"
        if len(seeds) and (first.low[seeds] > second.high[seeds]).all():
            verdict = "holds"
        elif len(seeds) and (first.high[seeds] < second.low[seeds]).all():
            verdict = "opposite"
        difference = round((first.value[seeds] - second.value[seeds]).mean(), 1)
        values = _with_intervals(first), _with_intervals(second)
        rows.append([claim, f"{benchmark} {metric}", *values, difference, verdict])
    columns = ["claim", "measured as", "first", "second", "difference", "verdict"]
    return pd.DataFrame(rows, columns=columns)


def _with_intervals(rows):
    """`81.2 [79.0, 83.1]` for each seed, separated by slashes."""
    return " / ".join(f"{r.value:.1f} [{r.low:.1f}, {r.high:.1f}]" for r in rows.itertuples())


def _required(floor, majority, before):
    """(low, high, in words): the range in which a measured value has to be."""
    bound = floor.bound
    if floor.rule == "at least":
        return bound, 100, f"{bound:g} or more"
    if floor.rule == "within":
        return bound, floor.upper, f"{bound:g} to {floor.upper:g}"
    if floor.rule == "over majority":
        return majority + bound, 100, f"majority + {bound:g}"
    if floor.rule == "over before":
        sign = "+" if bound > 0 else "-"
        return before + bound, float("inf"), f"stage before {sign} {abs(bound):g}"
    return 0, 100, ""  # shown, not judged


def floors(scores: Scores, losses: Mapping[int, tuple] | None = None) -> pd.DataFrame:
    """What the mini world must show before a comparison in it means anything, from data/floors.csv.

    Columns: claim, needs, measured, each seed, majority, stage before, holds. losses: {seed:
    (first, last)} of the projector stage; its loss on captions has to fall by half. A floor whose
    benchmark was not run is left out. `holds` is judged on the mean over seeds, a range on each
    seed; it is None for a row that is shown only.
    """
    rows = []
    for floor in pd.read_csv(resolve("data/floors.csv")).itertuples():
        seeds = seeds_of(scores, floor.run, floor.benchmark, floor.metric)
        if seeds.empty:
            continue
        mean, majority = seeds.value.mean(), seeds.baseline.mean()
        before = seeds_of(scores, floor.before, floor.benchmark, floor.metric).value.mean()
        low, high, needs = _required(floor, majority, before)
        # always yes in one seed and never in another would have a balanced mean
        judged = seeds.value if floor.rule == "within" else [mean]
        holds = None if floor.rule == "shown" else all(low <= value <= high for value in judged)
        each = " / ".join(f"{value:.1f}" for value in seeds.value)
        rows.append([floor.claim, needs, mean, each, majority, before, holds])
    # A projector that was trained elsewhere has no losses here.
    if losses and None not in {loss for pair in losses.values() for loss in pair}:
        first, last = np.mean(list(losses.values()), axis=0)
        each = " / ".join(f"{pair[1]:.2f}" for pair in losses.values())
        claim, needs = "The projector learns captions: the loss falls", "half of the first"
        rows.append([claim, needs, last, each, None, first, bool(last <= first / 2)])
    columns = ["claim", "needs", "measured", "each seed", "majority", "stage before", "holds"]
    return pd.DataFrame(rows, columns=columns).round(2)


# ---------------------------------------------------------------------- the ledger

READ: list[str] = []  # committed files that this process has read: a notebook lists them at its end
HOLDS, WEAKLY, NOT, FEW = "holds", "holds weakly", "does not hold at this scale", "not enough runs"
MIN_SEEDS, ROUNDS, LEVEL = 3, 2000, 0.95
VERDICTS = "claim statement comparison metric n_seeds effect low high smallest verdict".split()


def ledger(path: str | Path | None = None) -> pd.DataFrame:
    """The claims: claim, statement, item, comparison, metric, direction, smallest, notebook, ...

    claim: a number, which counts in the correction for many claims, or a number with a letter
    (`1a`), a part of a claim that is shown only. item: the table or figure of the paper.
    comparison: labels of runs with signs and weights, `chat - 0.9 base`. metric:
    `benchmark:metric`; several are averaged. direction: `above` claims that the effect is at least
    `smallest` and its interval above 0; `over` and `below` claim that its interval is wholly above
    or below `smallest`. either_way: why the claim could turn out one way or the other.
    ValueError for another direction, or a claim that occurs twice.
    """
    claims = pd.read_csv(path or resolve("data/claims.csv"), dtype=str, keep_default_na=False)
    claims["smallest"] = claims.smallest.astype(float)
    if unknown := sorted(set(claims.direction) - {"above", "over", "below"}):
        raise ValueError(f"direction {unknown[0]!r} in the ledger: write above, over or below.")
    if len(repeated := claims.claim[claims.claim.duplicated()]):
        raise ValueError(f"claim {repeated.iloc[0]} occurs twice in the ledger.")
    return claims


def terms(comparison: str) -> list[tuple[float, str]]:
    """[(weight, label), ...] of a comparison: `chat - 0.9 base` is [(1, chat), (-0.9, base)]."""
    parsed, sign, weight = [], 1.0, 1.0
    for word in comparison.split():
        if word in "+-":
            sign = -1.0 if word == "-" else 1.0
        elif re.fullmatch(r"\d*\.?\d+", word):
            weight = float(word)
        else:
            parsed.append((sign * weight, word))
            sign, weight = 1.0, 1.0
    return parsed


def verdicts(
    items: Items,
    seeds: Sequence[int],
    claims: pd.DataFrame | None = None,
    rounds: int = ROUNDS,
) -> pd.DataFrame:
    """The ledger with what was measured: one row for each claim, with the columns VERDICTS.

    items(label, seed, benchmark) -> {metric: Metric} of a run's saved answers (a Sweep's `items`);
    KeyError where there are none. A claim counts only the seeds that have all of its runs. claims:
    some rows of `ledger()`; the correction always counts all whole claims of the ledger.

    The effect is paired: the runs of a seed are compared on the same questions, then seeds are
    averaged. Its standard error has two levels, the spread of seeds and a bootstrap over pictures.
    The interval is Student's t with the degrees of freedom of both (Welch and Satterthwaite), at
    95 % corrected for the number of claims (Bonferroni). The verdict is `holds` by that interval,
    `holds weakly` if only by the uncorrected one; with fewer than three seeds there is no verdict.
    """
    score, rows = resampler(items, rounds), []
    whole = int(ledger().claim.str.isdigit().sum())
    for claim in (ledger() if claims is None else claims).itertuples():
        runs, measures = terms(claim.comparison), claim.metric.split()
        effects, replicates = paired_effects(score, seeds, runs, measures)
        effect = float(np.mean(effects)) if effects else float("nan")
        strict = effect_interval(effects, replicates, 1 - (1 - LEVEL) / whole)
        loose = effect_interval(effects, replicates, LEVEL)
        if len(effects) < MIN_SEEDS:
            verdict = FEW
        elif _is_confirmed(effect, *strict, claim):
            verdict = HOLDS
        else:
            verdict = WEAKLY if _is_confirmed(effect, *loose, claim) else NOT
        rows.append([claim.claim, claim.statement, claim.comparison, claim.metric, len(effects),
                     effect, *strict, claim.smallest, verdict])  # fmt: skip
    return pd.DataFrame(rows, columns=VERDICTS).round(2)


def _is_confirmed(effect, low, high, claim):
    """Whether an effect with this interval is what the claim says."""
    if claim.direction == "above":
        return low > 0 and effect >= claim.smallest
    return low > claim.smallest if claim.direction == "over" else high < claim.smallest


def resampler(items: Items, rounds: int = ROUNDS) -> Callable:
    """A cached function score(label, seed, `benchmark:metric`) -> (value, (rounds,) replicates).

    A replicate draws the pictures of a benchmark anew, the same ones for all seeds and runs, since
    all of them were asked about the same pictures.
    """

    @cache
    def drawn(benchmark, pictures):
        blocks = draws(pictures, crc32(benchmark.encode()), rounds)
        return np.concatenate(list(blocks)).astype(float)  # (rounds, pictures)

    @cache
    def score(label, seed, measure):
        benchmark, _, name = measure.partition(":")
        metric = items(label, seed, benchmark)[name]
        sums = tables(100 * metric.num, metric.den, metric.cluster, metric.group)
        weights = drawn(benchmark, len(sums[0]))
        value = float(ratio(sums[0].sum(0), sums[1].sum(0)))
        return value, ratio(*(weights @ part for part in sums))

    return score


def paired_effects(
    score: Callable, seeds: Sequence[int], runs: list[tuple[float, str]], measures: list[str]
) -> tuple[list[float], np.ndarray]:
    """([effect of each seed that has all runs], (rounds,) replicates of their mean).

    score: from `resampler`. runs: (weight, label). measures: `benchmark:metric`, averaged.
    """
    effects, replicates = [], np.zeros(1)
    for seed in seeds:
        try:
            parts = [(w, *score(label, seed, m)) for m in measures for w, label in runs]
        except KeyError:
            continue
        effects.append(sum(weight * value for weight, value, _ in parts) / len(measures))
        replicates = replicates + sum(weight * part for weight, _, part in parts) / len(measures)
    return effects, replicates / max(1, len(effects))


def effect_interval(
    effects: Sequence[float], replicates: np.ndarray, level: float
) -> tuple[float, float]:
    """(low, high) of the mean effect; NaN with fewer than two seeds, whose spread is unknown."""
    if len(effects) < 2:
        return float("nan"), float("nan")
    between, pictures = np.var(effects, ddof=1), float(np.var(replicates))
    error, freedom = standard_error(between, pictures, len(effects))
    half = float(student.ppf((1 + level) / 2, freedom)) * error
    return float(np.mean(effects) - half), float(np.mean(effects) + half)


def standard_error(between: float, pictures: float, seeds: int) -> tuple[float, float]:
    """(standard error, degrees of freedom) of the mean effect of so many seeds.

    between: variance of an effect from seed to seed. pictures: variance of the mean over draws of
    pictures.
    """
    of_seeds = between / seeds
    total = of_seeds + pictures
    # Welch and Satterthwaite; the bootstrap counts as 1000 degrees of freedom
    freedom = total**2 / (of_seeds**2 / (seeds - 1) + pictures**2 / 1000) if total else 1.0
    return float(total**0.5), float(freedom)


def keep_verdicts(path: str | Path, measured: pd.DataFrame) -> pd.DataFrame:
    """Add verdicts to a csv, in place of those of the same claims; returns the whole table.

    The rows are in the order of the ledger.
    """
    path, order = Path(path), {claim: i for i, claim in enumerate(ledger().claim)}
    with locked(path):  # notebooks run side by side
        if path.exists():
            old = pd.read_csv(path, dtype={"claim": str})
            measured = pd.concat([old, measured.assign(claim=measured.claim.astype(str))])
            measured = measured.drop_duplicates("claim", keep="last")
        measured = measured.sort_values("claim", key=lambda column: column.map(order))
        part = path.with_suffix(".part")
        measured.to_csv(part, index=False)
        part.replace(path)
    return measured


# ---------------------------------------------------------------------- what notebooks show


def number(value: float) -> Metric:
    """A Metric of one number from 0 to 1, for example a correlation; nothing can be resampled."""
    return Metric(np.array([value], float), np.ones(1), np.zeros(1), np.zeros(1))


def publish(
    preset: str, measured: pd.DataFrame, scores: Scores, changes: dict | None = None
) -> None:
    """Save a notebook's verdicts and scores as claims.csv and sweeps.csv in `results` of its runs.

    `make publish` copies them to data/results, where `committed` reads them. Prints what is
    otherwise than committed.
    """
    folder = output_folder(resolve(recipes(preset, changes or {}).base.runs), "results")
    print("\n".join(changed(measured, _committed(preset))))
    keep_verdicts(folder / "claims.csv", measured)
    keep_scores(folder / "sweeps.csv", scores)


def changed(measured: pd.DataFrame, before: pd.DataFrame) -> list[str]:
    """A line for each claim with another verdict than `before`, or one that says that none has."""
    both = measured.merge(before, on="claim", how="left", suffixes=("", "_before"))
    new = both[both.verdict_before.isna()]
    other = both[both.verdict_before.notna() & (both.verdict != both.verdict_before)]
    lines = [
        f"{row.claim}. {row.statement}: {row.verdict_before} ({row.effect_before:+.1f}) before, "
        f"now {row.verdict} ({row.effect:+.1f})"
        for row in other.itertuples()
    ]
    if len(new):
        lines.append(f"measured for the first time: {', '.join(new.claim)}")
    return lines or ["The verdicts are those of the committed run."]


def committed(notebook: str, preset: str = "tiny") -> pd.DataFrame:
    """The committed verdicts of a notebook's claims ("06"); empty if there are none yet."""
    saved = _committed(preset)
    return saved[saved.claim.isin(ledger().query("notebook == @notebook").claim)]


def _committed(preset):
    # `tiny` and `tiny_frozen` share one file: the frozen mini world is measured for both
    path = resolve(f"data/results/claims_{preset.removesuffix('_frozen')}.csv")
    # A preset file of one's own is another experiment, whatever its name.
    if preset.endswith(".py") or not path.exists():
        return pd.DataFrame(columns=VERDICTS)
    READ.append(shown_path(path))
    return pd.read_csv(path, dtype={"claim": str})


def beside(scores: Scores, preset: str = "tiny", changes: dict | None = None) -> pd.DataFrame:
    """Headline scores by benchmark and run: the seeds run here, then the other committed ones.

    A trial with `changes` is another experiment, and so is a preset file of one's own, whatever its
    name: no committed seeds are shown beside them.
    """
    path = resolve(f"data/results/{preset}.csv")
    parts = [scores.assign(source=[f"seed {seed}, run here" for seed in scores.seed])]
    if path.is_file() and not changes:
        other = read_scores(path)
        other = other[~other.seed.isin(scores.seed) & other.run.isin(scores.run)]
        parts.append(other.assign(source=[f"seed {seed}, committed" for seed in other.seed]))
        READ.append(shown_path(path))
    both = pd.concat(parts, ignore_index=True)
    headlines = {name: benchmark.headline for name, benchmark in BENCHMARKS.items()}
    is_headline = both.metric == both.benchmark.map(headlines)
    both = both[is_headline & both.benchmark.isin(scores.benchmark)]
    index = ["benchmark", "metric", "run"]
    return both.pivot_table(index=index, columns="source", values="value", sort=False).round(1)


def account(*sweeps, live: str = "all") -> None:
    """Print what a notebook ran live, what it read, and what it left out.

    sweeps: the notebook's Sweeps, in order. live: "small" if only some of the arms were run.
    """
    runs, trained, asked = set(), set(), {}
    for done in sweeps:
        runs |= {shown_path(run.folder) for run in done.runs.values()}
        trained |= {shown_path(done.runs[key].folder) for key in done.trained}
        for label, _, name in sorted(done.answered):
            asked.setdefault(label, []).append(name)
    questions = [f"{label} ({', '.join(dict.fromkeys(names))})" for label, names in asked.items()]
    lines = {"trained here": sorted(trained), "asked here": questions}
    lines |= {"read, runs": sorted(runs - trained), "read, committed": sorted(set(READ))}
    if live == "small":
        lines["not run here"] = ['the other arms and seeds: live = "all", or make paper']
    for title, parts in lines.items():
        text = f"{title:17}" + (", ".join(dict.fromkeys(parts)) or "nothing")
        print(textwrap.fill(text, 112, subsequent_indent=" " * 17, break_on_hyphens=False))


def shown_verdicts(measured: pd.DataFrame) -> pd.DataFrame:
    """Verdicts as notebooks show them, with the interval as text and without the comparison."""
    rows = measured.itertuples()
    intervals = [f"[{r.low:.1f}, {r.high:.1f}]" if r.n_seeds > 1 else "" for r in rows]
    columns = ["statement", "n_seeds", "effect", "interval", "smallest", "verdict"]
    return measured.assign(interval=intervals).set_index("claim")[columns]


def reading(measured: pd.DataFrame | None, long: pd.DataFrame) -> Iterator[str]:
    """One line for each whole claim: these runs' verdict, or the long form's where there is none.

    measured: the verdicts of these runs, or None where they were not judged (a notebook with
    live="small"). long: the committed verdicts.
    """
    rows = long if measured is None else measured
    for row in rows[rows.claim.str.isdigit()].itertuples():
        source = "committed long form" if measured is None else "these runs"
        other = long[long.claim == row.claim]
        if measured is not None and row.verdict == FEW and len(other):
            row, source = next(other.itertuples()), "committed long form"
        statement = f"{row.claim}. {row.statement}"
        if not row.n_seeds:
            yield f"{statement}: needs runs that only the long form has (make paper)"
            continue
        interval = "" if np.isnan(row.low) else f", interval {row.low:.1f} to {row.high:.1f}"
        seeds = f"{row.n_seeds} seed{'s' if row.n_seeds != 1 else ''}"
        yield f"{statement}: {row.verdict} ({source}, {seeds}: {row.effect:+.1f}{interval})"
