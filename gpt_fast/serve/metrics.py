"""The figures a server exports: vLLM's stems with the prefix gpt_fast_, in seconds and counts.

`deploy/metrics.yaml` declares them to TorchServe (a test holds the two together). Values go out a sequence, not a
token, and gauges only when they change: each is a line that TorchServe parses.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

SPECULATION_GAUGES = {
    "spec_decode_draft_acceptance_rate": "Share of all proposed tokens that were accepted.",
    "spec_decode_mean_accepted_length": "Proposed tokens accepted in a verified block, on average.",
}
GAUGES = {  # with what each says, as the doors' metrics endpoints do
    "num_requests_running": "Sequences that are being decoded.",
    "num_requests_waiting": "Sequences that wait for a slot.",
    "kv_cache_usage_perc": "Share of the KV cache's positions that running sequences occupy; 1 is all of it.",
    **SPECULATION_GAUGES,
}
COUNTERS = {
    "prompt_tokens_total": "Tokens of prompts.",
    "generation_tokens_total": "Tokens decoded.",
    "prefix_cache_queries_total": "Tokens of prompts that were looked up in the slots' prefixes.",
    "prefix_cache_hits_total": "Tokens of prompts that a slot held already.",
    "request_success_total": "Sequences that ended, by why: stop, length or error.",
    "requests_cancelled_total": "Sequences dropped because their client had left.",
    "requests_refused_total": "Requests that were refused, by why.",
    "recompiles_total": "Compilations since the warm-up: there should be none.",
    "spec_decode_num_drafts_total": "Blocks of proposed tokens that were verified.",
    "spec_decode_num_draft_tokens_total": "Tokens proposed.",
    "spec_decode_num_accepted_tokens_total": "Proposed tokens accepted.",
    "spec_decode_requests_total": "Sequences that ended, by whether any of their tokens were proposed: on or off.",
}
HISTOGRAMS = {
    "time_to_first_token_seconds": "From a request's arrival to its first token.",
    "inter_token_latency_seconds": "From one token of a sequence to the next, its mean.",
    "e2e_request_latency_seconds": "From a request's arrival to its end.",
    "request_queue_time_seconds": "From a request's arrival to its slot.",
    "request_prefill_time_seconds": "From the slot to the first token.",
    "request_decode_time_seconds": "From the first token to the end.",
}
REFUSED = {  # why a request got no answer, by the status that it got; any other: invalid
    400: "invalid",
    403: "foreign_page",
    404: "not_found",
    413: "too_large",
    429: "queue_full",
    500: "error",
    503: "draining",
}
LABELS = {  # of counters that say more than how many: the label and its values
    "request_success_total": ("finished_reason", ("stop", "length", "error")),
    "requests_refused_total": ("reason", tuple(REFUSED.values())),
    "spec_decode_requests_total": ("speculation", ("on", "off")),
}

# What vLLM calls the same figures, behind its prefix "vllm:". Those that are not here say what it has no name for.
OF_VLLM = {
    **{
        name: name
        for name in (
            "num_requests_running",
            "num_requests_waiting",
            "kv_cache_usage_perc",
            "prompt_tokens_total",
            "generation_tokens_total",
            "prefix_cache_queries_total",
            "prefix_cache_hits_total",
            "request_success_total",
            "spec_decode_num_drafts_total",
            "spec_decode_num_draft_tokens_total",
            "spec_decode_num_accepted_tokens_total",
            "time_to_first_token_seconds",
            "e2e_request_latency_seconds",
            "request_queue_time_seconds",
            "request_prefill_time_seconds",
            "request_decode_time_seconds",
        )
    },
    "inter_token_latency_seconds": "request_time_per_output_token_seconds",  # vLLM's own of our name has every gap
}

Emit = Callable[[str, str, float, str], None]  # kind ("gauge", "counter", "histogram"), name, value, label or ""


@dataclass(frozen=True)
class RequestRecord:
    """One sequence's way through the engine; times in seconds of one monotonic clock, None where it never came."""

    request_id: str
    finish_reason: str  # "stop", "length", "error", "cancelled"
    prompt_tokens: int
    reused_tokens: int
    generation_tokens: int
    arrival: float
    started: float | None
    first_token: float | None
    ended: float
    drafted_tokens: int = 0
    accepted_tokens: int = 0

    @property
    def speculation(self) -> str:
        """Whether any of the sequence's tokens were proposed rather than decoded one by one: "on" or "off"."""
        return "on" if self.drafted_tokens else "off"

    def durations(self) -> dict[str, float]:
        """The histograms' values, by name; those that never happened are left out."""
        values = {"e2e_request_latency_seconds": self.ended - self.arrival}
        if self.started is not None:
            values["request_queue_time_seconds"] = self.started - self.arrival
        if self.started is not None and self.first_token is not None:
            values["time_to_first_token_seconds"] = self.first_token - self.arrival
            values["request_prefill_time_seconds"] = self.first_token - self.started
            values["request_decode_time_seconds"] = self.ended - self.first_token
            if self.generation_tokens > 1:
                mean_gap = (self.ended - self.first_token) / (self.generation_tokens - 1)
                values["inter_token_latency_seconds"] = mean_gap
        return values


def log_fields(named: Mapping[str, str], records: Sequence[RequestRecord]) -> dict[str, Any]:
    """One structured log line for a request and all its sequences; it never holds a prompt or an answer.

    named: the request's ids.
    Durations are seconds, of the sequence for which each was longest.
    """
    durations: dict[str, float] = {}
    for record in records:
        for name, value in record.durations().items():
            durations[name] = max(value, durations.get(name, 0.0))
    return {
        **named,
        "sequences": len(records),
        "finish_reasons": sorted({record.finish_reason for record in records}),
        "prompt_tokens": sum(record.prompt_tokens for record in records),
        "reused_tokens": sum(record.reused_tokens for record in records),
        "generation_tokens": sum(record.generation_tokens for record in records),
        **speculation_fields(records),
        **{name.removesuffix("_seconds") + "_s": round(value, 4) for name, value in durations.items()},
    }


def speculation_fields(records: Sequence[RequestRecord]) -> dict[str, Any]:
    """Of a request's log line; the rate is there only where something was drafted."""
    drafted, accepted = (sum(getattr(r, name) for r in records) for name in ("drafted_tokens", "accepted_tokens"))
    fields: dict[str, Any] = {"speculation": "on" if drafted else "off"}
    if drafted:
        fields |= {"drafted_tokens": drafted, "accepted_tokens": accepted}
        fields["acceptance_rate"] = round(accepted / drafted, 4)
    return fields


class SpeculationTotals(Protocol):
    """What speculator.Totals counts since the start: blocks verified, proposals in them, and those that stood."""

    steps: int
    drafted: int
    accepted: int


def speculation_totals(totals: SpeculationTotals) -> dict[str, float]:
    """As the counters that `Reporter.state` takes."""
    return {
        "spec_decode_num_drafts_total": totals.steps,
        "spec_decode_num_draft_tokens_total": totals.drafted,
        "spec_decode_num_accepted_tokens_total": totals.accepted,
    }


def speculation_gauges(totals: Mapping[str, float]) -> dict[str, float]:
    """Over all blocks so far: the share of proposals that stood, and how many stood a block; 0 before the first."""
    drafts, drafted, accepted = (
        totals.get(f"spec_decode_num_{name}_total", 0) for name in ("drafts", "draft_tokens", "accepted_tokens")
    )
    values = (accepted / drafted if drafted else 0, accepted / drafts if drafts else 0)
    return {name: round(value, 4) for name, value in zip(SPECULATION_GAUGES, values, strict=True)}


class Reporter:
    """Turns records and gauges into emitted figures."""

    def __init__(self, emit: Emit) -> None:
        self.emit = emit
        self.gauges: dict[str, float] = {}
        self.totals: dict[tuple[str, str], float] = {}  # by name and label

    def sequence(self, record: RequestRecord) -> None:
        counts: dict[str, float] = {
            "prompt_tokens_total": record.prompt_tokens,
            "generation_tokens_total": record.generation_tokens,
            "prefix_cache_queries_total": record.prompt_tokens,
            "prefix_cache_hits_total": record.reused_tokens,
        }
        for name, value in counts.items():
            self.emit("counter", name, value, "")
        if record.finish_reason == "cancelled":
            self.emit("counter", "requests_cancelled_total", 1, "")
        else:
            self.emit("counter", "request_success_total", 1, record.finish_reason)
            self.emit("counter", "spec_decode_requests_total", 1, record.speculation)
            for name, value in record.durations().items():
                self.emit("histogram", name, value, "")

    def state(self, gauges: Mapping[str, float], totals: Mapping[str, float], refused: Mapping[str, int]) -> None:
        """Gauges that have changed, those of speculation among them, and running totals as their increase.

        refused: how many requests, by the reason as REFUSED has it.
        """
        gauges = {**gauges, **speculation_gauges(totals)}
        for name, value in gauges.items():
            if self.gauges.get(name) != value:
                self.emit("gauge", name, value, "")
        self.gauges = gauges
        for name, value in totals.items():
            self._grown(name, value, "")
        for reason in REFUSED.values():
            self._grown("requests_refused_total", refused.get(reason, 0), reason)

    def _grown(self, name: str, total: float, label: str) -> None:
        """The first time also a total of 0: whoever looks at an increase must see where it began."""
        before = self.totals.get((name, label))
        if before is None or total > before:
            self.emit("counter", name, total - (before or 0), label)
            self.totals[name, label] = total
