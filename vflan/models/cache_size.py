"""The memory that answering takes beside the weights, from which its batch size follows."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

# Bytes of a GPU that are left to its libraries' buffers, and the share of the rest that is used:
# gaps between tensors take some too.
RESERVE = 512 << 20
SHARE = 0.9
PICTURE_BYTES = 2 << 30  # keys and values of the pictures that are read together
# More questions in a row would save little memory and waste attention on masked positions.
QUESTIONS_PER_ROW = 8

Question = tuple[int, list[int]]  # (index, token ids)
# (slot, questions): one sequence, whose questions are about the picture in that slot of the cache.
Row = tuple[int, list[Question]]


@dataclass(frozen=True)
class Sizes:
    """Bytes of one unit each, for a language model at a given precision."""

    token: float  # keys and values of one position in all layers
    again: float  # the same in one layer: copied while the cache grows, and where heads share them
    work: float  # activations of one layer for one position
    logits: float  # of one question
    number: int  # of one number

    def cache(self, rows: int, positions: int) -> float:
        """Bytes of a cache that is not in use."""
        return rows * positions * self.token

    def reading(self, rows: int, past: int, width: int) -> float:
        """Bytes of reading `width` positions behind `past` cached ones, without logits."""
        return rows * (past + width) * (self.token + self.again) + rows * width * self.work

    def asking(self, past: int, rows: Sequence[tuple[int, int]], new: int) -> float:
        """Bytes of a batch of questions from its first pass to its last token.

        past: positions that are cached already. rows: (questions, their tokens) of each row.
        new: tokens of an answer at most.
        """
        width, most = max(tokens for _, tokens in rows), max(questions for questions, _ in rows)
        total = past + width + new * most
        # The first pass has a mask, and beside it the form that the mask is made from.
        mask = 2 * self.number * (past + width)
        first_pass = len(rows) * width * (self.work + mask)
        later_pass = len(rows) * most * self.work
        logits = sum(questions for questions, _ in rows) * self.logits
        cache = len(rows) * total * (self.token + self.again)
        return cache + max(first_pass, later_pass) + logits


def sizes(text: Any, number: int) -> Sizes:
    """The Sizes of a language model from its config `text` and the bytes of one number."""
    head = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    # Keys and values of one position in one layer.
    layer = 2 * text.num_key_value_heads * head * number
    queries = text.num_attention_heads * head
    # Grouped-query attention repeats keys and values for the heads that share them.
    is_grouped = text.num_key_value_heads < text.num_attention_heads
    repeated = 2 * queries * number if is_grouped else 0
    # The residual stream, also in fp32 inside a norm; and the larger of attention (queries twice,
    # output) and a gated MLP (three tensors).
    widest = max(3 * queries, 3 * text.intermediate_size)
    work = number * (2 * text.hidden_size + widest) + 8 * text.hidden_size
    # Logits in the model's precision and in fp32.
    logits = (number + 4) * text.vocab_size
    return Sizes(layer * text.num_hidden_layers, layer + repeated, work, logits, number)


def free(device: torch.device | str) -> int:
    """Bytes that answering may take on a device now.

    On a GPU: what is free, or reserved by PyTorch and unused, less RESERVE.
    """
    device = torch.device(device)
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return max(1, int(SHARE * (torch.cuda.mem_get_info(device)[0] + unused)) - RESERVE)
    import psutil

    return max(1, int(SHARE * psutil.virtual_memory().available))


def ran_out(error: BaseException) -> bool:
    """Whether an error says that memory ran out."""
    # PyTorch raises its own class on GPUs only, and cuBLAS not even there.
    phrases = "can't allocate memory", "CUBLAS_STATUS_ALLOC_FAILED"
    is_known = isinstance(error, torch.OutOfMemoryError)
    return is_known or any(phrase in str(error) for phrase in phrases)


@dataclass
class Budget:
    """How many questions fit into memory. `bytes` shrinks if memory runs out, and stays so.

    A question has `prefix` positions before its picture, `picture` positions of the picture, those
    of its own text, and `new` positions for the answer.
    """

    bytes: float
    batch: int  # the most questions in a batch
    each: Sizes
    prefix: int = 0
    picture: int = 0
    new: int = 0

    def pictures(self, left: list) -> int:
        """How many of [(features, questions)] are read together, from the first on; 1 at least.

        As many as a batch of questions needs, or more if they take little memory. Those that the
        first batch does not use have to fit into memory beside it.
        """
        past = self.prefix + self.picture
        needed = math.ceil(self.batch * len(left) / sum(len(questions) for _, questions in left))
        cheap = self.batch
        if past:
            cheap = min(cheap, PICTURE_BYTES // int(self.each.cache(1, past)))
        for number in range(min(len(left), max(needed, cheap)), 1, -1):
            rows = make_rows(questions for _, questions in left[:number])
            prefill = self.each.reading(number, self.prefix, self.picture)
            if max(self._needs(*self._split(rows, math.inf)), prefill) <= self.bytes:
                return number
        return 1

    def split(self, rows: list[Row]) -> tuple[list[Row], list[Row]]:
        """(the rows of the next batch, the other rows): what fits, and one question in any case."""
        return self._split(rows, self.bytes)

    def _split(self, rows: list[Row], limit: float) -> tuple[list[Row], list[Row]]:
        batch, rest, asked = [], list(rows), 0
        while rest:
            asked += len(rest[0][1])
            too_many = asked > max(1, self.batch)
            if too_many or self._needs([*batch, rest[0]], rest[1:]) > limit:
                break
            batch.append(rest.pop(0))
        if batch or not rest:
            return batch, rest
        # Not even the first row fits: try with half of its questions.
        (slot, questions), half = rest[0], len(rest[0][1]) // 2
        if not half:
            return rest[:1], rest[1:]
        halves = [(slot, questions[:half]), (slot, questions[half:])]
        return self._split(halves + rest[1:], limit)

    def _needs(self, batch: list[Row], rest: list[Row]) -> float:
        """Bytes of a batch and of the cached pictures that the rest needs."""
        past = self.prefix + self.picture
        lengths = [(len(row), sum(len(ids) for _, ids in row)) for _, row in batch]
        kept = self.each.cache(len({slot for slot, _ in rest}), past)
        return kept + self.each.asking(past, lengths, self.new)

    def must_drop(self, batch: list[Row], rest: list[Row]) -> bool:
        """Whether only the batch fits, so that the pictures of the rest have to be read again."""
        return bool(rest) and self._needs(batch, rest) > self.bytes

    def halve(self, batch: list[Row], rest: list[Row], reading: int) -> None:
        """Allows half of what was too much: a batch, or reading so many pictures."""
        prefill = self.each.reading(reading, self.prefix, self.picture)
        self.bytes = min(self.bytes, max(self._needs(batch, rest), prefill)) / 2


def make_rows(questions_of: Iterable[list[Question]]) -> list[Row]:
    """Rows for the questions of each slot, the longest first; QUESTIONS_PER_ROW in each at most."""
    rows = []
    for slot, questions in enumerate(questions_of):
        size = math.ceil(len(questions) / math.ceil(len(questions) / QUESTIONS_PER_ROW))
        # Questions of similar length share a row, and rows of similar length a batch.
        questions = sorted(questions, key=lambda question: -len(question[1]))
        starts = range(0, len(questions), size)
        rows += [(slot, questions[start : start + size]) for start in starts]
    return sorted(rows, key=lambda row: -sum(len(ids) for _, ids in row[1]))
