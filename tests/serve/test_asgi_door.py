"""The ASGI door over a real tiny engine: answers, streams, refusals, clients that leave, old HTTP."""

from __future__ import annotations

import json
import re
import socket
import threading
import time

import pytest

from gpt_fast.config import SamplingParams
from gpt_fast.serve.asgi import door as door_module
from gpt_fast.serve.body import MAX_BODY
from support.asgi_server import AsgiServer
from support.tiny_engine import tiny_engine
from support.waiting import wait_until

COMPLETIONS = "/v1/completions"
PROMPT = {"prompt": "a prompt", "temperature": 0, "ignore_eos": True}


@pytest.fixture(scope="module")
def server():
    with AsgiServer() as server:
        yield server


def completion(count: int = 8, **fields) -> dict:
    return PROMPT | {"max_tokens": count} | fields


def events(text: str) -> list[dict]:
    """A stream's data; it must end with [DONE]."""
    frames = [frame.removeprefix("data: ") for frame in text.split("\n\n") if frame]
    assert frames.pop() == "[DONE]"
    return [json.loads(frame) for frame in frames]


def alone(count: int) -> str:
    params = SamplingParams(max_new_tokens=count, ignore_eos=True)
    return tiny_engine().generate([list(b"a prompt")], [params])[0].text


# ------------------------------------------------------------------------------------------- answers


@pytest.mark.parametrize("count", [1, 2, 20])
def test_streamed_and_whole_answers_are_the_engines_own_text(server, count):
    whole = server.call(COMPLETIONS, completion(count))
    assert (whole.status, whole.headers["content-type"]) == (200, "application/json")
    assert int(whole.headers["content-length"]) == len(whole.body)
    streamed = server.call(COMPLETIONS, completion(count, stream=True))
    assert streamed.headers["content-type"] == "text/event-stream; charset=utf-8"
    told = events(streamed.text)
    assert "".join(event["choices"][0]["text"] for event in told) == whole.json["choices"][0]["text"] == alone(count)
    assert told[-1]["choices"][0]["finish_reason"] == "length"


def test_the_native_request_at_torchserves_path(server):
    for path in ("/predictions/gpt-fast", "/predictions/gpt-fast/1.0"):
        answer = server.call(path, {"prompt": "a prompt", "max_new_tokens": 12, "ignore_eos": True})
        assert (answer.status, answer.headers["content-type"]) == (200, "text/plain; charset=utf-8")
        assert answer.text == alone(12)
    chat = server.call(
        "/predictions/gpt-fast/1.0/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}]}
    )
    assert chat.json["object"] == "chat.completion"
    other = server.call("/predictions/other", PROMPT)
    assert other.status == 404 and "'other'" in other.json["error"]["message"]


def test_several_choices_stream_together(server):
    told = events(server.call(COMPLETIONS, completion(9, n=3, temperature=1.0, seed=5, stream=True)).text)
    whole = server.call(COMPLETIONS, completion(9, n=3, temperature=1.0, seed=5)).json["choices"]
    for choice in whole:
        pieces = [c for event in told for c in event["choices"] if c["index"] == choice["index"]]
        assert "".join(piece["text"] for piece in pieces) == choice["text"]


@pytest.mark.slow
def test_many_clients_get_what_each_gets_alone(server):
    bodies = [completion(40, prompt=f"prompt {n}", temperature=1.0, seed=n, stream=bool(n % 2)) for n in range(24)]
    expected = [server.call(COMPLETIONS, body | {"stream": False}).json["choices"][0]["text"] for body in bodies]
    got: dict[int, str] = {}

    def ask(n: int) -> None:
        text = server.call(COMPLETIONS, bodies[n]).text
        chunks = events(text) if n % 2 else [json.loads(text)]
        got[n] = "".join(chunk["choices"][0]["text"] for chunk in chunks)

    threads = [threading.Thread(target=ask, args=(n,)) for n in range(24)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [got[n] for n in range(24)] == expected


def test_the_tokens_between_the_first_and_the_last_come_together():
    """With a long interval: the first at once, then nothing until the end brings the rest."""
    with AsgiServer(interval=1.0) as server:
        told = events(server.call(COMPLETIONS, completion(60, stream=True)).text)
    assert len(told) == 2 and "".join(event["choices"][0]["text"] for event in told) == alone(60)


def test_without_an_interval_every_token_may_leave_by_itself(server):
    told = events(server.call(COMPLETIONS, completion(60, stream=True)).text)
    assert len(told) > 5


def test_a_clients_request_id_comes_back_and_names_the_answer(server):
    named = server.call(COMPLETIONS, completion(2), headers={"X-Request-ID": "mine-1"})
    assert named.headers["x-request-id"] == named.headers["x-client-request-id"] == "mine-1"
    assert named.json["id"] == "cmpl-mine-1"
    twice = [server.call(COMPLETIONS, completion(2)).headers["x-request-id"] for _ in range(2)]
    assert twice[0] != twice[1]


def test_two_requests_of_one_id_do_not_meet(server):
    bodies = [completion(40, prompt=f"p{n}") for n in range(2)]
    connections = [server.connect(COMPLETIONS, body, headers={"X-Request-ID": "same"}) for body in bodies]
    texts = [json.loads(connection.getresponse().read())["choices"][0]["text"] for connection in connections]
    assert texts == [
        server.call(COMPLETIONS, completion(40, prompt=f"p{n}")).json["choices"][0]["text"] for n in range(2)
    ]


# ------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("method", "path", "body", "status", "says"),
    [
        ("POST", COMPLETIONS, b"{", 400, "body: not JSON"),
        ("POST", COMPLETIONS, b"", 400, "body: not JSON"),
        ("POST", COMPLETIONS, {"prompt": "x", "top_p": 7}, 400, "top_p"),
        ("POST", COMPLETIONS, {"prompt": "x", "model": "other"}, 404, "model"),
        ("POST", "/v1/nothing", {}, 404, "path"),
        ("GET", COMPLETIONS, None, 405, "POST"),
        ("DELETE", COMPLETIONS, None, 405, "POST"),
        ("POST", "/v1/models", {}, 405, "GET"),
        ("POST", "/health", {}, 405, "GET"),
        ("POST", "/", {"prompt": "x"}, 405, "GET"),
        ("GET", "/v1/models/other", None, 404, "no such model"),
        ("POST", COMPLETIONS, b" " * (MAX_BODY + 1), 413, str(MAX_BODY)),
    ],
)
def test_a_refusal_is_one_json_error(server, method, path, body, status, says):
    refused = server.call(path, body, method=method)
    assert (refused.status, refused.headers["content-type"]) == (status, "application/json")
    assert says in refused.json["error"]["message"] and refused.headers["x-request-id"]
    if status == 405:
        assert refused.headers["allow"].split(", ")[0] == says


def test_anthropics_path_refuses_in_anthropics_form(server):
    refused = server.call("/v1/messages", {"max_tokens": 0, "messages": []})
    assert refused.status == 400 and refused.json["type"] == "error"


def test_a_body_far_too_large_is_refused_before_it_is_read(server):
    with socket.create_connection(("127.0.0.1", server.port), timeout=30) as connection:
        connection.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 99999999999\r\n\r\n")
        assert connection.recv(1 << 16).startswith(b"HTTP/1.1 413 ")


def test_a_body_that_does_not_come_is_given_up(server, monkeypatch):
    monkeypatch.setattr(door_module, "BODY_SECONDS", 0.05)
    with socket.create_connection(("127.0.0.1", server.port), timeout=30) as connection:
        connection.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 10\r\n\r\n{")
        assert connection.recv(1 << 16).startswith(b"HTTP/1.1 408 ")


def test_a_full_server_says_so_at_once(monkeypatch):
    from support.round_server import LIMITS

    with AsgiServer(tiny_engine(slots=1), limits=LIMITS._replace(max_waiting=1)) as server:
        hold_the_engine(server, monkeypatch)
        clients = [server.connect(COMPLETIONS, completion(50)) for _ in range(2)]
        wait_until(lambda: server.service.in_flight() == 2)
        late = server.call(COMPLETIONS, completion(1))
        assert (late.status, late.headers["retry-after"], late.json["error"]["code"]) == (429, "1", "queue_full")
        for client in clients:
            client.close()


# ------------------------------------------------------------------------------------------- clients that leave


def hold_the_engine(server, monkeypatch) -> None:
    """Steps take 20 ms from here on, so that an answer is still under way when its client leaves."""
    step = server.engine.step
    monkeypatch.setattr(server.engine, "step", lambda: (time.sleep(0.02), step())[1])


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_frees_its_slot_within_two_steps(server, monkeypatch, stream):
    hold_the_engine(server, monkeypatch)
    scheduler = server.engine.core.scheduler
    connection = server.connect(COMPLETIONS, completion(100, stream=stream))
    wait_until(lambda: scheduler.running and next(iter(scheduler.running.values())).output)
    (request,) = scheduler.running.values()
    before = len(request.output)
    connection.close()
    wait_until(lambda: not scheduler.running)
    # One step may be under way when the connection ends, one more may begin before the event loop hears of it.
    assert len(request.output) - before <= 2 + 1  # and one more while this thread was on its way
    wait_until(lambda: not server.door.in_flight)
    assert server.service.known() == set()


def test_a_client_that_leaves_hurts_nobody(server, monkeypatch):
    hold_the_engine(server, monkeypatch)
    stays = server.connect(COMPLETIONS, completion(30, stream=True))
    leaves = server.connect(COMPLETIONS, completion(100, prompt="other", stream=True))
    leaves.getresponse().read(1)
    leaves.close()
    told = events(stays.getresponse().read().decode())
    assert "".join(event["choices"][0]["text"] for event in told) == alone(30)


def test_a_client_that_does_not_read_holds_up_nobody(server):
    """Its answer waits in its own connection; it is dropped when it leaves."""
    body = completion(100, n=4, logprobs=20, stream=True)
    sleepers = [server.connect(COMPLETIONS, body | {"prompt": f"sleeper {n}"}) for n in range(3)]
    assert server.call(COMPLETIONS, completion(20)).json["choices"][0]["text"] == alone(20)
    for sleeper in sleepers:
        sleeper.close()
    wait_until(lambda: not server.door.in_flight)


# ------------------------------------------------------------------------------------------- failures


def test_an_exception_while_answering_ends_that_answer_alone(server, monkeypatch):
    from gpt_fast.serve.response import CompletionAnswer

    push = CompletionAnswer.push

    def fail(self, index, events):
        if self.model and "bad-" in self.head["id"] and self.choices[0].tokens > 3:
            raise KeyError("a secret prompt")
        return push(self, index, events)

    monkeypatch.setattr(CompletionAnswer, "push", fail)
    for stream in (True, False):
        bad = server.connect(COMPLETIONS, completion(30, stream=stream), headers={"X-Request-ID": f"bad-{stream}"})
        assert server.call(COMPLETIONS, completion(30)).json["choices"][0]["text"] == alone(30)
        answer = bad.getresponse()
        text = answer.read().decode()
        assert '"server_error"' in text and "secret" not in text
        assert answer.status == (200 if stream else 500)
    wait_until(lambda: not server.door.in_flight and server.service.known() == set())


def test_a_request_ends_at_its_time_limit(server, monkeypatch):
    hold_the_engine(server, monkeypatch)
    ended = server.call(COMPLETIONS, completion(100, timeout=0.2))
    assert ended.json["choices"][0]["finish_reason"] == "length"
    assert 0 < ended.json["usage"]["completion_tokens"] < 100


# ------------------------------------------------------------------------------------------- HTTP


def request_bytes(version: str, body: dict, *headers: str) -> bytes:
    data = json.dumps(body).encode()
    lines = [f"POST {COMPLETIONS} HTTP/{version}", "Host: localhost", f"Content-Length: {len(data)}", *headers]
    return "\r\n".join([*lines, "", ""]).encode() + data


def test_http_1_0_gets_no_chunks_and_the_connection_ends(server):
    head, _, body = server.raw(request_bytes("1.0", completion(12, stream=True))).partition(b"\r\n\r\n")
    assert b"transfer-encoding" not in head.lower() and head.startswith(b"HTTP/1.1 200 ")
    assert "".join(event["choices"][0]["text"] for event in events(body.decode())) == alone(12)
    whole = server.raw(request_bytes("1.0", completion(12))).partition(b"\r\n\r\n")[2]
    assert json.loads(whole)["choices"][0]["text"] == alone(12)


@pytest.mark.parametrize("stream", [True, False])
def test_connection_close_is_said_and_done(server, stream):
    head, _, body = server.raw(request_bytes("1.1", completion(12, stream=stream), "Connection: close")).partition(
        b"\r\n\r\n"
    )
    assert re.search(rb"(?i)\r\nconnection: close(\r\n|$)", head)
    assert body.endswith(b"0\r\n\r\n") == stream


def test_pipelined_requests_are_answered_in_their_order(server):
    bodies = [completion(n, prompt=f"p{n}") for n in (9, 1, 5)]
    sent = b"".join(
        request_bytes("1.1", body, *(["Connection: close"] if body is bodies[-1] else [])) for body in bodies
    )
    counts = re.findall(rb'"completion_tokens": (\d+)', server.raw(sent))
    assert [int(count) for count in counts] == [9, 1, 5]


def test_a_connection_is_kept_for_the_next_request(server):
    connection = server.connect(COMPLETIONS, completion(3, stream=True))
    connection.getresponse().read()
    port = connection.sock.getsockname()[1]
    connection.request("GET", "/v1/models")
    assert json.loads(connection.getresponse().read())["data"][0]["id"] == "gpt-fast"
    assert connection.sock.getsockname()[1] == port
    connection.close()


# ------------------------------------------------------------------------------------------- beside the model


def test_the_page_is_at_the_root_and_where_torchserve_has_it(server):
    first = server.call("/", method="GET")
    assert first.status == 307 and first.headers["location"] == "chat"
    page = server.call("/chat", method="GET")
    assert (
        page.headers["content-type"] == "text/html; charset=utf-8" and "Content-Security-Policy".lower() in page.headers
    )
    assert server.call("/predictions/gpt-fast/1.0/chat", method="GET").body == page.body
    assert server.call("/chat", method="HEAD").body == b""


def test_health_is_ok(server):
    assert server.call("/health", method="GET").json == {"status": "ok"}
