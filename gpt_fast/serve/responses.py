"""OpenAI's Responses API (https://platform.openai.com/docs/api-reference/responses): its bodies as chat bodies.

Nothing is stored: a conversation comes whole, as input items. What a chat takes is checked there. No torch here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gpt_fast.serve.body import RequestError, expect, short
from gpt_fast.serve.chat_request import parse_content

Fields = dict[str, Any]
Names = dict[str, str]  # body.in_words_of's

SAME = frozenset({
    "model", "temperature", "top_p", "parallel_tool_calls", "user", "stream",
    # what OpenAI's chats or vLLM's have besides
    "seed", "top_k", "min_p", "stop", "presence_penalty", "frequency_penalty", "repetition_penalty", "ignore_eos",
    "logit_bias", "timeout", "chat_template_kwargs",
})  # fmt: skip
KNOWN = SAME | {
    "input", "instructions", "max_output_tokens", "tools", "tool_choice", "text", "reasoning", "include",
    "top_logprobs",
}  # fmt: skip
# For whom, how fast and from which cache it is served, and whether it is kept: it never is.
IGNORED = frozenset({
    "store", "metadata", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_retention",
    "prompt_cache_options", "stream_options",
})  # fmt: skip
STORED = "nothing is stored here, send the earlier items as input"
REFUSED = {  # unless null, or the value beside them
    "previous_response_id": (None, STORED),
    "conversation": (None, STORED),
    "background": (False, "not supported (allowed false)"),
    "prompt": (None, "stored prompts are not supported, send instructions and input"),
    "truncation": ("disabled", 'not supported (allowed "disabled"), send fewer items'),
    "max_tool_calls": (None, "not supported: there are no built-in tools"),
}
# What a chat's fields are called here.
NAMES = {
    "messages": "input",
    "max_completion_tokens": "max_output_tokens",
    "reasoning_effort": "reasoning.effort",
    "response_format": "text.format",
    "response_format.json_schema": "text.format",
}
LOGPROBS = "message.output_text.logprobs"


def chat_body(fields: Fields) -> tuple[Fields, Names]:
    """A chat completion's body for that of a response, and what the client calls its parts. RequestError names what has
    no counterpart."""
    check_known(fields)
    fields = {name: value for name, value in fields.items() if value is not None}
    turns = messages(fields.get("input"))
    if fields.get("instructions"):
        turns.insert(0, ({"role": "system", "content": fields["instructions"]}, {".content": "instructions"}))
    names = NAMES | {
        f"messages[{n}]{ours}": theirs for n, (_, each) in enumerate(turns) for ours, theirs in each.items()
    }
    body: Fields = {"messages": [turn for turn, _ in turns]}
    body |= {name: fields[name] for name in SAME if name in fields}
    if "max_output_tokens" in fields:
        body["max_completion_tokens"] = token_limit(fields["max_output_tokens"])
    if fields.get("tools"):
        expect(fields["tools"], "tools", list, "a list of tools")
        body["tools"] = [chat_tool(tool, f"tools[{index}]") for index, tool in enumerate(fields["tools"])]
        names |= {f"tools[{index}].function": f"tools[{index}]" for index in range(len(fields["tools"]))}
    if "tool_choice" in fields:
        body["tool_choice"] = tool_choice(fields["tool_choice"])
    body |= text_options(fields.get("text", {})) | effort(fields.get("reasoning", {})) | logprobs(fields)
    return body, names


def check_known(fields: Fields) -> None:
    for name, value in fields.items():
        neutral, problem = REFUSED.get(name, (None, ""))
        if name in REFUSED and value is not None and value != neutral:
            raise RequestError(f"{name}: {problem} (got {short(value)})", param=name)
        if name not in KNOWN | IGNORED | REFUSED.keys() and value is not None:
            raise RequestError(f"{short(name)}: unknown field (allowed {', '.join(sorted(KNOWN))})", param=name)


def token_limit(value: object) -> int:
    if type(value) is not int or value < 1:
        message = f"max_output_tokens: must be a whole number (got {short(value)}, allowed 1 or more)"
        raise RequestError(message, param="max_output_tokens")
    return value


# ------------------------------------------------------------------------------------------- input


def messages(value: object) -> list[tuple[Fields, Names]]:
    """The input's items as chat messages, and where the parts of each came from: calls that follow each other are one
    message's."""
    if isinstance(value, str) and value:
        return [({"role": "user", "content": value}, {})]
    if not isinstance(value, list) or not value:
        raise RequestError(f"input: must be a string or a list of items (got {short(value)})", param="input")
    turns: list[tuple[Fields, Names]] = []
    for index, item in enumerate(value):
        where = f"input[{index}]"
        expect(item, where, dict, "an object")
        kind = item.get("type", "message")
        if kind == "function_call":
            if not turns or turns[-1][0]["role"] != "assistant":
                turns.append(({"role": "assistant", "content": ""}, {"": where}))
            turn, names = turns[-1]
            calls = turn.setdefault("tool_calls", [])
            ours = f".tool_calls[{len(calls)}]"
            names |= {ours: where, f"{ours}.function": where, f"{ours}.id": f"{where}.call_id"}
            calls.append(chat_call(item))
        elif kind == "function_call_output":
            output = parse_content(item.get("output") or "", f"{where}.output")
            turn = {"role": "tool", "tool_call_id": item.get("call_id"), "content": output}
            turns.append((turn, {"": where, ".tool_call_id": f"{where}.call_id"}))
        elif kind == "message":
            content = parse_content(item.get("content"), f"{where}.content")
            turns.append(({"role": item.get("role"), "content": content}, {"": where}))
        elif kind != "reasoning":  # what another model thought, which came with its answer
            allowed = "message, function_call, function_call_output, reasoning"
            raise RequestError(f"{where}.type: not supported (got {short(kind)}, allowed {allowed})", param=where)
    return turns


def chat_call(item: Mapping[str, Any]) -> Fields:
    function = {"name": item.get("name"), "arguments": item.get("arguments")}
    return {"id": item.get("call_id"), "type": "function", "function": function}


# ------------------------------------------------------------------------------------------- tools and the rest


def chat_tool(tool: object, where: str) -> Fields:
    expect(tool, where, dict, "an object with type and name")
    fields: Mapping[str, Any] = tool  # type: ignore[assignment]
    if fields.get("type") != "function":
        got = short(fields.get("type"))
        raise RequestError(f'{where}.type: not supported (got {got}, allowed "function")', param=where)
    names = ("name", "description", "parameters", "strict")
    return {"type": "function", "function": {name: fields[name] for name in names if fields.get(name) is not None}}


def tool_choice(choice: object) -> Any:
    if not isinstance(choice, dict):
        return choice
    if choice.get("type") == "function":
        return named(choice)
    if choice.get("type") == "allowed_tools" and isinstance(choice.get("tools"), list):
        tools = [named(tool) if isinstance(tool, dict) else tool for tool in choice["tools"]]
        return {"type": "allowed_tools", "allowed_tools": {"mode": choice.get("mode"), "tools": tools}}
    return choice


def named(choice: Mapping[str, Any]) -> Fields:
    return {"type": "function", "function": {"name": choice.get("name")}}


def text_options(value: object) -> Fields:
    """text.format: what the answer must match."""
    expect(value, "text", dict, "an object with format")
    for name, each in value.items():  # type: ignore[attr-defined]
        if name not in ("format", "verbosity") and each is not None:
            raise RequestError(f"text.{name}: unknown field (allowed format, verbosity)", param="text")
    if (verbosity := value.get("verbosity")) not in (None, "medium"):  # type: ignore[attr-defined]
        message = f'text.verbosity: not supported here (got {short(verbosity)}, allowed "medium")'
        raise RequestError(message, param="text.verbosity")
    form = value.get("format")  # type: ignore[attr-defined]
    if form is None:
        return {}
    expect(form, "text.format", dict, "an object with a type")
    if form.get("type") != "json_schema":
        return {"response_format": form}
    inner = {name: each for name, each in form.items() if name != "type" and each is not None}
    return {"response_format": {"type": "json_schema", "json_schema": inner}}


def effort(value: object) -> Fields:
    expect(value, "reasoning", dict, "an object with effort")
    chosen = value.get("effort")  # type: ignore[attr-defined]
    return {} if chosen is None else {"reasoning_effort": chosen}


def logprobs(fields: Fields) -> Fields:
    """As a chat's: a switch, which is an entry of `include` here, and a number."""
    include = fields.get("include", [])
    expect(include, "include", list, "a list of names")
    if LOGPROBS not in include and not fields.get("top_logprobs"):
        return {}
    return {"logprobs": True, "top_logprobs": fields.get("top_logprobs", 0)}
