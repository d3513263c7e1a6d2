"""Who may ask a server without a token: this machine's programs and pages, nobody else's."""

import json

import pytest

from gpt_fast.serve.foreign_page import is_local, refusal_of

LOCAL = [
    "localhost",
    "LOCALHOST:8080",
    "127.0.0.1",
    "127.0.0.1:8080",
    "127.8.9.1:1",
    "[::1]",
    "[::1]:8080",
    "localhost:",
]
FOREIGN = [
    "", "evil.example", "evil.example:8080", "localhost.evil.example", "127.0.0.1.evil.example", "localhost.",
    "unix:80",
    "192.168.0.7:8080", "0.0.0.0", "[::]:80", "[::1", "[1::1::1]", "[::1]evil", "127.0.0.1@evil.example", "null",
    "127.0.0.1:8080, evil.example", "127.0.0.1/evil.example", "2130706433", " localhost", "localhost\n", "127.0.0.1:x",
]  # fmt: skip


@pytest.mark.parametrize("name", LOCAL)
def test_this_machine(name):
    assert is_local(name)
    assert refusal_of([("Host", name), ("oRiGiN", f"http://{name}"), ("Sec-Fetch-Site", "cross-site")]) is None


@pytest.mark.parametrize("name", FOREIGN)
def test_another_machine(name):
    assert not is_local(name)
    for headers in (
        [("Host", name)],
        [("hOsT", name), ("Host", "localhost")],
        [("host", "localhost"), ("HOST", name)],
        [("Host", "localhost:8080"), ("Origin", f"https://{name}")],
        [("Host", "localhost:8080"), ("Origin", name)],
    ):
        refused = refusal_of(headers)
        assert refused is not None and refused.status == 403
        assert json.dumps(name) in refused.message or "https" in refused.message
        assert "token" in refused.message  # the way out


@pytest.mark.parametrize("origin", ["null", "file://", "chrome-extension://localhost", "ftp://localhost", "http://"])
def test_origins_that_are_no_page_of_a_server_here(origin):
    assert refusal_of([("Host", "localhost"), ("Origin", origin)]) is not None


def test_what_sends_neither():
    assert refusal_of([]) is None  # HTTP/1.0, gRPC: no browser
    assert refusal_of([("Host", "localhost"), ("User-Agent", "curl")]) is None


@pytest.mark.parametrize(
    "site, mode, refused",
    [("cross-site", "no-cors", True), ("cross-site", "navigate", False), ("same-origin", "cors", False)],
)
def test_what_a_page_embeds(site, mode, refused):
    """An image's address has no Origin; following a link is the user's own doing."""
    headers = [("Host", "localhost"), ("Sec-Fetch-Site", site), ("Sec-Fetch-Mode", mode)]
    assert (refusal_of(headers) is not None) == refused
