"""/openapi.json and /docs of the ASGI door: complete, well formed, and its examples are requests that are answered."""

from __future__ import annotations

import html
import re

import jsonschema
import pytest

from gpt_fast.serve.admission import AT_ONCE
from gpt_fast.serve.asgi import door
from gpt_fast.serve.asgi.guard import Rules
from gpt_fast.serve.asgi.openapi import POSTED, READ, STREAMED, document
from gpt_fast.serve.endpoints import ENDPOINTS
from support.asgi_server import AsgiServer


@pytest.fixture(scope="module")
def server():
    with AsgiServer() as server:
        yield server


def test_every_path_is_described():
    assert POSTED.keys() - {"predictions/gpt-fast"} == {*filter(None, ENDPOINTS), *AT_ONCE}
    assert READ.keys() == {"v1/models", *door.READ}


@pytest.mark.parametrize("path", POSTED)
def test_an_example_fits_its_schema_and_is_answered_as_described(server, path):
    told = server.call("/openapi.json", method="GET").json["paths"][f"/{path}"]["post"]
    asked = told["requestBody"]["content"]["application/json"]
    jsonschema.Draft202012Validator.check_schema(asked["schema"])
    jsonschema.validate(asked["example"], asked["schema"])
    answer = server.call(f"/{path}", asked["example"])
    described = told["responses"]["200"]["content"]
    assert answer.status == 200 and answer.headers["content-type"].split(";")[0] in described
    if path in STREAMED:
        streamed = server.call(f"/{path}", asked["example"] | {"stream": True})
        assert (
            streamed.headers["content-type"].split(";")[0] == "text/event-stream" and "text/event-stream" in described
        )


@pytest.mark.parametrize("path", READ)
def test_what_is_only_read_is_there(server, path):
    assert server.call(f"/{path}", method="GET").status == 200


def test_a_refusal_has_the_described_form(server):
    made = document(keys=False)
    answer = server.call("/v1/completions", {"prompt": 7})
    assert answer.status == 400
    jsonschema.validate(answer.json, made["components"]["schemas"]["Error"])


def test_the_page_shows_every_example_and_loads_nothing(server):
    answer = server.call("/docs", method="GET")
    assert answer.headers["content-security-policy"] == "default-src 'none'"
    assert "<script" not in answer.text and not re.search(r"(src|href)=\"?(https?:)?//", answer.text)
    for path in POSTED:
        assert f"curl http://HOST:PORT/{path} " in html.unescape(answer.text)


def test_keys_are_told_and_asked_for():
    assert document(keys=True)["security"] and "security" not in document(keys=False)
    with AsgiServer(rules=Rules(keys=("a-key-of-the-test",))) as server:
        assert server.call("/openapi.json", method="GET").status == 401
        headers = {"Authorization": "Bearer a-key-of-the-test"}
        assert "Bearer $KEY" in server.call("/docs", method="GET", headers=headers).text
