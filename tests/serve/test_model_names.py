"""A model with names of its own, through OpenAI's client."""

import openai
import pytest

from support.round_server import RoundServer

NAMES = ["gpt-4o-mini", "meta-llama/Llama-3.2-1B"]


@pytest.fixture(scope="module")
def client():
    with RoundServer(model_names=NAMES) as server:
        yield openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=30)


def test_every_name_is_listed_and_served_and_answers_carry_the_first(client):
    assert [model.id for model in client.models.list()] == NAMES
    for name in NAMES:
        assert client.models.retrieve(name).id == name
        answer = client.completions.create(model=name, prompt="a", max_tokens=1)
        assert answer.model == NAMES[0]
    messages = [{"role": "user", "content": "a"}]
    assert client.chat.completions.create(model=NAMES[1], messages=messages, max_tokens=1).model == NAMES[0]


def test_another_name_is_404(client):
    with pytest.raises(
        openai.NotFoundError, match=r"gpt-fast.* is not served here .*gpt-4o-mini.*Llama-3\.2-1B"
    ) as caught:
        client.completions.create(model="gpt-fast", prompt="a")
    assert caught.value.code == "model_not_found" and caught.value.param == "model"
    with pytest.raises(openai.NotFoundError, match="allowed v1/models/gpt-4o-mini"):
        client.models.retrieve("gpt-fast")


def test_the_clients_id_comes_back(client):
    raw = client.completions.with_raw_response.create(
        model=NAMES[0], prompt="a", max_tokens=1, extra_headers={"X-Request-Id": "run-17"}
    )
    assert raw.headers["x-client-request-id"] == "run-17" and raw.parse().id == "cmpl-run-17"
