"""A request on its way through the server, whichever door it came by: what it brings, what it needs, what it gets.

The doors (TorchServe's rounds.py, asgi/) differ in when they may speak to a client; what they say is made here and in
the answers of response.py. No torch here.
"""

from __future__ import annotations

import logging
import re
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Protocol

from gpt_fast.config import SamplingParams
from gpt_fast.serve.body import RequestError
from gpt_fast.serve.stamp import Stamp, fresh

if TYPE_CHECKING:
    from gpt_fast.llm import TextEvent

logger = logging.getLogger(__name__)

FAILED = "the server failed on this request"
CLIENT_ID = "x-client-request-id"


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
    keep it from being answered. stamp: makes its answer's.
    one_message: its answer must be one message, which is also the last: TorchServe 0.12 ends a call of Predictions with
    the first, and takes the client of StreamPredictions for gone after any but the last.
    """

    path: str
    body: object
    client_id: str = ""
    one_message: bool = False
    refused: RequestError | None = None
    stamp: Callable[[], Stamp] = fresh
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
    """One request in flight: which of its sequences still run, and the text of its answer that has not left yet."""

    def __init__(self, request_id: str, job: Job, incoming: Incoming) -> None:
        self.answer, self.incoming = job.answer, incoming
        self.ids = [f"{request_id}/{index}" for index in range(len(job.prompts))]
        self.running = set(self.ids)
        self.failed = False
        self.begun = False  # a status and perhaps some text have left
        self.text = ""
        self.deadline = incoming.arrival + job.seconds

    def take(self, name: str, events: list[TextEvent]) -> None:
        """Make a sequence's new events the answer's next text."""
        if events and events[-1].finish_reason is not None:
            self.running.discard(name)
            self.failed |= events[-1].finish_reason == "error"
        self.text += self.answer.push(self.ids.index(name), events)

    @property
    def failure(self) -> Reply | None:
        """The whole answer of one that failed before anything was sent."""
        if self.failed and not self.begun:
            return failure(self.answer.error_body("the model failed on this request"))
        return None

    def break_off(self) -> Reply:
        """The end of an answer that cannot go on: a status where none was sent, else the stream's own last word."""
        if not self.begun:
            return failure(self.answer.error_body(FAILED))
        return Reply(self.answer.broken(FAILED), False, content_type=self.answer.content_type)


def with_headers(reply: Reply, incoming: Incoming) -> Reply:
    more = False if incoming.one_message else reply.more
    return replace(reply, more=more, headers=reply.headers + incoming.headers)


def failure(body: str) -> Reply:
    return Reply(body, None, 500, "Internal Server Error", "application/json")


def log_failure(request_id: str, error: Exception) -> None:
    """The error's type and where it was raised. Its message stays out: it may quote what the client sent."""
    where = "".join(traceback.format_tb(error.__traceback__))
    logger.error("request %s failed: %s\n%s", request_id, type(error).__name__, where)
