"""The doctor: what it finds, what it misses, and that it says what to do."""

from types import SimpleNamespace

import huggingface_hub
import pytest

import vflan
from vflan.config import Preset
from vflan.tools import doctor


@pytest.fixture
def found(recipe, monkeypatch):
    """What the doctor says about a preset whose three stages are this recipe, with changes, here."""

    def look(gpus=(), **changes):
        stages = Preset(*[vflan.replace(recipe, **changes)] * 3)
        monkeypatch.setattr(doctor, "preset", lambda name: stages)
        monkeypatch.setattr(
            doctor, "gpus", lambda: [SimpleNamespace(name="g", total_memory=size) for size in gpus]
        )
        return doctor.missing("mine")

    return look


def test_nothing_is_missing_where_everything_is(found, tmp_path):
    (tmp_path / "benchmarks" / "pope").mkdir(parents=True)
    assert found(benchmarks=str(tmp_path / "benchmarks")) == []


@pytest.mark.parametrize(
    "changes, says",
    [
        (dict(language_model="data/none"), "data/none: no such folder"),
        (dict(language_model="nobody/nothing"), "hf download nobody/nothing"),
        (
            dict(samples="data/vision_flan/annotation_191-task_1k.json"),
            "vflan download vision_flan_191",
        ),
        (dict(samples="elsewhere.json"), "elsewhere.json: not there; data/README.md"),
        (
            dict(images="data/llava_instruct/train2017", samples="data/llava_instruct/x.json"),
            "COCO train2017",
        ),
        (dict(benchmarks="nowhere"), "nowhere: no benchmark there"),
        (dict(sharding="zero3"), "pip install deepspeed"),
    ],
)
def test_what_is_missing_is_named_once_with_what_to_do(found, changes, says, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert len([line for line in found(**changes) if says in line]) == 1


def test_bitsandbytes_is_asked_for_where_a_preset_uses_it(found, monkeypatch):
    monkeypatch.setattr(doctor, "find_spec", lambda name: None)
    assert "bitsandbytes is not installed: pip install bitsandbytes" in found(
        optimizer="adamw_8bit"
    )
    assert not any("pip install" in line for line in found())


def test_the_gpus_that_are_here_are_held_against_the_plan(found):
    published = dict(
        vision_tower="openai/clip-vit-large-patch14-336", language_model="lmsys/vicuna-7b-v1.5"
    )
    large = published | dict(precision="bf16", gradient_checkpointing=True, global_batch=8)
    (line,) = (line for line in found(**large) if "here are" in line)
    assert line.startswith("base needs") and "GB on each of 8 GPUs, here are 0; vflan.plan" in line
    assert any("here are 2 of 24 GB" in line for line in found(gpus=[24e9, 24e9], **large))
    assert not any("here are" in line for line in found(gpus=[141e9] * 8, **large))


def test_tiny_can_run_here_and_the_exit_status_says_so(capsys, monkeypatch):
    assert doctor.examine(["tiny"]) == 0
    said = capsys.readouterr().out
    assert (
        "torch 2" in said
        and "GB free" in said
        and "vision_flan_191: " in said
        and "\ntiny: " in said
    )
    monkeypatch.setattr(
        doctor, "missing", lambda name: ["data/tiny/language_model: no such folder"]
    )
    assert doctor.examine(["tiny"]) == 1
    monkeypatch.setattr(doctor, "missing", lambda name: [f"samples: {doctor.DRAWN}"])
    assert doctor.examine(["tiny"]) == 0


def test_a_preset_that_is_none_is_said_and_the_others_go_on(capsys, monkeypatch):
    monkeypatch.setattr(
        doctor, "missing", lambda name: [] if name == "tiny" else vflan.preset(name)
    )
    assert doctor.examine(["no_such", "tiny"]) == 0
    said = capsys.readouterr().out
    assert (
        "no_such: missing\n  There is no preset 'no_such'" in said
        and "tiny: nothing is missing" in said
    )
