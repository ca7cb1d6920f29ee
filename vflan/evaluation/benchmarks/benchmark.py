"""What a benchmark is: a folder of questions, a parser of answers, and metrics that can be
resampled.

    <folder>/NAME/questions.jsonl    one question a line: question_id, image, text, label, ...
    <folder>/NAME/images/            its pictures; `image` is a path below this folder
    <folder>/images/                 used if NAME/images/ does not exist; benchmarks can share it

In place of questions.jsonl, <folder>/NAME/ may hold the files that the benchmark's authors and
LLaVA released; the file of each benchmark lists them. `text` is the whole human turn with its
format prompt ("Answer the question using a single word or phrase."), as in LLaVA's question files.
The file therefore shows exactly what a model is asked.
"""

from __future__ import annotations

import json
import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from vflan.data.images import picture_trouble
from vflan.evaluation.benchmarks.files import UnreadableFile, keep_picture, read_rows, read_text

if TYPE_CHECKING:
    from vflan.evaluation.judge import Judgement

# Fields of a question that are more than plain values, and the type that each must have.
_TYPES = {"text": str, "letters": str, "options": list, "classes": list}


@dataclass(frozen=True)
class Metric:
    """Mean over groups of 100 * sum(num) / sum(den). All arrays are (n,), one entry for each item.

    An item is usually a question. For MME's acc+ it is a pair of questions, for MMBench all
    rotations of one question.
    """

    num: np.ndarray
    den: np.ndarray
    group: np.ndarray
    cluster: np.ndarray  # the picture; confidence intervals resample pictures

    def value(self) -> float:
        """The metric in percent; a group whose denominators sum to 0 counts as 0."""
        ratios = []
        for g in np.unique(self.group):
            in_group = self.group == g
            top, bottom = self.num[in_group].sum(), self.den[in_group].sum()
            ratios.append(top / bottom if bottom else 0.0)
        return 100 * float(np.mean(ratios))

    def where(self, mask: np.ndarray) -> Metric:
        """The metric of the items that a mask selects."""
        return Metric(self.num[mask], self.den[mask], self.group[mask], self.cluster[mask])

    def pooled(self) -> Metric:
        """The metric over all items at once: each question has the same weight, not each
        category.
        """
        return Metric(self.num, self.den, np.zeros(len(self.num)), self.cluster)


def metrics(
    name: str,
    num: Sequence[float],
    samples: Sequence[dict],
    den: Sequence[float] | None = None,
    pooled: bool = False,
) -> dict[str, Metric]:
    """{name: the mean over categories, "name/category": each category}, from one number a question.

    num, den: (n,), den is 1 if not given. pooled: the metric called `name` is over all questions at
    once, as in most official scripts.
    """
    category = np.array([s["category"] for s in samples])
    cluster = np.array([str(s.get("image")) for s in samples])
    den = np.ones(len(samples)) if den is None else np.asarray(den, float)
    whole = Metric(np.asarray(num, float), den, category, cluster)
    names = list(dict.fromkeys(category))
    parts = {}
    if len(names) > 1:
        parts = {f"{name}/{part}": whole.where(category == part) for part in names}
    return {name: whole.pooled() if pooled else whole} | parts


# ----------------------------------------------------------------------------------- question files


def read_questions(path: str | Path) -> list[dict]:
    """The rows of a questions.jsonl in our own format, with `image` as an absolute path or None.

    A lexicon.json in the same folder is added to each row: the rule judge of the mini world needs
    it. ValueError for a question that lacks a field.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(
            f"{path} is not there - run notebooks/01_data_exploration.ipynb, which writes it."
        )
    images = path.parent / "images"
    if not images.exists():
        images = path.parent.parent / "images"
    lexicon, shared = path.parent / "lexicon.json", {}
    if lexicon.exists():
        shared = {"lexicon": json.loads(lexicon.read_text(encoding="utf-8"))}
    samples = read_rows(path)
    for number, sample in enumerate(samples, 1):
        if missing := {"question_id", "text", "label"} - sample.keys():
            raise ValueError(
                f"{path}, line {number}: a question needs {', '.join(sorted(missing))}."
            )
        image = sample.get("image")
        sample["image"] = str((images / image).absolute()) if image else None
        sample |= shared
    return samples


@contextmanager
def in_words(path: Path, name: str, labels: Path | None = None) -> Iterator[None]:
    """Turn any error in reading a file of others into a ValueError that names the file.

    json, gzip, pandas and base64 each have errors of their own, and a file of an unexpected shape
    may raise KeyError or TypeError anywhere. labels: named too, if they are read in the same block.
    """
    try:
        yield
    except (FileNotFoundError, UnreadableFile):
        raise
    except Exception as error:
        if isinstance(error, ValueError) and str(path.parent) in str(error):
            raise  # the message already names the file and says what to do
        which = f"{path} or {labels}" if labels else path
        raise ValueError(
            f"{which} is damaged, or is not in a known shape of {name} ({type(error).__name__}: "
            f"{str(error)[:200]}); data/README.md lists the released files."
        ) from error


def check_types(sample: dict, where: str) -> None:
    """ValueError for a field of a question that has the wrong type."""
    for key, kind in _TYPES.items():
        if key in sample and not isinstance(sample[key], kind):
            expected = "text" if kind is str else "list"
            raise ValueError(f"{where}: its {key} is {sample[key]!r}, which is no {expected}.")


# ------------------------------------------------------------------------------------------ answers


def clean(text: object) -> str:
    """Lower case, single spaces, no quotes around it and no full stop after it."""
    return re.sub(r"\s+", " ", str(text)).strip().strip("\"'").rstrip(" .!").lower()


def first_sentence(text: object) -> str:
    """Up to the first full stop, question mark or line break that ends a sentence ("3.5" does
    not).
    """
    return re.split(r"(?<=[.!?])\s|\n", str(text).strip(), maxsplit=1)[0]


def contains(text: object, label: object) -> bool:
    """Whether `text` contains `label` as whole words."""
    return re.search(rf"(?<!\w){re.escape(clean(label))}(?!\w)", clean(text)) is not None


def majority(samples: Sequence[dict]) -> list[str]:
    """For each question the most frequent label of its category: what needs no picture."""
    counts, spellings = {}, {}
    for s in samples:
        category, label = s["category"], clean(s["label"])
        counts.setdefault(category, Counter())[label] += 1
        spellings.setdefault((category, label), str(s["label"]))
    # Ties go to the first label in the alphabet, so that the baseline does not depend on the order.
    best = {c: min(n, key=lambda label, n=n: (-n[label], label)) for c, n in counts.items()}
    return [spellings[s["category"], best[s["category"]]] for s in samples]


def out_of(judgement: Judgement) -> float:
    """What a score is divided by: that of the reference if the judge scored both, else 10."""
    return getattr(judgement, "out_of", 10.0)


def valid(judgement: Judgement | None) -> bool:
    """Whether a judgement can be averaged: its score, and its reference's, is from 0 to 10."""
    score = judgement.score if judgement is not None else None
    return score is not None and 0 <= score <= 10 and 0 < out_of(judgement) <= 10


def itself(sample: dict) -> tuple[str, str]:
    """A question that is scored by itself."""
    return sample["question_id"], sample["text"]


def labelled(sample: dict) -> bool:
    """Whether a question has a label that is not empty."""
    return bool(str(sample["label"] if sample["label"] is not None else "").strip())


# -------------------------------------------------------------------------------------- a benchmark


@dataclass(frozen=True)
class Benchmark:
    """One benchmark: how it is read, asked, parsed and scored.

    load(folder) returns the questions as dicts; parse(answer, sample) what an answer says;
    items(samples, answers) the Metrics. `headline` names the metric that tables show.
    """

    name: str
    headline: str
    parse: Callable
    # (samples, answers[, judgements]) -> {metric name: Metric}, for questions that can be scored
    measure: Callable
    # (released question file, file or folder of the labels, keep) -> samples
    read: Callable | None = None
    # Names (globs) of the released question file, the preferred one first. "a/b" reads a whole
    # folder.
    released: tuple[str, ...] = ()
    source: str = ""  # where to get the released files
    size: int = 0  # questions of the whole released set; 0: not one number
    known: Callable = labelled  # sample -> whether its label can be scored
    # A question without an answer is "excluded", or "wrong" where the official script says so.
    missing: str = "excluded"
    # (samples, answers or None) -> the samples that lack the partner they are scored with
    find_unpaired: Callable | None = None
    # sample -> a name that the questions share which are scored as one (rotations of one question)
    unit: Callable = itself
    blind: Callable = majority  # samples -> answers that need no picture: the baseline
    max_new_tokens: int = 16
    title: str = ""  # in figures and tables; the name if empty
    paper: str = ""  # the column of Table 2
    judged: bool = False  # the official number comes from a judge
    # (samples, answers, judgements) -> Metrics, where a judge decides only on the answers that
    # `parse` reads nothing in; a judgement is None for the others
    measure_with_judge: Callable | None = None
    # (samples, answers, path): write the file that the benchmark's server takes
    upload: Callable | None = None
    # How that file is called (in <run>/answers/); "": NAME_upload.json
    upload_name: str = ""
    # Names of the file, beside the questions, of all questions that the server wants an answer to;
    # `upload` takes it as `every`
    upload_all: tuple[str, ...] = ()
    # (released file of a judge's verdicts, samples, model) -> a list of judgements for each run of
    # the judge, or a dict: the scores of a table of results, in the row of that model
    reviews: Callable | None = None

    def prompt(self, sample: dict) -> str:
        """The text of the human turn, format prompt included."""
        return sample["text"]

    def is_in(self, folder: str | Path) -> bool:
        """Whether a folder of benchmarks holds this one."""
        return (Path(folder) / self.name).is_dir()

    def load(self, folder: str | Path) -> list[dict]:
        """The questions of <folder>/NAME.

        FileNotFoundError says where to get them. Warns of questions that cannot be scored, and of a
        number of questions that is not the released one.
        """
        here = Path(folder) / self.name
        path = self._question_file(here)
        if path is None:
            other = "write the file yourself (CONTRIBUTING.md has an example)"
            if self.released:
                other = f"put {' or '.join(self.released)} there ({self.source})"
            raise FileNotFoundError(
                f"{here}/questions.jsonl is not there - run notebooks/01_data_exploration.ipynb, "
                f"which writes the mini world's, or {other}."
            )
        samples = self.questions(path)
        unscored = [s["question_id"] for s in samples if not self.known(s)]
        if unscored:
            count = "all" if len(unscored) == len(samples) else len(unscored)
            warnings.warn(
                f"{self.name}: {count} questions have no usable label and will not be scored "
                f"(first: {unscored[0]}).",
                stacklevel=2,
            )
        return samples

    def _question_file(self, here: Path) -> Path | None:
        """The question file in the benchmark's folder (that folder, where it is read as a
        whole).
        """
        for name in ("questions.jsonl", *self.released):
            for path in [*sorted(here.glob(name)), *sorted(here.glob(f"{name}.gz"))]:
                return here if "/" in name else path
        return None

    def questions(
        self, path: str | Path, labels: str | Path | None = None, keep: Callable = keep_picture
    ) -> list[dict]:
        """The questions of one file, in our format or a released one.

        labels: file or folder of the labels (default: the folder of the question file). keep:
        stores a picture that comes inside the file and returns its path. ValueError for a damaged
        file; FileNotFoundError names the one of the two that is not there.
        """
        path, labels = Path(path), Path(labels) if labels else None
        for file, what in ((path, "questions"), (labels, "labels")):
            if file is not None and not file.exists():
                raise FileNotFoundError(f"{file} is not there: the {what} of {self.name}.")
        here = path if path.is_dir() else path.parent
        in_our_format = self.read is None or (path.is_file() and self.is_ours(path))
        with in_words(path, self.name, labels):
            if in_our_format:
                samples = read_questions(path)
            else:
                samples = self.read(path, labels or here, keep)
        complete = not self.size or path.name == "questions.jsonl" or len(samples) == self.size
        if not in_our_format and not complete:
            warnings.warn(
                f"{path} holds {len(samples)} questions, the released {self.name} {self.size}.",
                stacklevel=2,
            )
        for number, sample in enumerate(samples, 1):
            sample["question_id"] = str(sample["question_id"])
            sample["category"] = str(sample.get("category", self.name))
            sample.setdefault("label", None)
            sample.setdefault("image", None)
            check_types(sample, f"{path}, question {number}")
            if in_our_format and isinstance(sample["label"], (int, float)):
                sample["label"] = str(sample["label"])  # 3 means "3"
        if not samples:
            raise ValueError(f"{path} holds no questions.")
        return samples

    def is_ours(self, path: Path) -> bool:
        """Whether a file is in our own format; some benchmarks were released as questions.jsonl
        too.
        """
        name = path.name.removesuffix(".gz")
        if not name.endswith(".jsonl") or "questions.jsonl" in self.released:
            return False
        head = read_text(path).split("\n", 1)[0]
        return name == "questions.jsonl" or ('"label"' in head and '"text"' in head)

    def items(
        self,
        samples: Sequence[dict],
        answers: Sequence[str | None],
        judgements: Sequence | None = None,
    ) -> dict[str, Metric]:
        """{metric name: Metric} of the questions that can be scored; {} if there are none.

        Left out are questions without a known label and, unless the official script counts them as
        wrong, those whose answer is None; `problems` lists them. judgements: a Judgement or None
        for each question. They give a benchmark that is not `judged` its headline, as the paper
        lets Vicuna decide on forgetting; invalid ones are left out. MMBench takes them only where
        its rules read no choice, as its official script does.
        """
        self._same_length(samples, answers, "answers")
        if judgements is not None:
            self._same_length(samples, judgements, "judgements")
        kept = [
            i
            for i, (sample, answer) in enumerate(zip(samples, answers))
            if self.known(sample) and (answer is not None or self.missing == "wrong")
        ]
        if not kept:
            return {}
        scored = [samples[i] for i in kept]
        texts = ["" if answers[i] is None else str(answers[i]) for i in kept]
        if judgements is None:
            return self.measure(scored, texts)
        verdicts = [judgements[i] for i in kept]
        if self.judged or self.measure_with_judge:
            return (self.measure_with_judge or self.measure)(scored, texts, verdicts)
        pairs = [(s, j) for s, j in zip(scored, verdicts) if valid(j)]
        if not pairs:
            return {}
        scores, best = [j.score for _, j in pairs], [out_of(j) for _, j in pairs]
        return metrics(self.headline, scores, [s for s, _ in pairs], den=best)

    def _same_length(self, samples: Sequence, others: Sequence, what: str) -> None:
        if len(samples) != len(others):
            raise ValueError(
                f"{self.name} has {len(samples)} questions, but {len(others)} {what} were given."
            )

    def problems(
        self,
        samples: Sequence[dict],
        answers: Sequence[str | None] | None = None,
        pictures: bool = False,
    ) -> dict[str, list[str]]:
        """{problem: [question ids]} of the questions that cannot be scored, or not as usual.

        Always: `unknown_label`, `duplicate_question`, MME's `unpaired`. With answers: `missing`,
        `empty` and `unread` (no choice can be read). With `pictures`: `unreadable_picture`
        ("id: why"). A problem that no question has is left out.
        """
        problems = {"unknown_label": [s["question_id"] for s in samples if not self.known(s)]}
        copies = Counter((s["question_id"], s["text"]) for s in samples)
        problems["duplicate_question"] = [id for (id, _), n in copies.items() for _ in range(n - 1)]
        if answers is not None:
            pairs = [(s["question_id"], answer) for s, answer in zip(samples, answers)]
            problems["missing"] = [id for id, answer in pairs if answer is None]
            problems["empty"] = [
                id for id, answer in pairs if answer is not None and not str(answer).strip()
            ]
            problems["unread"] = [
                sample["question_id"]
                for sample, answer in zip(samples, answers)
                if str(answer or "").strip() and self.parse(answer, sample) is None
            ]
        if pictures:
            reasons = (
                (s["question_id"], picture_trouble(s["image"])) for s in samples if s["image"]
            )
            problems["unreadable_picture"] = [f"{id}: {why}" for id, why in reasons if why]
        if self.find_unpaired:
            unpaired = self.find_unpaired(samples, answers)
            problems["unpaired"] = [s["question_id"] for s in unpaired]
        return {problem: ids for problem, ids in problems.items() if ids}

    def score(
        self,
        samples: Sequence[dict],
        answers: Sequence[str | None],
        judgements: Sequence | None = None,
    ) -> dict[str, float]:
        """{metric name: value from 0 to 100}; only MME's points are on their official scale."""
        measured = self.items(samples, answers, judgements)
        return {name: metric.value() for name, metric in measured.items()}

    def baseline(self, samples: Sequence[dict]) -> dict[str, float]:
        """What the majority answer scores: chance level, to be printed next to every score."""
        return self.score(samples, self.blind(samples))
