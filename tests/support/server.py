"""A real TorchServe with the default model on free ports, made by the same scripts as `make serve`."""

from __future__ import annotations

import atexit
import functools
import http.client
import json
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from dataclasses import dataclass
from pathlib import Path

import yaml

from support.paths import ROOT

sys.path.insert(0, str(ROOT / "scripts"))

from instance import Instance

from gpt_fast.torchserve import archive

PORTS = (8080, 8081, 8082, 7070, 7071)


def free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    try:
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]
    finally:
        for each in sockets:
            each.close()


@dataclass
class Response:
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def text(self) -> str:
        return self.body.decode("utf-8")

    @property
    def json(self) -> dict:
        return json.loads(self.body)


@dataclass
class Server:
    """One instance in a folder of its own."""

    home: Path
    ports: list[int]

    @property
    def instance(self) -> Instance:
        return Instance((self.home / "run").resolve())

    @property
    def origin(self) -> str:
        return f"http://127.0.0.1:{self.ports[0]}"

    @property
    def url(self) -> str:
        return f"{self.origin}/predictions/gpt-fast"

    @property
    def base_url(self) -> str:
        """OpenAI's base_url. The version is TorchServe's: without it there is no path behind a model's name."""
        return f"{self.url}/1.0/v1"

    def start(self, *, token: str = "off", keys: dict[str, object] | None = None, **handler: object) -> None:
        """keys: of TorchServe's in model_config.yaml; handler: of our own section."""
        properties = (ROOT / "deploy/config.properties").read_text()
        for old, new in zip(PORTS, self.ports, strict=True):
            properties = properties.replace(f":{old}\n", f":{new}\n").replace(f"port={old}\n", f"port={new}\n")
        (self.home / "config.properties").write_text(properties)
        config = yaml.safe_load((ROOT / "model_config.yaml").read_text())
        config |= keys or {}
        config["handler"] |= handler
        (self.home / "model_config.yaml").write_text(yaml.safe_dump(config))
        made = archive.build(
            handler=ROOT / "handler.py",
            config=self.home / "model_config.yaml",
            model="",
            fmt="tgz",
            store=self.home / "store",
            work=self.home / "work",
        )
        result = self._script("start", "--archive", str(made), "--token", token, "--start-seconds", "300")
        if result.returncode:
            raise RuntimeError(result.stdout + result.stderr + "\n".join(self.instance.worker_lines()[-30:]))

    def stop(self) -> None:
        self._script("stop", "--drain-seconds", "0")
        shutil.rmtree(self.home, ignore_errors=True)

    def _script(self, command: str, *options: str) -> subprocess.CompletedProcess[str]:
        given = ["--properties", str(self.home / "config.properties"), "--run-dir", str(self.home / "run")]
        line = [sys.executable, str(ROOT / "scripts/serve.py"), command, *given, *options]
        return subprocess.run(line, capture_output=True, text=True, timeout=400)

    # -------------------------------------------------------------------------------- as a client

    def connect(self, body: object, path: str = "", *, headers: dict[str, str] | None = None, method: str = "POST"):
        """Send a request; its connection, before any answer was read."""
        connection = http.client.HTTPConnection("127.0.0.1", self.ports[0], timeout=120)
        data = json.dumps(body).encode() if isinstance(body, dict | list) else body
        connection.request(method, f"/predictions/gpt-fast{path}", body=data, headers=headers or {})
        return connection

    def call(self, body: object, path: str = "", **options: object) -> Response:
        connection = self.connect(body, path, **options)
        try:
            response = connection.getresponse()
            return Response(response.status, {k.lower(): v for k, v in response.getheaders()}, response.read())
        finally:
            connection.close()

    def chunks(self, body: object, path: str = "") -> list[bytes]:
        """A stream's HTTP chunks, as they were cut on the wire."""
        connection = self.connect(body, path)
        response = connection.getresponse()
        assert response.status == 200, response.read()
        found = []
        while chunk := response.read1(1 << 20):
            found.append(chunk)
        connection.close()
        return found

    def metrics(self) -> dict[str, float]:
        """Every sample of the metrics endpoint by name and our own labels; of equal ones the sum."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.ports[2]}/metrics", timeout=10) as reply:
            text = reply.read().decode()
        found: dict[str, float] = {}
        for name, labels, value in re.findall(r"^gpt_fast_(\w+)\{([^}]*)\} (\S+)$", text, re.M):
            reason = re.search(r'finished_reason="(\w+)"', labels)
            key = f"{name}:{reason[1]}" if reason else name
            found[key] = found.get(key, 0.0) + (float(value) if "le=" not in labels else 0.0)
        return found

    def wait_for(self, condition, *, seconds: float) -> float:
        """Seconds until the figures are as wanted."""
        begin = time.monotonic()
        while not condition(self.metrics()):
            if time.monotonic() - begin > seconds:
                raise AssertionError(f"not within {seconds} s: {self.metrics()}")
            time.sleep(0.02)
        return time.monotonic() - begin


def new_server() -> Server:
    return Server(home=Path(tempfile.mkdtemp(prefix="gpt-fast-")), ports=free_ports(5))


@functools.cache
def shared_server() -> Server:
    """One server for every test module that needs no settings of its own."""
    server = new_server()
    atexit.register(server.stop)
    server.start()
    return server
