"""Precision and quantisation (bitsandbytes): options for loading, and copies between layers."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from vflan.config import Recipe

# bitsandbytes compares these with the START of a name (or its end), so that "vision_tower" alone
# would skip nothing.
_NOT_QUANTISED = ("model.vision_tower", "model.multi_modal_projector", "lm_head")


def uses_gpu(recipe: Recipe) -> bool:
    """Whether a recipe is computed on a GPU here."""
    return recipe.device != "cpu" and torch.cuda.is_available()


def compute_dtype(recipe: Recipe) -> torch.dtype:
    """bf16 only on a GPU, where it is fast: on a CPU everything runs in fp32.

    Training refuses a bf16 recipe without a GPU, unless it says device="cpu".
    """
    half = recipe.precision == "bf16" and uses_gpu(recipe)
    return torch.bfloat16 if half else torch.float32


def loading_options(
    recipe: Recipe, dtype: torch.dtype, skip: Iterable[str] = _NOT_QUANTISED
) -> dict[str, Any]:
    """Options of `from_pretrained` that quantise all linear layers but those of `skip`."""
    if recipe.bits == 16:
        return {}
    from transformers import BitsAndBytesConfig

    options = dict(load_in_8bit=True)
    if recipe.bits == 4:
        # QLoRA's settings: NormalFloat, with quantised scales.
        options = dict(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)
        options["bnb_4bit_use_double_quant"] = True
    config = BitsAndBytesConfig(llm_int8_skip_modules=list(skip), **options)
    # Each process has a GPU of its own.
    device = int(os.environ.get("LOCAL_RANK", 0)) if uses_gpu(recipe) else "cpu"
    return {"quantization_config": config, "device_map": {"": device}}


def is_quantised(layer: nn.Module) -> bool:
    """Whether a layer holds 8- or 4-bit weights."""
    # By name, because bitsandbytes is imported only where it is used.
    return type(layer).__name__ in ("Linear8bitLt", "Linear4bit")


def keep_layout(model: nn.Module) -> None:
    """Keep 4-bit weights as they were quantised, on every processor."""
    # On a CPU with AVX512-BF16, bitsandbytes changes a layer's layout when the layer first computes
    # in evaluation mode. In that layout a product has no gradient, so that a run would learn
    # wrongly after its first evaluation; the scales are rounded to bf16 for good; the bytes differ,
    # so that frozen weights seem to have changed; and layers narrower than 64 fail.
    for layer in model.modules():
        if type(layer).__name__ == "Linear4bit":
            layer.support_avx512bf16_for_cpu = False


def shapes_of(weights: dict[str, torch.Tensor]) -> dict[str, torch.Size]:
    """The shape of each weight."""
    return {name: weight.shape for name, weight in weights.items()}


def copy_weights(target: nn.Module, source: nn.Module, part: str) -> None:
    """Copy all weights of a module to another one of the same shapes and quantisation."""
    weights, layers, kinds = _contents(target)
    new_weights, new_layers, new_kinds = _contents(source)
    if kinds != new_kinds:
        raise ValueError(
            f"The two {part}s are not quantised alike ({len(kinds)} and {len(new_kinds)} such "
            "layers), so they cannot be swapped; load both in the same number of bits."
        )
    old, new = shapes_of(weights), shapes_of(new_weights)
    # A packed 4-bit weight has its true shape in its quantisation state.
    old |= {name: layer.weight.quant_state.shape for name, layer in layers.items()}
    new |= {name: layer.weight.quant_state.shape for name, layer in new_layers.items()}
    if different := [name for name in old | new if old.get(name) != new.get(name)]:
        raise ValueError(
            f"The two {part}s differ in shape ({different[0]} and {len(different) - 1} more), "
            "so they cannot be swapped."
        )
    for name in kinds.keys() - layers.keys():
        layer = target.get_submodule(name)
        # An 8-bit layer that has computed keeps its scales in its state, where loading finds none.
        if layer.weight.SCB is None:
            layer.weight.CB, layer.weight.SCB = layer.state.CB, layer.state.SCB
    target.load_state_dict(new_weights, strict=not layers)
    for name, layer in layers.items():
        weight, device = new_layers[name].weight, layer.weight.device
        # Copies, so that the two models can be tuned apart afterwards.
        layer.weight.data = weight.data.to(device, copy=True)
        layer.weight.quant_state = layer.quant_state = copy.deepcopy(weight.quant_state)
        layer.quant_state.to(device)


def _contents(part: nn.Module) -> tuple[dict, dict, dict]:
    """(weights outside 4-bit layers, 4-bit layers, class of each quantised layer), all by name."""
    quantised = {name: layer for name, layer in part.named_modules() if is_quantised(layer)}
    kinds = {name: type(layer).__name__ for name, layer in quantised.items()}
    layers = {name: layer for name, layer in quantised.items() if kinds[name] == "Linear4bit"}
    # A 4-bit layer keeps its scales beside its weight, where load_state_dict would leave the old.
    prefixes = tuple(f"{name}.weight" for name in layers)
    weights = part.state_dict().items()
    return {name: w for name, w in weights if not name.startswith(prefixes)}, layers, kinds
