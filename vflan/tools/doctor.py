"""What this machine has, and what each preset would still need here, with what to do about it.

    vflan doctor                # everything
    vflan doctor tiny qlora_7b  # these presets only, a .py file among them

Nothing is downloaded. The exit status is 0 when the preset `tiny` can run here, else 1.
"""

import os
import platform
import shutil
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

import psutil
import torch
from huggingface_hub import try_to_load_from_cache

from vflan.config import (
    CACHE,
    Recipe,
    output_path,
    preset,
    preset_names,
    replace,
    resolve,
    shown,
    weights_source,
)
from vflan.data.download import SETS
from vflan.evaluation.benchmarks import BENCHMARKS
from vflan.training.memory import plan

PACKAGES = {  # and what it means when one is not there
    **dict.fromkeys(
        ("torch", "transformers", "peft", "accelerate", "datasets"),
        "pip install -r requirements.lock",
    ),
    "bitsandbytes": "only for QLoRA and 8-bit AdamW",
    "deepspeed": "only for sharding='zero2' and 'zero3'",
    "flash-attn": "only to be faster: attention is PyTorch's without it",
}
DRAWN = "vflan.world.build_for(preset) draws it, as notebook 01 does"
SCALE, GB = "A100-80G", 1e9  # the board that a need is told for, and its figures' unit


def machine():
    """Versions, devices, memory and disk, a line each."""
    yield f"python {platform.python_version()}, {platform.system()} {platform.machine()}"
    for name, means in PACKAGES.items():
        try:
            yield f"{name} {version(name)}"
        except PackageNotFoundError:
            yield f"{name}: not installed; {means}"
    yield from (
        f"GPU {i}: {gpu.name}, {gpu.total_memory / GB:.1f} GB" for i, gpu in enumerate(gpus())
    )
    if not gpus():
        yield "no GPU: the preset tiny needs none"
    memory = psutil.virtual_memory()
    yield f"{os.cpu_count()} CPU cores, {memory.available / GB:.1f} of {memory.total / GB:.1f} GB of memory free"
    for what, path in (("project", output_path("")), ("cache", CACHE)):
        there = next(place for place in (path, *path.absolute().parents) if place.exists())
        yield f"disk of the {what} ({shown(path)}): {shutil.disk_usage(there).free / GB:.1f} GB free"


def gpus() -> list:
    """The properties of each GPU here."""
    return [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]


def data():
    """The real sets: found, or the command that fetches them."""
    for name, known in SETS.items():
        lack = [pattern for pattern in known.files if not list(resolve(known.folder).glob(pattern))]
        yield f"{name}: {f'lacks {lack[0]}; vflan download {name}' if lack else f'found in {known.folder}'}"


def missing(name: str) -> list[str]:
    """What a preset lacks here, a line each with what to do; none when its three stages can be trained and evaluated."""
    lines, recipes = [], preset(name)
    for recipe in recipes:
        lines += [
            backbone(recipe.vision_tower),
            backbone(recipe.language_model),
            *samples(recipe),
            *packages(recipe),
        ]
    try:
        base = recipes.base  # the most demanding of the three
        there = resolve(
            base.samples
        ).exists()  # how many rows are lacking matters for the hours only
        lines.append(
            memory(
                base if there else replace(base, num_samples=base.num_samples or base.global_batch)
            )
        )
    except (OSError, ValueError) as trouble:  # of missing backbones it is told above
        lines.append("" if isinstance(trouble, OSError) else f"{recipes.base.name}: {trouble}")
    if not any((resolve(recipes.base.benchmarks) / benchmark).is_dir() for benchmark in BENCHMARKS):
        lines.append(
            f"{recipes.base.benchmarks}: no benchmark there, so nothing can be scored; {_source(recipes.base.benchmarks)}"
        )
    return list(dict.fromkeys(filter(None, lines)))  # the stages share most of it


def backbone(source: str) -> str:
    try:
        folder = Path(weights_source(source))
    except FileNotFoundError as trouble:
        return str(trouble)
    if folder.is_dir():
        weights = any(folder.glob("*.safetensors")) or any(folder.glob("*.bin"))
        whole = weights and (folder / "config.json").is_file()
        return (
            ""
            if whole
            else f"{source}: config.json and weights are not both in it; get them from one place"
        )
    known = isinstance(try_to_load_from_cache(source, "config.json"), str)
    return (
        ""
        if known
        else f"{source} is not in the hub's cache: hf download {source}, or training fetches it as it begins"
    )


def samples(recipe: Recipe):
    path = resolve(recipe.samples)
    of_set = [name for name, known in SETS.items() if path.parent == resolve(known.folder)]
    if not path.exists():
        named = [name for name in of_set if path.name in SETS[name].files]
        yield f"{recipe.samples}: not there; {f'vflan download {named[0]}' if named else _source(recipe.samples)}"
    if not resolve(recipe.images).exists() and not any(path.parent.glob("image*.zip")):
        yield f"{recipe.images}: no pictures there; {SETS[of_set[0]].then if of_set else _source(recipe.images)}"


def _source(path: str) -> str:
    worlds = (output_path(world) for world in ("data/tiny", "data/frozen"))
    drawn = any(output_path(path).is_relative_to(world) for world in worlds)
    return DRAWN if drawn else "data/README.md says where it comes from"


def packages(recipe: Recipe):
    needed = dict(
        bitsandbytes=recipe.bits < 16 or recipe.optimizer == "adamw_8bit",
        deepspeed="zero" in recipe.sharding,
    )
    yield from (
        f"{name} is not installed: pip install {name}"
        for name in needed
        if needed[name] and not find_spec(name)
    )


def memory(recipe: Recipe) -> str:
    """What a stage needs beyond what is here: of memory on a CPU (fp32 recipes where there is no GPU), else of GPUs."""
    here, hint = gpus(), "vflan.plan(recipe) says what would make it smaller"
    if not here and recipe.precision == "fp32":
        found, free = plan(recipe, gpu="cpu"), psutil.virtual_memory().available
        return (
            ""
            if found.needs < free
            else f"{recipe.name} needs {found.needs / GB:.1f} GB, {free / GB:.1f} are free; {hint}"
        )
    room = min((gpu.total_memory for gpu in here), default=0)
    if here and plan(recipe, len(here), SCALE).needs <= room:
        return ""
    tried = (plan(recipe, number, SCALE) for number in (1, 8) if recipe.global_batch % number == 0)
    fits = next((found for found in tried if found.fits), None)
    needs = (
        f"{fits.needs / GB:.0f} GB on each of {fits.gpus} GPUs"
        if fits
        else "more than 8 GPUs of 80 GB"
    )
    return f"{recipe.name} needs {needs}, here are {len(here)}{f' of {room / GB:.0f} GB' if here else ''}; {hint}"


def examine(presets: list[str] | None = None) -> int:
    """Print what this machine has and what each preset (all, if none is named) lacks; 0 if the tiny preset can run here."""
    print("This machine", *machine(), sep="\n  ")
    print("\nReal data", *data(), sep="\n  ")
    for name in presets or preset_names():
        try:
            lacks = missing(name)
        except (OSError, ValueError) as trouble:  # no such preset, or one that is none
            lacks = [str(trouble)]
        print(f"\n{name}: {'missing' if lacks else 'nothing is missing'}", *lacks, sep="\n  ")
    return int(any(DRAWN not in line for line in missing("tiny")))
