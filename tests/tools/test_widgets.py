"""The widgets without a browser: what they show, and what each control does."""

import io
import json
import subprocess
import sys
import time
from threading import Event
from types import SimpleNamespace

import ipywidgets as w
import numpy as np
import pandas as pd
import pytest
from PIL import Image

from vflan import progress, widgets
from vflan.evaluation import streaming
from vflan.tools.widgets import live_view
from vflan.training import run as training_run

EVIL = "<script>alert('x')</script>"


@pytest.fixture
def png(tmp_path):
    Image.new("RGB", (200, 100), "red").save(tmp_path / "a.png")
    return str(tmp_path / "a.png")


@pytest.fixture
def samples(png):
    def row(task, question):
        turns = [{"from": "human", "value": f"<image>\n{question}"}, {"from": "gpt", "value": EVIL}]
        return {"image": png, "task_name": task, "conversations": turns}

    return [row("color", "first?"), row("color", "second?"), row("shape", "third?")]


def find(box, kind, description=""):
    """The control of a widget of one kind, by its description."""
    controls = [box]
    while controls:
        control = controls.pop(0)
        if isinstance(control, kind) and getattr(control, "description", "") == description:
            return control
        controls += getattr(control, "children", ())
    raise LookupError(f"no {kind.__name__} {description!r}")


def page(box):
    return box.children[-1].value


def wait_until(condition):
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end, "nothing happened within 20 seconds"
        time.sleep(0.01)


def test_importing_the_widgets_needs_no_torch():
    code = "import sys, vflan.tools.widgets; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_model_and_data_text_is_escaped_everywhere(samples, png):
    rows = [{"image": png, "text": EVIL, "label": EVIL, "answer": EVIL}]
    pages = [widgets.task_table(samples).data, widgets.answer_table(rows).data]
    both = {EVIL: rows, "b": [rows[0] | {"reason": EVIL, "right": False}]}
    pages += [
        page(widgets.task_browser(samples)),
        page(widgets.answer_browser(rows)),
        page(widgets.answer_browser(both)),
    ]
    for html in pages:
        assert "<script" not in html and "&lt;script" in html


def test_task_table_counts_each_task_once(samples):
    html = widgets.task_table(pd.DataFrame(samples)).data
    assert (
        html.count("<tr>") == 1 + 2
        and "first?" in html
        and "second?" not in html
        and "&lt;image" not in html
    )


def test_task_browser_shows_the_next_sample_and_begins_a_new_task_at_its_first(samples):
    box = widgets.task_browser(samples)
    task, number = find(box, w.Dropdown, "task"), find(box, w.BoundedIntText, "sample")
    assert "first?" in page(box) and number.max == 2
    find(box, w.Button, "next ▶").click()
    assert "second?" in page(box) and "2 of 2 samples of color" in page(box)
    find(box, w.Button, "next ▶").click()  # after the last comes the first
    assert "first?" in page(box)
    number.value = 2
    task.value = "shape"
    assert "third?" in page(box) and (number.value, number.max) == (1, 1)
    find(box, w.Button, "◀ back").click()
    assert "third?" in page(box)


def test_tasks_are_chosen_by_group_and_category(samples):
    known = pd.DataFrame(
        [
            ("color", "questions", "attributes"),
            ("shape", "questions", "forms"),
            ("other", "captions", "captions"),
        ],
        columns=["task_name", "group", "category"],
    )
    box = widgets.task_browser([*samples, samples[0] | {"task_name": "stray"}], known)
    group, category, task = (find(box, w.Dropdown, name) for name in ("group", "category", "task"))
    assert group.options == ("all", "in no list", "questions") and task.options == (
        "color",
        "shape",
        "stray",
    )
    group.value = "questions"
    assert category.options == ("all", "attributes", "forms") and task.options == ("color", "shape")
    category.value = "forms"
    assert task.options == ("shape",) and "third?" in page(box)
    group.value = "in no list"  # it has no forms, so the category becomes "all"
    assert category.value == "all" and task.options == ("stray",) and "first?" in page(box)


def test_task_browser_shows_tokens_and_the_packed_row_of_a_sample(squares, recipe):
    import vflan

    samples = vflan.load_samples(squares, squares.parent / "images")
    box = widgets.task_browser(samples, recipe=recipe)
    html = page(box)
    assert html.count("#F6C9A8") > 5 and html.count("#BFDDF0") > 2  # learned tokens, pictures
    assert "step" in html and "of 4" in html  # 32 rows, 8 a step
    assert html.count("outline:2px") == 1, "this sample is outlined, and no other"
    broken = widgets.task_browser(
        samples, recipe=vflan.replace(recipe, language_model="runs/nowhere")
    )
    assert "What color is it?" in page(broken) and page(broken).rstrip("</div>p").endswith(")")


def test_each_token_has_the_colour_of_its_role():
    words = SimpleNamespace(decode=lambda ids: {1: "ask", 2: "<b>", 3: "\n"}[ids[0]])
    html = widgets.token_line([1, -200, 3, 2], [-100, -100, -100, 2], words)
    spans = html.split("</div>")[0].split("<span")[1:]
    assert [text.split(">")[1].split("<")[0] for text in spans] == [
        "ask",
        "picture",
        "↵",
        "&lt;b&gt;",
    ]
    colors = [text.split("background:")[1][:7] for text in spans]
    assert colors == ["#EDEDED", "#BFDDF0", "#EDEDED", "#F6C9A8"]


def test_a_missing_picture_is_named(tmp_path):
    for no_image in (None, float("nan"), ""):
        assert widgets.picture(no_image) == "(no picture)"
    assert "cannot open gone.png" in widgets.picture(str(tmp_path / "gone.png"))


def test_answer_browser_filters_and_pages():
    rows = [
        {
            "text": f"q{i}",
            "label": "yes",
            "answer": "Yes." if i % 2 else "no",
            "benchmark": "ab"[i > 5],
        }
        for i in range(12)
    ]
    box = widgets.answer_browser(rows)
    number, show = find(box, w.BoundedIntText, "page"), find(box, w.Dropdown, "show")
    assert number.max == 3 and "12 of 12 questions; right: answer 50%" in page(box)
    find(box, w.Button, "next ▶").click()
    assert number.value == 2 and "q5" in page(box) and "q0" not in page(box)
    find(box, w.Button, "◀ back").click()
    assert number.value == 1 and "q0" in page(box)
    show.value = "wrong"
    assert "6 of 12 questions" in page(box) and "✓" not in page(box)
    find(box, w.Dropdown, "benchmark").value = "a"
    assert "3 of 12 questions" in page(box) and number.max == 1 and show.value == "wrong"
    assert "right" not in rows[0]


def two_runs():
    questions = [
        {"text": f"q{i}", "label": "yes", "category": f"kind{i // 2}", "benchmark": "ab"[i > 3]}
        for i in range(6)
    ]
    rights = {"base": "110100", "chat": "101100"}
    return {
        name: [
            question
            | {"answer": f"{name} on {question['text']}", "reason": f"{name}: since"}
            | {"right": bit == "1"}
            for question, bit in zip(questions, bits)
        ]
        for name, bits in rights.items()
    }


def test_two_runs_are_compared_side_by_side():
    box = widgets.answer_browser(two_runs())
    show, other = find(box, w.Dropdown, "show"), find(box, w.Dropdown, "beside")
    assert (find(box, w.Dropdown, "run").value, other.value) == ("base", "chat")
    assert (
        "base 50%, chat 50%" in page(box)
        and "base on q0" in page(box)
        and "chat: since" in page(box)
    )
    shown = {}
    for verdict in show.options:
        show.value = verdict
        shown[verdict] = [i for i in range(6) if f"base on q{i}" in page(box)]
    assert shown == {"all": [0, 1, 2, 3, 4], "both right": [0, 3], "both wrong": [4, 5],
                     "only base right": [1], "only chat right": [2],
                     "answers differ": [0, 1, 2, 3, 4]}  # fmt: skip
    other.value = "base"
    show.value = "answers differ"
    assert "0 of 6 questions" in page(box), "a run's answers do not differ from themselves"
    assert "only base right" in show.options and "chat on" not in page(box)


def test_the_offered_tasks_are_those_of_the_chosen_benchmark():
    box = widgets.answer_browser(two_runs())
    benchmark, task = find(box, w.Dropdown, "benchmark"), find(box, w.Dropdown, "task")
    assert task.options == ("all", "kind0", "kind1", "kind2")
    task.value = "kind1"
    assert "2 of 6 questions" in page(box)
    benchmark.value = "b"
    assert (
        task.options == ("all", "kind2") and task.value == "all" and "2 of 6 questions" in page(box)
    )


def test_runs_with_different_questions_are_not_compared():
    runs = two_runs()
    with pytest.raises(ValueError, match="base and chat were not asked the same questions"):
        widgets.answer_browser(runs | {"chat": runs["chat"][:-1]})


def test_a_verdict_in_the_row_replaces_the_comparison_of_texts():
    rows = [{"text": "q", "label": "a", "answer": "It is (a), the cat", "right": True}]
    assert "✓" in widgets.answer_table(rows).data


def test_a_sample_without_a_task_is_shown_too(samples):
    samples[1]["task_name"] = None
    assert "second?" in widgets.task_table(samples).data
    find(box := widgets.task_browser(samples), w.Dropdown, "task").value = ""
    assert "second?" in page(box)


def test_runs_of_one_name_are_all_offered(tmp_path):
    places = [tmp_path / place for place in ("first/base", "first/chat", "second/base")]
    runs = [SimpleNamespace(name=place.name, folder=place) for place in places]
    box = widgets.chat(runs, [])  # without a picture
    assert find(box, w.Dropdown, "run").options == (str(places[0]), "chat", str(places[2]))
    for place in places:
        train_some(place, 1)
    html = live_view.loss_page([training_run.Run(place) for place in places])
    assert html.count("<polyline") == 3


# -------------------------------------------------------------------------------- while it trains


def train_some(folder, steps, end=""):
    folder.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(dict(step=i + 1, loss=4 / (i + 1), pictures=8)) for i in range(steps)]
    (folder / "metrics.jsonl").write_text("\n".join([*lines, end]))


def test_the_loss_is_drawn_while_it_trains_and_once_more_at_the_end(tmp_path, monkeypatch):
    shown = []
    monkeypatch.setattr(live_view, "display", shown.append)
    monkeypatch.setattr(progress, "is_watched", lambda: True)
    recipe = SimpleNamespace(folder=tmp_path / "base")
    with widgets.live_loss([recipe], seconds=0.01):
        wait_until(lambda: shown and "waiting for the first step" in shown[0].value)
        train_some(recipe.folder, 3)
        wait_until(lambda: "base: step 3, loss 1.33" in shown[0].value)
        answer = dict(step=4, id="a", task=EVIL, question=EVIL, answer="red", reference="blue")
        (recipe.folder / "samples.jsonl").write_text(json.dumps(answer) + "\n")
        train_some(recipe.folder, 4, '{"step": 99, "lo')  # a line that is half written
        time.sleep(0.1)
        assert "base: step 3" in shown[0].value
        train_some(recipe.folder, 4)
    page = shown[0].value
    assert "base: step 4, loss 1.00" in page and "<b>red</b>" in page and "<script" not in page
    assert page.count("<polyline") == 1 and "NaN" not in page


def test_nothing_is_drawn_where_nobody_watches(monkeypatch, tmp_path):
    monkeypatch.setattr(live_view, "display", lambda _: pytest.fail("a plot for nobody"))
    monkeypatch.setattr(progress, "is_watched", lambda: False)
    with widgets.live_loss([SimpleNamespace(folder=tmp_path / "base")]):
        train_some(tmp_path / "base", 1)


# -------------------------------------------------------------------------------- chat


class Run:
    def __init__(self, name="run"):
        self.name, self.loads = name, 0

    def load_model(self):
        self.loads += 1
        return f"model of {self.name}"

    def processor(self):
        return "processor"


@pytest.fixture
def talk(monkeypatch):
    """Stands in for a model: records the questions, and writes a word, then waits for `go_on`."""
    talk = SimpleNamespace(asked=[], go_on=Event(), looked=[], before=[], begun=[])

    def stream(model, processor, text, image, tokens, temperature, stop, before, begun, ended):
        talk.asked.append((model, processor, text, image, tokens, temperature))
        talk.before.append(before)
        talk.begun.append(begun)
        if "fail" in text:
            raise ValueError("no such thing\nat line 3")
        if "long" in text:
            ended.append("length" if len(begun) < 6 else "stop")
            yield "word "
            return
        try:
            yield EVIL
            while not talk.go_on.wait(0.01):
                if stop.is_set():
                    return
            yield " the end"
        finally:
            stop.set()  # as the real one does

    def maps(model, processor, text, image, before):
        talk.looked.append((model, text))
        return np.full((3, 4, 4), 0.01) * np.arange(1, 4)[:, None, None]  # (layers, side, side)

    monkeypatch.setattr(streaming, "stream", stream)
    monkeypatch.setattr(streaming, "attention_maps", maps)
    monkeypatch.setattr(streaming, "tower_view", lambda *_: Image.new("RGB", (48, 48), "blue"))
    return talk


def conversation(box):
    return box.children[2].children[1].value


def view(box):
    return box.children[2].children[0].value


def ask(box, text, wait=True):
    send = find(box, w.Button, "ask")
    next(c for c in box.children[-1].children if isinstance(c, w.Text)).value = text
    send.click()
    if wait:
        wait_until(lambda: not send.disabled)


def test_chat_asks_the_run_and_shows_the_whole_conversation(talk, png):
    talk.go_on.set()
    run = Run()
    box = widgets.chat(run, png, max_new_tokens=9)
    find(box, w.FloatSlider, "temperature").value = 0.7
    ask(box, "  ")
    assert talk.asked == []  # nothing was asked
    for text in ("what?", "fail"):
        ask(box, text)
    assert talk.asked == [
        ("model of run", "processor", text, png, 9, 0.7) for text in ("what?", "fail")
    ]
    assert run.loads == 1 and find(box, w.Button, "stop").disabled
    assert (
        "what?" in conversation(box)
        and "&lt;script" in conversation(box)
        and "<script" not in conversation(box)
    )
    assert (
        "(no such thing)" in conversation(box)
        and "line 3" not in conversation(box)
        and "the end" in conversation(box)
    )


def test_an_answer_is_shown_while_it_is_written_and_can_be_stopped(talk, png):
    box = widgets.chat(Run(), png)
    ask(box, "what?", wait=False)
    wait_until(lambda: "alert" in conversation(box))
    send, stop = find(box, w.Button, "ask"), find(box, w.Button, "stop")
    assert send.disabled and not stop.disabled
    ask(box, "one more?", wait=False)
    stop.click()
    wait_until(lambda: not send.disabled)
    assert "the end" not in conversation(box) and len(talk.asked) == 1 and stop.disabled
    talk.go_on.set()
    ask(box, "again?")  # an old stop does not end a new answer
    assert "the end" in conversation(box)


def test_a_run_is_loaded_when_it_is_asked_and_the_one_before_is_freed(talk, png):
    talk.go_on.set()
    first, second = Run("base"), Run("chat")
    box = widgets.chat([first, second], png)
    for name in ("base", "chat", "chat", "base"):
        find(box, w.Dropdown, "run").value = name
        ask(box, "what?")
    assert [model for model, *_ in talk.asked] == [
        f"model of {n}" for n in ("base", "chat", "chat", "base")
    ]
    assert (first.loads, second.loads) == (2, 1)
    assert (
        conversation(box).count("<b>base</b>") == 2 and conversation(box).count("<b>chat</b>") == 2
    )


def test_a_run_reads_its_earlier_answers_only_with_remember(talk, png):
    talk.go_on.set()
    box = widgets.chat([Run("base"), Run("chat")], [png, png])
    remember, run, answer = (
        find(box, w.Checkbox, "remember"),
        find(box, w.Dropdown, "run"),
        f"{EVIL} the end",
    )
    ask(box, "one?")
    ask(box, "two?")
    assert talk.before == [[], []]
    remember.value = True
    ask(box, "fail")  # a failed question is not remembered
    ask(box, "three?")
    assert talk.before[2:] == [[("one?", answer), ("two?", answer)]] * 2
    run.value = "chat"
    ask(box, "four?")
    assert talk.before[-1] == [], "this run has not answered yet"
    run.value = "base"
    find(box, w.Button, "another picture").click()
    ask(box, "five?")
    assert talk.before[-1] == [], "another picture, another conversation"


def test_the_picture_is_the_next_one_or_an_upload(talk, png):
    talk.go_on.set()
    box = widgets.chat(Run(), [png, Image.new("RGB", (48, 48), "blue")])
    first = view(box)
    ask(box, "what?")
    find(box, w.Button, "another picture").click()
    assert view(box) != first and "what?" not in conversation(box), (
        "another picture, another conversation"
    )
    find(box, w.Button, "another picture").click()
    assert view(box) == first
    upload, buffer = find(box, w.FileUpload, "own picture"), io.BytesIO()
    Image.new("RGBA", (20, 20), "green").save(buffer, "PNG")
    file = dict(
        name=EVIL,
        type="image/png",
        size=9,
        last_modified=pd.Timestamp(0),
        content=memoryview(buffer.getvalue()),
    )
    upload.value = (file,)
    ask(box, "and this?")
    assert talk.asked[-1][3].getpixel((0, 0)) == (0, 128, 0) and "<script" not in view(box)
    upload.value = (file | {"name": "a.txt", "content": memoryview(b"no picture")},)
    assert "a.txt is no picture that can be opened" in view(box) and "(no picture)" in view(box)
    buffer = io.BytesIO()
    Image.new("1", (9000, 9000)).save(buffer, "PNG")
    upload.value = (file | {"name": "b.png", "content": memoryview(buffer.getvalue())},)
    assert "b.png is no picture that can be opened" in view(box)
    before = len(talk.asked)
    ask(box, "and now?")
    assert len(talk.asked) == before and "There is no picture to ask about" in view(box)
    find(box, w.Checkbox, "text only").value = True
    ask(box, "without one?")
    assert talk.asked[-1][2:4] == ("without one?", None)


def test_attention_is_shown_for_each_layer(talk, png):
    talk.go_on.set()
    box = widgets.chat(Run(), png)
    look, layer = find(box, w.Checkbox, "where it looks"), find(box, w.Dropdown, "layer")
    look.value = True
    assert talk.looked == [] and layer.disabled  # nothing was asked yet
    ask(box, "what?")
    assert talk.looked == [("model of run", "what?")] and layer.options == ("mean", 1, 2, 3)
    assert "32% of its attention" in view(box)
    layer.value = 3
    assert "48% of its attention" in view(box)
    look.value = False
    assert "attention" not in view(box) and layer.disabled


def test_enter_sends_the_question(talk, png):
    talk.go_on.set()
    box = widgets.chat(Run(), png)
    field = next(c for c in box.children[-1].children if isinstance(c, w.Text))
    field.value = "what?"
    field._handle_string_msg(field, {"event": "submit"}, [])  # as the browser reports Enter
    wait_until(lambda: not find(box, w.Button, "ask").disabled)
    assert [question for _, _, question, *_ in talk.asked] == ["what?"] and field.value == ""


def test_a_cut_answer_is_marked_and_goes_on_from_its_last_word(talk, png):
    talk.go_on.set()
    box = widgets.chat(Run(), png)
    go_on = find(box, w.Button, "continue")
    ask(box, "a long one?")
    assert "word … (cut at the limit" in conversation(box) and not go_on.disabled
    for _ in range(2):
        go_on.click()
        wait_until(lambda: not find(box, w.Button, "ask").disabled)
    assert talk.begun == ["", "word ", "word word "] and go_on.disabled
    assert "word word word" in conversation(box) and "cut at" not in conversation(box)
    ask(box, "what?")
    assert go_on.disabled and "cut at" not in conversation(box).rpartition("what?")[2]


def test_two_runs_answer_the_same_question_side_by_side(talk, png):
    talk.go_on.set()
    first, second = Run("base"), Run("chat")
    box = widgets.chat([first, second, Run("third")], png)
    find(box, w.Dropdown, "beside").value = "chat"
    for question in ("one?", "two?"):
        ask(box, question)
    assert [model for model, *_ in talk.asked] == ["model of base", "model of chat"] * 2
    assert (first.loads, second.loads) == (1, 1), "both stay loaded while both are chosen"
    text = conversation(box)
    assert text.count("<b>you</b>") == text.count("<b>base</b>") == text.count("<b>chat</b>") == 2
    assert text.count("the end") == 4
    talk.go_on.clear()
    ask(box, "three?", wait=False)
    wait_until(lambda: len(talk.asked) == 5)
    find(box, w.Button, "stop").click()
    wait_until(lambda: not find(box, w.Button, "ask").disabled)
    assert len(talk.asked) == 5, "after a stop the other run is not asked"
    text = conversation(box)
    assert text.index("one?") < text.index("<b>base</b>") < text.index("<b>chat</b>")


def test_a_map_in_frames_leaves_the_colours_inside_visible():
    weights = np.zeros((4, 4))
    weights[1, 2], weights[0, 0] = 0.2, 0.1
    blue = Image.new("RGB", (48, 48), "blue")
    pixels = np.asarray(widgets.heat_map(blue, weights, side=80)).astype(int)
    is_orange = (pixels == (0xD5, 0x5E, 0)).all(2).reshape(4, 20, 4, 20).sum((1, 3))
    assert is_orange.argmax() == 6 and 0 < is_orange[0, 0] < is_orange[1, 2] < 400
    assert (np.delete(is_orange.ravel(), [0, 6]) == 0).all()
    centres = pixels[10::20, 10::20].reshape(-1, 3)
    assert (centres == (0, 0, 255)).all()


def test_a_heat_map_covers_the_strongest_patch_most():
    weights = np.zeros((4, 4))
    weights[1, 2], weights[0, 0] = 0.2, 0.1
    white = Image.new("RGB", (48, 48), "white")
    pixels = np.asarray(widgets.heat_map(white, weights, 80, "overlay")).astype(int)  # (80, 80, 3)
    distance = 255 * 3 - pixels.sum(2)  # from white
    patches = distance.reshape(4, 20, 4, 20).mean((1, 3))
    assert patches.argmax() == 6 and 0 < patches[0, 0] < patches[1, 2]
    assert (np.delete(patches.ravel(), [0, 6]) == 0).all()
    assert widgets.heat_map(Image.new("RGB", (48, 48)), np.zeros((2, 2))).size == (240, 240)
