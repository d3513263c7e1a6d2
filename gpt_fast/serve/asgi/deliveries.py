"""From the engine's thread to the event loop: what was decoded wakes the coroutines that send it.

First and last events come at once, the tokens between them together every `Service.pause()` seconds: each delivery
takes the processor from the engine for a moment. While streams run, one timer of the loop paces them; the engine's
thread calls the loop only when no delivery is due.
"""

from __future__ import annotations

import asyncio

from gpt_fast.serve.exchange import Exchange, Incoming, Job, log_failure
from gpt_fast.serve.service import Service


class LiveExchange(Exchange):
    """An exchange that a coroutine waits on."""

    def __init__(self, request_id: str, job: Job, incoming: Incoming) -> None:
        super().__init__(request_id, job, incoming)
        self.news = asyncio.Event()  # text to send, or the end, or one of those below
        self.gone = False  # the client has left
        self.broken = False  # the answer cannot go on

    def stop(self, *, gone: bool = False) -> None:
        """Nothing more of the model's comes: the client has left, or it is the server that cannot go on."""
        self.gone, self.broken = self.gone or gone, self.broken or not gone
        self.news.set()


class Deliveries:
    """Of one service, on one event loop: made there, and used there only."""

    def __init__(self, service: Service) -> None:
        self.service = service
        self.exchanges: set[LiveExchange] = set()
        self._loop = asyncio.get_running_loop()
        self._owners: dict[str, LiveExchange] = {}  # by sequence
        self._timer: asyncio.TimerHandle | None = None
        self._last = self._loop.time()
        self._called = self._urgent = False
        service.listen(self._tell)

    def join(self, exchange: LiveExchange) -> None:
        self.exchanges.add(exchange)
        self._owners |= dict.fromkeys(exchange.ids, exchange)

    def leave(self, exchange: LiveExchange) -> None:
        """What still runs of it is dropped."""
        self.exchanges.discard(exchange)
        for name in exchange.ids:
            del self._owners[name]
        self.service.cancel(exchange.running)

    def cut_short(self, exchange: LiveExchange) -> None:
        """Its time is up: it ends where it is, with finish_reason "length"."""
        self.service.cut_short(exchange.running)
        self._deliver()

    def stop_all(self) -> None:
        for exchange in self.exchanges:
            exchange.stop()

    def _tell(self, urgent: bool) -> None:
        """By the engine's thread: there is something to take."""
        if urgent:
            self._urgent = True
        if not self._called and (urgent or self._timer is None):
            self._called = True
            self._loop.call_soon_threadsafe(self._come)

    def _come(self) -> None:
        self._called = False  # first: what is told from here on calls again
        urgent, self._urgent = self._urgent, False
        wait = self._last + self.service.pause() - self._loop.time()
        if urgent or wait <= 0:
            self._deliver()
        elif self._timer is None:
            self._timer = self._loop.call_later(wait, self._deliver)

    def _deliver(self) -> None:
        """Hand everything out. The next delivery is due soon, unless this one had nothing to deliver."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._last = self._loop.time()
        news = self.service.take_all()
        for name, events in news.items():
            if exchange := self._owners.get(name):
                try:
                    exchange.take(name, events)
                except Exception as error:
                    log_failure(name.rpartition("/")[0], error)
                    exchange.stop()
                if exchange.text or not exchange.running:
                    exchange.news.set()
        pause = self.service.pause()
        if pause and news:
            self._timer = self._loop.call_later(pause, self._deliver)
