"""An HTTP server on loopback that plays TorchServe's rounds over a real tiny engine: for clients' tests."""

from __future__ import annotations

import itertools
import queue
import threading
from collections.abc import Mapping, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from gpt_fast.llm import Engine
from gpt_fast.serve.admission import Admit, Limits
from gpt_fast.serve.exchange import Incoming, Reply, client_id_of
from gpt_fast.serve.rounds import Rounds
from gpt_fast.serve.service import Service
from support.tiny_engine import tiny_engine

LIMITS = Limits(max_new_tokens=20, stream=True, max_waiting=64, max_seconds=60.0)


class RoundServer:
    """`url` answers as the served model does. Use as a context manager."""

    def __init__(self, engine: Engine | None = None, *, model_names: Sequence[str] = ("gpt-fast",)) -> None:
        engine = engine or tiny_engine(slots=4)
        service = Service(engine)
        service.start()
        admit = Admit(
            engine, in_flight=service.in_flight, limits=LIMITS, model_names=model_names, draining=lambda: False
        )
        self.rounds = Rounds(service, admit)
        self.replies: dict[str, queue.Queue[Reply]] = {}
        self.arrived: queue.Queue[tuple[str, Incoming] | None] = queue.Queue()  # None: no more will come
        self.ids = itertools.count()
        self.stopped = threading.Event()
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self.threads = [threading.Thread(target=run, daemon=True) for run in (self._serve, self._play)]
        self.url = f"http://127.0.0.1:{self.server.server_port}/predictions/gpt-fast"

    def __enter__(self) -> RoundServer:
        for thread in self.threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stopped.set()
        self.arrived.put(None)
        self.server.shutdown()
        self.server.server_close()
        for thread in self.threads:
            thread.join(timeout=10)

    def ask(self, path: str, body: bytes, headers: Mapping[str, str]) -> queue.Queue[Reply]:
        name = f"id{next(self.ids)}"
        self.replies[name] = queue.Queue()
        self.arrived.put((name, Incoming(path, body, client_id_of(headers))))
        return self.replies[name]

    def _serve(self) -> None:
        self.server.serve_forever(poll_interval=0.01)  # how long its end may take

    def _arrivals(self, *, wait: bool) -> dict[str, Incoming]:
        """What has come since; waiting for the first, as TorchServe does when nothing is in flight."""
        found = [self.arrived.get()] if wait else []
        while not self.arrived.empty():
            found.append(self.arrived.get())
        return dict(each for each in found if each is not None)

    def _play(self) -> None:
        active: set[str] = set()
        while not self.stopped.is_set():
            incoming = self._arrivals(wait=not active)
            active |= set(incoming)
            for name, reply in self.rounds.run(sorted(active), incoming).items():
                self.replies[name].put(reply)
                if reply.more is not True:
                    active.discard(name)

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                replies = server.ask(self.path.partition("gpt-fast")[2], body, dict(self.headers.items()))
                first = reply = replies.get(timeout=30)
                self.send_response(first.status)
                self.send_header("Content-Type", first.content_type)
                for name, value in first.headers:
                    self.send_header(name, value)
                if first.more is None:
                    self.send_header("Content-Length", str(len(first.text.encode())))
                    self.end_headers()
                    self.wfile.write(first.text.encode())
                    return
                self.send_header("Transfer-Encoding", "chunked")
                self.end_headers()
                while True:
                    self._chunk(reply.text.encode())
                    if not reply.more:
                        break
                    reply = replies.get(timeout=30)
                self.wfile.write(b"0\r\n\r\n")

            do_GET = do_POST

            def _chunk(self, data: bytes) -> None:
                if data:  # an empty chunk would be the end
                    self.wfile.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")

            def log_message(self, *_: object) -> None:
                pass

        return Handler
