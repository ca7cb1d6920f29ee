"""A disk that loses bits, a file system without locks, and limits: one sentence, and nothing lost.

A bit that flips in a cache is made again, in an answer it is asked again, in a model it is refused.
"""

import errno
import fcntl
import json
import os
import subprocess
import sys
import zipfile
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from tiny_model import TinyRun, make_tiny, write_pope

import vflan
from vflan import io
from vflan.data import samples as tables
from vflan.data import validation
from vflan.data.images import content_sum
from vflan.evaluation import evaluator  # noqa: F401
from vflan.evaluation.generation import answering
from vflan.evaluation.judge import EndpointJudge
from vflan.evaluation.results import per_task
from vflan.training.run import Run

EVALUATOR = sys.modules["vflan.evaluation.evaluator"]  # vflan.evaluate itself is the function


def flip(path, place, bit):
    """Change one bit of a file; the same call changes it back."""
    data = bytearray(path.read_bytes())
    data[place] ^= 1 << bit
    path.write_bytes(data)


def places(path, number):
    """(byte, bit) pairs: the first and the last bytes, and others, each with its top bit too."""
    size = path.stat().st_size
    chosen = {0, 1, size // 2, size - 2, size - 1, *range(7, size, max(1, size // number))}
    return [(place, bit) for place in sorted(chosen) for bit in (7, place % 7)]


# ------------------------------------------------------------------------------ lines and files


def test_any_flipped_bit_of_a_line_is_noticed_or_leaves_the_row_as_it_is():
    row = {"i": 3, "answer": 'two "ä", 2.5', "reason": None, "known": [1, {"crc": "12345678"}]}
    line = io.sealed_line(row).encode()
    assert line.endswith(b"\n") and json.loads(line).items() >= row.items()
    assert io.read_line(line[:-1]) == row
    noticed = 0
    for bit in range(8 * (len(line) - 1)):
        damaged = bytearray(line[:-1])
        damaged[bit // 8] ^= 1 << bit % 8
        read = io.read_line(bytes(damaged))
        noticed += read is None
        # Only the name of the checksum may be another one.
        assert read is None or {key: read.get(key) for key in row} == row
    assert noticed >= 8 * (len(line) - 1 - len('"crc"'))


@pytest.mark.parametrize("line", [b"", b"{", b"[1]", b"1" * 5000, b"[" * 100_000, b'{"a": "\xff"}'])
def test_a_line_that_is_no_row_is_a_damaged_one(line):
    assert io.read_line(line) is None


def test_a_line_of_an_earlier_version_is_read():
    assert io.read_line(b'{"i": 0, "answer": "yes"}') == {"i": 0, "answer": "yes"}


@pytest.mark.parametrize("size", [0, 1, 1000, (1 << 20) + 5])
def test_any_flipped_bit_of_a_sealed_file_is_noticed(tmp_path, size):
    path = tmp_path / "file"
    path.write_bytes(np.random.default_rng(0).bytes(size))
    assert size < io.SEAL or not io.is_sealed(path)
    io.seal(path)
    assert path.stat().st_size == size + io.SEAL and io.is_sealed(path)
    for place, bit in places(path, 5):
        flip(path, place, bit)
        assert not io.is_sealed(path)
        flip(path, place, bit)
    path.write_bytes(path.read_bytes()[:-1])
    with suppress(OSError):  # it is shorter than a seal
        assert not io.is_sealed(path)


# ---------------------------------------------------------------------------------- the caches


@pytest.fixture
def cache(tmp_path, monkeypatch):
    for module in (tables, validation):
        monkeypatch.setattr(module, "CACHE", tmp_path / "cache")
    return tmp_path / "cache"


def test_a_table_with_a_flipped_bit_is_made_again(squares, cache):
    rows = vflan.load_samples(squares).to_list()
    (table,) = cache.glob("samples/*.arrow")
    whole = table.read_bytes()
    for place, bit in places(table, 40):
        flip(table, place, bit)
        assert vflan.load_samples(squares).to_list() == rows
        assert table.read_bytes() == whole


def test_a_table_of_an_earlier_version_is_made_again(squares, cache):
    rows = vflan.load_samples(squares).to_list()
    (table,) = cache.glob("samples/*.arrow")
    whole = table.read_bytes()
    table.write_bytes(whole[: -io.SEAL])
    assert vflan.load_samples(squares).to_list() == rows and table.read_bytes() == whole


def test_a_verdict_with_a_flipped_bit_is_made_again(squares, cache, capfd):
    names = sorted(map(str, (squares.parent / "images").iterdir()))
    prints, troubles = validation.fingerprints(names)
    file = cache / validation.CACHE_FILE
    whole = file.read_bytes()
    # Each page of the file, and everything that is in the part with the rows.
    for place, bit in places(file, 60):
        file.write_bytes(whole)
        flip(file, place, bit)
        again = validation.fingerprints(names)
        assert again[0].tobytes() == prints.tobytes() and again[1] == troubles == {}
        for old in cache.glob("*.old-*"):
            old.unlink()
    assert f"it is now {validation.CACHE_FILE}.old-1" in capfd.readouterr().err


def test_a_verdict_file_that_cannot_grow_is_held_in_memory(squares, cache, monkeypatch):
    names = sorted(map(str, (squares.parent / "images").iterdir()))
    prints, _ = validation.fingerprints(names)
    full = validation._connect(cache / validation.CACHE_FILE)
    full.execute("delete from pictures")
    full.commit()
    full.execute("vacuum")
    full.execute("pragma max_page_count = 1")
    monkeypatch.setattr(validation, "_open_cache", lambda: full)
    with pytest.warns(UserWarning, match="cannot be written .*full"):
        assert validation.fingerprints(names)[0].tobytes() == prints.tobytes()


def test_a_kept_picture_with_a_flipped_bit_is_written_again(tmp_path, monkeypatch):
    from vflan.evaluation.benchmarks import files

    monkeypatch.setattr(files, "CACHE", tmp_path)
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    data = (tmp_path / "a.png").read_bytes()
    kept = files.keep_picture(data)
    flip(Path(kept), 50, 1)
    assert files.keep_picture(data) == kept and Path(kept).read_bytes() == data


# --------------------------------------------------------------------------------- the answers


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return make_tiny(tmp_path_factory.mktemp("pictures"))


@pytest.fixture
def run(tiny, tmp_path):
    write_pope(tmp_path / "benchmarks", tiny.folder)
    return TinyRun(tmp_path, tiny)


@pytest.fixture
def asked(monkeypatch):
    """The texts of the questions that were asked."""
    texts = []

    def listening(model, processor, questions, *more):
        texts.extend(question["text"] for question in questions)
        return answering(model, processor, questions, *more)

    monkeypatch.setattr(EVALUATOR, "answering", listening)
    return texts


def without_checksums(path):
    """The file of answers as an earlier version wrote it, with the sizes of the pictures."""
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for row in rows:
        row.pop("crc")
        if "picture" in row:
            row.pop("picture")
            row["bytes"] = None
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return rows


def test_an_answer_with_a_flipped_bit_is_asked_again_and_no_other(run, asked, capfd):
    whole = vflan.evaluate(run)
    path = run.folder / "answers" / "pope.jsonl"
    data, lines = path.read_bytes(), path.read_bytes().split(b"\n")
    start = len(b"\n".join(lines[:4])) + 1
    for place in (*range(0, len(lines[4]), 23), len(lines[4]) - 1):
        for bit in (7, place % 7):
            path.write_bytes(data)
            flip(path, start + place, bit)
            asked.clear()
            pd.testing.assert_frame_equal(vflan.evaluate(run), whole)
            # A line break that appears cuts the line in two; one in the checksum's name harms none.
            assert asked in ([], [json.loads(lines[4])["prompt"]])
    assert "pope.jsonl: 1 damaged lines are not used." in capfd.readouterr().err


def test_line_breaks_that_flip_lose_no_answer(run, asked):
    whole = vflan.evaluate(run)
    path = run.folder / "answers" / "pope.jsonl"
    data = path.read_bytes()
    for place in (place for place, byte in enumerate(data) if byte == 10):
        path.write_bytes(data)
        flip(path, place, 5)
        pd.testing.assert_frame_equal(vflan.evaluate(run), whole)


def test_answers_with_a_damaged_header_are_laid_aside(run, asked, capfd):
    whole = vflan.evaluate(run)
    path = run.folder / "answers" / "pope.jsonl"
    flip(path, 12, 0)
    damaged = path.read_bytes()
    asked.clear()
    pd.testing.assert_frame_equal(vflan.evaluate(run), whole)
    assert len(asked) == 12 and (path.parent / "pope.jsonl.old-1").read_bytes() == damaged
    assert "pope.jsonl.old-1, nothing was deleted" in capfd.readouterr().err


def test_swapped_rows_are_the_same_answers_and_swapped_numbers_are_asked_again(run, asked):
    whole = vflan.evaluate(run)
    path = run.folder / "answers" / "pope.jsonl"
    header, *rows = path.read_text().splitlines(keepends=True)
    asked.clear()
    path.write_text("".join([header, *reversed(rows)]))
    pd.testing.assert_frame_equal(vflan.evaluate(run), whole)
    assert asked == []
    old = without_checksums(path)
    old[1]["i"], old[2]["i"] = old[2]["i"], old[1]["i"]
    path.write_text("".join(json.dumps(row) + "\n" for row in old))
    pd.testing.assert_frame_equal(vflan.evaluate(run), whole)
    assert sorted(asked) == sorted(row["prompt"] for row in old[1:3])


def test_answers_of_an_earlier_version_are_used(run, asked):
    whole = vflan.evaluate(run)
    path = run.folder / "answers" / "pope.jsonl"
    without_checksums(path)
    asked.clear()
    pd.testing.assert_frame_equal(vflan.evaluate(run), whole)
    assert asked == [] and "crc" not in path.read_text()


@pytest.mark.parametrize(
    "key, value",
    [
        ("i", "3"),
        ("i", 12),
        ("i", -1),
        ("i", True),
        ("answer", None),
        ("finish", "stpp"),
        (None, 1),
    ],
)
def test_a_damaged_answer_of_an_earlier_version_is_asked_again(run, asked, key, value):
    whole = vflan.evaluate(run)
    path = run.folder / "answers" / "pope.jsonl"
    rows = without_checksums(path)
    rows[4] = rows[4] | {key: value} if key else {"?": 1}
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    asked.clear()
    pd.testing.assert_frame_equal(vflan.evaluate(run), whole)
    assert len(asked) == 1


def test_results_count_a_damaged_answer_as_missing(run):
    vflan.evaluate(run)
    path = run.folder / "answers" / "pope.jsonl"
    flip(path, path.read_bytes().index(b'"answer": "') + 12, 0)
    with pytest.raises(FileNotFoundError, match="lacks 1 answers"):
        per_task(run, "pope")
    vflan.evaluate(run)
    assert len(per_task(run, "pope"))


def test_damaged_scores_are_laid_aside_and_written_again(run, capfd):
    vflan.evaluate(run)
    path = run.folder / "scores.csv"
    whole = path.read_bytes()
    for place, bit in ((0, 1), (0, 7), (whole.index(b"value"), 0), (whole.index(b"\n"), 5)):
        path.write_bytes(whole)
        flip(path, place, bit)
        damaged = path.read_bytes()
        vflan.evaluate(run)
        assert path.read_bytes() == whole
        assert damaged in [old.read_bytes() for old in run.folder.glob("scores.csv.old-*")]


def test_a_verdict_of_a_judge_with_a_flipped_bit_is_asked_again(tmp_path, monkeypatch):
    from vflan.evaluation import judge as judges
    from vflan.evaluation.judge_prompts import YES_NO

    replies, calls = {"red": "Yes, red.", "blue": "No."}, []

    def ask_all(model, requests, *settings):
        for i, request in enumerate(requests):
            text = request()[0]["content"]
            calls.append(text)
            reply = next(reply for word, reply in replies.items() if word in text)
            yield i, judges.Reply(reply, model=model)

    monkeypatch.setattr(judges, "ask_all", ask_all)
    judge = EndpointJudge("grader", YES_NO, cache=tmp_path)
    rows = [("What colour?", "red", answer, {}) for answer in ("red", "blue")]
    first = judge.judge_all(rows)
    (path,) = tmp_path.glob("*.jsonl")
    data = path.read_bytes()
    for place, bit in places(path, 40):
        path.write_bytes(data)
        flip(path, place, bit)
        calls.clear()
        assert judge.judge_all(rows) == first and len(calls) <= 2
    # A reply of an earlier version that cannot be read any more is no error either.
    path.write_text(
        "".join(json.dumps(json.loads(line) | {"crc": None}) + "\n" for line in data.splitlines())
    )
    path.write_text(path.read_text().replace(', "crc": null', "").replace("Yes", "Yds"))
    assert judge.judge_all(rows) == first


# ------------------------------------------------------------------------------- the pictures


def test_a_picture_is_compared_by_its_content_wherever_it_is(run, tmp_path):
    folder = run.folder / "benchmarks" / "images"
    pictures = [(path.name, path.read_bytes()) for path in sorted(folder.glob("*.png"))]
    folder.unlink()
    folder.mkdir()
    for name, data in pictures:
        (folder / name).write_bytes(data)
    whole = vflan.evaluate(run)
    # The same pictures, written again.
    for name, data in pictures:
        (folder / name).write_bytes(data)
        os.utime(folder / name, (1, 1))
    pd.testing.assert_frame_equal(vflan.evaluate(run), whole)
    other = bytearray(pictures[2][1])
    other[-1] ^= 1
    (folder / "2.png").write_bytes(other)  # of the same size
    with pytest.raises(ValueError, match=r"2 answers about pictures that have changed .*2\.png"):
        vflan.evaluate(run)


@pytest.mark.parametrize("kind", ["zip", "parquet"])
def test_a_picture_in_a_container_has_the_sum_of_its_file(tmp_path, kind):
    import zlib

    import pyarrow as pa
    import pyarrow.parquet as pq

    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    data = (tmp_path / "a.png").read_bytes()
    path = tmp_path / f"pictures.{kind}"
    name = f"{path}::a.png" if kind == "zip" else f"{path}::0"

    def write(data):
        if kind == "zip":
            with zipfile.ZipFile(path, "w") as archive:
                archive.writestr("a.png", data)
        else:
            pq.write_table(pa.table({"image": [{"bytes": data}]}), path)

    write(data)
    assert content_sum(name) == content_sum(tmp_path / "a.png") == zlib.crc32(data)
    write(data[:-1] + b"x")
    os.utime(path, (1, 1))
    assert content_sum(name) == zlib.crc32(data[:-1] + b"x")
    path.unlink()
    assert content_sum(name) is None and content_sum(None) is None


# --------------------------------------------------------------------------------- the weights


def test_a_checkpoint_whose_record_has_a_flipped_bit_is_skipped(recipe, monkeypatch, capfd):
    from vflan.training import checkpointing

    def stop(*arguments, **summary):
        raise KeyboardInterrupt

    monkeypatch.setattr(Run, "finish", stop)
    with pytest.raises(KeyboardInterrupt):
        vflan.train(vflan.replace(recipe, save_every=1, max_steps=2))
    path, record = checkpointing.newest(recipe.folder)
    file = path / "checkpoint.json"
    whole = file.read_bytes()
    for place, bit in places(file, 40):
        file.write_bytes(whole)
        flip(file, place, bit)
        found = checkpointing.newest(recipe.folder)
        assert found[0].name == "step-00000001" or found == (path, record)
    assert "step-00000002 is damaged (checkpoint.json)" in capfd.readouterr().err


def test_a_model_with_a_flipped_bit_is_refused_with_its_name(recipe):
    run = vflan.train(vflan.replace(recipe, max_steps=1))
    assert run.load_model() is not None and run.processor() is not None
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        file = run.folder / "model" / name
        size, refused = file.stat().st_size, rf"base/model/{name} is not as it was written"
        for place, bit in ((0, 0), (size // 2, 7), (size - 1, 3)):
            flip(file, place, bit)
            with pytest.raises(ValueError, match=refused):
                run.load_model()
            with pytest.raises(ValueError, match="train it again"):
                vflan.train(vflan.replace(recipe, name="next", max_steps=1), init=run)
            flip(file, place, bit)
        flip(file, 5, 5)
        with pytest.raises(ValueError, match=refused):
            run.export(run.folder.parent / "out")
        assert not (run.folder.parent / "out").exists()
        flip(file, 5, 5)
    # done.json holds the hashes that scores and cards repeat; they are a fact about the run too.
    text = (run.folder / "done.json").read_text()
    place = text.index(run.summary["parts"]["projector"])
    (run.folder / "done.json").write_text(f"{text[:place]}0x{text[place + 2 :]}")
    with pytest.raises(ValueError, match="base/done.json is not as it was written"):
        run.load_model()
    # A run of an earlier version has no checksums: it is loaded as before.
    record = json.loads(text)
    del record["files"]
    (run.folder / "done.json").write_text(json.dumps(record))
    assert Run.open(run.folder).load_model() is not None


def test_a_lora_runs_adapter_is_checked_when_it_is_exported(recipe):
    run = vflan.train(vflan.replace(recipe, lora_r=2, lora_alpha=4, max_steps=1))
    files = run.summary["files"]
    assert {"model/model.safetensors", "adapter/adapter_model.safetensors"} <= set(files)
    flip(run.folder / "adapter" / "adapter_model.safetensors", -1, 0)
    with pytest.raises(ValueError, match="adapter_model.safetensors is not as it was written"):
        run.export(run.folder.parent / "out", merge=False)


# ------------------------------------------------------------------- locks, and other limits


@pytest.fixture(params=[errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP], ids=errno.errorcode.get)
def no_locks(request, monkeypatch):
    """A file system that cannot lock."""

    def flock(file, how):
        raise OSError(request.param, os.strerror(request.param))

    monkeypatch.setattr(fcntl, "flock", flock)


def test_without_locks_training_and_evaluation_end_in_a_sentence(no_locks, recipe, run, tmp_path):
    sentence = "is on a file system that cannot lock files, .*: mount it with locks"
    with pytest.raises(OSError, match=f"runs/base {sentence}"):
        vflan.train(recipe)
    with pytest.raises(OSError, match=f"answers {sentence}"):
        vflan.evaluate(run)
    with pytest.raises(OSError, match=sentence):
        vflan.world.build(
            tmp_path / "world", captions=1, per_kind=1, conversations=1, questions=0.01
        )
    assert not list(tmp_path.glob("answers/*.jsonl"))


def test_without_locks_samples_are_read_into_memory(no_locks, squares, cache):
    with pytest.warns(UserWarning, match="cannot lock files.*held in memory"):
        assert len(vflan.load_samples(squares)) == 32


def limited(limit, size, *words, before=""):
    """(what `vflan WORDS` prints to stderr, its exit status), in a process with a limit."""
    code = (
        f"import resource, sys\nresource.setrlimit(resource.{limit}, ({size}, {size}))\n{before}\n"
    )
    code += "from vflan.__main__ import main\nsys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", code, *map(str, words)]
    # A cache of its own, which is not yet larger than the limit.
    with TemporaryDirectory() as cache:
        environment = os.environ | {"VFLAN_CACHE": cache}
        child = subprocess.run(command, capture_output=True, text=True, env=environment)
    return child.stderr, child.returncode


def test_a_limit_for_files_ends_training_and_evaluation_in_a_sentence(recipe, tiny, tmp_path):
    """Nothing is lost: without the limit, both go on."""
    recipe = vflan.replace(recipe, save_every=1, max_steps=3, benchmarks=str(tmp_path / "tests"))
    names = (
        "vision_tower",
        "language_model",
        "samples",
        "images",
        "runs",
        "benchmarks",
        "save_every",
    )
    names += ("max_steps", "global_batch", "micro_batch")
    changes = json.dumps({name: getattr(recipe, name) for name in names})
    train = ("train", "tiny", "--stage", "base", "--changes", changes)
    said, status = limited("RLIMIT_FSIZE", 60_000, *train)
    assert status == 1 and said.count("\n") == 1, said
    assert "A file may not grow larger here: cannot write more to" in said, said
    assert "it has no checkpoint yet. Raise the limit (ulimit -f) and train it again" in said
    run = vflan.train(vflan.preset("tiny", changes).base)
    assert run.finished and run.load_model() is not None

    write_pope(tmp_path / "tests", tiny.folder)
    said, status = limited("RLIMIT_FSIZE", 1000, "evaluate", run.folder, "pope")
    assert status == 1 and said.count("\n") == 1, said
    assert (
        "pope.jsonl, for a file may not grow larger here: raise the limit (ulimit -f). All" in said
    )
    path = run.folder / "answers" / "pope.jsonl"
    kept = path.read_bytes()
    kept = kept[: kept.rindex(b"\n") + 1]
    assert 1 < kept.count(b"\n") < 12
    vflan.evaluate(run, "pope")
    assert path.read_bytes().startswith(kept) and path.read_bytes().count(b"\n") == 13


@pytest.mark.parametrize("gigabytes", [0.6, 1.5])
def test_a_limit_for_memory_ends_in_a_sentence(gigabytes):
    """Importing torch with too little memory fails in many ways, some of them without an error."""
    said, status = limited("RLIMIT_AS", int(gigabytes * 1e9), "train", "tiny")
    assert status == 1
    assert said == (
        f"vflan train: {gigabytes} GB of memory are allowed here (ulimit -v), and 2 GB are needed "
        "to start: raise the limit.\n"
    )


def test_with_no_limit_for_memory_nothing_is_said():
    assert io.require_memory() is None


@pytest.mark.parametrize(
    "error, sentence",
    [
        (OSError(errno.EFBIG, "File too large"), "a file may not grow larger here"),
        (
            RuntimeError("I/O error: File too large (os error 27)"),
            "a file may not grow larger here",
        ),
        (OSError(errno.EDQUOT, os.strerror(errno.EDQUOT)), "the disk is full"),
        (RuntimeError("No space left on device (os error 28)"), "the disk is full"),
        (RuntimeError("inline_container.cc:672] . unexpected pos 1 vs 2"), "the disk is full"),
        (MemoryError(), "not enough memory"),
        (
            RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"),
            "not enough memory",
        ),
        (RuntimeError("can't start new thread"), "not enough memory"),
        (MemoryError("malloc of size 1125899906842624 failed"), "not enough memory"),  # Arrow
        (MemoryError("realloc of size 1125899906842624 failed"), "not enough memory"),
        (ImportError("libtorch.so: failed to map segment from shared object"), "not enough memory"),
        (RuntimeError("unable to mmap 5 bytes from file <x>: No such device (19)"), "cannot map"),
        (ValueError("no such task"), ""),
    ],
)
def test_each_librarys_words_for_a_limit_are_known(error, sentence):
    found = io.machine_limit(error)
    assert (sentence in found) if sentence else not found
    assert "\n" not in found
