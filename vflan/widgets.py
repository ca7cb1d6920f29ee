"""Three small widgets for looking around: tasks, answers, a chat. Beside each stands the static table it is made of.

The tables are plain HTML and show on GitHub and in print; a widget lives only while a kernel runs. Rows are
a DataFrame, a `datasets.Dataset` or a list of dicts; all text is escaped, since it comes from data and models.
"""

import base64
import io
from html import escape
from pathlib import Path

import ipywidgets as w
import pandas as pd
from datasets import Dataset
from IPython.display import HTML

from vflan.mixtures import rows_by_task
from vflan.pictures import read_picture

CELL = 'style="text-align:left;vertical-align:top;max-width:32em;white-space:pre-wrap"'


def _frame(rows):
    return rows.to_pandas() if hasattr(rows, "to_pandas") else pd.DataFrame(rows).reset_index(drop=True)


def _tasks(samples):
    """The samples, to be taken by number, and {task: row numbers}; a large Dataset stays on disk."""
    if isinstance(samples, Dataset):
        return samples, rows_by_task(samples)
    frame = _frame(samples)
    return frame.to_dict("records"), frame.groupby("task_name", sort=False).indices


def _is_path(image):
    return isinstance(image, (str, Path)) and bool(str(image))


def picture(path, side=96):
    """An <img> of the picture, at most `side` pixels; a few words where there is none (text-only rows, lost files)."""
    if not _is_path(path):
        return "(no picture)"
    try:
        image = read_picture(path)
    except OSError:
        return f"(cannot open {escape(Path(path).name)})"
    if max(image.size) > side:
        image.thumbnail((side, side))
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    data = base64.b64encode(buffer.getvalue()).decode()
    return f'<img width="{side}" src="data:image/png;base64,{data}" alt="{escape(Path(path).name)}">'


def table(columns, rows):
    """An HTML table; `rows` hold cells that are HTML already."""
    head = "".join(f"<th {CELL}>{escape(column)}</th>" for column in columns)
    body = "".join("<tr>" + "".join(f"<td {CELL}>{cell}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _said(conversations):
    turns = [(str(turn["from"]), str(turn["value"]).replace("<image>", "").strip()) for turn in conversations]
    return "\n".join(f"<b>{escape(who)}</b> {escape(text)}" for who, text in turns)


def task_table(samples, limit=None):
    """One row a task: its name, its number of samples, and its first sample. Needs image, task_name, conversations."""
    samples, tasks = _tasks(samples)
    rows = []
    for name, numbers in list(tasks.items())[:limit]:
        first = samples[int(numbers[0])]
        said = _said(first["conversations"])
        rows.append((escape(str(name)), f"{len(numbers):,}", picture(first.get("image")), said))
    return HTML(table(("task", "samples", "picture", "first sample"), rows))


def task_browser(samples):
    """Choose a task and leaf through its samples."""
    samples, tasks = _tasks(samples)
    task = w.Dropdown(options=sorted(tasks), description="task", layout=w.Layout(width="32em"))
    number = w.IntSlider(min=1, max=1, description="sample", continuous_update=False)
    page = w.HTML()

    def show(_=None):
        numbers = tasks[task.value]
        number.max = len(numbers)
        row = samples[int(numbers[number.value - 1])]
        said = _said(row["conversations"])
        page.value = table(("picture", "conversation"), [(picture(row.get("image"), 240), said)])

    def first(_):
        number.value = 1
        show()

    task.observe(first, "value")
    number.observe(show, "value")
    show()
    return w.VBox([w.HBox([task, number]), page])


def _right(row):
    """The row's own verdict where it brings one (`right`), else label and answer compared as bare words."""
    if "right" in row and not pd.isna(row["right"]):
        return bool(row["right"])
    return str(row["label"]).strip(" .").lower() == str(row["answer"]).strip(" .").lower()


def _answer_rows(frame, side=96):
    for _, row in frame.iterrows():
        texts = [escape(str(row[name])) for name in ("text", "label", "answer")]
        yield (picture(row.get("image"), side), *texts, "✓" if _right(row) else "✗")


def answer_table(rows, limit=8):
    """Questions, labels, answers and a verdict each. Needs text, label, answer; image, right, benchmark if at hand."""
    return HTML(table(("picture", "question", "label", "answer", ""), _answer_rows(_frame(rows).head(limit))))


def answer_browser(rows, page_size=5):
    """Leaf through answers by benchmark (or run), all of them or only the wrong ones."""
    frame = _frame(rows)
    frame["right"] = [_right(row) for _, row in frame.iterrows()]
    by = next((name for name in ("benchmark", "run") if name in frame), None)
    options = ["all", *sorted(frame[by].astype(str).unique())] if by else ["all"]
    group = w.Dropdown(options=options, description=by or "answers")
    wrong = w.Checkbox(description="only wrong ones")
    number = w.BoundedIntText(value=1, min=1, max=1, description="page")
    page = w.HTML()

    def show(_=None):
        shown = frame if group.value == "all" else frame[frame[by].astype(str) == group.value]
        shown = shown[~shown["right"]] if wrong.value else shown
        number.max = max(1, -(-len(shown) // page_size))
        start = (number.value - 1) * page_size
        rows = _answer_rows(shown.iloc[start : start + page_size])
        page.value = f"<p>{len(shown):,} answers</p>" + table(("picture", "question", "label", "answer", ""), rows)

    for control in (group, wrong, number):
        control.observe(show, "value")
    show()
    return w.VBox([w.HBox([group, wrong, number]), page])


def chat_table(turns, image=None):
    """Questions and answers about one picture: `turns` is a list of (question, answer)."""
    lines = "\n\n".join(f"<b>you</b> {escape(str(q))}\n<b>model</b> {escape(str(a))}" for q, a in turns)
    return HTML(table(("picture", "chat"), [(picture(image, 240), lines)]))


def chat(run, image=None, max_new_tokens=64):
    """Ask a finished run about a picture; each question stands alone, as in training on one-turn tasks.

    The model is loaded at the first question. A question that fails shows the error's sentence instead of an answer.
    """
    question = w.Text(placeholder="ask about the picture", continuous_update=False, layout=w.Layout(width="32em"))
    send = w.Button(description="ask")
    page = w.HTML(chat_table([], image).data)
    turns, loaded = [], []

    def ask(_=None):
        text = question.value.strip()
        if not text:
            return
        send.disabled = True
        try:
            import vflan

            if not loaded:
                loaded.extend((run.load_model(), run.processor()))
            row = {"image": None if image is None else str(image), "text": text}
            reply = vflan.answer(*loaded, [row], max_new_tokens=max_new_tokens)[0]
        except (OSError, ValueError, RuntimeError) as error:
            reply = f"({error})"
        finally:
            send.disabled = False
        turns.append((text, reply))
        page.value = chat_table(turns, image).data
        question.value = ""

    send.on_click(ask)
    return w.VBox([page, w.HBox([question, send])])
