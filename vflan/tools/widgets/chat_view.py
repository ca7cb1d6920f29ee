"""A chat with finished runs about a picture, with a map of where the model looks."""

from __future__ import annotations

import io
import warnings
from dataclasses import dataclass, field
from threading import Event, Thread

import ipywidgets as w
import numpy as np
from PIL import Image

from vflan.data.images import as_rgb, open_picture
from vflan.data.limits import MAX_PIXELS
from vflan.tools.widgets import elements

ORANGE = "#D55E00"
ALONE = "(no other)"
CUT = "\u2026 (cut at the limit: \u201ccontinue\u201d goes on)"

STYLES = ("frames", "overlay")  # of the map: where it looks


def heat_map(image: Image.Image, weights, side: int = 240, style: str = "frames") -> Image.Image:
    """A picture (side, side) with `weights` (n, n), one for each patch, in orange on it.

    style: "frames" draws a frame inside each patch, the thicker the more weight, so that the
    colours stay visible; "overlay" covers each patch, the strongest most.
    """
    weights = np.asarray(weights, float)
    share = weights / max(weights.max(), 1e-9)  # (n, n), of the strongest patch
    if style == "overlay":
        opacity = Image.fromarray(np.uint8(190 * share))
        mask = opacity.resize((side, side), Image.Resampling.NEAREST)
    else:
        cell = np.arange(side) * len(weights) // side  # (side): the patch of a pixel
        edges = np.searchsorted(cell, np.arange(len(weights) + 1))
        inward = np.minimum(np.arange(side) - edges[cell], edges[cell + 1] - 1 - np.arange(side))
        distance = np.minimum(inward[:, None], inward)  # (side, side): pixels to the patch's edge
        thickness = np.ceil(share * side / len(weights) / 5)
        mask = Image.fromarray(np.uint8(255 * (distance < thickness[cell][:, cell])))
    image = as_rgb(image).resize((side, side), Image.Resampling.NEAREST)
    return Image.composite(Image.new("RGB", image.size, ORANGE), image, mask)


def chat(runs, pictures=None, max_new_tokens: int = 512) -> w.VBox:
    """Ask finished runs about a picture and read the answers while they are written.

    runs: a Run, or a list of them to choose from; with a list, a second run can answer the same
    question "beside" the first. pictures: one or several paths or PIL pictures; another one can be
    uploaded. A run is loaded at its first question; runs that are no longer chosen are freed. If a
    question fails, the error's first line takes the place of the answer. An answer that reaches
    max_new_tokens ends with a mark, and "continue" goes on with it.

    "remember" lets a run read its earlier questions and answers about this picture; otherwise each
    question is separate, as in the benchmarks. "text only" asks without the picture. "where it
    looks" shows the first run's attention to the picture before the first word.
    """
    runs = runs if isinstance(runs, (list, tuple)) else [runs]
    pictures = list(pictures) if isinstance(pictures, (list, tuple)) else [pictures]
    return _Chat(elements.by_name(runs), pictures or [None], max_new_tokens).box


class _Chat:
    def __init__(self, runs, pictures, max_new_tokens):
        self.runs, self.pictures, self.max_new_tokens = runs, pictures, max_new_tokens
        self.picture_number, self.stopped = 0, False
        # ends the answer that is being written, which also sets it at its own end
        self.current = Event()
        self.loaded = {}  # {run's name: (model, processor)} of the runs that answered last

        self.run = elements.dropdown(list(runs), "run")
        self.beside = elements.dropdown([ALONE, *runs], "beside")
        self.temperature = w.FloatSlider(
            max=1.5, step=0.1, description="temperature", style=elements.LABEL_STYLE
        )
        # kept up to date while one types: Enter is reported before the value of a finished field
        self.question = w.Text(placeholder="ask about the picture", layout=w.Layout(width="32em"))
        self.send = elements.button("ask", button_style="primary")
        self.stop = elements.button("stop", disabled=True)
        self.go_on = elements.button("continue", disabled=True)
        self.upload = w.FileUpload(accept="image/*", description="own picture")
        self.another = elements.button("another picture")
        self.look, self.remember, self.text_only = map(
            _checkbox, ("where it looks", "remember", "text only")
        )
        self.layer = elements.dropdown(["mean"], "layer", "9em")
        self.style = elements.dropdown(STYLES, "as", "9em")
        self.layer.disabled = self.style.disabled = True
        self.view, self.page = w.HTML(), w.HTML()
        self.text_only.value = pictures[0] is None
        self.connect()
        self.take(pictures[0])
        another = [self.another] if len(pictures) > 1 else []
        beside = [self.beside] if len(runs) > 1 else []
        choices = elements.in_a_row(self.run, *beside, self.temperature, self.remember)
        looks = (self.look, self.layer, self.style)
        tools = elements.in_a_row(*another, self.upload, self.text_only, *looks)
        pages = w.HBox([self.view, self.page])
        asking = elements.in_a_row(self.question, self.send, self.stop, self.go_on)
        self.box = w.VBox([choices, tools, pages, asking])

    def connect(self):
        self.send.on_click(self.ask)
        # the way that the warning names would also send when the field is left
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            self.question.on_submit(self.ask)
        self.stop.on_click(self.stop_answers)
        self.go_on.on_click(lambda _: self.begin(self.continue_answers))
        self.another.on_click(self.next_picture)
        self.upload.observe(self.read_upload, "value")
        # during an answer nothing happens: the map is drawn when it ends
        self.look.observe(lambda _: self.send.disabled or self.draw_attention(), "value")
        self.layer.observe(self.show_picture, "value")
        self.style.observe(self.show_picture, "value")

    # -------------------------------------------------------------------------- what is shown

    def take(self, image, caption=""):
        """Begin a new conversation about a picture."""
        self.image, self.caption, self.attention = image, caption, None
        self.turns: list[_Turn] = []
        self.go_on.disabled = True
        self.show_picture()
        self.show_turns()

    def show_picture(self, _=None):
        image, caption = self.image, self.caption
        if self.attention is not None:
            maps, model_view = self.attention  # (layers, side, side) and what the tower reads
            weights = maps.mean(0) if self.layer.value == "mean" else maps[self.layer.value - 1]
            image = heat_map(model_view, weights, style=self.style.value)
            caption = f"{weights.sum():.0%} of its attention is on the picture"
        self.view.value = elements.macros.chat_picture(elements.picture(image, 240), caption)

    def show_turns(self):
        turns = [
            (turn.question, [(answer.run, answer.shown) for answer in turn.answers])
            for turn in self.turns
        ]
        self.page.value = elements.macros.chat_turns(turns)

    def next_picture(self, _):
        self.picture_number = (self.picture_number + 1) % len(self.pictures)
        self.take(self.pictures[self.picture_number])

    def read_upload(self, _):
        for file in self.upload.value:
            try:
                picture = open_picture(io.BytesIO(file["content"]))
                if picture.width * picture.height > MAX_PIXELS:
                    raise ValueError("too many pixels")
                image = as_rgb(picture)
            except Exception:  # Pillow raises many kinds
                self.take(None, f"{file['name']} is no picture that can be opened")
            else:
                self.take(image, file["name"])

    # ---------------------------------------------------------------------------- the answer

    def ask(self, _=None):
        text = self.question.value.strip()
        if not text or self.send.disabled:
            return
        if self.image is None and not self.text_only.value:
            # a question about a picture that could not be opened would be answered without it
            self.caption = 'There is no picture to ask about: choose one, or tick "text only".'
            self.show_picture()
            return
        names = dict.fromkeys([self.run.value, self.beside.value])
        turn = _Turn(text, not self.text_only.value, [_Answer(n) for n in names if n != ALONE])
        for answer in turn.answers:
            answer.before = self.earlier(answer.run) if self.remember.value else []
        self.turns.append(turn)
        self.question.value, self.attention = "", None
        self.begin(lambda: self.write(turn, turn.answers))

    def continue_answers(self):
        self.write(self.turns[-1], [answer for answer in self.turns[-1].answers if answer.is_cut])

    def begin(self, work):
        """Do the work in a thread, so that the kernel still hears the stop button."""

        def run():
            work()
            self.set_busy(False)

        self.set_busy(True)
        self.stopped = False
        Thread(target=run, daemon=True).start()

    def stop_answers(self, _):
        """End the answer that is being written, and ask no other run."""
        self.stopped = True
        self.current.set()

    def set_busy(self, busy):
        self.stop.disabled = not busy
        for control in (self.send, self.run, self.beside, self.another, self.upload):
            control.disabled = busy
        cut = self.turns and any(answer.is_cut for answer in self.turns[-1].answers)
        self.go_on.disabled = busy or not cut

    def earlier(self, run):
        """The (question, answer) pairs of a run on the page; failed ones are left out."""
        return [
            (turn.question, answer.text.strip())
            for turn in self.turns
            for answer in turn.answers
            if answer.run == run and answer.text.strip() and not answer.error
        ]

    def write(self, turn, answers):
        """Write the answer of each run to the page, piece by piece."""
        from vflan.evaluation.streaming import stream

        for answer in answers:
            begun, ended = answer.text, []
            answer.is_cut, answer.error = False, ""
            self.current = Event()
            how = dict(stop=self.current, before=answer.before, begun=begun, ended=ended)
            how |= dict(temperature=self.temperature.value)
            image = self.image if turn.has_picture else None
            self.show_turns()
            try:
                model, processor = self.load(answer.run)
                for piece in stream(
                    model, processor, turn.question, image, self.max_new_tokens, **how
                ):
                    answer.text += piece
                    self.show_turns()
                answer.is_cut = ended == ["length"]
            except Exception as error:  # in a thread nobody catches it: the reader must see it
                answer.error = elements.first_line(error)
            answer.is_done = True
            self.show_turns()
            if self.stopped:
                break
        for answer in turn.answers:  # those that a stop left out
            answer.is_done = True
        self.show_turns()
        self.draw_attention()

    def load(self, name):
        """Model and processor of a run."""
        if name not in self.loaded:
            # frees the models before: more may not fit
            chosen = {self.run.value, self.beside.value}
            self.loaded = {run: pair for run, pair in self.loaded.items() if run in chosen}
            self.loaded[name] = self.runs[name].load_model(), self.runs[name].processor()
        return self.loaded[name]

    def draw_attention(self):
        """Show where the first run looked when it began its last answer, if that is asked for."""
        from vflan.evaluation.streaming import attention_maps, tower_view

        self.attention, self.layer.disabled, self.style.disabled = None, True, True
        turn = self.turns[-1] if self.turns else None
        if self.look.value and turn and turn.has_picture:
            try:
                first = turn.answers[0]
                model, processor = self.load(first.run)
                question, before = turn.question, first.before
                maps = attention_maps(model, processor, question, self.image, before=before)
                self.attention = maps, tower_view(processor, self.image)
                self.layer.options = ["mean", *range(1, len(maps) + 1)]
                self.layer.disabled = self.style.disabled = False
            except Exception as error:
                self.caption = elements.first_line(error)
        self.show_picture()


@dataclass
class _Answer:
    """The answer of one run, as far as it is written."""

    run: str
    text: str = ""
    error: str = ""
    before: list = field(default_factory=list)  # the earlier (question, answer) pairs it was given
    is_cut: bool = False  # it ended at the limit of new tokens
    is_done: bool = False

    @property
    def shown(self) -> str:
        """What the page shows for it."""
        if self.error:
            return f"{self.text} ({self.error})".strip()
        if self.is_cut:
            return f"{self.text.strip()} {CUT}"
        return self.text.strip() or ("(nothing)" if self.is_done else "\u2026")


@dataclass
class _Turn:
    """A question and the answers of the runs that were asked."""

    question: str
    has_picture: bool
    answers: list[_Answer]


def _checkbox(name):
    return w.Checkbox(description=name, indent=False, layout=w.Layout(width="auto"))
