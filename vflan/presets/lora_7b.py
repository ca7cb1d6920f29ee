"""Vicuna-7B v1.5, tuned with LoRA by LLaVA-1.5's published values (r 128, alpha 256, dropout 0.05).

Hardware: one GPU of 48 GB or more, or smaller ones with a smaller pack_tokens (every process holds
the whole model).
Memory, by vflan.plan (computed, not measured): 29 GB for the base stage, 21 GB for the projector.
Cost: not measured here.
Expect: close to full tuning on most benchmarks in LLaVA-1.5's own table; Vision-Flan prints no LoRA
row.
"""

from vflan.config import Preset, replace
from vflan.presets.full_7b import preset as full_7b


def preset() -> Preset:
    """The stages projector, base and chat."""
    projector, base, chat = (replace(recipe, runs="runs/lora_7b") for recipe in full_7b())
    lora = dict(lora_r=128, lora_alpha=256, lora_dropout=0.05, projector_lr=2e-5)
    base = replace(base, lr=2e-4, **lora)
    # The paper halves the learning rate from Base to Chat. LoRA has no published value, so this
    # halves it too.
    chat = replace(chat, lr=1e-4, **lora | dict(projector_lr=1e-5))
    return Preset(projector, base, chat)
