"""The second language model of Table 7: the ancestry of the first, another manner, and a language
model of text alone.
"""

import shutil

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from vflan.world import language_model
from vflan.world.backbones import FOLDER
from vflan.world.tasks import KINDS


def test_a_few_steps_make_another_model_of_the_same_shape(tmp_path, monkeypatch):
    shutil.copytree(FOLDER / "language_model", tmp_path / "language_model")
    monkeypatch.setattr(language_model, "skills", lambda *_, **__: {})
    record = language_model.make_second_language_model(tmp_path, steps=2, log=lambda *_, **__: None)
    one, two = (
        AutoModelForCausalLM.from_pretrained(tmp_path / name, dtype=torch.float32).state_dict()
        for name in ("language_model", "second_language_model")
    )
    assert {name: w.shape for name, w in one.items()} == {name: w.shape for name, w in two.items()}
    assert any(not torch.equal(one[name], two[name]) for name in one)
    assert record["steps"] == 2


def test_the_first_can_be_made_from_nothing(tmp_path, monkeypatch):
    shutil.copytree(FOLDER / "language_model", tmp_path / "language_model")
    monkeypatch.setattr(language_model, "skills", lambda *_, **__: {})
    monkeypatch.setattr(language_model, "exam", lambda *_, **__: [])
    record = language_model.make_language_model(tmp_path, steps=(1, 2, 3), rows_a_step=2)
    assert record["steps"] == 3 and record["answer_tokens"] > 0


def test_it_answers_in_sentences_but_gives_a_letter_where_a_letter_is_asked_for():
    say = language_model.in_a_sentence
    assert say(KINDS["color_of"], "red") == "The picture shows red."
    assert say(KINDS["exist_shape"], "no") == "no, I cannot see that."
    assert say(KINDS["choose_color"], "b") == "b"


def test_the_shipped_one_talks_where_the_first_is_terse():
    tokenizer = AutoTokenizer.from_pretrained(FOLDER / "language_model")
    question = "sand clear. b2 small striped red star.\nWhat is the color of the star?"
    prompt = f"{language_model.SYSTEM} USER: {question} ASSISTANT:"
    answers = {}
    for name in ("language_model", "second_language_model"):
        model = AutoModelForCausalLM.from_pretrained(FOLDER / name, dtype=torch.float32)
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        out = model.generate(input_ids=ids, max_new_tokens=12, do_sample=False)
        answers[name] = tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True).strip()
    assert answers == {"language_model": "red", "second_language_model": "The picture shows red."}
