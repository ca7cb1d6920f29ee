"""The planned memory is what training holds on a CPU; plans for machines that are not here."""

import html
import json
import math
import sys

import pytest
import torch
from torch.profiler import profile

import vflan
from tests.conftest import make_backbones, make_squares
from vflan.config import Recipe
from vflan.training import footprint

TRAIN = sys.modules.get("vflan.training.trainer") or __import__("importlib").import_module(
    "vflan.training.trainer"
)
FULL = dict(tune=("projector", "language_model"))
LORA = FULL | dict(lora_r=16, lora_alpha=32, lora_dropout=0.05)


@pytest.fixture(scope="module")
def medium(tmp_path_factory):
    """A recipe with a random Llama of 19 million weights and rows of up to 250 tokens.

    It is large enough that tensors take most of its memory.
    """
    folder = tmp_path_factory.mktemp("medium")
    make_backbones(folder, width=512, layers=8)
    path = make_squares(folder, rows=12)
    rows = json.loads(path.read_text())
    for i, row in enumerate(rows):
        row["conversations"][1]["value"] = " and ".join(["a red square on grey"] * (14 + i))
    path.write_text(json.dumps(rows))
    backbones = dict(
        vision_tower=str(folder / "vision_tower"), language_model=str(folder / "language_model")
    )
    more = dict(global_batch=4, micro_batch=2, max_steps=2, max_length=512, lr=1e-4)
    return Recipe(
        "base",
        "base",
        samples=str(path),
        images=str(folder / "images"),
        runs="",
        **backbones,
        **more,
    )


def measured(recipe, monkeypatch):
    """Return the most bytes that PyTorch's CPU allocator held at a time in the training loop.

    It reports them to the profiler. Weights are included; Python, libraries and gaps are not.
    """
    model, weights = [], []
    profiler = profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True)
    real = TRAIN.models.freeze, TRAIN.feed, TRAIN.Log.close

    def freeze(loaded, *arguments):
        model.append(loaded)
        return real[0](loaded, *arguments)

    def feed(*arguments):
        weights.append(
            sum(weight.numel() * weight.element_size() for weight in model[0].parameters())
        )
        profiler.start()
        return real[1](*arguments)

    def close(log):
        profiler.stop()
        return real[2](log)

    monkeypatch.setattr(TRAIN.models, "freeze", freeze)
    monkeypatch.setattr(TRAIN, "feed", feed)
    monkeypatch.setattr(TRAIN.Log, "close", close)
    monkeypatch.setattr(sys.modules["vflan.models.image_features"], "_FEATURES", {})
    vflan.train(recipe)
    held = most = weights[0]
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most


@pytest.mark.parametrize(
    "changes",
    [
        dict(FULL),
        dict(FULL, micro_batch=4, gradient_checkpointing=True),
        dict(tune=("projector",)),
        dict(LORA),
        dict(LORA, bits=4, optimizer="adamw_8bit"),
    ],
    ids=["full", "full, one pass, checkpointing", "projector", "LoRA", "QLoRA"],
)
def test_the_planned_peak_is_the_measured_one(medium, monkeypatch, tmp_path, changes):
    recipe = vflan.replace(medium, runs=str(tmp_path), **changes)
    planned, held = vflan.plan(recipe, gpu="cpu"), measured(recipe, monkeypatch)
    print(planned, held / 1e9)
    assert planned.steps == 2 and planned.fits
    assert planned.peak == pytest.approx(held, rel=0.15)


# ---------------------------------------------------------------------- machines that are not here


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def test_every_layer_costs_the_same(medium):
    """So a 13B model is counted in seconds: two and three layers predict eight."""
    recipe, shape = vflan.replace(medium, packing="padded", **LORA), (2, 78, 2, 100)
    eight = vars(footprint._count(recipe, False, False, shape, 8))
    predicted = vars(footprint.count(recipe, False, False, shape))
    counted = {name: size for name, size in eight.items() if name not in ("tower", "weights")}
    assert {name: predicted[name] for name in counted} == pytest.approx(counted, rel=0.02)


def test_only_what_matters_to_memory_is_counted_again(medium):
    """Counting is slow: recipes that differ in optimizer, sharding or packing share a count."""
    shape = (2, 80, 2, 100)
    before = footprint._count.cache_info().misses
    for changes in (
        {},
        dict(optimizer="adamw_8bit"),
        dict(sharding="fsdp2"),
        dict(packing="packed"),
    ):
        footprint.count(vflan.replace(medium, **changes), False, False, shape)
    assert footprint._count.cache_info().misses == before + 2  # for two and for three layers
    footprint.count(vflan.replace(medium, gradient_checkpointing=True), False, False, shape)
    assert footprint._count.cache_info().misses == before + 4


def test_weights_gradients_and_moments_are_those_of_the_arithmetic():
    seven = vflan.preset("full_7b").base
    one, eight = (vflan.plan(seven, gpus=n).memory for n in (1, 8))
    weights, tower = 6_738_415_616 + 20_979_712, 303_507_456
    assert one["weights"] == 4 * weights + 2 * tower and one["gradients"] == 4 * weights
    assert one["optimiser"] == 8 * weights and one["exchange"] == 0
    assert (
        eight["weights"] == pytest.approx(4 * weights / 8 + 2 * tower)
        and eight["optimiser"] == weights
    )
    thrifty = vflan.plan(vflan.replace(seven, optimizer="adamw_8bit")).memory
    assert thrifty["optimiser"] == pytest.approx(2 * weights, rel=0.02)


def test_the_presets_fit_where_their_docstrings_say():
    qlora, lora, full = (vflan.preset(name).base for name in ("qlora_7b", "lora_7b", "full_13b"))
    small = vflan.plan(qlora, gpu="RTX4090-24G")
    assert small.fits and small.peak < 16e9 and not small.changes
    assert vflan.plan(lora, gpu="L40S-48G").fits and not vflan.plan(lora, gpu="RTX4090-24G").fits
    assert (
        vflan.plan(full, gpus=8).fits
        and small.hours > 0
        and small.kwh == pytest.approx(small.hours * 0.45)
    )


def test_evaluation_is_counted_too():
    """At 7B, keys and values of 64 questions take over 20 GB: a GPU of 24 GB answers fewer."""
    qlora, full = (vflan.preset(name).base for name in ("qlora_7b", "full_13b"))
    small, large = vflan.plan(qlora, gpu="RTX4090-24G"), vflan.plan(full, gpus=8)
    a_position = 2 * 32 * 4096 * 2
    assert 64 * (35 + 576 + 60) * a_position > 20e9 and 3.3e9 < small.answering["weights"] < 5e9
    assert small.answering["question"] == pytest.approx((35 + 576 + 60 + 64) * a_position, rel=0.1)
    assert 20 < small.at_once < 64 and f"{small.at_once} at once" in str(small)
    assert large.at_once > 40 and large.answering["weights"] == pytest.approx(2 * 13.35e9, rel=0.02)
    assert vflan.plan(full, gpu="RTX4090-24G").at_once == 0
    assert small.needs == small.peak > sum(small.answering.values())
    small.__dict__["answering"] = dict(weights=small.room, question=1)
    assert not small.fits


def test_what_does_not_fit_comes_with_what_was_tried(medium):
    plan = vflan.plan(vflan.replace(vflan.preset("full_7b").base, gradient_checkpointing=False))
    text = str(plan)
    assert (
        not plan.fits
        and "does NOT fit into 1 x A100-80G" in text
        and "gradient_checkpointing=True:" in text
    )
    assert any("gpus=" in change and change.endswith("fits") for change in plan.changes)
    assert any("lora_r=128" in change for change in plan.changes) and any(
        "bits=4" in c for c in plan.changes
    )
    assert all(html.escape(change) in plan._repr_html_() for change in plan.changes)


def test_lengths_are_read_where_they_can_be_and_else_assumed_and_said(medium):
    here, away = vflan.plan(medium, gpu="cpu"), vflan.plan(vflan.preset("full_7b").projector)
    assert here.tokens < 8 * 300 and "12 of 12 rows" in str(here) and "assumed" not in str(here)
    assert away.steps == math.ceil(
        558_128 / 256
    ) and "assumed: lengths like LLaVA-1.5's, 558,128 rows" in str(away)
    with pytest.raises(
        ValueError, match="gone.json is not there, and its number of rows is unknown"
    ):
        vflan.plan(vflan.replace(medium, samples="gone.json"))


@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(gpu="A100"), "no gpu='A100' in the list; known ones are A100-40G, A100-80G"),
        (dict(gpus=0), "gpus=0"),
        (dict(share=40), "share=40"),
        (dict(gpus=3), "global_batch=4: 3 processes cannot share it evenly"),
    ],
)
def test_bad_arguments_are_refused_in_one_sentence(medium, arguments, message):
    with pytest.raises(ValueError, match=message):
        vflan.plan(medium, **arguments)


def test_a_recipe_that_could_not_be_trained_is_not_planned(medium):
    held = vflan.replace(medium, heldout_rows=12)
    with pytest.raises(ValueError, match="heldout_rows=12 of 12 .* leaves nothing to train on"):
        print(vflan.plan(held, gpu="cpu"))
    with pytest.raises(ValueError, match="no row can be trained on, .* within max_length=8"):
        vflan.plan(vflan.replace(medium, max_length=8), gpu="cpu")
