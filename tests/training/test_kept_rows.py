"""A run's rows are tokenised once, its pictures stay those that it began with."""

import json
import os
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import vflan
from tests.training.test_resume import killed, same_weights
from vflan.training.run import Run

vflan.train  # noqa: B018 (imports the file)
TRAIN = sys.modules["vflan.training.trainer"]  # the file; vflan.train is its function


@pytest.fixture
def saving(recipe):
    return vflan.replace(recipe, max_steps=6, save_every=2)


@pytest.fixture
def prepared(monkeypatch):
    """A list that grows with each call of `prepare`."""
    calls = []
    real = TRAIN.prepare
    monkeypatch.setattr(TRAIN, "prepare", lambda *a, **k: [calls.append(1), real(*a, **k)][1])
    return calls


def test_a_resumed_run_reads_the_rows_that_it_began_with(saving, monkeypatch, prepared):
    straight = vflan.train(vflan.replace(saving, name="straight"))
    run = killed(saving, monkeypatch)
    assert len(prepared) == 2 and (run.folder / "rows" / "tokens.npy").is_file()
    bad = (run.folder / "bad.jsonl").stat().st_mtime_ns
    resumed = vflan.train(saving)
    assert len(prepared) == 2 and (run.folder / "bad.jsonl").stat().st_mtime_ns == bad
    assert same_weights(straight, resumed)
    assert resumed.metrics().loss.tolist() == straight.metrics().loss.tolist()
    assert resumed.summary["rows"] == straight.summary["rows"] == 32
    assert not (run.folder / "rows").exists()


def test_a_run_that_cannot_resume_writes_no_rows(saving, monkeypatch):
    run = killed(vflan.replace(saving, save_every=0), monkeypatch)
    assert not (run.folder / "rows").exists()


@pytest.mark.parametrize("damage", ["a bit", "a file", "the record", "unfinished"])
def test_damaged_rows_are_made_again(saving, monkeypatch, prepared, damage):
    straight = vflan.train(vflan.replace(saving, name="straight"))
    rows = killed(saving, monkeypatch).folder / "rows"
    if damage == "a bit":
        content = bytearray((rows / "tokens.npy").read_bytes())
        content[len(content) // 2] ^= 1
        (rows / "tokens.npy").write_bytes(content)
    elif damage == "a file":
        (rows / "start.npy").unlink()
    elif damage == "the record":
        (rows / "rows.json").write_text("{")
    else:
        rows.rename(rows.with_name(".rows"))
    assert same_weights(straight, vflan.train(saving)) and len(prepared) == 3
    assert not rows.exists() and not rows.with_name(".rows").exists()


def test_rows_of_other_code_are_made_again(saving, monkeypatch, prepared):
    rows_file = sys.modules["vflan.training.kept_rows"]
    run = killed(saving, monkeypatch)
    monkeypatch.setattr(rows_file, "versions", lambda: dict(code="another"))
    assert vflan.train(saving).finished and len(prepared) == 2 and run.finished


def exchange(recipe, name="5.png", colour=(1, 2, 3)):
    """Another picture under the same name, with the size and time of the first."""
    path = Path(recipe.images, name)
    status = path.stat()
    Image.new("RGB", (30, 20), colour).save(path)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    return path


def test_a_picture_exchanged_since_the_kill_is_named(saving, monkeypatch):
    run = killed(saving, monkeypatch)
    path = exchange(saving)
    with pytest.raises(
        ValueError, match=r"1 of 32 pictures changed since .*base began \(first: .*5.png"
    ):
        vflan.train(saving)
    path.unlink()
    with pytest.raises(ValueError, match=r"pictures changed .*\(first: missing picture: .*5.png"):
        vflan.train(saving)
    assert [p.name for p in (run.folder / "checkpoints").iterdir()] and not run.finished


def test_a_picture_exchanged_and_code_changed_is_named_too(saving, monkeypatch):
    killed(saving, monkeypatch)
    exchange(saving)
    rows_file = sys.modules["vflan.training.kept_rows"]
    monkeypatch.setattr(rows_file, "versions", lambda: dict(code="another"))
    with pytest.raises(ValueError, match="1 of 32 pictures changed"):
        vflan.train(saving)


def test_a_row_that_shows_another_picture_since_the_kill_is_named(saving, monkeypatch):
    """Its tokens are the same, and no file has changed."""
    killed(saving, monkeypatch)
    rows = json.loads(Path(saving.samples).read_text())
    rows[3]["image"] = rows[4]["image"]
    Path(saving.samples).write_text(json.dumps(rows))
    with pytest.raises(ValueError, match=r"1 of 31 pictures changed .*\(first: .*4.png"):
        vflan.train(saving)


def test_pictures_are_compared_when_a_run_resumes_without_further_checkpoints(saving, monkeypatch):
    killed(saving, monkeypatch)
    exchange(saving)
    with pytest.raises(ValueError, match="1 of 32 pictures changed"):
        vflan.train(vflan.replace(saving, save_every=0))


def test_copied_pictures_with_other_dates_are_the_same(saving, monkeypatch):
    straight = vflan.train(vflan.replace(saving, name="straight"))
    killed(saving, monkeypatch)
    images = Path(saving.images)
    images.rename(images.with_name("before"))
    shutil.copytree(images.with_name("before"), images, copy_function=shutil.copyfile)
    assert same_weights(straight, vflan.train(saving))


def test_a_picture_exchanged_before_the_first_checkpoint_is_trained_on(saving, monkeypatch):
    killed(saving, monkeypatch, step=1)
    exchange(saving)
    fresh = vflan.train(vflan.replace(saving, name="fresh"))
    assert same_weights(fresh, vflan.train(saving))


def test_a_picture_that_was_mended_since_the_kill_does_not_change_the_rows(saving, monkeypatch):
    saving = vflan.replace(saving, max_bad_share=0.1)
    whole = Path(saving.images, "3.png").read_bytes()
    Path(saving.images, "3.png").write_text("broken")
    straight = vflan.train(vflan.replace(saving, name="straight"))
    killed(saving, monkeypatch)
    Path(saving.images, "3.png").write_bytes(whole)
    resumed = vflan.train(saving)
    assert same_weights(straight, resumed) and resumed.summary["bad"] == 1


def test_another_recipe_may_replace_a_start_with_rows(saving, monkeypatch):
    run = killed(saving, monkeypatch, step=1)
    assert (run.folder / "rows").is_dir()
    assert vflan.train(vflan.replace(saving, lr=0.5, max_steps=1)).finished


def test_a_disk_that_is_full_of_rows_ends_in_one_sentence(saving, monkeypatch):
    def save(path, array):
        path.write_bytes(b"half of it")
        raise OSError("4096 requested and 0 written")  # NumPy's own words

    with monkeypatch.context() as patch:
        patch.setattr(np, "save", save)
        with pytest.raises(OSError, match="disk is full: .*it has no checkpoint yet"):
            vflan.train(saving)
    assert not (saving.folder / ".rows").exists()
    assert vflan.train(saving).finished


def test_rows_on_a_disk_that_maps_no_files_are_read(saving, monkeypatch):
    real = np.load

    def load(path, mmap_mode=None):
        if mmap_mode:
            raise OSError(19, "No such device")
        return real(path)

    monkeypatch.setattr(np, "load", load)
    assert vflan.train(saving).finished


def test_a_run_says_when_it_resumes_on_other_threads(saving, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        patch.setattr("torch.get_num_threads", lambda: 2)
        killed(saving, monkeypatch)
    assert vflan.train(saving).finished
    assert (
        "resumes after step 4. Since then, threads 2, now 1: the last bits"
        in capsys.readouterr().err
    )


def test_the_rows_of_a_run_are_vflans_own_files(saving, monkeypatch):
    run = killed(saving, monkeypatch)
    from vflan import io

    assert not io.foreign(run.folder / "rows", io.ROWS) and not io.foreign(run.folder, io.RUN)
    assert Run.open(run.folder).at().finished
