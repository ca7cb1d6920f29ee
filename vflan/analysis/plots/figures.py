"""The figures of the paper, drawn from tables of scores (vflan.evaluate, vflan.sweep)."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd

from vflan.analysis.claims import HOLDS, NOT, WEAKLY
from vflan.analysis.plots.reference import TITLES, Scores, headline, printed, unit
from vflan.analysis.plots.theme import COLORS, GREY, INK, MAJORITY, PALE, model_colors
from vflan.evaluation.benchmarks import BENCHMARKS

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Names = Sequence[str]
Labels = Mapping[str, tuple[str, str | None]]  # {run: (label, row of the paper's table or None)}
Panels = Sequence[tuple[str, str | None, str]]  # (benchmark, metric or None for headline, title)
VERDICT_COLORS = {HOLDS: COLORS[2], WEAKLY: COLORS[5], NOT: COLORS[1]}


def _legend_mark(label, color, marker="o", ls="", **style):
    """A mark for a legend, not drawn anywhere else."""
    return plt.Line2D([], [], marker=marker, ls=ls, color=color, label=label, **style)


def _panels(count, columns, **options):
    """A figure with `count` axes in rows of `columns`; the axes left over are hidden.

    ValueError for none: matplotlib's would only speak of rows.
    """
    if not count:
        raise ValueError("There is nothing to draw: no row of the table belongs to a panel.")
    lines = -(-count // columns)
    fig, axes = plt.subplots(lines, columns, squeeze=False, **options)
    for ax in axes.flat[count:]:
        ax.set_axis_off()
    return fig, axes


def loss_curve(*runs, smooth: float = 0.03) -> Figure:
    """The loss over the steps of each run: every step in pale, the running mean on top.

    runs: anything with .name and .metrics(). smooth: the mean's window, as a share of all steps.
    Steps whose rows have no picture are crosses in a panel of their own: LLaVA's sampler puts rows
    of text alone into steps of their own, and their loss is another task's.
    """
    tables, colors, drawn = [run.metrics() for run in runs], model_colors(r.name for r in runs), []
    split = [_without_pictures(table) for table in tables]
    has_text = any(len(text) for text, _ in split)
    fig, axes = plt.subplots(
        1 + has_text, 1, figsize=(9, 3.2 + 0.8 * has_text), sharex=True, squeeze=False,
        height_ratios=[3, 1][: 1 + has_text],
    )  # fmt: skip
    ax, below = axes[0, 0], axes[-1, 0]
    for run, (text, table) in zip(runs, split):
        color = colors[run.name]
        others = drawn.count(color)  # other seeds of this stage
        style = ("--", ":")[others % 2] if others else "-"
        drawn.append(color)
        if len(text):
            below.plot(text.step, text.loss, "x", color=color, alpha=0.7, markersize=4)
        window = min(len(table), max(5, int(smooth * len(table))))
        mean = table.loss.rolling(window, min_periods=1, center=True).mean()
        last = f"last {window} steps {table.loss.tail(window).mean():.2f}"
        ax.plot(table.step, table.loss, color=color, alpha=0.18, lw=0.8)
        ax.plot(table.step, mean, style, color=color, label=f"{run.name}: mean of the {last}")
    ax.set(ylabel="loss of a learned token, nats", title="Training loss", ylim=(0, None))
    ax.legend()
    if has_text:
        below.set(title="Steps of text alone", ylim=(0, None))
    below.set_xlabel("step")
    return fig


def _without_pictures(metrics):
    """(steps of text alone, other steps); of a run of text, all steps are other ones."""
    alone = metrics.get("pictures", pd.Series(1, metrics.index)) == 0
    return (metrics[:0], metrics) if alone.all() else (metrics[alone], metrics[~alone])


def learning_curves(heldout: pd.DataFrame, category: Mapping[str, str]) -> Figure:
    """The held-out loss of every task during training, one panel for each category.

    heldout: `Run.heldout()`. category: {task: its category}.
    """
    heldout = heldout[heldout.task != "all"]
    groups: dict[str, list] = {}
    for task in heldout.task.unique():
        groups.setdefault(category.get(task, "other"), []).append(task)
    height = 1.25 * -(-len(groups) // 6) + 0.4
    fig, axes = _panels(len(groups), 6, figsize=(9, height), sharex=True)
    for ax, name in zip(axes.flat, sorted(groups)):
        for i, task in enumerate(groups[name]):
            part = heldout[heldout.task == task]
            ax.plot(part.step, part.loss, color=COLORS[i % len(COLORS)], lw=1.1)
        ax.set_title(f"{name} ({len(groups[name])})", fontsize=7)
        ax.tick_params(labelsize=7)
        ax.set_ylim(bottom=0)
    fig.supxlabel("step", fontsize=9)
    fig.supylabel("loss a token on held-out rows", fontsize=9)
    return fig


# ---------------------------------------------------------------------- tables as dot plots


def dots(scores: Scores, rows: Labels, item: str, benchmarks: Names | None = None) -> Figure:
    """A panel for each benchmark and a line for each run, with the paper's value as a diamond.

    A dot is the value, a bar its interval, a dotted line the majority answer. A diamond is hollow
    if the paper's value is not confirmed. rows: {run: (label, row of the paper's table or None)},
    from top to bottom. item: the table's name in data/paper.csv. The legend names what is drawn.
    """
    scores = scores[scores.run.isin(list(rows))]
    names = [name for name in benchmarks or BENCHMARKS if len(headline(scores, name))]
    columns = min(4, len(names)) or 1
    height = -(-len(names) // columns) * (0.95 + 0.3 * len(rows))
    fig, axes = _panels(len(names), columns, figsize=(9, height), sharey=True)
    drawn: set[str] = set()
    for k, (ax, name) in enumerate(zip(axes.flat, names)):
        drawn |= _draw_dots(ax, headline(scores, name), rows, item, BENCHMARKS[name].paper)
        ax.set_title(TITLES[name])
        ax.set_xlabel(unit(name), fontsize=8.5)
        ax.set(xlim=(-3, 103), ylim=(len(rows) - 0.5, -0.5), xticks=[0, 25, 50, 75, 100])
        ax.set_yticks(range(len(rows)), [label for label, _ in rows.values()])
        ax.tick_params(axis="y", length=0, labelleft=k % columns == 0)
        ax.grid(axis="y", visible=False)
    handles = [
        _legend_mark("here, 95 % interval", INK, ls="-"),
        plt.Line2D([], [], label="majority answer", **MAJORITY),
        _legend_mark("paper, 13B", GREY, "D"),
        _legend_mark("paper, 13B, not confirmed", "white", "D", markeredgecolor=GREY),
    ]
    handles = [handle for handle in handles if handle.get_label() in drawn]
    fig.legend(handles=handles, loc="outside lower center", ncols=4)
    return fig


def _draw_dots(ax, scores, rows, item, column):
    """Draw one panel of `dots`; several seeds of a run are drawn on the same line.

    Returns the legend's labels of what is drawn.
    """
    diamond = dict(markeredgecolor=GREY, markersize=6.5, zorder=2)
    colors, drawn = model_colors(rows), {"here, 95 % interval"}
    for y, (run, (_, row)) in enumerate(rows.items()):
        if number := row and printed(item, row, column):
            drawn.add("paper, 13B" if number[1] else "paper, 13B, not confirmed")
            ax.plot(number[0], y, "D", color=GREY if number[1] else "white", **diamond)
        for score in scores[scores.run == run].itertuples():
            ax.plot(
                [score.low, score.high], [y, y], color=colors[run], lw=2.4, alpha=0.45, zorder=3
            )
            ax.plot(score.value, y, "o", color=colors[run], zorder=4)
            if not np.isnan(score.baseline):  # a model as judge answers for no majority
                drawn.add("majority answer")
                ax.vlines(score.baseline, y - 0.34, y + 0.34, zorder=3, **MAJORITY)
    return drawn


def table2(scores: Scores, rows: Labels | None = None, benchmarks: Names | None = None) -> Figure:
    """Table 2 as dots: every benchmark of the given runs beside the paper's Base and Chat.

    rows: as for `dots`; by default all runs, those whose names end in base or chat with the paper's
    row of that name.
    """
    if rows is None:
        stages = {"base": "Vision-Flan Base", "chat": "Vision-Flan Chat"}
        rows = {run: (run, stages.get(run.rsplit("-", 1)[-1])) for run in scores.run.unique()}
    return dots(scores, rows, "Table 2", benchmarks)


def parts_table(
    scores: Scores,
    rows: Mapping[str, str | None],
    item: str = "Table 5",
    benchmarks: Names | None = None,
) -> Figure:
    """Tables 3 to 7 as dots.

    rows: {run: row of that table in data/paper.csv, or None}, for example
    {"mlp-only": "LLM frozen, MLP tuned", "base": "LLM tuned, MLP tuned"}.
    """
    labels = {run: (row or run, row) for run, row in rows.items()}
    return dots(scores, labels, item, benchmarks)


def categories(
    scores: Scores, benchmarks: Names, of: Mapping[str, str] | None = None, metric: str = "accuracy"
) -> Figure:
    """A panel for each benchmark, a line for each category, a dot with its interval for each stage.

    A dot is the mean over the category's kinds and all seeds; a dotted line is the majority answer.
    The interval joins those of the kinds, whose questions differ, by their squares (Zou and Donner,
    2008). scores: rows with `metric`/kind. of: {kind: category}; a kind that it lacks has its own
    line.
    """
    part = scores[scores.metric.str.startswith(f"{metric}/")]
    kind = part.metric.str.removeprefix(f"{metric}/")
    stage = part.run.str.replace(r"-seed\d+$", "", regex=True)
    part = part.assign(kind=kind, stage=stage, line=[(of or {}).get(name, name) for name in kind])
    numbers = ["value", "low", "high", "baseline"]
    # the seeds of a stage answer the same questions, so their intervals do not shrink by joining
    part = part.groupby(["benchmark", "line", "stage", "kind"], sort=False)[numbers].mean()
    parts = [part.loc[name].groupby(["line", "stage"], sort=False).apply(_join_kinds)
             for name in benchmarks]  # fmt: skip
    size = (9, 0.6 + 0.3 * max(table.index.get_level_values(0).nunique() for table in parts))
    fig, axes = plt.subplots(1, len(parts), figsize=size, squeeze=False, layout="constrained")
    for ax, name, table in zip(axes.flat, benchmarks, parts):
        values = table.value.unstack()[list(dict.fromkeys(table.index.get_level_values(1)))]
        values = values.sort_values(values.columns[-1], kind="stable")
        colors, lines = model_colors(values), np.arange(len(values))
        chance = table.baseline.unstack().mean(axis=1)[values.index]
        label = "majority answer" if chance.notna().any() else None
        ax.vlines(chance, lines - 0.4, lines + 0.4, label=label, **MAJORITY)
        for k, column in enumerate(values):
            own, y = table.xs(column, level=1).reindex(values.index), lines + 0.24 * k - 0.12
            ax.hlines(y, own.low, own.high, color=colors[column], lw=2, alpha=0.45)
            ax.plot(own.value, y, "o", color=colors[column], markersize=5, label=column)
        ax.set_yticks(lines, values.index)
        ax.set(title=TITLES[name], xlim=(-3, 103), xlabel=unit(name, metric))
    fig.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=6)
    return fig


def _join_kinds(kinds):
    """Mean and interval of several kinds of questions from their own means and intervals."""
    below, above = kinds.value - kinds.low, kinds.high - kinds.value
    mean, count = kinds.value.mean(), len(kinds)
    low, high = (
        mean + sign * np.sqrt((d**2).sum()) / count for sign, d in ((-1, below), (1, above))
    )
    numbers = {"value": mean, "low": low, "high": high, "baseline": kinds.baseline.mean()}
    return pd.Series(numbers)


def yes_ratio(scores: Scores) -> Figure:
    """POPE's share of yes for each way of choosing the objects asked for; half is right.

    A dot with its interval for each stage and seed; the seeds of a stage have one colour and
    stand side by side. scores: rows `yes_ratio/SETTING` of the benchmark pope.
    """
    part = scores[(scores.benchmark == "pope") & scores.metric.str.startswith("yes_ratio/")]
    settings = list(dict.fromkeys(part.metric.str.removeprefix("yes_ratio/")))
    runs = list(dict.fromkeys(zip(part.run, part.seed)))
    colors = model_colors(part.run)
    fig, ax = plt.subplots(figsize=(9, 3))
    for k, (run, seed) in enumerate(runs):
        own = part[(part.run == run) & (part.seed == seed)].set_index("metric")
        own = own.reindex([f"yes_ratio/{setting}" for setting in settings])
        x = np.arange(len(settings)) + (k - (len(runs) - 1) / 2) * 0.6 / max(1, len(runs))
        ax.vlines(x, own.low, own.high, color=colors[run], lw=3, alpha=0.45)
        ax.plot(x, own.value, "o", color=colors[run])
    ax.axhline(50, color=INK, ls="--", lw=1)
    ax.set_xticks(range(len(settings)), settings)
    ax.set(ylim=(0, 100), ylabel=unit("pope", "yes_ratio"), title="POPE: how often it says yes")
    handles = [
        _legend_mark(f"{run}, 95 % interval", color, ls="-") for run, color in colors.items()
    ]
    handles.append(plt.Line2D([], [], color=INK, ls="--", lw=1, label="the truth"))
    ax.legend(handles=handles, loc="center left", bbox_to_anchor=(1, 0.5))
    return fig


def affinity(
    scores: Scores,
    runs: Names,
    category: Mapping[str, str],
    start: str = "projector",
    benchmark: str = "heldin",
) -> Figure:
    """A heat map of what tuning on one category of tasks (rows) gains on all others (columns).

    The gain is over the run `start`, in points. scores: a table of vflan.evaluate with a row for
    each task (`accuracy/TASK`). runs: names like `category-NAME`. category: {task: category}.
    """
    own = scores[(scores.benchmark == benchmark) & scores.metric.str.startswith("accuracy/")]
    own = own.assign(category=own.metric.str.removeprefix("accuracy/").map(category))
    table = own.dropna(subset="category").groupby(["run", "category"]).value.mean().unstack()
    gain = (table.loc[list(runs)] - table.loc[start])[sorted(table.columns)]
    fig, ax = plt.subplots(figsize=(9, 1.6 + 0.26 * len(gain)))
    limit = max(1.0, float(np.nanmax(np.abs(gain))))
    image = ax.imshow(gain, cmap="RdBu", vmin=-limit, vmax=limit, aspect="auto")
    for (y, x), value in np.ndenumerate(gain.to_numpy()):
        color = "white" if abs(value) > 0.6 * limit else INK
        ax.text(x, y, f"{value:.0f}", ha="center", va="center", fontsize=6.5, color=color)
    names = [run.removeprefix("category-").replace("-", " ") for run in gain.index]
    ax.set_xticks(range(len(gain.columns)), gain.columns, rotation=40, ha="right", fontsize=8)
    ax.set_yticks(range(len(gain)), names, fontsize=8)
    ax.set(xlabel="asked", ylabel="tuned on")
    ax.grid(False)
    fig.colorbar(image, ax=ax, label="gain, points", shrink=0.7)
    return fig


# ---------------------------------------------------------------------- curves


def curves(
    scores: Scores,
    points: Mapping[str, tuple[str, float]],
    panels: Panels,
    xlabel: str,
    log: bool = False,
    reference: Scores | None = None,
) -> Figure:
    """Score against an amount, one panel for each metric.

    points: {run: (line, x)}. panels: [(benchmark, metric or None for the headline, title)].
    reference: scores of one run, drawn as a dashed line. Seeds are drawn as dots; the line is their
    mean, and the band the mean of their intervals.
    """
    columns = len(panels) if len(panels) <= 4 else 3
    height = 0.3 + 2.7 * -(-len(panels) // columns)
    fig, axes = _panels(len(panels), columns, figsize=(9, height))
    names = list(dict.fromkeys(line for line, _ in points.values()))
    xs = sorted({x for _, x in points.values()})
    ticks = [f"{x // 1000}k" if x >= 1000 and x % 1000 == 0 else f"{x:g}" for x in xs]
    for ax, (benchmark, metric, title) in zip(axes.flat, panels):
        own = headline(scores, benchmark, metric)
        for name, color in model_colors(names).items():
            part = own[own.run.isin([run for run, (line, _) in points.items() if line == name])]
            part = part.assign(x=[points[run][1] for run in part.run])
            mean = part.groupby("x")[["value", "low", "high"]].mean()
            ax.plot(part.x, part.value, "o", color=color, markersize=3.5, alpha=0.6)
            ax.plot(mean.index, mean.value, color=color, label=name)
            ax.fill_between(mean.index, mean.low, mean.high, color=color, alpha=0.14, lw=0)
        if own.baseline.notna().any():
            ax.axhline(own.baseline.mean(), label="majority answer", **MAJORITY)
        other = own.iloc[:0] if reference is None else headline(reference, benchmark, metric)
        if len(other):
            ax.axhline(other.value.mean(), color=INK, ls="--", lw=1.2, label=other.run.iloc[0])
        ax.set(title=title, xlabel=xlabel, ylabel=unit(benchmark, metric))
        if log:  # linear between 0 and the smallest amount, which a logarithm lacks
            ax.set_xscale("symlog", linthresh=min(x for x in xs if x > 0), linscale=0.5)
        ax.set_xticks(xs, ticks)
        ax.minorticks_off()
        ax.margins(x=0.06)
    named = {label: handle for ax in axes.flat
             for handle, label in zip(*ax.get_legend_handles_labels())}  # fmt: skip
    fig.legend(named.values(), named, loc="outside lower center", ncols=len(named))
    return fig


def diversity(
    scores: Scores,
    tasks: Mapping[str, int | tuple[str, int]],
    benchmarks: Names = ("mmbench", "mme", "pope", "heldout"),
    line: str = "",
    reference: Scores | None = None,
) -> Figure:
    """Figure 4: scores against the number of training tasks.

    tasks: {run: number of tasks}, or {run: (line, number)}. line: the name of the only line.
    """
    points = {run: t if isinstance(t, tuple) else (line or "here", t) for run, t in tasks.items()}
    panels = [(name, None, TITLES[name]) for name in benchmarks]
    return curves(scores, points, panels, "training tasks", reference=reference)


def gpt4_curves(
    scores: Scores,
    amounts: Mapping[str, tuple[str, int]],
    figure: int | None = None,
    reference: Scores | None = None,
) -> Figure:
    """Figures 5 to 8: scores against the number of GPT-4 instances in the second stage.

    amounts: {run: (start, number)}, for example {"base-100": ("Base", 100)}. figure: 5 (MME), 6
    (LLaVA-Bench), 7 (POPE and its share of yes), 8 (MMBench); None draws all of them. ValueError
    for another number. reference: scores of one run, drawn as a dashed line.
    """
    panels = {
        5: [("mme", None, "Figure 5: MME")],
        6: [("llava_bench", None, "Figure 6: LLaVA-Bench")],
        7: [("pope", "f1", "Figure 7: POPE, F1"), ("pope", "yes_ratio", "Figure 7: share of yes")],
        8: [("mmbench", None, "Figure 8: MMBench")],
    }
    if figure is None:
        every = [panel for part in panels.values() for panel in part]
        chosen = [(name, metric, t.replace("Figure ", "Fig. ")) for name, metric, t in every]
    elif figure in panels:
        chosen = panels[figure]
    else:
        raise ValueError(f"Figure {figure} has no curve of GPT-4 data; choose 5, 6, 7 or 8.")
    return curves(scores, amounts, chosen, "GPT-4 instances", log=True, reference=reference)


# ---------------------------------------------------------------------- the ledger of claims


def forest_plot(verdicts: pd.DataFrame, long: pd.DataFrame | None = None) -> Figure:
    """A line for each claim: its effect in points, the corrected interval, the verdict as colour.

    verdicts: the table of claims.verdicts; a claim with too few seeds has a hollow mark. long: the
    committed verdicts of the long form, drawn small in grey above. A tick on each line is the
    smallest effect that counts.
    """
    fig, ax = plt.subplots(figsize=(9, 0.8 + 0.36 * len(verdicts)))
    long = verdicts.iloc[:0] if long is None else long
    long, effect = long.set_index("claim"), verdicts.set_index("claim").effect
    # the same effects mean that these are the runs of the long form: nothing to compare with
    other = long.effect.reindex(effect.index)
    if len(long) and np.allclose(other, effect, atol=0.01, equal_nan=True):
        long = long.iloc[:0]
    for y, row in enumerate(verdicts.itertuples()):
        if row.claim in long.index:
            committed = long.loc[row.claim]
            ax.plot([committed.low, committed.high], [y - 0.24] * 2, color=GREY, lw=1.4)
            ax.plot(committed.effect, y - 0.24, "o", color=GREY, markersize=4)
        color = VERDICT_COLORS.get(row.verdict, GREY)
        if not np.isnan(row.low):
            ax.plot([row.low, row.high], [y, y], color=color, lw=2.6, alpha=0.6)
        face = color if row.verdict in VERDICT_COLORS else "white"
        ax.plot(row.effect, y, "o", color=face, markeredgecolor=color)
        ax.plot([row.smallest] * 2, [y - 0.32, y + 0.32], color=INK, lw=0.9)
    ax.axvline(0, color=INK, lw=0.7, alpha=0.5)
    texts = [f"{row.claim}  {row.statement}" for row in verdicts.itertuples()]
    labels = ["\n".join(textwrap.wrap(text, 62)[:2]) for text in texts]
    ax.set_yticks(range(len(verdicts)), labels, fontsize=8)
    ax.set(ylim=(len(verdicts) - 0.4, -0.6))
    ax.set_xlabel("effect, points (tick: the smallest that counts)")
    ax.grid(axis="x", color=PALE)
    present = [verdict for verdict in VERDICT_COLORS if verdict in set(verdicts.verdict)]
    handles = [_legend_mark(verdict, VERDICT_COLORS[verdict]) for verdict in present]
    if len(present) < verdicts.verdict.nunique():
        handles.append(_legend_mark("not enough runs", "white", markeredgecolor=GREY))
    if len(long):
        handles.append(_legend_mark("committed long form", GREY, ls="-", markersize=4))
    below = (-0.4, -0.08 - 0.5 / len(verdicts))
    place = dict(loc="upper left", bbox_to_anchor=below, ncols=5, frameon=False, fontsize=8)
    ax.legend(handles=handles, **place)
    return fig
