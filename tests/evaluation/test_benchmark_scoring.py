"""`vflan score` reads what other programs and the authors' scripts leave, and never ends well
without a score.
"""

import gzip
import json

import pandas as pd
import pytest

from tests.evaluation.score_command import command, put, refused  # noqa: F401
from vflan.evaluation.benchmarks import BENCHMARKS
from vflan.evaluation.benchmarks.files import SHORT, match, read_answers, read_rows

pytestmark = pytest.mark.filterwarnings("ignore:.*questions, the released")  # test files are small


# -------------------------------------------------------------------- one small set of each release

PEOPLE = [{"answer": "red"}] * 10
CHOICE = {"choice_a": "x", "choice_b": "y", "question": "q"}
# name: (question file, its content, label file, its content, right answers, headline)
RELEASED = {
    "gqa": (
        "llava_gqa_testdev_balanced.jsonl",
        [{"question_id": "8", "text": "What?"}, {"question_id": "9", "text": "Is it?"}],
        "testdev_balanced_questions.json",
        {"8": {"answer": "dog", "types": {}}, "9": {"answer": "Yes"}},
        {"8": "Dog.", "9": "yes"},
        "accuracy",
    ),
    "vqav2": (
        "llava_vqav2_mscoco_test-dev2015.jsonl",
        [{"question_id": i, "image": f"{i}.jpg", "text": "?"} for i in (1, 2)],
        "v2_mscoco_val2014_annotations.json",
        {"annotations": [{"question_id": i, "answers": PEOPLE} for i in (1, 2)]},
        {1: "Red.", 2: "red"},
        "accuracy",
    ),
    "vizwiz": (
        "llava_test.jsonl",
        [{"question_id": i, "image": f"{i}.jpg", "text": "?"} for i in (1, 2)],
        "labels/val.json",
        [{"image": f"{i}.jpg", "answers": PEOPLE} for i in (1, 2)],
        {1: "Red.", 2: "red"},
        "accuracy",
    ),
    "textvqa": (
        "llava_textvqa_val_v051_ocr.jsonl",
        [{"question_id": i, "image": f"{i}.jpg", "text": "What?" + SHORT} for i in "ab"],
        "TextVQA_0.5.1_val.json",
        {"data": [{"image_id": i, "question": "What?", "answers": ["red"] * 10} for i in "ab"]},
        {"a": "Red.", "b": "red"},
        "accuracy",
    ),
    "pope": (
        "llava_pope_test.jsonl",
        [
            {"question_id": i, "image": "x.jpg", "text": f"Is {i}?" + SHORT, "category": "random"}
            for i in (1, 2)
        ],
        "coco_pope_random.json",
        '{"image": "x.jpg", "text": "Is 1?", "label": "yes"}\n'
        '{"image": "x.jpg", "text": "Is 2?", "label": "no"}\n',
        {1: "Yes", 2: "No"},
        "f1",
    ),
    "mme": (
        "llava_mme.jsonl",
        [{"question_id": "OCR/1.png", "image": "OCR/1.png", "text": t} for t in ("Is it?", "Not?")],
        "eval_tool/Your_Results/OCR.txt",
        "1.png\tIs it? Please answer yes or no.\tYes\n1.png\tNot? Please answer yes or no.\tNo\n",
        [("OCR/1.png", "Is it?", "Yes"), ("OCR/1.png", "Not?", "No")],
        "score",
    ),
    "seed": (
        "llava-seed-bench.jsonl",
        [{"question_id": i, "text": "q"} for i in ("101", "v2")],
        "SEED-Bench.json",
        {
            "questions": [
                CHOICE | dict(question_id="101", question_type_id=1, data_type="image", answer="A"),
                CHOICE | dict(question_id="v2", question_type_id=10, data_type="video", answer="B"),
            ]
        },
        {"101": "A", "v2": "B"},
        "accuracy",
    ),
    "scienceqa": (
        "llava_test_CQM-A.json",
        [
            {"id": i, "image": f"{i}/image.png", "conversations": [{"value": "Which?\nA. x\nB. y"}]}
            for i in ("4", "5")
        ],
        "problems.json",
        {"4": {"answer": 1}, "5": {"answer": 0}},
        {"4": "B", "5": "A"},
        "img_accuracy",
    ),
    "mmmu": (
        "questions.json",
        [{"id": f"validation_Art_{i}", "question": "?", "options": "['x', 'y']"} for i in (1, 2)],
        "answer_dict_val.json",
        {
            f"validation_Art_{i}": {"question_type": "multiple-choice", "ground_truth": "B"}
            for i in (1, 2)
        },
        {"validation_Art_1": "B", "validation_Art_2": "(B)"},
        "accuracy",
    ),
    "mm_vet": (
        "llava-mm-vet.jsonl",
        [{"question_id": i, "image": f"v1_{i}.png", "text": "?"} for i in (1, 2)],
        "mm-vet.json",
        {f"v1_{i}": {"answer": "dog", "capability": ["rec"]} for i in (1, 2)},
        {1: "A dog.", 2: "dog"},
        "rule",
    ),
}


@pytest.fixture
def released(put):
    """released("gqa"): {"questions", "labels", "answers"}: paths, and the key of the headline."""

    def write(name):
        questions, asked, labels, gold, answers, headline = RELEASED[name]
        rows = [{"question_id": id, "text": text} for id, text in dict_items(answers)]
        if isinstance(answers, list):
            rows = [{"question_id": i, "prompt": p, "text": t} for i, p, t in answers]
        paths = dict(questions=put(questions, asked), labels=put(labels, gold))
        return paths | dict(answers=put("answers.jsonl", rows)), headline

    return write


def dict_items(answers):
    return answers.items() if isinstance(answers, dict) else ()


# ---------------------------------------------------------- what other programs do to a file


def with_mark(text):
    return ("\ufeff" + text).encode()


def with_carriage_returns(text):
    return text.replace("\n", "\r\n").encode()


def as_powershell_writes(text):
    return text.replace("\n", "\r\n").encode("utf-16")


def packed(text):
    return gzip.compress(text.encode())


def with_commas(text):
    """A comma after each line of json lines, and after the last row of a list or object."""
    if "\t" in text:
        return text.encode()
    try:
        json.loads(text)
    except ValueError:
        return "".join(line + ",\n" for line in text.splitlines() if line).encode()
    return (text[:-1] + ",\n" + text[-1]).encode() if text[-1] in "]}" else text.encode()


def with_an_empty_line(text):
    return (text + "\n\n").encode()


@pytest.mark.parametrize("name", RELEASED)
@pytest.mark.parametrize("which", ["questions", "labels", "answers"])
@pytest.mark.parametrize(
    "change",
    [
        with_mark,
        with_carriage_returns,
        as_powershell_writes,
        packed,
        with_commas,
        with_an_empty_line,
    ],
)
def test_a_file_that_was_saved_again_scores_the_same(released, command, name, which, change):
    paths, headline = released(name)
    paths[which].write_bytes(change(paths[which].read_text(encoding="utf-8")))
    scores = command(name, **paths)
    assert scores[headline] == 100 and scores["n"] == 2
    assert set(scores["problems"].values()) == {0}


@pytest.mark.parametrize("name", [name for name in RELEASED if name != "mme"])
def test_packed_files_are_found_under_their_packed_names(released, command, name):
    paths, headline = released(name)
    for which, path in paths.items():
        paths[which] = path.with_name(path.name + ".gz")
        paths[which].write_bytes(packed(path.read_text()))
        path.unlink()
    folder = paths["labels"].parent
    assert command(name, **paths | {"labels": folder})[headline] == 100


def as_text(value):
    """All numbers of a json value as strings, as some databases export them."""
    if isinstance(value, dict):
        return {key: as_text(v) for key, v in value.items()}
    if isinstance(value, list):
        return [as_text(v) for v in value]
    return str(value) if isinstance(value, (int, float)) else value


@pytest.mark.parametrize("name", RELEASED)
def test_numbers_may_be_strings_and_strings_numbers(released, command, name):
    paths, headline = released(name)
    for path in paths.values():
        if path.suffix == ".jsonl" or name == "pope":
            rows = [json.loads(line) for line in path.read_text().splitlines()]
            path.write_text("\n".join(json.dumps(as_text(row)) for row in rows))
        elif path.suffix == ".json":
            path.write_text(json.dumps(as_text(json.loads(path.read_text()))))
    assert command(name, **paths)[headline] == 100
    rows = [json.loads(line) for line in paths["answers"].read_text().splitlines()]
    for row in rows:
        if row["question_id"].isdigit():
            row["question_id"] = float(row["question_id"])
    paths["answers"].write_text("\n".join(map(json.dumps, rows)))
    assert command(name, **paths)[headline] == 100


@pytest.mark.parametrize(
    "text",
    [
        "question_id,text\n1,Yes\n2,No\n",
        "\ufeffquestion_id,text\r\n1,Yes\r\n2,No\r\n",
        "question_id,text\n1,Yes,\n2,No,\n",
        "question_id,text,\n1,Yes,\n2,No,\n",
        "question_id,text\n1,Yes\n,\n2,No\n,\n",
        "question_id,text\n1.0,Yes\n2.0,No\n",
        'question_id,text,\n1,"Yes, it is.",\n2,"No",\n',
    ],
)
@pytest.mark.parametrize("change", [str.encode, packed])
def test_a_table_of_answers_keeps_its_columns(released, command, tmp_path, text, change):
    """pandas takes the first column for an index if each row ends in a comma."""
    paths, headline = released("pope")
    (tmp_path / "a.csv").write_bytes(change(text))
    scores = command("pope", **paths | {"answers": tmp_path / "a.csv"})
    assert scores[headline] == 100 and set(scores["problems"].values()) == {0}


def test_a_table_with_more_cells_than_columns_is_refused(released, refused, tmp_path):
    paths, _ = released("pope")
    (tmp_path / "a.csv").write_text("question_id,text\n1,Yes,it is\n2,No,it is not\n")
    sentence = refused("pope", **paths | {"answers": tmp_path / "a.csv"})
    assert "a.csv, line 2 has more cells than the first line" in sentence


@pytest.mark.parametrize("name", RELEASED)
@pytest.mark.parametrize("content", [b"\x1f\x8b\x08 no gzip", b"{half", b"\xff\xfd", b"[[1]]", b""])
def test_a_damaged_label_file_is_named_and_no_other(released, refused, name, content):
    paths, _ = released(name)
    paths["labels"].write_bytes(content)
    sentence = refused(name, **paths)
    assert paths["labels"].name in sentence


def test_bad_lines_are_counted_in_packed_files_and_in_parts(released, command, tmp_path):
    paths, _ = released("pope")
    text = paths["answers"].read_text()
    (tmp_path / "parts").mkdir()
    for number, line in enumerate(text.splitlines()):
        (tmp_path / "parts" / f"2_{number}.jsonl").write_text(line + "\n{half")
    (tmp_path / "a.jsonl.gz").write_bytes(packed(text + "\n{half"))
    scores = command("pope", **paths | {"answers": tmp_path / "a.jsonl.gz"})
    assert scores["problems"]["unreadable_line"] == 1 and scores["n"] == 2
    scores = command("pope", **paths | {"answers": tmp_path / "parts"})
    assert scores["problems"]["unreadable_line"] == 2 and scores["n"] == 2
    assert "2_0.jsonl:2, 2_1.jsonl:2" in command.err


@pytest.mark.parametrize("change", [with_mark, with_carriage_returns, packed, with_commas])
def test_reviews_that_were_saved_again_score_the_same(released, command, put, change):
    questions = put("lb/questions.jsonl", [{"question_id": i, "text": "?"} for i in (1, 2)])
    rows = [{"question_id": 1, "tuple": ["8", "6"]}, {"question_id": 2, "content": "8, 2\nBad."}]
    reviews = put("r.jsonl", rows)
    reviews.write_bytes(change(reviews.read_text()))
    scores = command("llava_bench", questions=questions, reviews=reviews)
    assert scores["score"] == 50 and scores["n"] == 2
    paths, _ = released("mm_vet")
    marks = put("marks.csv", "question_id,score\nv1_1,1.0\nv1_2,0.5\n")
    text = marks.read_text()
    marks.write_bytes(change(text.replace("\n", ",\n") if change is with_commas else text))
    assert command("mm_vet", **paths | {"reviews": marks})["total"] == 75


def test_reviews_that_are_not_there_or_of_another_benchmark_are_named(released, refused, put):
    questions = put("lb/questions.jsonl", [{"question_id": 1, "text": "?"}])
    missing = questions.parent / "none.jsonl"
    sentence = refused("llava_bench", questions=questions, reviews=missing)
    assert f"{missing} is not there" in sentence
    reviews = put("r.jsonl", [{"question_id": 1, "tuple": [8, 6]}])
    sentence = refused("llava_bench", questions=questions, reviews=reviews, model="one")
    assert "is about one model" in sentence
    bad = put("bad.json", '["a", "b"]')
    assert "bad.json is damaged" in refused("llava_bench", questions=questions, reviews=bad)
    paths, _ = released("gqa")
    assert "has no judge" in refused("gqa", **paths | {"reviews": reviews})


# Benchmarks whose labels are in the question file: {name: ({file: content}, right answers)}
LABELLED = {
    "textocr": (
        {
            "TextOCR_0.1_val.json": {
                "imgs": {"a": {"file_name": "a.jpg"}},
                "imgToAnns": {"a": ["a_1"]},
                "anns": {"a_1": {"utf8_string": "STOP"}},
            }
        },
        {"a": "It says stop."},
    ),
    "wit": (
        {
            "wit.tsv": "language\timage_url\tcaption_reference_description\n"
            "en\thttp://x/y.jpg\tThe Eiffel Tower\n"
        },
        {0: "The Eiffel Tower"},
    ),
    "miniimagenet": (
        {
            "test.csv": "filename,label\na.jpg,n01\nb.jpg,n02\n",
            "words.txt": "n01\thouse finch, linnet\nn02\tSt. Bernard\n",
        },
        {0: "house finch", 1: "St. Bernard"},
    ),
    "heldin": (
        {"questions.jsonl": [{"question_id": i, "text": "?", "label": i} for i in (3, 4)]},
        {3: "3.", 4: 4},
    ),
    "mmbench": (
        {
            "dev.tsv": "index\tquestion\tA\tB\tanswer\timage\tcategory\n"
            "7\tWhich?\tx\ty\tB\taGVs\tc\n"
        },
        {"7": "B"},
    ),
}


@pytest.mark.parametrize("name", LABELLED)
@pytest.mark.parametrize(
    "change", [with_mark, with_carriage_returns, packed, with_commas, with_an_empty_line]
)
def test_a_labelled_question_file_that_was_saved_again_scores_the_same(command, put, name, change):
    files, answers = LABELLED[name]
    paths = [put(f"{name}/{file}", content) for file, content in files.items()]
    for path in paths:
        path.write_bytes(change(path.read_text()))
    rows = [{"question_id": id, "text": text} for id, text in answers.items()]
    scores = command(name, questions=paths[0], answers=put("a.jsonl", rows))
    assert scores[BENCHMARKS[name].headline] == 100
    assert set(scores["problems"].values()) == {0}


def test_a_damaged_line_of_answers_is_counted_where_a_judge_could_be_meant(released, command):
    paths, _ = released("mm_vet")
    paths["answers"].write_text(paths["answers"].read_text() + "\n{half")
    assert command("mm_vet", **paths)["problems"]["unreadable_line"] == 1


def test_an_answer_that_failed_or_is_null_is_missing(released, command, put):
    """MMMU's output.json has its label beside a response; our own cache marks what failed."""
    paths, _ = released("pope")
    rows = [
        {"i": 0, "question_id": 1, "answer": "", "finish": "error"},
        {"i": 1, "question_id": 2, "answer": "No", "finish": "stop"},
    ]
    scores = command("pope", **paths | {"answers": put("kept.jsonl", rows)})
    assert scores["problems"]["missing"] == 1 and scores["problems"]["empty"] == 0
    paths, _ = released("mmmu")
    rows = [
        {"id": f"validation_Art_{i}", "answer": "B", "response": r}
        for i, r in ((1, None), (2, "A"))
    ]
    scores = command("mmmu", **paths | {"answers": put("out.json", rows)})
    assert scores["accuracy"] == 0 and scores["problems"]["missing"] == 1


# ----------------------------------------------------------------------- files that are not there


@pytest.mark.parametrize("name", RELEASED)
@pytest.mark.parametrize("which", ["questions", "labels", "answers"])
def test_the_file_that_is_missing_is_the_one_that_is_named(released, refused, name, which):
    paths, _ = released(name)
    paths[which].unlink()
    sentence = refused(name, **paths)
    assert f"{paths[which]} is not there" in sentence
    assert which == "answers" or f"the {which} of {name}" in sentence


@pytest.mark.parametrize("name", [name for name in RELEASED if name not in ("vqav2", "vizwiz")])
@pytest.mark.parametrize("given", [True, False], ids=["an empty folder", "no labels"])
def test_answers_without_labels_are_no_success(released, refused, tmp_path, name, given):
    paths, _ = released(name)
    paths.pop("labels").unlink()
    (tmp_path / "empty").mkdir()
    sentence = refused(name, **paths | ({"labels": tmp_path / "empty"} if given else {}))
    assert "labels" in sentence or "label in" in sentence


def test_questions_that_all_lack_labels_are_told_when_they_are_loaded(put, tmp_path):
    file, asked, *_ = RELEASED["textvqa"]
    put(f"textvqa/{file}", asked)
    with pytest.warns(UserWarning, match="textvqa: all questions have no usable label"):
        BENCHMARKS["textvqa"].load(tmp_path)


@pytest.mark.parametrize("name", ["vqav2", "vizwiz"])
def test_a_test_set_without_labels_says_where_its_score_is(
    released, command, refused, tmp_path, name
):
    """Their labels are on a server, so a share of 'unanswerable' is all that can be counted."""
    paths, _ = released(name)
    paths.pop("labels").unlink()
    scores = command(name, **paths)
    assert "accuracy" not in scores and scores["unanswerable"] == 0
    assert "There is no `accuracy`" in command.err and "vflan upload" in command.err
    (tmp_path / "empty").mkdir()
    assert "has a label in" in refused(name, **paths | {"labels": tmp_path / "empty"})


def test_reviews_that_judge_nothing_are_named(released, refused, put):
    paths, _ = released("mm_vet")
    for content in ({"v1_77": {"score": [1.0]}}, {"v1_1": {"score": []}}, {"v1_1": 7}):
        sentence = refused("mm_vet", **paths | {"reviews": put("g.json", content)})
        assert "has a verdict in" in sentence and "g.json" in sentence


def test_a_pair_that_is_not_whole_is_no_success(released, refused, put):
    paths, _ = released("mme")
    rows = [{"question_id": "OCR/1.png", "prompt": "Is it?", "text": "Yes"}]
    sentence = refused("mme", **paths | {"answers": put("one.jsonl", rows)})
    assert "can be scored: too few are answered" in sentence


# ------------------------------------------------------------------------------ labels and answers


def test_gqas_labels_with_capitals_can_be_answered_and_the_official_number_is_kept(command, put):
    theirs = {"7": "Yes", "8": "dog", "9": "St.", "6": "NBA"}
    labels = put(
        "testdev_balanced_questions.json",
        {id: {"question": "?", "imageId": "n", "answer": answer} for id, answer in theirs.items()},
    )
    answers = {"7": "yes", "8": "Dog.", "9": "St.", "6": "cat"}
    rows = put("a.jsonl", [{"question_id": id, "text": text} for id, text in answers.items()])
    scores = command("gqa", questions=labels, answers=rows)
    assert scores["accuracy"] == 75 and scores["official_accuracy"] == 25
    plain = {"8": {"question": "?", "imageId": "n", "answer": "dog"}}
    scores = command("gqa", questions=put("q/plain.json", plain), answers=rows)
    assert scores["accuracy"] == 100 and "official_accuracy" not in scores


@pytest.mark.parametrize(
    "name, label",
    [
        ("gqa", "New York"),
        ("gqa", "St."),
        ("heldin", "St. Bernard"),
        ("forgetting", "St. Bernard"),
        ("miniimagenet", "St. Bernard"),
        ("pope", "Yes"),
        ("mme", "No"),
        ("textocr", "St. Bernard"),
        ("mm_vet", "St. Bernard"),
        ("scienceqa", "B"),
        ("seed", "B"),
        ("vqav2", "The St. Bernard's"),
    ],
)
def test_a_label_as_it_stands_is_a_right_answer(name, label):
    sample = dict(text="?", category="c", image="x.png", label=label, answers=[label] * 10)
    samples = [sample | dict(question_id=str(i)) for i in range(2)]
    headline = {"mm_vet": "rule"}.get(name, BENCHMARKS[name].headline)
    assert BENCHMARKS[name].score(samples, [label] * 2)[headline] == 100


def answers_of(*texts, id="i", prompt=None):
    return [{"id": id, "text": text, "prompt": prompt, "gold": None} for text in texts]


def test_a_question_that_stands_there_twice_is_one_question():
    twice = [{"question_id": "i", "text": "what?"}, {"question_id": "i", "text": "What?" + SHORT}]
    answers, problems = match(twice, answers_of("a"))
    assert answers == ["a", "a"] and not any(problems.values())
    answers, problems = match(twice, answers_of("a", "b"))
    assert answers == ["a", "b"] and problems["unknown"] == problems["duplicate"] == []
    answers, problems = match(twice, answers_of("a", "b", "c"))
    assert answers == ["c", "c"] and problems["duplicate"] == ["i", "i"]
    answers, problems = match(twice, answers_of("a", prompt="what?"))
    assert answers == ["a", "a"] and not any(problems.values())


def test_an_answer_that_two_questions_could_mean_is_not_guessed():
    two = [{"question_id": "i", "text": "what?"}, {"question_id": "i", "text": "who?"}]
    answers, problems = match(two, answers_of("a"))
    assert answers == [None, None] and problems["unknown"] == ["i"]


def test_a_question_that_stands_there_twice_is_reported_once(command, put):
    labels = put("coco_pope_random.json", '{"image": "x", "text": "Is it?", "label": "yes"}')
    row = {"question_id": 1, "image": "x", "text": "Is it?", "category": "random"}
    scores = command(
        "pope",
        questions=put("llava_pope_test.jsonl", [row, row]),
        labels=labels,
        answers=put("a.jsonl", [{"question_id": 1, "text": "Yes"}]),
    )
    assert scores["problems"]["missing"] == scores["problems"]["unknown"] == 0
    assert scores["problems"]["duplicate_question"] == 1 and scores["f1"] == 100


# ------------------------------------------------------------- what the authors' scripts leave


def mmbench_sheet(path):
    rows = [
        {"index": i, "question": "Which?", "A": "x", "B": "y", "C": "", "D": "", "prediction": p}
        | {"answer": a, "split": "dev"}
        for i, p, a in ((5, "A", "A"), (1_000_005, "B", "B"), (6, "A", "B"), (1_000_006, "A", "A"))
    ]
    frame = pd.DataFrame(rows)
    save = frame.to_excel if path.suffix == ".xlsx" else frame.to_csv
    save(path, index=False)


@pytest.mark.parametrize("kind", ["xlsx", "csv"])
def test_mmbenchs_upload_sheet_is_read_as_questions(command, tmp_path, kind):
    sheet = tmp_path / f"llava-v1.5-13b.{kind}"
    mmbench_sheet(sheet)
    scores = command("mmbench", questions=sheet, answers=sheet)
    assert scores["accuracy"] == 50 and scores["single_pass"] == 50 and scores["n"] == 4
    (sample, *_) = BENCHMARKS["mmbench"].questions(sheet)
    assert sample["image"] is None and sample["label"] == "A" and sample["category"] == "all"


TABLE = (
    ',rec,ocr,total,std,runs\none,40.1,30.0,36.1,0.1,"[36.1, 36.2]"\ntwo,2,3,30.2,0.2,"[30.2]"\n'
)


def test_one_model_of_mm_vets_table_is_named(released, command, refused, put):
    paths, _ = released("mm_vet")
    paths |= {"reviews": put("cap.csv", TABLE)}
    scores = command("mm_vet", **paths, model="two")
    assert (scores["total"], scores["std"], scores["runs"]) == (30.2, 0.2, [30.2])
    assert command("mm_vet", **paths, model="one")["ocr"] == 30
    assert "several models: name one of one, two with --model" in refused("mm_vet", **paths)
    assert "0 rows for --model three" in refused("mm_vet", **paths, model="three")
    paths |= {"reviews": put("g.json", {"v1_1": 1.0})}
    assert "leave --model out" in refused("mm_vet", **paths, model="one")
    del paths["reviews"]
    assert "--model names a row" in refused("mm_vet", **paths, model="one")


def test_several_runs_of_a_judge_give_mean_and_deviation(released, command, put):
    """The population's deviation of the runs' totals, as in MM-Vet's evaluator."""
    paths, _ = released("mm_vet")
    grades = {"v1_1": {"score": [1.0, 0.8, 0.6]}, "v1_2": {"score": [0.2, 0.2, "0.2"]}}
    scores = command("mm_vet", **paths | {"reviews": put("g.json", grades)})
    assert scores["total"] == pytest.approx(50) and scores["rec"] == pytest.approx(50)
    assert scores["runs"] == pytest.approx([60, 50, 40])
    assert scores["std"] == pytest.approx((200 / 3) ** 0.5)
    assert scores["problems"]["failed_judgement"] == 0 and scores["n"] == 2
    files = [put(f"{i}.json", {id: g["score"][i] for id, g in grades.items()}) for i in range(3)]
    assert command("mm_vet", **paths | {"reviews": files}) == scores
    grades["v1_2"]["score"].pop()
    scores = command("mm_vet", **paths | {"reviews": put("g.json", grades)})
    assert scores["runs"] == pytest.approx([60, 50]) and "not marked every question" in command.err
    one = command("mm_vet", **paths | {"reviews": files[0]})
    assert one["total"] == pytest.approx(60) and "std" not in one and "runs" not in one


def test_scienceqas_output_file_is_read_as_answers(released, command, tmp_path):
    """The script calls one large json object, with line breaks, NAME_output.jsonl."""
    paths, _ = released("scienceqa")
    row = dict(parsed_ans="B", ground_truth="B", question="<image>\nWhich?", is_multimodal=True)
    content = {
        "correct": [row | {"question_id": "4", "pred": "B"}],
        "incorrect": [row | {"question_id": "5", "pred": "C. z"}],
    }
    output = tmp_path / "llava-v1.5-13b_output.jsonl"
    output.write_text(json.dumps(content, indent=2))
    scores = command("scienceqa", **paths | {"answers": output})
    assert scores["img_accuracy"] == 50 and set(scores["problems"].values()) == {0}


def test_mmmus_folder_of_output_files_is_read_as_questions_and_answers(command, put, tmp_path):
    choice = {"question_type": "multiple-choice", "all_choices": ["A", "B"]}
    choice |= {"index2ans": {"A": "a red star", "B": "a blue ring"}}
    answers = {
        "Art": [
            choice
            | {"id": "validation_Art_1", "answer": "A", "response": "It must be a red star here."},
            choice | {"id": "validation_Art_2", "answer": "B", "response": "A"},
        ],
        "Math": [
            {"id": "validation_Math_1", "question_type": "short-answer", "answer": "['4', 'four']"}
            | {"response": "So x is 4."}
        ],
    }
    for subject, rows in answers.items():
        put(f"llava/{subject}/output.json", rows)
        put(f"llava/{subject}/parsed_output.json", [])
    folder = tmp_path / "llava"
    scores = command("mmmu", questions=folder, answers=folder)
    assert scores["accuracy"] == pytest.approx(200 / 3) and scores["n"] == 3
    assert scores["accuracy_Math"] == 100 and scores["accuracy_multiple_choice"] == 50


def test_mmes_eval_tool_is_read_as_labels_and_as_questions(released, command, tmp_path):
    paths, _ = released("mme")
    tool = tmp_path / "eval_tool"
    (tool / "calculation.py").write_text("")
    for labels in (tool, tool / "Your_Results", tool / "Your_Results" / "OCR.txt", tmp_path):
        assert command("mme", **paths | {"labels": labels})["perception"] == 200
    del paths["labels"]
    assert command("mme", **paths | {"questions": tool})["perception"] == 200
    filled = tool / "Your_Results" / "OCR.txt"
    filled.write_text("".join(f"{line}\tYes\n" for line in filled.read_text().splitlines()))
    scores = command("mme", questions=tool, answers=tool)
    assert scores["perception"] == 50 and scores["accuracy"] == 50


# ---------------------------------------------------------------------- the released files of POPE


@pytest.mark.parametrize("change", [with_mark, with_carriage_returns, packed, with_commas])
def test_popes_released_answers_score_as_published_after_any_change(
    shared, command, tmp_path, change
):
    folder = shared / "benchmarks" / "pope"
    if not (folder / "llava-v1.5-13b.jsonl").exists():
        pytest.skip("needs shared/benchmarks/pope beside the repository")
    answers = tmp_path / "answers.jsonl"
    answers.write_bytes(change((folder / "llava-v1.5-13b.jsonl").read_text()))
    scores = command(
        "pope", questions=folder / "llava_pope_test.jsonl", labels=folder, answers=answers
    )
    assert round(scores["f1"], 2) == 85.95 and scores["n"] == 8910


def test_answers_in_a_table_that_pandas_would_shift_are_read(tmp_path):
    (tmp_path / "a.csv").write_text("question_id,text\n1,Yes,\n2,No,\n")
    assert [(r["id"], r["text"]) for r in read_answers(tmp_path / "a.csv")[0]] == [
        ("1", "Yes"),
        ("2", "No"),
    ]
    (tmp_path / "a.tsv").write_text("index\tA\n7\tNA\n\t\n")
    assert read_rows(tmp_path / "a.tsv") == [{"index": "7", "A": "NA"}]
    assert read_rows(tmp_path / "a.tsv", na=True) == [{"index": "7", "A": ""}]
