"""Catastrophic forgetting (CF in the paper): mean accuracy as an image classifier on four sets.

    cifar10/        cifar-10-batches-py/ (test_batch, batches.meta)
    cifar100/       cifar-100-python/ (test, meta)
    mnist/          t10k-images-idx3-ubyte.gz, t10k-labels-idx1-ubyte.gz (or unpacked)
    miniimagenet/   test.csv (filename, label), words.txt (ImageNet's: id, tab, names), images/
    forgetting/     no files: the mean over those of the four that are in the folder

Each of the four can also be the hub's parquet files of its test split, test-*.parquet.

In the paper Vicuna-13B decides whether an answer names the class; prompts and splits are not
printed. Our prompt lists the classes (for miniImageNet the 20 of its test split). A rule decides
unless there are judgements: the first sentence contains the label as whole words, and no other
label of the set, so that listing every class earns nothing. There is no official script; a missing
answer is wrong. CIFAR's files are Python pickles, of which only arrays, strings and numbers are
loaded.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from vflan.evaluation.benchmarks.benchmark import (
    Benchmark,
    Metric,
    clean,
    contains,
    first_sentence,
    metrics,
)
from vflan.evaluation.benchmarks.files import (
    SHORT,
    parts_of,
    pictures_in,
    read_bytes,
    read_rows,
    read_text,
)
from vflan.evaluation.benchmarks.reading import affirms

SETS = ("cifar10", "cifar100", "mnist", "miniimagenet")


def parse(answer: str, sample: dict | None = None) -> str:
    """The first sentence, cleaned."""
    return clean(first_sentence(answer))


def items(samples: list[dict], answers: list[str]) -> dict[str, Metric]:
    labels = {}
    for s in samples:
        labels.setdefault(s["category"], set()).add(clean(s["label"]))
        labels[s["category"]].update(map(clean, s.get("classes", ())))
    scores = [
        # The whole answer "St. Bernard" is right, although its first sentence is only "St."
        clean(a) == clean(s["label"]) or right(parse(a), clean(s["label"]), labels[s["category"]])
        for s, a in zip(samples, answers)
    ]
    return metrics("accuracy", scores, samples)


def right(answer: str, label: str, labels: set[str]) -> bool:
    """Whether an answer names the label and no other; "deer" inside "red deer" is no other."""
    named = {name for name in labels if name in answer and affirms(answer, name)}
    return label in named and all(other == label or contains(label, other) for other in named)


def ask(name: str, rows: Iterable[tuple], classes: Sequence[str], keep: Callable) -> list[dict]:
    """Samples from (picture's bytes or path, class) pairs, with the classes in the question."""
    names = [c.replace("_", " ") for c in classes]
    what = "number" if name == "mnist" else "object"
    text = f"What is the {what} in the image? Choose one of: {', '.join(names)}.{SHORT}"
    return [
        dict(
            question_id=str(i),
            text=text,
            label=names[k],
            category=name,
            classes=names,
            image=keep(picture) if isinstance(picture, bytes) else picture,
        )
        for i, (picture, k) in enumerate(rows)
    ]


class Arrays(pickle.Unpickler):
    """Reads a pickle that holds arrays, strings and numbers, and nothing that could run."""

    ALLOWED = {"_reconstruct", "ndarray", "dtype", "scalar", "encode"}

    def find_class(self, module: str, name: str) -> type:
        if name in self.ALLOWED and module.split(".")[0] in ("numpy", "_codecs"):
            return super().find_class(module.replace("numpy.core", "numpy._core"), name)
        raise ValueError(f"a pickle with {module}.{name} in it is not CIFAR's: it is not opened")


def unpickle(path: Path) -> dict:
    try:
        with open(path, "rb") as file:
            return Arrays(file, encoding="bytes").load()
    except (pickle.UnpicklingError, EOFError, IndexError, KeyError, AttributeError) as error:
        raise ValueError(f"{path} is no whole CIFAR file ({error}); download it again.") from None


def png(pixels: np.ndarray) -> bytes:
    """The bytes of a picture: (height, width) or (height, width, 3) of 0 to 255."""
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "PNG")
    return out.getvalue()


def read_cifar(path: Path, labels: Path, keep: Callable, name: str) -> list[dict]:
    folder = path if path.is_dir() else path.parent
    test = next(
        (p for p in (path, folder / "test_batch", *folder.glob("cifar-10*/test*")) if p.is_file()),
        path,
    )
    names_file = next(iter(sorted(test.parent.glob("*meta"))), None)
    if names_file is None:
        which = "batches.meta" if name == "cifar10" else "meta"
        raise FileNotFoundError(f"{test.parent}/{which} is not there: the names of the classes.")
    batch, meta = unpickle(test), unpickle(names_file)
    fine = b"fine_" if b"fine_labels" in batch else b""
    classes = [name.decode() for name in meta[fine + b"label_names"]]
    pixels = np.ascontiguousarray(
        np.asarray(batch[b"data"]).reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    )
    return ask(name, zip(map(png, pixels), batch[fine + b"labels"]), classes, keep)


def read_mnist(path: Path, labels: Path, keep: Callable, name: str) -> list[dict]:
    folder = path if path.is_dir() else path.parent

    def array(pattern, header):
        file = next(iter(sorted(folder.rglob(pattern))), None)
        if file is None:
            raise FileNotFoundError(f"{folder}/{pattern.replace('*', '')} is not there.")
        return np.frombuffer(read_bytes(file), np.uint8, offset=header)

    digits, pixels = array("t10k-labels*", 8), array("t10k-images*", 16).reshape(-1, 28, 28)
    return ask(name, zip(map(png, pixels), digits.tolist()), [str(d) for d in range(10)], keep)


def read_miniimagenet(path: Path, labels: Path, keep: Callable, name: str) -> list[dict]:
    here = path.parent
    rows, words = read_rows(path), {}
    image = pictures_in(here, "images", "test")
    if (here / "words.txt").exists():
        lines = read_text(here / "words.txt").splitlines()
        words = {
            id: names.split(",")[0]
            for id, names in (line.split("\t", 1) for line in lines if "\t" in line)
        }
    ids = sorted({r["label"] for r in rows})
    classes = [words.get(id, id) for id in ids]
    if any(c[:1] == "n" and c[1:].isdigit() for c in classes):
        raise FileNotFoundError(
            f"{here}/words.txt is not there: ImageNet's names of the classes (id, tab, names)."
        )
    return ask(name, [(image(r["filename"]), ids.index(r["label"])) for r in rows], classes, keep)


def read_parquet(path: Path, keep: Callable, name: str) -> list[dict]:
    """The hub's files: a column of pictures, one of class numbers, and names in the metadata."""
    import json

    import pyarrow.parquet as pq

    rows = [row for file in parts_of(path) for row in read_rows(file)]
    schema = pq.read_schema(path)
    kinds = json.loads(schema.metadata[b"huggingface"])["info"]["features"]
    column = next((c for c in ("fine_label", "label") if c in schema.names), None)
    picture = next((c for c in ("img", "image") if c in schema.names), None)
    if not column or not picture or "names" not in kinds[column]:
        raise ValueError(
            f"{path} needs columns img or image, and label with the names of its classes."
        )
    pairs = ((row[picture]["bytes"], row[column]) for row in rows)
    return ask(name, pairs, kinds[column]["names"], keep)


def read(path: Path, labels: Path, keep: Callable, name: str, other: Callable) -> list[dict]:
    inside = sorted(path.glob("test-*.parquet")) if path.is_dir() else []
    parquet = path if path.suffix == ".parquet" else next(iter(inside), None)
    return read_parquet(parquet, keep, name) if parquet else other(path, labels, keep, name)


def one_set(
    name: str, title: str, other: Callable, released: tuple[str, ...], source: str
) -> Benchmark:
    """The benchmark of one of the four sets; `other` reads the set's own files."""
    return Benchmark(
        name,
        title=title,
        headline="accuracy",
        parse=parse,
        measure=items,
        read=partial(read, name=name, other=other),
        released=released,
        source=source,
        missing="wrong",
    )


CIFAR10, CIFAR100, MNIST, MINIIMAGENET = FOUR = (
    one_set(
        "cifar10",
        "CIFAR-10",
        read_cifar,
        ("cifar-10-batches-py/test_batch", "test-*.parquet"),
        "the CIFAR page of U. Toronto",
    ),
    one_set(
        "cifar100",
        "CIFAR-100",
        read_cifar,
        ("cifar-100-python/test", "test-*.parquet"),
        "the CIFAR page of U. Toronto",
    ),
    one_set("mnist", "MNIST", read_mnist, ("t10k-labels*", "test-*.parquet"), "the MNIST page"),
    one_set(
        "miniimagenet",
        "miniImageNet",
        read_miniimagenet,
        ("test.csv", "test-*.parquet"),
        "Ravi and Larochelle's split of ImageNet",
    ),
)


class Forgetting(Benchmark):
    """The mini world's forgetting/questions.jsonl, or the questions of the four released sets."""

    def is_in(self, folder: str | Path) -> bool:
        """Whether a folder holds the mini world's questions or one of the four sets."""
        return super().is_in(folder) or any(benchmark.is_in(folder) for benchmark in FOUR)

    def load(self, folder: str | Path) -> list[dict]:
        if (Path(folder) / self.name).is_dir():
            return super().load(folder)
        here = [b for b in FOUR if b.is_in(folder)]
        if not here:
            raise FileNotFoundError(
                f"{folder} has none of {', '.join(SETS)} - put one there, or run "
                "notebooks/01_data_exploration.ipynb, which writes the mini world's."
            )
        return [
            s | {"question_id": f"{b.name}_{s['question_id']}", "category": b.name}
            for b in here
            for s in b.load(folder)
        ]


FORGETTING = Forgetting("forgetting", "accuracy", parse, items, missing="wrong", paper="CF")
