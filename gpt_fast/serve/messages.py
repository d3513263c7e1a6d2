"""Anthropic's Messages API (https://docs.anthropic.com/en/api/messages): its bodies as chat bodies, its errors.

What a chat takes is checked there; here is only what the two call differently. No torch here.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from gpt_fast.serve.body import RequestError, expect, short

Fields = dict[str, Any]
Names = dict[str, str]  # body.in_words_of's

SAME = ("model", "max_tokens", "temperature", "top_p", "top_k", "stream")
KNOWN = {*SAME, "messages", "system", "stop_sequences", "tools", "tool_choice", "metadata", "thinking", "output_config"}
# For whom, where and how fast it is served.
IGNORED = {"service_tier", "cache_control", "speed", "inference_geo", "user_profile_id", "workspace_id"}
# What a chat's fields are called here.
NAMES = {
    "stop": "stop_sequences",
    "user": "metadata.user_id",
    "reasoning_effort": "output_config.effort",
    "response_format": "output_config.format",
    "response_format.json_schema.schema": "output_config.format.schema",
    "continue_final_message": "messages",
}
ERRORS = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
}


def chat_body(fields: Fields) -> tuple[Fields, Names]:
    """A chat completion's body for that of a message, and what the client calls its parts. RequestError names what has
    no counterpart."""
    for name, value in fields.items():
        if name not in KNOWN | IGNORED and value is not None:
            raise RequestError(f"{short(name)}: unknown field (allowed {', '.join(sorted(KNOWN))})", param=name)
    fields = {name: value for name, value in fields.items() if value is not None}
    if "max_tokens" not in fields:
        raise RequestError("max_tokens: is required (allowed 1 or more)", param="max_tokens")
    body, names = prompt_fields(fields)
    body |= {
        **{name: fields[name] for name in SAME if name in fields},
        **({"stop": fields["stop_sequences"]} if fields.get("stop_sequences") else {}),
        **metadata(fields.get("metadata", {})),
        **output_config(fields.get("output_config", {})),
    }
    return body, names


def count_body(fields: Fields) -> tuple[Fields, Names]:
    """The part of a chat's body that makes its prompt, for /v1/messages/count_tokens."""
    known = {"model", "messages", "system", "tools", "tool_choice", "thinking", "output_config"}
    for name in fields:
        if name not in known | IGNORED:
            raise RequestError(f"{short(name)}: unknown field (allowed {', '.join(sorted(known))})", param=name)
    return prompt_fields(fields)


def prompt_fields(fields: Fields) -> tuple[Fields, Names]:
    if "messages" not in fields:
        raise RequestError("messages: is required (allowed a list of messages)", param="messages")
    expect(fields["messages"], "messages", list, "a list of messages")
    turns = [({"role": "system", "content": fields["system"]}, {"content": "system"})] if fields.get("system") else []
    for index, message in enumerate(fields["messages"]):
        turns += split_message(message, f"messages[{index}]")
    names = NAMES | {
        f"messages[{n}].{ours}": theirs for n, (_, each) in enumerate(turns) for ours, theirs in each.items()
    }
    messages = [turn for turn, _ in turns]
    body: Fields = {"messages": messages} | thinking(fields.get("thinking"))
    if messages and messages[-1]["role"] == "assistant":  # the answer goes on where the client began it
        body["continue_final_message"] = True
    if fields.get("tools"):
        expect(fields["tools"], "tools", list, "a list of tools")
        body["tools"] = [chat_tool(tool, f"tools[{index}]") for index, tool in enumerate(fields["tools"])]
        for index in range(len(body["tools"])):
            names[f"tools[{index}].function"] = f"tools[{index}]"
            names[f"tools[{index}].function.parameters"] = f"tools[{index}].input_schema"
        body |= tool_choice(fields.get("tool_choice", {"type": "auto"}), [each.get("name") for each in fields["tools"]])
    return body, names


# ------------------------------------------------------------------------------------------- messages


def split_message(message: object, where: str) -> list[tuple[Fields, Names]]:
    """A message as chat messages, and where the parts of each came from: each of its tool results is one of its own."""
    expect(message, where, dict, "an object with role and content")
    role, content = message.get("role"), message.get("content")  # type: ignore[attr-defined]
    if role not in ("user", "assistant"):
        raise RequestError(f"{where}.role: unknown role (got {short(role)}, allowed user, assistant)", param=where)
    if isinstance(content, str):
        return [({"role": role, "content": content}, {"content": f"{where}.content"})]
    expect(content, f"{where}.content", list, "a string or a list of blocks")
    blocks = {f"{where}.content[{i}]": block for i, block in enumerate(content)}
    blocks = {at: checked_block(block, at, role) for at, block in blocks.items()}
    return [answer_of(blocks, where)] if role == "assistant" else turns_of(blocks, where)


BLOCKS = {"user": ("text", "tool_result"), "assistant": ("text", "tool_use", "thinking")}


def checked_block(block: object, where: str, role: str) -> Fields:
    expect(block, where, dict, "an object with a type")
    kind = block.get("type")  # type: ignore[attr-defined]
    if kind not in BLOCKS[role]:
        allowed = ", ".join(BLOCKS[role])
        raise RequestError(f"{where}.type: not supported in a {role} message (got {short(kind)}, allowed {allowed})")
    needed = {"text": "text", "tool_result": "tool_use_id", "tool_use": "name", "thinking": "thinking"}[kind]
    expect(block.get(needed), f"{where}.{needed}", str, "a string")  # type: ignore[attr-defined]
    return dict(block)  # type: ignore[call-overload, no-any-return]


def answer_of(blocks: Mapping[str, Fields], where: str) -> tuple[Fields, Names]:
    """An earlier answer: its text, calls and thoughts."""
    calls: list[Fields] = []
    names = {"content": f"{where}.content", "reasoning_content": f"{where}.content"}
    for at, block in blocks.items():
        if block["type"] == "tool_use":
            ours = f"tool_calls[{len(calls)}]"
            names |= {ours: at, f"{ours}.function": at, f"{ours}.function.arguments": f"{at}.input"}
            function = {"name": block["name"], "arguments": json.dumps(block.get("input", {}))}
            calls.append({"id": block.get("id"), "type": "function", "function": function})
    thoughts = "".join(block["thinking"] for block in blocks.values() if block["type"] == "thinking")
    message: Fields = {"role": "assistant", "content": text_parts(blocks.values()) or ("" if calls else None)}
    message |= {"tool_calls": calls} if calls else {}
    return message | ({"reasoning_content": thoughts} if thoughts else {}), names


def turns_of(blocks: Mapping[str, Fields], where: str) -> list[tuple[Fields, Names]]:
    """What the user says, with the results of tools in their place."""
    turns: list[tuple[Fields, Names]] = []
    for at, block in blocks.items():
        if block["type"] == "tool_result":
            names = {"content": f"{at}.content", "tool_call_id": f"{at}.tool_use_id"}
            content = block.get("content") or ""
            turns.append(({"role": "tool", "tool_call_id": block["tool_use_id"], "content": content}, names))
        elif turns and turns[-1][0]["role"] == "user":
            turns[-1][0]["content"] += text_parts([block])
        else:
            turns.append(({"role": "user", "content": text_parts([block])}, {"content": f"{where}.content"}))
    return turns or [({"role": "user", "content": []}, {"content": f"{where}.content"})]  # refused there, by its name


def text_parts(blocks: Iterable[Fields]) -> list[Fields]:
    return [{"type": "text", "text": block["text"]} for block in blocks if block["type"] == "text"]


# ------------------------------------------------------------------------------------------- tools and the rest


def chat_tool(tool: object, where: str) -> Fields:
    expect(tool, where, dict, "an object with name and input_schema")
    fields: Mapping[str, Any] = tool  # type: ignore[assignment]
    if fields.get("type", "custom") not in ("custom", None):
        raise RequestError(f"{where}.type: not supported (got {short(fields['type'])}, allowed custom)", param=where)
    function = {"name": fields.get("name"), "parameters": fields.get("input_schema")}
    if fields.get("description"):
        function["description"] = fields["description"]
    return {"type": "function", "function": function}


def tool_choice(choice: object, tools: Sequence[object]) -> Fields:
    """tools: their names."""
    expect(choice, "tool_choice", dict, "an object with a type")
    fields: Mapping[str, Any] = choice  # type: ignore[assignment]
    kind = fields.get("type")
    chosen: Any = {"auto": "auto", "any": "required", "none": "none"}.get(kind) if isinstance(kind, str) else None
    if kind == "tool":
        if fields.get("name") not in tools:
            allowed = ", ".join(map(short, tools))
            message = f"tool_choice.name: no such tool (got {short(fields.get('name'))}, allowed {allowed})"
            raise RequestError(message, param="tool_choice.name")
        chosen = {"type": "function", "function": {"name": fields.get("name")}}
    if chosen is None:
        raise RequestError(
            f"tool_choice.type: unknown (got {short(kind)}, allowed auto, any, tool, none)", param="tool_choice"
        )
    one = fields.get("disable_parallel_tool_use", False)
    expect(one, "tool_choice.disable_parallel_tool_use", bool, "true or false")
    return {"tool_choice": chosen} | ({"parallel_tool_calls": False} if one else {})


def metadata(value: object) -> Fields:
    expect(value, "metadata", dict, "an object with user_id")
    user = value.get("user_id")  # type: ignore[attr-defined]
    return {} if user is None else {"user": user}


def thinking(value: object) -> Fields:
    """What is thought is part of the text, so there is no budget of its own for it."""
    kind = value.get("type") if isinstance(value, dict) else value
    if kind in (None, "adaptive"):
        return {}
    if kind != "disabled":
        message = f'thinking.type: not supported (got {short(kind)}, allowed "disabled", "adaptive")'
        raise RequestError(message, param="thinking")
    return {"chat_template_kwargs": {"enable_thinking": False}}


def output_config(value: object) -> Fields:
    """How hard to think, and the JSON schema that the answer must match."""
    expect(value, "output_config", dict, "an object with format and effort")
    config: Mapping[str, Any] = value  # type: ignore[assignment]
    for name in config:
        if name not in ("format", "effort") and config[name] is not None:
            raise RequestError(f"output_config.{name}: not supported (allowed format, effort)", param="output_config")
    effort = {} if config.get("effort") is None else {"reasoning_effort": config["effort"]}
    form = config.get("format")
    if form is None:
        return effort
    if not isinstance(form, dict) or form.get("type") != "json_schema":
        message = f'output_config.format: unknown (got {short(form)}, allowed {{"type": "json_schema", "schema": ...}})'
        raise RequestError(message, param="output_config")
    schema = {"name": "answer", "schema": form.get("schema")}
    return effort | {"response_format": {"type": "json_schema", "json_schema": schema}}


# ------------------------------------------------------------------------------------------- errors


def error_body(status: int, message: str) -> str:
    kind = ERRORS.get(status, "invalid_request_error" if status < 500 else "api_error")
    return json.dumps({"type": "error", "error": {"type": kind, "message": message}})
