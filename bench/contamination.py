"""How well copies of evaluation pictures are found among training pictures, and how fast.

    python -m bench.contamination                 # into bench/results/data.json, about 15
                                                  # minutes on two cores
    python -m bench.contamination --pictures 500  # a quick look, nothing is written

The thresholds of vflan/data/decontamination.py were chosen on the mini world of seed 0, with an eye
on the real samples; here they are measured on the mini world of another seed. Of the real samples,
where they are at hand, every second one is evaluated on and copied, the others are training
pictures of no copy; they are the same ones that were looked at then.

Recall: of evaluation pictures copied into a training set (JPEG at quality 30; half the width and
height; 5 % cut off at each of the four sides), the share that `check` reports as a copy of that
picture; the lowest of the three kinds, over the copies of the mini world and of the real samples
together. False alarms: the share of training pictures that are no copy and are reported. Minutes:
186,000 pictures at the rate of one thread here, times 8; an extrapolation, nothing ran on 8 cores.
It counts the time of this process on the processor, from pictures in the page cache.
"""

import argparse
import io
import json
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from datasets import Dataset
from PIL import Image

from bench.record import HOME, write
from vflan.data import decontamination, validation
from vflan.data.images import read_picture
from vflan.world import build

CHECKS = {
    "contamination_recall": ("share", 0.95, None),
    "contamination_false_alarms": ("share", None, 0.001),
    "contamination_minutes": ("min, 8 cores, extrapolated", None, 20),
}
REAL = HOME.parent / "shared" / "vision_flan_samples" / "images"
KINDS = ("jpeg_30", "half_size", "crop_5")
SIZE, EVALUATION = 186_000, 30_000


def copy(picture: Image.Image, kind: str) -> Image.Image:
    width, height = picture.size
    if kind == "half_size":
        return picture.resize((max(1, width // 2), max(1, height // 2)))
    if kind == "crop_5":
        x, y = round(0.05 * width), round(0.05 * height)
        return picture.crop((x, y, width - x, height - y))
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=30)
    return Image.open(io.BytesIO(file.getvalue())).convert("RGB")


def plant(originals, folder: Path) -> dict[str, tuple[str, str]]:
    """{copy: (kind, original)}: one copy of each kind of each picture, written to `folder`."""
    planted = {}
    for number, original in enumerate(originals):
        picture = read_picture(original)
        for kind in KINDS:
            name = folder / f"{number}_{kind}.{'jpg' if kind == 'jpeg_30' else 'png'}"
            if kind == "jpeg_30":
                picture.save(name, quality=30)
            else:
                copy(picture, kind).save(name, compress_level=1)
            planted[str(name)] = kind, original
    return planted


def report(training, evaluation):
    """check() on one row a training picture against one question an evaluation picture."""
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "this"}]
    rows = [
        dict(id=p, image=p, task_name=Path(p).parent.name, conversations=turns) for p in training
    ]
    asked = [dict(question_id=p, image=p, text="Which one?") for p in evaluation]
    return validation.check(Dataset.from_list(rows), against={"planted": asked})


def quality(folder: Path, world: Path, seed: int, pictures: int | None):
    """Recall by kind, the share of false alarms, and what was counted."""
    draw = np.random.default_rng(seed)
    build(world, seed=seed)
    evaluation = [str(p) for p in sorted((world / "benchmarks" / "images").iterdir())]
    training = [str(p) for p in sorted((world / "samples" / "images").iterdir())]
    training = sorted(draw.choice(training, pictures, replace=False)) if pictures else training
    real = [str(p) for p in sorted(REAL.iterdir())] if REAL.is_dir() else []
    chosen = {
        "mini": [
            str(p) for p in draw.choice(evaluation, min(len(evaluation), 1000), replace=False)
        ],
        "real": real[1::2],
    }
    (folder / "copies").mkdir()
    planted = {}
    for source, originals in chosen.items():
        (folder / "copies" / source).mkdir()
        planted |= plant(originals, folder / "copies" / source)
    training += real[::2]
    start = time.perf_counter()
    found = report([*training, *planted], evaluation + chosen["real"]).contamination
    seconds = time.perf_counter() - start
    hits = set(zip(found.picture, found.question_id))
    recall = {
        f"{source}_{kind}": [
            (name, original) in hits
            for name, (k, original) in planted.items()
            if k == kind and original in members
        ]
        for source, members in ((s, set(o)) for s, o in chosen.items() if o)
        for kind in KINDS
    }
    by_kind = {
        kind: np.mean(sum((v for k, v in recall.items() if k.endswith(kind)), [])) for kind in KINDS
    }
    false = found[~found.picture.isin(planted)]
    wrong = false[
        false.kind != "same pixels"
    ].picture.nunique()  # identical pixels by chance are a match
    return (
        by_kind,
        wrong / len(training),
        dict(
            recall={k: round(float(np.mean(v)), 4) for k, v in recall.items()},
            copies={source: 3 * len(o) for source, o in chosen.items()},
            training_pictures=len(training),
            flagged=wrong,
            evaluation_pictures=len(evaluation) + len(chosen["real"]),
            check_seconds=round(seconds, 1),
        ),
    )


def rate(folder: Path):
    """Pictures a second of one thread: the real samples, or generated 640 x 480 JPEGs; read from
    the page cache.
    """
    if REAL.is_dir():
        names, what = [str(p) for p in sorted(REAL.iterdir())], "the real samples"
    else:
        draw, names, what = (
            np.random.default_rng(0),
            [],
            "generated 640 x 480 JPEGs (no real samples here)",
        )
        for i in range(150):
            coarse = Image.fromarray(draw.integers(0, 256, (48, 64, 3), np.uint8))
            names.append(str(folder / f"{i}.jpg"))
            coarse.resize((640, 480), Image.Resampling.BICUBIC).save(names[-1])
    for name in names:
        Path(name).read_bytes()
    best = 0
    for attempt in range(3):
        # Nothing is remembered from the attempt before.
        validation.CACHE = folder / f"cache-{attempt}"
        # Of this process alone: others that share the machine do not count.
        start = time.process_time()
        validation.fingerprints(names, threads=1)
        best = max(best, len(names) / (time.process_time() - start))
    megapixels = np.mean([np.prod(Image.open(name).size) for name in names]) / 1e6
    return best, dict(
        pictures=f"{len(names)} of {what}",
        mean_megapixels=round(float(megapixels), 3),
        a_second=round(best, 1),
    )


def search_minutes():
    """Finding candidates for SIZE pictures among EVALUATION ones, on one thread, from a part of
    them.
    """
    draw = np.random.default_rng(0)
    mine, others = (draw.integers(0, 256, (n, 2, 8, 8, 3), np.uint8) for n in (4000, EVALUATION))
    start = time.process_time()
    decontamination.candidates(mine, others)
    return (time.process_time() - start) * SIZE / len(mine) / 60


def main():
    parser = argparse.ArgumentParser(
        prog="python -m bench.contamination", description=__doc__.splitlines()[0]
    )
    parser.add_argument(
        "--pictures", type=int, help="so many of the mini world's training pictures only"
    )
    parser.add_argument(
        "--seed",
        type=int,
        default=1,
        help="of the mini world; 0 is the one that the thresholds were chosen on",
    )
    parser.add_argument(
        "--world", help="build the mini world in this folder, or use the one there, and leave it"
    )
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        a_second, speed = rate(folder)
        search = search_minutes()
        validation.CACHE = folder / "cache"
        recall, false_alarms, notes = quality(
            folder, Path(options.world or folder / "world"), options.seed, options.pictures
        )
    values = {
        "contamination_recall": float(min(recall.values())),
        "contamination_false_alarms": false_alarms,
        "contamination_minutes": SIZE / a_second / 8 / 60 + search,
    }
    notes |= {
        "seed": options.seed,
        "rate": speed,
        "recall_by_kind": {k: round(float(v), 4) for k, v in recall.items()},
    }
    notes["extrapolated"] = (
        f"{SIZE} pictures at the rate of one thread here times 8, and {search:.1f} min to search "
        f"{EVALUATION} evaluation pictures "
        "for like ones, not divided; opening the like ones again is not in it"
    )
    command = " ".join(
        [
            "python -m bench.contamination",
            *("FOLDER" if a == options.world else a for a in sys.argv[1:]),
        ]
    )
    if options.pictures:
        print(json.dumps(values | notes, indent=1))
        return
    write("data", CHECKS, values, command, contamination=notes)


if __name__ == "__main__":
    main()
