"""Parts of real folders are exchanged: a language model without `<image>`, a projector's file."""

import json
import shutil

import pytest
import torch
from real_folders import make_clip, make_language_model, make_projector
from transformers import AutoModelForCausalLM

import vflan
from vflan.models.llava import load_model, parameter_counts, parts, read_projector


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """(the backbones of a recipe, another language model of the same shape)"""
    home = tmp_path_factory.mktemp("real")
    ours = make_language_model(home / "vicuna", seed=1)
    backbones = dict(language_model=ours, vision_tower=make_clip(home / "clip"))
    return backbones, make_language_model(home / "llama_chat", seed=2)


@pytest.fixture
def real(recipe, folders):
    return vflan.replace(recipe, **folders[0])


LORA = dict(lora_r=4, lora_alpha=8)


@pytest.mark.parametrize("bits", [16, 4])
def test_a_language_model_that_never_saw_a_picture_gets_the_row_of_image(real, folders, bits):
    recipe = vflan.replace(real, bits=bits, **LORA if bits < 16 else {})
    model, other = load_model(recipe), folders[1]
    expected = load_model(vflan.replace(recipe, language_model=other))
    assert model.config.image_token_id + 1 == model.lm_head.out_features
    vflan.swap_part(model, "language_model", other)
    pairs = [parts(m)["language_model"].state_dict() for m in (model, expected)]
    assert pairs[0].keys() == pairs[1].keys()
    assert all(torch.equal(pairs[0][name], pairs[1][name]) for name in pairs[0])


def test_a_model_in_8_bits_that_has_answered_takes_another_language_model(real, folders):
    """bitsandbytes moves the scales of a layer when it first computes."""
    recipe, asked = vflan.replace(real, bits=8, **LORA), dict(input_ids=torch.arange(9)[None])
    model = load_model(recipe)
    before = model(**asked).logits
    vflan.swap_part(model, "language_model", folders[1])
    expected = load_model(vflan.replace(recipe, language_model=folders[1]))(**asked).logits
    assert torch.equal(model(**asked).logits, expected) and not torch.equal(before, expected)


def test_another_vocabulary_is_refused(real, folders, tmp_path):
    small = AutoModelForCausalLM.from_pretrained(folders[1])
    small.resize_token_embeddings(100, mean_resizing=False)
    small.save_pretrained(tmp_path / "small")
    with pytest.raises(ValueError, match="differ in shape .model.embed_tokens.weight and 1 more"):
        vflan.swap_part(load_model(real), "language_model", tmp_path / "small")


def test_a_language_model_without_all_its_weights_is_refused(real, folders, tmp_path):
    """transformers would fill the others with random numbers."""
    part = shutil.copytree(folders[1], tmp_path / "part")
    index = json.loads((part / "pytorch_model.bin.index.json").read_text())
    name, shard = next(pair for pair in index["weight_map"].items() if "up_proj" in pair[0])
    weights = torch.load(part / shard)
    del weights[name], index["weight_map"][name]
    torch.save(weights, part / shard)
    (part / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=f"part lacks 1 weights .{name}"):
        vflan.swap_part(load_model(real), "language_model", part)


def test_a_swap_reads_no_more_than_it_needs(real, folders, tmp_path, monkeypatch):
    """A projector alone from its file; a language model in the precision of the model."""
    real = vflan.replace(real, tune=("projector",), max_steps=2)
    run, model = vflan.train(real), load_model(real).to(torch.bfloat16)
    asked = []

    def read(*arguments, real=AutoModelForCausalLM.from_pretrained, **options):
        asked.append(options["dtype"])
        return real(*arguments, **options)

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", read)
    vflan.swap_part(model, "language_model", folders[1])
    assert asked == [torch.bfloat16]
    monkeypatch.setattr("vflan.models.llava.load_model", lambda *_: pytest.fail("a whole model"))
    file = make_projector(tmp_path / "mm_projector.bin")
    for source in (run, run.folder, file):
        vflan.swap_part(model, "projector", source)
        now, then = (
            parts(model)["projector"].state_dict(),
            read_projector(source),
        )
        assert all(torch.equal(now[name], then[name].to(torch.bfloat16)) for name in then)
    wide = make_projector(tmp_path / "wide.bin", text=80)
    with pytest.raises(ValueError, match="wide.bin joins .* width 80, but this recipe's have 64"):
        vflan.swap_part(model, "projector", wide)


def test_weights_in_4_bits_are_counted_one_by_one(real):
    quantised = load_model(vflan.replace(real, bits=4, **LORA))
    assert parameter_counts(quantised) == parameter_counts(load_model(real))
