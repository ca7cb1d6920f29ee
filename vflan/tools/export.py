"""A run for others: a folder that Hugging Face's pipeline and vLLM answer from, with its cards, and the way to the hub.

Every figure of a card comes from the files of the run and of those it was trained from (recipe.json, init.json, mixture.json,
done.json, scores.csv) and from data/tasks.csv, which knows the licences of Vision-Flan's sources as far as they are stated.
"""

import os
import re
import shlex
import shutil
import tempfile
from html import escape
from pathlib import Path

import pandas as pd
from huggingface_hub import (
    DatasetCard,
    DatasetCardData,
    EvalResult,
    HfApi,
    ModelCard,
    ModelCardData,
    constants,
    errors,
    get_token,
)

from vflan.config import (
    DEFAULTS,
    ROOT,
    SHIPPED,
    Recipe,
    commit,
    output_path,
    read_json,
    resolve,
    shown,
    write_json,
)
from vflan.data.download import SETS
from vflan.data.mixture import released_tasks
from vflan.evaluation.benchmarks import BENCHMARKS
from vflan.io import whole_folder
from vflan.training.checkpointing import versions

PAPER = "[Vision-Flan](https://arxiv.org/abs/2402.11690) (Xu et al., 2024)"
TINY = "data/tiny/"  # the mini world's files and backbones
BACKBONES = {  # licences as their owners state them; CLIP's weights have none of their own on the hub
    "lmsys/vicuna-7b-v1.5": "Llama 2 Community License",
    "lmsys/vicuna-13b-v1.5": "Llama 2 Community License",
    "openai/clip-vit-large-patch14-336": "MIT, that of OpenAI's CLIP repository",
}
FLAGS = {
    "faces": "Faces or identities are the subject of {} of the tasks.",
    "benchmark": "{} of the tasks come from a benchmark's own validation or test set: scores there measure less than they seem to.",
    "overlaps": "{} of the tasks are kin of the sets that the papers evaluate forgetting on.",
}


def export(run, folder, merge: bool = True) -> Path:
    """`Run.export`: the model (or with merge=False the adapter) with processor, README.md and data/README.md in `folder`."""
    folder = _write(run, output_path(folder), merge, Path(folder).name)
    begun = read_json(run.folder / "init.json").get("init") or "its bare backbones"
    print(serve_command(folder) if merge else f"The adapter of {run.name}; it belongs on {begun}.")
    return folder


def _write(run, folder, merge, name, copy=shutil.copy2):
    recipe, begun = run.recipe, read_json(run.folder / "init.json").get("init")
    source = run.folder / ("model" if merge else "adapter")
    if not source.is_dir():
        why = (
            "it was not tuned with LoRA"
            if not recipe.lora_r
            else "it was trained before adapters were kept"
        )
        raise ValueError(f"{run.name} has no adapter: {why}; export it with merge=True.")
    with whole_folder(folder, folder.with_name(f".{folder.name}.part")) as part:
        shutil.copytree(source, part, copy_function=copy, dirs_exist_ok=True)
        processor = run.processor()
        processor.save_pretrained(part)
        processor.image_processor.save_pretrained(
            part
        )  # preprocessor_config.json, for transformers 4 and vLLM
        if not merge:
            config = read_json(part / "adapter_config.json")
            write_json(
                part / "adapter_config.json",
                config | dict(base_model_name_or_path=begun and f"{begun}/model"),
            )
        write_dataset_card(run, part / "data")
        model_card(run, name, merge).save(part / "README.md")
    return folder


def push(run, repo: str, private: bool = True, merge: bool = True) -> str:
    """`Run.push`: one commit on the hub (or on the mirror that HF_ENDPOINT names)."""
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repo):
        raise ValueError(f"{repo!r}: the hub wants user/name.")
    if not get_token():
        raise PermissionError(
            "The hub wants a token that may write: set HF_TOKEN, or run `hf auth login`."
        )
    api = HfApi(endpoint=(os.environ.get("HF_ENDPOINT") or constants.ENDPOINT).rstrip("/"))
    with tempfile.TemporaryDirectory(dir=run.folder, prefix=".push-") as scratch:
        folder = _write(run, Path(scratch) / "folder", merge, repo, copy=_linked)
        try:
            page = api.create_repo(repo, private=private, exist_ok=True)
            api.upload_folder(
                repo_id=repo, folder_path=folder, commit_message=f"{run.name}, by vflan"
            )
        except errors.OfflineModeIsEnabled as trouble:
            raise ConnectionError(f"{api.endpoint} cannot be reached: {trouble}") from None
        except errors.HTTPError as trouble:  # all that goes wrong on the way
            status = getattr(getattr(trouble, "response", None), "status_code", None)
            if status in (401, 403):
                raise PermissionError(
                    f"{api.endpoint} does not let this token write to {repo}."
                ) from None
            reason = str(trouble).strip().split("\n")[0]
            raise ConnectionError(
                f"{api.endpoint} cannot be reached, or refused ({reason}); push again."
            ) from None
    print(
        serve_command(repo, folder_length(run.folder / "model"))
        if merge
        else f"The adapter is at {page}."
    )
    return str(page)


def _linked(source, target):
    """Weights are read only, and may have 27 GB: for an upload they need not be copied."""
    if Path(source).suffix != ".safetensors":
        return shutil.copy2(source, target)
    try:
        return os.link(source, target)
    except OSError:  # a file system without hard links
        return shutil.copy2(source, target)


def folder_length(folder: Path) -> int:
    """The most tokens, the picture's included, that the language model in a folder can hold."""
    return read_json(Path(folder) / "config.json")["text_config"]["max_position_embeddings"]


def serve_command(model, length: int | None = None) -> str:
    """The line that serves an exported folder (or a hub id) with vLLM; `vflan.ServedModel` then asks it.

    The chat template loops over the parts of a message, which is vLLM's format `openai`; one picture a conversation, as trained.
    """
    name = Path(model).name
    command = [
        "vllm",
        "serve",
        str(model),
        "--served-model-name",
        name,
        "--limit-mm-per-prompt",
        '{"image": 1}',
    ]
    command += [
        "--max-model-len",
        str(length or folder_length(model)),
        "--chat-template-content-format",
        "openai",
    ]
    return shlex.join(command)


def lineage(folder) -> list[Path]:
    """The folders of the runs that a run was trained from, oldest first and itself last, as far as they are still there."""
    found = [Path(folder)]
    while begun := read_json(found[0] / "init.json").get("init"):
        if resolve(begun) in found or not (resolve(begun) / "recipe.json").is_file():
            break
        found.insert(0, resolve(begun))
    return found


# ---------------------------------------------------------------------------------------------------------- the two cards


def model_card(run, name: str, merged: bool = True) -> ModelCard:
    """README.md of an exported run in the hub's format: use, stages, data and licences, scores, limits, versions."""
    stages = [
        (folder, Recipe.from_dict(read_json(folder / "recipe.json")))
        for folder in lineage(run.folder)
    ]
    recipe, tiny = run.recipe, _is_tiny(run.folder)
    files = [
        file["file"]
        for folder, _ in stages
        for file in read_json(folder / "mixture.json").get("files", [])
    ]
    scores = _scores(run)
    results = [
        EvalResult(
            "image-text-to-text",
            row.benchmark,
            BENCHMARKS[row.benchmark].paper or row.benchmark,
            row.metric,
            row.value,
        )
        for row in scores.itertuples()
    ]
    backbones = [recipe.vision_tower, recipe.language_model]
    data = ModelCardData(
        language="en",
        library_name="transformers" if merged else "peft",
        pipeline_tag="image-text-to-text",
        tags=["llava", "vision-flan", "visual-instruction-tuning", "vflan"],
        base_model=[model for model in backbones if _on_hub(model)] or None,
        datasets=list(dict.fromkeys(filter(None, (_origin(file)[0] for file in files)))) or None,
        model_name=name if results else None,
        eval_results=results or None,
        **_licence(tiny),
    )
    values = {key: value for key, value in recipe.to_dict().items() if value != DEFAULTS.get(key)}
    made = _table(
        [
            "run",
            "stage",
            "rows",
            "tasks",
            "steps",
            "tuned",
            "learning rate",
            "samples a step",
            "first loss",
            "last loss",
        ],
        [_stage_row(folder, stage) for folder, stage in stages],
    )
    begun = read_json(stages[0][0] / "init.json").get("init")
    made += f"\n\nThe first of these began with the weights of `{_public(begun)}`." if begun else ""
    used = [
        f"- {_cell(_public(model))}: {BACKBONES.get(model, _own(model))}" for model in backbones
    ]
    world = (
        "the drawn pictures of a generated mini world, of 48 pixels a side"
        if tiny
        else "the sets named below"
    )
    content = f"""
# {_cell(name)}

A model of LLaVA-1.5's architecture (CLIP, a two-layer projector, a Llama) after stage `{recipe.stage}` of {PAPER}: visual
instruction tuning on human-labelled tasks, then on a few conversations. Made with vflan from {world}.

## Use

{_USE.format(name=name) if merged else _ADAPTER.format(name=name)}
## How it was made

{made}

The recipe of the last stage, as far as it differs from vflan's defaults:

{_table(["field", "value"], [[key, _public(value)] for key, value in values.items()])}

## Data and licences

{chr(10).join(used)}

{chr(10).join(_data_lines(folder) for folder, _ in stages)}

This is what could be found out, not legal advice. [data/README.md](data/README.md) lists the tasks of the last stage.

## Scores

{_score_lines(scores)}

## Intended use and limits

For research on visual instruction tuning. {_TINY if tiny else _LARGE} It was tuned on one picture a conversation and at most
{recipe.max_length} tokens, mostly in English; it was not made safe for the public in any way.

## Versions

vflan's code {versions()["code"]}{f" at {commit()}" if commit() else ""}, PyTorch {versions()["torch"]}.
"""
    return ModelCard(f"---\n{data.to_yaml()}\n---\n{content}")


def dataset_card(run) -> DatasetCard:
    """A card for the rows that a run drew (its mixture.json): files, tasks, rows of each, sources and licences."""
    mixture, recipe, known = read_json(run.folder / "mixture.json"), run.recipe, released_tasks()
    if not mixture:
        raise FileNotFoundError(
            f"{shown(run.folder)} has no mixture.json; runs trained by an earlier version kept none."
        )
    named = {task: rows for task, rows in mixture["tasks"].items() if task}
    drawn = (
        "num_tasks",
        "per_task",
        "exclude",
        "num_samples",
        "temperature",
        "task_weights",
        "more_samples",
        "seed",
    )
    drawn = {key: recipe.to_dict()[key] for key in drawn}
    sizes = {
        1_000: "n<1K",
        10_000: "1K<n<10K",
        100_000: "10K<n<100K",
        1_000_000: "100K<n<1M",
        10**7: "1M<n<10M",
    }
    data = DatasetCardData(
        language="en",
        pretty_name=f"The mixture of {run.name}",
        task_categories=["image-text-to-text", "visual-question-answering"],
        size_categories=next(size for most, size in sizes.items() if mixture["rows"] < most),
        source_datasets=[repo for file in mixture["files"] if (repo := _origin(file["file"])[0])]
        or None,
        tags=["visual-instruction-tuning", "vflan"],
        **_licence(_is_tiny(run.folder)),
    )
    rows = []
    for task, count in sorted(named.items(), key=lambda pair: (-pair[1], pair[0])):
        about = known.get(task, {})
        rows.append(
            [
                task,
                count,
                about.get("source"),
                about.get("licence") or "not stated",
                about.get("flags"),
            ]
        )
    tasks = (
        _table(["task", "rows", "source", "licence", "flags"], rows)
        if rows
        else "Its rows name no task."
    )
    content = f"""
# The mixture of {_cell(run.name)}

{mixture["rows"]:,} rows in LLaVA's format, drawn by vflan for stage `{recipe.stage}`. The rows themselves are not here: they are drawn
again from the files below by the recipe, in the same order on any machine (hash of the order: `{mixture["order"]}`).

## Files

{_data_lines(run.folder)}

## How they were drawn

{_table(["field", "value"], [[key, _public(value)] for key, value in drawn.items()])}

## Tasks

{tasks}
"""
    return DatasetCard(f"---\n{data.to_yaml()}\n---\n{content}")


def write_dataset_card(run, folder) -> Path:
    """README.md and mixture.json of a run's data in `folder`; nothing, for a run that kept no mixture.json."""
    folder = Path(folder)
    if (run.folder / "mixture.json").is_file():
        folder.mkdir(parents=True, exist_ok=True)
        dataset_card(run).save(folder / "README.md")
        mixture = read_json(run.folder / "mixture.json")
        files = [file | dict(file=_public(file["file"])) for file in mixture["files"]]
        write_json(folder / "mixture.json", mixture | dict(files=files))
    return folder


_USE = """```python
from transformers import pipeline

ask = pipeline("image-text-to-text", model="{name}")
picture = {{"type": "image", "image": "picture.png"}}
question = {{"type": "text", "text": "What is in the picture?"}}
said = ask(text=[{{"role": "user", "content": [picture, question]}}], max_new_tokens=128, return_full_text=False)
print(said[0]["generated_text"])
```
"""
_ADAPTER = """```python
from peft import PeftModel

model = PeftModel.from_pretrained(base, "{name}")  # base: the model that the run began with, in 16 bits
```
"""
_TINY = "It knows drawn shapes and letters and nothing else: it is for learning how the experiments work, not for photographs."
_LARGE = (
    "Like the models it is made of, it says things that are not in the picture, inherits their biases, reads only what a "
    "picture of its tower's size shows, and must not decide anything about people."
)


def _stage_row(folder, recipe):
    done, mixture = read_json(folder / "done.json"), read_json(folder / "mixture.json")
    tasks = len([task for task in mixture.get("tasks", {}) if task]) or None
    tuned = ", ".join(recipe.tune) + (f" (LoRA, r {recipe.lora_r})" if recipe.lora_r else "")
    tuned += f", {recipe.bits} bits" if recipe.bits < 16 else ""
    losses = [
        None if done.get(key) is None else f"{done[key]:.3f}" for key in ("first_loss", "last_loss")
    ]
    return [
        recipe.name,
        recipe.stage,
        done.get("rows"),
        tasks,
        done.get("steps"),
        tuned,
        recipe.lr,
        recipe.global_batch,
        *losses,
    ]


def _data_lines(folder):
    """The files of a run with their owners' terms; of Vision-Flan, the tasks by licence and what their flags mean."""
    mixture, known = read_json(folder / "mixture.json"), released_tasks()
    if not mixture:
        return f"{_cell(folder.name)}: which rows it was trained on was not kept."
    files = [[_public(f["file"]), f["rows"], *_origin(f["file"])] for f in mixture["files"]]
    lines = [
        f"Files of run {_cell(folder.name)}:",
        "",
        _table(["file", "rows", "dataset", "licence"], files),
        "",
    ]
    by_licence, flagged = {}, dict.fromkeys(FLAGS, 0)
    for task, rows in mixture["tasks"].items():
        if about := known.get(task):
            entry = by_licence.setdefault(about["licence"] or "not stated", [0, 0, set()])
            entry[0], entry[1] = entry[0] + 1, entry[1] + rows
            entry[2].add(about["source"])
            for flag in set(about["flags"].split()) & set(FLAGS):
                flagged[flag] += 1
    if by_licence:
        rows = [
            [name, *entry[:2], ", ".join(sorted(entry[2]))]
            for name, entry in sorted(by_licence.items())
        ]
        lines += ["Its released tasks, by the licence that their source states:", ""]
        lines += [_table(["licence", "tasks", "rows", "sources"], rows), ""]
    return "\n".join(
        [*lines, *(f"{FLAGS[flag].format(count)}" for flag, count in flagged.items() if count)]
    )


def _scores(run) -> pd.DataFrame:
    """The headline of each benchmark that this run was evaluated on."""
    if not (run.folder / "scores.csv").is_file():
        return pd.DataFrame(columns=["benchmark", "metric", "value"])
    scores = pd.read_csv(run.folder / "scores.csv")
    wanted = scores.benchmark.map(
        lambda name: BENCHMARKS[name].headline if name in BENCHMARKS else None
    )
    return scores[(scores.run == run.name) & (scores.metric == wanted)].dropna(subset="value")


def _score_lines(scores):
    if scores.empty:
        return "It was not evaluated."
    rows = []
    for r in scores.itertuples():
        judge = (
            r.judge if isinstance(r.judge, str) else ""
        )  # NaN where a rule of the benchmark reads the answers
        rows.append(
            [
                r.benchmark,
                r.metric,
                f"{r.value:.1f}",
                f"{r.low:.1f} to {r.high:.1f}",
                f"{r.baseline:.1f}",
                r.n,
                judge,
            ]
        )
    columns = [
        "benchmark",
        "metric",
        "value",
        "95 % interval",
        "majority answer",
        "questions",
        "judge",
    ]
    return f"{_table(columns, rows)}\n\nOn a scale of 0 to 100. The intervals are over the benchmark's pictures, for one training."


def _origin(file):
    """(id on the hub, licence) of a samples file, as far as vflan knows it by its name."""
    for known in SETS.values():
        if Path(file).name in known.files:
            return known.repo, known.licence
    return (None, "Apache-2.0 (generated)") if _tiny_path(file) else (None, "not known to vflan")


def _own(model):
    return (
        "Apache-2.0 (pretrained on the mini world)" if _tiny_path(model) else "not known to vflan"
    )


def _licence(tiny):
    if tiny:
        return dict(license="apache-2.0")
    return dict(
        license="other",
        license_name="sources-keep-their-terms",
        license_link="README.md#data-and-licences",
    )


def _is_tiny(folder):
    """Whether every file and backbone that went into a run is the mini world's."""
    stages = [read_json(stage / "recipe.json") for stage in lineage(folder)]
    used = [
        stage[key].split("#")[0]
        for stage in stages
        for key in ("vision_tower", "language_model", "samples")
    ]
    used += [file.split("#")[0] for stage in stages for file in stage.get("more_samples", [])]
    return all(map(_tiny_path, used))


def _tiny_path(path):
    return any(resolve(path).is_relative_to(home / TINY) for home in (ROOT, SHIPPED))


def _on_hub(model):
    """Whether a backbone was named by its id on the hub."""
    return not Path(model).is_absolute() and model.count("/") == 1 and not resolve(model).exists()


def _public(value):
    """A recipe's value for strangers: of a file elsewhere on this machine only its name."""
    if isinstance(value, (list, tuple)):
        return ", ".join(str(_public(each)) for each in value)
    return (
        Path(value).name
        if isinstance(value, str) and Path(value).expanduser().is_absolute()
        else value
    )


def _cell(value):
    """Text of others in a card: no markup, no table cells of its own."""
    return "" if value is None else escape(" ".join(str(value).split())).replace("|", "\\|")


def _table(columns, rows):
    lines = [map(_cell, row) for row in [columns, *rows]]
    lines = [f"| {' | '.join(line)} |" for line in lines]
    return "\n".join([lines[0], f"|{' --- |' * len(columns)}", *lines[1:]])
