import dataclasses
import json
import re

import pytest

import vflan
from vflan.config import ROOT, Recipe, differences, for_seed, preset_names, resolve, weights_source


def test_every_preset_gives_the_three_stages_in_order():
    for name in preset_names():
        assert [recipe.stage for recipe in vflan.preset(name)] == ["projector", "base", "chat"], (
            name
        )


def test_the_13b_preset_holds_the_papers_values():
    projector, base, chat = vflan.preset("full_13b")
    assert (
        projector.lr,
        projector.global_batch,
        projector.template,
        projector.image_aspect_ratio,
    ) == (1e-3, 256, "plain", "crop")
    assert (base.lr, base.global_batch, base.epochs, base.image_aspect_ratio) == (
        2e-5,
        128,
        1,
        "pad",
    )
    assert (chat.lr, chat.global_batch, chat.max_steps, chat.num_samples) == (1e-5, 64, 128, 1000)
    assert projector.tune == ("projector",) and base.tune == chat.tune == (
        "projector",
        "language_model",
    )


def test_changes_reach_all_three_stages():
    assert [recipe.seed for recipe in vflan.preset("tiny", seed=7)] == [7, 7, 7]


def test_an_unknown_field_is_refused_with_the_closest_name():
    with pytest.raises(ValueError, match="'learning_rate'.*closest is"):
        vflan.preset("tiny", learning_rate=1)
    with pytest.raises(ValueError, match="closest is 'max_steps'"):
        vflan.replace(vflan.preset("tiny").base, max_step=4)


def test_an_unknown_preset_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match="full_13b.*tiny"):
        vflan.preset("huge")


def test_a_preset_may_be_a_users_own_file(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(
        "from vflan.presets.tiny import preset as tiny\ndef preset():\n    return tiny()\n"
    )
    assert vflan.preset(str(path), max_steps=4).chat.max_steps == 4


@pytest.mark.parametrize(
    "change",
    [
        {"bits": 5},
        {"lr": -1},
        {"lr": "1e-3"},
        {"stage": "sft"},
        {"tune": ("vision_tower",)},
        {"tune": ()},
        {"global_batch": 0},
        {"max_steps": 1.5},
        {"name": "a/b"},
        {"bits": 4},  # tunes the language model without LoRA
        {"lora_r": 8},  # without lora_alpha
        {"max_steps": True},
    ],
)
def test_an_impossible_value_is_refused_with_one_sentence(change):
    with pytest.raises(ValueError) as error:
        vflan.replace(vflan.preset("tiny").base, **change)
    assert next(iter(change)) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "change",
    [
        {"tune": None},
        {"tune": [1]},
        {"exclude": {"faces": 1}},
        {"samples": 5},
        {"feature_cache": 1},
        {"name": "a\0b"},
        {"images": "\ud83d"},
        {"lr": float("inf")},
        {"lr": float("nan")},
        {"max_steps": 10**30},
        {"packing": []},
        {"lr": "2e-5"},
    ],
)
def test_a_value_of_the_wrong_type_is_refused_by_its_name(change):
    with pytest.raises(ValueError, match=f"^{next(iter(change))}=.*is needed.$"):
        vflan.replace(vflan.preset("tiny").base, **change)


@pytest.mark.parametrize(
    "text, sentence",
    [
        ("preset = 3", "defines no preset"),
        ("preset(", "cannot be run: SyntaxError"),
        ("import does_not_exist", "cannot be run: ModuleNotFoundError"),
        ("def preset(): 1 / 0", "fails: ZeroDivisionError"),
        ("def preset(): return [1, 2, 3]", "must return three recipes"),
        ("def preset(): return ()", "must return three recipes"),
    ],
)
def test_a_bad_preset_file_is_refused_with_one_sentence(tmp_path, text, sentence):
    (tmp_path / "mine.py").write_text(text)
    with pytest.raises(ValueError, match=sentence):
        vflan.preset(str(tmp_path / "mine.py"))


def test_changes_may_be_json_text():
    """`papermill -p changes '{"max_steps": 2}'` passes a text."""
    assert vflan.preset("tiny", '{"max_steps": 2}', seed=3) == vflan.preset(
        "tiny", max_steps=2, seed=3
    )
    assert vflan.preset("tiny", {}) == vflan.preset("tiny", "{}") == vflan.preset("tiny")
    with pytest.raises(ValueError, match="is no json; write it as"):
        vflan.preset("tiny", "max_steps=2")
    with pytest.raises(ValueError, match="a table of fields"):
        vflan.preset("tiny", "[1]")


def test_changing_the_name_of_all_stages_is_refused():
    with pytest.raises(ValueError, match="cannot share one"):
        vflan.preset("tiny", name="mine")


def test_a_missing_field_is_named():
    with pytest.raises(ValueError, match="needs stage, vision_tower"):
        Recipe.from_dict({"name": "a"})


def test_a_recipe_is_the_same_after_json():
    recipe = vflan.replace(vflan.preset("lora_7b").base, more_samples=["data/x.json#10"])
    again = Recipe.from_dict(json.loads(json.dumps(recipe.to_dict())))
    assert again == recipe and differences(again.to_dict(), recipe.to_dict()) == ""


def test_differences_names_each_field_with_both_values():
    old = vflan.preset("tiny").base
    new = dataclasses.replace(old, lr=1.0, seed=3)
    assert differences(old.to_dict(), new.to_dict()).split("\n") == [
        f"  lr: {old.lr} -> 1.0",
        "  seed: 0 -> 3",
    ]


def test_a_notebook_shows_only_what_differs_from_the_defaults():
    recipe = vflan.replace(vflan.preset("tiny").base, name="a[b]&c")
    page = recipe._repr_html_()
    rows = dict(re.findall(r"<tr><td>(\w*)</td><td>(.*?)</td></tr>", page))
    assert (rows["name"], rows["stage"], rows["lr"]) == ("a[b]&amp;c", "base", "0.0006")
    assert rows["tune"] == "projector, language_model"
    assert not {"lora_r", "seed", "trackers"} & rows.keys() and len(rows) < 20


def test_a_notebook_shows_a_preset_in_three_columns():
    page = vflan.preset("lora_7b", benchmarks="<b>")._repr_html_()
    rows = dict(re.findall(r"<tr><td>(\w*)</td>(.*?)</tr>", page))
    columns = {name: re.findall("<td>(.*?)</td>", cells) for name, cells in rows.items()}
    assert columns["stage"] == ["projector", "base", "chat"]
    assert columns["lora_r"] == ["0", "128", "128"]
    assert columns["benchmarks"] == ["&lt;b&gt;"] * 3 and "<b>" not in page
    assert "seed" not in columns


def test_each_seed_has_its_own_run():
    base = vflan.preset("tiny").base
    first, second = for_seed(base, 0), for_seed(base, 1)
    assert first == base and (second.name, second.seed) == ("base-seed1", 1)


def test_paths_start_at_the_project_folder_not_at_the_working_directory(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert resolve("runs/tiny") == ROOT / "runs/tiny" and resolve(tmp_path) == tmp_path


def test_a_missing_folder_is_not_read_as_a_hub_id():
    assert weights_source("lmsys/vicuna-7b-v1.5") == "lmsys/vicuna-7b-v1.5"
    with pytest.raises(FileNotFoundError, match="data/README.md"):
        weights_source("data/tiny/no_such_tower")
