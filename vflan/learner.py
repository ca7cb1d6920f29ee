"""What is trained: from a batch of ids and picture features to the summed loss of its answers, and nothing computed in vain."""

import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint
from transformers.modeling_flash_attention_utils import prepare_fa_kwargs_from_position_ids
from transformers.utils import is_flash_attn_2_available

from vflan import model as models
from vflan.batches import packs

LOGITS = 1 << 24  # logits that exist at a time (64 MB in fp32); more supervised positions are taken in turns


class Learner(nn.Module):
    """The model as training sees it.

    Padded rows are padded on the right and a causal model never looks right, so no mask is needed. Packed rows are told
    apart by their position ids, which begin at 0 again with each conversation: FlashAttention's varlen kernel where it
    is installed, else the mask that transformers builds from them. Both hold only without an attention mask and without
    a cache; with either, conversations would see each other, and nothing would say so.
    """

    def __init__(self, model, recipe):
        super().__init__()
        self.model, language_model = model, model.model.language_model
        if recipe.gradient_checkpointing:
            language_model.activation_checkpointing_enable({"use_reentrant": False})
        if packs(recipe) and is_flash_attn_2_available() and models.compute_dtype(recipe) == torch.bfloat16:
            language_model.set_attn_implementation("flash_attention_2")

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
        else:  # every process must have a gradient for every weight
            embeds = embeds + 0 * sum(weight.sum() for weight in projector.parameters())
        options = {}
        if position_ids is not None and language_model.config._attn_implementation == "flash_attention_2":
            starts, longest = prepare_fa_kwargs_from_position_ids(position_ids)  # once, not in every layer
            options = dict(zip(("cu_seq_lens_q", "cu_seq_lens_k"), starts))
            options |= dict(zip(("max_length_q", "max_length_k"), map(int, longest)))
        hidden = language_model(
            inputs_embeds=embeds, position_ids=position_ids, attention_mask=None, use_cache=False, **options
        ).last_hidden_state
        return answer_loss(hidden.flatten(0, 1)[keep], self.model.lm_head, targets)


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
