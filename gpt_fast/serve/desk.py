"""A request's beginning and end, the same at every door: admitted or refused, then its figures and its log line."""

from __future__ import annotations

import json
import logging
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

from gpt_fast.serve.exchange import (
    FAILED,
    Admission,
    Exchange,
    Incoming,
    Job,
    Refusal,
    Reply,
    failure,
    log_failure,
    with_headers,
)
from gpt_fast.serve.metrics import REFUSED, Reporter, RequestRecord, log_fields
from gpt_fast.serve.response import server_error
from gpt_fast.serve.service import Service

logger = logging.getLogger(__name__)

REPORT_SECONDS = 0.1  # how often figures are exported
ADMITTING = 2  # requests parsed and tokenized at a time: a long prompt takes a second, which nobody else waits for

Kind = TypeVar("Kind", bound=Exchange)


class Desk:
    """Of one service. `report` has a thread of its own; `begin` is the door's."""

    def __init__(self, service: Service, admit: Admission) -> None:
        self.service, self.admit = service, admit
        self.refused: Counter[str] = Counter()  # by reason
        self._pool = ThreadPoolExecutor(ADMITTING, thread_name_prefix="admit")
        self._reading: set[Future[Job | Reply]] = set()
        self._records: dict[str, list[RequestRecord]] = {}  # of requests some of whose sequences still run
        self._begun: dict[str, Exchange] = {}  # until all their sequences are recorded

    def read(self, incoming: Incoming) -> Future[Job | Reply]:
        """Have a request parsed and its prompt encoded, on another thread."""
        future = self._pool.submit(self.admit, incoming)
        self._reading.add(future)
        future.add_done_callback(self._reading.discard)
        return future

    def begin(
        self,
        request_id: str,
        incoming: Incoming,
        admitted: Future[Job | Reply],
        make: Callable[[str, Job, Incoming], Kind],
    ) -> Kind | Reply:
        """Submit what was admitted and return its exchange, made by `make`; or the reply of one that needs no model.

        admitted: what `read` returned for it, done.
        """
        try:
            job = admitted.result()
            if isinstance(job, Job):
                self.admit.confirm(job)
        except Refusal as refusal:
            return self._refuse(request_id, incoming, refusal.reply)
        except Exception as error:
            log_failure(request_id, error)
            return self._refuse(request_id, incoming, failure(server_error(FAILED)))
        if isinstance(job, Reply):
            return with_headers(job, incoming)
        exchange = self._begun[request_id] = make(request_id, job, incoming)
        for name, prompt in zip(exchange.ids, job.prompts, strict=True):
            self.service.submit(name, prompt.tokens, prompt.params, owner=job.owner, arrival=incoming.arrival)
        return exchange

    def _refuse(self, request_id: str, incoming: Incoming, reply: Reply) -> Reply:
        self.refused[REFUSED.get(reply.status, REFUSED[400])] += 1
        logger.info("request %s", json.dumps({**incoming.names(request_id), "status": reply.status}))
        return with_headers(reply, incoming)

    def report_forever(self, reporter: Reporter) -> None:
        """Export figures on a thread of their own: a door may do nothing while nobody is in flight."""

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
            exchange = self._begun[request_id]
            if len(records) == len(exchange.ids):
                del self._records[request_id], self._begun[request_id]
                logger.info("request %s", json.dumps(log_fields(exchange.incoming.names(request_id), records)))
        gauges = self.service.gauges()
        gauges["num_requests_waiting"] += len(self._reading)
        reporter.state(gauges, self.service.totals(), self.refused)
