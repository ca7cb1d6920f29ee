"""vflan deletes only what it wrote: a refused call leaves the disk as it was."""

import json
import os
import threading
from pathlib import Path

import pytest

import vflan
from vflan import io, world
from vflan.config import folder_name
from vflan.training import run as runs
from vflan.training import trainer
from vflan.training.run import Run

BAD_NAMES = [".", "..", "", "a/b", "/a", "../a", "a\\b", "a\0b", "a\nb", "a\x1bb", "a\u202eb"]
BAD_NAMES += ["a\u200bb", " a", "a ", "a.", ".a", "a:b", "a*", "x" * 101, "基" * 70, "NUL"]
BAD_NAMES += ["con.txt", "a\ud800b", None, 5]


def snapshot(folder):
    """Every path below a folder, with its bytes, or the target of a link."""
    contents = {}
    for path in sorted(Path(folder).rglob("*")):
        name = str(path.relative_to(folder))
        if path.is_symlink():
            contents[name] = os.readlink(path)
        else:
            contents[name] = path.read_bytes() if path.is_file() else None
    return contents


def failed_start(recipe, monkeypatch):
    """The folder of a run that failed before its first step."""
    with monkeypatch.context() as patch:
        patch.setattr(trainer, "batch_order", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            vflan.train(recipe)
    return recipe.folder


def write_thesis(folder):
    """A user's own files."""
    (folder / "figures").mkdir(parents=True)
    (folder / "thesis.txt").write_text("three years of work")
    (folder / "figures" / "1.png").write_bytes(b"a figure")


@pytest.mark.parametrize("name", BAD_NAMES, ids=ascii)
def test_a_name_that_is_not_a_plain_folder_name_is_refused(recipe, name):
    with pytest.raises(ValueError, match="name="):
        vflan.replace(recipe, name=name)


@pytest.mark.parametrize(
    "name", ["base", "基础模型", "modèle 2", "a-b_c.d", "x" * 100, "NULL", "базовая"]
)
def test_plain_names_of_any_script_are_accepted(recipe, name):
    assert vflan.replace(recipe, name=name).folder.name == name == folder_name(name)


def test_a_name_that_is_too_long_with_its_seed_is_refused(recipe):
    from vflan.config import for_seed

    with pytest.raises(ValueError, match="more than 100"):
        for_seed(vflan.replace(recipe, name="x" * 98), 1)


def test_a_run_trains_under_a_chinese_name(recipe):
    run = vflan.train(vflan.replace(recipe, name="基础", max_steps=1))
    assert run.finished and run.folder.name == "基础"


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="only Linux has /proc")
def test_a_folder_that_cannot_be_made_is_one_sentence_before_anything_is_read(recipe):
    Path(recipe.samples).unlink()
    for place in ("/proc/runs", "/proc/self/runs"):
        with pytest.raises(OSError, match="cannot be made .*; choose another folder$"):
            vflan.train(vflan.replace(recipe, runs=place))


def test_no_run_starts_in_a_folder_with_other_files(recipe, tmp_path):
    write_thesis(recipe.folder)
    before = snapshot(tmp_path)
    with pytest.raises(
        FileExistsError,
        match=r"is not a run of vflan: it holds figures/1.png, thesis.txt. Nothing was",
    ):
        vflan.train(recipe)
    assert snapshot(tmp_path) == before


def test_a_foreign_recipe_json_does_not_make_a_run_folder(recipe, tmp_path):
    recipe.folder.mkdir(parents=True)
    (recipe.folder / "recipe.json").write_text('{"name": "apple pie", "flour": 200}')
    before = snapshot(tmp_path)
    with pytest.raises(FileExistsError, match="it holds recipe.json"):
        vflan.train(recipe)
    assert snapshot(tmp_path) == before


def test_files_laid_into_a_start_that_failed_stay_when_the_recipe_changes(
    recipe, monkeypatch, tmp_path
):
    write_thesis(failed_start(recipe, monkeypatch))
    before = snapshot(tmp_path / "runs")
    with pytest.raises(FileExistsError, match="figures/1.png, thesis.txt. Nothing was deleted"):
        vflan.train(vflan.replace(recipe, lr=0.5))
    assert snapshot(tmp_path / "runs") == before
    # The same recipe continues beside them.
    assert vflan.train(vflan.replace(recipe, max_steps=None)).finished
    assert (recipe.folder / "thesis.txt").read_text() == "three years of work"


def test_another_recipe_may_replace_a_failed_start(recipe, monkeypatch):
    folder = failed_start(recipe, monkeypatch)
    for name in (
        "answers/pope.jsonl",
        "tensorboard/vflan/events.1",
        "checkpoints/.part/0.pt",
        ".model/config.json",
    ):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("old")
    run = vflan.train(vflan.replace(recipe, lr=0.5, max_steps=1))
    assert run.finished and run.recipe.lr == 0.5
    assert not {"answers", "tensorboard", "checkpoints", ".model"} & {
        path.name for path in folder.iterdir()
    }


@pytest.mark.parametrize("inside", ["model", "tensorboard", "answers", "metrics.jsonl"])
def test_a_link_in_a_run_folder_is_not_followed(recipe, monkeypatch, tmp_path, inside):
    write_thesis(tmp_path / "home")
    (failed_start(recipe, monkeypatch) / inside).symlink_to(tmp_path / "home")
    before = snapshot(tmp_path / "runs") | snapshot(tmp_path / "home")
    with pytest.raises(FileExistsError, match=f"{inside}. Nothing was deleted"):
        vflan.train(vflan.replace(recipe, lr=0.5))
    assert snapshot(tmp_path / "runs") | snapshot(tmp_path / "home") == before


def test_a_linked_run_folder_is_used_but_never_emptied(recipe, monkeypatch, tmp_path):
    (tmp_path / "big disk").mkdir()
    recipe.folder.parent.mkdir()
    recipe.folder.symlink_to(tmp_path / "big disk")
    failed_start(recipe, monkeypatch)
    before = snapshot(tmp_path / "big disk")
    with pytest.raises(FileExistsError, match="link"):
        vflan.train(vflan.replace(recipe, lr=0.5))
    assert snapshot(tmp_path / "big disk") == before
    assert vflan.train(recipe).finished and recipe.folder.is_symlink()


def test_runs_may_be_a_link(recipe, monkeypatch, tmp_path):
    (tmp_path / "big disk").mkdir()
    write_thesis(tmp_path / "big disk" / "mine")
    Path(recipe.runs).symlink_to(tmp_path / "big disk")
    failed_start(recipe, monkeypatch)
    assert vflan.train(vflan.replace(recipe, lr=0.5, max_steps=1)).finished
    assert (tmp_path / "big disk" / "mine" / "thesis.txt").read_text() == "three years of work"


@pytest.mark.parametrize("name", ["runs", "runs/base"])
def test_a_file_in_place_of_a_folder_is_reported_in_one_sentence(recipe, tmp_path, name):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("a file")
    with pytest.raises(NotADirectoryError, match=f"{name} is no folder, but one is needed there"):
        vflan.train(recipe)
    assert (tmp_path / name).read_text() == "a file"


def test_a_model_folder_with_other_files_is_renamed_at_the_end(recipe, monkeypatch, capsys):
    folder = failed_start(recipe, monkeypatch)
    (folder / "model").mkdir()
    (folder / "model" / "notes.txt").write_text("mine")
    assert (
        vflan.train(recipe).finished
        and (folder / "model.old-1" / "notes.txt").read_text() == "mine"
    )
    assert "model.old-1" in capsys.readouterr().err and (folder / "model" / "config.json").is_file()


def test_only_unfinished_files_of_vflan_are_deleted_when_a_run_starts(recipe, monkeypatch):
    folder = failed_start(recipe, monkeypatch)
    for name in (".recipe.json.123", ".notes.json.bak", ".recipe.json.mine"):
        (folder / name).write_text("x")
    vflan.train(recipe)
    assert {".notes.json.bak", ".recipe.json.mine"} <= {path.name for path in folder.iterdir()}
    assert not (folder / ".recipe.json.123").exists()


def test_a_foreign_lock_file_is_not_emptied(recipe, monkeypatch, tmp_path):
    folder = failed_start(recipe, monkeypatch)
    (tmp_path / "diary").write_text("dear diary")
    (folder / ".lock").unlink()
    (folder / ".lock").symlink_to(tmp_path / "diary")
    with pytest.raises(FileExistsError, match="not vflan's lock file"):
        vflan.train(recipe)
    (folder / ".lock").unlink()
    (folder / ".lock").write_text("dear diary")
    with pytest.raises(FileExistsError, match="not vflan's lock file"):
        vflan.train(recipe)
    assert (tmp_path / "diary").read_text() == (folder / ".lock").read_text() == "dear diary"


def test_a_run_at_a_checkpoint_never_uses_an_existing_folder(recipe, monkeypatch):
    saving = vflan.replace(recipe, max_steps=4, save_every=2)

    def kill(now, *rest, real=trainer.learning_rate):
        if now == 3:
            raise KeyboardInterrupt
        return real(now, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(trainer, "learning_rate", kill)
        with pytest.raises(KeyboardInterrupt):
            vflan.train(saving)
    beside = saving.folder.with_name("base-step2")
    write_thesis(beside)
    before = snapshot(beside)
    with pytest.raises(FileExistsError, match="thesis.txt"):
        Run(saving.folder).at()
    assert snapshot(beside) == before


# Two processes at once


def test_a_run_that_another_process_finishes_meanwhile_is_not_deleted(recipe, monkeypatch):
    """The second process checks an empty folder, and gets the lock after the first has finished."""
    first, second = vflan.replace(recipe, max_steps=1), vflan.replace(recipe, max_steps=1, lr=0.5)
    has_checked, first_is_done = threading.Event(), threading.Event()
    real_lock, errors = Run.lock, []

    def slow_lock(self, **options):
        is_second = threading.current_thread() is not threading.main_thread()
        if is_second and not has_checked.is_set():
            has_checked.set()
            first_is_done.wait(60)
        return real_lock(self, **options)

    def other():
        try:
            vflan.train(second)
        except ValueError as error:
            errors.append(str(error))

    monkeypatch.setattr(Run, "lock", slow_lock)
    thread = threading.Thread(target=other)
    thread.start()
    assert has_checked.wait(60)
    run = vflan.train(first)
    before = snapshot(run.folder)
    first_is_done.set()
    thread.join(60)
    assert errors and "holds another recipe's run:\n  lr: 0.01 -> 0.5" in errors[0]
    assert snapshot(run.folder) | {".lock": b""} == before | {".lock": b""} and run.recipe == first


def test_the_folder_is_locked_from_the_first_check_to_the_end(recipe, monkeypatch):
    monkeypatch.setattr(runs, "PATIENCE", 0)
    refused = []

    def fit(folder):
        def other():
            try:
                vflan.train(vflan.replace(recipe, lr=0.5))
            except RuntimeError as error:
                refused.append(str(error))

        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
        real(folder)

    real = trainer.fit
    monkeypatch.setattr(trainer, "fit", fit)
    assert vflan.train(vflan.replace(recipe, max_steps=1)).recipe.lr == recipe.lr
    assert len(refused) == 1 and "is being trained by process" in refused[0]


def test_launched_processes_refuse_a_folder_that_another_run_has_taken(recipe, monkeypatch):
    def launch(folder, processes):
        begun = Run(folder).start_record()
        # Another process, in the moment without a lock.
        vflan.train(vflan.replace(recipe, lr=0.5, max_steps=1))
        monkeypatch.setenv("VFLAN_BEGUN", json.dumps(begun))
        real_fit(folder)

    real_fit = trainer.fit
    monkeypatch.setattr(trainer.distributed, "launch", launch)
    monkeypatch.setattr(trainer.distributed, "check_processes", lambda *_: None)
    with pytest.raises((RuntimeError, ValueError), match="another recipe"):
        vflan.train(recipe, num_processes=2)
    assert Run(recipe.folder).recipe.lr == 0.5


# Folders that are written whole


def test_clear_renames_a_folder_with_other_files(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "config.json").write_text("ours")
    (tmp_path / "a" / "diary").write_text("not ours")
    io.clear(tmp_path / "a", io.MODEL)
    assert snapshot(tmp_path) == {
        "a.old-1": None,
        "a.old-1/config.json": b"ours",
        "a.old-1/diary": b"not ours",
    }


@pytest.mark.parametrize("target", ["a file", "a link", "home"])
def test_whole_folder_never_overwrites_anything(tmp_path, target):
    (tmp_path / "a file").write_text("mine")
    (tmp_path / "a link").symlink_to(tmp_path / "nowhere")
    write_thesis(tmp_path / "home")
    before = snapshot(tmp_path)
    with pytest.raises(FileExistsError, match="name a new folder"):
        with io.whole_folder(tmp_path / target, tmp_path / ".part"):
            pytest.fail("begun")
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("name", ["../x", "..", "a/../b", "/abs", "a\nb"])
def test_a_name_for_answers_cannot_lead_outside_the_folder(tmp_path, name):
    with pytest.raises(ValueError, match="one plain folder name"):
        vflan.evaluate(None, model=object(), name=name)


def test_files_laid_into_a_mini_world_while_it_is_built_again_stay(tmp_path, monkeypatch):
    def write(folder, **_):
        (folder / "captions.json").write_text("[]")

    def write_while_a_user_works(folder, **_):
        write(folder)
        if folder.name == ".samples.new":
            (tmp_path / "samples" / "thesis.txt").write_text("three years of work")

    for name in ("write_samples", "write_benchmarks", "write_twins"):
        monkeypatch.setattr(world, name, write)
    world.build(tmp_path, seed=1)
    monkeypatch.setattr(world, "write_samples", write_while_a_user_works)
    with pytest.raises(FileExistsError, match="thesis.txt.*Nothing was deleted"):
        world.build(tmp_path, seed=2)
    assert (tmp_path / "samples" / "thesis.txt").read_text() == "three years of work"
    (tmp_path / "samples" / "thesis.txt").rename(tmp_path / "thesis.txt")
    monkeypatch.setattr(world, "write_samples", write)
    world.build(tmp_path, seed=2)
    assert '"seed": 2' in (tmp_path / "samples" / "built.json").read_text()
