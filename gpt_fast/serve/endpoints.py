"""What sets the three bodies that a client may post apart: their fields, their defaults, the form of the answer.

Another endpoint is another Endpoint here, and a path in ENDPOINTS. No torch here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from gpt_fast.config import SamplingParams, check_int
from gpt_fast.serve.body import RequestError, expect
from gpt_fast.serve.response import ChatAnswer, CompletionAnswer, PlainAnswer

Fields = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Endpoint:
    """One kind of body and its answer.

    known: the fields it takes; offered: those it also takes where the server can do more, by what that is ("tools",
    "schema"). prompt: the field that holds the prompt; a list of prompts is refused unless `many`.
    token_limits: fields for the number of new tokens, which must agree; max_new_tokens: without one, None for what the
    server is configured to. temperature: without one. logprobs: how many alternatives a token is to report, None: none.
    openai: it streams only if asked to, and fields of OpenAI's and vLLM's clients that ask for nothing (NEUTRAL) pass.
    """

    known: frozenset[str]
    offered: Mapping[str, frozenset[str]]
    prompt: str
    many: bool
    token_limits: tuple[str, ...]
    max_new_tokens: int | None
    temperature: float
    logprobs: Callable[[Fields], int | None]
    openai: bool
    answer: Callable[..., PlainAnswer | CompletionAnswer | ChatAnswer]


def count_of_logprobs(fields: Fields) -> int | None:
    """As completions ask: with a number."""
    return None if fields.get("logprobs") is None else whole_number(fields, "logprobs", 0, 0, MAX_LOGPROBS)


def switch_of_logprobs(fields: Fields) -> int | None:
    """As chats ask: with true, and a number beside it."""
    asked = fields.get("logprobs")
    expect(asked if asked is not None else False, "logprobs", bool, "true or false")
    if "top_logprobs" in fields and not asked:
        raise RequestError("top_logprobs: needs logprobs true", param="top_logprobs")
    return whole_number(fields, "top_logprobs", 0, 0, MAX_LOGPROBS) if asked else None


def whole_number(fields: Fields, name: str, default: int, low: int, high: int) -> int:
    value: int = fields.get(name, default)
    check_int(name, value, low, high)
    return value


MAX_LOGPROBS = SamplingParams.MAX_LOGPROBS
SAMPLING = frozenset((
    "temperature", "top_p", "top_k", "min_p", "seed", "stop", "stop_token_ids", "logit_bias", "presence_penalty",
    "frequency_penalty", "repetition_penalty", "ignore_eos", "min_tokens",
))  # fmt: skip
COMMON = SAMPLING | {"stream", "timeout", "user"}
OPENAI = COMMON | {"model", "max_tokens", "n", "stream_options", "logprobs"}
SCHEMA = {"schema": frozenset({"response_format"})}
TOOLS = {"tools": frozenset({"tools", "tool_choice", "parallel_tool_calls"})}

NATIVE = Endpoint(
    known=COMMON | {"prompt", "max_new_tokens"},
    offered=SCHEMA,
    prompt="prompt",
    many=False,
    token_limits=("max_new_tokens",),
    max_new_tokens=None,
    temperature=0.0,
    logprobs=count_of_logprobs,
    openai=False,
    answer=PlainAnswer,
)
COMPLETION = Endpoint(
    known=OPENAI | {"prompt", "echo", "best_of"},
    offered=SCHEMA,
    prompt="prompt",
    many=True,
    token_limits=("max_tokens",),
    max_new_tokens=16,
    temperature=1.0,
    logprobs=count_of_logprobs,
    openai=True,
    answer=CompletionAnswer,
)
CHAT = Endpoint(
    known=OPENAI | {"messages", "max_completion_tokens", "top_logprobs"},
    offered=SCHEMA | TOOLS,
    prompt="messages",
    many=False,
    token_limits=("max_completion_tokens", "max_tokens"),
    max_new_tokens=1 << 22,  # the rest of the context: SamplingParams' own limit, which the caller shortens to the slot
    temperature=1.0,
    logprobs=switch_of_logprobs,
    openai=True,
    answer=ChatAnswer,
)
ENDPOINTS = {"": NATIVE, "v1/completions": COMPLETION, "v1/chat/completions": CHAT}  # by the path behind the model's

# Known to OpenAI's and vLLM's clients, not offered here: only these values, which ask for nothing, pass.
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
    "early_stopping": (False,),
    "include_stop_str_in_output": (False,),
    "skip_special_tokens": (True,),
    "spaces_between_special_tokens": (True,),
    "add_generation_prompt": (True,),
    "continue_final_message": (False,),
    "chat_template": (),
    "chat_template_kwargs": ({},),
    "structured_outputs": (),
    "bad_words": ([],),
}
