"""What the whole walk of a preset costs: three stages, their evaluation, and the disk they fill."""

from __future__ import annotations

import html
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import pandas as pd

from vflan.config import Preset, Recipe, resolve
from vflan.models import llava as models
from vflan.training.memory import ASKED, BEFORE, GPUS, PROCESS, Plan, plan_recipe
from vflan.training.row_lengths import QUESTIONS

# The share of a GPU's peak rate that reading questions reaches: 0.36 at 7B on one H200, with
# POPE's shape and with one question a picture (bench/results/gpu.json).
READING_SHARE = 0.36
# Numbers of GPUs to try where none is given.
NUMBERS = (1, 2, 4, 8)
# Runs that notebooks 06 to 08 add: by default, and with live="all".
MORE_RUNS = {"small": 5, "all": 18}
GB = 1e9


@dataclass(frozen=True, eq=False)
class Walk:
    """What `plan` returns for a preset: prints as text, and in a notebook as a table."""

    stages: dict[str, Plan]
    dollars_per_hour: float | None  # of one GPU

    @property
    def gpus(self) -> int:
        """How many GPUs each stage uses."""
        return self.stages["base"].gpus

    @property
    def fits(self) -> bool:
        """Whether each stage fits into the memory of its GPUs."""
        return all(stage.fits for stage in self.stages.values())

    @property
    def hours(self) -> float | None:
        """Hours of all stages and of the evaluation; None if the machine's rate is not known."""
        return None if self.evaluation is None else float(self.table.hours["all"])

    @property
    def dollars(self) -> float | None:
        """Hours x GPUs x price of a GPU hour; None if one of them is not known."""
        if self.hours is None or self.dollars_per_hour is None:
            return None
        return self.hours * self.gpus * self.dollars_per_hour

    @property
    def questions(self) -> dict[str, list[int]]:
        """{benchmark: [questions, pictures]}, as published: those that are here, or the paper's."""
        folder = resolve(self.stages["base"].recipe.benchmarks or "data/benchmarks")
        here = {name: size for name, size in QUESTIONS.items() if (folder / name).is_dir()}
        return here or QUESTIONS

    @cached_property
    def evaluation(self) -> float | None:
        """Hours of answering all questions with the three models; None if the rate is not known."""
        base = self.stages["base"]
        _, rate, _ = GPUS[base.gpu]
        if rate is None:
            return None
        questions, pictures = map(sum, zip(*self.questions.values()))
        patches = models.picture_tokens(base.recipe)
        # A picture is read once, with the text before it; answers are short.
        positions = pictures * (BEFORE + patches) + questions * ASKED
        model = base.model
        operations = 2 * model.body * positions + 2 * model.tower * (patches + 1) * pictures
        return 3 * operations / (self.gpus * rate * 1e12 * READING_SHARE) / 3600

    @cached_property
    def table(self) -> pd.DataFrame:
        """A row for each stage, the evaluation and all of it; sizes in GB, disk of what it adds."""
        rows, kept = {}, 0.0
        for name, stage in self.stages.items():
            disk = stage.disk
            left = sum(disk.values()) - disk["checkpoints"]
            rows[name] = dict(hours=stage.hours, gpu=stage.peak, memory=stage.host)
            rows[name] |= dict(disk=kept + sum(disk.values()), left=kept + left)
            kept += left
        base = self.stages["base"]
        weights, question = base.answering["weights"], base.answering["question"]
        gpu = sum(base.answering.values()) + max(0, base.at_once - 1) * question
        memory = self.gpus * (PROCESS + weights)
        answering = dict(hours=self.evaluation, gpu=gpu, memory=memory)
        rows["evaluation"] = answering | dict(disk=kept, left=kept)
        table = pd.DataFrame(rows).T.astype(float)
        whole = table.max()
        whole["hours"], whole["left"] = table.hours.sum(min_count=4), kept
        table.loc["all"] = whole
        table[["gpu", "memory", "disk", "left"]] /= GB
        return table

    def _notes(self):
        base = self.stages["base"]
        size, names = base.disk["model"] / GB, ", ".join(self.questions)
        asked = sum(number for number, _ in self.questions.values())
        if self.hours is not None:
            price = "dollars of a GPU hour"
            price = price if self.dollars is None else f"{self.dollars_per_hour} dollars"
            result = "" if self.dollars is None else f" = {self.dollars:,.0f} dollars"
            count = f"{self.gpus} GPU{'s' if self.gpus > 1 else ''}"
            yield f"cost: {self.hours:,.1f} hours x {count} x {price}{result}"
        yield f"disk beside the runs: the data, and the downloaded backbones ({size:,.1f} GB)"
        yield f"evaluation: {asked:,} questions ({names}) to each of the three models"
        yield (
            f"notebooks 06 to 08 leave {MORE_RUNS['small']} more models, with live='all' "
            f"{MORE_RUNS['all']}, {size:,.1f} GB each; --keep nothing deletes them"
        )
        yield from dict.fromkeys(note for stage in self.stages.values() for note in stage.notes)
        yield "not counted: downloads, checks of the data, loading and writing models"

    def _heading(self):
        base, fits = self.stages["base"], "fits into" if self.fits else "does NOT fit into"
        where = "this machine's memory" if base.gpu == "cpu" else f"{self.gpus} x {base.gpu}"
        return f"{Path(base.recipe.runs).name} {fits} {where}"

    def _shown(self):
        names = dict(hours="hours", gpu="GB on a GPU", memory="GB of main memory")
        names |= dict(disk="GB of disk at most", left="GB of disk left")
        return self.table.round(1).rename(columns=names)

    def __str__(self) -> str:
        table = self._shown().to_string(na_rep="", float_format="{:,.1f}".format)
        return "\n".join([self._heading(), table, *self._notes()])

    __repr__ = __str__

    def _repr_html_(self) -> str:
        table = self._shown().to_html(na_rep="", float_format="{:,.1f}".format)
        lines = [html.escape(line) for line in self._notes()]
        return f"<b>{html.escape(self._heading())}</b>{table}{'<br>'.join(lines)}"


def plan(
    recipe: Recipe | Preset,
    gpus: int | None = None,
    gpu: str = "A100-80G",
    share: float | None = None,
    dollars_per_hour: float | None = None,
) -> Plan | Walk:
    """Estimate what a recipe or a whole preset needs on `gpus` of a kind in GPUS ("cpu": here).

    Nothing is downloaded and no weight is read. Lengths are those of the samples if these and the
    tokenizer are on this machine, and otherwise like LLaVA-1.5's. The hours of LLaVA-1.5's four
    published runs are met within 15 % (docs/real_data.md).

    gpus: default 1; for a preset, as few of 1, 2, 4 and 8 as its stages fit into. share: of the
    GPUs' peak rate that training reaches, recomputed activations included; None: 0.5, for LoRA
    0.33, for compiled models 0.48. dollars_per_hour: of one GPU. ValueError names the known kinds,
    and a batch that cannot be divided.
    """
    if not isinstance(recipe, Preset):
        one = plan_recipe(recipe, 1 if gpus is None else gpus, gpu, share)
        return replace(one, dollars_per_hour=dollars_per_hour)
    if gpus is None:
        possible = [n for n in NUMBERS if not any(stage.global_batch % n for stage in recipe)]
        possible = possible[:1] if "cpu" in (gpu, recipe.base.device) else possible
        # Base needs the most memory; it decides.
        fitting = (n for n in possible if plan_recipe(recipe.base, n, gpu, share).fits)
        gpus = next(fitting, possible[-1])
    stages = {
        name: plan_recipe(stage, gpus, gpu, share) for name, stage in recipe._asdict().items()
    }
    return Walk(stages, dollars_per_hour)
