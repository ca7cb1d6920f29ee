import gc
import json
import math
import re
import shutil
import sys
import weakref
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator

import vflan
from tests.conftest import make_squares
from vflan.models import loss as learner
from vflan.models.image_features import Pictures
from vflan.models.llava import fingerprint, load_model, load_processor, parts
from vflan.models.loss import Learner
from vflan.training.batching import prepare
from vflan.training.run import Run
from vflan.training.trainer import learning_rate

TRAIN = sys.modules["vflan.training.trainer"]  # the file; vflan.train is its function


def lines(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def same_weights(a, b):
    return a.summary["parts"] == b.summary["parts"]


def test_training_lowers_the_loss_and_writes_a_finished_run(recipe):
    run = vflan.train(vflan.replace(recipe, epochs=8))
    metrics = run.metrics()
    assert (
        run.finished
        and len(metrics) == 32
        and metrics.loss.iloc[-3:].mean() < 0.5 * metrics.loss.iloc[0]
    )
    assert list(metrics.columns[:4]) == ["step", "loss", "lr", "tokens"]
    assert Run.open(run.folder).recipe == run.recipe
    assert fingerprint(parts(run.load_model())["projector"]) == run.summary["parts"]["projector"]
    assert run.processor().tokenizer.decode(5)


def test_only_what_the_recipe_names_moves(recipe):
    start = load_model(recipe)
    for tune in (("projector",), ("language_model",)):
        run = vflan.train(vflan.replace(recipe, name=tune[0], tune=tune, max_steps=3))
        moved = {
            part
            for part, module in parts(start).items()
            if fingerprint(module) != run.summary["parts"][part]
        }
        assert moved == set(tune)


@pytest.mark.parametrize(
    "part, tune",
    [
        ("vision_tower", ("projector", "language_model")),
        ("projector", ("language_model",)),
        ("language_model", ("projector",)),
    ],
)
def test_a_frozen_part_that_moves_stops_the_run_and_is_named(recipe, monkeypatch, part, tune):
    original = torch.optim.AdamW.step

    def step(self, *arguments):
        weight.data += 1
        return original(self, *arguments)

    def remember(model, recipe, freeze=TRAIN.models.freeze):
        nonlocal weight
        weight = next(parts(model)[part].parameters())
        return freeze(model, recipe)

    weight = None
    monkeypatch.setattr(TRAIN.models, "freeze", remember)
    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    with pytest.raises(
        RuntimeError, match=f"frozen part moved during training: {part.replace('_', ' ')}. The run"
    ):
        vflan.train(vflan.replace(recipe, max_steps=2, tune=tune))
    assert not Run.open(recipe.folder).finished


def test_the_same_recipe_gives_the_same_weights_whatever_the_global_random_state(recipe):
    a = vflan.train(vflan.replace(recipe, name="a", max_steps=3))
    torch.manual_seed(123)
    b = vflan.train(vflan.replace(recipe, name="b", max_steps=3))
    c = vflan.train(vflan.replace(recipe, name="c", max_steps=3, seed=1))
    assert same_weights(a, b) and not same_weights(a, c)


def test_a_finished_run_is_read_not_trained_again(recipe, monkeypatch):
    recipe = vflan.replace(recipe, max_steps=2)
    first = vflan.train(recipe)
    monkeypatch.setattr(TRAIN, "fit", lambda *a: pytest.fail("trained again"))
    assert vflan.train(recipe) == first


def test_the_same_folder_with_another_recipe_is_an_error_that_names_the_fields(recipe):
    vflan.train(vflan.replace(recipe, max_steps=2))
    with pytest.raises(ValueError, match=r"lr: 0.01 -> 0.5\n  seed: 0 -> 1"):
        vflan.train(vflan.replace(recipe, max_steps=2, lr=0.5, seed=1))


def test_a_run_that_started_from_other_weights_is_not_taken_for_this_one(recipe):
    first = vflan.replace(recipe, name="first", max_steps=2)
    second = vflan.replace(recipe, name="second", max_steps=2)
    vflan.train(second, init=vflan.train(first))
    shutil.rmtree(first.folder)
    with pytest.raises(ValueError, match="init_weights"):
        vflan.train(second, init=vflan.train(vflan.replace(first, seed=5)))


def test_a_stage_starts_from_the_weights_of_the_one_before(recipe):
    first = vflan.train(vflan.replace(recipe, name="first", max_steps=6))
    second = vflan.train(vflan.replace(recipe, name="second", max_steps=2, lr=0), init=first)
    assert same_weights(first, second)
    with pytest.raises(ValueError, match="not finished"):
        (first.folder / "done.json").unlink()
        vflan.train(vflan.replace(recipe, name="third"), init=first)


def test_a_half_written_run_is_trained_again(recipe):
    recipe = vflan.replace(recipe, max_steps=3)
    whole = vflan.train(recipe)
    (whole.folder / "done.json").unlink()
    weights = whole.folder / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    (whole.folder / ".mixture.json.12345").write_text(
        '{"rows": ['
    )  # what write_json leaves where it is killed
    again = vflan.train(recipe)
    assert not list(again.folder.glob(".*.json.*"))
    assert again.finished and len(again.metrics()) == 3 and again.load_model()


def test_gradient_checkpointing_changes_nothing_but_memory(recipe):
    plain = vflan.train(vflan.replace(recipe, name="plain", max_steps=3)).metrics()
    thrifty = vflan.train(
        vflan.replace(recipe, name="thrifty", max_steps=3, gradient_checkpointing=True)
    ).metrics()
    assert thrifty.loss.tolist() == pytest.approx(plain.loss.tolist(), abs=1e-5)


def test_a_nan_loss_stops_with_the_samples_names(recipe, monkeypatch):
    monkeypatch.setattr(learner, "cross_entropy", lambda logits, *a, **k: logits.sum() * math.nan)
    with pytest.raises(FloatingPointError, match=r"loss is nan in step 1, samples s\d+, s\d+"):
        vflan.train(recipe)
    assert not Run.open(recipe.folder).finished


def test_bad_rows_are_left_out_and_listed(recipe):
    Path(recipe.images, "3.png").write_text("broken")
    run = vflan.train(vflan.replace(recipe, max_steps=1, max_bad_share=0.05))
    assert (run.summary["rows"], run.summary["bad"]) == (31, 1)
    assert lines(run.folder / "bad.jsonl")[0]["id"] == "s3"


def test_too_many_bad_rows_stop_the_run_before_it_starts(recipe):
    for i in range(4):
        Path(recipe.images, f"{i}.png").unlink()
    with pytest.raises(
        ValueError, match=r"4 of 32 samples are bad(.|\n)*row 0 \(s0\): missing picture"
    ):
        vflan.train(recipe)
    assert not (recipe.folder / "metrics.jsonl").exists()


def test_a_row_whose_answer_lies_beyond_max_length_is_bad(recipe):
    with pytest.raises(ValueError, match="no answer token within max_length=6"):
        vflan.train(vflan.replace(recipe, max_length=6))


def test_text_only_rows_train_beside_pictures(recipe):
    rows = json.loads(Path(recipe.samples).read_text())
    for row in rows[:16]:
        row.pop("image")
        row["conversations"][0]["value"] = "What is a square?"
    Path(recipe.samples).write_text(json.dumps(rows))
    assert vflan.train(vflan.replace(recipe, max_steps=4)).finished
    assert vflan.train(vflan.replace(recipe, name="p", max_steps=4, tune=("projector",))).finished


def test_more_samples_are_mixed_in(recipe, tmp_path):
    more = make_squares(tmp_path / "more", rows=8)
    run = vflan.train(
        vflan.replace(
            recipe, name="a", max_steps=1, num_samples=10, more_samples=(str(more), f"{more}#3")
        )
    )
    assert run.summary["rows"] == 10 + 8 + 3


def test_the_schedule_is_the_published_one(recipe):
    steps = 5198  # LLaVA-1.5's tuning stage; its log shows 2.8205e-6 after 22 steps
    assert 2e-5 * learning_rate(22, steps, recipe) == pytest.approx(2.8205e-6, rel=1e-4)
    from transformers import get_cosine_schedule_with_warmup

    weight = torch.nn.Parameter(torch.zeros(1))
    schedule = get_cosine_schedule_with_warmup(
        torch.optim.SGD([weight], lr=1.0), math.ceil(0.03 * 40), 40
    )
    for step in range(40):
        assert learning_rate(step, 40, recipe) == pytest.approx(schedule.get_last_lr()[0])
        schedule.optimizer.step()
        schedule.step()


def test_a_run_of_a_single_step_learns(recipe):
    assert learning_rate(0, 1, recipe) == 1
    before = vflan.train(vflan.replace(recipe, name="two", max_steps=2)).summary["parts"]
    after = vflan.train(vflan.replace(recipe, name="one", max_steps=1)).summary["parts"]
    fresh = {name: fingerprint(part) for name, part in parts(load_model(recipe)).items()}
    assert after["projector"] != fresh["projector"] and after["projector"] != before["projector"]


def test_a_projector_cannot_learn_from_rows_without_pictures(recipe, tmp_path):
    turns = [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "red"}]
    rows = [{"id": str(i), "conversations": turns} for i in range(8)]
    (tmp_path / "text.json").write_text(json.dumps(rows))
    text_only = vflan.replace(recipe, name="text", samples=str(tmp_path / "text.json"))
    with pytest.raises(ValueError, match="none of its rows has a picture"):
        vflan.train(vflan.replace(text_only, tune=("projector",)))


def test_the_projector_has_its_own_learning_rate(recipe):
    run = vflan.train(vflan.replace(recipe, max_steps=3, projector_lr=0.0))
    assert fingerprint(parts(load_model(recipe))["projector"]) == run.summary["parts"]["projector"]


@pytest.mark.parametrize("bits", [16, 8, 4])
def test_lora_goes_on_from_a_run_and_leaves_a_merged_model_that_loads_alone(recipe, bits):
    start = vflan.train(vflan.replace(recipe, name="start", epochs=2))
    run = vflan.train(
        vflan.replace(recipe, bits=bits, lora_r=8, lora_alpha=16, epochs=8), init=start
    )
    loss = run.metrics().loss
    assert loss.iloc[-4:].mean() < loss.iloc[0] - 0.1  # the frozen output layer allows no more
    model = load_model(vflan.replace(recipe, bits=16), run)
    assert not any("lora" in name for name, _ in model.named_parameters())
    data = prepare(recipe, load_processor(recipe).tokenizer, model.config, run.folder)
    pictures, rows = Pictures(data, model, load_processor(recipe), recipe), list(range(32))
    with torch.no_grad():
        merged = (
            Learner(model, recipe)(*data.batch(rows, "cpu"), pictures(rows))
            / data.supervised[rows].sum()
        )
    assert merged.item() == pytest.approx(
        loss.iloc[-4:].mean(), abs=0.02
    )  # what was learned is in the merged weights


def test_model_and_adapter_are_on_the_disk_before_a_run_is_finished(recipe, monkeypatch):
    flushed, real = [], TRAIN.checkpointing.flush
    monkeypatch.setattr(
        TRAIN.checkpointing, "flush", lambda path: [flushed.append(path.name), real(path)]
    )
    run = vflan.train(vflan.replace(recipe, max_steps=1, lora_r=2, lora_alpha=4))
    assert flushed == [".model", "adapter"] and set(run.summary["files"]) > {
        "adapter/adapter_model.safetensors"
    }


@pytest.mark.parametrize(
    "fails", [False, True], ids=["to its end", "until an error, which is kept"]
)
def test_after_training_no_model_is_alive(recipe, monkeypatch, fails):
    """Python's own collector is off here, as it may not come for a long time."""
    alive, real, prepare = [], TRAIN.models.freeze, Accelerator.prepare

    def in_a_circle(accelerator, learner):
        # as Accelerate does itself where it trains in bf16
        learner._original_forward = learner.forward
        return prepare(accelerator, learner)

    def freeze(model, *arguments):
        alive.append(weakref.ref(model))
        alive.extend(map(weakref.ref, model.parameters()))
        return real(model, *arguments)

    def close(log):
        raise FloatingPointError("the loss is nan")

    monkeypatch.setattr(Accelerator, "prepare", in_a_circle)
    monkeypatch.setattr(TRAIN.models, "freeze", freeze)
    monkeypatch.setattr(sys.modules["vflan.models.image_features"], "_FEATURES", {})
    gc.disable()
    try:
        if fails:
            monkeypatch.setattr(TRAIN.Log, "close", close)
            with pytest.raises(FloatingPointError, match="the loss is nan") as kept:
                vflan.train(recipe)
            assert kept.value.__traceback__ is not None
        else:
            vflan.train(recipe)
        assert len(alive) > 20 and not [one for one in alive if one() is not None]
    finally:
        gc.enable()


@pytest.mark.parametrize("what", [vflan.train, vflan.plan])
def test_a_preset_or_a_name_instead_of_a_recipe_is_refused_with_what_to_write(what):
    if what is vflan.train:  # a preset can be planned
        with pytest.raises(TypeError, match="preset.projector, preset.base or preset.chat"):
            what(vflan.preset("tiny"))
    with pytest.raises(TypeError, match="not str; vflan.preset"):
        what("tiny")


def test_a_run_is_a_small_table_in_a_notebook(recipe):
    recipe = vflan.replace(recipe, name="a & b", max_steps=2)
    run = Run(recipe.folder)
    assert "<td>not finished</td>" in run._repr_html_()
    table = vflan.train(recipe)._repr_html_()
    cells = dict(re.findall(r"<tr><th>(.*?)</th><td>(.*?)</td></tr>", table))
    assert cells["run"] == "a &amp; b" and cells["folder"].endswith("a &amp; b")
    assert (cells["stage"], cells["steps"], cells["rows"]) == ("base", "2", "32")
    assert float(cells["last loss"]) == pytest.approx(run.metrics().loss.mean(), abs=1e-3)
