"""The chat page's policy: its own script and style run in it and nothing else; and who gets it through the relay."""

import base64
import hashlib
import http.client
import re
import threading

import pytest

from gpt_fast.serve.page import PageServer, chat_page

PAGE = chat_page()
HEADERS = dict(PAGE.headers)
POLICY = dict(part.strip().split(" ", 1) for part in HEADERS["Content-Security-Policy"].split(";"))


def test_nothing_is_allowed_that_is_not_named():
    assert POLICY["default-src"] == POLICY["frame-ancestors"] == POLICY["base-uri"] == POLICY["form-action"] == "'none'"
    assert "unsafe" not in HEADERS["Content-Security-Policy"] and "*" not in HEADERS["Content-Security-Policy"]
    assert HEADERS["X-Content-Type-Options"] == "nosniff" and HEADERS["Referrer-Policy"] == "no-referrer"


@pytest.mark.parametrize("tag", ["script", "style"])
def test_its_own_code_is_named_by_its_hash(tag):
    start, end = PAGE.text.index(f"<{tag}>") + len(tag) + 2, PAGE.text.index(f"</{tag}>")
    digest = hashlib.sha256(PAGE.text[start:end].encode()).digest()
    assert POLICY[f"{tag}-src"] == f"'sha256-{base64.b64encode(digest).decode()}'"


def test_it_has_no_code_that_the_policy_would_stop():
    html = re.sub(r"<(script|style)>.*?</\1>", "", PAGE.text, flags=re.DOTALL)
    assert not re.search(r"\s(on\w+|style|src|href|action)\s*=", html)
    assert "innerHTML" not in PAGE.text and "eval(" not in PAGE.text


@pytest.mark.parametrize(
    "headers, status",
    [({}, 200), ({"Host": "evil.example"}, 403), ({"Origin": "http://evil.example"}, 403), ({"Origin": "null"}, 403)],
)
@pytest.mark.parametrize("method", ["GET", "POST"])
def test_the_relay_is_for_this_machine_too(method, headers, status):
    """The server behind it sees the relay's own Host."""
    pages = PageServer("http://127.0.0.1:1", port=0)  # nobody there: what is let through ends with the connection
    threading.Thread(target=pages.serve_forever, daemon=True).start()
    try:
        connection = http.client.HTTPConnection("127.0.0.1", pages.server_port, timeout=10)
        connection.request(method, "/chat" if method == "GET" else "/v1/chat/completions", "{}", headers)
        if method == "POST" and status == 200:
            with pytest.raises(http.client.RemoteDisconnected):
                connection.getresponse()
        else:
            assert connection.getresponse().status == status
        connection.close()
    finally:
        pages.shutdown()
        pages.server_close()
