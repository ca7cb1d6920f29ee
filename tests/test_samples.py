import json
import os
import time

import pytest
from PIL import Image

from vflan.checks import check
from vflan.samples import load_samples, save_samples

ASK, SAY = {"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "a dot"}


def make(folder, *rows, lines=False):
    (folder / "images").mkdir(exist_ok=True)
    Image.new("RGB", (9, 9)).save(folder / "images" / "ok.png")
    path = folder / "rows.json"
    path.write_text("\n".join(map(json.dumps, rows)) if lines else json.dumps(rows))
    return path


def row(**changes):
    return {"id": "r", "image": "ok.png", "task_name": "t", "conversations": [ASK, SAY]} | changes


def reason(folder, **changes):
    report = check(load_samples(make(folder, row(**changes))))
    assert report.rows == report.ok + len(report.bad)
    return report.bad.reason.iloc[0] if len(report.bad) else "fine"


def test_an_array_and_json_lines_load_alike(tmp_path):
    rows = [row(id=1), row(id="two", image=None, conversations=[{"from": "human", "value": "line\u2028sep"}, SAY])]
    array = load_samples(make(tmp_path, *rows)).to_list()
    assert load_samples(make(tmp_path, *rows, lines=True)).to_list() == array
    assert array[0]["image"] == str(tmp_path / "images" / "ok.png") and array[1]["image"] is None
    assert [r["id"] for r in array] == ["1", "two"]


def test_a_cut_off_file_is_an_error_that_says_so(tmp_path):
    path = make(tmp_path, row(), row())
    path.write_text(path.read_text()[:-30])
    with pytest.raises(ValueError, match="not whole json"):
        load_samples(path)


def test_samples_survive_writing_and_reading(tmp_path):
    path = make(tmp_path, row(), row(conversations=[{"from": "human", "value": "hé"}, SAY], image=None))
    samples = load_samples(path)
    save_samples(samples, tmp_path / "again.json", tmp_path / "images")
    assert load_samples(tmp_path / "again.json").to_list() == samples.to_list()
    assert json.loads((tmp_path / "again.json").read_text())[0]["image"] == "ok.png"


@pytest.mark.parametrize(
    "turns, expected",
    [
        ([], "no turns"),
        (None, "no turns"),
        ([ASK], "wrong order"),
        ([SAY], "wrong order"),
        ([ASK, ASK, SAY], "wrong order"),
        ([ASK, SAY, SAY], "wrong order"),
        ([ASK, {"from": "bot", "value": "x"}], "unknown role"),
        ([ASK, {"value": "x"}], "unknown role"),
        ([ASK, {"from": "gpt", "value": " \n"}], "empty answer"),
        ([ASK, {"from": "gpt", "value": None}], "empty answer"),
        ([{"from": "human", "value": "What?"}, SAY], "picture without an image token"),
        ([ASK, SAY, ASK, SAY], "image token in more than one question"),
        ([ASK, {"from": "gpt", "value": "<image>"}], "image token in an answer"),
    ],
)
def test_a_bad_conversation_is_named_with_its_reason(tmp_path, turns, expected):
    assert reason(tmp_path, conversations=turns).startswith(expected)


def test_an_image_token_without_a_picture_is_bad(tmp_path):
    assert reason(tmp_path, image=None) == "image token without a picture"


def test_missing_truncated_and_undecodable_pictures_are_told_apart(tmp_path):
    make(tmp_path)
    for kind in ("jpg", "png"):
        Image.effect_noise((64, 64), 90).save(tmp_path / "images" / f"whole.{kind}")
        data = (tmp_path / "images" / f"whole.{kind}").read_bytes()
        (tmp_path / "images" / f"half.{kind}").write_bytes(data[: len(data) // 2])
    (tmp_path / "images" / "text.png").write_text("not a picture")
    assert reason(tmp_path, image="gone.png").startswith("missing picture")
    assert reason(tmp_path, image="half.jpg").startswith("truncated picture")
    assert reason(tmp_path, image="half.png").startswith("truncated picture")
    assert reason(tmp_path, image="text.png").startswith("undecodable picture")
    assert reason(tmp_path, image="whole.jpg") == "fine"


def test_a_picture_outside_the_folder_is_bad_even_when_it_exists(tmp_path):
    make(tmp_path)
    Image.new("RGB", (9, 9)).save(tmp_path / "secret.png")
    os.symlink(tmp_path / "secret.png", tmp_path / "images" / "link.png")
    (tmp_path / "images-too").mkdir()
    Image.new("RGB", (9, 9)).save(tmp_path / "images-too" / "x.png")
    for name in ("../secret.png", str(tmp_path / "secret.png"), "link.png", "../images-too/x.png"):
        assert reason(tmp_path, image=name).startswith("path outside"), name
    assert reason(tmp_path, image="../images/ok.png") == "fine"


def test_what_can_be_repaired_is_kept_and_said(tmp_path):
    hello = {"from": "human", "value": "And?"}
    rows = [
        row(conversations=[SAY, ASK, SAY]),
        row(conversations=[ASK, SAY, hello]),
        row(conversations=[{"from": "human", "value": "<image><image>\nWhat?"}, SAY]),
        row(conversations=[ASK, {"from": "gpt", "value": ""}, hello, SAY]),
        row(),
    ]
    report = check(load_samples(make(tmp_path, *rows)))
    assert (report.rows, report.ok, len(report.bad)) == (5, 5, 0)
    assert list(report.repaired.row) == [0, 1, 2, 3]


def test_twenty_thousand_rows_check_quickly_and_a_shared_picture_is_decoded_once(tmp_path):
    samples = load_samples(make(tmp_path, *[row(id=i) for i in range(20_000)]))
    start = time.process_time()
    assert check(samples).ok == 20_000
    assert time.process_time() - start < 5
