"""Tool calls: which templates have them, what a text of them means however it is cut, and the whole way by HTTP."""

import json
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpt_fast.llm import Engine
from gpt_fast.serve.tool_calls import ToolCall, call_parser
from gpt_fast.text.chat import HERMES, LLAMA, ChatTemplate, read_tool_format
from gpt_fast.text.grammar import Constraint, Maker
from support.hard_strings import TRL, wheel_member
from support.round_server import RoundServer
from support.tiny_engine import ByteTokenizer, tiny_engine

NAMES = ["get_weather", "clock"]


def tool(name, **parameters):
    return {"type": "function", "function": {"name": name, "description": "d", "parameters": parameters}}


WEATHER = tool(
    "get_weather",
    type="object",
    properties={"city": {"enum": ["Oslo", "Rom"]}, "days": {"enum": [1, 2]}},
    required=["city", "days"],
    additionalProperties=False,
)
CLOCK = tool("clock", type="object", properties={}, additionalProperties=False)

# ------------------------------------------------------------------------------------------- templates

FORMATS = {"qwen2_5": HERMES, "qwen3": HERMES, "llama3_1": LLAMA, "llama3_2": LLAMA, "llama3": None, "phi3": None}


@pytest.mark.parametrize(("name", "form"), FORMATS.items())
def test_a_template_says_how_its_model_calls(name, form):
    source = wheel_member(TRL, f"trl/chat_templates/{name}.jinja").decode()
    assert ChatTemplate(source).tool_format == form
    assert ChatTemplate("no tools", tool_source=source).tool_format == form


def test_other_formats_are_not_mistaken_for_these():
    qwen3_coder = "{{ '<tool_call>\\n<function=example_function_name>\\n<parameter=example_parameter_1>' }}"
    mistral = "{{ '[TOOL_CALLS] [' }}{{ tool_call.arguments|tojson }}"
    assert read_tool_format(qwen3_coder) is None and read_tool_format(mistral) is None


# ------------------------------------------------------------------------------------------- texts


def parse(form, chunks):
    """(content, calls) of a text that comes in these chunks."""
    parser = call_parser(form, NAMES)
    pieces = [piece for chunk in chunks for piece in parser.push(chunk)] + parser.finish(cut=False)
    return "".join(p for p in pieces if isinstance(p, str)), [p for p in pieces if isinstance(p, ToolCall)]


def call_text(form, name, arguments):
    return f"{form.before}\n{json.dumps({'name': name, form.arguments_key: arguments})}\n{form.after}"


def cuts(text, seed):
    rng, parts = random.Random(seed), []
    while text:
        size = rng.choice([1, 1, 2, 3, 7, 40])
        parts.append(text[:size])
        text = text[size:]
    return parts


MARKED_TEXTS = ["a</tool_call>b", "<tool_call>", '\\"</tool_call>', "</tool_call>\\", "; {}", '{"a": 1}</tool_call>']
json_values = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(-99, 99), st.text(max_size=5), st.sampled_from(MARKED_TEXTS)),
    lambda each: st.one_of(st.lists(each, max_size=2), st.dictionaries(st.text(max_size=3), each, max_size=2)),
    max_leaves=4,
)
arguments = st.dictionaries(st.sampled_from(["city", "é", '"']), json_values, max_size=2)
calls = st.tuples(st.sampled_from(NAMES), arguments)
words = st.text(alphabet='ab <>{}:\n"é', max_size=8).filter(lambda text: "<tool_call>" not in text)


@given(before=words, made=st.lists(calls, min_size=1, max_size=3), after=words, seed=st.integers(0, 99))
def test_marked_calls_and_the_text_around_them(before, made, after, seed):
    text = before + "\n".join(call_text(HERMES, *call) for call in made) + after
    content, found = parse(HERMES, cuts(text, seed))
    assert [(call.name, json.loads(call.arguments)) for call in found] == made
    assert content == before.rstrip() + (after if after.strip() else "")


@given(
    made=st.lists(calls, min_size=1, max_size=3), between=st.sampled_from(["; ", ";", "\n"]), seed=st.integers(0, 99)
)
def test_bare_calls(made, between, seed):
    text = between.join(call_text(LLAMA, *call) for call in made)
    content, found = parse(LLAMA, cuts(text, seed))
    assert content == "" and [(call.name, json.loads(call.arguments)) for call in found] == made


FRAGMENTS = [
    "<tool_call>",
    "</tool_call>",
    "<tool",
    "_call>",
    "\n",
    " ",
    "{",
    "}",
    '{"name": "clock", "arguments": {}}',
    "word",
    '{"name": "clock", "parameters": {}}',
    '{"name": "other", "arguments": {}}',
    '"',
    ";",
    "<",
    "é",
    '{"name": "clock", "arguments": {"t": "',
    '"}}',
    "\\",
]


def test_marks_inside_a_string_are_its_text():
    text = '<tool_call>{"name":"clock","arguments":{"t":"a</tool_call>b"}}</tool_call>'
    for chunks in ([text], text, [text[:50], text[50:]]):
        content, (call,) = parse(HERMES, chunks)
        assert (content, json.loads(call.arguments)) == ("", {"t": "a</tool_call>b"})
    for cut in range(len(text)):
        assert parse(HERMES, [text[:cut], text[cut:]]) == parse(HERMES, [text])
    content, (call,) = parse(HERMES, text.removesuffix("</tool_call>"))  # a last call may lack its end mark
    assert (content, json.loads(call.arguments)) == ("", {"t": "a</tool_call>b"})


def test_a_string_that_never_ends_hides_no_call_behind_it():
    broken = '<tool_call>{"name": "clock</tool_call>'
    call = '<tool_call>{"name": "clock", "arguments": {}}</tool_call>'
    content, found = parse(HERMES, broken + call)
    assert content == broken and [each.name for each in found] == ["clock"]


@pytest.mark.parametrize("form", [HERMES, LLAMA])
@given(text=st.lists(st.sampled_from(FRAGMENTS), max_size=12).map("".join), seed=st.integers(0, 999))
def test_any_text_means_the_same_however_it_is_cut(form, text, seed):
    whole = parse(form, [text])
    assert parse(form, text) == whole == parse(form, cuts(text, seed))
    content, found = whole
    if not found:
        assert content == text  # what looks like a call and is none is the model's answer


@pytest.mark.parametrize("form", [HERMES, LLAMA])
@pytest.mark.parametrize(
    "body",
    [
        "{",
        "{}",
        "[]",
        '"clock"',
        '{"name": "clock"}',
        '{"name": "clock", "KEY": []}',
        '{"name": "clock", "KEY": "{}"}',
        '{"name": "other", "KEY": {}}',
        '{"name": "clock", "KEY": {"a": NaN}}',
        '{"name": "clock", "KEY": {"a": 1,}}',
        '{"name": "clock", "KEY": {"a": 1, "a": 2}}',
        '{"name": "clock", "KEY": {"a": "\\ud800"}}',
        '{"name": ["clock"], "KEY": {}}',
        '{"name": "clock", "KEY": ' + '{"a":' * 5000,
        "{'name': 'clock', 'KEY': {}}",
    ],
)
def test_what_is_no_call_is_content(form, body):
    text = form.before + body.replace("KEY", form.arguments_key) + form.after
    assert parse(form, [text]) == (text, [])


@pytest.mark.parametrize("form", [HERMES, LLAMA])
@given(call=calls, size=st.integers(1, 9))
def test_a_call_is_told_as_it_comes(form, call, size):
    """Its name before its arguments, and of them always more, as the whole call then has them."""
    text, parser, told = call_text(form, *call), call_parser(form, NAMES), []
    pieces = []
    for at in range(0, len(text), size):
        pieces += parser.push(text[at : at + size])
        told += [parser.begun] if parser.begun else []
    (found,) = pieces + parser.finish(cut=False)
    assert (found.name, json.loads(found.arguments)) == call
    assert told == sorted(told)
    assert all(name == found.name and found.arguments.startswith(so_far) for name, so_far in told)
    assert told or size > 1


@pytest.mark.parametrize("form", [HERMES, LLAMA])
def test_a_call_that_was_cut_is_as_far_as_it_goes(form):
    parser = call_parser(form, NAMES)
    begun = call_text(form, "clock", {"a": [1, "}"]}).partition("]")[0]
    assert parser.push("\n" + begun) == []
    assert parser.finish(cut=True) == [ToolCall("clock", '{"a": [1, "}"')]
    assert parse(form, [begun]) == (begun, [])


def test_the_text_before_a_call_streams_at_once():
    parser = call_parser(HERMES, NAMES)
    assert parser.push("Let me look") == ["Let me look"]
    assert parser.push(" it up.\n<tool") == [" it up."]
    assert parser.push('_call>{"name": "clock", "arguments": {}}') == []
    assert parser.push("</tool_call>\n") == [ToolCall("clock", "{}")]
    assert parser.finish(cut=False) == []
    plain = call_parser(LLAMA, NAMES)
    assert plain.push(" ") == [] and plain.push("It") == [" It"] and plain.push(" is {") == [" is {"]


# ------------------------------------------------------------------------------------------- by HTTP

TEMPLATES = {
    HERMES: """{% if tools %}{% for t in tools %}{{ t | tojson }}{% endfor %}
{{ '<tool_call>\\n{"name": <function-name>, "arguments": <args-json-object>}\\n</tool_call>' }}{% endif %}""",
    LLAMA: """{% if tools %}{% for t in tools %}{{ t | tojson }}{% endfor %}
Respond in the format {"name": function name, "parameters": dictionary of argument name and its value}.{% endif %}""",
}
TURNS = """{% for m in messages %}<{{ m.role }}>{{ m.content }}{{ m.tool_calls | tojson if m.tool_calls }}
{% endfor %}<assistant>"""


@pytest.fixture(scope="module", params=[HERMES, LLAMA], ids=["hermes", "llama"])
def server(request):
    engine = tiny_engine(slots=4, max_seq_len=2048)
    engine.chat_template = ChatTemplate(TEMPLATES[request.param] + TURNS)
    with RoundServer(engine) as running:
        yield running


@pytest.fixture(scope="module")
def ask(server):
    import openai

    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=300)
    user = [{"role": "user", "content": "Weather in Oslo?"}]

    def create(**fields):
        given = {"messages": user, "tools": [WEATHER, CLOCK], "max_tokens": 300, "seed": 1} | fields
        return client.chat.completions.create(model="gpt-fast", **given)

    return create


def test_a_required_call_whole_and_streamed(ask):
    named = {"type": "function", "function": {"name": "get_weather"}}
    (choice,) = ask(tool_choice=named).choices
    assert (choice.finish_reason, choice.message.content) == ("tool_calls", None)
    (call,) = choice.message.tool_calls
    assert call.function.name == "get_weather" and call.id.startswith("call_")
    assert json.loads(call.function.arguments)["city"] in ("Oslo", "Rom")
    events = list(ask(tool_choice=named, stream=True))
    assert events[0].choices[0].delta.role == "assistant"
    assert events[-1].choices[0].finish_reason == "tool_calls"
    first, *rest = [each for event in events for each in event.choices[0].delta.tool_calls or []]
    assert (first.index, first.type, first.function.name) == (0, "function", "get_weather")
    assert first.function.arguments == "" and first.id != call.id
    assert rest and all((each.index, each.id, each.function.name) == (0, None, None) for each in rest)
    assert "".join(each.function.arguments for each in rest) == call.function.arguments
    assert not "".join(event.choices[0].delta.content or "" for event in events)


def test_required_calls_any_of_the_tools_for_every_choice(ask):
    choices = ask(tool_choice="required", n=3, temperature=3.0, parallel_tool_calls=False).choices
    assert [choice.finish_reason for choice in choices] == ["tool_calls"] * 3
    assert [len(choice.message.tool_calls) for choice in choices] == [1, 1, 1]
    assert {choice.message.tool_calls[0].function.name for choice in choices} <= {"get_weather", "clock"}


def test_a_call_cut_short_is_as_far_as_it_goes_with_reason_length(ask):
    """As OpenAI has it; before its arguments begin it is text."""
    (choice,) = ask(tool_choice="required", max_tokens=12).choices
    assert choice.finish_reason == "length" and choice.message.tool_calls is None and choice.message.content
    named = {"type": "function", "function": {"name": "get_weather"}}
    (choice,) = ask(tool_choice=named, max_tokens=60).choices
    (call,) = choice.message.tool_calls
    assert choice.finish_reason == "length" and call.function.arguments.startswith("{")
    with pytest.raises(ValueError):
        json.loads(call.function.arguments)
    streamed = ask(tool_choice=named, max_tokens=60, stream=True)
    parts = [each.function.arguments for event in streamed for each in event.choices[0].delta.tool_calls or []]
    assert "".join(parts) == call.function.arguments


def test_an_answer_without_a_call_is_as_ever(ask):
    (auto,) = ask(tool_choice="auto", max_tokens=20).choices
    assert auto.finish_reason in ("length", "stop") and auto.message.tool_calls is None
    (none,) = ask(tool_choice="none", max_tokens=20).choices
    (without,) = ask(tools=[], max_tokens=20).choices
    assert none.message == without.message  # "none" leaves the tools out of the prompt
    streamed = "".join(e.choices[0].delta.content or "" for e in ask(tool_choice="auto", max_tokens=20, stream=True))
    assert streamed == auto.message.content


def test_the_next_turn_takes_the_call_and_its_result(ask):
    (choice,) = ask(tool_choice="required").choices
    said = choice.message.model_dump(exclude_none=True)
    result = {"role": "tool", "tool_call_id": said["tool_calls"][0]["id"], "content": '{"degrees": 3}'}
    user = {"role": "user", "content": "Weather in Oslo?"}
    short, longer = ask(messages=[user], max_tokens=4), ask(messages=[user, said, result], max_tokens=4)
    assert longer.usage.prompt_tokens > short.usage.prompt_tokens + len(result["content"])


def test_what_tools_cannot_be(ask):
    import openai

    for fields, param in (
        ({"tool_choice": "required", "tools": [tool("a", type="object", required=5)]}, "tools"),
        ({"tools": [tool("a", type="string")]}, "tools[0].function.parameters.type"),
        ({"tool_choice": "required", "extra_body": {"min_tokens": 3}}, "min_tokens"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].tool_call_id"),
    ):
        with pytest.raises(openai.BadRequestError) as caught:
            ask(**fields)
        assert caught.value.param == param


@pytest.mark.model
def test_the_default_model_calls_with_another_templates_format(default_checkpoint):
    """Its own template takes no tools, but a real tokenizer and a real model can be made to call."""
    import openai

    engine = Engine.load(str(default_checkpoint), max_num_seqs=2, max_seq_len=1024, threads=1)
    engine.chat_template = ChatTemplate(wheel_member(TRL, "trl/chat_templates/qwen2_5.jinja").decode())
    ask = {"model": "gpt-fast", "tools": [WEATHER, CLOCK], "temperature": 0, "max_tokens": 80}
    ask["parallel_tool_calls"] = False  # a weak model goes on calling
    ask |= {"messages": [{"role": "user", "content": "How is the weather in Oslo, for 2 days?"}]}
    with RoundServer(engine) as server:
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=300)
        (choice,) = client.chat.completions.create(**ask, tool_choice="required").choices
        events = list(client.chat.completions.create(**ask, tool_choice="required", stream=True))
    (call,) = choice.message.tool_calls
    assert choice.finish_reason == events[-1].choices[0].finish_reason == "tool_calls"
    assert call.function.name == "get_weather" and set(json.loads(call.function.arguments)) == {"city", "days"}
    streamed = [each for event in events for each in event.choices[0].delta.tool_calls or []]
    assert "".join(each.function.arguments for each in streamed) == call.function.arguments and len(streamed) > 3


@pytest.mark.slow
def test_a_template_without_tools_can_be_made_to_call():
    """As with vLLM a call that is required is a matter of the grammar; only a free answer needs a template for it."""
    import openai

    user, bare = {"role": "user", "content": "x"}, tool("nothing", type="object", properties={})
    ask = {"model": "gpt-fast", "tools": [CLOCK, WEATHER, bare], "max_tokens": 200, "seed": 2}
    with RoundServer(tiny_engine(slots=4, max_seq_len=512)) as server:
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=300)
        with pytest.raises(openai.BadRequestError) as caught:
            client.chat.completions.create(messages=[user], **ask)
        assert caught.value.param == "tools" and "required" in caught.value.message
        none = client.chat.completions.create(messages=[user], tool_choice="none", **ask | {"max_tokens": 3})
        assert none.choices[0].message.tool_calls is None
        for name in ("get_weather", "nothing"):
            named = {"type": "function", "function": {"name": name}}
            (choice,) = client.chat.completions.create(messages=[user], tool_choice=named, **ask).choices
            (call,) = choice.message.tool_calls
            assert choice.finish_reason == "tool_calls" and call.function.name == name
            assert name != "nothing" or call.function.arguments == "{}"  # no arguments, not any
        said = choice.message.model_dump(exclude_none=True)
        result = {"role": "tool", "tool_call_id": call.id, "content": "ok"}
        plain = [user, {"role": "assistant", "content": '{"name": "nothing", "parameters": {}}'}, result]
        sizes = [
            client.chat.completions.create(model="gpt-fast", messages=each, max_tokens=1).usage.prompt_tokens
            for each in ([user, said, result], plain)
        ]
        assert sizes[0] == sizes[1]  # the template would drop the call: it is told as text


def test_several_calls_where_they_may_be_and_a_schema_beside_them():
    source = wheel_member(TRL, "trl/chat_templates/qwen2_5.jinja").decode()
    template = ChatTemplate(source)
    assert template.tool_format == HERMES
    maker = Maker(ByteTokenizer(), vocab_size=257, eos_ids={256})

    def takes(text, **options):
        guide = maker.calls_guide([CLOCK], HERMES, **options)
        output = [*text.encode(), 256]
        return all(guide.allowed(output[:at])[token] for at, token in enumerate(output))

    one, answer = call_text(HERMES, "clock", {}), Constraint("json", '{"enum": [5]}')
    assert takes(one) and takes(one, parallel=True) and takes(f"{one}\n{one}", parallel=True)
    assert not takes(f"{one}\n{one}") and not takes("") and not takes("5")
    assert takes("5", answer=answer) and takes(one, answer=answer) and not takes("6", answer=answer)
    assert takes(f"hm</think>\n\n{one}", thinking=True) and not takes(one, thinking=True)
    assert takes("a < b\n</think>5", thinking=True, answer=answer)
