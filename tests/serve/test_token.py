"""With TorchServe's token on: what the official clients must be given, at every endpoint, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Iterator

import openai
import pytest

from support.server import Server, new_server

pytestmark = [pytest.mark.server, pytest.mark.model]
USER = [{"role": "user", "content": "Hi"}]


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    server = new_server()
    try:
        server.start(token="on")
        yield server
    finally:
        server.stop()


@pytest.fixture(scope="module")
def key(server: Server) -> str:
    key = server.instance.token("inference")
    assert key
    return key


def test_anthropics_client_has_it_as_auth_token(server: Server, key: str) -> None:
    """TorchServe looks for it in Authorization alone, not in x-api-key, where the API and older clients put it."""
    import anthropic

    where = {"base_url": server.base_url.removesuffix("/v1"), "max_retries": 0, "timeout": 120}
    ask = {"model": "gpt-fast", "messages": USER}
    client = anthropic.Anthropic(auth_token=key, **where)
    assert client.messages.create(**ask, max_tokens=2).content[0].text
    assert client.messages.count_tokens(**ask).input_tokens > 0
    with client.messages.stream(**ask, max_tokens=2) as stream:
        assert "".join(stream.text_stream)
    with pytest.raises(anthropic.BadRequestError, match="Token Authorization failed"):
        anthropic.Anthropic(auth_token="x", **where).messages.create(**ask, max_tokens=2)
    body = ask | {"max_tokens": 2}
    assert server.call(body, "/1.0/v1/messages", headers={"x-api-key": key}).status == 400
    assert server.call(body, "/1.0/v1/messages", headers={"Authorization": f"Bearer {key}"}).status == 200


def test_openais_client_has_it_as_api_key(server: Server, key: str) -> None:
    client = openai.OpenAI(base_url=server.base_url, api_key=key, max_retries=0, timeout=120)
    assert client.chat.completions.create(model="gpt-fast", messages=USER, max_tokens=2).choices[0].message.content
    assert client.responses.create(model="gpt-fast", input="Hi", max_output_tokens=2).output_text
    with pytest.raises(openai.BadRequestError, match="Token Authorization failed"):
        openai.OpenAI(base_url=server.base_url, api_key="x", max_retries=0, timeout=120).models.list()


def test_the_watch_renews_a_key_that_expired(server: Server, key: str) -> None:
    """It would take the refusal for an answer, and see no wedge: keys expire after a day."""
    file = server.instance.run_dir / "key_file.json"
    keys = json.loads(file.read_text())
    for kind in ("inference", "management"):  # what TorchServe says to these, it says to expired ones
        keys[kind]["key"] = "expired"
    file.write_text(json.dumps(keys))
    health = server.instance.health(timeout=60)
    assert health is not None and health["status"] == "ok" and server.instance.is_ready()
    new = server.instance.token("inference")
    assert new not in ("expired", key)
    body = {"prompt": "Hi", "max_new_tokens": 2}
    assert server.call(body, headers={"Authorization": f"Bearer {new}"}).status == 200
