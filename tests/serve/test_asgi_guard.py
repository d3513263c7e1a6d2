"""Who may ask at the ASGI door: keys, loopback names, pages from elsewhere, CORS; and what a start refuses."""

from __future__ import annotations

import pytest

from gpt_fast.serve.asgi.app import KNOWN
from gpt_fast.serve.asgi.guard import OPEN, Rules, check_origins, check_reach, read_keys
from gpt_fast.serve.page.assets import chat_page
from support.asgi_server import AsgiServer

KEY, OTHER_KEY, PAGE = "sk-0123456789", "sk-abcdefghij", "http://app.example:3000"
BODY = {"prompt": "a", "max_tokens": 2, "temperature": 0}


@pytest.fixture(scope="module")
def locked():
    with AsgiServer(rules=Rules(keys=(KEY, OTHER_KEY), origins=(PAGE,))) as server:
        yield server


@pytest.fixture(scope="module")
def local():
    with AsgiServer(rules=Rules(origins=(PAGE,))) as server:
        yield server


@pytest.mark.parametrize(
    "headers",
    [{"Authorization": f"Bearer {KEY}"}, {"Authorization": f"bearer {OTHER_KEY}"}, {"x-api-key": KEY}],
)
def test_any_of_the_keys_opens_the_door(locked, headers):
    assert locked.call("/v1/completions", BODY, headers=headers).status == 200


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"Authorization": "Bearer wrong"},
        {"Authorization": f"Basic {KEY}"},
        {"Authorization": f"Bearer {KEY}x"},
        {"Authorization": f"Bearer {KEY[:-1]}"},
        {"x-api-key": ""},
        {"Authorization": "Bearer schl\xfcssel"},
    ],
)
def test_without_a_key_it_is_401_in_openais_form(locked, headers):
    refused = locked.call("/v1/completions", BODY, headers=headers)
    assert (refused.status, refused.headers["www-authenticate"]) == (401, "Bearer")
    assert refused.json["error"]["code"] == "invalid_api_key" and KEY not in refused.text


def test_every_path_asks_for_the_key_but_those_that_tell_nothing(locked):
    answered = {path for path in KNOWN if locked.call(path, method="GET").status != 401}
    assert answered == {"/" + path for path in OPEN}
    assert {locked.call(f"/{path}", method="GET").status for path in chat_page()} == {200}
    assert locked.call("/chat/nothing", method="GET").status == 404
    for path in ("/predictions/gpt-fast", "/predictions/gpt-fast/1.0/v1/models", "/v1/models/gpt-fast", "/other"):
        assert locked.call(path, {}).status == 401
    assert locked.call("/v1/messages", {}).json["error"]["type"] == "authentication_error"


def test_with_keys_any_name_of_the_server_is_fine(locked):
    headers = {"Authorization": f"Bearer {KEY}", "Host": "models.example", "Origin": "http://elsewhere.example"}
    assert locked.call("/v1/completions", BODY, headers=headers).status == 200


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Host": "evil.example"}, 403),
        ({"Host": "localhost:8000"}, 200),
        ({"Host": "[::1]:8000"}, 200),
        ({"Host": "127.0.0.1.evil.example"}, 403),
        ({"Origin": "http://evil.example"}, 403),
        ({"Origin": "null"}, 403),
        ({"Origin": PAGE}, 200),
        ({"Origin": PAGE, "Sec-Fetch-Site": "cross-site"}, 200),
        ({"Sec-Fetch-Site": "cross-site"}, 403),
        ({"Host": "evil.example", "Origin": PAGE}, 403),
    ],
)
def test_without_keys_names_and_pages_of_elsewhere_are_403(local, headers, status):
    answer = local.call("/v1/completions", BODY, headers=headers)
    assert answer.status == status
    if status == 403:
        assert answer.json["error"]["code"] == "foreign_page" and "allowed" in answer.json["error"]["message"]


def test_browsers_are_told_which_pages_may_ask(locked):
    asked = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization,content-type"}
    said = locked.call("/v1/completions", method="OPTIONS", headers={"Origin": PAGE, **asked})
    assert (said.status, said.headers["access-control-allow-origin"]) == (200, PAGE)
    assert "authorization" in said.headers["access-control-allow-headers"]
    other = locked.call("/v1/completions", method="OPTIONS", headers={"Origin": "http://evil.example", **asked})
    assert "access-control-allow-origin" not in other.headers
    refused = locked.call("/v1/completions", BODY, headers={"Origin": PAGE})
    assert (refused.status, refused.headers["access-control-allow-origin"]) == (401, PAGE)


# ------------------------------------------------------------------------------------------- at the start


def test_a_files_keys_are_read_and_held_to_be_secret(tmp_path):
    path = tmp_path / "keys"
    path.write_text(f"# ours\n{KEY}\n\n  {OTHER_KEY}\n")
    path.chmod(0o644)
    with pytest.raises(ValueError, match="others may read it"):
        read_keys(path, None)
    path.chmod(0o600)
    assert read_keys(path, "sk-of-the-environment") == (KEY, OTHER_KEY)
    assert read_keys(None, KEY) == (KEY,) and read_keys(None, None) == read_keys(None, "") == ()
    path.write_text("# none\n")
    with pytest.raises(ValueError, match="holds no key"):
        read_keys(path, None)
    for bad in ("short", "with a blank in it", "schl\xfcssel-0123"):
        with pytest.raises(ValueError, match="API key"):
            read_keys(None, bad)


def test_a_server_that_others_reach_needs_a_key():
    for host in ("127.0.0.1", "localhost", "::1"):
        check_reach(host, Rules())
    for host in ("0.0.0.0", "::", "10.0.0.1"):
        with pytest.raises(ValueError, match="--api-key-file"):
            check_reach(host, Rules())
        check_reach(host, Rules(keys=(KEY,), origins=("*",)))
    with pytest.raises(ValueError, match="--cors-origin"):
        check_reach("127.0.0.1", Rules(origins=("*",)))


@pytest.mark.parametrize("origin", ["app.example", "http://app.example/", "https://", "null"])
def test_what_is_no_origin_is_refused(origin):
    with pytest.raises(ValueError, match="--cors-origin"):
        check_origins([origin])
