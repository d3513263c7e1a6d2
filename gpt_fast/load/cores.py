"""Each rank of a machine on cores of its own: a thread that moves to another rank's core holds both of them up."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from gpt_fast.engine.ranks import Group
from gpt_fast.model.parallel import Ranks

TOPOLOGY = Path("/sys/devices/system/cpu")


def settle(group: Group) -> None:
    """Keep this thread, and those that it will start, on its rank's share of the cores. Called by all ranks alike.

    Not where the ranks may run on different cores already, as numactl or taskset set them, or have too few.
    """
    if sys.platform != "linux":
        return
    allowed = sorted(os.sched_getaffinity(0))
    first, keys = group.ranks.rank - group.local.rank, "gpt_fast/cores/{}"
    group.store.set(keys.format(group.ranks.rank), str(allowed))
    all_allowed = {group.store.get(keys.format(first + local)) for local in range(group.local.size)}
    if len(all_allowed) == 1 and len(allowed) >= group.local.size:
        os.sched_setaffinity(0, share(by_place(allowed, place), group.local))


def by_place(cores: Iterable[int], place: Callable[[int], Sequence[int]]) -> list[int]:
    """Neighbours first: the threads of a core, then the cores of a socket."""
    return sorted(cores, key=lambda core: (*place(core), core))


def place(core: int) -> Sequence[int]:
    """(socket, core of it) of what Linux counts as a core; () where it does not say."""
    files = (TOPOLOGY / f"cpu{core}" / "topology" / name for name in ("physical_package_id", "core_id"))
    try:
        return [int(file.read_text()) for file in files]
    except (OSError, ValueError):
        return ()


def share(cores: Sequence[int], local: Ranks) -> Sequence[int]:
    """One rank's, of at least as many cores as ranks: none is left over."""
    first, end = (rank * len(cores) // local.size for rank in (local.rank, local.rank + 1))
    return cores[first:end]
