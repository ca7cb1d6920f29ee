"""The language model's tokenizer, with the ids that LLaVA trains on.

LLaVA reads `tokenizer.model` with SentencePiece. transformers 5 converts that file to a fast
tokenizer and orders the merges by the ids of their pieces; SentencePiece orders them by the pieces'
scores. Llama's file gives runs of spaces the lowest score and a low id, so that the two disagree
where two spaces meet.
"""

from __future__ import annotations

from pathlib import Path

from sentencepiece import SentencePieceProcessor
from tokenizers.models import BPE
from transformers import AutoTokenizer, PreTrainedTokenizerBase
from transformers.tokenization_utils_base import generate_merges

from vflan.config import Recipe, weights_source
from vflan.data.conversation import IMAGE
from vflan.models.weights import read_pretrained


def load_tokenizer(recipe: Recipe) -> PreTrainedTokenizerBase:
    """The language model's tokenizer, with `<image>` and a padding token.

    The unknown token pads, as in LLaVA. ValueError for a tokenizer without an end token.
    """
    tokenizer = read_pretrained(AutoTokenizer, weights_source(recipe.language_model))
    tokenizer = merge_by_score(tokenizer)
    if IMAGE not in tokenizer.get_vocab():
        # Without the option, the model's own tokens would no longer be special.
        more = {"additional_special_tokens": [IMAGE]}
        tokenizer.add_special_tokens(more, replace_extra_special_tokens=False)
    # `legacy` says how a Llama tokenizer reads the text after an end token. Without this line a
    # saved copy would forget it.
    if hasattr(tokenizer, "legacy"):
        tokenizer.init_kwargs["legacy"] = tokenizer.legacy
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
    if tokenizer.eos_token_id is None:
        raise ValueError(
            f"{recipe.language_model}: its tokenizer has no end token, so no answer could ever end."
        )
    return tokenizer


def merge_by_score(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """Order the merges of a tokenizer that comes from a SentencePiece file by the file's scores.

    Returns the same tokenizer. Without such a file, or with another vocabulary, nothing changes.
    """
    file = Path(str(tokenizer.init_kwargs.get("vocab_file") or ""))
    backend = getattr(tokenizer, "backend_tokenizer", None)
    is_bpe = isinstance(backend and backend.model, BPE)
    if file.suffix != ".model" or not file.is_file() or not is_bpe:
        return tokenizer
    pieces = SentencePieceProcessor(str(file))
    ids = {pieces.id_to_piece(i): i for i in range(len(pieces))}
    if any(tokenizer.convert_tokens_to_ids(piece) != i for piece, i in ids.items()):
        return tokenizer
    # No merge makes a control, unknown or byte piece.
    unmerged = (pieces.is_control, pieces.is_unknown, pieces.is_byte)
    merged = {piece: i for piece, i in ids.items() if not any(is_kind(i) for is_kind in unmerged)}
    merges = generate_merges(ids, {piece: pieces.get_score(i) for piece, i in merged.items()})
    backend.model = BPE(vocab=ids, merges=merges, fuse_unk=True, byte_fallback=True)
    return tokenizer
