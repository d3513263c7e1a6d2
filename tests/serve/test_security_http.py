"""Nobody from elsewhere is answered by a real server without a token."""

from __future__ import annotations

import pytest

from support.server import Server, shared_server

pytestmark = [pytest.mark.server, pytest.mark.model]
SHORT = {"prompt": "The capital of France", "max_new_tokens": 5, "stream": False}
CHAT = {"messages": [{"role": "user", "content": "x"}], "max_tokens": 1}
DOORS = [
    ("", "POST", SHORT), ("/1.0/v1/chat/completions", "POST", CHAT), ("/1.0/v1/models", "GET", None),
    ("/1.0/chat", "GET", None), ("/1.0/tokenizer_info", "GET", None), ("/1.0/tokenize", "POST", {"prompt": "x"}),
    ("/1.0/v1/messages", "POST", CHAT), ("/1.0/nowhere", "GET", None),
]  # fmt: skip
FOREIGN = [
    {"Host": "evil.example"}, {"Origin": "http://evil.example"}, {"Origin": "null"},
    {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "no-cors"},
]  # fmt: skip


@pytest.fixture(scope="module")
def server() -> Server:
    return shared_server()


@pytest.mark.parametrize("path, method, body", DOORS)
@pytest.mark.parametrize("headers", FOREIGN, ids=str)
def test_a_page_from_elsewhere(server, path, method, body, headers):
    answer = server.call(body, path, method=method, headers=headers)
    assert answer.status == 403
    assert answer.json["error"]["message"].startswith(f"{next(iter(headers))}: not of this machine")


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1:8080", "[::1]:8080"])
def test_this_machine(server, host):
    answer = server.call(SHORT, headers={"Host": host, "Origin": f"http://{host}"})
    assert answer.status == 200 and answer.text.startswith(" is Paris")
