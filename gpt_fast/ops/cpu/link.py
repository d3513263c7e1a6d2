"""Link: shared memory where the decoders of one machine's ranks meet (src/link.h says how).

The memory has no name: it is gone with the last process that holds it, however that ends.
"""

from __future__ import annotations

import os
from contextlib import suppress

import torch
import torch.distributed as dist

from gpt_fast.model.parallel import Ranks
from gpt_fast.ops.cpu.build import BuildError
from gpt_fast.ops.cpu.structs import load_library

PART_BYTES = 1 << 31  # room for a rank's part of one sum; only what is used takes memory
MAX_RANKS = 63  # src/link.h's kMaxRanks
SECONDS = 20.0  # that ranks wait for one of them within a step, after its first
SPIN_MICROSECONDS = 50  # a waiting thread spins, where every thread of all ranks has a core
GIVEN_UP, STEPS_DIFFER = -1, -2  # src/link.h's End


class RanksLost(RuntimeError):
    """The ranks cannot go on together: what they compute from now on means nothing."""


class Link:
    """One rank's end of it.

    file: of memory(size), the same for all. seconds: how long a rank that is late is waited for; then the link has
    ended on every rank. threads: of this rank's decoder. isa: of the decoder's library, for tests.
    Raises OSError where the memory cannot be mapped, build.BuildError where there is no library.
    """

    def __init__(
        self, file: int, ranks: Ranks, *, threads: int, seconds: float = SECONDS, part_bytes: int = PART_BYTES,
        isa: str | None = None,
    ) -> None:  # fmt: skip
        self.library, self.seconds = load_library(isa), seconds
        self.rank, self.size = ranks
        spin = SPIN_MICROSECONDS if ranks.size * threads <= (os.cpu_count() or 1) else 0
        self.handle = self.library.gf_link_create(file, ranks.rank, ranks.size, part_bytes, seconds, spin)
        if not self.handle:
            raise OSError("the memory that ranks share cannot be mapped")

    def __del__(self) -> None:
        handle, self.handle = getattr(self, "handle", None), None
        if handle:
            self.library.gf_link_destroy(handle)

    def give_up(self) -> None:
        """End the link: steps that run or begin on any rank fail at once. From any thread."""
        self.library.gf_link_give_up(self.handle)

    def meet(self, count: int = 1) -> None:
        """Wait for all ranks, as a sum of nothing does, `count` times; no step may run. Raises RanksLost."""
        if not self.library.gf_link_meet(self.handle, count):
            self.check()

    def check(self) -> None:
        """Raises RanksLost where the link has ended, with the reason."""
        end = self.library.gf_link_end(self.handle) if self.handle else GIVEN_UP  # with its decoder, in any order
        if end > 0:
            raise RanksLost(f"rank {end - 1} did not take part in a step for {self.seconds:g} s")
        if end:
            raise RanksLost({GIVEN_UP: "the ranks gave up", STEPS_DIFFER: "ranks began different steps"}[end])


def memory(size: int, part_bytes: int = PART_BYTES) -> int:
    """A file, held by memory alone, that `size` ranks can share. Raises OSError, build.BuildError."""
    file = os.memfd_create("gpt_fast ranks", os.MFD_CLOEXEC)
    os.ftruncate(file, load_library().gf_link_bytes(size, part_bytes))
    return file


def join(ranks: Ranks, threads: int) -> Link | None:
    """The link of torch.distributed's default group, whose ranks must all be on this machine and must all call this.

    None, on every rank, where one of them has no library, or cannot see the memory of rank 0, which builds the library
    for all.
    """
    link, file = None, -1
    with suppress(BuildError, OSError, AttributeError):  # not every system has such files
        file = memory(ranks.size) if ranks.rank == 0 and ranks.size <= MAX_RANKS else -1
    place = torch.tensor([os.getpid(), file])
    dist.broadcast(place, src=0)
    pid, first_file = place.tolist()
    with suppress(BuildError, OSError):
        if first_file >= 0 and ranks.rank:
            file = os.open(f"/proc/{pid}/fd/{first_file}", os.O_RDWR | os.O_CLOEXEC)
        link = Link(file, ranks, threads=threads) if file >= 0 else None
    all_have_it = agreed(link is not None)
    if file >= 0:
        os.close(file)
    return link if all_have_it else None


def agreed(yes: bool) -> bool:
    """Whether all ranks say yes."""
    answer = torch.tensor([int(yes)])
    dist.all_reduce(answer, op=dist.ReduceOp.MIN)
    return bool(answer.item())
