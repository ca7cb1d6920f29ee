"""The cards of an exported run, in the hub's format: one for the model, one for its data.

Every figure comes from the files of the run and of the runs before it (recipe.json, init.json,
mixture.json, done.json, scores.csv), and from data/tasks.csv, which has the licences of
Vision-Flan's sources as far as they are stated. The words are in templates/*_card.md.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd
from huggingface_hub import DatasetCard, DatasetCardData, EvalResult, ModelCard, ModelCardData
from jinja2 import Template

from vflan import config
from vflan.analysis.tables import markdown
from vflan.config import DEFAULTS, Recipe, commit, read_json, resolve, shown
from vflan.data.download import SETS
from vflan.data.mixture import released_tasks
from vflan.escape import for_markdown
from vflan.evaluation.answer_cache import read_scores
from vflan.evaluation.benchmarks import BENCHMARKS
from vflan.tools.parameters import in_mini_world
from vflan.training.checkpointing import versions

if TYPE_CHECKING:
    from vflan.training.run import Run

TEMPLATES = Path(__file__).parent / "templates"
# Licences as the owners state them; CLIP's weights have none of their own on the hub.
BACKBONES = {
    "lmsys/vicuna-7b-v1.5": "Llama 2 Community License",
    "lmsys/vicuna-13b-v1.5": "Llama 2 Community License",
    "HuggingFaceTB/SmolLM2-135M-Instruct": "Apache-2.0",
    "openai/clip-vit-large-patch14-336": "MIT, that of OpenAI's CLIP repository",
    "openai/clip-vit-base-patch16": "MIT, that of OpenAI's CLIP repository",
}
# The hub's size classes, by the number of digits above three.
SIZES = ("n<1K", "1K<n<10K", "10K<n<100K", "100K<n<1M", "1M<n<10M", "10M<n<100M", "100M<n<1B")
DRAWING_FIELDS = (
    *("num_tasks", "per_task", "exclude", "num_samples", "temperature", "task_weights"),
    *("more_samples", "seed"),
)


def lineage(folder: Path) -> list[Path]:
    """The folders of the runs that a run was trained from, oldest first, and its own at the end.

    It stops at a run whose folder is not there any more.
    """
    folders = [Path(folder)]
    while begun := read_json(folders[0] / "init.json").get("init"):
        earlier = resolve(begun)
        if earlier in folders or not (earlier / "recipe.json").is_file():
            break
        folders.insert(0, earlier)
    return folders


def model_card(run: Run, name: str, merged: bool = True) -> ModelCard:
    """README.md of an exported run: use, stages, data and licences, scores, limits, versions.

    name: the folder or the hub id by which the card's code loads the model.
    merged: a whole model, not an adapter.
    """
    folders, recipe, scores = lineage(run.folder), run.recipe, _headline_scores(run)
    changed = {key: value for key, value in recipe.to_dict().items() if value != DEFAULTS.get(key)}
    backbones = (recipe.vision_tower, recipe.language_model)
    return ModelCard.from_template(
        _model_metadata(run, name, merged, scores),
        TEMPLATES / "model_card.md",
        name=name,
        merged=merged,
        recipe=recipe,
        is_tiny=_is_tiny(run.folder),
        stages=[_stage_row(folder) for folder in folders],
        first_weights=_public(read_json(folders[0] / "init.json").get("init")),
        changed_fields=_public_fields(changed),
        backbones=[(_public(model), _backbone_licence(model)) for model in backbones],
        data_files=[_files_used(folder) for folder in folders],
        scores=[_score_row(score) for score in scores.itertuples()],
        versions=versions(),
        commit=commit(),
        text=for_markdown,
        table=_table,
    )


def _model_metadata(run, name, merged, scores):
    results = [
        EvalResult(
            task_type="image-text-to-text",
            dataset_type=score.benchmark,
            # a benchmark that another process registered is not known here
            dataset_name=getattr(BENCHMARKS.get(score.benchmark), "paper", "") or score.benchmark,
            metric_type=score.metric,
            metric_value=score.value,
        )
        for score in scores.itertuples()
    ]
    mixtures = [read_json(folder / "mixture.json") for folder in lineage(run.folder)]
    files = [file["file"] for mixture in mixtures for file in mixture.get("files", [])]
    backbones = (run.recipe.vision_tower, run.recipe.language_model)
    return ModelCardData(
        language="en",
        library_name="transformers" if merged else "peft",
        pipeline_tag="image-text-to-text",
        tags=["llava", "vision-flan", "visual-instruction-tuning", "vflan"],
        base_model=[model for model in backbones if _is_on_hub(model)] or None,
        datasets=_datasets(files),
        model_name=name if results else None,
        eval_results=results or None,
        **_licence(run.folder),
    )


def dataset_card(run: Run) -> DatasetCard:
    """A card for the rows that a run drew: files, tasks, rows of each, sources and licences.

    Raises FileNotFoundError if the run has no mixture.json.
    """
    mixture, released = read_json(run.folder / "mixture.json"), released_tasks()
    if not mixture:
        raise FileNotFoundError(
            f"{shown(run.folder)} has no mixture.json; an earlier version of vflan wrote none."
        )
    metadata = DatasetCardData(
        language="en",
        pretty_name=f"The mixture of {run.name}",
        task_categories=["image-text-to-text", "visual-question-answering"],
        size_categories=SIZES[max(0, len(str(mixture["rows"])) - 3)],
        source_datasets=_datasets(file["file"] for file in mixture["files"]),
        tags=["visual-instruction-tuning", "vflan"],
        **_licence(run.folder),
    )
    tasks = []
    named = [(task, rows) for task, rows in mixture["tasks"].items() if task]
    for task, rows in sorted(named, key=lambda pair: (-pair[1], pair[0])):
        about = released.get(task, {})
        licence = about.get("licence") or "not stated"
        tasks.append([task, rows, about.get("source"), licence, about.get("flags")])
    fields = run.recipe.to_dict()
    return DatasetCard.from_template(
        metadata,
        TEMPLATES / "dataset_card.md",
        run=run.name,
        rows=f"{mixture['rows']:,}",
        stage=run.recipe.stage,
        order=mixture["order"],
        data_files=_files_used(run.folder),
        drawn=_public_fields({key: fields[key] for key in DRAWING_FIELDS}),
        tasks=tasks,
        text=for_markdown,
        table=_table,
    )


def write_dataset_card(run: Run, folder: Path) -> None:
    """Write README.md and mixture.json of a run's data to `folder`, if it has a mixture.json."""
    mixture = read_json(run.folder / "mixture.json")
    if mixture:
        folder.mkdir(parents=True, exist_ok=True)
        dataset_card(run).save(folder / "README.md")
        files = [file | dict(file=_public(file["file"])) for file in mixture["files"]]
        config.write_json(folder / "mixture.json", mixture | dict(files=files))


# -------------------------------------------------------------------------- rows of the tables


def _stage_row(folder):
    recipe = Recipe.from_dict(read_json(folder / "recipe.json"))
    done, mixture = read_json(folder / "done.json"), read_json(folder / "mixture.json")
    tasks = sum(bool(task) for task in mixture.get("tasks", {})) or None
    tuned = ", ".join(recipe.tune)
    tuned += f" (LoRA, r {recipe.lora_r})" if recipe.lora_r else ""
    tuned += f", {recipe.bits} bits" if recipe.bits < 16 else ""
    losses = [done.get(key) for key in ("first_loss", "last_loss")]
    losses = [None if loss is None else f"{loss:.3f}" for loss in losses]
    work = [done.get("rows"), tasks, done.get("steps")]
    return [recipe.name, recipe.stage, *work, tuned, recipe.lr, recipe.global_batch, *losses]


def _headline_scores(run):
    """The rows of scores.csv with the headline metric of each benchmark; empty without scores."""
    if not (run.folder / "scores.csv").is_file():
        return pd.DataFrame(columns=["benchmark", "metric", "value"])
    scores = read_scores(run.folder / "scores.csv")
    headline = scores.benchmark.map({name: b.headline for name, b in BENCHMARKS.items()})
    # Another process may have registered a benchmark that this one does not know. Its headline is
    # not stored, so all its metrics are shown, except those of one category ("accuracy/star").
    is_unknown = headline.isna() & ~scores.metric.str.contains("/")
    rows = (scores.run == run.name) & ((scores.metric == headline) | is_unknown)
    return scores[rows].dropna(subset="value")


def _score_row(score):
    interval = f"{score.low:.1f} to {score.high:.1f}"
    # A model as judge is not asked about the majority answer.
    majority = None if pd.isna(score.baseline) else f"{score.baseline:.1f}"
    values = [f"{score.value:.1f}", interval, majority, score.n]
    return [score.benchmark, score.metric, *values, score.judge]


def _files_used(folder):
    """The files of a run with their owners' terms, as Markdown.

    For the released tasks of Vision-Flan also how many have which licence and which flag.
    """
    mixture, released = read_json(folder / "mixture.json"), released_tasks()
    files = mixture.get("files", [])
    licences, flags = {}, Counter()
    for task, rows in mixture.get("tasks", {}).items():
        if about := released.get(task):
            licence = about["licence"] or "not stated"
            licences.setdefault(licence, []).append((about["source"], rows))
            flags.update(set(about["flags"].split()))
    template = Template((TEMPLATES / "data_files.md").read_text(encoding="utf-8"))
    return template.render(
        run=folder.name,
        files=[[_public(file["file"]), file["rows"], *_origin(file["file"])] for file in files],
        licences=[
            [name, len(group), sum(n for _, n in group), ", ".join(sorted({s for s, _ in group}))]
            for name, group in sorted(licences.items())
        ],
        flags=flags,
        text=for_markdown,
        table=_table,
    )


# ---------------------------------------------------------------- origins, licences and markup


def _datasets(files):
    """The hub ids of samples files, each once; None if there are none."""
    return list(dict.fromkeys(filter(None, (_origin(file)[0] for file in files)))) or None


def _origin(file):
    """(hub id, licence) of a samples file, as far as vflan knows a file of that name."""
    for known in SETS.values():
        if Path(file).name in known.files:
            return known.repo, known.licence
    return None, "Apache-2.0 (generated)" if in_mini_world(file) else "not known to vflan"


def _backbone_licence(model):
    generated = "Apache-2.0 (pretrained on the mini world)"
    return BACKBONES.get(model, generated if in_mini_world(model) else "not known to vflan")


def _licence(folder):
    if _is_tiny(folder):
        return dict(license="apache-2.0")
    link = "README.md#data-and-licences"
    return dict(license="other", license_name="sources-keep-their-terms", license_link=link)


def _is_tiny(folder):
    """Whether all files and backbones of a run, and of those before it, are the mini world's."""
    recipes = [read_json(stage / "recipe.json") for stage in lineage(folder)]
    keys = ("vision_tower", "language_model", "samples")
    paths = [recipe[key] for recipe in recipes for key in keys]
    paths += [file for recipe in recipes for file in recipe.get("more_samples", [])]
    return all(in_mini_world(path.split("#")[0]) for path in paths)


def _is_on_hub(model):
    """Whether a backbone was named by its id on the hub."""
    return not Path(model).is_absolute() and model.count("/") == 1 and not resolve(model).exists()


def _public_fields(fields):
    return [[key, _public(value)] for key, value in fields.items()]


def _public(value):
    """A recipe's value for strangers: a file of this machine is given by its name only."""
    if isinstance(value, (list, tuple)):
        return ", ".join(str(_public(each)) for each in value)
    if isinstance(value, str) and Path(value).expanduser().is_absolute():
        return Path(value).name
    return value


def _table(columns, rows):
    return markdown(columns, [[for_markdown(value) for value in row] for row in rows])
