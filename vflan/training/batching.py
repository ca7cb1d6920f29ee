"""From samples to batches: rows are tokenised once, shuffled by the seed, and padded or packed."""

from __future__ import annotations

import dataclasses
import json
import math
from bisect import bisect_left, insort
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain, pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from vflan.config import Recipe, replace, shown, write_json
from vflan.data.conversation import IGNORE_INDEX, IMAGE, IMAGE_TOKEN_INDEX, encode_many, expand
from vflan.data.images import shortened
from vflan.data.mixture import mixture_record, recipe_samples
from vflan.data.validation import check, cut
from vflan.models import image_features
from vflan.models import llava as models
from vflan.models.loss import packs
from vflan.progress import counted

if TYPE_CHECKING:
    from collections.abc import Iterator

    from transformers import LlavaConfig, PreTrainedTokenizerBase

    from vflan.data.samples import Dataset

_ENCODED_TOGETHER = 4096  # rows in one call of the tokenizer
_TEXT = np.dtypes.StringDType()


@dataclass(frozen=True)
class Data:
    """Every usable row, tokenised, in flat arrays: rows cost bytes, not Python objects."""

    ids: np.ndarray  # (rows): the samples' ids
    tokens: np.ndarray  # (all tokens): int32; a picture is one token, IMAGE_TOKEN_INDEX
    learned: np.ndarray  # (all tokens): whether it belongs to an answer
    start: np.ndarray  # (rows + 1): row i is tokens[start[i] : start[i + 1]]
    pictures: np.ndarray  # (pictures): names of the distinct pictures
    picture: np.ndarray  # (rows): index into `pictures`, -1 for a row without one
    lengths: np.ndarray  # (rows): positions in the model, with the picture's features
    supervised: np.ndarray  # (rows): how many tokens belong to answers
    image_tokens: int  # positions of a picture
    image_token_id: int  # the token id at these positions
    packed: bool = False
    bad: int = 0
    repaired: int = 0

    def row(self, row: int) -> tuple[np.ndarray, np.ndarray]:
        """Return input_ids and labels of one row, with as many image tokens as the picture has."""
        span = slice(self.start[row], self.start[row + 1])
        repeats = np.where(self.tokens[span] == IMAGE_TOKEN_INDEX, self.image_tokens, 1)
        ids = np.repeat(self.tokens[span], repeats)
        labels = np.where(np.repeat(self.learned[span], repeats), ids, IGNORE_INDEX)
        return np.where(ids == IMAGE_TOKEN_INDEX, self.image_token_id, ids), labels

    def sizes(self, rows: Sequence[int]) -> dict[str, int]:
        """Of some rows: supervised tokens, all tokens (useful), and rows with a picture."""
        tokens, useful = int(self.supervised[rows].sum()), int(self.lengths[rows].sum())
        return dict(tokens=tokens, useful=useful, pictures=int((self.picture[rows] >= 0).sum()))

    def batch(self, rows: Sequence[int], device: str | torch.device) -> list[torch.Tensor | None]:
        """Return the first five arguments of `Learner.forward`.

        They are input_ids (B, T), position_ids (1, T) or None, at (P), keep (N) and targets (N).
        Rows are padded on the right to the longest; if `packed`, they share one sequence (B = 1)
        without padding.
        """
        lengths = self.lengths[rows]
        if self.packed:
            shape, offsets = (1, int(lengths.sum())), np.cumsum(lengths) - lengths
            # Positions start again at 0 with each conversation: so attention keeps them apart.
            position_ids = np.concatenate([np.arange(length) for length in lengths])[None]
        else:
            shape, position_ids = (len(rows), int(lengths.max())), None
            offsets = np.arange(len(rows)) * shape[1]
        input_ids = np.zeros(math.prod(shape), dtype=np.int64)
        at, keep, targets = [], [], []
        for row, offset in zip(rows, offsets):
            ids, labels = self.row(row)
            input_ids[offset : offset + len(ids)] = ids
            # Position t predicts token t + 1.
            predicting = np.flatnonzero(labels[1:] != IGNORE_INDEX)
            keep.append(offset + predicting)
            targets.append(labels[predicting + 1])
            if self.picture[row] >= 0:
                tokens = self.tokens[self.start[row] : self.start[row + 1]]
                at.append(offset + np.argmax(tokens == IMAGE_TOKEN_INDEX))
        keep, targets = np.concatenate(keep), np.concatenate(targets)
        arrays = (input_ids.reshape(shape), position_ids, np.array(at), keep, targets)
        tensors = [None if array is None else torch.from_numpy(array) for array in arrays]
        return [None if each is None else each.to(device, torch.int64) for each in tensors]


def prepare(
    recipe: Recipe,
    tokenizer: PreTrainedTokenizerBase,
    config: LlavaConfig,
    folder: Path,
) -> Data:
    """Check and tokenise the recipe's samples.

    Bad rows are left out and listed in `folder`/bad.jsonl. ValueError if there are too many of
    them. Rows that lose a part, such as an answer's end beyond `max_length`, are trained on and
    listed in repaired.jsonl (row, id, reason).
    """
    samples, listing = recipe_samples(recipe), folder / "bad.jsonl"
    bad, repaired = _validate(recipe, samples, folder)
    names, numbers, blocks = {}, {}, []  # {row: id} of listed rows, {image: number}, flat arrays
    for rows in _read_chunks(samples):
        names |= {row: name for row, name, *_ in rows if row in bad or row in repaired}
        # The tokenizer gets many texts in one call, which its threads share.
        rows, usable = [each for each in rows if each[0] not in bad], []
        encoded = encode_many([turns for *_, turns in rows], tokenizer, recipe.template)
        for (row, name, image, _), result in zip(rows, encoded):
            try:
                ids, learned, lost = truncate(result, image, recipe, config.image_seq_length)
            except ValueError as error:
                bad[row], names[row] = str(error), name
                continue
            # A row may have lost a turn in the check, and now its end.
            if lost:
                before = f"{repaired[row]}; " if row in repaired else "left out: "
                repaired[row], names[row] = before + lost, name
            picture = numbers.setdefault(image, len(numbers)) if image else -1
            usable.append((name, picture, len(ids), ids, learned))
        if usable:
            blocks.append(_join(usable))
    # A row that turned out bad here was perhaps only repaired in the check.
    repaired = {row: reason for row, reason in repaired.items() if row not in bad}
    _write_reasons(listing, bad, names)
    _write_reasons(folder / "repaired.jsonl", repaired, names)
    if len(bad) > recipe.max_bad_share * len(samples) or not blocks:
        raise ValueError(_too_many_bad(recipe, len(samples), bad, names, listing))
    if tuple(recipe.tune) == ("projector",) and not numbers:
        raise ValueError(
            f"{recipe.name} tunes the projector alone, but none of its rows has a picture, so that "
            "nothing would be learned; add rows with pictures, or tune the language model too."
        )
    return _assemble(blocks, list(numbers), recipe, config, len(bad), len(repaired))


def _validate(recipe, samples, folder):
    """Check all samples; return ({row: reason}, {row: reason}) of the bad and the repaired ones."""
    write_json(folder / "mixture.json", mixture_record(recipe, samples))
    report = check(samples, max_pixels=recipe.max_pixels)
    return tuple(dict(zip(table.row, table.reason)) for table in (report.bad, report.repaired))


def _write_reasons(path, reasons, names):
    lines = [dict(row=row, id=names[row], reason=reasons[row]) for row in sorted(reasons)]
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    path.write_text(text, encoding="utf-8")


def _read_chunks(samples):
    """Yield lists of (row, id, image, conversations)."""
    starts = range(0, len(samples), _ENCODED_TOGETHER)
    for start in counted(starts, "tokenising", len(samples), "rows", _ENCODED_TOGETHER):
        chunk = samples[start : start + _ENCODED_TOGETHER]
        columns = chunk["id"], chunk["image"], chunk["conversations"]
        yield [(start + i, *row) for i, row in enumerate(zip(*columns))]


def truncate(
    result: tuple[list[int], list[int]] | ValueError,
    image: str | None,
    recipe: Recipe,
    image_tokens: int,
) -> tuple[np.ndarray, np.ndarray, str]:
    """Return a row's ids and answer mask within max_length, and what was cut off (empty: nothing).

    result: of `encode_many`. ValueError if the row could not be encoded, or no answer is left.
    """
    if isinstance(result, ValueError):
        raise result
    # The picture's placeholder is one token here and `image_tokens` positions in the model.
    room = max(0, recipe.max_length - (image_tokens - 1 if image else 0))
    ids, labels = (np.array(column, dtype=np.int32) for column in result)
    lost = cut(labels, room, recipe.max_length)
    return ids[:room], labels[:room] != IGNORE_INDEX, lost


def _join(rows):
    """Make a few arrays of many small ones, which would take much more memory."""
    names, pictures, lengths, ids, learned = zip(*rows)
    numbers = np.array(pictures), np.array(lengths)
    return np.array(names, dtype=_TEXT), *numbers, np.concatenate(ids), np.concatenate(learned)


def _too_many_bad(recipe, total, bad, names, listing):
    # Names and reasons come from the file, and may be as long as a picture in base64.
    first = ((row, shortened(names[row]), shortened(bad[row], 600)) for row in sorted(bad)[:5])
    examples = "".join(f"\n  row {row} ({name}): {reason}" for row, name, reason in first)
    return (
        f"{len(bad)} of {total} samples are bad, more than max_bad_share={recipe.max_bad_share} "
        f"allows; all are listed in {shown(listing)}.{examples}"
    )


def _assemble(blocks, pictures, recipe, config, bad, repaired) -> Data:
    ids, picture, lengths, tokens, learned = map(np.concatenate, zip(*blocks))
    start = np.concatenate([[0], np.cumsum(lengths)])
    # The picture's one token becomes `image_seq_length` positions.
    lengths = lengths + (config.image_seq_length - 1) * (picture >= 0)
    supervised = np.add.reduceat(learned, start[:-1], dtype=np.int64)
    pictures = np.array(pictures, dtype=_TEXT)
    more = config.image_seq_length, config.image_token_id, packs(recipe), bad, repaired
    return Data(ids, tokens, learned, start, pictures, picture, lengths, supervised, *more)


@dataclass(frozen=True)
class Batches(Sequence):
    """The rows of every global batch of a run, made an epoch at a time, when they are read.

    A step is found by its number, and a slice reads no more than it must. So ten million steps or
    a million epochs take no more time to start and no more memory than one epoch.
    """

    epoch: Callable[[int], np.ndarray]  # (batches of the epoch, global_batch): the rows of each
    in_epoch: int  # how many batches an epoch has
    steps: range  # the steps of this sequence, counted in the whole run

    def __len__(self) -> int:
        return len(self.steps)

    def __getitem__(self, at: Any) -> Any:
        if isinstance(at, slice):
            return dataclasses.replace(self, steps=self.steps[at])
        epoch, batch = divmod(self.steps[at], self.in_epoch)
        return self.epoch(epoch)[batch]

    @property
    def beginning(self) -> Batches:
        """As many of the first steps as stand for all of them: 20,000, or ten million rows."""
        return self[: min(20_000, 1 + 10**7 // len(self[0]))]


def batch_order(data: Data, recipe: Recipe, rows: np.ndarray | None = None) -> Batches:
    """Return the rows of every global batch of the run, drawn from `rows` (None: all), by the seed.

    Each epoch is shuffled, and its last batch is filled from its start. Padded rows are then sorted
    by length within every 32 batches (text-only rows apart), so that a batch holds similar lengths,
    and the batches are shuffled. Packed batches are better with all lengths in them.
    """
    rows = np.arange(len(data.ids)) if rows is None else rows
    count, size = len(rows), recipe.global_batch
    steps = recipe.max_steps or max(1, math.ceil(count * recipe.epochs / size))
    in_epoch = math.ceil(count / size)

    # `feed` is at most one epoch ahead of the loop, or the epochs are so short that they cost
    # nothing.
    @lru_cache(2)
    def epoch_rows(epoch):
        # PCG64 is named, so that another version of NumPy does not change the order.
        random = np.random.Generator(np.random.PCG64([recipe.seed, epoch]))
        order = np.resize(random.permutation(count), in_epoch * size)
        if not packs(recipe):
            # Longer than any row: text-only rows are sorted behind all others.
            text_last = (data.picture[rows[order]] < 0) * 10**6
            order = _sort_within(order, data.lengths[rows[order]] + text_last, 32 * size)
        shuffled = random.permutation(in_epoch)
        return rows[order].reshape(in_epoch, size)[shuffled]

    return Batches(epoch_rows, in_epoch, range(steps))


def _sort_within(order, key, span):
    starts = range(0, len(order), span)
    indices = [start + np.argsort(key[start : start + span], kind="stable") for start in starts]
    return order[np.concatenate(indices)]


def pack(lengths: Sequence[int], budget: int, processes: int = 1) -> list[list[int]]:
    """Group indices of `lengths`: few groups of similar sums, none above `budget`.

    Best-fit decreasing: the longest first, each into the fullest group that has room. The number of
    groups is rounded up to a multiple of `processes`. Then a binary search lowers the budget as far
    as that number allows, so that no group is left nearly empty.
    """
    lengths = np.asarray(lengths)
    order = np.argsort(-lengths, kind="stable").tolist()
    # Python integers: comparing NumPy's one by one is slow.
    numbers = lengths.tolist()
    groups = _best_fit(numbers, order, budget)
    count = math.ceil(len(groups) / processes) * processes
    low, high = max(lengths.max(), math.ceil(lengths.sum() / count)), budget
    while low < high:
        middle = int(low + high) // 2
        tighter = _best_fit(numbers, order, middle)
        if len(tighter) <= count:
            groups, high = tighter, middle
        else:
            low = middle + 1
    # Every process makes equally many passes: halve the largest groups until there are enough.
    while len(groups) < count:
        largest = max(groups, key=len)
        groups.remove(largest)
        groups += [largest[::2], largest[1::2]]
    return sorted(groups, key=lambda group: -lengths[group].sum())


def _best_fit(lengths, order, budget):
    groups, free = [], []  # free: the room that is left in each group, as sorted (room, group)
    for i in order:
        # The fullest group with room is the first of the sorted list that is large enough.
        at = bisect_left(free, (lengths[i], -1))
        if at == len(free):
            free.append((budget, len(groups)))
            groups.append([])
        room, group = free.pop(at)
        groups[group].append(i)
        insort(free, (room - lengths[i], group))
    return groups


def micro_batches(
    data: Data, rows: np.ndarray, recipe: Recipe, world: int = 1
) -> list[list[np.ndarray]]:
    """For each of `world` processes, return the rows of its forward passes in one step.

    Each process gets the same number of passes, of similar sizes. Padded: `micro_batch` rows each.
    Packed: as many rows as fit into `pack_tokens`. The rows of the step are the same either way.
    """
    if not data.packed:
        shares, size = [rows[rank::world] for rank in range(world)], recipe.micro_batch
        return [[share[i : i + size] for i in range(0, len(share), size)] for share in shares]
    groups = pack(data.lengths[rows], recipe.pack_tokens or recipe.max_length, world)
    return [[rows[group] for group in groups[rank::world]] for rank in range(world)]


def packed_step(
    samples: Dataset, row: int, recipe: Recipe, tokenizer: PreTrainedTokenizerBase
) -> tuple[int, int, list] | None:
    """For people to look at: the first step of a packed training on `samples` that reads `row`.

    Returns (step, steps, packed rows), counted from 1; a packed row is a list of (row, input_ids,
    labels), with the picture as wide as its features. Only this step is tokenised, so it is fast on
    a million samples; therefore bad rows count in the order, and are left out of the step. None if
    no step reads the row.
    """
    # That file imports this one.
    from vflan.training.validation import hold_out

    recipe = replace(recipe, packing="packed")
    kept, _ = hold_out(samples["id"][:], recipe.heldout_rows)
    batches = batch_order(None, recipe, kept)
    # Each epoch reads every row that is not held out.
    first_epoch = batches[: batches.in_epoch]
    step = next((step for step, rows in enumerate(first_epoch, 1) if row in rows), None)
    if step is None:
        return None
    image_tokens, image_id = models.picture_tokens(recipe), tokenizer.convert_tokens_to_ids(IMAGE)
    rows = batches[step - 1]
    some = samples.select(rows)
    encoded = encode_many(some["conversations"][:], tokenizer, recipe.template)
    usable = []
    for number, image, result in zip(rows, some["image"][:], encoded):
        try:
            truncate(result, image, recipe, image_tokens)
        except ValueError:
            continue
        columns = expand(*result, image_tokens, image_id)
        usable.append((int(number), *(column[: recipe.max_length] for column in columns)))
    lengths = [len(ids) for _, ids, _ in usable]
    groups = pack(lengths, recipe.pack_tokens or recipe.max_length) if usable else []
    return step, len(batches), [[usable[i] for i in group] for group in groups]


def feed(
    data: Data,
    pictures: image_features.Pictures,
    batches: Sequence[np.ndarray],
    recipe: Recipe,
    rank: int = 0,
    world: int = 1,
    first: int = 0,
) -> Iterator[list[tuple[np.ndarray, int]]]:
    """For each step from `first`, yield one process's micro-batches: (rows, divisor of the loss).

    The divisor is the number of supervised tokens in the whole global batch, so that every token
    has the same weight. `loss_average="micro_batches"` averages the means of the micro-batches, as
    LLaVA does.
    """
    # Enough steps to fill the tower's batch load their pictures together. Where they begin must not
    # depend on `first`: a resumed run then computes features in the same groups.
    together = max(1, image_features.TOWER_BATCH * world // recipe.global_batch)
    starts = range(first // together * together, len(batches), together)
    groups = (
        [micro_batches(data, rows, recipe, world)[rank] for rows in batches[i : i + together]]
        for i in starts
    )
    for start, (group, next_group) in zip(starts, pairwise(chain(groups, [None]))):
        # While the model computes this group, threads read the pictures of the next one.
        pictures.load(np.concatenate(list(chain(*group))))
        if next_group:
            pictures.prefetch(np.concatenate(list(chain(*next_group))))
        for step, parts in enumerate(group, start):
            if step < first:
                continue
            if recipe.loss_average == "tokens":
                tokens = int(data.supervised[batches[step]].sum())
                yield [(part, tokens) for part in parts]
            else:
                # The mean of a micro-batch, averaged over all micro-batches of all processes.
                sums = [int(data.supervised[part].sum()) for part in parts]
                yield [(part, tokens * len(parts) * world) for part, tokens in zip(parts, sums)]
