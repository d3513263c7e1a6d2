"""One TorchServe instance: its folder, settings, environment, processes and what its ports tell.

Everything that an instance writes lies in its run directory (.run/): the settings it was started with, logs,
TorchServe's pid file, sockets and unpacked models. Its processes are found by that directory in their environment,
never by a program's name alone.
"""

import contextlib
import json
import os
import re
import shutil
import socket
import sys
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psutil

from gpt_fast.files import write_text
from gpt_fast.serve.startup_check import ADDRESSES, STARTUP_ERROR, is_true, parse_properties
from gpt_fast.torchserve.archive import MODEL_NAME, VERSION
from gpt_fast.torchserve.java import find_java

ROOT = Path(__file__).resolve().parents[1]
MAX_TMP = 80  # a unix socket's path, TEMP/.ts.sock.NNNNN, must stay under 108 bytes
PROGRAMS = ("org.pytorch.serve.ModelServer", "model_service_worker.py")


@dataclass(frozen=True)
class Usage:
    """at: seconds of a monotonic clock; the others are seconds of the processes' lives (see Instance.usage)."""

    at: float
    workers: frozenset[int] = frozenset()  # their process ids
    computed: float = 0.0
    waited: float = 0.0
    frontend_waited: float = 0.0


@dataclass(frozen=True)
class Instance:
    run_dir: Path

    @property
    def tmp(self) -> Path:
        return self.run_dir / "tmp"

    @property
    def logs(self) -> Path:
        return self.run_dir / "logs"

    @property
    def properties_file(self) -> Path:
        return self.run_dir / "config.properties"

    @property
    def drain_file(self) -> Path:
        """While this file exists the handler refuses new requests."""
        return self.run_dir / "draining"

    @property
    def watch_file(self) -> Path:
        """Which process watches the instance; see `watcher`."""
        return self.run_dir / "watch.pid"

    def served(self) -> dict[str, Any]:
        """What is served, as `serve` was told; empty when nothing is meant to run."""
        try:
            return json.loads((self.run_dir / "served").read_text())
        except (OSError, ValueError):
            return {}

    def serve(self, what: dict[str, Any]) -> None:
        """Note what is served. state: changes with archive and settings; archive: its path; start_seconds."""
        write_text(self.run_dir / "served", json.dumps(what))

    @property
    def properties(self) -> dict[str, str]:
        """The settings the instance was started with."""
        return parse_properties(self.properties_file.read_text(encoding="latin-1"))

    def prepare(self, properties: str) -> None:
        """Make the folders and write the settings. Raises ValueError when sockets could not be made there."""
        if len(os.fsencode(self.tmp)) > MAX_TMP:
            raise ValueError(
                f"RUN_DIR: path too long for unix sockets (got {len(os.fsencode(self.run_dir))} bytes, "
                f"allowed {MAX_TMP - 4}); set RUN_DIR to a shorter one"
            )
        for folder in (self.run_dir, self.tmp, self.logs):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        write_text(self.properties_file, properties, encoding="latin-1")

    def variables(self) -> dict[str, str]:
        """The environment that TorchServe and its workers need, beyond what the shell has."""
        return {
            "PATH": f"{Path(sys.executable).parent}:{os.environ.get('PATH', '')}",  # torchrun is looked up there
            "JAVA_HOME": find_java(),
            "TMPDIR": str(self.tmp),  # TorchServe's pid file
            "TEMP": str(self.tmp),  # sockets, unpacked models
            "LOG_LOCATION": str(self.logs),
            "METRICS_LOCATION": str(self.logs),
            "LOG4J_CONFIGURATION_FILE": (ROOT / "deploy" / "log4j2.xml").as_uri(),
            "TS_CONFIG_FILE": str(self.properties_file),
            "GPT_FAST_ROOT": str(ROOT),  # relative paths in model_config.yaml count from here
            "GPT_FAST_DRAIN_FILE": str(self.drain_file),
            # By default compiled kernels would lie in TMPDIR and go with the instance.
            "TORCHINDUCTOR_CACHE_DIR": os.environ.get("TORCHINDUCTOR_CACHE_DIR", str(ROOT / "build" / "inductor")),
        }

    # --- processes ---

    def processes(self) -> list[psutil.Process]:
        """Frontend, torchrun and workers of this instance with all they started, orphans included."""
        found = {p for p in psutil.process_iter() if self._owns(p)}
        for process in list(found):
            try:
                found.update(process.children(recursive=True))
            except psutil.Error:  # it ended meanwhile
                continue
        return [p for p in found if alive(p)]

    def _owns(self, process: psutil.Process) -> bool:
        try:
            command = " ".join(process.cmdline())
            return any(p in command for p in PROGRAMS) and process.environ().get("TEMP") == str(self.tmp)
        except psutil.Error:
            return False

    def frontend(self) -> psutil.Process | None:
        """TorchServe's Java process, None when it does not run."""
        try:
            process = psutil.Process(int((self.tmp / ".model_server.pid").read_text()))
        except (OSError, ValueError, psutil.Error):
            return None
        return process if self._owns(process) and alive(process) else None

    def workers_running(self) -> list[psutil.Process]:
        """The worker processes, as the frontend's descendants."""
        frontend = self.frontend()
        try:
            found = frontend.children(recursive=True) if frontend else []
        except psutil.Error:  # it ended meanwhile
            return []
        return [process for process in found if is_worker(process)]

    def usage(self) -> Usage:
        """What the workers have computed until now, and how long they and the frontend have waited for a core."""
        workers = self.workers_running()
        frontend = self.frontend()
        return Usage(
            at=time.monotonic(),
            workers=frozenset(process.pid for process in workers),
            computed=sum(map(cpu_seconds, workers)),
            waited=sum(map(waited_seconds, workers)),
            frontend_waited=waited_seconds(frontend) if frontend else 0.0,
        )

    def watcher(self) -> psutil.Process | None:
        """The process that watches the instance, None when none does."""
        try:
            pid, created = self.watch_file.read_text().split()
            process = psutil.Process(int(pid))
            return process if process.create_time() == float(created) and alive(process) else None
        except (OSError, ValueError, psutil.Error):
            return None

    def watch_here(self) -> None:
        """Note that this process watches."""
        write_text(self.watch_file, f"{os.getpid()} {psutil.Process().create_time()}")

    # --- ports ---

    def url(self, key: str) -> str:
        """`inference_address` and the like as this machine reaches it."""
        parts = urlsplit(self.properties[key])
        everywhere = parts.hostname in ("0.0.0.0", "::")
        return f"{parts.scheme}://127.0.0.1:{parts.port}" if everywhere else parts.geturl()

    def ports(self) -> list[int]:
        addresses = [urlsplit(self.properties[key]).port or 0 for key in ADDRESSES if "//" in self.properties[key]]
        return [*addresses, *(int(self.properties[f"grpc_{name}_port"]) for name in ("inference", "management"))]

    def taken_ports(self) -> list[int]:
        """The instance's ports that another program listens on."""
        return [port for port in self.ports() if is_listening(port)]

    def token(self, kind: str) -> str | None:
        """The key for `inference` or `management` calls, or `API` to renew them; None when the token is off."""
        frontend = self.frontend()
        if is_true(self.properties.get("disable_token_authorization", "")) or frontend is None:
            return None
        return json.loads((Path(frontend.cwd()) / "key_file.json").read_text())[kind]["key"]

    def describe(self, *, timeout: float = 5.0) -> dict[str, Any] | None:
        """The model as the management API tells it; None while it does not answer."""
        url = f"{self.url('management_address')}/models/{MODEL_NAME}"
        try:
            return json.loads(self._get(url, "management", timeout))[0]
        except (OSError, ValueError, LookupError, HTTPException):
            return None

    def workers(self) -> list[dict[str, Any]]:
        """The model's workers; none while the management API does not answer."""
        return (self.describe() or {"workers": []})["workers"]

    def health(self, *, timeout: float) -> dict[str, Any] | None:
        """What a worker says of itself, by the way that requests take; None when it says nothing in time.

        Empty when TorchServe asks for another token: it answers, and nobody may know more.
        """
        url = f"{self.url('inference_address')}/predictions/{MODEL_NAME}/{VERSION}/health"
        try:
            return json.loads(self._get(url, "inference", timeout))
        except urllib.error.HTTPError as error:
            return {} if error.code == 400 else None
        except (OSError, ValueError, LookupError, HTTPException):
            return None

    def is_ready(self) -> bool:
        """A worker has loaded and warmed the model. (`/ping` is 200 without one.)"""
        return any(worker["status"] == "READY" for worker in self.workers())

    def active_requests(self) -> float:
        """Requests in flight, those in TorchServe's queue too; where it does not say, open client connections."""
        connections = self._open_connections()
        described = self.describe() if connections else None
        if described is None:
            return connections
        waiting = described["jobQueueStatus"]["pendingRequests"]
        if all(worker["status"] != "READY" for worker in described["workers"]):
            return waiting  # a worker that died has left its last figures, and its clients were told
        running = self._running_requests()
        return connections if running is None else waiting + running

    def _running_requests(self) -> float | None:
        """The handler's own count, None where it publishes none."""
        try:
            text = self._get(f"{self.url('metrics_address')}/metrics", "management")
        except OSError:
            return None
        return requests_in_flight(text)

    def _open_connections(self) -> int:
        frontend = self.frontend()
        port = urlsplit(self.properties["inference_address"]).port
        try:
            connections = frontend.net_connections(kind="tcp") if frontend else []
        except psutil.Error:
            return 0
        return sum(c.status == psutil.CONN_ESTABLISHED and c.laddr.port == port for c in connections)

    def _get(self, url: str, kind: str, timeout: float = 5.0) -> str:
        try:
            return fetch(url, self.token(kind), timeout)
        except urllib.error.HTTPError as error:
            if error.code != 400 or not self.token(kind):
                raise
        self._renew(kind, timeout)
        return fetch(url, self.token(kind), timeout)

    def _renew(self, kind: str, timeout: float) -> None:
        """Have TorchServe write a new key of a kind that it takes no longer: keys expire, but the one that asks."""
        fetch(f"{self.url('management_address')}/token?type={kind}", self.token("API"), timeout)

    # --- what the worker said ---

    def worker_lines(self) -> list[str]:
        """What the workers printed since the start, without the log's own columns."""
        try:
            text = (self.logs / "model_log.log").read_text(errors="replace")
        except FileNotFoundError:
            return []
        return [line.split(" - ", 1)[1] for line in text.splitlines() if " - " in line]

    def load_failure(self) -> str | None:
        """Why TorchServe gave the model up before it started a worker: its own words; None: it did not."""
        try:
            text = (self.logs / "console.log").read_text(errors="replace")
        except FileNotFoundError:
            return None
        match = re.search(r"Failed to load model: (\S+)(?:.*\n(?!\d{4}-)(.*))?", text)
        return None if match is None else f"{match[1]}: {(match[2] or 'no reason given').removesuffix(': null')}"

    def keep_last_logs(self) -> None:
        """What the worker and TorchServe said until now goes to *.last.log: the next start begins anew."""
        for name in ("model_log", "console"):
            with contextlib.suppress(FileNotFoundError):
                os.replace(self.logs / f"{name}.log", self.logs / f"{name}.last.log")

    def clean(self) -> None:
        """Remove what a stopped instance leaves: sockets, unpacked models, pid and key file."""
        shutil.rmtree(self.tmp, ignore_errors=True)
        for name in ("draining", "key_file.json", "served"):
            (self.run_dir / name).unlink(missing_ok=True)


def requests_in_flight(metrics: str) -> float | None:
    """The handler's own count in Prometheus' text; None where there is none."""
    counts = re.findall(r"^gpt_fast_num_requests_(?:running|waiting)\{[^\n]*\} ([\d.]+)$", metrics, re.M)
    return sum(map(float, counts)) if counts else None


def fetch(url: str, key: str | None, timeout: float) -> str:
    request = urllib.request.Request(url, headers={"Authorization": f"Bearer {key}"} if key else {})
    with urllib.request.urlopen(request, timeout=timeout) as reply:
        return reply.read().decode()


def alive(process: psutil.Process) -> bool:
    """A process whose first thread has ended while others still do keeps its memory and its ports: it lives."""
    try:
        if not process.is_running():
            return False
        return process.status() != psutil.STATUS_ZOMBIE or len(os.listdir(f"/proc/{process.pid}/task")) > 1
    except (psutil.Error, OSError):
        return False


def is_worker(process: psutil.Process) -> bool:
    try:
        return alive(process) and any(PROGRAMS[1] in word for word in process.cmdline())
    except psutil.Error:  # it ended meanwhile
        return False


def cpu_seconds(process: psutil.Process) -> float:
    try:
        return sum(process.cpu_times()[:2])
    except psutil.Error:
        return 0.0


def waited_seconds(process: psutil.Process) -> float:
    """How long its threads have waited for a core, all together; 0 where the kernel does not count it."""
    nanoseconds = 0
    for file in Path(f"/proc/{process.pid}/task").glob("*/schedstat"):
        with contextlib.suppress(OSError):  # it ended meanwhile
            nanoseconds += int(file.read_text().split()[1])
    return nanoseconds / 1e9


def is_listening(port: int) -> bool:
    with socket.socket() as probe:
        probe.settimeout(1)
        return probe.connect_ex(("127.0.0.1", port)) == 0


def startup_error(lines: list[str]) -> str | None:
    """Why the worker did not start: the handler's own line, else the last line of the last traceback, else None."""
    for line in reversed(lines):
        if line.startswith(STARTUP_ERROR):
            return line.removeprefix(STARTUP_ERROR)
    errors = [line for line in lines if re.match(r"[\w.]+(Error|Exception|Exit|Interrupt)\b", line)]
    errors = [line for line in errors if "Unknown exception" not in line]  # TorchServe's own, after the real one
    return errors[-1].removeprefix("ValueError: ") if errors else None


def render_properties(source: Path, *, token: str) -> str:
    """The settings file with absolute paths, and the token switched when `token` is "on" or "off"."""
    text = source.read_text(encoding="latin-1")
    metrics = ROOT / parse_properties(text).get("metrics_config", "deploy/metrics.yaml")
    added = [f"metrics_config={escape(str(metrics))}"]
    if token:
        added.append(f"disable_token_authorization={'false' if token == 'on' else 'true'}")
    return "\n".join([text, "# Added at start:", *added, ""])


def escape(value: str) -> str:
    """A value in Java's .properties format."""
    value = value.replace("\\", "\\\\")
    return "".join(c if c.isascii() else f"\\u{ord(c):04x}" for c in value)
