"""Generates answers: answer() for a list of questions, answering() for answers as they come.

Three things save time and change no answer. The text before the picture is the same for all
questions and goes through the model once. A picture goes through the model once, however many
questions are asked about it. Several questions on one picture share one sequence; a block mask
keeps them apart, so that the picture's keys and values are not copied for each question.

Features of the vision tower are cached for the next model with the same tower, as in a sweep.
Decoding is greedy, as in the papers' benchmarks.

A *question* is (index, token ids). A *row* is (slot, questions): one sequence of the batch, whose
questions are about the picture in that slot of the key-value cache.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from copy import copy
from functools import cache, partial
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from vflan.data.conversation import IGNORE_INDEX, IMAGE_TOKEN_INDEX, encode, prompt_ids
from vflan.data.images import picture_trouble, read_picture, stamp
from vflan.evaluation.answer_cache import Answer, hash_model
from vflan.models.cache_size import Budget, Row, free, make_rows, ran_out, sizes
from vflan.models.llava import image_features, parts
from vflan.progress import counted

if TYPE_CHECKING:
    from transformers import LlavaProcessor

    Prompts = list[list[list[int]]]  # for each row of a cache, the token ids of its questions

FEATURE_BYTES = 256 << 20  # cached features of the vision tower, of the newest pictures
# Owners of tokens that belong to no question: seen by the whole row, and by nobody.
PREFIX, PAD = -1, -2
# (tower, preparation, pictures) -> features. The models of a sweep share a tower and questions.
_FEATURES: dict[tuple, Tensor] = {}


def answer(
    model: nn.Module,
    processor: LlavaProcessor,
    samples: list[Mapping[str, Any]],
    max_new_tokens: int = 32,
    batch_size: int = 32,
    template: str = "vicuna_v1",
    memory: float | None = None,
) -> list[str]:
    """The greedy answer to each sample: a mapping with `text` (the human turn) and `image`.

    `image` is a path or None. The answers equal those to single questions, up to floating point:
    in half precision a near tie may go either way. memory: bytes that answering may take beside
    the weights, as for `answering`. ValueError if a picture cannot be read.
    """
    replies = answering(model, processor, samples, max_new_tokens, batch_size, template, memory)
    answers = dict(counted(replies, "answering", len(samples), "questions"))
    if failed := [i for i in answers if answers[i].finish == "error"]:
        first, reason = failed[0], answers[failed[0]].reason
        raise ValueError(
            f"{len(failed)} questions have no answer, first question {first}: {reason}"
        )
    return [answers[i].text for i in range(len(samples))]


@torch.inference_mode()
def answering(
    model: nn.Module,
    processor: LlavaProcessor,
    samples: list[Mapping[str, Any]],
    max_new_tokens: int = 32,
    batch_size: int = 32,
    template: str = "vicuna_v1",
    memory: float | None = None,
) -> Iterator[tuple[int, Answer]]:
    """Yields (index, Answer) batch by batch, not in the order of the samples.

    A sample with `choices`, a list of words, is answered from one forward pass: with the choice
    whose first token is the likeliest. The questions about a picture that cannot be read are
    answered with an error and its reason. memory: bytes for keys, values and activations (None:
    what is free). Batches hold as many questions as fit, at most `batch_size`. If memory runs out,
    batches are halved, and nothing is answered twice. RuntimeError if one question does not fit.
    """
    was_training, language = model.training, parts(model)["language_model"]["model"]
    each = sizes(model.config.text_config, model.dtype.itemsize)
    budget = Budget(free(model.device) if memory is None else memory, batch_size, each)
    # Each word is tokenised once, though it is allowed for many questions.
    start_of = cache(partial(first_token, tokenizer=processor.tokenizer, template=template))
    ask = partial(_ask, model, processor.tokenizer, samples, max_new_tokens, start_of)
    # Dropout off; the mode is restored at the end.
    model.eval()
    try:
        groups = group_questions(samples, processor.tokenizer, template)
        for (prefix, choose), pictures in groups.items():
            budget.new = 0 if choose else max_new_tokens
            budget.prefix = budget.picture = 0
            # Questions without a picture have no shared positions, each is its own group.
            text_only = [(None, [question]) for question in pictures.pop(None, [])]
            yield from ask_in_batches(text_only, budget, lambda features: None, ask)
            if not pictures:
                continue
            head = DynamicCache()
            ids = torch.tensor([prefix], device=model.device)  # (1, prefix)
            language(input_ids=ids, past_key_values=head, use_cache=True)
            budget.prefix, budget.picture = len(prefix), model.config.image_seq_length
            read_pictures = partial(prefill_pictures, model, head)
            for group, failed in picture_features(model, processor, pictures, batch_size):
                yield from failed
                yield from ask_in_batches(group, budget, read_pictures, ask)
    finally:
        model.train(was_training)


def group_questions(samples: list, tokenizer: Any, template: str) -> dict[tuple, dict]:
    """{(ids before the picture, one pass or not): {picture: questions}}.

    A question's ids are those after the picture; without a picture, all ids.
    """
    # POPE has 80 different texts in 8,910 questions: each is tokenised once.
    tokenized, groups = {}, {}
    for index, sample in enumerate(samples):
        image = sample.get("image") or None
        key = sample["text"], image is not None
        if key not in tokenized:
            tokenized[key] = prompt_ids(key[0], tokenizer, template, has_image=key[1])
        ids = tokenized[key]
        split = ids.index(IMAGE_TOKEN_INDEX) if image else 0
        group = groups.setdefault((tuple(ids[:split]), bool(sample.get("choices"))), {})
        group.setdefault(image, []).append((index, ids[split + 1 :] if image else ids))
    return groups


def _ask(model, tokenizer, samples, max_new_tokens, start_of, past, batch: list[Row]):
    """[(index, Answer)] of the questions of a batch."""
    prompts = [[ids for _, ids in questions] for _, questions in batch]
    indices = [index for _, questions in batch for index, _ in questions]
    # A group of questions either has choices or has none.
    if samples[indices[0]].get("choices"):
        allowed = [samples[index]["choices"] for index in indices]
        return list(zip(indices, _choose_words(model, past, prompts, allowed, start_of, tokenizer)))
    decoded = decode(model, past, prompts, max_new_tokens, tokenizer)
    texts = tokenizer.batch_decode([ids for ids, _ in decoded], skip_special_tokens=True)
    answers = [Answer(text.strip(), finish) for text, (_, finish) in zip(texts, decoded)]
    return list(zip(indices, answers))


def ask_in_batches(
    left: list, budget: Budget, read_pictures: Callable, ask: Callable
) -> Iterator[tuple[int, Answer]]:
    """Yields (index, Answer) for [(features, questions)]: pictures with their questions.

    read_pictures(list of features) returns a cache with one row for each picture; ask(cache, batch)
    returns [(index, Answer)].
    """
    while left:
        number = budget.pictures(left)
        again = yield from _ask_group(left[:number], budget, read_pictures, ask)
        left = again + left[number:]


def _ask_group(group, budget, read_pictures, ask):
    """Yields answers about pictures that are read together; returns what has to be read again.

    Only one copy of the cache is alive at a time: a batch takes the rows that it needs, and a
    picture without further questions leaves the cache.
    """
    cache, started = None, False
    rows = make_rows(questions for _, questions in group)
    slots = list(range(len(group)))  # slots[i]: the picture in row i of the cache
    while rows:
        batch, rest = budget.split(rows)
        drop = budget.must_drop(batch, rest)
        kept = [] if drop else sorted({slot for slot, _ in rest})
        answers = None
        try:
            if not started:
                cache, started = read_pictures([features for features, _ in group]), True
            used = [slots.index(slot) for slot, _ in batch]
            chosen, cache = divide(cache, used, [slots.index(slot) for slot in kept])
            answers = ask(chosen, batch)
        except Exception as error:
            if not ran_out(error):
                raise
            asked = sum(len(questions) for _, questions in batch)
            if len(group) == 1 and asked == 1 and (drop or not rest):
                raise RuntimeError(
                    "One question alone does not fit into the memory that is free beside the "
                    "model: close other programs that use it, take a GPU with more memory, or "
                    "load the model in 4 bits (bits=4 in its recipe)."
                ) from error
            budget.halve(batch, [] if drop else rest, 0 if started else len(group))
        # Outside the except block the error is gone, and with it the frames that held the tensors.
        chosen = None
        if answers is None or drop:
            cache = None
            if answers is None:
                _release_gpu_memory()
            again = {}
            for slot, questions in rows if answers is None else rest:
                again.setdefault(slot, []).extend(questions)
            yield from answers or ()
            return [(group[slot][0], questions) for slot, questions in again.items()]
        rows, slots = rest, kept
        yield from answers
    return []


def _release_gpu_memory() -> None:
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


# -------------------------------------------------------------------------------------- pictures


def picture_features(
    model: nn.Module, processor: LlavaProcessor, pictures: dict, batch_size: int
) -> Iterator[tuple[list, list]]:
    """Yields ([(features, questions)], errors) for `batch_size` pictures of {path: questions}.

    features: (patches, width) on the CPU. errors: (index, Answer) of pictures that cannot be read.
    """
    # The longest questions first: if memory is short, it shows at once. Pictures with one
    # question each are then already in the order of the batches.
    paths = sorted(pictures, key=lambda path: -max(len(ids) for _, ids in pictures[path]))
    size = max(1, batch_size)
    chunks = [paths[start : start + size] for start in range(0, len(paths), size)]
    preparation = str(processor.image_processor.to_dict())
    tower = hash_model(parts(model)["vision_tower"]), model.config.vision_feature_layer
    tower = *tower, model.dtype, model.device.type, preparation

    def load(chunk):
        key = *tower, *((str(path), stamp(path)) for path in chunk)
        if (features := _FEATURES.get(key)) is not None:
            return key, features, []
        return key, None, [pixels_of(processor, path) for path in chunk]

    for chunk, (key, features, pixels) in zip(chunks, prefetch(load, chunks)):
        broken = {path: why for path, why in zip(chunk, pixels) if isinstance(why, str)}
        failed = [(i, why) for path, why in broken.items() for i, _ in pictures[path]]
        readable = [path for path in chunk if path not in broken]
        if features is None and readable:
            values = torch.stack([values for values in pixels if not isinstance(values, str)])
            features = encode_pictures(model, values).cpu()  # (pictures, patches, width)
            if not broken:
                cache_features(key, features)
        group = [(one, pictures[path]) for one, path in zip(features, readable)] if readable else []
        yield group, [(i, Answer("", "error", why)) for i, why in failed]


def encode_pictures(model: nn.Module, values: Tensor) -> Tensor:
    """Features of (pictures, 3, height, width); half of them at a time where memory runs out."""
    try:
        return image_features(model, values.to(model.device))
    except Exception as error:
        if len(values) == 1 or not ran_out(error):
            raise
    _release_gpu_memory()
    return torch.cat([encode_pictures(model, half).cpu() for half in values.tensor_split(2)])


def cache_features(key: tuple, features: Tensor) -> None:
    """Caches features of a chunk of pictures for the next model; the oldest chunks are dropped."""
    _FEATURES[key] = features
    while sum(cached.nbytes for cached in _FEATURES.values()) > FEATURE_BYTES:
        del _FEATURES[next(iter(_FEATURES))]


def pixels_of(processor: LlavaProcessor, path: str) -> Tensor | str:
    """(3, height, width) of a picture, prepared for the vision tower; or why it cannot be read."""
    try:
        prepared = processor.image_processor([read_picture(path)], return_tensors="pt")
        return prepared["pixel_values"][0]
    # Pillow raises many kinds of errors, and one picture must not end an evaluation.
    except Exception as error:
        return picture_trouble(str(path)) or f"{path}: {error}"


def prefetch(function: Callable, items: list) -> Iterator:
    """Yields function(item) for each item; a thread computes the next one in the meantime."""
    with ThreadPoolExecutor(1) as thread:
        current = None
        for item in items:
            following = thread.submit(function, item)
            if current:
                yield current.result()
            current = following
        if current:
            yield current.result()


def prefill_pictures(model: nn.Module, head: DynamicCache, features: list[Tensor]) -> DynamicCache:
    """A cache with one row for each picture: the prefix (`head`, a cache of one row) and it."""
    cache = copy(head)
    cache.layers = [copy(layer) for layer in head.layers]
    cache.batch_select_indices(torch.zeros(len(features), dtype=torch.long, device=model.device))
    embeddings = parts(model)["projector"](torch.stack(features).to(model.device))
    embeddings = embeddings.to(model.dtype)  # (pictures, patches, hidden)
    language = parts(model)["language_model"]["model"]
    language(inputs_embeds=embeddings, past_key_values=cache, use_cache=True)
    return cache


def divide(
    cache: DynamicCache | None, rows: list[int], keep: list[int]
) -> tuple[DynamicCache, DynamicCache | None]:
    """Two caches out of one: with `rows` (one may occur more than once), and with those to keep.

    The second is None if `keep` is empty. `cache` is used up, layer by layer, so that only one
    layer exists twice at any time. For None the first is an empty cache.
    """
    if cache is None:
        return DynamicCache(), None
    chosen, rest = copy(cache), cache if keep else None
    chosen.layers, layers = [copy(layer) for layer in cache.layers], cache.layers
    device = layers[0].keys.device
    everything = list(range(len(layers[0].keys)))
    for mine, theirs in zip(chosen.layers, layers):
        if rows != everything:
            mine.batch_select_indices(torch.tensor(rows, device=device))
        if not keep:
            theirs.keys = theirs.values = None
        elif keep != everything:
            theirs.batch_select_indices(torch.tensor(keep, device=device))
    return chosen, rest


def read(
    model: nn.Module, cache: DynamicCache, owner: Tensor, pieces: list, pad: int
) -> tuple[Tensor, Tensor]:
    """Runs `pieces` of questions after the cache: (logits after each piece, the longer owner).

    pieces: for each row of the cache [(question, position, ids)]. owner: (rows, positions), the
    question of each cached token. A token attends to PREFIX and to its own question only.
    """
    tokens = [
        [
            (token, question, start + k)
            for question, start, ids in row
            for k, token in enumerate(ids)
        ]
        for row in pieces
    ]
    width = max(map(len, tokens))
    padded = [row + [(pad, PAD, 0)] * (width - len(row)) for row in tokens]
    ids, mine, position = torch.tensor(padded).unbind(-1)  # each (rows, width)
    owner = torch.cat([owner, mine], dim=1)  # (rows, total)
    mask, total = None, owner.shape[1]
    # With one question in each row, causal attention is already right and needs no mask.
    if ((owner != PREFIX) & (owner != mine[:, :1])).any():
        earlier = torch.arange(total) <= torch.arange(total - width, total)[:, None]
        same = owner[:, None] == mine[:, :, None]
        visible = (owner[:, None] == PREFIX) | (same & earlier)  # (rows, width, total)
        mask = torch.zeros(visible.shape, dtype=model.dtype)
        mask = mask.masked_fill(~visible, torch.finfo(model.dtype).min)
        mask = mask[:, None].to(model.device)  # (rows, 1, width, total)
    language = parts(model)["language_model"]
    more = dict(attention_mask=mask, past_key_values=cache, use_cache=True)
    more |= dict(position_ids=position.to(model.device))
    hidden = language["model"](input_ids=ids.to(model.device), **more).last_hidden_state
    # Only the last position of each piece needs logits.
    ends = [
        (row, end - 1)
        for row, some in enumerate(pieces)
        for end in accumulate(len(p[2]) for p in some)
    ]
    rows, columns = zip(*ends)
    return language["lm_head"](hidden[list(rows), list(columns)]), owner  # (pieces, vocabulary)


def first_pieces(cache: DynamicCache, prompts: Prompts) -> tuple[Tensor, list]:
    """(owner, pieces) to begin with. prompts: for each row of the cache, ids of its questions."""
    past = cache.get_seq_length()
    numbers = iter(range(sum(map(len, prompts))))
    pieces = [[(next(numbers), past, ids) for ids in row] for row in prompts]
    return torch.full((len(prompts), past), PREFIX), pieces


# ---------------------------------------------------------------------------------------- decoding


def decode(
    model: nn.Module, cache: DynamicCache, prompts: Prompts, max_new_tokens: int, tokenizer: Any
) -> list[tuple[list[int], str]]:
    """[(ids, `stop` or `length`)]: the greedy answer to each prompt, in their order.

    Finished rows leave the batch as soon as they are half of it.
    """
    owner, pieces = first_pieces(cache, prompts)
    number = sum(map(len, prompts))
    answers, finish = [[] for _ in range(number)], ["length"] * number
    while True:
        logits, owner = read(model, cache, owner, pieces, tokenizer.pad_token_id or 0)
        tokens = iter(logits.argmax(-1).tolist())
        following = [[] for _ in pieces]
        for row, pieces_left in zip(pieces, following):
            for question, position, ids in row:
                token = next(tokens)
                if token == tokenizer.eos_token_id:
                    finish[question] = "stop"
                    continue
                answers[question].append(token)
                if len(answers[question]) < max_new_tokens:
                    pieces_left.append((question, position + len(ids), [token]))
        pieces = following
        active = [row for row, pieces_left in enumerate(pieces) if pieces_left]
        if not active:
            return list(zip(answers, finish))
        if len(active) * 2 <= len(pieces):
            indices = torch.tensor(active)
            cache.batch_select_indices(indices.to(model.device))
            owner, pieces = owner[indices], [pieces[row] for row in active]


def _choose_words(model, cache, prompts, allowed, start_of, tokenizer) -> list[Answer]:
    """For each prompt, the one of its `allowed` words whose first token is the likeliest next.

    start_of(word) is that token. ValueError if two words of a prompt begin with the same token.
    """
    logits, _ = read(model, cache, *first_pieces(cache, prompts), tokenizer.pad_token_id or 0)
    answers = []
    for row, words in zip(logits.float().cpu(), allowed):  # row: (vocabulary,)
        words = [word for word in words if start_of(word) != tokenizer.unk_token_id] or words
        ids = [start_of(word) for word in words]
        if len(set(ids)) < len(ids):
            raise ValueError(
                f"One pass cannot tell {', '.join(words)} apart: some begin with the same token; "
                "answer in full."
            )
        answers.append(Answer(words[int(row[ids].argmax())], "choice"))
    return answers


def first_token(word: str, tokenizer: Any, template: str = "vicuna_v1") -> int:
    """The first token id of an answer that begins with `word`, behind the template's prompt."""
    if template != "own":
        turns = [{"from": "human", "value": "?"}, {"from": "gpt", "value": word}]
        return next(label for label in encode(turns, tokenizer)[1] if label != IGNORE_INDEX)
    # What the template writes behind a prompt, for a turn that is over: a space, perhaps.
    prompt = prompt_ids("?", tokenizer, template, has_image=False)
    whole = prompt_ids("?", tokenizer, template, has_image=False, before=[("?", word)])
    answer = whole[len(prompt) :] if whole[: len(prompt)] == prompt else []
    return (answer or tokenizer(word, add_special_tokens=False).input_ids)[0]
