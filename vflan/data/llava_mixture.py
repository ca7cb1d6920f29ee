"""LLaVA-1.5's tuning mixture, rebuilt from the source annotations.

The rules are those that its paper states (v2, appendix and Table 7). Only the resulting json was
published, not the code: what the paper does not state, but the published rows and counts show, is
marked "inferred" here. Each rule takes records (dicts) and yields rows in LLaVA's form, in the
order of the records. What is random is drawn by hash, so that a seed gives the same rows on any
machine.

Records hold what the sources' own files say; `records` reads these files, and joins them where a
source has two:

    vqav2, okvqa, gqa, ocrvqa   image, question, answer (one a question)
    aokvqa                      image, question, choices, correct_choice_idx (one a question)
    textcaps                    image, caption, ocr_tokens (one an image: its first caption,
                                inferred)
    refcoco, vg                 image, width, height, box, phrase (one a region; box is x, y,
                                width, height in pixels)
    sharegpt, llava_instruct    rows in LLaVA's form

`image` is the path in the mixture: coco/train2017/000000033471.jpg, gqa/images/1.jpg,
ocr_vqa/images/..., textvqa/train_images/..., vg/VG_100K/...
"""

from __future__ import annotations

import json
import os
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vflan.data.conversation import IMAGE, as_text, audit, encode
from vflan.data.limits import no_file
from vflan.data.mixture import closest, hash_draw

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase as Tokenizer

SHORT = "Answer the question using a single word or phrase."
LETTER = "Answer with the option's letter from the given choices directly."
CAPTION = "Provide a one-sentence caption for the provided image."
REGION = "Please provide a short description for this region: "
BOX = "Please provide the bounding box coordinate of the region this sentence describes: "
_LETTERS = "ABCDEFGHIJ"
# Rows of each source in the published file (the author's counts), in the paper's order.
ROWS = {"llava_instruct": 157_712, "sharegpt": 40_688, "vqav2": 82_783, "gqa": 72_140,
        "okvqa": 8_998, "ocrvqa": 80_000, "aokvqa": 66_160, "textcaps": 21_953,
        "refcoco": 48_447, "vg": 86_417}  # fmt: skip
# "<image>" in a text-only conversation, with a character inside, so that it is not an image token.
_IMAGE_AS_TEXT = "<image\u2060>"


def llava_mixture(
    sources: Mapping[str, Iterable[dict]], tokenizer: Tokenizer | None = None, seed: int = 0
) -> Iterator[dict]:
    """The mixture's rows from {source: records}, source by source; `task_name` is the source.

    The published sources give 665,298 rows (see ROWS). A source that is not given is left out.
    `save_samples` writes the rows. sharegpt needs the `tokenizer` of the model to be trained.
    ValueError: an unknown source, or no tokenizer for sharegpt.
    """
    for name in sources:
        if name not in ROWS:
            raise ValueError(f"LLaVA-1.5's mixture has no source {name!r}; {closest(name, ROWS)}")
    if "sharegpt" in sources and tokenizer is None:
        problem = "ShareGPT is cut by tokens"
        raise ValueError(f"{problem}: give the tokenizer of the model to be trained.")
    rules = _rules(tokenizer, seed)
    for name in ROWS:
        if name in sources:
            yield from rules[name](sources[name])


def _rules(tokenizer: Tokenizer | None, seed: int) -> dict[str, Callable]:
    """For each source, the function from its records to rows."""

    def merge(name):
        return partial(one_conversation_per_image, prompt=SHORT, name=name)

    return {
        "llava_instruct": partial(map, as_published),
        "sharegpt": partial(sharegpt, tokenizer=tokenizer),
        "vqav2": merge("vqav2"),
        "gqa": merge("gqa"),
        "okvqa": merge("okvqa"),
        "ocrvqa": lambda records: sample(merge("ocrvqa")(records), ROWS["ocrvqa"], seed),
        "aokvqa": a_okvqa,
        "textcaps": partial(map, text_caps),
        "refcoco": partial(refcoco, seed=seed),
        "vg": partial(visual_genome, seed=seed),
    }


# ------------------------------------------------------------------------ the sources' files


def records(source: str, *files: str | os.PathLike) -> Iterator[dict]:
    """The records of a source from its own training files (json), which are given in this order:

    vqav2, okvqa: questions, annotations (mscoco_train2014); gqa: train_balanced_questions; ocrvqa:
    dataset; aokvqa: aokvqa_v1p0_train; textcaps: TextCaps_0.1_train,
    TextVQA_Rosetta_OCR_v0.2_train; vg: region_descriptions, image_data.

    RefCOCO publishes pickles, which its own toolkit reads. Of VQA's ten answers the most frequent
    counts (inferred). ValueError: no such source.
    """
    if source not in _READERS:
        raise ValueError(f"records reads no {source!r}; it reads {', '.join(_READERS)}.")
    return _READERS[source](*map(_read_json, files))


def _read_json(file: str | os.PathLike) -> Any:
    """The value in a json file. A device or a pipe is not read; what is no json is one sentence."""
    if lack := no_file(Path(file)):
        raise FileNotFoundError(f"{file}: {lack} in place of a json file.")
    try:
        return json.loads(Path(file).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is not whole json ({error}); download it again.") from None


def _coco(number: int) -> str:
    # In train2017, the images of train2014 have these names.
    return f"coco/train2017/{number:012}.jpg"


def _read_vqa(questions: dict, annotations: dict) -> Iterator[dict]:
    answers = {entry["question_id"]: entry["answers"] for entry in annotations["annotations"]}
    for entry in questions["questions"]:
        # Ten people answered each question.
        votes = Counter(vote["answer"] for vote in answers[entry["question_id"]])
        ((answer, _),) = votes.most_common(1)
        yield dict(image=_coco(entry["image_id"]), question=entry["question"], answer=answer)


def _read_gqa(questions: dict) -> Iterator[dict]:
    for entry in questions.values():
        image = f"gqa/images/{entry['imageId']}.jpg"
        yield dict(image=image, question=entry["question"], answer=entry["answer"])


def _read_ocr_vqa(books: dict) -> Iterator[dict]:
    for name, book in books.items():
        # Split 1 is the training split.
        if book["split"] == 1:
            image = f"ocr_vqa/images/{name}.jpg"
            for question, answer in zip(book["questions"], book["answers"]):
                yield dict(image=image, question=question, answer=answer)


def _read_a_okvqa(questions: list) -> Iterator[dict]:
    for entry in questions:
        fields = {key: entry[key] for key in ("question", "choices", "correct_choice_idx")}
        yield dict(image=_coco(entry["image_id"]), **fields)


def _read_text_caps(captions: dict, ocr: dict) -> Iterator[dict]:
    words = {entry["image_id"]: entry["ocr_tokens"] for entry in ocr["data"]}
    first_captions = {}
    for entry in captions["data"]:
        first_captions.setdefault(entry["image_id"], entry["caption_str"])
    for image, caption in first_captions.items():
        path = f"textvqa/train_images/{image}.jpg"
        yield dict(image=path, caption=caption, ocr_tokens=words.get(image, []))


def _read_vg(images: list, sizes: list) -> Iterator[dict]:
    size_of = {size["image_id"]: size for size in sizes}
    for region in (region for image in images for region in image["regions"]):
        size = size_of[region["image_id"]]
        # The folder is VG_100K or VG_100K_2.
        path = "vg/" + "/".join(size["url"].split("/")[-2:])
        box = tuple(region[side] for side in ("x", "y", "width", "height"))
        shape = {"width": size["width"], "height": size["height"]}
        yield dict(image=path, **shape, box=box, phrase=region["phrase"])


_READERS = {"vqav2": _read_vqa, "okvqa": _read_vqa, "gqa": _read_gqa, "ocrvqa": _read_ocr_vqa,
            "aokvqa": _read_a_okvqa, "textcaps": _read_text_caps, "vg": _read_vg}  # fmt: skip


# --------------------------------------------------------------------------------- the rules


def one_conversation_per_image(records: Iterable[dict], prompt: str, name: str) -> Iterator[dict]:
    """All question-answer pairs of an image as one conversation.

    The format prompt follows only the first question, on a line of its own (as in the published
    rows of GQA and OCR-VQA; inferred for the others).
    """
    for image, pairs in _by_image(records):
        yield _row(name, image, [(pair["question"], pair["answer"]) for pair in pairs], prompt)


def a_okvqa(records: Iterable[dict]) -> Iterator[dict]:
    """A-OKVQA: an image's pairs merged, and a row for each choice with the options rotated by one.

    The paper says that every question is repeated for each of its k choices. That the pairs of an
    image are merged follows from the count (66,160 = 4 x 16,540 images). Rotation is how LLaVA
    evaluates MMBench. Both are inferred.
    """
    for image, questions in _by_image(records):
        # Questions of one image may differ in their number of choices.
        for turn in range(max(len(question["choices"]) for question in questions)):
            pairs = [_multiple_choice(question, turn) for question in questions]
            yield _row("aokvqa", image, pairs, LETTER, f"_{turn}")


def _multiple_choice(question: dict, turn: int) -> tuple[str, str]:
    choices, right = question["choices"], question["correct_choice_idx"]
    turn %= len(choices)
    rotated = zip(_LETTERS, choices[turn:] + choices[:turn])
    options = [f"{letter}. {choice}" for letter, choice in rotated]
    return "\n".join([question["question"], *options]), _LETTERS[(right - turn) % len(choices)]


def text_caps(record: dict) -> dict:
    """TextCaps: one caption; below the prompt, a line with the words that OCR read.

    The line is there also without any words (inferred from the questions of TextVQA, which all
    have it).
    """
    prompt = f"{CAPTION}\nReference OCR token: {', '.join(record['ocr_tokens'])}"
    return _row("textcaps", record["image"], [(prompt, record["caption"])])


def refcoco(records: Iterable[dict], seed: int = 0) -> Iterator[dict]:
    """RefCOCO: the regions of an image as conversations of fewer than ten question-answer pairs.

    For each region it is random whether the box or the phrase is the question, and the other the
    answer. That the paper's "turn" is a pair, not a single utterance, is inferred.
    """
    for image, regions in _by_image(records):
        pairs = []
        for number, region in enumerate(regions):
            box = _region_box(region)
            asks_phrase = hash_draw(seed, f"refcoco/{image}/{number}")[0] % 2
            pair = (
                (REGION + box, region["phrase"]) if asks_phrase else (BOX + region["phrase"], box)
            )
            pairs.append(pair)
        # Fewer than ten pairs: nine.
        for start in range(0, len(pairs), 9):
            suffix = f"_{start // 9}" if len(pairs) > 9 else ""
            yield _row("refcoco", image, pairs[start : start + 9], id_end=suffix)


def visual_genome(records: Iterable[dict], seed: int = 0) -> Iterator[dict]:
    """Visual Genome: at most ten regions of an image, drawn if it has more; asks for the box."""
    for image, regions in _by_image(records):
        if len(regions) > 10:
            keys = [f"vg/{image}/{number}" for number in range(len(regions))]
            regions = [regions[number] for number in _drawn(keys, 10, seed)]
        pairs = [(BOX + region["phrase"], _region_box(region)) for region in regions]
        yield _row("vg", image, pairs)


def _region_box(region: dict) -> str:
    return padded_box(region["box"], region["width"], region["height"])


def padded_box(box: tuple[float, float, float, float], width: int, height: int) -> str:
    """A box (x, y, width, height in pixels) as "[x1, y1, x2, y2]" with two decimals.

    The coordinates are relative to the square that padding makes of the image. The author says so
    of the mixture; users doubt it for RefCOCO.
    """
    side, (x, y, w, h) = max(width, height), box
    # Rounded down, as the padding itself does it.
    left, top = (side - width) // 2, (side - height) // 2
    corners = (x + left, y + top, x + w + left, y + h + top)
    return "[" + ", ".join(f"{min(max(corner / side, 0), 1):.2f}" for corner in corners) + "]"


def sharegpt(rows: Iterable[dict], tokenizer: Tokenizer, max_length: int = 2048) -> Iterator[dict]:
    """ShareGPT without invalid conversations; long ones are cut at `max_length` tokens, not split.

    Invalid is what Vicuna's filter drops (inferred: the paper only names the filter): no turns, an
    unknown role, or turns that do not alternate after an opening answer; also a conversation
    without any answer, from which nothing could be learned. An opening answer, a last question
    without an answer, and an empty answer with its question are left out. The cut keeps all pairs
    that fit completely; if not even the first pair fits, its answer is cut.
    """
    for row in rows:
        turns = [
            turn | {"value": (as_text(turn.get("value")) or "").replace(IMAGE, _IMAGE_AS_TEXT)}
            for turn in row["conversations"] or []
        ]
        try:
            pairs = _cut(audit(turns).pairs, tokenizer, max_length)
        except ValueError:
            continue  # audit raises it for an invalid conversation
        if pairs:
            talk = _conversation(pairs)
            # Spell "<image>" again as it was.
            for turn in talk:
                turn["value"] = turn["value"].replace(_IMAGE_AS_TEXT, IMAGE)
            head = {"id": row.get("id"), "task_name": "sharegpt", "model": row.get("model", "")}
            yield head | {"conversations": talk}


def _cut(pairs: list[tuple[str, str]], tokenizer, max_length: int) -> list[tuple[str, str]]:
    """The longest beginning of a conversation that fits; empty if its first question does not."""

    def fits(pairs):
        return len(encode(_conversation(pairs), tokenizer)[0]) <= max_length

    # Most conversations fit: try the whole one before bisection.
    if fits(pairs):
        return pairs
    if whole := _longest(len(pairs), lambda n: fits(pairs[:n])):
        return pairs[:whole]
    question, answer = pairs[0]
    # A blank answer cannot be encoded; it is shorter than any answer that fits.
    kept = _longest(len(answer), lambda n: not answer[:n].strip() or fits([(question, answer[:n])]))
    return [(question, answer[:kept])] if answer[:kept].strip() else []


def _longest(length: int, fits: Callable[[int], bool]) -> int:
    """The largest n up to `length` for which `fits`, 0 if there is none; found by bisection."""
    return length - bisect_left(range(length, 0, -1), True, key=fits)


def as_published(row: dict) -> dict:
    """LLaVA-Instruct as it is; its bare file names are images of COCO train2017."""
    image = row["image"] if "/" in row["image"] else f"coco/train2017/{row['image']}"
    return row | {"image": image, "task_name": "llava_instruct"}


def sample(rows: Iterable[dict], count: int, seed: int = 0) -> Iterator[dict]:
    """`count` rows drawn by hash of their image, in their order; all if there are no more."""
    rows = list(rows)
    return (rows[i] for i in _drawn([f"sample/{row['image']}" for row in rows], count, seed))


def _drawn(keys: list[str], count: int, seed: int) -> list[int]:
    """The indices of `count` keys drawn by hash, ascending."""
    return sorted(sorted(range(len(keys)), key=lambda i: hash_draw(seed, keys[i]))[:count])


def _by_image(records: Iterable[dict]) -> Iterable[tuple[str, list[dict]]]:
    """(image, its records), images in the order in which they first appear."""
    groups = {}
    for record in records:
        groups.setdefault(record["image"], []).append(record)
    return groups.items()


def _row(
    name: str, image: str, pairs: list[tuple[str, str]], prompt: str = "", id_end: str = ""
) -> dict:
    """One row; `<image>` before the first question, the format prompt below it."""
    (question, answer), *later = pairs
    first = "\n".join(filter(None, [IMAGE, question, prompt]))
    talk = _conversation([(first, answer), *later])
    stem = image.rpartition("/")[2].rpartition(".")[0]
    return {"id": stem + id_end, "image": image, "task_name": name, "conversations": talk}


def _conversation(pairs: Iterable[tuple[str, str]]) -> list[dict]:
    return [
        {"from": role, "value": text}
        for pair in pairs
        for role, text in zip(("human", "gpt"), pair)
    ]
