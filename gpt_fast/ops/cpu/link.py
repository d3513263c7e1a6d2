"""Link: shared memory where the decoders of one machine's ranks meet (src/link.h says how), and where rank 0 tells the
others what comes next (src/mailbox.h).

The memory has no name: it is gone with the last process that holds it, however that ends.
"""

from __future__ import annotations

import os

import torch
import torch.distributed as dist
from torch import Tensor

from gpt_fast.model.parallel import Ranks
from gpt_fast.ops.cpu.build import BuildError
from gpt_fast.ops.cpu.structs import load_library

PART_BYTES = 1 << 31  # room for a rank's part of one sum; only what is used takes memory
MAX_RANKS = 63  # src/link.h's kMaxRanks
SECONDS = 20.0  # that ranks wait for one of them within a step, after its first
SPIN_MICROSECONDS = 50  # a waiting thread spins, where every thread of all ranks has a core
CANNOT = (BuildError, OSError, AttributeError)  # the last: a system without such memory
GIVEN_UP, STEPS_DIFFER = -1, -2  # src/link.h's End


class LinkRefused(Exception):
    """A rank can take no part in a link."""


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

    def send(self, message: Tensor) -> None:
        """Rank 0: leave a message, int64 [n], to all other ranks, in order. Raises RanksLost."""
        numbers = torch.cat((torch.tensor([len(message)]), message))
        if not self.library.gf_link_send(self.handle, numbers.data_ptr(), len(numbers)):
            self.check()

    def receive(self) -> Tensor:
        """The others: the next message, however long it takes. Raises RanksLost."""
        return self._numbers(int(self._numbers(1)))

    def _numbers(self, count: int) -> Tensor:
        numbers = torch.empty(count, dtype=torch.int64)
        if not self.library.gf_link_receive(self.handle, numbers.data_ptr(), count):
            self.check()
        return numbers

    def check(self) -> None:
        """Raises RanksLost where the link has ended, with the reason."""
        end = self.library.gf_link_end(self.handle) if self.handle else GIVEN_UP  # with its decoder, in any order
        if end > 0:
            raise RanksLost(f"rank {end - 1} did not take part in a step for {self.seconds:g} s")
        if end:
            raise RanksLost({GIVEN_UP: "the ranks gave up", STEPS_DIFFER: "ranks began different steps"}[end])


def memory(size: int, part_bytes: int = PART_BYTES) -> int:
    """A file, held by memory alone, that `size` ranks can share. Raises OSError, build.BuildError."""
    if size > MAX_RANKS:
        raise OSError(f"{size} ranks: at most {MAX_RANKS} of a machine share memory")
    file = os.memfd_create("gpt_fast ranks", os.MFD_CLOEXEC)
    os.ftruncate(file, load_library().gf_link_bytes(size, part_bytes))
    return file


def join(ranks: Ranks, threads: int, *, refusal: str | None = None) -> Link:
    """The link of torch.distributed's default group, whose ranks must all be on this machine and must all call this.

    refusal: why this rank can take none. Rank 0 builds the library for all.

    Raises:
        LinkRefused: on every rank, with what one of them said: its refusal, or why it has no library or no memory.
    """
    file, link = -1, None
    try:
        if ranks.rank == 0 and refusal is None:
            file = memory(ranks.size)
    except CANNOT as error:
        refusal = str(error)
    place = torch.tensor([os.getpid(), file])
    dist.broadcast(place, src=0)
    pid, file_there = place.tolist()
    try:
        if file_there >= 0 and refusal is None:
            file = file if ranks.rank == 0 else os.open(f"/proc/{pid}/fd/{file_there}", os.O_RDWR | os.O_CLOEXEC)
            link = Link(file, ranks, threads=threads)
    except CANNOT as error:
        refusal = str(error)
    said: list[str | None] = [None] * ranks.size
    dist.all_gather_object(said, refusal)  # after which nobody needs the file any more
    if file >= 0:
        os.close(file)
    if link is None or any(said):
        raise LinkRefused(next(f"rank {rank}: {why}" for rank, why in enumerate(said) if why))
    return link
