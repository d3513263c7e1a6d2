"""The processes that torchrun started to hold one model together: join them, and speak with one voice.

`torchrun --nproc_per_node N -m COMMAND` starts N ranks and ends them all when one of them fails.
"""

from __future__ import annotations

import ctypes
import os
import secrets
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from datetime import timedelta

import torch.distributed as dist
from torch.distributed import Store  # type: ignore[attr-defined]  # public, but not in its __all__
from torch.distributed.rendezvous import rendezvous

from gpt_fast.cli.errors import MISTAKES, one_line_errors, text
from gpt_fast.model.parallel import Ranks

TIMEOUT = timedelta(minutes=10)  # how long a rank waits for the others in one collective
SET_PARENT_DEATH_SIGNAL = 1  # prctl(2)


@dataclass(frozen=True)
class Group:
    """All ranks, those on this machine, and the key-value store they share."""

    ranks: Ranks
    local: Ranks
    store: Store

    def agreed_seed(self) -> int:
        """A random seed, the same on all ranks: rank 0 draws it."""
        if self.ranks.rank == 0:
            self.store.set("gpt_fast/seed", str(secrets.randbits(31)))
        return int(self.store.get("gpt_fast/seed"))

    @contextmanager
    def one_voice(self) -> Iterator[None]:
        """What rank 0 prints is shown, what the others print is not; of ranks that fail, one says why."""
        try:
            with open(os.devnull, "w") as unheard, ExitStack() as quiet:
                if self.ranks.rank:
                    quiet.enter_context(redirect_stdout(unheard))
                    quiet.enter_context(redirect_stderr(unheard))
                yield
            dist.destroy_process_group()
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
        speaks = self.ranks.rank == 0 if said_already else self.store.add("gpt_fast/failed", 1) == 1
        if not speaks:
            self.store.wait(["gpt_fast/said"], TIMEOUT)
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
    """Meet the other ranks. Tensors on a CPU go through gloo, those on a GPU through nccl."""
    end_with_parent()
    store, rank, size = next(rendezvous("env://", timeout=TIMEOUT))
    dist.init_process_group(store=store, rank=rank, world_size=size, timeout=TIMEOUT)
    local = Ranks(int(os.environ["LOCAL_RANK"]), int(os.environ["LOCAL_WORLD_SIZE"]))
    return Group(Ranks(rank, size), local, store)


def run_command(command: Callable[[Group | None], None]) -> None:
    """Run a command in this process, or as torchrun started it on every rank; a user's mistake is one line."""
    if not launched():
        with one_line_errors():
            return command(None)
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
