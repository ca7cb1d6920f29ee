"""MM-Vet: open questions that combine capabilities; a judge gives each answer a mark from 0 to 1.

    mm_vet/    llava-mm-vet.jsonl (LLaVA), mm-vet.json (the authors'), images/;
               or only mm-vet.json

Capabilities are rec, ocr, know, gen, spat and math. The papers' judge is GPT-4 with the authors'
few-shot prompt. Released marks are read as judgements: the authors' json id -> {"score": [one a
run]}, a list or a table of question_id and score, or their table of results (a csv with a column
`total` and a row for each model), whose numbers are returned unchanged. Of several runs the mean is
reported, with `runs` and their standard deviation `std`, as the authors compute it. Without a judge
there is only `rule`: the share of the parts of the reference (joined by <AND>; <OR> between
alternatives) that the answer contains. In the mini world `rule` is the judge. Questions without an
answer or a mark are left out.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np

from vflan.evaluation.benchmarks.benchmark import (
    Benchmark,
    Metric,
    clean,
    labelled,
    metrics,
    out_of,
    valid,
)
from vflan.evaluation.benchmarks.files import find, pictures_in, read_rows
from vflan.evaluation.benchmarks.reading import affirms
from vflan.evaluation.benchmarks.vqa import write_json
from vflan.evaluation.judge import Judgement


def parse(answer: str, sample: dict) -> float:
    """0 to 1: the share of the parts of the reference that the answer contains as whole words.

    Parts are joined by <AND>; of alternatives, joined by <OR>, one is enough.
    """

    def part(text):
        alternatives = [clean(phrase) for phrase in text.split("<OR>") if phrase.strip()]
        return any(affirms(clean(answer), phrase) for phrase in alternatives)

    parts = [p for p in str(sample.get("label") or "").split("<AND>") if p.strip()]
    return sum(map(part, parts)) / len(parts) if parts else 0.0


def read(path: Path, labels: Path, keep: Callable) -> list[dict]:
    """The questions of LLaVA's file or of mm-vet.json, with the labels of mm-vet.json."""
    data = read_rows(path)
    image = pictures_in(path.parent, "images", "mm-vet/images")
    file, official = find(labels, "mm-vet.json", "mm-vet/mm-vet.json"), {}
    if isinstance(data, dict):
        official = data
    elif file and file != path:
        official = read_rows(file)
    rows = data
    if isinstance(data, dict):
        rows = [
            dict(question_id=id, text=q["question"], image=q["imagename"]) for id, q in data.items()
        ]
    samples = []
    for q in rows:
        bare = str(q["question_id"]).removeprefix("v1_")
        label = official.get(f"v1_{bare}", {})
        samples.append(
            q
            | dict(
                question_id=f"v1_{bare}",
                aliases=[bare],
                image=image(q.get("image")),
                category="all",
                label=label.get("answer"),
                capability=sorted(label.get("capability", [])),
            )
        )
    return samples


def reviews(path: Path, samples: list[dict], model: str | None = None) -> list[list] | dict:
    """For each run of the judge a Judgement (or None) of each sample; a dict for the authors' table
    of results, of which `model` names the row.
    """
    data = read_rows(path)
    if isinstance(data, list) and data and "total" in data[0]:
        return table(row_of(path, data, model))
    if model:
        raise ValueError(f"{path} is no table of several models: leave --model out.")
    rows = (
        data.items()
        if isinstance(data, dict)
        else [(str(r.get("question_id", r.get("id"))), r) for r in data]
    )
    marks = {}
    for id, row in rows:
        runs = row.get("score") if isinstance(row, dict) else row
        runs = runs if isinstance(runs, list) else [runs]
        marks["v1_" + str(id).removeprefix("v1_")] = [judgement(mark) for mark in runs]
    counts = [len(runs) for runs in marks.values() if runs] or [0]
    if max(counts) > min(counts):
        warnings.warn(
            f"{path}: a run that has not marked every question is left out.", stacklevel=2
        )
    ids = ["v1_" + str(s["question_id"]).removeprefix("v1_") for s in samples]
    return [
        [(marks.get(id) or [None] * (i + 1))[i] for id in ids] for i in range(max(1, min(counts)))
    ]


def judgement(mark: object) -> Judgement | None:
    """The Judgement of a released mark; None if it is no number from 0 to 1."""
    try:
        return Judgement(10 * float(mark), "") if 0 <= float(mark) <= 1 else None
    except (TypeError, ValueError):
        return None


def row_of(path: Path, rows: list[dict], model: str | None) -> dict:
    """The row of a model; ValueError if it is not there, or if one of several has to be named."""
    # The first column has no name of its own.
    names = [str(next(iter(row.values()))) for row in rows]
    if model is None and len(rows) == 1:
        return rows[0]
    if names.count(model) != 1:
        which = f"{names.count(model)} rows for --model {model}" if model else "several models"
        raise ValueError(f"{path} has {which}: name one of {', '.join(names)} with --model.")
    return rows[names.index(model)]


def table(row: dict) -> dict[str, float]:
    """The authors' csv of one model: {"total", "rec", ...: percent, "std", "runs": list}."""
    scores = {}
    for name, cell in row.items():
        if name == "runs":
            numbers = cell.replace("np.float64(", "").strip("[]").replace(")", "")
            scores[name] = [float(x) for x in numbers.split(",")]
        elif name and not name.startswith("Unnamed") and cell.replace(".", "", 1).isdigit():
            scores[name] = float(cell)
    return scores


def items(
    samples: list[dict], answers: list[str], judgements: list | None = None
) -> dict[str, Metric]:
    """total and its parts (by capability, by combination of them) if there is a judge; rule."""
    rule, measured = np.array([parse(a, s) for s, a in zip(samples, answers)]), {}
    if (with_label := np.array([labelled(s) for s in samples])).any():
        measured["rule"] = metrics("rule", rule, samples, pooled=True)["rule"].where(with_label)
    if judgements is None:
        judgements = [
            Judgement(10 * x, "") if s.get("judge") == "rule" else None
            for x, s in zip(rule, samples)
        ]
    judged = [(s, j.score / out_of(j)) for s, j in zip(samples, judgements) if valid(j)]
    if not judged:
        return measured
    chosen = [s for s, _ in judged]
    total = metrics("total", [mark for _, mark in judged], chosen, pooled=True)["total"]
    parts = {"total": total}
    for name in dict.fromkeys(c for s in chosen for c in s.get("capability", ())):
        parts[name] = total.where(np.array([name in s.get("capability", ()) for s in chosen]))
    for both in dict.fromkeys(tuple(s.get("capability", ())) for s in chosen):
        if len(both) > 1:
            parts["_".join(both)] = total.where(
                np.array([tuple(s.get("capability", ())) == both for s in chosen])
            )
    return parts | measured


def upload(samples: list[dict], answers: list[str], path: Path) -> None:
    """The json {"v1_<id>": answer} that the authors' grader reads."""
    ids = ["v1_" + s["question_id"].removeprefix("v1_") for s in samples]
    write_json(path, {id: a or "" for id, a in zip(ids, answers)})


MM_VET = Benchmark(
    name="mm_vet",
    title="MM-Vet",
    paper="MM-Vet",
    headline="total",
    parse=parse,
    measure=items,
    read=read,
    released=("llava-mm-vet.jsonl", "mm-vet.json"),
    source="LLaVA's eval.zip, and mm-vet.zip",
    size=218,
    known=lambda sample: True,
    judged=True,
    reviews=reviews,
    upload=upload,
    max_new_tokens=128,
)
