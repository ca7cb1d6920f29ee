"""One process and two train on the same samples with the same losses, replicated or sharded."""

import errno
import io
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import pytest

import vflan
from vflan.training import distributed
from vflan.training.run import Run

HOME = Path(__file__).resolve().parents[2]
# A user's own script, which also records how the weights are distributed, and kills a run.
SCRIPT = """
import json, os, sys
import vflan
from vflan.config import Recipe
from vflan.training import validation
from torch.distributed.tensor import DTensor
vflan.train
TRAIN, layout = sys.modules["vflan.training.trainer"], {}
validation.ANSWER_TOKENS = 3  # each token gathers all sharded weights

def distribute(*arguments, real=TRAIN.distributed.distribute):
    state = real(*arguments)
    weights = [weight for weight in state.model.parameters() if weight.requires_grad]
    sharded = [isinstance(weight, DTensor) for weight in weights]
    local = sum((w.to_local() if isinstance(w, DTensor) else w).numel() for w in weights)
    tower = state.model.model.vision_tower.parameters()
    layout.update(all=all(sharded), any=any(sharded))
    layout.update(tower=any(isinstance(weight, DTensor) for weight in tower))
    layout.update(share=local / max(1, sum(w.numel() for w in weights)))
    return state

def learning_rate(step, *rest, real=TRAIN.learning_rate):
    if step == kill_at:
        raise KeyboardInterrupt
    return real(step, *rest)

TRAIN.distributed.distribute, TRAIN.learning_rate = distribute, learning_rate
for name, changes, kill_at in json.loads(sys.argv[2]):
    recipe = vflan.replace(Recipe.from_dict(json.loads(sys.argv[1])), name=name, **changes)
    try:
        run = vflan.train(recipe)
        if os.environ["RANK"] == "0":
            (run.folder / "layout.json").write_text(json.dumps(layout))
    except KeyboardInterrupt:
        pass
"""
# A user's own script, in which each process records what it did itself to start.
STARTING = """
import json, os, sys
import torch
import vflan
from vflan.config import Recipe
vflan.train
TRAIN, did = sys.modules["vflan.training.trainer"], dict(read=0, made=0, empty=0)
recipe, record = Recipe.from_dict(json.loads(sys.argv[1])), json.loads(sys.argv[2])[0]

def read(*arguments, real=TRAIN.models.load_model):
    did["read"] += 1
    return real(*arguments)

def make(*arguments, real=TRAIN.prepare):
    did["made"] += 1
    return real(*arguments)

def freeze(model, recipe, real=TRAIN.models.freeze):
    real(model, recipe)
    did["empty"] = sum(weight.numel() for weight in model.parameters() if weight.is_meta)
    did["all"] = sum(weight.numel() for weight in model.parameters())

TRAIN.models.load_model, TRAIN.prepare, TRAIN.models.freeze = read, make, freeze
before = torch.get_rng_state()
vflan.train(recipe)
did["random"] = torch.equal(before, torch.get_rng_state())
with open(f"{record}/{os.environ['RANK']}.json", "w") as file:
    json.dump(did, file)
"""
KILL_AT = 5  # the last checkpoint before is that of step 3


def mixed(recipe):
    """8 clipped steps with validation, in micro-batches smaller than a process's share.

    A third of the rows has no picture.
    """
    rows = json.loads(Path(recipe.samples).read_text())
    for row in rows[::3]:
        row.pop("image")
        row["conversations"][0]["value"] = "What is a square?"
    Path(recipe.samples).write_text(json.dumps(rows))
    return vflan.replace(
        recipe,
        max_steps=8,
        micro_batch=3,
        lr=1e-3,
        max_grad_norm=1.0,
        save_every=3,
        heldout_rows=5,
        evaluate_every=4,
    )


def free_port():
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def torchrun(recipe, trainings, nodes, folder, text=SCRIPT):
    """Run a script in two processes under torchrun: on one machine, or as if on two."""
    script = folder / "script.py"
    script.write_text(text)
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc_per_node",
        str(2 // nodes),
        "--nnodes",
        str(nodes),
    ]
    command += ["--master_addr", "127.0.0.1", "--master_port", str(free_port())]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(HOME), *filter(None, [os.environ.get("PYTHONPATH")])])
    }
    argument = [script, json.dumps(recipe.to_dict()), json.dumps(trainings)]
    pipes = dict(
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment, cwd=folder
    )
    children = [
        subprocess.Popen([*command, "--node_rank", str(rank), *argument], **pipes)
        for rank in range(nodes)
    ]
    output = [child.communicate(timeout=300)[0] for child in children]
    assert [child.returncode for child in children] == [0] * nodes, "\n".join(output)


def agree(run, one):
    """Assert the same rows and losses, step by step and on the held-out rows."""
    assert run.metrics().tokens.tolist() == one.metrics().tokens.tolist()
    assert run.metrics().useful.tolist() == one.metrics().useful.tolist()
    assert run.metrics().loss.tolist() == pytest.approx(one.metrics().loss.tolist(), abs=1e-5)
    assert run.heldout().loss.tolist() == pytest.approx(one.heldout().loss.tolist(), abs=1e-5)
    assert run.sample_answers().question.tolist() == one.sample_answers().question.tolist()
    return True


@pytest.mark.usefixtures("alone")
def test_two_machines_replicated_or_sharded_train_as_one_process_does_and_resume_exactly(
    recipe, tmp_path
):
    recipe = mixed(recipe)
    one = vflan.train(vflan.replace(recipe, name="one"))
    killed = [["killed", {"sharding": "fsdp2"}, KILL_AT], ["killed", {"sharding": "fsdp2"}, None]]
    trainings = [
        ["replicated", {"sharding": "none"}, None],
        ["sharded", {"sharding": "fsdp2"}, None],
        *killed,
    ]
    torchrun(recipe, trainings, 2, tmp_path)
    replicated, sharded, resumed = (
        Run(one.folder.with_name(name)) for name in ("replicated", "sharded", "killed")
    )
    for run, kind in ((replicated, "none"), (sharded, "fsdp2")):
        assert (run.summary["processes"], run.summary["sharding"]) == (2, kind) and agree(run, one)
    layout = json.loads((sharded.folder / "layout.json").read_text())
    assert layout["all"] and layout["share"] == pytest.approx(0.5, abs=0.01) and not layout["tower"]
    assert not json.loads((replicated.folder / "layout.json").read_text())["any"]
    assert resumed.summary["parts"] == sharded.summary["parts"]
    assert resumed.metrics().loss.tolist() == sharded.metrics().loss.tolist()
    assert sharded.load_model()


@pytest.mark.parametrize("tied", [False, True], ids=["two tables", "one table"])
@pytest.mark.usefixtures("alone")
def test_only_the_main_process_reads_the_weights_and_makes_the_rows(recipe, tmp_path, tied):
    """tied: the output layer is the table of embeddings, as in small language models."""
    if tied:
        recipe = vflan.replace(recipe, language_model=str(tie(recipe, tmp_path / "tied")))
    recipe = vflan.replace(mixed(recipe), max_steps=3, sharding="fsdp2")
    one = vflan.train(vflan.replace(recipe, name="one"))
    torchrun(recipe, [str(tmp_path)], 1, tmp_path, STARTING)
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    # The main process reads the weights once more to export them.
    assert (first["read"], first["made"], first["empty"]) == (2, 1, 0)
    assert (second["read"], second["made"]) == (0, 0)
    # All but the vision tower.
    assert 0.4 * second["all"] < second["empty"] < second["all"] == first["all"]
    assert first["random"] and second["random"]
    run = Run.open(recipe.folder)
    assert agree(run, one) and run.load_model().config.tie_word_embeddings == tied
    assert not (run.folder / "rows").exists()


def tie(recipe, folder):
    """A copy of the recipe's language model with one table for embeddings and output layer."""
    from transformers import AutoModelForCausalLM

    shutil.copytree(recipe.language_model, folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.config.tie_word_embeddings = True
    model.lm_head.weight = model.model.embed_tokens.weight
    model.save_pretrained(folder)
    return folder


@pytest.mark.usefixtures("alone")
def test_a_full_log_does_not_end_a_training_of_two_processes(recipe, monkeypatch):
    class Full(io.StringIO):
        def flush(self):
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(sys, "stdout", Full())
    monkeypatch.setattr(sys, "stderr", Full())
    assert vflan.train(vflan.replace(recipe, max_steps=2), num_processes=2).finished


def launch(folder, monkeypatch, script):
    """Launches the lines of a shell script in place of two processes."""
    child = folder / "python"
    child.write_text(f"#!/bin/sh\n{script}\n")
    child.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(child))
    distributed.launch(folder, 2)


def test_output_that_is_no_text_does_not_end_a_training_of_two_processes(
    tmp_path, monkeypatch, capfd
):
    launch(tmp_path, monkeypatch, "printf 'from a library: \\377\\n'")
    assert "from a library: \ufffd" in capfd.readouterr().err


def test_a_second_try_after_an_error_may_end_in_peace(tmp_path, monkeypatch):
    """The error that is being handled did not happen in this training."""
    try:
        raise OSError("the first try")
    except OSError:
        launch(tmp_path, monkeypatch, "exec >&- 2>&-; sleep 0.3")


def test_an_interrupted_training_ends_its_children(tmp_path, monkeypatch):
    def say(text, *_):
        if text == "begun":
            raise KeyboardInterrupt

    monkeypatch.setattr(distributed, "say", say)
    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        launch(tmp_path, monkeypatch, "echo begun; exec sleep 60")
    assert time.monotonic() - began < 30


@pytest.mark.usefixtures("alone")
def test_processes_started_from_a_notebook_print_a_command_to_paste_and_train_the_same(
    recipe, capfd
):
    recipe = vflan.replace(mixed(recipe), max_steps=4, heldout_rows=0, evaluate_every=0)
    one = vflan.train(vflan.replace(recipe, name="one"))
    run = vflan.train(vflan.replace(recipe, name="two"), num_processes=2)
    assert re.search(
        r"^python -m torch.distributed.run .* -m vflan train .*two --processes 2$",
        capfd.readouterr().out,
        re.M,
    )
    assert run.summary["processes"] == 2 and run.load_model()
    assert run.metrics().loss.tolist() == pytest.approx(one.metrics().loss.tolist(), abs=1e-5)


@pytest.mark.skipif(
    not find_spec("deepspeed"), reason="DeepSpeed is not installed: ZeRO is not run here"
)
@pytest.mark.usefixtures("alone")
def test_deepspeed_trains_as_one_process_does_and_resumes(recipe, tmp_path):
    recipe = mixed(recipe)
    one = vflan.train(vflan.replace(recipe, name="one"))
    whole = [[kind, {"sharding": kind}, None] for kind in ("zero2", "zero3")]
    killed = [
        [f"{kind}-killed", {"sharding": kind}, kill_at]
        for kind in ("zero2", "zero3")
        for kill_at in (KILL_AT, None)
    ]
    torchrun(recipe, [*whole, *killed], 1, tmp_path)
    for kind in ("zero2", "zero3"):
        run, resumed = (Run(one.folder.with_name(name)) for name in (kind, f"{kind}-killed"))
        assert run.summary["sharding"] == kind and agree(run, one)
        assert resumed.summary["parts"] == run.summary["parts"]


def test_a_batch_that_cannot_be_divided_is_refused_and_a_number_that_works_is_named(recipe):
    with pytest.raises(
        ValueError,
        match="global_batch=8: 3 processes cannot .* evenly; start 2, or make it a multiple of 3",
    ):
        vflan.train(recipe, num_processes=3)
    with pytest.raises(
        ValueError, match="global_batch=8: 16 processes are more than its samples; start 8"
    ):
        vflan.train(recipe, num_processes=16)
    assert not recipe.folder.exists()


def test_more_processes_than_gpus_are_refused(recipe, monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    distributed.check_processes(recipe, 2)
    with pytest.raises(ValueError, match="4 processes were requested; start 2"):
        distributed.check_processes(recipe, 4)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")  # two machines of two
    distributed.check_processes(recipe, 4)


@pytest.mark.parametrize("processes", [0, -1, True, 1.0, "2", None, 10**30, 10_000], ids=repr)
def test_an_absurd_number_of_processes_is_refused_before_the_run_begins(recipe, processes):
    """10,000 can share this batch evenly, and would still be started."""
    for batch in (8, 10_000):
        wrong = vflan.replace(recipe, global_batch=batch)
        with pytest.raises(ValueError, match="processes") as error:
            vflan.train(wrong, num_processes=processes)
        assert "\n" not in str(error.value) and not recipe.folder.exists()


def test_processes_that_cannot_reach_each_other_are_not_started(recipe, monkeypatch):
    def connect(*_, **__):
        raise OSError(errno.ENETUNREACH, "Network is unreachable")

    monkeypatch.setattr(distributed.socket, "create_connection", connect)
    with pytest.raises(RuntimeError, match=r"127.0.0.1, .*\(Network is unreachable\): start it"):
        vflan.train(recipe, num_processes=2)
    assert not recipe.folder.exists() and vflan.train(vflan.replace(recipe, max_steps=1)).finished


def test_missing_deepspeed_is_reported_before_training(recipe, monkeypatch):
    monkeypatch.setattr(distributed, "find_spec", lambda name: None)
    with pytest.raises(
        ImportError, match="sharding='zero3' needs DeepSpeed: pip install deepspeed"
    ):
        vflan.train(vflan.replace(recipe, sharding="zero3"), num_processes=2)


def test_only_full_tuning_on_gpus_is_sharded_unless_the_recipe_says_so(recipe, monkeypatch):
    lora = vflan.replace(recipe, lora_r=4, lora_alpha=8)
    assert (
        distributed.sharding(recipe, 2) == "none"
        and distributed.sharding(vflan.replace(recipe, sharding="fsdp2"), 2) == "fsdp2"
    )
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    assert [distributed.sharding(r, n) for r, n in ((recipe, 2), (recipe, 1), (lora, 2))] == [
        "fsdp2",
        "none",
        "none",
    ]


def test_fewer_processes_than_requested_is_an_error(recipe):
    run = Run(recipe.folder)
    run.folder.mkdir(parents=True)
    (run.folder / "recipe.json").write_text(json.dumps(recipe.to_dict()))
    with pytest.raises(RuntimeError, match="2 processes were requested, but 1"):
        sys.modules["vflan.training.trainer"].fit(run.folder, 2)


@pytest.mark.parametrize(
    "change", [dict(bits=4, lora_r=4, lora_alpha=8), dict(optimizer="adamw_8bit")]
)
def test_quantised_models_and_optimizers_are_not_sharded(recipe, change):
    with pytest.raises(
        ValueError, match="cannot be shared out over processes; set sharding='none'"
    ):
        vflan.replace(recipe, sharding="fsdp2", **change)
