"""Ask a model: answer() for any list of questions, answering() as they come.

Three things make it quick without changing a single answer. What precedes the picture is the same for all questions and
is read once; a picture is read once, however many questions are asked about it; and questions of one length share a
batch, so that hardly anything is padding. The rest is greedy decoding, as the papers' benchmarks want it.
"""

import hashlib
import math
from concurrent.futures import ThreadPoolExecutor
from copy import copy

import torch
from transformers import DynamicCache

from vflan.conversation import IGNORE_INDEX, IMAGE_TOKEN_INDEX, encode, prompt_ids
from vflan.kept import Answer
from vflan.model import image_features, parts
from vflan.pictures import picture_trouble, read_picture

SHELF_BYTES = 2 << 30  # keys and values of pictures that are kept at a time


def answer(model, processor, samples, max_new_tokens=32, batch_size=32, template="vicuna_v1"):
    """list[str]: the greedy answer to each sample, a mapping with `text` (the human turn) and `image` (a path or None).

    Equals asking one by one (up to floating point: in half precision a near tie may fall the other way). ValueError
    where a picture cannot be read.
    """
    said = dict(answering(model, processor, samples, max_new_tokens, batch_size, template))
    if failed := [i for i in said if said[i].finish == "error"]:
        raise ValueError(
            f"{len(failed)} questions were not answered, first question {failed[0]}: {said[failed[0]].reason}"
        )
    return [said[i].text for i in range(len(samples))]


@torch.inference_mode()
def answering(model, processor, samples, max_new_tokens=32, batch_size=32, template="vicuna_v1"):
    """Yields (index, Answer) batch by batch, in the order in which they come out, not in that of the samples.

    A sample with `choices`, a list of words, is answered from one forward pass: with the choice whose first token is the
    likeliest. A picture that cannot be read makes its questions errors with a reason.
    """
    tokenizer, was_training = processor.tokenizer, model.training
    tokens = {}  # (text, whether there is a picture) -> ids: POPE has 80 texts in 8,910 questions
    groups = {}  # (ids before the picture, whether to choose) -> picture -> [(index, ids after the picture)]
    for index, sample in enumerate(samples):
        image = sample.get("image") or None
        key = sample["text"], image is not None
        ids = tokens[key] = tokens.get(key) or prompt_ids(key[0], tokenizer, template, has_image=key[1])
        at = ids.index(IMAGE_TOKEN_INDEX) if image else 0
        group = groups.setdefault((tuple(ids[:at]), bool(sample.get("choices"))), {})
        group.setdefault(image, []).append((index, ids[at + 1 :] if image else ids))
    words = {word for sample in samples for word in sample.get("choices") or ()}
    starts = {word: first_token(word, tokenizer) for word in words}
    model.eval()
    try:
        for (before, choose), pictures in groups.items():
            for cache, rows, failed in shelves(model, processor, before, pictures, batch_size):
                yield from failed
                rows.sort(key=lambda row: -len(row[2]))
                for start in range(0, len(rows), batch_size):
                    batch = rows[start : start + batch_size]
                    prompts = [ids for *_, ids in batch]
                    own = pick(cache, [slot for _, slot, _ in batch])
                    if choose:
                        allowed = [samples[index]["choices"] for index, *_ in batch]
                        said = choices(model, own, prompts, allowed, starts, tokenizer)
                    else:
                        said = [
                            Answer(tokenizer.decode(ids, skip_special_tokens=True).strip(), finish)
                            for ids, finish in decode(model, own, prompts, max_new_tokens, tokenizer)
                        ]
                    yield from zip((index for index, *_ in batch), said)
    finally:
        model.train(was_training)


def shelves(model, processor, before, pictures, batch_size):
    """Yields (cache, [(index, slot, ids)], failed): keys and values of some pictures, a slot each, and their questions.

    `before` is read once, each picture once. A shelf holds a batch of pictures or what fits in SHELF_BYTES, and at least
    enough to fill a batch with questions. Questions without a picture come with an empty cache. failed: the errors of
    pictures that cannot be read.
    """
    device = model.device
    if None in pictures:
        yield None, [(index, 0, ids) for index, ids in pictures.pop(None)], []
    if not pictures:
        return
    head = DynamicCache()
    model(input_ids=torch.tensor([before], device=device), past_key_values=head, use_cache=True, logits_to_keep=1)
    text = model.config.text_config
    tokens = len(before) + model.config.image_seq_length
    width = text.num_key_value_heads * (getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads)
    picture_bytes = 2 * text.num_hidden_layers * width * tokens * model.dtype.itemsize
    a_batch = math.ceil(batch_size * len(pictures) / sum(map(len, pictures.values())))
    size = max(a_batch, min(batch_size, SHELF_BYTES // picture_bytes))
    # the longest first: if memory is short, it is so at once; and pictures with one question each are then in batch order
    paths = sorted(pictures, key=lambda path: -max(len(ids) for _, ids in pictures[path]))
    cut = [paths[start : start + size] for start in range(0, len(paths), size)]
    for shelf, pixels in zip(cut, ahead(lambda shelf: [pixels_of(processor, path) for path in shelf], cut)):
        failed = [(index, Answer("", "error", why))
                  for path, why in zip(shelf, pixels) if isinstance(why, str) for index, _ in pictures[path]]  # fmt: skip
        seen = [(path, values) for path, values in zip(shelf, pixels) if not isinstance(values, str)]
        if not seen:
            yield None, [], failed
            continue
        values = torch.stack([values for _, values in seen]).to(device)
        found = parts(model)["projector"](image_features(model, values)).to(model.dtype)
        cache = pick(head, [0] * len(seen))
        model(inputs_embeds=found, past_key_values=cache, use_cache=True, logits_to_keep=1)
        yield (
            cache,
            [(index, slot, ids) for slot, (path, _) in enumerate(seen) for index, ids in pictures[path]],
            failed,
        )


def pixels_of(processor, path):
    """(3, height, width) of a picture as the vision tower wants it; or, in words, why it cannot be read."""
    try:
        return processor.image_processor([read_picture(path)], return_tensors="pt")["pixel_values"][0]
    except Exception as trouble:  # Pillow raises many kinds, and a picture must not end an evaluation
        return picture_trouble(str(path)) or f"{path}: {trouble}"


def ahead(function, items):
    """Yields function(item) for each item; the next one is computed in a thread meanwhile."""
    with ThreadPoolExecutor(1) as thread:
        later = None
        for item in items:
            soon = thread.submit(function, item)
            if later:
                yield later.result()
            later = soon
        if later:
            yield later.result()


def pick(cache, rows):
    """A cache with the given rows of `cache`, in that order (a list); a row may occur more than once. None: an empty one.

    The old cache stays as it is: a layer grows by making new tensors, so both may share what was read already.
    """
    if cache is None:
        return DynamicCache()
    new = copy(cache)
    new.layers = [copy(layer) for layer in cache.layers]
    keys = new.layers[0].keys
    if rows != list(range(len(keys))):
        new.batch_select_indices(torch.tensor(rows, device=keys.device))
    return new


def read(model, cache, prompts, pad):
    """(logits of the last token, position of the next, mask): reads `prompts`, left-padded to the longest, after `cache`."""
    device, past, width = model.device, cache.get_seq_length(), max(map(len, prompts))
    pads = torch.tensor([width - len(ids) for ids in prompts], device=device)[:, None]
    ids = torch.tensor([[pad] * (width - len(p)) + p for p in prompts], device=device)
    columns = torch.arange(width, device=device)
    position = past + (columns - pads).clamp(min=0)
    mask = None
    if pads.any():
        mask = torch.cat([ids.new_ones(len(prompts), past), (columns >= pads).long()], dim=1)
    out = model(input_ids=ids, attention_mask=mask, position_ids=position, past_key_values=cache, use_cache=True,
                logits_to_keep=1)  # fmt: skip
    return out.logits[:, -1], position[:, -1:] + 1, mask


def decode(model, cache, prompts, max_new_tokens, tokenizer):
    """[(ids, `stop` or `length`)]: greedy continuations of `prompts`, which follow what `cache` has read already.

    A finished row leaves the batch once half of the rows are done.
    """
    said, finish = [[] for _ in prompts], ["length"] * len(prompts)
    logits, position, mask = read(model, cache, prompts, tokenizer.pad_token_id or 0)
    rows, alive = list(range(len(prompts))), [True] * len(prompts)
    while True:
        token = logits.argmax(-1)
        for at, (row, new) in enumerate(zip(rows, token.tolist())):
            if alive[at] and new == tokenizer.eos_token_id:
                finish[row], alive[at] = "stop", False
            elif alive[at]:
                said[row].append(new)
                alive[at] = len(said[row]) < max_new_tokens
        if not any(alive):
            return list(zip(said, finish))
        if sum(alive) * 2 <= len(alive):
            keep = [at for at, going in enumerate(alive) if going]
            where = torch.tensor(keep, device=token.device)
            cache.batch_select_indices(where)
            token, position, rows, alive = token[where], position[where], [rows[at] for at in keep], [True] * len(keep)
            mask = mask if mask is None else mask[where]
        if mask is not None:
            mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
        out = model(input_ids=token[:, None], attention_mask=mask, position_ids=position, past_key_values=cache,
                    use_cache=True, logits_to_keep=1)  # fmt: skip
        logits, position = out.logits[:, -1], position + 1


def choices(model, cache, prompts, allowed, starts, tokenizer):
    """[Answer]: of each prompt's `allowed` words the one whose first token (`starts`) is the likeliest next."""
    logits, *_ = read(model, cache, prompts, tokenizer.pad_token_id or 0)
    said = []
    for row, own in zip(logits.float().cpu(), allowed):
        own = [word for word in own if starts[word] != tokenizer.unk_token_id] or own
        ids = [starts[word] for word in own]
        if len(set(ids)) < len(ids):
            raise ValueError(
                f"One pass cannot tell {', '.join(own)} apart: some begin with the same token; answer in full."
            )
        said.append(Answer(own[int(row[ids].argmax())], "choice"))
    return said


def first_token(word, tokenizer):
    """The id with which an answer that begins with `word` begins."""
    turns = [{"from": "human", "value": "?"}, {"from": "gpt", "value": word}]
    return next(label for label in encode(turns, tokenizer)[1] if label != IGNORE_INDEX)


def fingerprint_of_model(model):
    """A short hash of a model in memory, from up to 4096 values of every tensor."""
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        flat = tensor.detach().flatten()
        sampled = flat[:: max(1, flat.numel() // 4096)][:4096]
        digest.update(name.encode() + sampled.double().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]
