"""What a pass of training holds in memory, counted on tensors that have a shape and no content (PyTorch's fake tensors).

The model is the one that training builds, the pass is `Learner`'s own, forward and backward; every storage that PyTorch
makes counts for as long as it lives. Two things are stand-ins of the same size: attention (flash attention's, whose memory
does not depend on the mask) and quantised layers, so that bitsandbytes need not be there.
"""

import weakref
from collections import Counter
from functools import lru_cache, partial
from types import SimpleNamespace

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AttentionInterface

from vflan.config import replace
from vflan.models import llava as models
from vflan.models.loss import Learner
from vflan.training import batching

_FEW, _SOME = 2, 3  # layers; a deeper model is taken to grow on as from the one to the other


def count(recipe, half: bool, low: bool, shape: tuple[int, int, int, int]) -> Counter:
    """Bytes of the recipe's model and of one pass of `shape`: rows, positions in each, pictures, learned tokens.

    weights: all; shared: weights less the vision tower's; learning, body, layer, outer: numbers of weights, of those that
    learn, of the language model's layers, of one of them, of what else a pass needs; again/...: what is held at most beside
    weights and gradients; first: the same with the gradients, which grow while what they need goes; tower: at most while the
    tower looks at TOWER_BATCH pictures; picture: features of one. `half`: bf16 autocast; `low`: weights that learn are in that
    width too, as FSDP2 and ZeRO gather them.
    """
    depth, width = models.shapes(recipe)[1].num_hidden_layers, 2 if half else 4
    found = _count(recipe, half, low, shape, min(depth, _SOME))
    if depth > _SOME:
        few = _count(recipe, half, low, shape, _FEW)
        found = {
            key: few[key] + (depth - _FEW) / (_SOME - _FEW) * (found[key] - few[key])
            for key in found
        }
    tower = _tower(recipe.vision_tower, recipe.language_model)
    return Counter({**found, "tower/weights": tower, "weights": found["shared"] + width * tower})


@lru_cache
def _tower(tower, language_model) -> int:
    recipe = SimpleNamespace(vision_tower=tower, language_model=language_model)
    return models.parameter_counts(models.meta_model(recipe))["vision_tower"]


@lru_cache(64)
def _count(recipe, half, low, shape, layers):
    rows, length, shown, learned = shape
    model, width = models.meta_model(recipe, layers), torch.bfloat16 if half else torch.float32
    parts, text, vision = models.parts(model), model.config.text_config, model.config.vision_config
    sizes, wide = models.parameter_counts(model), model.config.image_seq_length
    _cast(model, width)
    if recipe.bits < 16:
        _quantise(parts["language_model"]["model"], recipe.bits)
    models.freeze(model, recipe)
    found = Counter(shared=_size(model) - _size(parts["vision_tower"]))
    found["learning"] = sum(weight.numel() for weight in model.parameters() if weight.requires_grad)
    outer = text.vocab_size * text.hidden_size * (1 if text.tie_word_embeddings else 2)
    found["body"], found["outer"] = sizes["language_model"] - outer, outer + sizes["projector"]
    found["layer"], found["picture"] = (
        found["body"] / layers,
        wide * vision.hidden_size * width.itemsize,
    )
    if low:
        _cast(model, width)
    learner = Learner(model, replace(recipe, packing="padded")).train()
    for part in (parts["language_model"]["model"], parts["vision_tower"]):
        part.set_attn_implementation("shapes_alone")
    with FakeTensorMode(), torch.random.fork_rng(devices=[]):
        _off_meta(learner)
        number = partial(torch.zeros, dtype=torch.int64)
        features = torch.empty(shown, wide, vision.hidden_size, dtype=width) if shown else None
        batch = (
            number(rows, length),
            None,
            number(shown),
            number(learned),
            number(learned),
            features,
        )
        with (
            Living(learner, text.vocab_size) as living,
            torch.autocast("cpu", torch.bfloat16, enabled=half),
        ):
            learner(*batch).backward()
        found |= {"first": living.most, "again/logits": living.beside["logits"]}
        found["again/activations"] = living.beside["activations"]
        if shown:
            with Living(learner) as living, torch.no_grad():
                side = vision.image_size
                models.image_features(
                    model, torch.empty(batching.TOWER_BATCH, 3, side, side, dtype=width)
                )
            found["tower"] = living.most
    return found


def _size(module):
    return sum(weight.numel() * weight.element_size() for weight in module.parameters())


def _cast(model, dtype):
    for weight in model.parameters():
        if weight.is_floating_point():
            weight.data = weight.data.to(dtype)


def _off_meta(module):
    """Fake tensors in place of those on the meta device, which autocast and attention would treat unlike a CPU's."""
    made = {}
    for owner in module.modules():
        for name, weight in owner._parameters.items():
            if weight is not None and id(weight) not in made:
                made[id(weight)] = nn.Parameter(
                    torch.empty(weight.shape, dtype=weight.dtype), weight.requires_grad
                )
            owner._parameters[name] = None if weight is None else made[id(weight)]
        for name, buffer in owner._buffers.items():
            owner._buffers[name] = (
                None if buffer is None else torch.empty(buffer.shape, dtype=buffer.dtype)
            )


class Living(TorchDispatchMode):
    """Within it every storage that PyTorch makes counts as long as it lives, those of `module`'s weights do not.

    `most`: bytes at the fullest; `beside`: {kind: bytes} when what is no gradient of a weight was most. What ends in
    `vocabulary` numbers is logits, the rest activations.
    """

    def __init__(self, module, vocabulary=None):
        super().__init__()
        self.vocabulary, self.now, self.kinds, self.most, self.beside = (
            vocabulary,
            Counter(),
            {},
            0,
            Counter(),
        )
        self.known = {
            weight.untyped_storage()._cdata for weight in [*module.parameters(), *module.buffers()]
        }
        for weight in module.parameters():
            if weight.requires_grad:
                weight.register_post_accumulate_grad_hook(self._gradient)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self._count(tensor, tensor.untyped_storage())
        return out

    def _count(self, tensor, storage):
        key, size = storage._cdata, storage.nbytes()
        if key not in self.known:
            self.known.add(key)
            self.kinds[key] = (
                "logits"
                if tensor.ndim > 1 and tensor.shape[-1] == self.vocabulary
                else "activations"
            )
            self.now[self.kinds[key]] += size
            weakref.finalize(storage, self._free, key, size).atexit = False
            self.most = max(self.most, self.now.total())
            if self.now.total() - self.now["gradients"] > self.beside.total():
                self.beside = self.now - Counter(gradients=self.now["gradients"])

    def _gradient(self, weight):
        key, size = weight.grad.untyped_storage()._cdata, weight.grad.untyped_storage().nbytes()
        if kind := self.kinds.pop(key, None):
            self.kinds[key] = "gradients"
            self.now += Counter({"gradients": size})
            self.now[kind] -= size

    def _free(self, key, size):
        self.known.discard(key)
        self.now[self.kinds.pop(key)] -= size


class _Attention(torch.autograd.Function):
    """What flash attention keeps and makes, whatever the mask; it computes nothing."""

    @staticmethod
    def forward(ctx, query, key, value):
        out = query.new_empty(query.transpose(1, 2).shape)
        ctx.save_for_backward(
            query, key, value, out, query.new_empty(query.shape[:-1], dtype=torch.float32)
        )
        return out

    @staticmethod
    def backward(ctx, gradient):
        return tuple(map(torch.empty_like, ctx.saved_tensors[:3]))


def _attention(module, query, key, value, attention_mask, **options):
    if torch.is_autocast_enabled("cpu"):
        query, key, value = (states.bfloat16() for states in (query, key, value))
    return _Attention.apply(query, key, value), None


AttentionInterface.register("shapes_alone", _attention)


class _Quantised(nn.Linear):
    """A layer of 4 or 8 bits as far as memory goes: few bytes at rest, unpacked whenever it is used."""

    def __init__(self, linear, bits):
        nn.Module.__init__(self)
        self.in_features, self.out_features, self.bias = (
            linear.in_features,
            linear.out_features,
            None,
        )
        size = (
            linear.weight.numel() * bits // 8 + linear.weight.numel() // 64
        )  # a scale for each 64 weights
        self.weight = nn.Parameter(
            linear.weight.new_empty(size, dtype=torch.uint8), requires_grad=False
        )

    def forward(self, states):
        return _Unpack.apply(states, self.out_features)


class _Unpack(torch.autograd.Function):
    @staticmethod
    def forward(ctx, states, width):
        ctx.width = states.shape[-1]
        return states @ states.new_empty(states.shape[-1], width)

    @staticmethod
    def backward(ctx, gradient):
        return gradient @ gradient.new_empty(gradient.shape[-1], ctx.width), None


def _quantise(module, bits):
    for name, child in module.named_children():
        if type(child) is nn.Linear:
            setattr(module, name, _Quantised(child, bits))
        else:
            _quantise(child, bits)
