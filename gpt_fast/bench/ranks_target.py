"""The engine on several ranks of this machine, as a target: its process is rank 0 and starts the others.

python -m gpt_fast.bench.ranks_target OPTIONS     # a further rank, told its place as torchrun tells it
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from dataclasses import replace
from typing import Any

from gpt_fast.bench.engine_target import EngineTarget
from gpt_fast.bench.sample import Description
from gpt_fast.cli.errors import one_line_errors
from gpt_fast.config import EngineConfig
from gpt_fast.engine.ranks import Group, join
from gpt_fast.llm import Engine
from gpt_fast.load.engine import load_parts, start_following
from gpt_fast.measure.machine import peak_rss_bytes


class RanksTarget(EngineTarget):
    """An Engine with EngineConfig's options on `tp` ranks; threads: of each."""

    def __init__(self, *, tp: int, **options: Any) -> None:
        places = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(tp)}
        command = [sys.executable, "-m", "gpt_fast.bench.ranks_target", json.dumps(options)]
        self.others = [subprocess.Popen(command, env=os.environ | places | place(rank, tp)) for rank in range(1, tp)]
        os.environ.update(places | place(0, tp))
        try:
            self.group: Group = join()
            super().__init__(engine=Engine(load_parts(EngineConfig(**options), self.group)))
        except BaseException:
            self.kill()
            raise
        self.helpers = [other.pid for other in self.others]

    def describe(self) -> Description:
        """Bytes are rank 0's: its share is read while the others read theirs."""
        told = super().describe()
        return replace(told, facts={**told.facts, "ranks": self.group.ranks.size})

    def peak_rss(self) -> int:
        """Bytes of the largest rank."""
        return max(peak_rss_bytes(pid) or 0 for pid in (os.getpid(), *self.helpers))

    def close(self) -> None:
        """Let the others go."""
        self.group.end()
        try:
            for other in self.others:
                other.wait(timeout=10)
        finally:
            self.kill()

    def kill(self) -> None:
        for other in self.others:
            other.kill()
            other.wait()


def place(rank: int, size: int) -> dict[str, str]:
    """What torchrun would say in the environment of a rank, all of them on one machine."""
    return {"RANK": str(rank), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(size)}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def main() -> None:
    with one_line_errors():  # rank 0's process says what it meets itself
        group = join()
        start_following(EngineConfig(**json.loads(sys.argv[1])), group)()
        group.end()


if __name__ == "__main__":
    main()
