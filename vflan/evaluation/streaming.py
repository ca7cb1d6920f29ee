"""Talk to a model: the answer as it is written, and which patches of the picture it looks at before it begins.

For one question at a time, by transformers' own generate; lists of questions are quicker through vflan.answer.
"""

from math import isqrt
from threading import Event, Thread

import numpy as np
import torch
from PIL import Image
from transformers import TextIteratorStreamer

from vflan.data.conversation import expand, prompt_ids
from vflan.data.images import read_picture


def stream(
    model,
    processor,
    text,
    image=None,
    max_new_tokens=64,
    temperature=0.0,
    stop=None,
    template="vicuna_v1",
    before=(),
):
    """Yields the answer to one question in pieces of text, as they are written; at temperature 0 (greedy) their words are
    those of `answer`.

    image: a path, a PIL picture or None. temperature: above 0 tokens are drawn, the higher the wilder. stop: a
    threading.Event that ends the answer where it stands. before: (question, answer) pairs said so far, which the model
    reads first. What the model raises is raised here; OSError where the picture cannot be read; ValueError where the
    conversation is longer than the model reads.
    """
    stop, failed = stop or Event(), []
    inputs = _inputs(model, processor, text, image, template, before)
    streamer = TextIteratorStreamer(processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
    how = (
        dict(do_sample=True, temperature=float(temperature), top_k=0)
        if temperature > 0
        else dict(do_sample=False)
    )
    how |= dict(
        eos_token_id=processor.tokenizer.eos_token_id,
        pad_token_id=processor.tokenizer.pad_token_id or 0,
    )

    def ended(ids, scores, **_):
        return torch.full((len(ids),), stop.is_set(), device=ids.device)

    def write():
        try:
            model.generate(
                **inputs,
                **how,
                max_new_tokens=max_new_tokens,
                streamer=streamer,
                stopping_criteria=[ended],
            )
        except (
            Exception
        ) as trouble:  # it would end in the thread, and the reader would wait for ever
            failed.append(trouble)
            streamer.end()

    was_training = model.training
    model.eval()
    thread = Thread(target=write, daemon=True)
    thread.start()
    try:
        yield from filter(None, streamer)
    finally:  # also when nobody reads on
        stop.set()
        thread.join()
        model.train(was_training)
    if failed:
        raise failed[0]


@torch.inference_mode()
def attention_maps(model, processor, text, image, template="vicuna_v1", before=()):
    """How much of its attention each layer gives to each patch before the first word of the answer: an array (layers,
    side, side), averaged over heads; a layer's sum is the share that goes to the picture at all.

    image: a path or a PIL picture. before: as for `stream`.
    """
    inputs, language = (
        _inputs(model, processor, text, image, template, before),
        model.model.language_model,
    )
    before = language.config._attn_implementation
    language.set_attn_implementation(
        "eager"
    )  # the other implementations never write the weights down
    try:
        layers = model(
            **inputs, output_attentions=True
        ).attentions  # of each layer: (1, heads, tokens, tokens)
    finally:
        language.set_attn_implementation(before)
    patches = inputs["input_ids"][0] == model.config.image_token_id
    side = isqrt(int(patches.sum()))
    maps = [layer[0, :, -1, patches].mean(0).view(side, side) for layer in layers]
    return torch.stack(maps).float().cpu().numpy()


def seen(processor, image):
    """The picture as the vision tower gets it, padded or cropped and scaled, as a PIL picture: patches lie on this one."""
    preparation = processor.image_processor
    pixels = np.asarray(preparation([_picture(image)], return_tensors="np")["pixel_values"][0])
    mean, std = (
        np.array(values)[:, None, None]
        for values in (preparation.image_mean, preparation.image_std)
    )
    return Image.fromarray(
        np.uint8((255 * (pixels * std + mean)).clip(0, 255).round().transpose(1, 2, 0))
    )


def _picture(image):
    return image.convert("RGB") if isinstance(image, Image.Image) else read_picture(image)


def _inputs(model, processor, text, image, template, before=()):
    """One question as the model's forward takes it: ids (1, tokens), as many of them as the picture has features."""
    ids = prompt_ids(
        text, processor.tokenizer, template, has_image=image is not None, before=before
    )
    ids, _ = expand(ids, [0] * len(ids), model.config.image_seq_length, model.config.image_token_id)
    if before and len(ids) >= (most := model.config.text_config.max_position_embeddings):
        raise ValueError(
            f"This conversation has {len(ids):,} tokens and the model reads {most:,}: begin a new one."
        )
    inputs = {"input_ids": torch.tensor([ids], device=model.device)}
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    if image is not None:
        pixels = processor.image_processor([_picture(image)], return_tensors="pt")["pixel_values"]
        inputs["pixel_values"] = pixels.to(model.device, model.dtype)
    return inputs
