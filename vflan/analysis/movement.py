"""How far training moved the weights of a part, from the files of two runs.

No model is loaded, and memory holds one piece of two tensors at a time: three models of 13B would
take 300 GB in double precision. The files are in 16 or 32 bits whatever a recipe's `bits`, so that
a quantised run is compared by what it learned.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import torch

from vflan.models.weights import Source, part_of, part_sizes, stored_slices

PIECE = 1 << 24  # weights of a piece: 128 MB in double precision
SHOWN = 1 << 21  # weights that a figure can show


def pieces(
    before: Source, after: Source, part: str, size: int = PIECE
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """The weights of a part in two runs, as flat float64 tensors of about `size` weights each.

    ValueError if the two runs differ in names or shapes, or have no such part in safetensors.
    """
    stored = [
        {name: weight for name, weight in stored_slices(run).items() if part_of(name) == part}
        for run in (before, after)
    ]
    shapes = [{name: weight.get_shape() for name, weight in some.items()} for some in stored]
    if shapes[0] != shapes[1]:
        raise ValueError(f"The {part}s of the two runs differ in shape: they cannot be compared.")
    if not shapes[0]:
        raise ValueError(f"The safetensors of the two runs hold no {part}.")
    names = list(shapes[0])
    if part == "language_model" and not any("lm_head" in name for name in names):
        # Tied tables are stored once, but they are two weights of the model.
        names += [name for name in names if "embed_tokens" in name]
    for name in names:
        shape = shapes[0][name]
        rows = max(1, size // math.prod(shape[1:]))
        for start in range(0, shape[0], rows):
            a, b = (some[name][start : start + rows].flatten().double() for some in stored)
            yield a, b


def moved(before: Source, after: Source, part: str, size: int = PIECE) -> tuple[float, float]:
    """(correlation, distance) of a part's weights before and after training.

    correlation: Pearson's, over all weights. distance: the length of the change divided by the
    length of the weights before.
    """
    sums = torch.zeros(7, dtype=torch.float64)
    for a, b in pieces(before, after, part, size):
        products = [a.new_tensor(len(a)), a.sum(), b.sum(), a @ a, b @ b, a @ b]
        sums += torch.stack([*products, (b - a).square().sum()])
    n, a, b, aa, bb, ab, change = sums.tolist()
    covariance, spread = ab - a * b / n, (aa - a * a / n) * (bb - b * b / n)
    return covariance / math.sqrt(spread), math.sqrt(change / aa)


def weight_pairs(
    before: Source, after: Source, part: str, most: int = SHOWN
) -> tuple[np.ndarray, np.ndarray]:
    """Weights of a part before and after training, for a figure.

    All of them; of a part with more than `most` every k-th, so that about `most` are left.
    """
    step, offset, chosen = math.ceil(part_sizes(before)[part] / most), 0, []
    for a, b in pieces(before, after, part):
        # The k-th weights of the whole part, whatever the pieces are.
        chosen.append(torch.stack([a, b])[:, -offset % step :: step])
        offset += len(a)
    return tuple(torch.cat(chosen, dim=1).numpy())
