"""Feeds broken, odd and hostile input to the public functions and checks how each one reacts.

    python -m bench.bad_input    # at least 15,000 inputs, into bench/results/bad_input.json
    python -m bench.bad_input --share 0.05 --families pictures

An input is accounted for if it was taken (and what came out is sound), if it was named with its
reason (a row of `check`'s report, the words of `picture_trouble`), or if it was refused by an error
that our code raised on purpose: a `raise` of ours, one sentence. An error that Python or a library
raised in the middle of our work is not accounted for; neither is what takes over ten seconds, nor
what a picture or an archive outside its folder, or code in a pickle, got done. An audit hook sees
whether an input started a process or opened a file for writing outside the cache and its folder.
"""

import argparse
import base64
import copy
import io
import json
import linecache
import os
import pickle
import random
import resource
import shutil
import signal
import struct
import sys
import tempfile
import time
import traceback
import warnings
import zipfile
import zlib
from collections import Counter
from contextlib import redirect_stderr, redirect_stdout
from functools import partial
from pathlib import Path

os.environ["VFLAN_CACHE"] = tempfile.mkdtemp(prefix="bad-input-cache-")

from PIL import Image  # noqa: E402

import vflan  # noqa: E402
from bench.record import write  # noqa: E402
from tests.conftest import make_backbones, make_squares  # noqa: E402
from vflan.__main__ import main as main_command  # noqa: E402
from vflan.config import Recipe  # noqa: E402
from vflan.data.images import picture_trouble, read_picture  # noqa: E402
from vflan.evaluation.benchmarks import BENCHMARKS  # noqa: E402
from vflan.models.llava import load_processor, load_tokenizer, read_projector  # noqa: E402
from vflan.training.run import Run  # noqa: E402
from vflan.world.twins import TWINS, write_twins  # noqa: E402

SECONDS, GIGABYTES = 10, 3.0
OURS = str(Path(vflan.__file__).parent)
ODD = [
    None,
    True,
    False,
    0,
    -1,
    1.5,
    float("nan"),
    float("inf"),
    10**30,
    "",
    " ",
    "\0",
    "\ud83d",
    "é" * 50,
    "x" * 100_000,
    [],
    {},
    [[]],
    [None],
    {"from": "gpt"},
    "../secret.png",
    "/etc/passwd",
    "<image>",
    "<image>\n<image>",
    "</s>",
    "‮",
    "http://localhost/x.png",
    "::",
    "a.zip::b",
    "a.parquet::x",
    "-1",
    "nan",
    "\x1b[31m",
    "%s%n",
    "🙂",
    "<script>",
]


class TooLong(BaseException):
    """Not an Exception, so that no handler takes it for a broken picture."""


def outcome(call):
    """(what became of an input, the words that say why) of one call."""

    def late(*_):
        raise TooLong

    signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    began = time.monotonic()
    try:
        with (
            warnings.catch_warnings(),
            redirect_stdout(io.StringIO()),
            redirect_stderr(io.StringIO()),
        ):
            warnings.simplefilter("ignore")
            found = call() or ("taken", "")
    except TooLong:
        found = "hung", " ".join(line.strip() for line in traceback.format_exc().splitlines()[-9:])
    except Exception as trouble:
        found = (
            ("refused", str(trouble)) if on_purpose(trouble) else ("unaccounted", in_words(trouble))
        )
    except SystemExit as trouble:
        found = "refused", str(trouble)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    if time.monotonic() - began > SECONDS and found[0] != "hung":
        found = "hung", f"{time.monotonic() - began:.0f} s"
    return found


def on_purpose(trouble):
    """Whether an error comes from a `raise` in vflan and says something."""
    frame = traceback.extract_tb(trouble.__traceback__)[-1]
    line = (linecache.getline(frame.filename, frame.lineno) or "").strip()
    return frame.filename.startswith(OURS) and line.startswith("raise ") and len(str(trouble)) > 15


def in_words(trouble):
    frames = traceback.extract_tb(trouble.__traceback__)
    ours = next((f for f in reversed(frames) if f.filename.startswith(OURS)), frames[-1])
    return (
        f"{type(trouble).__name__}: {str(trouble)[:120]!r} in "
        f"{Path(ours.filename).name}:{ours.lineno} {ours.name}"
    )


def twisted(value, draw, depth=0):
    """A copy of a json value with one thing in it changed: a key lost, a value of another kind,
    text cut or doubled.
    """
    if depth and draw.random() < 0.3 or not isinstance(value, (dict, list)) or not value:
        if isinstance(value, str) and draw.random() < 0.5:
            at = draw.randrange(len(value) + 1)
            return draw.choice(
                (
                    value[:at],
                    value + value,
                    value[:at] + str(draw.choice(ODD)) + value[at:],
                    value.upper(),
                )
            )
        return draw.choice(ODD)
    value = copy.copy(value)
    key = draw.choice(list(value) if isinstance(value, dict) else range(len(value)))
    if draw.random() < 0.2:
        del value[key]
    elif draw.random() < 0.05:
        value[key if isinstance(value, list) else str(draw.choice(ODD))] = draw.choice(ODD)
    else:
        value[key] = twisted(value[key], draw, depth + 1)
    return value


def damaged(data, draw):
    """The bytes cut off, with some of them changed, lost, doubled, or others in front."""
    data, at = bytearray(data), draw.randrange(len(data) + 1)
    how = draw.randrange(6)
    if how == 0:
        return bytes(data[:at])
    if how == 1:
        for _ in range(draw.choice((1, 4, 64))):
            data[draw.randrange(len(data))] = draw.randrange(256)
        return bytes(data)
    if how == 2:
        return bytes(data[:at] + data[at + draw.randrange(1, 40) :])
    if how == 3:
        return bytes(data[:at] + data[at : at + 200] + data[at:])
    if how == 4:
        return draw.choice(
            (
                b"\xef\xbb\xbf",
                b"\xff\xfe",
                b"\0" * 8,
                b"<html>",
                b"PK\3\4",
                b"version https://git-lfs",
            )
        ) + bytes(data)
    return bytes(data[:at]) + draw.randbytes(draw.randrange(1, 300))


# ------------------------------------------------------------------------------------------ records


def records(draw, folder, n):
    """Rows of a samples file, forty changed ones in a file; and files that are themselves
    damaged.
    """
    path = make_squares(folder)
    make_backbones(folder)
    tokenizer = load_tokenizer(recipe_in(folder))
    whole, text = json.loads(path.read_text()), path.read_bytes()
    os.symlink(folder.parent / "secret.png", folder / "images" / "link.png")
    os.mkfifo(folder / "images" / "pipe.png")

    def checked(file, count):
        report = vflan.check(vflan.load_samples(file, folder / "images"), tokenizer, image_tokens=4)
        if count is not None and report.rows != count:
            return "unaccounted", f"{count} rows written, {report.rows} read"
        if report.ok + len(report.bad) != report.rows or not all(report.bad.reason):
            return "unaccounted", f"{report.ok} fine and {len(report.bad)} bad of {report.rows}"
        return ("named", report.bad.reason.iloc[0]) if len(report.bad) else None

    for number in range(n):
        if number % 8 == 7:
            file = folder / f"damaged{draw.choice(('.json', '.jsonl', '.parquet'))}"
            file.write_bytes(damaged(text, draw))
            yield partial(checked, file, None)
            continue
        row = draw.choice(whole)
        for _ in range(draw.choice((1, 1, 2, 3))):
            row = twisted(row, draw)
        if draw.random() < 0.1 and isinstance(row, dict):
            row["image"] = draw.choice(
                (
                    "link.png",
                    "pipe.png",
                    "../../secret.png",
                    "images",
                    ".",
                    "/dev/zero",
                    "0.png/x",
                    "a" * 300,
                )
            )
        many = [row] if draw.random() < 0.5 else [whole[0], row, whole[1]]
        file = folder / f"rows{draw.choice(('.json', '.jsonl'))}"
        lines = [json.dumps(r) for r in many]
        file.write_text("\n".join(lines) if file.suffix == ".jsonl" else f"[{', '.join(lines)}]")
        yield partial(checked, file, len(many))


# ----------------------------------------------------------------------------------------- pictures


def pictures(draw, folder, n):
    """Picture files: damaged, of every mode and format, misnamed, animated, rotated, thin, empty,
    and bombs.
    """
    folder.mkdir(parents=True)
    make_backbones(folder)
    processors = [
        load_processor(vflan.replace(recipe_in(folder), image_aspect_ratio=a))
        for a in ("pad", "crop")
    ]
    noise = Image.frombytes("RGB", (40, 30), random.Random(1).randbytes(3600))
    kinds = {
        "PNG": ("RGB", "RGBA", "L", "LA", "P", "1", "I;16"),
        "JPEG": ("RGB", "L", "CMYK"),
        "GIF": ("P", "L"),
        "WEBP": ("RGB", "RGBA"),
        "BMP": ("RGB", "1", "P"),
        "TIFF": ("RGB", "CMYK", "F", "I;16", "LAB"),
        "PPM": ("RGB", "L"),
        "ICO": ("RGBA",),
        "TGA": ("RGB",),
    }
    sound = []
    for kind, modes in kinds.items():
        for mode in modes:
            out = io.BytesIO()
            grey = noise.convert("L")
            picture = (
                grey.point(lambda v: v * 256, "I").convert(mode)
                if mode == "I;16"
                else noise.convert(mode)
            )
            picture.save(out, kind)
            sound.append(out.getvalue())
    out = io.BytesIO()
    noise.save(
        out, "GIF", save_all=True, append_images=[noise.rotate(90), Image.new("RGB", (40, 30))]
    )
    sound.append(out.getvalue())  # animated
    for turn in range(1, 9):
        out, exif = io.BytesIO(), Image.Exif()
        exif[274] = turn
        noise.save(out, "JPEG", exif=exif)
        sound.append(out.getvalue())
    thin = [(1, 1), (1, 5000), (5000, 1), (1, 60000), (60000, 1), (2, 2), (3, 40000)]
    for size in thin:
        out = io.BytesIO()
        Image.new("RGB", size, "red").save(out, "PNG")
        sound.append(out.getvalue())
    bombs = [
        png(width, height)
        for width, height in (
            (0, 0),
            (0, 5),
            (20000, 20000),
            (100000, 100000),
            (2**31 - 1, 2**31 - 1),
        )
    ]
    bombs += [
        b"",
        b"GIF89a",
        b"\x89PNG\r\n\x1a\n",
        b"<svg xmlns='http://www.w3.org/2000/svg'/>",
        b"%PDF-1.4",
    ]
    endings = ("png", "jpg", "gif", "webp", "tif", "txt", "zip", "", "PNG", "parquet")

    def seen(path):
        trouble = picture_trouble(path)
        if trouble:
            return "named", trouble
        picture = read_picture(path)
        if picture.mode != "RGB" or not all(picture.size):
            return "unaccounted", f"{picture.mode} {picture.size}"
        for processor in processors:
            pixels = processor.image_processor([picture], return_tensors="pt")["pixel_values"]
            if pixels.shape != (1, 3, 24, 24) or not pixels.isfinite().all():
                return "unaccounted", f"pixels of shape {tuple(pixels.shape)}"

    for number in range(n):
        plain = [*sound, *bombs]
        data = plain[number] if number < len(plain) else damaged(draw.choice(plain) or b"x", draw)
        path = folder / f"{number}.{draw.choice(endings)}"
        path.write_bytes(data)
        yield partial(seen, path)
        path.unlink()


def png(width, height):
    """A PNG that says that it is so large, with little in it."""

    def chunk(kind, data):
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", head)
        + chunk(b"IDAT", zlib.compress(b"\0" * 100_000))
        + chunk(b"IEND", b"")
    )


# ----------------------------------------------------------------------------------------- archives


def archives(draw, folder, n):
    """Zips and parquet parts of pictures: members that point elsewhere, links, bombs, locks; and
    damaged ones.
    """
    path = make_squares(folder)
    rows = json.loads(path.read_text())[:4]
    picture = (folder / "images" / "0.png").read_bytes()
    hostile = [
        "../secret.png",
        "../../secret.png",
        "/etc/hostname",
        "x/../../secret.png",
        "C:\\secret.png",
        "link.png",
        "bomb.png",
        "dir/",
        "..",
        "․․/secret.png",
        "a\0b.png",
        "0.png",
    ]
    shutil.rmtree(folder / "images")
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in hostile:
            archive.writestr(name, bytes(300 << 20) if name == "bomb.png" else picture)
        link = zipfile.ZipInfo("link.png")
        link.external_attr = 0o120777 << 16
        archive.writestr(link, "../secret.png")
    sound = file.getvalue()

    def read(target):
        samples = vflan.load_samples(path, target)
        report = vflan.check(samples)
        for image in samples["image"][:]:
            if not picture_trouble(image) and read_picture(image).getpixel((0, 0)) == (1, 2, 3):
                return "unaccounted", f"{image} was read from outside"
        return ("named", report.bad.reason.iloc[0]) if len(report.bad) else None

    for number in range(n):
        target = folder / f"images-{number}.zip"
        target.write_bytes(sound if number < 10 else damaged(sound, draw))
        for row in rows:
            row["image"] = draw.choice(hostile)
        path.write_text(json.dumps(rows))
        yield partial(read, target)
        target.unlink()


# --------------------------------------------------------------------------------------- benchmarks


def benchmarks(draw, folder, n):
    """Question files of every benchmark in our format, some as released; read by `load` and by the
    command that scores.
    """
    (folder / "images").mkdir(parents=True)
    with redirect_stdout(io.StringIO()):
        write_twins(folder, seed=5, questions=0.2)
    picture = base64.b64encode((next((folder / "images").iterdir())).read_bytes()).decode()
    released = {
        "pope": {
            "llava_pope_test.jsonl": [
                {"question_id": i, "image": "a.jpg", "text": "Is it?", "category": "random"}
                for i in range(2)
            ],
            "coco/coco_pope_random.json": [
                {"question_id": i, "label": "yes", "text": "Is it?"} for i in range(2)
            ],
        },
        "mmbench": {
            "mmbench_dev_20230712.tsv": "index\tquestion\tA\tB\tanswer\tcategory\tl2-category"
            "\tsplit\timage\n"
            f"0\tWhat?\tred\tblue\tA\tcolour\tattr\tdev\t{picture}\n"
            f"1\tWho?\tme\tyou\tB\tcolour\tattr\tdev\t{picture}\n"
        },
        "scienceqa": {
            "llava_test_CQM-A.json": [
                {
                    "id": "1",
                    "image": "1.png",
                    "conversations": [
                        {"from": "human", "value": "<image>\nWhat?\nA. a\nB. b"},
                        {"from": "gpt", "value": "A"},
                    ],
                }
            ],
            "problems.json": {
                "1": {
                    "choices": ["a", "b"],
                    "answer": 0,
                    "subject": "natural science",
                    "grade": "grade1",
                    "image": "image.png",
                    "hint": "",
                    "question": "What?",
                }
            },
            "pid_splits.json": {"test": ["1"]},
        },
        "vizwiz": {
            "llava_test.jsonl": [
                {"question_id": i, "image": f"VizWiz_test_{i}.jpg", "text": "what?"}
                for i in range(2)
            ]
        },
        "textocr": {
            "TextOCR_0.1_val.json": {
                "imgs": {"a": {"file_name": "train/a.jpg"}},
                "anns": {"a_1": {"utf8_string": "stop"}},
                "imgToAnns": {"a": ["a_1"]},
            }
        },
    }
    for name, files in released.items():
        for file, content in files.items():
            home = folder / "released" / name / file
            home.parent.mkdir(parents=True, exist_ok=True)
            text = "\n".join(map(json.dumps, content)) if file.endswith(".jsonl") else content
            home.write_text(text if isinstance(text, str) else json.dumps(text))
    work = folder / "work"

    def load(name):
        with warnings.catch_warnings(record=True):
            samples = BENCHMARKS[name].load(work)
            BENCHMARKS[name].score(samples, ["yes"] * len(samples))
        return None

    def command(name, questions, answers):
        said = io.StringIO()
        with redirect_stderr(said):
            code = main_command(
                ["score", name, "--questions", str(questions), "--answers", str(answers)]
            )
        text = said.getvalue().strip()
        if code and (not text or "Traceback" in text):
            return "unaccounted", text[-200:]
        return ("refused", text) if code else None

    for _ in range(n):
        shutil.rmtree(work, ignore_errors=True)
        if draw.random() < 0.3:
            name = draw.choice(list(released))
            shutil.copytree(folder / "released" / name, work / name)
        else:
            name = draw.choice(list(TWINS))
            shutil.copytree(folder / name, work / name)
        file = draw.choice([p for p in (work / name).rglob("*") if p.is_file()])
        if draw.random() < 0.4 or file.suffix == ".tsv":
            file.write_bytes(damaged(file.read_bytes(), draw))
        elif file.suffix == ".jsonl":
            lines = [json.loads(line) for line in file.read_text().splitlines()]
            at = draw.randrange(len(lines))
            lines[at] = twisted(lines[at], draw)
            file.write_text("\n".join(map(json.dumps, lines)))
        else:
            file.write_text(json.dumps(twisted(json.loads(file.read_text()), draw)))
        if draw.random() < 0.5:
            yield partial(load, name)
            continue
        rows = [{"question_id": f"{name}_{i}", "text": "yes"} for i in range(3)] + [
            {"question_id": i, "text": "A"} for i in range(2)
        ]
        answers = work / draw.choice(("answers.jsonl", "answers.json"))
        rows = [twisted(row, draw) if draw.random() < 0.3 else row for row in rows]
        answers.write_text(
            "\n".join(map(json.dumps, rows)) if answers.suffix == ".jsonl" else json.dumps(rows)
        )
        questions = next(p for p in sorted((work / name).rglob("*"), reverse=True) if p.is_file())
        yield partial(command, name, questions, answers)


def answers(draw, folder, n):
    """Odd strings as answers, to the parser and the score of every benchmark."""
    (folder / "images").mkdir(parents=True)
    with redirect_stdout(io.StringIO()):
        write_twins(folder, seed=6, questions=0.1)
    samples = {name: BENCHMARKS[name].load(folder) for name in TWINS}
    pieces = [x for x in ODD if isinstance(x, str)] + [
        "yes",
        "No",
        "A",
        "(b)",
        "the",
        "1,000",
        "3.5",
        "-1e9",
        ".",
        "\n",
        "\t",
        "'",
        "{}",
    ]

    def read(name, said):
        scores = BENCHMARKS[name].score(samples[name], [said] * len(samples[name]))
        if not all(-1e-9 <= value < 1e9 for value in scores.values()):
            return "unaccounted", f"{scores}"

    for _ in range(n):
        name = draw.choice(list(samples))
        said = (
            "".join(draw.choice(pieces) for _ in range(draw.randrange(6)))
            if draw.random() < 0.97
            else None
        )
        yield partial(read, name, said)


# ------------------------------------------------------------------------------ recipes and presets


def recipe_in(folder):
    return Recipe(
        name="run",
        stage="base",
        vision_tower=str(folder / "vision_tower"),
        language_model=str(folder / "language_model"),
        samples=str(folder / "samples.json"),
        images=str(folder / "images"),
        runs=str(folder / "runs"),
        tune=("projector", "language_model"),
        global_batch=8,
        micro_batch=4,
        max_steps=2,
    )


def recipes(draw, folder, n):
    """Fields of a recipe: unknown, of another type, out of range. One that is taken must come back
    from its json.
    """
    values = recipe_in(folder).to_dict()
    names = sorted(values)

    def made(changed):
        recipe = Recipe.from_dict(changed)
        if Recipe.from_dict(json.loads(json.dumps(recipe.to_dict()))) != recipe:
            return "unaccounted", "it does not come back from its json"

    for _ in range(n):
        changed = dict(values)
        for _ in range(draw.choice((1, 1, 2))):
            changed[draw.choice(names)] = draw.choice(ODD)
        if draw.random() < 0.1:
            changed[draw.choice(("learning_rate", "stge", "", "lr ", "__class__"))] = 1
        yield partial(made, changed)


def presets(draw, folder, n):
    """Files given as a preset that are none."""
    folder.mkdir(parents=True)
    good = (Path(OURS) / "presets" / "tiny.py").read_bytes()
    bodies = [
        b"",
        b"preset = 3",
        b"def preset(): return 1",
        b"def preset(): return ()",
        b"def preset(x): return x",
        b"def preset(): return [1, 2, 3]",
        b"raise RuntimeError('no')",
        b"import does_not_exist",
        b"def preset(): 1/0",
        b"preset(",
    ]

    def read(path, more):
        found = vflan.preset(str(path), **more)
        if not all(isinstance(stage, Recipe) for stage in found):
            return "unaccounted", f"{found}"[:100]

    for number in range(n):
        path = folder / f"mine{number}.py"
        path.write_bytes(bodies[number] if number < len(bodies) else damaged(good, draw))
        more = (
            {draw.choice(("lr", "max_steps", "nothing", "name")): draw.choice(ODD)}
            if draw.random() < 0.3
            else {}
        )
        yield partial(read, f"tiny{number}" if number % 20 == 19 else path, more)


# -------------------------------------------------------------------------------------- checkpoints


class Hostile:
    """What a pickle does when it is read: make a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (os.mkdir, (str(self.path),))


def checkpoints(draw, folder, n):
    """A finished run and a projector file: damaged, changed, with files lost, or with code in
    them.
    """
    make_squares(folder)
    make_backbones(folder)
    with redirect_stderr(io.StringIO()):
        run = vflan.train(recipe_in(folder))
    proof = folder / "code ran"
    from vflan.models.weights import save_projector

    projector = save_projector(run.load_model(), folder / "mm_projector.bin")
    kept = folder / "copy"

    def look(run):
        run = Run.open(run)
        run.metrics(), run.heldout(), run.summary, run.recipe  # noqa: B018
        if run.finished:
            run.processor()
            model = run.load_model()
            if not all(weight.isfinite().all() for weight in model.parameters()):
                return "named", "weights that are no numbers"  # told by the first answer

    def projector_of(path):
        read_projector(path)

    for number in range(n):
        if number % 4 == 3:
            path = folder / "other.bin"
            whole = pickle.dumps(
                {"model.mm_projector.0.weight": Hostile(proof)}, protocol=draw.choice((2, 4))
            )
            path.write_bytes(whole if number % 8 == 3 else damaged(projector.read_bytes(), draw))

            def call(path=path):
                try:
                    projector_of(path)
                finally:
                    if proof.exists():
                        proof.rmdir()
                        raise AssertionError("code in a pickle was run")

            yield call
            continue
        shutil.rmtree(kept, ignore_errors=True)
        shutil.copytree(run.folder, kept)
        file = draw.choice(
            [
                p
                for p in kept.rglob("*")
                if p.is_file() and p.suffix in (".json", ".jsonl", ".safetensors", ".jinja")
            ]
        )
        how = draw.random()
        if how < 0.15:
            file.unlink()
        elif how < 0.5 and file.suffix == ".json":
            file.write_text(json.dumps(twisted(json.loads(file.read_text()), draw)))
        elif file.stat().st_size:
            file.write_bytes(damaged(file.read_bytes(), draw))
        yield partial(look, kept)


FAMILIES = {  # and how many inputs of each
    records: 3000,
    pictures: 3000,
    archives: 120,
    benchmarks: 1800,
    answers: 1500,
    recipes: 1200,
    presets: 120,
    checkpoints: 360,
}


def main():
    from bench import hostile

    families = FAMILIES | hostile.FAMILIES
    parser = argparse.ArgumentParser(
        prog="python -m bench.bad_input", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--share", type=float, default=1.0, help="of the inputs, for a look")
    parser.add_argument(
        "--families",
        nargs="+",
        choices=[f.__name__ for f in families],
        default=[f.__name__ for f in families],
    )
    asked = parser.parse_args()
    print(f"seed {asked.seed}", flush=True)
    counts, odd, slowest = {}, Counter(), 0.0
    with tempfile.TemporaryDirectory() as scratch:
        watcher = hostile.Watcher([scratch, os.environ["VFLAN_CACHE"], "/dev/null"])
        sys.addaudithook(watcher)
        Image.new("RGB", (8, 8), (1, 2, 3)).save(Path(scratch) / "secret.png")
        for family, number in families.items():
            if family.__name__ not in asked.families:
                continue
            found, began = Counter(), time.monotonic()
            for call in family(
                random.Random(f"{family.__name__} {asked.seed}"),
                Path(scratch) / family.__name__,
                max(1, round(number * asked.share)),
            ):
                at, watcher.on = time.monotonic(), True
                verdict, words = outcome(call)
                watcher.on = False
                if watcher.started or watcher.written:
                    verdict, words = "obeyed", str(watcher.started + watcher.written)[:200]
                    watcher.started, watcher.written = [], []
                slowest = max(slowest, time.monotonic() - at)
                found[verdict] += 1
                if verdict in ("unaccounted", "hung", "obeyed"):
                    odd[f"{verdict}: {words}"] += 1
            counts[family.__name__] = dict(found)
            print(
                f"{family.__name__:12} {sum(found.values()):6} {dict(found)} "
                f"{time.monotonic() - began:.0f} s",
                flush=True,
            )
    shutil.rmtree(os.environ["VFLAN_CACHE"], ignore_errors=True)
    for words, times in odd.most_common():
        print(f"{times:5} x {words}")
    every = Counter()
    for found in counts.values():
        every.update(found)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    checks = {
        "inputs": ("inputs", 15_000, None),
        "unaccounted": ("inputs with an error that is not ours, or lost", None, 0),
        "obeyed": ("inputs that started a process or wrote outside cache and run", None, 0),
        "hung": (f"inputs that took over {SECONDS} s", None, 0),
        "slowest": ("s, the slowest input", None, SECONDS),
        "peak_gb": ("GB, peak memory of the whole bench", None, GIGABYTES),
    }
    values = dict(
        inputs=sum(every.values()),
        unaccounted=every["unaccounted"],
        obeyed=every["obeyed"],
        hung=every["hung"],
        slowest=slowest,
        peak_gb=peak,
    )
    if asked.share == 1 and len(counts) == len(families):
        write(
            "bad_input",
            checks,
            values,
            f"python -m bench.bad_input {' '.join(sys.argv[1:])}".strip(),
            seed=asked.seed,
            families=counts,
        )
    else:
        print(values)


if __name__ == "__main__":
    main()
