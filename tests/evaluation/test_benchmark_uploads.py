"""`vflan upload` writes from cached answers what LLaVA-1.5's converters write, in all six formats.

Each test starts from the released question file, with the values that the converter gives.
"""

import base64
import json

import pandas as pd
import pytest

from vflan.__main__ import main
from vflan.evaluation.benchmarks import BENCHMARKS
from vflan.evaluation.benchmarks.files import LETTER, SHORT, UNSURE, read_rows

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*questions, the released"),  # test files are small
    pytest.mark.filterwarnings("ignore:.*no usable label"),  # labels are on the server
]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr("vflan.evaluation.benchmarks.files.CACHE", tmp_path / "cache")


@pytest.fixture
def asked(tmp_path):
    """asked("gqa", {file name: content}, answers): benchmarks/ and run/ with cached answers.

    An answer that is None failed; one that is ... was never asked.
    """

    def write(name, files, answers):
        for file, content in files.items():
            path = tmp_path / "benchmarks" / name / file
            path.parent.mkdir(parents=True, exist_ok=True)
            if file.endswith(".jsonl"):
                content = "".join(json.dumps(row) + "\n" for row in content)
            path.write_text(content if isinstance(content, str) else json.dumps(content))
        samples = BENCHMARKS[name].load(tmp_path / "benchmarks")
        rows = [{"model": "the header"}]
        for i, answer in enumerate(answers):
            row = dict(i=i, question_id=samples[i]["question_id"], answer=answer, finish="stop")
            failed = dict(answer="", finish="error", reason="missing picture")
            rows += [] if answer is ... else [row | (failed if answer is None else {})]
        kept = tmp_path / "run" / "answers" / f"{name}.jsonl"
        kept.parent.mkdir(parents=True, exist_ok=True)
        kept.write_text("".join(json.dumps(row) + "\n" for row in rows))

    return write


@pytest.fixture
def upload(tmp_path, capsys):
    """upload("gqa", "--out", ...): the path that the command prints; it must succeed."""

    def run(name, *options):
        code = main(arguments(tmp_path, name, *options))
        out, err = capsys.readouterr()
        assert code == 0, err
        return type(tmp_path)(out.strip())

    return run


@pytest.fixture
def refused(tmp_path, capsys):
    """refused("gqa", ...): the one sentence with which the command ends; nothing is written."""

    def run(name, *options):
        before = sorted(tmp_path.rglob("*"))
        assert main(arguments(tmp_path, name, *options)) == 1
        out, err = capsys.readouterr()
        assert out == "" and err.count("\n") == 1 and sorted(tmp_path.rglob("*")) == before
        return err

    return run


def arguments(folder, name, *options):
    given = ["--run", str(folder / "run"), "--folder", str(folder / "benchmarks")]
    return ["upload", name, *given, *map(str, options)]


# --------------------------------------------------------------------------------- the six formats

GQA = {
    "llava_gqa_testdev_balanced.jsonl": [
        {"question_id": id, "image": f"n{id}.jpg", "text": "Is it?" + SHORT}
        for id in ("201", "202")
    ]
}


def test_gqa_becomes_the_list_that_the_authors_eval_reads(asked, upload):
    asked("gqa", GQA, ["Yes.", "A red Car.."])
    path = upload("gqa")
    assert path.name == "testdev_balanced_predictions.json"
    assert json.loads(path.read_text()) == [
        {"questionId": "201", "prediction": "yes"},
        {"questionId": "202", "prediction": "a red car"},
    ]


VQAV2 = {
    "llava_vqav2_mscoco_test-dev2015.jsonl": [
        {"question_id": i, "image": f"COCO_test2015_{i:012}.jpg", "text": "Is it?" + SHORT}
        for i in (262144005, 262144000)
    ]
}
EVERY = [{"question_id": i} for i in (262144000, 7, 262144005, 9)]
VQAV2_UPLOAD = [
    {"question_id": 262144000, "answer": "2 dogs"},
    {"question_id": 7, "answer": ""},
    {"question_id": 262144005, "answer": "yes"},
    {"question_id": 9, "answer": ""},
]


@pytest.mark.parametrize(
    "name, content",
    [
        ("llava_vqav2_mscoco_test2015.jsonl", EVERY),
        ("v2_OpenEnded_mscoco_test2015_questions.json", {"questions": EVERY}),
    ],
)
def test_vqav2_answers_every_question_of_the_test_set(asked, upload, tmp_path, name, content):
    asked("vqav2", VQAV2 | {name: content}, ["Yes.", "The two dogs"])
    path = upload("vqav2")
    assert path.name == "vqav2_upload.json" and json.loads(path.read_text()) == VQAV2_UPLOAD
    elsewhere = (tmp_path / "benchmarks" / "vqav2" / name).rename(tmp_path / name)
    path = upload("vqav2", "--all-questions", elsewhere, "--out", tmp_path / "new" / "up.json")
    assert json.loads(path.read_text()) == VQAV2_UPLOAD


def test_vqav2_without_the_list_of_its_test_set_is_refused(asked, refused, tmp_path):
    """The server takes no file that lacks a question."""
    asked("vqav2", VQAV2, ["Yes.", "The two dogs"])
    assert "llava_vqav2_mscoco_test2015.jsonl is not there" in refused("vqav2")
    (tmp_path / "other.jsonl").write_text('{"question_id": 7}\n{"question_id": 262144000}')
    sentence = refused("vqav2", "--all-questions", tmp_path / "other.jsonl")
    assert "lacks 1 of the questions that were answered (first: 262144005)" in sentence
    asked("gqa", GQA, ["Yes.", "No."])
    assert "leave --all-questions out" in refused("gqa", "--all-questions", "x.jsonl")


def test_vqav2_with_labels_of_its_own_needs_no_list(asked, upload):
    """The validation set, or the mini world's questions: there is no larger test set."""
    rows = [{"question_id": "q_1", "text": "?", "label": "red", "answers": ["red"] * 10}]
    asked("vqav2", {"questions.jsonl": rows}, ["Red."])
    assert json.loads(upload("vqav2").read_text()) == [{"question_id": "q_1", "answer": "red"}]


def test_vizwiz_becomes_a_list_of_pictures_and_normalised_answers(asked, upload):
    rows = [
        {"question_id": i, "image": f"VizWiz_test_{i:08}.jpg", "text": "?" + UNSURE + SHORT}
        for i in range(2)
    ]
    asked("vizwiz", {"llava_test.jsonl": rows}, ["Unanswerable", "A dog, isnt it?"])
    assert json.loads(upload("vizwiz").read_text()) == [
        {"image": "VizWiz_test_00000000.jpg", "answer": "unanswerable"},
        {"image": "VizWiz_test_00000001.jpg", "answer": "dog isn't it"},
    ]


def test_4000_released_vizwiz_answers_become_the_released_upload(asked, upload, shared):
    path = shared / "benchmarks" / "vizwiz" / "normalizer_pairs.json"
    if not path.exists():
        pytest.skip("needs shared/benchmarks/vizwiz beside the repository")
    pairs = json.loads(path.read_text())
    rows = [{"question_id": i, "image": f"v_{i}.jpg", "text": "?"} for i in range(len(pairs))]
    asked("vizwiz", {"llava_test.jsonl": rows}, [pair["raw"] for pair in pairs])
    uploaded = json.loads(upload("vizwiz").read_text())
    assert len(uploaded) == 4000 and uploaded == [
        {"image": f"v_{i}.jpg", "answer": pair["normalized"]} for i, pair in enumerate(pairs)
    ]


def mmbench_rows():
    picture = base64.b64encode(b"0123456789" * 10).decode()
    row = dict(hint="Look.", A="3", B="=4", C="", D="", answer="A", category="c", image=picture)
    row |= {"source": "s", "l2-category": "l", "comment": "n", "split": "dev"}
    first = [{"index": i, "question": f"Which {i}?"} | row for i in (5, 241)]
    return first + [{"index": 1_000_005, "question": "Which 5?"} | row | {"image": "5"}]


@pytest.mark.parametrize("name", ["mmbench", "mmbench_cn"])
def test_mmbench_becomes_the_sheet_of_llavas_converter(asked, upload, tmp_path, name):
    file = {
        "mmbench": "mmbench_dev_20230712.tsv",
        "mmbench_cn": "mmbench_dev_cn_20231003.tsv",
    }[name]
    answers = ["A", "=5", "B\x0b"]
    table = pd.DataFrame(mmbench_rows()).to_csv(sep="\t", index=False)
    asked(name, {file: table}, answers)
    path = upload(name)
    assert path.name == f"{name}_upload.xlsx"
    # As the converter makes it: the released table without six columns, the prediction after D.
    whole = pd.read_table(tmp_path / "benchmarks" / name / file)
    drop = ["hint", "category", "source", "image", "comment", "l2-category"]
    expected = whole.drop(columns=drop)
    expected.insert(6, "prediction", ["A", "=5", "B"])
    sheet = pd.read_excel(path)
    assert list(sheet.columns) == "index question A B C D prediction answer split".split()
    pd.testing.assert_frame_equal(sheet.astype(str), expected.astype(str))
    tsv = upload(name, "--out", tmp_path / "up.tsv")
    assert [row["prediction"] for row in read_rows(tsv)][:2] == ["A", "=5"]


def test_mmbench_of_the_test_split_has_no_answers_and_gets_its_sheet(asked, upload):
    table = pd.DataFrame(mmbench_rows()).drop(columns="answer")
    asked("mmbench", {"mmbench_test.tsv": table.to_csv(sep="\t", index=False)}, ["A", "B", "C"])
    rows = read_rows(upload("mmbench"))
    assert list(rows[0]) == "index question A B C D prediction split".split()
    assert [(row["index"], row["prediction"]) for row in rows] == [
        ("5", "A"),
        ("241", "B"),
        ("1000005", "C"),
    ]


def test_mmbench_of_questions_that_are_not_released_is_refused(asked, refused):
    rows = [{"question_id": "1_0", "text": "Which? (a) x (b) y", "label": "a"}]
    asked("mmbench", {"questions.jsonl": rows}, ["a"])
    assert "released file, which question 1_0 is not from" in refused("mmbench")


def test_mm_vet_becomes_the_object_that_the_grader_reads(asked, upload):
    rows = [{"question_id": i, "image": f"v1_{i}.png", "text": "What is x?"} for i in range(2)]
    asked("mm_vet", {"llava-mm-vet.jsonl": rows}, ["x = -1 or 5.\nSo it is.", "Ein Bär"])
    assert json.loads(upload("mm_vet").read_text()) == {
        "v1_0": "x = -1 or 5.\nSo it is.",
        "v1_1": "Ein Bär",
    }


def test_seed_becomes_the_lines_of_the_leaderboard(asked, upload):
    rows = [
        {"question_id": "101669", "image": "SEED-Bench-image/1", "text": "q" + LETTER},
        {"question_id": "v_2", "image": "SEED-Bench-video-image/v_2.png", "text": "q" + LETTER},
    ]
    asked("seed", {"llava-seed-bench.jsonl": rows}, ["B", "C. x"])
    path = upload("seed")
    assert path.name == "seed_upload.jsonl"
    assert [json.loads(line) for line in path.read_text().splitlines()] == [
        {"question_id": "101669", "prediction": "B"},
        {"question_id": "v_2", "prediction": "C. x"},
    ]


# ------------------------------------------------------------------- answers that are not there

SIX = {
    "gqa": (
        GQA,
        [{"questionId": "201", "prediction": "yes"}, {"questionId": "202", "prediction": ""}],
    ),
    "vqav2": (
        VQAV2 | {"llava_vqav2_mscoco_test2015.jsonl": EVERY},
        [row | ({"answer": ""} if row["question_id"] != 262144005 else {}) for row in VQAV2_UPLOAD],
    ),
    "vizwiz": (
        {
            "llava_test.jsonl": [
                {"question_id": i, "image": f"{i}.jpg", "text": "?"} for i in range(2)
            ]
        },
        [{"image": "0.jpg", "answer": "yes"}, {"image": "1.jpg", "answer": ""}],
    ),
    "mm_vet": (
        {"llava-mm-vet.jsonl": [{"question_id": i, "text": "?"} for i in range(2)]},
        {"v1_0": "Yes.", "v1_1": ""},
    ),
    "seed": (
        {"llava-seed-bench.jsonl": [{"question_id": f"s{i}", "text": "?"} for i in range(2)]},
        [{"question_id": "s0", "prediction": "Yes."}, {"question_id": "s1", "prediction": ""}],
    ),
    "mmbench": (
        {"mmbench_dev.tsv": pd.DataFrame(mmbench_rows()[:2]).to_csv(sep="\t", index=False)},
        ["Yes.", ""],
    ),
}


@pytest.mark.parametrize("missing", [None, ...], ids=["failed", "not asked"])
@pytest.mark.parametrize("name", SIX)
def test_a_question_without_an_answer_is_refused_or_uploaded_empty(
    asked, upload, refused, name, missing
):
    files, expected = SIX[name]
    asked(name, files, ["Yes.", missing])
    assert ("lacks 1 answers" if missing is ... else "1 of 2 questions have no") in refused(name)
    path = upload(name, "--allow-missing")
    content = read_rows(path)
    if name == "mmbench":
        content = [row["prediction"] for row in content]
    assert content == expected


@pytest.mark.parametrize("name", SIX)
def test_an_upload_without_any_answer_is_refused(asked, refused, name):
    asked(name, SIX[name][0], [..., ...])
    assert "lacks 2 answers" in refused(name)
    assert "2 of 2 questions have no answer" in refused(name, "--allow-missing")


def test_answers_to_other_questions_are_not_uploaded(asked, refused, tmp_path):
    """The folder of the benchmarks was changed after the run was asked."""
    asked("gqa", GQA, ["Yes.", "No."])
    path = tmp_path / "benchmarks" / "gqa" / "llava_gqa_testdev_balanced.jsonl"
    path.write_text("\n".join(path.read_text().splitlines()[::-1]))
    assert "answers other questions than these" in refused("gqa")
    path.write_text(path.read_text().splitlines()[1])
    assert "answers other questions than these" in refused("gqa")


def test_the_answers_of_another_model_of_the_run_are_uploaded(asked, upload, tmp_path):
    asked("gqa", GQA, ["Yes.", "No."])
    kept = tmp_path / "run" / "answers" / "gqa.jsonl"
    other = kept.parent / "swapped" / "gqa.jsonl"
    other.parent.mkdir()
    other.write_text(kept.read_text().replace('"No."', '"Dog"'))
    path = upload("gqa", "--model", "swapped")
    assert path.parent == other.parent and json.loads(path.read_text())[1]["prediction"] == "dog"


@pytest.mark.parametrize("name, row", [("vizwiz", {}), ("mme", {"category": "count"})])
def test_a_question_without_a_picture_has_no_place_in_some_files(asked, refused, name, row):
    rows = [{"question_id": "7", "text": "?", "label": "yes", "answers": ["yes"] * 10} | row]
    asked(name, {"questions.jsonl": rows}, ["yes"])
    assert "picture" in refused(name)


def test_answers_of_a_model_that_is_no_run_need_the_folder_of_the_benchmarks(
    asked, tmp_path, capsys, monkeypatch
):
    """A served or a released model: its weights are neither looked for nor downloaded."""
    asked("gqa", GQA, ["Yes.", "No."])
    assert main(["upload", "gqa", "--run", str(tmp_path / "run")]) == 1
    assert "is no run of ours: give --folder" in capsys.readouterr().err
    assert main(["upload", "gqa", "--run", str(tmp_path / "none")]) == 1
    assert "holds no answers" in capsys.readouterr().err
    monkeypatch.setattr("vflan.evaluation.released_model.output_path", lambda _: tmp_path / "run")
    given = ["--run", "someone/a-model-of-the-hub", "--folder", str(tmp_path / "benchmarks")]
    assert main(["upload", "gqa", *given]) == 0
    written = tmp_path / "run" / "answers" / "testdev_balanced_predictions.json"
    assert capsys.readouterr().out.strip() == str(written)
