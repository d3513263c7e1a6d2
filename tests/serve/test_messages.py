"""Anthropic's Messages API over HTTP, through their own client, which builds its messages from our events."""

from __future__ import annotations

import json

import openai
import pytest

from gpt_fast.serve.body import RequestError
from gpt_fast.serve.messages import chat_body
from gpt_fast.text.chat import ChatTemplate
from support.round_server import RoundServer
from support.tiny_engine import tiny_engine

TEMPLATE = """{% if tools %}{% for t in tools %}{{ t | tojson }}{% endfor %}
{{ '<tool_call>\n{"name": <function-name>, "arguments": <args-json-object>}\n</tool_call>' }}{% endif %}
{% for m in messages %}<{{ m.role }}>{{ m.content }}{{ m.tool_calls | tojson if m.tool_calls }}
{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"""
GREEDY = {"temperature": 0}  # today's client has no such argument
USER = [{"role": "user", "content": "Weather in Oslo?"}]
WEATHER = {
    "name": "get_weather",
    "description": "d",
    "input_schema": {
        "type": "object",
        "properties": {"city": {"enum": ["Oslo", "Rom"]}, "days": {"enum": [1, 2]}},
        "required": ["city", "days"],
        "additionalProperties": False,
    },
}


@pytest.fixture(scope="module")
def engine():
    engine = tiny_engine(slots=4, max_seq_len=2048)
    engine.chat_template = ChatTemplate(TEMPLATE)
    return engine


@pytest.fixture(scope="module")
def server(engine):
    with RoundServer(engine) as running:
        yield running


@pytest.fixture(scope="module")
def client(server):
    import anthropic  # 2.7 s, so who asks with it is slow

    return anthropic.Anthropic(base_url=server.url, api_key="none", max_retries=0, timeout=60)


def prompt_tokens(message):
    """Anthropic's input_tokens are those that were not in the cache."""
    return message.usage.input_tokens + message.usage.cache_read_input_tokens


def ask(**fields):
    return {"model": "gpt-fast", "max_tokens": 40, "messages": USER, "extra_body": GREEDY} | fields


@pytest.mark.slow
def test_a_message_whole_and_streamed(client, engine):
    whole = client.messages.create(**ask(system="Be short."))
    assert (whole.type, whole.role, whole.model) == ("message", "assistant", "gpt-fast") and whole.id.startswith("msg_")
    assert prompt_tokens(whole) == len(
        engine.encode_chat([{"role": "system", "content": "Be short."}, *USER], add_generation_prompt=True)
    )
    with client.messages.stream(**ask(system=[{"type": "text", "text": "Be short."}])) as stream:
        kinds = [event.type for event in client.messages.create(**ask(system="Be short."), stream=True)]
        text, message = "".join(stream.text_stream), stream.get_final_message()
    assert text == message.content[0].text == whole.content[0].text
    assert (message.stop_reason, prompt_tokens(message)) == (whole.stop_reason, prompt_tokens(whole))
    assert message.usage.output_tokens == whole.usage.output_tokens
    assert message.usage.cache_read_input_tokens == prompt_tokens(whole) - 1 and message.usage.input_tokens == 1
    deltas = kinds.count("content_block_delta")
    assert deltas > 0 and [kind for kind in kinds if kind != "ping"] == [
        "message_start", "content_block_start", *["content_block_delta"] * deltas, "content_block_stop",
        "message_delta", "message_stop",
    ]  # fmt: skip


@pytest.mark.slow
def test_the_answer_is_the_chats(client, server):
    chat = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=60)
    system = [{"role": "system", "content": "Be short."}]
    said = chat.chat.completions.create(model="gpt-fast", messages=system + USER, max_tokens=40, temperature=0)
    assert client.messages.create(**ask(system="Be short.")).content[0].text == said.choices[0].message.content
    response = chat.responses.create(
        model="gpt-fast", instructions="Be short.", input=USER, max_output_tokens=40, temperature=0
    )
    assert response.output_text == said.choices[0].message.content


@pytest.mark.slow
def test_why_it_stopped(client):
    assert client.messages.create(**ask(max_tokens=3)).stop_reason == "max_tokens"
    text = client.messages.create(**ask()).content[0].text
    stops = ["never said", next(char for char in text if char.isascii())]
    with client.messages.stream(**ask(stop_sequences=stops)) as stream:
        streamed = stream.get_final_message()
    whole = client.messages.create(**ask(stop_sequences=stops))
    assert (whole.stop_reason, whole.stop_sequence) == ("stop_sequence", stops[1])
    assert (streamed.stop_reason, streamed.stop_sequence) == ("stop_sequence", stops[1])


@pytest.mark.slow
@pytest.mark.parametrize("choice", [{"type": "any"}, {"type": "tool", "name": "get_weather"}])
def test_a_tool_is_used_whole_and_streamed(client, choice):
    asked = ask(tools=[WEATHER], tool_choice=choice | {"disable_parallel_tool_use": True}, max_tokens=200)
    whole = client.messages.create(**asked)
    (block,) = whole.content
    assert whole.stop_reason == "tool_use" and block.type == "tool_use" and block.id.startswith("toolu_")
    assert block.name == "get_weather" and block.input["city"] in ("Oslo", "Rom") and block.input["days"] in (1, 2)
    with client.messages.stream(**asked) as stream:
        message = stream.get_final_message()
    assert message.stop_reason == "tool_use" and [each.input for each in message.content] == [block.input]


@pytest.mark.slow
def test_the_next_turn_takes_the_use_and_its_result(client):
    first = client.messages.create(**ask(tools=[WEATHER], tool_choice={"type": "any"}, max_tokens=200))
    result = {"type": "tool_result", "tool_use_id": first.content[0].id, "content": [{"type": "text", "text": "3 C"}]}
    turns = [*USER, {"role": "assistant", "content": first.content}, {"role": "user", "content": [result]}]
    answer = client.messages.create(**ask(messages=turns, tools=[WEATHER], max_tokens=4))
    assert prompt_tokens(answer) > prompt_tokens(first) + len("3 C")


@pytest.mark.slow
def test_counted_tokens_are_those_of_the_message(client):
    asked = {"model": "gpt-fast", "messages": USER, "system": "Be short.", "tools": [WEATHER]}
    counted = client.messages.count_tokens(**asked)
    assert counted.input_tokens == prompt_tokens(client.messages.create(**asked, max_tokens=1))


@pytest.mark.slow
def test_an_answer_that_the_client_began_goes_on(client, engine):
    began = [*USER, {"role": "assistant", "content": "It is"}]
    answer = client.messages.create(**ask(messages=began, max_tokens=2))
    tokens = engine.encode_chat(began, add_generation_prompt=False, continue_final_message=True)
    assert prompt_tokens(answer) == len(tokens)


@pytest.mark.slow
def test_errors_are_anthropics(client):
    import anthropic

    with pytest.raises(anthropic.NotFoundError) as missing:
        client.messages.create(**ask(model="other"))
    assert missing.value.body["error"]["type"] == "not_found_error"
    with pytest.raises(anthropic.BadRequestError) as wrong:
        client.messages.create(**ask(extra_body={"top_p": 7}))
    assert wrong.value.body["type"] == "error" and "top_p: must be" in wrong.value.body["error"]["message"]
    with pytest.raises(anthropic.BadRequestError, match="messages"):
        client.messages.count_tokens(model="gpt-fast", messages=[])


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"max_tokens": None}, "max_tokens: is required"),
        ({"messages": None}, "messages: is required"),
        ({"mcp_servers": []}, "mcp_servers"),
        ({"thinking": {"type": "enabled", "budget_tokens": 1024}}, 'thinking.type: not supported (got "enabled"'),
        ({"tool_choice": {"type": "some"}, "tools": [WEATHER]}, "tool_choice.type: unknown"),
        ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "tools[0].type: not supported"),
        ({"messages": [{"role": "system", "content": "x"}]}, "messages[0].role: unknown"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}]},
            'messages[0].content[0].type: not supported in a user message (got "image", allowed text, tool_result)',
        ),
        ({"messages": [{"role": "assistant", "content": [{"type": "tool_result"}]}]}, "messages[0].content[0].type"),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": 7}]}]}, "messages[0].content[0].text"),
        ({"output_config": {"task_budget": {}}}, "output_config.task_budget"),
        ({"output_config": {"format": {"type": "xml"}}}, "output_config.format"),
    ],
)
def test_what_has_no_counterpart_is_named(fields, named):
    with pytest.raises(RequestError) as caught:
        chat_body({"model": "gpt-fast", "max_tokens": 40, "messages": USER} | fields)
    assert named in caught.value.message


LONG = "x" * 300
USE = {"type": "tool_use", "id": "1", "name": "f", "input": {}}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"stop_sequences": [7]}, "stop_sequences: "),
        ({"metadata": {"user_id": 7}}, "metadata.user_id: "),
        ({"output_config": {"effort": "huge"}}, "output_config.effort: "),
        ({"output_config": {"format": {"type": "json_schema", "schema": 7}}}, "output_config.format.schema: "),
        ({"output_config": {"format": {"type": "json_schema", "schema": {"type": "x"}}}}, "output_config.format: "),
        ({"system": 7}, "system: "),
        ({"system": "s", "messages": [USER[0], {"role": "user", "content": []}]}, "messages[1].content: "),
        (
            {"system": "s", "messages": [{"role": "assistant", "content": [USE | {"name": "a b"}]}]},
            "messages[0].content[0].name: ",
        ),
        (
            {"messages": [{"role": "assistant", "content": [{"type": "text", "text": "x"}, USE | {"id": LONG}]}]},
            "messages[0].content[1].id: ",
        ),
        (
            {"messages": [{"role": "assistant", "content": [USE | {"input": [1]}]}]},
            "messages[0].content[0].input: ",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "tool_result", "tool_use_id": LONG}]}]},
            "messages[0].content[0].tool_use_id: ",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "tool_result", "tool_use_id": "1", "content": [7]}]}]},
            "messages[0].content[0].content: ",
        ),
        ({"tools": [WEATHER | {"name": "a b"}]}, "tools[0].name: "),
        ({"tools": [WEATHER, {"name": "f", "input_schema": 7}]}, "tools[1].input_schema: "),
        ({"tools": [WEATHER, {"name": "f", "input_schema": {"type": "array"}}]}, "tools[1].input_schema.type: "),
        ({"tools": [WEATHER], "tool_choice": {"type": "tool", "name": "g"}}, 'tool_choice.name: no such tool (got "g"'),
    ],
)
def test_a_refusal_is_in_the_clients_words(client, fields, named):
    """Where a chat calls the same thing otherwise, or counts otherwise."""
    import anthropic

    asked = ask(**fields)
    body = asked.pop("extra_body")
    own = {name: asked.pop(name) for name in ("output_config", "system") if name in asked}  # their types are too narrow
    with pytest.raises(anthropic.BadRequestError) as refused:
        client.messages.create(**asked, extra_body=body | own)
    assert refused.value.body["error"]["message"].startswith(named)
    if fields.keys() & {"system", "messages", "tools"}:
        with pytest.raises(anthropic.BadRequestError) as refused:
            client.messages.count_tokens(
                **{name: asked[name] for name in ("model", "messages", "tools", "tool_choice") if name in asked},
                extra_body=own,
            )
        assert refused.value.body["error"]["message"].startswith(named)


def test_results_and_text_keep_their_order():
    blocks = [
        {"type": "tool_result", "tool_use_id": "a", "content": "1"},
        {"type": "tool_result", "tool_use_id": "b"},
        {"type": "text", "text": "And"},
        {"type": "text", "text": " now?", "cache_control": {"type": "ephemeral"}},
    ]
    body, _ = chat_body({"max_tokens": 1, "messages": [{"role": "user", "content": blocks}]})
    assert body["messages"] == [
        {"role": "tool", "tool_call_id": "a", "content": "1"},
        {"role": "tool", "tool_call_id": "b", "content": ""},
        {"role": "user", "content": [{"type": "text", "text": "And"}, {"type": "text", "text": " now?"}]},
    ]


@pytest.mark.slow
def test_a_schema_is_kept(client):
    schema = {"type": "object", "properties": {"n": {"enum": [1, 2]}}, "required": ["n"], "additionalProperties": False}
    form = {"format": {"type": "json_schema", "schema": schema}}
    answer = client.messages.create(**ask(max_tokens=60, output_config=form))
    assert answer.stop_reason == "end_turn" and json.loads(answer.content[0].text)["n"] in (1, 2)
