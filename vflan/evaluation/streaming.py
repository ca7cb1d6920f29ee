"""Streams one answer as it is generated, captions pictures, and shows which patches are looked at.

By transformers' own generate; vflan.answer is faster for lists of questions.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import isqrt
from threading import Event, Thread
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image
from transformers import TextIteratorStreamer

from vflan.data.conversation import expand, prompt_ids
from vflan.data.images import as_rgb, read_picture
from vflan.models.llava import image_features, parts

if TYPE_CHECKING:
    import os

    from transformers import LlavaForConditionalGeneration, LlavaProcessor

    Picture = str | os.PathLike | Image.Image
    Turns = Sequence[tuple[str, str]]


def stream(
    model: LlavaForConditionalGeneration,
    processor: LlavaProcessor,
    text: str,
    image: Picture | None = None,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    stop: Event | None = None,
    template: str = "vicuna_v1",
    before: Turns = (),
    begun: str = "",
    ended: list[str] | None = None,
) -> Iterator[str]:
    """Yields the answer to one question in pieces of text, as they are generated.

    At temperature 0 (greedy) the words are those of `answer`; above 0 tokens are sampled. image: a
    path, a PIL picture or None. stop: an event that ends the answer when it is set. before: earlier
    (question, answer) pairs of the conversation. begun: an answer that was cut, to go on with; the
    first piece is what follows it, with a space where a new word begins.
    ended: gets why the answer ended: "stop" (the model's end), "length" (max_new_tokens or the end
    of its context) or "stopped". Errors of the model are raised here; OSError if
    the picture cannot be read; ValueError if the conversation is longer than the model's context.
    """
    stop, outcome, was_training = stop or Event(), {}, model.training
    tokenizer = processor.tokenizer
    options = _inputs(model, processor, text, image, template, before, begun)
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    # Decoders drop the space before the first word of a text: the streamer has to know of `begun`.
    streamer.token_cache = _begun_ids(tokenizer, begun)
    streamer.print_len = len(tokenizer.decode(streamer.token_cache, skip_special_tokens=True))
    longest = model.config.text_config.max_position_embeddings
    room = max(1, longest - options["input_ids"].shape[1])
    options |= dict(streamer=streamer, max_new_tokens=min(max_new_tokens, room))
    options |= dict(eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id or 0)
    options |= dict(do_sample=temperature > 0)
    # transformers warns about a temperature if nothing is sampled.
    if temperature > 0:
        options |= dict(temperature=float(temperature), top_k=0)

    # generate() blocks, so it runs in a thread and this one reads what it writes.
    model.eval()
    thread = Thread(target=_generate, args=(model, options, stop, outcome), daemon=True)
    thread.start()
    try:
        yield from filter(None, streamer)
    finally:
        # Also runs if the reader stops early.
        stop.set()
        thread.join()
        model.train(was_training)
    if "error" in outcome:
        raise outcome["error"]
    if ended is not None:
        ended.append(outcome["reason"])


def _generate(model, options, stop, outcome):
    """Generate until the end or `stop`; `outcome` gets the error, or the reason of the end."""
    halted = []

    # generate() asks this after every token.
    def must_stop(ids, scores, **_):
        if stop.is_set():
            halted.append(True)
        return torch.full((len(ids),), stop.is_set(), device=ids.device)

    try:
        ids = model.generate(**options, stopping_criteria=[must_stop])
    # An error that ended only the thread would leave the reader waiting for ever.
    except Exception as error:
        outcome["error"] = error
        options["streamer"].end()
    else:
        is_whole = int(ids[0, -1]) == options["eos_token_id"]
        outcome["reason"] = "stop" if is_whole else "stopped" if halted else "length"


@torch.inference_mode()
def captioned(
    model: LlavaForConditionalGeneration,
    processor: LlavaProcessor,
    images: Sequence[Picture],
    max_new_tokens: int = 48,
    batch_size: int = 8,
) -> list[str]:
    """What a model says to each picture and no question (template `plain`), up to the line's end.

    Few pictures at a time: at 7B, the keys and values of 64 take 21 GB.
    """
    ids = prompt_ids("", processor.tokenizer, "plain")
    ids, _ = expand(ids, ids, model.config.image_seq_length, model.config.image_token_id)
    lines = []
    for start in range(0, len(images), batch_size):
        some = [_read(image) for image in images[start : start + batch_size]]
        pixels = processor.image_processor(some, return_tensors="pt")["pixel_values"]
        asked = torch.tensor([ids] * len(some), device=model.device)
        inputs = dict(attention_mask=torch.ones_like(asked), max_new_tokens=max_new_tokens)
        inputs["pixel_values"] = pixels.to(model.device, model.dtype)
        said = model.generate(asked, **inputs)[:, len(ids) :]
        texts = processor.tokenizer.batch_decode(said, skip_special_tokens=True)
        lines += [text.strip().split("\n")[0] for text in texts]
    return lines


@torch.inference_mode()
def nearest_words(
    model: LlavaForConditionalGeneration, processor: LlavaProcessor, image: Picture
) -> np.ndarray:
    """The word that each patch looks like to the language model, before it has read anything.

    That is the token whose embedding has the largest cosine with the patch's vector after the
    projector. Returns (side, side) texts. image: a path or a PIL picture.
    """
    pixels = processor.image_processor([_read(image)], return_tensors="pt")["pixel_values"]
    features = image_features(model, pixels.to(model.device, model.dtype))
    vectors = parts(model)["projector"](features)[0].float()  # (patches, width)
    embeddings = model.get_input_embeddings().weight.float()  # (vocabulary, width)
    unit = torch.nn.functional.normalize
    nearest = (unit(vectors, dim=-1) @ unit(embeddings, dim=-1).T).argmax(-1).tolist()
    words = [processor.tokenizer.decode([token]).strip() or "\u00b7" for token in nearest]
    return np.array(words, dtype=object).reshape(isqrt(len(words)), -1)


@torch.inference_mode()
def attention_maps(
    model: LlavaForConditionalGeneration,
    processor: LlavaProcessor,
    text: str,
    image: Picture,
    template: str = "vicuna_v1",
    before: Turns = (),
) -> np.ndarray:
    """Attention of each layer to each patch before the first word of the answer.

    Returns (layers, side, side), averaged over heads; the sum over a layer is the share of its
    attention that goes to the picture. image: a path or a PIL picture. before: as for `stream`.
    """
    inputs = _inputs(model, processor, text, image, template, before)
    language = model.model.language_model
    implementation = language.config._attn_implementation
    # Only the eager implementation returns attention weights.
    language.set_attn_implementation("eager")
    try:
        layers = model(
            **inputs, output_attentions=True
        ).attentions  # each (1, heads, tokens, tokens)
    finally:
        language.set_attn_implementation(implementation)
    patches = inputs["input_ids"][0] == model.config.image_token_id  # (tokens,)
    side = isqrt(int(patches.sum()))
    # The last token is the one that predicts the first word of the answer.
    maps = [layer[0, :, -1, patches].mean(0).view(side, side) for layer in layers]
    return torch.stack(maps).float().cpu().numpy()


def tower_view(processor: LlavaProcessor, image: Picture) -> Image.Image:
    """The picture as the vision tower sees it: padded or cropped, and scaled. Patches divide it."""
    preparation = processor.image_processor
    pixels = preparation([_read(image)], return_tensors="np")["pixel_values"][0]
    statistics = preparation.image_mean, preparation.image_std
    mean, std = (np.array(values)[:, None, None] for values in statistics)
    # Undo the normalisation.
    pixels = 255 * (np.asarray(pixels) * std + mean)  # (3, height, width)
    return Image.fromarray(np.uint8(pixels.clip(0, 255).round().transpose(1, 2, 0)))


def _read(image: Picture) -> Image.Image:
    return as_rgb(image) if isinstance(image, Image.Image) else read_picture(image)


def _begun_ids(tokenizer, begun: str) -> list[int]:
    return tokenizer(begun.lstrip(), add_special_tokens=False)["input_ids"] if begun else []


def _inputs(model, processor, text, image, template, before=(), begun=""):
    """Arguments of the model's forward for one question and the beginning of its answer."""
    ids = prompt_ids(
        text, processor.tokenizer, template, has_image=image is not None, before=before
    )
    ids = [*ids, *_begun_ids(processor.tokenizer, begun)]
    # The model expects one image token for each feature of the picture.
    ids, _ = expand(ids, [0] * len(ids), model.config.image_seq_length, model.config.image_token_id)
    longest = model.config.text_config.max_position_embeddings
    if (before or begun) and len(ids) >= longest:
        raise ValueError(
            f"This conversation has {len(ids):,} tokens, and the model reads at most {longest:,}: "
            "begin a new one."
        )
    inputs = {"input_ids": torch.tensor([ids], device=model.device)}  # (1, tokens)
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    if image is not None:
        pixels = processor.image_processor([_read(image)], return_tensors="pt")["pixel_values"]
        inputs["pixel_values"] = pixels.to(model.device, model.dtype)  # (1, 3, height, width)
    return inputs
