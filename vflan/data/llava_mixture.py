"""LLaVA-1.5's tuning mixture, rebuilt from source annotations by the rules its paper states (v2, appendix and Table 7).

Only the resulting json was published, never the code. What is not stated but read off the published rows and counts is marked
"inferred" here. Each rule takes records (dicts) one by one and yields rows in LLaVA's shape, in the order of the records; what is
drawn is drawn by hash, so the same seed gives the same rows on any machine.

Records are what the sources' own files say (`records` reads them), joined where a source spreads it over two files:
    vqav2, okvqa, gqa, ocrvqa   image, question, answer                          (one a question)
    aokvqa                      image, question, choices, correct_choice_idx     (one a question)
    textcaps                    image, caption, ocr_tokens                       (one a picture: its first caption, inferred)
    refcoco, vg                 image, width, height, box, phrase                (one a region; box is x, y, width, height in pixels)
    sharegpt, llava_instruct    rows in LLaVA's shape
`image` is the path in the mixture: coco/train2017/000000033471.jpg, gqa/images/1.jpg, ocr_vqa/images/..., textvqa/train_images/...,
vg/VG_100K/...
"""

import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

from vflan.data.conversation import IMAGE, audit, encode
from vflan.data.mixture import closest, hash_draw

SHORT = "Answer the question using a single word or phrase."
LETTER = "Answer with the option's letter from the given choices directly."
CAPTION = "Provide a one-sentence caption for the provided image."
REGION = "Please provide a short description for this region: "
BOX = "Please provide the bounding box coordinate of the region this sentence describes: "
_BROKEN_IMAGE = "<image\u2060>"  # the token spelt so that nothing obeys it


def llava_mixture(
    sources: Mapping[str, Iterable[dict]], tokenizer=None, seed: int = 0
) -> Iterator[dict]:
    """The mixture's rows from {source: records}, one source after the other; `task_name` is the source.

    With the published sources it has 665,298 rows (see ROWS). A source that is not given is left out; `save_samples` writes the
    rows. sharegpt needs the `tokenizer` of the model that will be trained.
    """
    for name in sources:
        if name not in ROWS:
            raise ValueError(f"LLaVA-1.5's mixture has no source {name!r}; {closest(name, ROWS)}")
    if "sharegpt" in sources and tokenizer is None:
        raise ValueError(
            "ShareGPT is cut by tokens: give the tokenizer of the model to be trained."
        )
    for name in ROWS:
        if name in sources:
            yield from _rules(tokenizer, seed)[name](sources[name], name)


# rows of each source in the published file (the author's counts), in the order of the paper's table
ROWS = {"llava_instruct": 157_712, "sharegpt": 40_688, "vqav2": 82_783, "gqa": 72_140, "okvqa": 8_998, "ocrvqa": 80_000,
        "aokvqa": 66_160, "textcaps": 21_953, "refcoco": 48_447, "vg": 86_417}  # fmt: skip


def records(source: str, *files: str | os.PathLike) -> Iterator[dict]:
    """The records of a source from its own training files, which are given in this order:

    vqav2, okvqa: questions, annotations (mscoco_train2014); gqa: train_balanced_questions; ocrvqa: dataset; aokvqa:
    aokvqa_v1p0_train; textcaps: TextCaps_0.1_train, TextVQA_Rosetta_OCR_v0.2_train; vg: region_descriptions, image_data. All json.
    RefCOCO publishes pickles, which its own toolkit reads. Of VQA's ten answers the most frequent counts (inferred).
    """
    if source not in _READERS:
        raise ValueError(f"records reads no {source!r}; it reads {', '.join(_READERS)}.")
    return _READERS[source](*(json.loads(Path(file).read_text(encoding="utf-8")) for file in files))


def _coco(number: int) -> str:
    return f"coco/train2017/{number:012}.jpg"  # COCO's train2014 pictures bear these names in train2017


def _read_vqa(questions: dict, annotations: dict) -> Iterator[dict]:
    answers = {found["question_id"]: found["answers"] for found in annotations["annotations"]}
    for asked in questions["questions"]:
        ((answer, _),) = Counter(
            found["answer"] for found in answers[asked["question_id"]]
        ).most_common(1)
        yield {"image": _coco(asked["image_id"]), "question": asked["question"], "answer": answer}


def _read_gqa(questions: dict) -> Iterator[dict]:
    for asked in questions.values():
        yield {
            "image": f"gqa/images/{asked['imageId']}.jpg",
            "question": asked["question"],
            "answer": asked["answer"],
        }


def _read_ocr_vqa(books: dict) -> Iterator[dict]:
    for name, book in books.items():
        if book["split"] == 1:  # its training split
            for question, answer in zip(book["questions"], book["answers"]):
                yield {
                    "image": f"ocr_vqa/images/{name}.jpg",
                    "question": question,
                    "answer": answer,
                }


def _read_a_okvqa(questions: list) -> Iterator[dict]:
    for asked in questions:
        kept = {key: asked[key] for key in ("question", "choices", "correct_choice_idx")}
        yield kept | {"image": _coco(asked["image_id"])}


def _read_text_caps(captions: dict, ocr: dict) -> Iterator[dict]:
    words = {found["image_id"]: found["ocr_tokens"] for found in ocr["data"]}
    for image, captions_of in _by_image(
        {"image": found["image_id"], **found} for found in captions["data"]
    ):
        path, tokens = f"textvqa/train_images/{image}.jpg", words.get(image, [])
        yield {"image": path, "caption": captions_of[0]["caption_str"], "ocr_tokens": tokens}


def _read_vg(pictures: list, sizes: list) -> Iterator[dict]:
    known = {size["image_id"]: size for size in sizes}
    for region in (region for picture in pictures for region in picture["regions"]):
        size = known[region["image_id"]]
        box = tuple(region[side] for side in ("x", "y", "width", "height"))
        image = "vg/" + "/".join(size["url"].split("/")[-2:])  # VG_100K or VG_100K_2
        yield {
            "image": image,
            "width": size["width"],
            "height": size["height"],
            "box": box,
            "phrase": region["phrase"],
        }


_READERS = {
    "vqav2": _read_vqa,
    "okvqa": _read_vqa,
    "gqa": _read_gqa,
    "ocrvqa": _read_ocr_vqa,
    "aokvqa": _read_a_okvqa,
    "textcaps": _read_text_caps,
    "vg": _read_vg,
}


def _rules(tokenizer, seed: int) -> dict[str, Callable]:
    def merged(records, name):
        return one_conversation_per_image(records, SHORT, name)

    return {
        "llava_instruct": lambda rows, name: map(as_published, rows),
        "sharegpt": lambda rows, name: sharegpt(rows, tokenizer),
        "vqav2": merged,
        "gqa": merged,
        "okvqa": merged,
        "ocrvqa": lambda records, name: sample(merged(records, name), 80_000, seed),
        "aokvqa": lambda records, name: a_okvqa(records),
        "textcaps": lambda records, name: map(text_caps, records),
        "refcoco": lambda records, name: refcoco(records, seed),
        "vg": lambda records, name: visual_genome(records, seed),
    }


def one_conversation_per_image(records: Iterable[dict], prompt: str, name: str) -> Iterator[dict]:
    """All question-answer pairs of a picture as one conversation; the format prompt follows the first question only, on a line of
    its own (the published rows of GQA and OCR-VQA; inferred for the others)."""
    for image, pairs in _by_image(records):
        yield _row(name, image, [(pair["question"], pair["answer"]) for pair in pairs], prompt)


def a_okvqa(records: Iterable[dict]) -> Iterator[dict]:
    """A-OKVQA: the pairs of a picture merged, then as many rows as there are choices, each with the options rotated by one.

    The paper says that every question is repeated for each of its k choices; that the rows of a picture stay merged follows from
    the count (66,160 = 4 x 16,540 pictures), and rotation, as LLaVA evaluates MMBench, is the natural reading: both inferred.
    """
    for image, questions in _by_image(records):
        for turn in range(max(len(question["choices"]) for question in questions)):
            yield _row(
                "aokvqa",
                image,
                [_multiple_choice(question, turn) for question in questions],
                LETTER,
                f"_{turn}",
            )


def _multiple_choice(question: dict, turn: int) -> tuple[str, str]:
    choices, right = question["choices"], question["correct_choice_idx"]
    turn %= len(choices)
    options = [
        f"{letter}. {choice}"
        for letter, choice in zip("ABCDEFGHIJ", choices[turn:] + choices[:turn])
    ]
    return "\n".join([question["question"], *options]), "ABCDEFGHIJ"[(right - turn) % len(choices)]


def text_caps(record: dict) -> dict:
    """TextCaps: a picture and one caption; the words that OCR found stand below the prompt. The line stays when there are none
    (inferred from the questions of TextVQA, which all have it)."""
    prompt = f"{CAPTION}\nReference OCR token: {', '.join(record['ocr_tokens'])}"
    return _row("textcaps", record["image"], [(prompt, record["caption"])])


def refcoco(records: Iterable[dict], seed: int = 0) -> Iterator[dict]:
    """RefCOCO: the regions of a picture as a conversation, cut into segments of fewer than ten question-answer pairs.

    For each region a coin decides what is asked: the words for the box, or the box for the words. That a "turn" of the paper is a
    pair, not a single utterance, is inferred.
    """
    for image, regions in _by_image(records):
        pairs = []
        for number, region in enumerate(regions):
            box = padded_box(region["box"], region["width"], region["height"])
            describe = hash_draw(seed, f"refcoco/{image}/{number}")[0] % 2
            pairs.append(
                (REGION + box, region["phrase"]) if describe else (BOX + region["phrase"], box)
            )
        for start in range(0, len(pairs), 9):
            yield _row(
                "refcoco",
                image,
                pairs[start : start + 9],
                id_end=f"_{start // 9}" if len(pairs) > 9 else "",
            )


def visual_genome(records: Iterable[dict], seed: int = 0) -> Iterator[dict]:
    """Visual Genome: at most ten regions of a picture, drawn where there are more; the box is asked for."""
    for image, regions in _by_image(records):
        if len(regions) > 10:
            drawn = sorted(
                range(len(regions)), key=lambda number: hash_draw(seed, f"vg/{image}/{number}")
            )[:10]
            regions = [regions[number] for number in sorted(drawn)]
        yield _row(
            "vg",
            image,
            [(BOX + r["phrase"], padded_box(r["box"], r["width"], r["height"])) for r in regions],
        )


def padded_box(box: tuple[float, float, float, float], width: int, height: int) -> str:
    """A box (x, y, width, height in pixels) as "[x1, y1, x2, y2]", two decimals, relative to the square that padding makes of the
    picture. The author says so of the mixture; users doubt it for RefCOCO."""
    side, (x, y, w, h) = max(width, height), box
    left, top = (side - width) // 2, (side - height) // 2  # the offsets of the padding itself
    corners = (x + left, y + top, x + w + left, y + h + top)
    return "[" + ", ".join(f"{min(max(corner / side, 0), 1):.2f}" for corner in corners) + "]"


def sharegpt(rows: Iterable[dict], tokenizer, max_length: int = 2048) -> Iterator[dict]:
    """ShareGPT: invalid conversations left out, long ones cut at `max_length` tokens of the training text, never split in two.

    Invalid as Vicuna's filter has it (inferred: the paper names the filter only): no turns, an unknown role, or turns that do not
    alternate after an opening answer; and, as nothing could be learned, no answer at all. An opening answer, a question left
    without one, and an empty answer with its question are dropped. The cut keeps the whole pairs that fit; the answer of a first
    pair that does not fit is itself cut.
    """
    for row in rows:
        turns = [
            turn | {"value": (turn.get("value") or "").replace(IMAGE, _BROKEN_IMAGE)}
            for turn in row["conversations"] or []
        ]
        try:
            pairs = _cut(audit(turns).pairs, tokenizer, max_length)
        except ValueError:  # audit's reason: such a conversation is invalid
            continue
        if pairs:
            talk = [
                t
                for pair in pairs
                for t in _exchange(*(text.replace(_BROKEN_IMAGE, IMAGE) for text in pair))
            ]
            yield {
                "id": row.get("id"),
                "task_name": "sharegpt",
                "model": row.get("model", ""),
                "conversations": talk,
            }


def _cut(pairs: list[tuple[str, str]], tokenizer, max_length: int) -> list[tuple[str, str]]:
    """The longest beginning of a conversation that fits; empty when not even its first question does."""

    def fits(pairs):
        return (
            len(encode([turn for pair in pairs for turn in _exchange(*pair)], tokenizer)[0])
            <= max_length
        )

    if fits(pairs):
        return pairs
    whole = _last_true(lambda n: fits(pairs[:n]), 1, len(pairs))
    if whole:
        return pairs[:whole]
    question, answer = pairs[0]
    kept = _last_true(
        lambda n: not answer[:n].strip() or fits([(question, answer[:n])]), 1, len(answer)
    )
    return [(question, answer[:kept])] if answer[:kept].strip() else []


def _last_true(holds: Callable[[int], bool], low: int, high: int) -> int:
    """The last of low..high for which `holds`, true up to some number and false after it; low - 1 when it never is."""
    low -= 1
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if holds(middle) else (low, middle - 1)
    return low


def as_published(row: dict) -> dict:
    """LLaVA-Instruct as it is; its bare file names are pictures of COCO train2017."""
    image = row["image"]
    return row | {
        "image": image if "/" in image else f"coco/train2017/{image}",
        "task_name": "llava_instruct",
    }


def sample(rows: Iterable[dict], count: int, seed: int = 0) -> Iterator[dict]:
    """`count` rows drawn by hash of their picture, in their order; all when there are no more."""
    rows = list(rows)
    drawn = sorted(
        range(len(rows)), key=lambda number: hash_draw(seed, f"sample/{rows[number]['image']}")
    )[:count]
    return (rows[number] for number in sorted(drawn))


def _by_image(records: Iterable[dict]):
    """(image, its records), pictures in the order in which they first appear."""
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
    talk = [turn for pair in [(first, answer), *later] for turn in _exchange(*pair)]
    stem = image.rpartition("/")[2].rpartition(".")[0]
    return {"id": stem + id_end, "image": image, "task_name": name, "conversations": talk}


def _exchange(question: str, answer: str) -> list[dict]:
    return [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
