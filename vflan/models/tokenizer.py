"""The language model's tokenizer, with the ids that LLaVA trains on.

LLaVA reads `tokenizer.model` with SentencePiece. transformers 5 converts that file to a fast tokenizer
and orders the merges by the ids of their pieces; SentencePiece orders them by the pieces' scores. Llama's
file gives runs of spaces the lowest score and a low id, so the two disagree where two spaces meet.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def merge_by_score(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """Order the merges of a tokenizer that was read from a SentencePiece file by the scores in it.

    Returns the same tokenizer. One that has no such file, or another vocabulary than it, stays as it is.
    """
    from tokenizers.models import BPE

    file = Path(str(tokenizer.init_kwargs.get("vocab_file") or ""))
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if (
        file.suffix != ".model"
        or not file.is_file()
        or not isinstance(backend and backend.model, BPE)
    ):
        return tokenizer
    from sentencepiece import SentencePieceProcessor
    from transformers.tokenization_utils_base import generate_merges

    pieces = SentencePieceProcessor(str(file))
    ids = {pieces.id_to_piece(i): i for i in range(len(pieces))}
    if any(tokenizer.convert_tokens_to_ids(piece) != i for piece, i in ids.items()):
        return tokenizer
    # control, unknown and byte pieces are never made by a merge
    scores = {
        piece: pieces.get_score(i)
        for piece, i in ids.items()
        if not (pieces.is_control(i) or pieces.is_unknown(i) or pieces.is_byte(i))
    }
    merges = generate_merges(ids, scores)
    backend.model = BPE(vocab=ids, merges=merges, fuse_unk=True, byte_fallback=True)
    return tokenizer
