"""What a benchmark is: a folder of questions, a way to read answers, and metrics that can be resampled.

    <folder>/NAME/questions.jsonl    one question a line: question_id, image, text, label, category, ...
    <folder>/images/                 the pictures of all of them (or <folder>/NAME/images/)

`text` is the whole human turn, format prompt included ("Answer the question using a single word or phrase."), as in the
question files that LLaVA released: what a model was asked can be read in the file.
"""

import json
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np


@dataclass(frozen=True)
class Metric:
    """mean over groups of 100 * sum(num) / sum(den); all arrays (n,), one entry for each item.

    An item is mostly a question; for MME's acc+ it is a pair, for MMBench all rotations of a question.
    """

    num: np.ndarray
    den: np.ndarray
    group: np.ndarray
    cluster: np.ndarray  # the picture

    def value(self):
        ratios = []
        for g in np.unique(self.group):
            top, bottom = self.num[self.group == g].sum(), self.den[self.group == g].sum()
            ratios.append(top / bottom if bottom else 0.0)
        return 100 * float(np.mean(ratios))

    def where(self, mask):
        return Metric(self.num[mask], self.den[mask], self.group[mask], self.cluster[mask])


def metrics(name, num, samples, den=None):
    """{name: the macro average over categories, 'name/category': each of them}, for per-question arrays."""
    category = np.array([s["category"] for s in samples])
    cluster = np.array([str(s.get("image")) for s in samples])
    whole = Metric(
        np.asarray(num, float), np.ones(len(samples)) if den is None else np.asarray(den, float), category, cluster
    )
    kinds = list(dict.fromkeys(category))
    return {name: whole} | {f"{name}/{k}": whole.where(category == k) for k in kinds if len(kinds) > 1}


def read_jsonl(path):
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines() if line.strip()]


def load_questions(folder, name):
    """The questions of <folder>/name with `image` as an absolute path (None: a question without a picture)."""
    folder = Path(folder)
    path = folder / name / "questions.jsonl"
    if not path.exists():
        raise FileNotFoundError(
            f"{path} is not there - run notebooks/01_data_exploration.ipynb, which writes the benchmarks."
        )
    samples = read_jsonl(path)
    own = folder / name / "images"
    images = own if own.exists() else folder / "images"
    for number, sample in enumerate(samples, 1):
        missing = {"question_id", "text", "label"} - sample.keys()
        if missing:
            raise ValueError(f"{path}, line {number}: a question needs {', '.join(sorted(missing))}.")
        sample["question_id"] = str(sample["question_id"])
        sample.setdefault("category", name)
        sample["image"] = str((images / sample["image"]).absolute()) if sample.get("image") else None
    return samples


def clean(text):
    """Lower case, single spaces, no quotes around it and no full stop after it."""
    return re.sub(r"\s+", " ", str(text)).strip().strip("\"'").rstrip(" .!").lower()


def first_sentence(text):
    """Up to the first full stop, question mark or line break that ends a sentence ('3.5' is no end)."""
    return re.split(r"(?<=[.!?])\s|\n", str(text).strip(), maxsplit=1)[0]


def contains(text, label):
    """Whether `label` stands in `text` as whole words."""
    return re.search(rf"(?<!\w){re.escape(clean(label))}(?!\w)", clean(text)) is not None


def majority(samples):
    """The most frequent label of each question's category: what a model can know without looking."""
    counts = {}
    for s in samples:
        counts.setdefault(s["category"], Counter())[clean(s["label"])] += 1
    best = {category: min(c, key=lambda label: (-c[label], label)) for category, c in counts.items()}
    return [best[s["category"]] for s in samples]


@dataclass(frozen=True)
class Benchmark:
    """One benchmark: everything that knows how it is asked and read lives in its file.

    load(folder) -> list of sample dicts; parse(answer, sample) -> what was understood;
    items(samples, answers) -> dict of Metrics. `headline` is the metric that a table shows; `paper` the column of
    Table 2.
    """

    name: str
    headline: str
    parse: Callable
    items: Callable
    load: Callable
    blind: Callable = majority  # samples -> the answers of a model that sees nothing
    max_new_tokens: int = 16
    paper: str = ""

    def prompt(self, sample):
        """The text of the human turn, format prompt included."""
        return sample["text"]

    def score(self, samples, answers):
        """dict metric -> value on a scale of 0 to 100 (only MME's `total` is on its official scale)."""
        if len(samples) != len(answers):
            raise ValueError(f"{self.name} has {len(samples)} questions, but {len(answers)} answers were given.")
        return {name: metric.value() for name, metric in self.items(samples, answers).items()}

    def baseline(self, samples):
        """What the majority answer scores: chance level, to be printed beside every score."""
        return self.score(samples, self.blind(samples))
