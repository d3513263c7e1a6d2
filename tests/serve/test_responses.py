"""OpenAI's Responses API over HTTP, through their own client, which builds its responses from our events."""

from __future__ import annotations

import json
from typing import Literal

import openai
import pytest
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import BaseModel, TypeAdapter

from gpt_fast.serve.body import RequestError
from gpt_fast.serve.responses import chat_body
from gpt_fast.text.chat import ChatTemplate
from support.round_server import RoundServer
from support.tiny_engine import tiny_engine

TEMPLATE = """{% if tools %}{% for t in tools %}{{ t | tojson }}{% endfor %}
{{ '<tool_call>\n{"name": <function-name>, "arguments": <args-json-object>}\n</tool_call>' }}{% endif %}
{% for m in messages %}<{{ m.role }}>{{ m.content }}{{ m.tool_calls | tojson if m.tool_calls }}
{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"""
WEATHER = {
    "type": "function",
    "name": "get_weather",
    "description": "d",
    "strict": True,
    "parameters": {
        "type": "object",
        "properties": {"city": {"enum": ["Oslo", "Rom"]}, "days": {"enum": [1, 2]}},
        "required": ["city", "days"],
        "additionalProperties": False,
    },
}
EVENT = TypeAdapter(ResponseStreamEvent)


class Place(BaseModel):
    city: Literal["Oslo", "Rom"]
    days: Literal[1, 2]


@pytest.fixture(scope="module")
def engine():
    engine = tiny_engine(slots=4, max_seq_len=2048)
    engine.chat_template = ChatTemplate(TEMPLATE)
    return engine


@pytest.fixture(scope="module")
def client(engine):
    with RoundServer(engine) as server:
        yield openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=60)


def ask(**fields):
    return {"model": "gpt-fast", "input": "Weather in Oslo?", "max_output_tokens": 40, "temperature": 0} | fields


def test_text_whole_and_streamed(client, engine):
    whole = client.responses.create(**ask(instructions="Be short.", store=True, metadata={"a": "b"}))
    Response.model_validate(whole.model_dump(), strict=True)
    assert (whole.object, whole.model, whole.instructions, whole.metadata) == (
        "response", "gpt-fast", "Be short.", {"a": "b"},
    )  # fmt: skip
    assert whole.id.startswith("resp_") and whole.model_extra["store"] is False
    chat = [{"role": "system", "content": "Be short."}, {"role": "user", "content": "Weather in Oslo?"}]
    assert whole.usage.input_tokens == len(engine.encode_chat(chat, add_generation_prompt=True))
    stop = next(char for char in whole.output_text[3:] if char.isascii() and char not in whole.output_text[:3])
    asked = ask(instructions="Be short.", extra_body={"stop": stop})
    ended = client.responses.create(**asked)
    with client.responses.stream(**asked) as stream:
        events = list(stream)
        final = stream.get_final_response()
    assert final.output_text == ended.output_text != "" and whole.output_text.startswith(final.output_text)
    assert final.status == ended.status == "completed" and final.usage.total_tokens == ended.usage.total_tokens
    assert "".join(e.delta for e in events if e.type == "response.output_text.delta") == final.output_text


def raw_events(client, **fields):
    """As they are sent: each of its type, in strict mode."""
    with client.responses.with_streaming_response.create(**ask(**fields), stream=True) as reply:
        lines = [line.removeprefix("data: ") for line in reply.iter_lines() if line.startswith("data: ")]
    return [EVENT.validate_json(line) for line in lines]


def test_the_events_of_a_text_in_their_order(client):
    events = raw_events(client)
    assert [event.sequence_number for event in events] == list(range(len(events)))
    deltas = [event for event in events if event.type == "response.output_text.delta"]
    assert [event.type.removeprefix("response.") for event in events] == [
        "created", "in_progress", "output_item.added", "content_part.added", *["output_text.delta"] * len(deltas),
        "output_text.done", "content_part.done", "output_item.done", events[-1].type.removeprefix("response."),
    ]  # fmt: skip
    assert events[0].response.status == "in_progress" and events[0].response.output == []
    text = "".join(event.delta for event in deltas)
    assert events[-4].text == events[-3].part.text == events[-2].item.content[0].text == text
    assert len({event.item_id for event in deltas} | {events[2].item.id, events[-2].item.id}) == 1
    assert events[-1].response.output[0].content[0].text == text


def test_the_events_of_a_call_in_their_order(client):
    events = raw_events(client, tools=[WEATHER], tool_choice="required", max_output_tokens=200)
    assert [event.type.removeprefix("response.") for event in events] == [
        "created", "in_progress", "output_item.added", "function_call_arguments.delta", "function_call_arguments.done",
        "output_item.done", "completed",
    ]  # fmt: skip
    assert events[2].item.arguments == "" and events[3].delta == events[4].arguments == events[5].item.arguments


def test_a_cut_answer_is_incomplete(client):
    cut = client.responses.create(**ask(max_output_tokens=3))
    assert (cut.status, cut.incomplete_details.reason) == ("incomplete", "max_output_tokens")
    assert cut.output[0].status == "incomplete" and cut.usage.output_tokens == 3
    assert raw_events(client, max_output_tokens=3)[-1].type == "response.incomplete"


@pytest.mark.slow
def test_a_call_and_its_output(client):
    asked = ask(tools=[WEATHER], tool_choice={"type": "function", "name": "get_weather"}, max_output_tokens=200)
    first = client.responses.create(**asked)
    (call,) = first.output
    assert first.status == "completed" and call.type == "function_call" and call.name == "get_weather"
    assert json.loads(call.arguments)["city"] in ("Oslo", "Rom") and call.call_id.startswith("call_")
    with client.responses.stream(**asked) as stream:
        (streamed,) = stream.get_final_response().output
    assert (streamed.name, streamed.arguments) == (call.name, call.arguments)
    turns = [{"role": "user", "content": "Weather in Oslo?"}, *first.output]
    turns.append({"type": "function_call_output", "call_id": call.call_id, "output": '{"degrees": 3}'})
    second = client.responses.create(**ask(input=turns, tools=[WEATHER], max_output_tokens=4))
    assert second.usage.input_tokens > first.usage.input_tokens + len('{"degrees": 3}')


def test_a_conversation_is_sent_whole(client):
    first = client.responses.create(**ask())
    turns = [{"role": "user", "content": "Weather in Oslo?"}, *first.output, {"role": "user", "content": "And Rom?"}]
    second = client.responses.create(**ask(input=turns))
    assert second.usage.input_tokens > first.usage.input_tokens + first.usage.output_tokens
    with pytest.raises(openai.BadRequestError, match="nothing is stored here, send the earlier items as input"):
        client.responses.create(**ask(previous_response_id=first.id))


@pytest.mark.slow
def test_a_parsed_answer(client):
    parsed = client.responses.parse(**ask(text_format=Place, max_output_tokens=200)).output_parsed
    assert isinstance(parsed, Place)
    with client.responses.stream(**ask(text_format=Place, max_output_tokens=200)) as stream:
        assert stream.get_final_response().output_parsed == parsed


def test_logprobs(client):
    asked = ask(include=["message.output_text.logprobs"], top_logprobs=2, max_output_tokens=5)
    rows = client.responses.create(**asked).output[0].content[0].logprobs
    assert len(rows) == 5 and all(len(row.top_logprobs) == 2 for row in rows)
    assert rows[0].logprob == rows[0].top_logprobs[0].logprob
    with client.responses.stream(**asked) as stream:
        deltas = [row for event in stream if event.type == "response.output_text.delta" for row in event.logprobs]
    assert [row.logprob for row in deltas] == [row.logprob for row in rows]


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"input": None}, "input: must be a string or a list of items"),
        ({"input": []}, "input: must be a string or a list of items"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, 'input[0].type: not supported (got "item_reference"'),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input[0].content"),
        ({"conversation": "c"}, "conversation: nothing is stored here"),
        ({"background": True}, "background: not supported (allowed false) (got true)"),
        ({"truncation": "auto"}, "truncation: not supported"),
        ({"tools": [{"type": "web_search"}]}, 'tools[0].type: not supported (got "web_search", allowed "function")'),
        ({"max_output_tokens": 0}, "max_output_tokens: must be a whole number (got 0"),
        ({"colour": "red"}, '"colour": unknown field'),
        ({"text": {"format": "json"}}, "text.format: must be"),
    ],
)
def test_what_has_no_counterpart_is_named(fields, named):
    with pytest.raises(RequestError) as caught:
        chat_body({"model": "gpt-fast", "input": "x"} | fields)
    assert named in caught.value.message


def test_values_that_ask_for_nothing_pass():
    fields = {"store": True, "background": False, "truncation": "disabled", "conversation": None, "metadata": {}}
    body, _ = chat_body({"input": "x"} | fields)
    assert body == {"messages": [{"role": "user", "content": "x"}]}


CALL = {"type": "function_call", "call_id": "1", "name": "f", "arguments": "{}"}
MESSAGE = {"type": "message", "role": "user", "content": "x"}


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"max_output_tokens": 1 << 30}, "max_output_tokens"),
        ({"input": "x" * 100_000}, "input"),
        ({"input": [MESSAGE | {"role": "robot"}], "instructions": "s"}, "input[0].role"),
        ({"input": [MESSAGE, CALL, CALL | {"arguments": "["}]}, "input[2].arguments"),
        ({"input": [MESSAGE, CALL | {"call_id": None}], "instructions": "s"}, "input[1].call_id"),
        ({"input": [MESSAGE, CALL | {"name": "a b"}]}, "input[1].name"),
        ({"input": [CALL, {"type": "function_call_output", "call_id": None, "output": "x"}]}, "input[1].call_id"),
        ({"instructions": 7}, "instructions"),
        ({"tools": [WEATHER | {"parameters": {"type": "array"}}]}, "tools[0].parameters.type"),
        ({"tools": [WEATHER | {"name": "a b"}]}, "tools[0].name"),
        ({"reasoning": {"effort": "huge"}}, "reasoning.effort"),
        ({"text": {"verbosity": "low"}}, "text.verbosity"),
        ({"text": {"format": {"type": "json_schema", "name": "a", "schema": {"type": "x"}}}}, "text.format"),
        ({"text": {"format": {"type": "json_schema", "name": "a", "schema": 7}}}, "text.format.schema"),
        ({"text": {"format": {"type": "xml"}}}, "text.format.type"),
    ],
)
def test_a_refusal_is_in_the_clients_words(client, fields, param):
    """Where a chat calls the same thing otherwise, or counts otherwise."""
    with pytest.raises(openai.BadRequestError) as refused:
        client.responses.create(**ask(extra_body=fields))
    assert refused.value.param == param
    assert refused.value.body["message"].startswith(f"{param}: ")


def test_cached_tokens_are_told(client):
    first = client.responses.create(**ask(input="Never asked before.", max_output_tokens=1)).usage
    second = client.responses.create(**ask(input="Never asked before.", max_output_tokens=1)).usage
    assert second.input_tokens == first.input_tokens
    assert second.input_tokens_details.cached_tokens == first.input_tokens - 1
    chat = [{"role": "user", "content": "Never asked before."}]
    third = client.chat.completions.create(model="gpt-fast", messages=chat, max_tokens=1).usage
    assert third.prompt_tokens_details.cached_tokens == first.input_tokens - 1
