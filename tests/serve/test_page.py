"""The chat page's files and policy: nothing runs in it but its own files; and who gets it through the relay."""

import http.client
import re
import socket
import struct
import threading

import pytest

from gpt_fast.serve.page.assets import PAGE, chat_page, is_of_page
from gpt_fast.serve.page.relay import PageServer

ASSETS = chat_page()
HTML = ASSETS[PAGE]
HEADERS = dict(HTML.headers)
POLICY = dict(part.strip().split(" ", 1) for part in HEADERS["Content-Security-Policy"].split(";"))
SCRIPTS = {path: asset.text for path, asset in ASSETS.items() if path.endswith(".js") and "/vendor/" not in path}


def test_nothing_is_allowed_that_is_not_named():
    closed = ("default-src", "frame-ancestors", "base-uri", "form-action")
    assert {POLICY[name] for name in closed} == {"'none'"}
    assert {POLICY[name] for name in ("script-src", "style-src", "connect-src")} == {"'self'"}
    assert "unsafe" not in HEADERS["Content-Security-Policy"] and "*" not in HEADERS["Content-Security-Policy"]
    assert POLICY["trusted-types"] == "dompurify" and POLICY["require-trusted-types-for"] == "'script'"
    assert HEADERS["X-Content-Type-Options"] == "nosniff" and HEADERS["Referrer-Policy"] == "no-referrer"


def test_it_has_no_code_that_the_policy_would_stop():
    assert not re.search(r"\s(on\w+|style)\s*=|<style|javascript:", HTML.text)
    assert re.findall(r"<script[^>]*>", HTML.text) == [f'<script type="module" src="{folder()}/main.js">']
    for path, text in SCRIPTS.items():
        assert not re.search(
            r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|setAttribute\(.style", text
        ), path


def folder() -> str:
    return next(path for path in ASSETS if path.endswith("/main.js")).rsplit("/", 1)[0]


def test_what_a_page_names_is_there():
    """Its links, and every module's imports, as a browser resolves them, from `chat` and from `chat/`."""
    links = re.findall(r'(?:src|href)="(chat/[^"]*)"', HTML.text)
    assert len(links) == 2
    for link in links:
        assert ASSETS[link] == ASSETS[f"{PAGE}/{link}"]
    for path, text in SCRIPTS.items():
        for name in re.findall(r'(?:from|import) "\./([^"]+)"', text):
            assert f"{path.rsplit('/', 1)[0]}/{name}" in ASSETS, (path, name)


def test_its_files_are_kept_for_good_and_the_page_is_not():
    assert HEADERS["Cache-Control"] == "no-cache"
    for path, asset in ASSETS.items():
        assert is_of_page(path)
        if path != PAGE:
            assert "immutable" in dict(asset.headers)["Cache-Control"] and re.match(r"chat/(chat/)?[0-9a-f]{16}/", path)
            assert dict(asset.headers)["X-Content-Type-Options"] == "nosniff"
            assert asset.content_type.startswith(("text/javascript", "text/css"))
    assert not is_of_page("chats") and not is_of_page("v1/chat/completions")


@pytest.mark.parametrize(
    "headers, status",
    [({}, 200), ({"Host": "evil.example"}, 403), ({"Origin": "http://evil.example"}, 403), ({"Origin": "null"}, 403)],
)
@pytest.mark.parametrize("method, path", [("GET", "/chat"), ("GET", "/v1/models"), ("POST", "/v1/chat/completions")])
def test_the_relay_is_for_this_machine_too(method, path, headers, status):
    """The server behind it sees the relay's own Host."""
    with relay() as port:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
        connection.request(method, path, "{}", headers)
        if path != "/chat" and status == 200:  # nobody there: what is let through ends with the connection
            with pytest.raises(http.client.RemoteDisconnected):
                connection.getresponse()
        else:
            assert connection.getresponse().status == status
        connection.close()


def test_the_relay_has_the_page_s_files_and_no_others():
    with relay() as port:
        for path, asset in [*ASSETS.items(), ("chat/../relay.py", None), (f"{folder()}/relay.py", None)]:
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
            connection.request("GET", f"/{path}")
            answer = connection.getresponse()
            assert answer.status == (404 if asset is None else 200), path
            if asset is not None:
                assert answer.read().decode() == asset.text and answer.headers["Content-Type"] == asset.content_type
            connection.close()


def test_a_browser_that_leaves_leaves_no_traceback(capfd):
    with relay() as port:
        for sent in (b"", b"GET /chat HTTP/1.0\r\nHost: localhost\r\n\r\n"):
            connection = socket.create_connection(("127.0.0.1", port))
            connection.sendall(sent)
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # close with a reset
            connection.close()
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
        connection.request("GET", "/nothing")
        assert connection.getresponse().status == 404
        connection.close()
    assert capfd.readouterr().err == ""


class relay:
    """The page in front of nobody; its port."""

    def __enter__(self) -> int:
        self.pages = PageServer("http://127.0.0.1:1", port=0)
        threading.Thread(target=self.pages.serve_forever, args=(0.01,), daemon=True).start()
        return self.pages.server_port

    def __exit__(self, *_: object) -> None:
        self.pages.shutdown()
        self.pages.server_close()
