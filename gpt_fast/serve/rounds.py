"""One TorchServe round: who is in flight goes in, what each gets now comes out. No ts here, no tensors.

With continuousBatching TorchServe calls the handler again and again with every request in flight; a request's body
comes with its first round only, and an id that is missing has lost its client.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Protocol

from gpt_fast.config import SamplingParams
from gpt_fast.llm import TextEvent
from gpt_fast.serve.metrics import Reporter
from gpt_fast.serve.service import Service

logger = logging.getLogger(__name__)

ROUND_SECONDS = 0.1  # the longest a round waits for a token: new requests join within it
PROBE_SECONDS = 0.25  # a request that had nothing for this long gets an empty chunk, which finds out a gone client


@dataclass(frozen=True)
class Reply:
    """What one request gets this round.

    more: True, a chunk and more will come; False, the last chunk; None, the whole response at once (also the only
    right form when nothing was sent before: TorchServe sends no header for a first chunk that is also the last).
    """

    text: str
    more: bool | None
    status: int = 200
    reason: str = "OK"
    content_type: str = "text/plain; charset=utf-8"
    headers: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class Prompt:
    """One sequence that a request needs decoded."""

    tokens: list[int]
    params: SamplingParams


class Answer(Protocol):
    """How a request's events become its response; see gpt_fast.serve.response."""

    stream: bool
    content_type: str

    def push(self, index: int, events: list[TextEvent]) -> str:
        """Take prompt `index`'s new events; the text to stream for them ("" when the answer is not streamed)."""

    def end(self) -> str:
        """What follows the last event: the end of the stream, or the whole body."""


@dataclass(frozen=True)
class Job:
    """An admitted request: how to answer it, the sequences it needs, whose prefixes it may share, its time limit."""

    answer: Answer
    prompts: list[Prompt]
    owner: str = ""
    seconds: float = 600.0


class Refusal(Exception):
    """A request that cannot be served: an HTTP status and a body that says why."""

    def __init__(self, status: int, reason: str, body: str, *, headers: tuple[tuple[str, str], ...] = ()) -> None:
        super().__init__(body)
        self.reply = Reply(body, None, status, reason, "application/json", headers)


class Admission(Protocol):
    def __call__(self, path: str, body: object) -> Job | Reply:
        """Parse one request. A Reply is a complete response (a model list, a page). Raises Refusal."""


@dataclass(frozen=True)
class Incoming:
    """A request's first round: the path behind the model's name, and the body as TorchServe hands it over."""

    path: str
    body: object


class Exchange:
    """One request in flight and what of its answer is already gone."""

    def __init__(self, request_id: str, job: Job) -> None:
        self.answer = job.answer
        self.ids = [f"{request_id}/{index}" for index in range(len(job.prompts))]
        self.running = set(self.ids)
        self.begun = False
        self.sent_at = 0.0
        self.deadline = time.monotonic() + job.seconds

    def reply(self, service: Service) -> Reply | None:
        """What this round sends, if anything.

        TorchServe notices that a client has left only when it sends something, so an empty chunk goes out now and
        then; an answer that is not streamed goes out whole behind them, as the last one.
        """
        text = "".join(self._take(service, index) for index, name in enumerate(self.ids) if name in self.running)
        content_type = self.answer.content_type
        if not self.running:
            return Reply(text + self.answer.end(), False if self.begun else None, content_type=content_type)
        now = time.monotonic()
        if not text and now - self.sent_at < PROBE_SECONDS:
            return None
        self.begun, self.sent_at = True, now
        return Reply(text, True, content_type=content_type)

    def _take(self, service: Service, index: int) -> str:
        events = service.take(self.ids[index])
        if events and events[-1].finish_reason is not None:
            self.running.discard(self.ids[index])
        return self.answer.push(index, events)


class Rounds:
    """Keeps the exchanges between rounds. Used by one thread."""

    def __init__(self, service: Service, admit: Admission) -> None:
        self.service = service
        self.admit = admit
        self.exchanges: dict[str, Exchange] = {}
        self.refused = 0

    def run(self, active: Iterable[str], incoming: Mapping[str, Incoming]) -> dict[str, Reply]:
        """Play one round. Requests without a reply get nothing now and stay in flight."""
        self._forget(set(self.exchanges) - set(active))
        replies = {}
        for request_id, request in incoming.items():
            if reply := self._begin(request_id, request):
                replies[request_id] = reply
        if not replies:
            self.service.wait(timeout=ROUND_SECONDS)
        self._expire(time.monotonic())
        for request_id, exchange in list(self.exchanges.items()):
            if reply := exchange.reply(self.service):
                replies[request_id] = reply
                if reply.more is not True:
                    del self.exchanges[request_id]
        return replies

    def report(self, reporter: Reporter) -> None:
        """Export what has ended since the last round, a log line each, and the state now."""
        for record in self.service.take_records():
            reporter.request(record)
            logger.info("request %s", json.dumps(record.log_fields()))
        reporter.state(self.service.gauges(), {"requests_refused_total": self.refused, **self.service.totals()})

    def _begin(self, request_id: str, request: Incoming) -> Reply | None:
        try:
            job = self.admit(request.path, request.body)
        except Refusal as refusal:
            self.refused += 1
            return refusal.reply
        if isinstance(job, Reply):
            return job
        exchange = self.exchanges[request_id] = Exchange(request_id, job)
        for name, prompt in zip(exchange.ids, job.prompts, strict=True):
            self.service.submit(name, prompt.tokens, prompt.params, owner=job.owner)
        return None

    def _forget(self, gone: Iterable[str]) -> None:
        for request_id in gone:
            self.service.cancel(self.exchanges.pop(request_id).running)

    def _expire(self, now: float) -> None:
        """Requests past their time end where they are, with finish_reason "length"."""
        for exchange in self.exchanges.values():
            if now > exchange.deadline:
                self.service.cut_short(exchange.running)
