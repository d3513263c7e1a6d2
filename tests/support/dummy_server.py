"""serve.py over an own run directory, ports and archive, with a handler that needs no model (dummy_handler.py)."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import yaml

from support.paths import ROOT
from support.server import PORTS, free_ports

sys.path.insert(0, str(ROOT / "scripts"))

from instance import Instance, is_listening

from gpt_fast.torchserve import archive

SHIPPED = (ROOT / "deploy" / "config.properties").read_text()
CONFIG = {
    "minWorkers": 1,
    "maxWorkers": 1,
    "batchSize": 4,
    "maxBatchDelay": 1,
    "responseTimeout": 30,
    "startupTimeout": 60,
    "maxRetryTimeoutInSec": 10,
    "continuousBatching": True,
    "handler": {"checkpoint_path": "none", "max_num_seqs": 2},
}


@dataclass
class DummyServer:
    """One instance in a folder of its own."""

    home: Path
    ports: list[int]

    def write(self, *, properties: str = "", keys: dict[str, object] | None = None, **handler: object) -> None:
        """keys: of TorchServe's in model_config.yaml; handler: of the handler's section."""
        text = SHIPPED
        for old, new in zip(PORTS, self.ports, strict=True):
            text = text.replace(f":{old}\n", f":{new}\n").replace(f"port={old}\n", f"port={new}\n")
        (self.home / "config.properties").write_text(text + properties)
        config = CONFIG | (keys or {}) | {"handler": CONFIG["handler"] | handler}
        (self.home / "model_config.yaml").write_text(yaml.safe_dump(config))
        (self.home / "request.json").write_text('{"n": 3, "pause": 0.05}')

    def archive(self, fmt: str = "tgz", handler: str = "tests/support/dummy_handler.py") -> Path:
        return archive.build(
            handler=ROOT / handler,
            config=self.home / "model_config.yaml",
            model="",
            fmt=fmt,
            store=self.home / "store",
            work=self.home / "work",
        )

    def serve(self, command: str, *options: str, timeout: float = 90) -> subprocess.CompletedProcess[str]:
        return subprocess.run(self.command(command, *options), capture_output=True, text=True, timeout=timeout)

    def command(self, command: str, *options: str) -> list[str]:
        given = ["--properties", "config.properties", "--request", "request.json", "--run-dir", "run"]
        paths = [str(self.home / g) if not g.startswith("-") else g for g in given]
        return [sys.executable, str(ROOT / "scripts/serve.py"), command, *paths, *options]

    def start(self, made: Path, *options: str) -> subprocess.CompletedProcess[str]:
        return self.serve("start", "--archive", str(made), "--start-seconds", "240", *options, timeout=300)

    @property
    def instance(self) -> Instance:
        return Instance((self.home / "run").resolve())

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.ports[0]}/predictions/gpt-fast"

    def curl(self, body: str, *options: str) -> subprocess.Popen[str]:
        command = ["curl", "-sS", "-N", "--max-time", "60", *options, self.url, "-d", body]
        command += ["-H", "content-type: application/octet-stream"]
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    def is_gone(self) -> bool:
        left = self.instance.processes() or self.instance.watcher()
        return not left and not any(map(is_listening, self.ports))


@contextmanager
def dummy_server() -> Iterator[DummyServer]:
    """A server that is not started yet; nothing of it is left afterwards."""
    home = Path(tempfile.mkdtemp(prefix="gpt-fast-"))
    made = DummyServer(home=home, ports=free_ports(5))
    made.write()
    try:
        yield made
    finally:
        made.serve("stop", "--drain-seconds", "0")
        shutil.rmtree(home, ignore_errors=True)
