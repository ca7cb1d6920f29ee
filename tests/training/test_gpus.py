"""No silent fall-back: bf16 without a usable GPU is refused, and the reason has a remedy."""

import subprocess
from types import SimpleNamespace

import pytest
import torch

import vflan
from vflan.models.quantisation import compute_dtype
from vflan.training import gpus
from vflan.training.distributed import check_device, sharding


@pytest.fixture
def machine(monkeypatch):
    """machine(driver, cuda): a machine with this driver ("": none) and a torch for this CUDA."""

    def pretend(driver, cuda, usable=False):
        monkeypatch.setattr(gpus, "driver_version", lambda: driver)
        monkeypatch.setattr(torch.version, "cuda", cuda)
        monkeypatch.setattr(torch, "__version__", f"2.13.0+{'cpu' if cuda is None else 'cu'}")
        monkeypatch.setattr(torch.cuda, "is_available", lambda: usable)

    return pretend


@pytest.mark.parametrize(
    "driver, cuda, words",
    [
        ("", "13.0", "there is no GPU, or NVIDIA's driver is not installed"),
        ("580.65.06", None, "built without CUDA, and the driver is 580.65.06. install"),
        ("535.104.05", "13.0", "CUDA 13.0, which needs driver 580 or newer, and the driver is 535"),
        ("535.104.05", "13.0", "torch==2.13.0 --index-url https://download.pytorch.org/whl/cu126."),
        ("470.1.1", "13.0", "it is too old for any build of torch 2.13.0."),
        ("580.65.06", "13.0", "new enough: python -c"),
    ],
)
def test_the_reason_names_driver_cuda_and_the_wheel_to_take(machine, driver, cuda, words):
    machine(driver, cuda)
    assert words in gpus.find_problem()


def test_a_hidden_gpu_is_named(machine, monkeypatch):
    machine("580.65.06", "13.0")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert "CUDA_VISIBLE_DEVICES='' may hide the GPUs" in gpus.find_problem()


def test_a_usable_gpu_is_no_problem(machine):
    machine("580.65.06", "13.0", usable=True)
    assert gpus.find_problem() == ""


@pytest.mark.parametrize(
    "printed, version", [("535.104.05\n535.104.05\n", "535.104.05"), ("no devices\n", "")]
)
def test_the_driver_is_what_nvidia_smi_prints(monkeypatch, printed, version):
    answer = SimpleNamespace(stdout=printed)
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: answer)
    assert gpus.driver_version() == version


def test_bf16_without_a_gpu_is_refused_and_leaves_no_folder(recipe, machine):
    machine("535.104.05", "13.0")
    half = vflan.replace(recipe, precision="bf16")
    with pytest.raises(RuntimeError, match="precision='bf16'.*535.*set device='cpu'"):
        vflan.train(half)
    assert not half.folder.exists()
    machine("580.65.06", "13.0", usable=True)
    check_device(half)


@pytest.mark.parametrize("name", ["smol_real", "qlora_7b", "lora_7b", "full_7b", "full_13b"])
def test_no_preset_for_gpus_trains_on_a_cpu_unless_it_is_asked_to(machine, name):
    machine("", None)
    for recipe in vflan.preset(name):
        with pytest.raises(RuntimeError, match="there is no GPU"):
            check_device(recipe)
    for recipe in (*vflan.preset(name, device="cpu"), *vflan.preset("tiny")):
        check_device(recipe)


def test_a_cpu_that_is_asked_for_is_used_beside_a_gpu(recipe, machine):
    machine("580.65.06", "13.0", usable=True)
    both = dict(precision="bf16", tune=("projector", "language_model"))
    auto, cpu = (vflan.replace(recipe, device=device, **both) for device in ("auto", "cpu"))
    assert compute_dtype(auto) == torch.bfloat16 and compute_dtype(cpu) == torch.float32
    assert sharding(auto, 2) == "fsdp2" and sharding(cpu, 2) == "none"


def test_a_bf16_run_that_is_finished_is_read_without_a_gpu_and_says_how_it_computes(
    recipe, machine, capsys
):
    machine("", None)
    half = vflan.replace(recipe, precision="bf16", max_steps=1)
    run = vflan.train(vflan.replace(half, device="cpu"))
    run.load_model()
    assert "now computes" not in capsys.readouterr().err
    # As a run from a machine with a GPU.
    (run.folder / "recipe.json").write_text(
        (run.folder / "recipe.json").read_text().replace('"device": "cpu"', '"device": "auto"')
    )
    assert vflan.train(half).finished
    run.load_model()
    said = capsys.readouterr().err
    assert "was trained in bf16 and now computes in fp32, on the CPU: there is no GPU" in said
