"""How long the rows of a recipe are, before they are prepared: as measured, or as assumed."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
from huggingface_hub import try_to_load_from_cache

from vflan.config import Recipe, resolve
from vflan.data.conversation import encode_many
from vflan.data.mixture import recipe_samples
from vflan.models import llava as models
from vflan.training.batching import truncate

# The file says what each of them holds.
_PLANNING = Path(__file__).with_name("planning.json").read_bytes()
GPUS, ROWS, TEXT, TASKS, QUESTIONS = json.loads(_PLANNING).values()
# Of how many rows the lengths are read (others are taken to be alike); how many a plan can order.
ROWS_READ, MOST_ROWS = 4000, 10**7


def load_rows(recipe: Recipe) -> tuple[SimpleNamespace, tuple[str, ...]]:
    """Return the recipe's rows as `batching.batch_order` takes them, and what was assumed."""
    vision, text = models.shapes(recipe)
    patches, path = (vision.image_size // vision.patch_size) ** 2, resolve(recipe.samples)
    samples = recipe_samples(recipe) if path.exists() else None
    rows = len(samples) if samples else _all_rows(recipe, path.name)
    if rows > MOST_ROWS:
        most = f"a plan orders at most {MOST_ROWS:,} rows"
        raise ValueError(f"{rows:,} rows: {most}; set num_samples to fewer, and multiply.")
    random = np.random.default_rng(0)
    if measured := samples and _has_tokenizer(recipe.language_model):
        lengths, learned, picture = _measure_lengths(samples, recipe, patches)
        notes = (f"lengths: those of {len(lengths):,} of {rows:,} rows",)
        sampled = rows > ROWS_READ
        chosen = random.integers(len(lengths), size=rows) if sampled else np.arange(len(lengths))
    else:
        lengths, learned, picture = _assume_lengths(rows, recipe, patches, random)
        where = "samples or tokenizer are not on this machine"
        notes = (f"assumed: lengths like LLaVA-1.5's, {rows:,} rows; {where}",)
        chosen = np.arange(rows)
    if rows > ROWS_READ or not measured:
        # It is not known which rows share a picture: each has its own.
        picture = np.where(picture[chosen] < 0, -1, np.arange(len(chosen)))
    if recipe.heldout_rows >= len(chosen):
        held = f"heldout_rows={recipe.heldout_rows} of {len(chosen)}"
        raise ValueError(f"{held} usable rows leaves nothing to train on.")
    columns = dict(lengths=lengths[chosen], supervised=learned[chosen], picture=picture, ids=chosen)
    packed = recipe.packing == "packed"
    return SimpleNamespace(**columns, packed=packed, patches=patches, text=text), notes


def _all_rows(recipe, name):
    """Return how many rows a recipe takes of published files; ValueError if one is unknown."""
    files = [(recipe.samples, _published_rows(recipe, name), "set num_samples")]
    for file, _, rows in (entry.partition("#") for entry in recipe.more_samples):
        files.append((file, int(rows or ROWS.get(Path(file).name, 0)), f"write {file}#rows"))
    for file, rows, advice in files:
        if not rows:
            unknown = f"{file} is not there, and its number of rows is unknown"
            raise ValueError(f"{unknown}: {advice}.")
    return sum(rows for _, rows, _ in files)


def _published_rows(recipe, name):
    """Return how many rows a recipe takes of a published file; None if that is unknown."""
    rows, tasks = ROWS.get(name), TASKS.get(name)
    if recipe.num_samples or not (rows and tasks):
        return recipe.num_samples or rows
    taken = min(recipe.num_tasks or tasks, tasks)
    # As if each task had as many rows as the others.
    return min(taken * (recipe.per_task or rows), rows * taken // tasks)


def _has_tokenizer(source):
    # A local folder, or a model of the hub that has been downloaded.
    if resolve(source).is_dir():
        return True
    return isinstance(try_to_load_from_cache(source, "tokenizer_config.json"), str)


def _measure_lengths(samples, recipe, patches):
    """Return lengths, answer tokens and picture numbers of up to ROWS_READ rows."""
    indices = np.linspace(0, len(samples) - 1, min(len(samples), ROWS_READ)).astype(int)
    some = samples.select(indices)
    encoded = encode_many(some["conversations"][:], models.load_tokenizer(recipe), recipe.template)
    rows, numbers, reason = [], {}, ""
    for image, result in zip(some["image"][:], encoded):
        try:
            ids, learned, _ = truncate(result, image, recipe, patches)
        except ValueError as error:
            # Training leaves out bad rows.
            reason = error
            continue
        picture = numbers.setdefault(image, len(numbers)) if image else -1
        length = len(ids) + (patches - 1 if image else 0)
        rows.append((length, int(learned.sum()), picture))
    if not rows:
        raise ValueError(f"{recipe.samples}: no row can be trained on, the last one: {reason}.")
    return np.array(rows).T


def _assume_lengths(rows, recipe, patches, random):
    plain = recipe.template == "plain"
    picture = np.where(random.random(rows) < 0.06 * (not plain), -1, 0)
    percent, *lengths = TEXT
    with_picture, text_only = (
        np.interp(100 * random.random(rows), percent, each) for each in lengths
    )
    if plain:
        text = random.integers(9, 41, rows)
        learned = text - 1
    else:
        text = np.where(picture < 0, text_only, with_picture).astype(int)
        # Long texts are about half answers, short ones end with a short answer.
        learned = np.where(text > 90, text // 2, text // 16 + 1)
    lengths = np.minimum(text + patches * (picture >= 0), recipe.max_length)
    return lengths, learned, picture
