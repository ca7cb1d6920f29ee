"""A model of others is evaluated as a run of ours is: the same questions, its own processor."""

import json

import pandas as pd
import pytest
import torch
from tiny_model import make_tiny, write_pope

import vflan
from vflan.data.conversation import IMAGE_TOKEN_INDEX, prompt_ids
from vflan.evaluation.released_model import ReleasedModel
from vflan.models.weights import to_llava


@pytest.fixture
def run(recipe):
    return vflan.train(recipe)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder of benchmarks with twelve POPE questions; what is written goes beside it."""
    monkeypatch.setenv("VFLAN_HOME", str(tmp_path / "home"))
    make_tiny(tmp_path)
    write_pope(tmp_path / "benchmarks", tmp_path)
    return tmp_path / "benchmarks"


def values(scores):
    return scores.drop(columns=["run", "seed"]).reset_index(drop=True)


def test_an_exported_folder_scores_as_the_run_it_came_from(run, folder, tmp_path):
    exported = run.export(tmp_path / "my model")
    scores = vflan.evaluate(str(exported), ["pope"], folder)
    pd.testing.assert_frame_equal(values(scores), values(vflan.evaluate(run, ["pope"], folder)))
    assert set(scores.run) == {"my-model"}
    home = ReleasedModel(str(exported)).folder
    assert home.name == "my-model" and (home / "answers" / "pope.jsonl").is_file()
    assert sorted(path.name for path in exported.iterdir() if path.name == "answers") == []


def test_a_folder_in_llavas_own_layout_scores_the_same(run, folder, tmp_path):
    model, layout = run.load_model(), tmp_path / "llava-v1.5-tiny"
    run.processor().tokenizer.save_pretrained(layout)
    torch.save(to_llava(model.state_dict()), layout / "pytorch_model.bin")
    config = model.config.text_config.to_dict()
    config |= dict(model_type="llava_llama", mm_projector_type="mlp2x_gelu")
    config |= dict(mm_vision_tower=run.recipe.vision_tower, mm_vision_select_layer=-2)
    config |= dict(image_aspect_ratio=run.recipe.image_aspect_ratio)
    (layout / "config.json").write_text(json.dumps(config))
    scores = vflan.evaluate(layout, ["pope"], folder)
    pd.testing.assert_frame_equal(values(scores), values(vflan.evaluate(run, ["pope"], folder)))


def test_a_model_with_another_chat_template_is_asked_in_its_own(run, tmp_path):
    exported = run.export(tmp_path / "other")
    template = "{% for m in messages %}[{{ m.role }}]{% for c in m.content %}"
    template += "{{ '<image>' if c.type == 'image' else c.text }}{% endfor %}{% endfor %}[reply]"
    (exported / "chat_template.jinja").write_text(template)
    model = ReleasedModel(str(exported))
    tokenizer = model.processor().tokenizer
    assert model.template == "own"
    ids = prompt_ids("What?", tokenizer, "own")
    where = ids.index(IMAGE_TOKEN_INDEX)
    assert tokenizer.decode(ids[:where]).endswith("[user]")
    assert tokenizer.decode(ids[where + 1 :]) == "What?[reply]"


def test_training_can_begin_from_a_folder_of_others(run, recipe, tmp_path):
    exported = run.export(tmp_path / "theirs")
    more = vflan.train(vflan.replace(recipe, name="more"), init=str(exported))
    again = vflan.train(vflan.replace(recipe, name="again"), init=run)
    assert more.summary["parts"] == again.summary["parts"]


def test_a_name_that_is_nothing_is_refused_in_a_sentence(folder, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for name in ("nothing", "runs/tiny/nothing", str(folder)):
        with pytest.raises(FileNotFoundError, match="no such file or folder|no config.json"):
            vflan.evaluate(name, ["pope"], folder)


def test_a_picture_length_that_config_json_lacks_is_computed(run, tmp_path):
    exported = run.export(tmp_path / "theirs")
    config = json.loads((exported / "config.json").read_text())
    length = config.pop("image_seq_length")
    (exported / "config.json").write_text(json.dumps(config))
    model = ReleasedModel(str(exported)).load_model()
    assert model.config.image_seq_length == length != 576
