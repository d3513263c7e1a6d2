"""One TorchServe round: who is in flight goes in, what each gets now comes out. No ts here, no tensors.

With continuousBatching TorchServe calls the handler again and again with every request in flight; a request's body
comes with its first round only, and an id that is missing has lost its client. An exception would reset every stream,
so whatever goes wrong with one request becomes that request's own answer.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Mapping
from concurrent.futures import Future

from gpt_fast.serve.desk import Desk
from gpt_fast.serve.exchange import Admission, Exchange, Incoming, Job, Reply, log_failure, with_headers
from gpt_fast.serve.service import Service

ROUND_SECONDS = 0.1  # the longest a round waits for a token: new requests join within it
REJOIN_SECONDS = 0.004  # the shortest round, right after an answer's end: its client may have another request at once
PROBE_SECONDS = 0.25  # a request that had nothing for this long gets an empty chunk, which finds out a gone client
MAX_PIECE = 1 << 20  # characters sent at once: TorchServe ends a worker whose message is over max_response_size
HEALTH = "health"  # the path that `scripts/serve.py watch` asks


class PacedExchange(Exchange):
    """An exchange and when TorchServe is to hear of it."""

    def __init__(self, request_id: str, job: Job, incoming: Incoming) -> None:
        super().__init__(request_id, job, incoming)
        self.whole = False  # nothing comes behind the text that is there
        self.spoke = False  # some text has left
        self.sent_at = incoming.arrival

    def reply(self, service: Service, *, interval: float) -> Reply | None:
        """What this round sends, if anything: the first text and the end at once, the rest every `interval` seconds.

        TorchServe notices that a client has left only when it sends something, so an empty chunk goes out now and
        then; an answer that is not streamed goes out whole behind them, as the last one.
        """
        for name in [name for name in self.ids if name in self.running]:
            self.take(name, service.take(name))
        if failed := self.failure:
            return failed
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


class Rounds:
    """Keeps the exchanges between rounds. Used by one thread; admission and the desk's reports have their own."""

    def __init__(self, service: Service, admit: Admission) -> None:
        self.service = service
        self.desk = Desk(service, admit)
        self.exchanges: dict[str, PacedExchange] = {}
        self._ended = -ROUND_SECONDS  # when an answer last ended
        self._admitting: dict[str, tuple[Incoming, Future[Job | Reply]]] = {}

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
            future = self.desk.read(request)
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
                begun = self.desk.begin(request_id, request, future, PacedExchange)
                if isinstance(begun, Reply):
                    replies[request_id] = begun
                else:
                    self.exchanges[request_id] = begun
        return replies

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
