"""A file of weights that the system does not give us is not called damaged."""

import os
import threading

import pytest
import torch
from safetensors.torch import save_file

from vflan.models import llava as models
from vflan.models import weights

# What safetensors and torch say on a file system that cannot map files into memory.
OF_SAFETENSORS = OSError("No such device (os error 19)")
OF_TORCH = RuntimeError("unable to mmap 4096 bytes from file </x/a.bin>: No such device (19)")


def refuse(error):
    def call(*arguments, **options):
        raise error

    return call


@pytest.mark.parametrize(
    "error, advice",
    [
        (OF_SAFETENSORS, "cannot map files into memory"),
        (OF_TORCH, "cannot map files into memory"),
        (OSError("Cannot allocate memory (os error 12)"), "not enough memory"),
        (FileNotFoundError(2, "No such file"), "download or copy it again"),
        (ValueError("header too large"), "download or copy it again"),
        (OSError("No file named model.safetensors"), "download or copy it again"),
    ],
    ids=str,
)
def test_what_the_system_refuses_is_told_apart_from_damage(recipe, monkeypatch, error, advice):
    monkeypatch.setattr("transformers.modeling_utils.safe_open", refuse(error))
    with pytest.raises((OSError, ValueError), match=f"cannot be read: .*{advice}") as trouble:
        models.load_model(recipe)
    assert "\n" not in str(trouble.value) and str(error) in str(trouble.value)


def test_a_projector_on_a_disk_that_maps_no_files(tmp_path, monkeypatch):
    real, stored = torch.load, {"projector.0.weight": torch.ones(2, 2)}
    torch.save(stored, tmp_path / "mm_projector.bin")
    save_file(stored, tmp_path / "projector.safetensors")

    def load(file, mmap=False, **options):
        if mmap:
            raise OF_TORCH
        return real(file, **options)

    monkeypatch.setattr(torch, "load", load)
    read = weights.read_tensors(tmp_path / "mm_projector.bin", "projector.")
    assert read["projector.0.weight"].tolist() == [[1, 1], [1, 1]]
    monkeypatch.setattr(weights, "safe_open", refuse(OF_SAFETENSORS))
    with pytest.raises(
        OSError, match="projector.safetensors cannot be read: .* map files into memory"
    ):
        weights.read_tensors(tmp_path / "projector.safetensors", "projector.")
    (tmp_path / "mm_projector.bin").write_bytes(b"PK half a file")
    with pytest.raises(ValueError, match="damaged"):
        weights.read_tensors(tmp_path / "mm_projector.bin", "projector.")


def test_no_model_is_converted_on_the_hub():
    """transformers starts a thread that asks for it when a hub model has .bin files."""
    assert os.environ["DISABLE_SAFETENSORS_CONVERSION"] == "1"
    assert not [t for t in threading.enumerate() if t.name == "Thread-auto_conversion"]


@pytest.mark.parametrize("text", ["{", "[]"])
def test_a_damaged_config_of_a_model_of_others_is_named(recipe, tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    save_file({"a": torch.ones(1)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="config.json is damaged"):
        models.load_model(recipe, tmp_path)
