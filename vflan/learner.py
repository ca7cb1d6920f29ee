"""What is trained: from a batch of ids and picture features to the summed loss of its answers, and nothing computed in vain."""

import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.modeling_flash_attention_utils import prepare_fa_kwargs_from_position_ids
from transformers.utils import is_flash_attn_2_available

from vflan import model as models
from vflan.batches import packs

LOGITS = 1 << 23  # logits that exist at a time (32 MB in fp32); more supervised positions are taken in turns


class Learner(nn.Module):
    """The model as training sees it.

    Padded rows are padded on the right and a causal model never looks right, so no mask is needed. In a packed row each
    conversation attends to itself alone; it begins where its position ids begin again at 0. FlashAttention's varlen
    kernel does that where it is installed, else PyTorch's attention, one conversation after the other: the mask that
    transformers would build is dense, costs the square of the whole row, and is quietly left out if a cache is on.
    """

    def __init__(self, model, recipe):
        super().__init__()
        self.model, language_model = model, model.model.language_model
        if recipe.gradient_checkpointing:
            language_model.activation_checkpointing_enable({"use_reentrant": False})
        if packs(recipe):
            flash = is_flash_attn_2_available() and models.compute_dtype(recipe) == torch.bfloat16
            language_model.set_attn_implementation("flash_attention_2" if flash else "by_conversation")

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
            embeds = embeds + 0 * projector(embeds.new_zeros(1, projector.linear_1.in_features)).sum()
        packed = {} if position_ids is None else _boundaries(position_ids)
        hidden = language_model(
            inputs_embeds=embeds, position_ids=position_ids, attention_mask=None, use_cache=False, **packed
        ).last_hidden_state
        return answer_loss(hidden.flatten(0, 1)[keep], self.model.lm_head, targets)


def _boundaries(position_ids) -> dict:
    """Where the conversations of a packed row lie, found once and not in every layer; each attention takes its own form."""
    starts, longest = prepare_fa_kwargs_from_position_ids(position_ids)
    names = "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k"
    return dict(zip(names, [*starts, *map(int, longest)]), conversations=starts[0].diff().tolist())


def _by_conversation(module, query, key, value, attention_mask, conversations=None, **options):
    """PyTorch's attention, (B, heads, T, width) in and (B, T, heads, width) out, for each conversation of a packed row alone."""
    if conversations is None:  # not training: the model answers questions, say
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    pieces = zip(*(states.split(conversations, dim=2) for states in (query, key, value)))
    return torch.cat([sdpa_attention_forward(module, *piece, None, **options)[0] for piece in pieces], dim=1), None


def _mask(*arguments, attention_mask=None, **options):
    """No mask where none was given, however the positions run."""
    return None if attention_mask is None else sdpa_mask(*arguments, attention_mask=attention_mask, **options)


AttentionInterface.register("by_conversation", _by_conversation)
AttentionMaskInterface.register("by_conversation", _mask)


def answer_loss(hidden, head, targets):
    """Summed cross-entropy of hidden (N, width) against targets (N), with at most `LOGITS` logits in memory at a time.

    The original computes logits for every position, in fp32 its largest tensor. Here only answers have any; if those are
    many, they are computed in stretches, and again in the backward pass.
    """
    size = max(1, LOGITS // head.out_features)
    if len(targets) <= size:
        return _loss(hidden, head, targets)
    pieces = zip(hidden.split(size), targets.split(size))
    return sum(checkpoint(_loss, some, head, wanted, use_reentrant=False) for some, wanted in pieces)


def _loss(hidden, head, targets):
    return cross_entropy(head(hidden).float(), targets, reduction="sum")
