"""The engine on its own thread, and the mailboxes between it and a door.

The engine never waits for a door, which submits requests, cancels the ones whose client has gone, and takes what was
produced meanwhile: in TorchServe's rounds (`wait`, then `take`), or when it is told of news (`listen`, `take_all`).
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial

import torch

from gpt_fast.config import SamplingParams
from gpt_fast.llm import Engine, TextEvent
from gpt_fast.request import Request
from gpt_fast.serve.metrics import RequestRecord, speculation_totals

logger = logging.getLogger(__name__)

# TorchServe plays rounds as long as anyone is in flight. None for this long while output waits: every client of the
# last round is gone, and nobody will say so. First decoding pauses, which costs nothing if the silence was a stall.
SILENCE_SECONDS = 0.3
LOST_SECONDS = 5.0  # then the requests are dropped
LOOK_SECONDS = 0.25  # of it count at a time: a machine that runs none of our threads is silent, and no client's leaving
CROWD_INTERVAL = 0.05  # seconds from round to round that many streams share at least


@dataclass
class Mailbox:
    """One request: what the engine produced and nobody has taken yet, and when things happened to it."""

    prompt_tokens: int
    events: list[TextEvent] = field(default_factory=list)
    done: bool = False
    taken: bool = False  # text has left; the tokens before may have been half a character
    arrival: float = field(default_factory=time.monotonic)
    request: Request | None = None
    first_token: float | None = None
    generated: int = 0

    def record(self, request_id: str, finish_reason: str) -> RequestRecord:
        return RequestRecord(
            request_id=request_id,
            finish_reason=finish_reason,
            prompt_tokens=self.prompt_tokens,
            reused_tokens=self.request.reused if self.request else 0,
            generation_tokens=self.generated,
            arrival=self.arrival,
            started=self.request.started if self.request else None,
            first_token=self.first_token,
            ended=time.monotonic(),
            drafted_tokens=self.request.drafted if self.request else 0,
            accepted_tokens=self.request.accepted if self.request else 0,
        )


class Service:
    """Thread-safe front of an Engine. `start` it once; every other method may be called from any thread."""

    def __init__(self, engine: Engine, *, threads: int = 0, hung_after: float = 60.0, interval: float = 0.0) -> None:
        self.engine = engine
        self.fatal: BaseException | None = None
        self._threads = threads
        self._interval = interval  # seconds
        self._returned = 0.0
        self._awaited = self._news
        self._hung_after = hung_after  # seconds
        self._stepping_since: float | None = None
        self._changed = threading.Condition()
        self._mail: dict[str, Mailbox] = {}
        self._inbox: list[Callable[[], None]] = []
        self._last_round = time.monotonic()
        self._woken = False
        self._records: list[RequestRecord] = []
        self._listener: Callable[[bool], None] | None = None

    def listen(self, listener: Callable[[bool], None]) -> None:
        """Have the engine's thread call `listener` when there is something to take.

        It is given whether a request's first text or its end is among it, and must return at once. Who listens also
        learns of clients that leave, so no silence means that they have. Call it while nothing is in flight.
        """
        self._listener = listener

    def start(self) -> None:
        threading.Thread(target=self._run, name="engine", daemon=True).start()

    # ------------------------------------------------------------------ the door's side

    def submit(
        self,
        request_id: str,
        prompt: list[int],
        params: SamplingParams,
        *,
        owner: str = "",
        arrival: float | None = None,
    ) -> None:
        """Queue a request. One that the engine refuses gets a last event with finish_reason "error"."""
        with self._changed:
            box = self._mail[request_id] = Mailbox(len(prompt), arrival=arrival or time.monotonic())
            self._inbox.append(partial(self._add, box, request_id, prompt, params, owner))
            self._changed.notify_all()

    def cancel(self, request_ids: Iterable[str]) -> None:
        """Drop requests whose client has gone; ended ones are only forgotten."""
        with self._changed:
            for request_id in request_ids:
                box = self._mail.pop(request_id, None)
                if box is not None and not box.done:
                    self._records.append(box.record(request_id, "cancelled"))
                    self._inbox.append(partial(self.engine.abort, request_id))
            self._changed.notify_all()

    def cut_short(self, request_ids: Iterable[str]) -> None:
        """End requests where they are: what they still get is a last event with finish_reason "length"."""
        with self._changed:
            for request_id in request_ids:
                self._end(request_id, "length", recorded_as="length")
            self._changed.notify_all()

    def wake(self) -> None:
        """Let the current `wait`, or the next one, return at once."""
        with self._changed:
            self._woken = True
            self._changed.notify_all()

    def in_flight(self) -> int:
        """Requests that are running or waiting for a slot."""
        with self._changed:
            return sum(not box.done for box in self._mail.values())

    def wait(self, *, timeout: float) -> None:
        """Return when there is something to take or `wake` was called, or after `timeout` seconds.

        First tokens and ends are worth a round at once; the tokens between wait until `interval` has passed since the
        last round, so that a fast engine's rounds do not take the processor from it.
        """
        with self._changed:
            self._last_round = time.monotonic()
            self._changed.notify_all()
            pause = min(max(self._returned + self.pause() - self._last_round, 0), timeout)
            if not self._wait_for(self._urgent, pause):
                self._wait_for(self._news, timeout - pause)
            self._last_round = self._returned = time.monotonic()
            self._woken = False

    def pause(self) -> float:
        """Seconds from round to round: a new request waits as long, and the more are served, the sooner one comes."""
        return max(self._interval / max(self.in_flight(), 1), min(self._interval, CROWD_INTERVAL))

    def _wait_for(self, condition: Callable[[], bool], timeout: float) -> bool:
        self._awaited = condition  # the engine's thread looks, and does not wake us for less
        return self._changed.wait_for(condition, timeout)

    def _urgent(self) -> bool:
        fresh = any(m.events and (m.done or not m.taken) for m in self._mail.values())
        return fresh or self._woken or self.fatal is not None

    def _news(self) -> bool:
        return self._woken or self.fatal is not None or any(m.events for m in self._mail.values())

    def take(self, request_id: str) -> list[TextEvent]:
        """A request's new events, oldest first. The one with a finish_reason ends it: the id is then forgotten."""
        with self._changed:
            return self._take(request_id, self._mail[request_id])

    def take_all(self) -> dict[str, list[TextEvent]]:
        """As `take`, for every request that has something new."""
        with self._changed:
            return {name: self._take(name, box) for name, box in list(self._mail.items()) if box.events}

    def _take(self, request_id: str, box: Mailbox) -> list[TextEvent]:
        events, box.events = box.events, []
        box.taken = box.taken or any(event.text for event in events)
        if box.done:
            del self._mail[request_id]
        return events

    def take_records(self) -> list[RequestRecord]:
        """The requests that ended since the last call."""
        with self._changed:
            records, self._records = self._records, []
            return records

    def gauges(self) -> dict[str, float]:
        """What runs and waits now, and the share of the KV cache's positions that running requests occupy.

        Requests that nobody reads do not count: their slots go to whoever comes next.
        """
        with self._changed:
            if self._deserted():
                return {"num_requests_running": 0, "num_requests_waiting": 0, "kv_cache_usage_perc": 0.0}
        load = self.engine.load_figures()
        return {
            "num_requests_running": load.running,
            "num_requests_waiting": max(self.in_flight() - load.running, 0),
            "kv_cache_usage_perc": round(load.cache_usage, 4),
        }

    def totals(self) -> dict[str, float]:
        """Counts since the start, of what is no request."""
        totals = self.engine.speculation_totals()
        drafts = speculation_totals(totals) if totals else {}
        return {"recompiles_total": self.engine.core.recompiles(), **drafts}

    def failure(self) -> str | None:
        """Why the engine will not produce anything any more, or None. TorchServe then has to restart the worker."""
        if self.fatal is not None:
            return f"the engine stopped: {self.fatal!r}"
        if self.step_seconds() > self._hung_after:
            return f"one step has taken more than {self._hung_after:g} s"
        return None

    def step_seconds(self) -> float:
        """How long the step under way has taken; 0 between steps."""
        since = self._stepping_since
        return 0.0 if since is None else time.monotonic() - since

    def known(self) -> set[str]:
        with self._changed:
            return set(self._mail)

    # ------------------------------------------------------------------ the engine's thread

    def _run(self) -> None:
        if self._threads:
            torch.set_num_threads(self._threads)  # per thread for MKL: the loader's setting does not reach here
        try:
            while True:
                self._admit()
                self._stepping_since = time.monotonic()
                events = self.engine.step()
                self._stepping_since = None
                self._deliver(events)
        except BaseException as error:
            with self._changed:
                self.fatal = error
                self._changed.notify_all()
            raise

    def _admit(self) -> None:
        """Run queued calls; block while there is nothing to decode, or nobody left to read it."""
        if self.engine.idle:
            self.engine.check_integrity()
            self._end_forgotten()
        with self._changed:
            silent, last = 0.0, self._last_round
            while not self._changed.wait_for(self._has_work, timeout=LOOK_SECONDS):
                silent, last = silent + LOOK_SECONDS if last == self._last_round else 0.0, self._last_round
                if silent >= LOST_SECONDS and self._listener is None:
                    self._drop_lost()
            calls, self._inbox = self._inbox, []
        for call in calls:
            call()

    def _has_work(self) -> bool:
        return bool(self._inbox) or not (self.engine.idle or self._deserted())

    def _deserted(self) -> bool:
        waiting = self._listener is None and any(m.events for m in self._mail.values())
        return waiting and time.monotonic() - self._last_round > SILENCE_SECONDS

    def _drop_lost(self) -> None:
        """Free the slots of requests that nobody has read for long; should their round come after all, they fail."""
        for request_id in self._mail:
            self._end(request_id, "error", recorded_as="cancelled")

    def _end_forgotten(self) -> None:
        """The engine is idle, so whoever still waits for it would wait for ever: an error, now."""
        with self._changed:
            if self._inbox:
                return  # the engine does not know everybody yet
            lost = [name for name, box in self._mail.items() if not box.done]
            for request_id in lost:
                logger.error("request %s: the engine has lost it", request_id)
                self._end(request_id, "error", recorded_as="error")
            self._changed.notify_all()
        if lost and self._listener is not None:
            self._listener(True)

    def _deliver(self, events: list[TextEvent]) -> None:
        news = urgent = False
        with self._changed:
            for event in events:
                box = self._mail.get(event.request_id)
                if box is not None and not box.done:  # else cancelled or cut short while this step ran
                    news, urgent = True, urgent or not box.taken or event.finish_reason is not None
                    self._hand_over(box, event)
            if self._awaited():
                self._changed.notify_all()
        if news and self._listener is not None:
            self._listener(urgent)

    def _add(self, box: Mailbox, request_id: str, prompt: list[int], params: SamplingParams, owner: str) -> None:
        try:
            box.request = self.engine.add(request_id, prompt, params, owner=owner)
        except ValueError as error:  # the engine's own checks: this request's failure, nobody else's
            logger.error("request %s: refused by the engine: %s", request_id, error)
            self._deliver([TextEvent(request_id, "", None, "error")])

    def _end(self, request_id: str, finish_reason: str, *, recorded_as: str) -> None:
        """Close a request that still runs with an event of our own. The caller holds the lock."""
        box = self._mail[request_id]
        if not box.done:
            self._hand_over(box, TextEvent(request_id, "", None, finish_reason), recorded_as=recorded_as)
            self._inbox.append(partial(self.engine.abort, request_id))

    def _hand_over(self, box: Mailbox, event: TextEvent, *, recorded_as: str = "") -> None:
        box.events.append(event)
        if event.token is not None:
            box.generated += 1
            box.first_token = box.first_token or time.monotonic()
        if event.finish_reason is not None:
            box.done = True
            self._records.append(box.record(event.request_id, recorded_as or event.finish_reason))
