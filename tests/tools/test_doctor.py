"""The doctor: what it reports as missing, and that it says what to do."""

from types import SimpleNamespace

import huggingface_hub
import pytest

import vflan
from vflan.config import Preset
from vflan.tools import doctor


@pytest.fixture
def missing(recipe, monkeypatch):
    """What the doctor reports for a preset whose three stages are the test recipe with changes."""

    def report(gpus=(), **changes):
        stages = Preset(*[vflan.replace(recipe, **changes)] * 3)
        monkeypatch.setattr(doctor, "preset", lambda name: stages)
        monkeypatch.setattr(
            doctor, "gpus", lambda: [SimpleNamespace(name="g", total_memory=size) for size in gpus]
        )
        return doctor.missing("mine")

    return report


def test_nothing_is_missing_where_all_files_exist(missing, tmp_path):
    (tmp_path / "benchmarks" / "pope").mkdir(parents=True)
    assert missing(benchmarks=str(tmp_path / "benchmarks")) == []


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
def test_each_missing_thing_is_named_once_with_what_to_do(missing, changes, says, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert len([line for line in missing(**changes) if says in line]) == 1


def test_bitsandbytes_is_missing_only_for_a_preset_that_uses_it(missing, monkeypatch):
    monkeypatch.setattr(doctor, "find_spec", lambda name: None)
    line = "bitsandbytes is not installed: pip install bitsandbytes"
    assert line in missing(optimizer="adamw_8bit")
    assert not any("pip install" in line for line in missing())


def test_the_gpus_of_this_machine_are_compared_with_the_plan(missing):
    published = dict(
        vision_tower="openai/clip-vit-large-patch14-336", language_model="lmsys/vicuna-7b-v1.5"
    )
    large = published | dict(precision="bf16", gradient_checkpointing=True, global_batch=8)
    (line,) = (line for line in missing(**large) if "here are" in line)
    assert line.startswith("base needs") and "GB on each of 8 GPUs, here are 0; vflan.plan" in line
    assert any("here are 2 of 24 GB" in line for line in missing(gpus=[24e9, 24e9], **large))
    # 8 GPUs cannot share 12 samples, so that only one was planned.
    (line,) = (line for line in missing(**large | dict(global_batch=12)) if "here are" in line)
    assert line.startswith("base needs more than one GPU of 80 GB, here are 0")
    assert not any("here are" in line for line in missing(gpus=[141e9] * 8, **large))


def test_main_memory_and_disk_are_compared_with_the_plan(missing, monkeypatch):
    small = SimpleNamespace(total=1e9, available=1e9)
    monkeypatch.setattr(doctor.psutil, "virtual_memory", lambda: small)
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    lines = missing(gpus=[24e9, 24e9], precision="bf16", save_every=1)
    (memory,) = (line for line in lines if "main memory" in line)
    assert memory.endswith("GB of main memory with 2 processes, this machine has 1")
    (disk,) = (line for line in lines if "of disk" in line)
    assert disk.endswith("are free; a larger save_every writes fewer checkpoints")


def test_driver_and_torch_are_compared_and_old_gpus_are_named(capsys, monkeypatch):
    volta = SimpleNamespace(name="V100", total_memory=16e9, major=7)
    monkeypatch.setattr(doctor, "gpus", lambda: [volta])
    monkeypatch.setattr(doctor, "driver_version", lambda: "535.104.05")
    monkeypatch.setattr(doctor, "find_problem", lambda: "the driver is 535.104.05. Update it.")
    text = "\n".join(doctor.describe_machine())
    assert "NVIDIA driver 535.104.05, torch built for CUDA" in text
    assert "GPU 0: V100, 16.0 GB; it emulates bf16, slowly" in text
    assert "no usable GPU (the preset tiny needs none): the driver is 535.104.05." in text


def test_the_exit_status_says_whether_tiny_can_run_here(capsys, monkeypatch):
    assert doctor.examine(["tiny"]) == 0
    printed = capsys.readouterr().out
    for words in ("torch 2", "GB free", "vision_flan_191: ", "\ntiny: "):
        assert words in printed
    monkeypatch.setattr(
        doctor, "missing", lambda name: ["data/tiny/language_model: no such folder"]
    )
    assert doctor.examine(["tiny"]) == 1
    monkeypatch.setattr(doctor, "missing", lambda name: [f"samples: {doctor.DRAWN}"])
    assert doctor.examine(["tiny"]) == 0


def test_an_unknown_preset_is_reported_and_the_others_follow(capsys, monkeypatch):
    monkeypatch.setattr(
        doctor, "missing", lambda name: [] if name == "tiny" else vflan.preset(name)
    )
    assert doctor.examine(["no_such", "tiny"]) == 0
    printed = capsys.readouterr().out
    assert "no_such: missing\n  There is no preset 'no_such'" in printed
    assert "tiny: nothing is missing" in printed
