"""What a row says in another form than LLaVA's is read, or is the reason why the row is bad."""

import base64
import io
import json

import pytest
from PIL import Image

from vflan.data.samples import load_samples, texture
from vflan.data.validation import check

ASK, SAY = {"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "a dot"}


@pytest.fixture
def load(tmp_path):
    """A function from rows to the samples of a file that holds them."""
    (tmp_path / "images").mkdir()
    Image.new("RGB", (9, 9)).save(tmp_path / "images" / "ok.png")

    def write_and_load(*rows):
        (tmp_path / "rows.json").write_text(json.dumps(rows))
        return load_samples(tmp_path / "rows.json")

    return write_and_load


def row(**changes):
    return {"id": "r", "image": "ok.png", "task_name": "t", "conversations": [ASK, SAY]} | changes


def reason(samples):
    """Why the only row is bad, or what of it is left out."""
    report = check(samples)
    assert report.rows == 1
    return "".join([*report.bad.reason, *report.repaired.reason])


def text_of(samples):
    return [turn["value"] for turn in samples[0]["conversations"]]


# ------------------------------------------------------------------------------------ turns


@pytest.mark.parametrize(
    "value, text",
    [
        (3, "3"),
        (-0.5, "-0.5"),
        (0, "0"),
        (True, "true"),
        (False, "false"),
        (10**30, "1" + "0" * 30),
    ],
)
def test_a_number_and_true_and_false_are_texts(load, value, text):
    samples = load(row(conversations=[ASK, {"from": "gpt", "value": value}]))
    assert text_of(samples) == ["<image>\nWhat?", text] and reason(samples) == ""


@pytest.mark.parametrize(
    "turn, said",
    [
        ({"value": ["a", "b"]}, "the value of turn 4 is a list"),
        ({"value": {"text": "a"}}, "the value of turn 4 is an object"),
        ({"value": None}, "the value of turn 4 is null"),
        ({"value": float("nan")}, "the value of turn 4 is NaN"),
        ({"text": "a"}, "turn 4 has no value, only from, text"),
        ({}, "turn 4 has no value, only from"),
    ],
)
@pytest.mark.parametrize("role", ["human", "gpt"])
def test_a_turn_whose_text_cannot_be_read_makes_the_row_bad(load, turn, said, role):
    """Else the row is trained on without that text, and nothing says so."""
    more = [{"from": "human", "value": "And?"}, {"from": role} | turn, ASK, SAY]
    samples = load(row(conversations=[ASK, SAY, *more]))
    assert reason(samples) == f"a turn without text: {said}"
    assert check(samples).reasons.to_dict() == {"a turn without text": 1}


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"conversations": "Hi"}, "no list of turns: conversations is text"),
        ({"conversations": {"human": "Hi"}}, "no list of turns: conversations is an object"),
        ({"conversations": [ASK, "Hi"]}, "a turn without text: turn 2 is text"),
        ({"conversations": None}, "no turns"),
        ({"video": "film.mp4"}, "video in the row: only pictures and text are trained on"),
        ({"audio": ["a.wav"]}, "audio in the row: only pictures and text are trained on"),
        ({"video": "", "videos": [], "audio": None}, ""),
        ({"system": "You are a cat."}, "left out: the row's own system text"),
        ({"system": {"text": "cat"}}, "left out: the row's own system text"),
        ({"system": ""}, ""),
    ],
)
def test_nothing_else_in_a_row_is_lost_in_silence(load, changes, said):
    assert reason(load(row(**changes))) == said


def test_a_json_value_that_is_no_row_is_named(load):
    report = check(load(None, 5, [row()], "text"))
    kinds = ["null", "a number", "a list", "text"]
    said = [f"not a row: an object is needed, this is {kind}" for kind in kinds]
    assert report.bad.reason.tolist() == said


@pytest.mark.parametrize("field", ["messages", "conversations"])
def test_rows_of_chat_apis_are_read(load, field):
    chat = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "<image>\nWhat?"},
        {"role": "assistant", "content": "a dot"},
    ]
    samples = load({"image": "ok.png", field: chat})
    assert samples[0]["conversations"][:2] == [ASK, SAY]
    assert reason(samples) == "left out: the row's own system text"
    # The first turn is the question for all who look at it.
    assert texture(samples).question.tolist() == [1]
    parts = [{"type": "image"}, {"type": "text", "text": "What?"}]
    samples = load({"image": "ok.png", field: [{"role": "user", "content": parts}, *chat[2:]]})
    assert reason(samples) == "a turn without text: the content of turn 1 is a list"
    assert "unknown role 'tool'" in reason(load({field: [{"role": "tool", "content": "x"}]}))


def test_a_long_role_is_named_shortly(load):
    said = reason(load(row(conversations=[ASK, {"from": "x" * 10_000, "value": "y"}])))
    assert said.startswith("unknown role 'xxx") and len(said) < 120


# ------------------------------------------------------------------------------------ images


@pytest.mark.parametrize(
    "changes",
    [
        {"image": ["ok.png"]},
        {"image": [None, "ok.png", ""]},
        {"image": {"path": "ok.png"}},
        {"image": {"path": "ok.png", "bytes": None}},
        {"image": [{"path": "ok.png"}]},
        {"image": None, "images": ["ok.png"]},
    ],
)
def test_the_one_picture_of_a_row_is_used_however_it_is_written(load, changes):
    samples = load(row(**changes))
    assert samples[0]["image"].endswith("/images/ok.png") and reason(samples) == ""


@pytest.mark.parametrize("nothing", ["", [], {}, False, None, float("nan"), [None], {"path": None}])
def test_an_empty_image_is_none(load, nothing):
    samples = load(row(image=nothing))
    assert samples[0]["image"] is None and reason(samples) == "image token without a picture"
    text_only = [{"from": "human", "value": "What?"}, SAY]
    assert reason(load(row(image=nothing, conversations=text_only))) == ""


def encoded_picture():
    buffer = io.BytesIO()
    Image.effect_noise((300, 300), 90).save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


@pytest.mark.parametrize(
    "image, said",
    [
        (["ok.png", "b.png"], "a row has one picture: this one has 2"),
        (True, "no name of a picture: image is true"),
        ([["ok.png"]], "no name of a picture: image is a list"),
        ({"url": "x.png"}, "no name of a picture: image is an object with the keys url"),
        ({"bytes": "aGVsbG8="}, "a picture inside the json: write it to a file"),
        ("https://example.org/x.png", "a URL in place of a name: download the picture"),
        (["s3://bucket/x.png"], "a URL in place of a name: download the picture"),
        (encoded_picture(), "base64 in place of a name: write the picture to a file"),
        ("data:image/png;base64," + encoded_picture(), "base64 in place of a name: write"),
        ("x" * 200_000, "missing picture: /"),
        ("../" + "x" * 200_000, "path outside the images folder: ../xxx"),
    ],
)
def test_any_other_image_is_named_shortly(load, image, said):
    reason_given = reason(load(row(image=image)))
    assert reason_given.startswith(said) and len(reason_given) < 250
