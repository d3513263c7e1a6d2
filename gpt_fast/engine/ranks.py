"""The processes that torchrun started to hold one model together: join them, and speak with one voice.

`torchrun --nproc_per_node N -m COMMAND` starts N ranks and ends them all when one of them fails.
"""

from __future__ import annotations

import ctypes
import itertools
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from datetime import timedelta

import torch.distributed as dist
from torch.distributed import ProcessGroup, Store  # type: ignore[attr-defined]  # public, but not in its __all__
from torch.distributed.rendezvous import rendezvous

from gpt_fast.cli.errors import MISTAKES, one_line_errors, text
from gpt_fast.engine.plans import Plans
from gpt_fast.engine.pulse import Pulse
from gpt_fast.model.parallel import Ranks

JOIN = timedelta(minutes=2)  # for all ranks to come up: imports, on a machine that is busy
COLLECTIVE = timedelta(minutes=10)  # for the others in one collective; the pulse finds dead and stopped ones far sooner
FOREVER = timedelta(days=3650)  # for rank 0's next plan: a server may idle
SET_PARENT_DEATH_SIGNAL = 1  # prctl(2)


@dataclass(frozen=True)
class Group:
    """All ranks, those on this machine, and what they have in common: a key-value store, plans, a pulse."""

    ranks: Ranks
    local: Ranks
    store: Store
    plans: Plans
    pulse: Pulse
    _agreed: Iterator[int] = field(default_factory=itertools.count)

    @property
    def leads(self) -> bool:
        """Whether this is rank 0, which decides all and speaks to users; the others compute their share."""
        return self.ranks.rank == 0

    def agree(self, what: str) -> None:
        """Called by all ranks alike: ValueError where this one says something else than rank 0."""
        key = f"gpt_fast/agreed/{next(self._agreed)}"
        if self.leads:
            self.store.set(key, what)
        elif (said := self.store.get(key).decode()) != what:
            raise ValueError(f"rank {self.ranks.rank}: is not set up as rank 0 is (got {what}, allowed {said})")

    def end(self) -> None:
        """Of a command that has done its work: rank 0 lets the others go."""
        if self.leads:
            self.plans.end()
        self.pulse.end()
        dist.destroy_process_group()

    @contextmanager
    def one_voice(self) -> Iterator[None]:
        """What rank 0 prints is shown, what the others print is not; of ranks that fail, one says why."""
        try:
            with open(os.devnull, "w") as unheard, ExitStack() as quiet:
                if not self.leads:
                    quiet.enter_context(redirect_stdout(unheard))
                    quiet.enter_context(redirect_stderr(unheard))
                yield
            self.end()
        except (Exception, SystemExit) as error:
            if isinstance(error, SystemExit) and not error.code:
                raise
            self._explain(error)
            raise SystemExit(1) from None

    def _explain(self, error: Exception | SystemExit) -> None:
        """The first rank that comes here says why; the others stay until it has, for torchrun ends all with the first.

        argparse, on every rank alike, has said so itself: rank 0's was heard.
        """
        said_already = isinstance(error, SystemExit) and not isinstance(error.code, str)
        speaks = self.leads if said_already else self.store.add("gpt_fast/failed", 1) == 1
        if not speaks:
            self.store.wait(["gpt_fast/said"], JOIN)
            return
        if not isinstance(error, SystemExit):
            traceback.print_exception(error)
        elif not said_already:
            print(error.code, file=sys.stderr, flush=True)
        self.store.set("gpt_fast/said", "")


def launched() -> bool:
    """Whether torchrun started this process."""
    return dist.is_torchelastic_launched()


def join() -> Group:
    """Meet the other ranks. Tensors on a CPU go through gloo, those on a GPU through nccl.

    Raises:
        ValueError: some rank does not come, or torchrun gave this one a place that there is not.
    """
    end_with_parent()
    local = Ranks(int(os.environ["LOCAL_RANK"]), int(os.environ["LOCAL_WORLD_SIZE"]))
    ranks = Ranks(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]))
    if not (ranks.rank in range(ranks.size) and local.rank in range(local.size) and local.size <= ranks.size):
        raise ValueError(f"RANK: is no place among the ranks (got {ranks}, on this machine {local})")
    if local.size == ranks.size and sys.platform == "linux":  # one machine: nobody else needs to reach the sockets
        for backend in ("GLOO", "NCCL"):
            os.environ.setdefault(f"{backend}_SOCKET_IFNAME", "lo")
    store, *_ = next(rendezvous("env://", timeout=COLLECTIVE))
    pulse = Pulse(store, ranks)
    meet(store, ranks)
    dist.init_process_group(store=store, rank=ranks.rank, world_size=ranks.size, timeout=COLLECTIVE)
    told: ProcessGroup = dist.new_group(backend="gloo", timeout=FOREVER)
    pulse.start()
    return Group(ranks, local, store, Plans(told), pulse)


def meet(store: Store, ranks: Ranks) -> None:
    """Return when all ranks have come here; ValueError names those that do not."""
    keys = [f"gpt_fast/here/{rank}" for rank in range(ranks.size)]
    store.set(keys[ranks.rank], "")
    try:
        store.wait(keys, JOIN)
    except RuntimeError:
        missing = [rank for rank, key in enumerate(keys) if not store.check([key])]
        problem = f"did not come up within {JOIN.seconds} s (got {ranks.size - len(missing)}, allowed {ranks.size})"
        raise ValueError(f"rank {', '.join(map(str, missing))}: {problem}") from None


def run_command(command: Callable[[Group | None], None]) -> None:
    """Run a command in this process, or as torchrun started it on every rank; a user's mistake is one line.

    With a group, only rank 0 does what the command is for; on the others it must follow (load.engine.follow).
    """
    if not launched():
        with one_line_errors():
            return command(None)
    with one_line_errors():
        group = join()
    with group.one_voice():
        try:
            command(group)
        except MISTAKES as error:  # one rank's alone perhaps, so it is one_voice that says it
            sys.exit(f"error: {text(error)}")


def end_with_parent() -> None:
    """Have Linux end this process if torchrun dies, however it dies."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(SET_PARENT_DEATH_SIGNAL, signal.SIGKILL)
