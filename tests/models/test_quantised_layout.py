"""QLoRA is right on processors where bitsandbytes changes the layout of 4-bit weights.

They have AVX512-BF16, which is simulated where it is absent.
"""

from pathlib import Path

import pytest
import torch
from avx512_bf16 import avx512_bf16
from bitsandbytes.nn import Linear4bit
from conftest import make_backbones

import vflan
from vflan.models.llava import fingerprint, freeze, load_model, parts
from vflan.training import trainer
from vflan.training.run import Run


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """Backbones of width 64. In the other layout narrower layers fail; these go wrong silently."""
    folder = tmp_path_factory.mktemp("wide")
    make_backbones(folder, width=64)
    return {part: str(folder / part) for part in ("vision_tower", "language_model")}


@pytest.fixture
def qlora(recipe, wide):
    return vflan.replace(
        recipe, **wide, bits=4, lora_r=4, lora_alpha=8, lora_dropout=0.3, max_steps=4
    )


@pytest.fixture
def layer():
    """A layer by bitsandbytes, without vflan: 64 inputs, 32 outputs."""

    def make(width=64):
        torch.manual_seed(0)
        return Linear4bit(width, 32, bias=False, quant_type="nf4").to("cpu").eval()

    return make


def questions(recipe):
    pictures = Path(recipe.images)
    return [
        {"text": "<image>\nWhat color is it?", "image": str(pictures / f"{i}.png")}
        for i in range(4)
    ]


def test_the_simulated_processor_computes_as_the_real_one(layer, monkeypatch):
    """As long as this passes, `keep_layout` is needed."""
    x = torch.randn(3, 64)
    plain = layer()
    weight, product = plain.weight.clone(), plain(x)
    with avx512_bf16(monkeypatch):
        other = layer()
        assert torch.equal(other.weight, weight) and other.weight.quant_state.nested
        # bf16 has 8 bits: each of 64 terms, the scale and the sum are off by 1 in 256 at most
        assert torch.allclose(other(x), product, atol=product.abs().max().item() * 4 / 256)
        assert not torch.equal(other.weight.reshape(-1), weight.reshape(-1))
        assert not other.weight.quant_state.nested
        learning = torch.randn(3, 64, requires_grad=True)
        with pytest.warns(UserWarning, match="autograd kernel was not registered"):
            other.train()(learning).sum().backward()
        assert learning.grad is None or not learning.grad.any()
        with pytest.raises(RuntimeError, match=r"shape '\[32, 0\]' is invalid"):
            layer(32)(x[:, :32])


@pytest.mark.parametrize("width", ["narrow", "wide"])
def test_validation_changes_nothing(qlora, backbones, monkeypatch, width):
    if width == "narrow":
        qlora = vflan.replace(qlora, **backbones)
    plain = vflan.train(vflan.replace(qlora, name="plain", heldout_rows=6))
    with avx512_bf16(monkeypatch):
        run = vflan.train(vflan.replace(qlora, heldout_rows=6, evaluate_every=1))
    assert run.summary["parts"] == plain.summary["parts"]
    last = run.sample_answers().iloc[-4:]
    assert last.answer.tolist() == plain.sample_answers().answer.tolist()
    assert run.heldout().loss.iloc[-1] == plain.heldout().loss.iloc[-1]


def test_a_killed_run_answers_from_its_checkpoint_and_is_resumed(qlora, monkeypatch):
    qlora = vflan.replace(qlora, save_every=2, heldout_rows=6, evaluate_every=1)
    straight = vflan.train(vflan.replace(qlora, name="straight"))

    def kill(now, *rest, real=trainer.learning_rate):
        if now == 3:
            raise KeyboardInterrupt
        return real(now, *rest)

    with avx512_bf16(monkeypatch):
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(trainer, "learning_rate", kill)
            vflan.train(qlora)
        halfway = Run.open(qlora.folder).at()
        answers = vflan.answer(halfway.load_model(), halfway.processor(), questions(qlora))
        resumed = vflan.train(qlora)
    assert answers == vflan.answer(halfway.load_model(), halfway.processor(), questions(qlora))
    assert resumed.summary["parts"] == straight.summary["parts"]
    assert resumed.metrics().loss.tolist() == straight.metrics().loss.tolist()


def test_answering_changes_neither_weights_nor_gradients(qlora, monkeypatch):
    def gradients(model):
        freeze(model, vflan.replace(qlora, lora_dropout=0.0))
        ids = torch.tensor([[1, 5, *[model.config.image_token_id] * 4, 6, 7, 8]])
        model.train()(
            input_ids=ids, pixel_values=torch.ones(1, 3, 24, 24), labels=ids
        ).loss.backward()
        return {name: w.grad for name, w in model.named_parameters() if w.requires_grad}

    run = vflan.train(qlora)
    with avx512_bf16(monkeypatch):
        model, fresh = run.load_model(), run.load_model()
        vflan.answer(model, run.processor(), questions(qlora))
        assert fingerprint(model) == fingerprint(fresh)
        after, before = gradients(model), gradients(fresh)
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in after)


def test_an_export_holds_what_was_learned(qlora, monkeypatch, tmp_path):
    looking = vflan.replace(qlora, heldout_rows=6, evaluate_every=2)
    plain = vflan.train(vflan.replace(looking, name="plain"))
    with avx512_bf16(monkeypatch):
        run = vflan.train(looking)
        for merge in (True, False):
            for each in (plain, run):
                each.export(tmp_path / f"{each.name} {merge}", merge)
    for name in ("True/model", "False/adapter_model"):
        ours, theirs = (tmp_path / f"{each} {name}.safetensors" for each in ("base", "plain"))
        assert ours.read_bytes() == theirs.read_bytes()


@pytest.mark.parametrize("part", ["projector", "language_model"])
def test_a_part_of_a_quantised_run_can_be_swapped(qlora, monkeypatch, part):
    run = vflan.train(qlora)
    with avx512_bf16(monkeypatch):
        model, other = load_model(qlora), run.load_model()
        for each in (model, other):
            vflan.answer(each, run.processor(), questions(qlora))
        rest = {name: fingerprint(of) for name, of in parts(model).items() if name != part}
        swapped = {
            name: fingerprint(of) for name, of in parts(vflan.swap_part(model, part, run)).items()
        }
        assert swapped == rest | {part: fingerprint(parts(other)[part])}
        # The weights are copies: later changes of the other model have no effect.
        with torch.no_grad():
            next(parts(other)[part].parameters()).zero_()
        assert fingerprint(parts(model)[part]) == swapped[part]


def test_a_language_model_from_files_is_quantised_like_the_model(qlora):
    model = vflan.swap_part(vflan.train(qlora).load_model(), "language_model", qlora.language_model)
    begun = load_model(qlora)
    assert fingerprint(parts(model)["language_model"]) == fingerprint(
        parts(begun)["language_model"]
    )
    with pytest.raises(
        ValueError, match="not quantised alike .14 and 0 such layers.*same number of bits"
    ):
        vflan.swap_part(model, "language_model", load_model(vflan.replace(qlora, bits=16)))
