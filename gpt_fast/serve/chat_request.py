"""What only a chat request has: messages, tools, and the schema its answer must match. Checked JSON in and out.

Shapes are OpenAI's (https://platform.openai.com/docs/api-reference/chat/create), text only.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from gpt_fast.serve.body import RequestError, check_values, decode_json, expect, short

MAX_MESSAGES = 1024
MAX_TOOLS = 64
MAX_SCHEMA = 32_768  # bytes of JSON in ASCII
ANY_OBJECT = '{"type": "object"}'
ROLES = ("system", "developer", "user", "assistant", "tool")
FUNCTION_NAME = re.compile(r"[a-zA-Z0-9_-]{1,64}")

Object = Mapping[str, Any]


def parse_messages(value: object, *, tools: bool) -> tuple[Object, ...]:
    """The conversation as chat templates expect it: content is text, a tool call's arguments are an object.

    tools: whether the conversation may hold calls of them. "developer" is the newer name of "system".
    """
    if value is None:
        raise RequestError("messages: is required (allowed a list of messages)", param="messages")
    expect(value, "messages", list, "a list of messages")
    rows: list[object] = value  # type: ignore[assignment]
    if not 1 <= len(rows) <= MAX_MESSAGES:
        raise RequestError(f"messages: {len(rows)} messages (allowed 1..{MAX_MESSAGES})", param="messages")
    return tuple(parse_message(row, f"messages[{index}]", tools=tools) for index, row in enumerate(rows))


def parse_message(value: object, where: str, *, tools: bool) -> Object:
    expect(value, where, dict, "an object with role and content")
    # An answer of ours (or OpenAI's) may come back whole, with fields that say nothing.
    fields = {name: each for name, each in value.items() if each is not None and each != []}  # type: ignore[attr-defined]
    role = fields.pop("role", None)
    if role not in ROLES:
        raise refuse(f"{where}.role", f"unknown role (got {short(role)}, allowed {', '.join(ROLES)})")
    message: dict[str, Any] = {"role": "system" if role == "developer" else role}
    calls = fields.pop("tool_calls", None) if role == "assistant" and tools else None
    message["content"] = parse_content(fields.pop("content", "" if calls else None), f"{where}.content")
    for name in ("name", "tool_call_id"):
        if name in fields:
            message[name] = short_text(fields.pop(name), f"{where}.{name}")
    if role == "tool" and "tool_call_id" not in message:
        raise refuse(f"{where}.tool_call_id", "is required with the role tool")
    if calls:
        message["tool_calls"] = parse_calls(calls, f"{where}.tool_calls")
    for name in fields:
        raise refuse(f"{where}.{name}", f"unknown or unsupported field (got {short(fields[name])})")
    return message


def parse_content(value: object, where: str) -> str | list[Object]:
    """A message's text: a string, or OpenAI's list of text parts; the chat template takes one or the other."""
    if isinstance(value, str):
        return value
    if isinstance(value, list) and value:
        parts = [part.get("text") for part in value if isinstance(part, dict) and part.get("type") == "text"]
        texts = [text for text in parts if isinstance(text, str)]
        if len(texts) == len(value):
            return texts[0] if len(texts) == 1 else [{"type": "text", "text": text} for text in texts]
    raise refuse(where, f"must be a string or a list of text parts (got {short(value)})")


def parse_calls(value: object, where: str) -> list[Object]:
    """The calls an assistant message made, arguments decoded: templates write them their own way."""
    expect(value, where, list, "a list of tool calls")
    calls: list[Object] = []
    for index, call in enumerate(value):  # type: ignore[arg-type, var-annotated]
        at = f"{where}[{index}]"
        function = parse_function(call, at, ("id",), ("name", "arguments"))
        call_id = short_text(call.get("id"), f"{at}.id")
        decoded = decode_arguments(function.get("arguments"), f"{at}.function.arguments")
        calls.append({"id": call_id, "type": "function", "function": {"name": function["name"], "arguments": decoded}})
    return calls


def decode_arguments(text: Any, where: str) -> Object:
    """A call's arguments, as a string or as they are; clients send "" for those of a tool without any."""
    try:
        value = decode_json(text or "{}") if isinstance(text, str) else text
        if isinstance(value, dict):
            check_values(value)
            return value
    except RequestError:
        pass
    raise refuse(where, f"must be a JSON object as a string (got {short(text)})")


def parse_tools(tools: object, choice: object) -> tuple[tuple[Object, ...], bool]:
    """The tools the model may call, and whether it must call one.

    tool_choice "none" leaves no tools, a named function leaves that one.
    """
    expect(tools, "tools", list, "a list of tools")
    rows: list[Any] = tools  # type: ignore[assignment]
    if len(rows) > MAX_TOOLS:
        raise refuse("tools", f"{len(rows)} tools (allowed {MAX_TOOLS})")
    allowed = ("name", "description", "parameters", "strict")
    by_name = {}
    for index, row in enumerate(rows):
        function = parse_function(row, f"tools[{index}]", (), allowed)
        expect(function.get("description") or "", f"tools[{index}].function.description", str, "a string")
        parameters = function.get("parameters") or {}
        expect(parameters, f"tools[{index}].function.parameters", dict, "a JSON schema")
        if parameters.get("type", "object") != "object":
            got = short(parameters["type"])
            raise refuse(f"tools[{index}].function.parameters.type", f"arguments are an object (got {got})")
        expect(function.get("strict") or False, f"tools[{index}].function.strict", bool, "true or false")
        if function["name"] in by_name:
            raise refuse(f"tools[{index}].function.name", f"{short(function['name'])} is there twice")
        by_name[function["name"]] = row
    return choose(by_name, choice)


def choose(by_name: Mapping[str, Object], choice: object) -> tuple[tuple[Object, ...], bool]:
    """Apply tool_choice."""
    if choice in ("none", None, "auto"):
        return (tuple(by_name.values()) if choice != "none" else ()), False
    if choice == "required" and by_name:
        return tuple(by_name.values()), True
    if isinstance(choice, dict) and choice.get("type") == "function" and isinstance(choice.get("function"), dict):
        name = choice["function"].get("name")
        if isinstance(name, str) and name in by_name:
            return (by_name[name],), True
    names = ", ".join(by_name) or "no tools given"
    raise refuse("tool_choice", f"unknown (got {short(choice)}, allowed none, auto, required or a function: {names})")


def parse_function(value: object, where: str, extra: tuple[str, ...], allowed: tuple[str, ...]) -> dict[str, Any]:
    """The function of a {"type": "function", "function": {"name", ...}}."""
    expect(value, where, dict, "an object with type and function")
    check_names(value, where, ("type", "function", *extra))
    if value.get("type", "function") != "function":  # type: ignore[attr-defined]
        raise refuse(f"{where}.type", f"unknown type (got {short(value['type'])}, allowed function)")  # type: ignore[index]
    function = value.get("function")  # type: ignore[attr-defined]
    expect(function, f"{where}.function", dict, "an object with a name")
    check_names(function, f"{where}.function", allowed)
    name = function.get("name")
    if not isinstance(name, str) or not FUNCTION_NAME.fullmatch(name):
        raise refuse(f"{where}.function.name", f"must be 1..64 of a-z, A-Z, 0-9, _ and - (got {short(name)})")
    found: dict[str, Any] = function
    return found


def parse_response_format(value: object) -> str | None:
    """The JSON schema, as text, that the answer must match; None: any text."""
    expect(value, "response_format", dict, "an object with a type")
    fields: dict[str, Any] = value  # type: ignore[assignment]
    kind = fields.get("type")
    if kind not in ("text", "json_object", "json_schema"):
        raise refuse("response_format.type", f"unknown (got {short(kind)}, allowed text, json_object, json_schema)")
    check_names(fields, "response_format", ("type", "json_schema") if kind == "json_schema" else ("type",))
    if kind != "json_schema":
        return None if kind == "text" else ANY_OBJECT
    named = fields.get("json_schema")
    expect(named, "response_format.json_schema", dict, "an object with name and schema")
    check_names(named, "response_format.json_schema", ("name", "schema", "description", "strict"))
    schema = named.get("schema")  # type: ignore[union-attr]
    expect(schema, "response_format.json_schema.schema", dict, "a JSON schema")
    text = json.dumps(schema)
    if len(text) > MAX_SCHEMA:
        raise refuse("response_format.json_schema.schema", f"{len(text)} bytes (allowed {MAX_SCHEMA})")
    return text


def check_names(value: Any, where: str, allowed: tuple[str, ...]) -> None:
    for name in value:
        if name not in allowed:
            raise refuse(f"{where}.{name}", f"unknown field (allowed {', '.join(allowed)})")


def short_text(value: object, where: str) -> str:
    """An identifier: a string of at most 256 characters."""
    if not isinstance(value, str) or not 0 < len(value) <= 256:
        raise refuse(where, f"must be a string of 1..256 characters (got {short(value)})")
    return value


def refuse(where: str, problem: str) -> RequestError:
    return RequestError(f"{short_path(where)}: {problem}", param=where)


def short_path(where: str) -> str:
    return where if len(where) <= 100 else where[:97] + "..."
