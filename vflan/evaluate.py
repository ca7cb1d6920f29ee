"""Ask a model and score what it says: answer() for any list of questions, evaluate() for the benchmarks of a run.

Three things make answer() quick without changing a single answer. What precedes the picture is the same for all
questions and is read once; a picture is read once, however many questions are asked about it; and questions of one
length share a batch, so that hardly anything is padding. The rest is greedy decoding, as the paper's benchmarks want
it.
"""

import hashlib
import json
import math
import os
from pathlib import Path

import pandas as pd
import torch
from PIL import Image
from transformers import DynamicCache

from vflan.benchmarks import BENCHMARKS
from vflan.conversation import IMAGE_TOKEN_INDEX, prompt_ids
from vflan.recipe import resolve
from vflan.stats import bootstrap

COLUMNS = ["run", "benchmark", "metric", "value", "low", "high", "n", "seed", "baseline"]
SHELF_BYTES = 2 << 30  # keys and values of pictures that are kept at a time


def answer(model, processor, samples, max_new_tokens=32, batch_size=32, template="vicuna_v1"):
    """list[str]: the greedy answer to each sample, a mapping with `text` (the human turn) and `image` (a path or None).

    Equals asking one by one (up to floating point: in half precision a near tie may fall the other way).
    """
    answers = [""] * len(samples)
    for index, text in answering(model, processor, samples, max_new_tokens, batch_size, template):
        answers[index] = text
    return answers


@torch.inference_mode()
def answering(model, processor, samples, max_new_tokens=32, batch_size=32, template="vicuna_v1"):
    """Yields (index, answer) batch by batch, in the order in which they come out, not in that of the samples."""
    tokenizer, was_training = processor.tokenizer, model.training
    model.eval()
    groups = {}  # ids before the picture -> picture -> [(index, ids after the picture)]
    for index, sample in enumerate(samples):
        image = sample.get("image") or None
        ids = list(prompt_ids(sample["text"], tokenizer, template, has_image=image is not None))
        if ids.count(IMAGE_TOKEN_INDEX) != (image is not None):
            raise ValueError(
                f"Question {index} names {ids.count(IMAGE_TOKEN_INDEX)} pictures in its text, it must have one at most."
            )
        at = ids.index(IMAGE_TOKEN_INDEX) if image else 0
        groups.setdefault(tuple(ids[:at]), {}).setdefault(image, []).append((index, ids[at + 1 :] if image else ids))
    try:
        for before, pictures in groups.items():
            for cache, rows in shelves(model, processor, before, pictures, batch_size):
                rows.sort(key=lambda row: len(row[2]))
                for start in range(0, len(rows), batch_size):
                    batch = rows[start : start + batch_size]
                    own = pick(cache, torch.tensor([slot for _, slot, _ in batch], device=model.device))
                    said = decode(model, own, [ids for *_, ids in batch], max_new_tokens, tokenizer)
                    for (index, *_), ids in zip(batch, said):
                        yield index, tokenizer.decode(ids, skip_special_tokens=True).strip()
    finally:
        model.train(was_training)


def shelves(model, processor, before, pictures, batch_size):
    """Yields (cache, [(index, slot, ids)]): keys and values of some pictures, a slot each, and the questions on them.

    `before` is read once, each picture once. A shelf holds as many pictures as fit in SHELF_BYTES, and at least enough
    to fill a batch. Questions without a picture come with an empty cache.
    """
    device = model.device
    rows = [(index, 0, ids) for index, ids in pictures.pop(None, [])]
    if rows:
        yield None, rows
    if not pictures:
        return
    head = DynamicCache()
    model(input_ids=torch.tensor([before], device=device), past_key_values=head, use_cache=True, logits_to_keep=1)
    text = model.config.text_config
    tokens = len(before) + model.config.image_seq_length
    width = text.num_key_value_heads * (getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads)
    picture_bytes = 2 * text.num_hidden_layers * width * tokens * model.dtype.itemsize
    a_batch = math.ceil(batch_size * len(pictures) / sum(map(len, pictures.values())))
    size = max(a_batch, min(256, SHELF_BYTES // picture_bytes))
    paths = list(pictures)
    for start in range(0, len(paths), size):
        shelf = paths[start : start + size]
        parts = [features(model, processor, shelf[i : i + batch_size]) for i in range(0, len(shelf), batch_size)]
        cache = pick(head, torch.zeros(len(shelf), dtype=torch.long, device=device))
        model(inputs_embeds=torch.cat(parts), past_key_values=cache, use_cache=True, logits_to_keep=1)
        yield cache, [(index, slot, ids) for slot, path in enumerate(shelf) for index, ids in pictures[path]]


def features(model, processor, paths):
    """(pictures, image tokens, width of the language model): what the language model sees of each picture."""
    images = []
    for path in paths:
        with Image.open(path) as image:
            images.append(image.convert("RGB"))
    pixels = processor.image_processor(images, return_tensors="pt")["pixel_values"]
    found = model.get_image_features(pixel_values=pixels.to(model.device, model.dtype), return_dict=True)
    return torch.stack(list(found.pooler_output)).to(model.dtype)


def pick(cache, rows):
    """A cache with the given rows of `cache`, in that order; a row may occur more than once."""
    new = DynamicCache()
    for i, layer in enumerate(cache.layers if cache else ()):
        new.update(layer.keys[rows], layer.values[rows], i)
    return new


def decode(model, cache, prompts, max_new_tokens, tokenizer):
    """list of id lists: greedy continuations of `prompts`, which follow what `cache` has read already.

    Prompts are left-padded to the longest. A finished row leaves the batch once half of the rows are done.
    """
    device, past, width = model.device, cache.get_seq_length(), max(map(len, prompts))
    pads = torch.tensor([width - len(ids) for ids in prompts], device=device)[:, None]
    ids = torch.tensor([[tokenizer.pad_token_id or 0] * (width - len(p)) + p for p in prompts], device=device)
    columns = torch.arange(width, device=device)
    position = past + (columns - pads).clamp(min=0)
    mask = None
    if pads.any():
        mask = torch.cat([ids.new_ones(len(prompts), past), (columns >= pads).long()], dim=1)
    said = [[] for _ in prompts]
    rows, alive = torch.arange(len(prompts), device=device), torch.ones(len(prompts), dtype=torch.bool, device=device)
    for step in range(max_new_tokens):
        out = model(input_ids=ids, attention_mask=mask, position_ids=position, past_key_values=cache, use_cache=True,
                    logits_to_keep=1)  # fmt: skip
        token = out.logits[:, -1].argmax(-1)
        alive = alive & (token != tokenizer.eos_token_id)
        for row, new, going in zip(rows.tolist(), token.tolist(), alive.tolist()):
            if going:
                said[row].append(new)
        if step + 1 == max_new_tokens or not alive.any():
            break
        ids, position = token[:, None], position[:, -1:] + 1
        if mask is not None:
            mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
        if alive.sum() * 2 <= len(alive):
            keep = alive.nonzero()[:, 0]
            cache, ids, position, rows, alive = pick(cache, keep), ids[keep], position[keep], rows[keep], alive[keep]
            mask = mask if mask is None else mask[keep]
    return said


# ------------------------------------------------------------------------------------------------- benchmarks of a run


def evaluate(run, benchmarks=None, folder=None, batch_size=64, model=None, name=None, template="vicuna_v1"):
    """Scores of a run as a DataFrame: run, benchmark, metric, value, low, high, n, seed, baseline.

    run: a Run or its folder. benchmarks: names (default: all that `folder` holds). folder: the recipe's if not given.
    Answers are kept in <run>/answers/NAME.jsonl as they come: an interrupted evaluation goes on where it stopped, and a
    finished one is scored again without loading the model. Scores are kept in <run>/scores.csv.
    model, name: evaluate another model under another name, one with a swapped part for instance (Tables 6 and 7).
    Values are on a scale of 0 to 100; low and high are a 95 % bootstrap over pictures; baseline is the majority
    answer's.
    """
    if isinstance(run, (str, os.PathLike)):
        from vflan.runs import Run

        run = Run.open(run)
    if (model is None) != (name is None):
        raise ValueError(
            "To evaluate a model of your own give both model= and name=: its answers are kept under that name."
        )
    folder = resolve(folder or run.recipe.benchmarks)
    names = [benchmarks] if isinstance(benchmarks, str) else list(benchmarks or present(folder))
    for unknown in set(names) - set(BENCHMARKS):
        raise ValueError(f"There is no benchmark {unknown!r}; known are {', '.join(BENCHMARKS)}.")
    home = Path(run.folder) / "answers" / name if name else Path(run.folder) / "answers"
    weights = fingerprint(Path(run.folder) / "model") if model is None else fingerprint_of(model)
    processor, tables = None, []
    for key in names:
        benchmark = BENCHMARKS[key]
        samples = benchmark.load(folder)
        asked = [{"image": s["image"], "text": benchmark.prompt(s)} for s in samples]
        header = {"model": weights, "questions": fingerprint_questions(samples, asked), "template": template,
                  "max_new_tokens": benchmark.max_new_tokens, "decoding": "greedy"}  # fmt: skip
        path = home / f"{key}.jsonl"
        answers = read_answers(path, header)
        todo = [i for i in range(len(samples)) if i not in answers]
        if todo:
            if processor is None:
                model, processor = (run.load_model() if model is None else model), run.processor()
            with path.open("a", encoding="utf-8") as file:
                new = answering(
                    model, processor, [asked[i] for i in todo], benchmark.max_new_tokens, batch_size, template
                )
                for j, text in new:
                    i = todo[j]
                    answers[i] = text
                    row = {"i": i, "question_id": samples[i]["question_id"], "prompt": asked[i]["text"], "answer": text}
                    file.write(json.dumps(row, ensure_ascii=False) + "\n")
                    file.flush()
        tables.append(score_table(name or run.recipe.name, benchmark, samples, [answers[i] for i in
        range(len(samples))],
                                  run.recipe.seed))  # fmt: skip
    scores = pd.concat(tables, ignore_index=True)
    keep_scores(Path(run.folder) / "scores.csv", scores)
    return scores


def present(folder):
    """The names of the benchmarks whose folder is there."""
    found = [name for name in BENCHMARKS if (Path(folder) / name).is_dir()]
    if not found:
        raise FileNotFoundError(
            f"No benchmark in {folder or 'the recipe'} - run notebooks/01_data_exploration.ipynb, or give folder=."
        )
    return found


def score_table(run, benchmark, samples, answers, seed=0):
    """One row a metric, with its interval and the majority baseline."""
    metrics, blind = benchmark.items(samples, answers), benchmark.baseline(samples)
    rows = []
    for name, metric in metrics.items():
        interval = bootstrap(100 * metric.num, metric.cluster, seed=0, den=metric.den, groups=metric.group)
        rows.append([run, benchmark.name, name, *interval, int((metric.den > 0).sum()), seed, blind[name]])
    return pd.DataFrame(rows, columns=COLUMNS)


def keep_scores(path, scores):
    """Add scores to a csv; rows of the same run, benchmark, metric and seed are replaced."""
    if path.exists():
        scores = pd.concat([pd.read_csv(path), scores], ignore_index=True)
        scores = scores.drop_duplicates(["run", "benchmark", "metric", "seed"], keep="last")
    part = path.with_suffix(".part")
    scores.to_csv(part, index=False, float_format="%.4f")
    part.replace(path)


def read_answers(path, header):
    """{index: answer} of the kept file, which is begun with its header if it is not there.

    ValueError if the file was made by another model, other questions or another way to decode. A last line that an
    interruption cut off is dropped from the file.
    """
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(header) + "\n", encoding="utf-8")
        return {}
    text = path.read_text(encoding="utf-8")
    if not text.endswith("\n"):
        text = text[: text.rfind("\n") + 1]
        path.write_text(text or json.dumps(header) + "\n", encoding="utf-8")
    rows = [json.loads(line) for line in text.splitlines()] or [header]
    other = [key for key in header if rows[0].get(key) != header[key]]
    if other:
        raise ValueError(
            f"{path} holds the answers of another {' and '.join(other)}: move it away or delete it to ask again."
        )
    return {row["i"]: row["answer"] for row in rows[1:]}


def fingerprint(folder):
    """A short hash of the weights in a folder, from at most 17 MiB of each file: a model may have 26 GB."""
    files = sorted(p for p in Path(folder).glob("**/*") if p.suffix in (".safetensors", ".bin"))
    if not files:
        raise FileNotFoundError(f"{folder} holds no weights: train the run first.")
    digest, block = hashlib.sha256(), 1 << 20
    for path in files:
        size = path.stat().st_size
        digest.update(f"{path.name} {size}".encode())
        with path.open("rb") as file:
            for start in sorted({min(size * i // 16, max(0, size - block)) for i in range(17)}):
                file.seek(start)
                digest.update(file.read(block))
    return digest.hexdigest()[:16]


def fingerprint_of(model):
    """A short hash of a model in memory, from up to 4096 values of every tensor."""
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        flat = tensor.detach().flatten()
        sampled = flat[:: max(1, flat.numel() // 4096)][:4096]
        digest.update(name.encode() + sampled.double().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def fingerprint_questions(samples, asked):
    """A short hash of what is asked: ids, prompts, names and sizes of the pictures. Labels may be corrected later."""
    digest, sizes = hashlib.sha256(), {None: 0}
    for s, a in zip(samples, asked):
        image = a["image"]
        if image not in sizes:
            sizes[image] = os.path.getsize(image) if os.path.exists(image) else -1
        digest.update(json.dumps([s["question_id"], a["text"], image and Path(image).name, sizes[image]]).encode())
    return digest.hexdigest()[:16]
