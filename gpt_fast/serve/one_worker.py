"""One worker a model: TorchServe 0.12's continuous batching hangs requests as soon as a second one runs."""

from __future__ import annotations

import os
import socket
import sys
import time

PATIENCE = 3.0  # seconds: a worker that is being replaced may not be gone yet


class SecondWorkerError(ValueError):
    """Another worker of the same TorchServe holds the model."""


def claim_model(name: str, *, frontend: int | None = None) -> socket.socket | None:
    """Hold the model's name for this process, among the workers of one TorchServe, until the returned socket goes.

    A name in Linux's abstract socket namespace is nobody's file and goes with its process, however that ends. frontend:
    TorchServe's process; by default the one that started this. None where there is no such namespace.
    Raises SecondWorkerError.
    """
    if sys.platform != "linux":
        return None
    claim = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    until = time.monotonic() + PATIENCE
    while True:
        try:
            claim.bind(f"\0gpt-fast {os.getuid()} {frontend or starter()} {name}")
            return claim
        except OSError:
            if time.monotonic() > until:
                claim.close()
                problem = "one worker holds the model and batches for all (got a second worker, allowed 1)"
                raise SecondWorkerError(f"min_worker: {problem}") from None
        time.sleep(0.1)


def starter() -> int:
    """The parent's process id, or that of its parent where it is torchrun."""
    import psutil

    parent = os.getppid()
    return psutil.Process(parent).ppid() if "TORCHELASTIC_RUN_ID" in os.environ else parent
