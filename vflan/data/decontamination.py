"""Training images and questions that also occur in a benchmark, as exact or as altered copies.

Copies are searched in two steps. Every image is described by two 8 x 8 views: the whole, and what
a crop of 5 % on each side leaves. Evaluation images with a similar view are candidates. Each
candidate is then compared in detail: least squares find the frame of one image inside the other,
and the two count as copies only if nothing in that frame differs by more than JPEG at quality 30
and halving the size were measured to do. This finds copies that were recompressed, resized, or
cropped by 3 to 6 % on each side. It tells two images apart where only one has a small object, or
where an object has another colour. If only the shape or texture of a small object differs, the two
may be reported. Mirrored, rotated and recoloured copies are not searched.
"""

from __future__ import annotations

import os
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache

import numpy as np
import pandas as pd
from PIL import Image

from vflan.config import resolve
from vflan.data.conversation import IMAGE
from vflan.data.images import INNER, SIDE, WHOLE, read_picture, resize_box
from vflan.data.limits import MAX_PIXELS
from vflan.data.validation import fingerprints
from vflan.evaluation.benchmarks import BENCHMARKS
from vflan.progress import progress

# Largest crop on each side that the search for the frame allows, as a share of the side.
MAX_CROP = 0.07
# Largest root mean square difference of two views, in grey levels, for a candidate.
LIKE = 12.0
# Evaluation images compared with one training image for each pair of views: the most similar ones.
CANDIDATES = 8
# Grey levels: an image that varies less has nothing to recognise, and only exact copies are found.
FLAT = 2.0
# Side in pixels at which candidates are compared, and the number of image pairs compared at a time.
FINE, PAIRS = 32, 256
# Largest difference of (luma, chroma) in grey levels anywhere in a copy, after a blur by so many of
# the 32 pixels. Chosen on the mini world of seed 0 and measured on another seed
# (bench/contamination.py). Chroma has wider limits because JPEG halves its resolution.
ALLOWED = {1: (10.0, np.inf), 2: (4.0, 12.0), 4: (np.inf, 5.2)}

# The format prompts of the benchmarks, at the end of a question.
_PROMPT = re.compile(
    r"(please )?answer (the question )?(yes or no|using a single word or phrase"
    r"|with the (option.?s )?letter( from the given choices directly)?)\W*$",
    re.I,
)
_MATCH = ["row", "id", "task_name", "picture", "benchmark", "question_id", "kind", "distance"]
_QUESTION = ["question", "rows", "benchmark", "question_id", "asked", "kind"]


class Overlap:
    """Collects for `check`, row by row, what samples share with benchmark questions."""

    def __init__(
        self,
        against: str | os.PathLike | dict[str, list[dict]],
        names: list[str],
        prints: np.ndarray,
        troubles: dict[int, str],
        threads: int,
        max_pixels: int,
    ):
        """names, prints, troubles: the training images, as `fingerprints` describes them.

        max_pixels: of a training image. Benchmarks are read as evaluation reads them.
        """
        questions = benchmark_questions(against)
        self.of_picture = _group(questions, lambda question: [question["image"]])
        self.of_key = _group(questions, lambda question: question["keys"])
        found = _copies(names, prints, troubles, questions, threads, max_pixels)
        self.copies, self.unread = found
        self.matches, self.shared = [], Counter()

    def add(self, sample: tuple, number: int | None, turns: list[dict]) -> bool:
        """Compare one row; True if its image is in a benchmark.

        sample: (row, id, task_name, image). number: the index of the image, None without one.
        """
        texts = [turn.get("value") for turn in turns if turn.get("from") == "human"]
        texts = [text.replace(IMAGE, "").strip() for text in texts if text]
        for image, kind, gap in self.copies.get(number, ()):
            self.matches += _matches(sample, self.of_picture[image], texts, kind, gap)
        for text in texts:
            if not self.of_key.keys().isdisjoint(question_keys(text)):
                self.shared[text] += 1
        return number in self.copies

    def tables(self) -> tuple[pd.DataFrame, pd.DataFrame, tuple[str, ...]]:
        """The fields contamination, questions and unread of a `Report`."""
        contamination = pd.DataFrame(self.matches, columns=_MATCH)
        return contamination, _question_table(self.shared, self.of_key), tuple(self.unread)


def benchmark_questions(against: str | os.PathLike | dict[str, list[dict]]) -> list[dict]:
    """The questions to compare with: benchmark, question_id, image (None for text), question keys.

    `against` is a folder of benchmarks, as in a recipe, or {name: questions} as
    `BENCHMARKS[name].load(folder)` gives them. FileNotFoundError: the folder holds no benchmark.
    """
    if not isinstance(against, dict):
        folder = resolve(against)
        present = {name: one for name, one in BENCHMARKS.items() if (folder / name).is_dir()}
        if not present:
            known = f"a folder named {', '.join(BENCHMARKS)}"
            raise FileNotFoundError(f"{folder} holds no benchmark ({known}); see data/README.md.")
        against = {name: benchmark.load(folder) for name, benchmark in present.items()}
    return [
        {
            "benchmark": name,
            "question_id": str(question["question_id"]),
            "image": question.get("image"),
            "keys": question_keys(str(question["text"])),
        }
        for name, questions in against.items()
        for question in questions
    ]


# --------------------------------------------------------------------------------- questions


# Cached because questions made from a template come in thousands.
@lru_cache(10_000)
def question_keys(text: str) -> frozenset[int]:
    """Hashes; two questions that share one have the same words, or eight or more but for one word.

    Case, punctuation, `<image>` and the format prompts of the benchmarks ("Answer with the
    letter.") do not count.
    """
    text = _PROMPT.sub(" ", text.replace(IMAGE, " "))
    words = tuple(re.findall(r"\w+", unicodedata.normalize("NFKC", text).casefold()))
    if not 8 <= len(words) <= 64:
        return frozenset([hash(words)] if words else [])
    # A key for each word left out: two questions that differ in one word share the key without it.
    without_one = [hash((*words[:i], None, *words[i + 1 :])) for i in range(len(words))]
    return frozenset([hash(words), *without_one])


def _group(items: Iterable, keys_of: Callable) -> dict:
    """{key: the items that have it}."""
    groups = {}
    for item in items:
        for key in keys_of(item):
            groups.setdefault(key, []).append(item)
    return groups


def _by_benchmark(questions: Iterable[dict]) -> dict[str, list[dict]]:
    return _group(questions, lambda question: [question["benchmark"]])


def _matches(sample: tuple, questions, texts, kind: str, gap: float) -> Iterator[tuple]:
    """A line for each benchmark with this image: its question that the row asks, or its first."""
    keys = frozenset().union(*map(question_keys, texts))
    for benchmark, its_questions in _by_benchmark(questions).items():
        same = next((question for question in its_questions if question["keys"] & keys), None)
        name = (same or its_questions[0])["question_id"]
        yield *sample, benchmark, name, "same question on it" if same else kind, gap


def _question_table(shared: dict[str, int], of_key: dict) -> pd.DataFrame:
    """Distinct questions that a benchmark asks too.

    `rows` is how often the samples ask one, `asked` how often the benchmark does. A question that
    both ask rarely comes first: it is less likely to be a template.
    """
    lines = []
    for text, rows in shared.items():
        keys = question_keys(text)
        hits = {id(question): question for key in keys for question in of_key.get(key, ())}
        for benchmark, questions in _by_benchmark(hits.values()).items():
            same = next((question for question in questions if question["keys"] == keys), None)
            kind = "same words" if same else "nearly the same words"
            name = (same or questions[0])["question_id"]
            lines.append((text, rows, benchmark, name, len(questions), kind))
    lines.sort(key=lambda line: line[1] * line[4])
    return pd.DataFrame(lines, columns=_QUESTION)


# ------------------------------------------------------------------------------------ images


def _copies(
    names: list[str], prints, troubles, questions, threads, max_pixels
) -> tuple[dict, Iterable[str]]:
    """{index: [(evaluation image, kind, distance)]}, and why some images cannot be compared."""
    others = list(dict.fromkeys(q["image"] for q in questions if q["image"]))
    other_prints, other_troubles = fingerprints(others, threads)
    copies, exact = {}, set()
    for kind, field in (("same file", "file"), ("same pixels", "pixels")):
        contents = [content.tobytes() for content in other_prints[field]]
        with_content = _group(range(len(others)), lambda j, contents=contents: [contents[j]])
        for i, content in enumerate(prints[field].tolist()):
            for j in with_content.get(content, ()):
                if i not in troubles and j not in other_troubles and (i, j) not in exact:
                    exact.add((i, j))
                    copies.setdefault(i, []).append((others[j], kind, 0.0))
    pairs = candidates(prints["views"], other_prints["views"])
    for (i, j), gap in _compare(pairs, names, others, threads, max_pixels):
        if gap <= 1 and (i, j) not in exact:
            copies.setdefault(i, []).append((others[j], "near picture", gap))
    return copies, other_troubles.values()


def _compare(
    pairs: dict, names, others, threads, max_pixels
) -> Iterator[tuple[tuple[int, int], float]]:
    """((i, j), distance) of each pair of candidates; their images are read again for this."""
    pairs = list(pairs.items())
    fine = lru_cache(4096)(lambda name, most: Fine(read_picture(name, most)))

    def compare(pair):
        (i, j), ways = pair
        return (i, j), distance(fine(names[i], max_pixels), fine(others[j], MAX_PIXELS), ways)

    bar = progress("comparing pictures", len(pairs), "pairs")
    with ThreadPoolExecutor(threads) as pool, bar:
        for start in range(0, len(pairs), PAIRS):
            part = pairs[start : start + PAIRS]
            yield from pool.map(compare, part)
            bar.update(len(part))


def candidates(views: np.ndarray, others: np.ndarray) -> dict[tuple[int, int], tuple[int, ...]]:
    """{(i, j): ways} of images with similar `views`, (n, 2, 8, 8, 3): what `distance` has to try.

    Way 0: the frames are the same; 1: the other is a crop of the image; 2: the image is a crop of
    the other.
    """
    pairs = {}
    for way, (view, other) in enumerate(((0, 0), (1, 0), (0, 1))):
        for i, j, gap in _similar(views[:, view], others[:, other]):
            pairs.setdefault((i, j), {})[way] = gap
    # A way that fits clearly worse than the best one is not tried.
    return {
        pair: tuple(way for way, gap in gaps.items() if gap <= 1.5 * min(gaps.values()) + 1)
        for pair, gaps in sorted(pairs.items())
    }


def _similar(views: np.ndarray, others: np.ndarray) -> Iterator[tuple[int, int, float]]:
    """(i, j, root mean square difference) of the views (n, 8, 8, 3) that differ by at most LIKE."""
    views, others = (v.reshape(len(v), SIDE * SIDE * 3) for v in (views, others))
    varied, other_varied = (np.flatnonzero(_is_varied(v)) for v in (views, others))
    if not len(other_varied):
        return
    others = others[other_varied].astype(np.float32)  # (m, 192)
    norms = (others**2).sum(1)  # (m,)
    # Rows compared at a time, so that the matrix of differences takes 128 MiB.
    step = max(1, (1 << 25) // len(others))
    for start in range(0, len(varied), step):
        rows = varied[start : start + step]
        part = views[rows].astype(np.float32)  # (rows, 192)
        # |a - b|^2 = |a|^2 - 2 a b + |b|^2, in place because the matrix is large.
        square = part @ others.T  # (rows, m)
        square *= -2
        square += norms
        square += (part**2).sum(1)[:, None]
        a, b = np.nonzero(square <= LIKE**2 * part.shape[1])
        gaps = np.sqrt(square[a, b].clip(0) / part.shape[1])
        # The CANDIDATES smallest gaps of each row; `a` is sorted, and so is a[order].
        order = np.lexsort((gaps, a))
        rank = np.arange(len(a)) - np.searchsorted(a, a)
        for k in order[rank < CANDIDATES]:
            yield int(rows[a[k]]), int(other_varied[b[k]]), float(gaps[k])


def _is_varied(views: np.ndarray) -> np.ndarray:
    """Whether each view (n, 192) varies by more than FLAT grey levels in a channel."""
    # In parts, because the standard deviation makes copies in float64.
    parts = [v.reshape(len(v), SIDE * SIDE, 3) for v in np.array_split(views, 64)]
    return np.concatenate([part.std(1).max(1) > FLAT for part in parts])


class Fine:
    """An image as `distance` compares it.

    picture: YCbCr, at most 128 pixels a side. view: the whole image, float (32, 32, 3).
    """

    def __init__(self, picture: Image.Image):
        if max(picture.size) > 128:
            picture = picture.resize((128, 128), Image.Resampling.BICUBIC, reducing_gap=3.0)
        self.picture = picture.convert("YCbCr")
        self.view = self.frame(WHOLE)

    def frame(self, box) -> np.ndarray:
        """The part inside `box` (shares of width and height), float (32, 32, 3)."""
        part = resize_box(self.picture, box, FINE, Image.Resampling.BICUBIC)
        return np.asarray(part, np.float32)


def distance(a: Fine, b: Fine, ways: Iterable[int] = (0, 1, 2)) -> float:
    """How much two images differ where they show the same; at most 1 for a copy (see ALLOWED)."""
    best = _largest(a.view - b.view) if 0 in ways else np.inf
    if best > 1 and 1 in ways:
        best = min(best, _frame_distance(a, b.view))
    if best > 1 and 2 in ways:
        best = min(best, _frame_distance(b, a.view))
    return best


def _frame_distance(large: Fine, small: np.ndarray) -> float:
    """The distance of `small` to the frame of `large` that shows it best.

    Levenberg-Marquardt on the four edges of the frame. The image is cropped and resized at each
    step, so that the frame is exact to a fraction of a pixel.
    """
    difference = small - large.frame(INNER)
    best = _largest(difference)
    # Too different: no frame would make it a copy.
    if best > 6:
        return best
    normal, gradient = _normal_equations(small)
    box, trial, least, damping = np.array(INNER), np.array(INNER), np.inf, 1e4
    for step in range(24):
        smooth = _blur(difference, 1)
        cost = float((smooth**2).sum())
        if cost < least:
            # The step helped: take it, and be bolder.
            is_settled = least - cost < 1e-3 * least
            box, least, pull = trial, cost, gradient @ smooth.ravel()
            damping = max(damping / 4, 30.0)
            best = min(best, _largest(difference))
        else:
            # The step did not help: try a shorter one from the same box.
            is_settled, damping = damping > 1e6, damping * 8
        if is_settled or best < 0.3 or (step == 6 and best > 4):
            break
        trial = box + np.linalg.solve(normal + damping * np.eye(4), pull)
        trial = np.clip(trial, (0, 0, 1 - MAX_CROP, 1 - MAX_CROP), (MAX_CROP, MAX_CROP, 1, 1))
        difference = small - large.frame(trial)
    return best


def _normal_equations(small: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """J^T J (4, 4) and J^T (4, n).

    J is how a view changes as the left, top, right and lower edge of its frame move.
    """
    smooth = _blur(small, 1)
    down, across = (np.gradient(smooth, axis=axis) * FINE for axis in (0, 1))
    centres = (np.arange(FINE, dtype=np.float32) + 0.5) / FINE
    x, y = centres[None, :, None], centres[:, None, None]
    # Moving an edge shifts each pixel in proportion to its distance from the opposite edge.
    jacobian = np.stack([across * (1 - x), down * (1 - y), across * x, down * y]).reshape(4, -1)
    return jacobian @ jacobian.T, jacobian


def _largest(difference: np.ndarray) -> float:
    """The largest difference anywhere, as a multiple of what ALLOWED allows."""
    worst = 0.0
    for radius, (luma, chroma) in ALLOWED.items():
        smooth = np.abs(_blur(difference, radius))
        worst = max(worst, smooth[..., 0].max() / luma, smooth[..., 1:].max() / chroma)
        # Not a copy, and by how much does not matter.
        if worst > 6:
            break
    return float(worst)


@lru_cache
def _kernel(radius: int) -> np.ndarray:
    at = np.arange(FINE)
    weights = np.exp(-0.5 * ((at[:, None] - at) / radius) ** 2)
    return (weights / weights.sum(1, keepdims=True)).astype(np.float32)


def _blur(image: np.ndarray, radius: int) -> np.ndarray:
    # Along one axis, then, transposed, along the other.
    for _ in "yx":
        image = (_kernel(radius) @ image.reshape(FINE, -1)).reshape(FINE, FINE, 3).swapaxes(0, 1)
    return image
