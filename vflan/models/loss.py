"""From a batch of ids and picture features to the summed loss of its answers."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.modeling_flash_attention_utils import prepare_fa_kwargs_from_position_ids
from transformers.models.llama.modeling_llama import repeat_kv
from transformers.utils import is_flash_attn_2_available

from vflan.config import Recipe
from vflan.models import llava as models
from vflan.models.quantisation import uses_gpu

try:
    from torch.nn.attention.varlen import varlen_attn
except ImportError:
    # PyTorch before 2.10.
    varlen_attn = None

# Logits in memory at a time (32 MB in fp32); more supervised positions are computed in turns.
LOGITS = 1 << 23


def packs(recipe: Recipe) -> bool:
    """Whether conversations share a row.

    `auto` packs on CUDA only: on a CPU, padding rows of similar lengths costs little.
    """
    return recipe.packing == "packed" or recipe.packing == "auto" and uses_gpu(recipe)


class Learner(nn.Module):
    """The model as training sees it.

    Padded rows are padded on the right, and a causal model never looks right, so that they need no
    mask. In a packed row each conversation attends to itself alone; it begins where position ids
    begin again at 0. `packed_attention` says which kernel does that. The mask that transformers
    would build is dense, costs the square of the whole row, and is silently omitted with a cache.
    """

    def __init__(self, model: nn.Module, recipe: Recipe):
        super().__init__()
        self.model, language_model = model, model.model.language_model
        if recipe.gradient_checkpointing:
            language_model.activation_checkpointing_enable({"use_reentrant": False})
        if packs(recipe):
            language_model.set_attn_implementation(packed_attention(models.compute_dtype(recipe)))
        if recipe.compile:
            # All layers share one compilation. Rows differ in length, so lengths stay symbols.
            for layer in language_model.layers:
                layer.compile(dynamic=True)

    def forward(
        self,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor | None,
        at: torch.Tensor,
        keep: torch.Tensor,
        targets: torch.Tensor,
        features: torch.Tensor | None,
    ) -> torch.Tensor:
        """The summed loss, a scalar.

        input_ids: (B, T). position_ids: (1, T) of a packed row, None for padded rows. at: (P), the
        first position of each picture in B*T. keep: (N), the positions in B*T that predict targets
        (N). features: (P, patches, vision width), or None for a batch of text.
        """
        inner = self.model.model
        language_model, projector = inner.language_model, inner.multi_modal_projector
        embeds = language_model.get_input_embeddings()(input_ids)  # (B, T, width)
        if features is not None:
            features = features.to(projector.linear_1.weight.dtype)
            pictures = projector(features).to(embeds.dtype)  # (P, patches, width)
            positions = at[:, None] + torch.arange(pictures.shape[1], device=at.device)
            flat = embeds.flatten(0, 1).index_put((positions,), pictures)  # (B*T, width)
            embeds = flat.view_as(embeds)
        else:
            # Every process must have a gradient for every weight, and ZeRO-3 gathers the weights
            # of a module when it is called.
            nothing = embeds.new_zeros(1, projector.linear_1.in_features)
            embeds = embeds + 0 * projector(nothing).sum()
        attention = language_model.config._attn_implementation
        packed = {} if position_ids is None else _boundaries(position_ids, attention)
        options = dict(attention_mask=None, use_cache=False, **packed)
        output = language_model(inputs_embeds=embeds, position_ids=position_ids, **options)
        hidden = output.last_hidden_state.flatten(0, 1)[keep]  # (N, width)
        return answer_loss(hidden, self.model.lm_head, targets)


def packed_attention(dtype: torch.dtype) -> str:
    """The name of the attention that keeps the conversations of a packed row apart.

    In bf16 on a GPU it is the flash-attn package if that is installed, else the same kernel of
    PyTorch (`varlen`). Elsewhere it is PyTorch's attention, one conversation after the other.
    """
    if dtype != torch.bfloat16:
        return "by_conversation"
    if is_flash_attn_2_available():
        return "flash_attention_2"
    return "varlen" if varlen_attn else "by_conversation"


def _boundaries(position_ids: torch.Tensor, attention: str) -> dict[str, Any]:
    """The boundaries of a packed row's conversations, in the form that `attention` takes.

    They are computed once for all layers.
    """
    starts, longest = prepare_fa_kwargs_from_position_ids(position_ids)
    if attention == "by_conversation":
        return dict(conversations=starts[0].diff().tolist())
    names = "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k"
    return dict(zip(names, [*starts, *map(int, longest)]))


def _varlen(
    module, query, key, value, attention_mask, cu_seq_lens_q=None, max_length_q=None, **options
):
    """FlashAttention's varlen kernel in PyTorch: (1, heads, T, width) -> (1, T, heads, width)."""
    # Without boundaries the model is not training; it answers questions, for example.
    if cu_seq_lens_q is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    # Keys and values of grouped heads are repeated for each of their query heads.
    key, value = (repeat_kv(states, module.num_key_value_groups) for states in (key, value))
    # Under autocast, rotary positions may have made query and key fp32 again. The kernel takes
    # 16 bits only.
    states = (query, key, value)
    query, key, value = (x[0].transpose(0, 1).to(value.dtype) for x in states)  # (T, heads, width)
    ends = [cu_seq_lens_q, cu_seq_lens_q, max_length_q, max_length_q]
    out = varlen_attn(query, key, value, *ends, scale=options.get("scaling"), **_CAUSAL)
    return out[None], None


# PyTorch 2.13 asks for causal attention by a window, 2.10 by a flag.
_VARLEN = inspect.signature(varlen_attn).parameters if varlen_attn else {}
_CAUSAL = dict(window_size=(-1, 0)) if "window_size" in _VARLEN else dict(is_causal=True)


def _by_conversation(module, query, key, value, attention_mask, conversations=None, **options):
    """PyTorch's attention for each conversation of a packed row.

    (B, heads, T, width) -> (B, T, heads, width). conversations: their lengths.
    """
    # Without lengths the model is not training; it answers questions, for example.
    if conversations is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    pieces = zip(*(states.split(conversations, dim=2) for states in (query, key, value)))
    # No mask: the kernel is causal, and a conversation has no padding.
    outputs = [sdpa_attention_forward(module, *piece, None, **options)[0] for piece in pieces]
    return torch.cat(outputs, dim=1), None


def _mask(*arguments, attention_mask=None, **options):
    """No mask if none was given: transformers would derive one from the position ids."""
    if attention_mask is None:
        return None
    return sdpa_mask(*arguments, attention_mask=attention_mask, **options)


for name, function in (("by_conversation", _by_conversation), ("varlen", _varlen)):
    AttentionInterface.register(name, function)
    AttentionMaskInterface.register(name, _mask)


def answer_loss(hidden: torch.Tensor, head: nn.Module, targets: torch.Tensor) -> torch.Tensor:
    """Summed cross-entropy of hidden states (N, width) against targets (N).

    The original computes logits for every position, in fp32 its largest tensor. Here only answers
    get logits. If there are more than `LOGITS`, they are computed in pieces, and again in the
    backward pass.
    """
    size = max(1, LOGITS // head.out_features)
    if len(targets) <= size:
        return _loss(hidden, head, targets)
    pieces = zip(hidden.split(size), targets.split(size))
    return sum(checkpoint(_loss, some, head, ids, use_reentrant=False) for some, ids in pieces)


def _loss(hidden, head, targets):
    logits = head(hidden).float()  # (N, vocabulary)
    return cross_entropy(logits, targets, reduction="sum")
