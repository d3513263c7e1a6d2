"""Large tensors on a CPU, in huge pages where the system gives them: fewer page table lookups and faults."""

from __future__ import annotations

import mmap
from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor

HUGE_PAGE = 1 << 21


def empty(nbytes: int) -> Tensor:
    """uint8 memory that starts at a huge page; what is never written takes no memory."""
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(nbytes, dtype=torch.uint8)
    # Python's default, shared memory, gets no huge pages.
    mapped = mmap.mmap(-1, nbytes + HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    mapped.madvise(mmap.MADV_HUGEPAGE)
    buffer = torch.frombuffer(mapped, dtype=torch.uint8)
    start = -buffer.data_ptr() % HUGE_PAGE
    return buffer[start : start + nbytes]


def zeros(shape: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
    """torch.zeros; on a CPU in huge pages, which the system gives when they are first written."""
    nbytes = prod(shape) * dtype.itemsize
    if device.type != "cpu" or nbytes < HUGE_PAGE or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.zeros(shape, dtype=dtype, device=device)
    return empty(nbytes).view(dtype).view(*shape)  # a new page is zero
