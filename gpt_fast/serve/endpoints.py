"""What sets the three bodies that a client may post apart: their fields, their defaults, the form of the answer.

Another endpoint is another Endpoint here, and a path in ENDPOINTS. No torch here.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from gpt_fast.config import SamplingParams, check_int
from gpt_fast.serve import messages, responses
from gpt_fast.serve.body import RequestError, expect
from gpt_fast.serve.constraints import CONSTRAINTS
from gpt_fast.serve.messages_answer import MessagesAnswer
from gpt_fast.serve.response import ChatAnswer, CompletionAnswer, PlainAnswer
from gpt_fast.serve.responses_answer import ResponsesAnswer

Fields = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Endpoint:
    """One kind of body and its answer.

    known: the fields it takes; of others, those that ask for nothing pass (neutral.py). prompt: the field that holds
    the prompt; a list of prompts is refused unless `many`. parse_special: whether a text prompt's special tokens are
    tokens, where the request does not say. token_limits: fields for the number of new tokens, which must agree;
    max_new_tokens: without one, None for what the server is configured to; fewest_tokens: the least they may say, 0
    where an answer may be the prompt alone. temperature: without one. logprobs: how many alternatives a token is to
    report, None: none. openai: it streams only if asked to. convert: makes such a body of a client's in another form,
    and says what the client calls its parts (body.in_words_of).
    """

    known: frozenset[str]
    prompt: str
    many: bool
    parse_special: bool
    token_limits: tuple[str, ...]
    max_new_tokens: int | None
    temperature: float
    logprobs: Callable[[Fields], int | None]
    openai: bool
    answer: Callable[..., PlainAnswer | CompletionAnswer | ChatAnswer]
    fewest_tokens: int = 1
    convert: Callable[[Fields], tuple[Fields, dict[str, str]]] | None = None


def count_of(fields: Fields, name: str) -> int | None:
    """How many alternatives of each token are asked for; None: not even its own log-probability."""
    return None if fields.get(name) is None else whole_number(fields, name, 0, 0, MAX_LOGPROBS)


def count_of_logprobs(fields: Fields) -> int | None:
    """As completions ask: with a number; a chat's false asks for none."""
    return None if fields.get("logprobs") is False else count_of(fields, "logprobs")


def switch_of_logprobs(fields: Fields) -> int | None:
    """As chats ask: with true, and a number beside it."""
    asked = fields.get("logprobs")
    expect(asked if asked is not None else False, "logprobs", bool, "true or false")
    best = whole_number(fields, "top_logprobs", 0, 0, MAX_LOGPROBS)
    if best and not asked:
        raise RequestError(f"top_logprobs: needs logprobs true (got {best})", param="top_logprobs")
    return best if asked else None


def whole_number(fields: Fields, name: str, default: int, low: int, high: int) -> int:
    value: int = fields.get(name, default)
    check_int(name, value, low, high)
    return value


MAX_LOGPROBS = SamplingParams.MAX_LOGPROBS
SAMPLING = frozenset((
    "temperature", "top_p", "top_k", "min_p", "seed", "stop", "stop_token_ids", "logit_bias", "presence_penalty",
    "frequency_penalty", "repetition_penalty", "ignore_eos", "min_tokens",
))  # fmt: skip
COMMON = SAMPLING | {"stream", "timeout", "user", "cache_salt"} | CONSTRAINTS
TEXT = {"prompt", "add_special_tokens", "parse_special"}
OPENAI = COMMON | {"model", "max_tokens", "max_completion_tokens", "n", "stream_options", "logprobs", "prompt_logprobs"}
TOOLS = {"tools", "tool_choice", "parallel_tool_calls"}
TEMPLATE = {"chat_template_kwargs", "reasoning_effort", "documents", "add_generation_prompt", "continue_final_message"}
ANSWER = {"include_reasoning"}

NATIVE = Endpoint(
    known=COMMON | TEXT | {"max_new_tokens"},
    prompt="prompt",
    many=False,
    parse_special=False,
    token_limits=("max_new_tokens",),
    max_new_tokens=None,
    temperature=0.0,
    logprobs=count_of_logprobs,
    openai=False,
    answer=PlainAnswer,
)
COMPLETION = Endpoint(
    known=OPENAI | TEXT | {"echo", "best_of"},
    prompt="prompt",
    many=True,
    parse_special=True,
    token_limits=("max_completion_tokens", "max_tokens"),
    max_new_tokens=16,
    temperature=1.0,
    logprobs=count_of_logprobs,
    openai=True,
    answer=CompletionAnswer,
    fewest_tokens=0,
)
CHAT = Endpoint(
    known=OPENAI | TOOLS | TEMPLATE | ANSWER | {"messages", "top_logprobs"},
    prompt="messages",
    many=False,
    parse_special=False,
    token_limits=("max_completion_tokens", "max_tokens"),
    max_new_tokens=1 << 22,  # the rest of the context: SamplingParams' own limit, which the caller shortens to the slot
    temperature=1.0,
    logprobs=switch_of_logprobs,
    openai=True,
    answer=ChatAnswer,
)
MESSAGES = dataclasses.replace(CHAT, convert=messages.chat_body, answer=MessagesAnswer)
RESPONSES = dataclasses.replace(CHAT, convert=responses.chat_body, answer=ResponsesAnswer)
ENDPOINTS = {  # by the path behind the model's
    "": NATIVE,
    "v1/completions": COMPLETION,
    "v1/chat/completions": CHAT,
    "v1/messages": MESSAGES,
    "v1/responses": RESPONSES,
}
