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
from dataclasses import dataclass
from functools import partial

import torch
from transformers import DynamicCache

from vflan.data.conversation import IGNORE_INDEX, IMAGE_TOKEN_INDEX, encode, prompt_ids
from vflan.data.images import picture_trouble, read_picture, stamp
from vflan.evaluation.answer_cache import Answer
from vflan.models.cache_size import Sizes, free, ran_out, sizes
from vflan.models.llava import image_features, parts
from vflan.progress import counted

SHELF_BYTES = 2 << 30  # keys and values of pictures that are kept at a time
SEEN_BYTES = 256 << 20  # what the tower saw of pictures is kept up to here, the newest
ROW = 8  # questions on one picture that share a row: more would save little memory and attend to much in vain
PREFIX, PAD = (
    -1,
    -2,
)  # whose a token is, where it is no question's: everybody's in its row, nobody's
_SEEN: dict = {}  # (tower, pictures of a shelf) -> features: the models of a sweep have one tower and are asked the same


def answer(
    model, processor, samples, max_new_tokens=32, batch_size=32, template="vicuna_v1", memory=None
):
    """list[str]: the greedy answer to each sample, a mapping with `text` (the human turn) and `image` (a path or None).

    Equals asking one by one (up to floating point: in half precision a near tie may fall the other way). memory: bytes
    that answering may take beside the weights, as for `answering`. ValueError where a picture cannot be read.
    """
    said = answering(model, processor, samples, max_new_tokens, batch_size, template, memory)
    said = dict(counted(said, "answering", len(samples), "questions"))
    if failed := [i for i in said if said[i].finish == "error"]:
        raise ValueError(
            f"{len(failed)} questions were not answered, first question {failed[0]}: {said[failed[0]].reason}"
        )
    return [said[i].text for i in range(len(samples))]


@torch.inference_mode()
def answering(
    model, processor, samples, max_new_tokens=32, batch_size=32, template="vicuna_v1", memory=None
):
    """Yields (index, Answer) batch by batch, in the order in which they come out, not in that of the samples.

    A sample with `choices`, a list of words, is answered from one forward pass: with the choice whose first token is the
    likeliest. A picture that cannot be read makes its questions errors with a reason. memory: bytes for keys, values and
    what passes make (None: what is free). Batches are as large as fit, at most `batch_size`; where memory runs out all
    the same they are halved, and nothing is asked twice. RuntimeError if one question alone does not fit.
    """
    tokenizer, was_training = processor.tokenizer, model.training
    tokens = {}  # (text, whether there is a picture) -> ids: POPE has 80 texts in 8,910 questions
    groups = {}  # (ids before the picture, whether to choose) -> picture -> [(index, ids after the picture)]
    for index, sample in enumerate(samples):
        image = sample.get("image") or None
        key = sample["text"], image is not None
        ids = tokens[key] = tokens.get(key) or prompt_ids(
            key[0], tokenizer, template, has_image=key[1]
        )
        at = ids.index(IMAGE_TOKEN_INDEX) if image else 0
        group = groups.setdefault((tuple(ids[:at]), bool(sample.get("choices"))), {})
        group.setdefault(image, []).append((index, ids[at + 1 :] if image else ids))
    words = {word for sample in samples for word in sample.get("choices") or ()}
    starts = {word: first_token(word, tokenizer) for word in words}
    each = sizes(model.config.text_config, model.dtype.itemsize)
    model.eval()

    def ask(cache, batch):
        prompts = [[ids for _, ids in row] for _, row in batch]
        where = [index for _, row in batch for index, _ in row]
        if samples[where[0]].get("choices"):
            allowed = [samples[index]["choices"] for index in where]
            return list(zip(where, choices(model, cache, prompts, allowed, starts, tokenizer)))
        said = decode(model, cache, prompts, max_new_tokens, tokenizer)
        texts = tokenizer.batch_decode([ids for ids, _ in said], skip_special_tokens=True)
        return list(
            zip(where, (Answer(text.strip(), finish) for text, (_, finish) in zip(texts, said)))
        )

    try:
        limit = Limit(free(model.device) if memory is None else memory, batch_size)
        for (before, choose), pictures in groups.items():
            new = 0 if choose else max_new_tokens
            without = [(None, [question]) for question in pictures.pop(None, [])]
            yield from served(without, Fit(limit, each, 0, 0, new), lambda features: None, ask)
            if not pictures:
                continue
            head, language = DynamicCache(), parts(model)["language_model"]["model"]
            language(
                input_ids=torch.tensor([before], device=model.device),
                past_key_values=head,
                use_cache=True,
            )
            fit = Fit(limit, each, len(before), model.config.image_seq_length, new)
            for shown, failed in looks(model, processor, pictures, batch_size):
                yield from failed
                yield from served(shown, fit, partial(after, model, head), ask)
    finally:
        model.train(was_training)


@dataclass
class Limit:
    """What answers may take. It gets smaller where memory runs out, and stays so for the questions that follow."""

    bytes: float
    batch: int  # questions


@dataclass(frozen=True)
class Fit:
    """How much of a group of questions fits: `before` positions, `wide` of a picture, their own, `new` of an answer."""

    limit: Limit
    each: Sizes
    before: int
    wide: int
    new: int

    def shelf(self, left):
        """How many of [(features, questions)] are read together, from the first on.

        As many as a batch of questions needs, or more if they take little. What is left of them beside a batch has to
        fit with it; one does in any case.
        """
        batch, past = self.limit.batch, self.before + self.wide
        needed = math.ceil(batch * len(left) / sum(len(questions) for _, questions in left))
        cheap = min(batch, SHELF_BYTES // int(self.each.cache(1, past))) if past else batch
        for number in range(min(len(left), max(needed, cheap)), 1, -1):
            rows = rows_of(list(enumerate(questions for _, questions in left[:number])))
            first, rest = self._first(rows, math.inf)
            if (
                max(self._bytes(first, rest), self.each.reading(number, self.before, self.wide))
                <= self.limit.bytes
            ):
                return number
        return 1

    def batch(self, rows):
        """(those of [(slot, [(index, ids)])] that are asked together, the others): what fits, a question in any case."""
        return self._first(rows, self.limit.bytes)

    def _first(self, rows, room):
        chosen, rows = [], list(rows)
        while rows:
            some = chosen + rows[:1]
            if (
                sum(len(questions) for _, questions in some) > max(1, self.limit.batch)
                or self._bytes(some, rows[1:]) > room
            ):
                (slot, questions), half = rows[0], len(rows[0][1]) // 2
                if chosen:
                    break
                if half:  # a row by itself may be too long
                    rows[:1] = [(slot, questions[:half]), (slot, questions[half:])]
                    continue
                return some, rows[1:]
            chosen = some
            rows = rows[1:]
        return chosen, rows

    def _bytes(self, batch, rest):
        """Of a batch, beside those pictures that the rest is about."""
        past = self.before + self.wide
        asked = [(len(questions), sum(len(ids) for _, ids in questions)) for _, questions in batch]
        return self.each.cache(len({slot for slot, _ in rest}), past) + self.each.asking(
            past, asked, self.new
        )

    def alone(self, batch, rest):
        """Whether a batch has room for itself only: the pictures of the rest are read again."""
        return bool(rest) and self._bytes(batch, rest) > self.limit.bytes

    def halve(self, batch, rest, reading):
        """Take half of what was too much from now on."""
        took = max(self._bytes(batch, rest), self.each.reading(reading, self.before, self.wide))
        self.limit.bytes = min(self.limit.bytes, took) / 2


def served(left, fit, read_pictures, ask):
    """Yields (index, Answer) for [(features, [(index, ids)])], pictures with their questions.

    read_pictures(list of features) gives a cache with a row for each; ask(cache, batch) answers. Only one cache is
    alive at a time: a batch takes the rows that it needs, and those that no question is left for go.
    """
    while left:
        number = fit.shelf(left)
        shelf, left = left[:number], left[number:]
        cache, rows, began = (
            None,
            rows_of(list(enumerate(questions for _, questions in shelf))),
            False,
        )
        places = list(range(number))  # the slot that each row of the cache is for
        while rows:
            batch, rest = fit.batch(rows)
            alone, said = fit.alone(batch, rest), None
            try:
                if not began:
                    cache, began = read_pictures([features for features, _ in shelf]), True
                keep = [] if alone else sorted({slot for slot, _ in rest})
                own, cache = divide(
                    cache,
                    [places.index(slot) for slot, _ in batch],
                    [places.index(s) for s in keep],
                )
                said = ask(own, batch)
            except Exception as trouble:
                if not ran_out(trouble):
                    raise
                if (
                    len(shelf) == 1
                    and sum(len(questions) for _, questions in batch) == 1
                    and (alone or not rest)
                ):
                    raise RuntimeError(
                        "One question alone does not fit into the memory that is free beside the model: close what else "
                        "uses it, take a GPU with more, or load the model in 4 bits (bits=4 in its recipe)."
                    ) from trouble
                fit.halve(batch, [] if alone else rest, 0 if began else number)
            # the error, and with it the frames that hold the tensors of what failed, are gone here
            own = None
            if said is None or alone:
                cache = None
                if said is None and torch.cuda.is_available():
                    torch.cuda.empty_cache()
                again = {}
                for slot, questions in rest if said is not None else rows:
                    again.setdefault(slot, []).extend(questions)
                left = [(shelf[slot][0], questions) for slot, questions in again.items()] + left
                rows = []
            else:
                rows, places = rest, keep
            if said is not None:
                yield from said


def looks(model, processor, pictures, batch_size):
    """Yields ([(features, [(index, ids)])], failed): some pictures as the tower saw them, with their questions.

    A picture is looked at once, `batch_size` of them together. failed: the errors of pictures that cannot be read.
    """
    device = model.device
    # the longest first: if memory is short, it is so at once; and pictures with one question each are then in batch order
    paths = sorted(pictures, key=lambda path: -max(len(ids) for _, ids in pictures[path]))
    cut = [paths[start : start + batch_size] for start in range(0, len(paths), batch_size)]
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
        return (
            key,
            features,
            [pixels_of(processor, path) for path in shelf] if features is None else [],
        )

    for shelf, (key, features, pixels) in zip(cut, ahead(looked_at, cut)):
        failed = [(index, Answer("", "error", why))
                  for path, why in zip(shelf, pixels) if isinstance(why, str) for index, _ in pictures[path]]  # fmt: skip
        if features is None:
            shelf = [path for path, values in zip(shelf, pixels) if not isinstance(values, str)]
            values = [values for values in pixels if not isinstance(values, str)]
            if not shelf:
                yield [], failed
                continue
            features = seen(model, torch.stack(values)).cpu()
            if not failed:
                remember(key, features)
        yield [(one, pictures[path]) for one, path in zip(features, shelf)], failed


def seen(model, values):
    """image_features of pictures (their number, 3, height, width), half of them at a time where memory runs out."""
    try:
        return image_features(model, values.to(model.device))
    except Exception as trouble:
        if len(values) == 1 or not ran_out(trouble):
            raise
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    half = len(values) // 2
    return torch.cat([seen(model, values[:half]).cpu(), seen(model, values[half:]).cpu()])


def after(model, head, features):
    """A cache with a row for each picture: what stands before it, a cache of one row, and the picture."""
    cache = copy(head)
    cache.layers = [copy(layer) for layer in head.layers]
    found = torch.stack(features).to(model.device)
    found = parts(model)["projector"](found).to(model.dtype)
    cache.batch_select_indices(torch.zeros(len(features), dtype=torch.long, device=model.device))
    parts(model)["language_model"]["model"](
        inputs_embeds=found, past_key_values=cache, use_cache=True
    )
    return cache


def remember(key, features):
    """Keep what the tower saw of a shelf, whole: the next model then reads the very same bits; the oldest give way."""
    _SEEN[key] = features
    while sum(kept.nbytes for kept in _SEEN.values()) > SEEN_BYTES:
        del _SEEN[next(iter(_SEEN))]


def rows_of(questions):
    """[(slot, [(index, ids)])] of questions by slot: at most ROW of them in a row, the longest rows first."""
    cut = []
    for slot, own in questions:
        size = math.ceil(len(own) / math.ceil(len(own) / ROW))
        own = sorted(own, key=lambda question: -len(question[1]))
        cut += [(slot, own[start : start + size]) for start in range(0, len(own), size)]
    return sorted(cut, key=lambda row: -sum(len(ids) for _, ids in row[1]))


def pixels_of(processor, path):
    """(3, height, width) of a picture as the vision tower wants it; or, in words, why it cannot be read."""
    try:
        return processor.image_processor([read_picture(path)], return_tensors="pt")["pixel_values"][
            0
        ]
    except (
        Exception
    ) as trouble:  # Pillow raises many kinds, and a picture must not end an evaluation
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


def divide(cache, rows, keep):
    """Two caches out of one, which is used up: with the given rows (lists; one may occur more than once), and with those
    to keep. None for the second if it would have no row, and two empty ones for None.

    Layer by layer, so that no more than one layer is alive both before and after.
    """
    if cache is None:
        return DynamicCache(), None
    own, other = copy(cache), cache if keep else None
    own.layers, layers = [copy(layer) for layer in cache.layers], cache.layers
    device = layers[0].keys.device
    everyone = list(range(len(layers[0].keys)))
    for mine, theirs in zip(own.layers, layers):
        if rows != everyone:
            mine.batch_select_indices(torch.tensor(rows, device=device))
        if not keep:
            theirs.keys = theirs.values = None
        elif keep != everyone:
            theirs.batch_select_indices(torch.tensor(keep, device=device))
    return own, other


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
    if (
        (owner != PREFIX) & (owner != mine[:, :1])
    ).any():  # else all that is there belongs to one question a row
        earlier = torch.arange(total) <= torch.arange(total - width, total)[:, None]
        seen = (owner[:, None] == PREFIX) | ((owner[:, None] == mine[:, :, None]) & earlier)
        mask = torch.zeros(seen.shape, dtype=model.dtype).masked_fill(
            ~seen, torch.finfo(model.dtype).min
        )
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
    return torch.full((len(prompts), past), PREFIX), [
        [(next(numbers), past, ids) for ids in row] for row in prompts
    ]


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
