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
from vflan.training.memory import plan

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
    for number, gpu in enumerate(gpus()):
        yield f"GPU {number}: {gpu.name}, {gpu.total_memory / GB:.1f} GB"
    if not gpus():
        yield "no GPU: the preset tiny needs none"
    memory = psutil.virtual_memory()
    free = f"{memory.available / GB:.1f} of {memory.total / GB:.1f} GB of memory free"
    yield f"{os.cpu_count()} CPU cores, {free}"
    for name, path in (("project", output_path("")), ("cache", CACHE)):
        # the folder itself may not exist yet
        existing = next(place for place in (path, *path.absolute().parents) if place.exists())
        free = shutil.disk_usage(existing).free / GB
        yield f"disk of the {name} ({shown(path)}): {free:.1f} GB free"


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
        lines.append(
            _missing_memory(base if has_samples else config.replace(base, num_samples=rows))
        )
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
    worlds = (output_path(world) for world in ("data/tiny", "data/frozen"))
    is_drawn = any(output_path(path).is_relative_to(world) for world in worlds)
    return DRAWN if is_drawn else "data/README.md says where it comes from"


def _missing_packages(recipe: Recipe) -> Iterator[str]:
    is_needed = {
        "bitsandbytes": recipe.bits < 16 or recipe.optimizer == "adamw_8bit",
        "deepspeed": "zero" in recipe.sharding,
    }
    for name in is_needed:
        if is_needed[name] and not find_spec(name):
            yield f"{name} is not installed: pip install {name}"


def _missing_memory(recipe: Recipe) -> str:
    """What a stage needs beyond this machine's GPUs; without one, an fp32 recipe uses the CPU."""
    here, hint = gpus(), "vflan.plan(recipe) says what would make it smaller"
    if not here and recipe.precision == "fp32":
        needs, free = plan(recipe, gpu="cpu").needs, psutil.virtual_memory().available
        sentence = f"{recipe.name} needs {needs / GB:.1f} GB, {free / GB:.1f} are free; {hint}"
        return "" if needs < free else sentence
    smallest = min((gpu.total_memory for gpu in here), default=0)
    if here and plan(recipe, len(here), REFERENCE_GPU).needs <= smallest:
        return ""
    numbers = [number for number in (1, 8) if recipe.global_batch % number == 0]
    plans = (plan(recipe, number, REFERENCE_GPU) for number in numbers)
    needs = "more than 8 GPUs of 80 GB"
    if fitting := next((each for each in plans if each.fits), None):
        needs = f"{fitting.needs / GB:.0f} GB on each of {fitting.gpus} GPUs"
    size = f" of {smallest / GB:.0f} GB" if here else ""
    return f"{recipe.name} needs {needs}, here are {len(here)}{size}; {hint}"
