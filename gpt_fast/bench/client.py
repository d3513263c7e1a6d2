"""A small asyncio HTTP/1.1 client that notes when each piece of a streamed answer arrived. Standard library only."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit


@dataclass(frozen=True)
class Arrival:
    """One piece of text and when it came, by time.perf_counter()."""

    at: float
    text: str


@dataclass(frozen=True)
class Answer:
    """error: why it is not a whole answer, in a line; "" when it is one."""

    started: float
    ended: float
    arrivals: tuple[Arrival, ...]
    error: str = ""

    @property
    def text(self) -> str:
        return "".join(arrival.text for arrival in self.arrivals)

    @property
    def ttft(self) -> float:
        return self.arrivals[0].at - self.started


class NativeApi:
    """POST {"prompt", "max_new_tokens"}; the answer's text itself, in chunks."""

    def body(self, prompt: str | list[int], count: int) -> dict[str, Any]:
        return {"prompt": prompt, "max_new_tokens": count, "temperature": 0, "ignore_eos": True, "stream": True}

    async def texts(self, pieces: AsyncIterator[bytes]) -> AsyncIterator[str]:
        """Chunks are whole characters: the server sends nothing else."""
        async for piece in pieces:
            yield piece.decode("utf-8", errors="replace")


class OpenAIApi:
    """POST to /v1/completions; server-sent events. vLLM and llama-server answer it too."""

    def __init__(self, model: str | None = None) -> None:
        self.model = model

    def body(self, prompt: str | list[int], count: int) -> dict[str, Any]:
        body = {"prompt": prompt, "max_tokens": count, "temperature": 0, "ignore_eos": True, "stream": True}
        return body if self.model is None else body | {"model": self.model}

    async def texts(self, pieces: AsyncIterator[bytes]) -> AsyncIterator[str]:
        held, done = b"", False
        async for piece in pieces:
            *events, held = (held + piece).replace(b"\r\n", b"\n").split(b"\n\n")
            for event in events:
                data = event.removeprefix(b"data:").strip()
                if data == b"[DONE]":
                    done = True
                elif choices := json.loads(data or b"{}").get("choices"):
                    yield choices[0].get("text") or ""
        if not done:
            raise ConnectionError("the stream ended without [DONE]")


Api = NativeApi | OpenAIApi


async def ask(
    url: str, api: Api, prompt: str | list[int], count: int, *, token: str = "", timeout: float = 300.0
) -> Answer:
    """Post one prompt on a connection of its own and read the streamed answer to its end. Never raises for it."""
    arrivals: list[Arrival] = []
    started = time.perf_counter()
    error = ""
    try:
        async with asyncio.timeout(timeout):
            async for text in api.texts(post(url, api.body(prompt, count), token)):
                if text:
                    arrivals.append(Arrival(time.perf_counter(), text))
    except TimeoutError:
        error = f"no end within {timeout:g} s"
    except (OSError, EOFError, ValueError) as problem:
        error = f"{type(problem).__name__}: {problem}".splitlines()[0]
    if not arrivals and not error:
        error = "an empty answer"
    return Answer(started, time.perf_counter(), tuple(arrivals), error)


async def post(url: str, body: Mapping[str, Any] | bytes, token: str = "") -> AsyncIterator[bytes]:
    """The response's body as it arrives. OSError when the status is not 200 or the body ends early."""
    parts = urlsplit(url)
    host, port = parts.hostname or "127.0.0.1", parts.port or 80
    reader, writer = await asyncio.open_connection(host, port)
    try:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        headers = [
            f"POST {parts.path or '/'} HTTP/1.1",
            f"Host: {host}:{port}",
            "Content-Type: application/json",
            f"Content-Length: {len(data)}",
            "Connection: close",
        ]
        if token:
            headers.append(f"Authorization: Bearer {token}")
        writer.write("\r\n".join([*headers, "", ""]).encode("latin-1") + data)
        await writer.drain()
        status, fields = await read_head(reader)
        pieces = read_body(reader, fields)
        if status != 200:
            text = b"".join([piece async for piece in pieces])[:300].decode(errors="replace")
            raise ConnectionError(f"status {status}: {' '.join(text.split())}")
        async for piece in pieces:
            yield piece
    finally:
        writer.close()


async def read_head(reader: asyncio.StreamReader) -> tuple[int, dict[str, str]]:
    """Status and header fields, names in lower case."""
    first, *lines = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").strip().split("\r\n")
    fields = {name.strip().lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    return int(first.split()[1]), fields


async def read_body(reader: asyncio.StreamReader, fields: Mapping[str, str]) -> AsyncIterator[bytes]:
    """Chunk by chunk, or all of Content-Length, or until the connection ends. EOFError when it is cut short."""
    if "chunked" in fields.get("transfer-encoding", "").lower():
        while size := int((await reader.readuntil(b"\r\n")).split(b";")[0], 16):
            yield await reader.readexactly(size)
            await reader.readexactly(2)
        return
    if "content-length" in fields:
        yield await reader.readexactly(int(fields["content-length"]))
        return
    while piece := await reader.read(1 << 16):
        yield piece
