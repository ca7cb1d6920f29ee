"""File formats of weights: Hugging Face folders, LLaVA's checkpoints and projector files."""

from __future__ import annotations

import hashlib
import json
import math
import os
import zipfile
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import safe_open
from torch import nn
from transformers import LlamaConfig
from transformers.utils import logging

from vflan.config import read_json, resolve, shown, weights_source
from vflan.io import digest, machine_limit
from vflan.models.hub import hub_options

# transformers would ask the hub, in a thread of its own, to convert a model's .bin files.
os.environ.setdefault("DISABLE_SAFETENSORS_CONVERSION", "1")
# Prefixes in LLaVA's own LlavaLlamaForCausalLM and in LlavaForConditionalGeneration. The first that
# fits counts, so that the short ones come last.
_LLAVA_PREFIXES = (
    ("model.vision_tower.vision_tower.vision_model.", "model.vision_tower."),
    ("model.mm_projector.0.", "model.multi_modal_projector.linear_1."),
    ("model.mm_projector.2.", "model.multi_modal_projector.linear_2."),
    ("model.", "model.language_model."),
    ("lm_head.", "lm_head."),
)
# What is downloaded of a model's repository.
_HUB_FILES = ["*.json", "*.safetensors", "pytorch_model*.bin", "*.model", "*.txt", "*.jinja"]
_HUB_FILES += ["mm_projector.bin"]
# LLaVA's config.json must not contradict these values.
_LLAVA_1_5 = dict(
    mm_projector_type="mlp2x_gelu",
    mm_vision_select_layer=-2,
    mm_vision_select_feature="patch",
    mm_use_im_start_end=False,
    mm_patch_merge_type="flat",
)


class HasFolder(Protocol):
    """A Run, as far as this room needs it."""

    @property
    def folder(self) -> Path:
        """The run folder."""


# What weights can be read from: a path, or a Run.
Source = str | os.PathLike | HasFolder


def read_pretrained(kind: Any, source: str | os.PathLike, **options: Any) -> Any:
    """`kind.from_pretrained(source)`, with one sentence for a damaged or incomplete folder.

    Code that comes with a model is never run. OSError or ValueError if the folder cannot be read,
    or if it is a run's and not as it was written.
    """
    check_files(Path(source), weights=not kind.__name__.endswith(("Processor", "Tokenizer")))
    options |= hub_options(source)
    if kind.__name__.startswith("Auto"):
        options["trust_remote_code"] = False
    try:
        return kind.from_pretrained(source, **options)
    except (ImportError, MemoryError, torch.OutOfMemoryError):
        raise
    # json, safetensors, tokenizers and transformers each have errors of their own.
    except Exception as error:
        error_class = OSError if isinstance(error, OSError) else ValueError
        raise error_class(f"{source} cannot be read: {_reason(error)}") from error


def sign(record: dict[str, Any]) -> dict[str, Any]:
    """A done.json with, among the checksums of `files`, one of its own other entries."""
    files = {name: each for name, each in record["files"].items() if name != "done.json"}
    # As it comes back from the file: tuples become lists.
    text = json.dumps(json.loads(json.dumps(record | dict(files=files))), sort_keys=True)
    own = hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
    return record | dict(files=files | {"done.json": own})


def check_files(folder: Path, weights: bool = True) -> None:
    """Compare a run's model, or its adapter, with the checksums in done.json, once a process.

    It costs no more than to read the files, which are read next anyway. ValueError names a file
    that is not as it was written. Runs of earlier versions have no checksums, and neither have
    models of others. weights: False leaves the large files out.
    """
    record = read_json(folder.parent / "done.json") if folder.name in ("model", "adapter") else {}
    if weights and record:
        require_kept(folder)
    if "done.json" in record.get("files", {}) and sign(record) != record:
        raise ValueError(
            f"{shown(folder.parent / 'done.json')} is not as it was written: put back a copy of "
            f"it, or delete {shown(folder.parent)} and train it again."
        )
    for name, before in record.get("files", {}).items():
        path = folder.parent / name
        if path.parent != folder or not (weights or path.suffix != ".safetensors"):
            continue
        status = path.stat() if path.is_file() else None
        if not status or _digest(path, status.st_mtime_ns, status.st_size) != before:
            raise ValueError(
                f"{shown(path)} is not as it was written, or missing: the model is damaged. Put "
                f"back a copy of the file, or delete {shown(folder.parent)} and train it again."
            )


# Time and size are part of the key, so that a file that was put back is read again.
@lru_cache(maxsize=1 << 10)
def _digest(path: Path, mtime_ns: int, size: int) -> str:
    return digest(path).hex()


def _reason(error: Exception) -> str:
    """Why a file of weights cannot be read, and what to do: damage is not the only reason."""
    reason = (str(error).strip() or type(error).__name__).splitlines()[0][:300]
    return f"{reason} - {machine_limit(error) or 'download or copy it again, whole'}."


def load_pretrained(kind: Any, source: str | os.PathLike, **options: Any) -> nn.Module:
    """A model by `read_pretrained`; ValueError if its files lack a weight or hold another shape.

    transformers would fill such a weight with random numbers.
    """
    verbosity = logging.get_verbosity()
    # The loading report would list every weight of CLIP's text side.
    logging.set_verbosity_error()
    options |= dict(output_loading_info=True, ignore_mismatched_sizes=True)
    try:
        model, info = read_pretrained(kind, source, **options)
    finally:
        logging.set_verbosity(verbosity)
    if mismatched := sorted(info["mismatched_keys"]):
        name, stored, expected = mismatched[0]
        raise ValueError(
            f"{source}: {name} is {tuple(stored)} in the files but {tuple(expected)} by "
            f"config.json ({len(mismatched)} such weights); take both from one place."
        )
    if missing := sorted(info["missing_keys"]):
        raise ValueError(
            f"{source} lacks {len(missing)} weights ({missing[0]}, ...); they would have been "
            "random. Is it the right folder?"
        )
    return model


def weights_path(weights: Source) -> Path:
    """The folder or file that holds weights.

    weights: a Run, the folder of one, a Hugging Face folder, a folder of LLaVA's, LLaVA's
    mm_projector.bin, or a hub id, which is downloaded. FileNotFoundError or ValueError if there is
    no model.
    """
    given = str(getattr(weights, "folder", weights))
    path = resolve(given)
    is_name = given.count("/") == 1 and not path.exists()
    if is_name and weights_source(given) == given:
        path = _download(given)
    require_kept(path / "model" if (path / "done.json").is_file() else path)
    path = path / "model" if (path / "model").is_dir() else path
    if path.is_file():
        return path
    if not path.is_dir():
        raise FileNotFoundError(f"{shown(path)}: no such file or folder to take weights from.")
    name = shown(path)
    if (path / "adapter_config.json").is_file():
        raise ValueError(f"{name} is a LoRA adapter, not a model; merge it into its base model.")
    if not (path / "config.json").is_file():
        raise FileNotFoundError(
            f"{name} has no config.json and so holds no model; "
            "train that run to its end, or download all files."
        )
    check_files(path, weights=False)
    # LLaVA's pre-training leaves a projector file beside a config.json, and no other weights.
    projector = path / "mm_projector.bin"
    return projector if projector.is_file() and not _weight_files(path) else path


def require_kept(folder: Path) -> None:
    """Raise FileNotFoundError for a run's model or adapter that `Run.keep` has deleted."""
    kept, name = read_json(folder.parent / "done.json").get("kept"), shown(folder.parent)
    if folder.name not in ("model", "adapter") or kept in (None, folder.name):
        return
    advice = f"delete {name} and train the run again"
    if kept == "adapter":
        advice += f", or load {name}/adapter with PEFT onto what the run started from"
    raise FileNotFoundError(f"The {folder.name} of {name} was deleted (keep={kept!r}): {advice}.")


def _download(repo: str) -> Path:
    """The files of a model of the hub, in the hub's cache."""
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(repo, allow_patterns=_HUB_FILES, etag_timeout=10))
    # huggingface_hub, httpx and the file system each have errors of their own.
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        raise FileNotFoundError(
            f"{repo}: no such folder is here, and it could not be downloaded as a model of the "
            f"Hugging Face hub ({reason})."
        ) from error


def is_llava_checkpoint(folder: Path) -> bool:
    """Whether LLaVA's own code wrote this folder."""
    return "mm_vision_tower" in read_json(folder / "config.json")


def llava_text_config(folder: Path) -> LlamaConfig:
    """The language model's shape in a folder of LLaVA's; ValueError if it is no LLaVA-1.5."""
    values = read_json(folder / "config.json")
    other = {key: values[key] for key, v in _LLAVA_1_5.items() if values.get(key, v) != v}
    if other or values.get("model_type") not in ("llava", "llava_llama"):
        problem = other or values.get("model_type")
        raise ValueError(f"{shown(folder)} is no LLaVA-1.5 on a Llama: {problem}.")
    names = {*LlamaConfig().to_dict(), "rope_theta", "rope_scaling"}
    names -= {"model_type", "architectures"}
    return LlamaConfig(**{key: value for key, value in values.items() if key in names})


def _weight_files(folder: Path) -> list[Path]:
    return sorted([*folder.glob("*.safetensors"), *folder.glob("pytorch_model*.bin")])


def part_of(name: str) -> str:
    """The part that a stored weight belongs to, by its name in a Hugging Face or LLaVA folder."""
    others = ("projector", "vision_tower")
    return next((part for part in others if f"{part}." in name), "language_model")


def stored_slices(source: Source) -> dict[str, Any]:
    """The weights in a folder's safetensors, by name, unread.

    `slice[2:5]` reads three rows of a tensor, so that files may be larger than memory.
    """
    readers = [safe_open(file, "pt") for file in sorted(weights_path(source).glob("*.safetensors"))]
    return {name: reader.get_slice(name) for reader in readers for name in reader.keys()}


def part_sizes(source: Source) -> dict[str, int]:
    """How many weights each part has in a folder's safetensors; no weight is read."""
    sizes = dict.fromkeys(("vision_tower", "projector", "language_model"), 0)
    for name, stored in stored_slices(source).items():
        sizes[part_of(name)] += math.prod(stored.get_shape())
    return sizes


def read_tensors(source: Path, part: str) -> dict[str, torch.Tensor]:
    """The tensors of a file, or of a folder's files, whose names contain `part`."""
    check_files(source)
    tensors = {}
    for file in [source] if source.is_file() else _weight_files(source):
        try:
            tensors |= _read_file(file, part)
        # pickle, zip and safetensors each have errors of their own.
        except Exception as error:
            if machine_limit(error):
                raise OSError(f"{shown(file)} cannot be read: {_reason(error)}") from error
            raise ValueError(
                f"{shown(file)} is damaged, or holds more than weights (a pickle may hold code; "
                "none was run); download it again."
            ) from error
    return tensors


def _read_file(file: Path, part: str) -> dict[str, torch.Tensor]:
    if file.suffix == ".safetensors":
        with safe_open(file, "pt") as stored:
            return {name: stored.get_tensor(name) for name in stored.keys() if part in name}
    return {name: tensor for name, tensor in load_tensors(file).items() if part in name}


def load_tensors(file: Path) -> dict[str, Any]:
    """What torch.save wrote. Tensors are read when they are used, where a disk can map files."""
    # weights_only: an ordinary pickle could run code. mmap needs PyTorch's zip format.
    options = dict(map_location="cpu", weights_only=True)
    try:
        return torch.load(file, mmap=zipfile.is_zipfile(file), **options)
    except RuntimeError as error:
        if "unable to mmap" not in str(error):
            raise
        return torch.load(file, **options)


def read_projector(source: Source) -> dict[str, torch.Tensor]:
    """A projector's weights, named as in `parts(model)["projector"]`.

    source: LLaVA's `mm_projector.bin`, or anything else that `load_model` starts from.
    """
    path = weights_path(source)
    stored = read_tensors(path, "projector.")
    stored = {name.split("projector.")[1]: tensor for name, tensor in stored.items()}
    # LLaVA's projector is a Sequential of linear, GELU, linear: 0 and 2 are the linear layers.
    kinds = ("weight", "bias")
    names = {f"{2 * i}.{kind}": f"linear_{i + 1}.{kind}" for i in (0, 1) for kind in kinds}
    weights = {names.get(name, name): tensor for name, tensor in stored.items()}
    if set(weights) != set(names.values()):
        raise ValueError(
            f"{shown(path)} holds {', '.join(sorted(stored)) or 'no projector'}; LLaVA-1.5's "
            "projector is two layers (mm_projector.0 and mm_projector.2), each with weight and "
            "bias."
        )
    return weights


def save_projector(model: nn.Module, path: str | os.PathLike) -> Path:
    """Write the projector as LLaVA's own `mm_projector.bin`."""
    path = resolve(path)
    projector = model.model.multi_modal_projector
    weights = to_llava(projector.state_dict(prefix="model.multi_modal_projector."))
    # Written beside its place and renamed, so that a reader never sees half a file.
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    torch.save({name: tensor.cpu() for name, tensor in weights.items()}, scratch)
    return scratch.replace(path)


def to_llava(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A model's `state_dict()` under the names of LLaVA's own code.

    Our language models have one more row, for `<image>`: vocab_size in LLaVA's config.json must
    count it.
    """
    return _rename(weights, [(ours, llavas) for llavas, ours in _LLAVA_PREFIXES])


def from_llava(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Weights of LLaVA's own code under the names of `LlavaForConditionalGeneration`."""
    # Old checkpoints store two tables that are computed today.
    computed = ("rotary_emb.inv_freq", "embeddings.position_ids")
    weights = {name: tensor for name, tensor in weights.items() if not name.endswith(computed)}
    return _rename(weights, _LLAVA_PREFIXES)


def _rename(weights: dict, prefixes: Iterable[tuple[str, str]]) -> dict[str, torch.Tensor]:
    renamed = {}
    for name, tensor in weights.items():
        matching = [pair for pair in prefixes if name.startswith(pair[0])]
        if not matching:
            raise ValueError(f"{name}: LLaVA-1.5 has no such weight.")
        old, new = matching[0]
        renamed[new + name.removeprefix(old)] = tensor
    return renamed
