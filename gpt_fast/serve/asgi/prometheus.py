"""GET /metrics: the figures of serve/metrics.py in Prometheus's text, and the responses by path and status."""

from __future__ import annotations

from typing import Any

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
from gpt_fast.serve.metrics import COUNTERS, GAUGES, HISTOGRAMS, LABELS

PREFIX = "gpt_fast_"
MODEL = "model_name"
# vLLM's for a first token, which also suit the other durations, and below them what a small model needs.
SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0,
           40.0, 80.0, 160.0, 640.0, 2560.0)  # fmt: skip


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
        self._gauges = {n: Gauge(PREFIX + n, told, (MODEL,), registry=self.registry) for n, told in GAUGES.items()}
        self._counters = {
            name: Counter(PREFIX + name, told, (MODEL, *LABELS.get(name, ())[:1]), registry=self.registry)
            for name, told in COUNTERS.items()
        }
        self._histograms = {
            name: Histogram(PREFIX + name, told, (MODEL,), registry=self.registry, buckets=SECONDS)
            for name, told in HISTOGRAMS.items()
        }

    def name_model(self, model: str) -> None:
        """Every figure is there from here on, at 0: whoever looks at an increase must see where it began."""
        self.model = model
        for name in GAUGES:
            self._gauges[name].labels(model)
        for name, counter in self._counters.items():
            for values in [(value,) for value in LABELS[name][1]] if name in LABELS else [()]:
                counter.labels(model, *values)
        for histogram in self._histograms.values():
            histogram.labels(model)

    def emit(self, kind: str, name: str, value: float, label: str) -> None:
        if kind == "gauge":
            self._gauges[name].labels(self.model).set(value)
        elif kind == "counter":
            self._counters[name].labels(self.model, *([label] if label else [])).inc(value)
        else:
            self._histograms[name].labels(self.model).observe(value)

    def text(self) -> bytes:
        return generate_latest(self.registry)


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
