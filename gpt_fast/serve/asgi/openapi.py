"""/openapi.json and /docs: what the door takes and gives, written from the endpoints' own tables, with examples.

OpenAPI 3.1. Each example is a request that any model with a chat template answers; tests post them all.
"""

from __future__ import annotations

import html
import json
from typing import Any

import gpt_fast
from gpt_fast.serve.endpoints import ENDPOINTS

Object = dict[str, Any]

USER = [{"role": "user", "content": "What is the capital of France?"}]
# Path: what it is for, and a body.
POSTED: dict[str, tuple[str, Object]] = {
    "v1/completions": (
        "Continue a prompt (OpenAI)",
        {"prompt": "The capital of France", "max_tokens": 8, "temperature": 0},
    ),
    "v1/chat/completions": ("Answer a conversation (OpenAI)", {"messages": USER, "max_tokens": 32}),
    "v1/responses": ("Answer a conversation (OpenAI's Responses)", {"input": USER[0]["content"]}),
    "v1/messages": ("Answer a conversation (Anthropic)", {"messages": USER, "max_tokens": 32}),
    "v1/messages/count_tokens": ("How many tokens a conversation has (Anthropic)", {"messages": USER}),
    "tokenize": ("Token ids of a text or a conversation", {"prompt": "The capital of France"}),
    "detokenize": ("The text of token ids", {"tokens": [1, 2, 3]}),
    "predictions/gpt-fast": (
        "Continue a prompt, as at TorchServe",
        {"prompt": "The capital of France", "stream": False},
    ),
}
READ = {
    "v1/models": "The models by their names",
    "tokenizer_info": "What the tokenizer is",
    "health": "200 once the engine has given a token; 503 while it loads or drains, or when it failed",
    "metrics": "Figures for Prometheus",
    "chat": "The chat page",
}
STREAMED = frozenset(path for path in POSTED if path.startswith("v1/") and path in ENDPOINTS)
NUMBERS = frozenset((
    "temperature", "top_p", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty", "timeout",
))  # fmt: skip
WHOLE = frozenset((
    "max_tokens", "max_completion_tokens", "max_new_tokens", "n", "top_k", "seed", "min_tokens", "top_logprobs",
    "prompt_logprobs", "best_of",
))  # fmt: skip
SWITCHES = frozenset(("stream", "echo", "ignore_eos", "parallel_tool_calls", "add_generation_prompt"))


def document(*, keys: bool) -> Object:
    """keys: whether requests need one."""
    paths: Object = {f"/{path}": {"post": posted(path, told, body)} for path, (told, body) in POSTED.items()}
    paths |= {f"/{path}": {"get": operation(told, {"200": {"description": told}})} for path, told in READ.items()}
    made: Object = {
        "openapi": "3.1.0",
        "info": {"title": "gpt-fast", "version": gpt_fast.__version__},
        "paths": paths,
        "components": {"schemas": {"Error": ERROR}},
    }
    if keys:
        made["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        made["security"] = [{"key": []}]
    return made


ERROR: Object = {
    "type": "object",
    "properties": {
        "error": {
            "type": "object",
            "properties": {"message": {"type": "string"}, "type": {"type": "string"}},
            "required": ["message", "type"],
        }
    },
    "required": ["error"],
}
REFUSALS = {
    "400": "the body is not fit: the message names field, value and limit",
    "429": "more requests than may wait",
    "503": "the model is being loaded, or the server is about to stop; Retry-After says when to come again",
}


def posted(path: str, told: str, body: Object) -> Object:
    content: Object = {"text/plain" if path.startswith("predictions/") else "application/json": {}}
    if path in STREAMED:
        content["text/event-stream"] = {}
    error = {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}}
    answers: Object = {"200": {"description": told, "content": content}}
    answers |= {status: {"description": why, "content": error} for status, why in REFUSALS.items()}
    schema = {"type": "object", "properties": fields(path, body), "required": required(path)}
    request = {"required": True, "content": {"application/json": {"schema": schema, "example": body}}}
    return operation(told, answers) | {"requestBody": request}


def operation(told: str, answers: Object) -> Object:
    return {"summary": told, "responses": answers}


def required(path: str) -> list[str]:
    """The fields of the example that no request can do without."""
    return [name for name in POSTED[path][1] if name in ("prompt", "messages", "input", "tokens")]


def fields(path: str, body: Object) -> Object:
    """An endpoint's fields; one whose body is made into another's has its own, of which the example shows some."""
    endpoint = ENDPOINTS.get("" if path.startswith("predictions/") else path)
    known = endpoint.known if endpoint is not None and endpoint.convert is None else frozenset(body)
    return {name: type_of(name) for name in sorted(known)}


def type_of(name: str) -> Object:
    """A field's JSON type, where it has one alone."""
    kinds = {"number": NUMBERS, "integer": WHOLE, "boolean": SWITCHES}
    return next(({"type": kind} for kind, names in kinds.items() if name in names), {})


def page(*, keys: bool) -> str:
    """The same for readers: each path with a request that can be copied. No script, nothing from elsewhere."""
    rows = [
        f"<h2>POST /{path}</h2><p>{told}</p><pre>{curl(path, body, keys)}</pre>"
        for path, (told, body) in POSTED.items()
    ]
    rows += [f"<h2>GET /{path}</h2><p>{told}</p>" for path, told in READ.items()]
    title = "<title>gpt-fast: the API</title><h1>gpt-fast</h1>"
    about = '<p>The whole of it for programs: <a href="openapi.json">openapi.json</a>.</p>'
    return f'<!doctype html><html lang="en"><meta charset="utf-8">{title}{about}{"".join(rows)}</html>'


def curl(path: str, body: Object, keys: bool) -> str:
    key = ' -H "Authorization: Bearer $KEY"' if keys else ""
    return html.escape(f"curl http://HOST:PORT/{path}{key} -d '{json.dumps(body)}'", quote=False)
