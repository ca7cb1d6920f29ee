"""Small files that become large, and names that are no files: one sentence, little memory, no hang.

What Python holds is measured with tracemalloc; what Pillow and Arrow hold, by how far a child
process grows. A limit of memory ends what would fill the machine.
"""

import bz2
import io
import json
import os
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import tracemalloc
import warnings
import zipfile
import zlib
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from vflan.config import Recipe, replace
from vflan.data import containers, formats, images, limits, parquet_pages, validation
from vflan.data.image_names import images_root
from vflan.data.images import decoded, picture_bytes, picture_trouble, read_picture
from vflan.data.limits import ByteBudget, no_file, read_limited
from vflan.data.llava_mixture import records
from vflan.data.samples import load_samples
from vflan.data.validation import check

ASK, SAY = {"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "a dot"}
TEXT = pa.string()
TURNS = pa.list_(pa.struct([("from", TEXT), ("value", TEXT)]))
MB = 1 << 20


@pytest.fixture(autouse=True)
def no_hang():
    """A test that waits for ever fails after some minutes."""

    def stop(*_):
        raise TimeoutError("it hangs")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(300)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def traced(function):
    """(what a function returns, or the error; the bytes of Python that it held at most)."""
    tracemalloc.start()
    try:
        value = function()
    except (OSError, ValueError) as error:
        value = error
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    return value, peak


CHILD = """
import json, resource, sys
import numpy, datasets
from vflan.data.images import picture_trouble
from vflan.data.samples import load_samples
from vflan.data.validation import check

def peak():
    try:
        return int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0])
    except (OSError, IndexError):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024  # macOS counts bytes

size = lambda samples: f"{len(samples)} rows"
work = {"picture": picture_trouble, "rows": lambda path: size(load_samples(path))}
begin = peak()
if sys.platform == "linux":
    resource.setrlimit(resource.RLIMIT_DATA, (3 << 30, 3 << 30))
for kind, name in json.loads(sys.argv[1]):
    before = peak()
    try:
        said = work[kind](name)
    except (ValueError, OSError) as error:
        said = str(error)
    print(json.dumps([said, (peak() - before) // 1024]), flush=True)
"""


def in_child(*attacks):
    """[(what is said, megabytes by which the process grew)] of each (kind, path)."""
    command = [sys.executable, "-c", CHILD, json.dumps([[kind, str(p)] for kind, p in attacks])]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return [json.loads(line) for line in done.stdout.splitlines()]


# ---------------------------------------------------------------------------------- pictures


def noise(size, mode="RGB"):
    return Image.effect_noise(size, 60).convert(mode)


def test_a_picture_has_at_most_max_pixels(tmp_path):
    noise((200, 150)).save(tmp_path / "a.png")
    assert picture_trouble(tmp_path / "a.png") == ""
    assert read_picture(tmp_path / "a.png", 30_000).size == (200 // 2, 150 // 2)
    with pytest.raises(OSError, match="too many pixels: .*a.png .*200 x 150.*max_pixels=29,999"):
        read_picture(tmp_path / "a.png", 29_999)
    assert limits.MAX_PIXELS == Recipe("n", "base", "", "", "", "", "").max_pixels == 40_000_000


@pytest.mark.parametrize("kind", ["PNG", "GIF", "WEBP", "BMP", "TIFF", "JPEG"])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_only_a_jpeg_that_is_not_progressive_is_decoded_at_a_reduced_size(tmp_path, kind, mode):
    picture = Image.linear_gradient("L").resize((400, 200)).convert(mode)
    picture.save(tmp_path / "a", kind)
    if kind != "JPEG":
        with pytest.raises(OSError, match="too many pixels"):
            read_picture(tmp_path / "a", 20_000)
        return
    # 141 pixels fit, so that a quarter is the first size that does.
    small = read_picture(tmp_path / "a", 20_000)
    assert (small.size, small.mode) == ((100, 50), "RGB")
    expected = np.asarray(picture.convert("RGB").reduce(4), float)
    assert np.abs(np.asarray(small, float) - expected).max() < 3
    # Phones put a second picture behind the first, for which Pillow has another name.
    picture.save(tmp_path / "b", "MPO", save_all=True, append_images=[picture])
    assert read_picture(tmp_path / "b", 20_000).tobytes() == small.tobytes()
    picture.save(tmp_path / "a", kind, progressive=True)
    with pytest.raises(OSError, match="too many pixels"):
        read_picture(tmp_path / "a", 20_000)


def test_a_picture_within_max_pixels_is_what_it_was(tmp_path):
    for kind in ("PNG", "JPEG", "WEBP"):
        noise((64, 48)).save(tmp_path / "a", kind)
        with Image.open(tmp_path / "a") as picture:
            expected = np.asarray(picture.convert("RGB"))
        assert np.array_equal(np.asarray(read_picture(tmp_path / "a", 64 * 64)), expected)


def test_a_picture_is_reduced_if_its_padded_square_is_too_large(tmp_path):
    noise((300, 40)).save(tmp_path / "a.png")
    assert read_picture(tmp_path / "a.png", 300 * 40).size == (100, 14)


def test_check_and_training_use_the_recipes_max_pixels(tmp_path, backbones, monkeypatch):
    monkeypatch.setattr(validation, "CACHE", tmp_path / "cache")
    (tmp_path / "images").mkdir()
    for name, size in (("small", (9, 9)), ("large", (30, 30)), ("jpeg", (30, 30))):
        noise(size).save(tmp_path / "images" / f"{name}.png", "JPEG" if name == "jpeg" else "PNG")
    names = ["small.png", "large.png", "jpeg.png"]
    rows = [{"id": n, "image": n, "conversations": [ASK, SAY]} for n in names]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    samples = load_samples(tmp_path / "rows.json")
    # In either order: a picture that was sound once may be too large now.
    for limit, bad in ((900, []), (899, [1]), (900, []), (899, [1])):
        assert check(samples, max_pixels=limit).bad.row.tolist() == bad
    recipe = Recipe("n", "base", *backbones.values(), str(tmp_path / "rows.json"), "", "runs")
    from transformers import AutoTokenizer

    from vflan.training.batching import prepare

    tokenizer = AutoTokenizer.from_pretrained(backbones["language_model"])
    config = SimpleNamespace(
        image_seq_length=4, image_token_id=tokenizer.convert_tokens_to_ids("<image>")
    )
    recipe = replace(recipe, max_pixels=899, max_bad_share=0.5, images=str(tmp_path / "images"))
    assert prepare(recipe, tokenizer, config, tmp_path).ids.tolist() == ["small.png", "jpeg.png"]
    assert "too many pixels" in (tmp_path / "bad.jsonl").read_text()
    with pytest.raises(ValueError, match="max_pixels"):
        replace(recipe, max_pixels=0)


def test_a_reduced_picture_is_not_taken_for_the_whole_one(tmp_path, monkeypatch):
    monkeypatch.setattr(validation, "CACHE", tmp_path / "cache")
    noise((40, 30)).save(tmp_path / "a.jpg")
    looks = [
        validation.fingerprints([str(tmp_path / "a.jpg")], max_pixels=limit)[0]["pixels"][0]
        for limit in (1600, 400, 1600, 400)
    ]
    assert looks[0] == looks[2] != looks[1] == looks[3]


def test_threads_share_a_budget_of_decoded_bytes(tmp_path, monkeypatch):
    noise((100, 100)).save(tmp_path / "a.png")
    holding, most, lock = [0], [0], threading.Lock()
    monkeypatch.setattr(images, "DECODED", ByteBudget(2 * 16 * 10_000))

    def work(_):
        with decoded(tmp_path / "a.png"):
            with lock:
                holding[0] += 1
                most[0] = max(most[0], holding[0])
            time.sleep(0.01)
            with lock:
                holding[0] -= 1

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(32)))
    assert most[0] == 2 and images.DECODED.used == 0
    # What is larger than the whole budget goes alone, and an error gives its share back.
    monkeypatch.setattr(images, "DECODED", ByteBudget(1))
    read_picture(tmp_path / "a.png")
    with pytest.raises(KeyError), decoded(tmp_path / "a.png"):
        raise KeyError
    assert images.DECODED.used == 0


def test_a_forked_process_has_a_budget_of_its_own():
    budget = ByteBudget(10)
    with budget.hold(10):
        child = os.fork()
        if child == 0:
            with budget.hold(10):
                os._exit(0)
        assert os.waitpid(child, 0)[1] == 0


def tiff(tags):
    """A little-endian TIFF of tags [(number, type, count, value)]."""
    entries = b"".join(struct.pack("<HHII", *tag) for tag in tags)
    return b"II*\0\x08\0\0\0" + struct.pack("<H", len(tags)) + entries + b"\0\0\0\0"


def picture_bombs(folder):
    """Pictures of a megabyte at most that ask for hundreds."""
    large = Image.new("1", (12_500, 12_500))
    large.save(folder / "large.png")
    large.save(folder / "large.tiff", compression="group4")
    Image.new("L", (6_400, 6_400)).save(folder / "large.webp", lossless=True, method=0)
    Image.new("L", (6_400, 6_400)).save(folder / "progressive.jpg", progressive=True)
    # 50 kB of tags which all say that the whole file is their value.
    count = 4000
    sizes = [(256, 4, 1, 9), (257, 4, 1, 9)]
    tags = sizes + [(40_000 + i, 1, 12 * count, 8) for i in range(count)]
    (folder / "tags.tiff").write_bytes(tiff(tags))
    exif = b"Exif\0\0" + tiff([(40_000 + i, 1, 60_000, 8) for i in range(5000)])
    buffer = io.BytesIO()
    noise((64, 64)).save(buffer, "JPEG")
    jpeg = buffer.getvalue()
    # Without the density of JFIF, for which Pillow looks into the EXIF data then.
    start = 4 + int.from_bytes(jpeg[4:6], "big")
    segment = b"\xff\xe1" + struct.pack(">H", len(exif) + 2) + exif
    (folder / "exif.jpg").write_bytes(b"\xff\xd8" + segment + jpeg[start:])
    # A picture of 90 pixels in a tile of 900 megapixels.
    tile = [(256, 4, 1, 9), (257, 4, 1, 9), (258, 3, 1, 8), (259, 3, 1, 8), (262, 3, 1, 1)]
    tile += [(277, 3, 1, 1), (322, 4, 1, 30_000), (323, 4, 1, 30_000), (324, 4, 1, 8)]
    (folder / "tile.tiff").write_bytes(tiff([*tile, (325, 4, 1, 100)]))
    # A bitmap that says how large it is, and has no pixels.
    header = struct.pack("<IiiHHIIiiII", 40, 30_000, 30_000, 1, 24, 0, 0, 0, 0, 0, 0)
    (folder / "empty.bmp").write_bytes(b"BM" + struct.pack("<IHHI", 54, 0, 0, 54) + header)
    chunk = zlib.compress(bytes(150 * MB), 1)
    png = io.BytesIO()
    noise((9, 9)).save(png, "PNG")
    for name, body in (("zTXt", b"a\0\0" + chunk), ("iCCP", b"a\0\0" + chunk)):
        data = name.encode() + body
        piece = struct.pack(">I", len(body)) + data + struct.pack(">I", zlib.crc32(data))
        (folder / f"{name}.png").write_bytes(png.getvalue()[:33] + piece + png.getvalue()[33:])


def test_no_picture_of_a_megabyte_takes_hundreds(tmp_path):
    picture_bombs(tmp_path)
    names = sorted(tmp_path.iterdir())
    assert all(path.stat().st_size < MB for path in names)
    told = dict(zip((path.name for path in names), in_child(*(("picture", n) for n in names))))
    assert {name: more for name, (_, more) in told.items() if more > 64} == {}
    for name in ("large.png", "large.tiff", "large.webp", "progressive.jpg", "tile.tiff"):
        assert told[name][0].startswith("too many pixels"), told[name]
    # A picture may be sound in spite of what else is in its file.
    assert told["exif.jpg"][0] == ""
    for name, (said, _) in told.items():
        assert name in said or not said, said


def test_only_the_first_frame_is_decoded(tmp_path):
    frames = [noise((60, 60)) for _ in range(50)]
    for kind in ("GIF", "WEBP", "TIFF"):
        frames[0].save(tmp_path / "a", kind, save_all=True, append_images=frames[1:])
        picture = read_picture(tmp_path / "a")
        assert (picture.size, picture.mode) == ((60, 60), "RGB")


def test_a_picture_file_has_at_most_max_bytes(tmp_path, monkeypatch):
    noise((9, 9)).save(tmp_path / "a.png")
    size = (tmp_path / "a.png").stat().st_size
    # A file with a hole takes no room on the disk, and is read as zeros.
    os.truncate(tmp_path / "a.png", limits.MAX_BYTES + 1)
    said, peak = traced(lambda: read_picture(tmp_path / "a.png"))
    assert "268,435,457 bytes, more than 268,435,456" in str(said) and peak < MB
    os.truncate(tmp_path / "a.png", size)
    assert picture_trouble(tmp_path / "a.png") == ""


# -------------------------------------------------------------------------- zips and parquet


def lying(path, data, method, stated):
    """A zip with one member, a.png, whose directory states another size."""
    with zipfile.ZipFile(path, "w", method) as archive:
        archive.writestr("a.png", data)
    content = bytearray(path.read_bytes())
    at = content.find(b"PK\1\2")
    content[at + 24 : at + 28] = struct.pack("<I", stated)
    path.write_bytes(content)
    return f"{path}::a.png"


@pytest.mark.parametrize("method", [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_STORED])
@pytest.mark.parametrize("stated", [0, 1000, 63 * MB])
def test_a_zip_member_is_unpacked_to_its_stated_size_only(tmp_path, method, stated):
    stored = method == zipfile.ZIP_STORED
    name = lying(tmp_path / "a.zip", bytes(64 * MB if not stored else 9), method, stated)
    said, peak = traced(lambda: picture_bytes(name))
    # The pieces are joined at the end.
    assert peak < 2 * stated + 2 * MB
    if not stored:
        assert str(said).startswith("truncated picture") and "a.zip::a.png" in str(said)
        assert f"more than its {stated:,} bytes" in str(said)


def test_members_packed_by_deflate_bzip2_or_not_at_all_are_read(tmp_path):
    data = bytes(range(256)) * 99
    for method in (zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_STORED):
        path = tmp_path / f"{method}.zip"
        assert picture_bytes(lying(path, data, method, len(data))) == data
    name = lying(tmp_path / "lzma.zip", data, zipfile.ZIP_LZMA, len(data))
    with pytest.raises(OSError, match="undecodable picture: .*packed by lzma: .*deflate"):
        picture_bytes(name)


def test_damaged_packed_data_is_a_truncated_picture(tmp_path):
    data = os.urandom(5000)
    for method in (zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_STORED):
        path = tmp_path / f"{method}.zip"
        name = lying(path, data, method, len(data))
        content = bytearray(path.read_bytes())
        content[100:110] = bytes(10)
        path.write_bytes(content)
        with pytest.raises(OSError, match="^truncated picture"):
            picture_bytes(name)


def test_of_members_with_one_name_the_last_counts_and_it_is_said(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
            for name, data in (("a", b"1"), ("b", b"2"), ("a", b"3"), ("a", b"4"), ("b", b"5")):
                archive.writestr(name, data)
    with pytest.warns(UserWarning, match="3 members whose name comes again later, the first: 'a'"):
        assert picture_bytes(f"{tmp_path}/a.zip::a") == b"4"
    assert picture_bytes(f"{tmp_path}/a.zip::b") == b"5"


def test_a_container_that_cannot_be_opened_is_tried_once(tmp_path, monkeypatch):
    (tmp_path / "a.zip").write_bytes(b"PK\5\6" + b"\xff" * 18)
    opened = []

    def count(*_):
        opened.append(1)
        raise zipfile.BadZipFile("spans disks")

    monkeypatch.setattr(containers, "Archive", count)
    said = {picture_trouble(f"{tmp_path}/a.zip::{i}").split(" ")[0] for i in range(50)}
    assert said == {"truncated"} and len(opened) == 1
    # An error of the system may be gone the next time.
    monkeypatch.setattr(containers, "Archive", lambda _: open(tmp_path / "gone"))
    (tmp_path / "b.zip").write_bytes(b"")
    assert picture_trouble(f"{tmp_path}/b.zip::x").startswith("undecodable picture")
    monkeypatch.undo()
    with zipfile.ZipFile(tmp_path / "c.zip", "w") as archive:
        archive.writestr("x", b"1")
    data, status = (tmp_path / "c.zip").read_bytes(), os.stat(tmp_path / "b.zip")
    assert picture_bytes(f"{tmp_path}/c.zip::x") == b"1" and data and status


def repeated(text, count, type=TEXT):
    """A column that holds one text `count` times, in the memory of one."""
    indices = pa.array(np.zeros(count, np.int32))
    return pa.DictionaryArray.from_arrays(indices, pa.array([text], type))


def parquet(path, columns, **options):
    pq.write_table(pa.table(columns), path, store_schema=False, **options)
    return path


def turns(values, each=1):
    """Conversations of `each` turns a row, with these values."""
    ends = pa.array(np.arange(0, len(values) + 1, each), pa.int32())
    turn = pa.StructArray.from_arrays([repeated("human", len(values)), values], ["from", "value"])
    return pa.ListArray.from_arrays(ends, turn)


def parquet_bombs(folder):
    """Parquet files of 30 kB at most that unpack to gigabytes."""
    text, fine = "x" * MB, turns(repeated("a", 3000))
    parquet(folder / "dictionary.parquet", {"conversations": turns(repeated(text, 3000))})
    parquet(folder / "one_row.parquet", {"conversations": turns(repeated(text, 3000), 3000)})
    parquet(folder / "id.parquet", {"conversations": fine, "id": repeated(text, 3000)})
    zeros = pa.array([bytes(20 * MB)] * 15, pa.binary())
    options = dict(compression="zstd", use_dictionary=False, write_statistics=False)
    parquet(folder / "zstd.parquet", {"conversations": fine[:15], "image": zeros}, **options)
    listed = pa.array([[bytes(20 * MB)]] * 15, pa.list_(pa.binary()))
    parquet(folder / "listed.parquet", {"conversations": fine[:15], "images": listed}, **options)
    # Many values of nothing: a row of three million turns without role and text.
    nothing = pa.StructArray.from_arrays([pa.nulls(3_000_000, TEXT)] * 2, ["from", "value"])
    ends = pa.array([0, 3_000_000], pa.int32())
    parquet(folder / "nothing.parquet", {"conversations": pa.ListArray.from_arrays(ends, nothing)})
    # Texts that share their beginning with the text before.
    delta = pa.array([text] * 300)
    options = dict(use_dictionary=False, column_encoding={"id": "DELTA_BYTE_ARRAY"})
    options["column_encoding"] |= dict.fromkeys(
        ("conversations.list.element.from", "conversations.list.element.value"), "PLAIN"
    )
    parquet(
        folder / "delta.parquet", {"conversations": fine[:300].cast(TURNS), "id": delta}, **options
    )
    # Each row group stays below the limit, and there are many.
    with pq.ParquetWriter(
        folder / "groups.parquet",
        pa.schema([("conversations", turns(repeated(text, 1)).type)]),
        store_schema=False,
    ) as writer:
        for _ in range(8):
            writer.write_table(pa.table({"conversations": turns(repeated(text, 200))}))


def test_no_parquet_file_of_thirty_kilobytes_takes_gigabytes(tmp_path):
    parquet_bombs(tmp_path)
    names = sorted(tmp_path.iterdir())
    told = dict(zip((path.name for path in names), in_child(*(("rows", n) for n in names))))
    for name, (said, _) in told.items():
        assert f"{tmp_path / name} " in said and ("unpacks to more" in said or "values in" in said)
    assert {name: more for name, (_, more) in told.items() if more > 600} == {}


def test_a_bomb_of_pictures_in_parquet_is_a_bad_row(tmp_path):
    picture = io.BytesIO()
    noise((9, 9)).save(picture, "PNG")
    bomb = picture.getvalue() + bytes(MB)
    parquet(tmp_path / "a.parquet", {"image": repeated(bomb, 3000, pa.binary())})
    large = io.BytesIO()
    Image.new("1", (12_500, 12_500)).save(large, "PNG")
    parquet(tmp_path / "b.parquet", {"image": pa.array([large.getvalue()])})
    (one, grown), (two, more) = in_child(
        ("picture", f"{tmp_path}/a.parquet::0"), ("picture", f"{tmp_path}/b.parquet::0")
    )
    assert one.startswith("undecodable picture") and "unpacks to more than" in one and grown < 64
    assert two.startswith("too many pixels") and more < 64


def test_texts_that_repeat_are_read_as_long_as_they_are_not_too_many(tmp_path, monkeypatch):
    """One long text among many short ones is no attack, though it might come as often as they."""
    monkeypatch.setattr(limits, "MAX_BYTES", 1 << 20)
    values = pa.array(["yes", "no"] * 3000 + ["long " * 3000]).dictionary_encode()
    path = parquet(tmp_path / "a.parquet", {"conversations": turns(values)})
    samples = load_samples(path)
    assert len(samples) == 6001 and samples[6000]["conversations"][0]["value"] == "long " * 3000
    values = repeated("long " * 3000, 100)
    with pytest.raises(ValueError, match="b.parquet unpacks to more than 1,048,576 bytes in conv"):
        load_samples(parquet(tmp_path / "b.parquet", {"conversations": turns(values)}))


def page(kind, unpacked, packed, count, encoding=0):
    """The header of a page in thrift's compact protocol."""

    def number(value):
        value, out = value << 1 ^ value >> 63, b""
        while value > 127:
            value, out = value >> 7, out + bytes([value & 127 | 128])
        return out + bytes([value])

    def ints(*values):
        return b"".join(b"\x15" + number(value) for value in values)

    field, values = {0: (5, (count, encoding)), 2: (7, (count, encoding))}[kind]
    # An unknown text, to be skipped, stands between the sizes and the header of the kind.
    return (
        ints(kind, unpacked, packed)
        + b"\x18\x03abc"
        + bytes([(field - 4) << 4 | 12])
        + ints(*values)
        + b"\0\0"
    )


@pytest.mark.parametrize(
    "pages, problem",
    [
        ([(2, 2**30, 0, 1), (0, 9, 0, 9, 8)], "unpacks to more than"),
        ([(0, 9, 0, 9), (0, 2**30, 0, 9)], "unpacks to more than"),
        ([(0, 9, 0, 2**30)], "values in c"),
        ([(0, -9, 0, 9)], "negative"),
        ([(0, 9, -9, 9)], "negative"),
        ([(0, 9, 0, 9)], None),
    ],
)
def test_the_headers_of_pages_count_and_not_the_footer(pages, problem):
    data = b"".join(page(*each) for each in pages)
    chunk = parquet_pages.Chunk("c", 1, 0, values=18, start=0, size=len(data))
    if problem is None:
        return parquet_pages._check_column("", data, 0, chunk)
    with pytest.raises(ValueError, match=problem):
        parquet_pages._check_column("", data, 0, chunk)


def test_pages_are_found_as_arrow_writes_them(tmp_path):
    rows = [[{"from": "human", "value": f"{i % 7} {'word ' * (i % 50)}"}] * 3 for i in range(5000)]
    for options in (
        {},
        {"data_page_version": "2.0"},
        {"compression": "zstd", "use_dictionary": False},
    ):
        path = tmp_path / "a.parquet"
        columns = {"conversations": pa.array(rows, TURNS), "id": pa.array(range(5000))}
        pq.write_table(pa.table(columns), path, data_page_size=4000, row_group_size=3000, **options)
        metadata, data = pq.read_metadata(path), path.read_bytes()
        for group, columns in enumerate(parquet_pages.Pages(path).groups):
            for number, column in enumerate(columns):
                chunk = metadata.row_group(group).column(number)
                assert (column.name, column.values) == (chunk.path_in_schema, chunk.num_values)
                pages = list(parquet_pages._pages(data, column))
                assert sum(count for kind, _, count, _ in pages if kind != 2) == chunk.num_values
                # The footer counts the headers too.
                unpacked = sum(size for _, size, _, _ in pages)
                assert unpacked < chunk.total_uncompressed_size < 1.1 * unpacked + 200 * len(pages)
        assert len(load_samples(path)) == 5000


FUZZ = """
import sys
from pathlib import Path
from vflan.data.formats import read_rows

path = Path(sys.argv[1])
whole = path.read_bytes()
for at in range(0, len(whole), 3):
    # Small changes of numbers in the footer too.
    wrong = whole[at] ^ (0x55, 1)[at % 2]
    path.write_bytes(whole[:at] + bytes([wrong]) + whole[at + 1 :])
    try:
        for some, _ in read_rows(path):
            assert isinstance(some, list)
    except ValueError as error:
        assert str(path) in str(error), (at, error)
"""


@pytest.mark.parametrize("compression", ["none", "zstd"])
def test_any_byte_of_a_parquet_file_may_be_wrong(tmp_path, compression):
    """In another process, because pyarrow may end its process where a footer is damaged."""
    rows = {"conversations": pa.array([[ASK, SAY]] * 300, TURNS), "id": pa.array(range(300))}
    rows["image"] = pa.array([b"no picture"] * 300)
    pq.write_table(pa.table(rows), tmp_path / "a.parquet", compression=compression)
    command = [sys.executable, "-c", FUZZ, str(tmp_path / "a.parquet")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


def test_a_column_that_comes_twice_is_refused(tmp_path):
    table = pa.Table.from_arrays([pa.array([[ASK]], TURNS)] * 2, ["conversations"] * 2)
    pq.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(ValueError, match="a.parquet has the column conversations twice"):
        load_samples(tmp_path / "a.parquet")


# -------------------------------------------------------------------------------------- json


def write(folder, text):
    path = folder / "rows.json"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


@pytest.mark.parametrize("start", ["[", ""])
def test_a_row_of_json_has_an_end(tmp_path, monkeypatch, start):
    monkeypatch.setattr(formats, "MAX_ROW", 100_000)
    monkeypatch.setattr(formats, "_BLOCK", 10_000)
    path = write(
        tmp_path, start + '{"id": 1}' + (",\n" if start else "\n") + '{"id": "' + "x" * 9 * MB
    )
    with pytest.raises(ValueError, match="rows.json, line 2: a row of more than 100,000 char"):
        load_samples(path)
    monkeypatch.setattr(formats, "MAX_BYTES", 100_000)
    path = write(tmp_path, '{"id": "' + "x" * 9 * MB)
    with pytest.raises(ValueError, match="rows.json holds one json object of more than 100,000"):
        load_samples(path)


@pytest.mark.parametrize(
    "text",
    [
        '[{"id": ' + "9" * 100_000 + "}]",
        '{"id": ' + "9" * 100_000 + "}\n{}",
        "[" * 200_000,
        '{"a":' * 200_000,
        '[{"id": ' + "[" * 100_000,
        b"\xff\xfe" + '[{"id": 1}]'.encode("utf-16-le"),
        '[{"id": 1}]'.encode("utf-16-be"),
        b"\x1f\x8b\x08\0" + bytes(50),
        zlib.compress(b"[]"),
        bz2.compress(b"[]"),
        "[NaN",
        "[1e",
        b"\0" * 5000,
        "{}" * 5,
    ],
    ids=range(14),
)
def test_odd_json_is_one_sentence_with_the_name_of_the_file(tmp_path, text):
    with pytest.raises(ValueError) as error:
        load_samples(write(tmp_path, text))
    assert str(tmp_path / "rows.json") in str(error.value) and len(str(error.value)) < 500


@pytest.mark.parametrize("text, rows", [("", 0), ("\ufeff[]", 0), ("[NaN, Infinity, 1e999]", 3)])
def test_json_of_nothing_or_of_odd_numbers_is_read(tmp_path, text, rows):
    samples = load_samples(write(tmp_path, text))
    assert len(samples) == rows and check(samples).ok == 0


@pytest.mark.parametrize("layout", ["[%s]", "%s", "%s\n%s"])
def test_of_a_key_that_comes_twice_the_last_counts_and_check_says_so(tmp_path, layout):
    turn = '{"from": "human", "value": "no", "value": "What?"}'
    row = f'{{"id": "a", "id": "b", "conversations": [{turn}, {json.dumps(SAY)}]}}'
    samples = load_samples(write(tmp_path, layout.replace("%s", row)))
    assert samples[0]["id"] == "b" and samples[0]["conversations"][0]["value"] == "What?"
    report = check(samples)
    assert report.ok == len(samples) == len(report.repaired) and not len(report.bad)
    reason = report.repaired.reason[0]
    assert reason == (
        "left out: an earlier value of id, named twice in the row; "
        "an earlier value of value, named twice in turn 1"
    )


def test_a_key_that_comes_once_leaves_no_note(tmp_path):
    rows = [{"id": 1, "conversations": [ASK | {"value": "x"}, SAY]}] * 2
    report = check(load_samples(write(tmp_path, json.dumps(rows))))
    assert report.ok == 2 and not len(report.repaired)


@pytest.mark.parametrize(
    "text",
    [
        '{"a": {"conversations": []}, "a": {"conversations": []}}',
        '{"data": [{}], "data": [{}]}',
    ],
)
def test_an_object_of_rows_must_not_name_one_twice(tmp_path, text):
    with pytest.raises(ValueError, match="rows.json gives (a|data) twice"):
        load_samples(write(tmp_path, text))


# ------------------------------------------------------------------------------------- names


@pytest.fixture
def odd(tmp_path):
    """A folder of names that are no regular files: {what: path}."""
    os.mkfifo(tmp_path / "pipe")
    os.symlink(tmp_path / "loop", tmp_path / "loop")
    os.symlink("/dev/zero", tmp_path / "zero")
    os.symlink(tmp_path / "gone", tmp_path / "broken")
    (tmp_path / "folder").mkdir()
    return {name: tmp_path / name for name in ("pipe", "loop", "zero", "broken", "folder")}


def test_what_is_no_file_is_named(odd, tmp_path):
    said = {name: no_file(path) for name, path in odd.items()}
    assert said.pop("loop")
    assert said == {"pipe": "a pipe", "zero": "a device", "broken": "a link to nothing",
                    "folder": "a folder"}  # fmt: skip
    assert no_file(tmp_path / "gone") == "no such file" and no_file(__file__) == ""
    assert no_file("x" * 5000) and no_file("a\0b")


@pytest.mark.parametrize("name", ["pipe", "loop", "zero", "broken", "folder"])
def test_samples_that_are_no_file_are_one_sentence(odd, name):
    with pytest.raises(FileNotFoundError) as error:
        load_samples(odd[name])
    assert str(odd[name]) in str(error.value)


@pytest.mark.parametrize("name", ["pipe", "loop", "zero", "broken", "folder"])
def test_records_of_a_source_that_is_no_file_are_one_sentence(odd, name):
    with pytest.raises(FileNotFoundError, match="in place of a json file"):
        list(records("gqa", odd[name]))


@pytest.mark.parametrize("text", ["{", "[" * 100_000, "\xff", "9" * 5000], ids=range(4))
def test_records_of_a_source_that_is_no_json_are_one_sentence(tmp_path, text):
    path = write(tmp_path, text.encode("latin-1"))
    with pytest.raises(ValueError, match="rows.json is not whole json"):
        list(records("gqa", path))


@pytest.mark.parametrize("path", ["/dev/zero", "/dev/stdin", "/dev/tty", "x" * 5000, "a\0b"])
def test_samples_that_are_a_device_or_no_name_are_one_sentence(path):
    with pytest.raises(FileNotFoundError):
        load_samples(path)


def test_a_socket_and_a_part_that_is_no_file_are_one_sentence(tmp_path, monkeypatch):
    # The name of a socket is short.
    monkeypatch.chdir(tmp_path)
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("s.parquet")
        with pytest.raises(FileNotFoundError, match="s.parquet: a socket in place of a samples"):
            load_samples(tmp_path / "s.parquet")
        with pytest.raises(FileNotFoundError, match="s.parquet: a socket in place of a samples"):
            load_samples(tmp_path)


@pytest.mark.parametrize("name", ["pipe", "loop", "zero", "broken", "folder"])
def test_a_picture_that_is_no_file_is_missing(odd, name):
    for path in (odd[name], f"{odd[name]}.zip::a.png", f"{odd[name]}.parquet::0"):
        assert picture_trouble(path).startswith("missing picture")


@pytest.mark.skipif(not os.path.exists("/proc/kmsg"), reason="needs a file that waits: Linux")
def test_a_file_of_the_system_that_waits_is_empty(tmp_path):
    for name in ("rows.json", "a.png", "images.zip"):
        os.symlink("/proc/kmsg", tmp_path / name)
    assert len(load_samples(tmp_path / "rows.json", tmp_path)) == 0
    # The link's target is no zip by its name, so that it is taken for a folder.
    assert images_root(tmp_path / "rows.json", None).name == "kmsg"
    assert picture_trouble(tmp_path / "a.png").startswith("undecodable picture")
    assert picture_trouble(f"{tmp_path}/images.zip::a.png").startswith("truncated picture")


def test_a_picture_that_becomes_a_pipe_is_not_waited_for(odd):
    with pytest.raises(ValueError, match="no regular file"):
        read_limited(odd["pipe"])


@pytest.mark.parametrize("name", ["pipe", "loop"])
def test_images_that_are_no_zip_are_one_sentence(odd, name):
    path = odd[name].rename(odd[name].with_name("images.zip"))
    if name == "loop":
        path.unlink()
        os.symlink(path, path)
    # The only zip beside the samples is taken in place of a folder that is not there.
    for images_folder in (path, None, path.parent / "gone"):
        with pytest.raises(ValueError, match="images.zip: .*; download it again"):
            images_root(path.parent / "rows.json", images_folder)


def test_rows_that_name_links_and_pipes_are_bad(tmp_path, odd):
    for name in odd:
        odd[name].rename(tmp_path / f"{name}.png")
    (tmp_path / "deep").mkdir()
    os.symlink("/dev/zero", tmp_path / "deep" / "zero.png")
    names = [*(f"{name}.png" for name in odd), "deep/zero.png"]
    rows = [{"image": name, "conversations": [ASK, SAY]} for name in names]
    report = check(load_samples(write(tmp_path, json.dumps(rows))))
    assert report.ok == 0 and len(report.bad) == len(names)
    assert set(report.reasons.index) <= {"missing picture", "path outside the images folder"}
