import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
from datasets import Dataset
from PIL import Image, ImageDraw

from vflan.data import decontamination, validation
from vflan.data.decontamination import Fine, candidates, distance, question_keys
from vflan.data.images import read_picture, views
from vflan.data.validation import check
from vflan.world.scene import COLORS, render, rng_of, sample_scene


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(validation, "CACHE", tmp_path_factory.mktemp("cache"))


def scene(seed, side=96):
    """Coloured boxes on a coloured ground, with some noise: of one seed always the same."""
    draw = np.random.default_rng(seed)
    picture = Image.new("RGB", (side, side), tuple(int(v) for v in draw.integers(90, 230, 3)))
    pen = ImageDraw.Draw(picture)
    for _ in range(6):
        x, y = draw.integers(0, side - 24, 2)
        pen.rectangle(
            (x, y, x + draw.integers(8, 24), y + draw.integers(8, 24)),
            tuple(map(int, draw.integers(0, 256, 3))),
        )
    return Image.fromarray(
        (np.asarray(picture) + draw.normal(0, 3, (side, side, 3))).clip(0, 255).astype(np.uint8)
    )


def with_a_spot(picture, side=96):
    """The picture with one small object more: a hundredth of its area."""
    picture = picture.copy()
    x = side * 2 // 3
    ImageDraw.Draw(picture).rectangle((x, x, x + side // 10, x + side // 10), (20, 20, 20))
    return picture


def crop(picture, share=0.05):
    width, height = picture.size
    x, y = round(share * width), round(share * height)
    return picture.crop((x, y, width - x, height - y))


def samples(folder, *pictures, question="What is it?"):
    """One row a picture (name, image, keyword arguments of save), of task `t0`, `t1`, `t0` ..."""
    rows = []
    for number, (name, picture, how) in enumerate(pictures):
        picture.save(folder / name, **how)
        turns = [{"from": "human", "value": f"<image>\n{question}"}, {"from": "gpt", "value": "x"}]
        rows.append(
            dict(id=name, image=str(folder / name), task_name=f"t{number % 2}", conversations=turns)
        )
    return Dataset.from_list(rows)


def benchmark(folder, *pictures, text="Which one?"):
    questions = []
    for number, picture in enumerate(pictures):
        picture.save(folder / f"benchmark{number}.png")
        questions.append(
            dict(question_id=f"q{number}", image=str(folder / f"benchmark{number}.png"), text=text)
        )
    return {"mme": questions}


def matches(report):
    columns = ["row", "benchmark", "question_id", "kind"]
    return [tuple(line) for line in report.contamination[columns].itertuples(index=False)]


def test_each_kind_of_copy_is_found(tmp_path):
    against = benchmark(tmp_path, scene(0), scene(1))
    shutil.copy(tmp_path / "benchmark0.png", tmp_path / "copy")
    data = samples(
        tmp_path,
        ("other.png", scene(9), {}),
        ("same.bmp", scene(0), {}),
        ("q30.jpg", scene(0), dict(quality=30)),
        ("half.png", scene(0).resize((48, 48)), {}),
        ("crop.png", crop(scene(1)), {}),
        ("file.png", scene(0), {}),
    )
    shutil.copy(tmp_path / "benchmark0.png", tmp_path / "file.png")
    report = check(data, against=against)
    assert matches(report) == [
        (1, "mme", "q0", "same pixels"),
        (2, "mme", "q0", "near picture"),
        (3, "mme", "q0", "near picture"),
        (4, "mme", "q1", "near picture"),
        (5, "mme", "q0", "same file"),
    ]
    assert (
        report.contamination.distance.tolist()[::4] == [0, 0]
        and report.contamination.distance.max() <= 1
    )
    assert report.by_task.contaminated.tolist() == [2, 3] and report.contaminated == [1, 2, 3, 4, 5]
    assert report.ok == 6  # nothing is removed by itself
    assert "5 rows have a picture that is one of a benchmark's, or near one" in str(report)


def test_a_training_image_whose_crop_is_in_a_benchmark_is_found(tmp_path):
    report = check(
        samples(tmp_path, ("whole.png", scene(3), {})), against=benchmark(tmp_path, crop(scene(3)))
    )
    assert matches(report) == [(0, "mme", "q0", "near picture")]


def test_a_picture_above_the_usual_limit_is_compared_if_check_may_read_it(tmp_path, monkeypatch):
    monkeypatch.setattr(read_picture, "__defaults__", (96 * 96 - 1,))
    data = samples(tmp_path, ("large.png", scene(0, 95).resize((96, 96)), {}))
    report = check(data, against=benchmark(tmp_path, scene(0, 95)), max_pixels=96 * 96)
    assert matches(report) == [(0, "mme", "q0", "near picture")]


@pytest.mark.parametrize("seed", range(8))
def test_two_pictures_that_differ_in_one_small_object_are_not_copies(seed):
    a, b = scene(seed), with_a_spot(scene(seed))
    assert len(candidates(views(a)[None], views(b)[None])) == 1  # alike enough to be looked at
    assert distance(Fine(a), Fine(b)) > 1
    assert distance(Fine(crop(a)), Fine(b)) > 1


@pytest.mark.parametrize("color", COLORS)
def test_a_small_object_of_another_colour_makes_no_copy(color):
    seen = sample_scene(rng_of("contamination", color), "objects", n=1)
    pictures = [
        render(replace(seen, things=(replace(seen.things[0], size="small", color=other),)))
        for other in COLORS
    ]
    mine = Fine(pictures[COLORS.index(color)])
    near = [other for other, picture in zip(COLORS, pictures) if distance(mine, Fine(picture)) <= 1]
    assert near == [color]


@pytest.mark.parametrize("seed", range(8))
def test_the_frame_of_a_crop_is_exact_to_a_fraction_of_a_pixel(seed):
    for share in (0.03, 0.035, 0.05, 0.06):
        assert distance(Fine(scene(seed, 192)), Fine(crop(scene(seed, 192), share))) < 0.7, share


def test_only_exact_copies_of_flat_images_are_found(tmp_path):
    white, cream = Image.new("RGB", (64, 64), "white"), Image.new("RGB", (64, 64), (254, 254, 254))
    data = samples(tmp_path, ("a.png", cream, {}), ("b.bmp", white, {}))
    assert matches(check(data, against=benchmark(tmp_path, white))) == [
        (1, "mme", "q0", "same pixels")
    ]


def test_candidates_are_the_most_similar_views_and_no_others(monkeypatch):
    draw = np.random.default_rng(0)
    others = draw.integers(0, 256, (50, 2, 8, 8, 3), np.uint8)
    near = others[draw.integers(0, 50, 300)] + draw.normal(0, 10, (300, 2, 8, 8, 3))
    mine = near.clip(0, 255).astype(np.uint8)
    monkeypatch.setattr(decontamination, "LIKE", 110.0)  # so that there are more than CANDIDATES
    gaps = np.sqrt(((mine[:, None, 0].astype(float) - others[None, :, 0]) ** 2).mean((2, 3, 4)))
    slow = {(i, int(j)) for i in range(300) for j in np.argsort(gaps[i])[:8] if gaps[i, j] <= 110}
    fast = list(decontamination._similar(mine[:, 0], others[:, 0]))
    assert {(i, j) for i, j, _ in fast} == slow and len(fast) == len(slow) > 1000
    assert max(abs(gap - gaps[i, j]) for i, j, gap in fast) < 0.01


def test_the_same_question_on_the_same_image_is_reported_with_its_id(tmp_path):
    against = benchmark(tmp_path, scene(0))
    against["mme"].append(
        dict(against["mme"][0], question_id="own", text="What is it? Answer yes or no.")
    )
    report = check(samples(tmp_path, ("a.jpg", scene(0), dict(quality=60))), against=against)
    assert matches(report) == [(0, "mme", "own", "same question on it")]


def test_equal_questions_about_other_images_are_listed_but_are_no_contamination(tmp_path):
    text = "How many people are standing to the left of the red bus?"
    against = benchmark(tmp_path, scene(0), scene(1), text=text)
    data = samples(
        tmp_path,
        ("a.png", scene(8), {}),
        ("b.png", scene(9), {}),
        question=text.replace("red", "green"),
    )
    report = check(data, against=against)
    assert report.contaminated == [] and report.by_task.contaminated.sum() == 0
    line = dict(rows=2, benchmark="mme", question_id="q0", asked=2, kind="nearly the same words")
    assert report.questions.to_dict("records") == [
        dict(question=text.replace("red", "green"), **line)
    ]


@pytest.mark.parametrize(
    "one, other, alike",
    [
        ("What color is the bus?", "<image>\nwhat color is the BUS", True),
        (
            "What color is the bus?",
            "What color is the car?",
            False,
        ),  # too short for one word to be a detail
        (
            "Is there a dog in it?\nAnswer the question using a single word or phrase.",
            "Is there a dog in it?",
            True,
        ),
        (
            "Is it a cat?\nAnswer with the option's letter from the given choices directly.",
            "Is it a cat",
            True,
        ),
        (
            "Answer yes or no: a dog?",
            "answer yes or no, a dog",
            True,
        ),  # no format prompt: it does not end the question
        ("Answer yes or no: a dog?", "a dog?", False),
        (
            "What is the man in the blue shirt holding?",
            "What is the man in the red shirt holding?",
            True,
        ),
        (
            "What is the man in the blue shirt holding?",
            "What is the man in the shirt holding?",
            False,
        ),
        (
            "What is the man in the blue shirt holding?",
            "What is a man in the red shirt holding?",
            False,
        ),
        ("", "<image>", False),
    ],
)
def test_questions_are_equal_up_to_form_and_one_word_of_eight(one, other, alike):
    assert bool(question_keys(one) & question_keys(other)) is alike


def test_a_folder_of_benchmarks_is_read_as_evaluation_reads_it(tmp_path):
    (tmp_path / "bench" / "pope").mkdir(parents=True)
    (tmp_path / "bench" / "images").mkdir()
    scene(0).save(tmp_path / "bench" / "images" / "0.png")
    lines = [
        dict(question_id=i, image=f"{i}.png", text="Is there a cup?", label="yes") for i in (0, 1)
    ]
    (tmp_path / "bench" / "pope" / "questions.jsonl").write_text("\n".join(map(json.dumps, lines)))
    report = check(samples(tmp_path, ("a.png", scene(0), {})), against=tmp_path / "bench")
    assert matches(report) == [(0, "pope", "0", "same file")]
    assert (
        len(report.unread) == 1
        and "1.png" in report.unread[0]
        and "1 evaluation pictures could not" in str(report)
    )


def test_a_folder_without_benchmarks_is_an_error_that_names_the_expected_folders(tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no benchmark .*pope"):
        check(samples(tmp_path, ("a.png", scene(0), {})), against=tmp_path)


def test_text_only_rows_are_compared_by_their_questions(tmp_path):
    turns = [{"from": "human", "value": "Name a fruit"}, {"from": "gpt", "value": "fig"}]
    data = Dataset.from_list([dict(id="1", image=None, task_name="t", conversations=turns)])
    report = check(data, against={"facts": [dict(question_id=1, text="Name a fruit.")]})
    assert (
        report.ok == 1
        and report.contaminated == []
        and report.questions.question.tolist() == ["Name a fruit"]
    )
