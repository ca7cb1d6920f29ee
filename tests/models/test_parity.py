"""vflan computes what LLaVA computes.

The reference model has LLaVA's arithmetic and parameter names, written out by hand.
"""

import json
import zipfile
from pathlib import Path
from shutil import copytree

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import vflan
from vflan.data.conversation import IGNORE_INDEX, IMAGE_TOKEN_INDEX, SYSTEM, encode, expand
from vflan.models.llava import export, fingerprint, freeze, load_model, load_processor, parts
from vflan.models.weights import from_llava, read_projector, save_projector, to_llava
from vflan.training.run import Run

SEEN, TEXT = ("<image>\nWhat color is it?", "a red square"), ("What is a square?", "a grey one")


class Reference(nn.Module):
    """A random LLaVA-1.5 of the recipe's shapes, of plain modules, without any code of vflan."""

    def __init__(self, recipe):
        from transformers import AutoConfig, CLIPVisionModel, LlamaForCausalLM

        super().__init__()
        torch.manual_seed(3)
        vision, text = (
            AutoConfig.from_pretrained(recipe.vision_tower),
            AutoConfig.from_pretrained(recipe.language_model),
        )
        llama = LlamaForCausalLM(text)
        self.model, self.lm_head = llama.model, llama.lm_head
        width = text.hidden_size
        self.model.mm_projector = nn.Sequential(
            nn.Linear(vision.hidden_size, width), nn.GELU(), nn.Linear(width, width)
        )
        self.model.vision_tower = nn.ModuleDict(
            {"vision_tower": nn.ModuleDict({"vision_model": CLIPVisionModel(vision)})}
        )
        for weight in self.parameters():  # every weight matters, biases and norms too
            nn.init.normal_(weight, std=0.2)
        self.requires_grad_(False).eval()

    def forward(self, ids, pixels):
        """Logits (positions, vocabulary), with the picture's features in place of the one -200."""
        embeds = [
            self.model.embed_tokens(torch.tensor([token]))
            for token in ids
            if token != IMAGE_TOKEN_INDEX
        ]
        if IMAGE_TOKEN_INDEX in ids:
            tower = self.model.vision_tower["vision_tower"]["vision_model"]
            hidden = tower(pixels[None], output_hidden_states=True).hidden_states[-2][0, 1:]
            embeds.insert(ids.index(IMAGE_TOKEN_INDEX), self.model.mm_projector(hidden))
        return self.lm_head(self.model(inputs_embeds=torch.cat(embeds)[None]).last_hidden_state[0])


def reference_row(tokenizer, question, answer):
    """Ids and labels as LLaVA makes them.

    The text before and after the picture is tokenised separately; only the answer is learned.
    """
    prompt = f"{SYSTEM} USER: {question} ASSISTANT:"
    chunks = [
        tokenizer(chunk, add_special_tokens=False).input_ids
        for chunk in f"{prompt} {answer}</s>".split("<image>")
    ]
    ids = [
        tokenizer.bos_token_id,
        *chunks[0],
        *(t for chunk in chunks[1:] for t in (IMAGE_TOKEN_INDEX, *chunk)),
    ]
    learned = len(tokenizer(f" {answer}</s>".strip(), add_special_tokens=False).input_ids)
    return ids, [IGNORE_INDEX] * (len(ids) - learned) + ids[len(ids) - learned :]


@pytest.fixture
def reference(recipe):
    return Reference(recipe)


@pytest.fixture(
    params=["pytorch_model.bin", "model.safetensors", "two shards", "without the tower"]
)
def folder(request, reference, recipe, tmp_path):
    """The reference in a folder as LLaVA's code writes it."""
    path = tmp_path / "llava"
    path.mkdir()
    return write(path, reference, recipe, request.param)


def write(path, reference, recipe, how="model.safetensors", **changes):
    config = json.loads((Path(recipe.language_model) / "config.json").read_text())
    config |= dict(
        model_type="llava_llama",
        architectures=["LlavaLlamaForCausalLM"],
        mm_vision_tower="openai/clip",
    )
    config |= dict(
        mm_projector_type="mlp2x_gelu", mm_vision_select_layer=-2, mm_vision_select_feature="patch"
    )
    (path / "config.json").write_text(
        json.dumps(config | dict(mm_hidden_size=32, mm_use_im_start_end=False) | changes)
    )
    weights = {name: weight.clone() for name, weight in reference.state_dict().items()}
    if how == "without the tower":
        weights = {name: weight for name, weight in weights.items() if "vision_tower" not in name}
        reference.model.vision_tower["vision_tower"]["vision_model"].save_pretrained(path / "tower")
    else:  # old folders hold tables that are computed today
        weights["model.vision_tower.vision_tower.vision_model.embeddings.position_ids"] = (
            torch.arange(5)[None]
        )
        weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    if how == "two shards":
        names = sorted(weights)
        shards = {
            "pytorch_model-00001-of-00002.bin": names[::2],
            "pytorch_model-00002-of-00002.bin": names[1::2],
        }
        for file, mine in shards.items():
            torch.save({name: weights[name] for name in mine}, path / file)
        where = {name: file for file, mine in shards.items() for name in mine}
        (path / "pytorch_model.bin.index.json").write_text(
            json.dumps(dict(metadata={}, weight_map=where))
        )
    elif how == "pytorch_model.bin":
        torch.save(weights, path / how)
    else:
        save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    return path


def backbones_of(recipe, folder):
    tower = folder / "tower"
    return vflan.replace(recipe, vision_tower=str(tower)) if tower.is_dir() else recipe


@torch.no_grad()
def test_a_llava_checkpoint_gives_llavas_logits_losses_and_greedy_tokens(
    recipe, reference, folder, tmp_path
):
    if (tower := folder / "tower").is_dir():
        tower.joinpath("preprocessor_config.json").write_bytes(
            (Path(recipe.vision_tower) / "preprocessor_config.json").read_bytes()
        )
    recipe = backbones_of(recipe, folder)
    model = load_model(recipe, folder)
    tokenizer = load_processor(recipe, model).tokenizer
    pixels = torch.randn(3, 24, 24)
    for question, answer in (SEEN, TEXT):
        ids, labels = reference_row(tokenizer, question, answer)
        assert (ids, labels) == encode(
            [{"from": "human", "value": question}, {"from": "gpt", "value": answer}], tokenizer
        )
        theirs = reference(ids, pixels)
        wide, wide_labels = expand(ids, labels, 4, model.config.image_token_id)
        seen = dict(pixel_values=pixels[None]) if "<image>" in question else {}
        ours = model(input_ids=torch.tensor([wide]), labels=torch.tensor([wide_labels]), **seen)
        assert (ours.logits[0] - theirs).abs().max() < 1e-5 < theirs.std() / 100
        loss = nn.functional.cross_entropy(
            theirs[:-1], torch.tensor(wide_labels[1:]), ignore_index=IGNORE_INDEX
        )
        assert ours.loss.item() == pytest.approx(loss.item(), abs=1e-5)

        prompt = ids[: labels.index(ids[len(ids) - sum(label >= 0 for label in labels)])]
        answer_ids = []
        for _ in range(6):
            answer_ids.append(reference(prompt + answer_ids, pixels)[-1].argmax().item())
        start, _ = expand(prompt, prompt, 4, model.config.image_token_id)
        again = model.generate(
            torch.tensor([start]), max_new_tokens=6, min_new_tokens=6, eos_token_id=-1, **seen
        )
        assert again[0, len(start) :].tolist() == answer_ids


def test_llavas_names_are_read_and_written_without_loss(recipe, reference):
    model, theirs = load_model(recipe), reference.state_dict()
    ours = from_llava(theirs)
    assert set(ours) == set(model.state_dict())
    assert all(
        torch.equal(weight, theirs[name]) for name, weight in to_llava(ours).items()
    ) and len(ours) == len(theirs)
    for rename, name in ((from_llava, "image_newline"), (to_llava, "model.layers.0.weight")):
        with pytest.raises(ValueError, match=f"{name}: LLaVA-1.5 has no such weight"):
            rename({name: torch.ones(1)})


def test_a_shard_that_is_missing_is_named_as_missing_weights(recipe, reference, tmp_path):
    (tmp_path / "llava").mkdir()
    folder = write(tmp_path / "llava", reference, recipe, "two shards")
    (folder / "pytorch_model-00002-of-00002.bin").unlink()
    with pytest.raises(ValueError, match="projector|is a file of it missing|lacks"):
        load_model(recipe, folder)
    # With the projector whole, it is the tower that lacks weights, and not its shape that is wrong.
    weights = torch.load(folder / "pytorch_model-00001-of-00002.bin")
    weights |= {k: w for k, w in reference.state_dict().items() if "mm_projector" in k}
    torch.save(weights, folder / "pytorch_model-00001-of-00002.bin")
    with pytest.raises(ValueError, match="without .* of its weights .*is a file of it missing"):
        load_model(recipe, folder)


def test_a_stage_can_begin_from_llavas_projector_file(recipe, reference, tmp_path):
    theirs = reference.model.mm_projector.state_dict()
    (tmp_path / "pretrained").mkdir()
    file = tmp_path / "pretrained" / "mm_projector.bin"
    torch.save(
        {f"model.mm_projector.{name}": weight.bfloat16() for name, weight in theirs.items()}, file
    )
    (tmp_path / "pretrained" / "config.json").write_text('{"mm_vision_tower": "openai/clip"}')
    fresh = load_model(recipe)
    for source in (
        file,
        file.parent,
    ):  # the file, or the folder that LLaVA's own pre-training leaves
        model = load_model(recipe, source)
        assert torch.equal(
            parts(model)["projector"].linear_2.bias, theirs["2.bias"].bfloat16().float()
        )
        assert torch.equal(
            parts(model)["projector"].linear_1.weight, theirs["0.weight"].bfloat16().float()
        )
        for part in ("vision_tower", "language_model"):
            assert fingerprint(parts(model)[part]) == fingerprint(parts(fresh)[part])
    save_projector(model, tmp_path / "again.bin")
    stored = torch.load(tmp_path / "again.bin", weights_only=True)
    assert {name.removeprefix("model.mm_projector."): w.shape for name, w in stored.items()} == {
        name: w.shape for name, w in theirs.items()
    }
    assert zipfile.is_zipfile(tmp_path / "again.bin") and not list(tmp_path.glob(".again*"))
    assert fingerprint(read_projector(tmp_path / "again.bin").items()) == fingerprint(
        parts(model)["projector"]
    )


def test_training_starts_from_a_projector_file_and_remembers_which(recipe, tmp_path):
    save_projector(load_model(vflan.replace(recipe, seed=5)), tmp_path / "mm_projector.bin")
    start = read_projector(tmp_path / "mm_projector.bin")
    still = vflan.replace(recipe, max_steps=1, lr=0, tune=("projector",))
    run = vflan.train(still, init=tmp_path / "mm_projector.bin")
    assert run.summary["parts"]["projector"] == fingerprint(start.items())
    assert vflan.train(still, init=str(tmp_path / "mm_projector.bin")) == run
    assert fingerprint(read_projector(run).items()) == fingerprint(
        read_projector(run.folder / "model").items()
    )
    four = vflan.replace(
        still, name="four", bits=4, lora_r=4, lora_alpha=8, tune=("projector", "language_model")
    )
    run = vflan.train(
        four, init=tmp_path / "mm_projector.bin"
    )  # written in 16 bits on what it began with
    assert run.summary["parts"]["projector"] == fingerprint(start.items())
    save_projector(load_model(recipe), tmp_path / "mm_projector.bin")
    with pytest.raises(ValueError, match="init_weights"):
        vflan.train(still, init=tmp_path / "mm_projector.bin")


def test_a_llava_checkpoint_can_be_quantised_tuned_and_exported(recipe, reference, tmp_path):
    (tmp_path / "llava").mkdir()
    source = write(tmp_path / "llava", reference, recipe)
    four = vflan.replace(recipe, bits=4, lora_r=4, lora_alpha=8)
    model = load_model(four, source)
    freeze(model, four)
    export(model, load_processor(four, model), four, tmp_path / "out", source)
    merged = load_model(recipe, tmp_path / "out").state_dict()
    assert all(
        torch.allclose(merged[name], weight)
        for name, weight in from_llava(reference.state_dict()).items()
    )


def test_a_projector_of_another_width_is_refused_before_anything_is_loaded(
    recipe, monkeypatch, tmp_path
):
    theirs = nn.Sequential(nn.Linear(32, 80), nn.GELU(), nn.Linear(80, 80)).state_dict()
    torch.save(
        {f"model.mm_projector.{name}": weight for name, weight in theirs.items()},
        tmp_path / "wide.bin",
    )
    monkeypatch.setattr(
        "vflan.models.weights.load_pretrained", lambda *a, **k: pytest.fail("weights were loaded")
    )
    with pytest.raises(
        ValueError,
        match=r"wide.bin joins a tower of width 32 to a .* width 80, but .* have 32 and 32",
    ):
        load_model(recipe, tmp_path / "wide.bin")


class Harm:
    """A pickle that would make a file when it is loaded."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


def test_a_bad_projector_file_is_refused_and_its_code_is_not_run(recipe, tmp_path):
    torch.save({"model.mm_projector.0.weight": Harm(tmp_path / "harm")}, tmp_path / "code.bin")
    torch.save([torch.ones(1)], tmp_path / "list.bin")
    (tmp_path / "empty.bin").write_bytes(b"")
    (tmp_path / "page.bin").write_text("<html>not found</html>")
    (tmp_path / "page.safetensors").write_text("<html>not found</html>")
    for name in ("code.bin", "list.bin", "empty.bin", "page.bin", "page.safetensors"):
        with pytest.raises(
            ValueError, match=rf"{name} is damaged, or holds more than weights .*download it again"
        ):
            load_model(recipe, tmp_path / name)
    assert not (tmp_path / "harm").exists()
    torch.save({"model.mm_projector.weight": torch.ones(32, 32)}, tmp_path / "linear.bin")
    torch.save({"model.norm.weight": torch.ones(32)}, tmp_path / "none.bin")
    for name, holds in (("linear.bin", "weight"), ("none.bin", "no projector")):
        with pytest.raises(
            ValueError, match=f"{name} holds {holds}; LLaVA-1.5's projector is two layers"
        ):
            load_model(recipe, tmp_path / name)


def test_other_kinds_of_llava_are_refused(recipe, reference, tmp_path):
    (tmp_path / "llava").mkdir()
    for changes, reason in (
        (dict(mm_vision_select_layer=-1), "mm_vision_select_layer': -1"),
        (dict(mm_patch_merge_type="spatial_unpad"), "spatial_unpad"),
        (dict(model_type="llava_mistral"), "llava_mistral"),
    ):
        source = write(tmp_path / "llava", reference, recipe, **changes)
        with pytest.raises(ValueError, match=f"is no LLaVA-1.5 on a Llama: .*{reason}"):
            load_model(recipe, source)
    source = write(tmp_path / "llava", reference, recipe)
    other = vflan.replace(
        recipe, vision_tower=str(copytree(recipe.vision_tower, tmp_path / "tower"))
    )
    shape = json.loads((tmp_path / "tower" / "config.json").read_text())
    weights = load_file(tmp_path / "tower" / "model.safetensors")
    weights["embeddings.position_embedding.weight"] = torch.zeros(17, 32)
    save_file(weights, tmp_path / "tower" / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "tower" / "config.json").write_text(json.dumps(shape | dict(image_size=48)))
    with pytest.raises(
        ValueError, match="llava brings a vision tower that is not of .*tower's shape"
    ):
        load_model(other, source)


def test_load_model_takes_a_run_or_its_folder(recipe):
    run = vflan.train(vflan.replace(recipe, max_steps=1))
    assert isinstance(run, Run)
    assert fingerprint(load_model(recipe, run)) == fingerprint(
        load_model(recipe, run.folder / "model")
    )
