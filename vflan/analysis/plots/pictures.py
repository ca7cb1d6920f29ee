"""Pictures of data: samples, answers of several runs, tokens, packed rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import matplotlib.pyplot as plt
import numpy as np

from vflan.analysis.plots.theme import (
    COLORS,
    GREY,
    INK,
    PALE,
    TOKEN_COLORS,
    model_colors,
    wrap,
    write,
)
from vflan.data.images import read_picture

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Inches from a line of small text to the next.
LINE = 0.14


def turns(sample: Mapping) -> tuple[str, str, str]:
    """(task, question, answer) of a LLaVA sample's first exchange, or of a benchmark question.

    What a bad row, or a question of a test set, lacks is "".
    """
    if "conversations" in sample:
        texts = [t.get("value") or "" for t in sample["conversations"] or ()]
        texts = [text.replace("<image>", "").strip() for text in texts] + ["", ""]
        return sample.get("task_name") or "", texts[0], texts[1]
    return sample.get("category") or "", sample["text"], sample.get("label") or ""


def question(sample: Mapping) -> dict:
    """The first exchange of a LLaVA sample in the shape of a benchmark question."""
    task, text, label = turns(sample)
    return {"image": sample.get("image"), "text": text, "label": label, "category": task}


def show(ax: Axes, path: str | None) -> None:
    """Draw a picture without axes, or a grey field with the reason where there is none."""
    ax.set_axis_off()
    try:
        image, reason = read_picture(path) if path else None, "text only"
    except OSError as error:
        image, reason = None, str(error).split(":")[0]  # the kind of error: "missing picture"
    if image is None:
        ax.add_patch(plt.Rectangle((0, 0), 1, 1, color=PALE, transform=ax.transAxes))
        write(ax, 0.5, 0.5, reason, ha="center", va="center", color=GREY)
        return
    # smoothing would blur the few pixels of a small picture
    ax.imshow(image, interpolation="nearest" if max(image.size) < 200 else "antialiased")
    ax.set_anchor("N")


def gallery(samples: Sequence[Mapping], n: int = 8, columns: int = 4) -> Figure:
    """A grid of the first `n` samples: picture, task, instruction and answer.

    samples: LLaVA rows or benchmark questions, with a path under `image`. ValueError: none.
    """
    if not len(samples):
        raise ValueError("There are no samples to draw.")
    rows = [samples[i] for i in range(min(n, len(samples)))]
    columns = min(columns, len(rows))
    characters, inches = (33, 2.3) if columns >= 4 else (44, 3)
    exchanges = [_wrapped(sample, characters) for sample in rows]
    # In inches: a picture, and below it as many lines as the longest text beside it has.
    heights = []
    for i in range(0, len(rows), columns):
        most = max(text.count("\n") for _, text, _ in exchanges[i : i + columns])
        more = max(reply.count("\n") for _, _, reply in exchanges[i : i + columns])
        heights += [1.8, LINE * (most + more + 4.5)]
    fig = plt.figure(figsize=(inches * columns, sum(heights)), layout="none")
    cells = fig.add_gridspec(len(heights), columns, height_ratios=heights)
    cells.update(hspace=0.03, wspace=0.12, left=0.01, right=0.99, top=0.995, bottom=0.005)
    for i, (sample, texts) in enumerate(zip(rows, exchanges)):
        line, column = divmod(i, columns)
        show(fig.add_subplot(cells[2 * line, column]), sample.get("image"))
        _write_exchange(fig.add_subplot(cells[2 * line + 1, column]), *texts, heights[2 * line + 1])
    return fig


def _wrapped(sample, characters):
    """(task, instruction, answer) in lines of about `characters` letters."""
    task, instruction, reply = turns(sample)
    # Bold letters are wider, so their lines are shorter.
    task, reply = wrap(task.replace("_", " "), characters - 4, 1), wrap(reply, characters - 3, 4)
    return task, wrap(instruction, characters, 6), reply


def _write_exchange(ax, task, instruction, reply, height):
    """Write the task, the instruction and the answer below each other; height: of `ax`, inches."""
    ax.set_axis_off()
    line = LINE / height
    write(ax, 0, 1 - 0.3 * line, task, fontsize=7.5, color=GREY, weight="bold")
    write(ax, 0, 1 - 1.6 * line, instruction, fontsize=7.5)
    below = 1 - line * (1.9 + instruction.count("\n") + 1)
    write(ax, 0, below, reply, fontsize=7.5, color=COLORS[0], weight="bold")


def before_after(
    questions: Sequence[Mapping], answers: Mapping[str, Sequence[str]], n: int = 6
) -> Figure:
    """The answers of several runs to the first `n` questions, side by side.

    questions: benchmark samples (image, text, label). answers: {run: its answers}. An answer that
    equals the label is bold.
    """
    questions = [questions[i] for i in range(min(n, len(questions)))]
    width = max(18, 84 // (len(answers) + 1))
    cells = []
    for i, asked in enumerate(questions):
        label = f"\n[{asked['label']}]" if asked.get("label") else ""
        texts = [turns(asked)[1] + label, *(a[i] or "(nothing)" for a in answers.values())]
        cells.append([wrap(text, width, 14) for text in texts])
    heights = [max(5, *(text.count("\n") + 1 for text in row)) for row in cells]
    fig = plt.figure(figsize=(9, 0.35 + 0.155 * (sum(heights) + len(heights))), layout="none")
    grid = fig.add_gridspec(len(cells), 1, height_ratios=heights)
    top = 1 - 0.3 / fig.get_figheight()
    grid.update(left=0.01, right=0.99, top=top, bottom=0.01, hspace=0.16)
    columns = [0.115 + 0.885 * k / (len(answers) + 1) for k in range(len(answers) + 1)]
    heading, colors = dict(weight="bold", va="top", parse_math=False), model_colors(answers)
    # A bold letter at 9 points takes about 0.088 inches.
    fitting = 9 * 0.885 / (len(answers) + 1) / 0.088
    for x, name in zip(columns, ["question", *answers]):
        size = 9 * min(1, fitting / len(name))
        fig.text(0.01 + 0.98 * x, 0.995, name, fontsize=size, **heading)
    for i, (asked, row) in enumerate(zip(questions, cells)):
        ax = fig.add_subplot(grid[i])
        ax.set_axis_off()
        ax.plot([0, 1], [1.06, 1.06], color=PALE, transform=ax.transAxes, clip_on=False)
        show(ax.inset_axes([0, 0.02, 0.1, 0.96]), asked.get("image"))
        write(ax, columns[0], 0.97, row[0], fontsize=8, color=INK)
        for x, text, (name, reply) in zip(columns[1:], row[1:], answers.items()):
            right = _plain(reply[i]) == _plain(asked.get("label", "")) != ""
            weight = "bold" if right else None
            write(ax, x, 0.97, text, fontsize=8, color=colors[name], weight=weight)
    return fig


def attention_mask(lengths: Sequence[int], names: Sequence[str] = ()) -> Figure:
    """Who attends to whom in a packed row: a token (line) to the tokens (columns) in orange.

    Each conversation attends to its own earlier tokens only. lengths: of the conversations, in
    tokens. names: what the conversations are called on the axis.
    """
    owner = np.repeat(np.arange(len(lengths)), lengths)
    position = np.arange(len(owner))
    mask = (owner[:, None] == owner) & (position[:, None] >= position)
    fig, ax = plt.subplots(figsize=(4.2, 4.2))
    ax.imshow(mask, cmap=plt.matplotlib.colors.ListedColormap([PALE, COLORS[1]]), vmin=0, vmax=1)
    ends = np.cumsum(lengths)
    for end in ends[:-1]:
        ax.axhline(end - 0.5, color="white", lw=1.5)
        ax.axvline(end - 0.5, color="white", lw=1.5)
    names = names or [f"conversation {i + 1}" for i in range(len(lengths))]
    ax.set_xticks(ends - np.asarray(lengths) / 2 - 0.5, names)
    ax.set_yticks(ends - np.asarray(lengths) / 2 - 0.5, names, rotation=90, va="center")
    ax.set(xlabel="attends to", ylabel="token of", title="The mask of a packed row")
    ax.grid(False)
    return fig


def attention_figure(
    image: str, maps: Mapping[str, Sequence[np.ndarray]], count: int = 5
) -> Figure:
    """Where a model looks, a line for each question and a column for each of `count` layers.

    image: the picture's path. maps: {question: (side, side) shares of attention for each layer}.
    All maps have one scale of colour; the number above a map is the share of the layer's attention
    that goes to the picture at all.
    """
    depth = len(next(iter(maps.values())))
    picks = np.unique(np.linspace(0, depth - 1, min(count, depth)).round().astype(int))
    size = (9, 1.6 * len(maps) + 0.3)
    fig, axes = plt.subplots(len(maps), len(picks) + 1, figsize=size, squeeze=False)
    most = 100 * max(float(np.max(layer)) for layers in maps.values() for layer in layers)
    for row, (text, layers) in zip(axes, maps.items()):
        show(row[0], image)
        row[0].set_title(wrap(text, 18, 2), fontsize=8.5)
        for ax, k in zip(row[1:], picks):
            drawn = ax.imshow(100 * np.asarray(layers[k]), cmap="Blues", vmin=0, vmax=most)
            ax.set_title(f"layer {k + 1}: {np.sum(layers[k]):.0%}", fontsize=8.5)
            ax.set_axis_off()
    fig.colorbar(drawn, ax=axes, label="share of a layer's attention, %", shrink=0.6)
    return fig


def _plain(text):
    """A short answer without what does not count: case, spaces and full stops at the ends."""
    return str(text or "").strip(" .").lower()


def tokens(
    ids: Sequence[int],
    labels: Sequence[int],
    tokenizer,
    width: int = 114,
    image_token: int = -200,
) -> Figure:
    """A conversation token by token: orange is learned, grey is only read, blue is the picture.

    ids, labels: two equally long lists, as vflan.encode returns them. image_token: the id that
    stands for the picture. width: characters in a line.
    """
    if len(ids) != len(labels):
        raise ValueError(f"ids and labels must be equally long, not {len(ids)} and {len(labels)}.")
    boxes, x, line = [], 0, 0
    for token, label in zip(ids, labels):
        text, kind = _token_text(token, label, tokenizer, image_token)
        if x and x + len(text) + 1 > width:
            x, line = 0, line + 1
        boxes.append((x, line, text, TOKEN_COLORS[kind]))
        x += len(text) + 1.2
    legend = zip((0, 9, 20), TOKEN_COLORS.items())
    boxes += [(x, line + 1.5, text, color) for x, (text, color) in legend]
    fig, ax = plt.subplots(figsize=(9, 0.3 * (line + 2.6)), layout="none")
    fig.subplots_adjust(0.01, 0.01, 0.99, 0.99)
    ax.set(xlim=(-0.5, width + 1), ylim=(line + 2.1, -0.6))
    ax.set_axis_off()
    for x, y, text, color in boxes:
        ax.add_patch(plt.Rectangle((x - 0.4, y - 0.4), len(text) + 0.8, 0.8, color=color, lw=0))
        ax.text(x, y, text, family="DejaVu Sans Mono", fontsize=8.6, va="center", parse_math=False)
    return fig


def _token_text(token, label, tokenizer, image_token):
    """(text, kind) of a token, with signs for white space and a long text cut in its middle."""
    if token == image_token:
        return "picture", "picture"
    text = tokenizer.decode([token]) if token >= 0 else str(token)
    text = text.replace("\n", "\u21b5").replace("\t", "\u21e5").strip(" ") or "\u00b7"
    # a tokenizer may have a whole opening sentence as one token
    text = text if len(text) <= 40 else f"{text[:24]} \u2026 {text[-12:]}"
    return text, "learned" if label >= 0 else "only read"


def packed_rows(rows: Sequence[Sequence[tuple]], budget: int, image_token: int = -200) -> Figure:
    """Packed rows as the model reads them: conversations side by side, then padding.

    rows: for each row a list of (ids, labels), where a picture takes as many positions as it has
    features. budget: positions in a row. Orange is learned, blue is a picture, grey is only read; a
    white line ends a conversation, and hatching is padding.
    """
    kinds = {"only read": PALE, "picture": TOKEN_COLORS["picture"], "learned": COLORS[1]}
    colors = list(kinds.values())
    fig, ax = plt.subplots(figsize=(9, 0.32 * len(rows) + 1.1))
    for y, conversations in enumerate(rows):
        x, span = 0, (y - 0.4, 0.8)
        for ids, labels in conversations:
            is_picture = np.asarray(ids) == image_token
            kind = np.where(np.asarray(labels) >= 0, 2, np.where(is_picture, 1, 0))
            cuts = [0, *(np.flatnonzero(np.diff(kind)) + 1), len(kind)]
            for a, b in zip(cuts, cuts[1:]):
                ax.broken_barh([(x + a, b - a)], span, color=colors[kind[a]], lw=0)
            x += len(kind)
            ax.vlines(x, y - 0.45, y + 0.45, color="white", lw=1.5)
        if x < budget:
            hatched = dict(facecolor="none", edgecolor=GREY, lw=0.5, hatch="////")
            ax.broken_barh([(x, budget - x)], span, **hatched)
    ax.set(xlim=(0, budget), ylim=(len(rows) - 0.5, -0.5), yticks=[])
    ax.set_xlabel("position in the row (hatched: padding)")
    ax.grid(False)
    marks = [plt.Rectangle((0, 0), 1, 1, color=c, label=kind) for kind, c in kinds.items()]
    ax.legend(handles=marks, ncols=3, loc="lower right", bbox_to_anchor=(1, 1), frameon=False)
    return fig
