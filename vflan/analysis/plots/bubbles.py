"""Figure 2 of the paper: its tasks as bubbles."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from typing import TYPE_CHECKING, NamedTuple

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd

from vflan.analysis.plots.reference import NO_GROUP
from vflan.analysis.plots.theme import COLORS, GREY

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class _Cluster(NamedTuple):
    """The bubbles of one group of tasks; centres count from the lower left corner."""

    counts: pd.Series  # tasks of each category
    radii: np.ndarray  # (n,)
    centres: np.ndarray  # (n, 2)
    extent: np.ndarray  # (2,): width and height


def pack_circles(radii: np.ndarray) -> np.ndarray:
    """(n, 2) centres of n circles that do not overlap.

    Each is put as near to the origin as the circles before it allow.
    """
    centres = np.zeros((len(radii), 2))
    angles = np.linspace(0, 2 * np.pi, 72, endpoint=False)
    ring = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    for i, r in enumerate(radii[1:], 1):
        # candidates: all places where circle i touches one that is placed already
        touching = (centres[:i, None] + (radii[:i, None, None] + r) * ring).reshape(-1, 2)
        gaps = np.linalg.norm(touching[:, None] - centres[:i], axis=-1) - radii[:i] - r
        free = touching[(gaps > -1e-9).all(axis=1)]
        centres[i] = free[np.linalg.norm(free, axis=1).argmin()]
    return centres


def _cluster(tasks):
    counts = tasks.category.value_counts()
    margin = 0.06
    radii = np.sqrt(counts.to_numpy() / np.pi) + margin
    centres = pack_circles(radii)
    low, high = (centres - radii[:, None]).min(axis=0), (centres + radii[:, None]).max(axis=0)
    return _Cluster(counts, radii - margin, centres - low, high - low)


def task_bubbles(collections: pd.DataFrame | Mapping[str, pd.DataFrame]) -> Figure:
    """Figure 2: a bubble for each category, its area the number of tasks, its colour the group.

    collections: {title: a row for each task, with columns group and category}, drawn in one row
    each; or a single such table. A task of another group, or of none, counts as NO_GROUP, in grey.
    """
    if not isinstance(collections, Mapping):
        collections = {"": collections}
    colors = dict(zip(("question answering", "classification", "generation"), COLORS))
    colors[NO_GROUP] = GREY
    gap, heading = 0.7, 1.1  # between groups, above them; in the unit of the radii
    rows = []
    for title, tasks in collections.items():
        tasks = tasks.assign(group=tasks.group.where(tasks.group.isin(colors), NO_GROUP))
        clusters = {group: _cluster(tasks[tasks.group == group])
                    for group in colors if (tasks.group == group).any()}  # fmt: skip
        categories = sum(len(c.counts) for group, c in clusters.items() if group != NO_GROUP)
        comma, others = f"{title}, " if title else "", int((tasks.group == NO_GROUP).sum())
        rest = f", {others} of no group" if others else ""
        rows.append((f"{comma}{len(tasks)} tasks in {categories} categories{rest}", clusters))
    widths = [sum(c.extent[0] + gap for c in clusters.values()) - gap for _, clusters in rows]
    inches = 8.9 / max(widths)  # of one unit
    notes = [{group: _unnamed(cluster, inches) for group, cluster in clusters.items()}
             for _, clusters in rows]  # fmt: skip
    # below the bubbles: 0.13 inches for each line of the longest note
    feet = [max(len(lines) for lines in of.values()) * 0.13 / inches for of in notes]
    heights = [max(c.extent[1] for c in clusters.values()) + heading + foot
               for (_, clusters), foot in zip(rows, feet)]  # fmt: skip
    size = (9, sum(heights) * inches + 0.35 * len(rows))
    fig, axes = plt.subplots(len(rows), 1, figsize=size, squeeze=False, height_ratios=heights)
    parts = zip(axes.flat, rows, widths, heights, feet, notes)
    for ax, (title, clusters), width, height, foot, of in parts:
        x = (max(widths) - width) / 2
        for group, cluster in clusters.items():
            corner = np.array([x, foot + (height - heading - foot - cluster.extent[1]) / 2])
            _draw_cluster(ax, cluster, corner, colors[group], inches)
            centre = x + cluster.extent[0] / 2
            ax.text(centre, 0, "\n".join(of[group]), ha="center", va="bottom", fontsize=7)
            ax.text(centre, height - 0.75, group, ha="center", color=colors[group], weight="bold")
            x += cluster.extent[0] + gap
        ax.set(xlim=(0, max(widths)), ylim=(0, height), aspect="equal")
        ax.set_title(title)
        ax.set_axis_off()
    return fig


def _label(name, count, radius, inches):
    """(text, size) of the words in a bubble; a name that would be too small to read is left out."""
    lines = textwrap.wrap(name, max(9, len(name) // 2), break_long_words=False)
    longest = max(len(line) for line in [*lines, str(count)])
    size = min(9.5, 1.8 * radius * inches * 72 / (0.62 * longest))
    return ("\n".join([*lines, str(count)]), size) if size >= 4.2 else (str(count), 6)


def _unnamed(cluster, inches):
    """Lines with the names that did not fit into their bubbles."""
    bubbles = zip(cluster.counts.items(), cluster.radii)
    names = [name for (name, count), radius in bubbles
             if _label(name, count, radius, inches)[0] == str(count)]  # fmt: skip
    width = max(24, int(cluster.extent[0] * inches * 72 / (7 * 0.55)))
    return textwrap.wrap(f"small: {', '.join(names)}", width) if names else []


def _draw_cluster(ax, cluster, corner, color, inches):
    """Draw the bubbles of a group."""
    inside = dict(ha="center", va="center", color="white", linespacing=0.95, parse_math=False)
    circles = zip(cluster.counts.items(), cluster.radii, cluster.centres + corner)
    for (name, count), radius, centre in circles:
        text, size = _label(name, count, radius, inches)
        ax.add_patch(plt.Circle(centre, radius, color=color, alpha=0.85, lw=0))
        ax.text(*centre, text, fontsize=size, **inside)
