import errno
import io
import json
import pickle
import random
import signal
import subprocess
import sys
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset, concatenate_datasets
from PIL import Image

from vflan.data import formats
from vflan.data import samples as room
from vflan.data.images import picture_trouble, read_picture
from vflan.data.samples import load_samples, save_samples
from vflan.data.validation import check

ASK, SAY = {"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "a dot"}


def make(folder, *rows, lines=False):
    (folder / "images").mkdir(exist_ok=True)
    Image.new("RGB", (9, 9)).save(folder / "images" / "ok.png")
    path = folder / "rows.json"
    path.write_text("\n".join(map(json.dumps, rows)) if lines else json.dumps(rows))
    return path


def row(**changes):
    return {"id": "r", "image": "ok.png", "task_name": "t", "conversations": [ASK, SAY]} | changes


def test_an_array_and_json_lines_give_the_same_samples(tmp_path):
    rows = [
        row(id=1),
        row(id="two", image=None, conversations=[{"from": "human", "value": "line\u2028sep"}, SAY]),
    ]
    array = load_samples(make(tmp_path, *rows)).to_list()
    assert load_samples(make(tmp_path, *rows, lines=True)).to_list() == array
    assert array[0]["image"] == str(tmp_path / "images" / "ok.png") and array[1]["image"] is None
    assert [r["id"] for r in array] == ["1", "two"]


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """The folder of cached tables, empty."""
    monkeypatch.setattr(room, "CACHE", tmp_path / "cache")
    return tmp_path / "cache" / "samples"


@pytest.fixture
def unread(monkeypatch):
    """A function that makes reading a samples file an error from then on."""

    def refuse(*args):
        raise AssertionError("the samples file was read again")

    return lambda: monkeypatch.setattr(room, "read_rows", refuse)


def texts(samples):
    return [[turn["value"] for turn in turns] for turns in samples["conversations"]]


def png(color="red"):
    buffer = io.BytesIO()
    Image.new("RGB", (9, 9), color).save(buffer, "PNG")
    return buffer.getvalue()


def test_the_released_files_open_without_conversion(tmp_path):
    """Rows as in the five releases: extra keys, no task, no image, equal ids, an empty answer."""
    last, hello = (
        {"from": "human", "value": "Name it.\n<image>"},
        {"from": "human", "value": "Hello"},
    )
    flan = dict(id="GQA_1", image="ok.png", task_name="GQA", conversations=[last, SAY])
    rows = [flan, flan | {"conversations": [ASK, {"from": "gpt", "value": ""}]}]
    rows.append(dict(id="004539375", image="ok.png", conversations=[last, SAY]))
    rows.append(dict(id="wgByO4Y_0", model="", conversations=[hello, SAY, hello, SAY]))
    rows.append(dict(id=33471, image="../images/ok.png", conversations=[ASK, SAY, hello, SAY]))
    samples = load_samples(make(tmp_path, *rows))
    assert samples["id"][:] == ["GQA_1", "GQA_1", "004539375", "wgByO4Y_0", "33471"]
    assert samples["task_name"][:] == ["GQA", "GQA", "", "", ""]
    assert [bool(image) for image in samples["image"]] == [True, True, True, False, True]
    assert texts(samples)[0][0] == "Name it.\n<image>"
    report = check(samples)
    assert (report.ok, list(report.bad.row), list(report.bad.reason)) == (4, [1], ["empty answer"])


def test_malformed_rows_are_kept_and_reported_by_check(tmp_path):
    odd = [
        None,
        5,
        "text",
        [],
        {},
        {"conversations": 3},
        {"conversations": [1, None, {"from": 2, "value": ["x"]}]},
    ]
    odd += [
        row(image=image)
        for image in (
            3,
            ["ok.png", "b.png"],
            {"a": 1},
            "",
            ".",
            "a\0b",
            "x" * 5000,
            "\ud800.png",
            "ok.png/",
        )
    ]
    odd += [
        row(conversations=[ASK, {"from": "gpt", "value": "half \udc00 pair"}]),
        row(id=None),
        row(task_name=7),
    ]
    for lines in (False, True):
        samples = load_samples(make(tmp_path, *odd, lines=lines))
        assert (
            len(samples) == len(odd)
            and samples[17]["id"] == "17"
            and samples[18]["task_name"] == "7"
        )
        assert texts(samples)[16][1] == "half \ufffd pair"
        report = check(samples)
        assert report.rows == len(odd) == report.ok + len(report.bad) and list(
            report.bad.row
        ) == list(range(15))


@pytest.mark.parametrize("block", [1, 2, 7, 64, 1 << 20])
def test_a_file_may_be_cut_into_blocks_anywhere(tmp_path, monkeypatch, block):
    monkeypatch.setattr(formats, "_BLOCK", block)
    draw = random.Random(block)
    values = ["", "é漢\U0001f600", 'a "b" \\ \n\t', "\u2028", "x" * 90, "] , [", "<image>"]
    rows = [
        row(id=i, more=[1.5e-7, -12, True, None, {"a": []}], task_name=draw.choice(values))
        for i in range(30)
    ] + [12345]
    whole = [[], rows[:1], rows]
    for rows, layout in [
        (rows, layout) for rows in whole for layout in ({}, {"indent": 3}, {"ensure_ascii": False})
    ]:
        path = tmp_path / "rows.json"
        path.write_text("\ufeff \n" + json.dumps(rows, **layout) + "\n\n", encoding="utf-8")
        assert [one for some, _ in formats._json(path) for one in some] == rows
        if "indent" not in layout:
            path.write_text(
                "\r\n".join(json.dumps(one, **layout) for one in rows), encoding="utf-8"
            )
            assert [one for some, _ in formats._json(path) for one in some] == rows


@pytest.mark.parametrize("block", [1, 50, 1 << 20])
@pytest.mark.parametrize(
    "text, where",
    [
        ('[\n{"id": 1},\n{"id": }]', "Expecting value: line 3, character 20"),
        ('[{"id": 1}\n{"id": 2}]', "Expecting , or ]: line 2, character 11"),
        ('[{"id": "a\nb"}]', "Invalid control character at: line 1, character 10"),
        ('[{"id": 1},]', "line 1, character 11"),
        ('[{"id": 1}', "Expecting , or ]: line 1, character 10"),
        ('[{"id": "never closed', "Unterminated string starting at: line 1, character 8"),
        ("[", "Expecting value or ]"),
        ("[1] 2", "Extra data: line 1, character 4"),
        ('{"id": 1}\n\n{"id" 2}\n', "line 3 is not json"),
        ('{"id": 1}\n[2', "line 2 is not json"),
        ("[" * 5000, "not whole json"),
    ],
)
def test_a_broken_file_is_an_error_with_the_place_and_what_to_do(
    tmp_path, monkeypatch, cache, block, text, where
):
    monkeypatch.setattr(formats, "_BLOCK", block)
    path = tmp_path / "rows.json"
    path.write_text(text)
    with pytest.raises(ValueError) as trouble:
        load_samples(path)
    assert (
        where in str(trouble.value)
        and str(path) in str(trouble.value)
        and "again" in str(trouble.value)
    )
    assert not list(cache.glob("*.arrow")) and not list(cache.glob("*.part"))


@pytest.mark.parametrize("layout", [{}, {"indent": 1}])
def test_an_object_that_holds_rows_gives_them(tmp_path, layout):
    rows = [row(id=str(i), task_name=f"t{i}") for i in range(9)]
    expected = load_samples(make(tmp_path, *rows)).to_list()
    by_id = {one["id"]: {key: one[key] for key in one if key != "id"} for one in rows}
    for held in ({"data": rows}, {"version": "1", "n": {"a": 9}, "data": rows}, by_id):
        path = tmp_path / "held.json"
        path.write_text(json.dumps(held, **layout))
        assert load_samples(path, tmp_path / "images").to_list() == expected
    path.write_text(json.dumps(rows[0], **layout))
    assert load_samples(path, tmp_path / "images").to_list() == expected[:1]
    path.write_text(json.dumps({"data": []}, **layout))
    assert len(load_samples(path)) == 0


@pytest.mark.parametrize(
    "held, said",
    [
        (None, "null"),
        (5, "a number"),
        ("rows", "text"),
        ({}, "an object with nothing in it"),
        ({"id": 1, "image": "x.png"}, "an object with id, image"),
        ({"train": [row()], "test": [row()]}, "an object with 2 lists, train, test"),
        ({"a": {"b": 1}, "c": {}}, "an object with a, c"),
        ({"data": ["a.png"]}, "an object with data"),
    ],
)
def test_a_json_value_without_rows_is_named(tmp_path, held, said):
    path = tmp_path / "held.json"
    path.write_text(json.dumps(held, indent=1))
    with pytest.raises(ValueError, match=f"held.json holds {said}; a list of rows is needed"):
        load_samples(path)


def test_a_truncated_file_a_binary_file_and_a_missing_file_are_errors(tmp_path):
    path = make(tmp_path, row(), row())
    path.write_text(path.read_text()[:-30])
    with pytest.raises(ValueError, match="not whole json"):
        load_samples(path)
    path.write_bytes(b'[{"id": "\xc3\xa9\xff"}]')
    with pytest.raises(ValueError, match="byte 11 is not UTF-8"):
        load_samples(path)
    with pytest.raises(FileNotFoundError, match="data/README.md says how to get it"):
        load_samples(tmp_path / "none.json")


def test_a_second_call_reads_only_the_table(tmp_path, cache, unread):
    path = make(tmp_path, row(id=1), row(id=2))
    first = load_samples(path)
    unread()
    second = load_samples(path)
    assert second.to_list() == first.to_list() and len(list(cache.glob("*.arrow"))) == 1
    assert second.cache_files == first.cache_files != []  # mapped, not held
    make(tmp_path, row(id=1), row(id="other"))
    with pytest.raises(AssertionError, match="read again"):
        load_samples(path)


def test_a_changed_file_replaces_its_table_and_other_images_have_their_own_table(tmp_path, cache):
    path = make(tmp_path, row(id=1))
    old = load_samples(path)
    new = load_samples(make(tmp_path, row(id=2), row(id=3)))
    assert (old["id"][:], new["id"][:]) == (["1"], ["2", "3"]) and len(
        list(cache.glob("*.arrow"))
    ) == 1
    assert load_samples(path, tmp_path)[0]["image"] == str(tmp_path / "ok.png")
    assert load_samples(path)[0]["image"] == str(tmp_path / "images" / "ok.png")


def test_a_killed_conversion_leaves_no_half_table_and_does_not_import_torch(tmp_path, cache):
    path = make(tmp_path, *[row(id=i) for i in range(500)])
    child = """
import sys, time
from pathlib import Path
from vflan.data import formats, samples as room
formats._BLOCK, room.CACHE, whole = 4096, Path(sys.argv[2]), room.read_rows
def slow(path):
    for number, part in enumerate(whole(path)):
        if number == 5:
            print("torch" in sys.modules, flush=True)
            time.sleep(600)
        yield part
room.read_rows = slow
room.load_samples(sys.argv[1])
"""
    process = subprocess.Popen(
        [sys.executable, "-c", child, path, cache.parent], stdout=subprocess.PIPE
    )
    assert process.stdout.readline() == b"False\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    assert [file.stat().st_size > 4096 for file in cache.glob("*.part")] == [True] and not list(
        cache.glob("*.arrow")
    )
    # The conversion of any file deletes what the killed one left.
    other = tmp_path / "other.json"
    other.write_text("[]")
    assert len(load_samples(other)) == 0 and not list(cache.glob("*.part"))
    assert load_samples(path)["id"][:] == [str(i) for i in range(500)]


def test_what_another_user_left_stays_and_hinders_nothing(tmp_path, cache, monkeypatch, recwarn):
    left = cache / f"rows-{'0' * 16}.part"
    left.parent.mkdir(parents=True, exist_ok=True)
    left.touch()
    hold = room.hold

    def refuse(path, *timeout, **more):
        if path == left.with_suffix(".lock"):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return hold(path, *timeout, **more)

    monkeypatch.setattr(room, "hold", refuse)
    assert len(load_samples(make(tmp_path, row(id=1)))) == 1
    assert left.exists() and len(list(cache.glob("*.arrow"))) == 1 and not recwarn


def test_only_one_of_several_simultaneous_calls_converts(tmp_path, cache, monkeypatch):
    path, converted, convert = make(tmp_path, row(id=1)), [], room._convert

    def slow(*args):
        converted.append(args)
        time.sleep(0.3)
        convert(*args)

    monkeypatch.setattr(room, "_convert", slow)
    with ThreadPoolExecutor(4) as pool:
        assert [samples["id"][:] for samples in pool.map(load_samples, [path] * 4)] == [["1"]] * 4
    assert len(converted) == 1


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data[:-8],  # a whole number of batches, but not all
        lambda data: data[: len(data) // 2],
        lambda data: b"",
        lambda data: bytes(len(data)),
        lambda data: data[:300] + bytes(100) + data[400:],
        lambda data: data[:4] + b"\xff" * 8 + data[12:],
    ],
)
def test_a_damaged_table_is_made_again(tmp_path, cache, damage):
    path = make(tmp_path, row(id=1), row(id=2))
    load_samples(path)
    (table,) = cache.glob("*.arrow")
    whole = table.read_bytes()
    table.write_bytes(damage(whole))
    assert load_samples(path)["id"][:] == ["1", "2"] and table.read_bytes() == whole


def test_without_a_writable_cache_the_samples_are_held_in_memory_with_one_warning(
    tmp_path, monkeypatch
):
    path = make(tmp_path, row(id=1), row(id=2))
    expected = load_samples(path).to_list()
    (tmp_path / "file").write_text("not a folder")
    monkeypatch.setattr(room, "CACHE", tmp_path / "file")
    with pytest.warns(UserWarning, match="VFLAN_CACHE") as warned:
        samples = load_samples(path)
    assert len(warned) == 1 and samples.to_list() == expected


def test_a_file_that_may_not_be_read_is_not_a_fault_of_the_cache(tmp_path, monkeypatch, recwarn):
    path = make(tmp_path, row(id=1))

    def refuse(file, *args, **more):
        raise PermissionError(errno.EACCES, "Permission denied", file)

    monkeypatch.setattr(formats, "open", refuse, raising=False)
    with pytest.raises(PermissionError, match="rows.json"):
        load_samples(path)
    assert not recwarn


def test_a_file_with_the_longest_name_is_cached(tmp_path, cache, recwarn):
    path = make(tmp_path, row(id=1))
    path = path.rename(path.with_name("数" * 82 + ".json"))
    assert load_samples(path)["id"][:] == ["1"] and not recwarn


def test_a_selected_joined_or_pickled_table_stays_memory_mapped(tmp_path):
    samples = load_samples(make(tmp_path, *[row(id=i) for i in range(100)]))
    some = concatenate_datasets([samples.select(range(50, 60)), samples.select([3, 1])])
    assert some["id"][:] == [str(i) for i in (*range(50, 60), 3, 1)]
    sent = pickle.dumps(samples.select([7]))
    assert pickle.loads(sent)[0]["id"] == "7" and len(sent) < 5000
    assert len(samples.filter(lambda one: one["id"] == "9")) == 1


def test_images_may_be_in_a_zip_beside_the_file(tmp_path):
    rows = [
        row(image=name)
        for name in ("a.png", "Müller.png", "gone.png", "../a.png", "/a.png", "sub/../a.png")
    ]
    path = tmp_path / "annotation.json"
    path.write_text(json.dumps(rows))
    with zipfile.ZipFile(tmp_path / "image_191-task_1k.zip", "w") as archive:
        archive.writestr("images_191task_1k/a.png", png("blue"))
        archive.writestr("images_191task_1k/Müller.png", png())
    samples = load_samples(path)
    assert samples[0]["image"] == f"{tmp_path / 'image_191-task_1k.zip'}::a.png"
    assert read_picture(samples[0]["image"]).getpixel((0, 0)) == (0, 0, 255)
    kinds = [picture_trouble(image).split(":")[0] for image in samples["image"]]
    assert kinds == [
        "",
        "",
        "missing picture",
        "path outside the images folder",
        "path outside the images folder",
        "",
    ]
    again = load_samples(
        save_samples(samples, tmp_path / "again.json", tmp_path / "image_191-task_1k.zip")
    )
    assert again.to_list() == samples.to_list()
    (tmp_path / "image_191-task_1k.zip").write_bytes(b"PK half a download")
    with pytest.raises(ValueError, match="not a whole zip archive; download it again"):
        load_samples(path)


def parquet(path, rows, **layout):
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), path, **layout)


def test_a_folder_of_parquet_files_opens_with_its_embedded_images(tmp_path, unread):
    colors = [(i, 0, 0) for i in range(7)]
    rows = [
        row(id=i, image={"bytes": png(color), "path": f"{i}.png"}) for i, color in enumerate(colors)
    ]
    rows[5] |= {"image": None}
    rows[6] |= {"image": {"bytes": None, "path": "ok.png"}}
    make(tmp_path)
    parquet(tmp_path / "data" / "train-00000-of-00002.parquet", rows[:4], row_group_size=3)
    parquet(tmp_path / "data" / "train-00001-of-00002.parquet", rows[4:], row_group_size=2)
    samples = load_samples(tmp_path)
    assert (
        samples["id"][:] == list("0123456") and texts(samples) == [["<image>\nWhat?", "a dot"]] * 7
    )
    assert [read_picture(image).getpixel((0, 0)) for image in samples["image"][:5]] == colors[:5]
    assert samples["image"][5:] == [None, str(tmp_path / "images" / "ok.png")]
    assert load_samples(f"{tmp_path}/data/train-00001*")["id"][:] == list("456")
    again = load_samples(save_samples(samples, tmp_path / "again.json", tmp_path), tmp_path)
    assert again.to_list() == samples.to_list()
    unread()
    assert load_samples(tmp_path).to_list() == samples.to_list()


def test_parquet_files_with_image_names_and_with_image_bytes_open(tmp_path):
    turns = {"conversations": [[ASK, SAY]] * 2}
    plain = Dataset.from_dict(turns | {"id": [1, 2], "image": ["ok.png", None], "model": ["", ""]})
    plain.to_parquet(make(tmp_path).with_name("plain.parquet"))
    assert load_samples(tmp_path / "plain.parquet")["image"][:] == [
        str(tmp_path / "images" / "ok.png"),
        None,
    ]
    Dataset.from_dict(turns | {"image": [png("blue"), None]}).to_parquet(tmp_path / "bytes.parquet")
    samples = load_samples(tmp_path / "bytes.parquet")
    assert samples["id"][:] == ["0", "1"] and samples["image"][1] is None
    assert read_picture(samples[0]["image"]).getpixel((0, 0)) == (0, 0, 255)


@pytest.mark.parametrize("column", ["image", "images"])
def test_a_parquet_column_of_lists_gives_the_one_image_or_the_reason(tmp_path, column):
    make(tmp_path)
    colors = ["red", "lime", "blue"]
    hub = [{"bytes": png(color), "path": None} for color in colors]
    lists = [[hub[0]], [], [hub[1], hub[2]], None, [hub[2]], [{"bytes": None, "path": "ok.png"}]]
    rows = [
        {"id": str(i), column: each, "conversations": [ASK, SAY]} for i, each in enumerate(lists)
    ]
    parquet(tmp_path / "hub.parquet", rows, row_group_size=4)
    samples = load_samples(tmp_path / "hub.parquet")
    shown = [image and read_picture(image).getpixel((0, 0)) for image in samples["image"]]
    assert shown == [(255, 0, 0), None, None, None, (0, 0, 255), (0, 0, 0)]
    report = check(samples)
    lack = "image token without a picture"
    assert dict(zip(report.bad.row, report.bad.reason)) == {
        1: lack,
        2: "a row has one picture: this one has 2",
        3: lack,
    }
    for given in (lambda color: [png(color)], lambda color: ["ok.png"]):
        some = [{column: given(color), "conversations": [ASK, SAY]} for color in colors]
        parquet(tmp_path / "more.parquet", some)
        assert check(load_samples(tmp_path / "more.parquet")).ok == 3


def test_parquet_files_of_arrows_newer_types_open(tmp_path):
    # Polars writes texts and bytes so.
    turns = [[{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "a dot"}]]
    data = pa.array([png("blue")], pa.binary_view())
    lists = pa.ListViewArray.from_arrays([0], [1], data)
    for image in (data, lists):
        table = pa.table({"image": image, "conversations": turns})
        pq.write_table(table, tmp_path / "new.parquet")
        samples = load_samples(tmp_path / "new.parquet")
        assert check(samples).ok == 1
        assert read_picture(samples[0]["image"]).getpixel((0, 0)) == (0, 0, 255)


def test_parquet_columns_in_another_form_are_a_reason_for_each_row(tmp_path):
    def reason(**columns):
        pq.write_table(pa.table(columns), tmp_path / "other.parquet")
        return check(load_samples(tmp_path / "other.parquet")).bad.reason.tolist()

    named = "no name of a picture: image is an object with the keys url"
    assert reason(image=[{"url": "x"}, None], conversations=[[ASK, SAY], [ASK]]) == [
        named,
        "wrong order: no question is followed by an answer",
    ]
    # As DuckDB and Spark write an object of json.
    kind = pa.map_(pa.string(), pa.string())
    images = pa.array([[("url", "x")]], kind)
    assert reason(image=images, conversations=[[ASK, SAY]]) == [
        "no name of a picture: image is of type tuple"
    ]
    turns = pa.array([[list(ASK.items()), list(SAY.items())]], pa.list_(kind))
    assert reason(conversations=turns) == ["a turn without text: turn 1 is a list"]


def test_images_beside_an_image_are_named_as_left_out(tmp_path):
    make(tmp_path)
    ok, more = "ok.png", ["ok.png", "more.png"]
    rows = [row(image=ok, images=more), row(image=ok, images=[ok]), row(image=ok, images=[])]
    parquet(tmp_path / "rows.parquet", rows)
    for path in (make(tmp_path, *rows), tmp_path / "rows.parquet"):
        report = check(load_samples(path))
        said = "left out: what images names, because the row names an image too"
        assert (report.ok, report.repaired.row.tolist()) == (3, [0])
        assert report.repaired.reason.tolist() == [said]


def test_parquet_with_messages_a_system_text_and_a_video_is_read_or_named(tmp_path):
    chat = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    rows = [{"messages": chat, "video": video, "system": "Be brief."} for video in (None, b"film")]
    parquet(tmp_path / "chat.parquet", rows)
    report = check(samples := load_samples(tmp_path / "chat.parquet"))
    assert texts(samples)[0][:2] == ["Hi", "Hello"]
    assert report.repaired.reason.tolist() == ["left out: the row's own system text"]
    assert report.bad.reason.tolist() == ["video in the row: only pictures and text are trained on"]


def test_a_broken_parquet_file_other_columns_and_several_splits_are_errors(
    tmp_path,
):
    parquet(tmp_path / "train-0.parquet", [{"question": "?"}])
    with pytest.raises(ValueError, match="has no column conversations, only question"):
        load_samples(tmp_path)
    parquet(tmp_path / "test-0.parquet", [row()])
    with pytest.raises(ValueError, match="splits test, train; name one"):
        load_samples(tmp_path)
    (tmp_path / "train-0.parquet").write_bytes((tmp_path / "test-0.parquet").read_bytes()[:-20])
    with pytest.raises(ValueError, match="not a whole parquet file"):
        load_samples(tmp_path / "train-0.parquet")
    with pytest.raises(FileNotFoundError, match="no parquet file in this folder"):
        load_samples(make(tmp_path).parent / "images")
    # As the hub converts a set: the folder has the name of the split.
    for split in ("train", "test"):
        parquet(tmp_path / "hub" / "default" / split / "0000.parquet", [row(id=split)])
    with pytest.raises(ValueError, match=r"splits test, train; name one, as in (.*)\.$") as found:
        load_samples(tmp_path / "hub")
    pattern = str(found.value).split("as in ")[1][:-1]
    assert load_samples(pattern)["id"][:] == ["train"]
    assert load_samples(tmp_path / "hub" / "default" / "test")["id"][:] == ["test"]


def test_samples_survive_writing_and_reading(tmp_path):
    rows = [
        row(),
        row(conversations=[{"from": "human", "value": "hé"}, SAY], image=None),
        row(image="../x.png"),
    ]
    samples = load_samples(make(tmp_path, *rows))
    save_samples(samples, tmp_path / "again.json", tmp_path / "images")
    assert load_samples(tmp_path / "again.json").to_list() == samples.to_list()
    assert json.loads((tmp_path / "again.json").read_text())[0]["image"] == "ok.png"
    assert len(load_samples(save_samples([], tmp_path / "none.json"))) == 0
    with pytest.raises(TypeError):
        save_samples([row(), {"id": object()}], tmp_path / "again.json")
    assert len(load_samples(tmp_path / "again.json")) == 3 and not list(tmp_path.glob(".again*"))


def test_texture_reports_the_place_of_the_image_and_the_length_of_the_texts(tmp_path):
    def turns(question, *more):
        return [{"from": "human", "value": question}, {"from": "gpt", "value": "two words"}, *more]

    rows = [
        row(conversations=turns("<image>\nWhat is it?")),
        row(conversations=turns("What is it?\n<image> ", ASK, SAY)),
        row(conversations=turns("Is <image> it?")),
        row(image=None, conversations=turns("Who?")),
        row(conversations=[]),
        row(conversations=[ASK]),
    ]
    table = room.texture(load_samples(make(tmp_path, *rows)))
    assert list(table.image) == ["first", "last", "inside", "none", "none", "first"]
    assert list(table.question) == [3, 3, 2, 1, 0, 1] and list(table.answer) == [2, 2, 2, 2, 0, 0]
    assert list(table.turns) == [2, 4, 2, 2, 0, 1]
    assert len(room.texture(load_samples(make(tmp_path, *rows)).select([4, 1]))) == 2
    assert list(room.texture(load_samples(make(tmp_path, rows[4]))).image) == ["none"]
    glued = row(conversations=turns("<image>What is<image>it?"))
    assert list(room.texture(load_samples(make(tmp_path, glued))).question) == [3]
    none = room.texture(load_samples(make(tmp_path, *rows)).select([]))
    assert len(none) == 0 and list(none) == list(table)


def test_the_released_zip_is_read_if_the_folder_was_not_unpacked(tmp_path):
    path = make(tmp_path, row())
    with zipfile.ZipFile(tmp_path / "image_191.zip", "w") as archive:
        archive.write(tmp_path / "images" / "ok.png", "images_191/ok.png")
    samples = load_samples(path, tmp_path / "images_191")
    assert samples[0]["image"].endswith("image_191.zip::ok.png") and check(samples).ok == 1


def test_an_image_that_is_no_name_is_saved_as_it_is(tmp_path):
    rows = [row(image=["ok.png"]), row(image=["a.png", "b.png"])]
    save_samples(rows, make(tmp_path), tmp_path / "images")
    report = check(samples := load_samples(tmp_path / "rows.json"))
    assert report.bad.reason.tolist() == ["a row has one picture: this one has 2"]
    # The reason is part of the table, and stays with the row.
    again = load_samples(save_samples(samples, tmp_path / "again.json", tmp_path / "images"))
    assert check(again).bad.to_dict() == report.bad.to_dict()
