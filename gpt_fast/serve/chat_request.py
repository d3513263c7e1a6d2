"""What only a chat request has: messages, tools, and what it tells the template. Checked JSON in and out.

Shapes are OpenAI's (https://platform.openai.com/docs/api-reference/chat/create), text only.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from gpt_fast.serve.body import RequestError, check_values, decode_json, expect, short
from gpt_fast.serve.constraints import refuse
from gpt_fast.text.chat import CALL_NAMES

MAX_MESSAGES = 1024
MAX_TOOLS = 64
ROLES = ("system", "developer", "user", "assistant", "tool")
TEXT_PARTS = ("text", "input_text", "output_text", "refusal")
EFFORTS = ("none", "minimal", "low", "medium", "high", "xhigh", "max")
TOOL_FIELDS = ("name", "description", "parameters", "strict")
FUNCTION_NAME = re.compile(r"[a-zA-Z0-9_-]{1,64}")

Object = Mapping[str, Any]


def parse_messages(value: object) -> tuple[Object, ...]:
    """The conversation as chat templates expect it: content is text, a tool call's arguments are an object.

    "developer" is the newer name of "system".
    """
    if value is None:
        raise RequestError("messages: is required (allowed a list of messages)", param="messages")
    expect(value, "messages", list, "a list of messages")
    rows: list[object] = value  # type: ignore[assignment]
    if not 1 <= len(rows) <= MAX_MESSAGES:
        raise RequestError(f"messages: {len(rows)} messages (allowed 1..{MAX_MESSAGES})", param="messages")
    return tuple(parse_message(row, f"messages[{index}]") for index, row in enumerate(rows))


def parse_message(value: object, where: str) -> Object:
    """One message. Keys that no template reads are passed over, as vLLM does; content elsewhere is refused."""
    expect(value, where, dict, "an object with role and content")
    fields = {name: each for name, each in value.items() if each is not None}  # type: ignore[attr-defined]
    role = fields.get("role")
    if role not in ROLES:
        raise refuse(f"{where}.role", f"unknown role (got {short(role)}, allowed {', '.join(ROLES)})")
    message: dict[str, Any] = {"role": "system" if role == "developer" else role}
    if "function_call" in fields:
        raise refuse(f"{where}.function_call", "not supported, write it as tool_calls")
    said = parse_assistant(fields, where) if role == "assistant" else {}
    content = fields.get("content", "" if said else None)
    if content is None and isinstance(fields.get("refusal"), str):
        content = fields["refusal"]
    message["content"] = parse_content(content, f"{where}.content")
    for name in ("name", "tool_call_id"):
        if name in fields:
            message[name] = short_text(fields[name], f"{where}.{name}")
    if role == "tool" and "tool_call_id" not in message:
        raise refuse(f"{where}.tool_call_id", "is required with the role tool (allowed the id of an earlier call)")
    return message | said


def parse_assistant(fields: Mapping[str, Any], where: str) -> dict[str, Any]:
    """What only an earlier answer has: its calls, and its reasoning under both names that templates read."""
    found: dict[str, Any] = {}
    if fields.get("tool_calls"):
        found["tool_calls"] = parse_calls(fields["tool_calls"], f"{where}.tool_calls")
    for name in ("reasoning", "reasoning_content"):
        if name in fields:
            expect(fields[name], f"{where}.{name}", str, "a string")
            found |= dict.fromkeys(("reasoning", "reasoning_content"), fields[name])
    return found


def parse_content(value: object, where: str) -> str | list[Object]:
    """A message's text: a string, or OpenAI's list of text parts; the chat template takes one or the other."""
    if isinstance(value, str):
        return value
    if isinstance(value, list) and value:
        texts = [text for text in map(part_text, value) if text is not None]
        if len(texts) == len(value):
            return texts[0] if len(texts) == 1 else [{"type": "text", "text": text} for text in texts]
    raise refuse(where, f"must be a string or a list of text parts (got {short(value)})")


def part_text(part: object) -> str | None:
    """The text of a part of a message; None for a picture or the like."""
    if isinstance(part, dict):
        kind = part.get("type", "text")
        part = part.get("refusal" if kind == "refusal" else "text") if kind in TEXT_PARTS else None
    return part if isinstance(part, str) else None


def parse_template_options(fields: Mapping[str, Any]) -> dict[str, Any]:
    """What a chat request tells the template, as vLLM reads it: options of ChatTemplate.render."""
    names = ("add_generation_prompt", "continue_final_message")
    options: dict[str, Any] = {name: fields[name] for name in names if name in fields}
    for name in options:
        expect(options[name], name, bool, "true or false")
    goes_on = options.setdefault("continue_final_message", False)
    if goes_on and options.get("add_generation_prompt"):
        message = "does not go with add_generation_prompt (got true for both), set one of them to false"
        raise refuse("continue_final_message", message)
    options.setdefault("add_generation_prompt", not goes_on)
    variables = fields.get("chat_template_kwargs", {})
    expect(variables, "chat_template_kwargs", dict, "an object of the template's variables")
    for name in variables:
        if name in CALL_NAMES:
            raise refuse(f"chat_template_kwargs.{name}", "is set by the request itself (allowed other variables)")
    effort = fields.get("reasoning_effort")
    if effort not in (None, *EFFORTS):
        raise refuse("reasoning_effort", f"unknown (got {short(effort)}, allowed {', '.join(EFFORTS)})")
    if effort is not None:
        variables = {"reasoning_effort": effort, "enable_thinking": effort != "none"} | variables
    documents = fields.get("documents", [])
    expect(documents, "documents", list, "a list of objects")
    for index, document in enumerate(documents):
        expect(document, f"documents[{index}]", dict, "an object, as with title and text")
    return options | {"chat_template_kwargs": variables, "documents": documents or None}


def parse_calls(value: object, where: str) -> list[Object]:
    """The calls an assistant message made, arguments decoded: templates write them their own way."""
    expect(value, where, list, "a list of tool calls")
    calls: list[Object] = []
    for index, call in enumerate(value):  # type: ignore[arg-type, var-annotated]
        at = f"{where}[{index}]"
        function = parse_function(call, at)
        call_id = short_text(call.get("id"), f"{at}.id")
        decoded = decode_arguments(function.get("arguments"), f"{at}.function.arguments")
        calls.append({"id": call_id, "type": "function", "function": {"name": function["name"], "arguments": decoded}})
    return calls


def decode_arguments(text: Any, where: str) -> Object:
    """A call's arguments, as a string or as they are; clients send "", "null" or nothing for a tool without any."""
    try:
        value = decode_json(text.strip() or "null") if isinstance(text, str) else text
        value = {} if value is None else value
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
    by_name = {}
    for index, row in enumerate(rows):
        function = parse_function(row, f"tools[{index}]")
        function = {name: function[name] for name in function if name in TOOL_FIELDS}
        expect(function.get("description") or "", f"tools[{index}].function.description", str, "a string")
        parameters = function.get("parameters") or {}
        expect(parameters, f"tools[{index}].function.parameters", dict, "a JSON schema")
        if parameters.get("type", "object") != "object":
            got = short(parameters["type"])
            raise refuse(
                f"tools[{index}].function.parameters.type", f'arguments are an object (got {got}, allowed "object")'
            )
        expect(function.get("strict") or False, f"tools[{index}].function.strict", bool, "true or false")
        if function["name"] in by_name:
            raise refuse(f"tools[{index}].function.name", f"{short(function['name'])} is there twice (allowed once)")
        by_name[function["name"]] = {"type": "function", "function": function}
    return choose(by_name, choice)


def choose(by_name: Mapping[str, Object], choice: object) -> tuple[tuple[Object, ...], bool]:
    """Apply tool_choice."""
    if isinstance(choice, dict) and choice.get("type") == "allowed_tools":
        return choose_allowed(by_name, choice)
    if choice in ("none", None, "auto"):
        return (tuple(by_name.values()) if choice != "none" else ()), False
    if choice == "required" and by_name:
        return tuple(by_name.values()), True
    if (name := named_function(choice)) in by_name:
        return (by_name[name],), True
    names = ", ".join(map(short, by_name)) or "no tools given"
    raise refuse("tool_choice", f"unknown (got {short(choice)}, allowed none, auto, required or a function: {names})")


def choose_allowed(by_name: Mapping[str, Object], choice: Mapping[str, Any]) -> tuple[tuple[Object, ...], bool]:
    """OpenAI's {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": [...]}}: some of the tools."""
    named = choice.get("allowed_tools")
    expect(named, "tool_choice.allowed_tools", dict, "an object with mode and tools")
    tools, mode = named.get("tools"), named.get("mode")  # type: ignore[union-attr]
    expect(tools, "tool_choice.allowed_tools.tools", list, "a list of functions")
    if mode not in ("auto", "required"):
        raise refuse("tool_choice.allowed_tools.mode", f"unknown (got {short(mode)}, allowed auto, required)")
    names = [named_function(each) for each in tools]
    if not names or not all(name in by_name for name in names):
        raise refuse("tool_choice.allowed_tools.tools", f"must name tools of the request (got {short(tools)})")
    return tuple(by_name[name] for name in by_name if name in names), mode == "required"


def named_function(value: object) -> str:
    """The name in {"type": "function", "function": {"name": ...}}; "" where there is none."""
    function = value.get("function") if isinstance(value, dict) and value.get("type") == "function" else None
    name = function.get("name") if isinstance(function, dict) else None
    return name if isinstance(name, str) else ""


def parse_function(value: object, where: str) -> dict[str, Any]:
    """The function of a {"type": "function", "function": {"name", ...}}. Other keys are passed over, as by vLLM."""
    expect(value, where, dict, "an object with type and function")
    if value.get("type", "function") != "function":  # type: ignore[attr-defined]
        raise refuse(f"{where}.type", f"unknown type (got {short(value['type'])}, allowed function)")  # type: ignore[index]
    function = value.get("function")  # type: ignore[attr-defined]
    expect(function, f"{where}.function", dict, "an object with a name")
    found: dict[str, Any] = function
    name = found.get("name")
    if not isinstance(name, str) or not FUNCTION_NAME.fullmatch(name):
        raise refuse(f"{where}.function.name", f"must be 1..64 of a-z, A-Z, 0-9, _ and - (got {short(name)})")
    return found


def short_text(value: object, where: str) -> str:
    """An identifier: a string of at most 256 characters."""
    if not isinstance(value, str) or not 0 < len(value) <= 256:
        raise refuse(where, f"must be a string of 1..256 characters (got {short(value)})")
    return value
