"""Tokens, pixels, logits and the first losses of the tiny recipe have not changed.

A failure means that a new library version, or a change of ours, moved a number that everything else
depends on. If that was intended, store the new numbers and say why in CHANGELOG.md:

    python -m tests.test_canary
"""

import hashlib
import json
import platform
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import vflan
from vflan import world
from vflan.config import replace
from vflan.models.llava import load_model, load_processor, load_tokenizer

GOLDEN = Path(__file__).parent / "golden" / "tiny.json"


def turns_of(*texts):
    """A conversation whose texts alternate between human and model."""
    return [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(texts)]


TURNS = [
    turns_of("<image>\nWhat is the color of the star?", "red"),
    turns_of("Is it  there?\n<image>", "Yes, it is.\n\n  Twice: 3.5 é 🙂", "", "no"),
    turns_of("Say hello.", "hello </s> <image"),
]


def cpu():
    """The processor and its vector instructions, which decide the last bits of a sum."""
    names = [line.split(":")[1].strip() for line in _cpuinfo() if line.startswith("model name")]
    return f"{names[0] if names else platform.machine()}, {torch.backends.cpu.get_cpu_capability()}"


def _cpuinfo():
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.exists() else []


def scene(number):
    return world.sample_scene(world.rng_of("canary", number), "objects")


def digest(array):
    return hashlib.sha256(np.ascontiguousarray(array)).hexdigest()[:16]


# The canary's own, so that a preset may have others.
RATES = {"projector": dict(lr=4e-3), "base": dict(lr=6e-4, projector_lr=2e-3)}
RATES["chat"] = dict(lr=1e-4)


@pytest.fixture(scope="module")
def now(tmp_path_factory):
    return measure(tmp_path_factory.mktemp("canary"))


@pytest.fixture(scope="module")
def golden():
    return json.loads(GOLDEN.read_text())


def measure(folder):
    """All numbers of this test, from the committed tiny backbones and a small mini world."""
    built = world.build(folder, seed=3, captions=96, per_kind=2, conversations=40, questions=0.05)
    recipes = {}
    for stage in vflan.preset("tiny"):
        file = built / "samples" / Path(stage.samples).name
        small = dict(
            samples=str(file), images=str(built / "samples" / "images"), runs=str(folder / "runs")
        )
        small |= dict(num_samples=None, per_task=None, max_steps=6)
        recipes[stage.stage] = replace(stage, **small, **RATES[stage.stage])
    base = recipes["base"]
    tokenizer, model = load_tokenizer(base), load_model(base)
    picture = world.render(scene(0))
    wide = picture.resize((90, 31))
    measured = {"cpu": cpu(), "torch": torch.__version__, "tokens": [], "pixels": {}, "losses": {}}
    for turns in TURNS:
        ids, labels = vflan.encode(turns, tokenizer)
        measured["tokens"].append([ids, labels])
    for ratio in ("pad", "crop"):
        prepare = load_processor(replace(base, image_aspect_ratio=ratio)).image_processor
        measured["pixels"][ratio] = [
            digest(prepare([p], return_tensors="pt")["pixel_values"].numpy())
            for p in (picture, wide)
        ]
    processor = load_processor(base)
    ready = processor(
        text="USER: <image>\nWhat is it? ASSISTANT:", images=picture, return_tensors="pt"
    )
    with torch.inference_mode():
        measured["logits"] = model(**ready).logits[0, -1, ::40].tolist()
    start = None
    for stage, recipe in recipes.items():
        start = vflan.train(recipe, init=start)
        measured["losses"][stage] = list(start.metrics().loss)
    return measured


def test_the_tokens_are_the_same(now, golden):
    assert now["tokens"] == golden["tokens"]


def test_the_pixels_are_the_same_to_the_bit(now, golden):
    assert now["pixels"] == golden["pixels"]


def test_the_logits_are_the_same(now, golden):
    np.testing.assert_allclose(now["logits"], golden["logits"], rtol=1e-4, atol=1e-5)


def test_the_first_losses_of_each_stage_are_the_same(now, golden):
    """To four digits on every processor.

    They were stored on an Intel with AVX512. An AMD with AVX2, or with no vector instructions,
    differs by a millionth at most. A hundred times that is allowed, a tenth of what the next test
    detects.
    """
    assert now["losses"].keys() == golden["losses"].keys() == {"projector", "base", "chat"}
    for stage, losses in golden["losses"].items():
        np.testing.assert_allclose(now["losses"][stage], losses, rtol=1e-4, err_msg=stage)


def test_a_changed_pixel_or_loss_is_detected(now, golden):
    """A loss that moves by a thousandth fails the test above."""
    assert hashlib.sha256(b"other").hexdigest()[:16] not in golden["pixels"]["pad"]
    with pytest.raises(AssertionError):
        np.testing.assert_allclose(
            np.array(golden["losses"]["base"]) * 1.001, golden["losses"]["base"], rtol=1e-4
        )


if __name__ == "__main__":
    import tempfile

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        GOLDEN.write_text(json.dumps(measure(Path(scratch)), indent=1) + "\n")
    sys.stderr.write(f"{GOLDEN.name} written\n")
