"""The paper's own scale: Vicuna-13B v1.5 and CLIP ViT-L/14-336, all of the language model tuned.

Vision-Flan, section 3.

Hardware: 8 GPUs of 80 GB (the papers used A100s) with num_processes 8, so that weights and
optimiser are sharded over them.
Memory, by vflan.plan (computed, not measured): 37 GB on each of 8 for the base stage, 34 GB for the
projector.
Cost, by vflan.plan on 8 A100-80G (computed, not measured): 9.3 h for the three stages, of which
3.3 h for the base stage, and 0.7 h of evaluation. LLaVA-1.5 reports 5.5 h for a 13B projector on 8
A100-80G. Vision-Flan prints no GPU hours; its base stage on the full release is about 13,000 steps.
Each run folder holds a whole model, 27 GB in bfloat16. A checkpoint of full tuning holds 12 bytes a
weight, 157 GB; two are kept, and a third exists while it is written. save_every=0: none but the
last of a sharded run.
Expect: the Vision-Flan rows of data/paper.csv.

pack_tokens is 8192: a GPU's share of a step is then two passes in place of seven rows of 2048, each
of which gathers all weights anew, and the GPUs wait less for each other. micro_batch counts only
where rows are padded.

The papers state: data, what is tuned, batch sizes, learning rates, one epoch, 128 steps of chat.
Vision-Flan does not state these, so they come from LLaVA-1.5's scripts: cosine schedule, warm-up
0.03, no weight decay, no clipping, 2048 tokens, bfloat16, templates.
"""

from vflan.config import Preset, Recipe, replace


def preset() -> Preset:
    """The stages projector, base and chat."""
    projector = Recipe(
        name="projector",
        stage="projector",
        vision_tower="openai/clip-vit-large-patch14-336",
        language_model="lmsys/vicuna-13b-v1.5",
        samples="data/llava_pretrain/blip_laion_cc_sbu_558k.json",
        images="data/llava_pretrain/images",
        runs="runs/full_13b",
        benchmarks="data/benchmarks",
        template="plain",
        image_aspect_ratio="crop",
        tune=("projector",),
        lr=1e-3,
        global_batch=256,
        micro_batch=32,
        pack_tokens=8192,
        precision="bf16",
        gradient_checkpointing=True,
        save_every=1000,
    )
    base = replace(
        projector,
        name="base",
        stage="base",
        samples="data/vision_flan/annotation_191-task_1k.json",
        images="data/vision_flan/images_191task_1k",
        template="vicuna_v1",
        image_aspect_ratio="pad",
        tune=("projector", "language_model"),
        lr=2e-5,
        global_batch=128,
        micro_batch=16,
    )
    chat = replace(
        base,
        name="chat",
        stage="chat",
        samples="data/llava_instruct/llava_instruct_150k.json",
        images="data/llava_instruct/train2017",
        num_samples=1000,
        lr=1e-5,
        global_batch=64,
        micro_batch=8,
        max_steps=128,
    )
    return Preset(projector, base, chat)
