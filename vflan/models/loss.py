"""What is trained: from a batch of ids and picture features to the summed loss of its answers, and nothing computed in vain."""

import inspect

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

try:
    from torch.nn.attention.varlen import varlen_attn
except ImportError:  # before PyTorch 2.10
    varlen_attn = None

LOGITS = (
    1 << 23
)  # logits that exist at a time (32 MB in fp32); more supervised positions are taken in turns


def packs(recipe: Recipe) -> bool:
    """Whether conversations share a row: `auto` packs on CUDA only; on a CPU rows of like lengths lose little."""
    return recipe.packing == "packed" or recipe.packing == "auto" and torch.cuda.is_available()


class Learner(nn.Module):
    """The model as training sees it.

    Padded rows are padded on the right and a causal model never looks right, so no mask is needed. In a packed row each
    conversation attends to itself alone; it begins where its position ids begin again at 0. `packed_attention` says which
    kernel does that. The mask that transformers would build is dense, costs the square of the whole row, and is quietly
    left out if a cache is on.
    """

    def __init__(self, model, recipe):
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

    def forward(self, input_ids, position_ids, at, keep, targets, features):
        """input_ids (B, T); position_ids (1, T) of a packed row, None for padded ones; at (P): first position of each
        picture in B*T; keep (N): positions in B*T that predict targets (N); features (P, patches, width), or None for a
        batch of text. Returns a scalar."""
        inner = self.model.model
        language_model, projector = inner.language_model, inner.multi_modal_projector
        embeds = language_model.get_input_embeddings()(input_ids)
        if features is not None:
            seen = projector(features.to(projector.linear_1.weight.dtype)).to(embeds.dtype)
            place = at[:, None] + torch.arange(seen.shape[1], device=at.device)
            embeds = embeds.flatten(0, 1).index_put((place,), seen).view_as(embeds)
        else:  # every process must have a gradient for every weight, and call what ZeRO-3 gathers when it is called
            embeds = (
                embeds + 0 * projector(embeds.new_zeros(1, projector.linear_1.in_features)).sum()
            )
        attention = language_model.config._attn_implementation
        packed = {} if position_ids is None else _boundaries(position_ids, attention)
        hidden = language_model(
            inputs_embeds=embeds,
            position_ids=position_ids,
            attention_mask=None,
            use_cache=False,
            **packed,
        ).last_hidden_state
        return answer_loss(hidden.flatten(0, 1)[keep], self.model.lm_head, targets)


def packed_attention(dtype: torch.dtype) -> str:
    """The name of the attention that keeps the conversations of a packed row apart.

    In bf16 on a GPU the flash-attn package where it is installed, else the same kernel as PyTorch ships it (`varlen`).
    Elsewhere PyTorch's attention, one conversation after the other.
    """
    if dtype != torch.bfloat16:
        return "by_conversation"
    if is_flash_attn_2_available():
        return "flash_attention_2"
    return "varlen" if varlen_attn else "by_conversation"


def _boundaries(position_ids, attention: str) -> dict:
    """Where the conversations of a packed row lie, found once and not in every layer, in the form that `attention` takes."""
    starts, longest = prepare_fa_kwargs_from_position_ids(position_ids)
    if attention == "by_conversation":
        return dict(conversations=starts[0].diff().tolist())
    names = "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k"
    return dict(zip(names, [*starts, *map(int, longest)]))


def _varlen(
    module, query, key, value, attention_mask, cu_seq_lens_q=None, max_length_q=None, **options
):
    """FlashAttention's varlen kernel in PyTorch: (1, heads, T, width) in and (1, T, heads, width) out."""
    if cu_seq_lens_q is None:  # not training: the model answers questions, say
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    key, value = (repeat_kv(states, module.num_key_value_groups) for states in (key, value))
    # Rotary positions may have made query and key fp32 again under autocast; the kernel takes 16 bits only.
    query, key, value = (
        states[0].transpose(0, 1).to(value.dtype) for states in (query, key, value)
    )
    ends = [cu_seq_lens_q, cu_seq_lens_q, max_length_q, max_length_q]
    out = varlen_attn(query, key, value, *ends, scale=options.get("scaling"), **_CAUSAL)
    return out[None], None


# PyTorch 2.13 asks for causal attention by a window, 2.10 by a flag.
_VARLEN = inspect.signature(varlen_attn).parameters if varlen_attn else {}
_CAUSAL = dict(window_size=(-1, 0)) if "window_size" in _VARLEN else dict(is_causal=True)


def _by_conversation(module, query, key, value, attention_mask, conversations=None, **options):
    """PyTorch's attention, (B, heads, T, width) in and (B, T, heads, width) out, for each conversation of a packed row alone."""
    if conversations is None:  # not training: the model answers questions, say
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    pieces = zip(*(states.split(conversations, dim=2) for states in (query, key, value)))
    return torch.cat(
        [sdpa_attention_forward(module, *piece, None, **options)[0] for piece in pieces], dim=1
    ), None


def _mask(*arguments, attention_mask=None, **options):
    """No mask where none was given, however the positions run."""
    return (
        None
        if attention_mask is None
        else sdpa_mask(*arguments, attention_mask=attention_mask, **options)
    )


for name, function in (("by_conversation", _by_conversation), ("varlen", _varlen)):
    AttentionInterface.register(name, function)
    AttentionMaskInterface.register(name, _mask)


def answer_loss(hidden, head, targets):
    """Summed cross-entropy of hidden (N, width) against targets (N), with at most `LOGITS` logits in memory at a time.

    The original computes logits for every position, in fp32 its largest tensor. Here only answers have any; if those are
    many, they are computed in stretches, and again in the backward pass.
    """
    size = max(1, LOGITS // head.out_features)
    if len(targets) <= size:
        return _loss(hidden, head, targets)
    pieces = zip(hidden.split(size), targets.split(size))
    return sum(
        checkpoint(_loss, some, head, wanted, use_reentrant=False) for some, wanted in pieces
    )


def _loss(hidden, head, targets):
    return cross_entropy(head(hidden).float(), targets, reduction="sum")
