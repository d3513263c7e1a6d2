"""Ranks of the CPU decoder as threads of one process: their decoders, and one call on all of them at once."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from gpt_fast.model.parallel import Ranks, shard
from gpt_fast.model.transformer import Transformer
from gpt_fast.ops.cpu import CpuDecoder
from gpt_fast.ops.cpu.link import PART_BYTES, Link, memory

T = TypeVar("T")


def together(calls: Sequence[Callable[[], T]]) -> list[T]:
    """What the calls return, each made on a thread of its own; the first error of one of them."""
    with ThreadPoolExecutor(len(calls)) as threads:
        return [future.result() for future in [threads.submit(call) for call in calls]]


def links(size: int, *, part_bytes: int = PART_BYTES, **options: Any) -> list[Link]:
    """Those of `size` ranks, over one memory."""
    file = memory(size, part_bytes)
    try:
        return [Link(file, Ranks(rank, size), threads=1, part_bytes=part_bytes, **options) for rank in range(size)]
    finally:
        os.close(file)


def share_decoders(
    make_model: Callable[[], Transformer],
    size: int,
    *,
    weights: str,
    threads: int = 1,
    isa: str | None = None,
    part_bytes: int = PART_BYTES,
) -> list[CpuDecoder]:
    """A decoder of each rank's share of the model, which make_model makes alike each time."""
    shares = [make_model() for _ in range(size)]
    for rank, model in enumerate(shares):
        shard(model, Ranks(rank, size))
    pairs = zip(shares, links(size, isa=isa, part_bytes=part_bytes), strict=True)

    def build(model: Transformer, link: Link) -> Callable[[], CpuDecoder]:
        return lambda: CpuDecoder(model, weights=weights, threads=threads, isa=isa, link=link)

    return together([build(model, link) for model, link in pairs])


def meet_for_ever(file: int) -> None:
    """Rank 1 of two, in a process of its own: it meets rank 0 as often as that likes."""
    link = Link(file, Ranks(1, 2), threads=1, seconds=600)
    while True:
        link.meet()
