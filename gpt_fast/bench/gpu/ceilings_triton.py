"""A kernel that only reads: 128 KiB a program, 64 bytes of each thread in flight at a time."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK, STEPS = 4096, 8


@triton.jit
def read_kernel(source, out, count, BLOCK: tl.constexpr, STEPS: tl.constexpr):
    first = tl.program_id(0).to(tl.int64) * (BLOCK * STEPS)
    total = tl.zeros((BLOCK,), tl.int32)
    for step in range(STEPS):
        at = first + step * BLOCK + tl.arange(0, BLOCK)
        total += tl.load(source + at, at < count, 0)
    tl.store(out + tl.program_id(0), tl.sum(total))


def read_stream(source: Tensor) -> Tensor:
    """The sum of each program's share, of the bits as int32; wraps."""
    words = source.view(torch.int32)
    programs = triton.cdiv(len(words), BLOCK * STEPS)
    out = torch.empty(programs, dtype=torch.int32, device=source.device)
    read_kernel[(programs,)](words, out, len(words), BLOCK=BLOCK, STEPS=STEPS, num_warps=8)
    return out
