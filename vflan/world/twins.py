"""Small twins of the papers' other benchmarks: same form of question, same parser, same metric.

They are in a folder of their own, benchmarks_more/, so that benchmarks/, which the notebooks use,
does not change. Options have the letters a to d, because the mini world's language model writes
small letters; the field `letters` of a sample says so.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from numpy.random import Generator

from vflan.evaluation.benchmarks.files import LETTER_CN, UNSURE
from vflan.world.scene import (
    BACKGROUNDS,
    COLORS,
    SHAPES,
    TEXTURES,
    Scene,
    digits,
    draw_all,
    held,
    pick,
    rng_of,
    sample_scene,
)
from vflan.world.tasks import ANIMAL, FRUIT, KINDS, YES_NO
from vflan.world.words import NUMBERS, describe

CHOICES = ("choose_color", "choose_shape", "choose_background", "choose_place", "choose_present")
LETTERED = dict(letters="abcd")


def write_twins(folder: Path, seed: int, questions: float, **_: object) -> None:
    """Write a folder with questions.jsonl for each twin, and all pictures into images/."""
    for name, make in TWINS.items():
        rows, jobs = [], {}
        for image, scene, row in make(seed, max(2, round(40 * questions))):
            jobs[f"{name}_{image}.png"] = scene
            rows.append(
                dict(question_id=f"{name}_{len(rows)}", image=f"{name}_{image}.png", category=name)
                | row
            )
        (folder / name).mkdir()
        with open(folder / name / "questions.jsonl", "w") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
        draw_all((str(folder / "images" / image), scene) for image, scene in jobs.items())


def scenes(
    name: str, seed: int, n: int, kind: str | None = "objects", things: int | None = None
) -> Iterator[tuple[int, Scene, Generator]]:
    """n (number, scene, rng) of scenes set aside for evaluation; `things`: objects in each."""
    i = done = 0
    while done < n:
        rng, i = rng_of("twin", name, seed, i), i + 1
        scene = sample_scene(rng, kind, things, seed=int(rng.integers(2**40)))
        if held(scene):
            yield done, scene, rng
            done += 1


def asked(
    name: str, seed: int, n: int, kinds: Sequence[str], kind: str | None = "objects"
) -> Iterator[tuple[int, Scene, Generator, str, str, str]]:
    """(number, scene, rng, kind, question, answer) for every kind that fits a scene."""
    for i, scene, rng in scenes(name, seed, n, kind):
        for task in kinds:
            if made := KINDS[task].make(scene, rng):
                yield i, scene, rng, task, *made


def ten(rng: Generator, answer: str, others: Sequence[str]) -> list[str]:
    """Answers of ten people: mostly the right one."""
    others = [o for o in others if o != answer]
    return [answer if rng.random() < 0.85 else pick(rng, others) for _ in range(10)]


def vqav2(seed: int, n: int) -> Iterator[tuple]:
    kinds = {
        "exist_shape": ("yes/no", YES_NO),
        "count_color": ("number", NUMBERS[:4]),
        "color_of": ("other", COLORS),
        "texture_of": ("other", TEXTURES),
    }
    for i, scene, rng, task, text, label in asked("vqav2", seed, n, kinds):
        sort, others = kinds[task]
        yield i, scene, dict(text=text, label=label, category=sort, answers=ten(rng, label, others))


def vizwiz(seed: int, n: int) -> Iterator[tuple]:
    for i, scene, rng, _, text, label in asked("vizwiz", seed, n, ("color_of", "texture_of")):
        yield (
            i,
            scene,
            dict(
                text=text + UNSURE,
                label=label,
                category="other",
                answers=ten(rng, label, (*COLORS, *TEXTURES, "unanswerable")),
            ),
        )
        absent = pick(rng, [s for s in SHAPES if all(t.shape != s for t in scene.things)])
        yield (
            i,
            scene,
            dict(
                text=f"What is the texture of the {absent}?{UNSURE}",
                label="unanswerable",
                category="unanswerable",
                answers=ten(rng, "unanswerable", TEXTURES),
            ),
        )


def gqa(seed: int, n: int) -> Iterator[tuple]:
    for i, scene, _, _, text, label in asked(
        "gqa", seed, n, ("above", "row_of", "topmost", "is_background")
    ):
        yield (
            i,
            scene,
            dict(text=text, label=label, category="verify" if label in YES_NO else "query"),
        )


def scienceqa(seed: int, n: int) -> Iterator[tuple]:
    for i, scene, rng, _, text, label in asked("scienceqa", seed, n, CHOICES[:3]):
        row = dict(label=label, **LETTERED)
        if rng.random() < 0.5:
            yield i, scene, row | dict(text=text, category="image")
        else:
            yield (
                i,
                scene,
                row | dict(text=f"Context: {describe(scene)}\n{text}", category="text", image=None),
            )


def textvqa(seed: int, n: int) -> Iterator[tuple]:
    kinds = {"first_letter": "acefhk", "count_letters": NUMBERS[2:5], "has_letter": YES_NO}
    for i, scene, rng, task, text, label in asked("textvqa", seed, n, kinds, "text"):
        text += f"\nReference OCR token: {', '.join(scene.text)}"
        yield i, scene, dict(text=text, label=label, answers=ten(rng, label, kinds[task]))


def mmbench_cn(seed: int, n: int) -> Iterator[tuple]:
    for q, (i, scene, _, task, text, label) in enumerate(
        asked("mmbench_cn", seed, max(1, n // 4), CHOICES[:3])
    ):
        stem, rest = text.split(" (a) ", 1)
        words = rest.removesuffix(" Answer with the letter.").split()
        turned = [w for w in words if not w.startswith("(")]
        right = turned["abcd".index(label)]
        for turn in range(4):
            options = turned[turn:] + turned[:turn]
            lettered = " ".join(f"({x}) {o}" for x, o in zip("abcd", options))
            yield (
                i,
                scene,
                dict(
                    question_id=f"{q}_{turn}",
                    text=f"{stem} {lettered}{LETTER_CN}",
                    category=task,
                    label="abcd"[options.index(right)],
                ),
            )


def seed_bench(seed: int, n: int) -> Iterator[tuple]:
    for i, scene, _, task, text, label in asked(
        "seed", seed, n, ("choose_color", "choose_shape", "choose_place")
    ):
        frame = i % 4 == 0  # a frame of a video is blurred
        yield (
            i,
            replace(scene, condition="blurred") if frame else scene,
            dict(
                text=text,
                label=label,
                category=task,
                data_type="video" if frame else "image",
                **LETTERED,
            ),
        )


def mm_vet(seed: int, n: int) -> Iterator[tuple]:
    kinds = {
        "color_and_place": ["rec", "spat"],
        "count_all": ["math", "rec"],
        "fruit": ["know", "rec"],
    }
    for i, scene, _, task, text, label in asked("mm_vet", seed, n, kinds):
        yield (
            i,
            scene,
            dict(
                text=text, label=label.replace(", ", "<AND>"), capability=kinds[task], judge="rule"
            ),
        )
    for i, scene, _, _, text, label in asked(
        "mm_vet text", seed, max(1, n // 4), ("first_letter",), "text"
    ):
        yield f"text_{i}", scene, dict(text=text, label=label, capability=["ocr"], judge="rule")


def mmmu(seed: int, n: int) -> Iterator[tuple]:
    kinds = {
        "choose_color": "Art",
        "choose_place": "Geography",
        "count_all": "Math",
        "row_of": "Geography",
    }
    for q, (i, scene, _, task, text, label) in enumerate(asked("mmmu", seed, n, kinds)):
        more = dict(question_type="open", options=[])
        if task.startswith("choose"):
            words = text.split(" (a) ", 1)[1].removesuffix(" Answer with the letter.").split()
            more = dict(
                question_type="multiple-choice",
                options=[w for w in words if w[0] != "("],
                **LETTERED,
            )
        yield (
            i,
            scene,
            more
            | dict(
                text=text,
                label=label,
                category=kinds[task],
                question_id=f"validation_{kinds[task]}_{q}",
            ),
        )


def classes(name: str, task: str, options: Sequence[str]) -> Callable:
    def make(seed, n):
        for i, scene, rng in scenes(name, seed, 3 * n // 2, things=1):
            text, label = KINDS[task].make(scene, rng)
            yield i, scene, dict(text=text, label=label, classes=list(options))

    return make


def mnist(seed: int, n: int) -> Iterator[tuple]:
    """Handwritten digits that training does not use.

    The forgetting benchmark takes the first 200 of the same order, or more in a world with more
    questions: only where `questions` is 1 or less do the two share none.
    """
    inks = (
        rng_of("digits", seed).permutation(len(digits().target) // 2)[200 : 200 + 3 * n // 2] * 2
        + 1
    )
    for ink in map(int, inks):
        yield (
            ink,
            ink,
            dict(
                text="Which digit was written by hand?",
                label=str(digits().target[ink]),
                classes=[str(d) for d in range(10)],
            ),
        )


def textocr(seed: int, n: int) -> Iterator[tuple]:
    """The first letter or digit of a text.

    The papers ask for all of it, but no task of the mini world does, so Base would not know the
    form.
    """
    for kind, task in (("text", "first_letter"), ("number", "first_digit")):
        for i, scene, _, _, text, label in asked("textocr", seed, 3 * n // 4, (task,), kind):
            yield f"{kind}_{i}", scene, dict(text=text, label=label)


def wit(seed: int, n: int) -> Iterator[tuple]:
    for i, scene, _ in scenes("wit", seed, 3 * n // 2, things=1):
        (thing,) = scene.things
        text = (
            "Which animal lives in a place with this background, and which fruit has the color "
            f"of the {thing.shape}?"
        )
        entities = ANIMAL[scene.background].title(), FRUIT[thing.color].title()
        yield i, scene, dict(text=text, label="The {} likes the {}.".format(*entities))


TWINS = dict(
    vqav2=vqav2,
    gqa=gqa,
    vizwiz=vizwiz,
    scienceqa=scienceqa,
    textvqa=textvqa,
    mmbench_cn=mmbench_cn,
    seed=seed_bench,
    mm_vet=mm_vet,
    mmmu=mmmu,
    cifar10=classes("cifar10", "main_object", SHAPES),
    cifar100=classes("cifar100", "main_color", COLORS),
    mnist=mnist,
    miniimagenet=classes("miniimagenet", "background", BACKGROUNDS),
    textocr=textocr,
    wit=wit,
)
