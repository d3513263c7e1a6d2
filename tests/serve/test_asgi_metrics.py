"""/metrics of the ASGI door, read by Prometheus's own parser: vLLM's names beside ours, refusals by why."""

from __future__ import annotations

import time

import pytest
from prometheus_client.parser import text_string_to_metric_families

from gpt_fast.serve.metrics import OF_VLLM
from support.asgi_server import AsgiServer
from support.waiting import wait_until

COMPLETIONS = "/v1/completions"
BODY = {"prompt": "a prompt", "temperature": 0, "ignore_eos": True}
# As vLLM's own page of metrics has them (v1); the parser takes _total from counters.
NAMES = {
    "gauge": {"num_requests_running", "num_requests_waiting", "kv_cache_usage_perc"},
    "counter": {
        "prompt_tokens",
        "generation_tokens",
        "prefix_cache_queries",
        "prefix_cache_hits",
        "request_success",
        "spec_decode_num_drafts",
        "spec_decode_num_draft_tokens",
        "spec_decode_num_accepted_tokens",
    },
    "histogram": {
        "time_to_first_token_seconds",
        "inter_token_latency_seconds",
        "request_time_per_output_token_seconds",
        "e2e_request_latency_seconds",
        "request_queue_time_seconds",
        "request_prefill_time_seconds",
        "request_decode_time_seconds",
    },
}
Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]


@pytest.fixture
def server():
    with AsgiServer() as server:
        yield server


def read(server: AsgiServer) -> Samples:
    text = server.call("/metrics", method="GET").text
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def value(samples: Samples, name: str, **labels: str) -> float:
    """The one sample of a name that has these labels among its own."""
    (found,) = [v for (n, ls), v in samples.items() if n == name and labels.items() <= dict(ls).items()]
    return found


def ended(server: AsgiServer, sequences: int) -> Samples:
    """The figures once so many sequences are among them: they come ten times a second."""
    name = "vllm:request_success_total"
    wait_until(lambda: sum(v for (n, _), v in read(server).items() if n == name) >= sequences)
    return read(server)


def test_vllms_figures_are_there_from_the_start_with_its_labels_and_help(server):
    text = server.call("/metrics", method="GET").text
    families = [f for f in text_string_to_metric_families(text) if f.name.startswith("vllm:")]
    named = {kind: {f.name.removeprefix("vllm:") for f in families if f.type == kind} for kind in NAMES}
    assert named == NAMES and len(families) == sum(map(len, NAMES.values()))
    for family in families:
        assert family.documentation and family.samples
        for sample in family.samples:
            assert (sample.labels["model_name"], sample.labels["engine"]) == ("gpt-fast", "0")
    reasons = {s.labels["finished_reason"] for f in families if f.name == "vllm:request_success" for s in f.samples}
    assert reasons == {"stop", "length", "error", "abort"}


def test_both_names_say_the_same_and_every_gap_counts(server):
    for count in (5, 9):
        assert server.call(COMPLETIONS, BODY | {"max_tokens": count}).status == 200
    samples = ended(server, 2)
    for ours, theirs in OF_VLLM.items():
        for (name, labels), number in samples.items():
            stem = name.removeprefix(f"gpt_fast_{ours}")
            if stem != name and stem in ("", "_sum", "_count"):
                assert value(samples, f"vllm:{theirs}{stem}", **dict(labels)) == number, name
    assert value(samples, "vllm:generation_tokens_total") == 5 + 9
    assert value(samples, "vllm:request_success_total", finished_reason="length") == 2
    assert value(samples, "vllm:request_time_per_output_token_seconds_count") == 2
    assert value(samples, "vllm:inter_token_latency_seconds_count") == 4 + 8
    gaps, decoded = (value(samples, f"vllm:{n}_seconds_sum") for n in ("inter_token_latency", "request_decode_time"))
    assert gaps == pytest.approx(decoded)


def test_a_client_that_leaves_is_vllms_abort(server, monkeypatch):
    step = server.engine.step
    monkeypatch.setattr(server.engine, "step", lambda: (time.sleep(0.02), step())[1])
    connection = server.connect(COMPLETIONS, BODY | {"max_tokens": 100, "stream": True})
    connection.getresponse().read(1)
    connection.close()
    samples = ended(server, 1)
    assert value(samples, "vllm:request_success_total", finished_reason="abort") == 1
    assert value(samples, "gpt_fast_requests_cancelled_total") == 1


def test_refusals_are_counted_by_why_and_responses_by_status(server):
    server.call(COMPLETIONS, BODY | {"top_p": 7})
    server.call(COMPLETIONS, BODY | {"model": "other"})
    server.call("/v1/nothing", {})
    server.door.draining = True
    server.call(COMPLETIONS, BODY)
    server.door.draining = False
    name = "gpt_fast_requests_refused_total"
    wait_until(lambda: sum(v for (n, _), v in read(server).items() if n == name) == 4)
    samples = read(server)
    counts = {dict(labels)["reason"]: number for (n, labels), number in samples.items() if n == name}
    assert {reason: number for reason, number in counts.items() if number} == {
        "invalid": 1,
        "not_found": 2,
        "draining": 1,
    }
    assert value(samples, "http_requests_total", handler=COMPLETIONS, method="POST", status="503") == 1
