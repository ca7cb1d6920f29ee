"""For tests of evaluation: a random LLaVA of width 32, a word tokenizer, five pictures, a run."""

import json
from types import SimpleNamespace

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedTokenizerFast,
)

from vflan.data.conversation import IMAGE_TOKEN_INDEX, SYSTEM, prompt_ids

WORDS = (
    "what is there a red blue green star circle in the picture ? yes no USER : ASSISTANT \n".split(
        " "
    )
)


def tiny_tokenizer():
    words = [
        "<unk>",
        "<s>",
        "</s>",
        "<image>",
        *SYSTEM.replace(".", " .").replace(",", " ,").split(),
        *WORDS,
    ]
    words = list(dict.fromkeys(words))
    core = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="<unk>",
        extra_special_tokens={"image_token": "<image>"},
    )


def tiny_model(tokenizer, seed=2):
    torch.manual_seed(seed)
    small = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)
    vision = CLIPVisionConfig(image_size=48, patch_size=12, **small)
    text = LlamaConfig(
        vocab_size=len(tokenizer),
        num_key_value_heads=2,
        initializer_range=0.6,
        pad_token_id=0,
        **small,
    )
    config = LlavaConfig(
        vision_config=vision, text_config=text, image_token_index=3, image_seq_length=16
    )
    model = LlavaForConditionalGeneration(config).eval()
    with torch.no_grad():
        # About half of the answers end by themselves.
        model.lm_head.weight[tokenizer.eos_token_id] *= 2
    return model


def make_tiny(folder):
    """model, processor, and the folder of five noisy pictures 0.png to 4.png."""
    rng = np.random.default_rng(0)
    for i in range(5):
        Image.fromarray(rng.integers(0, 255, (48, 48, 3), dtype=np.uint8)).save(folder / f"{i}.png")
    tokenizer = tiny_tokenizer()
    pictures = CLIPImageProcessorPil(
        size={"shortest_edge": 48}, crop_size={"height": 48, "width": 48}
    )
    processor = SimpleNamespace(tokenizer=tokenizer, image_processor=pictures)
    return SimpleNamespace(model=tiny_model(tokenizer), processor=processor, folder=folder)


def questions(tiny, n=40):
    """n random questions about the pictures, some without one."""
    rng = np.random.default_rng(1)
    rows = []
    for i in range(n):
        text = " ".join(rng.choice(WORDS[:14], size=rng.integers(1, 12)))
        rows.append({"text": text, "image": str(tiny.folder / f"{i % 5}.png") if i % 7 else None})
    return rows


def by_generate(model, processor, row, max_new_tokens):
    """(text, finish) of one question, by Hugging Face's own generate()."""
    tokenizer = processor.tokenizer
    ids, more = list(prompt_ids(row["text"], tokenizer, has_image=bool(row["image"]))), {}
    if row["image"]:
        at = ids.index(IMAGE_TOKEN_INDEX)
        ids[at : at + 1] = [model.config.image_token_index] * model.config.image_seq_length
        with Image.open(row["image"]) as image:
            more["pixel_values"] = processor.image_processor(
                [image.convert("RGB")], return_tensors="pt"
            )["pixel_values"]
    ids = torch.tensor([ids])
    more |= {
        "attention_mask": torch.ones_like(ids),
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": 0,
    }
    out = model.generate(input_ids=ids, do_sample=False, max_new_tokens=max_new_tokens, **more)[
        0, ids.shape[1] :
    ]
    finish = "stop" if tokenizer.eos_token_id in out.tolist() else "length"
    return tokenizer.decode(out, skip_special_tokens=True).strip(), finish


class TinyRun:
    """As much of a Run as evaluate() needs; `loaded` counts how often its model was loaded."""

    def __init__(self, folder, tiny, seed=0):
        self.folder, self.tiny, self.loaded = folder, tiny, 0
        self.recipe = SimpleNamespace(
            name="tiny-run", seed=seed, benchmarks=str(folder / "benchmarks")
        )
        tiny.model.save_pretrained(folder / "model")

    def load_model(self):
        self.loaded += 1
        return self.tiny.model

    def processor(self):
        return self.tiny.processor


def write_pope(folder, pictures):
    """Write twelve POPE questions to `folder`/pope; `pictures` is the folder of 0.png to 4.png."""
    (folder / "pope").mkdir(parents=True)
    (folder / "images").symlink_to(pictures)
    objects = [
        ("star", "yes", "random"),
        ("circle", "no", "random"),
        ("red star", "yes", "popular"),
        ("blue", "no", "popular"),
    ]
    rows = [
        {
            "question_id": str(i),
            "image": f"{i % 5}.png",
            "text": f"is there a {w} ?",
            "label": label,
            "category": category,
        }
        for i, (w, label, category) in enumerate(objects * 3)
    ]
    (folder / "pope" / "questions.jsonl").write_text("\n".join(map(json.dumps, rows)))


def lines(path):
    """A kept file: its header, and its rows."""
    header, *rows = (json.loads(line) for line in path.read_text().splitlines())
    return header, rows
