"""Large tensors on a CPU, in huge pages where the system gives them: fewer page table lookups and faults."""

from __future__ import annotations

import ctypes
import mmap
import threading
from collections.abc import Iterable, Sequence
from math import prod

import torch
from torch import Tensor

HUGE_PAGE = 1 << 21
POPULATE_WRITE = 23  # Linux 5.14's MADV_POPULATE_WRITE, which Python's mmap does not name


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
    """torch.zeros; on a CPU in huge pages, which the system gives when they are first written, or by `populate`."""
    nbytes = prod(shape) * dtype.itemsize
    if device.type != "cpu" or nbytes < HUGE_PAGE or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.zeros(shape, dtype=dtype, device=device)
    return empty(nbytes).view(dtype).view(*shape)  # a new page is zero


def populate(tensors: Iterable[Tensor]) -> threading.Thread:
    """Let a thread fetch the pages of what `zeros` made, so that few requests wait for them: seconds for gigabytes."""
    large = [t for t in tensors if t.device.type == "cpu" and t.nbytes >= HUGE_PAGE]
    thread = threading.Thread(target=write_pages, args=large, daemon=True)
    thread.start()
    return thread


def write_pages(*tensors: Tensor) -> None:
    """One by one, for while the system fetches one the process cannot map memory."""
    madvise = ctypes.CDLL(None).madvise
    for tensor in tensors:
        for start in range(0, tensor.nbytes, HUGE_PAGE):
            length = min(HUGE_PAGE, tensor.nbytes - start)
            # An advice: what comes back is not looked at, for an older system fetches each page when it is used.
            madvise(ctypes.c_void_p(tensor.data_ptr() + start), ctypes.c_size_t(length), POPULATE_WRITE)
