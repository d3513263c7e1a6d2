"""What a client may send: bytes in, a checked ApiRequest out, or a RequestError that names field, value and limit.

Three bodies: the native one ({"prompt", "max_new_tokens", ...}), OpenAI's completions and chat completions. A field
that is unknown, or not supported with the value it has, is refused by name; one that asks for nothing passes. No torch.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from gpt_fast.config import ConfigError, SamplingParams, check_float, check_int
from gpt_fast.serve.body import REASONS, RequestError, expect, in_words_of, parse_json, short
from gpt_fast.serve.chat_request import (
    Object,
    named_function,
    parse_messages,
    parse_template_options,
    parse_tools,
    short_text,
)
from gpt_fast.serve.constraints import parse_constraint
from gpt_fast.serve.endpoints import CHAT, SAMPLING, Endpoint, Fields, count_of, whole_number
from gpt_fast.serve.neutral import check_neutral, is_neutral
from gpt_fast.text.grammar import Constraint

__all__ = ["REASONS", "ApiRequest", "RequestError", "parse_request"]

MAX_CHOICES = 16
MAX_PROMPTS = 16
MAX_TIMEOUT = 3600.0  # seconds
MAX_LOGIT_BIAS = 8192  # entries


@dataclass(frozen=True, kw_only=True)
class ApiRequest:
    """One checked request. `prompts` are text or token ids; a chat has `messages` instead.

    sent: the body as it came; names: what the client calls its parts (body.in_words_of). limited: the client set the
    token limit itself, so one that cannot be met is refused instead of shortened.
    add_special_tokens, parse_special: whether a text prompt begins as the model's tokenizer begins texts (BOS), and
    whether special tokens spelled in it are tokens. template_options: ChatTemplate.render's, beside messages and tools.
    tools, must_call: what a chat's model may call, and whether it has to; named: the one it has to, once; parallel:
    whether others may call more than once.
    constraint: what the answer must match, as the field constrained_by says. continuous_usage: usage in every chunk.
    prompt_only: nothing is to be generated. prompt_logprobs: alternatives in vLLM\'s list of the prompt\'s tokens, None
    for none; the params\' are also those of an echo.
    """

    endpoint: Endpoint
    sent: Mapping[str, Any] = field(default_factory=dict, compare=False)
    names: Mapping[str, str] = field(default_factory=dict, compare=False)
    params: SamplingParams
    stream: bool
    prompts: tuple[str | tuple[int, ...], ...] = ()
    add_special_tokens: bool = True
    parse_special: bool = False
    messages: tuple[Object, ...] = ()
    template_options: Mapping[str, Any] = field(default_factory=dict)
    tools: tuple[Object, ...] = ()
    must_call: bool = False
    named: bool = False
    parallel: bool = True
    include_reasoning: bool = True
    constraint: Constraint | None = None
    constrained_by: str = ""
    n: int = 1
    echo: bool = False
    prompt_only: bool = False
    prompt_logprobs: int | None = None
    include_usage: bool = False
    continuous_usage: bool = False
    limited: bool = False
    timeout: float | None = None
    owner: str = ""


BOOLEANS = {
    "stream",
    "echo",
    "ignore_eos",
    "add_special_tokens",
    "parse_special",
    "parallel_tool_calls",
    "include_reasoning",
}


def parse_request(
    endpoint: Endpoint,
    body: object,
    *,
    model_names: Collection[str],
    max_new_tokens: int,
    stream: bool = True,
) -> ApiRequest:
    """Check one request. max_new_tokens and stream: what a native request gets that does not say. null: the default."""
    sent = parse_json(body)
    given, names = endpoint.convert(sent) if endpoint.convert else (sent, {})
    with in_words_of(names):
        request = parse_fields(endpoint, given, model_names=model_names, max_new_tokens=max_new_tokens, stream=stream)
    return replace(request, sent=sent, names=names)


def parse_fields(
    endpoint: Endpoint, given: Fields, *, model_names: Collection[str], max_new_tokens: int, stream: bool
) -> ApiRequest:
    """As above, of the endpoint's own fields."""
    check_known(given, endpoint)
    fields = {name: value for name, value in given.items() if value is not None and name in endpoint.known}
    for name in sorted(BOOLEANS & fields.keys()):
        expect(fields[name], name, bool, "true or false")
    check_model(fields, model_names)
    try:
        return build(endpoint, fields, max_new_tokens=max_new_tokens, stream=stream)
    except ConfigError as error:
        message = str(error).replace(f"got {error.got!r}", f"got {short(error.got)}", 1)  # as JSON spells it
        raise RequestError(message, param=error.key) from None


def check_model(fields: Fields, model_names: Collection[str]) -> None:
    if fields.get("model") is not None and fields["model"] not in model_names:
        allowed = ", ".join(map(short, model_names))
        message = f"model: {short(fields['model'])} is not served here (allowed {allowed})"
        raise RequestError(message, param="model", status=404, code="model_not_found")


def check_known(given: Fields, endpoint: Endpoint) -> None:
    """Refuse what this endpoint does not know, unless it asks for nothing."""
    for name, value in given.items():
        if name in endpoint.known or value is None:
            continue
        if not is_neutral(name):
            shown = name if len(name) <= 60 else name[:57] + "..."
            raise RequestError(f"{shown}: unknown field (allowed {', '.join(sorted(endpoint.known))})", param=name)
        check_neutral(name, value)


def build(endpoint: Endpoint, fields: Fields, *, max_new_tokens: int, stream: bool) -> ApiRequest:
    limit_name, limit = token_limit(endpoint, fields, max_new_tokens)
    streamed = fields.get("stream", stream and not endpoint.openai)
    n, params = choices(fields), sampling_params(endpoint, fields, limit, limit_name)
    if params.seed is not None:
        check_int("seed", params.seed + n - 1, -(1 << 63), (1 << 63) - 1)  # choice i draws with seed + i
    usage, continuous = usage_options(fields, streamed)
    constraint, constrained_by = parse_constraint(fields)
    request = ApiRequest(
        endpoint=endpoint,
        params=params,
        stream=streamed,
        constraint=constraint,
        constrained_by=constrained_by,
        n=n,
        echo=fields.get("echo", False),
        prompt_only=limit == 0,
        prompt_logprobs=count_of(fields, "prompt_logprobs"),
        include_usage=usage,
        continuous_usage=continuous,
        limited=limit_name is not None,
        timeout=timeout(fields),
        owner=owner(fields),
        **(chat_fields(fields) if endpoint.prompt == CHAT.prompt else text_fields(endpoint, fields)),
    )
    check_together(request)
    return request


def text_fields(endpoint: Endpoint, fields: Fields) -> Fields:
    return {
        "prompts": prompts(fields.get("prompt"), many=endpoint.many),
        "add_special_tokens": fields.get("add_special_tokens", True),
        "parse_special": fields.get("parse_special", endpoint.parse_special),
    }


def chat_fields(fields: Fields) -> Fields:
    tools, must_call = parse_tools(fields.get("tools", []), fields.get("tool_choice"))
    return {
        "messages": parse_messages(fields.get("messages")),
        "template_options": parse_template_options(fields),
        "tools": tools,
        "must_call": must_call,
        "named": must_call and named_function(fields["tool_choice"]) != "",
        "parallel": fields.get("parallel_tool_calls", True),
        "include_reasoning": fields.get("include_reasoning", True),
    }


def owner(fields: Fields) -> str:
    """Whose prefixes a request may share: those of equal user and, as vLLM has it, equal cache_salt."""
    return "\0".join(short_text(fields[name], name) for name in ("user", "cache_salt") if fields.get(name))


def check_together(request: ApiRequest) -> None:
    """Refuse fields that do not go together."""
    if request.prompt_logprobs is not None and request.stream:
        message = f"prompt_logprobs: not with stream true (got {request.prompt_logprobs}), leave one of them out"
        raise RequestError(message, param="prompt_logprobs")
    if (request.constraint is not None or request.must_call) and request.params.min_tokens:
        by = "tool_choice" if request.must_call else request.constrained_by
        message = f"not supported together with {by} (got {request.params.min_tokens}, allowed 0)"
        raise RequestError(f"min_tokens: {message}", param="min_tokens")


def token_limit(endpoint: Endpoint, fields: Fields, max_new_tokens: int) -> tuple[str | None, Any]:
    """The field that holds the token limit, None when the client gave none; and the limit."""
    given = [name for name in endpoint.token_limits if name in fields]
    if not given:
        return None, max_new_tokens if endpoint.max_new_tokens is None else endpoint.max_new_tokens
    if any(fields[name] != fields[given[0]] for name in given):
        got, other = short(fields["max_tokens"]), f"{given[0]} {short(fields[given[0]])}"
        raise RequestError(f"max_tokens: differs from {other} (got {got}), give one of them", param="max_tokens")
    return given[0], fields[given[0]]


def choices(fields: Fields) -> int:
    n = whole_number(fields, "n", 1, 1, MAX_CHOICES)
    if "best_of" in fields and fields["best_of"] != n:
        raise RequestError(f"best_of: not supported (got {short(fields['best_of'])}, allowed n={n})", param="best_of")
    return n


def sampling_params(endpoint: Endpoint, fields: Fields, max_new_tokens: Any, limit_name: str | None) -> SamplingParams:
    check_int(limit_name or "max_new_tokens", max_new_tokens, endpoint.fewest_tokens, 1 << 22)
    values = {name: fields[name] for name in SAMPLING & fields.keys()}
    values.setdefault("temperature", endpoint.temperature)
    if values.get("top_k") == -1:  # vLLM's spelling of "all"
        values["top_k"] = 0
    if "stop" in values:
        values["stop"] = stop_strings(values["stop"])
    if "logit_bias" in values:
        values["logit_bias"] = logit_bias(values["logit_bias"])
    logprobs, of_prompt = endpoint.logprobs(fields), count_of(fields, "prompt_logprobs")
    if fields.get("echo") and logprobs is not None:
        of_prompt = max(logprobs, of_prompt or 0)
    return SamplingParams(**values, max_new_tokens=max(max_new_tokens, 1), logprobs=logprobs, prompt_logprobs=of_prompt)


def stop_strings(value: Any) -> tuple[str, ...]:
    if isinstance(value, str):
        return (value,)
    expect(value, "stop", list, "a string or a list of strings")
    return tuple(value)


def logit_bias(value: Any) -> Mapping[int, float]:
    expect(value, "logit_bias", dict, "an object of token id to number")
    if len(value) > MAX_LOGIT_BIAS:
        raise RequestError(f"logit_bias: {len(value)} entries (allowed {MAX_LOGIT_BIAS})", param="logit_bias")
    biases: dict[int, float] = {}
    for key, bias in value.items():
        if not (key.isascii() and key.isdigit() and len(key) < 10):
            raise RequestError(
                f"logit_bias: {short(key)} is no token id (allowed whole numbers from 0)", param="logit_bias"
            )
        if int(key) in biases:
            raise RequestError(f"logit_bias: the token {int(key)} is there twice (allowed once)", param="logit_bias")
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


def usage_options(fields: Fields, streamed: bool) -> tuple[bool, bool]:
    """Whether a stream ends with its usage, and whether every chunk has it: stream_options, as vLLM."""
    options = fields.get("stream_options", {})
    expect(options, "stream_options", dict, "an object")
    for name, value in options.items():
        param = f"stream_options.{name}"
        if name not in ("include_usage", "continuous_usage_stats", "include_obfuscation"):
            allowed = "include_usage, continuous_usage_stats"
            raise RequestError(f"{param}: unknown field (allowed {allowed})", param=param)
        expect(value if value is not None else False, param, bool, "true or false")
        if name == "include_obfuscation" and value:
            raise RequestError(f"{param}: not supported (got true, allowed false)", param=param)
    if any(options.values()) and not streamed:
        raise RequestError(f"stream_options: needs stream true (got {short(options)})", param="stream_options")
    usage = bool(options.get("include_usage"))
    return usage, usage and bool(options.get("continuous_usage_stats"))


def timeout(fields: Fields) -> float | None:
    if "timeout" in fields:
        check_float("timeout", fields["timeout"], 0.001, MAX_TIMEOUT)
    return fields.get("timeout")
