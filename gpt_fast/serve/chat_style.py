"""How the served model chats, as its template tells: how it writes calls, whether it thinks; and what follows from that
for a request's prompt and for reading the answer. No torch here.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from gpt_fast.serve.body import RequestError
from gpt_fast.serve.reasoning import CLOSE, OPEN, ReasoningParser
from gpt_fast.serve.request import ApiRequest
from gpt_fast.serve.tool_calls import CallParser, TextOnly, call_parser
from gpt_fast.text.chat import LLAMA, ChatTemplate, ToolFormat
from gpt_fast.text.tokenizer import Tokenizer

TAIL = 16  # tokens at a prompt's end that hold <think> where the template opens it
ANSWER_FORM = LLAMA  # of a required call where the template has no form: the call is the whole answer


class ChatStyle:
    """template: None for a model without one, which does not chat."""

    def __init__(self, template: ChatTemplate | None, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        silent = {*tokenizer.control_tokens}  # no text of an answer holds them
        form = template.tool_format if template else None
        self.tool_format = None if form is None or {form.before, form.after} & silent else form
        self.thinks = template is not None and template.mentions(OPEN, CLOSE) and not {OPEN, CLOSE} & silent
        self._shows_calls = template is not None and template.mentions("tool_calls")

    def form(self, request: ApiRequest) -> ToolFormat | None:
        """How this request's calls are written; None where it can have none. A call that is required needs no template
        that knows calls: the grammar makes it."""
        if not request.tools:
            return None
        if self.tool_format is None and not request.must_call:
            allowed = 'allowed with tool_choice "required" or a function, which constrain the answer, or "none"'
            raise RequestError(f"tools: this model's chat template has no tool calls ({allowed})", param="tools")
        return self.tool_format or ANSWER_FORM

    def messages(self, request: ApiRequest) -> Sequence[Mapping[str, Any]]:
        """The conversation; where the template would drop earlier calls, they are text."""
        return request.messages if self._shows_calls else [with_calls_as_text(each) for each in request.messages]

    def is_thinking(self, request: ApiRequest, prompt: Sequence[int]) -> bool:
        """Whether the prompt ends inside of the model's reasoning."""
        if not self.thinks or not request.messages:
            return False
        if request.template_options["continue_final_message"]:
            said = request.messages[-1]["content"]
            text = said if isinstance(said, str) else said[-1]["text"]
            return bool(text.rfind(OPEN) > text.rfind(CLOSE))
        tail = self._tokenizer.decode_bytes(prompt[-TAIL:], keep_specials=True)
        return tail.decode("utf-8", "replace").rstrip().endswith(OPEN)

    def parser(self, request: ApiRequest, *, thinking: bool) -> Callable[[], CallParser | ReasoningParser]:
        """Makes what reads an answer. A constrained answer thinks only where the prompt has begun to."""
        form = self.form(request)
        names = [tool["function"]["name"] for tool in request.tools]
        content: Callable[[], CallParser] = TextOnly if form is None else partial(call_parser, form, names)
        free = request.constraint is None and not request.must_call
        if not thinking and not (self.thinks and free):
            return content
        return lambda: ReasoningParser(content(), begun=thinking)


def with_calls_as_text(message: Mapping[str, Any]) -> Mapping[str, Any]:
    if not message.get("tool_calls") or not isinstance(message["content"], str):
        return message
    calls = [
        json.dumps({"name": call["function"]["name"], ANSWER_FORM.arguments_key: call["function"]["arguments"]})
        for call in message["tool_calls"]
    ]
    return {**message, "content": "\n".join(filter(None, [message["content"], *calls]))}
