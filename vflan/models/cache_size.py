"""What answering holds in memory beside the weights, and what is free for it: how many questions share a batch follows."""

from dataclasses import dataclass

import torch

RESERVE = 512 << 20  # bytes of a GPU that are left alone: its libraries' buffers
SHARE = 0.9  # of the rest; what lies unused between tensors takes some too


@dataclass(frozen=True)
class Sizes:
    """Bytes of one unit each, for a language model in passes of a given width."""

    token: float  # a position's keys and values in all layers
    again: float  # the same of one layer while it grows, and of heads that share keys, which attention repeats
    work: float  # what a layer makes of a position that it reads
    logits: float  # of a question
    number: int  # of one number

    def cache(self, rows, positions):
        """Keys and values at rest."""
        return rows * positions * self.token

    def reading(self, rows, past, width):
        """A cache of `past` positions that reads `width` more, in rows of pictures: no logits."""
        return rows * (past + width) * (self.token + self.again) + rows * width * self.work

    def asking(self, past, rows, new):
        """A batch from its first pass to its last token. rows: for each (questions, tokens of them); new: at most."""
        width, most = max(tokens for _, tokens in rows), max(questions for questions, _ in rows)
        total = past + width + new * most
        first = (
            len(rows) * width * (self.work + 2 * self.number * (past + width))
        )  # a mask, and its first form
        said = sum(questions for questions, _ in rows) * self.logits
        return (
            len(rows) * total * (self.token + self.again)
            + max(first, len(rows) * most * self.work)
            + said
        )


def sizes(text, number: int) -> Sizes:
    """The Sizes of a language model, from its config and the bytes of a number in its passes."""
    head = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    layer, wide = 2 * text.num_key_value_heads * head * number, text.num_attention_heads * head
    repeated = 2 * wide * number if text.num_key_value_heads < text.num_attention_heads else 0
    # the residual, in fp32 inside a norm, queries twice, what attention gives; or the three of a gated layer
    work = (
        number * (2 * text.hidden_size + max(3 * wide, 3 * text.intermediate_size))
        + 8 * text.hidden_size
    )
    return Sizes(
        layer * text.num_hidden_layers,
        layer + repeated,
        work,
        (number + 4) * text.vocab_size,
        number,
    )


def free(device) -> int:
    """Bytes that answering may take on a device now: of a GPU what is free or unused in PyTorch's hands, less a reserve."""
    device = torch.device(device)
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return max(1, int(SHARE * (torch.cuda.mem_get_info(device)[0] + unused)) - RESERVE)
    import psutil

    return max(1, int(SHARE * psutil.virtual_memory().available))


def ran_out(trouble: BaseException) -> bool:
    """Whether an error says that memory ran out; PyTorch has a class for it on GPUs alone, and cuBLAS not even there."""
    said = "can't allocate memory", "CUBLAS_STATUS_ALLOC_FAILED"
    return isinstance(trouble, torch.OutOfMemoryError) or any(
        words in str(trouble) for words in said
    )
