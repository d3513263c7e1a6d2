"""The watch over a served instance: what is dead or wedged is started anew, what computes is left alone."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from support.dummy_server import DummyServer, dummy_server
from support.paths import ROOT
from support.waiting import wait_until

sys.path.insert(0, str(ROOT / "scripts"))

import watch
from instance import Instance, Usage, alive, cpu_seconds, waited_seconds
from lifecycle import ServeError
from watch import STALL_SECONDS, Judge, Sight, Watch, trim

ONE = frozenset({1})
START_SECONDS = 100.0


def found(*sights: Sight) -> list[str | None]:
    judge = Judge(START_SECONDS)
    return [judge.problem(sight) for sight in sights]


def answered(at: float) -> Sight:
    return Sight(Usage(at), Usage(at), answered=True)


def unanswered(
    at: float,
    *,
    took: float = 0.0,
    cpu: float = 0.0,
    starved: float = 0.0,
    frontend_starved: float = 0.0,
    ready: bool | None = True,
    workers: frozenset[int] = ONE,
) -> Sight:
    """A look that ended at `at`. cpu, starved: shares of all time until then."""

    def used(at: float) -> Usage:
        return Usage(at, workers, cpu * at, starved * at, frontend_starved * at)

    return Sight(used(at - took), used(at), ready=ready)


def test_an_end_is_seen_at_once():
    assert found(answered(0), Sight(Usage(1), Usage(1), frontend=False)) == [None, "TorchServe has ended"]


@pytest.mark.parametrize("ready", [True, None])
def test_silence_while_nothing_computes_is_a_wedge(ready):
    problems = found(*(unanswered(at, cpu=0.01, starved=0.2, ready=ready) for at in range(6)))
    assert problems == [None] * 3 + ["no request is answered while nothing computes"] * 3
    assert STALL_SECONDS == 3


def test_one_look_that_took_as_long_is_enough():
    assert found(answered(0), unanswered(4, took=3)) == [None, "no request is answered while nothing computes"]
    began_anew = Sight(Usage(1, frozenset({7})), Usage(4, ONE), ready=True)
    assert found(answered(0), began_anew, unanswered(6)) == [None] * 3


def test_a_frontend_that_says_nothing_is_wedged_whatever_its_workers_compute():
    problems = found(*(unanswered(at, cpu=2.0, starved=2.0, ready=None) for at in range(4)))
    assert problems == [None] * 3 + ["no request is answered while nothing computes"]


@pytest.mark.parametrize(
    "busy", [{"cpu": 0.2}, {"starved": 0.9}, {"frontend_starved": 0.9}, {"frontend_starved": 0.9, "ready": None}]
)
def test_silence_is_none_while_something_computes_or_waits_for_a_core_or_an_answer_comes(busy):
    """Full queues, long prompts, long steps, a machine that is full of others: for ever, if need be."""
    assert not any(found(*(unanswered(at, **busy) for at in range(1000))))
    assert not any(found(*(unanswered(4 * at, took=3, **busy) for at in range(1000))))
    assert not any(found(*(answered(at) if at % 4 == 3 else unanswered(at) for at in range(100))))


def test_a_worker_that_is_replaced_begins_anew_and_may_load_as_long_as_at_the_start():
    died, loads = unanswered(0, ready=False, workers=frozenset()), frozenset({2})
    waited = [unanswered(at, ready=False, workers=loads) for at in (2, 50, 99)]
    assert not any(found(died, *waited, unanswered(101, workers=loads), answered(104)))
    late = unanswered(102, ready=False, workers=loads)
    assert found(died, *waited, late)[-1] == "the worker does not get ready"


def test_no_worker_for_long_is_torchserve_having_given_up():
    problems = found(*(unanswered(at, ready=False, workers=frozenset()) for at in (0, 2, 3)))
    assert problems == [None, None, "no worker runs and TorchServe starts none"]


@pytest.fixture
def instance() -> Iterator[tuple[Instance, list[int]]]:
    """Said to be served, and nothing runs; its ports."""
    with dummy_server() as server:
        server.instance.prepare((server.home / "config.properties").read_text())
        yield server.instance, server.ports


def test_restarts_that_do_not_help_end(instance, monkeypatch):
    served, ports = instance
    served.serve({"state": "", "archive": "none.tar.gz", "start_seconds": 1})
    monkeypatch.setattr(watch, "DELAYS", (0.0, 0.0))
    monkeypatch.setattr(watch, "LOOK_SECONDS", 0.0)
    monkeypatch.setattr(watch, "ASK_SECONDS", 0.2)  # who has the port does not answer
    told: list[str] = []
    with socket.socket() as other:
        other.bind(("127.0.0.1", ports[0]))
        other.listen()
        with pytest.raises(ServeError, match="TorchServe has ended: given up after 2 restarts; start it with: make"):
            Watch(served, told.append).run()
    assert [f"(try {n} of 2)" in line for n, line in enumerate(told, 1)] == [True, True]
    assert all("port: in use by another program" in line for line in told)
    assert served.served() == {}


def test_it_ends_with_what_it_watches(instance):
    served, _ = instance
    served.serve({"state": "", "archive": "", "start_seconds": 1})
    watcher = Watch(served, pytest.fail)
    (served.run_dir / "served").unlink()
    watcher.run()


def test_a_log_that_has_grown_too_long_begins_anew(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(watch, "LOG_BYTES", 10)
    log = tmp_path / "console.log"
    trim(log)
    with open(log, "a") as writer:
        for text in ("0123456789", "1", "23"):
            writer.write(text)
            writer.flush()
            trim(log)
    assert log.read_text() == "23"


def test_a_process_lives_as_long_as_one_of_its_threads(tmp_path: Path):
    """Killed Java is a zombie by its first thread while others still hold its ports: a start then found them taken."""
    code = "import ctypes, threading; threading.Thread(target=input).start(); ctypes.CDLL(None).pthread_exit(None)"
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE) as left:
        process = psutil.Process(left.pid)
        wait_until(lambda: process.status() == psutil.STATUS_ZOMBIE)
        assert alive(process)
        left.kill()
        wait_until(lambda: not alive(process))


def test_waiting_for_a_core_is_counted():
    """Of a process that may run only when nobody else wants its core, which another one does."""
    code = "import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))}); os.nice(%d)\nwhile True: pass"
    with subprocess.Popen([sys.executable, "-c", code % 0]) as first:
        with subprocess.Popen([sys.executable, "-c", code % 19]) as starved:
            wait_until(lambda: waited_seconds(psutil.Process(starved.pid)) > 0.3)
            assert cpu_seconds(psutil.Process(starved.pid)) < waited_seconds(psutil.Process(starved.pid))
            starved.kill()
        first.kill()


# --- a real TorchServe ----------------------------------------------------------------------------------------


def answers(server: DummyServer) -> bool:
    process = server.curl('{"n": 1, "pause": 0}')
    return process.communicate(timeout=90)[0].endswith("0\n") and process.returncode == 0


def lines(server: DummyServer) -> list[str]:
    return (server.instance.logs / "watch.log").read_text().splitlines()


@pytest.mark.server
def test_a_dead_torchserve_and_a_stopped_worker_are_replaced_and_sigterm_drains():
    with dummy_server() as server:
        assert server.start(server.archive()).returncode == 0
        assert answers(server) and lines(server) == []
        java, watcher = server.instance.frontend(), server.instance.watcher()
        java.kill()
        wait_until(lambda: len(lines(server)) == 1)
        assert "TorchServe has ended: started anew, ready after" in lines(server)[0] and answers(server)

        (stopped,) = server.instance.usage().workers
        os.kill(stopped, signal.SIGSTOP)
        wait_until(lambda: len(lines(server)) == 2)
        assert "no request is answered while nothing computes: started anew" in lines(server)[1] and answers(server)
        assert stopped not in server.instance.usage().workers

        stream = server.curl('{"n": 8, "pause": 0.25}')
        assert stream.stdout is not None and stream.stdout.readline()
        watcher.terminate()
        assert stream.communicate(timeout=20)[0] == "".join(f"{n}\n" for n in range(8)) and stream.returncode == 0
        wait_until(server.is_gone)
        assert lines(server)[-1] == "serve: stopped" and not server.instance.tmp.exists()


@pytest.mark.server
@pytest.mark.parametrize("worker", ["lives", "dies"])
def test_a_drain_ends_or_tells_all_that_run_and_all_that_wait_in_torchserves_queue(worker):
    with dummy_server() as server:
        server.write(keys={"batchSize": 8})
        assert server.start(server.archive()).returncode == 0
        running = [server.curl('{"n": 12, "pause": 0.25}', "-w", "%{http_code}") for _ in range(8)]
        assert all(stream.stdout.readline() for stream in running)
        waiting = [server.curl('{"n": 1, "pause": 0}', "-w", "%{http_code}") for _ in range(8)]
        wait_until(lambda: server.instance.describe()["jobQueueStatus"]["pendingRequests"] >= 8)
        if worker == "dies":
            (pid,) = server.instance.usage().workers
            os.kill(pid, signal.SIGKILL)
        stopped = server.serve("stop")
        begun = r"\((8|9) in flight" if worker == "dies" else r"\((16|17) in flight"  # with the watch's own question
        assert re.search(begun, stopped.stdout) and "cut" not in stopped.stdout, stopped.stdout
        for stream in waiting:
            assert stream.communicate(timeout=20)[0] == "draining\n503"
        for stream in running:
            text, _ = stream.communicate(timeout=20)
            whole = "".join(f"{n}\n" for n in range(12)) + "200"
            assert (text == whole) == (worker == "lives") == (stream.returncode == 0)
        assert server.is_gone()
