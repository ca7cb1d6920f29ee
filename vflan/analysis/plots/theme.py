"""What all figures share: colours, the style sheet, and how a figure is saved or shown again."""

from __future__ import annotations

import inspect
import io
import re
import textwrap
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import matplotlib.pyplot as plt

from vflan.analysis.claims import READ
from vflan.analysis.plots.reference import CAPTIONS
from vflan.config import output_folder, resolve
from vflan.config import shown as shown_path
from vflan.data.images import open_picture

if TYPE_CHECKING:
    from IPython.display import Code
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.text import Text

COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
GREY, PALE, INK = "#8A8A8A", "#EDEDED", "#222222"
# A model has the same colour in every figure, whatever its seed.
MODEL_COLORS = {"projector": COLORS[2], "base": COLORS[0], "chat": COLORS[1]}
OTHER_COLORS = (COLORS[3], COLORS[4], COLORS[5], "#8C564B", INK, "#7570B3")
MAJORITY = dict(color=INK, ls=":", lw=1.6)  # the one mark of the majority answer
TOKEN_COLORS = {"learned": "#F6C9A8", "only read": PALE, "picture": "#BFDDF0"}
SVG_LIMIT = 200_000  # bytes


def style() -> None:
    """Use the project's style sheet, figures/vflan.mplstyle, for all figures that follow."""
    plt.style.use(resolve("figures/vflan.mplstyle"))


def model_colors(names: Iterable[str]) -> dict[str, str]:
    """{name: colour}: the stages' own, as in every figure; other names take further colours.

    Capitals, a seed at the end and the word "stage" do not matter: "Base", "base-seed3".
    """
    names = list(dict.fromkeys(names))
    stage = {name: re.sub(r"( stage|-seed\d+)$", "", str(name).lower()) for name in names}
    others = [name for name in names if stage[name] not in MODEL_COLORS]
    rest = {name: OTHER_COLORS[i % len(OTHER_COLORS)] for i, name in enumerate(others)}
    return {name: MODEL_COLORS.get(stage[name]) or rest[name] for name in names}


def save(fig: Figure, name: str, album: str | Path = "tiny") -> Path:
    """Write runs/<album>/figures/name.png, and name.svg if that is smaller than 200 KB.

    album: the name of a preset, or its folder of runs. Returns the path of the PNG. Both files hold
    the figure's caption and no date, so the same figure gives the same bytes.
    """
    folder = output_folder(album, "figures")
    png, svg = folder / f"{name}.png", folder / f"{name}.svg"
    words = {"Description": CAPTIONS[name]} if name in CAPTIONS else {}
    fig.savefig(png, metadata={"Software": None, **words})
    fig.savefig(svg, metadata={"Date": None, **words})
    if svg.stat().st_size > SVG_LIMIT:
        svg.unlink()
    return png


def committed_figure(name: str, preset: str = "tiny_frozen") -> None:
    """Display a figure of the long form from figures/, or print that it does not exist yet."""
    path = resolve(f"figures/{preset}/{name}.png")
    if not path.exists():
        print(f"figures/{preset}/{name}.png does not exist: `make paper` draws it.")
        return
    print(f"The committed long form, figures/{preset}/{name}.png:")
    READ.append(shown_path(path))
    _display(path)


def _display(path):
    from IPython.display import Image as Display
    from IPython.display import display

    # 640 pixels are as wide as a notebook's column; more would only make the notebook larger
    with open_picture(path) as picture:
        small = picture.convert("RGB").resize((640, 640 * picture.height // picture.width))
    small.save(buffer := io.BytesIO(), "JPEG", quality=85, subsampling=0)
    display(Display(buffer.getvalue(), format="jpeg"))


def opening(path: str) -> None:
    """Display a committed picture at the top of a notebook; nothing where it does not exist.

    path: from the project folder.
    """
    from IPython.display import SVG, display

    if (file := resolve(path)).suffix == ".svg" and file.exists():
        display(SVG(filename=file))
    elif file.exists():
        _display(file)


def source(obj: object) -> Code:
    """The source of a function or class, coloured, so that a notebook quotes it, not copies it."""
    from IPython.display import Code

    return Code(inspect.getsource(obj), language="python")


def wrap(text: str, width: int, lines: int | None = None) -> str:
    """`text` in lines of at most `width` characters, without blank ones.

    lines: the most lines; text beyond them is cut and marked by an ellipsis.
    """
    pieces = [piece for line in str(text).splitlines() for piece in textwrap.wrap(line, width)]
    if lines and len(pieces) > lines:
        pieces = [*pieces[: lines - 1], pieces[lines - 1][: width - 1].rstrip() + "\u2026"]
    return "\n".join(pieces)


def write(ax: Axes, x: float, y: float, text: str, **options) -> Text:
    """Write text at (x, y) of the axes, from 0 to 1, without reading `$` as a formula."""
    defaults = {"va": "top", "parse_math": False, "transform": ax.transAxes}
    return ax.text(x, y, text, **defaults | options)
