"""TorchServe's rounds over a real tiny engine: admission, streams, refusals, disconnects, deadlines, failures."""

from __future__ import annotations

import json
import logging
import re
import threading
from dataclasses import dataclass, field

import pytest
import yaml

from gpt_fast.config import ConfigError, SamplingParams
from gpt_fast.serve import metrics
from gpt_fast.serve import rounds as rounds_module
from gpt_fast.serve import service as service_module
from gpt_fast.serve.admission import Admit, Limits
from gpt_fast.serve.exchange import Incoming, Reply, client_id_of
from gpt_fast.serve.metrics import Reporter
from gpt_fast.serve.model_config import queue_places, read_config
from gpt_fast.serve.rounds import Rounds
from gpt_fast.serve.service import Service
from support.paths import ROOT
from support.tiny_engine import tiny_engine
from support.waiting import wait_until

LIMITS = Limits(max_new_tokens=20, stream=True, max_waiting=4, max_seconds=60.0)


@dataclass
class Client:
    """What one client has received, as TorchServe would pass it on."""

    path: str
    body: object
    replies: list[Reply] = field(default_factory=list)
    gone: bool = False
    client_id: str = ""

    @property
    def done(self) -> bool:
        return bool(self.replies) and self.replies[-1].more is not True

    @property
    def text(self) -> str:
        return "".join(reply.text for reply in self.replies)

    @property
    def status(self) -> int:
        return self.replies[0].status

    @property
    def error(self) -> dict:
        return json.loads(self.text)["error"]

    @property
    def events(self) -> list[dict]:
        """A stream's data, [DONE] left out."""
        frames = [frame.removeprefix("data: ") for frame in self.text.split("\n\n") if frame]
        return [json.loads(frame) for frame in frames if frame != "[DONE]"]


class Frontend:
    """TorchServe's side of continuousBatching."""

    def __init__(self, rounds: Rounds) -> None:
        self.rounds = rounds
        self.clients: dict[str, Client] = {}
        self.fresh: set[str] = set()

    def send(self, body: object, path: str = "", name: str = "") -> Client:
        name = name or f"id{len(self.clients)}"
        client = self.clients[name] = Client(path, json.dumps(body).encode() if isinstance(body, dict) else body)
        self.fresh.add(name)
        return client

    def round(self) -> None:
        active = {name: client for name, client in self.clients.items() if not client.done and not client.gone}
        incoming = {n: Incoming(c.path, c.body, c.client_id) for n, c in active.items() if n in self.fresh}
        assert {name for name in active if not self.rounds.knows(name)} == set(incoming)
        self.fresh -= set(incoming)
        for name, reply in self.rounds.run(active, incoming).items():
            client = active[name]
            assert reply.more is not False or client.replies, (
                "a first chunk that is the last: TorchServe sends no header"
            )
            client.replies.append(reply)

    def until(self, condition) -> None:
        wait_until(condition, meanwhile=self.round)

    def finish(self, *clients: Client) -> None:
        self.until(lambda: all(client.done for client in clients or self.clients.values()))


def make_rounds(
    *, slots: int = 4, limits: Limits = LIMITS, draining=lambda: False, hung_after: float = 60.0, interval: float = 0.0
) -> Rounds:
    engine = tiny_engine(slots=slots)
    service = Service(engine, hung_after=hung_after, interval=interval)
    service.start()
    admit = Admit(engine, in_flight=service.in_flight, limits=limits, model_names=["gpt-fast"], draining=draining)
    return Rounds(service, admit)


@pytest.fixture(scope="module")
def shared() -> Rounds:
    return make_rounds()


@pytest.fixture
def frontend(shared) -> Frontend:
    assert shared.service.known() == set()
    return Frontend(shared)


def native(count: int = 8, **fields) -> dict:
    return {"prompt": "a prompt", "max_new_tokens": count, "ignore_eos": True, **fields}


def scheduler(rounds: Rounds):
    return rounds.service.engine.core.scheduler


# ------------------------------------------------------------------------------------------- answers


@pytest.mark.parametrize("count", [1, 2, 20])
def test_streams_and_whole_answers_are_the_same_text(frontend, count):
    streamed = frontend.send(native(count))
    whole = frontend.send(native(count, stream=False))
    frontend.finish()
    assert streamed.text == whole.text
    assert streamed.status == whole.status == 200
    alone = tiny_engine().generate([list(b"a prompt")], [SamplingParams(max_new_tokens=count, ignore_eos=True)])[0]
    assert streamed.text == alone.text


def test_a_stream_arrives_in_pieces_and_ends_once(frontend):
    client = frontend.send(native(40))
    frontend.finish()
    assert [reply.more for reply in client.replies[:-1]] == [True] * (len(client.replies) - 1)
    assert client.replies[-1].more is False
    assert len(client.replies) > 5


def test_tokens_between_the_first_and_the_last_wait_for_the_interval_whatever_others_get():
    frontend = Frontend(make_rounds(interval=60.0))
    first = frontend.send(native(100))
    frontend.until(lambda: first.replies)
    second = frontend.send(native(30))
    frontend.finish()
    assert [len(client.replies) for client in (first, second)] == [2, 2]
    whole = frontend.send(native(100, stream=False))
    frontend.finish()
    assert first.text == whole.text and whole.text.startswith(second.text)


def test_a_round_after_an_end_is_short_for_the_client_may_ask_again(monkeypatch):
    """New requests join between rounds only; here the other one in flight has nothing to say."""
    monkeypatch.setattr(rounds_module, "ROUND_SECONDS", 600.0)
    rounds, pause, go_on = make_rounds(), threading.Event(), threading.Event()
    frontend, step = Frontend(rounds), rounds.service.engine.step
    monkeypatch.setattr(rounds.service.engine, "step", lambda: (pause.is_set() and go_on.wait(20), step())[1])
    ended, other = frontend.send(native(1)), frontend.send(native(120, stream=False, prompt="b"))
    frontend.until(lambda: ended.done)
    pause.set()
    frontend.round()
    frontend.round()
    assert not other.done  # a long round would have waited for its end, until the step gives up its pause
    again = frontend.send(native(1))
    go_on.set()
    frontend.finish()
    assert again.status == other.status == 200


def test_chat_streams_are_the_whole_answers(frontend):
    body = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 12, "seed": 1, "ignore_eos": True, "n": 3}
    streamed = frontend.send({**body, "stream": True}, "v1/chat/completions")
    whole = frontend.send(body, "v1/chat/completions")
    frontend.finish()
    texts = ["", "", ""]
    for event in streamed.events:
        for choice in event["choices"]:
            texts[choice["index"]] += choice["delta"].get("content") or ""
    answer = json.loads(whole.text)
    assert texts == [choice["message"]["content"] for choice in answer["choices"]]
    assert len(set(texts)) == 3  # each choice has a seed of its own
    assert answer["usage"]["completion_tokens"] == 36
    assert streamed.text.endswith("data: [DONE]\n\n")


def test_seeds_at_the_end_of_their_range(frontend):
    last = (1 << 63) - 1
    for seed, status in ((last - 1, 200), (last, 400), (-last - 1, 200)):
        client = frontend.send({"prompt": "x", "n": 2, "seed": seed, "max_tokens": 3}, "v1/completions")
        frontend.finish()
        assert client.status == status, client.text


def test_echo_is_the_prompt_as_it_was_sent(frontend):
    body = {"prompt": ["e\u0301 汉🙂", [104, 105]], "echo": True, "max_tokens": 2, "n": 2, "ignore_eos": True}
    client = frontend.send(body, "v1/completions")
    frontend.finish()
    texts = [choice["text"] for choice in json.loads(client.text)["choices"]]
    assert [text[:4] for text in texts[:2]] == ["e\u0301 汉", "e\u0301 汉"]
    assert [text[:2] for text in texts[2:]] == ["hi", "hi"]


def test_an_answer_that_is_too_long_for_one_message_leaves_in_pieces(frontend, monkeypatch):
    body = {"prompt": "x", "max_tokens": 30, "logprobs": 5, "seed": 1}
    usual = frontend.send(body, "v1/completions")
    frontend.finish()
    monkeypatch.setattr(rounds_module, "MAX_PIECE", 100)
    for fields in ({}, {"stream": True}):
        client = frontend.send(body | fields, "v1/completions")
        frontend.finish()
        assert max(len(reply.text) for reply in client.replies) <= 100 and client.replies[-1].more is False
        assert len(client.replies) > 5 and {reply.more for reply in client.replies[:-1]} == {True}
        if not fields:
            assert json.loads(client.text)["choices"] == json.loads(usual.text)["choices"]


def test_complete_replies_without_the_model(frontend):
    models = frontend.send(None, "/v1/models")
    card = frontend.send(None, "v1/models/gpt-fast")
    page = frontend.send(None, "chat/")
    frontend.finish()
    assert json.loads(models.text)["data"] == [json.loads(card.text)]
    assert page.replies[0].content_type.startswith("text/html")
    assert "default-src 'none'" in dict(page.replies[0].headers)["Content-Security-Policy"]


# ------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("path", "body", "status", "param"),
    [
        ("", b"", 400, None),
        ("", b"{", 400, None),
        ("", None, 400, None),
        ("", {"prompt": ""}, 400, "prompt"),
        ("", {"prompt": "x" * 128}, 400, "prompt"),
        ("", {"prompt": [300]}, 400, "prompt"),
        ("", {"prompt": "x", "logit_bias": {"257": 1}}, 400, "logit_bias"),
        ("", {"prompt": "x", "max_new_tokens": 128}, 400, "prompt"),
        ("v1/completions", {"prompt": ["x"] * 9, "n": 1, "max_tokens": 1}, 400, "n"),
        ("v1/chat/completions", {"messages": []}, 400, "messages"),
        ("v1/chat/completions", {"messages": [{"role": "user", "content": "x" * 128}]}, 400, "messages"),
        ("v1/models/other", None, 404, None),
        ("v2/chat", {"prompt": "x"}, 404, None),
        ("../../etc/passwd", {"prompt": "x"}, 404, None),
    ],
)
def test_a_refusal_is_one_json_error_and_the_next_request_works(frontend, path, body, status, param):
    running = frontend.send(native(30))
    frontend.until(lambda: running.replies)
    refused = frontend.send(body, path)
    after = frontend.send(native(2))
    frontend.finish()
    assert len(refused.replies) == 1
    assert (refused.status, refused.error["param"]) == (status, param)
    assert refused.replies[0].content_type == "application/json"
    assert after.status == 200 and running.status == 200


def test_a_full_queue_is_429_at_once_and_empties_again(monkeypatch):
    rounds = make_rounds(slots=1, limits=LIMITS._replace(max_waiting=2))
    frontend, pause, go_on = Frontend(rounds), threading.Event(), threading.Event()
    step = rounds.service.engine.step
    monkeypatch.setattr(rounds.service.engine, "step", lambda: (pause.is_set() and go_on.wait(20), step())[1])
    accepted = [frontend.send(native(60)) for _ in range(3)]
    frontend.until(lambda: rounds.service.in_flight() == 3)
    pause.set()
    late = frontend.send(native(1))
    unread = frontend.send(b"not even JSON")
    frontend.finish(late, unread)
    assert not any(client.done for client in accepted)  # refused while nobody gets on
    go_on.set()
    assert late.status == unread.status == 429
    assert dict(late.replies[0].headers) == {"Retry-After": "1"}
    assert late.error["code"] == "queue_full"
    frontend.finish()
    assert all(client.status == 200 for client in accepted)
    again = frontend.send(native(1))
    frontend.finish()
    assert again.status == 200


def test_the_queue_holds_its_bound_when_all_come_in_one_round(monkeypatch):
    rounds, go_on = make_rounds(slots=1, limits=LIMITS._replace(max_waiting=2)), threading.Event()
    frontend, step = Frontend(rounds), rounds.service.engine.step
    monkeypatch.setattr(rounds.service.engine, "step", lambda: (go_on.wait(20), step())[1])
    clients = [frontend.send(native(2)) for _ in range(10)]
    frontend.until(lambda: sum(client.done for client in clients) == 7)
    go_on.set()
    frontend.finish()
    assert sorted(client.status for client in clients) == [200] * 3 + [429] * 7


def test_a_draining_server_ends_what_runs_and_refuses_the_rest(tmp_path):
    rounds = make_rounds(draining=(tmp_path / "draining").exists)
    frontend = Frontend(rounds)
    running = frontend.send(native(60))
    frontend.until(lambda: running.replies)
    (tmp_path / "draining").touch()
    late = frontend.send(native(1))
    frontend.finish()
    assert late.status == 503 and dict(late.replies[0].headers) == {"Retry-After": "1"}
    assert running.status == 200 and len(running.text) > 10


def test_health_is_told_at_once_whatever_waits_or_steps(monkeypatch):
    rounds = make_rounds(slots=1)
    frontend, go_on = Frontend(rounds), threading.Event()
    step = rounds.service.engine.step
    monkeypatch.setattr(rounds.service.engine, "step", lambda: go_on.wait() and step())
    clients = [frontend.send(native(3)) for _ in range(5)]
    frontend.until(lambda: rounds.service.in_flight() == 5 and rounds.service.step_seconds() > 0)
    last, look = frontend.send(native(4)), frontend.send(b"", "health")
    frontend.round()
    told = json.loads(look.text)
    assert look.status == 200 and told["status"] == "ok" and told["in_flight"] == 5 and told["step_seconds"] > 0
    go_on.set()
    frontend.finish(*clients)
    assert [client.status for client in clients] == [200] * 5
    frontend.finish(last)
    assert last.status == 429 and not rounds.knows("id6")


def test_what_is_being_admitted_counts_as_waiting(monkeypatch):
    """Or a drain would cut a request whose long prompt is being encoded."""
    rounds, go_on = make_rounds(), threading.Event()
    frontend, admit, figures = Frontend(rounds), rounds.desk.admit, {}
    rounds.desk.admit = lambda incoming: go_on.wait() and admit(incoming)
    rounds.desk.admit.confirm = admit.confirm
    client = frontend.send(native(3))
    frontend.round()
    rounds.desk.report(Reporter(lambda kind, name, value, label: figures.update({name: value})))
    assert figures["num_requests_waiting"] == 1
    go_on.set()
    frontend.finish(client)
    assert client.status == 200


# ------------------------------------------------------------------------------------------- company and cancellation


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_frees_its_slots_and_hurts_nobody(frontend, shared, stream):
    alone = frontend.send(native(100))
    frontend.finish()
    stays = frontend.send(native(100))
    leaves = frontend.send(
        {"prompt": "b", "n": 2, "max_tokens": 120, "ignore_eos": True, "stream": stream}, "v1/completions"
    )
    frontend.until(lambda: len(scheduler(shared).running) == 3)
    shared.service.take_records()
    leaves.gone = True
    frontend.until(lambda: len(scheduler(shared).running) == 1)
    assert [record.finish_reason for record in shared.service.take_records()] == ["cancelled"] * 2
    frontend.finish(stays)
    assert stays.text == alone.text
    wait_until(lambda: len(scheduler(shared).free) == 4)


def test_a_client_that_leaves_while_it_waits_is_forgotten():
    rounds = make_rounds(slots=1)
    frontend = Frontend(rounds)
    first, second = frontend.send(native(100)), frontend.send(native(100))
    frontend.until(lambda: rounds.service.in_flight() == 2)
    second.gone = True
    frontend.until(lambda: rounds.service.in_flight() == 1 and not scheduler(rounds).waiting)
    assert not first.done
    frontend.finish(first)


def test_whole_answers_are_probed_so_that_a_gone_client_is_found(monkeypatch):
    monkeypatch.setattr(rounds_module, "PROBE_SECONDS", 0.02)
    rounds = make_rounds(slots=1)
    frontend = Frontend(rounds)
    running = frontend.send(native(120, stream=False))
    waiting = frontend.send(native(120, stream=False))
    frontend.until(lambda: waiting.replies and running.replies)
    assert running.replies[0] == Reply("", True)
    frontend.finish()
    assert running.text == waiting.text and running.replies[-1].more is False


def test_a_lone_client_that_leaves_is_noticed_by_the_silence(monkeypatch):
    monkeypatch.setattr(service_module, "SILENCE_SECONDS", 0.05)
    monkeypatch.setattr(service_module, "LOST_SECONDS", 0.3)
    rounds = make_rounds()
    frontend = Frontend(rounds)
    client = frontend.send(native(120))
    frontend.until(lambda: client.replies)
    wait_until(lambda: rounds.service.gauges()["num_requests_running"] == 0)
    wait_until(lambda: rounds.service.engine.idle)  # no round comes any more
    assert [record.finish_reason for record in rounds.service.take_records()] == ["cancelled"]
    frontend.finish(client)  # it was a stall after all: the stream ends, the worker lives
    after = frontend.send(native(2))
    frontend.finish(after)
    assert after.status == 200


def test_a_deadline_ends_an_answer_where_it_is(frontend):
    whole = {"prompt": "x", "max_tokens": 120, "ignore_eos": True, "timeout": 0.001}
    client = frontend.send(whole, "v1/completions")
    frontend.finish()
    answer = json.loads(client.text)
    assert answer["choices"][0]["finish_reason"] == "length"
    assert answer["usage"]["completion_tokens"] < 120
    wait_until(lambda: len(scheduler(frontend.rounds).free) == 4)


def test_the_servers_own_time_limit_holds_for_everybody():
    rounds = make_rounds(limits=LIMITS._replace(max_seconds=0.001))
    frontend = Frontend(rounds)
    client = frontend.send(native(120, timeout=3000))
    frontend.finish()
    assert len(client.text) < 100


# ------------------------------------------------------------------------------------------- failures


def test_an_exception_in_admission_is_that_requests_500(frontend, shared, monkeypatch, caplog):
    good = frontend.send(native(60))
    frontend.until(lambda: good.replies)
    with monkeypatch.context() as patch:

        def encode(prompt: str, **_: bool) -> list[int]:
            raise KeyError(prompt)

        patch.setattr(shared.service.engine, "encode", encode)
        bad = frontend.send(native(prompt="my secret"))
        frontend.finish(bad)
    assert bad.status == 500 and bad.error["type"] == "server_error"
    assert "KeyError" in caplog.text and "secret" not in caplog.text + bad.text
    frontend.finish()
    assert good.status == 200 and good.replies[-1].more is False


def test_an_exception_while_answering_ends_that_answer_alone(frontend, shared, monkeypatch):
    good = frontend.send(native(60))
    bad = frontend.send({"prompt": "x", "max_tokens": 60, "ignore_eos": True, "stream": True}, "v1/completions", "bad")
    frontend.until(lambda: bad.replies)
    monkeypatch.setattr(shared.exchanges["bad"].answer, "push", lambda index, events: 1 / 0)
    frontend.finish()
    assert bad.events[-1]["error"]["type"] == "server_error"
    assert good.replies[-1].more is False
    wait_until(lambda: len(scheduler(shared).free) == 4)


def test_a_prompt_that_the_engine_refuses_is_that_requests_failure(frontend, shared, monkeypatch):
    good = frontend.send(native(60))
    frontend.until(lambda: good.replies)
    with monkeypatch.context() as patch:

        def add(*args, **options):
            raise ValueError("prompt: not this one")

        patch.setattr(shared.service.engine, "add", add)
        bad = frontend.send(native())
        frontend.finish(bad)
    assert bad.status == 500
    frontend.finish()
    assert good.replies[-1].more is False


def test_an_overflowing_row_fails_alone(frontend, shared, monkeypatch):
    """A row of NaN ends its request; its neighbour's text is what it is alone."""
    good = frontend.send(native(60))
    frontend.finish()
    neighbour, poisoned = frontend.send(native(60)), frontend.send(native(60, prompt="poison", stream=False))
    decode = shared.service.engine.core.runner.decode

    def overflow(batch):
        logits = decode(batch).clone()
        running = list(scheduler(shared).running.values())
        for row, sequence in enumerate([s for s in running if s.output][: len(logits)]):
            if bytes(sequence.prompt) == b"poison":
                logits[row] = float("nan")
        return logits

    monkeypatch.setattr(shared.service.engine.core.runner, "decode", overflow)
    frontend.finish()
    assert poisoned.status == 500 or poisoned.replies[-1].more is False
    assert neighbour.text == good.text


def test_a_slow_admission_does_not_hold_up_the_others(frontend, shared, monkeypatch):
    encode, gate = shared.service.engine.encode, threading.Event()
    monkeypatch.setattr(
        shared.service.engine,
        "encode",
        lambda text, **_: encode(text) if text != "slow" else (gate.wait(10), encode(text))[1],
    )
    slow = frontend.send(native(2, prompt="slow"))
    quick = frontend.send(native(30))
    frontend.finish(quick)
    assert not slow.replies
    gate.set()
    frontend.finish(slow)
    assert slow.status == 200


def test_a_client_that_leaves_during_admission_costs_nothing(frontend, shared, monkeypatch):
    encode, gate = shared.service.engine.encode, threading.Event()
    monkeypatch.setattr(shared.service.engine, "encode", lambda text, **_: (gate.wait(10), encode(text))[1])
    client = frontend.send(native(2))
    frontend.round()
    client.gone = True
    frontend.round()
    gate.set()
    assert not shared.exchanges and shared.service.known() == set()


# ------------------------------------------------------------------------------------------- figures and logs


def test_figures_and_one_log_line_a_request_without_its_prompt(caplog):
    caplog.set_level(logging.INFO)
    rounds = make_rounds()
    frontend = Frontend(rounds)
    body = {"prompt": "a secret prompt", "n": 2, "max_tokens": 5, "ignore_eos": True}
    good = frontend.send(body, "v1/completions", "good")
    frontend.send({"prompt": "a secret prompt", "top_p": "secret"}, name="bad")
    frontend.finish()
    gone = frontend.send(native(100, prompt="a secret prompt"), name="gone")
    frontend.until(lambda: gone.replies)
    gone.gone = True
    frontend.round()
    emitted: list[tuple[str, str, float, str]] = []
    reporter = Reporter(lambda *figure: emitted.append(figure))
    rounds.desk.report(reporter)
    wait_until(lambda: rounds.service.engine.idle)
    rounds.desk.report(reporter)
    lines = [json.loads(r.message.removeprefix("request ")) for r in caplog.records if r.message.startswith("request ")]
    assert sorted(line["request_id"] for line in lines) == ["bad", "gone", "good"]
    by_id = {line["request_id"]: line for line in lines}
    assert by_id["bad"]["status"] == 400
    assert by_id["good"]["sequences"] == 2 and by_id["good"]["generation_tokens"] == 10
    assert by_id["gone"]["finish_reasons"] == ["cancelled"]
    assert "secret" not in caplog.text and good.text not in caplog.text
    totals: dict[str, float] = {}
    for kind, name, value, _ in emitted:
        if kind == "counter":
            totals[name] = totals.get(name, 0) + value
    assert totals["generation_tokens_total"] >= 10 and totals["requests_cancelled_total"] == 1
    assert totals["request_success_total"] == 2 and totals["requests_refused_total"] == 1
    assert totals["prompt_tokens_total"] == 45 and totals["recompiles_total"] == 0
    histograms = {name for kind, name, _, _ in emitted if kind == "histogram"}
    assert histograms == set(metrics.HISTOGRAMS)
    assert {name: value for kind, name, value, _ in emitted if kind == "gauge"} == dict.fromkeys(metrics.GAUGES, 0)


def test_figures_are_those_that_torchserve_is_told_about():
    declared = yaml.safe_load((ROOT / "deploy/metrics.yaml").read_text())["model_metrics"]
    ours = {
        kind: {entry["name"].removeprefix("gpt_fast_") for entry in entries if entry["name"].startswith("gpt_fast_")}
        for kind, entries in declared.items()
    }
    assert ours == {
        "gauge": set(metrics.GAUGES),
        "counter": set(metrics.COUNTERS),
        "histogram": set(metrics.HISTOGRAMS),
    }


def test_the_clients_own_id_is_in_headers_answers_and_the_log(caplog):
    caplog.set_level(logging.INFO)
    rounds = make_rounds()
    frontend = Frontend(rounds)
    body = {"prompt": "a", "max_tokens": 2}
    asked = {
        "whole": frontend.send(body, "v1/completions"),
        "stream": frontend.send(body | {"stream": True}, "v1/completions"),
        "native": frontend.send(native(2)),
        "refused": frontend.send({"prompt": "a", "top_p": 7}),
        "models": frontend.send(None, "v1/models"),
    }
    for name, client in asked.items():
        client.client_id = f"mine/{name}"
    anonymous = frontend.send(body, "v1/completions", "nobody")
    frontend.finish()
    for name, client in asked.items():
        assert {value for reply in client.replies for value in dict(reply.headers).values()} == {f"mine/{name}"}
    assert json.loads(asked["whole"].text)["id"] == "cmpl-mine/whole"
    assert {event["id"] for event in asked["stream"].events} == {"cmpl-mine/stream"}
    assert anonymous.replies[0].headers == () and json.loads(anonymous.text)["id"] != "cmpl-"
    rounds.desk.report(Reporter(lambda *figure: None))
    lines = [json.loads(r.message.removeprefix("request ")) for r in caplog.records if r.message.startswith("request ")]
    named = {line.get("client_request_id") for line in lines}
    assert named == {"mine/whole", "mine/stream", "mine/native", "mine/refused", None}


@pytest.mark.parametrize(
    ("headers", "found"),
    [
        ({}, ""),
        ({"X-Request-Id": "abc-1"}, "abc-1"),
        ({"x-request-id": "a/b:c"}, "a/b:c"),
        ({"x-request-id": "two words"}, ""),
        ({"x-request-id": "line\nbreak"}, ""),
        ({"x-request-id": "x" * 129}, ""),
        ({"x-request-id": "\u00e9"}, ""),
    ],
)
def test_an_id_fits_headers_and_logs_or_is_passed_over(headers, found):
    assert client_id_of(headers) == found


# ------------------------------------------------------------------------------------------- configuration


def test_the_queue_fits_torchserves_batch():
    assert queue_places(64, slots=8, wanted=None) == 28
    assert queue_places(9, slots=8, wanted=0) == 0
    with pytest.raises(ConfigError, match=r"^batchSize: .*got 8, allowed > 8"):
        queue_places(8, slots=8, wanted=None)
    with pytest.raises(ConfigError, match=r"^handler.max_waiting: .*got 8, allowed 0..7"):
        queue_places(16, slots=8, wanted=8)


@pytest.mark.parametrize(
    ("handler", "line"),
    [
        (None, "handler: model_config.yaml needs a handler section"),
        ({}, "handler.checkpoint_path: is required"),
        ({"checkpoint_path": "x", "max_num_seq": 1}, "handler.max_num_seq: unknown key"),
        ({"converted_ckpt_dir": "x"}, "handler.converted_ckpt_dir: renamed to checkpoint_path"),
        ({"checkpoint_path": "x", "stream": "yes"}, "handler.stream: must be true or false (got 'yes')"),
        ({"checkpoint_path": "x", "request_seconds": 0}, "handler.request_seconds: must be a number in range (got 0"),
        ({"checkpoint_path": "x", "max_waiting": True}, "handler.max_waiting: must be a whole number"),
        ({"checkpoint_path": "x", "served_model_name": []}, "handler.served_model_name: must be a name or a list"),
        ({"checkpoint_path": "x", "served_model_name": [7]}, "handler.served_model_name: must be a name or a list"),
        ({"checkpoint_path": "x", "served_model_name": ""}, "handler.served_model_name: must be a name or a list"),
        ({"checkpoint_path": "x", "served_model_name": ["a", "a"]}, "handler.served_model_name: has a name twice"),
    ],
)
def test_a_wrong_key_is_one_line(tmp_path, handler, line):
    with pytest.raises(ConfigError) as caught:
        read_config({"handler": handler, "continuousBatching": True, "batchSize": 64}, root=tmp_path)
    assert str(caught.value).startswith(line) and "\n" not in str(caught.value)


def test_a_name_or_several(tmp_path):
    def names(value):
        yaml = {"handler": {"checkpoint_path": "x"} | value, "continuousBatching": True, "batchSize": 64}
        return read_config(yaml, root=tmp_path)[1].model_names

    assert names({}) == ()
    assert names({"served_model_name": "gpt-4o"}) == ("gpt-4o",)
    assert names({"served_model_name": ["gpt-4o", "org/model"]}) == ("gpt-4o", "org/model")


def test_the_shipped_configurations_are_valid(tmp_path):
    """By serve's own reader, with the keys of TorchServe that configs/README.md asks of every file."""
    others = sorted((ROOT / "configs").glob("*.yaml"))
    assert others
    for path in [ROOT / "model_config.yaml", *others]:
        values = yaml.safe_load(path.read_text())
        engine, serve = read_config(values, root=tmp_path)
        assert engine.checkpoint_path.startswith(str(tmp_path)), path
        assert serve.max_waiting is not None and serve.max_waiting > 0
        assert [values[key] for key in ("minWorkers", "maxWorkers", "maxBatchDelay")] == [1, 1, 1], path
        assert {"responseTimeout", "startupTimeout", "maxRetryTimeoutInSec"} <= set(values), path
        assert values["deviceType"] == ("gpu" if engine.device == "cuda" else "cpu"), path


def test_every_configuration_that_a_page_names_is_there():
    pages = [ROOT / "README.md", *(ROOT / "docs").glob("*.md"), ROOT / "configs/README.md"]
    named = {name for page in pages for name in re.findall(r"configs/[\w.-]+\.yaml", page.read_text())}
    missing = {name for name in named - {"configs/other.yaml"} if not (ROOT / name).is_file()}
    assert named and not missing
