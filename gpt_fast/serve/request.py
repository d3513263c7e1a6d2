"""What a client may send: bytes in, a checked Request out, or a RequestError that names field, value and limit.

Three bodies: the native one ({"prompt", "max_new_tokens", ...}), OpenAI's completions and chat completions. A field
that is unknown, or known but not supported with the value it has, is refused by name. No torch here.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from gpt_fast.config import ConfigError, SamplingParams, check_float, check_int

MAX_BODY = 1 << 20  # bytes; TorchServe's own limit answers first where it is lower
MAX_CHOICES = 16
MAX_PROMPTS = 16
MAX_MESSAGES = 1024
MAX_TIMEOUT = 3600.0  # seconds
ROLES = ("system", "developer", "user", "assistant", "tool")
REASONS = {400: "Bad Request", 404: "Not Found", 429: "Too Many Requests", 503: "Service Unavailable"}


class RequestError(Exception):
    """A refused request: an HTTP status and OpenAI's error object."""

    def __init__(self, message: str, *, param: str | None = None, status: int = 400, code: str | None = None) -> None:
        super().__init__(message)
        self.message, self.param, self.status, self.code = message, param, status, code

    @property
    def body(self) -> str:
        kind = "invalid_request_error" if self.status < 429 else "overloaded_error"
        error = {"message": self.message, "type": kind, "param": self.param, "code": self.code}
        return json.dumps({"error": error})


@dataclass(frozen=True, kw_only=True)
class Request:
    """One checked request. `prompts` are text or token ids; a chat has `messages` instead.

    limited: the client set the token limit itself, so one that cannot be met is refused instead of shortened.
    """

    kind: str  # "native", "completion", "chat"
    params: SamplingParams
    stream: bool
    prompts: tuple[str | tuple[int, ...], ...] = ()
    messages: tuple[Mapping[str, Any], ...] = ()
    n: int = 1
    echo: bool = False
    include_usage: bool = False
    limited: bool = False
    timeout: float | None = None
    user: str = ""


# ------------------------------------------------------------------------------------------- bytes to JSON


def parse_json(body: object) -> dict[str, Any]:
    """A request's body as TorchServe hands it over: bytes, or text or a dict where it decoded them itself."""
    if isinstance(body, bytes | bytearray):
        if len(body) > MAX_BODY:
            raise RequestError(f"body: {len(body)} bytes (allowed {MAX_BODY})")
        try:
            body = bytes(body).decode("utf-8")
        except UnicodeDecodeError:
            raise RequestError("body: not UTF-8") from None
    if isinstance(body, str):
        body = decode_json(body)
    if not isinstance(body, dict):
        raise RequestError(f"body: must be a JSON object (got {type(body).__name__})")
    return body


def decode_json(text: str) -> object:
    """Strict JSON: no NaN, no duplicate keys, no lone surrogates, no endless nesting."""
    try:
        value = json.loads(text, parse_constant=refuse_constant, object_pairs_hook=unique_keys)
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError:
        raise RequestError("body: holds a lone surrogate, which is not text") from None
    except RecursionError:
        raise RequestError("body: nested too deeply") from None
    except json.JSONDecodeError as error:
        raise RequestError(f"body: not JSON at character {error.pos}") from None
    except ValueError:  # an integer of thousands of digits
        raise RequestError("body: holds a number that is too long") from None
    return value


def refuse_constant(name: str) -> None:
    raise RequestError(f"body: {name} is not JSON")


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise RequestError(f"body: the key {short(twice)} is there twice")
    return values


# ------------------------------------------------------------------------------------------- the fields

Fields = dict[str, Any]

SAMPLING = {
    "temperature", "top_p", "top_k", "min_p", "seed", "stop", "logit_bias", "presence_penalty", "frequency_penalty",
    "repetition_penalty", "ignore_eos", "min_tokens",
}  # fmt: skip
COMMON = SAMPLING | {"stream", "timeout", "user"}
OPENAI = COMMON | {"model", "max_tokens", "n", "stream_options", "logprobs"}
KNOWN = {
    "native": COMMON | {"prompt", "max_new_tokens"},
    "completion": OPENAI | {"prompt", "echo", "best_of"},
    "chat": OPENAI | {"messages", "max_completion_tokens", "top_logprobs"},
}
# Known to OpenAI's clients, not offered here: only these values, which ask for nothing, pass.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "suffix": ("",),
    "response_format": ({"type": "text"},),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "parallel_tool_calls": (True, False),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "store": (False,),
    "metadata": ({},),
    "service_tier": ("auto", "default"),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "reasoning_effort": (),
    "web_search_options": (),
    "prompt_cache_key": (),
    "safety_identifier": (),
    "verbosity": (),
    "length_penalty": (1, 1.0),
    "use_beam_search": (False,),
    "skip_special_tokens": (True,),
    "spaces_between_special_tokens": (True,),
    "add_generation_prompt": (True,),
    "stop_token_ids": ([],),
}
BOOLEANS = {"stream", "echo", "ignore_eos"}


def parse_request(kind: str, body: object, *, model_name: str, max_new_tokens: int, stream: bool = True) -> Request:
    """Check one request. max_new_tokens and stream: what a native request gets that does not say.

    OpenAI's defaults hold for its endpoints: temperature 1, 16 new tokens for a completion, the rest of the context
    (here: SamplingParams' own limit, which the caller shortens to the slot) for a chat.
    """
    fields = {key: value for key, value in parse_json(body).items() if value is not None}
    check_known(fields, kind)
    for name in BOOLEANS & fields.keys():
        expect(fields[name], name, bool, "true or false")
    if fields.get("model", model_name) != model_name:
        message = f"model: {short(fields['model'])} is not served here (allowed {model_name!r})"
        raise RequestError(message, param="model", status=404, code="model_not_found")
    try:
        return build(kind, fields, max_new_tokens=max_new_tokens, stream=stream)
    except ConfigError as error:
        raise RequestError(str(error), param=error.key) from None


def build(kind: str, fields: Fields, *, max_new_tokens: int, stream: bool) -> Request:
    limit_names = ("max_new_tokens",) if kind == "native" else ("max_completion_tokens", "max_tokens")
    limit_name = next((name for name in limit_names if name in fields), None)
    default = {"native": max_new_tokens, "completion": 16, "chat": 1 << 22}[kind]
    n = number(fields, "n", 1, 1, MAX_CHOICES)
    if "best_of" in fields and fields["best_of"] != n:
        raise RequestError(f"best_of: not supported (got {short(fields['best_of'])}, allowed n={n})", param="best_of")
    return Request(
        kind=kind,
        params=sampling_params(kind, fields, fields[limit_name] if limit_name else default, limit_name),
        stream=fields.get("stream", stream if kind == "native" else False),
        prompts=prompts(fields.get("prompt"), single=kind == "native") if kind != "chat" else (),
        messages=messages(fields.get("messages")) if kind == "chat" else (),
        n=n,
        echo=fields.get("echo", False),
        include_usage=include_usage(fields.get("stream_options", {})),
        limited=limit_name is not None,
        timeout=timeout(fields),
        user=text_field(fields, "user"),
    )


def check_known(fields: Fields, kind: str) -> None:
    for name, value in fields.items():
        if name in KNOWN[kind]:
            continue
        if name in NEUTRAL and kind != "native":
            if any(type(value) is type(neutral) and value == neutral for neutral in NEUTRAL[name]):
                continue
            raise RequestError(f"{short(name)}: not supported (got {short(value)})", param=name)
        raise RequestError(f"{short(name)}: unknown field (allowed {', '.join(sorted(KNOWN[kind]))})", param=name)


def sampling_params(kind: str, fields: Fields, max_new_tokens: Any, limit_name: str | None) -> SamplingParams:
    check_int(limit_name or "max_new_tokens", max_new_tokens, 1, 1 << 22)
    values = {name: fields[name] for name in SAMPLING & fields.keys()}
    values.setdefault("temperature", 0.0 if kind == "native" else 1.0)
    if "stop" in values:
        values["stop"] = (values["stop"],) if isinstance(values["stop"], str) else tuple(listed(values["stop"], "stop"))
    if "logit_bias" in values:
        values["logit_bias"] = logit_bias(values["logit_bias"])
    return SamplingParams(**values, max_new_tokens=max_new_tokens, logprobs=logprobs(kind, fields))


def logprobs(kind: str, fields: Fields) -> int | None:
    """How many alternatives each token reports: completions ask with a number, chats with two fields."""
    asked = fields.get("logprobs")
    if kind == "chat":
        expect(asked if asked is not None else False, "logprobs", bool, "true or false")
        if "top_logprobs" in fields and not asked:
            raise RequestError("top_logprobs: needs logprobs true", param="top_logprobs")
        return number(fields, "top_logprobs", 0, 0, SamplingParams.MAX_LOGPROBS) if asked else None
    return None if asked is None else number(fields, "logprobs", 0, 0, SamplingParams.MAX_LOGPROBS)


def logit_bias(value: object) -> dict[int, float]:
    expect(value, "logit_bias", dict, "an object of token id to number")
    biases = {}
    for key, bias in value.items():  # type: ignore[attr-defined]
        if not (key.isascii() and key.isdigit() and len(key) < 10):
            raise RequestError(f"logit_bias: {short(key)} is not a token id", param="logit_bias")
        check_float(f"logit_bias.{key}", bias, -100.0, 100.0)
        biases[int(key)] = float(bias)
    return biases


def prompts(value: object, *, single: bool) -> tuple[str | tuple[int, ...], ...]:
    """A prompt as text or token ids; OpenAI's endpoint also takes a list of either."""
    allowed = "a string or a list of token ids" + ("" if single else ", or a list of them")
    if value is None:
        raise RequestError(f"prompt: is required (allowed {allowed})", param="prompt")
    many = isinstance(value, list) and value and not isinstance(value[0], int)
    if (many and single) or not isinstance(value, str | list):
        raise RequestError(f"prompt: must be {allowed} (got {short(value)})", param="prompt")
    rows = value if many else [value]
    if len(rows) > MAX_PROMPTS:
        raise RequestError(f"prompt: {len(rows)} prompts (allowed {MAX_PROMPTS})", param="prompt")
    return tuple(one_prompt(row, allowed) for row in rows)


def one_prompt(value: object, allowed: str) -> str | tuple[int, ...]:
    if isinstance(value, str) and value:
        return value
    if isinstance(value, list) and value and all(type(token) is int and 0 <= token < 1 << 31 for token in value):
        return tuple(value)
    raise RequestError(f"prompt: must be {allowed}, not empty (got {short(value)})", param="prompt")


def messages(value: object) -> tuple[Mapping[str, Any], ...]:
    rows = listed(value, "messages") if value is not None else []
    if not 1 <= len(rows) <= MAX_MESSAGES:
        raise RequestError(f"messages: {len(rows)} messages (allowed 1..{MAX_MESSAGES})", param="messages")
    return tuple(one_message(row, f"messages[{index}]") for index, row in enumerate(rows))


def one_message(row: object, where: str) -> Mapping[str, Any]:
    expect(row, where, dict, "an object with role and content")
    fields: Fields = {key: value for key, value in row.items() if value is not None}  # type: ignore[attr-defined]
    for key in fields:
        if key not in ("role", "content", "name", "tool_call_id"):
            raise RequestError(f"{where}.{short(key)}: unknown or unsupported field", param=f"{where}.{short(key)}")
    if fields.get("role") not in ROLES:
        got = short(fields.get("role"))
        raise RequestError(f"{where}.role: unknown role (got {got}, allowed {', '.join(ROLES)})", param=f"{where}.role")
    for key in ("name", "tool_call_id"):
        text_field(fields, key, where=f"{where}.")
    return {**fields, "content": content(fields.get("content"), f"{where}.content")}


def content(value: object, where: str) -> str:
    """A message's text: a string, or OpenAI's list of text parts."""
    if isinstance(value, str):
        return value
    if isinstance(value, list) and value:
        parts = [part for part in value if isinstance(part, dict) and part.get("type") == "text"]
        texts = [part.get("text") for part in parts]
        if len(parts) == len(value) and all(isinstance(text, str) for text in texts):
            return "".join(texts)  # type: ignore[arg-type]
    raise RequestError(f"{where}: must be a string or a list of text parts (got {short(value)})", param=where)


def include_usage(value: object) -> bool:
    expect(value, "stream_options", dict, "an object")
    for key in value:  # type: ignore[attr-defined]
        if key not in ("include_usage", "include_obfuscation"):
            raise RequestError(f"stream_options.{short(key)}: unknown field", param=f"stream_options.{short(key)}")
    usage = value.get("include_usage") or False  # type: ignore[attr-defined]
    expect(usage, "stream_options.include_usage", bool, "true or false")
    return usage


def timeout(fields: Fields) -> float | None:
    if "timeout" in fields:
        check_float("timeout", fields["timeout"], 0.001, MAX_TIMEOUT)
    return fields.get("timeout")


def text_field(fields: Fields, name: str, *, where: str = "") -> str:
    value = fields.get(name, "")
    if not isinstance(value, str) or len(value) > 256:
        raise RequestError(f"{where}{name}: must be a string of at most 256 characters", param=where + name)
    return value


def number(fields: Fields, name: str, default: int, low: int, high: int) -> int:
    value = fields.get(name, default)
    check_int(name, value, low, high)
    return value


def listed(value: object, name: str) -> list[Any]:
    expect(value, name, list, "a list")
    return value  # type: ignore[return-value]


def expect(value: object, name: str, kind: type, allowed: str) -> None:
    if not isinstance(value, kind):
        raise RequestError(f"{name}: must be {allowed} (got {short(value)})", param=name)


def short(value: object, limit: int = 60) -> str:
    """The value as an error message shows it."""
    text = value if isinstance(value, str) else json.dumps(value, default=str)
    shown = text if len(text) <= limit else text[:limit] + "..."
    return repr(shown) if isinstance(value, str) else shown


