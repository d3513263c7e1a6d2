"""The chat page for a server that asks for a token: python -m gpt_fast.serve.page.

TorchServe with token authorization answers nothing, not even a page, to a browser that cannot send the token yet. This
serves the same page on loopback and passes its requests on, with the token that the user types into the page. It adds
no authority of its own: without a token the server refuses.
"""

from __future__ import annotations

import argparse
import http.client
import sys
from collections.abc import Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit

from gpt_fast.serve.foreign_page import refusal_of
from gpt_fast.serve.page.assets import chat_page

MODEL_PATH = "/predictions/gpt-fast/1.0"
MODELS, CHAT = "/v1/models", "/v1/chat/completions"
MAX_BODY = 1 << 20


class PageHandler(BaseHTTPRequestHandler):
    """GET of the page's files is answered here; what asks the model goes to the server as it is, and its answer comes
    back as it arrives."""

    server: PageServer

    def do_GET(self) -> None:
        if self.refuses():
            return
        if self.path == MODELS:
            return self.ask("GET", None)
        asset = self.server.page.get(self.path.strip("/"))
        if asset is None:
            return self.send_error(404)
        self.send_response(200)
        for name, value in (("Content-Type", asset.content_type), *asset.headers):
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(asset.text.encode())

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
        if self.path != CHAT or not length.isdigit() or int(length) > MAX_BODY:
            return self.send_error(404)
        self.ask("POST", self.rfile.read(int(length)))

    def ask(self, method: str, body: bytes | None) -> None:
        names = ("Authorization", "Content-Type")
        headers = {name: self.headers[name] for name in names if name in self.headers}
        connection = self.server.connect()
        try:
            connection.request(method, MODEL_PATH + self.path, body, headers)
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
        self.target, self.page = parts, chat_page()
        super().__init__(("127.0.0.1", port), PageHandler)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A browser that leaves in the middle is no error."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)

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
