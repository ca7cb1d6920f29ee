import io
import json
import os
import shutil
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest
from datasets import Dataset
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from PIL import Image

from vflan.config import Recipe
from vflan.data import validation
from vflan.data.conversation import encode, expand
from vflan.data.images import read_picture
from vflan.data.samples import load_samples, save_samples
from vflan.data.validation import check
from vflan.training.batching import prepare

ASK, SAY = {"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "a dot"}


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    """An empty cache for each test."""
    monkeypatch.setattr(validation, "CACHE", tmp_path_factory.mktemp("cache"))
    return validation.CACHE


@pytest.fixture
def opened(monkeypatch):
    """The names of the pictures that check opened, in order."""
    names = []
    monkeypatch.setattr(
        validation,
        "decoded",
        lambda name, *more, read=validation.decoded: [names.append(name), read(name, *more)][1],
    )
    return names


def make(folder, *rows):
    (folder / "images").mkdir(exist_ok=True)
    if not (folder / "images" / "ok.png").exists():
        Image.new("RGB", (9, 9)).save(folder / "images" / "ok.png")
    path = folder / "rows.json"
    path.write_text(json.dumps(rows))
    return path


def row(**changes):
    return {"id": "r", "image": "ok.png", "task_name": "t", "conversations": [ASK, SAY]} | changes


def reason(folder, **changes):
    report = check(load_samples(make(folder, row(**changes))))
    assert report.rows == report.ok + len(report.bad)
    return report.bad.reason.iloc[0] if len(report.bad) else "fine"


@pytest.mark.parametrize(
    "turns, expected, kind",
    [
        ([], "no turns", "no turns"),
        (None, "no turns", "no turns"),
        ([ASK], "wrong order", "wrong order"),
        ([SAY], "wrong order", "wrong order"),
        ([ASK, ASK, SAY], "wrong order", "wrong order"),
        ([ASK, SAY, SAY], "wrong order", "wrong order"),
        ([ASK, {"from": "bot", "value": "x"}], "unknown role", "unknown role"),
        ([ASK, {"value": "x"}], "unknown role", "unknown role"),
        ([ASK, {"from": "gpt", "value": " \n"}], "empty answer", "empty answer"),
        ([ASK, {"from": "gpt", "value": None}], "a turn without text", "a turn without text"),
        (
            [{"from": "human", "value": "What?"}, SAY],
            "picture without an image token",
            "image token count",
        ),
        ([ASK, SAY, ASK, SAY], "image token in more than one question", "image token count"),
        (
            [ASK, {"from": "gpt", "value": "<image>"}],
            "image token in an answer",
            "image token count",
        ),
    ],
)
def test_a_bad_conversation_is_reported_with_its_reason(tmp_path, turns, expected, kind):
    report = check(load_samples(make(tmp_path, row(conversations=turns))))
    assert report.bad.reason.iloc[0].startswith(expected)
    assert report.reasons.to_dict() == {kind: 1}


def test_an_image_token_without_a_picture_is_bad(tmp_path):
    assert reason(tmp_path, image=None) == "image token without a picture"


def test_missing_truncated_undecodable_and_oversized_images_have_different_reasons(
    tmp_path, monkeypatch
):
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
    Image.new("1", (70, 70)).save(tmp_path / "images" / "huge.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 2100)
    assert reason(tmp_path, image="huge.png").startswith("too many pixels")


def test_a_picture_outside_the_folder_is_bad_even_when_it_exists(tmp_path):
    make(tmp_path)
    Image.new("RGB", (9, 9)).save(tmp_path / "secret.png")
    os.symlink(tmp_path / "secret.png", tmp_path / "images" / "link.png")
    (tmp_path / "images-too").mkdir()
    Image.new("RGB", (9, 9)).save(tmp_path / "images-too" / "x.png")
    for name in ("../secret.png", str(tmp_path / "secret.png"), "link.png", "../images-too/x.png"):
        assert reason(tmp_path, image=name).startswith("path outside"), name
    assert reason(tmp_path, image="../images/ok.png") == "fine"


def test_a_folder_link_at_the_top_of_the_images_folder_is_the_users_word(tmp_path):
    """As for COCO on another disk; no other link may lead out of the images folder."""
    make(tmp_path)
    images, disk = tmp_path / "images", tmp_path / "disk"
    (disk / "train2017").mkdir(parents=True)
    (tmp_path / "secret").mkdir()
    for folder in (disk, disk / "train2017", tmp_path / "secret"):
        Image.new("RGB", (9, 9)).save(folder / "x.png")
    (images / "gqa").mkdir()
    links = {
        images / "coco": disk,
        images / "gqa" / "images": tmp_path / "secret",
        images / "picture.png": tmp_path / "secret" / "x.png",
        images / "gqa" / "picture.png": tmp_path / "secret" / "x.png",
        disk / "out": tmp_path / "secret",
        disk / "out.png": tmp_path / "secret" / "x.png",
        disk / "same.png": disk / "train2017" / "x.png",
    }
    for link, target in links.items():
        os.symlink(target, link)
    for name in ("coco/x.png", "coco/train2017/x.png", "coco/same.png", "./coco//x.png"):
        assert reason(tmp_path, image=name) == "fine", name
    outside = ["gqa/images/x.png", "picture.png", "gqa/picture.png", "coco/out/x.png"]
    outside += ["coco/out.png", "coco/../secret/x.png", "coco/../../secret/x.png"]
    outside += [str(disk / "x.png"), "../disk/x.png"]
    for name in outside:
        assert reason(tmp_path, image=name).startswith("path outside the images folder"), name
    # The row keeps the name that it had, so that it can be saved and read again.
    samples = load_samples(make(tmp_path, row(image="coco/train2017/x.png")))
    assert samples[0]["image"] == str(images / "coco" / "train2017" / "x.png")
    save_samples(samples, tmp_path / "again.json", images)
    assert json.loads((tmp_path / "again.json").read_text())[0]["image"] == "coco/train2017/x.png"


def test_rows_that_can_be_repaired_are_kept_and_reported(tmp_path):
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


def tokenizer_of(backbones):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(backbones["language_model"])


def test_an_answer_beyond_max_length_is_bad_and_one_that_is_cut_is_reported(tmp_path, backbones):
    samples = load_samples(make(tmp_path, row()))
    tokenizer = tokenizer_of(backbones)
    ids, labels = expand(*encode(samples[0]["conversations"], tokenizer), 4, 0)
    first, end = labels.index(next(label for label in labels if label >= 0)), len(ids)

    def judged(max_length):
        report = check(samples, tokenizer, max_length=max_length, image_tokens=4)
        return report.reasons.to_dict(), list(report.repaired.reason)

    assert judged(end) == ({}, [])
    assert judged(end - 1) == ({}, [f"left out: 1 answer tokens beyond max_length={end - 1}"])
    assert judged(first + 1) == (
        {},
        [f"left out: {end - first - 1} answer tokens beyond max_length={first + 1}"],
    )
    assert judged(first) == ({"too long at max_length": 1}, [])
    assert check(samples).ok == 1  # without a tokenizer no length is known


def test_totals_add_up_by_task(tmp_path):
    rows = [
        row(id=str(i), task_name="ab"[i % 2], image=["ok.png", "gone.png"][i > 7])
        for i in range(10)
    ]
    rows[3]["conversations"] = [SAY, ASK, SAY]
    by_task = check(load_samples(make(tmp_path, *rows))).by_task.set_index("task_name")
    assert by_task.loc["a"].to_dict() == dict(
        rows=5, ok=4, bad=1, repaired=0, duplicates=0, contaminated=0
    )
    assert by_task.loc["b"].to_dict() == dict(
        rows=5, ok=4, bad=1, repaired=1, duplicates=0, contaminated=0
    )


def test_the_same_image_under_another_name_is_a_duplicate_and_not_bad(tmp_path):
    make(tmp_path)
    images = tmp_path / "images"
    Image.new("RGB", (9, 9)).save(images / "also.bmp")  # other bytes, same pixels
    Image.new("RGB", (3, 27)).save(images / "long.png")  # the same bytes of pixels in another shape
    report = check(
        load_samples(
            make(tmp_path, *[row(image=n) for n in ("ok.png", "also.bmp", "long.png", "also.bmp")])
        )
    )
    assert report.ok == 4 and "1 pictures repeat" in str(report)
    assert report.duplicates.to_dict("records") == [
        dict(picture=str(images / "also.bmp"), same_as=str(images / "ok.png"), rows=[1, 3])
    ]
    assert report.by_task.duplicates.tolist() == [2]


def test_a_shared_image_is_decoded_once_and_not_again_by_the_second_check(tmp_path, opened):
    samples = load_samples(make(tmp_path, *[row(id=i) for i in range(20_000)]))
    assert check(samples).ok == 20_000 and len(opened) == 1
    assert check(samples).ok == 20_000 and len(opened) == 1


def test_an_image_that_changed_is_decoded_again(tmp_path, opened):
    samples = load_samples(make(tmp_path, row()))
    assert check(samples).ok == 1
    picture = Path(samples[0]["image"])
    picture.write_bytes(picture.read_bytes()[:30])
    assert check(samples).ok == 0
    Image.new("RGB", (8, 8)).save(picture)
    assert check(samples).ok == 1 and len(opened) == 3


def test_the_images_of_a_copied_folder_are_not_decoded_again(tmp_path, opened):
    """Another path and another time, but the same content; one of another content is decoded."""
    (tmp_path / "first").mkdir()
    rows = [row(image=f"{i}.png") for i in range(4)]
    make(tmp_path / "first", *rows)
    for i in range(4):
        Image.new("RGB", (9, 9), (i, 0, 0)).save(tmp_path / "first" / "images" / f"{i}.png")
    before = check(load_samples(tmp_path / "first" / "rows.json"))
    shutil.copytree(tmp_path / "first", tmp_path / "copy", copy_function=shutil.copyfile)
    Image.new("RGB", (9, 9), (9, 9, 9)).save(tmp_path / "copy" / "images" / "2.png")
    (tmp_path / "copy" / "images" / "3.png").write_text("broken")
    opened.clear()
    after = check(load_samples(tmp_path / "copy" / "rows.json"))
    assert [Path(name).name for name in opened] == ["2.png", "3.png"]
    assert (before.ok, after.ok, after.bad.row.tolist()) == (4, 3, [3])


def test_an_interrupted_check_continues_where_it_stopped(tmp_path, opened, monkeypatch):
    make(tmp_path)
    monkeypatch.setattr(validation, "PICTURES", 4)
    for i in range(12):
        Image.new("RGB", (9, 9), (i, 0, 0)).save(tmp_path / "images" / f"{i}.png")
    samples = load_samples(make(tmp_path, *[row(image=f"{i}.png") for i in range(12)]))

    def stop(name, stamp=validation.stamp):
        if name.endswith("9.png"):
            raise KeyboardInterrupt
        return stamp(name)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(validation, "stamp", stop)
        check(samples)
    assert len(opened) == 8
    assert check(samples).ok == 12 and len(opened) == 12 and len(set(opened)) == 12


def test_a_broken_cache_is_replaced(tmp_path, cache):
    samples = load_samples(make(tmp_path, row()))
    (cache / validation.CACHE_FILE).write_text(
        "this is no database, and long enough to be taken for one" * 100
    )
    assert check(samples).ok == 1
    with sqlite3.connect(cache / validation.CACHE_FILE) as shelf:
        assert shelf.execute("select count(*) from pictures").fetchone() == (1,)


@pytest.mark.parametrize("error", [FileNotFoundError, PermissionError])
def test_a_broken_cache_that_cannot_be_set_aside_is_held_in_memory(
    tmp_path, cache, monkeypatch, error
):
    samples = load_samples(make(tmp_path, row()))
    (cache / validation.CACHE_FILE).write_text("this is no database" * 100)

    def fail(path):
        raise error(path)

    monkeypatch.setattr(validation, "set_aside", fail)
    with pytest.warns(UserWarning, match="an interrupted check will start from the beginning"):
        assert check(samples).ok == 1


def test_without_a_writable_cache_the_check_warns_and_continues(tmp_path, monkeypatch):
    samples = load_samples(make(tmp_path, row()))
    (tmp_path / "file").touch()
    monkeypatch.setattr(validation, "CACHE", tmp_path / "file" / "cache")
    with pytest.warns(UserWarning, match="cannot be written"):
        assert check(samples).ok == 1


def test_training_imports_no_benchmark_and_no_judge():
    """check compares with benchmarks only if `against` is given; training does not need them."""
    code = "import sys, vflan.training.trainer; print(*sys.modules)"
    loaded = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    modules = set(loaded.stdout.split())
    assert "vflan.data.validation" in modules
    assert "vflan.data.decontamination" not in modules
    assert not {name for name in modules if name.startswith("vflan.evaluation")}


def test_rows_are_read_in_batches(tmp_path, monkeypatch):
    samples = load_samples(make(tmp_path, *[row(id=i) for i in range(50)]))
    monkeypatch.setattr(validation, "ROWS", 7)
    monkeypatch.setattr(Dataset, "__getitem__", lambda *_: pytest.fail("a whole column was read"))
    assert check(samples).ok == 50


def test_the_table_in_a_notebook_escapes_html_in_the_samples(tmp_path):
    report = check(
        load_samples(make(tmp_path, row(id="<script>", task_name="<b>t</b>", image="<i>.png")))
    )
    shown = report._repr_html_()
    assert (
        "&lt;script&gt;" in shown
        and "<script>" not in shown
        and "<b>t</b>" not in shown
        and "<i>" not in shown
    )


# -------------------------------------------------------- any file: every row is accounted for

ODD_TEXTS = [
    "",
    " \n",
    "<image>",
    "<image>\nWhat?",
    "What?\n<image>",
    "<image><image>",
    "a <image> b",
    "</s>",
    "<s><unk>",
]
ODD_TEXTS += ["USER: x ASSISTANT: y", "\u2028", "e\u0301\u202e", "\ud800", "\x00", "word " * 200]
SOUND_PICTURES = [
    "whole.png",
    "whole.jpg",
    "cmyk.jpg",
    "deep.png",
    "palette.png",
    "moving.gif",
    "clear.png",
    "line.png",
]
SOUND_PICTURES += ["jpeg.png", "tiny.bmp", "float.tiff"]
ODD_PICTURES = [
    "empty.png",
    "text.jpg",
    "folder.png",
    *(f"cut{i}.{k}" for i in range(8) for k in ("png", "jpg", "gif")),
]
TRICKS = [
    "gone.png",
    "../secret.png",
    "/etc/hostname",
    "a\x00b.png",
    "x" * 5000,
    "a/" * 3000 + "b.png",
    "",
    ".",
    "..",
]
TRICKS += [
    "images/../whole.png",
    "\ud800.png",
    "whole.png::x",
    "x.zip::whole.png",
    "x.parquet::0",
    "whole.png/deeper.png",
]
TRICKS += ["~/x.png", "C:\\x.png", " whole.png "]

TEXT = st.text(max_size=30) | st.sampled_from(ODD_TEXTS)
GARBAGE = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=5,
)
ROLE = st.sampled_from(["human", "gpt", "Human", "system", "", None]) | GARBAGE
TURNS = st.lists(
    st.fixed_dictionaries({}, optional={"from": ROLE, "value": TEXT | GARBAGE}) | GARBAGE,
    max_size=5,
)
ANY_PICTURE = st.sampled_from(SOUND_PICTURES + ODD_PICTURES + TRICKS)
TALK = st.lists(TEXT, min_size=1, max_size=4).map(
    lambda texts: [
        {"from": ["human", "gpt"][i % 2], "value": v} for i, v in enumerate([ASK["value"], *texts])
    ]
)
CONVERSATIONS = TALK | st.just([ASK, SAY]) | TURNS | GARBAGE
ANYTHING = {
    "id": st.integers() | GARBAGE,
    "image": ANY_PICTURE | GARBAGE,
    "task_name": TEXT | GARBAGE,
}
RECORD = (
    st.fixed_dictionaries(
        {}, optional=ANYTHING | {"conversations": CONVERSATIONS}
    )  # anything may be wrong
    | st.fixed_dictionaries(
        {"image": ANY_PICTURE, "conversations": st.just([ASK, SAY])}
    )  # the picture
    | st.fixed_dictionaries(
        {"image": st.sampled_from(SOUND_PICTURES), "conversations": CONVERSATIONS}
    )  # the rest
)


@pytest.fixture(scope="session")
def odd_pictures(tmp_path_factory):
    """A folder of pictures, sound, odd and broken."""
    folder = tmp_path_factory.mktemp("odd") / "images"
    folder.mkdir()
    colour, grey = Image.effect_noise((40, 30), 60).convert("RGB"), Image.effect_noise((40, 30), 60)
    colour.save(folder / "whole.png")
    colour.save(folder / "whole.jpg")
    colour.convert("CMYK").save(folder / "cmyk.jpg")
    Image.new("I;16", (9, 7), 40_000).save(folder / "deep.png")
    colour.quantize(7).save(folder / "palette.png")
    grey.save(
        folder / "moving.gif", save_all=True, append_images=[grey.rotate(90), grey.rotate(180)]
    )
    colour.convert("RGBA").save(folder / "clear.png")
    Image.new("LA", (1, 900)).save(folder / "line.png")
    colour.save(folder / "jpeg.png", format="JPEG")
    Image.new("1", (1, 1)).save(folder / "tiny.bmp")
    Image.new("F", (5, 5), 0.5).save(folder / "float.tiff")
    (folder / "empty.png").touch()
    (folder / "text.jpg").write_text("<html>404</html>")
    (folder / "folder.png").mkdir()
    for kind in ("png", "jpg", "gif"):
        file = io.BytesIO()
        colour.save(file, {"jpg": "JPEG"}.get(kind, kind))
        for i in range(8):
            (folder / f"cut{i}.{kind}").write_bytes(
                file.getvalue()[: int(len(file.getvalue()) * (i + 0.5) / 8)]
            )
    Image.new("RGB", (9, 9)).save(folder.parent / "secret.png")
    return folder


class Counted:
    rows = bad = kept = repaired = 0


def test_any_record_and_picture_is_judged_and_training_keeps_exactly_the_sound_ones(
    backbones, odd_pictures, tmp_path
):
    tokenizer, count = tokenizer_of(backbones), Counted()

    class Config:
        image_seq_length, image_token_id = 4, tokenizer.convert_tokens_to_ids("<image>")

    path = tmp_path / "odd.json"
    recipe = Recipe(
        "odd",
        "base",
        "",
        "",
        str(path),
        str(odd_pictures),
        str(tmp_path),
        max_bad_share=1.0,
        max_length=90,
    )

    # one example is one file; nothing is shrunk, as that would take minutes
    @settings(
        max_examples=40,
        deadline=None,
        derandomize=True,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(st.lists(RECORD, min_size=30, max_size=30))
    def judge(records):
        path.write_text(json.dumps(records))
        samples = load_samples(path, odd_pictures)
        report = check(samples, tokenizer, max_length=90, image_tokens=Config.image_seq_length)
        bad = set(report.bad.row)
        assert len(samples) == len(records) == report.rows == report.ok + len(report.bad) and len(
            bad
        ) == len(report.bad)
        assert report.reasons.sum() == len(bad) and bad.isdisjoint(report.repaired.row)
        assert (
            report.by_task[["ok", "bad"]].to_numpy().sum()
            == report.by_task.rows.sum()
            == len(records)
        )
        if report.ok:
            data = prepare(recipe, tokenizer, Config, tmp_path)
            listed = [
                json.loads(line) for line in (tmp_path / "repaired.jsonl").read_text().splitlines()
            ]
            assert listed == report.repaired.to_dict("records") and data.repaired == len(listed)
            count.repaired += len(listed)
            sound = [sample for number, sample in enumerate(samples) if number not in bad]
            assert list(data.ids) == [sample["id"] for sample in sound] and data.bad == len(bad)
            shown = [data.pictures[number] if number >= 0 else None for number in data.picture]
            assert shown == [sample["image"] or None for sample in sound]
            assert {read_picture(image).mode for image in data.pictures} <= {"RGB"}
            count.kept += len(data.ids)
        count.rows, count.bad = count.rows + report.rows, count.bad + len(bad)

    judge()
    assert count.rows >= 1000 and count.bad > 300 and count.kept > 100 and count.repaired > 10
