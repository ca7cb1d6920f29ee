"""The paper's two case studies (appendix E.2): reading text, and naming entities.

    textocr/    TextOCR_0.1_val.json (the authors'), train_images/ or images/
    wit/        a TSV of WIT with image_url and caption_reference_description; images/, each named
                by the last part of its url. The paper took 1,000 at random and does not say which.

textocr: `recall` is the share of the words in the picture that the answer contains, without regard
to case and outer punctuation, each as often as it occurs in the answer. Words marked illegible
('.') are not counted. `words` is the mean length of the answers.

wit: the share of the caption's entities that the answer names. The paper finds entities with spaCy.
The name of the metric says how they were found: `coverage_capitalised` (runs of capitalised words;
always given, so that scores from two machines compare) and `coverage_spacy_MODEL` (if spaCy and an
English model are installed). `entities` is the number of capitalised entities in an answer. A
missing answer names nothing.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from functools import cache, lru_cache
from importlib.metadata import entry_points
from pathlib import Path

import numpy as np

from vflan.evaluation.benchmarks.benchmark import Benchmark, Metric, contains, metrics
from vflan.evaluation.benchmarks.files import pictures_in, read_rows

EDGE = ".,;:!?\"'()[]{}<>*`"
STARTERS = set(
    "A An The This That These Those It Its In On At He She They We I You There Here His Her "
    "Their As And But Or "
    "If When While What Which Who Where Why How For From With By To Of".split()
)


def parse_words(answer: str, sample: dict | None = None) -> list[str]:
    """The words of an answer in lower case, without punctuation at their ends."""
    return [w for w in (word.strip(EDGE).lower() for word in str(answer).split()) if w]


def read_textocr(path: Path, labels: Path, keep: Callable) -> list[dict]:
    """One question a picture; the label is all its words."""
    data = read_rows(path)
    image = pictures_in(path.parent, "train_images", "images")
    samples = []
    for id, picture in data["imgs"].items():
        strings = [data["anns"][a]["utf8_string"] for a in data["imgToAnns"].get(id, ())]
        samples.append(
            dict(
                question_id=id,
                text="Read all the text in the image.",
                label=" ".join(strings),
                image=image(picture["file_name"].split("/")[-1]),
            )
        )
    return samples


def recall(samples: list[dict], answers: list[str]) -> dict[str, Metric]:
    """`recall`, and the length of answers in hundreds of words."""
    hits, totals = [], []
    for s, a in zip(samples, answers):
        targets, spoken = Counter(parse_words(s["label"])), Counter(parse_words(a))
        totals.append(targets.total())
        hits.append((targets & spoken).total())
    length = [len(str(a).split()) / 100 for a in answers]
    return metrics("recall", hits, samples, den=totals, pooled=True) | metrics(
        "words", length, samples, pooled=True
    )


def parse_entities(answer: str, sample: dict | None = None) -> list[str]:
    """Runs of capitalised words ('Eiffel Tower', 'University of Oxford'), each once, in order.

    A word that only begins a sentence, such as 'The', does not count.
    """
    runs = re.findall(
        r"\b[A-Z][\w'-]*(?:(?:\s+(?:of|the|de|la|von|van|der))*\s+[A-Z][\w'-]*)*", str(answer)
    )
    entities = []
    for run in runs:
        words = run.split()
        while words and words[0] in STARTERS:
            words = words[1:]
        while words and words[0].islower():  # 'The of Oxford'
            words = words[1:]
        entities += [" ".join(words)] if words else []
    return list(dict.fromkeys(entities))


@cache
def spacy_model() -> tuple | None:
    """(name, pipeline) of the first English spaCy model that is installed, or None.

    spaCy is imported only if there is one.
    """
    names = sorted(
        m.name for m in entry_points(group="spacy_models") if m.name.startswith("en_core_web")
    )
    if not names:
        return None
    import spacy

    return names[0], spacy.load(names[0])


@lru_cache(1 << 14)
def spacy_entities(text: str) -> list[str]:
    """The entities that spaCy finds."""
    return [e.text for e in spacy_model()[1](text).ents]


def read_wit(path: Path, labels: Path, keep: Callable) -> list[dict]:
    """The English rows of WIT; the label is the caption."""
    image = pictures_in(path.parent, "images")
    return [
        dict(
            question_id=str(i),
            text="Introduce the entities in the image in detail, with their background.",
            label=row["caption_reference_description"],
            image=image(row["image_url"].rsplit("/", 1)[-1]),
        )
        for i, row in enumerate(read_rows(path))
        if row.get("language", "en") == "en"
    ]


def coverage(samples: list[dict], answers: list[str]) -> dict[str, Metric]:
    """The share of the caption's entities that the answer names, for each way to find entities.

    Capitalised ones count if the answer contains them as whole words in any case; spaCy's if spaCy
    finds the same entity in the answer.
    """
    measured = {}

    def share(name, pairs):
        num = [sum(hits) for hits in pairs]
        den = np.array([len(hits) for hits in pairs], float)
        measured[name] = metrics(name, num, samples, den=den, pooled=True)[name]

    share(
        "coverage_capitalised",
        [[contains(a, e) for e in parse_entities(s["label"])] for s, a in zip(samples, answers)],
    )
    if spacy_model():
        pairs = [
            (
                [e.lower() for e in spacy_entities(str(s["label"]))],
                {e.lower() for e in spacy_entities(str(a))},
            )
            for s, a in zip(samples, answers)
        ]
        share(
            f"coverage_spacy_{spacy_model()[0]}",
            [[e in named for e in targets] for targets, named in pairs],
        )
    whole = measured["coverage_capitalised"]
    count = np.array([len(parse_entities(a)) / 100 for a in answers])
    return measured | {"entities": Metric(count, np.ones(len(samples)), whole.group, whole.cluster)}


TEXTOCR = Benchmark(
    name="textocr",
    title="TextOCR",
    headline="recall",
    parse=parse_words,
    measure=recall,
    read=read_textocr,
    released=("TextOCR_0.1_val.json", "TextOCR*.json"),
    source="textvqa.org/textocr",
    known=lambda sample: sample["label"] is not None,
    missing="wrong",
    max_new_tokens=128,
)
WIT = Benchmark(
    name="wit",
    title="WIT",
    headline="coverage_capitalised",
    parse=parse_entities,
    measure=coverage,
    read=read_wit,
    released=("*.tsv", "*.tsv.gz"),
    source="google-research-datasets/wit",
    missing="wrong",
    max_new_tokens=128,
)
