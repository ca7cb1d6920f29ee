"""A real language model in the mini world: SmolLM2-135M-Instruct with `tiny`'s tower and pictures.

It has 120 times as many parameters as `tiny`'s language model, and has read real text.

Hardware: any laptop with 8 GB of memory.
Memory, by vflan.plan (computed): 4 GB for Chat and 3 GB for Base, beside 1 GB for Python.
Cost: about an hour on two quiet cores, at 200 useful tokens a second (from one trial, not a bench):
7,000 captions 26 minutes, 113 rows of each of 53 tasks 25, 1,000 conversations 8 (seen once, not
eight times). Evaluation is not counted, nor are notebooks 06 to 08, which train more runs.
Expect: not measured; no score of it is in this repository.
The weights (Apache-2.0) are downloaded from the hub at first use, 0.3 GB. Without the hub,
examples/smollm2.py makes a folder of them, to be named as `language_model` in `changes`.

Learning rates are not tuned. The projector's is LLaVA-1.5's. LLaVA's 2e-5 for a language model
belongs to 7B weights and batches of 128. Base has 1e-4 (nanoVLM's configurations for this language
model have 5e-5 to 1e-4), and Chat half of it, as in the paper.
"""

from vflan.config import Preset, replace
from vflan.presets.tiny import preset as tiny


def preset() -> Preset:
    """The stages projector, base and chat."""
    changes = dict(language_model="HuggingFaceTB/SmolLM2-135M-Instruct", runs="runs/smol")
    # Half of tiny's rows in a pass: the activations of 16 conversations take 3 GB.
    changes |= dict(micro_batch=8)
    projector, base, chat = (replace(recipe, **changes) for recipe in tiny())
    return Preset(
        replace(projector, lr=1e-3, pretrained=""),
        replace(base, per_task=113, lr=1e-4),
        replace(chat, lr=5e-5, epochs=1),
    )
