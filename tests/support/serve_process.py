"""`python -m gpt_fast.serve` in a process of its own."""

from __future__ import annotations

import http.client
import json
import os
import ssl
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path

from support.paths import ROOT
from support.server import free_ports
from support.waiting import wait_until

COMMAND = ("-m", "gpt_fast.serve")


class ServeProcess:
    """One server of its own on a free port, in a folder without a model_config.yaml."""

    def __init__(
        self, folder: Path, *flags: str, program: Sequence[str] = COMMAND, tls: ssl.SSLContext | None = None
    ) -> None:
        self.log = folder / "log"
        (self.port,) = free_ports(1)
        self.tls = tls
        command = [sys.executable, *program, "--port", str(self.port), *flags]
        with open(self.log, "wb") as log:
            self.process = subprocess.Popen(
                command, cwd=folder, env={**os.environ, "PYTHONPATH": str(ROOT)}, stdout=log, stderr=log
            )

    @property
    def url(self) -> str:
        return f"{'https' if self.tls else 'http'}://localhost:{self.port}"

    def get(self, path: str) -> tuple[int, str]:
        try:
            with urllib.request.urlopen(self.url + path, timeout=10, context=self.tls) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()
        except (urllib.error.URLError, ConnectionError):
            return 0, ""

    def ready(self) -> ServeProcess:
        wait_until(
            lambda: self.process.poll() is not None or self.get("/health")[0] == 200, meanwhile=lambda: time.sleep(0.1)
        )
        assert self.process.poll() is None, self.log.read_text()
        return self

    def stream(self, body: dict) -> http.client.HTTPResponse:
        connection = http.client.HTTPConnection("localhost", self.port, timeout=60)
        connection.request("POST", "/v1/completions", json.dumps(body).encode())
        return connection.getresponse()

    def end(self) -> None:
        self.process.kill()
        self.process.wait(30)
