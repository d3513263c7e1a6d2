"""One engine answers rows, and is kept full: while it decodes, the next requests are read on another thread."""

from __future__ import annotations

import dataclasses
import time
from collections import deque
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

from gpt_fast.batch.batch_file import Row
from gpt_fast.batch.dealer import Deal, Done, Trade
from gpt_fast.batch.lines import Line, LineError, Names, answer_line, error_line, parse_line
from gpt_fast.llm import Engine, TextEvent
from gpt_fast.serve.admission import Admit, Limits
from gpt_fast.serve.exchange import FAILED, Exchange, Incoming, Job, Prompt, Refusal, Reply, failure, log_failure
from gpt_fast.serve.response import server_error
from gpt_fast.serve.stamp import derived

AGAIN_SECONDS = 0.1  # until a dealer that had nothing is asked again
NO_LIMITS = Limits(max_new_tokens=1, stream=False, max_waiting=1 << 20, max_seconds=1e9)


@dataclass(frozen=True)
class Plan:
    """What decides a row's answer beside the model. defaults: fields of the bodies that do not have them.

    seed: of the requests that have none; model_names: what they may call the model, of which answers carry the first.
    """

    input_sha256: str
    seed: int
    defaults: Mapping[str, Any]
    model_names: tuple[str, ...]


class Asked(Exchange):
    """A row in flight."""

    def __init__(self, names: Names, line: Line, job: Job, incoming: Incoming) -> None:
        super().__init__(str(names.number), job, incoming)
        self.names, self.line, self.tokens = names, line, 0

    def take(self, name: str, events: list[TextEvent]) -> None:
        """What the cache held depends on who else was served, and the answer must not."""
        self.tokens += sum(event.token is not None for event in events)
        super().take(name, [dataclasses.replace(e, cached_tokens=0) if e.cached_tokens else e for e in events])

    def done(self) -> Done:
        failed = self.failure
        status, body = (failed.status, failed.text) if failed else (200, self.text + self.answer.end())
        line = answer_line(self.names, self.line.custom_id, status=status, body=body)
        return Done(self.names.number, line, self.tokens)


class Reader:
    """From a row to what the engine needs for it, or to its answer at once."""

    def __init__(self, engine: Engine, plan: Plan) -> None:
        self.plan = plan
        names = plan.model_names
        self.admit = Admit(engine, in_flight=lambda: 0, limits=NO_LIMITS, model_names=names, draining=lambda: False)

    def __call__(self, row: Row) -> tuple[Asked, Sequence[Prompt]] | Done:
        number, text = row
        names = Names(self.plan.input_sha256, number)
        try:
            line = parse_line(text, number, self.plan.defaults)
        except LineError as error:
            return Done(number, error_line(names, error), 0)
        incoming = Incoming(line.path, line.body, stamp=partial(derived, names.stem))
        job = self.job(incoming)
        if isinstance(job, Reply):
            return Done(number, answer_line(names, line.custom_id, status=job.status, body=job.text), 0)
        base = names.seed(self.plan.seed)
        return Asked(names, line, job, incoming), [seeded(p, base + i) for i, p in enumerate(job.prompts)]

    def job(self, incoming: Incoming) -> Job | Reply:
        """What a server would do with it, or say at once."""
        try:
            return self.admit(incoming)
        except Refusal as refusal:
            return refusal.reply
        except Exception as error:
            log_failure("of the batch", error)
            return failure(server_error(FAILED))


def seeded(prompt: Prompt, seed: int) -> Prompt:
    """With this seed where it has none."""
    if prompt.params.seed is not None:
        return prompt
    return dataclasses.replace(prompt, params=dataclasses.replace(prompt.params, seed=seed))


class Answering:
    """One engine's run through what a dealer gives. The thread that calls `run` is the engine's."""

    def __init__(self, engine: Engine, plan: Plan, trade: Trade) -> None:
        self.engine, self.read, self.trade = engine, Reader(engine, plan), trade
        self.most = 2 * engine.slots  # rows held here: those in slots, and those that take the slots that fall free
        self.reading: deque[Future[tuple[Asked, Sequence[Prompt]] | Done]] = deque()
        self.running: dict[str, Asked] = {}  # by sequence
        self.events: dict[str, list[TextEvent]] = {}
        self.done: list[Done] = []
        self.held = 0  # rows
        self.ask_at = 0.0
        self.over = False

    def run(self) -> None:
        """Return when no rows are left."""
        with ThreadPoolExecutor(1, thread_name_prefix="read") as pool:
            while not (self.over and not self.held):
                self.exchange(pool)
                self.begin()
                if not self.engine.idle:
                    self.step()
                elif not self.reading and not self.done and not self.over:
                    time.sleep(max(0.0, self.ask_at - time.monotonic()))

    def exchange(self, pool: ThreadPoolExecutor) -> None:
        """Give what is done, and take as much as there is room for."""
        want = self.most - self.held if time.monotonic() >= self.ask_at else 0
        if not self.done and not want:
            return
        done, self.done = self.done, []
        deal: Deal = self.trade(done, want)
        self.over = deal.over
        self.held += len(deal.rows)
        if want and not deal.rows:
            self.ask_at = time.monotonic() + AGAIN_SECONDS
        self.reading.extend(pool.submit(self.read, row) for row in deal.rows)

    def begin(self) -> None:
        """Give the engine what is read, in order; wait for it only where there is nothing else to do."""
        while self.reading and (self.reading[0].done() or self.engine.idle):
            read = self.reading.popleft().result()
            if isinstance(read, Done):
                self.finish(read)
            else:
                self.start(*read)

    def start(self, asked: Asked, prompts: Sequence[Prompt]) -> None:
        try:
            for name, prompt in zip(asked.ids, prompts, strict=True):
                self.engine.add(name, prompt.tokens, prompt.params)
                self.running[name], self.events[name] = asked, []
        except ValueError:  # the engine's own checks, behind the reader's
            for name in asked.ids:
                self.engine.abort(name)
                self.running.pop(name, None)
                self.events.pop(name, None)
            body = failure(asked.answer.error_body(FAILED)).text
            line = answer_line(asked.names, asked.line.custom_id, status=500, body=body)
            self.finish(Done(asked.names.number, line, 0))

    def step(self) -> None:
        """Events are kept until their sequence ends, and folded then: while a step runs, every core is the engine's."""
        for event in self.engine.step():
            events = self.events[event.request_id]
            events.append(event)
            if event.finish_reason is not None:
                asked = self.running.pop(event.request_id)
                asked.take(event.request_id, self.events.pop(event.request_id))
                if not asked.running:
                    self.finish(asked.done())

    def finish(self, done: Done) -> None:
        self.done.append(done)
        self.held -= 1
