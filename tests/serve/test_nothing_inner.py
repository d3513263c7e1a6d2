"""No answer tells a path, an address or a module of the server: neither of a client's fault nor of ours."""

import http.client
import json
import re

import pytest

from gpt_fast.serve.response import OpenAIAnswer, PlainAnswer
from gpt_fast.text.chat import ChatTemplate
from support.round_server import RoundServer
from support.tiny_engine import tiny_engine

INNER = re.compile(r"Traceback|0x[0-9a-f]{4,}|\.py\b|secret|site-packages|gpt_fast|jinja|Error\b")
PLANTED = "/home/secret/gpt_fast/serve/x.py: <gpt_fast.llm.Engine object at 0x7f0011223344>"
CHAT = {"messages": [{"role": "user", "content": "x"}], "max_tokens": 2}
PATHS = {
    "": {"prompt": "x", "max_new_tokens": 2},
    "/v1/completions": {"prompt": "x", "max_tokens": 2},
    "/v1/chat/completions": CHAT,
    "/v1/messages": CHAT,
    "/v1/responses": {"input": "x"},
    "/tokenize": {"prompt": "x"},
    "/v1/messages/count_tokens": {"messages": CHAT["messages"]},
}


def post(server: RoundServer, path: str, body: object) -> tuple[int, str]:
    connection = http.client.HTTPConnection(server.url.split("/")[2], timeout=30)
    target = "/predictions/gpt-fast" + path
    connection.request("POST", target, body if isinstance(body, bytes) else json.dumps(body).encode())
    answer = connection.getresponse()
    try:
        text = answer.read().decode()
    except http.client.IncompleteRead as cut:
        text = cut.partial.decode()
    connection.close()
    return answer.status, text


@pytest.fixture(scope="module")
def server():
    with RoundServer(tiny_engine(slots=4)) as running:
        yield running


@pytest.mark.parametrize("path", PATHS)
def test_a_fault_of_ours(server, path, monkeypatch):
    def fail(*args, **kwargs):
        raise RuntimeError(PLANTED)

    engine = server.rounds.service.engine
    for name in ("encode", "encode_chat"):
        monkeypatch.setattr(engine, name, fail)
    status, text = post(server, path, PATHS[path])
    assert status == 500 and "the server failed on this request" in text
    assert not INNER.search(text.replace("api_error", "").replace("server_error", ""))


@pytest.mark.parametrize("path", ["", "/v1/completions", "/v1/chat/completions"])
@pytest.mark.parametrize("stream", [True, False])
def test_a_fault_within_an_answer(server, path, stream, monkeypatch):
    def fail(*args, **kwargs):
        raise RuntimeError(PLANTED)

    for kind in (PlainAnswer, OpenAIAnswer):
        monkeypatch.setattr(kind, "push", fail)
    _, text = post(server, path, PATHS[path] | {"stream": stream})
    assert not INNER.search(text)


@pytest.mark.parametrize(
    "source",
    [
        "{{ raise_exception(messages | map('upper') | string) }}",
        "{{ messages.a.b.c }}",
        "{{ 1 + messages }}",
        "{{ messages | tojson(indent=messages) }}",
        "{{ ''.__class__.__mro__ }}{{ undefined.x }}",
        "{% include '/etc/passwd' %}",
    ],
)
def test_a_template_that_fails(server, source, monkeypatch):
    monkeypatch.setattr(server.rounds.service.engine, "chat_template", ChatTemplate(source))
    status, text = post(server, "/v1/chat/completions", CHAT)
    assert status == 400
    assert not INNER.search(text)


@pytest.mark.parametrize("path", [*PATHS, "/v1/models/x", "/nowhere/../../etc/passwd", "/detokenize"])
@pytest.mark.parametrize("body", [b"", b"{", b"\xff", b"[]", b"{}", b'{"prompt": 1e999}', b'{"model": "/etc/passwd"}'])
def test_a_fault_of_the_clients(server, path, body):
    status, text = post(server, path, body)
    assert status in (400, 404)
    assert not INNER.search(text)
