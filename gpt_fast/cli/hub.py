"""Whether the Hugging Face Hub can be asked at all: libraries try it again for minutes where there is no network."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Sequence
from urllib.parse import urlsplit

OFFLINE = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE")
ENDPOINT = "https://huggingface.co"
PORTS = {"https": 443, "http": 80}


def why_unreachable(seconds: float = 5.0, *, switches: Sequence[str] = OFFLINE[:1]) -> str | None:
    """Why the Hub cannot be asked, in one line; None where something answers. It takes `seconds` at most.

    What is asked is HF_ENDPOINT's host, or the proxy that the environment names for it. switches: variables that are an
    answer of themselves.
    """
    for name in switches:
        if os.environ.get(name, "").upper() in ("1", "ON", "YES", "TRUE"):
            return f"{name} is set"
    address = os.environ.get("HF_ENDPOINT") or ENDPOINT
    address = proxy_for(address) or address
    reasons = [f"no answer within {seconds:g} s"]
    probe = threading.Thread(target=lambda: reasons.append(try_connection(address, seconds)), daemon=True)
    probe.start()  # a resolver of names knows no time-out
    probe.join(seconds)
    return f"{address} cannot be reached ({reasons[-1]})" if reasons[-1] else None


def proxy_for(address: str) -> str | None:
    from urllib.request import getproxies, proxy_bypass

    url, proxies = urlsplit(address), getproxies()
    return None if proxy_bypass(url.netloc) else proxies.get(url.scheme) or proxies.get("all")


def try_connection(address: str, seconds: float) -> str:
    """What stands against a connection; "" where there is one."""
    try:
        url = urlsplit(address if "://" in address else f"http://{address}")
        port = url.port or PORTS.get(url.scheme, 443)
        socket.create_connection((url.hostname or "", port), timeout=seconds).close()
    except (OSError, ValueError) as error:
        return getattr(error, "strerror", None) or str(error)
    return ""


def work_offline() -> None:
    """Let the libraries that ask the Hub, imported later, take what is on this machine or fail at once."""
    os.environ.update(dict.fromkeys(OFFLINE, "1"))
