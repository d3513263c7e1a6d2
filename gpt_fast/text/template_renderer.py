"""The caller's side of template_process.py: one process for all chat templates, started at the first one.

It is there before any request, so that a rendering costs a message to and fro, and is started again when it ended.
"""

from __future__ import annotations

import functools
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any, NamedTuple

from gpt_fast.text.template_process import MEMORY, SECONDS

WALL_SECONDS = 60.0  # a machine may be busy with other things
PIECE = 1 << 20  # bytes received at a time
ROOT = Path(__file__).resolve().parents[2]


class TemplateError(ValueError):
    """What is wrong with a template, or with these messages for it, in one line."""


class Renderer:
    """Thread-safe; one rendering at a time."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._worker: Worker | None = None

    def content_format(self, source: str) -> str:
        """Compile a template: the form of content that it takes. Raises TemplateError."""
        return self._ask({"source": source})["content_format"]

    def render(self, source: str, variables: dict[str, Any], *, max_chars: int) -> str:
        """Raises TemplateError: the template's own refusal, or it took too much time, memory or room."""
        return self._ask({"source": source, "variables": variables, "max_chars": max_chars})["text"]

    def _ask(self, request: dict[str, Any]) -> dict[str, str]:
        line = json.dumps(request, ensure_ascii=False).encode("utf-8", "surrogatepass") + b"\n"
        with self._lock:
            if self._worker is None or self._worker.process.poll() is not None:
                self._worker = start()
            reply = self._worker.exchange(line)
        answer: dict[str, str] = json.loads(reply)
        if "error" in answer:
            raise TemplateError(answer["error"])
        return answer


@functools.cache
def shared_renderer() -> Renderer:
    """One for the process."""
    return Renderer()


class Worker(NamedTuple):
    """The process, and what connects us with it. It ends when we do."""

    process: subprocess.Popen[bytes]
    connection: socket.socket

    def exchange(self, line: bytes) -> bytes:
        """Its answer. Raises TemplateError where it ended before, or is not heard of: then it has ended now."""
        try:
            self.connection.sendall(line)
            parts = [self.connection.recv(PIECE)]
            while parts[-1] and not parts[-1].endswith(b"\n"):
                parts.append(self.connection.recv(PIECE))
        except OSError:  # a time-out, too
            parts = [b""]
        if parts[-1]:
            return b"".join(parts)
        raise TemplateError(self.ended())

    def ended(self) -> str:
        """Why there was no answer."""
        self.connection.close()
        self.process.kill()  # if it still runs, it speaks no longer
        if self.process.wait() == -signal.SIGPROF:
            return f"takes too long (allowed {SECONDS:g} s of processor time)"
        return f"takes too much (allowed {MEMORY >> 20} MiB and {WALL_SECONDS:g} s)"


def start() -> Worker:
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    ours, its = socket.socketpair()
    ours.settimeout(WALL_SECONDS)
    with its:
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", "gpt_fast.text.template_process"],
            stdin=its.fileno(),
            stdout=its.fileno(),
            stderr=subprocess.DEVNULL,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
        )
    return Worker(process, ours)
