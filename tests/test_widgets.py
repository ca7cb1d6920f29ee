"""The widgets, without a browser: what they show, that text is escaped, and that they answer to their controls."""

import subprocess
import sys

import pandas as pd
import pytest
from PIL import Image

from vflan import widgets

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


def controls(box):
    return box.children[0].children, box.children[1]


def test_the_module_needs_no_torch():
    code = "import sys, vflan.widgets; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_model_and_data_text_is_escaped_everywhere(samples, png):
    rows = [{"image": png, "text": EVIL, "label": EVIL, "answer": EVIL}]
    pages = [widgets.task_table(samples).data, widgets.answer_table(rows).data]
    pages += [widgets.task_browser(samples).children[1].value, widgets.answer_browser(rows).children[1].value]
    pages += [widgets.chat_table([(EVIL, EVIL)], png).data]
    for page in pages:
        assert "<script" not in page and "&lt;script" in page


def test_task_table_counts_each_task_once(samples):
    page = widgets.task_table(pd.DataFrame(samples)).data
    assert page.count("<tr>") == 1 + 2 and "first?" in page and "second?" not in page and "&lt;image" not in page


def test_task_browser_leafs_and_returns_to_the_first_sample_of_a_new_task(samples):
    (task, number), page = controls(widgets.task_browser(samples))
    assert "first?" in page.value and number.max == 2
    number.value = 2
    assert "second?" in page.value
    task.value = "shape"
    assert "third?" in page.value and (number.value, number.max) == (1, 1)


def test_rows_without_a_picture_and_lost_pictures_are_said(tmp_path):
    for nothing in (None, float("nan"), ""):
        assert widgets.picture(nothing) == "(no picture)"
    assert "cannot open gone.png" in widgets.picture(str(tmp_path / "gone.png"))


def test_answer_browser_filters_and_pages():
    rows = [
        {"text": f"q{i}", "label": "yes", "answer": "Yes." if i % 2 else "no", "benchmark": "ab"[i > 5]}
        for i in range(12)
    ]
    (group, wrong, number), page = controls(widgets.answer_browser(rows))
    assert number.max == 3 and "12 answers" in page.value
    wrong.value = True
    assert "6 answers" in page.value and "✓" not in page.value
    group.value = "a"
    assert "3 answers" in page.value and number.max == 1
    assert "right" not in rows[0]


def test_a_rows_own_verdict_wins_over_the_comparison():
    rows = [{"text": "q", "label": "a", "answer": "It is (a), the cat", "right": True}]
    assert "✓" in widgets.answer_table(rows).data


def test_chat_asks_the_run_and_keeps_the_conversation(monkeypatch, png):
    import vflan

    class Run:
        loads = 0

        def load_model(self):
            self.loads += 1
            return "model"

        def processor(self):
            return "processor"

    asked = []

    def answer(model, processor, rows, max_new_tokens):
        asked.append((model, processor, rows[0]["image"], rows[0]["text"]))
        if "fail" in rows[0]["text"]:
            raise ValueError("no such picture")
        return [EVIL]

    monkeypatch.setitem(vars(vflan), "answer", answer)
    run = Run()
    box = widgets.chat(run, png)
    page, (question, send) = box.children[0], box.children[1].children
    send.click()
    assert asked == []  # nothing was asked
    for text in ("what?", "fail"):
        question.value = text
        send.click()
    assert asked == [("model", "processor", png, "what?"), ("model", "processor", png, "fail")]
    assert run.loads == 1 and question.value == "" and not send.disabled
    assert "what?" in page.value and "&lt;script" in page.value and "(no such picture)" in page.value
