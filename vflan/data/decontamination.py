"""Training pictures and questions that also occur in a benchmark, copies included.

A copy is looked for in two steps. Every picture is described by two 8 x 8 views, of the whole and of what a 5 % crop on each
side would leave; evaluation pictures with a like view are candidates. A candidate is then looked at again: the frame of the one
picture inside the other is found by least squares, and the two count as copies only if nothing in that frame differs by more
than JPEG at quality 30 and halving the size were seen to do. So copies are found that were recompressed, resized or cropped by 3 to
6 % on each side, and two pictures that differ in one small object are not taken for copies. Mirrored, rotated and recoloured copies
are not looked for.
"""

import re
import unicodedata
from functools import lru_cache

import numpy as np
from PIL import Image

from vflan.config import resolve
from vflan.evaluation.benchmarks import BENCHMARKS

SIDE = 8  # of a view
CROP = 0.05  # of width and height, on each side
MAX_CROP = 0.07  # the frame is looked for up to here
LIKE = 12.0  # root mean square difference of two views, in grey levels, up to which a picture is a candidate
CANDIDATES = 8  # evaluation pictures looked at for each training picture and pair of views, the most alike ones
FLAT = 2.0  # grey levels: a picture that varies less shows nothing to know it by; only exact copies of it are found
FINE = 32  # side at which candidates are compared
# Largest difference of (luma, chroma) in grey levels anywhere in a copy, after a blur of so many of the 32 pixels. Chosen on the
# mini world of seed 0 and measured on another (bench/contamination.py). Chroma is wider: JPEG halves its resolution.
ALLOWED = {1: (10.0, np.inf), 2: (4.0, 12.0), 4: (np.inf, 5.2)}

_WHOLE, _INNER = (0.0, 0.0, 1.0, 1.0), (CROP, CROP, 1 - CROP, 1 - CROP)
_PROMPT = re.compile(  # the format prompts of the benchmarks, where they end a question
    r"(please )?answer (the question )?(yes or no|using a single word or phrase"
    r"|with the (option.?s )?letter( from the given choices directly)?)\W*$",
    re.I,
)


def benchmark_questions(against) -> list[dict]:
    """The questions to compare with: benchmark, question_id, image (None for text) and `question_keys` of each.

    `against` is a folder of benchmarks, as in a recipe, or {name: questions} as `BENCHMARKS[name].load(folder)` gives them.
    """
    if not isinstance(against, dict):
        folder = resolve(against)
        against = {
            name: b.load(folder) for name, b in BENCHMARKS.items() if (folder / name).is_dir()
        }
        if not against:
            known = ", ".join(BENCHMARKS)
            raise FileNotFoundError(
                f"{folder} holds no benchmark (a folder named {known}); data/README.md says how."
            )
    return [
        dict(
            benchmark=name,
            question_id=str(q["question_id"]),
            image=q.get("image"),
            keys=question_keys(str(q["text"])),
        )
        for name, questions in against.items()
        for q in questions
    ]


# ------------------------------------------------------------------------------------------------------------ questions


@lru_cache(10_000)  # templated questions come in thousands
def question_keys(text: str) -> frozenset[int]:
    """Two questions are the same or nearly so if they share a key: equal words, or eight and more of which one differs.

    Case, punctuation, `<image>` and the format prompts of the benchmarks ("Answer with the letter.") do not count.
    """
    text = _PROMPT.sub(" ", text.replace("<image>", " "))
    words = tuple(re.findall(r"\w+", unicodedata.normalize("NFKC", text).casefold()))
    if not 8 <= len(words) <= 64:
        return frozenset([hash(words)] if words else [])
    return frozenset(
        [hash(words), *(hash((*words[:i], None, *words[i + 1 :])) for i in range(len(words)))]
    )


# ------------------------------------------------------------------------------------------------------------- pictures


def views(picture: Image.Image) -> np.ndarray:
    """uint8 (2, 8, 8, 3): the whole picture and what lies inside a 5 % crop, each shrunk to 8 x 8."""
    return np.stack(
        [np.asarray(_shrunk(picture, box, SIDE, Image.Resampling.BOX)) for box in (_WHOLE, _INNER)]
    )


def candidates(looks: np.ndarray, others: np.ndarray) -> dict[tuple[int, int], tuple[int, ...]]:
    """{(i, j): ways} of pictures with like `views` (n, 2, 8, 8, 3): what is to be tried in `distance`.

    Way 0 is the same frame; 1: the other is a crop of the picture; 2: the picture is a crop of the other.
    """
    pairs = {}
    for way, (mine, other) in enumerate(((0, 0), (1, 0), (0, 1))):
        for i, j, gap in _like(looks[:, mine], others[:, other]):
            pairs.setdefault((i, j), {})[way] = gap
    return {
        pair: tuple(way for way, gap in gaps.items() if gap <= 1.5 * min(gaps.values()) + 1)
        for pair, gaps in sorted(pairs.items())
    }


class Fine:
    """A picture to compare closely: `picture` (YCbCr, at most 128 pixels a side) and `view`, float (32, 32, 3)."""

    def __init__(self, picture: Image.Image):
        if max(picture.size) > 128:
            picture = picture.resize((128, 128), Image.Resampling.BICUBIC, reducing_gap=3.0)
        self.picture = picture.convert("YCbCr")
        self.view = self.frame(_WHOLE)

    def frame(self, box) -> np.ndarray:
        return np.asarray(_shrunk(self.picture, box, FINE, Image.Resampling.BICUBIC), np.float32)


def distance(a: Fine, b: Fine, ways=(0, 1, 2)) -> float:
    """How much two pictures differ where they show the same; at most 1 for what ALLOWED calls a copy."""
    best = _largest(a.view - b.view) if 0 in ways else np.inf
    if best > 1 and 1 in ways:
        best = min(best, _framed(a, b.view))
    if best > 1 and 2 in ways:
        best = min(best, _framed(b, a.view))
    return best


def _like(mine: np.ndarray, others: np.ndarray):
    """Yields (i, j, root mean square difference) of the views that differ by at most LIKE."""
    mine, others = (v.reshape(len(v), SIDE * SIDE * 3) for v in (mine, others))
    lively = [np.flatnonzero(_lively(v)) for v in (mine, others)]
    if not len(lively[1]):
        return
    others = others[lively[1]].astype(np.float32)
    norms = (others**2).sum(1)
    step = max(1, (1 << 25) // len(others))
    for start in range(0, len(lively[0]), step):
        rows = lively[0][start : start + step]
        some = mine[rows].astype(np.float32)
        square = some @ others.T
        square *= -2
        square += norms
        square += (some**2).sum(1)[:, None]
        a, b = np.nonzero(square <= LIKE**2 * some.shape[1])
        gaps = np.sqrt(square[a, b].clip(0) / some.shape[1])
        order = np.lexsort((gaps, a))
        taken = (
            np.arange(len(a)) - np.searchsorted(a, a) < CANDIDATES
        )  # `a` is sorted, so that it is its own a[order]
        for k in order[taken]:
            yield int(rows[a[k]]), int(lively[1][b[k]]), float(gaps[k])


def _lively(flat_views: np.ndarray) -> np.ndarray:
    return np.concatenate(
        [
            v.reshape(len(v), SIDE * SIDE, 3).std(1).max(1) > FLAT
            for v in np.array_split(flat_views, 64)
        ]
    )


def _framed(large: Fine, small: np.ndarray) -> float:
    """The distance of `small` to the frame of `large` that shows it best: Levenberg-Marquardt on the frame's four edges.

    The picture is really cropped and shrunk at each step, so that the frame is exact to a fraction of a pixel.
    """
    difference = small - large.frame(_INNER)
    best = _largest(difference)
    if best > 6:  # too far off to come to anything
        return best
    normal, gradient = _normal_equations(small)
    box, trial, least, damping = np.array(_INNER), np.array(_INNER), np.inf, 1e4
    for step in range(24):
        smooth = _blur(difference, 1)
        cost = float((smooth**2).sum())
        if cost < least:
            settled = least - cost < 1e-3 * least
            box, least, pull, damping = (
                trial,
                cost,
                gradient @ smooth.ravel(),
                max(damping / 4, 30.0),
            )
            best = min(best, _largest(difference))
        else:
            settled, damping = damping > 1e6, damping * 8
        if settled or best < 0.3 or (step == 6 and best > 4):
            break  # found, as good as it gets, or getting nowhere
        trial = box + np.linalg.solve(normal + damping * np.eye(4), pull)
        trial = np.clip(trial, (0, 0, 1 - MAX_CROP, 1 - MAX_CROP), (MAX_CROP, MAX_CROP, 1, 1))
        difference = small - large.frame(trial)
    return best


def _normal_equations(small: np.ndarray):
    """J^T J (4, 4) and J^T (4, n), J being how a view changes as the left, top, right and lower edge of its frame move."""
    smooth = _blur(small, 1)
    down, across = (np.gradient(smooth, axis=axis) * FINE for axis in (0, 1))
    at = (np.arange(FINE, dtype=np.float32) + 0.5) / FINE
    x, y = at[None, :, None], at[:, None, None]
    jacobian = np.stack([across * (1 - x), down * (1 - y), across * x, down * y]).reshape(4, -1)
    return jacobian @ jacobian.T, jacobian


def _largest(difference: np.ndarray) -> float:
    """The largest difference anywhere, as a share of what ALLOWED allows."""
    worst = 0.0
    for radius, (luma, chroma) in ALLOWED.items():
        smooth = np.abs(_blur(difference, radius))
        worst = max(worst, smooth[..., 0].max() / luma, smooth[..., 1:].max() / chroma)
        if worst > 6:
            break  # no copy; how far off does not matter
    return float(worst)


@lru_cache
def _kernel(radius: int) -> np.ndarray:
    at = np.arange(FINE)
    weights = np.exp(-0.5 * ((at[:, None] - at) / radius) ** 2)
    return (weights / weights.sum(1, keepdims=True)).astype(np.float32)


def _blur(image: np.ndarray, radius: int) -> np.ndarray:
    for _ in "yx":  # along one axis, then, turned over, along the other
        image = (_kernel(radius) @ image.reshape(FINE, -1)).reshape(FINE, FINE, 3).swapaxes(0, 1)
    return image


def _shrunk(picture: Image.Image, box, side: int, how) -> Image.Image:
    width, height = picture.size
    box = (box[0] * width, box[1] * height, box[2] * width, box[3] * height)
    return picture.resize(
        (side, side), how, box=box, reducing_gap=3.0 if how == Image.Resampling.BOX else None
    )
