"""TorchServe's gRPC door: both of its calls give the whole answer, in one message, and end."""

from __future__ import annotations

import json
from collections.abc import Iterator

import grpc
import pytest

from support.server import Server, shared_server

pytestmark = [pytest.mark.server, pytest.mark.model]
SERVICE = "/org.pytorch.serve.grpc.inference.InferenceAPIsService/"
BODY = {"prompt": "The capital of France is", "max_new_tokens": 20, "temperature": 0}


@pytest.fixture(scope="module")
def server() -> Server:
    return shared_server()


@pytest.fixture(scope="module")
def channel(server: Server) -> Iterator[grpc.Channel]:
    with grpc.insecure_channel(f"127.0.0.1:{server.ports[3]}") as made:
        yield made


def field(number: int, content: bytes) -> bytes:
    """A field of bytes in protobuf's wire format; all here are shorter than 128."""
    assert len(content) < 128
    return bytes([number << 3 | 2, len(content)]) + content


def request(body: dict[str, object]) -> bytes:
    """PredictionsRequest: model_name, and the map `input`, whose entries are key and value."""
    return field(1, b"gpt-fast") + field(3, field(1, b"data") + field(2, json.dumps(body).encode()))


def text_of(message: bytes) -> str:
    """PredictionResponse: one field of bytes, its length in one or two bytes."""
    assert message[0] == 1 << 3 | 2
    return message[2 if message[1] < 128 else 3 :].decode()


def test_both_calls_give_the_whole_answer(server: Server, channel: grpc.Channel) -> None:
    expected = server.call(BODY | {"stream": False}).text
    body = request(BODY)  # which streams, over HTTP
    assert text_of(channel.unary_unary(SERVICE + "Predictions")(body, timeout=60)) == expected
    messages = list(channel.unary_stream(SERVICE + "StreamPredictions")(body, timeout=60))
    assert [text_of(message) for message in messages] == [expected]


def test_a_refusal_is_a_whole_answer_too(server: Server, channel: grpc.Channel) -> None:
    wrong = request({"prompt": 5})
    (message,) = channel.unary_stream(SERVICE + "StreamPredictions")(wrong, timeout=60)
    for refusal in (message, channel.unary_unary(SERVICE + "Predictions")(wrong, timeout=60)):
        assert json.loads(text_of(refusal))["error"]["param"] == "prompt"
    assert server.call(BODY).status == 200  # the worker is the same, and well
