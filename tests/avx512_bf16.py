"""Simulates a processor with AVX512-BF16.

On such a processor bitsandbytes changes the layout of 4-bit weights for inference.
"""

from contextlib import contextmanager

import bitsandbytes
import torch
from torch.nn.functional import linear


@contextmanager
def avx512_bf16(monkeypatch):
    """Layers made inside see such a processor. On a real one nothing changes."""
    if bitsandbytes.functional.has_avx512bf16():
        yield
        return
    monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: True)
    with torch.library._scoped_library("bitsandbytes", "IMPL") as kernels:
        kernels.impl("gemv_4bit", _product, "CPU")
        yield


def _product(x, packed, shape, scales, code, blocksize):
    """What bitsandbytes' kernel computes, in its layout.

    x: (..., K); packed: (N, K/2); scales: (K/blocksize, N).
    Like the kernel it rounds to bf16 and has no derivative.
    """
    rows, columns = shape
    # Each group of 32 rows stores, column by column, the lower halves of 32 bytes, then the upper.
    halves = packed.reshape(-1, 32)
    numbers = torch.cat([halves & 15, halves >> 4], dim=-1).reshape(rows // 32, columns // 2, 32, 2)
    numbers = numbers.transpose(1, 2).reshape(rows, columns)
    weight = code[numbers.long()] * scales.float().T.repeat_interleave(blocksize, dim=1)
    with torch.no_grad():
        return linear(x.bfloat16().float(), weight.bfloat16().float()).bfloat16().to(x.dtype)
