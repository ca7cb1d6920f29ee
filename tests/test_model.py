import json

import pytest
import torch
from PIL import Image

import vflan
from vflan.model import PARTS, export, fingerprint, freeze, image_features, load_model, load_processor, parts


@pytest.fixture
def model(recipe):
    return load_model(recipe)


def prints(model):
    return {name: fingerprint(part) for name, part in parts(model).items()}


def test_the_model_is_its_three_parts_and_only_the_projector_is_fresh(recipe, model):
    from transformers import AutoModelForCausalLM, CLIPVisionModel

    tower, language = (
        CLIPVisionModel.from_pretrained(recipe.vision_tower),
        AutoModelForCausalLM.from_pretrained(recipe.language_model),
    )
    assert tuple(parts(model)) == PARTS
    assert fingerprint(parts(model)["vision_tower"]) == fingerprint(tower)
    assert torch.equal(model.lm_head.weight, language.lm_head.weight)
    assert torch.equal(
        model.model.language_model.layers[1].mlp.up_proj.weight, language.model.layers[1].mlp.up_proj.weight
    )
    assert sum(p.numel() for part in parts(model).values() for p in part.parameters()) == model.num_parameters()


def test_the_fresh_projector_depends_on_the_seed_alone(recipe, model):
    torch.rand(3)
    again, other = load_model(recipe), load_model(vflan.replace(recipe, seed=1))
    projector = [fingerprint(parts(m)["projector"]) for m in (model, again, other)]
    assert projector[0] == projector[1] != projector[2]


def test_weights_that_the_files_lack_are_an_error(recipe, tmp_path):
    from shutil import copytree

    from safetensors.torch import load_file, save_file

    folder = copytree(recipe.language_model, tmp_path / "broken")
    weights = load_file(folder / "model.safetensors")
    weights.pop("model.layers.1.mlp.up_proj.weight")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="lacks 1 weights.*up_proj"):
        load_model(vflan.replace(recipe, language_model=str(folder)))


def test_freeze_lets_only_the_named_parts_learn(recipe, model):
    for tune in (("projector",), ("language_model",), ("projector", "language_model")):
        freeze(model, vflan.replace(recipe, tune=tune))
        learning = {part for part, module in parts(model).items() if all(p.requires_grad for p in module.parameters())}
        still = {part for part, module in parts(model).items() if not any(p.requires_grad for p in module.parameters())}
        assert learning == set(tune) and still == set(PARTS) - set(tune)


def test_lora_reaches_the_language_model_and_never_the_tower(recipe, model):
    freeze(model, vflan.replace(recipe, lora_r=4, lora_alpha=8))
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    adapters = [name for name in names if "lora_" in name]
    assert len(adapters) == 2 * 7 * 2 and all(
        "language_model" in name for name in adapters
    )  # A and B, 7 matrices, 2 layers
    rest = set(names) - set(adapters)
    assert len(rest) == 4 and all("multi_modal_projector" in name for name in rest)  # the projector trains in full


@pytest.mark.parametrize("bits", [8, 4])
def test_only_the_language_models_layers_are_quantised(recipe, bits, tmp_path):
    from bitsandbytes.nn import Linear4bit, Linear8bitLt

    quantised = vflan.replace(recipe, bits=bits, lora_r=4, lora_alpha=8)
    export(load_model(recipe), load_processor(recipe), recipe, tmp_path / "whole")
    for model in (load_model(quantised), load_model(quantised, tmp_path / "whole")):
        names = [name for name, module in model.named_modules() if isinstance(module, (Linear4bit, Linear8bitLt))]
        assert len(names) == 14 and all("language_model.layers" in name for name in names)


def test_an_exported_folder_loads_through_the_auto_classes_with_the_same_numbers(recipe, model, tmp_path):
    from transformers import AutoModelForImageTextToText, AutoProcessor

    export(model, load_processor(recipe), recipe, tmp_path / "out")
    again = AutoModelForImageTextToText.from_pretrained(tmp_path / "out").eval()
    processor = AutoProcessor.from_pretrained(tmp_path / "out", backend="pil")
    picture = Image.new("RGB", (30, 20), "red")
    message = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What color is it?"}]}]
    text = processor.apply_chat_template(message, add_generation_prompt=True)
    assert text.endswith("questions. USER: <image>\nWhat color is it? ASSISTANT:")
    inputs = processor(images=picture, text=text, return_tensors="pt")
    assert (inputs["input_ids"] == model.config.image_token_id).sum() == model.config.image_seq_length == 4
    with torch.no_grad():
        assert torch.equal(again(**inputs).logits, model(**inputs).logits)


def test_image_features_are_the_models_own(model):
    pixels = torch.randn(3, 3, 24, 24)
    with torch.no_grad():
        theirs = torch.stack(list(model.get_image_features(pixels, return_dict=True).pooler_output))
        assert torch.equal(parts(model)["projector"](image_features(model, pixels)), theirs)


def test_pad_keeps_the_whole_picture_and_crop_the_middle(recipe):
    wide = Image.new("RGB", (48, 24), "red")
    wide.paste("blue", (12, 0, 36, 24))
    pixels = {
        how: load_processor(vflan.replace(recipe, image_aspect_ratio=how)).image_processor(wide, return_tensors="pt")[
            "pixel_values"
        ][0]
        for how in ("pad", "crop")
    }
    assert pixels["pad"].shape == pixels["crop"].shape == (3, 24, 24)
    assert pixels["crop"].std(dim=(1, 2)).max() < 1e-5  # blue only
    assert pixels["pad"][:, 0].abs().max() < 0.02  # the bar above is CLIP's mean colour, that is zero
    assert pixels["pad"][0, 12, 0] > 1 > -1 > pixels["pad"][0, 12, 12]  # red edges, blue middle


def test_a_tokenizer_without_the_image_token_gets_one_that_is_never_generated(recipe, tmp_path):
    from shutil import copytree

    folder = copytree(recipe.language_model, tmp_path / "plain")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_text(
            (folder / name).read_text().replace("<image>", "<other>").replace('"image_token"', '"other_token"')
        )
    model = load_model(vflan.replace(recipe, language_model=str(folder)))
    head, size = model.lm_head.weight, json.loads((folder / "config.json").read_text())["vocab_size"]
    assert model.config.image_token_id == size and head.shape[0] == size + 1
    logits = head @ torch.randn(head.shape[1], 50)
    assert (logits.argmax(dim=0) < size).all()


def test_swap_part_takes_exactly_one_part(recipe, model):
    other = load_model(vflan.replace(recipe, seed=1))
    with torch.no_grad():
        other.lm_head.weight += 1
    before, theirs = prints(model), prints(other)
    swapped = prints(vflan.swap_part(model, "projector", other))
    assert swapped["projector"] == theirs["projector"] != before["projector"]
    assert swapped["language_model"] == before["language_model"] != theirs["language_model"]
    assert prints(vflan.swap_part(model, "language_model", other)) == theirs
    with pytest.raises(ValueError, match="vision_tower, projector, language_model"):
        vflan.swap_part(model, "mlp", other)


def test_a_causal_language_model_can_be_swapped_in(recipe, model):
    from transformers import AutoModelForCausalLM

    language = AutoModelForCausalLM.from_pretrained(recipe.language_model)
    with torch.no_grad():
        language.model.norm.weight += 1
    vflan.swap_part(model, "language_model", language)
    assert torch.equal(model.model.language_model.norm.weight, language.model.norm.weight)
