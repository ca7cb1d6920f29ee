"""A model spread over processes (FSDP2): one of them reads the weights, each gets its share."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import chain
from typing import Any

import torch
from torch import distributed, nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from transformers import LlavaForConditionalGeneration as Llava

from vflan.config import Recipe
from vflan.models.llava import parts
from vflan.models.quantisation import compute_dtype


def outline(model: nn.Module) -> dict[str, Any]:
    """What `empty_model` needs to know of a model: its config, and the types of its weights."""
    dtypes = {name: weight.dtype for name, weight in model.named_parameters()}
    return dict(config=model.config, dtypes=dtypes)


def empty_model(config: Any, dtypes: dict[str, torch.dtype]) -> Llava:
    """A model without memory for its weights (on the meta device), for `receive` to fill."""
    with torch.device("meta"):
        model = Llava(config)
    for name, weight in model.named_parameters():
        weight.data = weight.data.to(dtypes[name])
    return model.eval()


def receive(modules: Iterable[nn.Module], device: torch.device) -> None:
    """Copy the weights of the main process into these modules' own weights, on `device`.

    Every process calls this. It leaves the main process's modules as they are.
    """
    is_main = distributed.get_rank() == 0
    for module in modules:
        if not is_main:
            module.to_empty(device=device, recurse=False)
        for tensor in chain(module.parameters(recurse=False), module.buffers(recurse=False)):
            # The main process may hold its weights on the CPU; what it sends is a copy.
            distributed.broadcast(tensor.detach().to(device) if is_main else tensor.detach(), 0)


def shard(learner: nn.Module, recipe: Recipe, device: torch.device) -> None:
    """Spread weights, gradients and optimiser state over the processes, in place (FSDP2).

    learner: `vflan.models.loss.Learner`, of which only the main process needs the weights. They
    travel layer by layer, so that no other process ever holds a whole model. The vision tower is
    small, frozen, and used outside of the learner's forward pass: every process has it already, and
    keeps it whole.
    """
    half = compute_dtype(recipe) == torch.bfloat16
    # Weights travel in bf16; gradients are added up in fp32.
    dtypes = dict(param_dtype=torch.bfloat16, reduce_dtype=torch.float32) if half else {}
    policy = MixedPrecisionPolicy(**dtypes)
    tower, done = parts(learner.model)["vision_tower"], set()
    for layer in learner.model.model.language_model.layers:
        receive(layer.modules(), device)
        fully_shard(layer, mp_policy=policy)
        done |= set(layer.modules())
    done |= set(tower.modules())
    receive([module for module in learner.modules() if module not in done], device)
    # Filling them made two weights of an embedding that is the output layer too.
    learner.model.tie_weights()
    fully_shard(learner, mp_policy=policy, ignored_params=set(tower.parameters()))
