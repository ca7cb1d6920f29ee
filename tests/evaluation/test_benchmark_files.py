"""Released files are read in the shapes in which they were released, and the command prints what
the scripts would.
"""

import base64
import gzip
import io
import json
import pickle
import re
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from tests.evaluation.score_command import command, put  # noqa: F401
from vflan.__main__ import main
from vflan.evaluation.benchmarks import BENCHMARKS
from vflan.evaluation.benchmarks.files import (
    LETTER,
    LETTER_CN,
    SHORT,
    UNSURE,
    UnreadableFile,
    keep_picture,
    match,
    read_answers,
    read_rows,
)

pytestmark = pytest.mark.filterwarnings("ignore:.*questions, the released")  # test files are small


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr("vflan.evaluation.benchmarks.files.CACHE", tmp_path / "cache")
    return tmp_path / "cache"


def answer_lines(answers):
    return [{"question_id": id, "text": text} for id, text in answers.items()]


def picture(color="red"):
    out = io.BytesIO()
    Image.new("RGB", (40, 30), color).save(out, "PNG")
    return out.getvalue()


# ----------------------------------------------------------------------------------- each benchmark

PEOPLE = [{"answer": "red", "answer_id": i} for i in range(8)] + [
    {"answer": "blue", "answer_id": 9}
] * 2


def test_vqav2_is_scored_on_the_validation_set_by_answer_type(put, command):
    questions = put(
        "v2_OpenEnded_mscoco_val2014_questions.json",
        {
            "questions": [
                {"question_id": 1, "image_id": 42, "question": "Color?"},
                {"question_id": 2, "image_id": 42, "question": "Is it?"},
            ]
        },
    )
    put(
        "v2_mscoco_val2014_annotations.json",
        {
            "annotations": [
                {
                    "question_id": 1,
                    "answer_type": "other",
                    "multiple_choice_answer": "red",
                    "answers": PEOPLE,
                },
                {
                    "question_id": 2,
                    "answer_type": "yes/no",
                    "multiple_choice_answer": "yes",
                    "answers": [{"answer": "yes"}] * 10,
                },
            ]
        },
    )
    scores = command(
        "vqav2",
        questions=questions,
        answers=put("upload.json", [{"question_id": 1, "answer": "blue"}]),
    )
    assert (
        scores["accuracy"] == 30
        and scores["accuracy_other"] == 60
        and scores["accuracy_yes_no"] == 0
    )
    assert scores["n"] == 2 and scores["problems"]["missing"] == 1  # wrong, as in the script
    samples = BENCHMARKS["vqav2"].questions(questions)
    assert (
        samples[0]["image"].endswith("COCO_val2014_000000000042.jpg")
        and samples[0]["text"] == "Color?" + SHORT
    )


def test_vqav2_of_the_test_set_is_uploaded_with_all_ids(put, tmp_path):
    questions = put(
        "vqav2/llava_vqav2_mscoco_test-dev2015.jsonl",
        [{"question_id": 5, "image": "COCO_test2015_1.jpg", "text": "a?", "category": "default"}],
    )
    every = put("llava_vqav2_mscoco_test2015.jsonl", [{"question_id": i} for i in (4, 5)])
    vqav2 = BENCHMARKS["vqav2"]
    samples = vqav2.load(tmp_path)
    assert samples == vqav2.questions(questions) and vqav2.score(samples, ["Two."]) == {
        "unanswerable": 0
    }
    vqav2.upload(samples, ["Two."], tmp_path / "up.json", every=every)
    assert json.loads((tmp_path / "up.json").read_text()) == [
        {"question_id": 4, "answer": ""},
        {"question_id": 5, "answer": "2"},
    ]


def test_vizwiz_test_answers_become_its_upload_and_its_share_of_unanswerable(
    put, command, tmp_path
):
    rows = [
        {"question_id": i, "image": f"VizWiz_test_{i}.jpg", "text": "what?" + UNSURE + SHORT}
        for i in range(4)
    ]
    questions = put("llava_test.jsonl", rows)
    answers = put(
        "a.jsonl", answer_lines({0: "Unanswerable", 1: "A dog.", 2: "unanswerable", 3: "3"})
    )
    assert command("vizwiz", questions=questions, answers=answers)["unanswerable"] == 50
    BENCHMARKS["vizwiz"].upload(
        BENCHMARKS["vizwiz"].questions(questions),
        ["Unanswerable", "A dog.", None, "3"],
        tmp_path / "up.json",
    )
    uploaded = json.loads((tmp_path / "up.json").read_text())
    assert (
        uploaded[1] == {"image": "VizWiz_test_1.jpg", "answer": "dog"}
        and uploaded[2]["answer"] == ""
    )
    assert (
        command("vizwiz", questions=questions, answers=tmp_path / "up.json")["unanswerable"] == 25
    )


def test_vizwiz_validation_is_scored(put, command):
    rows = [
        {
            "image": "v_0.jpg",
            "question": "what?",
            "answers": PEOPLE,
            "answer_type": "other",
            "answerable": 1,
        },
        {
            "image": "v_1.jpg",
            "question": "and?",
            "answers": [{"answer": "unanswerable"}] * 10,
            "answer_type": "unanswerable",
        },
    ]
    questions = put("val.json", rows)
    answers = put(
        "a.json", [{"image": "v_0.jpg", "answer": "red"}, {"image": "v_1.jpg", "answer": "dog"}]
    )
    scores = command("vizwiz", questions=questions, answers=answers)
    assert (scores["accuracy"], scores["accuracy_other"], scores["accuracy_unanswerable"]) == (
        50,
        100,
        0,
    )
    test_file = put(
        "q/llava_test.jsonl",
        [{"question_id": i, "image": f"v_{i}.jpg", "text": "?"} for i in range(2)],
    )
    again = command(
        "vizwiz",
        questions=test_file,
        labels=questions,
        answers=put("b.jsonl", answer_lines({0: "red", 1: "dog"})),
    )
    assert again["accuracy"] == 50


TEXTVQA = {
    "data": [
        {"question_id": 7, "image_id": "img", "question": "What brand?", "answers": ["nokia"] * 10},
        {"question_id": 8, "image_id": "img", "question": "What Time?", "answers": ["1:30"] * 10},
    ]
}


@pytest.mark.parametrize("with_prompt", [True, False])
def test_textvqa_labels_are_found_by_picture_and_question(put, command, with_prompt):
    texts = ["what time?\nReference OCR token: NOKIA, 1:30" + SHORT, "what brand?" + SHORT]
    questions = put(
        "q.jsonl", [{"question_id": "img", "image": "img.jpg", "text": t} for t in texts]
    )
    labels = put("TextVQA_0.5.1_val.json", TEXTVQA)
    rows = [
        {"question_id": "img", "text": "1:30"} | ({"prompt": texts[0]} if with_prompt else {}),
        {"question_id": "img", "text": "Nokia."} | ({"prompt": texts[1]} if with_prompt else {}),
    ]
    scores = command(
        "textvqa",
        questions=questions,
        labels=labels,
        answers=put("a.jsonl", rows[::-1] if with_prompt else rows),
    )
    assert (
        scores["accuracy"] == 100 and ("paired_by_order" in scores["problems"]) is not with_prompt
    )
    straight = command(
        "textvqa",
        questions=labels,
        answers=put("b.jsonl", [r | {"prompt": t} for r, t in zip(rows, texts)]),
    )
    assert straight["accuracy"] == 100
    own_ids = command(
        "textvqa",
        questions=labels,
        answers=put(
            "c.json", [{"question_id": 7, "answer": "nokia"}, {"question_id": 8, "answer": "x"}]
        ),
    )
    assert own_ids["accuracy"] == 50


def test_gqa_reads_the_authors_questions_and_prediction_list(put, command, tmp_path):
    theirs = {
        "9": {
            "question": "Is it?",
            "imageId": "n1",
            "answer": "yes",
            "types": {"structural": "verify"},
        },
        "8": {
            "question": "What?",
            "imageId": "n1",
            "answer": "dog",
            "types": {"structural": "query"},
        },
    }
    labels = put("testdev_balanced_questions.json", theirs)
    answers = put(
        "p.json",
        [{"questionId": "9", "prediction": "yes"}, {"questionId": "8", "prediction": "cat"}],
    )
    scores = command("gqa", questions=labels, answers=answers)
    assert (scores["accuracy"], scores["accuracy_binary"], scores["accuracy_open"]) == (50, 100, 0)
    questions = put(
        "llava_gqa_testdev_balanced.jsonl",
        [{"question_id": "8", "image": "n1.jpg", "text": "What?" + SHORT}],
    )
    scores = command(
        "gqa",
        questions=questions,
        labels=labels,
        answers=put("a.jsonl", answer_lines({"8": "Dog."})),
    )
    assert scores["accuracy"] == 100 and scores["n"] == 1
    BENCHMARKS["gqa"].upload(BENCHMARKS["gqa"].questions(questions), ["Dog."], tmp_path / "up.json")
    assert json.loads((tmp_path / "up.json").read_text()) == [
        {"questionId": "8", "prediction": "dog"}
    ]


def science(put):
    turns = [
        {"from": "human", "value": "<image>\nWhich?\nA. x\nB. y"},
        {"from": "gpt", "value": "The answer is B."},
    ]
    questions = put(
        "llava_test_CQM-A.json",
        [
            {"id": "4", "image": "4/image.png", "conversations": turns},
            {
                "id": "5",
                "conversations": [
                    dict(turns[0], value="Why?\nA. x\nB. y"),
                    dict(turns[1], value="A"),
                ],
            },
            {"id": "6", "image": "6/image.png", "conversations": turns},
        ],
    )
    put(
        "problems.json",
        {
            "4": {
                "answer": 1,
                "choices": ["x", "y"],
                "question": "Which?",
                "image": "image.png",
                "hint": "",
            },
            "5": {
                "answer": 0,
                "choices": ["x", "y"],
                "question": "Why?",
                "image": None,
                "hint": "Because.",
            },
            "6": {
                "answer": 0,
                "choices": ["x", "y"],
                "question": "Who?",
                "image": "image.png",
                "hint": "",
            },
        },
    )
    put("pid_splits.json", {"test": ["4", "5"], "train": ["6"]})
    return questions


def test_scienceqa_reports_pictures_apart_and_counts_a_missing_answer_as_wrong(
    put, command, tmp_path
):
    scores = command(
        "scienceqa",
        questions=science(put),
        answers=put("a.jsonl", answer_lines({"4": "B", "5": "A. x"})),
    )
    assert (
        scores["img_accuracy"] == 50
        and scores["accuracy"] == pytest.approx(200 / 3)
        and scores["problems"]["missing"] == 1
    )
    result = put("out.json", {"acc": 1, "results": {"4": 1}, "outputs": {"4": "B", "5": "B"}})
    scores = command("scienceqa", questions=tmp_path / "problems.json", answers=result)
    assert (scores["img_accuracy"], scores["accuracy"], scores["n"]) == (100, 50, 2)


def test_scienceqa_prompts_end_in_the_letter_line_and_labels_may_be_the_files_own(put, tmp_path):
    read = BENCHMARKS["scienceqa"].questions
    samples = read(science(put), labels=tmp_path)
    assert samples[0]["text"] == "Which?\nA. x\nB. y" + LETTER and [
        s["label"] for s in samples
    ] == ["B", "A", "A"]
    (tmp_path / "problems.json").unlink()
    assert [s["label"] for s in read(tmp_path / "llava_test_CQM-A.json")] == ["B", "A", "B"]
    assert samples[1]["image"] is None and samples[0]["image"].endswith("4/image.png")


def mme_files(put):
    for task in ("count", "code_reasoning"):
        folder = task if task == "count" else f"{task}/questions_answers_YN"
        put(
            f"MME_Benchmark_release_version/{folder}/1.txt",
            "Is it? Please answer yes or no.\tYes\nIs it not?  Please answer yes or no.\tNo\n",
        )
    return put(
        "llava_mme.jsonl",
        [
            {"question_id": f"{t}/1.png", "image": f"{t}/1.png", "category": t, "text": q + SHORT}
            for t in ("count", "code_reasoning")
            for q in ("Is it?", "Is it not?")
        ],
    )


def test_mme_finds_labels_in_the_release_and_reports_both_groups(put, command):
    questions = mme_files(put)
    rows = [
        r | {"prompt": r["text"], "text": a}
        for r, a in zip(read_rows(questions), ("Yes", "No", "Yes", "Yes"))
    ]
    scores = command("mme", questions=questions, answers=put("a.jsonl", rows[::-1]))
    assert (scores["perception"], scores["cognition"], scores["total_count"]) == (200, 50, 200)
    assert (
        scores["accuracy_code_reasoning"] == 50
        and scores["acc_plus"] == scores["accuracy_plus"] == 50
    )
    one_less = command("mme", questions=questions, answers=put("b.jsonl", rows[:3]))
    assert (
        "cognition" not in one_less
        and one_less["perception"] == 200
        and one_less["problems"]["unpaired"] == 1
    )


def test_mme_result_folders_are_written_and_read_and_bring_their_own_labels(put, command, tmp_path):
    questions = mme_files(put)
    samples = BENCHMARKS["mme"].questions(questions)
    BENCHMARKS["mme"].upload(samples, ["Yes", "No\tno", "Yes", "Yes"], tmp_path / "results")
    assert (
        (tmp_path / "results" / "count.txt")
        .read_text()
        .startswith("1.txt\tIs it? Please answer yes or no.\tYes\tYes\n")
    )
    bare = put("elsewhere/llava_mme.jsonl", read_rows(questions))
    for where in (questions, bare):
        scores = command("mme", questions=where, answers=tmp_path / "results")
        assert (scores["perception"], scores["cognition"]) == (200, 50)
    release = command(
        "mme", questions=tmp_path / "MME_Benchmark_release_version", answers=tmp_path / "results"
    )
    assert release["perception"] == 200
    with pytest.raises(AssertionError, match="can be scored"):
        command(
            "mme", questions=bare, answers=put("a.jsonl", answer_lines({"count/1.png": "Yes"}) * 2)
        )


def mmbench_table(n=3):
    image = base64.b64encode(picture()).decode()
    rows = [
        {
            "index": 10 * q + k * 1_000_000,
            "question": f"Which {q}?",
            "hint": "nan" if q else "Look.",
            "A": "x",
            "B": "y",
            "C": "z" if q else "",
            "D": "",
            "answer": "AB"[k],
            "category": "c",
            "image": image if not k else str(10 * q),
            "source": "s",
            "l2-category": "l",
            "comment": "",
            "split": "dev",
        }
        for k in range(2)
        for q in range(n)
    ]
    return pd.DataFrame(rows)


def test_mmbench_is_read_from_its_table_and_scored_by_rotation(tmp_path, put, command, cache):
    mmbench_table().to_csv(tmp_path / "dev.tsv", sep="\t", index=False)
    answers = {10 * q + k * 1_000_000: "AB"[k] for k in range(2) for q in range(3)} | {10: "B"}
    scores = command(
        "mmbench", questions=tmp_path / "dev.tsv", answers=put("a.jsonl", answer_lines(answers))
    )
    assert scores["accuracy"] == pytest.approx(200 / 3)
    # Of the rows below a million, as published: question 10 is wrong in its first order.
    assert scores["single_pass"] == pytest.approx(200 / 3)
    assert not cache.exists()  # scoring writes no pictures
    samples = BENCHMARKS["mmbench"].questions(tmp_path / "dev.tsv")
    assert samples[0]["text"] == "Look.\nWhich 0?\nA. x\nB. y" + LETTER and samples[1][
        "text"
    ].startswith("nan" * 0 + "Which 1?\nA. x\nB. y\nC. z")
    assert {Image.open(s["image"]).size for s in samples} == {(40, 30)} and len(
        list(cache.rglob("*.png"))
    ) == 1
    assert BENCHMARKS["mmbench_cn"].questions(tmp_path / "dev.tsv")[0]["text"].endswith(LETTER_CN)


@pytest.mark.parametrize("kind", ["tsv", "xlsx", "csv"])
def test_mmbench_upload_sheets_are_written_as_the_server_wants_and_read_again(
    tmp_path, command, kind
):
    if kind == "xlsx":
        pytest.importorskip("openpyxl")
    mmbench_table().to_csv(tmp_path / "dev.tsv", sep="\t", index=False)
    samples, sheet = BENCHMARKS["mmbench"].questions(tmp_path / "dev.tsv"), tmp_path / f"up.{kind}"
    BENCHMARKS["mmbench"].upload(
        samples,
        ["A"] * 3 + ["B", "B", None],
        tmp_path / ("up.tsv" if kind == "csv" else sheet.name),
    )
    if kind == "csv":
        pd.read_csv(tmp_path / "up.tsv", sep="\t").to_csv(sheet, index=False)
    rows = read_rows(sheet)
    assert list(rows[0]) == [
        "index",
        "question",
        "A",
        "B",
        "C",
        "D",
        "prediction",
        "answer",
        "split",
    ]
    scores = command("mmbench", questions=tmp_path / "dev.tsv", answers=sheet)
    assert scores["accuracy"] == pytest.approx(200 / 3) and scores["problems"]["empty"] == 1


SEED = {
    "question_type": {"Scene": 1, "Action": 10},
    "questions": [
        {
            "question_id": "101",
            "question_type_id": 1,
            "data_type": "image",
            "data_id": "55_66",
            "answer": "A",
            "question": "q",
            "choice_a": "x",
            "choice_b": "y",
        },
        {
            "question_id": "v2",
            "question_type_id": 10,
            "data_type": "video",
            "data_id": "v.mp4",
            "answer": "B",
            "question": "q",
            "choice_a": "x",
            "choice_b": "y",
        },
    ],
}


def test_seed_reports_images_and_videos(put, command, tmp_path):
    labels = put("SEED-Bench.json", SEED)
    questions = put(
        "llava-seed-bench.jsonl",
        [
            {"question_id": 101, "image": "SEED-Bench-image/55_66", "text": "q" + LETTER},
            {"question_id": "v2", "image": "SEED-Bench-video-image/v2.png", "text": "q" + LETTER},
        ],
    )
    answers = put(
        "a.jsonl",
        [{"question_id": 101, "prediction": "A"}, {"question_id": "v2", "prediction": "B."}],
    )
    for where in (questions, labels):
        scores = command("seed", questions=where, labels=labels, answers=answers)
        assert (scores["accuracy"], scores["accuracy_image"], scores["accuracy_video"]) == (
            50,
            100,
            0,
        )
        assert scores["accuracy_scene_understanding"] == 100
    samples = BENCHMARKS["seed"].questions(questions)
    BENCHMARKS["seed"].upload(samples, ["A", None], tmp_path / "up.jsonl")
    assert [r["prediction"] for r in read_rows(tmp_path / "up.jsonl")] == ["A", ""]


def test_seed_tables_bring_their_pictures(tmp_path, cache):
    frame = pd.DataFrame(
        [
            {
                "index": 3,
                "question": "q",
                "A": "x",
                "B": "y",
                "answer": "A",
                "category": "c",
                "image": [{"bytes": picture()}],
            }
        ]
    )
    frame.to_parquet(tmp_path / "seed.parquet")
    (sample,) = BENCHMARKS["seed"].questions(tmp_path / "seed.parquet")
    parts = [tmp_path / f"test-0000{i}-of-00002.parquet" for i in range(2)]
    for part in parts:
        frame.assign(index=part.name[9]).to_parquet(part)
    assert len(BENCHMARKS["seed"].questions(parts[0])) == 2
    assert sample["text"] == "q\nA. x\nB. y" + LETTER and Image.open(sample["image"]).size == (
        40,
        30,
    )


def test_llava_bench_reviews_are_read_and_failed_ones_left_out(put, command):
    questions = put(
        "lb/questions.jsonl",
        [
            {"question_id": i, "image": "1.jpg", "text": "?", "category": c}
            for i, c in enumerate(("conv", "detail", "conv"))
        ],
    )
    put("lb/answers_gpt4.jsonl", answer_lines({i: "It is a dog." for i in range(3)}))
    rows = [
        {"question_id": 0, "category": "llava_bench_conv", "tuple": [8.0, 6.0]},
        {"question_id": 1, "content": "9, 9\nGood."},
        {"question_id": 2, "category": "llava_bench_conv", "tuple": [-1, -1]},
    ]
    reviews, again = put("r.jsonl", rows), put("r2.jsonl", [dict(rows[0], tuple=[8, 8]), *rows[1:]])
    scores = command(
        "llava_bench",
        questions=questions,
        answers=put("a.jsonl", answer_lines({i: "A dog." for i in range(3)})),
        reviews=reviews,
    )
    assert (
        scores["score"] == pytest.approx(100 * 15 / 17)
        and scores["score_conv"] == pytest.approx(75)
        and scores["n"] == 2
    )
    assert scores["problems"]["failed_judgement"] == 1 and scores["words"] == 2
    straight = command("llava_bench", questions=questions, answers=reviews)
    assert straight["score"] == scores["score"] and "words" not in straight
    both = command("llava_bench", questions=questions, reviews=[reviews, again])
    assert both["runs"] == pytest.approx([100 * 15 / 17, 100]) and both["score"] == pytest.approx(
        np.mean(both["runs"])
    )
    sample = BENCHMARKS["llava_bench"].questions(questions)[0]
    assert sample["label"] == "It is a dog." and sample["category"] == "conv"


def test_mm_vet_reads_marks_in_three_shapes_and_a_table_of_results(put, command, tmp_path):
    theirs = put(
        "mm-vet.json",
        {
            f"v1_{i}": {
                "imagename": f"v1_{i}.png",
                "question": "?",
                "answer": "dog",
                "capability": ["rec", "ocr"][: i + 1],
            }
            for i in range(2)
        },
    )
    questions = put(
        "llava-mm-vet.jsonl",
        [
            {"question_id": f"v1_{i}" if i else 0, "image": f"v1_{i}.png", "text": "?"}
            for i in range(2)
        ],
    )
    answers = put("a.json", {"v1_0": "A dog.", "v1_1": "cat"})
    scores = command("mm_vet", questions=questions, answers=answers)
    assert scores["rule"] == 50 and "total" not in scores  # GPT-4's number is never guessed
    grades = {"v1_0": {"model": ["gpt-4"], "score": [1.0, 0.8]}, "v1_1": {"score": [0.1, 0.1]}}
    for content in (
        grades,
        [{"question_id": k, "score": v["score"]} for k, v in grades.items()],
        {"v1_0": 0.9, "v1_1": 0.1},
    ):
        scores = command(
            "mm_vet", questions=theirs, answers=answers, reviews=put("g.json", content)
        )
        assert scores["total"] == pytest.approx(50) and scores["ocr"] == pytest.approx(
            10
        ) == pytest.approx(scores["ocr_rec"])
    table = put("cap.csv", ',rec,ocr,total,std,runs\nmodel,40.1,30.0,36.1,0.1,"[36.1, 36.2]"\n')
    assert command("mm_vet", questions=questions, reviews=table)["total"] == 36.1
    BENCHMARKS["mm_vet"].upload(
        BENCHMARKS["mm_vet"].questions(questions), ["x", None], tmp_path / "up.json"
    )
    assert json.loads((tmp_path / "up.json").read_text()) == {"v1_0": "x", "v1_1": ""}


def test_mmmu_is_read_from_the_hubs_files_with_the_first_picture(put, command, tmp_path):
    rows = [
        {
            "id": "validation_Art_1",
            "question": "<image 1> Who?",
            "options": "['x', 'y']",
            "answer": "B",
            "question_type": "multiple-choice",
            "image_1": {"bytes": picture()},
        },
        {
            "id": "validation_Art_2",
            "question": "How many?",
            "options": "[]",
            "answer": "['4', 'four']",
            "question_type": "open",
            "image_1": {"bytes": picture()},
        },
    ]
    (tmp_path / "mmmu" / "Art").mkdir(parents=True)
    pd.DataFrame(rows).to_parquet(tmp_path / "mmmu" / "Art" / "validation-0.parquet")
    with pytest.warns(UserWarning, match="holds 2 questions, the released mmmu 900"):
        samples = BENCHMARKS["mmmu"].load(tmp_path)
    assert (
        samples[0]["text"] == "<image 1> Who?\n(A) x\n(B) y\n" + LETTER
        and samples[1]["text"] == "How many?" + SHORT
    )
    assert samples[1]["label"] == ["4", "four"] and Image.open(samples[0]["image"]).size == (40, 30)
    answers = put("out.json", {"validation_Art_1": "B", "validation_Art_2": "it is four"})
    assert command("mmmu", questions=tmp_path / "mmmu", answers=answers)["accuracy"] == 100
    gold = put(
        "answer_dict_val.json",
        {
            "validation_Art_1": {"question_type": "multiple-choice", "ground_truth": "A"},
            "validation_Art_2": {"question_type": "short-answer", "ground_truth": "four"},
        },
    )
    assert command("mmmu", questions=gold, answers=answers)["accuracy"] == 50
    listed = put(
        "list.json",
        [
            {"id": "validation_Art_1", "response": "(B)", "answer": "B"},
            {"id": "validation_Art_2", "response": "4"},
        ],
    )
    assert command("mmmu", questions=tmp_path / "mmmu", answers=listed)["accuracy"] == 100
    BENCHMARKS["mmmu"].upload(samples, ["(B) y", "4"], tmp_path / "up.json")
    assert json.loads((tmp_path / "up.json").read_text()) == {
        "validation_Art_1": "B",
        "validation_Art_2": "4",
    }


def test_cifar_is_read_from_its_pickles(tmp_path, put, command, cache):
    for name, folder, kind in (
        ("cifar10", "cifar-10-batches-py", "labels"),
        ("cifar100", "cifar-100-python", "fine_labels"),
    ):
        here = tmp_path / name / folder
        here.mkdir(parents=True)
        data = np.zeros((2, 3072), np.uint8)
        data[1, :1024] = 255
        test, meta = ("test_batch", "batches.meta") if name == "cifar10" else ("test", "meta")
        (here / test).write_bytes(pickle.dumps({b"data": data, kind.encode(): [0, 1]}))
        (here / meta).write_bytes(
            pickle.dumps({kind.removesuffix("s").encode() + b"_names": [b"cat", b"pickup_truck"]})
        )
        samples = BENCHMARKS[name].load(tmp_path)
        assert [s["label"] for s in samples] == [
            "cat",
            "pickup truck",
        ] and "cat, pickup truck" in samples[0]["text"]
        assert Image.open(samples[1]["image"]).getpixel((0, 0)) == (255, 0, 0)
        scores = command(
            name,
            questions=here / test,
            answers=put("a.jsonl", answer_lines({0: "A cat.", 1: "cat"})),
        )
        assert scores["accuracy"] == 50
    whole = BENCHMARKS["forgetting"].load(tmp_path)
    assert (
        len(whole) == 4
        and {s["category"] for s in whole} == {"cifar10", "cifar100"}
        and len({s["question_id"] for s in whole}) == 4
    )


class Evil:
    def __init__(self, run):
        self.run = run

    def __reduce__(self):
        return self.run, ("never",)


@pytest.mark.parametrize("run", [print, np.loadtxt, exec])
def test_a_pickle_that_would_run_code_is_not_opened(tmp_path, capsys, run):
    here = tmp_path / "cifar-10-batches-py"
    here.mkdir()
    (here / "test_batch").write_bytes(pickle.dumps({b"data": Evil(run)}))
    (here / "batches.meta").write_bytes(pickle.dumps({}))
    assert (
        main(["score", "cifar10", "--questions", str(here / "test_batch"), "--answers", "x"]) == 1
    )
    out, err = capsys.readouterr()
    assert "not opened" in err and "never" not in out + err


@pytest.mark.parametrize("packed", [True, False])
def test_mnist_is_read_from_its_own_format(tmp_path, packed):
    here = tmp_path / "mnist"
    here.mkdir()
    pixels = np.zeros((2, 28, 28), np.uint8)
    files = {
        "t10k-images-idx3-ubyte": struct.pack(">iiii", 2051, 2, 28, 28) + pixels.tobytes(),
        "t10k-labels-idx1-ubyte": struct.pack(">ii", 2049, 2) + bytes([7, 3]),
    }
    for name, raw in files.items():
        (here / (name + ".gz" * packed)).write_bytes(gzip.compress(raw) if packed else raw)
    samples = BENCHMARKS["mnist"].load(tmp_path)
    assert [s["label"] for s in samples] == ["7", "3"] and "number" in samples[0]["text"]
    assert BENCHMARKS["mnist"].score(samples, ["The number is 7.", "8"])["accuracy"] == 50


def test_miniimagenet_needs_the_names_of_its_classes(tmp_path, put):
    put("miniimagenet/test.csv", "filename,label\na.jpg,n01\nb.jpg,n02\n")
    with pytest.raises(FileNotFoundError, match="words.txt"):
        BENCHMARKS["miniimagenet"].load(tmp_path)
    put("miniimagenet/words.txt", "n01\thouse finch, linnet\nn02\ttank\n")
    assert [s["label"] for s in BENCHMARKS["miniimagenet"].load(tmp_path)] == [
        "house finch",
        "tank",
    ]


def write_hub_file(path, labels, bytes_of_a_picture):
    import pyarrow as pa
    import pyarrow.parquet as pq

    kinds = {
        "info": {
            "features": {
                "img": {"_type": "Image"},
                "label": {"names": ["cat", "dog"], "_type": "ClassLabel"},
            }
        }
    }
    pictures = [{"bytes": bytes_of_a_picture, "path": None}] * len(labels)
    table = pa.table({"img": pictures, "label": labels})
    path.parent.mkdir(exist_ok=True)
    table = table.replace_schema_metadata({"huggingface": json.dumps(kinds)})
    pq.write_table(table, path, compression="zstd")


def test_the_hubs_parquet_of_a_classification_set_is_read(tmp_path):
    write_hub_file(tmp_path / "cifar10" / "test-00000.parquet", [1], picture())
    (sample,) = BENCHMARKS["cifar10"].load(tmp_path)
    assert sample["label"] == "dog" and Image.open(sample["image"]).size == (40, 30)


def test_a_split_in_several_parquet_files_is_read_whole_or_not_at_all(tmp_path):
    first, second = (tmp_path / "mnist" / f"test-0000{i}-of-00002.parquet" for i in range(2))
    write_hub_file(first, [1, 0], picture())
    with pytest.raises(FileNotFoundError, match="test-00001-of-00002.parquet is not there"):
        BENCHMARKS["mnist"].load(tmp_path)
    write_hub_file(second, [1], picture())
    samples = BENCHMARKS["mnist"].load(tmp_path)
    assert [(s["question_id"], s["label"]) for s in samples] == [
        ("0", "dog"),
        ("1", "cat"),
        ("2", "dog"),
    ]


def test_a_classification_set_that_unpacks_to_much_more_than_its_size_is_refused(
    tmp_path, monkeypatch
):
    monkeypatch.setattr("vflan.data.limits.MAX_BYTES", 1000)
    write_hub_file(tmp_path / "cifar10" / "test-00000-of-00001.parquet", [0], bytes(1 << 20))
    (tmp_path / "mnist").mkdir()
    for name in ("images-idx3", "labels-idx1"):
        file = tmp_path / "mnist" / f"t10k-{name}-ubyte.gz"
        file.write_bytes(gzip.compress(bytes(1 << 20)))
    for name in ("cifar10", "mnist"):
        with pytest.raises(UnreadableFile, match="unpacks to more than"):
            BENCHMARKS[name].load(tmp_path)


@pytest.mark.parametrize(
    "name, test, names",
    [
        ("cifar10", "cifar-10-batches-py/test_batch", "batches.meta"),
        ("cifar100", "cifar-100-python/test", "python/meta"),
    ],
)
def test_cifar_without_the_names_of_its_classes_says_which_file_is_missing(
    tmp_path, name, test, names
):
    (tmp_path / name / test).parent.mkdir(parents=True)
    (tmp_path / name / test).write_bytes(pickle.dumps({b"data": b""}))
    with pytest.raises(FileNotFoundError, match=f"{names} is not there: the names of the classes"):
        BENCHMARKS[name].load(tmp_path)


def test_brackets_in_brackets_are_one_sentence(put, tmp_path, capsys):
    questions = str(put("q.jsonl", [dict(question_id="v1_0", text="?", label="x")]))
    (tmp_path / "a.json").write_text("[" * 100_000)
    answers = str(tmp_path / "a.json")
    assert main(["score", "mm_vet", "--questions", questions, "--answers", answers]) == 1
    assert "a.json is not whole json (brackets in brackets" in capsys.readouterr().err


def test_two_processes_may_keep_the_same_picture_at_the_same_time(cache, monkeypatch):
    write = Path.write_bytes

    def write_while_another_process_does(path, data):
        write(path, data)
        monkeypatch.setattr(Path, "write_bytes", write)
        monkeypatch.setattr("os.getpid", lambda: -1)
        assert keep_picture(data)

    monkeypatch.setattr(Path, "write_bytes", write_while_another_process_does)
    path = Path(keep_picture(picture()))
    assert path.read_bytes() == picture() and list((cache / "pictures").iterdir()) == [path]


def test_textocr_leaves_out_what_is_illegible(put, command):
    data = {
        "imgs": {"a": {"id": "a", "file_name": "train/a.jpg"}},
        "imgToAnns": {"a": ["a_1", "a_2", "a_3"]},
        "anns": {
            "a_1": {"utf8_string": "STOP"},
            "a_2": {"utf8_string": "."},
            "a_3": {"utf8_string": "now!"},
        },
    }
    questions = put("TextOCR_0.1_val.json", data)
    assert (
        command(
            "textocr",
            questions=questions,
            answers=put("a.jsonl", answer_lines({"a": "It says stop here."})),
        )["recall"]
        == 50
    )


def test_wit_reads_english_captions(put, command):
    questions = put(
        "wit.tsv",
        "language\timage_url\tcaption_reference_description\nen\thttp://x/y.jpg\tThe Eiffel "
        "Tower in Paris\nde\thttp://x/z.jpg\tTurm\n",
    )
    scores = command(
        "wit", questions=questions, answers=put("a.jsonl", answer_lines({0: "This is Paris."}))
    )
    assert scores["coverage_capitalised"] == 50 and scores["n"] == 1


# ---------------------------------------------------------------------------------------- bad input


def pope_files(put, n=4):
    questions = [
        {"question_id": i, "image": "x.jpg", "text": f"Is there a thing {i} in the image?"}
        for i in range(n)
    ]
    put(
        "coco_pope_random.json",
        "\n".join(json.dumps(q | {"label": ["yes", "no"][i % 2]}) for i, q in enumerate(questions)),
    )
    return put(
        "llava_pope_test.jsonl",
        [q | {"text": q["text"] + SHORT, "category": "random"} for q in questions],
    )


def test_what_is_wrong_with_answers_is_counted_and_named(put, command):
    rows = [
        *answer_lines({0: "Yes", 1: "", 9: "Yes"}),
        {"question_id": 0, "text": "No"},
        {"question_id": 2, "text": "Yes"},
    ]
    answers = put("a.jsonl", rows)
    answers.write_text(answers.read_text() + "\n{half a line")
    scores = command("pope", questions=pope_files(put), answers=answers)
    assert scores["problems"] == {
        "missing": 1,
        "unknown": 1,
        "duplicate": 1,
        "empty": 1,
        "unknown_label": 0,
        "unreadable_line": 1,
    }
    assert (
        scores["n"] == 3 and scores["recall"] == 50
    )  # of two answers to question 0 the later counts
    for sentence in ("1 missing: 3", "1 unknown: 9", "1 duplicate: 0", "1 empty: 1"):
        assert sentence in command.err


def test_labels_that_are_not_known_are_counted(put, command, tmp_path):
    questions = pope_files(put)
    labels = (
        (tmp_path / "coco_pope_random.json")
        .read_text()
        .replace('"label": "yes"', '"label": "perhaps"', 1)
    )
    scores = command(
        "pope",
        questions=questions,
        labels=put("labels/coco_pope_random.json", labels),
        answers=put("a.jsonl", answer_lines({i: "Yes" for i in range(4)})),
    )
    assert scores["n"] == 3 and scores["problems"]["unknown_label"] == 1 and "sha256" in command.err


def test_a_question_asked_twice_keeps_both_answers(put):
    samples = [
        {"question_id": "i", "text": "what?"},
        {"question_id": "i", "text": "what?"},
        {"question_id": "i", "text": "who?"},
    ]
    rows = [
        {"id": "i", "text": t, "prompt": p, "gold": None}
        for t, p in (("1", "what?"), ("2", "what?"), ("3", "Who?"))
    ]
    answers, troubles = match(samples, rows)
    assert answers == ["1", "2", "3"] and not any(troubles.values())
    answers, troubles = match(
        samples, rows[:1] + [{"id": "i", "text": "x", "prompt": "where?", "gold": None}]
    )
    assert answers == ["1", "1", None] and troubles["unknown"] == ["i"]
    assert match(samples, [dict(r, prompt=None) for r in rows[:2]])[1]["unknown"] == [
        "i",
        "i",
    ]  # which two of three?


@pytest.mark.parametrize(
    "name, content, sentence",
    [
        ("none.jsonl", None, "is not there|No such file"),
        ("empty.jsonl", "", "holds no answers"),
        ("list.json", "[1, 2]", "holds no answers"),
        ("broken.json", "[{", "not whole json"),
        ("other.jsonl", '{"question_id": 77, "text": "x"}', "answers none of the 4 questions"),
        ("no_id.jsonl", '{"text": "x"}', "holds no answers"),
    ],
)
def test_unusable_answers_end_in_one_sentence(put, tmp_path, capsys, name, content, sentence):
    questions = pope_files(put)
    if content is not None:
        put(name, content) if not name.endswith(".jsonl") else (tmp_path / name).write_text(content)
    assert (
        main(["score", "pope", "--questions", str(questions), "--answers", str(tmp_path / name)])
        == 1
    )
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1
    assert re.search(sentence, err)


@pytest.mark.parametrize(
    "content", [b"\xff\xfe\0", b'{"question_id": 1, "text": \xfd}', b"\x1f\x8b\x08 no gzip"]
)
@pytest.mark.parametrize("name", ["pope", "vqav2", "heldin", "mm_vet"])
def test_bytes_that_are_no_text_are_named_by_load(tmp_path, name, content):
    (tmp_path / name).mkdir()
    (tmp_path / name / "questions.jsonl").write_bytes(content)
    with pytest.raises(ValueError, match=f"{name}/questions.jsonl is damaged"):
        BENCHMARKS[name].load(tmp_path)


def test_a_question_whose_text_is_none_and_references_that_are_no_list_are_told(tmp_path):
    (tmp_path / "vqav2").mkdir()
    path = tmp_path / "vqav2" / "questions.jsonl"
    path.write_text(json.dumps({"question_id": 1, "text": None, "label": "red"}))
    with pytest.raises(ValueError, match="question 1: its text is None"):
        BENCHMARKS["vqav2"].load(tmp_path)
    path.write_text(
        json.dumps({"question_id": 1, "text": "what?", "label": "red", "answers": True})
    )
    assert BENCHMARKS["vqav2"].problems(BENCHMARKS["vqav2"].load(tmp_path)) == {
        "unknown_label": ["1"]
    }
    path.write_text(json.dumps({"question_id": 1, "text": "what?", "label": "a", "letters": 4}))
    with pytest.raises(ValueError, match="question 1: its letters is 4, which is no text"):
        BENCHMARKS["vqav2"].load(tmp_path)
    (tmp_path / "mmbench").mkdir()
    (tmp_path / "mmbench" / "questions.jsonl").write_text(
        json.dumps({"question_id": "1_0", "text": "what?", "label": 3})
    )
    assert BENCHMARKS["mmbench"].score(BENCHMARKS["mmbench"].load(tmp_path), ["A"])["accuracy"] == 0


@pytest.mark.parametrize(
    "name", [n for n in BENCHMARKS if n not in ("heldin", "heldout", "forgetting")]
)
def test_a_missing_benchmark_says_which_file_it_needs(tmp_path, name):
    with pytest.raises(
        FileNotFoundError, match="questions.jsonl is not there - run notebooks/01.*or put"
    ):
        BENCHMARKS[name].load(tmp_path)


@pytest.mark.parametrize("name", [n for n in BENCHMARKS if n not in ("heldin", "heldout")])
@pytest.mark.parametrize(
    "content", ["{}", "[]", '[{"a": 1}]', "{half", "\ufeff", '{"question_id": 1}', "[[1]]", "null"]
)
def test_a_question_file_that_is_none_ends_in_one_sentence(put, tmp_path, capsys, name, content):
    path = put("questions.json", content)
    assert (
        main(
            [
                "score",
                name,
                "--questions",
                str(path),
                "--answers",
                str(put("a.jsonl", answer_lines({1: "x"}))),
            ]
        )
        == 1
    )
    out, err = capsys.readouterr()
    assert out == "" and err.strip().count("\n") == 0 and err.strip()


def test_our_own_questions_and_kept_answers_are_read(put, command):
    questions = put(
        "heldin/questions.jsonl",
        [
            {"question_id": f"q_{i}", "text": "?", "label": "red", "image": "x.png"}
            for i in range(2)
        ],
    )
    kept = put(
        "kept.jsonl",
        [
            {"model": "abc", "decoding": "greedy"},
            {"i": 0, "question_id": "q_0", "prompt": "?", "answer": "Red."},
            {"i": 1, "question_id": "q_1", "answer": "x"},
        ],
    )
    assert command("heldin", questions=questions, answers=kept)["accuracy"] == 50


def test_the_command_is_quick_to_start_and_prints_one_object(put):
    questions, answers = pope_files(put), put("a.jsonl", answer_lines({i: "Yes" for i in range(4)}))
    code = (
        "import sys; from vflan.__main__ import main; main(sys.argv[1:]); assert 'torch' not in "
        "sys.modules"
    )
    run = subprocess.run(
        [
            sys.executable,
            "-c",
            code,
            "score",
            "pope",
            "--questions",
            questions,
            "--answers",
            answers,
        ],
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    assert json.loads(run.stdout)["f1"] == pytest.approx(200 / 3)


@pytest.mark.parametrize(
    "content",
    ['[{"question_id": 0, "text": "a"}]', '{"question_id": 0, "text": "a"}', '{"0": "a"}'],
)
@pytest.mark.parametrize("name", ["x.json", "x.jsonl", "x"])
def test_answers_may_be_a_list_a_line_or_an_object_whatever_the_file_is_called(
    tmp_path, name, content
):
    (tmp_path / name).write_text(content)
    if name == "x.jsonl" and content.startswith('{"0"'):
        with pytest.raises(ValueError, match="holds no answers"):
            read_answers(tmp_path / name)
    else:
        assert [(r["id"], r["text"]) for r in read_answers(tmp_path / name)[0]] == [("0", "a")]


def test_answer_files_in_parts_are_read_together(put, tmp_path):
    put("parts/4_0.jsonl", answer_lines({0: "a"})), put("parts/4_1.jsonl", answer_lines({1: "b"}))
    assert [r["id"] for r in read_answers(tmp_path / "parts")[0]] == ["0", "1"]
    put("parts/merge.jsonl", answer_lines({5: "c"}))
    assert [r["id"] for r in read_answers(tmp_path / "parts")[0]] == ["5"]


def test_a_file_that_unpacks_to_much_more_than_its_size_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("vflan.data.limits.MAX_BYTES", 1000)
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(b'{"a": 1}\n' * 100_000))
    with pytest.raises(UnreadableFile, match="unpacks to more than"):
        read_rows(tmp_path / "a.jsonl.gz")
    pd.DataFrame({"question": ["x" * 1000] * 2000}).to_parquet(tmp_path / "a.parquet")
    with pytest.raises(UnreadableFile, match="unpacks to more than"):
        read_rows(tmp_path / "a.parquet")
    monkeypatch.undo()
    assert len(read_rows(tmp_path / "a.parquet")) == 2000
    assert len(read_rows(tmp_path / "a.jsonl.gz")) == 100_000
