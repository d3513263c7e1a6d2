"""Speculation through a real TorchServe: the same text, and its figures on the metrics endpoint and in the log."""

import json
import time
import urllib.request

import pytest

from support.server import Server, new_server, shared_server

BODY = {"prompt": "apple pear apple pear apple pear apple", "max_new_tokens": 64, "temperature": 0, "stream": False}


@pytest.fixture(scope="module")
def speculating():
    server = new_server()
    server.start(speculate="ngram", speculate_k=4)
    yield server
    server.stop()


def log_line(server: Server, request_id: str) -> dict:
    for _ in range(100):
        lines = [line for line in server.instance.worker_lines() if line.startswith("request ") and request_id in line]
        if lines:
            return json.loads(lines[0].removeprefix("request "))
        time.sleep(0.1)
    raise AssertionError("no log line")


def requests(server: Server, speculation: str) -> float:
    """How many requests were answered with speculation "on" or "off"."""
    with urllib.request.urlopen(f"http://127.0.0.1:{server.ports[2]}/metrics", timeout=10) as reply:
        lines = reply.read().decode().splitlines()
    found = [line for line in lines if line.startswith("gpt_fast_spec_decode_requests_total{")]
    return sum(float(line.rpartition(" ")[2]) for line in found if f'speculation="{speculation}"' in line)


def speculated(server: Server) -> tuple[dict[str, float], dict]:
    """The metrics before a request that was speculated for, and its log line. On a busy machine the controller may
    first have to find out that it pays."""
    for _ in range(30):
        before = server.metrics()
        response = server.call(BODY)
        assert response.status == 200
        fields = log_line(server, response.headers["x-request-id"])
        if fields["speculation"] == "on":
            return before, fields
        assert "drafted_tokens" not in fields
    raise AssertionError("never speculated")


@pytest.mark.slow
def test_figures_of_speculation(speculating):
    speculating.wait_for(lambda figures: "spec_decode_num_drafts_total" in figures, seconds=10)
    time.sleep(1)
    on = requests(speculating, "on")
    before, fields = speculated(speculating)
    drafted, accepted = fields["drafted_tokens"], fields["accepted_tokens"]
    assert 0 < accepted <= drafted

    def gained(figures: dict[str, float], name: str) -> float:
        return figures[f"spec_decode_num_{name}_tokens_total"] - before[f"spec_decode_num_{name}_tokens_total"]

    speculating.wait_for(
        lambda f: (
            (gained(f, "draft"), gained(f, "accepted")) == (drafted, accepted) and requests(speculating, "on") == on + 1
        ),
        seconds=10,
    )
    after = speculating.metrics()
    total = {n: after[f"spec_decode_num_{n}_total"] for n in ("drafts", "draft_tokens", "accepted_tokens")}
    rate, mean = total["accepted_tokens"] / total["draft_tokens"], total["accepted_tokens"] / total["drafts"]
    assert after["spec_decode_draft_acceptance_rate"] == pytest.approx(rate, abs=1e-3)
    assert after["spec_decode_mean_accepted_length"] == pytest.approx(mean, abs=1e-3)
    time.sleep(1)
    off = requests(speculating, "off")
    one = speculating.call({**BODY, "max_new_tokens": 1})  # nothing is left to propose after the prompt's own token
    assert log_line(speculating, one.headers["x-request-id"])["speculation"] == "off"
    speculating.wait_for(lambda _: requests(speculating, "off") == off + 1, seconds=10)


@pytest.mark.slow
def test_the_text_is_that_of_a_server_without(speculating):
    assert speculating.call(BODY).text == shared_server().call(BODY).text
