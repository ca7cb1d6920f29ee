"""A look at rows that are never trained on: the loss of each task, and what the model answers to a few of them."""

import hashlib
import json
import math
from functools import partial

import numpy as np
import torch
from torch.distributed.fsdp import FSDPModule, register_fsdp_forward_method

from vflan.data.conversation import IGNORE_INDEX
from vflan.data.mixture import recipe_samples
from vflan.models import llava as models
from vflan.training.batching import micro_batches

QUESTIONS = 4  # answered in words at every look, always the same
ANSWER_TOKENS = 32


def hold_out(ids, count: int) -> tuple[np.ndarray, np.ndarray]:
    """(rows to train on, `count` rows held out): drawn by the hash of their ids, so the same for every seed and machine."""
    if not count:
        return np.arange(len(ids)), np.arange(0)
    if count >= len(ids):
        raise ValueError(
            f"heldout_rows={count} of {len(ids)} usable rows leaves nothing to train on."
        )
    order = sorted(range(len(ids)), key=lambda row: hashlib.sha256(str(ids[row]).encode()).digest())
    return np.array(sorted(order[count:])), np.array(order[:count])


def task_names(recipe, folder) -> list[str]:
    """The task of every usable row; bad.jsonl says which are not."""
    lines = (folder / "bad.jsonl").read_text(encoding="utf-8").split("\n")[:-1]
    bad = {json.loads(line)["row"] for line in lines}
    return [
        task for row, task in enumerate(recipe_samples(recipe)["task_name"][:]) if row not in bad
    ]


class HeldOut:
    """Looks at the weights as they now are; changes neither them nor the random numbers of the next step."""

    def __init__(self, rows, data, pictures, tasks, recipe, tokenizer, spread):
        self.data, self.pictures, self.tokenizer, self.spread = data, pictures, tokenizer, spread
        self.recipe, self.task_of, self.tasks = recipe, tasks, {}
        for row in map(int, rows):
            self.tasks.setdefault(tasks[row] or "no task", []).append(row)
        first, others = (
            [own[0] for own in self.tasks.values()],
            [row for own in self.tasks.values() for row in own[1:]],
        )
        self.asked = [*first, *others][:QUESTIONS]  # of different tasks, if there are as many
        spread.learner.greedy = partial(greedy, spread.model)
        register_fsdp_forward_method(
            spread.learner, "greedy"
        )  # sharded weights are gathered for it; else nothing

    def __call__(self, step: int, log) -> None:
        """Write the losses and the answers of `step` into the log; every process calls this."""
        self.spread.learner.eval()
        with torch.no_grad(), self.spread.accelerator.autocast():
            log.look("heldout", step, self.losses())
            log.look("samples", step, [self.answer(row) for row in self.asked])
        if isinstance(self.spread.learner, FSDPModule):
            self.spread.learner.reshard()  # else a backward pass would do it, and none comes
        self.spread.learner.train()

    def losses(self) -> list[dict]:
        """A dict a task (task, loss: the mean over its answers' tokens, tokens), then one of all tasks together.

        Processes share the passes, each makes equally many: sharded ones would else wait for each other for ever.
        """
        accelerator, names = self.spread.accelerator, sorted(self.tasks)
        world, rank = accelerator.num_processes, accelerator.process_index
        parts = []
        for i, name in enumerate(names):
            parts += [
                (i, part)
                for part in micro_batches(self.data, np.array(self.tasks[name]), self.recipe)[0]
            ]
        sums = torch.zeros(len(names), device=accelerator.device)
        for start in range(rank, rank + math.ceil(len(parts) / world) * world, world):
            i, rows = parts[min(start, len(parts) - 1)]
            loss = self.spread.learner(
                *self.data.batch(rows, accelerator.device), self.pictures(rows)
            )
            sums[i] += loss * (start < len(parts))
        sums = accelerator.reduce(sums).tolist()
        tokens = [int(self.data.supervised[self.tasks[name]].sum()) for name in names]
        found = zip([*names, "all"], [*sums, sum(sums)], [*tokens, sum(tokens)])
        return [dict(task=name, loss=round(loss / n, 6), tokens=n) for name, loss, n in found]

    def answer(self, row: int) -> dict:
        """The first question of a row and the greedy answer to it: id, task, question, answer, reference."""
        (ids, labels), device = self.data.row(row), self.spread.accelerator.device
        first = int(np.argmax(labels != IGNORE_INDEX))
        prompt = torch.as_tensor(ids[:first], device=device)
        turn = labels[
            first : first + int(np.argmin(np.append(labels[first:] != IGNORE_INDEX, False)))
        ]
        at = int(np.argmax(ids == self.data.image_token_id))
        said = self.spread.learner.greedy(prompt[None], at, self.pictures([row]))
        end = self.tokenizer.eos_token_id
        said = said[: said.index(end)] if end in said else said
        words = [
            self.tokenizer.decode(part, skip_special_tokens=True).strip()
            for part in (prompt, said, turn)
        ]
        names = dict(id=self.data.ids[row], task=self.task_of[row])
        return names | dict(zip(("question", "answer", "reference"), words))


def greedy(model, input_ids, at: int, features) -> list[int]:
    """The ids of the most likely continuation of (1, T) `input_ids`, whose picture, if `features` holds one, begins at `at`.

    Always ANSWER_TOKENS long: processes that share the weights must not part ways over where an answer ends.
    """
    inner, projector, said = model.model, models.parts(model)["projector"], []
    table = inner.language_model.get_input_embeddings()
    embeds = table(input_ids)
    if features is not None:
        seen = projector(features.to(embeds.device, projector.linear_1.weight.dtype)).to(
            embeds.dtype
        )
        embeds = torch.cat([embeds[:, :at], seen, embeds[:, at + seen.shape[1] :]], dim=1)
    for _ in range(ANSWER_TOKENS):
        hidden = inner.language_model(inputs_embeds=embeds, use_cache=False).last_hidden_state[
            :, -1:
        ]
        token = model.lm_head(hidden).argmax(-1)
        embeds = torch.cat([embeds, table(token).to(embeds.dtype)], dim=1)
        said.append(token.item())
    return said
