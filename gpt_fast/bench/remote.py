"""A target in a process of its own: its threads, its memory and its imports disturb no other's."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from multiprocessing.connection import Connection
from typing import Any

from gpt_fast.bench.sample import Unavailable
from gpt_fast.measure.machine import peak_rss_bytes


class Remote:
    """Starts `factory(**options)` in a new Python process and passes calls on to it.

    Raises what the factory or a call raises there: Unavailable as it is, anything else as RuntimeError in one line.
    `start_seconds`: from before the process existed to the factory's return.
    """

    def __init__(self, factory: Callable[..., Any], **options: Any) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, factory, options), daemon=True)
        started = time.perf_counter()
        self.process.start()
        theirs.close()
        try:
            self._receive()
        except BaseException:
            self.close()
            raise
        self.start_seconds = time.perf_counter() - started

    def call(self, method: str, *args: Any) -> Any:
        """The target's method, there."""
        self.connection.send((method, args))
        return self._receive()

    def peak_rss(self) -> int | None:
        """Bytes: the target's own peak_rss(), where it starts programs, or that of its process."""
        peak: int | None = self.call("peak_rss")
        return peak

    def close(self) -> None:
        """End the process."""
        with suppress(OSError):  # it may be gone already
            self.connection.send(None)
        self.process.join(timeout=10)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()

    def _receive(self) -> Any:
        try:
            kind, value = self.connection.recv()
        except EOFError:
            self.process.join()
            raise RuntimeError(f"the process ended with code {self.process.exitcode}") from None
        if kind == "unavailable":
            raise Unavailable(value)
        if kind == "error":
            raise RuntimeError(value)
        return value


def _serve(connection: Connection, factory: Callable[..., Any], options: dict[str, Any]) -> None:
    """The other process: make the target, then answer calls until told to stop or left alone."""
    made, target = _attempt(partial(factory, **options))
    connection.send((made, None if made == "done" else target))
    while made == "done":
        try:
            request = connection.recv()
        except EOFError:
            return
        if request is None:
            getattr(target, "close", lambda: None)()  # of a target that has a process of its own
            return
        method, args = request
        run = peak_rss_bytes if method == "peak_rss" and not hasattr(target, method) else getattr(target, method)
        connection.send(_attempt(partial(run, *args)))


def _attempt(call: Callable[[], Any]) -> tuple[str, Any]:
    try:
        return "done", call()
    except Unavailable as error:
        return "unavailable", str(error)
    except Exception as error:
        kind = "" if isinstance(error, ValueError | RuntimeError) else f"{type(error).__name__}: "
        return "error", f"{kind}{error}".splitlines()[0]
