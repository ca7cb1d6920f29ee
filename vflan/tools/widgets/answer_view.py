"""The answers of runs: a table for print, and a browser that puts two runs side by side."""

from __future__ import annotations

import ipywidgets as w
import numpy as np
import pandas as pd
from IPython.display import HTML

from vflan.tools.widgets import elements


def answer_table(rows, limit: int = 8) -> HTML:
    """A table of questions, labels and answers, each answer with a mark for right or wrong.

    rows: with text, label and answer; image and right if there are any. limit: the most rows shown.
    """
    cells = []
    for _, row in elements.as_frame(rows).head(limit).iterrows():
        texts = (str(row[name]) for name in ("text", "label", "answer"))
        mark = "✓" if _is_right(row) else "✗"
        cells.append((elements.picture(row.get("image")), *texts, mark))
    return HTML(elements.macros.table(("picture", "question", "label", "answer", ""), cells))


def answer_browser(rows, page_size: int = 5) -> w.VBox:
    """Leaf through answers by benchmark, task and verdict, those of two runs side by side.

    rows: the answers of one run, or {run: answers} of several that were asked the same questions
    in the same order, as vflan.evaluation.results.judged_answers returns them. Columns: text,
    label, answer; image, benchmark, category, right and reason if there are any.
    Raises ValueError if the questions differ.
    """
    runs = rows if isinstance(rows, dict) else {"answer": rows}
    frames = {name: elements.as_frame(answers) for name, answers in runs.items()}
    return _AnswerBrowser(frames, page_size).box


class _AnswerBrowser:
    def __init__(self, answers, page_size):
        self.answers, self.page_size = answers, page_size
        names, self.questions = list(answers), next(iter(answers.values()))
        for name, frame in answers.items():
            if list(frame["text"]) != list(self.questions["text"]):
                raise ValueError(
                    f"{names[0]} and {name} were not asked the same questions, "
                    "so they cannot be shown side by side."
                )
            frame["right"] = [_is_right(row) for _, row in frame.iterrows()]
        labels = ("run", "beside") if len(names) > 1 else ()
        self.runs = [elements.dropdown(names, label) for label in labels]
        for choice, name in zip(self.runs, names):
            choice.value = name
        self.filters = self.make_filters()
        self.verdict = elements.dropdown(["all"], "show", "18em")
        self.number, turning = elements.pager("page")
        self.page, self.is_updating = w.HTML(), False

        for control in (*self.runs, *self.filters.values(), self.verdict, self.number):
            control.observe(self.update, "value")
        self.update()
        runs = elements.in_a_row(*self.runs, self.verdict)
        filters = elements.in_a_row(*self.filters.values(), *turning)
        self.box = w.VBox([runs, filters, self.page])

    def make_filters(self):
        """A choice for each column that groups the questions: {column: dropdown}."""
        # `run` names the source of answers that have no benchmark
        first = "benchmark" if "benchmark" in self.questions else "run"
        filters = {}
        for column, label in ((first, first), ("category", "task")):
            if column in self.questions:
                filters[column] = elements.dropdown(["all"], label, "22em")
                elements.set_options(filters[column], self.questions[column].astype(str).unique())
        return filters

    def update(self, _=None):
        """Show the questions that fit all choices; the choices follow each other."""
        if self.is_updating:  # a choice that this function makes itself
            return
        self.is_updating = True
        names = [choice.value for choice in self.runs] or list(self.answers)
        right = [self.answers[name]["right"].to_numpy(bool) for name in names]
        texts = [self.answers[name]["answer"].astype(str).str.strip(" .") for name in names]
        differ = np.array([len(set(row)) > 1 for row in zip(*texts)], bool)
        places = np.flatnonzero(self.fitting(names, right, differ))
        self.number.max = max(1, -(-len(places) // self.page_size))
        scores = [
            f"{name} {own[places].mean():.0%}" for name, own in zip(names, right) if len(places)
        ]
        summary = f"{len(places):,} of {len(self.questions):,} questions; right: "
        summary += ", ".join(scores) or "none to count"
        first = (self.number.value - 1) * self.page_size
        rows = [self.line(place, names) for place in places[first : first + self.page_size]]
        self.page.value = elements.macros.answers(summary, ["", "question", "label", *names], rows)
        self.is_updating = False

    def fitting(self, names, right, differ):
        """Which questions fit the chosen verdict, benchmark and task: booleans (questions,)."""
        verdicts = _verdicts(names, right, differ)
        # Setting options also sets the choice, and would undo one that the browser makes meanwhile.
        if self.verdict.options != tuple(verdicts):
            position = self.verdict.options.index(self.verdict.value)
            self.verdict.options = list(verdicts)
            self.verdict.index = min(position, len(verdicts) - 1)
        fits = verdicts[self.verdict.value].copy()
        for column, choice in self.filters.items():
            if column == "category":  # only those of the chosen benchmark and verdict
                elements.set_options(choice, self.questions[column][fits].astype(str).unique())
            fits &= elements.matches(self.questions[column], choice)
        return fits

    def line(self, place, names):
        """The cells of one question: picture, question, label, and the answer of each run."""
        row = self.questions.iloc[place]
        cells = [elements.picture(row.get("image")), str(row["text"]), str(row["label"])]
        for name in names:
            answer = self.answers[name].iloc[place]
            reason = answer.get("reason")
            reason = reason if isinstance(reason, str) else ""  # NaN where no judge gave one
            cells.append(elements.macros.verdict(answer["right"], str(answer["answer"]), reason))
        return cells


def _verdicts(names, right, differ):
    """{what the verdict filter offers: booleans (questions,)} for one run or two."""
    everything = {"all": np.ones(len(right[0]), bool)}
    if len(names) == 1:
        return everything | {"right": right[0], "wrong": ~right[0]}
    first, second = right
    return everything | {
        "both right": first & second,
        "both wrong": ~first & ~second,
        f"only {names[0]} right": first & ~second,
        f"only {names[1]} right": second & ~first,
        "answers differ": differ,
    }


def _is_right(row):
    """The verdict that the row brings (`right`), else label and answer compared as bare words."""
    if "right" in row and not pd.isna(row["right"]):
        return bool(row["right"])
    label, answer = (str(row[name]).strip(" .").lower() for name in ("label", "answer"))
    return label == answer
