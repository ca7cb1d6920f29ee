"""What this machine has, and what each preset would still need here, with what to do about it.

    vflan doctor                # everything
    vflan doctor tiny qlora_7b  # only these presets, which can be .py files

Nothing is downloaded. The exit status is 0 if the preset `tiny` can run here, else 1.
"""

from __future__ import annotations

import os
import platform
import shutil
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

import psutil
import torch
from huggingface_hub import try_to_load_from_cache

from vflan import config
from vflan.config import CACHE, Recipe, output_path, preset, preset_names, resolve, shown
from vflan.data.download import SETS
from vflan.evaluation.benchmarks import BENCHMARKS
from vflan.tools.parameters import in_mini_world
from vflan.training.gpus import driver_version, find_problem
from vflan.training.memory import Plan, plan_recipe

INSTALL = "pip install -r requirements.lock"
PACKAGES = {  # and what it means if one is missing
    **dict.fromkeys(("torch", "transformers", "peft", "accelerate", "datasets"), INSTALL),
    "bitsandbytes": "only for QLoRA and 8-bit AdamW",
    "deepspeed": "only for sharding='zero2' and 'zero3'",
    "flash-attn": "only for speed: PyTorch's attention works without it",
}
DRAWN = "vflan.world.build_for(preset) draws it, as notebook 01 does"
REFERENCE_GPU, GB = "A100-80G", 1e9  # the GPU for which needs are reported, and their unit


def examine(presets: list[str] | None = None) -> int:
    """Print what this machine has and what each preset (default: all) needs; 0 if tiny can run."""
    print("This machine", *describe_machine(), sep="\n  ")
    print("\nReal data", *describe_data(), sep="\n  ")
    for name in presets or preset_names():
        try:
            lines = missing(name)
        except (OSError, ValueError) as error:  # no such preset, or a damaged file
            lines = [str(error)]
        print(f"\n{name}: {'missing' if lines else 'nothing is missing'}", *lines, sep="\n  ")
    return int(any(DRAWN not in line for line in missing("tiny")))


def describe_machine() -> Iterator[str]:
    """Versions, devices, memory and disk, a line each."""
    yield f"python {platform.python_version()}, {platform.system()} {platform.machine()}"
    for name, meaning in PACKAGES.items():
        try:
            yield f"{name} {version(name)}"
        except PackageNotFoundError:
            yield f"{name}: not installed; {meaning}"
    yield f"NVIDIA driver {driver_version() or 'none'}, torch built for CUDA {torch.version.cuda}"
    for number, gpu in enumerate(gpus()):
        # Before compute capability 8, a GPU has no bf16 of its own.
        slow = "" if gpu.major >= 8 else "; it emulates bf16, slowly"
        yield f"GPU {number}: {gpu.name}, {gpu.total_memory / GB:.1f} GB{slow}"
    if problem := find_problem():
        yield f"no usable GPU (the preset tiny needs none): {problem}"
    memory = psutil.virtual_memory()
    free = f"{memory.available / GB:.1f} of {memory.total / GB:.1f} GB of memory free"
    yield f"{os.cpu_count()} CPU cores, {free}"
    for name, path in (("project", output_path("")), ("cache", CACHE)):
        yield f"disk of the {name} ({shown(path)}): {_free_disk(path) / GB:.1f} GB free"


def describe_data() -> Iterator[str]:
    """For each real data set: its folder, or the command that downloads it."""
    for name, known in SETS.items():
        absent = [file for file in known.files if not list(resolve(known.folder).glob(file))]
        lacks = f"{name}: lacks {absent[0]}; vflan download {name}" if absent else ""
        yield lacks or f"{name}: found in {known.folder}"


def gpus() -> list:
    """The properties of each GPU of this machine."""
    return [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]


def missing(name: str) -> list[str]:
    """What a preset needs here and does not have, a line each with what to do.

    Empty if its three stages can be trained and evaluated. Raises ValueError for no such preset.
    """
    lines, recipes = [], preset(name)
    for recipe in recipes:
        lines += [_missing_backbone(recipe.vision_tower), _missing_backbone(recipe.language_model)]
        lines += [*_missing_samples(recipe), *_missing_packages(recipe)]
    base = recipes.base  # it needs the most memory of the three
    try:
        # without the samples the number of rows is unknown; it matters only for the hours
        rows = base.num_samples or base.global_batch
        has_samples = resolve(base.samples).exists()
        known = base if has_samples else config.replace(base, num_samples=rows)
        lines += _missing_memory(known)
    except OSError:
        pass  # a backbone is missing, and a line above says so
    except ValueError as error:
        lines.append(f"{base.name}: {error}")
    if not any((resolve(base.benchmarks) / benchmark).is_dir() for benchmark in BENCHMARKS):
        problem = f"{base.benchmarks}: no benchmark there, so nothing can be scored"
        lines.append(f"{problem}; {_where_from(base.benchmarks)}")
    return list(dict.fromkeys(filter(None, lines)))  # the stages share most lines


def _missing_backbone(source: str) -> str:
    try:
        folder = Path(config.weights_source(source))
    except FileNotFoundError as error:
        return str(error)
    if folder.is_dir():
        weights = any(folder.glob("*.safetensors")) or any(folder.glob("*.bin"))
        if weights and (folder / "config.json").is_file():
            return ""
        return f"{source}: config.json and weights are not both in it; get them from one place"
    if isinstance(try_to_load_from_cache(source, "config.json"), str):
        return ""
    problem = f"{source} is not in the hub's cache"
    return f"{problem}: hf download {source}, or training downloads it when it begins"


def _missing_samples(recipe: Recipe) -> Iterator[str]:
    path = resolve(recipe.samples)
    sets = {name: known for name, known in SETS.items() if resolve(known.folder) == path.parent}
    if not path.exists():
        names = [name for name, known in sets.items() if path.name in known.files]
        remedy = f"vflan download {names[0]}" if names else _where_from(recipe.samples)
        yield f"{recipe.samples}: not there; {remedy}"
    if not resolve(recipe.images).exists() and not any(path.parent.glob("image*.zip")):
        remedies = [known.then for known in sets.values()] or [_where_from(recipe.images)]
        yield f"{recipe.images}: no pictures there; {remedies[0]}"


def _where_from(path: str) -> str:
    return DRAWN if in_mini_world(path) else "data/README.md says where it comes from"


def _missing_packages(recipe: Recipe) -> Iterator[str]:
    is_needed = {
        "bitsandbytes": recipe.bits < 16 or recipe.optimizer == "adamw_8bit",
        "deepspeed": "zero" in recipe.sharding,
    }
    for name in is_needed:
        if is_needed[name] and not find_spec(name):
            yield f"{name} is not installed: pip install {name}"


def _missing_memory(recipe: Recipe) -> Iterator[str]:
    """What a stage needs beyond this machine's GPUs, main memory and disk."""
    here, hint = gpus(), "vflan.plan(recipe) says what would make it smaller"
    memory = psutil.virtual_memory()
    # Without a GPU, only an fp32 recipe is trained, on the CPU.
    if recipe.device == "cpu" or not here and recipe.precision == "fp32":
        planned, free = plan_recipe(recipe, 1, "cpu", None), memory.available
        if planned.needs >= free:
            sentence = f"{recipe.name} needs {planned.needs / GB:.1f} GB"
            yield f"{sentence}, {free / GB:.1f} are free; {hint}"
        yield from _missing_disk(planned)
        return
    smallest = min((gpu.total_memory for gpu in here), default=0)
    planned = plan_recipe(recipe, len(here), REFERENCE_GPU, None) if here else None
    if not here or planned.needs > smallest:
        numbers = [number for number in (1, 8) if recipe.global_batch % number == 0]
        plans = [plan_recipe(recipe, number, REFERENCE_GPU, None) for number in numbers]
        planned = next((each for each in plans if each.fits), plans[-1])
        several = f"{planned.gpus} GPUs" if planned.gpus > 1 else ""
        needs = f"{planned.needs / GB:.0f} GB on {f'each of {several}' if several else 'one GPU'}"
        needs = needs if planned.fits else f"more than {several or 'one GPU'} of 80 GB"
        size = f" of {smallest / GB:.0f} GB" if here else ""
        yield f"{recipe.name} needs {needs}, here are {len(here)}{size}; {hint}"
    if planned.host > memory.total:
        sentence = f"{recipe.name} needs {planned.host / GB:.0f} GB of main memory"
        count = f"with {planned.gpus} processes" if planned.gpus > 1 else "to load the model"
        yield f"{sentence} {count}, this machine has {memory.total / GB:.0f}"
    yield from _missing_disk(planned)


def _missing_disk(planned: Plan) -> Iterator[str]:
    free, needed = _free_disk(output_path(planned.recipe.runs)), sum(planned.disk.values())
    if needed > free:
        sentence = f"{planned.recipe.name} needs {needed / GB:.0f} GB of disk while it trains"
        yield f"{sentence}, {free / GB:.0f} are free; a larger save_every writes fewer checkpoints"


def _free_disk(path: Path) -> int:
    # the folder itself may not exist yet
    existing = next(place for place in (path, *path.absolute().parents) if place.exists())
    return shutil.disk_usage(existing).free
