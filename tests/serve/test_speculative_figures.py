"""Speculation's figures: what the metrics endpoint and the request's log line say."""

import pytest

from gpt_fast.serve.metrics import Reporter, RequestRecord, log_fields, speculation_totals
from gpt_fast.speculative.speculator import Totals


def record(name="r/0", reason="stop", drafted=0, accepted=0):
    return RequestRecord(
        request_id=name,
        finish_reason=reason,
        prompt_tokens=5,
        reused_tokens=0,
        generation_tokens=9,
        arrival=1.0,
        started=1.0,
        first_token=1.5,
        ended=2.0,
        drafted_tokens=drafted,
        accepted_tokens=accepted,
    )


@pytest.fixture
def emitted():
    return []


@pytest.fixture
def reporter(emitted):
    return Reporter(lambda *figure: emitted.append(figure))


def test_requests_are_counted_by_whether_they_were_speculated(reporter, emitted):
    for each in (record(drafted=4, accepted=1), record(), record(drafted=2), record(reason="cancelled", drafted=3)):
        reporter.sequence(each)
    assert [label for _, name, _, label in emitted if name == "spec_decode_requests_total"] == ["on", "off", "on"]


def test_counters_grow_by_what_is_new_and_gauges_follow(reporter, emitted):
    totals = Totals()
    reporter.state({}, speculation_totals(totals), {})
    assert {(name, value) for _, name, value, _ in emitted if name.startswith("spec_decode_mean")} == {
        ("spec_decode_mean_accepted_length", 0)
    }
    totals.learn(4, 3)
    totals.learn(4, 0)
    emitted.clear()
    reporter.state({}, speculation_totals(totals), {})
    totals.learn(4, 3)
    reporter.state({}, speculation_totals(totals), {})
    assert [figure[1:3] for figure in emitted] == [
        ("spec_decode_draft_acceptance_rate", 0.375),
        ("spec_decode_mean_accepted_length", 1.5),
        ("spec_decode_num_drafts_total", 2),
        ("spec_decode_num_draft_tokens_total", 8),
        ("spec_decode_num_accepted_tokens_total", 3),
        ("spec_decode_draft_acceptance_rate", 0.5),
        ("spec_decode_mean_accepted_length", 2.0),
        ("spec_decode_num_drafts_total", 1),
        ("spec_decode_num_draft_tokens_total", 4),
        ("spec_decode_num_accepted_tokens_total", 3),
    ]


def test_the_log_line_says_whether_and_how_well():
    fields = log_fields({"request": "r"}, [record(drafted=6, accepted=3), record("r/1", drafted=2, accepted=2)])
    assert (fields["speculation"], fields["drafted_tokens"], fields["accepted_tokens"]) == ("on", 8, 5)
    assert fields["acceptance_rate"] == 0.625
    plain = log_fields({"request": "r"}, [record()])
    assert plain["speculation"] == "off" and "drafted_tokens" not in plain
