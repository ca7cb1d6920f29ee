"""The samples of a data set by task: a table for print, and a browser that leafs through them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import ipywidgets as w
import pandas as pd
from datasets import Dataset
from IPython.display import HTML

from vflan.data.mixture import rows_by_task
from vflan.tools.widgets import elements
from vflan.tools.widgets.token_view import packed_bars, token_line

if TYPE_CHECKING:
    from vflan.config import Recipe


def task_table(samples, limit: int | None = None) -> HTML:
    """A table with one row a task: its name, its number of samples and its first sample.

    samples: rows with image, task_name and conversations. limit: the most tasks to show.
    """
    samples, tasks = _by_task(samples)
    rows = []
    for name, numbers in list(tasks.items())[:limit]:
        first = samples[int(numbers[0])]
        text = elements.macros.dialogue(elements.turns_of(first["conversations"]))
        rows.append((name, f"{len(numbers):,}", elements.picture(first.get("image")), text))
    return HTML(elements.macros.table(("task", "samples", "picture", "first sample"), rows))


def task_browser(samples, tasks=None, recipe: Recipe | None = None) -> w.VBox:
    """Choose a task and leaf through its samples.

    tasks: a DataFrame with task_name, group and category, which become choices of their own.
    recipe: its tokenizer and template show a sample token by token, and in the packed row in which
    a training on these samples reads it.
    """
    return _TaskBrowser(samples, tasks, recipe).box


class _TaskBrowser:
    def __init__(self, samples, tasks, recipe):
        self.samples, self.numbers = _by_task(samples)
        self.recipe, self.tokenizer = recipe, None
        self.known = pd.DataFrame({"task_name": list(self.numbers)})
        self.choices = {}
        if tasks is not None:
            columns = ["group", "category"]
            tasks = elements.as_frame(tasks).drop_duplicates("task_name")
            self.known = self.known.merge(tasks, "left", "task_name")
            self.known[columns] = self.known[columns].replace("", pd.NA).fillna("in no list")
            self.choices = {name: elements.dropdown(["all"], name, "20em") for name in columns}
        self.task = elements.dropdown(sorted(self.numbers), "task", "26em")
        self.number, turning = elements.pager("sample")
        self.page = w.HTML()

        self.narrow()
        for choice in self.choices.values():
            choice.observe(self.narrow, "value")
        self.task.observe(self.show_first, "value")
        self.number.observe(self.show, "value")
        self.show()
        choices = elements.in_a_row(*self.choices.values(), self.task)
        self.box = w.VBox([choices, elements.in_a_row(*turning), self.page])

    def narrow(self, _=None):
        """Offer the categories of the chosen group, and the tasks of both."""
        possible = self.known
        for name, choice in self.choices.items():
            elements.set_options(choice, possible[name].unique())
            possible = possible[elements.matches(possible[name], choice)]
        tasks = sorted(possible["task_name"])
        if list(self.task.options) != tasks:
            self.task.options = tasks

    def show_first(self, _):
        self.number.value = 1
        self.show()

    def show(self, _=None):
        rows = self.numbers[self.task.value]
        self.number.max = len(rows)
        row = int(rows[self.number.value - 1])
        sample = self.samples[row]
        position = f"{self.number.value:,} of {len(rows):,} samples of {self.task.value}"
        image = elements.picture(sample.get("image"), 220)
        turns = elements.turns_of(sample["conversations"])
        try:
            tokens = self.token_views(row, sample) if self.recipe is not None else {}
        except (OSError, ValueError) as error:
            tokens = {"problem": elements.first_line(error)}
        self.page.value = elements.macros.sample(position, image, turns, **tokens)

    def token_views(self, row, sample):
        """The sample token by token, and its place in a packed training: parts of the page."""
        # torch is imported at the first look, so that the widgets open without it
        from vflan.data.conversation import encode
        from vflan.models.llava import load_tokenizer
        from vflan.training.batching import packed_step

        self.tokenizer = tokenizer = self.tokenizer or load_tokenizer(self.recipe)
        encoded = encode(sample["conversations"], tokenizer, self.recipe.template)
        views = {"tokens": token_line(*encoded, tokenizer)}
        if not isinstance(self.samples, Dataset):
            return views
        reading = packed_step(self.samples, row, self.recipe, tokenizer)
        if reading is None:  # no step of this training reads the sample
            return views
        step, steps, packed = reading
        # None where the sample cannot be used, so that its step leaves it out
        place = next((i for i, one in enumerate(packed, 1) if row in [n for n, *_ in one]), None)
        views["place"] = f"step {step:,} of {steps:,}, row {place} of {len(packed)}"
        image_token = tokenizer.convert_tokens_to_ids("<image>")
        return views | {"bars": packed_bars(packed, row, image_token)}


def _by_task(samples):
    """Samples that can be taken by number, and {task: row numbers}; a Dataset stays on disk."""
    if isinstance(samples, Dataset):
        return samples, rows_by_task(samples)
    frame = elements.as_frame(samples)
    frame["task_name"] = frame["task_name"].fillna("")
    return frame.to_dict("records"), frame.groupby("task_name", sort=False).indices
