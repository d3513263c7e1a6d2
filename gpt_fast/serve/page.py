"""python -m gpt_fast.serve.page: the chat page for a server that asks for a token.

TorchServe with token authorization answers nothing, not even a page, to a browser that cannot send the token yet. This
serves the same page on loopback and passes its requests on, with the token that the user types into the page. It adds
no authority of its own: without a token the server refuses.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import http.client
import re
from collections.abc import Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.resources import files
from typing import NamedTuple
from urllib.parse import urlsplit

from gpt_fast.serve.foreign_page import refusal_of

# The page is one file that runs what is in it, talks to the server it came from, and to nobody else.
POLICY = (
    "default-src 'none'; style-src {style}; script-src {script}; connect-src 'self'; img-src data:; "
    "frame-ancestors 'none'; base-uri 'none'; form-action 'none'"
)
PAGE_TYPE = "text/html; charset=utf-8"
MODEL_PATH = "/predictions/gpt-fast/1.0"
MAX_BODY = 1 << 20


class Page(NamedTuple):
    text: str
    headers: tuple[tuple[str, str], ...]


def chat_page() -> Page:
    """The page, and the headers that let nothing but its own script and style run in it."""
    text = (files("gpt_fast.serve") / "chat.html").read_text(encoding="utf-8")
    policy = POLICY.format(style=source_of(text, "style"), script=source_of(text, "script"))
    return Page(
        text,
        (
            ("Content-Security-Policy", policy),
            ("X-Content-Type-Options", "nosniff"),
            ("Referrer-Policy", "no-referrer"),
        ),
    )


def source_of(page: str, tag: str) -> str:
    """The page's only element of this kind as the policy names it: by what is in it."""
    (content,) = re.findall(f"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
    return f"'sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}'"


class PageHandler(BaseHTTPRequestHandler):
    """GET /chat is the page; a POST goes to the server as it is, and its answer comes back as it arrives."""

    server: PageServer

    def do_GET(self) -> None:
        if self.refuses():
            return
        if self.path != "/chat":
            return self.send_error(404)
        page = chat_page()
        self.send_response(200)
        for name, value in (("Content-Type", PAGE_TYPE), *page.headers):
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(page.text.encode())

    def refuses(self) -> bool:
        """What the server would refuse; it cannot see behind us."""
        refused = refusal_of(self.headers.items())
        if refused is not None:
            self.send_error(refused.status, refused.message)
        return refused is not None

    def do_POST(self) -> None:
        if self.refuses():
            return
        length = self.headers.get("Content-Length", "")
        if self.path != "/v1/chat/completions" or not length.isdigit() or int(length) > MAX_BODY:
            return self.send_error(404)
        names = ("Authorization", "Content-Type")
        headers = {name: self.headers[name] for name in names if name in self.headers}
        connection = self.server.connect()
        try:
            connection.request("POST", MODEL_PATH + self.path, self.rfile.read(int(length)), headers)
            self.relay(connection.getresponse())
        except (OSError, http.client.HTTPException):  # either side has gone: nothing to say to the other but the end
            self.close_connection = True
        finally:
            connection.close()

    def relay(self, response: http.client.HTTPResponse) -> None:
        self.send_response(response.status)
        self.send_header("Content-Type", response.getheader("Content-Type", "application/json"))
        self.end_headers()
        while chunk := response.read1(1 << 16):
            self.wfile.write(chunk)

    def log_message(self, format: str, *args: object) -> None:
        """Quiet: the server keeps the log."""


class PageServer(ThreadingHTTPServer):
    """The page on a loopback port (0: any), in front of a TorchServe at `url`."""

    daemon_threads = True

    def __init__(self, url: str, *, port: int) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"--server: not an address (got {url!r}, allowed http://HOST:PORT)")
        self.target = parts
        super().__init__(("127.0.0.1", port), PageHandler)

    def connect(self) -> http.client.HTTPConnection:
        kind = http.client.HTTPSConnection if self.target.scheme == "https" else http.client.HTTPConnection
        return kind(self.target.hostname or "", self.target.port, timeout=600)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m gpt_fast.serve.page", description=__doc__)
    parser.add_argument("--server", default="http://127.0.0.1:8080", help="TorchServe's inference address")
    parser.add_argument("--port", type=int, default=8090)
    args = parser.parse_args(argv)
    server = PageServer(args.server, port=args.port)
    print(f"chat page: http://127.0.0.1:{server.server_port}/chat (Ctrl-C ends it)", flush=True)
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        print()


if __name__ == "__main__":
    main()
