import dataclasses
import json
import os
import re
import subprocess
import sys
import threading
from decimal import Decimal
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

import vflan
from vflan.config import (
    ROOT,
    Recipe,
    differences,
    for_seed,
    output_path,
    preset_file,
    preset_names,
    resolve,
    weights_source,
)


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


def test_relative_folders_of_the_environment_are_the_same_for_a_child_elsewhere(tmp_path):
    """A notebook's kernel starts in the notebook's folder, with the environment of its parent."""
    child = "import vflan.config as c; print(c.ROOT, c.CACHE, sep='|')"
    code = f"import subprocess, sys; {child}; sys.stdout.flush()\n"
    code += f"subprocess.run([sys.executable, '-c', {child!r}], cwd='/')"
    given = dict(VFLAN_HOME="project", VFLAN_CACHE="cache", PYTHONPATH=str(ROOT))
    command = [sys.executable, "-c", code]
    done = subprocess.run(
        command, cwd=tmp_path, env=os.environ | given, capture_output=True, text=True, check=True
    )
    assert done.stdout == f"{tmp_path / 'project'}|{tmp_path / 'cache'}\n" * 2


def test_a_missing_folder_is_not_read_as_a_hub_id():
    assert weights_source("lmsys/vicuna-7b-v1.5") == "lmsys/vicuna-7b-v1.5"
    with pytest.raises(FileNotFoundError, match="data/README.md"):
        weights_source("data/tiny/no_such_tower")


# --------------------------------------------------------------- mistyped and absurd settings


def refusal(change):
    """The one sentence with which a change is refused; None if it is accepted."""
    try:
        recipe = vflan.replace(vflan.preset("tiny").base, **change)
    except ValueError as error:
        sentence = str(error)
        assert "\n" not in sentence and len(sentence) < 400, sentence
        return sentence
    # What is accepted can be written to recipe.json and read again.
    assert Recipe.from_dict(json.loads(json.dumps(recipe.to_dict()))) == recipe
    return None


@pytest.mark.parametrize(
    "change, need",
    [
        ({"lora_dropout": 5}, "at most 0.99"),
        ({"lora_dropout": 1}, "at most 0.99"),
        ({"lora_r": 10**6, "lora_alpha": 8}, "at most 4,096"),
        ({"global_batch": 10**9}, "at most 100,000"),
        ({"micro_batch": 10**9}, "at most 100,000"),
        ({"lr": 1e6}, "at most 10"),
        ({"warmup_ratio": 2}, "at most 1"),
        ({"max_bad_share": 1.5}, "at most 1"),
        ({"epochs": 1e7}, "at most 1,000,000"),
        ({"max_steps": 2**63}, "at most 1,000,000,000"),
        ({"max_length": 10**9}, "at most 1,000,000"),
        ({"seed": 1.0}, "seed=1.0: a whole number"),
        ({"max_steps": 2.0}, "max_steps=2.0: a whole number"),
        ({"bits": 16.0}, "choose one of 16, 8, 4"),
        ({"name": "x" * 300}, "at most 255 bytes"),
        ({"name": "x" * 200}, "200 characters"),
        ({"samples": "x" * 5000}, "at most 4,000 characters"),
        ({"runs": f"runs/{'x' * 300}/a"}, "at most 255 bytes between slashes"),
        ({"images": "a\nb"}, r"without the character '\n'"),
        ({"runs": "a\x1b[31m"}, r"without the character '\x1b'"),
        ({"exclude": ["a\0"]}, r"without the character '\x00'"),
        ({"name": "a\u202eb"}, "u202e"),
        ({"more_samples": "a.json#many"}, "file#rows"),
        ({"more_samples": "a.json#0"}, "file#rows"),
        ({"task_weights": "a=nan", "num_samples": 4}, "at least 0"),
        ({"task_weights": "a=-1", "num_samples": 4}, "at least 0"),
    ],
    ids=str,
)
def test_an_absurd_value_is_refused_with_what_is_needed(change, need):
    sentence = refusal(change)
    assert sentence.startswith(f"{next(iter(change))}=") and need in sentence


def test_any_value_of_any_field_is_accepted_whole_or_refused_in_one_sentence():
    nan, inf = float("nan"), float("inf")
    values = [nan, inf, -inf, -1, 0, 1, 0.5, 10**30, 10**5000, True, None, "", "x", "1", b"x", 1j]
    values += [Decimal(1), Fraction(1, 2), np.array([1, 2]), np.int64(2), np.float32(nan), {}, []]
    values += [np.str_("pad"), [[]], [None], ("x", 1), {"x"}, object(), int, Path("x"), "\ud800"]
    values += ["a\0b", "x" * 10**5, ["x"] * 10**5, range(3), print]
    for field in dataclasses.fields(Recipe):
        for value in values:
            refusal({field.name: value})


def test_a_number_of_numpy_is_a_number_and_a_whole_run_may_be_long():
    recipe = vflan.replace(
        vflan.preset("tiny").base, seed=np.arange(3)[2], lr=np.float64(0.5), epochs=np.int8(2)
    )
    assert [type(value) for value in (recipe.seed, recipe.lr, recipe.epochs)] == [int, float, int]
    assert recipe.to_dict()["seed"] == 2
    assert refusal({"max_steps": 10**7}) is refusal({"epochs": 10**6}) is None


@pytest.mark.parametrize("name", [1, None, "x" * 300, "\ud800", "", ("lr",)], ids=ascii)
def test_an_unknown_field_of_any_kind_is_refused(name):
    with pytest.raises(ValueError, match="Recipe has no field") as error:
        vflan.preset("tiny", {name: 1})
    assert len(str(error.value)) < 200


@pytest.mark.parametrize("name", [None, 5, "", "x" * 5000, "a\0b", [], "~nosuchuser/x"], ids=ascii)
@pytest.mark.parametrize("end", ["", ".py"])
def test_a_preset_of_any_name_is_refused_in_one_sentence(name, end):
    with pytest.raises((ValueError, FileNotFoundError), match="no (such )?preset") as error:
        vflan.preset(f"{name}{end}" if end else name)
    assert len(str(error.value)) < 400


def test_only_a_recipe_is_changed():
    with pytest.raises(TypeError, match="a preset, three recipes"):
        vflan.replace(vflan.preset("tiny"), lr=1)


@pytest.mark.parametrize("find", [resolve, output_path])
def test_the_home_of_nobody_is_no_path(find):
    with pytest.raises(ValueError, match="~nosuchuser is the home of nobody here"):
        find("~nosuchuser/runs")
    assert find("~/runs") == Path.home() / "runs"


# --------------------------------------------------------------------------- preset files that fail


def preset_problem(folder, text):
    """The sentence with which a preset file is refused."""
    path = folder / "mine.py"
    path.write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(ValueError) as error:
        vflan.preset(str(path))
    sentence = str(error.value)
    assert sentence.startswith(str(path)) and "\n" not in sentence
    return sentence.removeprefix(str(path))


@pytest.mark.parametrize(
    "text, sentence",
    [
        ("import sys\nsys.exit(3)", ", line 2, cannot be run: SystemExit: 3."),
        ("import sys\n\ndef preset():\n    sys.exit()", ", line 4, fails: SystemExit."),
        ("import os\nos._exit(3)", " ended its own process (status 3)."),
        ("raise KeyboardInterrupt", ", line 1, cannot be run: KeyboardInterrupt."),
        ("class E(BaseException): pass\nraise E('a\\nb')", ", line 2, cannot be run: E: a b."),
        ("\n\ndef preset(:\n", ", line 3, cannot be run: SyntaxError"),
        ("x = 1\ny = 'caf\udce9'", "cannot be run: SyntaxError"),
        ("a = 1\0", " cannot be run: "),
        ("def preset():\n    return preset()", ", line 2, fails: RecursionError"),
        ("def preset():\n    input('name? ')", ", line 2, fails: EOFError"),
        ("def preset():\n    return 3", ": preset() must return three recipes"),
        ("def preset():\n    while True: yield 3", ": preset() must return three recipes"),
        ("def preset():\n    yield 3\n    1 / 0", ", line 3, fails: ZeroDivisionError"),
        ("preset = dict(a=1)", " defines no preset()"),
        ("", " defines no preset()"),
        (
            "class E(Exception):\n    def __str__(self): 1 / 0\nraise E",
            ", line 3, cannot be run: E.",
        ),
        (
            "from vflan import config\ndef preset():\n    return [config.Recipe(lr=-1)] * 3",
            ", line 3, fails: TypeError",
        ),
    ],
    ids=lambda text: text[:30].encode("unicode_escape").decode(),
)
def test_a_preset_file_that_fails_is_named_with_its_line(tmp_path, text, sentence):
    assert sentence in preset_problem(tmp_path, text)


@pytest.mark.parametrize(
    "text, line",
    [
        ("def preset():\n    while True:\n        pass", ", line [23],"),
        ("import re\nre.match('(a+)+$', 'a' * 60 + 'b')", ", line 2,"),  # no bytecode, no signal
        (
            "import time\ndef preset():\n    try:\n        time.sleep(1e6)\n    except: pass",
            ", line 4,",
        ),
    ],
    ids=["a loop", "a regular expression", "a wait"],
)
def test_a_preset_file_that_never_ends_is_stopped_at_a_line(tmp_path, monkeypatch, text, line):
    monkeypatch.setattr(preset_file, "SECONDS", 1)
    found = preset_problem(tmp_path, text)
    assert re.fullmatch(f"{line} does not end: it was stopped after 1 s.", found)


def test_a_preset_file_leaves_this_process_as_it_was(tmp_path, monkeypatch, capfd):
    """What it prints is seen, its threads end with it, and it imports what this process could."""
    (tmp_path / "beside").mkdir()
    (tmp_path / "beside" / "my_values.py").write_text("LR = 0.25")
    monkeypatch.syspath_prepend(tmp_path / "beside")
    (tmp_path / "tiny.py").write_text(
        "import os, threading, time\n"
        "from my_values import LR\n"
        "from vflan.config import replace\n"
        "from vflan.presets.tiny import preset as tiny\n"
        "print('hello from the preset')\n"
        "os.environ['MINE'] = 'set'\n"
        "threading.Thread(target=time.sleep, args=(1e6,)).start()\n"
        "def preset():\n"
        "    return (replace(recipe, lr=LR) for recipe in tiny())\n"
    )
    threads = threading.active_count()
    mine = vflan.preset(str(tmp_path / "tiny.py"), max_steps=4)
    assert mine == vflan.preset("tiny", lr=0.25, max_steps=4) != vflan.preset("tiny", max_steps=4)
    assert threading.active_count() == threads and "MINE" not in os.environ
    assert "hello from the preset" in capfd.readouterr().err


def test_a_folder_or_a_pipe_is_no_preset_file(tmp_path):
    (tmp_path / "folder.py").mkdir()
    (tmp_path / "link.py").symlink_to(tmp_path / "nothing.py")
    os.mkfifo(tmp_path / "pipe.py")
    for name in ("folder.py", "link.py", "pipe.py"):
        with pytest.raises(ValueError, match=f"{name} is no file"):
            vflan.preset(str(tmp_path / name))
