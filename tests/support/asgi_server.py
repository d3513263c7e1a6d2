"""The ASGI door over a real tiny engine, on loopback in this process: for clients' tests."""

from __future__ import annotations

import asyncio
import http.client
import json
import socket
import threading
from typing import Any

from gpt_fast.llm import Engine
from gpt_fast.serve.admission import Admit, Limits
from gpt_fast.serve.asgi.app import build_app
from gpt_fast.serve.asgi.door import Door
from gpt_fast.serve.asgi.guard import Rules
from gpt_fast.serve.asgi.prometheus import Figures, FiguresReporter
from gpt_fast.serve.asgi.uvicorn_server import DrainingServer, listen
from gpt_fast.serve.service import Service
from gpt_fast.serve.startup import Started
from support.round_server import LIMITS
from support.server import Response
from support.tiny_engine import tiny_engine

OPEN = Rules()


class AsgiServer:
    """`url` is the door's root. Use as a context manager."""

    def __init__(
        self, engine: Engine | None = None, *, rules: Rules = OPEN, limits: Limits = LIMITS, interval: float = 0.0
    ) -> None:
        self.engine = engine or tiny_engine(slots=4)
        self.service = Service(self.engine, interval=interval)
        self.door, self.figures = Door(), Figures()
        self.admit = Admit(
            self.engine, in_flight=self.service.in_flight, limits=limits, model_names=["gpt-fast"],
            draining=lambda: self.door.draining,
        )  # fmt: skip
        app = build_app(self.door, self.figures, rules, lambda: "ok")
        self.server = DrainingServer(app, self.door, failure=self.service.failure, drain_seconds=30, tls=None)
        self.listener = listen("127.0.0.1", 0)
        self.port = self.listener.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.opened = threading.Event()
        self.thread = threading.Thread(target=lambda: asyncio.run(self._serve()), daemon=True)

    async def _serve(self) -> None:
        self.service.start()
        self.desk = self.door.open(Started(self.service, self.admit))
        self.figures.name_model("gpt-fast")
        self.desk.report_forever(FiguresReporter(self.figures))
        self.opened.set()
        await self.server.serve(sockets=[self.listener])

    def __enter__(self) -> AsgiServer:
        self.thread.start()
        assert self.opened.wait(30)
        return self

    def __exit__(self, *_: object) -> None:
        self.server.should_exit = True
        self.thread.join(timeout=30)
        assert not self.thread.is_alive()

    # -------------------------------------------------------------------------------- as a client

    def connect(
        self, path: str, body: object = None, *, method: str = "POST", headers: dict[str, str] | None = None
    ) -> http.client.HTTPConnection:
        """Send a request; its connection, before any answer was read."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        data = json.dumps(body).encode() if isinstance(body, dict) else body
        connection.request(method, path, data, headers or {})
        return connection

    def call(self, path: str, body: object = None, **options: Any) -> Response:
        connection = self.connect(path, body, **options)
        try:
            answer = connection.getresponse()
            return Response(answer.status, {k.lower(): v for k, v in answer.getheaders()}, answer.read())
        finally:
            connection.close()

    def raw(self, data: bytes) -> bytes:
        """Send bytes as they are; all that comes back until the server ends the connection."""
        with socket.create_connection(("127.0.0.1", self.port), timeout=60) as connection:
            connection.sendall(data)
            return b"".join(iter(lambda: connection.recv(1 << 16), b""))
