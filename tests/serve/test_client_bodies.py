"""What clients really send, word for word: client_bodies.json holds bodies recorded from langchain-openai, instructor,
litellm and openai (the last lines: from public reports). Each gets an answer that OpenAI's types accept."""

import json
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from openai.types import Completion
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from gpt_fast.text.chat import ChatTemplate
from support.hard_strings import TRL, wheel_member
from support.round_server import RoundServer
from support.tiny_engine import tiny_engine

BODIES = json.loads((Path(__file__).parent / "client_bodies.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def server():
    engine = tiny_engine(slots=4, max_seq_len=8192)
    engine.chat_template = ChatTemplate(wheel_member(TRL, "trl/chat_templates/qwen2_5.jinja").decode())
    with RoundServer(engine) as server:
        yield server


@pytest.mark.parametrize("recorded", BODIES, ids=lambda each: each["client"])
def test_a_recorded_body_is_answered(server, recorded):
    few = {name: 24 for name in ("max_tokens", "max_completion_tokens") if name in recorded["body"]}
    body = recorded["body"] | few
    request = urllib.request.Request(server.url + recorded["path"], json.dumps(body).encode())
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            text = answer.read().decode()
    except urllib.error.HTTPError as error:
        pytest.fail(error.read().decode())
    chat = "chat" in recorded["path"]
    if body.get("stream"):
        frames = [frame.removeprefix("data: ") for frame in text.split("\n\n") if frame]
        assert frames.pop() == "[DONE]"
        for frame in frames:
            (ChatCompletionChunk if chat else Completion).model_construct(**json.loads(frame))
            assert json.loads(frame)["usage"] if "guidellm" in recorded["client"] else True
        return
    whole = (ChatCompletion if chat else Completion).model_validate(json.loads(text), strict=True)
    if body.get("parallel_tool_calls") is False and body.get("tool_choice") == "required":
        assert len(whole.choices[0].message.tool_calls or []) <= 1
    if chat and body.get("tool_choice") == "required" and whole.choices[0].finish_reason != "length":
        assert whole.choices[0].message.tool_calls
