"""Nothing that a test starts outlives its pytest, however that ends, `kill -9` included.

`watch_this_process` puts a mark into this process's environment, which every program that a test starts inherits, in
whatever session it lives: TorchServe, its Java and its workers, torchrun's ranks, browsers. A second process, which
runs this file, waits for this one's end and then kills whatever carries the mark (found in Linux's /proc).
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

PREFIX = "GPT_FAST_STARTED_BY_"
LOOK_SECONDS = 0.2


def watch_this_process() -> None:
    """To be called once, before anything is started. A pytest that another one starts (xdist's) has both marks."""
    mark = f"{PREFIX}{os.getpid()}_{uuid.uuid4().hex}"
    subprocess.Popen(
        [sys.executable, "-SEs", __file__, str(os.getpid()), mark],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,  # Ctrl-C is not for it
    )
    os.environ[mark] = "1"


def marked(mark: str) -> Iterator[int]:
    """The processes that were started with a mark in their environment and still run."""
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            if mark.encode() in path.read_bytes():
                yield int(path.parent.name)
        except OSError:  # ended meanwhile, or another user's
            continue


def main(parent: int, mark: str) -> None:
    while os.getppid() == parent:
        time.sleep(LOOK_SECONDS)
    while left := list(marked(mark)):  # again, until none is left: a process may be starting another
        for pid in left:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        time.sleep(0.02)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
