"""Training starts from a projector of others: LLaVA's file, or the hub id of one."""

import json
import re
from shutil import copytree

import pandas as pd
import pytest
import torch
from real_folders import make_projector

import vflan
from vflan.analysis import claims
from vflan.analysis.sweeps import projector_arm
from vflan.config import for_seed, read_json
from vflan.models.llava import fingerprint, load_model, parts, read_projector
from vflan.training.trainer import take_projector


@pytest.fixture
def stage(recipe):
    return vflan.replace(recipe, name="projector", stage="projector", tune=("projector",))


@pytest.fixture
def file(tmp_path):
    return make_projector(tmp_path / "llava" / "mm_projector.bin", vision=32, text=32)


def test_the_run_holds_the_backbones_and_the_projector_and_says_where_it_came_from(stage, file):
    run = take_projector(stage, file)
    started = read_json(run.folder / "init.json")
    assert started["init"] == file
    assert started["init_weights"] == {"projector": fingerprint(read_projector(file).items())}
    assert run.summary["steps"] == 0 and run.summary["first_loss"] is None
    assert "<td>0</td>" in run._repr_html_() and run.metrics().empty
    model, untrained = run.load_model(), load_model(stage)
    now, then = parts(model)["projector"].state_dict(), read_projector(file)
    assert all(torch.equal(now[name], then[name].float()) for name in then)
    for part in ("vision_tower", "language_model"):
        assert fingerprint(parts(model)[part]) == fingerprint(parts(untrained)[part])
    run.processor()


def test_base_starts_from_it_and_its_card_names_it(stage, recipe, file, tmp_path):
    run = take_projector(stage, file)
    base = vflan.train(vflan.replace(recipe, max_steps=2), init=run)
    card = (base.export(tmp_path / "shared") / "README.md").read_text()
    assert "mm_projector.bin" in card


def test_a_sweep_reads_it_for_each_seed_and_trains_no_captions(stage, recipe, file, monkeypatch):
    arm = projector_arm(stage, file, [0, 1])
    base = vflan.Arm(vflan.replace(recipe, max_steps=2), init="projector")
    done = vflan.sweep({"projector": arm, "base": base}, [0, 1], (), folder=".", jobs=1)
    assert {label for label, _ in done.trained} == {"base"}
    steps = {key: run.summary["steps"] for key, run in done.runs.items()}
    assert steps == {
        (label, seed): n for label, n in (("projector", 0), ("base", 2)) for seed in (0, 1)
    }
    assert projector_arm(stage, "", [0]) == vflan.Arm(stage)


def test_a_recipe_may_name_the_projector_that_later_stages_start_from(stage, recipe, file):
    """The stage can still be trained: what is taken has a folder of its own."""
    stage = vflan.replace(stage, pretrained=str(file), max_steps=2)
    arms = {"one-epoch": vflan.Arm(stage), "projector": projector_arm(stage, "", [0, 1])}
    arms["base"] = vflan.Arm(vflan.replace(recipe, max_steps=2), init="projector")
    done = vflan.sweep(arms, [0, 1], (), folder=".", jobs=1)
    steps = {key: (run.name, run.summary["steps"]) for key, run in done.runs.items()}
    assert steps["projector", 0] == (f"{stage.name}-pretrained", 0)
    assert steps["one-epoch", 1] == (f"{stage.name}-seed1", 2) and steps["base", 0][1] == 2
    taken = read_projector(done.runs["projector", 1])["linear_2.bias"]
    assert torch.equal(taken, read_projector(file)["linear_2.bias"].float())
    # README's example takes the runs that a sweep has made, and the other way round.
    run = vflan.take_projector(stage)
    assert run.folder == done.runs["projector", 0].folder
    again = vflan.take_projector(vflan.config.for_seed(stage, 1))
    assert again.folder == done.runs["projector", 1].folder
    assert vflan.train(arms["base"].recipe, init=run).summary == done.runs["base", 0].summary
    with pytest.raises(ValueError, match="names no projector in `pretrained`"):
        vflan.take_projector(recipe)
    # What a notebook's parameter names comes first.
    other = projector_arm(vflan.replace(stage, name="other"), str(file), [0])
    assert other.recipe.name == "other"


@pytest.mark.parametrize("vision, text", [(32, 48), (48, 32)])
def test_a_projector_of_another_shape_is_refused_in_one_sentence(stage, tmp_path, vision, text):
    wrong = make_projector(tmp_path / "wrong.bin", vision, text)
    words = f"wrong.bin joins a tower of width {vision} to a language model of width {text}, but"
    with pytest.raises(ValueError, match=words) as error:
        take_projector(stage, wrong)
    assert "\n" not in str(error.value) and not stage.folder.exists()


def test_a_projector_with_another_hidden_width_is_refused_too(stage, file):
    weights = torch.load(file)
    name = "model.mm_projector.{}.{}".format
    weights[name(0, "weight")] = torch.ones(48, 32)
    weights[name(0, "bias")], weights[name(2, "weight")] = torch.ones(48), torch.ones(32, 48)
    torch.save(weights, file)
    with pytest.raises(ValueError, match="its hidden width is 48"):
        take_projector(stage, file)


def test_a_projector_that_was_trained_here_is_never_replaced(stage, file):
    run = vflan.train(vflan.replace(stage, max_steps=2))
    before = run.summary
    with pytest.raises(ValueError, match=r"init: None -> '.*mm_projector.bin'"):
        take_projector(vflan.replace(stage, max_steps=2), file)
    assert run.summary == before


def test_a_hub_id_brings_its_projector_file(stage, file, tmp_path, monkeypatch):
    """LLaVA's projectors lie on the hub beside a config.json and no other weights."""
    cache = tmp_path / "cache"
    cache.mkdir()
    (cache / "config.json").write_text(json.dumps(dict(model_type="llava")))

    def download(repo, allow_patterns, **_):
        assert repo == "someone/projector"
        if any(
            re.fullmatch(pattern.replace("*", ".*"), "mm_projector.bin")
            for pattern in allow_patterns
        ):
            copytree(tmp_path / "llava", cache, dirs_exist_ok=True)
        return str(cache)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    arm = projector_arm(stage, "someone/projector", [0])
    done = vflan.sweep({"projector": arm}, [0], (), folder=".", jobs=1)
    run = done.runs["projector", 0]
    assert not done.trained and read_json(run.folder / "init.json")["init"] == "someone/projector"
    assert torch.equal(
        read_projector(run)["linear_1.bias"], read_projector(file)["linear_1.bias"].float()
    )
    assert run.recipe == for_seed(stage, 0)


def test_floors_judge_no_loss_of_a_projector_that_was_not_trained_here():
    scores = pd.DataFrame(columns="run benchmark metric value low high n seed baseline".split())
    assert claims.floors(scores, {0: (None, None)}).empty
    assert len(claims.floors(scores, {0: (2.0, 0.5)})) == 1
