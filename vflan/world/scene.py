"""A scene: the truth from which pictures, captions, tasks, chats and benchmarks are made.

Pictures have 48 x 48 pixels on a 4 x 4 grid of 12-pixel cells, so that a CLIP tower with 12-pixel
patches sees one cell in each patch. Four kinds of scene represent the paper's sources: `objects`
(photographs), `text` (scene text), `number` (house numbers) and `chart` (plots). Objects follow a
prior, as in photographs: some shapes are frequent, and each has a favourite colour and a partner
that it often appears with. Language priors, POPE's `popular` and `adversarial` negatives and the
invented objects of the GPT-4-style set all come from this prior.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from numpy.random import Generator
from numpy.typing import ArrayLike
from PIL import Image, ImageDraw, ImageFilter

GRID, CELL = 4, 12
# Reading order: a1 is top left.
PLACES = tuple(f"{row}{column}" for row in "abcd" for column in "1234")
SIZES = ("small", "large")
TEXTURES = ("plain", "striped", "dotted")
COLORS = ("red", "green", "blue", "yellow", "purple", "orange", "white", "black")
SHAPES = ("circle", "square", "star", "triangle", "cross", "heart", "diamond", "ring")
BACKGROUNDS = ("sand", "grass", "sea", "dusk")
CONDITIONS = ("clear", "noisy", "dark", "blurred")
KINDS = ("objects", "text", "number", "chart", "handwritten")
LETTERS = "acefhklmoprstuxz"

# The prior: the n-th shape has popularity 1/(n+3), a favourite colour (taken with .35) and a
# partner (joins with .4).
POPULARITY = np.array([1 / (n + 3) for n in range(len(SHAPES))])
POPULARITY /= POPULARITY.sum()
FAVOURITE = dict(
    zip(SHAPES, ("red", "blue", "yellow", "green", "white", "purple", "orange", "black"))
)
PARTNER = dict(
    zip(SHAPES, ("square", "circle", "triangle", "star", "heart", "cross", "ring", "diamond"))
)

RGB = dict(
    red=(214, 39, 40),
    green=(26, 140, 48),
    blue=(31, 80, 200),
    yellow=(250, 214, 20),
    purple=(136, 48, 168),
    orange=(255, 130, 14),
    white=(252, 252, 252),
    black=(24, 24, 24),
)
GROUND = dict(
    sand=(236, 218, 176), grass=(182, 222, 170), sea=(170, 212, 240), dusk=(204, 184, 216)
)

FONT = {  # 5 x 5 bitmaps, drawn twice as large
    "a": "01110 10001 11111 10001 10001",
    "c": "01111 10000 10000 10000 01111",
    "e": "11111 10000 11110 10000 11111",
    "f": "11111 10000 11110 10000 10000",
    "h": "10001 10001 11111 10001 10001",
    "k": "10010 10100 11000 10100 10010",
    "l": "10000 10000 10000 10000 11111",
    "m": "10001 11011 10101 10001 10001",
    "o": "01110 10001 10001 10001 01110",
    "p": "11110 10001 11110 10000 10000",
    "r": "11110 10001 11110 10010 10001",
    "s": "01111 10000 01110 00001 11110",
    "t": "11111 00100 00100 00100 00100",
    "u": "10001 10001 10001 10001 01110",
    "x": "10001 01010 00100 01010 10001",
    "z": "11111 00010 00100 01000 11111",
    "0": "01110 10011 10101 11001 01110",
    "1": "00100 01100 00100 00100 01110",
    "2": "11110 00001 01110 10000 11111",
    "3": "11110 00001 00110 00001 11110",
    "4": "10010 10010 11111 00010 00010",
    "5": "11111 10000 11110 00001 11110",
    "6": "01100 10000 11110 10001 01110",
    "7": "11111 00001 00010 00100 00100",
    "8": "01110 10001 01110 10001 01110",
    "9": "01110 10001 01111 00001 00110",
}


@dataclass(frozen=True)
class Thing:
    """One object: place 0..15 in reading order, and its four attributes."""

    place: int
    size: str
    texture: str
    color: str
    shape: str

    @property
    def row(self) -> int:
        """Row 0..3 from the top."""
        return self.place // GRID

    @property
    def column(self) -> int:
        """Column 0..3 from the left."""
        return self.place % GRID


@dataclass(frozen=True)
class Scene:
    """Everything that is true of one picture."""

    kind: str
    background: str
    condition: str
    things: tuple[Thing, ...] = ()  # objects, in reading order
    text: str = ""  # letters or digits, one a cell, from the left
    line: int = 0  # the row that the text stands in
    bars: tuple[tuple[str, int], ...] = ()  # chart: (colour, height 1..4) from the left
    # handwritten: index into scikit-learn's digits; even ones are for training, odd ones for the
    # forgetting benchmark
    ink: int = -1
    seed: int = 0


def rng_of(*key: str | int) -> Generator:
    """A generator that depends on the key alone, the same on any machine."""
    # A whole number stands for itself, a text for its bytes.
    numbers = [
        abs(k) if isinstance(k, int) else int.from_bytes(str(k).encode(), "little") % (2**61 - 1)
        for k in key
    ]
    return np.random.default_rng(numbers)


def pick(rng: Generator, options: Sequence, p: Sequence[float] | None = None) -> Any:
    """One of the options, as a Python object; `p` are their probabilities."""
    # The same draw as rng.choice, without its checks, because a world needs a million of them.
    if p is None:
        return options[int(rng.integers(len(options)))]
    return options[int(rng.choice(len(options), p=p))]


def sample_scene(
    rng: Generator,
    kind: str | None = None,
    n: int | None = None,
    seed: int = 0,
    odd_ink: bool = False,
) -> Scene:
    """Draw a scene; `kind` and `n` (number of objects, 1..5) are drawn too unless given."""
    kind = kind or pick(rng, KINDS, (0.68, 0.09, 0.07, 0.11, 0.05))
    base = dict(
        kind=kind,
        background=pick(rng, BACKGROUNDS),
        seed=seed,
        condition=pick(rng, CONDITIONS, (0.79, 0.07, 0.07, 0.07)),
    )
    if kind == "text":
        return Scene(
            text="".join(rng.choice(list(LETTERS), int(rng.integers(2, 5)), replace=False)),
            line=int(rng.integers(GRID)),
            **base,
        )
    if kind == "number":
        numerals = rng.integers(0, 10, int(rng.integers(1, 4)))
        return Scene(text="".join(map(str, numerals)), line=int(rng.integers(GRID)), **base)
    if kind == "handwritten":
        ink = 2 * int(rng.integers(len(digits().target) // 2)) + odd_ink
        return Scene(text=str(digits().target[ink]), ink=ink, **base)
    if kind == "chart":
        m = int(rng.integers(2, 5))
        colors, heights = rng.permutation(len(COLORS))[:m], rng.permutation(GRID)[:m] + 1
        return Scene(bars=tuple((COLORS[c], int(h)) for c, h in zip(colors, heights)), **base)
    return Scene(things=sample_things(rng, n or int(rng.integers(1, 6))), **base)


def sample_things(rng: Generator, n: int) -> tuple[Thing, ...]:
    """n objects on distinct cells, drawn from the prior."""
    shapes = []
    while len(shapes) < n:
        if shapes and rng.random() < 0.4 and PARTNER[shapes[-1]] not in shapes:
            shapes.append(PARTNER[shapes[-1]])
        else:
            shapes.append(pick(rng, SHAPES, POPULARITY))
    places = sorted(int(p) for p in rng.permutation(GRID * GRID)[:n])
    rng.shuffle(shapes)
    return tuple(
        Thing(
            place,
            pick(rng, SIZES),
            pick(rng, TEXTURES),
            FAVOURITE[shape] if rng.random() < 0.35 else pick(rng, COLORS),
            shape,
        )
        for place, shape in zip(places, shapes)
    )


def held(scene: Scene) -> bool:
    """Whether a scene is set aside for evaluation: an eighth of all; no training set draws it.

    It depends on what the scene shows, not on its seed or condition, so training and evaluation
    share no content.
    """
    if scene.kind == "handwritten":
        return scene.ink % 2 == 1
    content = (scene.kind, scene.background, scene.things, scene.text, scene.line, scene.bars)
    return zlib.crc32(repr(content).encode()) % 8 == 0


# -------------------------------------------------------------------------------------- the picture


@cache
def shape_mask(shape: str, side: int) -> np.ndarray:
    """(side, side) float mask of a shape, anti-aliased by drawing it eight times as large."""
    k = 8
    big = Image.new("L", (side * k, side * k))
    draw, e = ImageDraw.Draw(big), side * k - 1

    def polygon(points):
        draw.polygon([(x * e, y * e) for x, y in points], fill=255)

    if shape == "circle":
        draw.ellipse((0, 0, e, e), fill=255)
    elif shape == "ring":
        draw.ellipse((0, 0, e, e), fill=255)
        draw.ellipse((0.3 * e, 0.3 * e, 0.7 * e, 0.7 * e), fill=0)
    elif shape == "square":
        polygon([(0.04, 0.04), (0.96, 0.04), (0.96, 0.96), (0.04, 0.96)])
    elif shape == "triangle":
        polygon([(0.5, 0), (1, 1), (0, 1)])
    elif shape == "diamond":
        polygon([(0.5, 0), (1, 0.5), (0.5, 1), (0, 0.5)])
    elif shape == "cross":
        polygon([(0.34, 0), (0.66, 0), (0.66, 1), (0.34, 1)])
        polygon([(0, 0.34), (1, 0.34), (1, 0.66), (0, 0.66)])
    elif shape == "heart":
        draw.ellipse((0, 0, 0.55 * e, 0.6 * e), fill=255)
        draw.ellipse((0.45 * e, 0, e, 0.6 * e), fill=255)
        polygon([(0.03, 0.42), (0.97, 0.42), (0.5, 1)])
    else:
        turn = np.pi * np.arange(10) / 5 - np.pi / 2
        radius = np.where(np.arange(10) % 2, 0.22, 0.54)
        polygon(list(zip(0.5 + radius * np.cos(turn), 0.54 + radius * np.sin(turn))))
    return np.asarray(big.resize((side, side), Image.Resampling.BOX), dtype=np.float32) / 255


@cache
def texture_mask(texture: str, side: int) -> np.ndarray:
    """(side, side) of {0, 1}: where a texture darkens (or, on dark colours, lightens) the shape."""
    y, x = np.mgrid[:side, :side]
    if texture == "striped":
        return (y % 4 >= 2).astype(np.float32)
    if texture == "dotted":
        return ((y % 4 >= 2) & (x % 4 >= 2)).astype(np.float32)
    return np.zeros((side, side), np.float32)


@cache
def digits() -> Any:
    """scikit-learn's 1,797 handwritten digits: images (n, 8, 8) of 0..16, target (n,)."""
    from sklearn.datasets import load_digits

    return load_digits()


def handwriting(canvas: np.ndarray, ink: int, color: Sequence[int]) -> None:
    """A handwritten digit over the whole picture, in the given colour."""
    side = len(canvas)
    mask = Image.fromarray((digits().images[ink] * 15.9).astype(np.uint8)).resize(
        (side, side), Image.Resampling.BICUBIC
    )
    paste(canvas, 0, 0, np.asarray(mask, np.float32) / 255, color)


def mnist_picture(ink: int) -> Image.Image:
    """A handwritten digit for the forgetting benchmark: white on black, no noise, as in MNIST."""
    canvas = np.zeros((GRID * CELL, GRID * CELL, 3), np.float32)
    handwriting(canvas, ink, (255, 255, 255))
    return Image.fromarray(canvas.astype(np.uint8))


def glyph(character: str) -> np.ndarray:
    """(10, 10) mask of a letter or digit."""
    bits = np.array([[int(b) for b in row] for row in FONT[character].split()], np.float32)
    return bits.repeat(2, 0).repeat(2, 1)


def paste(canvas: np.ndarray, y: int, x: int, mask: np.ndarray, color: ArrayLike) -> None:
    """Blend a colour, or one for each pixel, into the canvas at (y, x), by a mask of 0 to 1."""
    side_y, side_x = mask.shape
    patch = canvas[y : y + side_y, x : x + side_x]
    patch += mask[..., None] * (np.asarray(color, np.float32) - patch)


def render(scene: Scene) -> Image.Image:
    """The picture of a scene: a 48 x 48 RGB `PIL.Image`.

    Jitter and noise depend only on the scene's seed.
    """
    rng = np.random.default_rng([scene.seed, 7])
    canvas = np.empty((GRID * CELL, GRID * CELL, 3), np.float32)
    canvas[:] = np.asarray(GROUND[scene.background], np.float32) + rng.normal(0, 4, 3)
    for thing in scene.things:
        side = 11 if thing.size == "large" else 7
        shift = rng.integers(0, 2, 2) if side == 11 else 2 + rng.integers(-1, 2, 2)
        mask, color = shape_mask(thing.shape, side), np.asarray(RGB[thing.color], np.float32)
        other = color * 0.45 if color.sum() > 200 else color + 110  # black cannot darken
        ink = color + texture_mask(thing.texture, side)[..., None] * (other - color)
        y, x = thing.row * CELL + int(shift[0]), thing.column * CELL + int(shift[1])
        paste(canvas, y, x, mask, ink)
    if scene.kind == "handwritten":  # on any ground, in any ink that stands out, as MNIST-M has it
        if rng.random() < 0.5:
            canvas[:] = rng.integers(0, 60, 3)
        light = canvas.mean() < 100
        color = rng.integers(170, 256, 3) if light else rng.integers(0, 70, 3)
        handwriting(canvas, scene.ink, color)
    for column, character in enumerate(scene.text if scene.kind != "handwritten" else ""):
        y = scene.line * CELL + 1 + int(rng.integers(-1, 2))
        x = column * CELL + 1 + int(rng.integers(-1, 2))
        paste(canvas, y, x, glyph(character), (40, 30, 30))
    for column, (color, height) in enumerate(scene.bars):
        bar = np.ones((height * CELL - 1, 8), np.float32)
        paste(canvas, GRID * CELL - height * CELL + 1, column * CELL + 2, bar, RGB[color])
    if scene.condition == "dark":
        canvas *= 0.5
    canvas += rng.normal(0, 22 if scene.condition == "noisy" else 3, canvas.shape)
    picture = Image.fromarray(canvas.clip(0, 255).astype(np.uint8))
    is_blurred = scene.condition == "blurred"
    return picture.filter(ImageFilter.GaussianBlur(0.9)) if is_blurred else picture


def draw_all(jobs: Iterable[tuple[str, Scene | int]]) -> None:
    """Write (path, scene) as PNG files; a number instead of a scene is a handwritten digit."""

    def draw(job):
        path, scene = job
        picture = mnist_picture(scene) if isinstance(scene, int) else render(scene)
        picture.save(path, compress_level=1)

    # While one thread compresses and writes, another draws.
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for _ in pool.map(draw, jobs):
            pass
