"""Ask a model: answer() for any list of questions, answering() as they come.

Three things make it quick without changing a single answer. What precedes the picture is the same for all questions and
is read once; a picture is read once, however many questions are asked about it; and several questions on one picture
stand in one row behind it, each blind to the others, so that what was read is not copied for each of them. Rows of one
length share a batch. What the tower saw is kept for the next model with the same tower, as in a sweep. The rest is greedy
decoding, as the papers' benchmarks want it.
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
from vflan.pictures import picture_trouble, read_picture, stamp
from vflan.progress import counted

SHELF_BYTES = 2 << 30  # keys and values of pictures that are kept at a time
SEEN_BYTES = 256 << 20  # what the tower saw of pictures is kept up to here, the newest
ROW = 8  # questions on one picture that share a row: more would save little memory and attend to much in vain
PREFIX, PAD = -1, -2  # whose a token is, where it is no question's: everybody's in its row, nobody's
_SEEN: dict = {}  # (tower, pictures of a shelf) -> features: the models of a sweep have one tower and are asked the same


def answer(model, processor, samples, max_new_tokens=32, batch_size=32, template="vicuna_v1"):
    """list[str]: the greedy answer to each sample, a mapping with `text` (the human turn) and `image` (a path or None).

    Equals asking one by one (up to floating point: in half precision a near tie may fall the other way). ValueError
    where a picture cannot be read.
    """
    said = answering(model, processor, samples, max_new_tokens, batch_size, template)
    said = dict(counted(said, "answering", len(samples), "questions"))
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
                for batch in batches(rows, batch_size):
                    own = pick(cache, [slot for slot, _ in batch])
                    prompts = [[ids for _, ids in row] for _, row in batch]
                    where = [index for _, row in batch for index, _ in row]
                    if choose:
                        allowed = [samples[index]["choices"] for index in where]
                        said = choices(model, own, prompts, allowed, starts, tokenizer)
                    else:
                        said = [
                            Answer(tokenizer.decode(ids, skip_special_tokens=True).strip(), finish)
                            for ids, finish in decode(model, own, prompts, max_new_tokens, tokenizer)
                        ]
                    yield from zip(where, said)
    finally:
        model.train(was_training)


def shelves(model, processor, before, pictures, batch_size):
    """Yields (cache, [(slot, [(index, ids)])], failed): keys and values of some pictures, a slot each, and their questions.

    `before` is read once, each picture once. A shelf holds a batch of pictures or what fits in SHELF_BYTES, and at least
    enough to fill a batch with questions. Questions without a picture come with an empty cache. failed: the errors of
    pictures that cannot be read.
    """
    device, language = model.device, parts(model)["language_model"]["model"]
    if None in pictures:
        yield None, [(0, [question]) for question in pictures.pop(None)], []
    if not pictures:
        return
    head = DynamicCache()
    language(input_ids=torch.tensor([before], device=device), past_key_values=head, use_cache=True)
    text = model.config.text_config
    tokens = len(before) + model.config.image_seq_length
    width = text.num_key_value_heads * (getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads)
    picture_bytes = 2 * text.num_hidden_layers * width * tokens * model.dtype.itemsize
    a_batch = math.ceil(batch_size * len(pictures) / sum(map(len, pictures.values())))
    size = max(a_batch, min(batch_size, SHELF_BYTES // picture_bytes))
    # the longest first: if memory is short, it is so at once; and pictures with one question each are then in batch order
    paths = sorted(pictures, key=lambda path: -max(len(ids) for _, ids in pictures[path]))
    cut = [paths[start : start + size] for start in range(0, len(paths), size)]
    tower = (
        fingerprint_of_model(parts(model)["vision_tower"]),
        model.config.vision_feature_layer,
        model.dtype,
        device.type,
    )
    preparation = str(processor.image_processor.to_dict())

    def looked_at(shelf):
        key = (*tower, preparation, *((str(path), stamp(path)) for path in shelf))
        features = _SEEN.get(key)
        return key, features, [pixels_of(processor, path) for path in shelf] if features is None else []

    for shelf, (key, features, pixels) in zip(cut, ahead(looked_at, cut)):
        failed = [(index, Answer("", "error", why))
                  for path, why in zip(shelf, pixels) if isinstance(why, str) for index, _ in pictures[path]]  # fmt: skip
        if features is None:
            shelf = [path for path, values in zip(shelf, pixels) if not isinstance(values, str)]
            values = [values for values in pixels if not isinstance(values, str)]
            if not shelf:
                yield None, [], failed
                continue
            features = image_features(model, torch.stack(values).to(device))
            if not failed:
                remember(key, features)
        found = parts(model)["projector"](features.to(device)).to(model.dtype)
        cache = pick(head, [0] * len(shelf))
        language(inputs_embeds=found, past_key_values=cache, use_cache=True)
        yield cache, [(slot, pictures[path]) for slot, path in enumerate(shelf)], failed


def remember(key, features):
    """Keep what the tower saw of a shelf, whole: the next model then reads the very same bits; the oldest give way."""
    _SEEN[key] = features.cpu()
    while sum(kept.nbytes for kept in _SEEN.values()) > SEEN_BYTES:
        del _SEEN[next(iter(_SEEN))]


def batches(rows, batch_size):
    """Yields [(slot, [(index, ids)])]: about batch_size questions, at most ROW of them in a row, the longest rows first."""
    cut = []
    for slot, questions in rows:
        size = math.ceil(len(questions) / math.ceil(len(questions) / ROW))
        questions = sorted(questions, key=lambda question: -len(question[1]))
        cut += [(slot, questions[start : start + size]) for start in range(0, len(questions), size)]
    cut.sort(key=lambda row: -sum(len(ids) for _, ids in row[1]))
    batch = []
    for row in cut:
        if batch and sum(len(questions) for _, questions in [*batch, row]) > batch_size:
            yield batch
            batch = []
        batch.append(row)
    yield from [batch] if batch else []


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


def read(model, cache, owner, pieces, pad):
    """(logits after the last token of each piece, owner): `pieces` are read after what `cache` holds.

    pieces: for each row of the cache [(number, position, ids)], stretches of the questions of those numbers. owner:
    (rows, tokens), whose each token in the cache is. A token attends to PREFIX and to its own question, as if alone.
    """
    width = max(sum(len(ids) for *_, ids in row) for row in pieces)
    ids, mine, position, ends = [], [], [], []
    for at, row in enumerate(pieces):
        ids.append([token for *_, own in row for token in own])
        mine.append([number for number, _, own in row for _ in own])
        position.append([start + k for _, start, own in row for k in range(len(own))])
        ends += [(at, sum(len(own) for *_, own in row[: k + 1]) - 1) for k in range(len(row))]
        for values, blank in ((ids, pad), (mine, PAD), (position, 0)):
            values[-1] += [blank] * (width - len(values[-1]))
    ids, mine, position = (torch.tensor(values) for values in (ids, mine, position))
    owner = torch.cat([owner, mine], dim=1)
    mask, total = None, owner.shape[1]
    if ((owner != PREFIX) & (owner != mine[:, :1])).any():  # else all that is there belongs to one question a row
        earlier = torch.arange(total) <= torch.arange(total - width, total)[:, None]
        seen = (owner[:, None] == PREFIX) | ((owner[:, None] == mine[:, :, None]) & earlier)
        mask = torch.zeros(seen.shape, dtype=model.dtype).masked_fill(~seen, torch.finfo(model.dtype).min)
        mask = mask[:, None].to(model.device)
    language = parts(model)["language_model"]
    hidden = language["model"](input_ids=ids.to(model.device), attention_mask=mask, past_key_values=cache,
                               position_ids=position.to(model.device), use_cache=True).last_hidden_state  # fmt: skip
    rows, columns = zip(*ends)
    return language["lm_head"](hidden[list(rows), list(columns)]), owner


def first_pieces(cache, prompts):
    """(owner, pieces) to begin with: `prompts`, for each row a list of ids, after a cache that all of them may see."""
    past = cache.get_seq_length()
    numbers = iter(range(sum(map(len, prompts))))
    return torch.full((len(prompts), past), PREFIX), [[(next(numbers), past, ids) for ids in row] for row in prompts]


def decode(model, cache, prompts, max_new_tokens, tokenizer):
    """[(ids, `stop` or `length`)]: greedy continuations of all `prompts` (for each row of the cache a list of ids).

    A row whose questions are all answered leaves the batch once half of the rows are done.
    """
    owner, pieces = first_pieces(cache, prompts)
    said, finish = [[] for row in pieces for _ in row], ["length" for row in pieces for _ in row]
    while True:
        logits, owner = read(model, cache, owner, pieces, tokenizer.pad_token_id or 0)
        tokens = iter(logits.argmax(-1).tolist())
        going = []
        for row in pieces:
            going.append([])
            for number, position, ids in row:
                token = next(tokens)
                if token == tokenizer.eos_token_id:
                    finish[number] = "stop"
                    continue
                said[number].append(token)
                if len(said[number]) < max_new_tokens:
                    going[-1].append((number, position + len(ids), [token]))
        pieces = going
        if not any(pieces):
            return list(zip(said, finish))
        keep = [at for at, row in enumerate(pieces) if row]
        if len(keep) * 2 <= len(pieces):
            where = torch.tensor(keep)
            cache.batch_select_indices(where.to(model.device))
            owner, pieces = owner[where], [pieces[at] for at in keep]


def choices(model, cache, prompts, allowed, starts, tokenizer):
    """[Answer]: of each prompt's `allowed` words the one whose first token (`starts`) is the likeliest next."""
    logits, _ = read(model, cache, *first_pieces(cache, prompts), tokenizer.pad_token_id or 0)
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
