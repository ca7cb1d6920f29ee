"""Three small widgets for looking around: tasks, answers, a chat. Beside each stands the static table it is made of.

The tables are plain HTML and show on GitHub and in print; a widget lives only while a kernel runs. Rows are
a DataFrame, a `datasets.Dataset` or a list of dicts; all text is escaped, since it comes from data and models.
"""

import base64
import io
from html import escape
from itertools import groupby
from pathlib import Path
from threading import Event, Thread
from types import SimpleNamespace

import ipywidgets as w
import numpy as np
import pandas as pd
from datasets import Dataset
from IPython.display import HTML
from PIL import Image

from vflan.analysis.plots import TOKEN_COLORS
from vflan.data.images import read_picture
from vflan.data.mixture import rows_by_task

CELL = 'style="text-align:left;vertical-align:top;max-width:32em;white-space:pre-wrap"'
LINE = "border:solid color-mix(in srgb, currentColor 18%, transparent)"  # seen in light and dark themes alike
_LABEL = {"description_width": "initial"}  # as wide as its words
GOOD, POOR = "#009E73", "#D55E00"


def _frame(rows):
    return (
        rows.to_pandas()
        if hasattr(rows, "to_pandas")
        else pd.DataFrame(rows).reset_index(drop=True)
    )


def _tasks(samples):
    """The samples, to be taken by number, and {task: row numbers}; a large Dataset stays on disk."""
    if isinstance(samples, Dataset):
        return samples, rows_by_task(samples)
    frame = _frame(samples)
    return frame.to_dict("records"), frame.groupby("task_name", sort=False).indices


def picture(image, side=96):
    """An <img> of a path or PIL picture, `side` pixels wide; a few words where there is none (text-only rows, lost files)."""
    if not isinstance(image, (str, Path, Image.Image)) or not str(image):
        return "(no picture)"
    name = escape(Path(image).name) if isinstance(image, (str, Path)) else "picture"
    try:
        image = image.copy() if isinstance(image, Image.Image) else read_picture(image)
    except OSError:
        return f"(cannot open {name})"
    hard = ' style="image-rendering:pixelated"' if max(image.size) < side else ""
    if max(image.size) > side:
        image.thumbnail((side, side))
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    data = base64.b64encode(buffer.getvalue()).decode()
    return f'<img width="{side}"{hard} src="data:image/png;base64,{data}" alt="{name}">'


def table(columns, rows):
    """An HTML table; `rows` hold cells that are HTML already."""
    head = "".join(f"<th {CELL}>{escape(column)}</th>" for column in columns)
    body = "".join(
        "<tr>" + "".join(f"<td {CELL}>{cell}</td>" for cell in row) + "</tr>" for row in rows
    )
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _page(html):
    """HTML of a widget: text as wide as one likes to read, lines close together."""
    return f'<div style="line-height:1.45;max-width:60em">{html}</div>'


def _beside(image, text):
    """A picture and, to the right of it (below it where there is no room), HTML."""
    left = f'<div style="flex:none">{image}</div>'
    return f'<div style="display:flex;flex-wrap:wrap;gap:18px">{left}<div style="flex:1;min-width:18em">{text}</div></div>'


def _choice(options, name, width="16em"):
    return w.Dropdown(options=options, description=name, layout=w.Layout(width=width), style=_LABEL)


def _number(name):
    return w.BoundedIntText(
        value=1, min=1, max=1, description=name, layout=w.Layout(width="9em"), style=_LABEL
    )


def _row(*controls):
    return w.HBox(controls, layout=w.Layout(flex_flow="row wrap", grid_gap="2px 14px"))


def _button(text, **more):
    return w.Button(description=text, layout=w.Layout(width="auto"), **more)


# ---------------------------------------------------------------------------------------------------------------- tasks


def _said(conversations):
    turns = [
        (str(turn["from"]), str(turn["value"]).replace("<image>", "").strip())
        for turn in conversations
    ]
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


def token_line(ids, labels, tokenizer, image_token=-200):
    """A conversation token by token as HTML, in the colours of plots.tokens: learned, only read, picture."""
    boxes = []
    for kind, run in groupby(zip(ids, labels), lambda pair: _kind(*pair, image_token)):
        texts = (
            ["picture"] if kind == "picture" else [tokenizer.decode([token]) for token, _ in run]
        )
        boxes += [
            (kind, text.replace("\n", "↵").replace("\t", "⇥").strip(" ") or "·") for text in texts
        ]
    style = "display:inline-block;color:#222;margin:0 2px 2px 0;padding:0 3px;border-radius:2px;line-height:1.35"
    style += ";white-space:pre-wrap;font:12px monospace"
    spans = [
        f'<span style="{style};background:{TOKEN_COLORS[kind]}">{escape(text)}</span>'
        for kind, text in boxes
    ]
    legend = "".join(
        f'<span style="{style};background:{c}">{kind}</span> ' for kind, c in TOKEN_COLORS.items()
    )
    return f"<div>{''.join(spans)}</div><div style='margin-top:4px;opacity:.8'>{legend}</div>"


def _kind(token, label, image_token):
    return "learned" if label >= 0 else "picture" if token == image_token else "only read"


def packed_rows(rows, chosen, image_token):
    """Packed rows as bars of HTML, as plots.packed_rows draws them: rows of (number, ids, labels), `chosen` is not pale."""
    widest, bars = max(sum(len(ids) for _, ids, _ in row) for row in rows), []
    for row in rows:
        bar = ""
        for number, ids, labels in row:
            runs = [
                (k, len(list(g)))
                for k, g in groupby(_kind(*pair, image_token) for pair in zip(ids, labels))
            ]
            cells = "".join(
                f'<i style="flex:{n} 0 0;background:{TOKEN_COLORS[k]}"></i>' for k, n in runs
            )
            mark = f"outline:2px solid {POOR};z-index:1" if number == chosen else "opacity:.55"
            bar += (
                f'<span style="display:flex;flex:{len(ids)} 0 0;min-width:0;{mark}">{cells}</span>'
            )
        left = widest - sum(len(ids) for _, ids, _ in row)
        stripes = "repeating-linear-gradient(45deg,transparent 0 4px,#8A8A8A66 4px 5px)"
        bar += f'<span style="flex:{left} 0 0;background:{stripes}"></span>' if left else ""
        bars.append(f'<div style="display:flex;gap:2px;height:14px;margin:4px 0">{bar}</div>')
    return "".join(bars)


def task_browser(samples, tasks=None, recipe=None):
    """Choose a task and leaf through its samples.

    tasks: a DataFrame with task_name, group and category, to choose by these first. recipe: a Recipe, by whose tokenizer
    and template a sample is shown token by token, and in the packed row where a training on these samples reads it.
    """
    samples, numbers = _tasks(samples)
    known = pd.DataFrame({"task_name": list(numbers)})
    columns = [] if tasks is None else ["group", "category"]
    if columns:
        known = known.merge(_frame(tasks).drop_duplicates("task_name"), "left", "task_name")
        known[columns] = known[columns].replace("", pd.NA).fillna("in no list")
    choices = {
        name: _choice(["all", *sorted(known[name].unique())], name, "20em") for name in columns
    }
    task = _choice(sorted(numbers), "task", "26em")
    number = _number("sample")
    back, on = (
        _button("◀ back", tooltip="previous sample"),
        _button("next ▶", tooltip="next sample"),
    )
    page, tokenizers = w.HTML(), []

    def narrow(_=None):
        fits = np.ones(len(known), bool)
        for (
            name,
            choice,
        ) in choices.items():  # the group decides which categories there are, both which tasks
            possible = ["all", *sorted(known[name][fits].unique())]
            choice.options, choice.value = (
                possible,
                choice.value if choice.value in possible else "all",
            )
            fits &= (known[name] == choice.value) | (choice.value == "all")
        left = sorted(known.task_name[fits])
        if list(task.options) != left:
            task.options = left

    def show(_=None):
        rows = numbers[task.value]
        number.max = len(rows)
        row = int(rows[number.value - 1])
        sample = samples[row]
        html = f"<p style='opacity:.7;margin:0'>{number.value:,} of {len(rows):,} samples of {escape(str(task.value))}</p>"
        said = f'<div style="white-space:pre-wrap">{_said(sample["conversations"])}</div>'
        html += _beside(picture(sample.get("image"), 220), said)
        if recipe is not None:
            try:
                tokenizers[:] = tokenizers or [_load_tokenizer(recipe)]
                html += _tokens_and_place(samples, row, sample, recipe, tokenizers[0])
            except (OSError, ValueError) as trouble:
                html += f"<p>({escape(_sentence(trouble))})</p>"
        page.value = _page(html)

    def first(_):
        number.value = 1
        show()

    for choice in choices.values():
        choice.observe(narrow, "value")
    task.observe(first, "value")
    number.observe(show, "value")
    back.on_click(lambda _: number.set_trait("value", max(1, number.value - 1)))
    on.on_click(lambda _: number.set_trait("value", number.value % number.max + 1))
    show()
    return w.VBox([_row(*choices.values(), task), _row(back, on, number), page])


def _load_tokenizer(recipe):
    from vflan.models.llava import load_tokenizer

    return load_tokenizer(recipe)


def _tokens_and_place(samples, row, sample, recipe, tokenizer):
    """HTML: a sample token by token, and the step of a packed training that reads it."""
    from vflan.data.conversation import encode
    from vflan.training.batching import packed_step

    html = "<p><b>as the model reads it</b></p>"
    html += token_line(*encode(sample["conversations"], tokenizer, recipe.template), tokenizer)
    found = packed_step(samples, row, recipe, tokenizer) if isinstance(samples, Dataset) else None
    if found is None:
        return html
    step, steps, rows = found
    place = next(
        (at for at, packed in enumerate(rows, 1) if row in [number for number, *_ in packed]), None
    )
    html += f"<p><b>where a packed training reads it</b>: step {step:,} of {steps:,}, row {place} of {len(rows)}"
    return f"{html}</p>{packed_rows(rows, row, tokenizer.convert_tokens_to_ids('<image>'))}"


# -------------------------------------------------------------------------------------------------------------- answers


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
    return HTML(
        table(
            ("picture", "question", "label", "answer", ""), _answer_rows(_frame(rows).head(limit))
        )
    )


def _verdict(row):
    """An answer with its mark and, where a judge left one, the reason."""
    mark, color = ("✓", GOOD) if row["right"] else ("✗", POOR)
    reason = row.get("reason")
    why = (
        f'<div style="opacity:.7;font-size:90%"><i>{escape(reason)}</i></div>'
        if isinstance(reason, str)
        else ""
    )
    return f'<span style="color:{color};font-weight:bold">{mark}</span> {escape(str(row["answer"]))}{why}'


def answer_browser(rows, page_size=5):
    """Leaf through answers by benchmark, task and verdict, those of two runs side by side.

    rows: the answers of one run, or {run: answers} of several that were asked the same questions in the same order; as
    vflan.evaluation.evaluator.judged_answers gives them. Needs text, label, answer; image, benchmark, category, right, reason if at
    hand. ValueError where the questions differ.
    """
    frames = {
        name: _frame(own)
        for name, own in (rows if isinstance(rows, dict) else {"answer": rows}).items()
    }
    names, asked = list(frames), next(iter(frames.values()))
    for name, frame in frames.items():
        if list(frame["text"]) != list(asked["text"]):
            raise ValueError(
                f"{names[0]} and {name} were not asked the same questions, so they cannot stand side by side."
            )
        frame["right"] = [_right(row) for _, row in frame.iterrows()]
    runs = [_choice(names, "run"), _choice(names, "beside")] if len(names) > 1 else []
    for choice, name in zip(runs, names):
        choice.value = name
    filters = {}
    for column, name in {"benchmark": "benchmark", "run": "run", "category": "task"}.items():
        if column in asked and not (column == "run" and "benchmark" in asked):
            filters[column] = _choice(
                ["all", *sorted(asked[column].astype(str).unique())], name, "22em"
            )
    verdict = _choice(["all"], "show", "18em")
    number = _number("page")
    page, busy = w.HTML(), []

    def update(_=None):
        if busy:  # a choice that this function makes itself
            return
        busy.append(True)
        chosen = [choice.value for choice in runs] or names
        right = [frames[name]["right"].to_numpy(bool) for name in chosen]
        kinds = {"all": np.ones(len(asked), bool)}
        if runs:
            kinds |= {"both right": right[0] & right[1], "both wrong": ~right[0] & ~right[1]}
            kinds |= {
                f"only {name} right": right[i] & ~right[1 - i] for i, name in enumerate(chosen)
            }
        else:
            kinds |= {"right": right[0], "wrong": ~right[0]}
        position = verdict.options.index(verdict.value)
        verdict.options, verdict.index = list(kinds), min(position, len(kinds) - 1)
        fits = kinds[verdict.value].copy()
        for column, choice in filters.items():
            inside = asked[column][fits if column == "category" else slice(None)].astype(str)
            if column == "category":
                possible = ["all", *sorted(inside.unique())]
                choice.options, choice.value = (
                    possible,
                    choice.value if choice.value in possible else "all",
                )
            fits &= (asked[column].astype(str) == choice.value).to_numpy() | (choice.value == "all")
        found = np.flatnonzero(fits)
        number.max = max(1, -(-len(found) // page_size))
        lines = []
        for at in found[(number.value - 1) * page_size :][:page_size]:
            row = asked.iloc[at]
            cells = [picture(row.get("image")), escape(str(row["text"])), escape(str(row["label"]))]
            lines.append([*cells, *(_verdict(frames[name].iloc[at]) for name in chosen)])
        score = (
            ", ".join(f"{name} {own[found].mean():.0%}" for name, own in zip(chosen, right))
            if len(found)
            else ""
        )
        said = f"{len(found):,} of {len(asked):,} questions; right: {score or 'none to count'}"
        page.value = _page(
            f"<p style='margin:0'>{escape(said)}</p>"
            + _grid(["", "question", "label", *chosen], lines)
        )
        busy.clear()

    for control in (*runs, *filters.values(), verdict, number):
        control.observe(update, "value")
    update()
    return w.VBox([_row(*runs, verdict), _row(*filters.values(), number), page])


def _grid(columns, rows):
    """A table with thin lines that follows the theme; cells are HTML already."""
    head = f"{LINE};border-width:0 0 2px;text-align:left;padding:4px 10px 4px 0"
    cell = f"{LINE};border-width:0 0 1px;vertical-align:top;padding:6px 10px 6px 0;white-space:pre-wrap;max-width:24em"
    long = (
        "max-height:15em;overflow:auto"  # an answer that never ends must not push the others away
    )
    html = "".join(f'<th style="{head}">{escape(str(column))}</th>' for column in columns)
    for row in rows:
        html += (
            "<tr>"
            + "".join(f'<td style="{cell}"><div style="{long}">{text}</div></td>' for text in row)
            + "</tr>"
        )
    return f'<table style="border-collapse:collapse;margin-top:6px">{html}</table>'


# ----------------------------------------------------------------------------------------------------------------- chat


def chat_table(turns, image=None):
    """Questions and answers about one picture: `turns` is a list of (question, answer)."""
    lines = "\n\n".join(
        f"<b>you</b> {escape(str(q))}\n<b>model</b> {escape(str(a))}" for q, a in turns
    )
    return HTML(table(("picture", "chat"), [(picture(image, 240), lines)]))


def heat_map(image, weights, side=240):
    """A PIL picture (side, side) with `weights` (n, n), one for each patch, in orange over it: the strongest is opaque."""
    weights = np.asarray(weights, float)
    mask = np.uint8(190 * weights / max(weights.max(), 1e-9))
    mask = Image.fromarray(mask).resize((side, side), Image.Resampling.NEAREST)
    image = image.convert("RGB").resize((side, side), Image.Resampling.NEAREST)
    return Image.composite(Image.new("RGB", image.size, POOR), image, mask)


def chat(runs, pictures=None, max_new_tokens=64):
    """Ask finished runs about a picture and read the answer as it is written.

    runs: a Run or several, to pick from. pictures: one or several paths or PIL pictures; a picture of one's own can be
    uploaded. A run is loaded at its first question, and lets go of the one before. A question that fails shows the
    error's sentence instead of an answer. *Remember*: a run reads what it was asked before about this picture, and what it
    said; else each question stands alone, as in the benchmarks. *Where it looks*: the attention to the picture before
    the first word.
    """
    runs = {run.name: run for run in (runs if isinstance(runs, (list, tuple)) else [runs])}
    pictures = list(pictures) if isinstance(pictures, (list, tuple)) else [pictures]
    run, temperature = (
        _choice(list(runs), "run"),
        w.FloatSlider(max=1.5, step=0.1, description="temperature", style=_LABEL),
    )
    question = w.Text(
        placeholder="ask about the picture", continuous_update=False, layout=w.Layout(width="32em")
    )
    send, stop = _button("ask", button_style="primary"), _button("stop", disabled=True)
    upload, another = (
        w.FileUpload(accept="image/*", description="own picture"),
        _button("another picture"),
    )
    look, remember = (w.Checkbox(description=name, indent=False, layout=w.Layout(width="auto"))
                      for name in ("where it looks", "remember"))  # fmt: skip
    layer = _choice(["mean"], "layer", "9em")
    layer.disabled = True
    view, page = w.HTML(), w.HTML()
    now = SimpleNamespace(
        image=pictures[0],
        place=0,
        turns=[],
        heard=[],
        before=[],
        maps=None,
        note="",
        loaded=None,
        stopped=Event(),
    )

    def see(_=None):
        image, below = now.image, escape(now.note)
        if now.maps is not None:
            weights = now.maps[0].mean(0) if layer.value == "mean" else now.maps[0][layer.value - 1]
            image, below = (
                heat_map(now.maps[1], weights),
                f"{weights.sum():.0%} of its attention is on the picture",
            )
        view.value = _page(f"{picture(image, 240)}<div style='max-width:240px'>{below}</div>")

    def say():
        lines = "\n\n".join(
            f"<b>you</b> {escape(q)}\n<b>{escape(name)}</b> {escape(a)}" for name, q, a in now.turns
        )
        page.value = _page(
            f'<div style="white-space:pre-wrap;min-width:20em;margin-left:18px">{lines}</div>'
        )

    def take(image, note=""):
        now.image, now.note, now.turns, now.heard, now.maps = image, note, [], [], None
        see()
        say()

    def next_picture(_):
        now.place = (now.place + 1) % len(pictures)
        take(pictures[now.place])

    def uploaded(_):
        for file in upload.value:
            try:
                take(Image.open(io.BytesIO(file["content"])).convert("RGB"), file["name"])
            except Exception:  # Pillow raises many kinds
                take(None, f"{file['name']} is no picture that can be opened")

    def loaded():
        if now.loaded is None or now.loaded[0] != run.value:
            now.loaded = None  # first let go: two models may not fit
            now.loaded = run.value, runs[run.value].load_model(), runs[run.value].processor()
        return now.loaded[1:]

    def attend():
        now.maps, layer.disabled = None, True
        if look.value and now.turns and now.image is not None:
            try:
                now.maps = _maps(*loaded(), now.turns[-1][1], now.image, now.before)
                layer.options, layer.disabled = ["mean", *range(1, len(now.maps[0]) + 1)], False
            except Exception as trouble:
                now.note = _sentence(trouble)
        see()

    def answer(text):
        name, said = run.value, ""
        now.turns, now.maps = [*now.turns, (name, text, "…")], None
        now.before = (
            [(q, a) for run_name, q, a in now.heard if run_name == name] if remember.value else []
        )
        how = dict(temperature=temperature.value, stop=now.stopped, before=now.before)
        try:
            say()
            for piece in _stream(*loaded(), text, now.image, max_new_tokens, **how):
                said += piece
                now.turns[-1] = name, text, said
                say()
            now.turns[-1] = name, text, said.strip() or "(nothing)"
            now.heard += [(name, text, said.strip())] if said.strip() else []
        except Exception as trouble:  # for the person who reads this: nobody is there to catch it
            now.turns[-1] = name, text, f"{said} ({_sentence(trouble)})".strip()
        say()
        attend()
        set_busy(False)

    def set_busy(busy):
        stop.disabled = not busy
        for control in (send, run, another, upload):
            control.disabled = busy

    def ask(_=None):
        text = question.value.strip()
        if text and not send.disabled:
            set_busy(True)
            now.stopped.clear()
            question.value = ""
            Thread(
                target=answer, args=(text,), daemon=True
            ).start()  # the kernel stays free for `stop`

    send.on_click(ask)
    stop.on_click(lambda _: now.stopped.set())
    another.on_click(next_picture)
    upload.observe(uploaded, "value")
    look.observe(lambda _: send.disabled or attend(), "value")  # while it answers: afterwards
    layer.observe(see, "value")
    take(pictures[0])
    tools = [another] * (len(pictures) > 1) + [upload, remember, look, layer]
    return w.VBox(
        [_row(run, temperature), _row(*tools), w.HBox([view, page]), _row(question, send, stop)]
    )


def _stream(*arguments, **how):
    from vflan.evaluation.streaming import stream

    return stream(*arguments, **how)


def _maps(model, processor, text, image, before):
    from vflan.evaluation.streaming import attention_maps, seen

    return attention_maps(model, processor, text, image, before=before), seen(processor, image)


def _sentence(trouble):
    """The first line of what an error says."""
    return next(iter(str(trouble).strip().splitlines()), "") or type(trouble).__name__
