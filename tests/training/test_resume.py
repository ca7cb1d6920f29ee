"""A killed run resumes bit for bit, and never from a partial or damaged file."""

import errno
import json
import os
import re
import signal
import sys
import time
from pathlib import Path

import pytest
import torch
from accelerate.utils import LoggerType

import vflan
from vflan.training import checkpointing
from vflan.training import run as runs
from vflan.training.run import Run
from vflan.training.validation import hold_out

vflan.train  # noqa: B018 (imports the file)
TRAIN = sys.modules["vflan.training.trainer"]  # the file; vflan.train is its function
TRACKIO = """
calls = []
class config:
    update = lambda values, **options: None
class Trackio:
    def log(self, values, **options):
        calls.append((values, options))
    def finish(self):
        calls.append("end")
def init(project, **options):
    calls.append((project, options))
    return Trackio()
"""  # as much of the package as Accelerate uses
LORA = dict(lora_r=4, lora_alpha=8, lora_dropout=0.3)


def same_weights(a, b):
    return a.summary["parts"] == b.summary["parts"]


def killed(recipe, monkeypatch, step=5):
    """The run of a recipe that was interrupted in the given step."""

    def kill(now, *rest, real=TRAIN.learning_rate):
        if now == step:
            raise KeyboardInterrupt
        return real(now, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(TRAIN, "learning_rate", kill)
        with pytest.raises(KeyboardInterrupt):
            vflan.train(recipe)
    return Run.open(recipe.folder)


@pytest.fixture
def saving(recipe):
    return vflan.replace(recipe, max_steps=6, save_every=2)


@pytest.mark.parametrize(
    "lora",
    [
        {},
        LORA,
        dict(LORA, bits=8),
        dict(LORA, bits=4, optimizer="adamw_8bit", gradient_checkpointing=True),
    ],
    ids=["full", "LoRA with dropout", "8 bits", "QLoRA"],
)
def test_a_killed_run_resumes_to_the_same_weights(saving, monkeypatch, lora):
    recipe = vflan.replace(saving, **lora)
    straight = vflan.train(vflan.replace(recipe, name="straight"))
    killed(recipe, monkeypatch)
    resumed = vflan.train(recipe)
    assert same_weights(straight, resumed)
    assert resumed.metrics().step.tolist() == [1, 2, 3, 4, 5, 6]
    assert resumed.metrics().loss.tolist() == straight.metrics().loss.tolist()
    assert not (resumed.folder / "checkpoints").exists()


def test_a_run_killed_while_a_checkpoint_is_written_goes_on_from_the_one_before(saving):
    straight = vflan.train(vflan.replace(saving, name="straight"))
    child = os.fork()
    if not child:  # a process of its own, with a disk so slow that the kill comes in the middle
        saves = []

        def slow(*arguments, real=torch.save):
            saves.append(1)
            real(*arguments)
            time.sleep(60 * (len(saves) == 2))

        torch.save = slow
        vflan.train(saving)
        os._exit(0)
    folder, end = saving.folder / "checkpoints", time.monotonic() + 60
    while time.monotonic() < end and not (
        (folder / "step-00000002").exists() and (folder / ".part" / "0.pt").exists()
    ):
        time.sleep(0.01)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    assert [path.name for path in checkpointing.list_checkpoints(saving.folder)] == [
        "step-00000002"
    ]
    assert same_weights(straight, vflan.train(saving))


def test_a_damaged_checkpoint_is_named_and_the_one_before_is_taken(saving, monkeypatch, capsys):
    straight = vflan.train(vflan.replace(saving, name="straight"))
    run = killed(saving, monkeypatch)
    newest, before = checkpointing.list_checkpoints(run.folder)
    assert (newest.name, before.name) == ("step-00000004", "step-00000002")
    tensors = newest / "0.pt"
    content = bytearray(tensors.read_bytes())
    content[len(content) // 2] ^= 1
    tensors.write_bytes(content)
    resumed = vflan.train(saving)
    said = capsys.readouterr().err
    assert "step-00000004 is damaged (0.pt)" in said and "resumes after step 2" in said
    assert same_weights(straight, resumed)


def test_texts_of_digits_stay_texts(tmp_path):
    """LLaVA's ids are such, and so are answers to counting questions."""
    answer = dict(step=1, id="000000033471", task="7", question="How many?", answer="07")
    loss = dict(step=1, task="07", loss=2.0, tokens=3)
    for name, row in (("samples", answer | dict(reference="7")), ("heldout", loss)):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(row) + "\n")
    run = Run(tmp_path)
    assert run.sample_answers().iloc[0].to_dict() == answer | dict(reference="7")
    assert run.heldout().iloc[0].to_dict() == loss


def test_a_checkpoint_names_the_file_that_it_lacks(saving, monkeypatch, capsys):
    run = killed(saving, monkeypatch)
    (checkpointing.list_checkpoints(run.folder)[0] / "0.pt").unlink()
    path, _ = checkpointing.newest(run.folder)
    assert path.name == "step-00000002"
    assert "step-00000004 is damaged (0.pt)" in capsys.readouterr().err


def test_without_an_intact_checkpoint_a_run_starts_again(saving, monkeypatch):
    straight = vflan.train(vflan.replace(saving, name="straight"))
    for path in checkpointing.list_checkpoints(killed(saving, monkeypatch).folder):
        (path / "checkpoint.json").write_text("{")
    assert same_weights(straight, vflan.train(saving))


def test_a_run_that_starts_again_logs_nothing_twice(saving, monkeypatch):
    """Lines logged before the first step must not be logged again."""
    saving = vflan.replace(saving, heldout_rows=6, evaluate_every=2)
    straight = vflan.train(vflan.replace(saving, name="straight"))
    for path in checkpointing.list_checkpoints(killed(saving, monkeypatch).folder):
        (path / "checkpoint.json").write_text("{")
    again = vflan.train(saving)
    assert again.heldout().equals(straight.heldout()) and again.sample_answers().equals(
        straight.sample_answers()
    )


def test_a_checkpoint_names_its_run_and_loads_without_running_code(saving, monkeypatch):
    run = killed(saving, monkeypatch)
    path, about = checkpointing.newest(run.folder)
    assert about["step"] == 4 and about["recipe"] == saving.to_dict()
    assert about["code"] == checkpointing.versions()["code"] and about["torch"] == torch.__version__
    assert set(torch.load(path / "0.pt", weights_only=True)) == {"weights", "moments"}


def test_a_run_does_not_resume_with_other_data(saving, monkeypatch):
    killed(saving, monkeypatch)
    rows = json.loads(Path(saving.samples).read_text())
    rows[7]["conversations"][1]["value"] = "something else"
    Path(saving.samples).write_text(json.dumps(rows))
    with pytest.raises(ValueError, match="step-00000004: the samples, or their tokens, changed"):
        vflan.train(saving)


def test_a_run_resumes_with_other_monitoring_but_not_with_another_recipe(saving, monkeypatch):
    straight = vflan.train(vflan.replace(saving, name="straight"))
    killed(saving, monkeypatch)
    with pytest.raises(ValueError, match="another recipe's run:\n  lr: 0.01 -> 0.5"):
        vflan.train(vflan.replace(saving, lr=0.5))
    assert same_weights(straight, vflan.train(vflan.replace(saving, save_every=1)))


def test_a_full_disk_ends_in_one_sentence_and_leaves_the_last_checkpoint(saving, monkeypatch):
    straight = vflan.train(vflan.replace(saving, name="straight"))

    def save(value, file, real=torch.save):
        if (saving.folder / "checkpoints" / "step-00000002").exists():
            file.write(b"half of it")
            raise OSError(errno.ENOSPC, "No space left on device")
        real(value, file)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", save)
        with pytest.raises(
            OSError, match="disk is full: .*base.* its last checkpoint, step-00000002, is intact"
        ) as full:
            vflan.train(saving)
    assert "\n" not in str(full.value)
    assert [path.name for path in (saving.folder / "checkpoints").iterdir()] == ["step-00000002"]
    assert same_weights(straight, vflan.train(saving))


def test_a_full_disk_is_recognised_by_the_position_error_of_torchs_writer(saving, monkeypatch):
    def save(value, file):
        raise RuntimeError(
            "[enforce fail at inline_container.cc:672] . unexpected pos 152704 vs 152592"
        )

    monkeypatch.setattr(torch, "save", save)
    with pytest.raises(OSError, match="disk is full: .*it has no checkpoint yet"):
        vflan.train(saving)


def test_a_disk_that_is_full_at_the_end_costs_no_step(saving, monkeypatch):
    def export(*arguments):
        raise RuntimeError(
            "Error while serializing: I/O error: No space left on device (os error 28)"
        )

    with monkeypatch.context() as patch:
        patch.setattr(TRAIN.models, "export", export)
        with pytest.raises(OSError, match="disk is full.*step-00000006, is intact"):
            vflan.train(saving)
    monkeypatch.setattr(TRAIN, "learning_rate", lambda *a: pytest.fail("a step was trained again"))
    assert len(vflan.train(saving).metrics()) == 6


def test_two_trainings_of_one_folder_at_once_are_refused(saving, monkeypatch):
    monkeypatch.setattr(runs, "PATIENCE", 0)
    run = Run(saving.folder)
    run.folder.mkdir(parents=True)
    with run.lock():
        with pytest.raises(
            RuntimeError, match=rf"base is being trained by process {os.getpid()} on .*another name"
        ):
            vflan.train(saving)
    assert vflan.train(saving).finished


def test_a_line_that_a_crash_cut_off_does_not_stop_the_run(saving, monkeypatch):
    run = killed(saving, monkeypatch)
    with (run.folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "lo')
    assert vflan.train(saving).metrics().step.tolist() == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("change", [{}, dict(LORA, bits=4)], ids=["full", "QLoRA"])
def test_a_checkpoint_is_a_run_that_loads_and_answers(saving, monkeypatch, change):
    saving = vflan.replace(saving, **change)
    straight = vflan.train(vflan.replace(saving, name="straight", max_steps=6))
    run = killed(saving, monkeypatch)
    with pytest.raises(FileNotFoundError, match=r"run\.at\(\)"):
        run.load_model()
    newest, before = run.at(), run.at(2)
    assert (newest.name, before.name) == ("base-step4", "base-step2") and not run.finished
    assert newest.summary["steps"] == len(newest.metrics()) == 4 and not same_weights(
        newest, before
    )
    question = {"text": "<image>\nWhat color is it?", "image": str(Path(saving.images) / "0.png")}
    assert len(vflan.answer(newest.load_model(), newest.processor(), [question])) == 1
    with pytest.raises(FileNotFoundError, match="base has not a checkpoint of step 3"):
        run.at(3)
    assert same_weights(straight, vflan.train(saving))


def test_the_last_checkpoint_holds_the_weights_that_the_run_ends_with(saving, monkeypatch):
    monkeypatch.setattr(Run, "finish", lambda *a, **k: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        vflan.train(saving)
    monkeypatch.undo()
    assert same_weights(Run.open(saving.folder).at(), vflan.train(saving))


@pytest.mark.parametrize("kept", [True, False], ids=["features kept", "features made as needed"])
def test_validation_changes_nothing(recipe, monkeypatch, kept):
    if not kept:
        monkeypatch.setattr("vflan.models.image_features.MAX_KEPT_BYTES", 0)
    recipe = vflan.replace(
        recipe, max_steps=4, heldout_rows=6, lora_r=4, lora_alpha=8, lora_dropout=0.3
    )
    looked = vflan.train(vflan.replace(recipe, name="looked", evaluate_every=1))
    unseen = vflan.train(vflan.replace(recipe, name="unseen"))
    assert (
        same_weights(looked, unseen)
        and looked.summary["heldout"] == 6
        and looked.summary["rows"] == 26
    )
    table = looked.heldout()
    assert sorted(table.step.unique()) == [
        0,
        1,
        2,
        3,
        4,
    ] and unseen.heldout().step.unique().tolist() == [4]
    tasks = (
        table[table.task != "all"]
        .groupby("step")
        .apply(lambda t: (t.loss * t.tokens).sum() / t.tokens.sum())
    )
    assert table[table.task == "all"].loss.tolist() == pytest.approx(tasks.tolist(), abs=1e-5)


def test_held_out_rows_are_never_trained_on(recipe, monkeypatch):
    trained = set()

    def order(data, recipe, of, real=TRAIN.batch_order):
        batches = real(data, recipe, of)
        trained.update(str(data.ids[row]) for rows in batches for row in rows)
        return batches

    monkeypatch.setattr(TRAIN, "batch_order", order)
    asked = set(vflan.train(vflan.replace(recipe, epochs=2, heldout_rows=4)).sample_answers().id)
    assert len(trained) == 28 and len(asked) == 4 and not asked & trained


def test_a_smaller_held_out_slice_is_part_of_a_larger_one():
    ids = [f"s{i}" for i in range(50)]
    kept, held = hold_out(ids, 10)
    assert sorted([*kept, *held]) == list(range(50)) and set(hold_out(ids, 5)[1]) < set(held)
    with pytest.raises(ValueError, match="heldout_rows=50 of 50"):
        hold_out(ids, 50)


def test_sample_answers_are_those_of_the_model(recipe):
    run = vflan.train(vflan.replace(recipe, epochs=6, heldout_rows=4, evaluate_every=10))
    said = run.sample_answers()
    assert (
        said.groupby("step").id.apply(list).map(str).nunique() == 1
    )  # the same questions every time
    last = said[said.step == said.step.max()]
    rows = {row["id"]: row for row in json.loads(Path(recipe.samples).read_text())}
    samples = [
        {
            "text": rows[name]["conversations"][0]["value"],
            "image": str(Path(recipe.images) / rows[name]["image"]),
        }
        for name in last.id
    ]
    assert last.answer.tolist() == vflan.answer(run.load_model(), run.processor(), samples)
    assert last.reference.tolist() == [rows[name]["conversations"][1]["value"] for name in last.id]


def test_every_step_is_logged_with_its_rates_and_a_line_a_minute_goes_to_stderr(
    recipe, monkeypatch, capsys
):
    clock = iter(range(0, 10**6, 40))
    monkeypatch.setattr("vflan.progress.time.perf_counter", lambda: next(clock))
    run = vflan.train(vflan.replace(recipe, max_steps=4))
    said = capsys.readouterr()
    line = r"base: \d of 4 steps, loss [\d.]+, [\d,]+ tokens/s, fill \d+%, peak [\d.]+ GB"
    line += r", \d+ min left"
    assert re.search(line, said.err) and said.out == ""
    table = run.metrics()
    assert (
        (table.fill > 0.5).all() and (table.fill <= 1).all() and (table.useful > table.tokens).all()
    )
    assert (table.peak_gb > 0).all() and (table.tokens_per_second > 0).all()


@pytest.fixture
def tracked(recipe, tmp_path, monkeypatch):
    """A recipe with a tracker that keeps what it gets."""
    package = tmp_path / "packages" / "trackio"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(TRACKIO)
    monkeypatch.syspath_prepend(package.parent)
    monkeypatch.setattr("accelerate.tracking._available_trackers", [LoggerType.TRACKIO])
    return vflan.replace(recipe, max_steps=2, trackers=("trackio",), heldout_rows=2)


def test_a_tracker_ends_with_a_run_that_is_stopped(tracked, monkeypatch):
    """Otherwise the next run of the process would log to it."""
    killed(tracked, monkeypatch, step=1)
    calls = sys.modules.pop("trackio").calls
    assert len(calls) > 2 and calls[-1] == "end" and calls.count("end") == 1


def test_trackers_get_what_metrics_jsonl_gets(tracked):
    run = vflan.train(tracked)
    calls = sys.modules.pop("trackio").calls
    assert calls[0][0] == "vflan" and calls[0][1]["name"] == "base" and calls[-1] == "end"
    logged = [values for values, _ in calls[1:-1]]
    assert [values["loss"] for values in logged if "loss" in values] == run.metrics().loss.tolist()
    assert "heldout/all" in logged[-1]


def test_a_missing_tracker_is_reported_before_training(recipe, monkeypatch):
    monkeypatch.setattr("vflan.training.distributed.find_spec", lambda name: None)
    with pytest.raises(ImportError, match="pip install wandb"):
        vflan.train(vflan.replace(recipe, trackers=("wandb",)))
    assert not recipe.folder.exists()


def test_a_step_without_a_supervised_token_stops_the_run_with_the_samples_names(
    recipe, monkeypatch
):
    def prepare(*a, real=TRAIN.prepare, **k):
        data = real(*a, **k)
        data.supervised[:] = 0
        return data

    monkeypatch.setattr(TRAIN, "prepare", prepare)
    with pytest.raises(ValueError, match=r"no supervised token in step 1, samples s\d+, s\d+"):
        vflan.train(recipe)
