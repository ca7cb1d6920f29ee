"""Streaming gives the words of `answer`, can be stopped, and raises errors; attention maps."""

import sys
import time
from threading import Event, active_count

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_model import make_tiny, questions

from vflan.evaluation.generation import answer
from vflan.evaluation.streaming import (
    attention_maps,
    captioned,
    nearest_words,
    stream,
    tower_view,
)

STREAMING = sys.modules["vflan.evaluation.streaming"]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return make_tiny(tmp_path_factory.mktemp("pictures"))


def ask(tiny, row, tokens=8, **more):
    return list(stream(tiny.model, tiny.processor, row["text"], row["image"], tokens, **more))


def test_the_pieces_make_up_the_answer(tiny):
    rows = questions(tiny, 12)
    pieces = [ask(tiny, row) for row in rows]
    assert max(map(len, pieces)) > 3, "it comes word by word"
    said = answer(tiny.model, tiny.processor, rows, max_new_tokens=8)
    assert len(set(said)) > 5 and ["".join(some).split() for some in pieces] == [
        text.split() for text in said
    ]


def test_a_picture_may_be_in_memory(tiny):
    row = questions(tiny, 2)[1]
    with Image.open(row["image"]) as image:
        assert ask(tiny, row | {"image": image.convert("RGBA")}) == ask(tiny, row)


def test_temperature_draws_other_words(tiny):
    row = questions(tiny, 2)[1]
    torch.manual_seed(0)
    assert len({"".join(ask(tiny, row, temperature=1.5)) for _ in range(5)}) > 1
    assert len({"".join(ask(tiny, row, temperature=0)) for _ in range(3)}) == 1


def test_it_reads_the_earlier_turns(tiny):
    row = questions(tiny, 2)[1]
    said = {
        before: "".join(ask(tiny, row, before=before))
        for before in ((), (("red?", "blue"),), (("red?", "star"),))
    }
    assert len(set(said.values())) > 1 and said[()] == "".join(ask(tiny, row))
    first = attention_maps(tiny.model, tiny.processor, row["text"], row["image"])
    later = attention_maps(
        tiny.model, tiny.processor, row["text"], row["image"], before=[("red?", "blue")]
    )
    assert first.shape == later.shape and not np.allclose(first, later)
    with pytest.raises(ValueError, match="begin a new one"):
        ask(tiny, row, before=[("red?", "blue " * 3000)])


def long_row(tiny):
    return next(
        row for row in questions(tiny, 40) if row["image"] and len(ask(tiny, row, 40)) >= 39
    )


def test_stop_ends_the_answer_where_it_stands(tiny):
    row, stop, said = long_row(tiny), Event(), []
    for piece in stream(tiny.model, tiny.processor, row["text"], row["image"], 2000, stop=stop):
        said.append(piece)
        if len(said) == 3:
            stop.set()
    assert 3 <= len(said) < 500


def test_a_reader_that_stops_leaves_no_thread_behind(tiny):
    row, threads = long_row(tiny), active_count()
    pieces = stream(tiny.model, tiny.processor, row["text"], row["image"], 2000)
    next(pieces)
    assert active_count() == threads + 1
    pieces.close()
    assert active_count() == threads


def test_an_error_in_the_thread_is_raised_to_the_reader(tiny, monkeypatch):
    def generate(**_):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(tiny.model, "generate", generate)
    began = time.monotonic()
    with pytest.raises(RuntimeError, match="out of memory"):
        ask(tiny, questions(tiny, 2)[1])
    with pytest.raises(OSError, match="missing picture"):
        ask(tiny, {"text": "what?", "image": "nowhere.png"})
    assert time.monotonic() - began < 10


def test_attention_is_a_share_of_each_layer_and_the_model_is_left_as_it_was(tiny):
    row = questions(tiny, 2)[1]
    before = tiny.model.model.language_model.config._attn_implementation
    maps = attention_maps(tiny.model, tiny.processor, row["text"], row["image"])
    assert (
        maps.shape == (2, 4, 4)
        and (maps >= 0).all()
        and (0 < maps.sum((1, 2))).all()
        and (maps.sum((1, 2)) < 1).all()
    )
    assert (
        before != "eager" and tiny.model.model.language_model.config._attn_implementation == before
    )
    other = attention_maps(tiny.model, tiny.processor, row["text"] + " red star", row["image"])
    assert not np.allclose(maps, other)


def test_attention_maps_are_those_of_the_models_own_forward(tiny):
    """The last row of each layer's weights, at the sixteen positions of the picture."""
    row = questions(tiny, 2)[1]
    inputs = STREAMING._inputs(tiny.model, tiny.processor, row["text"], row["image"], "vicuna_v1")
    at = (inputs["input_ids"][0] == 3).nonzero().flatten()
    assert at.tolist() == list(range(int(at[0]), int(at[0]) + 16))
    tiny.model.set_attn_implementation("eager")
    try:
        with torch.no_grad():
            layers = tiny.model(**inputs, output_attentions=True).attentions
    finally:
        tiny.model.set_attn_implementation("sdpa")
    expected = [layer[0].mean(0)[-1, at[0] : at[0] + 16].reshape(4, 4) for layer in layers]
    maps = attention_maps(tiny.model, tiny.processor, row["text"], row["image"])
    assert np.allclose(maps, torch.stack(expected).numpy(), atol=1e-6)


def test_the_view_is_the_picture_as_the_tower_gets_it(tiny):
    wide = Image.new("RGB", (96, 48), "red")
    wide.paste("blue", (24, 0, 72, 48))  # what the centre crop keeps
    view = tower_view(tiny.processor, wide)
    assert view.size == (48, 48)
    assert np.abs(np.asarray(view).astype(int) - [0, 0, 255]).max() <= 1


def test_pictures_are_captioned_a_few_at_a_time_as_one_by_one(tiny, monkeypatch):
    """At 7B the keys and values of 64 pictures in one call take 21 GB."""
    pictures = [str(tiny.folder / f"{i % 5}.png") for i in range(20)]
    alone = [captioned(tiny.model, tiny.processor, [picture])[0] for picture in pictures[:5]]
    sizes, real = [], tiny.model.generate

    def generate(ids, **options):
        sizes.append(len(ids))
        return real(ids, **options)

    monkeypatch.setattr(tiny.model, "generate", generate)
    assert captioned(tiny.model, tiny.processor, pictures) == alone * 4
    assert sizes == [8, 8, 4] and len(set(alone)) > 1


def test_an_answer_says_why_it_ended_and_goes_on_where_it_was_cut(tiny):
    row, whole, ended = long_row(tiny), "", []
    whole = "".join(ask(tiny, row, 20, ended=ended))
    first = "".join(ask(tiny, row, 8, ended=ended))
    assert ended == ["length", "length"] and whole.startswith(first.rstrip())
    rest = "".join(ask(tiny, row, 12, begun=first, ended=ended))
    assert first + rest == whole and rest.startswith(" ")
    stop = Event()
    stop.set()
    list(stream(tiny.model, tiny.processor, row["text"], row["image"], 8, stop=stop, ended=ended))
    assert ended[-1] == "stopped"


def test_an_answer_ends_at_the_models_context(tiny):
    row, ended = long_row(tiny), []
    longest = tiny.model.config.text_config.max_position_embeddings
    said = ask(tiny, row, 10 * longest, ended=ended)
    assert ended == ["length"] or ended == ["stop"]
    assert sum(len(piece.split()) for piece in said) < longest


def test_the_nearest_word_of_a_patch_is_that_of_its_vector(tiny):
    """A projector that is made to say one word says it for every patch."""
    model, row = tiny.model, questions(tiny, 2)[1]
    last = model.model.multi_modal_projector.linear_2
    kept = last.weight.detach().clone(), last.bias.detach().clone()
    token = tiny.processor.tokenizer("red", add_special_tokens=False)["input_ids"][-1]
    with torch.no_grad():
        last.weight.zero_()
        last.bias.copy_(model.get_input_embeddings().weight[token])
    words = nearest_words(model, tiny.processor, row["image"])
    with torch.no_grad():
        last.weight.copy_(kept[0])
        last.bias.copy_(kept[1])
    assert words.shape[0] == words.shape[1] > 1
    assert set(words.ravel()) == {tiny.processor.tokenizer.decode([token]).strip()}
