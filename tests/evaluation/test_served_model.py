"""A model behind an endpoint answers the benchmarks: same questions, same cache, same scores."""

import base64
import io
import json
import threading
import time
import zipfile

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from chat_server import KEY, said, serve  # noqa: F401 (serve is a fixture)
from PIL import Image
from tiny_model import TinyRun, lines, make_tiny, write_pope

from vflan.evaluation.evaluator import evaluate
from vflan.evaluation.served_model import ServedModel, messages


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A project folder of its own, with POPE in `benchmarks`."""
    monkeypatch.setattr("vflan.config.ROOT", tmp_path)
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    make_tiny(pictures)
    write_pope(tmp_path / "benchmarks", pictures)
    return tmp_path


MODEL = ServedModel("org/llava-13b", workers=4, timeout=5, retries=1)


def ask(model=MODEL, **more):
    return evaluate(None, "pope", folder="benchmarks", model=model, **more)


def answer_yes_to_stars(body, number):
    return said("Yes" if "star" in str(body["messages"][0]["content"][-1]) else "No")


def test_a_served_model_is_scored_like_any_other_and_its_answers_are_cached(home, serve):
    server = serve(answer_yes_to_stars)
    scores = ask()
    assert set(scores.run) == {"org-llava-13b"} and scores.set_index("metric").value["f1"] == 100
    assert server.keys == {f"Bearer {KEY}"} and len(server.asked) == 12
    header, rows = lines(home / "runs/served/org-llava-13b/answers/pope.jsonl")
    assert (
        header["model"].startswith("org/llava-13b at endpoint ")
        and header["template"] == "the server's"
    )
    assert len(rows) == 12 and {row["finish"] for row in rows} == {"stop"}
    pd.testing.assert_frame_equal(ask(), scores)
    assert len(server.asked) == 12, "cached answers are not requested again"
    assert len(pd.read_csv(home / "runs/served/org-llava-13b/scores.csv")) == len(scores)


def test_neither_key_nor_address_is_written_down(home, serve, capfd):
    server = serve(lambda body, n: (400, {"error": {"message": f"{KEY} {server.url}"}}))
    with pytest.raises(ValueError, match="pope: no question was answered") as refusal:
        ask()
    out, refusal = capfd.readouterr(), str(refusal.value)
    kept = "".join(path.read_text() for path in (home / "runs").rglob("*") if path.is_file())
    assert "secret" not in kept + out.out + out.err + refusal
    assert "127.0.0.1" not in kept + out.out + refusal


def test_the_pictures_file_is_sent_unchanged_and_before_the_text(home, serve):
    server = serve(answer_yes_to_stars)
    ask()
    body = next(
        b for b in server.asked if b["messages"][0]["content"][1]["text"] == "is there a star ?"
    )
    picture, text = body["messages"][0]["content"]
    assert (
        body["temperature"] == 0 and body["max_tokens"] == 16 and body["model"] == "org/llava-13b"
    )
    kind, data = picture["image_url"]["url"].split(";base64,")
    assert kind == "data:image/png" and text["type"] == "text"
    assert Image.open(io.BytesIO(base64.b64decode(data))).size == (48, 48)


def encoded(kind):
    """The bytes of a picture in a file format of Pillow's."""
    file = io.BytesIO()
    Image.new("RGB", (4, 3), "red").save(file, kind)
    return file.getvalue()


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
@pytest.mark.parametrize("place", ["zip", "parquet", "folder"])
def test_a_picture_in_a_zip_or_parquet_file_is_sent_too(tmp_path, place, kind):
    """The kind is that of the bytes: a name in a zip may be wrong, and a row has none."""
    data = encoded(kind)
    if place == "zip":
        with zipfile.ZipFile(tmp_path / "pictures.zip", "w") as archive:
            archive.writestr("pictures/a.gif", data)
        name = f"{tmp_path}/pictures.zip::pictures/a.gif"
    elif place == "parquet":
        pq.write_table(pa.table({"image": [b"", data]}), tmp_path / "part.parquet")
        name = f"{tmp_path}/part.parquet::1"
    else:
        (tmp_path / "a.gif").write_bytes(data)
        name = f"{tmp_path}/a.gif"
    picture, text = messages({"text": "what ?", "image": name})[0]["content"]
    kind, sent = picture["image_url"]["url"].split(";base64,")
    assert base64.b64decode(sent) == data and text == {"type": "text", "text": "what ?"}
    assert kind == f"data:image/{Image.open(io.BytesIO(data)).format.lower()}"


@pytest.mark.parametrize("name", ["pictures.zip::b.png", "none.zip::a.png", "broken.zip::a.png"])
def test_a_picture_that_a_zip_does_not_hold_is_not_sent(tmp_path, name):
    with zipfile.ZipFile(tmp_path / "pictures.zip", "w") as archive:
        archive.writestr("a.png", encoded("PNG"))
    (tmp_path / "broken.zip").write_bytes(b"no zip")
    with pytest.raises(OSError, match="^(missing|undecodable|truncated) picture"):
        messages({"text": "what ?", "image": f"{tmp_path}/{name}"})


def test_a_question_without_a_picture_is_text_alone():
    assert messages({"text": "why ?", "image": None})[0]["content"] == [
        {"type": "text", "text": "why ?"}
    ]


def test_answers_that_were_cut_say_so(home, serve):
    serve(lambda body, n: said("Yes and", finish="length"))
    ask()
    assert {
        row["finish"] for row in lines(home / "runs/served/org-llava-13b/answers/pope.jsonl")[1]
    } == {"length"}


def test_an_empty_answer_is_an_answer(home, serve):
    serve(lambda body, n: said(None))
    assert set(ask().problems) == {0}


def test_questions_are_asked_at_the_same_time(home, serve):
    together, lock, most = [0], threading.Lock(), [0]

    def slow(body, n):
        with lock:
            together[0] += 1
            most[0] = max(most[0], together[0])
        time.sleep(0.03)
        with lock:
            together[0] -= 1
        return said("Yes")

    serve(slow)
    ask()
    assert 1 < most[0] <= MODEL.workers


def test_what_failed_is_counted_and_asked_again_next_time(home, serve):
    server = serve(
        lambda body, n: (500, {}) if "blue" in str(body) else answer_yes_to_stars(body, n)
    )
    assert set(ask().problems) == {3}
    server.reply = answer_yes_to_stars
    before = len(server.asked)
    scores = ask()
    assert set(scores.problems) == {0} and scores.set_index("metric").value["f1"] == 100
    assert len(server.asked) == before + 3


def test_a_broken_picture_is_not_sent(home, serve):
    (home / "pictures" / "2.png").write_bytes(b"no picture")
    server = serve(answer_yes_to_stars)
    assert set(ask().problems) == {2} and len(server.asked) == 10
    rows = lines(home / "runs/served/org-llava-13b/answers/pope.jsonl")[1]
    assert {row["reason"].split(":")[0] for row in rows if row["finish"] == "error"} == {
        "undecodable picture"
    }


def test_an_endpoint_that_goes_down_stops_the_evaluation_and_answers_stay_cached(
    home, serve, monkeypatch
):
    server = serve(lambda body, n: answer_yes_to_stars(body, n) if n <= 4 else (500, {}))
    with pytest.raises(ConnectionError, match="failed 8 times in a row"):
        ask(ServedModel("org/llava-13b", workers=1, retries=0))
    server.reply = answer_yes_to_stars
    assert ask().set_index("metric").value["f1"] == 100 and set(ask().problems) == {0}


def test_answers_of_another_server_are_refused(home, serve, monkeypatch):
    serve(answer_yes_to_stars)
    ask()
    monkeypatch.setenv("OPENAI_BASE_URL", "http://127.0.0.1:1/other")
    with pytest.raises(ValueError, match="answers of another model"):
        ask()


def test_a_run_may_be_asked_through_a_server_under_its_own_folder(home, serve):
    run = TinyRun(home, make_tiny(home))
    serve(answer_yes_to_stars)
    scores = evaluate(run, "pope", model=MODEL)
    assert set(scores.run) == {"org-llava-13b"} and run.loaded == 0
    assert (home / "answers/org-llava-13b/pope.jsonl").exists()


def test_a_key_that_an_answer_repeats_is_not_written_down(home, serve, capfd):
    serve(lambda body, n: said(f"Yes {KEY}"))
    ask()
    kept = "".join(path.read_text() for path in (home / "runs").rglob("*") if path.is_file())
    assert "Yes ..." in kept and "secret" not in kept + "".join(capfd.readouterr())


def test_pictures_are_not_sent_to_another_host(home, serve):
    other = serve(answer_yes_to_stars)
    serve(lambda body, n: (308, {}, {"Location": f"{other.url}/chat/completions"}))
    with pytest.raises(ValueError, match="redirects to another host"):
        ask()
    assert other.asked == []


def test_a_slow_and_an_endless_answer_are_problems_of_their_questions(home, serve):
    def slow(write):
        write(b"HTTP/1.1 200 OK\r\nX-Slow: ")
        for _ in range(100):
            time.sleep(0.05)
            write(b"x")

    long = json.dumps(said("x" * (9 << 20)))
    odd = {"is there a blue ?": slow, "is there a star ?": long}
    serve(lambda body, n: odd.get(body["messages"][0]["content"][1]["text"], said("No")))
    start = time.monotonic()
    assert set(ask(ServedModel("org/llava-13b", timeout=1, retries=0)).problems) == {6}
    assert time.monotonic() - start < 15
    rows = lines(home / "runs/served/org-llava-13b/answers/pope.jsonl")[1]
    assert {row["reason"] for row in rows if row["finish"] == "error"} == {
        "refused: the reply has more than 8 MB, unpacked",
        "APITimeoutError: Request timed out.",
    }


def test_a_served_model_cannot_be_asked_in_one_pass(home):
    with pytest.raises(ValueError, match="answers in full: leave one_pass out"):
        ask(one_pass=True)


def test_a_served_model_is_not_shared_among_processes(home):
    with pytest.raises(ValueError, match="raise its `workers` instead"):
        ask(num_processes=2)
