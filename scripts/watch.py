"""The watch over a served instance: what has died or is wedged is started anew, with the same archive and settings.

A server that computes is left alone, however long its queue, its prompts or its steps, and one that waits for a
processor too: only one that answers nothing while it neither computes nor waits is taken for wedged, TorchServe and its
workers each by what they have to answer. Steps that compute for ever are the worker's own to find (`hung_seconds`), and
a worker that died is TorchServe's to start, as long as it does.
"""

import os
import shutil
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from instance import Instance, Usage
from lifecycle import ServeError, UnderWay, end_processes, launch, locked, wait_until_ready

LOOK_SECONDS = 1.0
GLANCE_SECONDS = 0.5  # a server that has time answers in milliseconds; one that has not is looked at as often
ASK_SECONDS = 10.0  # then it is asked again
STALL_SECONDS = 3.0  # no answer for so long, while nothing computes: wedged. As long without a worker: given up
BUSY_SHARE = 0.1  # of one core; an idle worker uses a hundredth
STARVED_SHARE = 0.5  # of the time, some thread waits for a core; those of an idle server on a full machine a fifth
DELAYS = (0.0, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 60.0)  # seconds before restarts that did not help; then it gives up
LOG_BYTES = 20 << 20  # console.log and watch.log begin anew beyond


@dataclass(frozen=True)
class Sight:
    """What is seen. asked: what the server's processes had used when it was asked; told: what they have now.

    answered: the server answered, and no step has taken long. ready, only where it did not: whether TorchServe calls a
    worker so (None: it does not say, which workers that compute do not explain).
    """

    asked: Usage
    told: Usage
    frontend: bool = True
    answered: bool = False
    ready: bool | None = None

    @property
    def state(self) -> tuple[str, frozenset[int]]:
        workers = self.told.workers
        if not workers:
            return "no worker runs and TorchServe starts none", workers
        if self.ready is False:
            return "the worker does not get ready", workers
        return "no request is answered while nothing computes", workers


class Judge:
    """Tells from one sight after another what is wrong with the server, if anything."""

    def __init__(self, start_seconds: float) -> None:
        self.start_seconds = start_seconds
        self.state: tuple[str, frozenset[int]] | None = None  # unanswered, and all is as it is now
        self.since: Usage | None = None  # the state's beginning, or the last progress in it

    def problem(self, sight: Sight) -> str | None:
        if not sight.frontend:
            return "TorchServe has ended"
        if sight.answered:
            self.state = self.since = None
            return None
        if self.since is None or self.state != sight.state:
            self.state = sight.state
            self.since = sight.asked if sight.asked.workers == sight.told.workers else sight.told
        if makes_progress(self.since, sight.told, frontend_only=sight.ready is None):
            self.since = sight.told
        may_load = sight.told.workers and sight.ready is False
        if sight.told.at - self.since.at >= (self.start_seconds if may_load else STALL_SECONDS):
            return sight.state[0]
        return None


def makes_progress(before: Usage, now: Usage, *, frontend_only: bool) -> bool:
    """It computes, or would if it was given a core. TorchServe itself has nothing to compute for seconds."""
    seconds = now.at - before.at
    computed, waited = now.computed - before.computed, now.waited - before.waited
    starved = now.frontend_waited - before.frontend_waited >= STARVED_SHARE * seconds
    works = computed >= BUSY_SHARE * seconds or waited >= STARVED_SHARE * seconds
    return seconds > 0 and (starved or (works and not frontend_only))


def look(instance: Instance, pool: Executor) -> Iterator[Sight]:
    """Ask the server for its health; a sight twice a second until it says something."""
    asked = instance.usage()
    if instance.frontend() is None:
        yield Sight(asked, asked, frontend=False)
        return
    asking = pool.submit(lambda: is_well(instance.health(timeout=ASK_SECONDS)))
    done = False
    while not done:
        done = bool(wait([asking], timeout=GLANCE_SECONDS).done)
        if done and asking.result():
            yield Sight(asked, asked, answered=True)
            return
        model = instance.describe(timeout=GLANCE_SECONDS)
        ready = None if model is None else any(worker["status"] == "READY" for worker in model["workers"])
        yield Sight(asked, instance.usage(), ready=ready)


def is_well(health: dict[str, Any] | None) -> bool:
    return health is not None and health.get("step_seconds", 0.0) < STALL_SECONDS


class Watch:
    """Looks once a second; `tell` gets one line for each restart."""

    def __init__(self, instance: Instance, tell: Callable[[str], None]) -> None:
        self.instance, self.tell = instance, tell
        self.served = instance.served()
        self.judge = Judge(self.served["start_seconds"])
        self.pool = ThreadPoolExecutor(1)
        self.failures = 0  # restarts in a row after which nothing was answered

    def run(self) -> None:
        """Returns when the instance is served no longer. Raises ServeError when restarts do not help."""
        while self.instance.served():
            for sight in look(self.instance, self.pool):
                if sight.answered:
                    self.failures = 0
                if problem := self.judge.problem(sight):
                    self.recover(problem)
                    break
            for name in ("console.log", "watch.log"):
                trim(self.instance.logs / name)
            time.sleep(LOOK_SECONDS)

    def recover(self, problem: str) -> None:
        """Start all anew; what the instance was is in logs/*.last.log."""
        given_up = self.failures == len(DELAYS)
        if not given_up:
            time.sleep(DELAYS[self.failures])
        try:
            with locked(self.instance):
                if not self.instance.served():
                    return  # stopped meanwhile
                end_processes(self.instance.processes(), patience=0)
                if given_up:
                    self.instance.clean()
                    raise ServeError(f"{problem}: given up after {self.failures} restarts; start it with: make serve")
                self.failures += 1
                self.tell(f"{problem}: {self.restart()}")
                if is_well(self.instance.health(timeout=ASK_SECONDS)):
                    self.failures = 0  # whatever happens before the next look
        except UnderWay:
            return  # somebody starts or stops it by hand
        self.judge = Judge(self.served["start_seconds"])

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
            return f"could not be started anew: {error} (try {self.failures} of {len(DELAYS)})"
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
