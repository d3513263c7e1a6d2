"""The processes that torchrun started to hold one model together: join them, and speak with one voice.

`torchrun --nproc_per_node N -m COMMAND` starts N ranks and ends them all when one of them fails.
"""

from __future__ import annotations

import ctypes
import io
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from datetime import timedelta

import torch.distributed as dist

from gpt_fast.engine import Runner
from gpt_fast.parallel import Ranks
from gpt_fast.scheduler import Sequence

TIMEOUT = timedelta(minutes=10)  # how long a rank waits for the others in one collective
SET_PARENT_DEATH_SIGNAL = 1  # prctl(2)


@dataclass(frozen=True)
class Group:
    """All ranks, those on this machine, and the key-value store they share."""

    ranks: Ranks
    local: Ranks
    store: dist.Store

    @contextmanager
    def one_voice(self) -> Iterator[None]:
        """What rank 0 prints is shown, what the others print is not; of ranks that fail, the first says why."""
        unheard = io.StringIO()
        try:
            with ExitStack() as quiet:
                if self.ranks.rank:
                    quiet.enter_context(redirect_stdout(unheard))
                    quiet.enter_context(redirect_stderr(unheard))
                yield
        except (Exception, SystemExit) as error:
            if isinstance(error, SystemExit) and not error.code:
                raise
            if self.store.add("gpt_fast/failed", 1) > 1:
                raise SystemExit(1) from None
            if isinstance(error, SystemExit) and not isinstance(error.code, str):
                sys.stderr.write(unheard.getvalue())  # where argparse has said it
            raise
        finally:
            dist.destroy_process_group()


class LockstepRunner(Runner):
    """A runner whose plans depend on nothing but the requests, so that ranks that are given the same make the same.

    The learned budget of prompt tokens beside streams follows a clock, and every rank has its own.
    """

    def chunk_beside(self, decodes: list[Sequence]) -> int:
        return self.chunks[-1]


def launched() -> bool:
    """Whether torchrun started this process."""
    return dist.is_torchelastic_launched()


def join() -> Group:
    """Meet the other ranks. Tensors on a CPU go through gloo, those on a GPU through nccl."""
    end_with_parent()
    store, rank, size = next(dist.rendezvous("env://", timeout=TIMEOUT))
    dist.init_process_group(store=store, rank=rank, world_size=size, timeout=TIMEOUT)
    local = Ranks(int(os.environ["LOCAL_RANK"]), int(os.environ["LOCAL_WORLD_SIZE"]))
    return Group(Ranks(rank, size), local, store)


def end_with_parent() -> None:
    """Have Linux end this process when torchrun dies, however it dies."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(SET_PARENT_DEATH_SIGNAL, signal.SIGKILL)
