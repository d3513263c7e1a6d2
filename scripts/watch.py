"""The watch over a served instance: what has died or is wedged is started anew, with the same archive and settings.

A server that computes is left alone, however long its queue, its prompts or its steps: only one whose workers use no
processor and which answers nothing meanwhile is taken for wedged. Steps that compute for ever are the worker's own to
find (`hung_seconds`), and a worker that died is TorchServe's to start, as long as it does.
"""

import os
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from instance import Instance
from lifecycle import ServeError, UnderWay, end_processes, launch, locked, wait_until_ready

LOOK_SECONDS = 1.0
ANSWER_SECONDS = 2.0  # a server that has time answers in milliseconds
STALL_SECONDS = 3.0  # no answer for so long, while nothing computes: wedged. As long without a worker: given up
BUSY_SHARE = 0.1  # of one core; an idle worker uses a hundredth
CALM_SECONDS = 600.0  # a restart so long ago does not count any more
DELAYS = (0.0, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 60.0)  # seconds before each restart in a row; then the watch gives up
LOG_BYTES = 20 << 20  # console.log and watch.log begin anew beyond


@dataclass(frozen=True)
class Sight:
    """One look. at: seconds of a monotonic clock.

    answered: the server answered, and no step has taken long. Only where it did not: ready, whether TorchServe calls a
    worker so (None: it does not say), workers, the worker processes, and cpu, the seconds that they have computed.
    """

    at: float
    frontend: bool = True
    answered: bool = False
    ready: bool | None = None
    workers: frozenset[int] = frozenset()
    cpu: float = 0.0

    @property
    def state(self) -> tuple[str, frozenset[int]]:
        if not self.workers:
            return "no worker runs and TorchServe starts none", self.workers
        if self.ready is False:
            return "the worker does not get ready", self.workers
        return "no request is answered while nothing computes", self.workers


class Judge:
    """Tells from one sight after another what is wrong with the server, if anything."""

    def __init__(self, start_seconds: float) -> None:
        self.start_seconds = start_seconds
        self.first: Sight | None = None  # since when all is as it is now: unanswered, the same state, no progress

    def problem(self, sight: Sight) -> str | None:
        if not sight.frontend:
            return "TorchServe has ended"
        first = self.first
        if sight.answered:
            self.first = None
        elif first is None or first.state != sight.state or is_computing(first, sight):
            self.first = sight
        elif sight.at - first.at >= (self.start_seconds if sight.workers and sight.ready is False else STALL_SECONDS):
            return sight.state[0]
        return None


def is_computing(before: Sight, now: Sight) -> bool:
    return now.cpu - before.cpu >= BUSY_SHARE * (now.at - before.at)


def look(instance: Instance) -> Sight:
    """May take some seconds, where the server does not answer."""
    frontend = instance.frontend()
    if frontend is None:
        return Sight(time.monotonic(), frontend=False)
    health = instance.health(timeout=ANSWER_SECONDS)
    if health is not None and health.get("step_seconds", 0.0) < STALL_SECONDS:
        return Sight(time.monotonic(), answered=True)
    description = instance.describe(timeout=ANSWER_SECONDS)
    ready = None if description is None else any(w["status"] == "READY" for w in description["workers"])
    usage = instance.worker_cpu()
    return Sight(time.monotonic(), ready=ready, workers=frozenset(usage), cpu=sum(usage.values()))


class Watch:
    """Looks once a second; `tell` gets one line for each restart."""

    def __init__(self, instance: Instance, tell: Callable[[str], None]) -> None:
        self.instance, self.tell = instance, tell
        self.served = instance.served()
        self.judge = Judge(self.served["start_seconds"])
        self.restarts = 0  # in a row
        self.last = time.monotonic()

    def run(self) -> None:
        """Returns when the instance is served no longer. Raises ServeError when restarts do not help."""
        while self.instance.served():
            if problem := self.judge.problem(look(self.instance)):
                self.recover(problem)
            for name in ("console.log", "watch.log"):
                trim(self.instance.logs / name)
            time.sleep(LOOK_SECONDS)

    def recover(self, problem: str) -> None:
        """Start all anew; what the instance was is in logs/*.last.log."""
        if time.monotonic() - self.last > CALM_SECONDS:
            self.restarts = 0
        given_up = self.restarts == len(DELAYS)
        if not given_up:
            time.sleep(DELAYS[self.restarts])
        try:
            with locked(self.instance):
                if not self.instance.served():
                    return  # stopped meanwhile
                end_processes(self.instance.processes(), patience=0)
                if given_up:
                    self.instance.clean()
                    raise ServeError(f"{problem}: given up after {self.restarts} restarts; start it with: make serve")
                self.restarts += 1
                self.tell(f"{problem}: {self.restart()} (restart {self.restarts} of {len(DELAYS)} in a row)")
        except UnderWay:
            return  # somebody starts or stops it by hand
        self.judge, self.last = Judge(self.served["start_seconds"]), time.monotonic()

    def restart(self) -> str:
        """How it went, in words. The caller holds the lock."""
        begin = time.monotonic()
        properties = self.instance.properties_file.read_text(encoding="latin-1")
        shutil.rmtree(self.instance.tmp, ignore_errors=True)
        try:
            self.instance.prepare(properties)
            launch(self.instance, Path(self.served["archive"]), tell=lambda _: None)
            wait_until_ready(self.instance, self.served["start_seconds"], tell=lambda _: None)
        except (ServeError, ValueError, OSError) as error:
            return f"could not be started anew: {error}"
        finally:
            self.instance.serve(self.served)  # also after a failure, which cleans up: there is another try
        return f"started anew, ready after {time.monotonic() - begin:.1f} s"


def trim(log: Path) -> None:
    """Empty a log that has grown too long; who writes it appends."""
    try:
        if log.stat().st_size > LOG_BYTES:
            os.truncate(log, 0)
    except OSError:
        return
