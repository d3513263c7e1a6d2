"""What a client may send: bytes in, a checked ApiRequest out, or a RequestError that names field, value and limit.

Three bodies: the native one ({"prompt", "max_new_tokens", ...}), OpenAI's completions and chat completions. A field
that is unknown, or known but not supported with the value it has, is refused by name. No torch here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from gpt_fast.config import ConfigError, SamplingParams, check_float, check_int
from gpt_fast.serve.body import REASONS, RequestError, expect, parse_json, short
from gpt_fast.serve.chat_request import Object, parse_messages, parse_response_format, parse_tools, short_text
from gpt_fast.serve.endpoints import CHAT, NEUTRAL, SAMPLING, Endpoint, Fields, whole_number

__all__ = ["REASONS", "ApiRequest", "RequestError", "parse_request"]

MAX_CHOICES = 16
MAX_PROMPTS = 16
MAX_TIMEOUT = 3600.0  # seconds


@dataclass(frozen=True, kw_only=True)
class ApiRequest:
    """One checked request. `prompts` are text or token ids; a chat has `messages` instead.

    limited: the client set the token limit itself, so one that cannot be met is refused instead of shortened.
    tools, must_call: what a chat's model may call, and whether it has to. schema: the JSON schema, as text, that the
    answer must match.
    """

    endpoint: Endpoint
    params: SamplingParams
    stream: bool
    prompts: tuple[str | tuple[int, ...], ...] = ()
    messages: tuple[Object, ...] = ()
    tools: tuple[Object, ...] = ()
    must_call: bool = False
    schema: str | None = None
    n: int = 1
    echo: bool = False
    include_usage: bool = False
    limited: bool = False
    timeout: float | None = None
    user: str = ""


BOOLEANS = {"stream", "echo", "ignore_eos"}


def parse_request(
    endpoint: Endpoint,
    body: object,
    *,
    model_name: str,
    max_new_tokens: int,
    stream: bool = True,
    offers: frozenset[str] = frozenset(),
) -> ApiRequest:
    """Check one request. max_new_tokens and stream: what a native request gets that does not say.

    offers: of Endpoint.offered, what this server can do; it must then look at the ApiRequest's fields for it.
    null is the default.
    """
    given = parse_json(body)
    check_known(given, endpoint, offers)
    fields = {name: value for name, value in given.items() if value is not None}
    for name in BOOLEANS & fields.keys():
        expect(fields[name], name, bool, "true or false")
    if fields.get("model", model_name) != model_name:
        message = f"model: {short(fields['model'])} is not served here (allowed {model_name!r})"
        raise RequestError(message, param="model", status=404, code="model_not_found")
    try:
        return build(endpoint, fields, max_new_tokens=max_new_tokens, stream=stream, offers=offers)
    except ConfigError as error:
        raise RequestError(str(error), param=error.key) from None


def check_known(given: Fields, endpoint: Endpoint, offers: frozenset[str]) -> None:
    """Refuse what this endpoint does not know, and what it knows but cannot do."""
    known = endpoint.known.union(*(endpoint.offered.get(offer, ()) for offer in offers))
    for name, value in given.items():
        if name in known:
            continue
        if name not in NEUTRAL or not endpoint.openai:
            shown = name if len(name) <= 60 else name[:57] + "..."
            raise RequestError(f"{shown}: unknown field (allowed {', '.join(sorted(known))})", param=name)
        neutral = (None, *NEUTRAL[name])
        if not any(type(value) is type(each) and value == each for each in neutral):
            raise RequestError(f"{name}: not supported (got {short(value)})", param=name)


def build(
    endpoint: Endpoint, fields: Fields, *, max_new_tokens: int, stream: bool, offers: frozenset[str]
) -> ApiRequest:
    limit_name, limit = token_limit(endpoint, fields, max_new_tokens)
    is_chat = endpoint is CHAT
    tools, must_call = chat_tools(fields, offers) if is_chat else ((), False)
    streamed = fields.get("stream", stream and not endpoint.openai)
    n, params = choices(fields), sampling_params(endpoint, fields, limit, limit_name)
    if params.seed is not None:
        check_int("seed", params.seed + n - 1, -(1 << 63), (1 << 63) - 1)  # choice i draws with seed + i
    request = ApiRequest(
        endpoint=endpoint,
        params=params,
        stream=streamed,
        prompts=() if is_chat else prompts(fields.get("prompt"), many=endpoint.many),
        messages=parse_messages(fields.get("messages"), tools="tools" in offers) if is_chat else (),
        tools=tools,
        must_call=must_call,
        schema=parse_response_format(fields.get("response_format", {"type": "text"})) if "schema" in offers else None,
        n=n,
        echo=fields.get("echo", False),
        include_usage=include_usage(fields, streamed),
        limited=limit_name is not None,
        timeout=timeout(fields),
        user=short_text(fields["user"], "user") if fields.get("user") else "",
    )
    check_together(request)
    return request


def check_together(request: ApiRequest) -> None:
    """Refuse fields that do not go together."""
    if request.echo and request.params.logprobs is not None:
        raise RequestError("echo: not supported together with logprobs (got true)", param="echo")
    if request.schema is not None and request.tools:
        raise RequestError("response_format: not supported together with tools", param="response_format")
    if (request.schema is not None or request.must_call) and request.params.min_tokens:
        message = "not supported together with response_format or a required tool"
        raise RequestError(f"min_tokens: {message} (got {request.params.min_tokens})", param="min_tokens")


def token_limit(endpoint: Endpoint, fields: Fields, max_new_tokens: int) -> tuple[str | None, Any]:
    """The field that holds the token limit, None when the client gave none; and the limit."""
    given = [name for name in endpoint.token_limits if name in fields]
    if not given:
        return None, max_new_tokens if endpoint.max_new_tokens is None else endpoint.max_new_tokens
    if any(fields[name] != fields[given[0]] for name in given):
        got = short(fields["max_tokens"])
        raise RequestError(f"max_tokens: differs from {given[0]} (got {got})", param="max_tokens")
    return given[0], fields[given[0]]


def choices(fields: Fields) -> int:
    n = whole_number(fields, "n", 1, 1, MAX_CHOICES)
    if "best_of" in fields and fields["best_of"] != n:
        raise RequestError(f"best_of: not supported (got {short(fields['best_of'])}, allowed n={n})", param="best_of")
    return n


def sampling_params(endpoint: Endpoint, fields: Fields, max_new_tokens: Any, limit_name: str | None) -> SamplingParams:
    check_int(limit_name or "max_new_tokens", max_new_tokens, 1, 1 << 22)
    values = {name: fields[name] for name in SAMPLING & fields.keys()}
    values.setdefault("temperature", endpoint.temperature)
    if values.get("top_k") == -1:  # vLLM's spelling of "all"
        values["top_k"] = 0
    if "stop" in values:
        values["stop"] = stop_strings(values["stop"])
    if "logit_bias" in values:
        values["logit_bias"] = logit_bias(values["logit_bias"])
    return SamplingParams(**values, max_new_tokens=max_new_tokens, logprobs=endpoint.logprobs(fields))


def stop_strings(value: Any) -> tuple[str, ...]:
    if isinstance(value, str):
        return (value,)
    expect(value, "stop", list, "a string or a list of strings")
    return tuple(value)


def logit_bias(value: Any) -> Mapping[int, float]:
    expect(value, "logit_bias", dict, "an object of token id to number")
    biases: dict[int, float] = {}
    for key, bias in value.items():
        if not (key.isascii() and key.isdigit() and len(key) < 10):
            raise RequestError(f"logit_bias: {short(key)} is not a token id", param="logit_bias")
        if int(key) in biases:
            raise RequestError(f"logit_bias: the token {int(key)} is there twice", param="logit_bias")
        check_float(f"logit_bias.{key}", bias, -100.0, 100.0)
        biases[int(key)] = float(bias)
    return biases


def prompts(value: object, *, many: bool) -> tuple[str | tuple[int, ...], ...]:
    """A prompt as text or token ids; OpenAI's endpoint also takes a list of either."""
    allowed = "a string or a list of token ids" + (", or a list of them" if many else "")
    if value is None:
        raise RequestError(f"prompt: is required (allowed {allowed})", param="prompt")
    several = isinstance(value, list) and value and not isinstance(value[0], int)
    if (several and not many) or not isinstance(value, str | list):
        raise RequestError(f"prompt: must be {allowed} (got {short(value)})", param="prompt")
    rows = value if several else [value]
    if len(rows) > MAX_PROMPTS:
        raise RequestError(f"prompt: {len(rows)} prompts (allowed {MAX_PROMPTS})", param="prompt")
    return tuple(one_prompt(row, allowed) for row in rows)


def one_prompt(value: object, allowed: str) -> str | tuple[int, ...]:
    if isinstance(value, str) and value:
        return value
    if isinstance(value, list) and value and all(type(token) is int and 0 <= token < 1 << 31 for token in value):
        return tuple(value)
    raise RequestError(f"prompt: must be {allowed}, not empty (got {short(value)})", param="prompt")


def chat_tools(fields: Fields, offers: frozenset[str]) -> tuple[tuple[Object, ...], bool]:
    if "tools" not in offers:
        return (), False
    tools, must_call = parse_tools(fields.get("tools", []), fields.get("tool_choice"))
    if must_call and "schema" not in offers:  # only a constrained answer is sure to be a call
        message = f"tool_choice: not supported (got {short(fields['tool_choice'])}, allowed none, auto)"
        raise RequestError(message, param="tool_choice")
    parallel = fields.get("parallel_tool_calls", True)
    expect(parallel, "parallel_tool_calls", bool, "true or false")
    if tools and not parallel:
        raise RequestError("parallel_tool_calls: not supported (got false)", param="parallel_tool_calls")
    return tools, must_call


def include_usage(fields: Fields, streamed: bool) -> bool:
    options = fields.get("stream_options", {})
    expect(options, "stream_options", dict, "an object")
    if options and not streamed:
        raise RequestError("stream_options: needs stream true", param="stream_options")
    for name, value in options.items():
        param = f"stream_options.{name}"
        if name not in ("include_usage", "include_obfuscation"):
            raise RequestError(f"{param}: unknown field (allowed include_usage)", param=param)
        expect(value if value is not None else False, param, bool, "true or false")
        if name == "include_obfuscation" and value:
            raise RequestError(f"{param}: not supported (got true)", param=param)
    return bool(options.get("include_usage"))


def timeout(fields: Fields) -> float | None:
    if "timeout" in fields:
        check_float("timeout", fields["timeout"], 0.001, MAX_TIMEOUT)
    return fields.get("timeout")
