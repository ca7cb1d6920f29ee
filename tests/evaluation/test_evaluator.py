"""A random model answers: batches change no answer, the right answers are cached, none is lost."""

import json
import math
import multiprocessing
import os
import signal
import sys
import time
import weakref
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from copy import deepcopy
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from tiny_model import TinyRun, by_generate, lines, make_tiny, questions, tiny_model, write_pope
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from transformers.cache_utils import DynamicLayer

from vflan.data.conversation import IMAGE_TOKEN_INDEX, prompt_ids
from vflan.evaluation import generation as answers
from vflan.evaluation import parallel, results
from vflan.evaluation.answer_cache import Answer, keep_scores, locked, read_cache
from vflan.evaluation.benchmarks import BENCHMARKS
from vflan.evaluation.evaluator import (
    COLUMNS,
    LETTERS,
    allowed,
    evaluate,
    scorable,
)
from vflan.evaluation.generation import answer, answering, first_token
from vflan.evaluation.judge import Judgement
from vflan.evaluation.results import difference, judged_answers, kept_items, per_task

FORK = multiprocessing.get_context("fork")  # a child of the test itself: it starts at once
EVALUATOR = sys.modules["vflan.evaluation.evaluator"]  # vflan.evaluate itself is the function


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return make_tiny(tmp_path_factory.mktemp("pictures"))


@pytest.fixture
def run(tiny, tmp_path):
    write_pope(tmp_path / "benchmarks", tiny.folder)
    return TinyRun(tmp_path, tiny)


@pytest.fixture
def own_pictures(tiny, run):
    """The run's pictures as files of its own, to be broken."""
    link = run.folder / "benchmarks" / "images"
    link.unlink()
    link.mkdir()
    for path in tiny.folder.glob("*.png"):
        (link / path.name).write_bytes(path.read_bytes())
    return link


def generated(tiny, rows, tokens):
    return [by_generate(tiny.model, tiny.processor, row, tokens) for row in rows]


@pytest.fixture
def looks(monkeypatch):
    """How many pictures the tower looked at, one number a look; nothing is kept from before."""
    numbers = []

    def look(model, values):
        numbers.append(len(values))
        return answers_look(model, values)

    answers_look = answers.image_features
    monkeypatch.setattr(answers, "image_features", look)
    monkeypatch.setattr(answers, "_FEATURES", {})
    return numbers


# ----------------------------------------------------------------------------------------- answer()


def test_batched_answers_equal_those_of_generate_one_by_one(tiny):
    rows = questions(tiny, 24)
    expected = generated(tiny, rows, 8)
    texts = [text for text, _ in expected]
    assert len(set(texts)) > 10, "a model that always says the same would prove nothing"
    assert {finish for _, finish in expected} == {"stop", "length"}, "some answers should end early"
    assert answer(tiny.model, tiny.processor, rows, max_new_tokens=8, batch_size=16) == texts
    assert answer(tiny.model, tiny.processor, rows, max_new_tokens=8, batch_size=1) == texts
    said = dict(answering(tiny.model, tiny.processor, rows, 8, 7))
    assert [said[i][:2] for i in range(len(rows))] == expected


def test_one_question_a_picture_equals_generate_too(tiny):
    rows = questions(tiny, 7)[1:6]
    assert len({row["image"] for row in rows}) == 5
    expected = [text for text, _ in generated(tiny, rows, 6)]
    for batch in (1, 2, 5):
        assert answer(tiny.model, tiny.processor, rows, 6, batch) == expected


def test_the_mini_world_answers_as_generate_does(tmp_path):
    """Committed backbones, a fresh projector, two questions of each kind of task, in fp32.

    bench/evaluate.py asks all questions.
    """
    import vflan
    from vflan.models.llava import load_model, load_processor
    from vflan.world.scene import render
    from vflan.world.tasks import KINDS, sample

    recipe = vflan.preset("tiny").base
    model, processor = load_model(recipe), load_processor(recipe)
    rows = []
    for kind in KINDS.values():
        for scene, text, _ in sample(kind, 2, "equal", evaluation=True):
            path = tmp_path / f"{len(rows) // 2}.png"  # two questions share a picture
            if not path.exists():
                render(scene).save(path)
            rows.append({"text": text, "image": str(path)})
    expected = [by_generate(model, processor, row, 3)[0] for row in rows]
    assert len(rows) > 100 and len(set(expected)) > 20
    assert answer(model, processor, rows, 3, 32) == expected


def test_each_picture_goes_through_the_tower_once(tiny, looks):
    answer(tiny.model, tiny.processor, questions(tiny), max_new_tokens=2, batch_size=4)
    assert sum(looks) == 5


def test_text_only_questions_need_no_picture(tiny):
    rows = [{"text": "what is there ?", "image": None}, {"text": "a star ?"}]
    expected = generated(tiny, [{"image": None} | row for row in rows], 5)
    assert answer(tiny.model, tiny.processor, rows, 5) == [text for text, _ in expected]
    assert answer(tiny.model, tiny.processor, []) == []


def test_answering_leaves_the_training_mode_as_it_was(tiny):
    tiny.model.train()
    answer(tiny.model, tiny.processor, questions(tiny, 3), 1)
    assert tiny.model.training
    tiny.model.eval()


def test_a_broken_picture_is_an_error_with_a_reason_and_the_others_are_answered(tiny, tmp_path):
    (tmp_path / "broken.png").write_bytes((tiny.folder / "0.png").read_bytes()[:900])
    rows = questions(tiny, 20)
    whole = answer(tiny.model, tiny.processor, rows, 3)
    for at, image in ((4, tmp_path / "broken.png"), (9, tmp_path / "missing.png")):
        rows[at] = rows[at] | {"image": str(image)}
    said = dict(answering(tiny.model, tiny.processor, rows, 3, 4))
    assert [i for i in said if said[i].finish == "error"] and sorted(said) == list(range(20))
    assert said[4].reason.startswith("truncated picture") and said[9].reason.startswith(
        "missing picture"
    )
    assert [said[i].text for i in range(20)] == [
        whole[i] if i not in (4, 9) else "" for i in range(20)
    ]
    with pytest.raises(ValueError, match="2 questions have no answer.*picture"):
        answer(tiny.model, tiny.processor, rows, 3)


def test_one_pass_takes_the_likelier_of_the_allowed_words(tiny):
    rows = [row | {"choices": ["yes", "no"]} for row in questions(tiny)]
    said = dict(answering(tiny.model, tiny.processor, rows, 5, 8))
    assert {a.finish for a in said.values()} == {"choice"} and {a.text for a in said.values()} == {
        "yes",
        "no",
    }
    for i in (1, 2, 8):  # as the logits of the whole prompt say
        free = dict(answering(tiny.model, tiny.processor, [rows[i] | {"choices": None}], 1))[0].text
        if free in ("yes", "no"):
            assert said[i].text == free
    assert said[1].text == likelier(tiny, rows[1])


def likelier(tiny, row):
    from vflan.data.conversation import IMAGE_TOKEN_INDEX, prompt_ids

    ids = list(prompt_ids(row["text"], tiny.processor.tokenizer))
    at = ids.index(IMAGE_TOKEN_INDEX)
    ids[at : at + 1] = [3] * 16
    from PIL import Image

    pixels = tiny.processor.image_processor([Image.open(row["image"])], return_tensors="pt")[
        "pixel_values"
    ]
    with torch.inference_mode():
        logits = tiny.model(input_ids=torch.tensor([ids]), pixel_values=pixels).logits[0, -1]
    yes, no = (first_token(w, tiny.processor.tokenizer) for w in ("yes", "no"))
    return "yes" if logits[yes] > logits[no] else "no"


def test_one_pass_compares_the_words_as_they_follow_the_prompt_of_the_template():
    """Behind "ASSISTANT:" a word has a space; other templates write none."""
    letters = pre_tokenizers.ByteLevel.alphabet()
    core = Tokenizer(models.BPE({x: i for i, x in enumerate([*sorted(letters), "no", "Ġno"])},
                                [("n", "o"), ("Ġ", "no")]))  # fmt: skip
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})

    def first(template):
        return tokenizer.convert_ids_to_tokens(first_token("no", tokenizer, template))

    assert first("vicuna_v1") == "Ġno"
    turn = "{% for m in messages %}[{{ m.role }}]SPACE{{ m.content[0].text }}{% endfor %}"
    turn += "{% if add_generation_prompt %}[assistant]{% endif %}"
    for space, token in (("", "no"), (" ", "Ġno")):
        tokenizer.chat_template = turn.replace("SPACE", space)
        assert first("own") == token
    # A template that shows the last turn alone says nothing about answers.
    tokenizer.chat_template = "{{ messages[-1].content[0].text }}"
    assert first("own") == "no"


def test_a_batch_holds_one_question_at_least(tiny):
    rows = questions(tiny, 4)
    expected = [text for text, _ in generated(tiny, rows, 3)]
    assert answer(tiny.model, tiny.processor, rows, 3, batch_size=0) == expected


def test_one_pass_refuses_words_that_begin_alike(tiny):
    rows = [{"text": "a star ?", "image": None, "choices": ["red star", "red circle"]}]
    with pytest.raises(ValueError, match="cannot tell red star, red circle apart"):
        dict(answering(tiny.model, tiny.processor, rows))


@pytest.mark.parametrize(
    "prompt, words",
    [
        ("what? (a) red (b) blue", "ab"),
        ("what?\nA. red\nB. blue\nC. grey", "ABC"),
        ("I see A star. Which?", ""),
        ("Is this John A. Smith?", ""),
    ],
)
def test_only_letters_that_are_options_are_allowed(prompt, words):
    assert allowed(LETTERS, prompt) == list(words)
    assert allowed(("yes", "no"), prompt) == ["yes", "no"]


# --------------------------------------------------------------------- cached features of the tower


def test_another_model_with_the_same_tower_encodes_no_picture_again(tiny, looks):
    rows = questions(tiny, 24)
    other = deepcopy(tiny.model)
    with torch.no_grad():
        other.model.multi_modal_projector.linear_1.weight.mul_(-1)
    first = answer(tiny.model, tiny.processor, rows, 8, 16)
    seen = sum(looks)
    second = answer(other, tiny.processor, rows, 8, 16)
    assert seen == len({row["image"] for row in rows} - {None}) == sum(looks) and second != first
    answers._FEATURES.clear()
    assert (
        answer(other, tiny.processor, rows, 8, 16) == second
    )  # the very answers of one that looked itself


def test_another_tower_or_another_preparation_encodes_pictures_again(tiny, looks):
    rows = questions(tiny, 8)
    answer(tiny.model, tiny.processor, rows, 2)
    seen, other, processor = sum(looks), deepcopy(tiny.model), deepcopy(tiny.processor)
    with torch.no_grad():
        other.model.vision_tower.embeddings.class_embedding.add_(1)
    processor.image_processor.image_mean = [0.1, 0.1, 0.1]
    answer(other, tiny.processor, rows, 2)
    answer(tiny.model, processor, rows, 2)
    assert sum(looks) == 3 * seen


def test_a_changed_picture_is_encoded_again_and_a_broken_one_is_never_cached(tiny, looks, tmp_path):
    files = sorted(tiny.folder.glob("*.png"))
    picture, broken = tmp_path / "one.png", tmp_path / "broken.png"
    picture.write_bytes(files[0].read_bytes())
    rows = [{"text": "what ?", "image": str(picture)}]
    answer(tiny.model, tiny.processor, rows, 2)
    picture.write_bytes(files[1].read_bytes() + b" ")
    answer(tiny.model, tiny.processor, rows, 2)
    assert looks == [1, 1] and len(answers._FEATURES) == 2
    broken.write_bytes(b"no picture")
    said = dict(
        answering(tiny.model, tiny.processor, [*rows, {"text": "what ?", "image": str(broken)}], 2)
    )
    assert said[1].finish == "error" and looks == [1, 1, 1] and len(answers._FEATURES) == 2


def test_the_oldest_features_are_dropped_first(tiny, looks, monkeypatch):
    answer(tiny.model, tiny.processor, questions(tiny, 12), 2, 1)
    kept = list(answers._FEATURES)
    assert len(kept) > 2
    monkeypatch.setattr(
        answers, "FEATURE_BYTES", 2 * max(some.nbytes for some in answers._FEATURES.values())
    )
    answers.cache_features("newest", answers._FEATURES[kept[-1]])
    assert list(answers._FEATURES) == [kept[-1], "newest"]


# ------------------------------------------------------------------------------ benchmarks of a run


def test_scores_have_intervals_and_baselines_for_every_metric_and_category(run):
    scores = evaluate(run)
    assert list(scores.columns) == COLUMNS
    assert {"f1", "accuracy/random", "accuracy/popular", "yes_ratio"} <= set(scores.metric)
    assert (scores.low <= scores.value + 1e-9).all() and (scores.value <= scores.high + 1e-9).all()
    always_yes = scores.set_index("metric").baseline
    assert always_yes["accuracy"] == pytest.approx(50) and always_yes["f1"] == pytest.approx(
        200 / 3
    )
    assert set(scores.judge) == {""} and set(scores.problems) == {0}
    assert pd.read_csv(run.folder / "scores.csv").shape == scores.shape


def test_every_answer_is_cached_with_id_prompt_and_why_it_ended(run):
    evaluate(run)
    header, rows = lines(run.folder / "answers" / "pope.jsonl")
    assert (
        header["decoding"] == "greedy"
        and header["max_new_tokens"] == BENCHMARKS["pope"].max_new_tokens
    )
    assert sorted(int(row["question_id"]) for row in rows) == list(range(12))
    assert all(
        row["prompt"].startswith("is there a ") and row["finish"] in ("stop", "length")
        for row in rows
    )


def test_a_second_evaluation_reads_the_answers_and_loads_no_model_and_needs_no_pictures(run):
    first, second = evaluate(run), evaluate(run)
    assert run.loaded == 1
    pd.testing.assert_frame_equal(first, second)


def test_an_interrupted_evaluation_continues_where_it_stopped(run, monkeypatch):
    whole = evaluate(run)
    path = run.folder / "answers" / "pope.jsonl"
    kept = path.read_text().splitlines(keepends=True)
    path.write_text(
        "".join(kept[:5]) + kept[5][:10]
    )  # four answers, and a fifth cut off in the middle
    asked = []

    def listening(model, processor, samples, *more):
        asked.extend(samples)
        return answering(model, processor, samples, *more)

    monkeypatch.setattr(EVALUATOR, "answering", listening)
    pd.testing.assert_frame_equal(evaluate(run), whole)
    assert len(asked) == 12 - 4
    assert len(lines(path)[1]) == 12


def slow(monkeypatch, after, pause=60.0):
    """answering() that stops for `pause` seconds after so many answers."""

    def answers(*arguments):
        for number, row in enumerate(answering(*arguments), 1):
            yield row
            if number == after:
                time.sleep(pause)

    monkeypatch.setattr(EVALUATOR, "answering", answers)


def wait_for(path, rows):
    end = time.monotonic() + 30
    while time.monotonic() < end:
        if len(read_cache(path)) > rows - 1:
            return
        time.sleep(0.01)
    raise AssertionError(f"{path.name} never had {rows} rows")


def test_an_evaluation_that_is_killed_loses_no_answer(run, monkeypatch):
    whole = evaluate(run)
    path = run.folder / "answers" / "pope.jsonl"
    path.unlink()
    slow(monkeypatch, after=5)
    child = FORK.Process(target=evaluate, args=(run,), kwargs={"batch_size": 2})
    child.start()
    wait_for(path, 1 + 5)
    os.kill(child.pid, signal.SIGKILL)
    child.join()
    monkeypatch.setattr(EVALUATOR, "answering", answering)
    first = lines(path)[1][:5]
    pd.testing.assert_frame_equal(evaluate(run), whole)
    rows = lines(path)[1]
    assert rows[:5] == first and sorted(row["i"] for row in rows) == list(range(12))


def test_of_two_evaluations_at_once_one_waits_and_no_question_is_asked_twice(
    run, monkeypatch, capfd
):
    whole = evaluate(run)
    path = run.folder / "answers" / "pope.jsonl"
    path.unlink()
    slow(monkeypatch, after=5, pause=1.0)
    child = FORK.Process(target=evaluate, args=(run,), kwargs={"batch_size": 2})
    child.start()
    wait_for(path, 1 + 5)
    pd.testing.assert_frame_equal(evaluate(run), whole)
    child.join()
    assert child.exitcode == 0 and "waiting for it" in capfd.readouterr().out
    assert sorted(row["i"] for row in lines(path)[1]) == list(range(12))


def test_a_reader_leaves_a_half_written_line_alone(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text('{"i": 0}\n{"i": 1')
    assert read_cache(path) == [{"i": 0}] and path.read_text().endswith('{"i": 1')
    with locked(path):
        assert read_cache(path, mend=True) == [{"i": 0}] and path.read_text() == '{"i": 0}\n'


def test_a_line_separator_in_an_answer_is_no_end_of_line(run, monkeypatch):
    odd = Answer("yes\u2028no\x85\u00e4\n", "stop")
    monkeypatch.setattr(
        EVALUATOR, "answering", lambda m, p, samples, *more: ((i, odd) for i in range(len(samples)))
    )
    pd.testing.assert_frame_equal(evaluate(run), evaluate(run))
    assert read_cache(run.folder / "answers" / "pope.jsonl")[5]["answer"] == odd.text


def test_a_damaged_line_is_named_and_left_out(run, capfd):
    whole = evaluate(run)
    path = run.folder / "answers" / "pope.jsonl"
    kept = path.read_text().splitlines()
    path.write_text("\n".join([*kept[:3], "{oh", *kept[3:]]) + "\n")
    pd.testing.assert_frame_equal(evaluate(run), whole)
    assert "pope.jsonl: 1 damaged lines are not used" in capfd.readouterr().err and run.loaded == 1


def test_answers_of_another_model_are_refused(run, tiny):
    evaluate(run)
    tiny_model(tiny.processor.tokenizer, seed=1).save_pretrained(run.folder / "model")
    with pytest.raises(
        ValueError, match="answers of another model .*move the file away or delete it to ask again"
    ):
        evaluate(run)


@pytest.mark.parametrize(
    "change, named",
    [({"one_pass": {"pope": ("yes", "no")}}, "decoding"), ({"template": "own"}, "template")],
)
def test_answers_of_another_way_to_decode_are_refused(run, change, named):
    evaluate(run)
    with pytest.raises(ValueError, match=f"answers of another (questions .* and another )?{named}"):
        evaluate(run, **change)


def test_answers_of_another_length_are_refused(run, monkeypatch):
    evaluate(run)
    monkeypatch.setitem(BENCHMARKS, "pope", replace(BENCHMARKS["pope"], max_new_tokens=3))
    with pytest.raises(ValueError, match=r"another max_new_tokens \(16, now 3\)"):
        evaluate(run)


def test_answers_to_other_questions_are_refused_but_labels_may_be_corrected(run):
    evaluate(run)
    path = run.folder / "benchmarks" / "pope" / "questions.jsonl"
    path.write_text(path.read_text().replace('"label": "no"', '"label": "yes"'))
    corrected = evaluate(run).set_index("metric")
    assert corrected.baseline["accuracy"] == 100 and run.loaded == 1
    path.write_text(path.read_text().replace("red star", "green star"))
    with pytest.raises(ValueError, match="another questions"):
        evaluate(run)


def test_a_broken_picture_is_counted_and_asked_again_once_it_is_whole(run, own_pictures, capsys):
    good = (own_pictures / "3.png").read_bytes()
    (own_pictures / "3.png").write_bytes(good[:700])
    scores = evaluate(run)
    asked_of_it = sum(
        row["image"] == "3.png"
        for row in read_cache(run.folder / "benchmarks/pope/questions.jsonl")
        if "image" in row
    )
    assert set(scores.problems) == {2} and asked_of_it in (
        1,
        2,
    )  # the last line has no end, so the reader leaves it out
    assert (
        "2 problems in 12 questions; the first, question 3: truncated picture"
        in capsys.readouterr().out
    )
    rows = lines(run.folder / "answers" / "pope.jsonl")[1]
    assert [row["answer"] for row in rows if row["finish"] == "error"] == ["", ""]
    evaluate(run)
    assert run.loaded == 1, "nothing can be done about it yet"
    (own_pictures / "3.png").write_bytes(good)
    assert set(evaluate(run).problems) == {0} and run.loaded == 2
    assert len(lines(run.folder / "answers" / "pope.jsonl")[1]) == 14


def test_answers_about_pictures_that_changed_are_refused_but_pictures_may_go(
    run, own_pictures, tiny
):
    whole = evaluate(run)
    picture = own_pictures / "2.png"
    old = picture.read_bytes()
    picture.write_bytes(old + b"more")
    with pytest.raises(
        ValueError, match=r"2 answers about pictures that have changed since \(first: 2.png\)"
    ):
        evaluate(run)
    picture.unlink()
    pd.testing.assert_frame_equal(evaluate(run), whole)


def test_pictures_that_are_all_missing_are_named_before_anything_is_asked(run, own_pictures):
    for path in own_pictures.iterdir():
        path.unlink()
    with pytest.raises(
        FileNotFoundError, match="None of the 5 pictures of pope exists; the first: .*0.png"
    ):
        evaluate(run)
    assert run.loaded == 0


def test_one_pass_is_named_in_the_header_and_scored_by_the_same_rule(run):
    scores = evaluate(run, one_pass=True)
    header, rows = lines(run.folder / "answers" / "pope.jsonl")
    assert header["decoding"] == "one pass: yes Yes no No"
    assert {row["finish"] for row in rows} == {"choice"}
    assert {row["answer"].lower() for row in rows} <= {"yes", "no"}
    assert scores.value.notna().all()


def test_several_processes_give_the_same_answers(run, monkeypatch):
    whole = evaluate(run)
    one = sorted(map(str, lines(run.folder / "answers" / "pope.jsonl")[1]))
    (run.folder / "answers" / "pope.jsonl").unlink()
    monkeypatch.setattr(
        parallel, "START", "fork"
    )  # this process holds no GPU, and spawning would import torch anew
    pd.testing.assert_frame_equal(evaluate(run, num_processes=2), whole)
    assert (
        run.loaded == 1 and sorted(map(str, lines(run.folder / "answers" / "pope.jsonl")[1])) == one
    )


class ForgetfulRun(TinyRun):
    """A run whose processes do not know the benchmarks that a notebook added."""

    def load_model(self):
        BENCHMARKS.pop("mine")
        return super().load_model()


def test_a_benchmark_added_at_run_time_is_answered_by_several_processes(run, monkeypatch):
    whole = evaluate(run).value
    monkeypatch.setattr(parallel, "START", "fork")
    monkeypatch.setitem(BENCHMARKS, "mine", replace(BENCHMARKS["pope"], name="mine"))
    (run.folder / "benchmarks" / "pope").rename(run.folder / "benchmarks" / "mine")
    run.__class__ = ForgetfulRun
    scores = evaluate(run, "mine", num_processes=2)
    assert set(scores.benchmark) == {"mine"} and list(scores.value) == list(whole)


def test_questions_on_one_picture_stay_in_one_process():
    asked = [{"image": f"{i % 4}.png" if i % 3 else None} for i in range(60)]
    pieces = parallel.split_by_picture(asked, 7)
    assert sorted(sum(pieces, [])) == list(range(60)) and len(pieces) > 4
    for picture in {"0.png", "1.png", "2.png", "3.png"}:
        assert sum(any(asked[i]["image"] == picture for i in piece) for piece in pieces) == 1


class DyingRun(TinyRun):
    def load_model(self):
        os._exit(3)


def test_a_process_that_dies_is_named_with_what_to_do(run, tiny, monkeypatch):
    monkeypatch.setattr(parallel, "START", "fork")
    run.__class__ = DyingRun
    with pytest.raises(
        RuntimeError, match="so far are cached: call again to continue, with fewer processes"
    ):
        evaluate(run, num_processes=2)


def test_a_process_that_died_between_two_benchmarks_is_one_sentence(monkeypatch):
    class Dead(ThreadPoolExecutor):
        def submit(self, *_):
            raise BrokenProcessPool

    monkeypatch.setattr(parallel, "ProcessPoolExecutor", lambda *_: Dead())
    with parallel.working(None, 2, 8, "vicuna_v1") as ask:
        with pytest.raises(RuntimeError, match="A process of the evaluation died"):
            list(ask([{"image": None, "text": "?"}], 3))


def test_a_model_in_memory_cannot_be_shared(run, tiny):
    with pytest.raises(ValueError, match="Set num_processes=1"):
        evaluate(run, model=tiny.model, name="x", num_processes=2)


def test_a_swapped_models_answers_are_cached_under_its_own_name(run, tiny):
    own = evaluate(run)
    other = tiny_model(tiny.processor.tokenizer, seed=3)
    swapped = evaluate(run, "pope", model=other, name="tiny-run swapped")
    assert set(swapped.run) == {"tiny-run swapped"}
    assert (run.folder / "answers" / "tiny-run swapped" / "pope.jsonl").exists()
    pd.testing.assert_frame_equal(evaluate(run), own)
    assert len(pd.read_csv(run.folder / "scores.csv")) == len(own) + len(swapped)
    with pytest.raises(ValueError, match="both model= and name="):
        evaluate(run, model=other)


def test_scores_written_before_judges_were_named_are_kept(run):
    old = evaluate(run).drop(columns=["judge", "problems"]).assign(run="older")
    old.to_csv(run.folder / "scores.csv", index=False)
    evaluate(run)
    evaluate(run)
    kept = pd.read_csv(run.folder / "scores.csv")
    assert list(kept.columns) == COLUMNS and len(kept) == 2 * len(old) and set(kept.problems) == {0}


def test_unknown_benchmarks_and_missing_folders_raise(run):
    with pytest.raises(ValueError, match="'popes'; known are "):
        evaluate(run, "popes")
    for options in ({"judge": {"popes": Fixed()}}, {"one_pass": {"popes": ("yes", "no")}}):
        with pytest.raises(ValueError, match="'popes'; known are "):
            evaluate(run, "pope", **options)
    with pytest.raises(FileNotFoundError, match="01_data_exploration"):
        evaluate(run, folder=run.folder / "nowhere")
    with pytest.raises(FileNotFoundError, match="mme"):
        evaluate(run, ["pope", "mme"])
    assert run.loaded == 0


def test_a_template_that_cannot_ask_questions_is_refused(run):
    for name in ("vicuna", "plain"):
        with pytest.raises(ValueError, match=f"'{name}' is no template for questions: take vicuna"):
            evaluate(run, template=name)
    assert run.loaded == 0 and not (run.folder / "answers").exists()


def test_without_a_run_a_served_model_and_a_folder_are_needed():
    with pytest.raises(ValueError, match=r"model=ServedModel\(...\) and folder="):
        evaluate(None, "pope")


def test_a_relative_folder_is_relative_to_the_project_not_to_the_working_directory(
    run, monkeypatch, tmp_path_factory
):
    monkeypatch.setattr("vflan.config.ROOT", run.folder)
    monkeypatch.chdir(tmp_path_factory.mktemp("elsewhere"))
    run.recipe.benchmarks = "benchmarks"
    assert len(evaluate(run)) and len(evaluate(run, folder="benchmarks"))


def test_a_trained_run_is_evaluated_from_its_folder_alone(run, recipe):
    from vflan.config import replace
    from vflan.training.trainer import train

    trained = train(replace(recipe, benchmarks=run.recipe.benchmarks, max_steps=1))
    scores = evaluate(trained.folder)
    assert set(scores.run) == {"base"} and (trained.folder / "answers" / "pope.jsonl").exists()
    pd.testing.assert_frame_equal(evaluate(trained), scores)


# --------------------------------------------------------------------- tasks, pairs of runs, judges


def test_each_task_has_a_row_with_its_own_interval(run):
    scores = evaluate(run).set_index("metric")
    tasks = per_task(run, "pope", "accuracy").set_index("task")
    assert list(tasks.index) == ["random", "popular"] and list(tasks.n) == [6, 6]
    for task, row in tasks.iterrows():
        assert row.to_dict() == pytest.approx(scores.loc[f"accuracy/{task}", row.index].to_dict())
    assert run.loaded == 1


def test_a_table_of_tasks_needs_all_answers(run):
    with pytest.raises(FileNotFoundError, match="pope.jsonl lacks 12 answers"):
        per_task(run, "pope")


def test_answers_to_questions_of_the_same_ids_and_other_words_are_not_scored(run):
    """The questions of two mini worlds have the same ids."""
    evaluate(run)
    path = run.folder / "benchmarks" / "pope" / "questions.jsonl"
    path.write_text(path.read_text().replace("is there a star", "is there a square"))
    for read in (per_task, judged_answers):
        with pytest.raises(ValueError, match="pope.jsonl answers other questions than these"):
            read(run, "pope")


def test_two_runs_are_compared_on_the_same_questions(run, tiny, tmp_path_factory, monkeypatch):
    evaluate(run)
    folder = tmp_path_factory.mktemp("other")
    other = TinyRun(folder, tiny)
    other.recipe.benchmarks = run.recipe.benchmarks
    labels = {s["text"]: s["label"] for s in BENCHMARKS["pope"].load(run.recipe.benchmarks)}

    def right(model, processor, samples, *more):
        return ((i, Answer(labels[s["text"]], "stop")) for i, s in enumerate(samples))

    monkeypatch.setattr(EVALUATOR, "answering", right)
    best = evaluate(other).set_index("metric").value
    table = difference(other, run, "pope").set_index("metric")
    mine = {key: m.value() for key, m in kept_items(run, "pope")[0].items()}
    assert best["f1"] == 100 and table.difference["f1"] == pytest.approx(100 - mine["f1"])
    assert ((table.low <= table.difference + 1e-9) & (table.difference <= table.high + 1e-9)).all()
    alike = difference(run, run, "pope")
    assert (alike.difference == 0).all() and (alike.p == 1).all() and table.p["accuracy"] < 1


class Marks:
    """A judge that gives one mark, and fails on one question."""

    title = "marks 1"

    def __init__(self, failed="", mark=1.0, best=1.0):
        self.failed, self.mark, self.best, self.asked = failed, mark, best, 0

    def judge(self, question, reference, answer, sample):
        self.asked += 1
        failed = sample["question_id"] == self.failed
        return Judgement(None if failed else self.mark, "a reason", self.best)


@pytest.mark.parametrize("failed, n", [(("0", "3"), 10), (("0", ""), 11)])
def test_a_question_that_either_judge_failed_on_counts_for_neither_run(run, monkeypatch, failed, n):
    evaluate(run)
    judges = [Marks(failed[0]), Marks(failed[1], mark=0.5)]
    given, load = iter(judges), results.load_benchmark

    def load_with_a_judge_of_its_own(key, folder, judge):
        return load(key, folder, {"pope": next(given)})

    monkeypatch.setattr(results, "load_benchmark", load_with_a_judge_of_its_own)
    row = difference(run, run, "pope").set_index("metric").loc["f1"]
    assert (row.difference, row.low, row.high, row.n) == (50, 50, 50, n)
    assert [judge.asked for judge in judges] == [12, 12]


def test_marks_beyond_ten_are_problems_and_not_left_out_in_silence(run, capsys):
    judge = {"pope": Marks(mark=85.0, best=100.0)}
    with pytest.raises(ValueError, match="no score that can be used .85 of 100 is no score from 0"):
        evaluate(run, judge=judge)

    class Sometimes(Marks):
        def judge(self, question, reference, answer, sample):
            if sample["question_id"] == "1":
                return Judgement(85.0, "fine", 100.0)
            return super().judge(question, reference, answer, sample)

    scores = evaluate(run, judge={"pope": Sometimes()}).set_index("metric")
    assert scores.n["f1"] == 11 and set(scores.problems) == {1}
    assert "question 1: judge: 85 of 100 is no score from 0 to 10" in capsys.readouterr().out
    row = judged_answers(run, "pope", judge={"pope": Sometimes()})[1]
    assert row["right"] is None and row["reason"].startswith("85 of 100")


class Fixed:
    """A judge with an opinion on everything but every third answer."""

    title = "fixed 7"

    def __init__(self):
        self.seen = []

    def judge(self, question, reference, answer, sample):
        self.seen.append((question, reference, answer))
        failed = len(self.seen) % 3 == 0
        return (
            Judgement(None, "no score in the reply")
            if failed
            else Judgement(1.0, "fine", out_of=2.0)
        )


def test_a_benchmark_with_a_rule_of_its_own_can_be_judged_and_failures_are_left_out(run, capsys):
    ruled, judge = evaluate(run), Fixed()
    scores = evaluate(run, judge={"pope": judge}).set_index("metric")
    assert run.loaded == 1 and len(judge.seen) == 12
    assert scores.value["f1"] == 50 and scores.n["f1"] == 8 and set(scores.problems) == {4}
    assert set(scores.judge) == {"fixed 7"} and scores.baseline.isna().all()
    assert "judge: no score in the reply" in capsys.readouterr().out
    kept = pd.read_csv(run.folder / "scores.csv").fillna({"judge": ""})
    assert len(kept[kept.metric == "f1"]) == 2 and len(kept) == len(ruled) + len(scores)


def test_a_judge_needs_references(run, monkeypatch):
    bench = BENCHMARKS["pope"]

    def without(folder):
        return [
            s | {"label": None if s["question_id"] == "7" else s["label"]}
            for s in bench.load(folder)
        ]

    monkeypatch.setitem(
        BENCHMARKS, "pope", SimpleNamespace(name="pope", load=without, prompt=bench.prompt)
    )
    with pytest.raises(
        ValueError, match=r"pope: 1 questions have no reference to judge by \(first: 7\)"
    ):
        evaluate(run, "pope", judge={"pope": Fixed()})


def test_a_judge_for_all_is_only_asked_where_a_judge_is_needed(run):
    judge = Fixed()
    assert set(evaluate(run, judge=judge).judge) == {""} and not judge.seen


def test_a_judge_of_mmbench_is_asked_only_what_no_rule_reads(run, monkeypatch, capsys):
    folder = run.folder / "benchmarks" / "mmbench"
    folder.mkdir()
    text = "Which? (a) red (b) blue Answer with the letter."
    rows = [
        dict(question_id=f"{i}", image="0.png", text=text, label="b", category="color")
        for i in range(3)
    ]
    (folder / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def said(model, processor, samples, *more):
        return ((i, Answer(text, "stop")) for i, text in enumerate(["b", "Hard to say.", "a"]))

    monkeypatch.setattr(EVALUATOR, "answering", said)
    judge = Fixed()
    scores = evaluate(run, "mmbench", judge={"mmbench": judge}).set_index("metric")
    assert [answer for *_, answer in judge.seen] == ["Hard to say."]
    assert scores.value["judged"] == pytest.approx(200 / 3)
    assert scores.value["accuracy"] == pytest.approx(100 / 3)


@pytest.fixture
def open_questions(run):
    """Three questions of LLaVA-Bench's kind, in place of POPE; the lexicon is the mini world's."""
    folder = run.folder / "benchmarks" / "llava_bench"
    folder.mkdir()
    rows = [
        {"question_id": str(i), "image": f"{i}.png", "text": "what is there ?",
         "label": "a red star", "category": c, "facts": [["red", "star"]]}
        for i, c in enumerate(["conversation", "detail", "reasoning"])
    ]  # fmt: skip
    (folder / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "lexicon.json").write_text(json.dumps({"colors": ["red"], "shapes": ["star"]}))
    return folder


def test_the_mini_world_is_judged_by_its_rules_and_says_so(run, open_questions):
    scores = evaluate(run, "llava_bench")
    assert set(scores.judge) == {"rules 1"} and scores.baseline.notna().all()


def test_without_a_lexicon_a_judge_must_be_named_before_anything_is_asked(
    run, open_questions, monkeypatch
):
    bench = BENCHMARKS["llava_bench"]

    def load(folder):
        return [{k: v for k, v in s.items() if k != "lexicon"} for s in bench.load(folder)]

    released = SimpleNamespace(name="llava_bench", load=load, prompt=bench.prompt, judged=True)
    monkeypatch.setitem(BENCHMARKS, "llava_bench", released)
    with pytest.raises(ValueError, match=r"llava_bench needs a judge: give judge=EndpointJudge"):
        evaluate(run, ["pope", "llava_bench"])
    assert run.loaded == 0


def test_what_a_model_has_to_judge_is_named_and_left_out_of_notebooks(run, open_questions, capsys):
    folder = run.folder / "benchmarks"
    assert set(scorable(folder)) == {"pope", "llava_bench"} and not capsys.readouterr().out
    (open_questions / "lexicon.json").unlink()
    assert scorable(folder) == ["pope"]
    assert "a model has to judge the answers: llava_bench" in capsys.readouterr().out


def test_the_numbers_of_a_score_do_not_depend_on_how_it_was_asked(run):
    """Batch sizes and resumption change neither value nor interval."""
    first = evaluate(run, batch_size=3)
    (run.folder / "answers" / "pope.jsonl").unlink()
    pd.testing.assert_frame_equal(evaluate(run, batch_size=64), first)
    assert np.isfinite(first[["value", "low", "high", "baseline"]].to_numpy()).all()


def test_judged_answers_say_which_are_right_as_the_score_does(run):
    scores = evaluate(run, "pope").set_index("metric").value
    rows = judged_answers(run, "pope")
    assert [row["answer"] for row in rows] == [row["answer"] for row in sorted(
        lines(run.folder / "answers" / "pope.jsonl")[1], key=lambda row: row["i"])]  # fmt: skip
    assert 100 * np.mean([row["right"] for row in rows]) == pytest.approx(scores["accuracy"])
    assert 0 < sum(row["right"] for row in rows) < len(rows), (
        "a model that is always right would prove nothing"
    )
    assert {row["benchmark"] for row in rows} == {"pope"} and not any(row["reason"] for row in rows)


def test_a_judges_reason_has_its_points_and_half_of_them_count_as_right(run):
    class Judge:
        title = "strict 1"

        def judge(self, question, reference, answer, sample):
            marks = {"0": 1.0, "1": 2.0}.get(sample["question_id"])
            return Judgement(marks, "because" if marks else "no score in the reply", out_of=4.0)

    evaluate(run, "pope")
    first, second, third, *_ = judged_answers(run, "pope", judge={"pope": Judge()})
    assert (first["right"], first["reason"]) == (False, "1 of 4: because")
    assert (second["right"], second["reason"]) == (True, "2 of 4: because")
    assert (third["right"], third["reason"]) == (None, "no score in the reply")


def test_a_question_that_is_scored_in_pairs_is_right_by_itself():
    rows = [dict(question_id="a", image="a.png", text="?", label="yes", category="color")]
    assert BENCHMARKS["mme"].items(rows, ["Yes"]) == {}
    assert [results._is_right(BENCHMARKS["mme"], rows[0], text) for text in ("Yes", "no")] == [
        True,
        False,
    ]


def test_an_answer_to_a_question_without_label_is_neither_right_nor_wrong():
    row = dict(question_id="a", image="a.png", text="?", label=None, category="random")
    for name in ("pope", "mme", "vqav2", "heldout"):
        assert results._is_right(BENCHMARKS[name], row, "yes") is None


def test_new_scores_replace_old_ones_in_place(tmp_path):
    def table(**values):
        rows = [(run, "pope", "f1", value, 0, "", 0) for run, value in values.items()]
        return pd.DataFrame(
            rows, columns=["run", "benchmark", "metric", "value", "seed", "judge", "problems"]
        )

    keep_scores(tmp_path / "scores.csv", table(a=1.0, b=2.0, c=3.0))
    keep_scores(tmp_path / "scores.csv", table(b=9.0, d=4.0, a=8.0))
    kept = pd.read_csv(tmp_path / "scores.csv")
    assert list(zip(kept.run, kept.value)) == [("a", 8), ("b", 9), ("c", 3), ("d", 4)]


# ------------------------------------------------------------------------------------------- memory


@pytest.fixture
def living(monkeypatch):
    """Bytes of keys and values that exist `now`, and the `most` at any time."""
    found, known = SimpleNamespace(most=0, now=0), set()

    def free(key, size):
        known.discard(key)
        found.now -= size

    def counted(real):
        def made(layer, *arguments, **more):
            out = real(layer, *arguments, **more)
            for storage in (tensor.untyped_storage() for tensor in (layer.keys, layer.values)):
                if storage._cdata not in known:
                    known.add(storage._cdata)
                    found.now += storage.nbytes()
                    weakref.finalize(storage, free, storage._cdata, storage.nbytes()).atexit = False
            found.most = max(found.most, found.now)
            return out

        return made

    for name in ("update", "batch_select_indices"):
        monkeypatch.setattr(DynamicLayer, name, counted(getattr(DynamicLayer, name)))
    return found


def cache_bytes(model, rows, positions):
    text = model.config.text_config
    width = text.num_key_value_heads * text.hidden_size // text.num_attention_heads
    return 2 * 4 * text.num_hidden_layers * width * rows * positions


def deep(tiny, layers=16):
    """The tiny model with many layers: one layer of its cache is little beside all."""
    config = deepcopy(tiny.model.config)
    config.text_config.num_hidden_layers = layers
    torch.manual_seed(0)
    return type(tiny.model)(config).eval()


@pytest.mark.parametrize("each", [1, 2, 9], ids=["a question a picture", "two", "a batch of them"])
def test_no_more_than_one_cache_is_alive_at_a_time(tiny, tmp_path, living, each):
    asked = [
        {"text": "is there a star ?", "image": path}
        for path in twins(tiny, tmp_path, 16)
        for _ in range(each)
    ]
    answer(deep(tiny), tiny.processor, asked, max_new_tokens=1, batch_size=16)
    ids = prompt_ids("is there a star ?", tiny.processor.tokenizer, has_image=True)
    question = len(ids) - ids.index(IMAGE_TOKEN_INDEX) - 1
    wide = ids.index(IMAGE_TOKEN_INDEX) + 16 + question * (1 if each < 9 else 5)
    # of the whole shelf; each row has all the questions on its picture
    rows = 16 if each < 9 else 18
    wide += question if each == 2 else 0
    assert 0 < living.most <= 1.15 * cache_bytes(deep(tiny), rows, wide)


def twins(tiny, folder, number):
    """The five pictures again and again, each as a file of its own."""
    paths = [folder / f"{i}.png" for i in range(number)]
    for i, path in enumerate(paths):
        path.write_bytes((tiny.folder / f"{i % 5}.png").read_bytes())
    return list(map(str, paths))


@pytest.mark.parametrize("tokens", [1, 12])
@pytest.mark.parametrize("each", [1, 3, 20])
def test_caches_stay_below_the_memory_limit(tiny, living, tmp_path, tokens, each):
    asked = [
        row | {"image": path} for path in twins(tiny, tmp_path, 16) for row in questions(tiny, each)
    ]
    model, limit = deep(tiny), 800_000
    whole = answer(model, tiny.processor, asked, tokens, batch_size=60, memory=1 << 40)
    free, living.most = living.most, 0
    assert answer(model, tiny.processor, asked, tokens, batch_size=60, memory=limit) == whole
    assert limit / 4 < living.most <= limit < free


@pytest.mark.parametrize("limit", [1, 100_000, 1_000_000, 10_000_000])
def test_answers_are_the_same_whatever_the_memory(tiny, limit):
    asked = questions(tiny, 40)
    whole = dict(answering(tiny.model, tiny.processor, asked, 12, memory=1 << 50))
    found = list(answering(tiny.model, tiny.processor, asked, 12, memory=limit))
    assert dict(found) == whole and len(found) == len(asked)


def failing(model, at, most=math.inf):
    """A hook: out of memory in pass number `at`, and in every pass with more than `most` rows."""
    passes = iter(range(1 << 30))

    def fail(module, positional, named):
        read = named["input_ids"] if named.get("inputs_embeds") is None else named["inputs_embeds"]
        if next(passes) == at or len(read) > most:
            raise torch.OutOfMemoryError("CUDA out of memory.")

    return model.model.language_model.register_forward_pre_hook(fail, with_kwargs=True)


@pytest.mark.parametrize("at", [1, 2, 3, 7, 20])
def test_when_memory_runs_out_batches_are_halved_and_nothing_is_asked_twice(tiny, at):
    asked = questions(tiny, 40)
    whole = dict(answering(tiny.model, tiny.processor, asked, 6))
    hook = failing(tiny.model, at, most=math.inf)
    try:
        found = list(answering(tiny.model, tiny.processor, asked, 6))
    finally:
        hook.remove()
    assert dict(found) == whole and len(found) == len(asked)


@pytest.mark.parametrize("most", [1, 2, 3])
def test_a_batch_becomes_as_small_as_it_has_to_be(tiny, most, living):
    asked = questions(tiny, 40)
    whole = dict(answering(tiny.model, tiny.processor, asked, 6))
    hook = failing(tiny.model, -1, most)
    try:
        found = list(answering(tiny.model, tiny.processor, asked, 6))
    finally:
        hook.remove()
    assert dict(found) == whole and len(found) == len(asked)
    assert living.now == 0, "what failed is still alive"


def test_one_question_that_does_not_fit_raises_one_sentence(tiny):
    hook = failing(tiny.model, -1, most=0)
    try:
        with pytest.raises(RuntimeError, match="One question alone does not fit into the memory"):
            list(
                answering(
                    tiny.model, tiny.processor, [{"text": "what is there ?", "image": None}] * 9, 6
                )
            )
    finally:
        hook.remove()


def test_the_tower_encodes_half_of_the_pictures_when_memory_runs_out(tiny, monkeypatch):
    asked = questions(tiny, 20)
    whole = answer(tiny.model, tiny.processor, asked)
    real = answers.image_features

    def look(model, values):
        if len(values) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return real(model, values)

    monkeypatch.setattr(answers, "_FEATURES", {})
    monkeypatch.setattr(answers, "image_features", look)
    assert answer(tiny.model, tiny.processor, asked) == whole


def test_a_question_that_nobody_answered_is_left_out_of_every_score(run):
    """POPE reads an empty answer as yes, so questions without their pictures must not count."""
    folder = run.folder / "benchmarks"
    samples = BENCHMARKS["pope"].load(folder)
    yes = [i for i, sample in enumerate(samples) if sample["label"] == "yes"]
    replies = [
        Answer("", "error", "gone") if i in yes else Answer("yes", "stop") for i in range(12)
    ]
    test = EVALUATOR.load_benchmark("pope", folder)
    scores = EVALUATOR.score_answers("run", test, replies).set_index("metric")
    assert scores.loc["accuracy", "value"] == 0 and scores.loc["accuracy", "n"] == 12 - len(yes)
    assert set(scores.problems) == {len(yes)}
    nobody = [Answer("", "error", "the endpoint is down")] * 12
    with pytest.raises(ValueError, match="no question was answered.*the endpoint is down"):
        EVALUATOR.score_answers("run", test, nobody)
    assert run.loaded == 0


def test_a_rotation_without_an_answer_takes_its_question_out():
    text = "Which?\nA. cat\nB. dog"
    rows = [
        dict(question_id=str(q + k * 1_000_000), text=text, label="B", image=None, category="x")
        | dict(rotation_of=str(q), exact=True)
        for k in range(2)
        for q in range(2)
    ]
    mmbench = BENCHMARKS["mmbench"]
    test = EVALUATOR.LoadedBenchmark(mmbench, rows, rows, "greedy", None, {})
    items, _ = test.measure(["B", "B", None, "B"])
    assert items["accuracy"].value() == 100 and len(items["accuracy"].num) == 1


@pytest.mark.parametrize("processes", [0, -1, 2.0, True, "2", None])
def test_what_is_no_number_of_processes_is_one_sentence_before_anything_is_read(processes):
    with pytest.raises(ValueError, match="a whole number of at least 1 is needed"):
        evaluate(None, model=SimpleNamespace(answering=1, folder_name="m"), folder="nowhere",
                 num_processes=processes)  # fmt: skip


@pytest.mark.skipif(torch.cuda.is_available(), reason="GPUs are counted elsewhere")
def test_thousands_of_processes_are_not_started():
    with pytest.raises(ValueError, match="10000 processes were requested"):
        evaluate(None, model=SimpleNamespace(answering=1, folder_name="m"), folder="nowhere",
                 num_processes=10_000)  # fmt: skip
