"""Who may ask: those with a key, or, while there is none, this machine's own programs and pages (foreign_page.py)."""

from __future__ import annotations

import hmac
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpt_fast.serve.admission import refusal
from gpt_fast.serve.asgi.door import Outlet, Receive, Scope, Send
from gpt_fast.serve.body import RequestError
from gpt_fast.serve.foreign_page import refusal_of
from gpt_fast.serve.page.assets import is_of_page
from gpt_fast.serve.startup_check import is_loopback

# What needs no key: readiness, and pages that hold nothing until their reader gives them the key.
OPEN = frozenset(("", "health", "chat"))
ANY_ORIGIN = "*"


@dataclass(frozen=True)
class Rules:
    """keys: any of them opens the door; none: the door is this machine's. origins: of pages elsewhere that may ask."""

    keys: tuple[str, ...] = ()
    origins: tuple[str, ...] = ()

    def problem(self, path: str, headers: Mapping[str, str]) -> RequestError | None:
        """Why a request may not enter; headers by their names in lower case."""
        if self.keys:
            is_open = path.strip("/") in OPEN or is_of_page(path.strip("/"))
            return None if is_open or self.has_key(headers) else wrong_key(headers)
        if headers.get("origin") in self.origins:  # a page that may: browsers say that it is another site's
            headers = {name: value for name, value in headers.items() if name not in ("origin", "sec-fetch-site")}
        return refusal_of(headers.items())

    def has_key(self, headers: Mapping[str, str]) -> bool:
        """As OpenAI's clients send it, or as Anthropic's do; every key is compared, however early one fits."""
        bearer = re.fullmatch(r"[Bb]earer +(\S+)", headers.get("authorization", ""))
        given = (bearer[1] if bearer else headers.get("x-api-key", "")).encode()
        return any([hmac.compare_digest(given, key.encode()) for key in self.keys])


def wrong_key(headers: Mapping[str, str]) -> RequestError:
    given = "authorization" in headers or "x-api-key" in headers
    problem = "is not one of the server's keys" if given else "missing"
    message = f"API key: {problem} (allowed Authorization: Bearer KEY)"
    return RequestError(message, status=401, code="invalid_api_key", headers=(("WWW-Authenticate", "Bearer"),))


class Guard:
    """ASGI middleware: 401 without a key, 403 for a name or a page of elsewhere."""

    def __init__(self, app: Any, rules: Rules) -> None:
        self.app, self.rules = app, rules

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            return await self.app(scope, receive, send)  # type: ignore[no-any-return]
        path = scope["path"].strip("/")
        headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
        problem = self.rules.problem(path, headers)
        if problem is None:
            return await self.app(scope, receive, send)  # type: ignore[no-any-return]
        await Outlet(scope, send).reply(refusal(problem, anthropic=path.startswith("v1/messages")).reply)


def read_keys(path: Path | None, variable: str | None) -> tuple[str, ...]:
    """The keys of a file, one a line, blank lines and those that begin with # aside; else of an environment variable.

    ValueError for a file that holds none or that others may read, and for what no header can carry.
    """
    if path is None:
        keys = [variable] if variable else []
    else:
        if path.stat().st_mode & 0o077:
            raise ValueError(f"--api-key-file: others may read it (got {path}, allowed mode 600: chmod 600 {path})")
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
        keys = [line for line in lines if line and not line.startswith("#")]
        if not keys:
            raise ValueError(f"--api-key-file: holds no key (got {path}, allowed one a line)")
    for key in keys:
        if not re.fullmatch(r"[!-~]{8,512}", key):
            raise ValueError("API key: not fit for a header (allowed 8..512 visible ASCII characters, no blanks)")
    return tuple(keys)


def check_reach(host: str, rules: Rules) -> None:
    """ValueError for a server that others would reach and that asks for no key."""
    if rules.keys:
        return
    if not is_loopback(host):
        way = "127.0.0.1, localhost or ::1; any address with --api-key-file or GPT_FAST_API_KEY"
        raise ValueError(f"--host: not a loopback address while there is no key (got {host}, allowed {way})")
    if ANY_ORIGIN in rules.origins:
        raise ValueError(
            f"--cors-origin: every page could ask while there is no key (got {ANY_ORIGIN}, allowed origins)"
        )


def check_origins(origins: Sequence[str]) -> None:
    """ValueError for what is no origin as browsers send it."""
    for origin in origins:
        if origin != ANY_ORIGIN and not re.fullmatch(r"https?://[a-z0-9.\-\[\]:]+", origin):
            raise ValueError(f"--cors-origin: not an origin (got {origin!r}, allowed http://NAME:PORT, https://NAME)")
