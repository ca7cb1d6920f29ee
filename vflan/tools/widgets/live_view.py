"""The loss of runs while they train, with what they answer at chosen steps."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from threading import Event, Thread
from typing import TYPE_CHECKING

import ipywidgets as w
from IPython.display import display

from vflan import progress
from vflan.analysis.plots import model_colors
from vflan.tools.widgets import elements
from vflan.training.run import Run

if TYPE_CHECKING:
    from vflan.config import Recipe

SECONDS = 3.0  # between two looks at the files
WIDTH, HEIGHT, POINTS = 640, 180, 320  # of the plot in pixels; the most points of a line


@contextmanager
def live_loss(recipes: Sequence[Recipe], seconds: float = SECONDS) -> Iterator[None]:
    """Show the loss of the recipes' runs, while the block trains them, in this process or others.

    The plot reads the files of the run folders every few `seconds`. A recipe with `evaluate_every`
    also shows its last answers to held-out rows. Where nobody watches, as under papermill, nothing
    is shown.
    """
    if not progress.is_watched():
        yield
        return
    view, over = w.HTML(), Event()
    runs = [Run(recipe.folder) for recipe in recipes]

    def look():
        with suppress(OSError, ValueError):  # a line that is half written: the next look reads it
            view.value = loss_page(runs)

    def follow():
        while not over.wait(seconds):
            look()

    display(view)
    thread = Thread(target=follow, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
        look()


def loss_page(runs: Sequence[Run]) -> str:
    """HTML of the runs' losses so far, and of the newest answers to held-out rows."""
    tables = {name: run.metrics() for name, run in elements.by_name(runs).items()}
    tables = {name: table[["step", "loss"]] for name, table in tables.items() if len(table)}
    if not tables:
        return elements.macros.page_text("waiting for the first step")
    last = max(table.step.iloc[-1] for table in tables.values())
    top = max(table.loss.quantile(0.99) for table in tables.values()) or 1.0
    lines, colors = [], model_colors(tables)
    for name, table in tables.items():
        mean = table.loss.rolling(max(1, len(table) // 30), min_periods=1).mean()
        every = -(-len(table) // POINTS)  # a plot needs no more points than pixels
        points = " ".join(
            f"{WIDTH * step / last:.1f},{HEIGHT * (1 - min(1.0, loss / top)):.1f}"
            for step, loss in zip(table.step[::every], mean[::every])
        )
        label = f"{name}: step {table.step.iloc[-1]:,}, loss {mean.iloc[-1]:.2f}"
        lines.append((points, colors[name], label))
    answers = [run.sample_answers() for run in runs]
    newest = [rows[rows.step == rows.step.iloc[-1]].head(3) for rows in answers if len(rows)]
    said = [(row.step, row.question, row.reference, row.answer)
            for rows in newest for row in rows.itertuples()]  # fmt: skip
    axis = f"{top:.2f}", f"step {last:,}"
    return elements.macros.live_loss(WIDTH, HEIGHT, axis, lines, said)
