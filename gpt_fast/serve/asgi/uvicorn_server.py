"""Uvicorn with this server's signals: the first lets running requests end and refuses new ones, the second ends all."""

from __future__ import annotations

import logging
import socket
import ssl
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import uvicorn

from gpt_fast.serve.asgi.door import Door

logger = logging.getLogger(__name__)

CUT_SECONDS = 2  # for the last words of what is cut to leave


@dataclass(frozen=True)
class Tls:
    """Files in PEM; key: None where the certificate's file holds it."""

    certificate: Path
    key: Path | None


def read_tls(certificate: Path | None, key: Path | None) -> Tls | None:
    """None without a certificate. ValueError for files that TLS cannot be served with."""
    if certificate is None:
        if key is not None:
            raise ValueError(f"--ssl-keyfile: needs --ssl-certfile beside it (got {key})")
        return None
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(certificate, key)
    except ssl.SSLError as error:
        raise ValueError(
            f"--ssl-certfile: no certificate with its key in PEM (got {certificate}): {error.reason}"
        ) from None
    return Tls(certificate, key)


class DrainingServer(uvicorn.Server):
    """Uvicorn stops listening at once; this answers 503 with Retry-After until the running requests have ended.

    failure: why the engine cannot go on, or None; then everything ends, and `failed` says why.
    """

    def __init__(
        self, app: Any, door: Door, *, failure: Callable[[], str | None], drain_seconds: float, tls: Tls | None
    ) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                http="h11",  # httptools would send chunks to HTTP/1.0 clients, which do not know them
                ws="none",
                lifespan="off",
                log_config=None,
                access_log=False,  # a line for each request is the desk's
                proxy_headers=False,
                server_header=False,
                timeout_graceful_shutdown=CUT_SECONDS,
                ssl_certfile=tls.certificate if tls else None,
                ssl_keyfile=tls.key if tls else None,
            )
        )
        self.door, self.failure, self.drain_seconds = door, failure, drain_seconds
        self.failed: str | None = None
        self._drain_until = 0.0

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self.door.draining:
            self._drain_until = 0.0
        else:
            self.door.draining, self._drain_until = True, time.monotonic() + self.drain_seconds

    async def on_tick(self, counter: int) -> bool:
        """Ten times a second, as Uvicorn's own."""
        self.failed = self.failed or self.failure()
        over = self.door.draining and (not self.server_state.tasks or time.monotonic() >= self._drain_until)
        if self.failed or over:
            self.cut()
            self.should_exit = True
        return await super().on_tick(counter)

    def cut(self) -> None:
        """End what still runs with the word that it is cut."""
        if self.door.in_flight:
            logger.warning("requests cut: %d", self.door.in_flight)
        if self.door.deliveries is not None:
            self.door.deliveries.stop_all()


def listen(host: str, port: int) -> socket.socket:
    """A socket bound before anything is loaded, so that a port that is taken is known at once."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
        listener.listen()
    except OSError as error:
        listener.close()
        raise ValueError(f"--port: cannot listen at {host}:{port}: {error.strerror or error}") from None
    return listener
