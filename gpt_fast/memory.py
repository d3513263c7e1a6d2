"""Large tensors on a CPU, in huge pages where the system gives them: fewer page table lookups and faults."""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Sequence

import torch
from torch import Tensor

HUGE_PAGE = 1 << 21


def empty(nbytes: int) -> Tensor:
    """uint8 memory that starts at a huge page; what is never written takes no memory."""
    buffer = ask_for_huge_pages(torch.empty(nbytes + HUGE_PAGE, dtype=torch.uint8))
    start = -buffer.data_ptr() % HUGE_PAGE
    return buffer[start : start + nbytes]


def zeros(shape: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
    """torch.zeros, in huge pages on a CPU."""
    tensor = torch.empty(shape, dtype=dtype, device=device)
    if device.type == "cpu":
        ask_for_huge_pages(tensor)
    return tensor.zero_()


def ask_for_huge_pages(tensor: Tensor) -> Tensor:
    """Advise the system of a large tensor not written yet; off Linux nothing."""
    first = -(-tensor.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
    length = tensor.data_ptr() + tensor.nbytes - first
    if hasattr(mmap, "MADV_HUGEPAGE") and length >= HUGE_PAGE:
        # An advice: what comes back is not looked at, for without huge pages all works as well.
        ctypes.CDLL(None).madvise(ctypes.c_void_p(first), ctypes.c_size_t(length), mmap.MADV_HUGEPAGE)
    return tensor
