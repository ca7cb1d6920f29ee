"""Validation on held-out rows: the loss of each task, and answers to a few questions."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch.distributed.fsdp import FSDPModule, register_fsdp_forward_method

from vflan.config import Recipe
from vflan.data.conversation import IGNORE_INDEX
from vflan.data.mixture import recipe_samples
from vflan.models import llava as models
from vflan.models.image_features import Pictures
from vflan.training.batching import Data, micro_batches

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedTokenizerBase

    from vflan.training.distributed import TrainState
    from vflan.training.metrics import Log

QUESTIONS = 4  # answered in words at every validation, always the same ones
ANSWER_TOKENS = 32


def hold_out(ids: np.ndarray | Sequence[str], count: int) -> tuple[np.ndarray, np.ndarray]:
    """Return (rows to train on, `count` rows held out).

    A hash of the ids chooses them, so they are the same for every seed and on every machine.
    """
    # Most runs hold out nothing, and a hash of each of a million ids takes seconds.
    if not count:
        return np.arange(len(ids)), np.arange(0)
    if count >= len(ids):
        raise ValueError(
            f"heldout_rows={count} of {len(ids)} usable rows leaves nothing to train on."
        )
    order = sorted(range(len(ids)), key=lambda row: hashlib.sha256(str(ids[row]).encode()).digest())
    return np.array(sorted(order[count:])), np.array(order[:count])


def task_names(recipe: Recipe, folder: Path) -> list[str]:
    """Return the task of every usable row, that is, without those in bad.jsonl."""
    lines = (folder / "bad.jsonl").read_text(encoding="utf-8").split("\n")[:-1]
    bad = {json.loads(line)["row"] for line in lines}
    names = enumerate(recipe_samples(recipe)["task_name"][:])
    return [task for row, task in names if row not in bad]


class Validator:
    """Measures the current weights on held-out rows; it changes nothing for training."""

    def __init__(
        self,
        rows: np.ndarray,
        data: Data,
        pictures: Pictures,
        tasks: list[str],
        recipe: Recipe,
        tokenizer: PreTrainedTokenizerBase,
        state: TrainState,
    ):
        self.data, self.pictures, self.tokenizer, self.state = data, pictures, tokenizer, state
        self.recipe, self.task_of, self.rows_of = recipe, tasks, {}
        for row in map(int, rows):
            self.rows_of.setdefault(tasks[row] or "no task", []).append(row)
        # Ask questions of different tasks first.
        first = [task[0] for task in self.rows_of.values()]
        others = [row for task in self.rows_of.values() for row in task[1:]]
        self.questions = [*first, *others][:QUESTIONS]
        # FSDP2 gathers weights for registered methods only; other models ignore this.
        state.learner.greedy = partial(greedy, state.model)
        register_fsdp_forward_method(state.learner, "greedy")

    def __call__(self, step: int, log: Log) -> None:
        """Write the losses and answers of `step` to the log. Every process calls this."""
        self.state.learner.eval()
        with torch.no_grad(), self.state.accelerator.autocast():
            log.write("heldout", step, self.losses())
            log.write("samples", step, [self.answer(row) for row in self.questions])
        if isinstance(self.state.learner, FSDPModule):
            # The backward pass would shard the weights again, but there is none here.
            self.state.learner.reshard()
        self.state.learner.train()

    def losses(self) -> list[dict]:
        """Return a dict for each task and one for all: task, loss (mean of a token), tokens.

        Processes divide the passes, and each makes equally many: sharded models would otherwise
        wait for each other for ever.
        """
        accelerator, names = self.state.accelerator, sorted(self.rows_of)
        world, rank = accelerator.num_processes, accelerator.process_index
        # Tasks do not mix in a pass, so that each pass's loss belongs to one task.
        passes = []
        for i, name in enumerate(names):
            (parts,) = micro_batches(self.data, np.array(self.rows_of[name]), self.recipe)
            passes += [(i, part) for part in parts]
        sums = torch.zeros(len(names), device=accelerator.device)
        for start in range(rank, rank + math.ceil(len(passes) / world) * world, world):
            i, rows = passes[min(start, len(passes) - 1)]
            batch = self.data.batch(rows, accelerator.device)
            loss = self.state.learner(*batch, self.pictures(rows))
            # A pass beyond the last one repeats it, and does not count.
            sums[i] += loss * (start < len(passes))
        sums = accelerator.reduce(sums).tolist()
        tokens = [int(self.data.supervised[self.rows_of[name]].sum()) for name in names]
        rows = zip([*names, "all"], [*sums, sum(sums)], [*tokens, sum(tokens)])
        return [dict(task=name, loss=round(loss / n, 6), tokens=n) for name, loss, n in rows]

    def answer(self, row: int) -> dict:
        """Answer a row's first question greedily: id, task, question, answer, reference."""
        (ids, labels), device = self.data.row(row), self.state.accelerator.device
        # The first answer is the first stretch of supervised tokens.
        supervised = np.append(labels != IGNORE_INDEX, False)
        first = int(np.argmax(supervised))
        last = first + int(np.argmin(supervised[first:]))
        prompt = torch.as_tensor(ids[:first], device=device)
        at = int(np.argmax(ids == self.data.image_token_id))
        answer = self.state.learner.greedy(prompt[None], at, self.pictures([row]))
        end = self.tokenizer.eos_token_id
        answer = answer[: answer.index(end)] if end in answer else answer
        parts = dict(question=prompt, answer=answer, reference=labels[first:last])
        decode = partial(self.tokenizer.decode, skip_special_tokens=True)
        texts = {name: decode(tokens).strip() for name, tokens in parts.items()}
        return dict(id=self.data.ids[row], task=self.task_of[row]) | texts


def greedy(
    model: nn.Module, input_ids: torch.Tensor, at: int, features: torch.Tensor | None
) -> list[int]:
    """Return the token ids of the greedy continuation of `input_ids` (1, T).

    features: (1, patches, width) of the picture that begins at position `at`, or None. The result
    always has ANSWER_TOKENS ids: processes that share the weights must make equally many passes,
    wherever an answer ends.
    """
    inner, projector, answer = model.model, models.parts(model)["projector"], []
    embedding = inner.language_model.get_input_embeddings()
    embeds = embedding(input_ids)  # (1, T, width)
    if features is not None:
        features = features.to(embeds.device, projector.linear_1.weight.dtype)
        image = projector(features).to(embeds.dtype)  # (1, patches, width)
        embeds = torch.cat([embeds[:, :at], image, embeds[:, at + image.shape[1] :]], dim=1)
    # Without a cache: a few short answers are not worth one.
    for _ in range(ANSWER_TOKENS):
        output = inner.language_model(inputs_embeds=embeds, use_cache=False)
        token = model.lm_head(output.last_hidden_state[:, -1:]).argmax(-1)  # (1, 1)
        embeds = torch.cat([embeds, embedding(token).to(embeds.dtype)], dim=1)
        answer.append(token.item())
    return answer
