"""Draws docs/architecture.svg: the path from a picture to an answer, and what each stage trains.

    python docs/architecture_figure.py

The figure is plain text, so every machine writes the same bytes. Its background is opaque, so
that it can be read on a light page and on a dark one. Which parts a stage trains is read from the
preset `full_13b`.
"""

from __future__ import annotations

from html import escape
from pathlib import Path

from vflan.config import preset

TARGET = Path(__file__).with_name("architecture.svg")
WIDTH, HEIGHT = 880, 424
INK, FAINT, PAPER, LINE = "#1f2328", "#59636e", "#ffffff", "#8c959f"
TRAINED, FROZEN = "#1a7f37", "#eaeef2"
# CLIP ViT-L/14-336 cuts a picture of 336 x 336 pixels into patches of 14 x 14.
PIXELS, PATCH, VISION_WIDTH, TEXT_WIDTH = 336, 14, 1024, 5120
GRID = PIXELS // PATCH
PATCHES = GRID * GRID
# Columns of the drawing: left edge and width of each box.
PICTURE, TOWER, PROJECTOR, LANGUAGE_MODEL, ANSWER = (
    (20, 120),
    (196, 140),
    (422, 112),
    (620, 144),
    (784, 88),
)
PARTS = {"vision_tower": TOWER, "projector": PROJECTOR, "language_model": LANGUAGE_MODEL}
ROW = 86  # middle of the upper row
STAGES = {
    "projector": ("1  Projector", "image captions"),
    "base": ("2  Vision-Flan Base", "human-labelled tasks"),
    "chat": ("3  Vision-Flan Chat", "1,000 GPT-4 conversations"),
}


def text(x: float, y: float, words: str, size: int = 13, **style: str) -> str:
    """One line of text; `style` holds SVG attributes with _ for -."""
    style = {"fill": INK, **style}
    attributes = " ".join(f'{name.replace("_", "-")}="{value}"' for name, value in style.items())
    return f'<text x="{x}" y="{y}" font-size="{size}" {attributes}>{escape(words)}</text>'


def rectangle(x: float, y: float, width: float, height: float, fill: str, **style: str) -> str:
    """A box with round corners."""
    attributes = " ".join(f'{name.replace("_", "-")}="{value}"' for name, value in style.items())
    return (
        f'<rect x="{x}" y="{y}" width="{width}" height="{height}" rx="6" fill="{fill}" '
        f"{attributes}/>"
    )


def middle(box: tuple[int, int]) -> float:
    """The x of the middle of a column."""
    return box[0] + box[1] / 2


def arrow(path: str) -> str:
    """A line with a head at its end."""
    return (
        f'<path d="{path}" fill="none" stroke="{INK}" stroke-width="1.5" marker-end="url(#head)"/>'
    )


def picture(x: float, y: float, side: float) -> list[str]:
    """A landscape under the grid of patches that the vision tower sees."""
    step = side / GRID
    lines = "".join(
        f"M{x + i * step:g} {y}v{side}M{x} {y + i * step:g}h{side}" for i in range(GRID + 1)
    )
    hill = f"M{x} {y + 90}q30 -40 60 -10t60 -20v60h-120z"
    return [
        f'<rect x="{x}" y="{y}" width="{side}" height="{side}" fill="#b6dcfe"/>',
        f'<circle cx="{x + 88}" cy="{y + 28}" r="14" fill="#f2c94c"/>',
        f'<path d="{hill}" fill="#5aa469"/>',
        f'<path d="{lines}" stroke="{PAPER}" stroke-width="0.5" fill="none"/>',
    ]


def network() -> list[str]:
    """The upper row: picture, vision tower, projector, language model, answer."""
    centred = dict(text_anchor="middle")
    parts = picture(PICTURE[0], ROW - 60, PICTURE[1])
    parts.append(text(middle(PICTURE), ROW + 78, f"{PIXELS} × {PIXELS} × 3", fill=FAINT, **centred))
    labels = {
        TOWER: ("Vision tower", "CLIP ViT-L/14-336", f"{GRID} × {GRID} patches"),
        PROJECTOR: ("Projector", "MLP, 2 layers", "GELU between"),
        LANGUAGE_MODEL: ("Language model", "Vicuna-13B v1.5", "next token"),
    }
    for (x, width), (name, what, detail) in labels.items():
        parts.append(rectangle(x, ROW - 40, width, 80, PAPER, stroke=INK, stroke_width="1.5"))
        for shift, words, style in (
            (-14, name, dict(font_weight="bold")),
            (6, what, {}),
            (25, detail, dict(fill=FAINT)),
        ):
            size = 14 if shift == -14 else 12
            parts.append(text(x + width / 2, ROW + shift, words, size, **style, **centred))
    # Arrows carry the shape of what passes along them.
    stops = [PICTURE, TOWER, PROJECTOR, LANGUAGE_MODEL, ANSWER]
    shapes = ["", f"{PATCHES} × {VISION_WIDTH}", f"{PATCHES} × {TEXT_WIDTH}", ""]
    for before, after, shape in zip(stops, stops[1:], shapes):
        start, end = sum(before) + 2, after[0] - 3
        if after is ANSWER:
            end = after[0] + 8
        parts.append(arrow(f"M{start} {ROW}H{end}"))
        parts.append(text((start + end) / 2, ROW - 8, shape, 12, fill=FAINT, **centred))
    for line, words in enumerate(["“A hill", "under", "the sun.”"]):
        y = ROW - 12 + 17 * line
        parts.append(text(ANSWER[0] + 14, y, words, 13, font_style="italic"))
    return parts


def question() -> list[str]:
    """The question's path: its tokens join those of the picture in front of the language model."""
    x, width, y = 330, 196, ROW + 62
    corner = middle(LANGUAGE_MODEL)
    return [
        rectangle(x, y, width, 32, PAPER, stroke=LINE),
        text(x + width / 2, y + 21, "question: What do you see?", 13, text_anchor="middle"),
        arrow(f"M{x + width + 2} {y + 16}H{corner}V{ROW + 43}"),
        text(
            x + width + 60, y + 10, f"tokens × {TEXT_WIDTH}", 12, fill=FAINT, text_anchor="middle"
        ),
    ]


def stages() -> list[str]:
    """The lower rows: for each stage, which parts are trained and which are frozen."""
    parts = [text(20, 222, "What is trained", 14, font_weight="bold")]
    for row, recipe in enumerate(preset("full_13b")):
        y, (name, data) = 240 + 52 * row, STAGES[recipe.stage]
        parts.append(f'<path d="M20 {y - 6}H{WIDTH - 20}" stroke="{FROZEN}" stroke-width="1.5"/>')
        parts.append(text(20, y + 15, name, 13, font_weight="bold"))
        parts.append(text(20, y + 33, data, 12, fill=FAINT))
        for part, (x, width) in PARTS.items():
            trained = part in recipe.tune
            parts.append(rectangle(x, y + 4, width, 30, TRAINED if trained else FROZEN))
            words, ink = ("trained", PAPER) if trained else ("frozen", FAINT)
            style = dict(fill=ink, text_anchor="middle", font_weight="bold")
            parts.append(text(x + width / 2, y + 24, words, 13, **style))
    return parts


def figure() -> str:
    """The whole drawing as SVG text."""
    note = (
        "Shapes of the 13B preset; at 7B the language model is 4096 wide. "
        "LoRA presets train adapters in it."
    )
    alternative = (
        "A picture passes a frozen CLIP vision tower, a projector and a language model, "
        "which also reads the question and writes the answer. Stage 1 trains the projector, "
        "stages 2 and 3 the projector and the language model."
    )
    head = (
        f'<marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" '
        f'orient="auto"><path d="M0 0L8 4L0 8z" fill="{INK}"/></marker>'
    )
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        f'width="{WIDTH}" height="{HEIGHT}" font-family="Helvetica, Arial, sans-serif">',
        f"<title>From a picture to an answer</title><desc>{escape(alternative)}</desc>",
        f"<defs>{head}</defs>",
        rectangle(0, 0, WIDTH, HEIGHT, PAPER),
        *network(),
        *question(),
        *stages(),
        text(20, HEIGHT - 16, note, 12, fill=FAINT),
        "</svg>",
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    TARGET.write_text(figure(), encoding="utf-8", newline="\n")
