"""Vicuna-7B v1.5 on one GPU: the language model in 4 bits (nf4) with LoRA, the projector in full.

Hardware: one GPU of 24 GB.
Memory, by vflan.plan (computed, not measured): 12 GB for Base and Chat, 8 GB for the projector.
pack_tokens is unset, so that packed rows stay at 2048 positions: longer ones cost memory.
Cost: not measured here.
Expect: the shape of the paper's results, not its values. LLaVA-1.5 published no QLoRA recipe, so
this is its LoRA recipe (r 128, alpha 256) on a quantised model, with an 8-bit optimiser.
"""

from vflan.config import Preset, replace
from vflan.presets.lora_7b import preset as lora_7b


def preset() -> Preset:
    """The stages projector, base and chat."""
    changes = dict(runs="runs/qlora_7b", bits=4, optimizer="adamw_8bit")
    changes |= dict(micro_batch=4, pack_tokens=None)
    return Preset(*(replace(recipe, **changes) for recipe in lora_7b()))
