"""Batches: every row once, packed without a leak; the tower runs once a picture."""

import base64
import dataclasses
import errno
import json
import math
import shutil
import threading
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import vflan
from vflan.data.conversation import IGNORE_INDEX, IMAGE_TOKEN_INDEX, encode, encode_many, expand
from vflan.data.images import read_picture
from vflan.models import image_features
from vflan.models import loss as learner
from vflan.models.image_features import Pictures
from vflan.models.llava import freeze, load_model, load_processor
from vflan.models.loss import Learner, answer_loss
from vflan.training import batching
from vflan.training.batching import (
    Data,
    batch_order,
    feed,
    micro_batches,
    pack,
    packed_step,
    prepare,
)
from vflan.training.validation import hold_out


@pytest.fixture
def mixed(recipe):
    """A recipe with 32 rows of many lengths: pictures (two share one), text-only, long chats."""
    rows = json.loads(Path(recipe.samples).read_text())
    for i, row in enumerate(rows):
        turns = row["conversations"]
        turns[1]["value"] = " and ".join(["a red square"] * (1 + i % 5))
        if i % 3 == 1:
            del row["image"]
            turns[0]["value"] = "What is a square?"
        if i % 4 == 3:
            turns += [
                {"from": "human", "value": "Is it green?"},
                {"from": "gpt", "value": "yes it is"},
            ]
    rows[2]["image"] = rows[0]["image"]
    Path(recipe.samples).write_text(json.dumps(rows))
    return vflan.replace(recipe, packing="packed", max_length=256)


def prepared(recipe, folder):
    """(model, data, pictures) as `fit` makes them."""
    model, processor = load_model(recipe), load_processor(recipe)
    freeze(model, recipe)
    data = prepare(recipe, processor.tokenizer, model.config, folder)
    return model, data, Pictures(data, model, processor, recipe)


def summed(net, data, pictures, rows):
    """Loss and gradients of some rows in one forward pass."""
    net.zero_grad()
    loss = net(*data.batch(rows, "cpu"), pictures(rows))
    loss.backward()
    return loss.item(), {
        name: weight.grad.clone()
        for name, weight in net.named_parameters()
        if weight.grad is not None
    }


def packing_error(net, data, pictures, rows):
    """Compare one packed row with its conversations one by one.

    Returns the largest difference of the loss or of any gradient, per answer token.
    """
    packed, gradients = summed(net, data, pictures, rows)
    alone = [summed(net, data, pictures, [row]) for row in rows]
    tokens = data.supervised[rows].sum()
    apart = {name: sum(found[name] for _, found in alone) for name in gradients}
    worst = max((gradients[name] - apart[name]).abs().max().item() for name in gradients)
    return max(abs(packed - sum(loss for loss, _ in alone)), worst) / tokens


def test_the_loss_is_that_of_the_plain_full_forward(mixed, tmp_path):
    """Precomputed features, no mask and logits at answers only give the model's own loss."""
    recipe = vflan.replace(mixed, packing="padded")
    model, data, pictures = prepared(recipe, tmp_path)
    chosen = [0, 1, 3]
    ours = (
        Learner(model, recipe)(*data.batch(chosen, "cpu"), pictures(chosen))
        / data.supervised[chosen].sum()
    )
    ids, labels = zip(*(map(torch.from_numpy, data.row(row)) for row in chosen))
    pad = torch.nn.utils.rnn.pad_sequence
    mask = pad([torch.ones(len(row), dtype=torch.long) for row in ids], batch_first=True)
    ids, labels = (
        pad(ids, batch_first=True).long(),
        pad(labels, batch_first=True, padding_value=IGNORE_INDEX).long(),
    )
    shown = [read_picture(str(data.pictures[data.picture[row]])) for row in (0, 3)]
    pixels = load_processor(recipe).image_processor(shown, return_tensors="pt")["pixel_values"]
    full = model(input_ids=ids, pixel_values=pixels, attention_mask=mask, labels=labels).loss
    assert torch.allclose(ours, full, atol=1e-5)


def test_packed_rows_have_the_loss_and_gradients_of_single_rows(mixed, tmp_path):
    model, data, pictures = prepared(mixed, tmp_path)
    rows = list(range(12))
    assert {data.picture[row] >= 0 for row in rows} == {True, False}
    assert packing_error(Learner(model, mixed), data, pictures, rows) < 1e-5


def test_packing_is_exact_with_gradient_checkpointing_and_grouped_heads(mixed, tmp_path):
    recipe = vflan.replace(mixed, gradient_checkpointing=True)
    model, data, pictures = prepared(recipe, tmp_path)
    config = model.config.text_config
    assert config.num_key_value_heads < config.num_attention_heads
    net = Learner(model, recipe).train()
    assert packing_error(net, data, pictures, list(range(12))) < 1e-5


def test_the_proof_of_packing_sees_a_leak(mixed, tmp_path):
    """The same proof fails when position ids run on from one conversation into the next."""
    model, data, pictures = prepared(mixed, tmp_path)

    class Leaking(Learner):
        def forward(self, input_ids, position_ids, *rest):
            return super().forward(input_ids, torch.arange(position_ids.shape[1])[None], *rest)

    assert packing_error(Leaking(model, mixed), data, pictures, list(range(12))) > 1e-4


def reference_varlen(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, scale=None, **causal):
    """Compute what PyTorch's varlen kernel does on a GPU; (T, heads, width) in and out."""
    assert (
        causal in (dict(window_size=(-1, 0)), dict(is_causal=True))
        and max_q == cu_seq_q.diff().max()
    )
    attend = torch.nn.functional.scaled_dot_product_attention
    pieces = zip(
        *(x.transpose(0, 1).split(cu_seq_q.diff().tolist(), dim=1) for x in (query, key, value))
    )
    return torch.cat(
        [attend(*piece, is_causal=True, scale=scale) for piece in pieces], dim=1
    ).transpose(0, 1)


def test_the_varlen_kernel_is_given_what_keeps_conversations_apart(mixed, tmp_path, monkeypatch):
    monkeypatch.setattr(learner, "varlen_attn", reference_varlen)
    model, data, pictures = prepared(mixed, tmp_path)
    net = Learner(model, mixed)
    assert model.model.language_model.config._attn_implementation == "by_conversation"  # on a CPU
    model.model.language_model.set_attn_implementation("varlen")
    assert packing_error(net, data, pictures, list(range(12))) < 1e-5


def test_packed_rows_take_the_fastest_kernel_that_is_there(monkeypatch):
    assert learner.packed_attention(torch.float32) == "by_conversation"
    monkeypatch.setattr(learner, "is_flash_attn_2_available", lambda: False)
    assert learner.packed_attention(torch.bfloat16) == "varlen"
    monkeypatch.setattr(learner, "varlen_attn", None)
    assert learner.packed_attention(torch.bfloat16) == "by_conversation"


def test_compiled_layers_learn_the_same(mixed, tmp_path, monkeypatch):
    compiled, real = [], torch.nn.Module.compile

    def compile(module, **options):  # without the C compiler, which takes half a minute
        compiled.append(options)
        real(module, backend="eager", **options)

    monkeypatch.setattr(torch.nn.Module, "compile", compile)
    found = []
    for recipe in (mixed, vflan.replace(mixed, compile=True, gradient_checkpointing=True)):
        model, data, pictures = prepared(recipe, tmp_path)
        net = Learner(model, recipe)
        found.append([summed(net, data, pictures, rows) for rows in ([0, 1, 2], [3, 4, 5, 6], [7])])
    assert compiled == [dict(dynamic=True)] * len(model.model.language_model.layers)
    for (loss, gradients), (other, others) in zip(*found):
        assert loss == pytest.approx(other, rel=1e-5) and gradients.keys() == others.keys()
        assert all(torch.allclose(gradients[name], others[name], atol=1e-4) for name in gradients)


def test_a_model_that_trains_on_packed_rows_still_answers_with_padding(mixed, tmp_path):
    """Left-padded prompts of two lengths get the answers of the untouched model."""
    model = load_model(mixed)
    ids = torch.randint(5, 200, (2, 9))
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    asked = dict(input_ids=ids, attention_mask=mask, max_new_tokens=8)
    before = model.generate(**asked)
    Learner(model, mixed)
    assert torch.equal(model.generate(**asked), before)


def test_an_answer_cut_at_max_length_is_counted_and_listed_as_check_lists_it(mixed, tmp_path):
    rows = json.loads(Path(mixed.samples).read_text())
    rows[23]["conversations"].append(
        {"from": "human", "value": "Why?"}
    )  # is left out too, and said before the cut
    Path(mixed.samples).write_text(json.dumps(rows))
    processor, samples = load_processor(mixed), vflan.load_samples(mixed.samples, mixed.images)
    whole = prepare(mixed, processor.tokenizer, load_model(mixed).config, tmp_path)
    assert whole.repaired == 1 and whole.bad == 0
    recipe = vflan.replace(mixed, max_length=int(np.sort(whole.lengths)[-8]), max_bad_share=1.0)
    data = prepare(recipe, processor.tokenizer, load_model(mixed).config, tmp_path)
    report = vflan.check(
        samples, processor.tokenizer, recipe.max_length, image_tokens=data.image_tokens
    )
    listed = [json.loads(line) for line in (tmp_path / "repaired.jsonl").read_text().splitlines()]
    assert listed == report.repaired.to_dict("records") and data.repaired == len(listed) > 4
    assert any(
        "without an answer; " in row["reason"] and "answer tokens beyond" in row["reason"]
        for row in listed
    )
    assert data.bad == len(report.bad) and data.lengths.max() == recipe.max_length


def test_a_refusal_names_rows_and_reasons_shortly(recipe, tmp_path):
    rows = json.loads(Path(recipe.samples).read_text())
    picture = base64.b64encode(bytes(range(256)) * 800).decode()
    for number, row in enumerate(rows[:3]):
        row |= {"image": "/9j/" + picture, "id": number}
    rows[3] |= {"id": "i" * 100_000, "image": "gone.png"}
    Path(recipe.samples).write_text(json.dumps(rows))
    with pytest.raises(ValueError, match="4 of 32 samples are bad") as refused:
        prepared(recipe, tmp_path)
    said = str(refused.value)
    assert said.count("base64 in place of a name") == 3 and len(said) < 2000
    assert "row 3 (iii" in said and "missing picture" in said
    Path(recipe.samples).write_text("[]")
    with pytest.raises(ValueError, match="holds no rows"):
        prepared(recipe, tmp_path)


def test_a_finished_run_is_reused_when_more_bad_rows_are_allowed(recipe):
    """`max_bad_share` decides whether a run starts, so the finished arms of a sweep stay."""
    small = vflan.replace(recipe, max_steps=1)
    run = vflan.train(small)
    before = (run.folder / "done.json").stat().st_mtime_ns
    again = vflan.train(vflan.replace(small, max_bad_share=0.5))
    assert again.folder == run.folder
    assert (again.folder / "done.json").stat().st_mtime_ns == before
    with pytest.raises(ValueError, match="holds another recipe's run"):
        vflan.train(vflan.replace(small, max_bad_share=0.5, lr=1e-3))


@given(st.lists(st.integers(1, 100), min_size=1, max_size=60))
@settings(deadline=None)
def test_packs_hold_every_row_once_and_never_too_much(lengths):
    groups = pack(np.array(lengths), 100)
    assert sorted(i for group in groups for i in group) == list(range(len(lengths)))
    assert all(sum(lengths[i] for i in group) <= 100 for group in groups)
    assert groups == pack(np.array(lengths), 100)


def test_best_fit_fills_what_has_least_room():
    assert pack([60, 50, 40, 45], 100) == [[0, 2], [1, 3]]


def test_no_pack_is_left_nearly_empty():
    assert [len(group) for group in pack([10] * 12, 100)] == [
        6,
        6,
    ]  # first come, first served gives 10 and 2
    assert [len(group) for group in pack([10] * 12, 100, processes=4)] == [3, 3, 3, 3]


@given(st.integers(1, 4), st.integers(1, 8), st.sampled_from(["packed", "padded"]), st.randoms())
@settings(deadline=None)
def test_processes_share_a_step_in_as_many_micro_batches_each(world, each, packing, random):
    data = data_of([random.randint(10, 99) for _ in range(64)], packing == "packed")
    recipe = batches_recipe(packing=packing, micro_batch=3, max_length=100)
    rows = np.array(random.sample(range(64), world * each))
    shares = micro_batches(data, rows, recipe, world)
    assert len(shares) == world and len({len(parts) for parts in shares}) == 1
    assert sorted(row for parts in shares for part in parts for row in part) == sorted(rows)
    if packing == "packed":
        assert all(data.lengths[part].sum() <= 100 for parts in shares for part in parts)


def test_logits_in_stretches_give_the_loss_and_gradients_of_all_at_once(monkeypatch):
    torch.manual_seed(0)
    head, hidden = torch.nn.Linear(16, 50, bias=False), torch.randn(70, 16, requires_grad=True)
    targets, seen = torch.randint(0, 50, (70,)), []
    head.register_forward_hook(lambda module, given, out: seen.append(out.numel()))

    def run():
        hidden.grad = head.weight.grad = None
        loss = answer_loss(hidden, head, targets)
        loss.backward()
        return loss.detach(), hidden.grad, head.weight.grad

    whole = run()
    seen.clear()
    monkeypatch.setattr(learner, "LOGITS", 600)
    for ours, theirs in zip(run(), whole):
        assert torch.allclose(ours, theirs, rtol=1e-6, atol=1e-6)
    assert (
        max(seen) <= 600 and len(seen) == 2 * 6
    )  # 12 rows at a time, forward and again in the backward pass
    reference = torch.nn.functional.cross_entropy(head(hidden), targets, reduction="sum")
    assert torch.allclose(whole[0], reference, rtol=1e-6)


def test_a_stretched_loss_trains_a_model_to_the_same_losses(mixed, monkeypatch):
    whole = vflan.train(vflan.replace(mixed, name="whole", max_steps=3)).metrics()
    monkeypatch.setattr(learner, "LOGITS", 5000)
    pieces = vflan.train(vflan.replace(mixed, name="pieces", max_steps=3)).metrics()
    assert pieces.loss.tolist() == pytest.approx(whole.loss.tolist(), abs=1e-5)


def looks(monkeypatch):
    """Records how many pictures each run of the tower saw."""
    seen, real = [], image_features.models.image_features
    monkeypatch.setattr(image_features, "_FEATURES", {})
    monkeypatch.setattr(
        image_features.models,
        "image_features",
        lambda m, pixels: seen.append(len(pixels)) or real(m, pixels),
    )
    return seen


def test_the_tower_runs_once_for_a_shared_picture_and_never_for_text(mixed, tmp_path, monkeypatch):
    seen = looks(monkeypatch)
    model, data, pictures = prepared(mixed, tmp_path)
    features = pictures([0, 1, 2, 3])  # 0 and 2 show the same picture, 1 is text
    assert seen == [2] and features.shape[0] == 3 and torch.equal(features[0], features[1])
    assert pictures([1, 4]) is None and pictures([0]) is not None and seen == [2]


def test_the_tower_stops_at_the_layer_that_is_used_and_keeps_no_gradients(
    mixed, tmp_path, monkeypatch
):
    looks(monkeypatch)
    model, data, pictures = prepared(mixed, tmp_path)
    ran = []
    for i, layer in enumerate(model.model.vision_tower.encoder.layers):
        layer.register_forward_hook(lambda *_, i=i: ran.append(i))
    model.requires_grad_(True)
    assert not pictures([0]).requires_grad and ran == [0, 1]


def test_a_large_set_is_read_as_it_comes_with_the_same_result(mixed, monkeypatch):
    kept = vflan.train(vflan.replace(mixed, name="kept", max_steps=6)).metrics()
    monkeypatch.setattr(image_features, "MAX_KEPT_BYTES", 0)
    monkeypatch.setattr(image_features, "TOWER_BATCH", 5)
    read = vflan.train(vflan.replace(mixed, name="read", max_steps=6)).metrics()
    assert read.loss.tolist() == pytest.approx(kept.loss.tolist(), abs=1e-4)


def test_the_next_steps_pictures_are_read_while_this_one_computes(mixed, tmp_path, monkeypatch):
    monkeypatch.setattr(image_features, "MAX_KEPT_BYTES", 0)
    monkeypatch.setattr(image_features, "TOWER_BATCH", 8)
    model, data, pictures = prepared(mixed, tmp_path)
    batches_, steps = batch_order(data, mixed), None
    steps = feed(data, pictures, batches_, mixed)
    next(steps)
    shows = {int(which) for which in data.picture[batches_[1]] if which >= 0}
    assert {key[0] for key in pictures.pending} == {
        str(data.pictures[which]) for which in shows
    } - {key[0] for key in pictures.features}
    assert len(list(steps)) == 3 and not pictures.pending


def test_a_feed_that_starts_later_yields_the_same_steps(mixed, tmp_path):
    model, data, pictures = prepared(mixed, tmp_path)
    order = batch_order(data, vflan.replace(mixed, epochs=3))
    whole, rest = (
        list(feed(data, pictures, order, mixed)),
        list(feed(data, pictures, order, mixed, first=5)),
    )
    assert len(whole) == 12 and [part.tolist() for parts in whole[5:] for part, _ in parts] == [
        part.tolist() for parts in rest for part, _ in parts
    ]


@pytest.fixture
def cached(mixed, tmp_path, monkeypatch):
    """A recipe whose features stay on disk, in a folder of this test, and only there."""
    monkeypatch.setattr(image_features, "CACHE", tmp_path / "cache")
    monkeypatch.setattr(image_features, "MAX_KEPT_BYTES", 0)
    return vflan.replace(mixed, feature_cache=True, max_steps=4)


def settle(pictures):
    pictures.readers.shutdown(wait=True)


def test_features_on_disk_replace_the_tower(cached, tmp_path, monkeypatch):
    model, data, pictures = prepared(cached, tmp_path)
    rows, seen = list(range(32)), looks(monkeypatch)
    first = pictures(rows)
    settle(pictures)
    assert len(list(tmp_path.glob("cache/features/*/*/*.npy"))) == sum(seen) == len(data.pictures)
    again = Pictures(data, model, load_processor(cached), cached)
    assert torch.equal(again(rows), first) and sum(seen) == len(data.pictures)


def test_damaged_or_foreign_features_are_made_again(cached, tmp_path, monkeypatch):
    model, data, pictures = prepared(cached, tmp_path)
    rows, seen = list(range(32)), looks(monkeypatch)
    first = pictures(rows)
    settle(pictures)
    files = sorted(tmp_path.glob("cache/features/*/*/*.npy"))
    files[0].write_bytes(files[0].read_bytes()[:50])  # cut short by a crash of the machine
    np.save(files[1], np.zeros((2, 2), dtype=np.float32))
    files[2].unlink()  # killed before it was written
    for file, place in ((files[3], 0), (files[4], 200), (files[5], -1)):
        damaged = bytearray(file.read_bytes())
        damaged[place] ^= 128  # a bit that the disk lost
        file.write_bytes(damaged)
    seen.clear()
    again = Pictures(data, model, load_processor(cached), cached)
    assert torch.equal(again(rows), first) and sum(seen) == 6
    settle(again)
    assert np.load(files[0]).shape == np.load(files[1]).shape == first.shape[1:]


def test_another_tower_another_preparation_and_an_exchanged_file_are_other_features(
    cached, tmp_path, monkeypatch
):
    model, data, pictures = prepared(cached, tmp_path)
    seen = looks(monkeypatch)
    pictures([0])
    settle(pictures)
    Path(str(data.pictures[data.picture[0]])).touch()
    Pictures(data, model, load_processor(cached), cached)([0])
    Pictures(data, model, load_processor(vflan.replace(cached, image_aspect_ratio="crop")), cached)(
        [0]
    )
    next(model.model.vision_tower.parameters()).data += 1
    Pictures(data, model, load_processor(cached), cached)([0])
    assert seen == [1, 1, 1, 1]


def test_a_full_disk_stops_the_feature_cache_but_not_the_run(cached, tmp_path, monkeypatch, capfd):
    def save(file, array):
        file.write(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(image_features.np, "save", save)
    assert vflan.train(cached).finished
    assert capfd.readouterr().err.count("(No space left on device); training goes on.") == 1
    assert not [file for file in tmp_path.glob("cache/features/*/*/*") if file.is_file()]


def test_two_readers_of_a_run_write_the_same_features_apart(cached, tmp_path, monkeypatch):
    """Training and validation have Pictures of their own, which may write at the same moment."""
    model, data, pictures = prepared(cached, tmp_path)
    both = [pictures, Pictures(data, model, load_processor(cached), cached)]
    meet, names, save = threading.Barrier(2), [], np.save

    def slow(out, array):
        names.append(out.name)
        meet.wait(10)
        save(out, array)

    monkeypatch.setattr(image_features.np, "save", slow)
    for each in both:
        each([0])
    for each in both:
        settle(each)
    assert len(set(names)) == 2 and not any(each.disk_full for each in both)


def test_features_of_earlier_runs_are_forgotten_where_they_would_be_too_many(
    mixed, tmp_path, monkeypatch
):
    monkeypatch.setattr(image_features, "_FEATURES", {})
    model, data, pictures = prepared(mixed, tmp_path)
    rows = np.arange(len(data.ids))
    pictures(rows)
    size = sum(features.nbytes for features in pictures.features.values())
    monkeypatch.setattr(image_features, "MAX_KEPT_BYTES", int(1.5 * size))
    again = Pictures(data, model, load_processor(mixed), mixed)
    assert again.features is pictures.features
    shutil.copytree(mixed.images, tmp_path / "others")
    names = [name.replace("images", "others") for name in data.pictures.tolist()]
    others = dataclasses.replace(data, pictures=np.array(names, dtype=data.pictures.dtype))
    others = Pictures(others, model, load_processor(mixed), mixed)
    others(rows)
    (kept,) = image_features._FEATURES.values()
    assert kept is others.features and len(kept) == len(names)


def test_pixels_that_another_reader_made_needless_are_let_go(mixed, tmp_path, monkeypatch):
    monkeypatch.setattr(image_features, "_FEATURES", {})
    model, data, pictures = prepared(mixed, tmp_path)
    pictures.prefetch([0])
    Pictures(data, model, load_processor(mixed), mixed)([0])
    pictures.load([0])
    assert not pictures.pending


def test_accumulating_small_batches_is_the_same_as_one_large_batch(mixed):
    """Padded in threes or eights, packed tightly or loosely: each learned token weighs the same."""
    ways = [dict(micro_batch=3), dict(micro_batch=8), dict(micro_batch=1)]
    one, *others = [
        vflan.train(vflan.replace(mixed, name=f"m{i}", packing="padded", max_steps=4, **way))
        for i, way in enumerate(ways)
    ]
    for other in others:
        assert other.metrics().loss.tolist() == pytest.approx(one.metrics().loss.tolist(), abs=1e-5)
    ways = [dict(pack_tokens=256), dict(pack_tokens=2000)]
    one, other = [
        vflan.train(vflan.replace(mixed, name=f"p{i}", max_steps=4, **way))
        for i, way in enumerate(ways)
    ]
    assert other.metrics().loss.tolist() == pytest.approx(one.metrics().loss.tolist(), abs=1e-5)


@pytest.mark.parametrize("average", ["tokens", "micro_batches"])
def test_the_loss_is_averaged_over_tokens_or_as_in_llava_over_micro_batches(
    mixed, tmp_path, average
):
    recipe = vflan.replace(mixed, packing="padded", micro_batch=2, loss_average=average)
    model, data, pictures = prepared(recipe, tmp_path)
    net, order = Learner(model, recipe), batch_order(data, recipe)
    for world in (1, 2):
        losses = []
        for rank in range(world):
            parts = next(feed(data, pictures, order, recipe, rank, world))
            losses += [
                (net(*data.batch(part, "cpu"), pictures(part)).item(), weight, part)
                for part, weight in parts
            ]
        total = sum(loss / weight for loss, weight, _ in losses)
        means = [loss / data.supervised[part].sum() for loss, _, part in losses]
        whole = sum(loss for loss, _, _ in losses) / data.supervised[order[0]].sum()
        assert len(losses) == 4 and total == pytest.approx(
            whole if average == "tokens" else np.mean(means)
        )


@pytest.mark.usefixtures("alone")
def test_two_processes_learn_packed_rows_as_one_does(mixed):
    one = vflan.train(vflan.replace(mixed, name="one", max_steps=4)).metrics()
    two = vflan.train(vflan.replace(mixed, name="two", max_steps=4), num_processes=2).metrics()
    assert two.loss.tolist() == pytest.approx(one.loss.tolist(), abs=1e-4)


def test_rows_are_what_encode_gives_with_the_picture_widened(mixed, tmp_path):
    model, data, _ = prepared(mixed, tmp_path)
    tokenizer, rows = load_processor(mixed).tokenizer, json.loads(Path(mixed.samples).read_text())
    for row in range(32):
        ids, labels = expand(
            *encode(rows[row]["conversations"], tokenizer),
            model.config.image_seq_length,
            model.config.image_token_id,
        )
        ours, learned = data.row(row)
        assert ours.tolist() == ids and learned.tolist() == labels
        assert data.lengths[row] == len(ids) and data.supervised[row] == sum(
            label >= 0 for label in labels
        )
        assert data.ids[row] == rows[row]["id"]


def test_many_conversations_are_encoded_as_each_alone(backbones):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(backbones["language_model"])
    many = [
        [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "a red one"}],
        [{"from": "gpt", "value": "nothing was asked"}],
        [{"from": "human", "value": "Write </s> here"}, {"from": "gpt", "value": "</s>USER: "}] * 2,
        [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "a blue one"}],
    ]
    for template in ("vicuna_v1", "plain"):
        for conversations, found in zip(many, encode_many(many, tokenizer, template)):
            if isinstance(found, ValueError):
                with pytest.raises(ValueError, match=str(found)):
                    encode(conversations, tokenizer, template)
            else:
                assert found == encode(conversations, tokenizer, template)


def test_rows_live_in_flat_arrays(mixed, tmp_path, monkeypatch):
    """Chunks change nothing: the last one is short, and one has no usable row."""
    whole = prepared(mixed, tmp_path)[1]
    monkeypatch.setattr(batching, "_ENCODED_TOGETHER", 3)
    data = prepared(mixed, tmp_path)[1]
    for name in Data.__dataclass_fields__:
        assert np.array_equal(getattr(data, name), getattr(whole, name)), name
    assert data.tokens.dtype == np.int32 and data.start[-1] == len(data.tokens) == len(data.learned)
    assert (data.tokens == IMAGE_TOKEN_INDEX).sum() == (data.picture >= 0).sum()


def batches_recipe(**changes):
    where = dict.fromkeys(
        ["vision_tower", "language_model", "samples", "images", "runs"], "nowhere"
    )
    return vflan.Recipe(name="base", stage="base", **where, **changes)


def data_of(lengths, packed=False, text_only=()):
    lengths, empty = np.array(lengths), np.zeros(0)
    picture = np.array([-1 if i in text_only else 0 for i in range(len(lengths))])
    ids = np.arange(len(lengths)).astype(str)
    return Data(ids, empty, empty, empty, empty, picture, lengths, lengths, 1, 0, packed)


def test_pack_tokens_is_the_budget_of_a_packed_row_and_nothing_to_a_padded_one():
    """A GPU preset's step on 8 processes takes 2 passes at 8,192 positions, 8 at 2,048."""
    lengths = np.random.default_rng(0).integers(620, 900, 128)
    recipes = {
        name: vflan.replace(vflan.preset(name).base, packing="packed")
        for name in ("full_7b", "qlora_7b")
    }
    shares = {
        name: micro_batches(data_of(lengths, packed=True), np.arange(128), recipe, 8)
        for name, recipe in recipes.items()
    }
    widest = {
        name: max(lengths[part].sum() for parts in share for part in parts)
        for name, share in shares.items()
    }
    assert {name: len(share[0]) for name, share in shares.items()} == dict(full_7b=2, qlora_7b=8)
    assert 4096 < widest["full_7b"] <= 8192 and widest["qlora_7b"] <= 2048
    padded = vflan.replace(recipes["full_7b"], packing="padded")
    assert {
        len(part) for part in micro_batches(data_of(lengths), np.arange(128), padded, 8)[0]
    } == {padded.micro_batch}


@pytest.mark.parametrize("packing", ["packed", "padded"])
def test_every_epoch_sees_every_row_once(packing):
    data = data_of(np.random.default_rng(0).integers(10, 100, 800), packing == "packed")
    steps = batch_order(data, batches_recipe(epochs=2, global_batch=16, packing=packing))
    assert len(steps) == 100 and sorted(np.concatenate(steps[:50])) == list(range(800))
    assert [step.tolist() for step in steps[:50]] != [step.tolist() for step in steps[50:]]


def test_padded_batches_hold_like_lengths():
    data = data_of(np.random.default_rng(0).integers(10, 100, 800))
    steps = batch_order(data, batches_recipe(global_batch=16))
    fill = sum(data.lengths[step].sum() for step in steps) / sum(
        16 * data.lengths[step].max() for step in steps
    )
    assert fill > 0.9  # a random order gives 0.6


def test_text_only_rows_go_in_padded_batches_of_their_own():
    data = data_of([20] * 320, text_only=range(0, 320, 2))
    steps = batch_order(data, batches_recipe(global_batch=16))
    assert all(len({data.picture[row] for row in step}) == 1 for step in steps)


def test_max_steps_decides_over_epochs():
    data = data_of([20] * 100)
    assert (
        len(batch_order(data, batches_recipe(max_steps=30))) == 30
    )  # more than an epoch: another begins
    assert len(batch_order(data, batches_recipe(epochs=0.5, global_batch=10))) == 5


def test_a_budget_below_the_longest_row_is_refused():
    with pytest.raises(ValueError, match="pack_tokens=1024 is below max_length=2048"):
        batches_recipe(pack_tokens=1024)


def test_the_packed_step_that_people_see_is_the_one_that_training_takes(mixed, tmp_path):
    """The same rows in the same step, packed alike, with the same ids and labels."""
    recipe = vflan.replace(mixed, max_length=128, epochs=2)
    _, data, _ = prepared(recipe, tmp_path)
    samples, tokenizer = (
        vflan.load_samples(recipe.samples, recipe.images),
        load_processor(recipe).tokenizer,
    )
    order = batch_order(data, recipe)
    for row in (0, 17):
        step, steps, rows = packed_step(
            samples, row, vflan.replace(recipe, packing="padded"), tokenizer
        )
        assert (
            steps == len(order) == 8
            and row in order[step - 1]
            and not any(row in some for some in order[: step - 1])
        )
        (groups,) = micro_batches(data, order[step - 1], recipe)
        assert [[number for number, *_ in own] for own in rows] == [
            group.tolist() for group in groups
        ]
        assert len(groups) > 1 and max(map(len, groups)) > 1, (
            "one conversation a row would prove nothing"
        )
        for number, ids, labels in (one for own in rows for one in own):
            expected = data.row(number)
            assert list(ids) == expected[0].tolist() and list(labels) == expected[1].tolist()
    unread = next(row for row in range(32) if row not in order[0])
    assert packed_step(samples, unread, vflan.replace(recipe, max_steps=1), tokenizer) is None


def test_a_packed_step_reads_no_row_that_is_held_out(mixed):
    recipe, tokenizer = vflan.replace(mixed, heldout_rows=6), load_processor(mixed).tokenizer
    samples = vflan.load_samples(mixed.samples, mixed.images)
    trained, held = hold_out(samples["id"][:], 6)
    assert packed_step(samples, int(held[0]), recipe, tokenizer) is None
    step, steps, _ = packed_step(samples, int(trained[0]), recipe, tokenizer)
    order = batch_order(None, recipe, trained)
    assert steps == len(order) == 4 and trained[0] in order[step - 1]


def test_a_row_whose_answer_does_not_fit_is_in_no_packed_step(mixed):
    """Training leaves it out too."""
    rows = json.loads(Path(mixed.samples).read_text())
    rows[5]["conversations"][0]["value"] = "<image>\n" + "What color is it? " * 100
    Path(mixed.samples).write_text(json.dumps(rows))
    samples = vflan.load_samples(mixed.samples, mixed.images)
    _, _, packed = packed_step(samples, 5, mixed, load_processor(mixed).tokenizer)
    assert 5 not in [number for some in packed for number, *_ in some]
    assert all(max(labels) > 0 for some in packed for _, _, labels in some)


# ------------------------------------------------------------------- a plan that is never whole


@pytest.mark.parametrize("packing", ["packed", "padded"])
@pytest.mark.parametrize("longest", [dict(max_steps=10**9), dict(epochs=10**6)], ids=str)
def test_a_run_of_a_thousand_million_steps_takes_the_memory_of_an_epoch(packing, longest):
    """Also at its end: a resumed run begins there."""
    data = data_of(np.random.default_rng(0).integers(10, 100, 8000), packing == "packed")
    recipe = batches_recipe(global_batch=16, packing=packing, **longest)
    tracemalloc.start()
    steps = batch_order(data, recipe)
    rows = [steps[at] for at in (0, len(steps) // 2, -1)]
    rest = steps[len(steps) - 500 :]
    assert len(rest) == 500 and sorted(np.concatenate(rest)) == list(range(8000))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(steps) == (recipe.max_steps or 5 * 10**8)
    assert [len(step) for step in rows] == [16] * 3 and peak < 2e6


def test_a_step_is_the_same_wherever_reading_begins():
    """As lists of a whole plan: indices, slices with a stride, negative ones, slices of slices."""
    data = data_of(np.random.default_rng(0).integers(10, 100, 90))
    recipe = batches_recipe(global_batch=8, epochs=5)
    steps = batch_order(data, recipe)
    whole = [step.tolist() for step in steps]
    assert len(whole) == len(steps) == math.ceil(90 * 5 / 8)
    for part in (slice(7, 30), slice(-9, None), slice(None, None, 5), slice(30, 3, -2)):
        again = batch_order(data, recipe)[part]
        assert [step.tolist() for step in again] == whole[part]
        assert [step.tolist() for step in again[1:3]] == whole[part][1:3]
    assert batch_order(data, recipe)[40].tolist() == whole[40] and whole[12:24] != whole[:12]
    with pytest.raises(IndexError):
        steps[len(steps)]


def test_what_stands_for_all_steps_has_an_end(monkeypatch):
    """A checkpoint hashes it, and vflan.plan counts it: neither reads ten million steps."""
    data, made = data_of([20] * 64), []
    count = np.random.PCG64
    monkeypatch.setattr(np.random, "PCG64", lambda seeds: made.append(seeds) or count(seeds))
    steps = batch_order(data, batches_recipe(global_batch=16, max_steps=10**7))
    assert not made and len(steps.beginning) == 20_000
    assert sum(len(rows) for rows in steps.beginning) == 320_000 and len(made) == 5000
    large = batch_order(data, batches_recipe(global_batch=10**5, max_steps=10**7))
    assert len(large.beginning) == 101
    short = batch_order(data, batches_recipe(global_batch=16, epochs=2))
    assert [step.tolist() for step in short.beginning] == [step.tolist() for step in short]


def test_a_run_of_ten_million_steps_starts_resumes_and_feeds_at_once(mixed, tmp_path):
    recipe = vflan.replace(mixed, max_steps=10**7)
    model, data, pictures = prepared(recipe, tmp_path)
    order = batch_order(data, recipe)
    (first, *_), (late, *_) = (
        next(feed(data, pictures, order, recipe, first=step)) for step in (0, 9_999_990)
    )
    assert sorted(first[0]) != sorted(late[0]) and set(late[0]) <= set(order[9_999_990])
