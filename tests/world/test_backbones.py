"""The shipped stand-ins for CLIP and Vicuna: what they are, what they can do, and how the language
model was taught.
"""

import json

import pytest
import torch
from transformers import CLIPVisionModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from vflan.config import ROOT, preset
from vflan.models.llava import fitting_projector
from vflan.world import WORLDS
from vflan.world import language_model as L
from vflan.world import scene as W
from vflan.world import tasks as T
from vflan.world.words import describe

FOLDER = ROOT / "data" / "tiny"


@pytest.fixture(scope="module")
def tokenizer():
    return PreTrainedTokenizerFast.from_pretrained(FOLDER / "language_model")


@pytest.fixture(scope="module")
def model():
    return LlamaForCausalLM.from_pretrained(FOLDER / "language_model", dtype=torch.float32).eval()


def small(tokenizer):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=336,
        num_hidden_layers=3,
        num_attention_heads=4,
        tie_word_embeddings=True,
        attn_implementation="eager",
        rope_parameters={"rope_type": "default", "rope_theta": 1e5},
    )
    return LlamaForCausalLM(config).eval()


def test_the_shipped_projector_fits_was_trained_on_other_pictures_and_converged():
    stage = preset("tiny").projector
    projector = fitting_projector(stage.pretrained, vision=160, text=128)
    record = json.loads((FOLDER / "backbones.json").read_text())["projector"]
    assert sum(weight.numel() for weight in projector.values()) == record["parameters"]
    assert record["captions"] * record["epochs"] / 16 == record["steps"]
    assert record["seed"] not in {world.get("seed", 0) for world in WORLDS.values()}
    losses = record["losses"]
    assert losses[-1] < losses[0] / 8 and min(losses[:10]) > 1.5 * max(losses[-5:])


def test_the_shipped_files_are_small_safetensors_of_the_right_classes(model):
    parts = ("vision_tower", "language_model", "projector")
    files = [p for part in parts for p in (FOLDER / part).iterdir()]
    assert sum(p.stat().st_size for p in files) < 25e6
    assert not [p for p in files if p.suffix in (".bin", ".pt", ".pkl")]
    assert isinstance(CLIPVisionModel.from_pretrained(FOLDER / "vision_tower"), CLIPVisionModel)


def test_the_tokenizer_gives_every_word_of_the_world_one_piece_and_loses_no_text(tokenizer):
    for kind in T.KINDS.values():
        for scene, instruction, answer in T.sample(kind, 3, "pieces"):
            text = f"USER: {describe(scene)}\n{instruction} ASSISTANT: {answer}"
            ids = tokenizer(text, add_special_tokens=False).input_ids
            assert tokenizer.decode(ids) == text
            words = [w.strip("?.,!") for w in answer.split()]
            assert all(
                len(tokenizer(w, add_special_tokens=False).input_ids) == 1 for w in words if w
            ), answer
    odd = "Ägypten 12345 \u4f60\u597d"
    assert tokenizer.decode(tokenizer(odd, add_special_tokens=False).input_ids) == odd
    assert len(tokenizer(L.SYSTEM, add_special_tokens=False).input_ids) == 1


def test_the_start_gathers_the_five_words_before_a_full_stop(tokenizer):
    model = small(tokenizer)
    L.start(model, tokenizer)
    ids = tokenizer(
        "sand clear. b2 small striped red star. c4 large plain blue circle.", return_tensors="pt"
    ).input_ids
    at = (ids[0] == tokenizer.convert_tokens_to_ids(".")).nonzero().flatten()[-1]
    with torch.no_grad():
        attention = model(ids, output_attentions=True).attentions[0][0, :, at]
    assert (attention[:, at - 5 : at].sum(-1) > 0.85).all()
    assert (attention[:, at - 5 : at].min(-1).values > 0.05).all()


def test_a_question_in_a_row_sees_the_text_and_itself_only(model, tokenizer):
    rows = L.Rows(tokenizer)
    scene, instruction, answer = T.sample(T.KINDS["color_of"], 1, "block")[0]
    text = [*rows.head, *rows.ids(describe(scene))]
    block = (rows.question(instruction), rows.ids(answer))
    other = (rows.question("How many objects are in the picture?"), rows.ids("two"))
    with torch.no_grad():
        logits = []
        for blocks in ([block], [other, block]):
            ids, positions, mask, where, _, _ = rows.batch([(text, blocks)])
            logits.append(L.logits_at(model, ids, positions, mask, where)[-1])
        plain = model(torch.tensor([text + block[0]])).logits[0, -1]
    assert torch.allclose(logits[0], logits[1], atol=1e-4) and torch.allclose(
        logits[0], plain, atol=1e-4
    )


def test_muon_steps_in_an_orthogonal_direction():
    torch.manual_seed(0)
    weight = torch.nn.Parameter(torch.zeros(16, 48))
    weight.grad = torch.randn(16, 48) @ torch.diag(torch.logspace(0, -2, 48))
    L.Muon([weight], lr=1.0, weight_decay=0.0).step()
    values = torch.linalg.svdvals(weight.detach())
    assert values.max() < 1.35 and values.median() > 0.5


def test_no_text_lesson_shows_a_scene_that_is_set_aside():
    assert not any(W.held(L.text_scene(W.rng_of("lesson", i), 0)) for i in range(500))


def test_lessons_never_ask_what_is_new_in_both(tokenizer):
    rows, weights = L.Rows(tokenizer), dict.fromkeys(T.KINDS, 1.0)
    questions = ""
    for i in range(60):
        for question, _ in L.lesson(rows, W.rng_of("new", i), weights, 0, 224)[1]:
            questions += tokenizer.decode(question)
    for words in (
        "Is there anything at",
        "Is the red object small",
        "Describe the red object",
        "the object at b2.",
    ):
        assert words not in questions
    assert "What is the color of" in questions


def test_the_record_tells_seed_time_and_every_skill():
    record = json.loads((FOLDER / "backbones.json").read_text())
    assert {"seed", "cpu_seconds", "skills"} <= set(record["vision_tower"]) & set(
        record["language_model"]
    )
    assert set(record["language_model"]["skills"]) == set(T.KINDS)


def test_the_language_model_still_has_the_recorded_skills(model, tokenizer):
    record = json.loads((FOLDER / "backbones.json").read_text())["language_model"]["skills"]
    kinds = [T.KINDS[k] for k in ("color_of", "exist_shape", "shape_at", "count_all", "bar_value")]
    skill = L.grade(model, L.Rows(tokenizer), L.exam(tokenizer, L.Rows(tokenizer), 40, kinds=kinds))
    for k, v in skill.items():
        assert v > record[k] - 0.15, k
