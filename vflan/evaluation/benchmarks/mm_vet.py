"""MM-Vet: open questions that combine capabilities; a judge gives each answer a mark from 0 to 1.

    mm_vet/    llava-mm-vet.jsonl (LLaVA), mm-vet.json (the authors'), images/;
               or only mm-vet.json

Capabilities are rec, ocr, know, gen, spat and math. The papers' judge is GPT-4 with the authors'
few-shot prompt. Released marks are read as judgements: the authors' json id -> {"score": [one a
run]}, a list or a table of question_id and score, or their table of results (a csv with a column
`total`), whose numbers are returned unchanged. Without a judge there is only `rule`: the share of
the parts of the reference (joined by <AND>; <OR> between alternatives) that the answer contains. In
the mini world `rule` is the judge. Questions without an answer or a mark are left out.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np

from vflan.evaluation.benchmarks.benchmark import Benchmark, Metric, clean, metrics, out_of, valid
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


def reviews(path: Path, samples: list[dict]) -> list | dict:
    """A Judgement (or None) for each sample; a dict for the authors' table of results."""
    data = read_rows(path)
    if isinstance(data, list) and data and "total" in data[0]:
        if len(data) > 1:
            raise ValueError(
                f"{path} holds the results of {len(data)} models: keep the row of one."
            )
        return table(data[0])
    rows = (
        data.items()
        if isinstance(data, dict)
        else [(str(r.get("question_id", r.get("id"))), r) for r in data]
    )
    marks = {}
    for id, row in rows:
        runs = row.get("score") if isinstance(row, dict) else row
        runs = runs if isinstance(runs, list) else [runs]
        try:
            marks["v1_" + str(id).removeprefix("v1_")] = float(np.mean([float(x) for x in runs]))
        except (TypeError, ValueError):
            continue  # not a number: treated as missing
    good = {id: Judgement(10 * mark, "") for id, mark in marks.items() if 0 <= mark <= 1}
    return [good.get("v1_" + str(s["question_id"]).removeprefix("v1_")) for s in samples]


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
    rule = np.array([parse(a, s) for s, a in zip(samples, answers)])
    measured = (
        {"rule": metrics("rule", rule, samples, pooled=True)["rule"]}
        if all(s["label"] for s in samples)
        else {}
    )
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
    write_json(path, {s["question_id"]: a or "" for s, a in zip(samples, answers)})


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
