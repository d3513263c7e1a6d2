"""The second door's life: listen, load, prove that a token comes, serve, drain."""

from __future__ import annotations

import asyncio
import logging
import socket
import threading
from dataclasses import dataclass

from gpt_fast.config import EngineConfig, SamplingParams
from gpt_fast.engine.ranks import Group
from gpt_fast.llm import TextEvent
from gpt_fast.serve.asgi.app import build_app
from gpt_fast.serve.asgi.door import Door
from gpt_fast.serve.asgi.guard import Rules
from gpt_fast.serve.asgi.prometheus import Figures, FiguresReporter
from gpt_fast.serve.asgi.uvicorn_server import DrainingServer, Tls, listen
from gpt_fast.serve.model_config import MODEL_NAME, ServeConfig
from gpt_fast.serve.service import Service
from gpt_fast.serve.startup import Started, start_service

logger = logging.getLogger(__name__)

BUSY_INTERVAL = 0.05  # seconds between a stream's chunks where the engine computes on every core
PROBE = "probe"


@dataclass(frozen=True, kw_only=True)
class Site:
    """Where the door is and who may enter."""

    host: str
    port: int
    rules: Rules
    tls: Tls | None
    drain_seconds: float

    def url(self, listener: socket.socket) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{'https' if self.tls else 'http'}://{host}:{listener.getsockname()[1]}"


class Serving:
    """One server, from the first connection to the last. `run` returns when it has drained."""

    def __init__(self, site: Site, engine_config: EngineConfig, serve_config: ServeConfig, group: Group | None) -> None:
        self.site, self.engine_config, self.serve_config, self.group = site, engine_config, serve_config, group
        self.door, self.figures = Door(), Figures()
        self.service: Service | None = None
        self.ready = False
        self.error: BaseException | None = None  # what loading ended with

    def run(self) -> None:
        """Raises ValueError or OSError for a user's mistake; RuntimeError when the engine cannot go on."""
        with listen(self.site.host, self.site.port) as listener:
            asyncio.run(self._serve(listener))

    async def _serve(self, listener: socket.socket) -> None:
        app = build_app(self.door, self.figures, self.site.rules, self.state)
        server = DrainingServer(
            app, self.door, failure=self.failure, drain_seconds=self.site.drain_seconds, tls=self.site.tls
        )
        loop, url = asyncio.get_running_loop(), self.site.url(listener)
        threading.Thread(target=self._load, args=(loop, url), name="load", daemon=True).start()
        await server.serve(sockets=[listener])
        if self.error is not None:
            raise self.error
        if server.failed:
            raise RuntimeError(server.failed)

    def _load(self, loop: asyncio.AbstractEventLoop, url: str) -> None:
        """On a thread of its own: readiness and signals are answered meanwhile."""
        try:
            started = start_service(
                self.engine_config,
                self.serve_config,
                model_name=MODEL_NAME,
                draining=lambda: self.door.draining,
                busy_interval=BUSY_INTERVAL,
                group=self.group,
            )
            prove(started.service)
        except BaseException as error:
            self.error = error
        else:
            loop.call_soon_threadsafe(self._open, started, url)

    def _open(self, started: Started, url: str) -> None:
        self.service = started.service
        desk = self.door.open(started)
        self.figures.name_model(started.admit.model_names[0])
        desk.report_forever(FiguresReporter(self.figures))
        self.ready = True
        logger.info("ready: %s/v1 serves %s; chat at %s/", url, ", ".join(started.admit.model_names), url)

    def state(self) -> str:
        """What /health says: "ok", or why no request should come now."""
        if self.failure():
            return "failed"
        if self.door.draining:
            return "draining"
        return "ok" if self.ready else "loading"

    def failure(self) -> str | None:
        if self.error is not None:
            return "loading failed"
        return self.service.failure() if self.service else None


def prove(service: Service) -> None:
    """One real token through the whole engine. RuntimeError where none comes."""
    service.submit(PROBE, [0], SamplingParams(max_new_tokens=1, ignore_eos=True, temperature=0.0))
    events: list[TextEvent] = []
    while not events and not (why := service.failure()):
        service.wait(timeout=1.0)
        events = service.take(PROBE)
    if not events or events[-1].finish_reason == "error":
        raise RuntimeError(f"no token came: {why or 'the model failed'}")
    service.take_records()  # it is nobody's request
