"""GET /metrics: the figures of serve/metrics.py in Prometheus's text, by our names and by vLLM's, and the responses by
path and status.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    disable_created_metrics,
    generate_latest,
)

from gpt_fast.serve.asgi.door import Receive, Scope, Send
from gpt_fast.serve.metrics import COUNTERS, GAUGES, HISTOGRAMS, LABELS, OF_VLLM, Reporter, RequestRecord

MODEL, ENGINE = "model_name", "engine"  # vLLM's labels; it numbers its engines, here there is one
# vLLM's for a first token, which also suit the other durations, and below them what a small model needs.
SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0,
           40.0, 80.0, 160.0, 640.0, 2560.0)  # fmt: skip
GAP = "inter_token_latency_seconds"


class Figure(NamedTuple):
    """A figure under one of its names, and the values of its labels between the model's and its own."""

    metric: Any
    between: tuple[str, ...]


class Figures:
    """One registry. `emit` is Reporter's; the model's name, a label of every figure, must be set before."""

    def __init__(self) -> None:
        self.model = ""
        disable_created_metrics()  # type: ignore[no-untyped-call]  # a second sample of each, with the time it began at
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        self.responses = Counter(
            "http_requests_total",
            "Requests answered, by path, method and status.",
            ("handler", "method", "status"),
            registry=self.registry,
        )
        histogram = partial(Histogram, buckets=SECONDS)
        self._figures = {
            name: list(self._named(make, name, told))
            for make, table in ((Gauge, GAUGES), (Counter, COUNTERS), (histogram, HISTOGRAMS))
            for name, told in table.items()
        }
        told = "From one token of a sequence to the next, as its mean for each of them."
        self._gaps = Figure(histogram(f"vllm:{GAP}", told, (MODEL, ENGINE), registry=self.registry), ("0",))

    def _named(self, make: Any, name: str, told: str) -> Iterator[Figure]:
        own = LABELS[name][:1] if name in LABELS else ()
        yield Figure(make(f"gpt_fast_{name}", told, (MODEL, *own), registry=self.registry), ())
        if name in OF_VLLM:
            metric = make(f"vllm:{OF_VLLM[name]}", told, (MODEL, ENGINE, *own), registry=self.registry)
            yield Figure(metric, ("0",))

    def name_model(self, model: str) -> None:
        """Every figure is there from here on, at 0: whoever looks at an increase must see where it began."""
        self.model = model
        for name in self._figures:
            for value in LABELS[name][1] if name in LABELS else ("",):
                self._of(name, value)
        self._aborted()
        self._child(self._gaps)

    def emit(self, kind: str, name: str, value: float, label: str) -> None:
        for metric in self._of(name, label):
            if kind == "gauge":
                metric.set(value)
            elif kind == "counter":
                metric.inc(value)
            else:
                metric.observe(value)

    def sequence(self, record: RequestRecord) -> None:
        """What vLLM tells of a sequence that is no figure of ours: each of its gaps, and that its client has left."""
        if record.finish_reason == "cancelled":
            self._aborted().inc()
        elif gap := record.durations().get(GAP):
            gaps = self._child(self._gaps)
            for _ in range(record.generation_tokens - 1):
                gaps.observe(gap)

    def _aborted(self) -> Any:
        return self._child(self._figures["request_success_total"][1], "abort")

    def _of(self, name: str, label: str) -> list[Any]:
        return [self._child(figure, *filter(None, [label])) for figure in self._figures[name]]

    def _child(self, figure: Figure, *label: str) -> Any:
        return figure.metric.labels(self.model, *figure.between, *label)

    def text(self) -> bytes:
        return generate_latest(self.registry)


class FiguresReporter(Reporter):
    """Reports to Figures, under vLLM's names, too."""

    def __init__(self, figures: Figures) -> None:
        super().__init__(figures.emit)
        self.figures = figures

    def sequence(self, record: RequestRecord) -> None:
        super().sequence(record)
        self.figures.sequence(record)


class Counted:
    """ASGI middleware that counts responses. known: the paths that are told apart; any other is "other"."""

    def __init__(self, app: Any, figures: Figures, known: frozenset[str]) -> None:
        self.app, self.figures, self.known = app, figures, known

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            return await self.app(scope, receive, send)  # type: ignore[no-any-return]
        path, method = scope["path"], scope["method"]
        handler = path if path in self.known else "other"

        async def counted(message: Any) -> None:
            if message["type"] == "http.response.start":
                self.figures.responses.labels(handler, method, message["status"]).inc()
            await send(message)

        await self.app(scope, receive, counted)
