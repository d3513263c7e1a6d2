"""Faults amid real streams: each client is told, the next request is answered right, and nothing is left behind."""

from __future__ import annotations

import concurrent.futures
import http.client
import resource
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import pytest

from support.paths import ROOT
from support.server import Server, new_server
from support.waiting import wait_until

sys.path.insert(0, str(ROOT / "scripts"))

from instance import alive

pytestmark = [pytest.mark.server, pytest.mark.model]

STREAMS = 8
LONG = {"prompt": "The history of the city begins", "max_new_tokens": 400, "temperature": 0, "ignore_eos": True}
SHORT = {"prompt": "The capital of France", "max_new_tokens": 5, "temperature": 0, "stream": False}
SCHEMA = {"type": "object", "properties": {"a": {"enum": ["x", "y"]}}, "required": ["a"], "additionalProperties": False}
CHAT = {
    "messages": [{"role": "user", "content": "x or y?"}],
    "temperature": 0,
    "max_tokens": 40,
    "response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": SCHEMA}},
}


def leavings(server: Server) -> set[str]:
    """What workers leave: sockets, unpacked models, shared memory."""
    return {*map(str, server.instance.tmp.rglob("*.sock*")), *map(str, server.instance.tmp.glob("*/*")), *shared()}


def shared() -> set[str]:
    return set(map(str, Path("/dev/shm").iterdir()))


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    """At its end no process, shared memory or file of it is left."""
    before = shared()
    made = new_server()
    try:
        made.start(max_num_seqs=STREAMS, max_seq_len=512)
        yield made
        processes = made.instance.processes()
        made.stop()
        assert not any(map(alive, processes))
        assert not made.home.exists() and shared() <= before
    finally:
        made.stop()


def stream(server: Server) -> bool:
    """Whether a stream came to a regular end; False where its client was told that it did not."""
    try:
        answer = server.call(LONG | {"stream": True})
    except (http.client.HTTPException, OSError):
        return False
    assert answer.status in (200, 500, 503, 507), answer.text
    return answer.status == 200


def answered(server: Server) -> str:
    """The short question's answer, as soon as there is one; the watch may be starting TorchServe anew."""
    found: list[str] = []

    def ask() -> bool:
        with suppress(ConnectionError, http.client.HTTPException):
            answer = server.call(SHORT)
            found.extend([answer.text] * (answer.status == 200))
        return bool(found)

    wait_until(ask)
    return found[-1]


def begin_streams(server: Server, clients: concurrent.futures.Executor) -> list[concurrent.futures.Future[bool]]:
    begun = [clients.submit(stream, server) for _ in range(STREAMS)]
    server.wait_for(lambda figures: figures.get("num_requests_running", 0) == STREAMS, seconds=60)
    return begun


def worker_of(server: Server) -> psutil.Process:
    (worker,) = server.instance.workers_running()
    return worker


def lose_the_worker(server: Server, expected: str) -> None:
    old, files = worker_of(server), leavings(server)
    ports = set(server.instance.taken_ports())
    with concurrent.futures.ThreadPoolExecutor(STREAMS) as clients:
        streams = begin_streams(server, clients)
        old.send_signal(signal.SIGKILL)
        ended = [each.result(timeout=60) for each in streams]
    assert not any(ended), "an answer that was cut looks whole"
    assert answered(server) == expected
    assert worker_of(server).pid != old.pid and set(server.instance.taken_ports()) == ports
    assert leavings(server) == files
    assert not [process for process in server.instance.processes() if process.pid == old.pid]


def test_kill_9_of_the_worker_amid_eight_streams(server: Server) -> None:
    lose_the_worker(server, answered(server))


@pytest.mark.nightly
def test_kill_9_of_the_worker_ten_times(server: Server) -> None:
    expected = answered(server)
    for _ in range(10):
        lose_the_worker(server, expected)


@contextmanager
def limited(processes: list[psutil.Process], kind: int, limit: int) -> Iterator[None]:
    """The soft limit of processes that run, for a while."""
    hard = {process.pid: resource.prlimit(process.pid, kind) for process in processes}
    for pid, old in hard.items():
        resource.prlimit(pid, kind, (limit, old[1]))
    try:
        yield
    finally:
        for pid, old in hard.items():
            if psutil.pid_exists(pid):
                resource.prlimit(pid, kind, old)


def test_a_full_disk_stops_no_answer(server: Server) -> None:
    """No byte can be written to any file: logs, TMPDIR, caches. What is said later is in the log again."""
    text, constrained = answered(server), server.call(CHAT, "/1.0/v1/chat/completions").json["choices"]
    log = server.instance.logs / "model_log.log"
    with limited(server.instance.processes(), resource.RLIMIT_FSIZE, 0):
        size = log.stat().st_size
        for _ in range(3):
            assert server.call(SHORT).text == text
        assert server.call(CHAT, "/1.0/v1/chat/completions").json["choices"] == constrained
        assert log.stat().st_size == size
    assert server.call(SHORT).text == text
    wait_until(lambda: log.stat().st_size > size)


def test_a_worker_without_memory_answers_or_says_so_and_the_next_one_serves(server: Server) -> None:
    text = answered(server)
    worker = worker_of(server)
    with limited([worker], resource.RLIMIT_AS, worker.memory_info().vms):
        with concurrent.futures.ThreadPoolExecutor(STREAMS) as clients:
            bodies = [LONG | {"stream": False, "prompt": "word " * 90 * n, "max_new_tokens": 9} for n in range(1, 5)]
            told = [clients.submit(server.call, body) for body in bodies]
            streams = [clients.submit(stream, server) for _ in range(STREAMS)]
            assert all(isinstance(each.result(timeout=60), bool) for each in streams)
        for each in told:
            with suppress(ConnectionError, http.client.HTTPException):  # cut, where its worker died
                assert each.result(timeout=60).status in {200, 400, 500, 503, 507}
        assert answered(server) == text
    assert answered(server) == text
