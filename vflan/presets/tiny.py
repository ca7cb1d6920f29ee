"""The mini world: three stages on two CPU cores, offline.

Hardware: any laptop.
Cost: data/tiny/backbones.json and the notebooks' outputs hold the measured times.
Expect: Base answers the mini world's questions tersely, Chat in sentences; README.md has the scores
of the committed run.
The learning rates suit a model of 1 M parameters; they are not the papers'. One epoch of captions
and one of tasks, as in the papers.
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
        samples="data/tiny/samples/flan.json",
        template="vicuna_v1",
        image_aspect_ratio="pad",
        tune=("projector", "language_model"),
        lr=6e-4,
        projector_lr=2e-3,
    )
    chat = replace(
        base,
        name="chat",
        stage="chat",
        samples="data/tiny/samples/chat.json",
        num_samples=1000,
        lr=1e-4,
        projector_lr=None,
    )
    return Preset(projector, base, chat)
