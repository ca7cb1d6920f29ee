"""How much faster answer() is than asking one question at a time, and whether it says the same.

    python -m bench.evaluate                 # everything, into bench/results/evaluate.json
    python -m bench.evaluate --share 0.05    # a twentieth of the questions, to see that it runs

Beside answer() runs what LLaVA's own scripts and most harnesses do: for each question open and
prepare the picture, then Hugging Face's generate() with batch 1, greedy. Same model, same
questions, same processor, same limit on new tokens, one thread. The model is a Base of the mini
world after a short training (or --run FOLDER), so that its answers end as trained answers do. Three
sets of questions:

- POPE-shaped: 17.8 yes/no questions a picture, as POPE has (8,910 on 500);
- single: every mini-world benchmark picture that has held-in, held-out or forgetting questions, one
  question each;
- all: all questions of all mini-world benchmarks (only whether the answers are equal).
"""

import argparse
import random
import sys
import tempfile
import time
from collections import Counter

import torch
from transformers import CLIPVisionConfig, LlavaConfig, LlavaForConditionalGeneration

from bench.record import write
from vflan import preset, train
from vflan.config import replace, resolve
from vflan.data.conversation import IMAGE_TOKEN_INDEX, prompt_ids
from vflan.data.images import read_picture
from vflan.evaluation.benchmarks import BENCHMARKS
from vflan.evaluation.generation import answering
from vflan.training.run import Run
from vflan.world.scene import COLORS, SHAPES

CHECKS = {
    "speedup_shared_prefix": ("x questions/s of batch-1 generate()", 12, None),
    "speedup_single": ("x questions/s of batch-1 generate()", 5, None),
    "answers_equal": ("share of answers", 1.0, None),
}
BENCHMARK_FOLDER = "data/tiny/benchmarks"
BATCH, SEED, PER_PICTURE = 64, 0, 17.82


def one_by_one(model, processor, questions, max_new_tokens):
    """The answers of batch-1 generate(), the picture prepared anew for each question."""
    tokenizer, said = processor.tokenizer, []
    for question in questions:
        ids, more = (
            list(prompt_ids(question["text"], tokenizer, has_image=bool(question["image"]))),
            {},
        )
        if question["image"]:
            at = ids.index(IMAGE_TOKEN_INDEX)
            ids[at : at + 1] = [model.config.image_token_id] * model.config.image_seq_length
            pixels = processor.image_processor(
                [read_picture(question["image"])], return_tensors="pt"
            )["pixel_values"]
            more["pixel_values"] = pixels.to(model.device, model.dtype)
        ids = torch.tensor([ids], device=model.device)
        out = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=max_new_tokens,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
            **more,
        )
        said.append(tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True).strip())
    return said


def together(model, processor, questions, max_new_tokens):
    said = dict(answering(model, processor, questions, max_new_tokens, BATCH))
    return [said[i].text for i in range(len(questions))]


def timed(way, *arguments, rounds=1):
    """(result, seconds): the fastest of some rounds."""
    best = float("inf")
    for _ in range(rounds):
        start = time.perf_counter()
        result = way(*arguments)
        best = min(best, time.perf_counter() - start)
    return result, best


def prefilled(model, way, *arguments):
    """Tokens that went through the language model before the first new one, padding included."""
    total = 0

    def count(module, positional, named):
        nonlocal total
        shape = (
            named["inputs_embeds"] if named.get("inputs_embeds") is not None else named["input_ids"]
        ).shape
        total += shape[0] * shape[1] if shape[1] > 1 else 0

    hook = model.model.language_model.register_forward_pre_hook(count, with_kwargs=True)
    way(*arguments)
    hook.remove()
    return total


def compared(model, processor, questions, max_new_tokens):
    """Speedup, share of equal answers, and what was done, of answer() beside one at a time."""
    together(model, processor, questions[:BATCH], max_new_tokens)  # warm
    one_by_one(model, processor, questions[:3], max_new_tokens)
    fast, fast_seconds = timed(together, model, processor, questions, max_new_tokens, rounds=3)
    slow, slow_seconds = timed(one_by_one, model, processor, questions, max_new_tokens)
    some = questions[: max(1, len(questions) // 10)]  # one at a time is the same for all
    before = (
        prefilled(model, one_by_one, model, processor, some, max_new_tokens)
        * len(questions)
        / len(some)
    )
    notes = {
        "questions": len(questions),
        "pictures": len({q["image"] for q in questions}),
        "different answers": len(set(slow)),
        "seconds": round(fast_seconds, 2),
        "seconds one by one": round(slow_seconds, 2),
        "questions a second": round(len(questions) / fast_seconds, 1),
        "questions a second one by one": round(len(questions) / slow_seconds, 1),
        "prefilled tokens": prefilled(model, together, model, processor, questions, max_new_tokens),
        "prefilled tokens one by one": round(before),
        "unequal answers": sum(a != b for a, b in zip(fast, slow)),
    }
    return slow_seconds / fast_seconds, notes


def mini_world():
    """{benchmark: its questions}."""
    return {
        name: [
            {"image": s["image"], "text": b.prompt(s)} for s in b.load(resolve(BENCHMARK_FOLDER))
        ]
        for name, b in BENCHMARKS.items()
        if (resolve(BENCHMARK_FOLDER) / name).is_dir()
    }


def pope_shaped(pictures, seed=SEED):
    """17.82 different yes/no questions a picture, in POPE's words."""
    things = [*SHAPES, *(f"{color} {shape}" for color in COLORS for shape in SHAPES)]
    rng, rows = random.Random(seed), []
    for i, path in enumerate(pictures):
        many = int((i + 1) * PER_PICTURE) - int(i * PER_PICTURE)
        rows += [
            {"image": path, "text": f"Is there a {thing} in the picture? Answer yes or no."}
            for thing in rng.sample(things, many)
        ]
    return rows


def body_of_576(processor, questions):
    """A random model with LLaVA's 576 picture tokens (336 px, patches of 14) and the mini world's
    language model.
    """
    torch.manual_seed(SEED)
    recipe = preset("tiny").base
    from vflan.models.llava import load_model

    text = load_model(recipe).config.text_config
    vision = CLIPVisionConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=3,
        num_attention_heads=2,
        image_size=336,
        patch_size=14,
    )
    token = processor.tokenizer.convert_tokens_to_ids("<image>")
    model = LlavaForConditionalGeneration(
        LlavaConfig(
            vision_config=vision, text_config=text, image_token_index=token, image_seq_length=576
        )
    ).eval()
    pictures = processor.image_processor
    old = pictures.size, pictures.crop_size
    pictures.size, pictures.crop_size = {"shortest_edge": 336}, {"height": 336, "width": 336}
    try:
        # POPE's answers are one token and the end.
        speedup, notes = compared(model, processor, questions, 2)
    finally:
        pictures.size, pictures.crop_size = old
    return {"speedup": round(speedup, 1)} | notes


def trained(folder):
    """A Base after a short training: 150 steps of captions, 300 of tasks."""
    stages = preset("tiny", runs=folder)
    projector = train(replace(stages.projector, max_steps=150))
    return train(replace(stages.base, max_steps=300), init=projector)


def measure(run, share):
    model, processor = run.load_model().float(), run.processor()
    asked = mini_world()

    def some(rows):
        return rows[: max(4, round(share * len(rows)))]

    pope = pope_shaped(some(sorted({q["image"] for q in asked["pope"]})))
    single = [q for name in ("heldin", "heldout", "forgetting") for q in asked[name]]
    single = some(list({q["image"]: q for q in single}.values()))
    shared, notes_shared = compared(model, processor, pope, 16)
    alone, notes_single = compared(model, processor, single, 24)
    unequal, total = Counter(), 0
    for name, rows in asked.items():
        rows, tokens = some(rows), min(48, BENCHMARKS[name].max_new_tokens)
        pairs = zip(
            together(model, processor, rows, tokens), one_by_one(model, processor, rows, tokens)
        )
        unequal[name], total = sum(a != b for a, b in pairs), total + len(rows)
    wrong = (
        sum(unequal.values()) + notes_shared["unequal answers"] + notes_single["unequal answers"]
    )
    total += len(pope) + len(single)
    few = pope_shaped(sorted({q["image"] for q in asked["pope"]})[:6])
    notes = {
        "POPE-shaped": notes_shared,
        "single": notes_single,
        "all": {"answers compared": total, "unequal": dict(unequal)},
        "576 picture tokens, random body": body_of_576(processor, few),
        "bf16": bf16(model, processor, [*few, *single[:100]]),
        "batch": BATCH,
        "seed": SEED,
        "threads": torch.get_num_threads(),
    }
    return {
        "speedup_shared_prefix": shared,
        "speedup_single": alone,
        "answers_equal": 1 - wrong / total,
    }, notes


def bf16(model, processor, questions):
    """The same comparison in half precision, where near ties may fall either way; bf16 is emulated
    on most CPUs.
    """
    half = model.to(torch.bfloat16)
    pairs = list(
        zip(together(half, processor, questions, 16), one_by_one(half, processor, questions, 16))
    )
    model.float()
    return {"questions": len(pairs), "unequal answers": sum(a != b for a, b in pairs)}


def main():
    parser = argparse.ArgumentParser(
        prog="python -m bench.evaluate", description=__doc__.splitlines()[0]
    )
    parser.add_argument(
        "--run",
        help="folder of a finished run of the mini world; by default one is trained briefly",
    )
    parser.add_argument(
        "--share",
        type=float,
        default=1.0,
        help="share of the questions; less than 1 writes no record",
    )
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        run = Run.open(options.run) if options.run else trained(folder)
        values, notes = measure(run, options.share)
    if options.share < 1:
        print(values, notes)
        return
    shown = " ".join("FOLDER" if arg == options.run else arg for arg in sys.argv[1:])
    notes["model"] = "a run given by --run" if options.run else "Base, 150 + 300 steps"
    write("evaluate", CHECKS, values, f"python -m bench.evaluate {shown}".strip(), **notes)


if __name__ == "__main__":
    main()
