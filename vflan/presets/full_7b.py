"""full_13b with Vicuna-7B v1.5: the same recipe, about half the memory and disk.

Hardware: 8 GPUs of 40 or 80 GB, num_processes 8.
Memory, by vflan.plan (computed, not measured): 22 GB on each.
Cost: not measured here. LLaVA-1.5 reports 3.5 h for a 7B projector on 8 A100-80G, and about 10 h to
tune 665 thousand samples on 8 A100-40G.
Expect: somewhat below the 13B rows of data/paper.csv.
"""

from vflan.config import Preset, replace
from vflan.presets.full_13b import preset as full_13b


def preset() -> Preset:
    """The stages projector, base and chat."""
    changes = dict(language_model="lmsys/vicuna-7b-v1.5", runs="runs/full_7b")
    return Preset(*(replace(recipe, **changes) for recipe in full_13b()))
