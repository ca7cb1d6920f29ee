"""Tokens by their role: a conversation token by token, and the packed rows of a training step."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby

from markupsafe import Markup

from vflan.analysis.plots import TOKEN_COLORS
from vflan.tools.widgets import elements


def runs_of_kinds(ids, labels, image_token: int) -> Iterator[tuple[str, list[int]]]:
    """(kind, token ids) of each stretch: "learned", "only read" or "picture"."""

    def kind(pair):
        token, label = pair
        if label >= 0:
            return "learned"
        return "picture" if token == image_token else "only read"

    for name, pairs in groupby(zip(ids, labels), kind):
        yield name, [token for token, _ in pairs]


def token_line(ids, labels, tokenizer, image_token: int = -200) -> Markup:
    """A conversation token by token as HTML, in the colours of plots.tokens.

    ids, labels: two equally long lists, as vflan.encode returns them. A picture is one box,
    however many placeholders it has.
    """
    boxes = []
    for kind, tokens in runs_of_kinds(ids, labels, image_token):
        is_picture = kind == "picture"
        texts = ["picture"] if is_picture else [tokenizer.decode([token]) for token in tokens]
        for text in texts:
            boxes.append((kind, text.replace("\n", "↵").replace("\t", "⇥").strip(" ") or "·"))
    return elements.macros.tokens(boxes, TOKEN_COLORS)


def packed_bars(rows, chosen: int, image_token: int) -> Markup:
    """Packed rows as bars of HTML: conversation number `chosen` is outlined, the others are pale.

    rows: for each packed row a list of (number, ids, labels). plots.packed_rows draws the same as
    a figure; that takes seconds for a large batch, and these bars are drawn at every click.
    """
    bars = []
    for row in rows:
        bars.append([])
        for number, ids, labels in row:
            runs = runs_of_kinds(ids, labels, image_token)
            bars[-1].append((number, len(ids), [(kind, len(tokens)) for kind, tokens in runs]))
    widest = max(sum(length for _, length, _ in row) for row in bars)
    return elements.macros.packed_bars(bars, widest, chosen, TOKEN_COLORS)
