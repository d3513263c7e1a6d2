"""What this card can do at best: bytes a second read and copied, seconds of a node of a CUDA graph."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from gpt_fast.bench.gpu.timing import timed, timed_graph

NODES = 225  # of a step of a model of 32 layers, about
Readers = dict[str, Callable[[Tensor], Tensor]]


def ceilings(device: torch.device, nbytes: int, repeat: int) -> dict[str, Any]:
    """read: the best of several reductions over a buffer far larger than the caches; copy counts both directions."""
    source = torch.ones(nbytes // 4, dtype=torch.float32, device=device)
    target = torch.empty_like(source)
    one = torch.zeros(1, device=device)
    reads = readers(device)
    seconds = {name: timed(partial(read, source), device, repeat=repeat).least for name, read in reads.items()}
    copy = timed(lambda: target.copy_(source), device, repeat=repeat)
    node = timed_graph(lambda: one.add_(1), device, repeat=repeat, inner=NODES)
    rates = {name: nbytes / least for name, least in seconds.items()}
    best = max(rates, key=rates.__getitem__)
    return {
        "read_gb_s": rates[best] / 1e9,
        "read_by": best,
        "readers_gb_s": {name: rate / 1e9 for name, rate in rates.items()},
        "copy_gb_s": 2 * nbytes / copy.least / 1e9,
        "graph_node_us": node.median * 1e6,
        "buffer_bytes": nbytes,
    }


def read_sum(source: Tensor) -> Tensor:
    return source.view(1024, -1).sum(1)


def read_max(source: Tensor) -> Tensor:
    return source.view(1024, -1).amax(1)


def read_matvec(source: Tensor) -> Tensor:
    matrix = source.view(torch.bfloat16).view(-1, 8192)
    return matrix @ matrix.new_ones(8192)


def readers(device: torch.device) -> Readers:
    """Which reads best differs from card to card."""
    found: Readers = {"sum": read_sum, "amax": read_max, "matrix-vector": read_matvec}
    if device.type == "cuda" and find_spec("triton"):
        from gpt_fast.bench.gpu.ceilings_triton import read_stream

        found["stream"] = read_stream
    return found
