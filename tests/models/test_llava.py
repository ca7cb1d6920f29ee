import json
import subprocess
import sys
from functools import partial
from shutil import copy, copytree

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import vflan
from tests.conftest import make_backbones
from vflan.config import write_json
from vflan.data.conversation import IGNORE_INDEX, encode, expand, prompt_ids
from vflan.models import quantisation
from vflan.models.llava import (
    PARTS,
    export,
    fingerprint,
    freeze,
    image_features,
    load_model,
    load_processor,
    meta_model,
    parameter_counts,
    parts,
    quantised_layers,
)
from vflan.training.run import Run


@pytest.fixture
def model(recipe):
    return load_model(recipe)


def fingerprints(model):
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
        model.model.language_model.layers[1].mlp.up_proj.weight,
        language.model.layers[1].mlp.up_proj.weight,
    )
    assert (
        sum(p.numel() for part in parts(model).values() for p in part.parameters())
        == model.num_parameters()
    )


def test_the_fresh_projector_depends_on_the_seed_alone(recipe, model):
    torch.rand(3)
    again, other = load_model(recipe), load_model(vflan.replace(recipe, seed=1))
    projector = [fingerprint(parts(m)["projector"]) for m in (model, again, other)]
    assert projector[0] == projector[1] != projector[2]


@pytest.mark.parametrize("part", PARTS)
def test_missing_weights_and_other_shapes_are_errors(recipe, tmp_path, part):
    name = dict(
        vision_tower="encoder.layers.1.mlp.fc1.weight",
        language_model="model.layers.1.mlp.up_proj.weight",
    ).get(part, "multi_modal_projector.linear_2.weight")
    if part == "projector":
        whole = tmp_path / "whole"
        export(load_model(recipe), load_processor(recipe), recipe, whole)
        broken, ask = recipe, dict(weights=tmp_path / "broken")
    else:
        whole, ask = getattr(recipe, part), {}
        broken = vflan.replace(recipe, **{part: str(tmp_path / "broken")})
    weights = load_file(copytree(whole, tmp_path / "broken") / "model.safetensors")
    narrow = weights | {name: weights.pop(name)[:, 1:].clone()}
    for stored, sentence in (
        (weights, f"lacks 1 weights.*{name}"),
        (narrow, rf"{name} is \(.*in the files but"),
    ):
        save_file(stored, tmp_path / "broken" / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(ValueError, match=sentence):
            load_model(broken, **ask)


def test_a_whole_clip_gives_its_vision_tower_and_reports_nothing_of_its_text_side(
    recipe, tmp_path, capfd
):
    from transformers import CLIPConfig, CLIPModel, CLIPVisionModel

    tower = CLIPVisionModel.from_pretrained(recipe.vision_tower)
    small = dict(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        vocab_size=50,
    )
    clip = CLIPModel(CLIPConfig(vision_config=tower.config.to_dict(), text_config=small))
    clip.vision_model.load_state_dict(tower.state_dict())
    clip.save_pretrained(tmp_path)
    old = dict(
        crop_size=24, do_center_crop=True, do_normalize=True, do_resize=True, resample=3, size=24
    )
    (tmp_path / "preprocessor_config.json").write_text(
        json.dumps(old | {"feature_extractor_type": "CLIPFeatureExtractor"})
    )
    whole = vflan.replace(recipe, vision_tower=str(tmp_path))
    capfd.readouterr()
    assert fingerprint(parts(load_model(whole))["vision_tower"]) == fingerprint(tower)
    assert "text_model" not in "".join(capfd.readouterr())
    assert (
        load_processor(whole).image_processor.to_dict()
        == load_processor(recipe).image_processor.to_dict()
    )


def test_freeze_lets_only_the_named_parts_learn(recipe, model):
    for tune in (("projector",), ("language_model",), ("projector", "language_model")):
        freeze(model, vflan.replace(recipe, tune=tune))
        learning = {
            part
            for part, module in parts(model).items()
            if all(p.requires_grad for p in module.parameters())
        }
        still = {
            part
            for part, module in parts(model).items()
            if not any(p.requires_grad for p in module.parameters())
        }
        assert learning == set(tune) and still == set(PARTS) - set(tune)


def test_lora_adapts_the_language_model_and_not_the_vision_tower(recipe, model):
    freeze(model, vflan.replace(recipe, lora_r=4, lora_alpha=8))
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    adapters = [name for name in names if "lora_" in name]
    assert len(adapters) == 2 * 7 * 2 and all(
        "language_model" in name for name in adapters
    )  # A and B, 7 matrices, 2 layers
    rest = set(names) - set(adapters)
    assert len(rest) == 4 and all(
        "multi_modal_projector" in name for name in rest
    )  # the projector trains in full


QLORA = dict(bits=4, lora_r=4, lora_alpha=8)


@pytest.mark.parametrize("bits", [8, 4])
def test_exactly_the_language_models_linear_layers_are_quantised(recipe, bits, tmp_path):
    from bitsandbytes.nn import Linear4bit, Linear8bitLt

    quantised = vflan.replace(recipe, **QLORA | dict(bits=bits))
    export(load_model(recipe), load_processor(recipe), recipe, tmp_path / "whole")
    for model in (load_model(quantised), load_model(quantised, tmp_path / "whole")):
        of = {
            part: [m for m in module.modules() if isinstance(m, (Linear4bit, Linear8bitLt))]
            for part, module in parts(model).items()
        }
        assert {part: len(layers) for part, layers in of.items()} == quantised_layers(model)
        assert quantised_layers(model) == dict(
            vision_tower=0, projector=0, language_model=2 * 7
        )  # layers, matrices
        assert type(model.lm_head) is torch.nn.Linear
        if bits == 4:
            states = [layer.weight.quant_state for layer in of["language_model"]]
            assert all(
                state.quant_type == "nf4" and state.nested for state in states
            )  # nested: double quantisation


def test_a_model_with_other_quantised_layers_than_the_recipe_names_is_refused(
    recipe, monkeypatch, tmp_path
):
    four, export_to = vflan.replace(recipe, **QLORA), tmp_path / "whole"
    export(load_model(recipe), load_processor(recipe), recipe, export_to)
    load_model(four, export_to).save_pretrained(tmp_path / "four")
    with pytest.raises(ValueError, match="four: quantised layers are .*bits=16 means"):
        load_model(recipe, tmp_path / "four")
    # the pitfall: bitsandbytes compares from the start of a name, so this skips nothing
    skip = ["vision_tower", "multi_modal_projector"]
    monkeypatch.setattr(
        quantisation, "loading_options", partial(quantisation.loading_options, skip=skip)
    )
    with pytest.raises(
        ValueError,
        match="'vision_tower': 18, 'projector': 2, 'language_model': 1[45].*bits=4 means",
    ):
        load_model(four, export_to)


WAYS = {
    "projector": dict(tune=("projector",)),
    "language model": dict(tune=("language_model",)),
    "full": {},
    "LoRA": dict(lora_r=4, lora_alpha=8),
    "QLoRA": QLORA,
    "8 bits": QLORA | dict(bits=8),
}


@pytest.mark.parametrize("way", WAYS)
def test_every_way_of_tuning_changes_only_the_parts_that_it_names(recipe, way):
    recipe = vflan.replace(recipe, **WAYS[way])
    model = load_model(recipe)
    freeze(model, recipe)

    def hashes():
        return {
            (part, kind): fingerprint(
                (n, w) for n, w in module.named_parameters() if ("lora_" in n) == (kind == "lora")
            )
            for part, module in parts(model).items()
            for kind in ("own", "lora")
        }

    before = hashes()
    optimizer = torch.optim.AdamW([w for w in model.parameters() if w.requires_grad], lr=0.1)
    ids = torch.tensor([[1, 5, *[model.config.image_token_id] * 4, 6, 7, 8]])
    for _ in range(2):  # a fresh adapter's A has no gradient in the first step
        model(input_ids=ids, pixel_values=torch.ones(1, 3, 24, 24), labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    moved = {key for key, value in hashes().items() if value != before[key]}
    adapters = "lora" if recipe.lora_r else "own"
    assert moved == {
        (part, adapters if part == "language_model" else "own") for part in recipe.tune
    }
    assert all(w.dtype == torch.float32 for w in model.parameters() if w.requires_grad)


def child(script, *arguments):
    """The output of a fresh Python process."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script, *arguments], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_bitsandbytes_is_imported_only_when_a_recipe_asks_for_it(recipe, tmp_path):
    script = """if True:
        import json, sys
        import vflan
        from vflan.models.llava import export, freeze, load_model, load_processor
        recipe = vflan.Recipe.from_dict(json.loads(sys.argv[1]))
        model = load_model(recipe)
        freeze(model, recipe)
        export(model, load_processor(recipe, model), recipe, sys.argv[2])
        print(sorted({"bitsandbytes", "peft"} & set(sys.modules)))
    """
    assert child(script, json.dumps(recipe.to_dict()), str(tmp_path / "out")).strip() == "[]"


def test_an_exported_folder_loads_through_the_auto_classes_with_the_same_numbers(
    recipe, model, tmp_path
):
    from transformers import AutoModelForImageTextToText, AutoProcessor

    export(model, load_processor(recipe), recipe, tmp_path / "out")
    again = AutoModelForImageTextToText.from_pretrained(tmp_path / "out").eval()
    processor = AutoProcessor.from_pretrained(tmp_path / "out", backend="pil")
    picture = Image.new("RGB", (30, 20), "red")
    message = [
        {
            "role": "user",
            "content": [{"type": "image"}, {"type": "text", "text": "What color is it?"}],
        }
    ]
    text = processor.apply_chat_template(message, add_generation_prompt=True)
    assert " ".join(text.split()).endswith("questions. USER: <image> What color is it? ASSISTANT:")
    inputs = processor(images=picture, text=text, return_tensors="pt")
    assert (
        (inputs["input_ids"] == model.config.image_token_id).sum()
        == model.config.image_seq_length
        == 4
    )
    with torch.no_grad():
        assert torch.equal(again(**inputs).logits, model(**inputs).logits)


def test_a_fresh_process_without_vflan_answers_from_an_exported_folder(recipe, model, tmp_path):
    script = """if True:
        import sys
        from PIL import Image
        from transformers import AutoModelForImageTextToText, AutoProcessor
        model = AutoModelForImageTextToText.from_pretrained(sys.argv[1])
        processor = AutoProcessor.from_pretrained(sys.argv[1], backend="pil")
        content = [{"type": "image"}, {"type": "text", "text": "What color is it?"}]
        turns = [{"role": "user", "content": content}]
        text = processor.apply_chat_template(turns, add_generation_prompt=True)
        inputs = processor(images=Image.new("RGB", (30, 20), "red"), text=text, return_tensors="pt")
        output = model.generate(**inputs, max_new_tokens=5, min_new_tokens=5)
        print(output[0, inputs["input_ids"].shape[1]:].tolist(), "vflan" in sys.modules)
    """
    processor = load_processor(recipe)
    export(model, processor, recipe, tmp_path / "out")
    (sample,) = [{"text": "<image>\nWhat color is it?", "image": str(tmp_path / "red.png")}]
    Image.new("RGB", (30, 20), "red").save(sample["image"])
    printed = child(script, str(tmp_path / "out"))
    ids = list(prompt_ids(sample["text"], processor.tokenizer))
    ids, _ = expand(ids, [IGNORE_INDEX] * len(ids), 4, model.config.image_token_id)
    pixels = processor.image_processor(Image.open(sample["image"]), return_tensors="pt")[
        "pixel_values"
    ]
    ours = model.generate(
        torch.tensor([ids]), pixel_values=pixels, max_new_tokens=5, min_new_tokens=5
    )
    assert printed.strip() == f"{ours[0, len(ids) :].tolist()} False"


def vicuna(folder, shared, legacy):
    """A folder like Vicuna's: a sentencepiece tokenizer without `<image>` and padding token."""
    from transformers import LlamaConfig, LlamaForCausalLM

    small = dict(hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4)
    LlamaForCausalLM(LlamaConfig(vocab_size=900, **small)).save_pretrained(folder)
    copy(shared / "golden" / "tokenizer.model", folder)
    names = dict(
        bos_token="<s>", eos_token="</s>", unk_token="<unk>", tokenizer_class="LlamaTokenizer"
    )
    (folder / "tokenizer_config.json").write_text(
        json.dumps(names | dict(legacy=legacy, add_bos_token=True))
    )


@pytest.mark.parametrize("legacy", [True, False])
def test_a_vicuna_keeps_the_reference_tokens_through_loading_saving_and_the_chat_template(
    recipe, shared, tmp_path, legacy
):
    from transformers import AutoProcessor

    vicuna(tmp_path / "vicuna", shared, legacy)
    recipe = vflan.replace(recipe, language_model=str(tmp_path / "vicuna"))
    processor = load_processor(recipe, load_model(recipe))
    processor.save_pretrained(tmp_path / "saved")
    again = AutoProcessor.from_pretrained(tmp_path / "saved", backend="pil")
    for case in json.loads((shared / "golden" / "llava_tokens.json").read_text()):
        expected = case["input_ids" if legacy else "input_ids_legacy_false"]
        for tokenizer in (processor.tokenizer, again.tokenizer):
            assert encode(case["conversations"], tokenizer, case["template"])[0] == expected, case[
                "name"
            ]
        if case["template"] == "plain" or "<image>" not in case["conversations"][0]["value"]:
            continue
        texts = [turn["value"].replace("<image>", "").strip() for turn in case["conversations"]]
        messages = [
            dict(role=("user", "assistant")[i % 2], content=[dict(type="text", text=text)])
            for i, text in enumerate(texts)
        ]
        messages[0]["content"].append(dict(type="image"))
        one_pass = again.tokenizer(again.apply_chat_template(messages)).input_ids
        assert [
            -200 if token == again.image_token_id else token for token in one_pass
        ] == expected, case["name"]


def test_an_exported_folder_looks_like_the_published_ones(recipe, tmp_path):
    """vLLM's loader reads the classes, the image token, the projector's shape and weight names."""
    language = copytree(recipe.language_model, tmp_path / "language")
    config = json.loads((language / "config.json").read_text())
    config.pop("architectures")
    (language / "config.json").write_text(json.dumps(config))
    recipe = vflan.replace(recipe, language_model=str(language))
    model = load_model(recipe)
    export(model, load_processor(recipe), recipe, tmp_path / "out")
    again = load_model(recipe, tmp_path / "out")
    export(again, load_processor(recipe, again), recipe, tmp_path / "twice")
    for folder in (tmp_path / "out", tmp_path / "twice"):
        config = json.loads((folder / "config.json").read_text())
        expected = dict(
            architectures=["LlavaForConditionalGeneration"],
            model_type="llava",
            image_token_index=model.config.image_token_id,
            image_seq_length=4,
            projector_hidden_act="gelu",
            multimodal_projector_bias=True,
            vision_feature_layer=-2,
            vision_feature_select_strategy="default",
        )
        assert {key: config.get(key) for key in expected} == expected
        text = config["text_config"]
        assert (text["architectures"], text["model_type"]) == (["LlamaForCausalLM"], "llama")
        weights = load_file(folder / "model.safetensors")
        assert text["vocab_size"] == weights["language_model.model.embed_tokens.weight"].shape[0]
        assert (config["vision_config"]["model_type"], config["vision_config"]["image_size"]) == (
            "clip_vision_model",
            24,
        )
        prefixes = {".".join(name.split(".")[:2]) for name in weights}
        assert prefixes == {
            "vision_tower.vision_model",
            "multi_modal_projector.linear_1",
            "multi_modal_projector.linear_2",
            "language_model.model",
            "language_model.lm_head",
        }
        assert str(tmp_path.parent) not in (folder / "config.json").read_text()
        template = (folder / "chat_template.jinja").read_text()
        assert "{{ 'A chat between" in template and "ASSISTANT:" in template


@pytest.mark.parametrize("layer", [-1, -2, 1])
def test_image_features_equal_the_models_own_and_skip_the_layers_above(model, layer):
    pixels, tower = torch.randn(3, 3, 24, 24), model.model.vision_tower
    model.config.vision_feature_layer = layer
    with torch.no_grad():
        theirs = torch.stack(list(model.get_image_features(pixels, return_dict=True).pooler_output))
        above = tower.encoder.layers[layer % 4 :]  # four hidden states of three layers
        for unused in above:
            unused.register_forward_hook(
                lambda *_: pytest.fail("a layer ran although its output is not used")
            )
        assert len(above) == {-1: 0, -2: 1, 1: 2}[layer]
        assert torch.equal(parts(model)["projector"](image_features(model, pixels)), theirs)


def test_pad_keeps_the_whole_picture_and_crop_the_middle(recipe):
    wide = Image.new("RGB", (48, 24), "red")
    wide.paste("blue", (12, 0, 36, 24))
    pixels = {
        how: load_processor(vflan.replace(recipe, image_aspect_ratio=how)).image_processor(
            wide, return_tensors="pt"
        )["pixel_values"][0]
        for how in ("pad", "crop")
    }
    assert pixels["pad"].shape == pixels["crop"].shape == (3, 24, 24)
    assert pixels["crop"].std(dim=(1, 2)).max() < 1e-5  # blue only
    assert (
        pixels["pad"][:, 0].abs().max() < 0.02
    )  # the bar above is CLIP's mean colour, that is zero
    assert pixels["pad"][0, 12, 0] > 1 > -1 > pixels["pad"][0, 12, 12]  # red edges, blue middle


def square(picture):
    """LLaVA's own padding: on a square of CLIP's mean colour, with the smaller half before it."""
    side = max(picture.size)
    canvas = Image.new("RGB", (side, side), (122, 116, 104))
    canvas.paste(picture, ((side - picture.width) // 2, (side - picture.height) // 2))
    return canvas


PICTURES = {
    "one row": ("RGB", (37, 1)),
    "one column": ("RGB", (1, 53)),
    "tall, odd rest": ("RGB", (20, 41)),
    "wide, even rest": ("RGB", (45, 21)),
    "square": ("RGB", (24, 24)),
    "smaller": ("RGB", (5, 3)),
    "large": ("RGB", (641, 480)),
    "palette": ("P", (31, 18)),
    "transparent": ("RGBA", (19, 30)),
    "grey with alpha": ("LA", (30, 19)),
    "print colours": ("CMYK", (25, 40)),
    "16 bits": ("I;16", (33, 22)),
}


@pytest.mark.parametrize("name", PICTURES)
@pytest.mark.parametrize("side", [24, 336])
def test_pictures_are_prepared_bit_for_bit_as_llava_does(recipe, tmp_path, name, side):
    from transformers import AutoProcessor, CLIPImageProcessorPil

    from vflan.data.images import read_picture

    clip = CLIPImageProcessorPil(
        size={"shortest_edge": side}, crop_size={"height": side, "width": side}
    )
    if side != 24:
        folder = copytree(recipe.vision_tower, tmp_path / "tower")
        clip.save_pretrained(folder)
        shape = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(shape | dict(image_size=side)))
        recipe = vflan.replace(recipe, vision_tower=str(folder))
    mode, size = PICTURES[name]
    noise = torch.Generator().manual_seed(7)
    if mode == "I;16":
        raw = (
            torch.randint(0, 2**16, (size[0] * size[1],), generator=noise).to(torch.uint16).numpy()
        )
        picture = Image.frombytes(mode, size, raw.tobytes())
    else:
        bands = len(Image.new(mode, (1, 1)).getbands())
        raw = torch.randint(
            0, 256, (size[0] * size[1] * bands,), generator=noise, dtype=torch.uint8
        )
        picture = Image.frombytes(mode, size, raw.numpy().tobytes())
    if mode == "P":
        picture.putpalette(bytes(range(256)) * 3)
    picture.save(path := tmp_path / ("picture.tif" if mode == "CMYK" else "picture.png"))
    picture = read_picture(path)
    for how, prepared in (("pad", square(picture)), ("crop", picture)):
        processor = load_processor(vflan.replace(recipe, image_aspect_ratio=how))
        processor.save_pretrained(tmp_path / how)
        again = AutoProcessor.from_pretrained(tmp_path / how, backend="pil")
        expected = clip(prepared, return_tensors="pt")["pixel_values"]
        assert expected.shape == (1, 3, side, side)
        for ours in (processor, again):
            assert type(ours.image_processor).__name__ == "LlavaImageProcessorPil"
            assert torch.equal(
                ours.image_processor(picture, return_tensors="pt")["pixel_values"], expected
            )


def test_pillow_prepares_pictures_also_where_torchvision_is_installed(
    recipe, monkeypatch, tmp_path
):
    from transformers.models.auto import image_processing_auto as auto

    backends, find = [], auto._load_backend_class
    monkeypatch.setattr(auto, "is_torchvision_available", lambda: True)
    monkeypatch.setattr(
        auto,
        "_load_backend_class",
        lambda name, kind, *a: backends.append(kind) or find(name, "pil", *a),
    )
    load_processor(recipe).save_pretrained(tmp_path / "model")
    (tmp_path / "done.json").write_text("{}")
    Run(tmp_path).processor()
    assert backends == ["pil"]


def test_a_model_made_for_other_backbones_is_refused_before_the_data_is_read(
    recipe, model, tmp_path
):
    load_processor(recipe, model)
    make_backbones(tmp_path, width=64, layers=3)
    other = vflan.replace(recipe, language_model=str(tmp_path / "language_model"))
    with pytest.raises(
        ValueError, match="width is 32, not 64 and the language model's depth is 2, not 3"
    ):
        load_processor(other, model)
    model.config.image_token_id = 7
    with pytest.raises(ValueError, match="id of <image> is 7, not 3"):
        load_processor(recipe, model)
    folder = copytree(recipe.vision_tower, tmp_path / "tower")
    shape = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(shape | dict(image_size=48)))
    with pytest.raises(ValueError, match="looks at 48 pixels a side, .* prepares 24"):
        load_processor(vflan.replace(recipe, vision_tower=str(folder)))


def test_a_source_without_a_model_is_refused_with_one_sentence(recipe, model, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    for folder, kind, sentence in (
        ("empty", FileNotFoundError, "empty has no config.json and so holds no model"),
        ("nowhere", FileNotFoundError, "nowhere: no such file or folder"),
        ("adapter", ValueError, "is a LoRA adapter, not a model; merge it"),
    ):
        with pytest.raises(kind, match=sentence):
            load_model(recipe, tmp_path / folder)
    with pytest.raises(ValueError, match="empty: no config.json could be read there"):
        load_processor(vflan.replace(recipe, vision_tower=str(tmp_path / "empty")))
    export(model, load_processor(recipe), recipe, tmp_path / "full")
    config = json.loads((tmp_path / "full" / "config.json").read_text())
    (tmp_path / "full" / "config.json").write_text(
        json.dumps(config | dict(vision_feature_select_strategy="full"))
    )
    with pytest.raises(ValueError, match="full is no LLaVA-1.5: .*'full'"):
        load_model(recipe, tmp_path / "full")


# The published sizes of the picture sides of CLIP ViT-L/14-336 and ViT-B/16, of LLaVA-1.5's
# projector, LLaMA-2 and SmolLM2-135M; of the mini world's tower and of smaller projectors our own.
PUBLISHED = {
    "smol": (1_104_320, 425_088, 134_515_008),
    "smol_real": (85_799_424, 775_296, 134_515_008),
    "qlora_7b": (303_507_456, 20_979_712, 6_738_415_616),
    "lora_7b": (303_507_456, 20_979_712, 6_738_415_616),
    "full_7b": (303_507_456, 20_979_712, 6_738_415_616),
    "full_13b": (303_507_456, 31_467_520, 13_015_864_320),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_presets_models_have_the_published_numbers_of_parameters(name, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for recipe in vflan.preset(name):
        model = meta_model(recipe)
        assert tuple(parameter_counts(model).values()) == PUBLISHED[name] and list(
            parameter_counts(model)
        ) == list(PARTS)
        patches = {"smol": 16, "smol_real": 196}.get(name, 576)
        assert model.config.image_seq_length == patches and model.device.type == "meta"


@pytest.mark.parametrize("size, adapters", [("7b", 319.8e6), ("13b", 500.7e6)])
def test_lora_has_as_many_parameters_as_in_llava(size, adapters):
    lora, full = vflan.preset("lora_7b").base, vflan.preset(f"full_{size}").base
    recipe = vflan.replace(full, lora_r=lora.lora_r, lora_alpha=lora.lora_alpha)
    assert (recipe.lora_r, recipe.lora_alpha) == (128, 256)
    model = meta_model(recipe)
    freeze(model, recipe)
    learning = sum(
        w.numel() for n, w in model.named_parameters() if w.requires_grad and "projector" not in n
    )
    assert learning == pytest.approx(adapters, abs=0.05e6)


def test_parameters_are_counted_from_the_shapes_in_a_folder(recipe, model):
    assert parameter_counts(meta_model(recipe)) == parameter_counts(model)


def test_a_tokenizer_without_the_image_token_gets_one_that_is_never_generated(recipe, tmp_path):
    folder = copytree(recipe.language_model, tmp_path / "plain")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_text(
            (folder / name)
            .read_text()
            .replace("<image>", "<other>")
            .replace('"image_token"', '"other_token"')
        )
    model = load_model(vflan.replace(recipe, language_model=str(folder)))
    head, size = (
        model.lm_head.weight,
        json.loads((folder / "config.json").read_text())["vocab_size"],
    )
    assert model.config.image_token_id == size and head.shape[0] == size + 1
    logits = head @ torch.randn(head.shape[1], 50)
    assert (logits.argmax(dim=0) < size).all()


def test_swap_part_takes_exactly_one_part(recipe, model):
    other = load_model(vflan.replace(recipe, seed=1))
    with torch.no_grad():
        other.lm_head.weight += 1
    before, theirs = fingerprints(model), fingerprints(other)
    swapped = fingerprints(vflan.swap_part(model, "projector", other))
    assert swapped["projector"] == theirs["projector"] != before["projector"]
    assert swapped["language_model"] == before["language_model"] != theirs["language_model"]
    assert fingerprints(vflan.swap_part(model, "language_model", other)) == theirs
    with pytest.raises(ValueError, match="vision_tower, projector, language_model"):
        vflan.swap_part(model, "mlp", other)


def test_a_causal_language_model_can_be_swapped_in(recipe, model):
    from transformers import AutoModelForCausalLM

    language = AutoModelForCausalLM.from_pretrained(recipe.language_model)
    with torch.no_grad():
        language.model.norm.weight += 1
    vflan.swap_part(model, "language_model", language)
    assert torch.equal(model.model.language_model.norm.weight, language.model.norm.weight)


@pytest.mark.parametrize(
    "name, content",
    [
        ("model.safetensors", b"\xff" * 100),
        ("processor_config.json", b'{"a": '),
        ("tokenizer.json", b"\xb7"),
        (
            "config.json",
            b'{"model_type": "llava",'
            b' "text_config": {"model_type": "llama", "vocab_size": "many"}}',
        ),
        ("tokenizer.json", None),
        ("model.safetensors", None),
    ],
)
def test_a_damaged_run_is_refused_in_a_sentence(recipe, tmp_path, name, content):
    """Each library has an error of its own for a truncated file (bench.bad_input)."""
    run = Run(tmp_path / "run")
    run.folder.mkdir()
    write_json(run.folder / "recipe.json", recipe.to_dict())
    export(load_model(recipe), load_processor(recipe), recipe, run.folder / "model")
    write_json(run.folder / "done.json", {"steps": 1})
    (run.folder / "model" / name).write_bytes(content) if content else (
        run.folder / "model" / name
    ).unlink()
    with pytest.raises(
        (ValueError, OSError), match="cannot be read|no config.json|lacks"
    ) as trouble:
        run.processor()
        run.load_model()
    assert "vflan" in str(trouble.traceback[-1].path) and "\n" not in str(trouble.value)


def test_a_damaged_json_of_a_run_is_named(tmp_path):
    for name in ("recipe.json", "metrics.jsonl"):
        (tmp_path / name).write_bytes(b"{\xb7")
    with pytest.raises(ValueError, match="recipe.json is damaged"):
        Run(tmp_path).recipe  # noqa: B018
    with pytest.raises(ValueError, match="metrics.jsonl is damaged"):
        Run(tmp_path).metrics()


def test_code_that_comes_with_a_model_is_not_run(recipe, tmp_path, backbones):
    """`trust_remote_code` is off, also where a person could be asked."""
    folder = tmp_path / "with_code"
    copytree(backbones["language_model"], folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {
        "model_type": "mine",
        "auto_map": {"AutoConfig": "own.Mine", "AutoModelForCausalLM": "own.Mine"},
    }
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "own.py").write_text(
        f"open({str(tmp_path / 'ran')!r}, 'w').write('x')\nclass Mine: pass\n"
    )
    with pytest.raises(ValueError):
        load_model(vflan.replace(recipe, language_model=str(folder)))
    assert not (tmp_path / "ran").exists()
