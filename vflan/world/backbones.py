"""The tiny stand-ins for CLIP, Vicuna and LLaVA's pretrained projector.

They are in data/tiny/, and `python -m vflan.world.backbones` trains them again; data/tiny/
backbones.json has the seed, the time and what each can do. Like CLIP and Vicuna they are pretrained
separately. The tower never meets the language model. The language model reads text only, where it
first has to bind the words of an object together; it never sees a picture or anything of that form.
The projector joins the two, trained on captions for longer than a notebook would wait.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from transformers import CLIPImageProcessorPil, CLIPVisionConfig, CLIPVisionModel

from vflan.config import ROOT, preset, replace
from vflan.models.weights import to_llava
from vflan.training.trainer import train
from vflan.world import scene as W
from vflan.world import write_samples
from vflan.world.language_model import (
    make_language_model,
    make_second_language_model,
    make_tokenizer,
)
from vflan.world.scene import Scene
from vflan.world.words import describe

FOLDER = ROOT / "data" / "tiny"
MEAN, STD = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]  # CLIP's own

# ---------------------------------------------------------------------------------------- the tower
# In a first try, contrastive training alone used the shortcut of colour and background, and shapes
# were not learned (worse than random features). Each patch therefore also learns to name what is in
# its cell, as web captions teach CLIP.

THINGS = ("nothing", "bar", "ink", *W.SHAPES, *W.LETTERS, *"0123456789")
HEADS = dict(
    thing=len(THINGS), color=9, size=3, texture=4, background=4, condition=4, place=16, digit=11
)


def cell_labels(scene: Scene) -> np.ndarray:
    """(16, 8) int labels of every cell, in the order of HEADS; 0 stands for "none"."""
    out = np.zeros((16, len(HEADS)), np.int64)
    out[:, 4] = W.BACKGROUNDS.index(scene.background)
    out[:, 5] = W.CONDITIONS.index(scene.condition)
    out[:, 6] = np.arange(16)
    for t in scene.things:
        out[t.place, :4] = (
            THINGS.index(t.shape),
            1 + W.COLORS.index(t.color),
            1 + W.SIZES.index(t.size),
            1 + W.TEXTURES.index(t.texture),
        )
    if scene.kind == "handwritten":
        out[:, 0], out[:, 7], out[:, 4] = THINGS.index("ink"), 1 + int(scene.text), -100
    else:
        for column, character in enumerate(scene.text):
            out[scene.line * 4 + column, 0] = THINGS.index(character)
    for column, (color, height) in enumerate(scene.bars):
        for row in range(4 - height, 4):
            out[row * 4 + column, :2] = THINGS.index("bar"), 1 + W.COLORS.index(color)
    return out


def pixels(scenes: Sequence[Scene]) -> torch.Tensor:
    """(n, 3, 48, 48) float pictures, normalised as CLIP does."""
    raw = np.stack([np.asarray(W.render(s)) for s in scenes])
    return (
        ((torch.tensor(raw).float() / 255 - torch.tensor(MEAN)) / torch.tensor(STD))
        .permute(0, 3, 1, 2)
        .contiguous()
    )


def make_tower(
    folder: Path,
    seed: int = 0,
    pictures: int = 24_000,
    steps: int = 4700,
    batch: int = 96,
    log: Callable = print,
) -> dict:
    """Train a `CLIPVisionModel` and save it; returns its record.

    The loss is contrastive, against bags of caption words, plus the labels of the cells.
    """
    torch.manual_seed(seed)
    start = time.process_time()
    mix = (0.58, 0.14, 0.11, 0.07, 0.10)  # rich in glyphs, the hardest to tell apart
    scenes = []
    for i in range(pictures + 1000):
        rng = W.rng_of("tower", seed, i)
        scenes.append(W.sample_scene(rng, kind=W.pick(rng, W.KINDS, mix), seed=10_000_000 + i))
    x, y = pixels(scenes), torch.tensor(np.stack([cell_labels(s) for s in scenes]))
    words = sorted({w for s in scenes for w in describe(s).replace(".", "").split()})
    bags = torch.zeros(len(scenes), len(words))
    for i, s in enumerate(scenes):
        bags[i, [words.index(w) for w in describe(s).replace(".", "").split()]] = 1
    test = slice(pictures, None)

    config = CLIPVisionConfig(
        hidden_size=160,
        intermediate_size=480,
        num_hidden_layers=4,
        num_attention_heads=4,
        image_size=48,
        patch_size=12,
        projection_dim=96,
    )
    tower = CLIPVisionModel(config)
    heads = torch.nn.ModuleDict({k: torch.nn.Linear(160, n) for k, n in HEADS.items()})
    to_text, to_image = (
        torch.nn.Linear(len(words), 96, bias=False),
        torch.nn.Linear(160, 96, bias=False),
    )
    scale = torch.nn.Parameter(torch.tensor(2.5))
    params = [
        *tower.parameters(),
        *heads.parameters(),
        *to_text.parameters(),
        *to_image.parameters(),
        scale,
    ]
    opt = torch.optim.AdamW(params, lr=1e-3, betas=(0.9, 0.98), weight_decay=0.02, fused=True)
    weight = dict(
        thing=3.0,
        color=1.5,
        size=1.0,
        texture=1.5,
        background=0.5,
        condition=0.5,
        place=0.3,
        digit=1.0,
    )
    generator = torch.Generator().manual_seed(seed)
    for step in range(steps):
        rows = torch.randperm(pictures, generator=generator)[:batch]
        lr = 1e-3 * min(1, (step + 1) / 100) * min(1.0, max(0.02, 2 * (steps - step) / steps))
        opt.param_groups[0]["lr"] = lr
        out = tower(pixel_values=x[rows], output_hidden_states=True)
        patches = out.hidden_states[-2][:, 1:]
        loss = sum(
            weight[k]
            * F.cross_entropy(
                heads[k](patches).flatten(0, 1), y[rows][..., i].flatten(), ignore_index=-100
            )
            for i, k in enumerate(HEADS)
        )
        a, b = (
            F.normalize(to_image(out.pooler_output), dim=-1),
            F.normalize(to_text(bags[rows]), dim=-1),
        )
        logits, target = scale.exp() * a @ b.T, torch.arange(batch)
        loss = (
            loss + 0.3 * (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
        )
        opt.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        opt.step()
        if step % 200 == 0:
            log(
                f"tower step {step}, {time.process_time() - start:.0f} s, loss {loss.item():.3f}",
                flush=True,
            )
    record = dict(
        seed=seed,
        cpu_seconds=round(time.process_time() - start),
        steps=steps,
        batch=batch,
        pictures=pictures,
        parameters=sum(p.numel() for p in tower.parameters()),
        skills={},
    )
    with torch.no_grad():
        patches = tower(pixel_values=x[test], output_hidden_states=True).hidden_states[-2][:, 1:]
        for i, k in enumerate(HEADS):
            gold = y[test][..., i]
            keep = gold > 0 if k in ("thing", "color", "size", "texture", "digit") else gold >= 0
            record["skills"][k] = round(
                (heads[k](patches).argmax(-1) == gold)[keep].float().mean().item(), 4
            )
        for name, members in dict(
            shape=W.SHAPES, letter=tuple(W.LETTERS), numeral=tuple("0123456789")
        ).items():
            ids = torch.tensor([THINGS.index(m) for m in members])
            keep = torch.isin(y[test][..., 0], ids)
            record["skills"][name] = round(
                (heads["thing"](patches).argmax(-1) == y[test][..., 0])[keep].float().mean().item(),
                4,
            )
    tower.half().save_pretrained(folder / "vision_tower")
    CLIPImageProcessorPil(
        size={"shortest_edge": 48},
        crop_size={"height": 48, "width": 48},
        image_mean=MEAN,
        image_std=STD,
    ).save_pretrained(folder / "vision_tower")
    log(json.dumps(record), flush=True)
    return record


# --------------------------------------------------------------------------------- the projector


def make_projector(
    folder: Path, seed: int = 7001, captions: int = 21_000, epochs: int = 2, every: int = 75
) -> dict:
    """Train `tiny`'s projector stage to the end of its curve, and save the projector.

    The paper starts from LLaVA's projector, which has seen 558,000 captions. This one sees three
    times as many captions as `tiny` has, twice, of pictures of its own draw; none is set aside for
    evaluation, in any world. Returns its record, with the loss as the mean of each `every` steps.
    """
    with tempfile.TemporaryDirectory() as scratch:
        drawn = Path(scratch) / "samples"
        (drawn / "images").mkdir(parents=True)
        write_samples(drawn, seed, captions, per_kind=0, conversations=0)
        recipe = replace(
            preset("tiny").projector,
            vision_tower=str(folder / "vision_tower"),
            language_model=str(folder / "language_model"),
            samples=str(drawn / "captions.json"),
            images=str(drawn / "images"),
            runs=scratch,
            epochs=epochs,
            seed=seed,
        )
        run = train(recipe)
        losses, seconds = run.metrics().loss.dropna().to_numpy(), run.summary["seconds"]
        projector = run.load_model().model.multi_modal_projector
        state = to_llava(projector.state_dict(prefix="model.multi_modal_projector."))
    (folder / "projector").mkdir(exist_ok=True)
    state = {name: weight.half().contiguous() for name, weight in state.items()}
    save_file(state, folder / "projector" / "mm_projector.safetensors")
    means = [losses[i : i + every].mean() for i in range(0, len(losses), every)]
    return dict(
        seed=seed,
        wall_seconds=round(seconds),
        captions=captions,
        epochs=epochs,
        steps=len(losses),
        parameters=sum(weight.numel() for weight in state.values()),
        every=every,
        losses=[round(float(loss), 3) for loss in means],
    )


def note_record(folder: Path, **entries) -> None:
    """Add entries to the record next to the weights."""
    path = folder / "backbones.json"
    record = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(record | entries, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "parts",
        nargs="*",
        default=["tokenizer", "tower", "language_model", "second_language_model", "projector"],
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, default=FOLDER)
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)  # one thread gives the same weights everywhere of one kind
    if "tokenizer" in args.parts:
        make_tokenizer(args.folder, args.seed)
    if "tower" in args.parts:
        note_record(args.folder, vision_tower=make_tower(args.folder, args.seed))
    if "language_model" in args.parts:
        note_record(args.folder, language_model=make_language_model(args.folder, args.seed))
    if "second_language_model" in args.parts:
        note_record(
            args.folder,
            second_language_model=make_second_language_model(args.folder, args.seed + 1),
        )
    if "projector" in args.parts:
        note_record(args.folder, projector=make_projector(args.folder, args.seed + 7001))


if __name__ == "__main__":
    main()
