"""From samples to batches: every row tokenised once, the order decided by the seed alone, each picture seen once."""

import hashlib
import json
import math
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain, pairwise
from pathlib import Path

import numpy as np
import torch

from vflan.config import CACHE, Recipe, replace, shown, write_json
from vflan.data.conversation import IGNORE_INDEX, IMAGE, IMAGE_TOKEN_INDEX, encode_many, expand
from vflan.data.images import read_picture, stamp
from vflan.data.mixture import mixture_record, recipe_samples
from vflan.data.validation import check, cut
from vflan.models import llava as models
from vflan.models.loss import packs
from vflan.progress import counted

MAX_KEPT_BYTES = (
    4 << 30
)  # the frozen tower's features are computed once and kept in memory up to this size
TOWER_BATCH = 64  # pictures that go through the tower together, whatever the micro-batch
_ENCODED_TOGETHER = 4096  # rows whose texts the tokenizer gets in one call
_FEATURES: dict = {}  # (tower, preparation) -> picture -> features, shared by the runs of a sweep


@dataclass(frozen=True)
class Data:
    """Every usable row, tokenised once: flat arrays, so that millions of rows cost bytes and not Python objects."""

    ids: np.ndarray  # the samples' names
    tokens: (
        np.ndarray
    )  # int32, all rows one after the other; a picture is ONE position, IMAGE_TOKEN_INDEX
    learned: np.ndarray  # bool, as long: is this token an answer's?
    start: np.ndarray  # row i is tokens[start[i] : start[i + 1]]
    pictures: np.ndarray  # names of the distinct pictures ...
    picture: np.ndarray  # ... and which of them each row shows; -1 for text-only rows
    lengths: np.ndarray  # positions that a row takes in the model, the picture's features included
    supervised: np.ndarray  # how many tokens of a row are learned
    image_tokens: int  # positions a picture takes
    image_token_id: int  # what stands there before the features do
    packed: bool = False
    bad: int = 0
    repaired: int = 0

    def row(self, row) -> tuple[np.ndarray, np.ndarray]:
        """input_ids and labels of one row as the model sees them, the picture widened to its features."""
        span = slice(self.start[row], self.start[row + 1])
        wide = np.where(self.tokens[span] == IMAGE_TOKEN_INDEX, self.image_tokens, 1)
        ids = np.repeat(self.tokens[span], wide)
        labels = np.where(np.repeat(self.learned[span], wide), ids, IGNORE_INDEX)
        return np.where(ids == IMAGE_TOKEN_INDEX, self.image_token_id, ids), labels

    def batch(self, rows, device):
        """The first five arguments of `Learner.forward`: one padded row each, or, if `packed`, all of them in one row."""
        whole, lengths = [self.row(row) for row in rows], self.lengths[rows]
        if self.packed:
            shape, begin = (1, int(lengths.sum())), np.cumsum(lengths) - lengths
            position_ids = np.concatenate([np.arange(length) for length in lengths])[None]
        else:
            shape, position_ids = (len(rows), int(lengths.max())), None
            begin = np.arange(len(rows)) * shape[1]
        input_ids = np.zeros(shape[0] * shape[1], dtype=np.int64)
        at, keep, targets = [], [], []
        for row, first, (ids, labels) in zip(rows, begin, whole):
            input_ids[first : first + len(ids)] = ids
            predicts = np.flatnonzero(labels[1:] != IGNORE_INDEX)
            keep.append(first + predicts)
            targets.append(labels[predicts + 1])
            if self.picture[row] >= 0:
                at.append(
                    first
                    + np.argmax(
                        self.tokens[self.start[row] : self.start[row + 1]] == IMAGE_TOKEN_INDEX
                    )
                )
        arrays = (
            input_ids.reshape(shape),
            position_ids,
            np.array(at),
            np.concatenate(keep),
            np.concatenate(targets),
        )
        return [
            None if array is None else torch.from_numpy(array).to(device, torch.int64)
            for array in arrays
        ]


def prepare(recipe: Recipe, tokenizer, config, folder: Path, judge: bool = True) -> Data:
    """Check and tokenise the recipe's samples.

    Bad rows are left out and listed in `folder`/bad.jsonl; too many stop the run before it starts. Rows that lose a part,
    an answer's end beyond `max_length` for one, are trained on and listed in repaired.jsonl: row, id, reason. Without
    `judge` bad.jsonl is read: another process of this run has just written it.
    """
    samples, listing, repaired = recipe_samples(recipe), folder / "bad.jsonl", {}
    if judge:
        write_json(folder / "mixture.json", mixture_record(recipe, samples))
        report = check(samples)
        bad, repaired = (
            dict(zip(table.row, table.reason)) for table in (report.bad, report.repaired)
        )
    else:
        verdicts = [json.loads(line) for line in listing.read_text(encoding="utf-8").splitlines()]
        bad = {verdict["row"]: verdict["reason"] for verdict in verdicts}
    wide, text, numbers, names = config.image_seq_length, np.dtypes.StringDType(), {}, {}
    chunks, blocks = range(0, len(samples), _ENCODED_TOGETHER), []
    if judge:  # one process tells for all
        chunks = counted(chunks, "tokenising", len(samples), "rows", _ENCODED_TOGETHER)
    for first in chunks:
        chunk = samples[first : first + _ENCODED_TOGETHER]
        numbered = [
            (first + i, *row)
            for i, row in enumerate(zip(chunk["id"], chunk["image"], chunk["conversations"]))
        ]
        names |= {row: name for row, name, _, _ in numbered if row in bad or row in repaired}
        numbered, usable = [row for row in numbered if row[0] not in bad], []
        encoded = encode_many([turns for *_, turns in numbered], tokenizer, recipe.template)
        for (row, name, image, _), found in zip(numbered, encoded):
            try:
                if isinstance(found, ValueError):
                    raise found
                room = max(0, recipe.max_length - (wide - 1 if image else 0))
                ids, labels = (np.array(column, dtype=np.int32) for column in found)
                if lost := cut(labels, room, recipe.max_length):
                    repaired[row] = (
                        f"{repaired[row]}; {lost}" if row in repaired else f"left out: {lost}"
                    )
                    names[row] = name
                ids, learned = ids[:room], labels[:room] != IGNORE_INDEX
                which = numbers.setdefault(image, len(numbers)) if image else -1
                usable.append((name, which, len(ids), ids, learned))
            except ValueError as reason:
                bad[row], names[row] = str(reason), name
        if usable:  # a few arrays in place of thousands
            name, which, length, ids, learned = zip(*usable)
            counts = np.array(which), np.array(length)
            blocks.append(
                (np.array(name, dtype=text), *counts, np.concatenate(ids), np.concatenate(learned))
            )
    repaired = {row: lost for row, lost in repaired.items() if row not in bad}
    for path, found in ((listing, bad), (folder / "repaired.jsonl", repaired)) if judge else ():
        lines = [dict(row=row, id=names[row], reason=found[row]) for row in sorted(found)]
        path.write_text(
            "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8"
        )
    if len(bad) > recipe.max_bad_share * len(samples) or not blocks:
        some = "".join(f"\n  row {row} ({names[row]}): {bad[row]}" for row in sorted(bad)[:5])
        raise ValueError(
            f"{len(bad)} of {len(samples)} samples are bad, more than max_bad_share={recipe.max_bad_share} allows; "
            f"all are listed in {shown(listing)}.{some}"
        )
    ids, picture, lengths, tokens, learned = map(np.concatenate, zip(*blocks))
    start = np.concatenate([[0], np.cumsum(lengths)])
    lengths = lengths + (wide - 1) * (picture >= 0)
    return Data(
        ids=ids,
        tokens=tokens,
        learned=learned,
        start=start,
        pictures=np.array(list(numbers), dtype=text),
        picture=picture,
        lengths=lengths,
        supervised=np.add.reduceat(learned, start[:-1], dtype=np.int64),
        image_tokens=wide,
        image_token_id=config.image_token_id,
        packed=packs(recipe),
        bad=len(bad),
        repaired=len(repaired),
    )


class Pictures:
    """Picture features for rows of a batch: (pictures, patches, width), or None for text.

    The tower is frozen, so one look at a picture is enough. Many questions about a picture in a step share one look; a
    small set's features stay in memory for later epochs and runs; with `feature_cache` they stay on disk. Pictures of
    the steps to come are read in the background (`begin`) while the model computes.
    """

    def __init__(self, data, model, processor, recipe):
        self.data, self.model, self.preparation = data, model, processor.image_processor
        self.readers, self.coming, self.held, self.folder = ThreadPoolExecutor(4), {}, {}, None
        tower, config = models.parts(model)["vision_tower"], model.config
        self.tower = tower
        self.shape, self.dtype = (
            (config.image_seq_length, config.vision_config.hidden_size),
            tower.dtype,
        )
        size = len(data.pictures) * math.prod(self.shape) * tower.dtype.itemsize
        self.keeps = size <= MAX_KEPT_BYTES
        if len(data.pictures) and (self.keeps or recipe.feature_cache):
            look = f"{models.fingerprint(tower)} {config.vision_feature_layer} {self.dtype} {self.preparation.to_dict()}"
            if self.keeps:
                self.held = _FEATURES.setdefault(look, {})
            if recipe.feature_cache:
                self.folder = CACHE / "features" / hashlib.sha256(look.encode()).hexdigest()[:16]
                self.folder.mkdir(parents=True, exist_ok=True)
        self.stamps, self.writes = {}, True

    def begin(self, rows):
        """Start to read, in the background, what `look` will need for these rows."""
        for key in self._keys(rows):
            if key not in self.held and key not in self.coming:
                self.coming[key] = self.readers.submit(self._read, key)

    def look(self, rows):
        """Hold the features of these rows' pictures; of a large set, forget all others."""
        self.begin(rows)
        keys = dict.fromkeys(self._keys(rows))
        if not self.keeps:
            self.held = {key: self.held[key] for key in keys if key in self.held}
        found = {key: self.coming.pop(key).result() for key in keys if key not in self.held}
        self.held |= {key: features for key, (features, _) in found.items() if features is not None}
        new = [key for key in found if key not in self.held]
        for i in range(0, len(new), TOWER_BATCH):
            some = new[i : i + TOWER_BATCH]
            pixels = torch.cat([found[key][1] for key in some])
            with torch.no_grad():
                features = models.image_features(self.model, pixels.to(self.tower.device))
            features = features.cpu() if self.keeps or self.folder else features
            self.held |= zip(some, features)
            if self.folder and self.writes:
                for key in some:
                    self.readers.submit(self._write, key, self.held[key])

    def __call__(self, rows):
        keys = self._keys(rows)
        if not keys:
            return None
        if not all(key in self.held for key in keys):
            self.look(rows)
        return torch.stack([self.held[key] for key in keys]).to(self.tower.device)

    def _keys(self, rows):
        """The picture of each row that has one, by name, size and time: an exchanged file is another picture."""
        shown_in = [which for which in self.data.picture[rows] if which >= 0]
        for which in shown_in:
            if which not in self.stamps:
                name = str(self.data.pictures[which])
                self.stamps[which] = (name, *stamp(name))
        return [self.stamps[which] for which in shown_in]

    def _read(self, key):
        """(features, None) if the disk has them, else (None, pixels)."""
        if self.folder:
            try:
                kept = torch.from_numpy(np.load(self._file(key)))
                if kept.dtype == _stored(self.dtype) and kept.shape == self.shape:
                    return kept.view(self.dtype), None
            except (
                OSError,
                ValueError,
                EOFError,
            ):  # not there, or not whole: the picture is looked at again
                pass
        return None, self.preparation([read_picture(key[0])], return_tensors="pt")["pixel_values"]

    def _write(self, key, features):
        file = self._file(key)
        scratch = file.with_name(f".{file.name}.{os.getpid()}")
        try:
            file.parent.mkdir(exist_ok=True)
            with scratch.open("wb") as out:
                np.save(out, features.view(_stored(self.dtype)).numpy())
            scratch.replace(file)
        except OSError as trouble:
            scratch.unlink(missing_ok=True)
            if self.writes:
                self.writes, where = False, shown(self.folder)
                print(
                    f"{where} takes no more features ({trouble.strerror}); training goes on.",
                    file=sys.stderr,
                )

    def _file(self, key):
        name = hashlib.sha256(repr(key).encode()).hexdigest()
        return self.folder / name[:2] / f"{name[2:32]}.npy"


def _stored(dtype):
    return torch.int16 if dtype == torch.bfloat16 else dtype  # numpy has no bf16


def plan(data: Data, recipe: Recipe, of=None) -> list[np.ndarray]:
    """The rows of every global batch of the run, decided by the seed alone; drawn from the rows `of` (None: all).

    Each epoch is shuffled. Where rows are padded it is then cut into stretches of 32 batches and sorted by length inside
    each (text-only rows apart), so that a batch holds like lengths, and the batches are shuffled; where rows are packed
    a batch should hold all lengths, the shuffle is enough. An epoch's last batch is filled from its start.
    """
    of = np.arange(len(data.ids)) if of is None else of
    rows, size = len(of), recipe.global_batch
    steps = recipe.max_steps or max(1, math.ceil(rows * recipe.epochs / size))
    batches, epoch = [], 0
    while len(batches) < steps:
        draw = np.random.Generator(np.random.PCG64([recipe.seed, epoch]))
        order = np.resize(draw.permutation(rows), math.ceil(rows / size) * size)
        if not packs(recipe):
            key = data.lengths[of[order]] + (data.picture[of[order]] < 0) * 10**6
            cuts = range(0, len(order), 32 * size)
            order = order[
                np.concatenate(
                    [cut + np.argsort(key[cut : cut + 32 * size], kind="stable") for cut in cuts]
                )
            ]
        batches += [
            of[order[i * size : (i + 1) * size]] for i in draw.permutation(len(order) // size)
        ]
        epoch += 1
    return batches[:steps]


def pack(lengths, budget: int, processes: int = 1) -> list[list[int]]:
    """Best-fit decreasing: indices of `lengths` in groups of at most `budget` together, as few as it finds and all alike.

    Longest first, each into the fullest group that has room; then the budget is lowered as far as the number of groups
    stays (rounded up to a multiple of `processes`, which share them), so that none is left nearly empty.
    """
    lengths = np.asarray(lengths)
    order = np.argsort(-lengths, kind="stable").tolist()
    groups = _best_fit(lengths, order, budget)
    number = math.ceil(len(groups) / processes) * processes
    low, high = max(lengths.max(), math.ceil(lengths.sum() / number)), budget
    while low < high:
        middle = int(low + high) // 2
        tighter = _best_fit(lengths, order, middle)
        if len(tighter) <= number:
            groups, high = tighter, middle
        else:
            low = middle + 1
    while len(groups) < number:
        largest = max(groups, key=len)
        groups.remove(largest)
        groups += [largest[::2], largest[1::2]]
    return sorted(groups, key=lambda group: -lengths[group].sum())


def _best_fit(lengths, order, budget):
    groups, room = [], np.zeros(len(order), dtype=np.int64)
    for i in order:
        left = room[: len(groups)] - lengths[i]
        best = np.where(left < 0, budget, left).argmin() if groups else 0
        if groups and left[best] >= 0:
            groups[best].append(i)
        else:
            best = len(groups)
            groups.append([i])
            room[best] = budget
        room[best] -= lengths[i]
    return groups


def micro_batches(data: Data, rows, recipe: Recipe, world: int = 1) -> list[list[np.ndarray]]:
    """For each of `world` processes, the rows of its forward passes in one step: as many for each, of like sizes.

    Padded: `micro_batch` rows each. Packed: as many as fit into `pack_tokens`; the step's rows are the same either way.
    """
    if not data.packed:
        mine, size = [rows[rank::world] for rank in range(world)], recipe.micro_batch
        return [[part[i : i + size] for i in range(0, len(part), size)] for part in mine]
    groups = pack(data.lengths[rows], recipe.pack_tokens or recipe.max_length, world)
    return [[rows[group] for group in groups[rank::world]] for rank in range(world)]


def packed_step(samples, row: int, recipe: Recipe, tokenizer):
    """For people to look at: the first step of a packed training on `samples` that reads row number `row`.

    (step, steps, rows): counted from 1; rows is a list of packed rows, each a list of (row number, input_ids, labels) with
    the picture as wide as its features. Only this step is tokenised, so it is quick on a million samples; rows that
    cannot be used are taken for usable in the order, and left out of the step. None where no step reads the row.
    """
    recipe = replace(recipe, packing="packed")
    steps = plan(None, recipe, np.arange(len(samples)))
    step = next((step for step, rows in enumerate(steps, 1) if row in rows), None)
    if step is None:
        return None
    wide, image_token = models.picture_tokens(recipe), tokenizer.convert_tokens_to_ids(IMAGE)
    batch = samples.select(steps[step - 1])
    encoded = encode_many(batch["conversations"][:], tokenizer, recipe.template)
    whole = {
        int(number): [column[: recipe.max_length] for column in expand(*found, wide, image_token)]
        for number, found in zip(steps[step - 1], encoded)
        if not isinstance(found, ValueError)
    }
    numbers, lengths = list(whole), [len(ids) for ids, _ in whole.values()]
    groups = pack(lengths, recipe.pack_tokens or recipe.max_length) if whole else []
    return step, len(steps), [[(numbers[i], *whole[numbers[i]]) for i in group] for group in groups]


def feed(
    data: Data,
    pictures: Pictures,
    batches,
    recipe: Recipe,
    rank: int = 0,
    world: int = 1,
    first: int = 0,
):
    """For each step from `first`: the micro-batches of one process as (rows, divisor of their summed loss).

    The divisor is the number of learned tokens in the whole global batch, so that each token weighs the same wherever it
    was computed; or with `loss_average="micro_batches"` as in LLaVA, where the mean of a micro-batch is averaged with
    the others'. Enough steps for one batch of the tower go together, from a place that does not depend on `first`.
    """
    together = max(1, TOWER_BATCH * world // recipe.global_batch)
    starts = range(first // together * together, len(batches), together)
    steps = (
        [micro_batches(data, rows, recipe, world)[rank] for rows in batches[i : i + together]]
        for i in starts
    )
    for start, (group, after) in zip(starts, pairwise(chain(steps, [None]))):
        pictures.look(np.concatenate([part for parts in group for part in parts]))
        if after:
            pictures.begin(np.concatenate([part for parts in after for part in parts]))
        for step, parts in enumerate(group, start):
            if step >= first:
                tokens = int(data.supervised[batches[step]].sum())
                if recipe.loss_average == "tokens":
                    yield [(part, tokens) for part in parts]
                else:
                    yield [
                        (part, int(data.supervised[part].sum()) * len(parts) * world)
                        for part in parts
                    ]
