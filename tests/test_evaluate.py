"""A random model answers: batches must not change answers, and kept answers must be the right ones."""

import json
import sys
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedTokenizerFast,
)

from vflan.conversation import IMAGE_TOKEN_INDEX, SYSTEM, prompt_ids
from vflan.evaluate import answer, answering, evaluate

WORDS = "what is there a red blue green star circle in the picture ? yes no USER : ASSISTANT \n".split(" ")


def tiny_tokenizer():
    words = [
        "<unk>",
        "<s>",
        "</s>",
        "<image>",
        *dict.fromkeys([*SYSTEM.replace(".", " .").replace(",", " ,").split(), *WORDS]),
    ]
    core = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="<unk>",
        extra_special_tokens={"image_token": "<image>"},
    )  # fmt: skip


def tiny_model(tokenizer, seed=0):
    torch.manual_seed(seed)
    small = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)
    vision = CLIPVisionConfig(image_size=48, patch_size=12, **small)
    text = LlamaConfig(vocab_size=len(tokenizer), num_key_value_heads=2, initializer_range=0.6, pad_token_id=0, **small)
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=3, image_seq_length=16)
    return LlavaForConditionalGeneration(config).eval()


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    for i in range(5):
        Image.fromarray(rng.integers(0, 255, (48, 48, 3), dtype=np.uint8)).save(folder / f"{i}.png")
    tokenizer = tiny_tokenizer()
    processor = SimpleNamespace(
        tokenizer=tokenizer,
        image_processor=CLIPImageProcessorPil(size={"shortest_edge": 48}, crop_size={"height": 48, "width": 48}),
    )
    return SimpleNamespace(model=tiny_model(tokenizer), processor=processor, folder=folder)


def questions(tiny, n=40):
    rng = np.random.default_rng(1)
    rows = []
    for i in range(n):
        text = " ".join(rng.choice(WORDS[:14], size=rng.integers(1, 12)))
        rows.append({"text": text, "image": str(tiny.folder / f"{i % 5}.png") if i % 7 else None})
    return rows


def by_generate(tiny, sample, max_new_tokens):
    """The same question through transformers' own generate, one at a time: the reference."""
    tokenizer, model = tiny.processor.tokenizer, tiny.model
    ids, more = prompt_ids(sample["text"], tokenizer, "vicuna_v1", has_image=bool(sample["image"])), {}
    if sample["image"]:
        at = ids.index(IMAGE_TOKEN_INDEX)
        ids = ids[:at] + [3] * 16 + ids[at + 1 :]
        with Image.open(sample["image"]) as image:
            more["pixel_values"] = tiny.processor.image_processor([image], return_tensors="pt")["pixel_values"]
    ids = torch.tensor([ids])
    more |= {"attention_mask": torch.ones_like(ids), "eos_token_id": tokenizer.eos_token_id, "pad_token_id": 0}
    out = model.generate(input_ids=ids, do_sample=False, max_new_tokens=max_new_tokens, **more)
    return tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True).strip()


def test_batched_answers_equal_those_of_generate_one_by_one(tiny):
    rows = questions(tiny)
    expected = [by_generate(tiny, row, 10) for row in rows]
    assert len(set(expected)) > 10, "a model that always says the same would prove nothing"
    assert len({len(e.split()) for e in expected}) > 1, "some answers should end early"
    assert answer(tiny.model, tiny.processor, rows, max_new_tokens=10, batch_size=16) == expected
    assert answer(tiny.model, tiny.processor, rows, max_new_tokens=10, batch_size=1) == expected


def test_each_picture_goes_through_the_tower_once(tiny, monkeypatch):
    seen, tower = [], type(tiny.model).get_image_features

    def counting(model, pixel_values, **more):
        seen.append(len(pixel_values))
        return tower(model, pixel_values=pixel_values, **more)

    monkeypatch.setattr(type(tiny.model), "get_image_features", counting)
    rows = questions(tiny)
    answer(tiny.model, tiny.processor, rows, max_new_tokens=2, batch_size=4)
    assert sum(seen) == 5


def test_text_only_questions_need_no_picture(tiny):
    rows = [{"text": "what is there ?", "image": None}, {"text": "a star ?"}]
    assert answer(tiny.model, tiny.processor, rows, 5) == [by_generate(tiny, {"image": None} | row, 5) for row in rows]
    assert answer(tiny.model, tiny.processor, []) == []


def test_answering_leaves_the_training_mode_as_it_was(tiny):
    tiny.model.train()
    answer(tiny.model, tiny.processor, questions(tiny, 3), 1)
    assert tiny.model.training
    tiny.model.eval()


# ------------------------------------------------------------------------------------------------- benchmarks of a run


class TinyRun:
    """What evaluate() needs of a Run: a folder with weights, a recipe, a model; it counts how often that is loaded."""

    def __init__(self, folder, tiny, seed=0):
        self.folder, self.tiny, self.loaded = folder, tiny, 0
        self.recipe = SimpleNamespace(name="tiny-run", seed=seed, benchmarks=str(folder / "benchmarks"))
        tiny.model.save_pretrained(folder / "model")

    def load_model(self):
        self.loaded += 1
        return self.tiny.model

    def processor(self):
        return self.tiny.processor


@pytest.fixture
def run(tiny, tmp_path):
    (tmp_path / "benchmarks" / "pope").mkdir(parents=True)
    (tmp_path / "benchmarks" / "images").symlink_to(tiny.folder)
    rows = [
        {
            "question_id": str(i),
            "image": f"{i % 5}.png",
            "text": f"is there a {w} ?",
            "label": label,
            "category": category,
        }
        for i, (w, label, category) in enumerate(
            [
                ("star", "yes", "random"),
                ("circle", "no", "random"),
                ("red star", "yes", "popular"),
                ("blue", "no", "popular"),
            ]
            * 3
        )
    ]
    (tmp_path / "benchmarks" / "pope" / "questions.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return TinyRun(tmp_path, tiny)


def test_scores_have_intervals_and_baselines_for_every_metric_and_category(run):
    scores = evaluate(run)
    assert list(scores.columns) == ["run", "benchmark", "metric", "value", "low", "high", "n", "seed", "baseline"]
    assert {"f1", "accuracy/random", "accuracy/popular", "yes_ratio"} <= set(scores.metric)
    assert (scores.low <= scores.value + 1e-9).all() and (scores.value <= scores.high + 1e-9).all()
    always_yes = scores.set_index("metric").baseline
    assert always_yes["accuracy"] == pytest.approx(50) and always_yes["f1"] == pytest.approx(200 / 3)
    assert pd.read_csv(run.folder / "scores.csv").shape == scores.shape


def test_a_second_evaluation_reads_the_answers_and_loads_no_model(run):
    first, second = evaluate(run), evaluate(run)
    assert run.loaded == 1
    pd.testing.assert_frame_equal(first, second)


def test_an_interrupted_evaluation_goes_on_where_it_stopped(run, monkeypatch):
    whole = evaluate(run)
    path = run.folder / "answers" / "pope.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:5]) + lines[5][:10])  # four answers, and a fifth cut off in the middle
    asked = []

    def listening(model, processor, samples, *more):
        asked.extend(samples)
        return answering(model, processor, samples, *more)

    monkeypatch.setattr(sys.modules["vflan.evaluate"], "answering", listening)  # vflan.evaluate itself is the function
    pd.testing.assert_frame_equal(evaluate(run), whole)
    assert len(asked) == 12 - 4


def test_answers_of_another_model_are_refused(run, tiny):
    evaluate(run)
    tiny_model(tiny.processor.tokenizer, seed=1).save_pretrained(run.folder / "model")
    with pytest.raises(ValueError, match="answers of another model"):
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


def test_a_swapped_model_is_kept_under_its_own_name(run, tiny):
    own = evaluate(run)
    other = tiny_model(tiny.processor.tokenizer, seed=3)
    swapped = evaluate(run, "pope", model=other, name="tiny-run swapped")
    assert (
        set(swapped.run) == {"tiny-run swapped"}
        and (run.folder / "answers" / "tiny-run swapped" / "pope.jsonl").exists()
    )
    pd.testing.assert_frame_equal(evaluate(run), own)
    with pytest.raises(ValueError, match="both model= and name="):
        evaluate(run, model=other)


def test_unknown_benchmarks_and_missing_folders_are_named(run):
    with pytest.raises(ValueError, match="'popes'; known are heldin"):
        evaluate(run, "popes")
    with pytest.raises(FileNotFoundError, match="01_data_exploration"):
        evaluate(run, folder=run.folder / "nowhere")
    with pytest.raises(FileNotFoundError, match="mme"):
        evaluate(run, "mme")


def test_a_relative_folder_hangs_from_the_project_not_from_the_working_directory(run, monkeypatch, tmp_path_factory):
    monkeypatch.setattr("vflan.recipe.ROOT", run.folder)
    monkeypatch.chdir(tmp_path_factory.mktemp("elsewhere"))
    run.recipe.benchmarks = "benchmarks"
    assert len(evaluate(run)) and len(evaluate(run, folder="benchmarks"))


def test_a_trained_run_is_evaluated_from_its_folder_alone(run, recipe):
    from vflan.recipe import replace
    from vflan.train import train

    trained = train(replace(recipe, benchmarks=run.recipe.benchmarks, max_steps=1))
    scores = evaluate(trained.folder)
    assert set(scores.run) == {"base"} and (trained.folder / "answers" / "pope.jsonl").exists()
    pd.testing.assert_frame_equal(evaluate(trained), scores)
