"""One TorchServe round: who is in flight goes in, what each gets now comes out. No ts here, no tensors.

With continuousBatching TorchServe calls the handler again and again with every request in flight; a request's body
comes with its first round only, and an id that is missing has lost its client. An exception would reset every stream,
so whatever goes wrong with one request becomes that request's own answer.
"""

from __future__ import annotations

import json
import logging
import re
import threading
import time
import traceback
from collections.abc import Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Protocol

from gpt_fast.config import SamplingParams
from gpt_fast.llm import TextEvent
from gpt_fast.serve.body import RequestError
from gpt_fast.serve.metrics import Reporter, RequestRecord, log_fields
from gpt_fast.serve.response import server_error
from gpt_fast.serve.service import Service

logger = logging.getLogger(__name__)

ROUND_SECONDS = 0.1  # the longest a round waits for a token: new requests join within it
REJOIN_SECONDS = 0.004  # the shortest round, right after an answer's end: its client may have another request at once
PROBE_SECONDS = 0.25  # a request that had nothing for this long gets an empty chunk, which finds out a gone client
REPORT_SECONDS = 0.1  # how often figures are exported
MAX_PIECE = 1 << 20  # characters sent at once: TorchServe ends a worker whose message is over max_response_size
FAILED = "the server failed on this request"
CLIENT_ID = "x-client-request-id"
HEALTH = "health"  # the path that `scripts/serve.py watch` asks
ADMITTING = 2  # requests parsed and tokenized at a time: a long prompt takes a second, which nobody else waits for


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

    def error_body(self, message: str) -> str:
        """The body of a failure, where nothing was sent."""

    def broken(self, message: str) -> str:
        """The end of an answer that has begun and cannot go on."""


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


@dataclass(frozen=True)
class Incoming:
    """A request's first round: the path behind the model's name, and the body as TorchServe hands it over.

    client_id: the client's own id for it, "" where it has none; see `client_id_of`. refused: why its headers alone
    keep it from being answered.
    one_message: its answer must be one message, which is also the last: TorchServe 0.12 ends a call of Predictions with
    the first, and takes the client of StreamPredictions for gone after any but the last.
    """

    path: str
    body: object
    client_id: str = ""
    one_message: bool = False
    refused: RequestError | None = None
    arrival: float = field(default_factory=time.monotonic)

    @property
    def headers(self) -> tuple[tuple[str, str], ...]:
        """What every answer to it has. TorchServe overwrites x-request-id with an id of its own."""
        return ((CLIENT_ID, self.client_id),) if self.client_id else ()

    def names(self, request_id: str) -> dict[str, str]:
        """The request's ids, for the log."""
        return {"request_id": request_id} | ({"client_request_id": self.client_id} if self.client_id else {})


def client_id_of(headers: Mapping[str, str]) -> str:
    """What a client calls its request, in x-request-id; "" where it does not, or not fit for headers and logs."""
    given = {name.lower(): value for name, value in headers.items()}.get("x-request-id", "")
    return given if re.fullmatch(r"[!-~]{1,128}", given) else ""


class Admission(Protocol):
    def __call__(self, incoming: Incoming) -> Job | Reply:
        """Parse one request. A Reply is a complete response (a model list, a page). Raises Refusal.

        Called from several threads.
        """

    def confirm(self, job: Job) -> None:
        """The last word on an admitted request, by the rounds' thread, just before it begins. Raises Refusal."""


class Exchange:
    """One request in flight and what of its answer is already gone."""

    def __init__(self, request_id: str, job: Job, incoming: Incoming) -> None:
        self.answer, self.incoming = job.answer, incoming
        self.ids = [f"{request_id}/{index}" for index in range(len(job.prompts))]
        self.running = set(self.ids)
        self.failed = False
        self.begun = False
        self.text = ""  # held back until the next chunk is due
        self.whole = False  # nothing comes behind it
        self.spoke = False  # some text has left
        self.sent_at = incoming.arrival
        self.deadline = incoming.arrival + job.seconds

    def reply(self, service: Service, *, interval: float) -> Reply | None:
        """What this round sends, if anything: the first text and the end at once, the rest every `interval` seconds.

        TorchServe notices that a client has left only when it sends something, so an empty chunk goes out now and
        then; an answer that is not streamed goes out whole behind them, as the last one.
        """
        self.text += "".join(self._take(service, index) for index, name in enumerate(self.ids) if name in self.running)
        if self.failed and not self.begun:
            return failure(self.answer.error_body("the model failed on this request"))
        if not self.running:
            return self._last()
        if self.incoming.one_message:
            return None
        now = time.monotonic()
        if now - self.sent_at < self._patience(interval):
            return None
        text = self._piece()
        self.begun, self.spoke, self.sent_at = True, self.spoke or bool(text), now
        return Reply(text, True, content_type=self.answer.content_type)

    def _last(self) -> Reply:
        """The rest of the answer, or the next piece of a long one."""
        if not self.whole:
            self.text, self.whole = self.text + self.answer.end(), True
        text = self._piece()
        more = True if self.text else (False if self.begun else None)
        self.begun = True
        return Reply(text, more, content_type=self.answer.content_type)

    def _piece(self) -> str:
        """Of the text that is there, what one message may hold."""
        end = len(self.text) if self.incoming.one_message else MAX_PIECE
        text, self.text = self.text[:end], self.text[end:]
        return text

    def _patience(self, interval: float) -> float:
        """Seconds from the last chunk to the next."""
        if not self.text:
            return PROBE_SECONDS
        return interval / 2 if self.spoke else 0.0  # a chunk that is nearly due goes with this round

    def break_off(self) -> Reply:
        """The end of an answer that cannot go on: a status where none was sent, else the stream's own last word."""
        if not self.begun:
            return failure(self.answer.error_body(FAILED))
        return Reply(self.answer.broken(FAILED), False, content_type=self.answer.content_type)

    def _take(self, service: Service, index: int) -> str:
        events = service.take(self.ids[index])
        if events and events[-1].finish_reason is not None:
            self.running.discard(self.ids[index])
            self.failed |= events[-1].finish_reason == "error"
        return self.answer.push(index, events)


class Rounds:
    """Keeps the exchanges between rounds. Used by one thread; admission and reports have their own."""

    def __init__(self, service: Service, admit: Admission) -> None:
        self.service = service
        self.admit = admit
        self.exchanges: dict[str, Exchange] = {}
        self.refused = 0
        self._ended = -ROUND_SECONDS  # when an answer last ended
        self._admitting: dict[str, tuple[Incoming, Future[Job | Reply]]] = {}
        self._pool = ThreadPoolExecutor(ADMITTING, thread_name_prefix="admit")
        self._records: dict[str, list[RequestRecord]] = {}  # of requests some of whose sequences still run
        self._unrecorded: dict[str, Exchange] = {}  # until all their sequences are recorded

    def knows(self, request_id: str) -> bool:
        """Whether the request's first round was played."""
        return request_id in self.exchanges or request_id in self._admitting

    def run(self, active: Iterable[str], incoming: Mapping[str, Incoming]) -> dict[str, Reply]:
        """Play one round. Requests without a reply get nothing now and stay in flight."""
        self._forget(active)
        looks = {name: self.health() for name, request in incoming.items() if request.path.strip("/") == HEALTH}
        if looks:
            self.service.wake()
        for request_id, request in incoming.items():
            if request_id in looks:
                continue
            future = self._pool.submit(self.admit, request)
            self._admitting[request_id] = request, future
            future.add_done_callback(lambda _: self.service.wake())
        end = time.monotonic() + (ROUND_SECONDS if incoming else self._round_seconds())
        while True:
            self.service.wait(timeout=max(end - time.monotonic(), 0))
            replies = self._settle() | self._replies()
            if any(reply.more is not True for reply in replies.values()):
                self._ended = time.monotonic()
            if replies or looks or time.monotonic() >= end:
                return replies | looks

    def health(self) -> Reply:
        """That rounds are played, and how the engine does: an answer without it, whoever is served or waits."""
        told = {"in_flight": self.service.in_flight(), "step_seconds": round(self.service.step_seconds(), 3)}
        return Reply(json.dumps({"status": "ok", **told}), None, content_type="application/json")

    def description(self) -> Reply:
        """What the management port's `?customized=true` adds to a model's description.

        It says that nothing more will come, or TorchServe 0.12 would count the job among those that run.
        """
        return Reply(json.dumps(self.service.engine.description.as_dict()), False, content_type="application/json")

    def _round_seconds(self) -> float:
        """How long a round lasts that brings nothing: only between rounds do requests join. Soon after an answer's end
        they are likely, so it is as long as none has ended, within bounds."""
        return min(max(time.monotonic() - self._ended, REJOIN_SECONDS), ROUND_SECONDS)

    def _forget(self, active: Iterable[str]) -> None:
        """Drop what has lost its client."""
        known = set(active)
        for request_id in self.exchanges.keys() - known:
            self.service.cancel(self.exchanges.pop(request_id).running)
        for request_id in self._admitting.keys() - known:
            self._admitting.pop(request_id)[1].cancel()

    def _settle(self) -> dict[str, Reply]:
        """Start the requests whose admission is done; the replies of those that need no model."""
        replies = {}
        for request_id, (request, future) in list(self._admitting.items()):
            if future.done():
                del self._admitting[request_id]
                if reply := self._begin(request_id, request, future):
                    replies[request_id] = reply
        return replies

    def _begin(self, request_id: str, request: Incoming, future: Future[Job | Reply]) -> Reply | None:
        try:
            job = future.result()
            if isinstance(job, Job):
                self.admit.confirm(job)
        except Refusal as refusal:
            return self._refuse(request_id, request, refusal.reply)
        except Exception as error:
            log_failure(request_id, error)
            return self._refuse(request_id, request, failure(server_error(FAILED)))
        if isinstance(job, Reply):
            return with_headers(job, request)
        exchange = self.exchanges[request_id] = self._unrecorded[request_id] = Exchange(request_id, job, request)
        for name, prompt in zip(exchange.ids, job.prompts, strict=True):
            self.service.submit(name, prompt.tokens, prompt.params, owner=job.owner, arrival=request.arrival)
        return None

    def _refuse(self, request_id: str, request: Incoming, reply: Reply) -> Reply:
        self.refused += 1
        logger.info("request %s", json.dumps({**request.names(request_id), "status": reply.status}))
        return with_headers(reply, request)

    def _replies(self) -> dict[str, Reply]:
        replies = {}
        now, interval = time.monotonic(), self.service.pause()
        for request_id, exchange in list(self.exchanges.items()):
            try:
                if now > exchange.deadline:  # it ends where it is, with finish_reason "length"
                    self.service.cut_short(exchange.running)
                reply = exchange.reply(self.service, interval=interval)
            except Exception as error:
                log_failure(request_id, error)
                reply = exchange.break_off()
            if reply is None:
                continue
            replies[request_id] = with_headers(reply, exchange.incoming)
            if reply.more and exchange.whole:
                self.service.wake()  # the next piece is there
            if reply.more is not True:
                del self.exchanges[request_id]
                self.service.cancel(exchange.running)  # of a failed one, the other sequences
        return replies

    # ---------------------------------------------------------------------------------------- figures

    def report_forever(self, reporter: Reporter) -> None:
        """Export figures on a thread of their own: TorchServe plays no rounds while nobody is in flight."""

        def loop() -> None:
            while True:
                try:
                    self.report(reporter)
                except Exception:  # figures are no reason to fail, but a reason to look
                    logger.exception("figures could not be exported")
                time.sleep(REPORT_SECONDS)

        threading.Thread(target=loop, name="figures", daemon=True).start()

    def report(self, reporter: Reporter) -> None:
        """Export the sequences that have ended since the last report, and the state now; log requests that ended."""
        for record in self.service.take_records():
            reporter.sequence(record)
            request_id = record.request_id.rpartition("/")[0]
            records = self._records.setdefault(request_id, [])
            records.append(record)
            exchange = self._unrecorded[request_id]
            if len(records) == len(exchange.ids):
                del self._records[request_id], self._unrecorded[request_id]
                logger.info("request %s", json.dumps(log_fields(exchange.incoming.names(request_id), records)))
        gauges = self.service.gauges()
        gauges["num_requests_waiting"] += len(self._admitting)
        reporter.state(gauges, {"requests_refused_total": self.refused, **self.service.totals()})


def with_headers(reply: Reply, incoming: Incoming) -> Reply:
    more = False if incoming.one_message else reply.more
    return replace(reply, more=more, headers=reply.headers + incoming.headers)


def failure(body: str) -> Reply:
    return Reply(body, None, 500, "Internal Server Error", "application/json")


def log_failure(request_id: str, error: Exception) -> None:
    """The error's type and where it was raised. Its message stays out: it may quote what the client sent."""
    where = "".join(traceback.format_tb(error.__traceback__))
    logger.error("request %s failed: %s\n%s", request_id, type(error).__name__, where)
