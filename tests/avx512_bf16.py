"""A processor with AVX512-BF16, played on any other.

On such a one bitsandbytes lays 4-bit weights out anew to answer with them.
"""

from contextlib import contextmanager

import bitsandbytes
import torch
from torch.nn.functional import linear


@contextmanager
def avx512_bf16(monkeypatch):
    """Layers made in here take this for such a processor. On one that is, nothing is changed."""
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
    # 32 rows go together: first the lower halves of 32 bytes, then the upper ones, column by column
    halves = packed.reshape(-1, 32)
    numbers = torch.cat([halves & 15, halves >> 4], dim=-1).reshape(rows // 32, columns // 2, 32, 2)
    numbers = numbers.transpose(1, 2).reshape(rows, columns)
    weight = code[numbers.long()] * scales.float().T.repeat_interleave(blocksize, dim=1)
    with torch.no_grad():
        return linear(x.bfloat16().float(), weight.bfloat16().float()).bfloat16().to(x.dtype)
