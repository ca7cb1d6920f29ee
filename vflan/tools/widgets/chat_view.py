"""A chat with finished runs about a picture, with a map of where the model looks."""

from __future__ import annotations

import io
from threading import Event, Thread

import ipywidgets as w
import numpy as np
from PIL import Image

from vflan.tools.widgets import elements

ORANGE = "#D55E00"


def heat_map(image: Image.Image, weights, side: int = 240) -> Image.Image:
    """A picture (side, side) with `weights` (n, n), one for each patch, in orange over it.

    The strongest patch is the most opaque.
    """
    weights = np.asarray(weights, float)
    opacity = np.uint8(190 * weights / max(weights.max(), 1e-9))
    nearest = Image.Resampling.NEAREST
    mask = Image.fromarray(opacity).resize((side, side), nearest)
    image = image.convert("RGB").resize((side, side), nearest)
    return Image.composite(Image.new("RGB", image.size, ORANGE), image, mask)


def chat(runs, pictures=None, max_new_tokens: int = 64) -> w.VBox:
    """Ask finished runs about a picture and read the answer while it is written.

    runs: a Run, or a list of them to choose from. pictures: one or several paths or PIL pictures;
    another one can be uploaded. A run is loaded at its first question, and the run before it is
    freed. If a question fails, the error's first line takes the place of the answer.

    "remember" lets a run read its earlier questions and answers about this picture; otherwise each
    question is separate, as in the benchmarks. "where it looks" shows the attention to the picture
    before the first word.
    """
    runs = runs if isinstance(runs, (list, tuple)) else [runs]
    pictures = list(pictures) if isinstance(pictures, (list, tuple)) else [pictures]
    return _Chat({run.name: run for run in runs}, pictures, max_new_tokens).box


class _Chat:
    def __init__(self, runs, pictures, max_new_tokens):
        self.runs, self.pictures, self.max_new_tokens = runs, pictures, max_new_tokens
        self.picture_number, self.stopped = 0, Event()
        self.loaded = None  # (run's name, model, processor) of the run that answered last
        self.earlier = []  # (question, answer) pairs that the last answer was given

        self.run = elements.dropdown(list(runs), "run")
        self.temperature = w.FloatSlider(
            max=1.5, step=0.1, description="temperature", style=elements.LABEL_STYLE
        )
        self.question = w.Text(
            placeholder="ask about the picture",
            continuous_update=False,
            layout=w.Layout(width="32em"),
        )
        self.send = elements.button("ask", button_style="primary")
        self.stop = elements.button("stop", disabled=True)
        self.upload = w.FileUpload(accept="image/*", description="own picture")
        self.another = elements.button("another picture")
        self.look, self.remember = _checkbox("where it looks"), _checkbox("remember")
        self.layer = elements.dropdown(["mean"], "layer", "9em")
        self.layer.disabled = True
        self.view, self.page = w.HTML(), w.HTML()
        self.connect()
        self.take(pictures[0])
        another = [self.another] if len(pictures) > 1 else []
        tools = elements.in_a_row(*another, self.upload, self.remember, self.look, self.layer)
        pages = w.HBox([self.view, self.page])
        asking = elements.in_a_row(self.question, self.send, self.stop)
        self.box = w.VBox([elements.in_a_row(self.run, self.temperature), tools, pages, asking])

    def connect(self):
        self.send.on_click(self.ask)
        self.stop.on_click(lambda _: self.stopped.set())
        self.another.on_click(self.next_picture)
        self.upload.observe(self.read_upload, "value")
        # during an answer nothing happens: the map is drawn when it ends
        self.look.observe(lambda _: self.send.disabled or self.draw_attention(), "value")
        self.layer.observe(self.show_picture, "value")

    # -------------------------------------------------------------------------- what is shown

    def take(self, image, caption=""):
        """Begin a new conversation about a picture."""
        self.image, self.caption, self.attention = image, caption, None
        self.turns = []  # (run, question, answer) on the page
        self.answered = []  # those of them that a run may read again: failed ones are left out
        self.show_picture()
        self.show_turns()

    def show_picture(self, _=None):
        image, caption = self.image, self.caption
        if self.attention is not None:
            maps, model_view = self.attention  # (layers, side, side) and what the tower reads
            weights = maps.mean(0) if self.layer.value == "mean" else maps[self.layer.value - 1]
            image = heat_map(model_view, weights)
            caption = f"{weights.sum():.0%} of its attention is on the picture"
        self.view.value = elements.macros.chat_picture(elements.picture(image, 240), caption)

    def show_turns(self):
        self.page.value = elements.macros.chat_turns(self.turns)

    def next_picture(self, _):
        self.picture_number = (self.picture_number + 1) % len(self.pictures)
        self.take(self.pictures[self.picture_number])

    def read_upload(self, _):
        for file in self.upload.value:
            try:
                image = Image.open(io.BytesIO(file["content"])).convert("RGB")
            except Exception:  # Pillow raises many kinds
                self.take(None, f"{file['name']} is no picture that can be opened")
            else:
                self.take(image, file["name"])

    # ---------------------------------------------------------------------------- the answer

    def ask(self, _=None):
        text = self.question.value.strip()
        if text and not self.send.disabled:
            self.set_busy(True)
            self.stopped.clear()
            self.question.value = ""
            # a thread, so that the kernel still hears the stop button
            Thread(target=self.answer, args=(text,), daemon=True).start()

    def set_busy(self, busy):
        self.stop.disabled = not busy
        for control in (self.send, self.run, self.another, self.upload):
            control.disabled = busy

    def answer(self, question):
        """Write the answer of the chosen run to the page, piece by piece."""
        from vflan.evaluation.streaming import stream

        run, text = self.run.value, ""
        self.turns.append((run, question, "…"))
        self.attention = None
        mine = [(q, a) for name, q, a in self.answered if name == run]
        self.earlier = mine if self.remember.value else []
        try:
            self.show_turns()
            how = dict(stop=self.stopped, before=self.earlier, temperature=self.temperature.value)
            for piece in stream(*self.load(), question, self.image, self.max_new_tokens, **how):
                text += piece
                self.turns[-1] = run, question, text
                self.show_turns()
            self.turns[-1] = run, question, text.strip() or "(nothing)"
            if text.strip():
                self.answered.append((run, question, text.strip()))
        except Exception as error:  # in a thread nobody catches it: the reader must see it
            self.turns[-1] = run, question, f"{text} ({elements.first_line(error)})".strip()
        self.show_turns()
        self.draw_attention()
        self.set_busy(False)

    def load(self):
        """Model and processor of the chosen run."""
        name = self.run.value
        if self.loaded is None or self.loaded[0] != name:
            self.loaded = None  # frees the model before: two may not fit
            self.loaded = name, self.runs[name].load_model(), self.runs[name].processor()
        return self.loaded[1:]

    def draw_attention(self):
        """Show where the model looked when it began its last answer, if that is asked for."""
        from vflan.evaluation.streaming import attention_maps, tower_view

        self.attention, self.layer.disabled = None, True
        if self.look.value and self.turns and self.image is not None:
            try:
                model, processor = self.load()
                _, question, _ = self.turns[-1]
                maps = attention_maps(model, processor, question, self.image, before=self.earlier)
                self.attention = maps, tower_view(processor, self.image)
                self.layer.options = ["mean", *range(1, len(maps) + 1)]
                self.layer.disabled = False
            except Exception as error:
                self.caption = elements.first_line(error)
        self.show_picture()


def _checkbox(name):
    return w.Checkbox(description=name, indent=False, layout=w.Layout(width="auto"))
