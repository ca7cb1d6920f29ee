"""What the widgets are made of: tables of samples, HTML from macros, pictures and controls."""

from __future__ import annotations

import base64
import io
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

import ipywidgets as w
import numpy as np
import pandas as pd
from jinja2 import Environment, FileSystemLoader
from markupsafe import Markup, escape
from PIL import Image

from vflan.config import shown
from vflan.data.images import eight_bits, read_picture

if TYPE_CHECKING:
    from vflan.training.run import Run

_FOLDER = FileSystemLoader(Path(__file__).parents[1] / "templates")
templates = Environment(loader=_FOLDER, autoescape=True, trim_blocks=True, lstrip_blocks=True)
# the macros of widgets.html as functions that return HTML; they escape text
macros = templates.get_template("widgets.html").module

LABEL_STYLE = {"description_width": "initial"}  # as wide as its words


def as_frame(rows) -> pd.DataFrame:
    """Rows as a new DataFrame: of a `datasets.Dataset`, a list of dicts or another DataFrame."""
    if hasattr(rows, "to_pandas"):
        return rows.to_pandas()
    return pd.DataFrame(rows).reset_index(drop=True)


def by_name(runs) -> dict[str, Run]:
    """{name: run}; runs of one name, from several folders, have the path of theirs."""
    counts = Counter(run.name for run in runs)
    return {run.name if counts[run.name] == 1 else shown(run.folder): run for run in runs}


def picture(image, side: int = 96) -> Markup:
    """An <img> of a path or PIL picture, `side` pixels wide; a few words where there is no picture.

    A text-only row has none (None, NaN or ""), and a file may be lost or damaged.
    """
    if not isinstance(image, (str, Path, Image.Image)) or not str(image):
        return Markup("(no picture)")
    name = "picture" if isinstance(image, Image.Image) else Path(image).name
    try:
        image = eight_bits(image).copy() if isinstance(image, Image.Image) else read_picture(image)
    except (OSError, ValueError):
        return escape(f"(cannot open {name})")
    is_small = max(image.size) < side
    image.thumbnail((side, side))  # a smaller picture stays as it is
    image.save(buffer := io.BytesIO(), "PNG")
    return macros.image(base64.b64encode(buffer.getvalue()).decode(), side, name, is_small)


def turns_of(conversations) -> list[tuple[str, str]]:
    """(speaker, text) of each turn of a LLaVA sample, without the placeholder of the picture."""
    return [
        (str(turn["from"]), str(turn["value"]).replace("<image>", "").strip())
        for turn in conversations
    ]


def first_line(error: Exception) -> str:
    """The first line of an error's message, or its type where it has none."""
    return next(iter(str(error).strip().splitlines()), "") or type(error).__name__


# ------------------------------------------------------------------------------------ controls


def dropdown(options, name: str, width: str = "16em") -> w.Dropdown:
    """A choice of one of `options`, with its name before it."""
    layout = w.Layout(width=width)
    return w.Dropdown(options=options, description=name, layout=layout, style=LABEL_STYLE)


def set_options(choice: w.Dropdown, values) -> None:
    """Offer "all" and the sorted `values`; a choice that is no longer offered becomes "all"."""
    options = ["all", *sorted(values)]
    value = choice.value if choice.value in options else "all"
    choice.options, choice.value = options, value


def matches(column: pd.Series, choice: w.Dropdown) -> np.ndarray:
    """Which rows of a column (rows,) have the chosen value; with "all", each of them."""
    return ((column.astype(str) == choice.value) | (choice.value == "all")).to_numpy()


def pager(name: str) -> tuple[w.BoundedIntText, list[w.Widget]]:
    """(a whole number from 1 to `max`, which is 1 at first; buttons that change it, and itself).

    After the last comes the first.
    """
    layout = w.Layout(width="9em")
    number = w.BoundedIntText(1, min=1, max=1, description=name, layout=layout, style=LABEL_STYLE)
    back = button("◀ back", tooltip=f"previous {name}")
    forward = button("next ▶", tooltip=f"next {name}")
    back.on_click(lambda _: number.set_trait("value", max(1, number.value - 1)))
    forward.on_click(lambda _: number.set_trait("value", number.value % number.max + 1))
    return number, [back, forward, number]


def button(text: str, **options) -> w.Button:
    """A button as wide as its text."""
    return w.Button(description=text, layout=w.Layout(width="auto"), **options)


def in_a_row(*controls) -> w.HBox:
    """Controls side by side; they wrap where there is no room."""
    return w.HBox(controls, layout=w.Layout(flex_flow="row wrap", grid_gap="2px 14px"))
