"""From samples to batches: every row tokenised once, the order decided by the seed alone, each picture seen once."""

import json
import math
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from vflan import model as models
from vflan.checks import check
from vflan.conversation import IGNORE_INDEX, encode, expand
from vflan.mixtures import recipe_samples
from vflan.pictures import read_picture
from vflan.recipe import Recipe, shown

MAX_KEPT_BYTES = 4 << 30  # the frozen tower's features are computed once and kept in memory up to this size
_FEATURES: dict = {}  # (tower, preparation) -> picture -> features, shared by the runs of a sweep


@dataclass(frozen=True)
class Data:
    """Every usable row, tokenised once; entry i of each column is row i."""

    ids: list[str]
    tokens: list[np.ndarray]  # the picture is already as wide as its features
    keep: list[np.ndarray]  # positions that predict ...
    targets: list[np.ndarray]  # ... these tokens
    images: list[str | None]
    image_at: np.ndarray  # first position of the picture; -1 for text-only rows
    lengths: np.ndarray
    supervised: np.ndarray  # how many targets
    bad: int = 0
    repaired: int = 0

    def batch(self, rows, device):
        """The first four arguments of `Learner.forward`."""
        width = max(self.lengths[row] for row in rows)
        input_ids = np.zeros((len(rows), width), dtype=np.int64)
        for i, row in enumerate(rows):
            input_ids[i, : self.lengths[row]] = self.tokens[row]
        at = np.array([(i, self.image_at[row]) for i, row in enumerate(rows) if self.images[row]]).reshape(-1, 2)
        keep = np.concatenate([self.keep[row] + i * width for i, row in enumerate(rows)])
        targets = np.concatenate([self.targets[row] for row in rows])
        return [torch.from_numpy(array).to(device, torch.int64) for array in (input_ids, at, keep, targets)]


def prepare(recipe: Recipe, tokenizer, config, folder: Path, judge: bool = True) -> Data:
    """Check and tokenise the recipe's samples.

    Bad rows are left out and listed in `folder`/bad.jsonl; too many stop the run before it starts. Without `judge` the
    listing is read: another process of this run has just written it.
    """
    samples, listing, repaired = recipe_samples(recipe), folder / "bad.jsonl", 0
    names, images, conversations = (samples[column][:] for column in ("id", "image", "conversations"))
    if judge:
        report = check(samples)
        bad, repaired = dict(zip(report.bad.row, report.bad.reason)), len(report.repaired)
    else:
        verdicts = [json.loads(line) for line in listing.read_text(encoding="utf-8").splitlines()]
        bad = {verdict["row"]: verdict["reason"] for verdict in verdicts}
    rows = []
    for row, (name, image, turns) in enumerate(zip(names, images, conversations)):
        if row in bad:
            continue
        try:
            encoded = encode(turns, tokenizer, recipe.template)
            pair = expand(*encoded, config.image_seq_length, config.image_token_id)
            ids, labels = (np.array(column[: recipe.max_length]) for column in pair)
            keep = np.flatnonzero(labels[1:] != IGNORE_INDEX)
            if not len(keep):
                raise ValueError(f"no answer token within max_length={recipe.max_length}")
        except ValueError as trouble:
            bad[row] = str(trouble)
            continue
        at = int(np.argmax(ids == config.image_token_id)) if image else -1
        rows.append((name, ids, keep, labels[1:][keep], image, at, len(ids), len(keep)))
    if judge:
        lines = [json.dumps(dict(row=row, id=names[row], reason=bad[row]), ensure_ascii=False) for row in sorted(bad)]
        listing.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    if len(bad) > recipe.max_bad_share * len(samples) or not rows:
        some = "".join(f"\n  row {row} ({names[row]}): {bad[row]}" for row in sorted(bad)[:5])
        raise ValueError(
            f"{len(bad)} of {len(samples)} samples are bad, more than max_bad_share={recipe.max_bad_share} allows; "
            f"all are listed in {shown(listing)}.{some}"
        )
    *columns, image_at, lengths, supervised = zip(*rows)
    return Data(*columns, np.array(image_at), np.array(lengths), np.array(supervised), len(bad), repaired)


class Pictures:
    """Picture features for rows of a batch: (pictures, patches, width), or None for text.

    The tower is frozen, so one look at a picture is enough: the features of a small set are computed once and kept. A
    large set's pictures are read and encoded as they come.
    """

    def __init__(self, data, model, processor, recipe):
        self.images, self.model, self.preparation = data.images, model, processor.image_processor
        self.readers, self.table = ThreadPoolExecutor(4), None
        paths = list(dict.fromkeys(path for path in data.images if path))
        size = len(paths) * model.config.image_seq_length * model.config.vision_config.hidden_size * 4
        if paths and size <= MAX_KEPT_BYTES:
            tower = models.fingerprint(models.parts(model)["vision_tower"])
            known = _FEATURES.setdefault((tower, str(self.preparation.to_dict())), {})
            stamped = [(path, os.stat(path).st_mtime_ns) for path in paths]
            new = [key for key in stamped if key not in known]
            for i in range(0, len(new), 64):
                known |= zip(new[i : i + 64], self.look([path for path, _ in new[i : i + 64]]))
            self.table = torch.stack([known[key] for key in stamped])
            self.where = {path: i for i, path in enumerate(paths)}

    @torch.no_grad()
    def look(self, paths):
        pixels = self.preparation(list(self.readers.map(read_picture, paths)), return_tensors="pt")["pixel_values"]
        return models.image_features(self.model, pixels.to(self.model.device))

    def __call__(self, rows):
        paths = [self.images[row] for row in rows if self.images[row]]
        if not paths:
            return None
        return self.look(paths) if self.table is None else self.table[[self.where[path] for path in paths]]


def plan(data: Data, recipe: Recipe) -> list[np.ndarray]:
    """The rows of every global batch of the run, decided by the seed alone.

    Each epoch is shuffled, cut into stretches of 32 batches and sorted by length inside each (text-only rows apart), so
    that a batch holds like lengths; then the batches are shuffled. An epoch's last batch is filled from its start.
    """
    rows, size = len(data.ids), recipe.global_batch
    steps = recipe.max_steps or max(1, math.ceil(rows * recipe.epochs / size))
    batches, epoch = [], 0
    while len(batches) < steps:
        draw = np.random.Generator(np.random.PCG64([recipe.seed, epoch]))
        order = np.resize(draw.permutation(rows), math.ceil(rows / size) * size)
        key = data.lengths[order] + (data.image_at[order] < 0) * 10**6
        cuts = range(0, len(order), 32 * size)
        order = order[np.concatenate([cut + np.argsort(key[cut : cut + 32 * size], kind="stable") for cut in cuts])]
        batches += [order[i * size : (i + 1) * size] for i in draw.permutation(len(order) // size)]
        epoch += 1
    return batches[:steps]
