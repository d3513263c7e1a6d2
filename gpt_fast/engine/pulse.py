"""Each rank shows the others that it is alive, whatever it does; one that falls silent ends the group.

torchrun notices a rank that dies, but not one that is stopped, or on a machine that is gone: the others would wait for
it in a collective, or for its next plan, for as long as those may take. A thread's pulse stops with its process only.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from pathlib import Path

from torch.distributed import Store  # type: ignore[attr-defined]  # public, but not in its __all__

from gpt_fast.model.parallel import Ranks

BEAT = 1.0  # seconds
SILENCE = 15.0  # seconds without a beat after which a rank counts as gone
ENDED = "ended"


class Pulse:
    """This rank's beats in the ranks' store, and an eye on the others'."""

    def __init__(self, store: Store, ranks: Ranks) -> None:
        self.store: Store = store.clone()  # type: ignore[attr-defined]  # a connection of its own: calls wait for others
        self.ranks = ranks
        self.ended = threading.Event()
        self.thread = threading.Thread(target=self._run, name="pulse", daemon=True)
        self.keys = [f"gpt_fast/pulse/{rank}" for rank in range(ranks.size)]
        self.beats = 0
        self.beat()

    def start(self) -> None:
        """Begin to watch; every rank must have come by here or be past its constructor."""
        self.thread.start()

    def end(self) -> None:
        """This rank has done its work: its silence means nothing from now on."""
        self.ended.set()
        self.thread.join()
        self.store.set(self.keys[self.ranks.rank], ENDED)

    def beat(self) -> None:
        self.beats += 1
        self.store.set(self.keys[self.ranks.rank], f"{os.getpid()} {self.beats}")

    def _run(self) -> None:
        heard: dict[int, tuple[str, float]] = {}
        while not self.ended.wait(BEAT):
            try:
                self.beat()
                said = [value.decode() for value in self.store.multi_get(self.keys)]
            except RuntimeError:
                if self.ended.is_set():
                    return
                give_up("error: torchrun's store is gone, and with it the machine of rank 0 or its torchrun")
            now = time.monotonic()
            for rank, value in enumerate(said):
                if value != heard.get(rank, ("", 0.0))[0] or value == ENDED:
                    heard[rank] = value, now
                elif now - heard[rank][1] > SILENCE:
                    self._end_group(rank, value)

    def _end_group(self, rank: int, value: str) -> None:
        """Say so once, end the silent rank too if it is a child of the same torchrun, whose signal a stopped one would
        not take, and this process."""
        end_sibling(int(value.split()[0]))
        speaks = self.store.add("gpt_fast/silent", 1) == 1
        give_up(f"error: rank {rank} gave no sign of life for {SILENCE:.0f} s" if speaks else "")


def give_up(message: str) -> None:
    """End this process at once, whatever its other threads wait for."""
    if message:
        print(message, file=sys.__stderr__, flush=True)
    os._exit(1)


def end_sibling(pid: int) -> None:
    """Kill a process of the same parent; one that is none, or gone, is left alone."""
    try:
        parent = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
        if parent == os.getppid():
            os.kill(pid, signal.SIGKILL)
    except OSError:
        pass
