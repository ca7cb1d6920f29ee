"""Photographs with small models: SmolLM2-135M-Instruct and CLIP ViT-B/16 at 224 pixels.

Hardware: a GPU of a laptop or of a free notebook, 8 GB or more. A GPU that has no bf16 of its own
(T4, P100) trains in fp32: changes={"precision": "fp32"}.
Memory and hours, by vflan.plan: docs/real_data.md. Nothing was measured here.
Data: 100 samples of each of the 191 tasks, a tenth of the release, and 60,000 of the 558,128
captions, so that no stage takes a day. The whole files have to be downloaded all the same.
Expect: not measured. The language model is 96 times smaller than the paper's: look whether losses
fall and answers follow the picture, not for the paper's scores.

Learning rates are not tuned: LLaVA-1.5's for the projector, and as in `smol` for the rest, with
batches of 64.
"""

from vflan.config import Preset, replace
from vflan.presets.full_7b import preset as full_7b
from vflan.presets.smol import preset as smol


def preset() -> Preset:
    """The stages projector, base and chat."""
    changes = dict(vision_tower="openai/clip-vit-base-patch16", runs="runs/smol_real")
    changes |= dict(language_model=smol().base.language_model, global_batch=64, micro_batch=8)
    # Packed rows of at most 2,048 positions; the activations of a small model fit without tricks.
    # A free notebook may end at any time.
    changes |= dict(pack_tokens=None, gradient_checkpointing=False, save_every=100)
    projector, base, chat = (replace(recipe, **changes) for recipe in full_7b())
    return Preset(
        replace(projector, num_samples=60_000),
        replace(base, per_task=100, lr=smol().base.lr),
        replace(chat, lr=smol().chat.lr),
    )
