"""The ASGI door: a request's path and body to the same admission, service and answers as TorchServe's rounds.

Plain ASGI, for a stream's sake: one coroutine a request, one event that wakes it, one message a chunk.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from gpt_fast.serve.admission import AT_ONCE, refusal
from gpt_fast.serve.asgi.deliveries import Deliveries, LiveExchange
from gpt_fast.serve.body import MAX_BODY, RequestError, too_large
from gpt_fast.serve.desk import Desk
from gpt_fast.serve.endpoints import ENDPOINTS
from gpt_fast.serve.exchange import CLIENT_ID, Incoming, Reply, client_id_of
from gpt_fast.serve.page.assets import PAGE, is_of_page
from gpt_fast.serve.startup import Started

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]

READ = frozenset((PAGE, "tokenizer_info", "health", "metrics"))  # app.py answers most
BODY_SECONDS = 60.0  # for a body to arrive
PASSED_OVER = 16 * MAX_BODY  # bytes read of a body that is too large: most clients read an answer only after they wrote
STREAM_HEADERS = (("cache-control", "no-cache"), ("x-accel-buffering", "no"))  # no proxy is to keep chunks back


class ClientGone(Exception):
    """The client left before its request was whole."""


class Door:
    """The application behind every path that reaches the model. It answers 503 until `open`."""

    def __init__(self) -> None:
        self.desk: Desk | None = None
        self.deliveries: Deliveries | None = None
        self.names: tuple[str, ...] = ()
        self.draining = False

    def open(self, started: Started) -> Desk:
        """Serve with this, on the event loop that runs."""
        self.deliveries = Deliveries(started.service)
        self.desk, self.names = Desk(started.service, started.admit), started.admit.model_names
        return self.desk

    @property
    def in_flight(self) -> int:
        return len(self.deliveries.exchanges) if self.deliveries else 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        out = Outlet(scope, send)
        path = ""
        try:
            path = self.path(scope["path"])
            check_method(path, scope["method"])
            if self.desk is None or self.deliveries is None:
                raise RequestError("the model is being loaded", status=503, code="loading")
            body = await read_body(receive, scope)
            incoming = Incoming(path, body, out.client_id)
            await self.answer(self.desk, self.deliveries, incoming, receive, out)
        except RequestError as error:
            await out.reply(refusal(error, anthropic=path.startswith("v1/messages")).reply)
        except ClientGone:
            pass

    def path(self, path: str) -> str:
        """As endpoints are named, behind the model's name where it came as TorchServe's paths do."""
        path = path.strip("/")
        if not path.startswith("predictions/"):
            return path or PAGE  # which is at the root, too
        _, name, *rest = path.split("/", 3)  # predictions/NAME/VERSION/PATH
        if self.names and name not in self.names:
            allowed = ", ".join(self.names)
            raise RequestError(f"path: no such model (got {name[:100]!r}, allowed {allowed})", status=404)
        return rest[1] if len(rest) > 1 else ""

    async def answer(
        self, desk: Desk, deliveries: Deliveries, incoming: Incoming, receive: Receive, out: Outlet
    ) -> None:
        future = desk.read(incoming)
        waiting = asyncio.wrap_future(future)
        await asyncio.wait([waiting])
        waiting.exception()  # asyncio is to know that somebody looks at it
        begun = desk.begin(out.request_id, incoming, future, LiveExchange)
        if isinstance(begun, Reply):
            return await out.reply(begun)
        deliveries.join(begun)
        loop = asyncio.get_running_loop()
        watcher = loop.create_task(watch(receive, begun, deliveries))
        deadline = loop.call_later(begun.deadline - time.monotonic(), deliveries.cut_short, begun)
        try:
            await send_answer(begun, out)
        finally:
            deadline.cancel()
            watcher.cancel()
            deliveries.leave(begun)


async def watch(receive: Receive, exchange: LiveExchange, deliveries: Deliveries) -> None:
    """Drop the request as soon as its client has left, though its answer may be waiting to be written."""
    while (await receive())["type"] != "http.disconnect":
        pass
    exchange.stop(gone=True)
    deliveries.service.cancel(exchange.running)


async def send_answer(exchange: LiveExchange, out: Outlet) -> None:
    """Send an answer as its text comes, or at once when it is whole."""
    answer = exchange.answer
    while not exchange.gone:
        await exchange.news.wait()
        exchange.news.clear()
        if exchange.gone:
            return
        if exchange.broken or exchange.failure:
            last = exchange.failure or exchange.break_off()
            return await (out.chunk(last.text, more=False) if exchange.begun else out.reply(last))
        whole = not exchange.running
        text, exchange.text = exchange.text, ""
        if not answer.stream:
            exchange.text = text
            if whole:
                return await out.reply(Reply(text + answer.end(), None, content_type=answer.content_type))
            continue
        if whole:
            text += answer.end()
        if not exchange.begun:
            exchange.begun = True
            await out.start(200, answer.content_type, STREAM_HEADERS)
        await out.chunk(text, more=not whole)
        if whole:
            return


class Outlet:
    """One request's way out: ASGI messages, each answer with the request's ids."""

    def __init__(self, scope: Scope, send: Send) -> None:
        self.request_id = uuid.uuid4().hex
        self.client_id = client_id_of({n.decode("latin-1"): v.decode("latin-1") for n, v in scope["headers"]})
        self.send = send

    async def start(self, status: int, content_type: str, headers: tuple[tuple[str, str], ...]) -> None:
        ids = [("x-request-id", self.client_id or self.request_id)]
        ids += [(CLIENT_ID, self.client_id)] if self.client_id else []
        rest = [(name, value) for name, value in headers if name != CLIENT_ID]
        pairs = [("content-type", content_type), *ids, *rest]
        raw = [(name.lower().encode("latin-1"), value.encode("latin-1")) for name, value in pairs]
        await self.send({"type": "http.response.start", "status": status, "headers": raw})

    async def chunk(self, text: str, *, more: bool) -> None:
        await self.send({"type": "http.response.body", "body": text.encode("utf-8"), "more_body": more})

    async def reply(self, reply: Reply) -> None:
        """A whole response."""
        length = ("content-length", str(len(reply.text.encode("utf-8"))))
        await self.start(reply.status, reply.content_type, (*reply.headers, length))
        await self.chunk(reply.text, more=False)


def check_method(path: str, method: str) -> None:
    """What a body is posted to, and what is only read; of other paths admission says that there is nothing."""
    if path in ENDPOINTS or path in AT_ONCE:
        allowed = ["POST"]
    elif path.startswith("v1/models") or path in READ or is_of_page(path):
        allowed = ["GET", "HEAD"]
    else:
        return
    if method not in allowed:
        message = f"method: not for this path (got {method}, allowed {', '.join(allowed)})"
        raise RequestError(message, status=405, headers=(("Allow", ", ".join(allowed)),))


async def read_body(receive: Receive, scope: Scope) -> bytes:
    """The whole body. RequestError for one that is too large, or not there in time; ClientGone."""
    try:
        async with asyncio.timeout(BODY_SECONDS):
            return await bounded_body(receive, scope)
    except TimeoutError:
        raise RequestError(f"body: not whole after {BODY_SECONDS:g} s", status=408) from None


async def bounded_body(receive: Receive, scope: Scope) -> bytes:
    parts: list[bytes] = []
    size, more = 0, True
    announced = dict(scope["headers"]).get(b"content-length", b"0")
    if announced.isdigit() and int(announced) > PASSED_OVER:
        raise too_large(int(announced))
    while more and size <= PASSED_OVER:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientGone
        part, more = message.get("body", b""), message.get("more_body", False)
        size += len(part)
        if size <= MAX_BODY:
            parts.append(part)
    if size > MAX_BODY:
        raise too_large(size)
    return b"".join(parts)
