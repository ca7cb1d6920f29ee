"""What one training pass holds in memory, counted with PyTorch's fake tensors: shapes without data.

The model is the one that training builds, and the pass is `Learner`'s own, forward and backward.
Every storage that PyTorch creates counts for as long as it lives. Two things are replaced by
stand-ins of the same size: attention (flash attention's memory does not depend on the mask) and
quantised layers (so that bitsandbytes need not be installed).
"""

from __future__ import annotations

import weakref
from collections import Counter
from dataclasses import dataclass
from functools import lru_cache, partial
from types import SimpleNamespace
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AttentionInterface

from vflan.config import replace
from vflan.models import image_features
from vflan.models import llava as models
from vflan.models.loss import Learner

if TYPE_CHECKING:
    from collections.abc import Callable

    from vflan.config import Recipe

# Models of these numbers of layers are counted; a deeper one grows by the same difference a layer.
_FEW, _SOME = 2, 3
# What a recipe may change without changing the count: these get the same value before caching.
_IRRELEVANT = dict(packing="padded", sharding="auto", optimizer="adamw", pack_tokens=None)


@dataclass(frozen=True)
class Footprint:
    """What a model and one pass of it take. Of weights, numbers; of all else, bytes."""

    trained: float  # number of weights that are trained
    body: float  # number of weights in the language model's layers
    layer: float  # number of weights in one of these layers
    outer: float  # number of weights in embeddings, output layer and projector
    outside_tower: float  # bytes of all weights but the vision tower's
    picture: float  # bytes of one picture's features
    peak: float  # bytes at most beside the weights: what the pass makes, and the gradients
    activations: float  # bytes of activations when they and the logits take most
    logits: float  # bytes of logits at that time
    tower_pass: float  # bytes at most while the tower reads TOWER_BATCH pictures
    tower: float = 0  # number of the vision tower's weights
    weights: float = 0  # bytes of all weights


def count(recipe: Recipe, half: bool, low: bool, shape: tuple[int, int, int, int]) -> Footprint:
    """Count the recipe's model and one pass of `shape`: (rows, length, pictures, answer tokens).

    half: the pass runs under bf16 autocast. low: trained weights have that precision too, as FSDP2
    and ZeRO gather them.
    """
    # Equal layers cost the same, so two small models predict a deep one.
    depth = models.shapes(recipe)[1].num_hidden_layers
    recipe = replace(recipe, **_IRRELEVANT)
    sizes = vars(_count(recipe, half, low, shape, min(depth, _SOME)))
    if depth > _SOME:
        few = vars(_count(recipe, half, low, shape, _FEW))
        steps = (depth - _FEW) / (_SOME - _FEW)
        sizes = {name: few[name] + steps * (size - few[name]) for name, size in sizes.items()}
    # The tower is counted in full: only the language model was cut to a few layers above.
    tower = _tower(recipe.vision_tower, recipe.language_model)
    weights = sizes["outside_tower"] + (2 if half else 4) * tower
    return Footprint(**sizes | dict(tower=tower, weights=weights))


@lru_cache
def _tower(tower: str, language_model: str) -> int:
    recipe = SimpleNamespace(vision_tower=tower, language_model=language_model)
    return models.parameter_counts(models.meta_model(recipe))["vision_tower"]


@lru_cache(64)
def _count(recipe, half, low, shape, layers) -> Footprint:
    model, dtype = models.meta_model(recipe, layers), torch.bfloat16 if half else torch.float32
    parts, text, vision = models.parts(model), model.config.text_config, model.config.vision_config
    counts, patches = models.parameter_counts(model), model.config.image_seq_length
    _cast(model, dtype)
    # As in training: the frozen precision, then quantised layers, then trained weights in fp32.
    if recipe.bits < 16:
        _quantise(parts["language_model"]["model"], recipe.bits)
    models.freeze(model, recipe)
    embeddings = text.vocab_size * text.hidden_size * (1 if text.tie_word_embeddings else 2)
    body = counts["language_model"] - embeddings
    trained = sum(weight.numel() for weight in model.parameters() if weight.requires_grad)
    outside_tower = _size(model) - _size(parts["vision_tower"])
    # Sharded weights are gathered in the precision of the pass.
    if low:
        _cast(model, dtype)
    return Footprint(
        trained=trained,
        body=body,
        layer=body / layers,
        outer=embeddings + counts["projector"],
        outside_tower=outside_tower,
        picture=patches * vision.hidden_size * dtype.itemsize,
        **_run_pass(model, recipe, half, dtype, shape),
    )


def _run_pass(model, recipe, half, dtype, shape) -> dict[str, float]:
    """Run one training pass and one of the tower on fake tensors, and return their peaks."""
    rows, length, pictures, answer_tokens = shape
    parts, text, vision = models.parts(model), model.config.text_config, model.config.vision_config
    learner = Learner(model, recipe).train()
    for part in (parts["language_model"]["model"], parts["vision_tower"]):
        part.set_attn_implementation("shapes_only")
    with FakeTensorMode(), torch.random.fork_rng(devices=[]):
        _leave_meta_device(learner)
        integers, features, tower_pass = partial(torch.zeros, dtype=torch.int64), None, 0
        # Features come from outside of the pass: the tower has read the pictures before.
        if pictures:
            width = (model.config.image_seq_length, vision.hidden_size)
            features = torch.empty(pictures, *width, dtype=dtype)
        # Values do not matter, only shapes: all ids, positions and targets are 0.
        answers = integers(answer_tokens), integers(answer_tokens)
        batch = (integers(rows, length), None, integers(pictures), *answers, features)
        memory = LiveMemory(learner, text.vocab_size)
        with memory, torch.autocast("cpu", torch.bfloat16, enabled=half):
            learner(*batch).backward()
        if pictures:
            size = (image_features.TOWER_BATCH, 3, vision.image_size, vision.image_size)
            tower_memory = LiveMemory(learner)
            with tower_memory, torch.no_grad():
                models.image_features(model, torch.empty(size, dtype=dtype))
            tower_pass = tower_memory.peak
    kinds = {kind: memory.beside_gradients[kind] for kind in ("activations", "logits")}
    return dict(peak=memory.peak, tower_pass=tower_pass, **kinds)


def _size(module):
    return sum(weight.numel() * weight.element_size() for weight in module.parameters())


def _cast(model, dtype):
    for weight in model.parameters():
        if weight.is_floating_point():
            weight.data = weight.data.to(dtype)


def _leave_meta_device(module):
    """Replace meta tensors by fake ones, with which autocast and attention act as on a CPU."""
    fakes = {}
    for owner in module.modules():
        for name, weight in owner._parameters.items():
            if weight is None:
                continue
            # Tied weights must stay one tensor.
            if id(weight) not in fakes:
                fake = torch.empty(weight.shape, dtype=weight.dtype)
                fakes[id(weight)] = nn.Parameter(fake, weight.requires_grad)
            owner._parameters[name] = fakes[id(weight)]
        for name, buffer in owner._buffers.items():
            if buffer is not None:
                owner._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)


class LiveMemory(TorchDispatchMode):
    """Within it, every storage that PyTorch creates counts while it lives; `module`'s own do not.

    peak: most bytes at a time. beside_gradients: {kind: bytes} at the time when all but the
    weights' gradients took most. Tensors whose last dimension is `vocabulary` are logits, others
    activations.
    """

    def __init__(self, module: nn.Module, vocabulary: int | None = None):
        super().__init__()
        self.vocabulary, self.peak, self.beside_gradients = vocabulary, 0, Counter()
        self.bytes, self.kinds = Counter(), {}  # of each kind now; {storage: kind}
        tensors = [*module.parameters(), *module.buffers()]
        self.known = {tensor.untyped_storage()._cdata for tensor in tensors}
        for weight in module.parameters():
            if weight.requires_grad:
                weight.register_post_accumulate_grad_hook(self._mark_gradient)

    def __torch_dispatch__(
        self, function: Callable, types: tuple, args: tuple = (), kwargs: dict | None = None
    ) -> object:
        out = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self._add(tensor, tensor.untyped_storage())
        return out

    def _add(self, tensor, storage):
        # Views share a storage, which counts once.
        key, size = storage._cdata, storage.nbytes()
        if key in self.known:
            return
        self.known.add(key)
        is_logits = tensor.ndim > 1 and tensor.shape[-1] == self.vocabulary
        self.kinds[key] = "logits" if is_logits else "activations"
        self.bytes[self.kinds[key]] += size
        # PyTorch has no hook for a freed storage; Python's finalizer of the wrapper tells it.
        weakref.finalize(storage, self._free, key, size).atexit = False
        self.peak = max(self.peak, self.bytes.total())
        if self.bytes.total() - self.bytes["gradients"] > self.beside_gradients.total():
            self.beside_gradients = self.bytes - Counter(gradients=self.bytes["gradients"])

    def _mark_gradient(self, weight):
        # It was counted as an activation when the backward pass made it.
        storage = weight.grad.untyped_storage()
        if kind := self.kinds.pop(storage._cdata, None):
            self.kinds[storage._cdata] = "gradients"
            self.bytes["gradients"] += storage.nbytes()
            self.bytes[kind] -= storage.nbytes()

    def _free(self, key, size):
        self.known.discard(key)
        self.bytes[self.kinds.pop(key)] -= size


class _Attention(torch.autograd.Function):
    """Allocates what flash attention keeps and returns, whatever the mask; it computes nothing."""

    @staticmethod
    def forward(ctx, query, key, value):
        out = query.new_empty(query.transpose(1, 2).shape)  # (B, T, heads, width)
        statistics = query.new_empty(query.shape[:-1], dtype=torch.float32)  # (B, heads, T)
        ctx.save_for_backward(query, key, value, out, statistics)
        return out

    @staticmethod
    def backward(ctx, gradient):
        return tuple(map(torch.empty_like, ctx.saved_tensors[:3]))


def _attention(module, query, key, value, attention_mask, **options):
    if torch.is_autocast_enabled("cpu"):
        query, key, value = (states.bfloat16() for states in (query, key, value))
    return _Attention.apply(query, key, value), None


AttentionInterface.register("shapes_only", _attention)


class _Quantised(nn.Linear):
    """A linear layer of 4 or 8 bits, as far as memory goes: small at rest, unpacked when used."""

    def __init__(self, linear, bits):
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.bias, count = None, linear.weight.numel()
        # A scale for each 64 weights.
        packed = linear.weight.new_empty(count * bits // 8 + count // 64, dtype=torch.uint8)
        self.weight = nn.Parameter(packed, requires_grad=False)

    def forward(self, states):
        return _Unpack.apply(states, self.out_features)


class _Unpack(torch.autograd.Function):
    """Multiplies by an unpacked weight, which is made again in the backward pass."""

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
