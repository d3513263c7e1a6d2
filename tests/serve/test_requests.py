"""What a client may send: every JSON value is an ApiRequest or a RequestError that names the field, and quickly."""

import gzip
import json
import subprocess
import sys

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from gpt_fast.config import SamplingParams
from gpt_fast.serve.body import MAX_BODY, MAX_DEPTH, decode_json, parse_json, short
from gpt_fast.serve.endpoints import CHAT, COMPLETION, NATIVE
from gpt_fast.serve.neutral import IGNORED, NEUTRAL
from gpt_fast.serve.request import ApiRequest, RequestError, parse_request
from support.examples import examples
from support.work import bounded_lines, ends

KINDS = {"native": NATIVE, "completion": COMPLETION, "chat": CHAT}
MINIMAL = {
    "native": {"prompt": "hi"},
    "completion": {"prompt": "hi"},
    "chat": {"messages": [{"role": "user", "content": "hi"}]},
}
WEATHER = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}
CLOCK = {"type": "function", "function": {"name": "clock", "description": "the time"}}


def parse(kind, body, **options):
    return parse_request(KINDS[kind], body, model_names=["gpt-fast"], max_new_tokens=50, **options)


def parse_fields(kind, **fields):
    return parse(kind, json.dumps(MINIMAL[kind] | fields).encode())


def refusal(kind, body, **options):
    """The error object that the client gets, checked for its shape."""
    with pytest.raises(RequestError) as caught:
        parse(kind, body, **options)
    return check_refusal(caught.value)


def check_refusal(error):
    assert 400 <= error.status < 500
    assert len(error.body) < 5000, "what the client sent comes back shortened"
    assert "Traceback" not in error.body and "\n" not in error.body
    body = json.loads(error.body)
    assert body.keys() == {"error"} and body["error"].keys() == {"message", "type", "param", "code"}
    assert body["error"]["type"] == "invalid_request_error"
    return body["error"]


# ------------------------------------------------------------------------------------------------ any body at all

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text(max_size=10), inner, max_size=5),
    max_leaves=20,
)
# Names and values near the real ones, or the fuzz would never pass the first check.
field_names = st.sampled_from([
    *sorted(NEUTRAL | IGNORED), "prompt", "messages", "model", "max_tokens", "max_new_tokens", "max_completion_tokens",
    "stop", "temperature", "top_p", "top_k", "min_p", "seed", "logprobs", "top_logprobs", "logit_bias",
    "presence_penalty", "repetition_penalty", "ignore_eos", "min_tokens", "stream", "stream_options", "echo", "user",
    "timeout", "best_of", "response_format", "add_special_tokens", "parse_special", "cache_salt",
])  # fmt: skip
near_values = st.sampled_from([
    True, False, None, -1, 0, 1, 2, 16, 10**30, 0.5, -0.0, 1e308, "", "hi", [], [1, 2], ["a", "b"], [[1], [2]], {},
    {"1": 5}, {"x": 1}, {"include_usage": True}, {"type": "text"}, {"type": "json_object"}, "auto", "none", "required",
    {"type": "json_schema", "json_schema": {"name": "a", "schema": {}}}, [WEATHER, CLOCK], [WEATHER, WEATHER],
    {"type": "function", "function": {"name": "clock"}}, [{"role": "user", "content": "hi"}], [{"role": "tool"}],
    [{"role": "user", "content": [{"type": "text", "text": "hi"}]}], [{"role": ["user"], "content": {}}],
    [{"role": "assistant", "tool_calls": [{"id": "1", "function": {"name": "clock", "arguments": "{}"}}]}],
])  # fmt: skip
GOOD = {
    "temperature": [0, 0.7, None], "top_p": [0.5, 1], "top_k": [-1, 0, 40], "min_p": [0.1], "seed": [0, -5],
    "stop": ["a", ["b", "🙂"], []], "presence_penalty": [1, -2.0], "repetition_penalty": [1.3], "min_tokens": [0, 3],
    "logit_bias": [{"5": -100}, {}], "ignore_eos": [True], "stream": [True, False], "timeout": [5], "user": ["me", ""],
    "n": [1, 2, 16], "stream_options": [{"include_usage": True}], "max_tokens": [5], "model": ["gpt-fast"],
    "tools": [[WEATHER], []], "tool_choice": ["auto", "none"], "response_format": [{"type": "json_object"}],
    "logprobs": [True, 3, 0], "top_logprobs": [2], "echo": [True], "max_new_tokens": [7], "best_of": [1],
}  # fmt: skip
good_fields = st.sampled_from(sorted(GOOD)).flatmap(lambda name: st.tuples(st.just(name), st.sampled_from(GOOD[name])))
bodies = st.builds(
    lambda good, wild: dict(good) | wild,
    st.lists(good_fields, max_size=4),
    st.dictionaries(field_names, near_values | json_values, max_size=1),
) | st.dictionaries(field_names, near_values | json_values, max_size=5)


def answer_to(kind, body):
    try:
        with ends():
            request = parse(kind, body)
    except RequestError as error:
        check_refusal(error)
    else:
        check_request(request)


def check_request(request):
    """What the layers below count on."""
    assert isinstance(request.params, SamplingParams)
    assert 1 <= request.n <= 16 and len(request.prompts) <= 16
    assert bool(request.prompts) != bool(request.messages)
    assert all(isinstance(message["content"], str | list) for message in request.messages)
    assert all(isinstance(prompt, str | tuple) and len(prompt) for prompt in request.prompts)
    assert request.tools or not request.must_call
    json.dumps([request.messages, request.prompts, request.tools], ensure_ascii=False, allow_nan=False).encode()


kinds = st.sampled_from(sorted(KINDS))


@pytest.mark.slow
@examples(1000)
@given(kind=kinds, fields=bodies, bare=st.booleans(), tidy=st.booleans())
def test_any_fields_give_a_request_or_a_refusal(kind, fields, bare, tidy):
    if tidy:  # without what this endpoint does not know, most are accepted
        fields = {name: value for name, value in fields.items() if name in KINDS[kind].known}
    body = fields if bare else MINIMAL[kind] | fields
    answer_to(kind, json.dumps(body).encode())
    answer_to(kind, body)  # as TorchServe decodes it where it is told the content type


@examples(500)
@given(kind=kinds, value=json_values)
def test_any_json_value_as_a_body(kind, value):
    answer_to(kind, json.dumps(value).encode())


@examples(500)
@given(kind=kinds, raw=st.binary(max_size=60) | st.text('{}[]":,\\ud80 eE+-.019nulltrN', max_size=60).map(str.encode))
@example(kind="native", raw=b'{"prompt": "\\ud800"}')
def test_any_bytes_as_a_body(kind, raw):
    answer_to(kind, raw)
    answer_to(kind, bytearray(raw))


@pytest.mark.parametrize("body", [None, 3, True, [], "", b"", object(), {"prompt": b"x"}, {"prompt": {1, 2}}])
def test_what_torchserve_may_hand_over_that_is_no_json(body):
    assert "0x" not in refusal("native", body)["message"]


# ------------------------------------------------------------------------------------------------ strict JSON


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"", "not JSON at character 0"),
        (b"\xff\xfe{\x00}\x00", "not UTF-8 (allowed JSON in UTF-8"),
        (b'{"prompt": "\xff"}', "not UTF-8"),
        (b'{"prompt": "x"} {}', "not JSON at character 16"),
        (b"{'prompt': 'x'}", "not JSON at character 1"),
        (b'{"prompt": "x", }', "not JSON"),
        (b'["prompt"]', "must be a JSON object (got an array)"),
        (None, "missing, or sent as a form (allowed JSON, with Content-Type: application/json)"),
        (b'{"prompt": "x", "prompt": "y"}', 'the key "prompt" is there twice'),
        (b'{"prompt": "x", "logit_bias": {"1": 1, "1": 2}}', 'the key "1" is there twice'),
        (b'{"prompt": "x", "temperature": NaN}', "NaN is not JSON"),
        (b'{"prompt": "x", "temperature": -Infinity}', "-Infinity is not JSON"),
        (b'{"prompt": "x", "temperature": 1e999}', "not finite"),
        (b'{"prompt": "\\ud800"}', "lone surrogate"),
        (b'{"prompt": "x", "\\udfff": 1}', "lone surrogate"),
        (b'{"prompt": "x", "seed": ' + b"9" * 41 + b"}", "41 digits (allowed 40)"),
        (b'{"prompt": "x", "seed": ' + b"9" * 500_000 + b"}", "500000 digits (allowed 40)"),
        (b'{"prompt": ' + b"[" * 200_000, "nested too deeply (allowed 64)"),
        (b'{"prompt": ' + b"[" * MAX_DEPTH + b"]" * MAX_DEPTH + b"}", "nested too deeply (allowed 64)"),
        ({"prompt": "\ud800"}, "lone surrogate"),
        ({"prompt": "x", "temperature": float("nan")}, "not finite"),
        ({"prompt": b"x"}, "not JSON"),
    ],
)
def test_strict_json(body, message):
    assert message in refusal("native", body)["message"]


@pytest.mark.parametrize("depth", range(20, 1200, 7))
def test_no_depth_escapes_as_recursion(depth):
    body = b'{"tools": ' + b"[" * depth + b"]" * depth + b', "prompt": "x"}'
    assert refusal("completion", body)["message"].startswith("tools" if depth < MAX_DEPTH else "body")


def test_a_body_within_the_limit_is_read_and_one_byte_more_is_refused():
    body = b'{"prompt": "' + b"x" * (MAX_BODY - 14) + b'"}'
    assert len(body) == MAX_BODY and parse("native", body).prompts == ("x" * (MAX_BODY - 14),)
    for larger in (body + b" ", body.decode() + " ", {"prompt": "x" * MAX_BODY}):
        with pytest.raises(RequestError) as caught:
            parse("native", larger)
        assert caught.value.status == 413


@pytest.mark.slow
@pytest.mark.parametrize(
    "body",
    [
        "{" + ",".join(f'"a{n:06d}": 1' for n in range(70_000)) + ', "a069999": 1}',  # a repeated key, at the end
        '{"prompt": [' + "[]," * 300_000 + "[]]}",
        '{"prompt": [' + "1," * 500_000 + "1.5]}",
        '{"prompt": "x", "logit_bias": {' + ",".join(f'"{n}": 1e400' for n in range(40_000)) + "}}",
        '{"prompt": "x", "temperature": "' + "a" * 10**6 + '"}',
        '{"prompt": "x", "stop": "' + "a" * 10**6 + '"}',
        '{"prompt": "x", "stop": [' + '"a",' * 200_000 + '"a"]}',
        '{"prompt": "x", "' + "a" * 10**6 + '": 1}',
        '{"prompt": "x", "model": "' + "a" * 10**6 + '"}',
        '{"prompt": "x", "seed": {"' + "a" * 10**6 + '": 1}}',
        '{"messages": [{"role": "' + "a" * 10**6 + '"}]}',
        '{"messages": [{"role": "user", "content": "x", "name": "' + "a" * 10**6 + '"}]}',
        '{"messages": [{"role": "user", "content": "x"}], "response_format": {"' + "a" * 10**6 + '": 1}}',
        '{"prompt": "x", "stream": true, "stream_options": {"' + "a" * 10**6 + '": 1}}',
        '{"messages": [{"role": "user", "content": "x"}], "tool_choice": "' + "a" * 10**6 + '"}',
    ],
)
def test_a_hostile_megabyte_is_refused_at_once_and_shortly(body):
    assert len(body) <= MAX_BODY
    for kind in KINDS:
        with bounded_lines(4 * len(body)):
            error = refusal(kind, body.encode())
        assert len(error["param"] or "") <= 103


@examples(300)
@given(st.dictionaries(st.text(max_size=5), json_values, max_size=4).filter(lambda v: "Infinity" not in json.dumps(v)))
def test_strict_json_agrees_with_json_on_what_is_strict(value):
    text = json.dumps(value)
    try:
        text.encode() and json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return
    if "NaN" in text or len(text) > 4000:
        return
    try:
        assert parse_json(text.encode()) == value == decode_json(text)
    except RequestError as error:
        assert "digits" in error.message


# ------------------------------------------------------------------------------------------------ defaults and fields


def test_defaults_are_each_endpoints_own():
    native, completion, chat = (parse(kind, MINIMAL[kind]) for kind in KINDS)
    assert (native.params.max_new_tokens, native.params.temperature, native.stream) == (50, 0.0, True)
    assert (completion.params.max_new_tokens, completion.params.temperature, completion.stream) == (16, 1.0, False)
    assert (chat.params.max_new_tokens, chat.params.temperature, chat.stream) == (1 << 22, 1.0, False)
    assert not parse("native", MINIMAL["native"], stream=False).stream
    assert not any(request.limited for request in (native, completion, chat))
    assert native.prompts == completion.prompts == ("hi",) and chat.messages == (MINIMAL["chat"]["messages"][0],)


@pytest.mark.parametrize("kind", KINDS)
def test_neutral_values_and_null_change_nothing(kind):
    plain = parse_fields(kind)
    neutral = {
        "top_k": 0, "top_p": 1.0, "min_p": 0, "stop": [], "logit_bias": {}, "presence_penalty": 0,
        "frequency_penalty": 0.0, "repetition_penalty": 1, "ignore_eos": False, "min_tokens": 0, "seed": None,
    }  # fmt: skip
    assert parse_fields(kind, **neutral) == plain
    assert parse_fields(kind, **dict.fromkeys(neutral)) == plain
    assert parse_fields(kind, top_k=-1) == plain
    for name, values in NEUTRAL.items():
        for value in (None, *values):
            if name not in KINDS[kind].known:
                assert parse(kind, MINIMAL[kind] | {name: value}) == plain, name
    for name, (json_type, _) in IGNORED.items():
        for value in (None, json_type()):
            assert parse(kind, MINIMAL[kind] | {name: value}) == plain, name
        assert refusal(kind, MINIMAL[kind] | {name: [1]})["param"] == name


@pytest.mark.parametrize("kind", KINDS)
def test_every_sampling_field_arrives(kind):
    asked = {
        "temperature": 0.5, "top_p": 0.9, "top_k": 7, "min_p": 0.05, "seed": -3, "stop": ["a", "b"], "ignore_eos": True,
        "presence_penalty": 1.5, "frequency_penalty": -0.5, "repetition_penalty": 1.1, "min_tokens": 2,
    }  # fmt: skip
    limit = "max_new_tokens" if kind == "native" else "max_tokens"
    request = parse_fields(kind, **asked, logit_bias={"5": -100}, timeout=2.5, user="me", cache_salt="s", **{limit: 9})
    want = SamplingParams(**asked | {"stop": ("a", "b")}, logit_bias={5: -100.0}, max_new_tokens=9)
    assert request.params == want
    assert (request.timeout, request.owner, request.limited) == (2.5, "me\0s", True)
    assert parse_fields(kind, stop="END").params.stop == ("END",)


@pytest.mark.parametrize("kind", ["completion", "chat"])
def test_max_completion_tokens_is_the_newer_max_tokens(kind):
    assert parse_fields(kind, max_completion_tokens=5).params.max_new_tokens == 5
    assert parse_fields(kind, max_completion_tokens=5, max_tokens=5).params.max_new_tokens == 5
    assert refusal(kind, MINIMAL[kind] | {"max_completion_tokens": 5, "max_tokens": 6})["param"] == "max_tokens"


def test_logprobs_of_both_endpoints():
    assert parse_fields("completion", logprobs=0).params.logprobs == 0
    assert parse_fields("completion", logprobs=5).params.logprobs == 5
    assert parse_fields("chat", logprobs=True).params.logprobs == 0
    assert parse_fields("chat", logprobs=True, top_logprobs=3).params.logprobs == 3
    assert parse_fields("chat", logprobs=False).params.logprobs is None


@pytest.mark.parametrize(
    ("kind", "fields", "param"),
    [
        ("native", {"prompt": ""}, "prompt"),
        ("native", {"prompt": None}, "prompt"),
        ("native", {"prompt": ["a"]}, "prompt"),
        ("native", {"prompt": [1, -1]}, "prompt"),
        ("native", {"prompt": [1, True]}, "prompt"),
        ("native", {"prompt": []}, "prompt"),
        ("native", {"prompt": {"a": 1}}, "prompt"),
        ("native", {"max_tokens": 5}, "max_tokens"),
        ("native", {"n": 2}, "n"),
        ("native", {"foo": False}, "foo"),
        ("native", {"max_new_tokens": 0}, "max_new_tokens"),
        ("native", {"max_new_tokens": -3}, "max_new_tokens"),
        ("native", {"max_new_tokens": 10**13}, "max_new_tokens"),
        ("native", {"max_new_tokens": 5.0}, "max_new_tokens"),
        ("native", {"max_new_tokens": "5"}, "max_new_tokens"),
        ("native", {"max_new_tokens": True}, "max_new_tokens"),
        ("native", {"temperature": -1}, "temperature"),
        ("native", {"temperature": True}, "temperature"),
        ("native", {"top_k": 2.5}, "top_k"),
        ("native", {"top_k": -2}, "top_k"),
        ("native", {"top_p": 0}, "top_p"),
        ("native", {"min_p": 1.01}, "min_p"),
        ("native", {"seed": 1 << 63}, "seed"),
        ("native", {"seed": "1"}, "seed"),
        ("native", {"stop": ""}, "stop"),
        ("native", {"stop": 5}, "stop"),
        ("native", {"stop": ["a", 5]}, "stop"),
        ("native", {"stop": ["a"] * 17}, "stop"),
        ("native", {"stop": "a" * 257}, "stop"),
        ("native", {"stream": "yes"}, "stream"),
        ("native", {"min_tokens": 51}, "min_tokens"),
        ("native", {"timeout": 0}, "timeout"),
        ("native", {"user": 5}, "user"),
        ("completion", {"logit_bias": {"x": 1}}, "logit_bias"),
        ("completion", {"logit_bias": {"-1": 1}}, "logit_bias"),
        ("completion", {"logit_bias": {"1": 1, "01": 2}}, "logit_bias"),
        ("completion", {"logit_bias": {"1": 101}}, "logit_bias.1"),
        ("completion", {"logit_bias": [1]}, "logit_bias"),
        ("completion", {"n": 0}, "n"),
        ("completion", {"n": 17}, "n"),
        ("completion", {"n": 2, "best_of": 3}, "best_of"),
        ("completion", {"n": 2, "seed": (1 << 63) - 1}, "seed"),
        ("completion", {"prompt": ["a"] * 17}, "prompt"),
        ("completion", {"prompt": ["a", ""]}, "prompt"),
        ("completion", {"prompt": ["a", [1]], "echo": 1}, "echo"),
        ("completion", {"logprobs": True}, "logprobs"),
        ("completion", {"logprobs": 21}, "logprobs"),
        ("completion", {"messages": []}, "messages"),
        ("completion", {"suffix": "x"}, "suffix"),
        ("completion", {"stream_options": {"include_usage": True}}, "stream_options"),
        ("completion", {"stream": True, "stream_options": {"include_usage": 1}}, "stream_options.include_usage"),
        ("completion", {"stream": True, "stream_options": {"foo": True}}, "stream_options.foo"),
        (
            "completion",
            {"stream": True, "stream_options": {"include_obfuscation": True}},
            "stream_options.include_obfuscation",
        ),
        ("chat", {"top_logprobs": 3}, "top_logprobs"),
        ("chat", {"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ("chat", {"logprobs": 1}, "logprobs"),
        ("chat", {"chat_template": "{{ x }}"}, "chat_template"),
        ("chat", {"reasoning_effort": "hard"}, "reasoning_effort"),
        ("chat", {"verbosity": "low"}, "verbosity"),
        ("chat", {"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs.messages"),
        ("chat", {"chat_template_kwargs": 1}, "chat_template_kwargs"),
        ("chat", {"continue_final_message": True, "add_generation_prompt": True}, "continue_final_message"),
        ("chat", {"add_generation_prompt": 1}, "add_generation_prompt"),
        ("chat", {"documents": ["a"]}, "documents[0]"),
        ("chat", {"echo": True}, "echo"),
        ("chat", {"priority": 1}, "priority"),
        ("chat", {"parallel_tool_calls": 1}, "parallel_tool_calls"),
        ("completion", {"parse_special": 1}, "parse_special"),
        ("completion", {"logit_bias": {str(n): 1 for n in range(8193)}}, "logit_bias"),
        ("chat", {"store": 0}, "store"),
        ("chat", {"skip_special_tokens": False}, "skip_special_tokens"),
        ("chat", {"stop_token_ids": [-1]}, "stop_token_ids"),
        ("chat", {"stop_token_ids": 2}, "stop_token_ids"),
        ("native", {"stop_token_ids": [True]}, "stop_token_ids"),
        ("completion", {"stop_token_ids": list(range(65))}, "stop_token_ids"),
        ("completion", {"include_stop_str_in_output": True}, "include_stop_str_in_output"),
        ("completion", {"stream": True, "prompt_logprobs": 0}, "prompt_logprobs"),
        ("completion", {"prompt_logprobs": 21}, "prompt_logprobs"),
        ("completion", {"prompt_logprobs": -1}, "prompt_logprobs"),
        ("chat", {"max_tokens": 0}, "max_tokens"),
        ("chat", {"tool_choice": "required"}, "tool_choice"),
    ],
)
def test_a_field_that_cannot_be_met_is_named_with_its_value(kind, fields, param):
    error = refusal(kind, MINIMAL[kind] | fields)
    assert error["param"] == param
    assert error["message"].startswith(f"{param}: ") or param in error["message"]


@pytest.mark.parametrize("kind", KINDS)
def test_null_says_nothing_whatever_its_name(kind):
    assert parse_fields(kind, regex=None, guided_whitespace_pattern=None) == parse_fields(kind)


@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        ("chat", {"add_special_tokens": False}),  # vLLM's default of a chat
        ("completion", {"logprobs": False}),
        ("native", {"logprobs": False}),
        ("chat", {"grammar": ""}),  # llama-server's default
    ],
)
def test_other_servers_defaults_pass(kind, fields):
    assert parse_fields(kind, **fields) == parse_fields(kind)


@pytest.mark.parametrize("name", ["enable_thinking", "thinking"])
def test_a_switch_that_is_the_templates_says_where_it_belongs(name):
    with pytest.raises(RequestError, match="chat_template_kwargs"):
        parse_fields("chat", **{name: False})


def test_the_model_is_the_served_one_or_unsaid():
    assert parse_fields("chat", model="gpt-fast") == parse_fields("chat", model=None) == parse_fields("chat")
    with pytest.raises(RequestError) as caught:
        parse_fields("chat", model="gpt-5")
    assert (caught.value.status, caught.value.code, caught.value.param) == (404, "model_not_found", "model")
    assert "gpt-5" in caught.value.message


def test_prompts_as_text_and_token_ids():
    assert parse_fields("completion", prompt=["a", "b"]).prompts == ("a", "b")
    assert parse_fields("completion", prompt=[1, 2]).prompts == ((1, 2),)
    assert parse_fields("completion", prompt=[[1, 2], [3]]).prompts == ((1, 2), (3,))
    assert parse_fields("native", prompt=[1, 2]).prompts == ((1, 2),)


# ------------------------------------------------------------------------------------------------ chats


def chat(*messages, **fields):
    return parse("chat", json.dumps({"messages": messages} | fields).encode())


def test_messages_become_what_templates_read():
    call = {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "汉"}'}}
    request = chat(
        {"role": "developer", "content": "be short"},
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}], "name": "ann"},
        {"role": "assistant", "content": None, "tool_calls": [call], "refusal": None, "annotations": []},
        {"role": "tool", "content": "sunny", "tool_call_id": "call_1"},
        {"role": "assistant", "content": "sunny", "refusal": None, "tool_calls": None, "audio": None},
    )
    decoded = call | {"function": {"name": "weather", "arguments": {"city": "汉"}}}
    assert request.messages == (
        {"role": "system", "content": "be short"},
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}], "name": "ann"},
        {"role": "assistant", "content": "", "tool_calls": [decoded]},
        {"role": "tool", "content": "sunny", "tool_call_id": "call_1"},
        {"role": "assistant", "content": "sunny"},
    )


@pytest.mark.parametrize("sent", [{}, {"arguments": None}, *({"arguments": text} for text in ("", " ", "null", "{}"))])
def test_a_call_without_arguments_has_an_empty_object(sent):
    """As vLLM reads a history's calls."""
    call = {"id": "1", "type": "function", "function": {"name": "clock", **sent}}
    request = chat({"role": "user", "content": "x"}, {"role": "assistant", "tool_calls": [call]})
    assert request.messages[1]["tool_calls"][0]["function"] == {"name": "clock", "arguments": {}}


def test_keys_of_a_message_that_no_template_reads_are_passed_over():
    """lm-eval's "type", LangChain's "index" in a call, litellm's cache_control, and what OpenAI's own answers hold."""
    call = {"id": "1", "index": 0, "type": "function", "function": {"name": "clock", "arguments": "", "x": 1}}
    part = {"type": "text", "text": "a", "cache_control": {"type": "ephemeral"}}
    request = chat(
        {
            "role": "user",
            "type": "text",
            "content": [part, "b", {"type": "input_text", "text": "c"}],
            "tool_calls": [1],
        },
        {"role": "assistant", "tool_calls": [call], "provider_specific_fields": {}, "annotations": []},
        {"role": "assistant", "content": None, "refusal": "No."},
        {"role": "assistant", "content": "x", "reasoning_content": "hm"},
    )
    clean = {"id": "1", "type": "function", "function": {"name": "clock", "arguments": {}}}
    assert request.messages == (
        {"role": "user", "content": [{"type": "text", "text": text} for text in "abc"]},
        {"role": "assistant", "content": "", "tool_calls": [clean]},
        {"role": "assistant", "content": "No."},
        {"role": "assistant", "content": "x", "reasoning": "hm", "reasoning_content": "hm"},
    )


def test_what_a_chat_tells_its_template():
    user, said = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "Well"}
    plain = {"add_generation_prompt": True, "continue_final_message": False, "chat_template_kwargs": {}}
    assert chat(user).template_options == plain | {"documents": None}
    on = {"add_generation_prompt": False, "continue_final_message": True}
    assert chat(user, said, continue_final_message=True).template_options == plain | on | {"documents": None}
    thinking = chat(user, reasoning_effort="high", chat_template_kwargs={"enable_thinking": False, "x": 1})
    asked = {"reasoning_effort": "high", "enable_thinking": False, "x": 1}  # as vLLM: its own kwargs win
    assert thinking.template_options["chat_template_kwargs"] == asked
    quiet = chat(user, reasoning_effort="none").template_options["chat_template_kwargs"]
    assert quiet == {"reasoning_effort": "none", "enable_thinking": False}


def test_stream_options_that_ask_for_nothing_need_no_stream():
    assert parse_fields("chat", stream_options={"include_usage": False}) == parse_fields("chat")
    both = {"include_usage": True, "continuous_usage_stats": True}
    request = parse_fields("chat", stream=True, stream_options=both)
    assert request.include_usage and request.continuous_usage
    alone = parse_fields("chat", stream=True, stream_options={"continuous_usage_stats": True})
    assert not alone.include_usage and not alone.continuous_usage  # as vLLM


def test_a_body_with_a_byte_order_mark_or_packed_is_the_body():
    body = json.dumps(MINIMAL["native"]).encode()
    assert parse("native", b"\xef\xbb\xbf" + body) == parse("native", gzip.compress(body)) == parse("native", body)
    large = json.dumps({"prompt": "x" * MAX_BODY}).encode()
    with pytest.raises(RequestError) as caught:
        parse("native", gzip.compress(large))
    assert caught.value.status == 413
    for broken in (gzip.compress(body)[:-1], gzip.compress(body) + b"x", b"\x1f\x8bx"):
        assert "gzip" in refusal("native", broken)["message"]


@pytest.mark.parametrize(("sent", "read"), [("", {}), ({"city": "x"}, {"city": "x"}), ("{}", {}), ({}, {})], ids=str)
def test_arguments_of_an_earlier_call_are_an_object(sent, read):
    """Clients send "" for a tool without arguments, and some the object itself."""
    call = {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": sent}}
    (message,) = chat({"role": "assistant", "tool_calls": [call]}).messages
    assert message["tool_calls"][0]["function"]["arguments"] == read


@pytest.mark.parametrize(
    ("message", "param"),
    [
        ("hi", "messages[1]"),
        ({"content": "hi"}, "messages[1].role"),
        ({"role": "function", "content": "hi"}, "messages[1].role"),
        ({"role": "user"}, "messages[1].content"),
        ({"role": "user", "content": 5}, "messages[1].content"),
        ({"role": "user", "content": []}, "messages[1].content"),
        ({"role": "user", "content": [{"type": "image_url", "image_url": {}}]}, "messages[1].content"),
        ({"role": "user", "content": [{"type": "text"}]}, "messages[1].content"),
        ({"role": "user", "content": "hi", "name": 5}, "messages[1].name"),
        ({"role": "assistant", "content": "hi", "reasoning_content": 5}, "messages[1].reasoning_content"),
        ({"role": "assistant", "function_call": {"name": "a", "arguments": "{}"}}, "messages[1].function_call"),
        ({"role": "tool", "content": "hi"}, "messages[1].tool_call_id"),
        ({"role": "assistant"}, "messages[1].content"),
        ({"role": "assistant", "tool_calls": [5]}, "messages[1].tool_calls[0]"),
        ({"role": "assistant", "tool_calls": [{"id": "1", "type": "x"}]}, "messages[1].tool_calls[0].type"),
        (
            {"role": "assistant", "tool_calls": [{"id": "1", "function": {"name": "a b"}}]},
            "messages[1].tool_calls[0].function.name",
        ),
        (
            {"role": "assistant", "tool_calls": [{"id": "1", "function": {"name": "a", "arguments": "[]"}}]},
            "messages[1].tool_calls[0].function.arguments",
        ),
        (
            {
                "role": "assistant",
                "tool_calls": [{"id": "1", "function": {"name": "a", "arguments": '{"a": "\\ud800"}'}}],
            },
            "messages[1].tool_calls[0].function.arguments",
        ),
        (
            {"role": "assistant", "tool_calls": [{"function": {"name": "a", "arguments": "{}"}}]},
            "messages[1].tool_calls[0].id",
        ),
    ],
)
def test_a_bad_message_is_named_by_its_path(message, param):
    error = refusal("chat", {"messages": [{"role": "user", "content": "hi"}, message]})
    assert error["param"] == param and error["message"].startswith(param)


def test_no_messages():
    for messages in (None, [], {}, [{}] * 1025):
        assert refusal("chat", {"messages": messages})["param"].startswith("messages")


def allowed_tools(mode, *names):
    tools = [{"type": "function", "function": {"name": name}} for name in names]
    return {"type": "allowed_tools", "allowed_tools": {"mode": mode, "tools": tools}}


def test_tools_and_tool_choice():
    user = {"role": "user", "content": "hi"}
    assert chat(user, tools=[WEATHER, CLOCK]).tools == (WEATHER, CLOCK)
    assert chat(user, tools=[WEATHER, CLOCK], tool_choice="none").tools == ()
    required = chat(user, tools=[WEATHER, CLOCK], tool_choice="required")
    assert (required.tools, required.must_call) == ((WEATHER, CLOCK), True)
    named = chat(user, tools=[WEATHER, CLOCK], tool_choice={"type": "function", "function": {"name": "clock"}})
    assert (named.tools, named.must_call) == ((CLOCK,), True)
    assert not chat(user, tools=[], tool_choice="auto", parallel_tool_calls=False).tools
    some = chat(user, tools=[WEATHER, CLOCK], tool_choice=allowed_tools("required", "clock"), parallel_tool_calls=False)
    assert (some.tools, some.must_call, some.parallel) == ((CLOCK,), True, False)
    extra = CLOCK | {"cache_control": {}, "function": CLOCK["function"] | {"defer_loading": False}}
    assert chat(user, tools=[extra]).tools == (CLOCK,)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tools": {}}, "tools"),
        ({"tools": [WEATHER] * 65}, "tools"),
        ({"tools": [WEATHER, WEATHER]}, "tools[1].function.name"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
        ({"tools": [{"type": "function"}]}, "tools[0].function"),
        ({"tools": [{"type": "function", "function": {"name": "a" * 65}}]}, "tools[0].function.name"),
        ({"tools": [{"type": "function", "function": {"name": "a\n"}}]}, "tools[0].function.name"),
        (
            {"tools": [{"type": "function", "function": {"name": "a", "parameters": "{}"}}]},
            "tools[0].function.parameters",
        ),
        ({"tools": [WEATHER], "tool_choice": "maybe"}, "tool_choice"),
        ({"tools": [WEATHER], "tool_choice": {"type": "function", "function": {"name": "clock"}}}, "tool_choice"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": [WEATHER], "tool_choice": allowed_tools("auto")}, "tool_choice.allowed_tools.tools"),
        ({"tools": [WEATHER], "tool_choice": allowed_tools("auto", "clock")}, "tool_choice.allowed_tools.tools"),
        ({"tools": [WEATHER], "tool_choice": allowed_tools("any", "weather")}, "tool_choice.allowed_tools.mode"),
    ],
)
def test_bad_tools(fields, param):
    assert refusal("chat", MINIMAL["chat"] | fields)["param"] == param


def constraint(kind, **fields):
    return parse_fields(kind, **fields).constraint


def test_response_formats():
    schema = {"type": "object", "properties": {"é": {"type": "string"}}}
    named = {"type": "json_schema", "json_schema": {"name": "a", "schema": schema, "strict": True}}
    for kind in ("chat", "completion"):
        assert json.loads(constraint(kind, response_format=named).text) == schema
        assert json.loads(constraint(kind, response_format={"type": "json_object"}).text) == {"type": "object"}
        with_schema = {"type": "json_object", "schema": schema}  # llama-server's
        assert parse_fields(kind, response_format=with_schema) == parse_fields(kind, response_format=named)
        assert parse_fields(kind, response_format={"type": "text"}) == parse_fields(kind)


@pytest.mark.parametrize("kind", KINDS)
def test_constraints_in_the_words_of_other_servers(kind):
    schema = {"type": "object", "properties": {"é": {"type": "string"}}}
    as_json = constraint(kind, json_schema=schema)
    assert (as_json.kind, json.loads(as_json.text)) == ("json", schema)
    assert constraint(kind, structured_outputs={"json": schema}) == as_json
    assert constraint(kind, structured_outputs={"json": json.dumps(schema)}) == as_json
    assert constraint(kind, guided_json=json.dumps(schema)) == as_json
    any_object = constraint(kind, response_format={"type": "json_object"})
    assert constraint(kind, structured_outputs={"json_object": True, "regex": None}) == any_object
    for name, value, text in (
        ("regex", "a+", "a+"),
        ("choice", ["a", "é"], json.dumps(["a", "é"])),
        ("grammar", 'root ::= "a"', 'root ::= "a"'),
    ):
        assert constraint(kind, structured_outputs={name: value}) == (name, text, False)
        assert constraint(kind, **{f"guided_{name}": value}) == (name, text, False)
    assert constraint(kind, grammar='start: "a"') == ("grammar", 'start: "a"', False)
    assert constraint(kind, structured_outputs={"json": schema, "disable_any_whitespace": True}).compact
    both = {"response_format": {"type": "text"}, "grammar": "x"}
    assert constraint(kind, **both).kind == "grammar"


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"structured_outputs": "a"}, "structured_outputs"),
        ({"structured_outputs": {}}, "structured_outputs"),
        ({"structured_outputs": {"regex": "a", "choice": ["b"]}}, "structured_outputs"),
        ({"structured_outputs": {"regexp": "a"}}, "structured_outputs.regexp"),
        ({"structured_outputs": {"regex": ""}}, "structured_outputs.regex"),
        ({"structured_outputs": {"regex": "a" * 32_769}}, "structured_outputs.regex"),
        ({"structured_outputs": {"choice": []}}, "structured_outputs.choice"),
        ({"structured_outputs": {"choice": ["a", 1]}}, "structured_outputs.choice"),
        ({"structured_outputs": {"json": "{"}}, "structured_outputs.json"),
        ({"structured_outputs": {"json": "[1]"}}, "structured_outputs.json"),
        ({"structured_outputs": {"json_object": 1}}, "structured_outputs.json_object"),
        ({"structured_outputs": {"regex": "a", "whitespace_pattern": " "}}, "structured_outputs.whitespace_pattern"),
        ({"structured_outputs": {"structural_tag": "{}"}}, "structured_outputs.structural_tag"),
        ({"grammar": 5}, "grammar"),
        ({"json_schema": "{}"}, "json_schema"),
        ({"guided_regex": ["a"]}, "guided_regex"),
        ({"grammar": "x", "json_schema": {}}, "json_schema"),
        ({"response_format": {"type": "json_object"}, "structured_outputs": {"regex": "a"}}, "structured_outputs"),
    ],
)
def test_constraints_that_are_none_or_two(fields, param):
    for kind in KINDS:
        assert refusal(kind, MINIMAL[kind] | fields)["param"] == param


@pytest.mark.parametrize(
    ("value", "param"),
    [
        ("json", "response_format"),
        ({}, "response_format.type"),
        ({"type": "grammar"}, "response_format.type"),
        ({"type": "json_object", "schema": "{}"}, "response_format.schema"),
        ({"type": "text", "schema": {}}, "response_format.schema"),
        ({"type": "json_schema"}, "response_format.json_schema"),
        ({"type": "json_schema", "json_schema": {"schema": "{}"}}, "response_format.json_schema.schema"),
        (
            {"type": "json_schema", "json_schema": {"schema": {"enum": ["a" * 40_000]}}},
            "response_format.json_schema.schema",
        ),
        ({"type": "json_schema", "json_schema": {"schema": {}, "regex": "a"}}, "response_format.json_schema.regex"),
    ],
)
def test_bad_response_formats(value, param):
    assert refusal("chat", MINIMAL["chat"] | {"response_format": value})["param"] == param


# ------------------------------------------------------------------------------------------------ and besides


@given(json_values)
def test_short_is_short(value):
    assert len(short(value)) <= 60


def test_requests_cannot_be_changed():
    request = parse_fields("chat")
    assert isinstance(request, ApiRequest)
    with pytest.raises(AttributeError):
        request.n = 2


def test_checks_stand_without_assertions_and_without_torch():
    """python -O drops every assert; and nothing here may need torch."""
    code = (
        "import sys\n"
        "from gpt_fast.serve.endpoints import COMPLETION\n"
        "from gpt_fast.serve.request import parse_request, RequestError\n"
        "assert False\n"
        'for body in (b\'[]\', b\'{"prompt": 5}\', b\'{"prompt": "x", "n": 99}\'):\n'
        "    try: parse_request(COMPLETION, body, model_names=['m'], max_new_tokens=5)\n"
        "    except RequestError: continue\n"
        "    sys.exit('accepted')\n"
        "sys.exit('torch' in sys.modules)\n"
    )
    assert subprocess.run([sys.executable, "-O", "-c", code], timeout=60).returncode == 0
