"""Images in folders, zips and parquet files: each is read, or the reason is reported."""

import ast
import io
import mmap
import os
import subprocess
import sys
import threading
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import EpsImagePlugin, Image

from vflan.data import containers, images
from vflan.data.images import (
    OTHER_FORMAT,
    as_rgb,
    open_picture,
    picture_bytes,
    picture_trouble,
    read_picture,
    stamp,
)
from vflan.data.samples import load_samples, save_samples
from vflan.data.validation import check


def encoded(color="red", kind="PNG", size=(9, 9)):
    buffer = io.BytesIO()
    picture = (
        Image.new("RGB", size, color) if color else Image.effect_noise(size, 90).convert("RGB")
    )
    picture.save(buffer, kind)
    return buffer.getvalue()


def zipped(path, members, utf8=True):
    """A zip of {name: bytes}; without `utf8` it does not declare its encoding (as many tools)."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    if not utf8:
        data = bytearray(path.read_bytes())
        # The second byte of the flags holds the UTF-8 bit.
        for mark, flags in ((b"PK\3\4", 7), (b"PK\1\2", 9)):
            at = data.find(mark)
            while at >= 0:
                data[at + flags] &= ~8
                at = data.find(mark, at + 1)
        path.write_bytes(data)
    return path


def pixel(name):
    return read_picture(name).getpixel((0, 0))


def test_palettes_are_converted_and_rotation_tags_are_ignored_as_in_llava(tmp_path):
    Image.new("P", (4, 2)).save(tmp_path / "palette.gif")
    exif = Image.Exif()
    # Rotate by 90 degrees: LLaVA does not.
    exif[0x0112] = 6
    Image.new("RGB", (4, 2)).save(tmp_path / "turned.jpg", exif=exif)
    for name in ("palette.gif", "turned.jpg"):
        picture = read_picture(tmp_path / name)
        assert (picture.mode, picture.size) == ("RGB", (4, 2))


@pytest.mark.parametrize(
    "written, requested",
    [
        ("a.jpg", "a.gif"),
        ("a.png", "a.jpg"),
        ("a.JPG", "a.jpg"),
        ("a.jpeg", "a.jpg"),
        ("Caf#U00e9 #U6f22.png", "Café 漢.png"),
        ("smile#L01f600.png", "smile\U0001f600.png"),
        ("Cafe\u0301.png", "Caf\u00e9.png"),  # decomposed on disk
        ("Caf\u00e9.png", "Cafe\u0301.png"),
        ("Caf├⌐.png", "Caf\u00e9.png"),  # UTF-8 read as code page 437
        ("Caf#U00e9.jpg", "Caf\u00e9.gif"),  # two at once
    ],
)
def test_a_missing_image_is_found_under_a_name_that_tools_gave_it(tmp_path, written, requested):
    (tmp_path / written).write_bytes(encoded())
    archive = zipped(tmp_path / "pictures.zip", {written: encoded("blue")})
    assert pixel(str(tmp_path / requested)) == (255, 0, 0) and pixel(f"{archive}::{requested}") == (
        0,
        0,
        255,
    )
    assert picture_trouble(str(tmp_path / requested)) == "" and stamp(
        tmp_path / requested
    ) == stamp(tmp_path / written)


def test_an_image_that_exists_is_never_replaced_by_one_with_another_suffix(tmp_path):
    for kind, color in (("jpg", "white"), ("png", "blue"), ("gif", "red")):
        (tmp_path / f"a.{kind}").write_bytes(encoded(color))
    assert [pixel(str(tmp_path / f"a.{kind}")) for kind in ("png", "gif")] == [
        (0, 0, 255),
        (255, 0, 0),
    ]


def test_a_link_is_not_used_for_a_missing_image(tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "secret.png").write_bytes(encoded())
    os.symlink(tmp_path / "secret.png", tmp_path / "images" / "a.png")
    assert picture_trouble(str(tmp_path / "images" / "a.jpg")).startswith("missing picture")


def test_each_reason_begins_with_its_kind_in_a_folder_and_in_a_zip(tmp_path, monkeypatch):
    whole = encoded(None, "JPEG", (64, 64))
    large, text = encoded("red", "PNG", (100, 100)), b"not a picture"
    members = {
        "whole.jpg": whole,
        "half.jpg": whole[: len(whole) // 2],
        "text.png": text,
        "large.png": large,
        "none": b"",
    }
    archive = zipped(tmp_path / "a.zip", members)
    for name, data in members.items():
        (tmp_path / name).write_bytes(data)
    (tmp_path / "folder.png").mkdir()
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 4999)  # Pillow refuses twice as much
    for home in (f"{tmp_path}/", f"{archive}::"):
        kinds = [
            picture_trouble(f"{home}{name}").split(":")[0]
            for name in (*members, "gone.jpg", "folder.png", "a\0b")
        ]
        expected = [
            "",
            "truncated picture",
            "undecodable picture",
            "too many pixels",
            "undecodable picture",
        ]
        assert kinds == expected + ["missing picture"] * 3, home
    assert picture_trouble("outside:../x.png") == "path outside the images folder: ../x.png"
    for name in ("outside:../x.png", str(tmp_path / "half.jpg")):
        with pytest.raises(OSError, match=f"^{picture_trouble(name).split(':')[0]}"):
            read_picture(name)
    with pytest.raises(FileNotFoundError, match="missing picture"):
        picture_bytes(tmp_path / "gone.jpg")
    assert stamp(tmp_path / "gone.jpg") == stamp("outside:../x.png") == ()


@pytest.mark.parametrize("utf8", [True, False])
def test_the_released_zip_is_read_in_place(tmp_path, utf8):
    """With a top folder that the annotation does not name and names that are not ASCII."""
    names = [f"images_191task_1k/{name}" for name in ("task_0_a.jpg", "WIT+x_1_Müller_漢.png")]
    archive = zipped(
        tmp_path / "image_191-task_1k.zip",
        {names[0]: encoded("red"), names[1]: encoded("blue")},
        utf8,
    )
    assert utf8 == (names[1] in zipfile.ZipFile(archive).namelist())
    assert [pixel(f"{archive}::{name.split('/')[1]}") for name in names] == [
        (255, 0, 0),
        (0, 0, 255),
    ]
    assert [pixel(f"{archive}::{name}") for name in names] == [(255, 0, 0), (0, 0, 255)]
    assert picture_bytes(f"{archive}::task_0_a.jpg") == encoded("red") and os.listdir(tmp_path) == [
        archive.name
    ]


def test_a_damaged_member_affects_only_its_image(tmp_path):
    archive = zipped(
        tmp_path / "a.zip", {f"{i}.png": encoded(None, size=(40, 40)) for i in range(3)}
    )
    whole = archive.read_bytes()
    info, data = zipfile.ZipFile(archive).getinfo("1.png"), bytearray(whole)
    data[info.header_offset + 60] ^= 255
    archive.write_bytes(data)
    assert [picture_trouble(f"{archive}::{i}.png").split(":")[0] for i in range(3)] == [
        "",
        "truncated picture",
        "",
    ]
    data[info.header_offset : info.header_offset + 4] = b"none"
    archive.write_bytes(data)
    assert picture_trouble(f"{archive}::1.png").startswith("truncated picture")
    archive.write_bytes(whole)  # downloaded again
    assert picture_trouble(f"{archive}::1.png") == ""


@pytest.mark.parametrize(
    "size, kind",
    [((1, 301), "too thin"), ((60000, 1), "too thin"), ((14000, 100), "too many pixels")],
)
def test_very_thin_and_very_wide_images_are_refused(tmp_path, size, kind):
    """Scaling 1 x 60,000 to a short side of 336, or padding 14,000 x 100, takes gigabytes."""
    Image.new("RGB", size).save(tmp_path / "a.png")
    assert picture_trouble(tmp_path / "a.png").startswith(kind)
    Image.new("RGB", (1, 300)).save(tmp_path / "b.png")
    assert picture_trouble(tmp_path / "b.png") == ""


def test_a_broken_zip_an_encrypted_member_and_a_zip_bomb_are_reported(tmp_path, monkeypatch):
    (tmp_path / "text.zip").write_text("no zip")
    archive = zipped(tmp_path / "a.zip", {"a.png": encoded()})
    assert picture_trouble(f"{tmp_path}/text.zip::a.png").split(":")[0] == "truncated picture"
    assert picture_trouble(f"{tmp_path}/gone.zip::a.png").split(":")[0] == "missing picture"
    monkeypatch.setattr(containers, "MAX_BYTES", 10)
    assert "unpacks to" in picture_trouble(f"{archive}::a.png")
    locked, data = tmp_path / "locked.zip", bytearray(archive.read_bytes())
    data[data.find(b"PK\1\2") + 8] |= 1
    locked.write_bytes(data)
    assert "encrypted" in picture_trouble(f"{locked}::a.png")


def test_the_index_of_a_zip_is_read_once_and_again_when_it_changes(tmp_path, monkeypatch):
    archive, opened = (
        zipped(tmp_path / "a.zip", {"a.png": encoded("red"), "b.png": encoded("red")}),
        [],
    )

    class Slow(zipfile.ZipFile):
        def __init__(self, *args):
            opened.append(args)
            time.sleep(0.05)
            super().__init__(*args)

    monkeypatch.setattr(zipfile, "ZipFile", Slow)
    with ThreadPoolExecutor(8) as pool:
        assert set(pool.map(pixel, [f"{archive}::{name}.png" for name in "ab" * 40])) == {
            (255, 0, 0)
        }
    assert len(opened) == 1
    before = stamp(f"{archive}::a.png")
    monkeypatch.undo()
    zipped(tmp_path / "new.zip", {"a.png": encoded("blue"), "c.png": b""}).replace(archive)
    assert pixel(f"{archive}::a.png") == (0, 0, 255) and stamp(f"{archive}::a.png") != before


def test_a_zip_opened_before_a_fork_works_in_both_processes(tmp_path):
    members = {f"{i}.png": encoded((i, 0, 0), size=(60, 60)) for i in range(100)}
    archive = zipped(tmp_path / "a.zip", members)
    assert pixel(f"{archive}::7.png") == (7, 0, 0)
    # As if another thread opened an archive at the moment of the fork.
    containers._lock.acquire()
    child = os.fork()
    if child == 0:
        os._exit(
            0
            if all(pixel(f"{archive}::{i}.png") == (i, 0, 0) for i in range(100) for _ in range(3))
            else 1
        )
    containers._lock.release()
    assert all(pixel(f"{archive}::{i}.png") == (i, 0, 0) for i in range(100) for _ in range(3))
    hung = threading.Timer(60, os.kill, (child, 9))
    hung.start()
    assert os.waitpid(child, 0)[1] == 0
    hung.cancel()


def test_an_image_is_read_from_its_row_of_a_parquet_file(tmp_path):
    rows = [{"bytes": encoded((i, 0, 0)), "path": None} for i in range(10)] + [
        None,
        {"bytes": None, "path": "x.png"},
    ]
    part = tmp_path / "part-0.parquet"
    pq.write_table(pa.table({"image": rows}), part, row_group_size=4)
    assert [pixel(f"{part}::{i}")[0] for i in (9, 0, 4, 3)] == [9, 0, 4, 3]
    assert [picture_trouble(f"{part}::{i}").split(":")[0] for i in (10, 11, 12)] == [
        "missing picture"
    ] * 3
    assert len({stamp(f"{part}::{i}") for i in range(10)}) == 10
    pq.write_table(pa.table({"image": [encoded("blue")]}), part)  # bytes without a struct
    assert pixel(f"{part}::0") == (0, 0, 255)
    part.write_bytes(b"PAR1 broken")
    assert picture_trouble(f"{part}::0").startswith("undecodable picture")


def test_the_result_is_cached_until_the_file_changes(tmp_path, monkeypatch):
    name = tmp_path / "a.png"
    name.write_bytes(encoded())
    assert picture_trouble(name) == ""
    with monkeypatch.context() as patch:
        patch.setattr(Image, "open", None)
        assert picture_trouble(name) == ""
    name.write_bytes(b"broken")
    assert picture_trouble(name).startswith("undecodable picture")
    name.unlink()
    assert picture_trouble(name).startswith("missing picture")


# ------------------------------------------------------------------ formats that start a program

POSTSCRIPT = b"%!PS-Adobe-3.0\n%%BoundingBox: 0 0 90 90\n%%EndComments\nshowpage\n%%EOF\n"
EPS = POSTSCRIPT.replace(b"3.0\n", b"3.0 EPSF-3.0\n", 1)
# With the header of DOS: where the text begins, and how long it is.
DOS_EPS = b"\xc5\xd0\xd3\xc6" + (30).to_bytes(4, "little") + len(EPS).to_bytes(4, "little")
DOS_EPS = DOS_EPS.ljust(30, b"\0") + EPS
OTHERS = {
    "eps.jpg": EPS,
    "dos.jpg": DOS_EPS,
    "script.jpg": POSTSCRIPT,
    "page.jpg": b"%PDF-1.4\n1 0 obj\n<< >>\nendobj\ntrailer\n<< >>\n%%EOF\n",
    "icon.png": None,
    "grey.jpg": b"P5 9 9 255\n" + bytes(81),
}
_WATCH = {"on": False, "seen": []}


def _watch(event, arguments):
    programs = {"subprocess.Popen", "os.system", "os.exec", "os.fork", "os.forkpty", "pty.spawn"}
    if _WATCH["on"] and (event in programs or event.startswith(("os.posix_spawn", "os.spawn"))):
        _WATCH["seen"].append((event, arguments))


sys.addaudithook(_watch)


@pytest.fixture
def programs(monkeypatch):
    """What starts a program while the test runs: every such call is noted, and refused."""

    def refuse(*arguments, **_):
        _WATCH["seen"].append(arguments)
        raise AssertionError(f"a program was started: {arguments}")

    for module, name in ((subprocess, "Popen"), (os, "posix_spawn"), (os, "system")):
        monkeypatch.setattr(module, name, refuse)
    # As in a fresh process, in which Pillow has not looked for Ghostscript yet.
    monkeypatch.setattr(EpsImagePlugin, "gs_binary", None)
    _WATCH.update(on=True, seen=[])
    yield _WATCH["seen"]
    _WATCH["on"] = False


@pytest.mark.parametrize("name", OTHERS)
def test_a_file_of_another_format_starts_no_program_whatever_its_name(tmp_path, name, programs):
    data = encoded(kind="ICO", size=(16, 16)) if OTHERS[name] is None else OTHERS[name]
    (tmp_path / name).write_bytes(data)
    archive = zipped(tmp_path / "a.zip", {name: data})
    pq.write_table(pa.table({"image": [data]}), tmp_path / "a.parquet")
    for where in (tmp_path / name, f"{archive}::{name}", f"{tmp_path}/a.parquet::0"):
        why = picture_trouble(where)
        assert why.startswith("undecodable picture") and OTHER_FORMAT in why
        with pytest.raises(OSError, match="undecodable picture"):
            read_picture(where)
    with pytest.raises(OSError, match=OTHER_FORMAT):
        open_picture(tmp_path / name)
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "x"}]
    rows = save_samples([{"image": name, "conversations": turns}], tmp_path / "rows.json")
    report = check(load_samples(rows, tmp_path))
    assert report.ok == 0 and OTHER_FORMAT in report.bad.reason.iloc[0]
    assert programs == []


def test_the_watch_sees_the_program_that_pillow_starts_for_an_eps(tmp_path, programs):
    """Without FORMATS it would, so the test above would fail."""
    with pytest.raises((AssertionError, OSError)):
        Image.open(io.BytesIO(EPS)).load()
    assert programs


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF"])
def test_the_content_decides_the_format_and_not_the_name(tmp_path, kind):
    (tmp_path / "a.eps").write_bytes(encoded(kind=kind))
    assert picture_trouble(tmp_path / "a.eps") == ""


def test_pillow_opens_files_in_one_place_only():
    """Every Image.open of the package, and every other function of Pillow's that opens a file."""
    home, places = Path(images.__file__).parents[1], []
    for path in sorted(home.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute) and ast.unparse(node) in ("Image.open", "PIL.open"):
                places.append(path.relative_to(home).as_posix())
            if isinstance(node, ast.Attribute) and node.attr in ("imread", "load_image"):
                places.append(path.relative_to(home).as_posix())
    assert places == ["data/images.py"]


# -------------------------------------------------------------------- values wider than 8 bits


@pytest.mark.parametrize(
    "values, kind, expected",
    [
        (np.array([[0, 257, 40_000, 65_535]], np.uint16), "png", [0, 1, 156, 255]),
        (np.array([[0, 257, 40_000, 65_535]], np.uint16), "tiff", [0, 1, 156, 255]),
        (np.array([[0, 255]], np.uint16), "png", [0, 1]),  # dark: the type decides, not the picture
        (np.array([[0, 100, 255]], np.int32), "tiff", [0, 100, 255]),
        (np.array([[0, 25_700, 65_535]], np.int32), "tiff", [0, 100, 255]),
        (np.array([[-100, 0, 100]], np.int32), "tiff", [0, 128, 255]),
        (np.array([[0, 70_000]], np.int32), "tiff", [0, 255]),
        (np.array([[0, 0.2, 1]], np.float32), "tiff", [0, 51, 255]),
        (np.array([[0, 51, 200]], np.float32), "tiff", [0, 51, 200]),
        (np.array([[-1, 0, 1]], np.float32), "tiff", [0, 128, 255]),
        (np.array([[-3, -3]], np.float32), "tiff", [0, 0]),
    ],
)
def test_wide_values_are_scaled_to_eight_bits_and_not_clipped(tmp_path, values, kind, expected):
    file = tmp_path / f"wide.{kind}"
    Image.fromarray(values).save(file)
    with Image.open(file) as picture:
        assert picture.mode.startswith(("I", "F"))
        shown = as_rgb(picture)
    assert np.asarray(shown)[0, :, 1].tolist() == expected
    assert np.array_equal(np.asarray(read_picture(file)), np.asarray(shown))
    assert shown.mode == "RGB"


def test_two_wide_pictures_are_no_copies_of_one_another(tmp_path):
    ramp = np.arange(300, 30_300, dtype=np.uint16).reshape(150, 200)
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "x"}]
    rows = []
    for number, values in enumerate((ramp, ramp[::-1], ramp + 30_000, ramp.astype(np.float32))):
        name = f"{number}.{'tiff' if values.dtype == np.float32 else 'png'}"
        Image.fromarray(np.ascontiguousarray(values)).save(tmp_path / name)
        rows.append({"image": name, "conversations": turns})
    report = check(load_samples(save_samples(rows, tmp_path / "rows.json"), tmp_path))
    # The last one has the values of the first, and 32 bits: within 0 to 65,535 they mean the same.
    assert report.ok == 4 and report.duplicates.rows.tolist() == [[3]]


def test_a_float_picture_with_a_value_that_is_no_number_is_bad(tmp_path):
    Image.fromarray(np.array([[0, np.nan]], np.float32)).save(tmp_path / "a.tiff")
    Image.fromarray(np.array([[0, np.inf]], np.float32)).save(tmp_path / "b.tiff")
    for name in ("a.tiff", "b.tiff"):
        assert "a pixel is not a number" in picture_trouble(tmp_path / name)


def test_a_parquet_file_is_read_where_files_cannot_be_mapped(tmp_path, monkeypatch):
    """On some network disks mmap does not exist."""
    Image.new("RGB", (8, 8), "red").save(tmp_path / "a.png")
    data = (tmp_path / "a.png").read_bytes()
    pq.write_table(pa.table({"image": [{"bytes": data}]}), tmp_path / "a.parquet")
    opened = pq.ParquetFile

    def no_mmap(*arguments, **options):
        raise OSError(19, "No such device")

    def without_mmap(*arguments, memory_map=False, **options):
        if memory_map:
            raise OSError(19, "Memory mapping file failed: No such device")
        return opened(*arguments, **options)

    monkeypatch.setattr(pq, "ParquetFile", without_mmap)
    monkeypatch.setattr(mmap, "mmap", no_mmap)
    assert picture_bytes(f"{tmp_path}/a.parquet::0") == data
