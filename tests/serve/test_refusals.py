"""Every refusal that a client can see: it names the field, shows the value as JSON spells it, and says what is allowed
or what to do. The fields come from the endpoints themselves, each with values of every JSON type."""

import json
import re

import pytest

from gpt_fast.llm import Engine
from gpt_fast.serve import messages, responses
from gpt_fast.serve.admission import Admit, Limits
from gpt_fast.serve.endpoints import ENDPOINTS
from gpt_fast.serve.exchange import Incoming, Refusal
from gpt_fast.serve.neutral import IGNORED, NEUTRAL
from gpt_fast.text.grammar_check import Checked
from support.tiny_engine import tiny_engine

USER = {"role": "user", "content": "hi"}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
VALUES = [
    True, False, -1, 0, 1, 0.5, -2.5, 10**30, "", "x", "\ud7ff'\"", [], [1], ["a"], [None], [{}], [[True]], {},
    {"a": None},
    {"type": "x"}, {"1": 1000}, {"-1": "x"}, [USER, {"role": "user", "content": None}], [USER, {"role": True}],
    [USER, {"role": "tool", "content": "x"}], [USER, {"role": "assistant", "tool_calls": [{"id": True}]}],
    [USER, {"role": "assistant", "tool_calls": [{"id": "1", "function": {"name": "f", "arguments": "None"}}]}],
    [TOOL, TOOL], [{"type": "function", "function": {"name": None}}], [{"type": None, "function": {"name": "f"}}],
    [{"type": "function", "function": {"name": "f", "parameters": {"type": True}}}], {"include_usage": "yes"},
    [{"type": "function", "function": {"name": "f", "strict": None, "description": False}}],
    {"type": "json_object", "a": 1},
    {"type": "function", "function": {"name": "g"}}, {"type": "allowed_tools", "allowed_tools": {"mode": True}},
    {"type": "json_schema", "json_schema": {"schema": True}}, {"type": "json_schema", "json_schema": {"name": "a"}},
    {"type": "json_schema", "json_schema": {"schema": {"type": "robot"}}}, {"regex": "(?=a)"}, {"choice": [None]},
    {"type": "json_schema", "json_schema": {"schema": {"enum": [10**20]}}}, {"grammar": "root ::= x"}, {"json": "{"},
    {"regex": "a", "choice": ["b"]}, {"grammar": "start: y"}, {"regex": "("}, {"messages": True}, 1e9, "a" * 300,
]  # fmt: skip
# What Python, and no client of another language, would write.
PYTHON = re.compile(r"\b(True|False|None|NoneType|dict|tuple|inf|nan)\b|<class|object at 0x|(?<![\w])'[^']*'")


def compiled_here(grammar: str, *, gbnf: bool = False) -> Checked:
    """The check of a grammar without a process of its own: none of these is hostile."""
    from llguidance import LLMatcher
    from llguidance.gbnf_to_lark import gbnf_to_lark

    try:
        grammar = LLMatcher.grammar_from_lark(gbnf_to_lark(grammar)) if gbnf else grammar
    except Exception as error:
        return Checked(f"GBNF: {error}", grammar)
    return Checked(" ".join(LLMatcher.validate_grammar(grammar).split()), grammar)


@pytest.fixture(autouse=True)
def quick(monkeypatch) -> None:
    monkeypatch.setattr("gpt_fast.text.grammar.check", compiled_here)


@pytest.fixture(scope="module")
def admit() -> Admit:
    engine: Engine = tiny_engine()
    limits = Limits(max_new_tokens=20, stream=True, max_waiting=4, max_seconds=60.0)
    return Admit(engine, in_flight=lambda: 0, limits=limits, model_names=["gpt-fast"], draining=lambda: False)


def refusal(admit: Admit, path: str, body: object) -> dict | None:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    try:
        admit(Incoming(path, data))
    except Refusal as error:
        assert 400 <= error.reply.status < 500
        return json.loads(error.reply.text)["error"]
    return None


def check(error: dict, name: str | None) -> None:
    message = error["message"]
    assert "\n" not in message and len(message) <= 610
    message = re.sub(r"\d+ \| .*? \^", "", message)  # the line of a grammar
    shown = re.sub(r'"(\\.|[^"\\])*"', '""', message)  # what the client itself wrote stands in JSON's quotes
    assert not PYTHON.search(shown), message
    assert re.search(r"got|allowed|needs|is required|leave|write|give|is no|is not|matches it", message), message
    if name is not None:
        assert error["param"] and message.startswith(name.split("[")[0].split(".")[0]), message


MINIMAL = {
    "": {"prompt": "hi", "max_new_tokens": 3},
    "v1/completions": {"prompt": "hi", "max_tokens": 3},
    "v1/chat/completions": {"messages": [USER], "max_tokens": 3},
    "v1/messages": {"messages": [USER], "max_tokens": 3},
    "v1/responses": {"input": "hi", "max_output_tokens": 3},
}
FIELDS = {"v1/messages": messages.KNOWN, "v1/responses": responses.KNOWN | responses.REFUSED.keys()}
TOOLS = {
    "v1/messages": {"name": "f", "input_schema": {"type": "object"}},
    "v1/responses": {"type": "function", "name": "f", "parameters": {"type": "object"}},
}


@pytest.mark.slow
@pytest.mark.parametrize("path", ENDPOINTS)
def test_every_field_with_values_of_every_kind(admit, path):
    fields = FIELDS.get(path, ENDPOINTS[path].known)
    refused = 0
    for name in sorted({*fields, *NEUTRAL, *IGNORED}):
        for value in VALUES:
            extra = {"tools": [TOOLS.get(path, TOOL)]} if name == "tool_choice" else {}
            if error := refusal(admit, path, MINIMAL[path] | extra | {name: value}):
                refused += 1
                check(error, None)
                assert error.get("param") or path == "v1/messages", error  # Anthropic's errors have none
    assert refused > 900


@pytest.mark.parametrize(
    "body",
    [
        b"", b"null", b"[1]", b"true", b"3", b'"x"', b"{", b"{'a': 1}", b'{"a": NaN}', b'{"a": 1e999}', b"\xff",
        b'{"a": 1, "a": 2}', b'{"prompt": "\\ud800"}', b'{"a": ' + b"[" * 100 + b"]" * 100 + b"}", b"\x1f\x8b",
        b'{"a": ' + b"9" * 50 + b"}", b'{"foo": true}', b'{"model": true}', b'{"model": "x\'y"}',
    ],
)  # fmt: skip
def test_bodies_that_are_none(admit, body):
    for path in ENDPOINTS:
        error = refusal(admit, path, body)
        assert error is not None
        check(error, None)


def test_paths_that_are_none(admit):
    for path in ("v2", "v1/models/other", "None", "v1/chat"):
        error = refusal(admit, path, b"{}")
        assert error is not None
        check(error, None)
        assert "allowed" in error["message"]


def test_the_check_can_fail():
    for message in ("a: bad (got True, allowed false)", "a: bad (got 'x', allowed y)", "a: must be a str (got None)"):
        with pytest.raises(AssertionError):
            check({"message": message, "param": "a"}, "a")
    check({"message": 'a: must be true or false (got "it\'s None")', "param": "a"}, "a")
