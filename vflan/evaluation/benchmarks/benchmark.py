"""What a benchmark is: a folder of questions, a way to read answers, and metrics that can be resampled.

    <folder>/NAME/questions.jsonl    one question a line: question_id, image, text, label, category, ...
    <folder>/images/                 the pictures of all of them (or <folder>/NAME/images/)

or the files that the benchmark's authors and LLaVA released, in <folder>/NAME/; each benchmark's file says which.
`text` is the whole human turn, format prompt included ("Answer the question using a single word or phrase."), as in the
question files that LLaVA released: what a model was asked can be read in the file.
"""

import json
import re
import warnings
from collections import Counter
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from vflan.data.images import picture_trouble
from vflan.evaluation.benchmarks.files import keep_picture, read_rows


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

    def pooled(self):
        """The same over all items together: questions count alike, not categories."""
        return Metric(self.num, self.den, np.zeros(len(self.num)), self.cluster)


def metrics(name, num, samples, den=None, pooled=False):
    """{name: the macro average over categories, 'name/category': each of them}, for per-question arrays.

    With `pooled` the whole is over all questions together, as most official scripts have it.
    """
    category = np.array([s["category"] for s in samples])
    cluster = np.array([str(s.get("image")) for s in samples])
    whole = Metric(
        np.asarray(num, float),
        np.ones(len(samples)) if den is None else np.asarray(den, float),
        category,
        cluster,
    )
    kinds = list(dict.fromkeys(category))
    parts = {f"{name}/{k}": whole.where(category == k) for k in kinds if len(kinds) > 1}
    return {name: whole.pooled() if pooled else whole} | parts


def read_questions(path):
    """The rows of our own questions.jsonl with `image` as an absolute path (None: a question without a picture), and with the
    `lexicon` of a lexicon.json beside it, by which the mini world's rule judge reads answers."""
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(
            f"{path} is not there - run notebooks/01_data_exploration.ipynb, which writes the benchmarks."
        )
    samples = read_rows(path)
    own = path.parent / "images"
    images, words = (
        own if own.exists() else path.parent.parent / "images",
        path.parent / "lexicon.json",
    )
    more = {"lexicon": json.loads(words.read_text(encoding="utf-8"))} if words.exists() else {}
    for number, sample in enumerate(samples, 1):
        missing = {"question_id", "text", "label"} - sample.keys()
        if missing:
            raise ValueError(
                f"{path}, line {number}: a question needs {', '.join(sorted(missing))}."
            )
        sample["image"] = (
            str((images / sample["image"]).absolute()) if sample.get("image") else None
        )
        sample |= more
    return samples


@contextmanager
def in_words(path, name):
    """What goes wrong in reading a file of others, as a sentence that names the file: json, gzip, pandas and base64 each have
    errors of their own, and a file of another shape ends in KeyError or TypeError anywhere."""
    try:
        yield
    except FileNotFoundError:
        raise
    except Exception as trouble:
        if isinstance(trouble, ValueError) and str(path.parent) in str(trouble):
            raise  # it says already which file, and what to do
        raise ValueError(
            f"{path} is damaged, or a file of {name} is not in a shape that is known ({type(trouble).__name__}: "
            f"{str(trouble)[:200]}); data/README.md lists the released files."
        ) from trouble


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
    counts, forms = {}, {}
    for s in samples:
        counts.setdefault(s["category"], Counter())[clean(s["label"])] += 1
        forms.setdefault((s["category"], clean(s["label"])), str(s["label"]))
    best = {c: min(n, key=lambda label, n=n: (-n[label], label)) for c, n in counts.items()}
    return [forms[s["category"], best[s["category"]]] for s in samples]


def out_of(judgement):
    """What a judgement's score is held against: the mark of the reference where both were marked, else 10."""
    return getattr(judgement, "out_of", 10.0)


def valid(judgement):
    """Whether a judge's verdict can be averaged: it is there and from 0 to 10, and so is what it is held against."""
    score = judgement.score if judgement is not None else None
    return score is not None and 0 <= score <= 10 and 0 < out_of(judgement) <= 10


def labelled(sample):
    return bool(str(sample["label"] if sample["label"] is not None else "").strip())


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
    measure: Callable  # (samples, answers[, judgements]) -> {metric name: Metric}, of questions that can be scored
    read: Callable | None = (
        None  # (released question file, file or folder of the labels, keep) -> samples
    )
    released: tuple[
        str, ...
    ] = ()  # what the question file may be called, the best first; a/b: the whole folder is read
    source: str = ""  # where to get it
    size: int = 0  # questions of the whole released set; 0: not one number
    known: Callable = labelled  # sample -> whether its label can be scored
    missing: str = "excluded"  # a question without an answer is `excluded`, or `wrong` where the official script says so
    alone: Callable | None = (
        None  # (samples, answers or None) -> the samples that lack a partner to be scored with
    )
    blind: Callable = majority  # samples -> the answers of a model that sees nothing
    max_new_tokens: int = 16
    paper: str = ""
    judged: bool = False  # its official number is a judge's
    upload: Callable | None = (
        None  # (samples, answers, path): write what the benchmark's server wants
    )
    reviews: Callable | None = None  # (released file of a judge's verdicts, samples) -> judgements

    def prompt(self, sample):
        """The text of the human turn, format prompt included."""
        return sample["text"]

    def load(self, folder):
        """The questions of <folder>/NAME. Says where they can be had if they are not there, and warns of those that
        cannot be scored or whose number is not that of the release."""
        here = Path(folder) / self.name
        found = (
            (name, p)
            for name in ("questions.jsonl", *self.released)
            for p in sorted(here.glob(name))
        )
        path = next((here if "/" in name else p for name, p in found), None)
        if path is None:
            theirs = (
                f", or put {' or '.join(self.released)} there ({self.source})"
                if self.released
                else ""
            )
            raise FileNotFoundError(
                f"{here}/questions.jsonl is not there - run notebooks/01_data_exploration.ipynb, which writes the mini "
                f"world's{theirs}."
            )
        samples = self.questions(path)
        unscored = [s["question_id"] for s in samples if not self.known(s)]
        if 0 < len(unscored) < len(samples):
            warnings.warn(
                f"{self.name}: {len(unscored)} questions have no usable label and will not be scored (first: "
                f"{unscored[0]}).",
                stacklevel=2,
            )
        return samples

    def questions(self, path, labels=None, keep=keep_picture):
        """The samples of one question file, ours or a released one, with the labels of `labels` (a file or a folder;
        default: the folder of the question file). `keep` stores pictures that come inside the file."""
        path = Path(path)
        here = path if path.is_dir() else path.parent
        ours = self.read is None or (path.is_file() and self.is_ours(path))
        with in_words(path, self.name):
            samples = (
                read_questions(path)
                if ours
                else self.read(path, Path(labels) if labels else here, keep)
            )
        if not ours and self.size and path.name != "questions.jsonl" and len(samples) != self.size:
            warnings.warn(
                f"{path} holds {len(samples)} questions, the released {self.name} {self.size}.",
                stacklevel=2,
            )
        for number, sample in enumerate(samples, 1):
            sample["question_id"] = str(sample["question_id"])
            sample["category"] = str(sample.get("category", self.name))
            sample.setdefault("label", None)
            sample.setdefault("image", None)
            for key, kind in (
                ("text", str),
                ("letters", str),
                ("options", list),
                ("classes", list),
            ):
                if key in sample and not isinstance(sample[key], kind):
                    wanted = "text" if kind is str else "list"
                    raise ValueError(
                        f"{path}, question {number}: its {key} is {sample[key]!r}, which is no {wanted}."
                    )
            if ours and isinstance(sample["label"], (int, float)):
                sample["label"] = str(sample["label"])  # 3 for "3"
        if not samples:
            raise ValueError(f"{path} holds no questions.")
        return samples

    def is_ours(self, path):
        """Whether a file is in our own format; a benchmark that was released under its name reads both itself."""
        if path.suffix != ".jsonl" or "questions.jsonl" in self.released:
            return False
        with path.open(encoding="utf-8-sig", errors="replace") as file:
            head = file.readline(100_000)
        return path.name == "questions.jsonl" or ('"label"' in head and '"text"' in head)

    def items(self, samples, answers, judgements=None):
        """{metric name: Metric}. Left out are questions whose label is not known and, unless the official script counts
        them as wrong, those whose answer is None; {} where nothing is left. See `problems` for how many and which.

        judgements: a Judgement (or None) for each question. A benchmark that is not `judged` gets its headline from them,
        as the paper lets Vicuna decide on forgetting; those that are not valid are left out.
        """
        if len(samples) != len(answers):
            raise ValueError(
                f"{self.name} has {len(samples)} questions, but {len(answers)} answers were given."
            )
        keep = [i for i, (s, a) in enumerate(zip(samples, answers))
                if self.known(s) and (a is not None or self.missing == "wrong")]  # fmt: skip
        chosen = (
            [samples[i] for i in keep],
            ["" if answers[i] is None else str(answers[i]) for i in keep],
        )
        if not keep:
            return {}
        if judgements is None:
            return self.measure(*chosen)
        if len(judgements) != len(samples):
            raise ValueError(
                f"{self.name} has {len(samples)} questions, but {len(judgements)} judgements were given."
            )
        verdicts = [judgements[i] for i in keep]
        if self.judged:
            return self.measure(*chosen, verdicts)
        good = [(s, j) for s, j in zip(chosen[0], verdicts) if valid(j)]
        marks, best = [j.score for _, j in good], [out_of(j) for _, j in good]
        return metrics(self.headline, marks, [s for s, _ in good], den=best) if good else {}

    def problems(self, samples, answers=None, pictures=False):
        """{trouble: [question ids]} of everything that keeps a question from being scored as it stands; empty lists are
        left out. `unknown_label`, `duplicate_question`, MME's `unpaired`; with answers `missing` and `empty`; with
        `pictures` those that do not open ('id: why')."""
        found = {"unknown_label": [s["question_id"] for s in samples if not self.known(s)]}
        twice = Counter((s["question_id"], s["text"]) for s in samples)
        found["duplicate_question"] = [id for (id, _), n in twice.items() for _ in range(n - 1)]
        if answers is not None:
            pairs = list(zip(samples, answers))
            found["missing"] = [s["question_id"] for s, a in pairs if a is None]
            found["empty"] = [
                s["question_id"] for s, a in pairs if a is not None and not str(a).strip()
            ]
        if pictures:
            trouble = (
                (s["question_id"], picture_trouble(s["image"])) for s in samples if s["image"]
            )
            found["unreadable_picture"] = [f"{id}: {why}" for id, why in trouble if why]
        if self.alone:
            found["unpaired"] = [s["question_id"] for s in self.alone(samples, answers)]
        return {trouble: ids for trouble, ids in found.items() if ids}

    def score(self, samples, answers, judgements=None):
        """dict metric -> value on a scale of 0 to 100 (only MME's points are on their official scale)."""
        return {
            name: metric.value()
            for name, metric in self.items(samples, answers, judgements).items()
        }

    def baseline(self, samples):
        """What the majority answer scores: chance level, to be printed beside every score."""
        return self.score(samples, self.blind(samples))
