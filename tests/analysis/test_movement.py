"""How far weights moved: sums over pieces of files equal the calculation on all weights at once."""

import numpy as np
import pytest
import torch
from conftest import make_backbones
from safetensors.torch import load_file, save_file

import vflan
from vflan.analysis import movement
from vflan.analysis.movement import moved, pieces, weight_pairs
from vflan.models.llava import parameter_counts, parts
from vflan.models.weights import part_of, part_sizes


@pytest.fixture
def runs(recipe):
    """A projector run and a Base run that began from it."""
    first = vflan.replace(recipe, name="projector", tune=("projector",), max_steps=2)
    before = vflan.train(first)
    return before, vflan.train(vflan.replace(recipe, max_steps=3), init=before)


def stacked(model, part):
    """All weights of a part of a model in memory, in double precision."""
    return torch.cat([w.flatten() for w in parts(model)[part].state_dict().values()]).double()


@pytest.mark.parametrize("size", [movement.PIECE, 100, 7])
@pytest.mark.parametrize("part", ["projector", "language_model"])
def test_running_sums_equal_the_stacked_calculation(runs, part, size):
    a, b = (stacked(run.load_model(), part) for run in runs)
    correlation, distance = moved(*runs, part, size)
    assert correlation == pytest.approx(torch.corrcoef(torch.stack([a, b]))[0, 1].item(), abs=1e-9)
    assert distance == pytest.approx(((b - a).norm() / a.norm()).item(), abs=1e-9)
    assert 0 < distance and correlation < 1
    assert max(len(piece) for piece, _ in pieces(*runs, part, size)) <= max(size, 64)


def test_a_tied_table_counts_as_both_of_its_weights(recipe, tmp_path):
    make_backbones(tmp_path)
    folder = tmp_path / "language_model"
    from transformers import AutoModelForCausalLM

    tied = AutoModelForCausalLM.from_pretrained(folder, tie_word_embeddings=True)
    tied.save_pretrained(folder)
    recipe = vflan.replace(recipe, language_model=str(folder), max_steps=2)
    start = vflan.replace(recipe, name="start", tune=("projector",))
    runs = vflan.train(start), vflan.train(recipe)
    a, b = (stacked(run.load_model(), "language_model") for run in runs)
    correlation, distance = moved(*runs, "language_model")
    assert correlation == pytest.approx(torch.corrcoef(torch.stack([a, b]))[0, 1].item(), abs=1e-9)
    assert distance == pytest.approx(((b - a).norm() / a.norm()).item(), abs=1e-9)


def test_a_quantised_run_is_compared_by_what_it_learned(recipe):
    """Its files are in 16 or 32 bits; packed 4-bit weights could not even be stacked."""
    four, lora = dict(bits=4, max_steps=2), dict(lora_r=4, lora_alpha=8)
    before = vflan.train(vflan.replace(recipe, name="projector", tune=("projector",), **four))
    after = vflan.train(vflan.replace(recipe, **four, **lora), init=before)
    for part in ("projector", "language_model"):
        correlation, distance = moved(before, after, part)
        assert 0.5 < correlation < 1 and 0 < distance < 1
    assert moved(before, before, "language_model") == pytest.approx((1, 0))


def test_a_figure_takes_all_weights_or_every_kth(runs, monkeypatch):
    a, b = (stacked(run.load_model(), "language_model").numpy() for run in runs)
    every = weight_pairs(*runs, "language_model")
    assert np.array_equal(np.sort(every[0]), np.sort(a)) and len(every[1]) == len(b)
    monkeypatch.setattr(movement.pieces, "__defaults__", (50,))
    few = weight_pairs(*runs, "language_model", most=1000)
    step = -(-len(a) // 1000)
    assert [np.array_equal(few[i], every[i][::step]) for i in (0, 1)] == [True, True]


def test_sizes_are_read_from_the_files(runs):
    assert part_sizes(runs[1]) == parameter_counts(runs[1].load_model())
    assert part_of("model.mm_projector.0.weight") == "projector"
    assert (
        part_of("model.vision_tower.vision_tower.vision_model.pre_layrnorm.bias") == "vision_tower"
    )
    assert (
        part_of("lm_head.weight")
        == part_of("model.layers.0.mlp.up_proj.weight")
        == "language_model"
    )


def test_a_part_that_the_files_lack_is_named(runs):
    with pytest.raises(ValueError, match="two runs hold no tower"):
        moved(*runs, "tower")
    for run in runs:
        (run.folder / "model" / "model.safetensors").rename(run.folder / "model" / "elsewhere")
    for compare in (moved, weight_pairs):
        with pytest.raises(ValueError, match="two runs hold no projector"):
            compare(*runs, "projector")


def test_runs_of_two_shapes_are_not_compared(runs):
    file = runs[1].folder / "model" / "model.safetensors"
    weights = load_file(file)
    name = next(name for name in weights if "linear_1.bias" in name)
    save_file(weights | {name: weights[name][:5].clone()}, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match="The projectors of the two runs differ in shape"):
        moved(*runs, "projector")
