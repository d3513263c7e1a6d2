"""Requests that a web page from elsewhere makes a browser send. Pure, and for every door to the model.

A server on loopback without a token trusts whoever runs programs on its machine. A browser is such a program, and any
page may have it post to 127.0.0.1, or give its own name that address (DNS rebinding). What a page cannot do is choose
Host and Origin: so both must be names of this machine. What is no browser sends no Origin, and Host as it pleases.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from gpt_fast.serve.body import RequestError, short
from gpt_fast.serve.startup_check import is_loopback

LOCAL = "localhost, 127.0.0.1 or [::1] while the server asks for no token"
AUTHORITY = re.compile(r"(\[[0-9a-f:.]+\]|[a-z0-9.-]+)(:[0-9]{0,5})?", re.IGNORECASE)


def refusal_of(headers: Iterable[tuple[str, str]]) -> RequestError | None:
    """Why a request with these headers, in any case, is refused by a server without a token: 403; None: it is not."""
    fetch = {"origin": "", "sec-fetch-site": "", "sec-fetch-mode": ""}
    for given, value in headers:
        name = given.lower()
        if name == "host" and not is_local(value):
            return foreign("Host", value)
        if name == "origin" and not is_local(re.sub(r"^https?://", "", value)):
            return foreign("Origin", value)
        if name in fetch:
            fetch[name] = value
    # A page may also name us as an image: then browsers send no Origin. A link that somebody follows is no harm.
    if fetch["sec-fetch-site"] == "cross-site" and fetch["sec-fetch-mode"] != "navigate" and not fetch["origin"]:
        return foreign("Sec-Fetch-Site", "cross-site")
    return None


def is_local(authority: str) -> bool:
    """Whether `host` or `host:port` is a name that only this machine has."""
    found = AUTHORITY.fullmatch(authority)
    return found is not None and is_loopback(found[1])


def foreign(header: str, value: str) -> RequestError:
    message = f"{header}: not of this machine (got {short(value)}, allowed {LOCAL})"
    return RequestError(message, status=403, code="foreign_page")
