"""The mini world: three stages on two CPU cores, offline.

Hardware: any laptop.
Cost: data/tiny/backbones.json and the notebooks' outputs hold the measured times.
Expect: Base answers the mini world's questions tersely, Chat in sentences; README.md has the scores
of the committed run.
Base starts from a projector that was trained longer (`pretrained`), as the paper's starts from
LLaVA's. The learning rates suit a model of 1 M parameters; their ratios are the paper's: one rate
for the projector and the language model, and half of it for Chat. One pass over half of the tasks'
samples, and eight over 1,000 conversations, as in the paper.
"""

from vflan.config import Preset, Recipe, replace


def preset() -> Preset:
    """The stages projector, base and chat."""
    projector = Recipe(
        name="projector",
        stage="projector",
        vision_tower="data/tiny/vision_tower",
        language_model="data/tiny/language_model",
        samples="data/tiny/samples/captions.json",
        images="data/tiny/samples/images",
        runs="runs/tiny",
        benchmarks="data/tiny/benchmarks",
        template="plain",
        image_aspect_ratio="crop",
        pretrained="data/tiny/projector/mm_projector.safetensors",
        tune=("projector",),
        lr=4e-3,
        global_batch=16,
        micro_batch=16,
        max_length=512,
    )
    base = replace(
        projector,
        name="base",
        stage="base",
        pretrained="",
        samples="data/tiny/samples/flan.json",
        template="vicuna_v1",
        image_aspect_ratio="pad",
        per_task=250,
        tune=("projector", "language_model"),
        lr=6e-4,
    )
    chat = replace(
        base,
        name="chat",
        stage="chat",
        samples="data/tiny/samples/chat.json",
        per_task=None,
        num_samples=1000,
        lr=3e-4,
        epochs=8,
    )
    return Preset(projector, base, chat)
