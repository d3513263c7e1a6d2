"""How a request's text events become its response: plain text, OpenAI completions, OpenAI chat completions.

Each answer is a fold of the same events: streamed, `push` returns what leaves now and `end` what closes the stream;
whole, `push` returns nothing and `end` the body. No torch here.
"""

from __future__ import annotations

import json
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

from gpt_fast.request import Logprobs
from gpt_fast.serve.prompt_logprobs import PromptLogprobs, token_name
from gpt_fast.serve.reasoning import Reasoning, ReasoningParser
from gpt_fast.serve.stamp import Stamp, fresh
from gpt_fast.serve.tool_calls import CallParser, Piece, TextOnly, ToolCall

TEXT = "text/plain; charset=utf-8"
JSON = "application/json"
SSE = "text/event-stream; charset=utf-8"
FAILED = {"message": "the model overflowed on this request", "type": "server_error", "param": None, "code": None}
LOWEST_LOGPROB = -9999.0  # OpenAI's stand-in for a token that could not come: JSON has no infinity
LINE_ENDS = re.compile("[\x85\u2028\u2029]")  # JSON leaves them as they are, and some clients split lines there


Row = tuple[int, Logprobs, int]  # a token, its log-probabilities and the offset of its text


class Event(Protocol):
    """The part of llm.TextEvent that a response is made of."""

    @property
    def text(self) -> str: ...
    @property
    def token(self) -> int | None: ...
    @property
    def finish_reason(self) -> str | None: ...
    @property
    def logprobs(self) -> Logprobs: ...
    @property
    def prompt_logprobs(self) -> tuple[Logprobs, ...]: ...
    @property
    def stop(self) -> str | None: ...
    @property
    def cached_tokens(self) -> int: ...


class PlainAnswer:
    """The native response: the text itself, one HTTP chunk as it is decoded, or all of it at once.

    As in TorchServe's gpt_fast example, nothing but the answer: plain text has no place for usage, a reason or an
    error. An answer that fails just ends; clients that must know use the OpenAI endpoints.
    """

    content_type = TEXT

    def __init__(self, *, stream: bool) -> None:
        self.stream = stream
        self.text = ""

    def push(self, index: int, events: Sequence[Event]) -> str:
        text = "".join(event.text for event in events)
        if self.stream:
            return text
        self.text += text
        return ""

    def end(self) -> str:
        return self.text

    def error_body(self, message: str) -> str:
        return server_error(message)

    def broken(self, message: str) -> str:
        return ""


@dataclass
class Choice:
    """What one choice of a response has received."""

    echo: str = ""
    text: str = ""
    tokens: int = 0
    cached: int = 0  # tokens of its prompt that the cache held
    finish_reason: str | None = None
    stop: str | None = None
    logprobs: list[Row] = field(default_factory=list)
    prompt_logprobs: tuple[Logprobs, ...] = ()
    begun: bool = False
    parser: CallParser | ReasoningParser = field(default_factory=TextOnly)
    calls: int = 0
    sent: int | None = None  # of the arguments of the call that a stream is in, how many characters have left

    def take(self, events: Sequence[Event]) -> None:
        for event in events:
            self.prompt_logprobs = event.prompt_logprobs or self.prompt_logprobs
            if event.logprobs:
                self.logprobs.append((event.logprobs[0][0], event.logprobs, len(self.echo) + len(self.text)))
            self.text += event.text
            self.tokens += event.token is not None
            self.cached = event.cached_tokens or self.cached
            self.finish_reason, self.stop = event.finish_reason or self.finish_reason, event.stop or self.stop


class OpenAIAnswer(ABC):
    """What completions and chat completions share; subclasses give the shape of a choice.

    A stream of which any choice fails ends with an error event instead of [DONE]. A whole answer has its status sent
    long before it fails: it holds an "error" beside the choices, and the one that failed has finish_reason "error".
    """

    prefix = ""
    object = ""
    chunk_object = ""

    def __init__(
        self,
        *,
        model: str,
        stream: bool,
        prompt_tokens: int,
        choices: Sequence[str],
        include_usage: bool,
        wants_logprobs: bool,
        token_bytes: Callable[[int], bytes],
        n: int = 1,
        continuous_usage: bool = False,
        told: PromptLogprobs | None = None,
        answer_id: str = "",
        stamp: Stamp | None = None,
    ) -> None:
        """choices: the text each begins with ("" without echo), n for each prompt. continuous_usage: usage so far in
        every chunk.

        told: what of their prompts' tokens. answer_id: what the answer's id says behind its prefix; "" for the
        stamp's. stamp: a fresh one by default.
        """
        self.stream, self.model = stream, model
        self.content_type = SSE if stream else JSON
        self.prompt_tokens, self.include_usage = prompt_tokens, include_usage
        self.n, self.continuous_usage = n, continuous_usage
        self.wants_logprobs, self.token_bytes, self.told = wants_logprobs, token_bytes, told
        self.choices = [Choice(echo=text) for text in choices]
        self.stamp = stamp or fresh()
        self.head = {
            "id": f"{self.prefix}{answer_id or self.stamp.new_hex()}",
            "created": self.stamp.created,
            "model": model,
        }

    def push(self, index: int, events: Sequence[Event]) -> str:
        choice = self.choices[index]
        if not events:
            return ""
        offset = len(choice.logprobs)
        choice.take(events)
        if not self.stream:
            return ""
        text = "".join(event.text for event in events)
        return self.streamed(index, choice, text, choice.logprobs[offset:])

    def streamed(self, index: int, choice: Choice, text: str, logprobs: list[Row]) -> str:
        """What a stream sends of a choice that has grown by this."""
        return "".join(map(self.sse, self.deltas(index, choice, text, logprobs)))

    def end(self) -> str:
        failed = {"error": FAILED} if any(choice.finish_reason == "error" for choice in self.choices) else {}
        if not self.stream:
            choices = [self.whole(index, choice) for index, choice in enumerate(self.choices)]
            more = self.beside_choices() | failed
            return dump({**self.head, "object": self.object, "choices": choices, "usage": self.usage(), **more})
        if failed:
            return self.sse(failed)
        usage = self.sse({**self.chunk([]), "usage": self.usage()}) if self.include_usage else ""
        return usage + "data: [DONE]\n\n"

    @abstractmethod
    def deltas(self, index: int, choice: Choice, text: str, logprobs: list[Row]) -> list[dict[str, Any]]:
        """The chunks that these events make."""

    @abstractmethod
    def whole(self, index: int, choice: Choice) -> dict[str, Any]:
        """The finished choice."""

    def beside_choices(self) -> dict[str, Any]:
        """What else a whole answer holds."""
        return {}

    def chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        chunk = {**self.head, "object": self.chunk_object, "choices": choices}
        return {**chunk, "usage": self.usage() if self.continuous_usage else None} if self.include_usage else chunk

    @property
    def cached_tokens(self) -> int:
        """Of the prompts' tokens, those found in the cache; a prompt's other choices find all of it there."""
        return sum(choice.cached for choice in self.choices[:: self.n])

    def usage(self) -> dict[str, Any]:
        completion = sum(choice.tokens for choice in self.choices)
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": completion,
            "total_tokens": self.prompt_tokens + completion,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens},
        }

    def error_body(self, message: str) -> str:
        return server_error(message)

    def broken(self, message: str) -> str:
        return f"data: {server_error(message)}\n\n" if self.stream else ""

    @staticmethod
    def sse(value: dict[str, Any]) -> str:
        return f"data: {dump(value)}\n\n"

    def token_text(self, token: int) -> str:
        return self.token_bytes(token).decode("utf-8", "replace")


class CompletionAnswer(OpenAIAnswer):
    """prompt_only: the answer is the prompt; of what was generated, which must be a token at least, nothing is told."""

    prefix, object, chunk_object = "cmpl-", "text_completion", "text_completion"

    def __init__(self, *, prompt_only: bool = False, **options: Any) -> None:
        super().__init__(**options)
        self.prompt_only = prompt_only

    def push(self, index: int, events: Sequence[Event]) -> str:
        return super().push(index, [PromptEnd(event) for event in events] if self.prompt_only else events)

    def deltas(self, index: int, choice: Choice, text: str, logprobs: list[Row]) -> list[dict[str, Any]]:
        if not choice.begun:
            text, logprobs = choice.echo + text, self.echoed(index, choice) + logprobs
        choice.begun = True
        if not (text or logprobs or choice.finish_reason):
            return []
        body = {"index": index, "text": text, "logprobs": self.logprobs(logprobs)}
        return [self.chunk([{**body, "finish_reason": choice.finish_reason}])]

    def whole(self, index: int, choice: Choice) -> dict[str, Any]:
        return {
            "index": index,
            "text": choice.echo + choice.text,
            "logprobs": self.logprobs(self.echoed(index, choice) + choice.logprobs),
            "finish_reason": choice.finish_reason,
            **(self.told.listing(index, choice.prompt_logprobs) if self.told else {}),
        }

    def echoed(self, index: int, choice: Choice) -> list[Row]:
        return self.told.echo(index, choice.prompt_logprobs) if self.told else []

    def logprobs(self, rows: list[Row]) -> dict[str, Any] | None:
        if not self.wants_logprobs:
            return None
        return {
            "tokens": [self.token_name(token) for token, _, _ in rows],
            "token_logprobs": [finite(row[0][1]) if row else None for _, row, _ in rows],
            "top_logprobs": [self.best(row) if row else None for _, row, _ in rows],
            "text_offset": [offset for _, _, offset in rows],
        }

    def best(self, row: Logprobs) -> dict[str, float]:
        """By name; of tokens that share one, the likelier."""
        names: dict[str, float] = {}
        for token, logprob in row:
            name = self.token_name(token)
            names[name] = max(finite(logprob), names.get(name, LOWEST_LOGPROB))
        return names

    def token_name(self, token: int) -> str:
        return token_name(self.token_bytes(token))


class PromptEnd:
    """An event of a request for its prompt alone: the first one ends it, and says nothing of what came behind."""

    text, token, logprobs, stop = "", None, (), None

    def __init__(self, event: Event) -> None:
        self.prompt_logprobs, self.cached_tokens = event.prompt_logprobs, event.cached_tokens
        self.finish_reason = "error" if event.finish_reason == "error" else "length"


class ChatAnswer(OpenAIAnswer):
    """new_parser: makes what tells an answer's reasoning, content and tool calls apart; None: all of it is content.

    include_reasoning: whether the reasoning is told. It has two names, DeepSeek's and vLLM's: clients read either.
    """

    prefix, object, chunk_object = "chatcmpl-", "chat.completion", "chat.completion.chunk"

    def __init__(
        self,
        *,
        new_parser: Callable[[], CallParser | ReasoningParser] = TextOnly,
        include_reasoning: bool = True,
        parallel: bool = True,
        **options: Any,
    ) -> None:
        """parallel: False tells of an answer's first call only, as vLLM does."""
        super().__init__(**options)
        self.include_reasoning, self.parallel = include_reasoning, parallel
        for choice in self.choices:
            choice.parser = new_parser()

    def deltas(self, index: int, choice: Choice, text: str, logprobs: list[Row]) -> list[dict[str, Any]]:
        """OpenAI's order: the role first, then content and calls, each its name first, then the finish reason."""
        chunks = []
        if not choice.begun:
            choice.begun = True
            chunks.append(self.delta(index, {"role": "assistant", "content": ""}))
        said = self.read(choice, text)
        begun = choice.parser.begun if choice.finish_reason is None else None
        if choice.sent is not None and not said.calls and (begun is None or said.content):
            end_call(choice)  # it broke off: what has left cannot be taken back
        delta = named(said.reasoning)
        if said.content or (logprobs and not delta):
            delta["content"] = said.content
        if delta:
            chunks.append(self.delta(index, delta, logprobs=self.logprobs(logprobs)))
        for call in said.calls:
            chunks += [self.delta(index, {"tool_calls": [each]}) for each in self.call_deltas(choice, call)]
            end_call(choice)
        if begun is not None and self.may_call(choice):
            call = ToolCall(*begun)
            chunks += [self.delta(index, {"tool_calls": [each]}) for each in self.call_deltas(choice, call)]
        if choice.finish_reason is not None:
            chunks.append(self.delta(index, {}, finish_reason=finish_reason(choice)))
        return chunks

    def read(self, choice: Choice, text: str) -> Said:
        """What new text brings, at the end of the answer all of it."""
        said = Said.of(pieces_of(choice, text))
        if not self.parallel:
            said = said._replace(calls=said.calls[: int(self.may_call(choice))])
        return said if self.include_reasoning else said._replace(reasoning="")

    def pieces(self, choice: Choice, text: str) -> list[Piece | Reasoning]:
        """As `read`, in its order, calls counted."""
        found = []
        for piece in pieces_of(choice, text):
            if isinstance(piece, ToolCall):
                if not self.may_call(choice):
                    continue
                choice.calls += 1
            if piece and (self.include_reasoning or not isinstance(piece, Reasoning)):
                found.append(piece)
        return found

    def may_call(self, choice: Choice) -> bool:
        return self.parallel or choice.calls == 0

    def call_deltas(self, choice: Choice, call: ToolCall) -> list[dict[str, Any]]:
        """What a stream has not told yet of its current call."""
        chunks: list[dict[str, Any]] = []
        if choice.sent is None:
            choice.sent = 0
            chunks.append({"index": choice.calls, **call_body(ToolCall(call.name, ""), self.stamp)})
        if rest := call.arguments[choice.sent :]:
            choice.sent += len(rest)
            chunks.append({"index": choice.calls, "function": {"arguments": rest}})
        return chunks

    def beside_choices(self) -> dict[str, Any]:
        return self.told.listing(0, self.choices[0].prompt_logprobs) if self.told else {}

    def delta(self, index: int, delta: dict[str, Any], **extra: Any) -> dict[str, Any]:
        return self.chunk([{"index": index, "delta": delta, "logprobs": None, "finish_reason": None, **extra}])

    def whole(self, index: int, choice: Choice) -> dict[str, Any]:
        said = self.read(choice, choice.text)
        choice.calls = len(said.calls)
        message: dict[str, Any] = {"role": "assistant", "content": said.content, "refusal": None}
        message |= named(said.reasoning)
        if said.calls:
            message["tool_calls"] = [call_body(call, self.stamp) for call in said.calls]
        if said.calls or said.reasoning:
            message["content"] = said.content or None
        return {
            "index": index,
            "message": message,
            "logprobs": self.logprobs(choice.logprobs),
            "finish_reason": finish_reason(choice),
        }

    def logprobs(self, rows: list[Row]) -> dict[str, Any] | None:
        if not self.wants_logprobs:
            return None
        content = [
            {**self.entry(*row[0]), "top_logprobs": [self.entry(*best) for best in row[1:]]} for _, row, _ in rows
        ]
        return {"content": content, "refusal": None}

    def entry(self, token: int, logprob: float) -> dict[str, Any]:
        return {"token": self.token_text(token), "logprob": finite(logprob), "bytes": list(self.token_bytes(token))}


def pieces_of(choice: Choice, text: str) -> list[Piece | Reasoning]:
    """What new text brings, at the end of the answer all of it, in its order."""
    pieces = list(choice.parser.push(text))
    if choice.finish_reason is not None:
        pieces += choice.parser.finish(cut=choice.finish_reason == "length")
    return pieces


class Said(NamedTuple):
    """An answer's parts, each joined in its order; OpenAI's messages know no other."""

    reasoning: str
    content: str
    calls: list[ToolCall]

    @classmethod
    def of(cls, pieces: Iterable[Piece | Reasoning]) -> Said:
        pieces = list(pieces)
        return cls(
            "".join(piece.text for piece in pieces if isinstance(piece, Reasoning)),
            "".join(piece for piece in pieces if isinstance(piece, str)),
            [piece for piece in pieces if isinstance(piece, ToolCall)],
        )


def named(reasoning: str) -> dict[str, Any]:
    return {"reasoning_content": reasoning, "reasoning": reasoning} if reasoning else {}


def end_call(choice: Choice) -> None:
    choice.calls, choice.sent = choice.calls + 1, None


def call_body(call: ToolCall, stamp: Stamp) -> dict[str, Any]:
    function = {"name": call.name, "arguments": call.arguments}
    return {"id": stamp.new_id("call"), "type": "function", "function": function}


def finish_reason(choice: Choice) -> str | None:
    return "tool_calls" if choice.calls and choice.finish_reason == "stop" else choice.finish_reason


def model_list(models: Iterable[str], *, created: int, max_seq_len: int) -> str:
    """The body of GET /v1/models."""
    cards = [model_card(model, created=created, max_seq_len=max_seq_len) for model in models]
    return dump({"object": "list", "data": cards})


def model_card(model: str, *, created: int, max_seq_len: int) -> dict[str, Any]:
    """The body of GET /v1/models/<model>, and an entry of the list."""
    return {"id": model, "object": "model", "created": created, "owned_by": "gpt-fast", "max_model_len": max_seq_len}


def server_error(message: str) -> str:
    """The body of a failure that is not the client's."""
    return json.dumps({"error": {"message": message, "type": "server_error", "param": None, "code": None}})


def finite(logprob: float) -> float:
    return max(logprob, LOWEST_LOGPROB)


def dump(value: object) -> str:
    """Strict JSON in UTF-8 that no client takes for two lines."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False)
    return LINE_ENDS.sub(lambda found: f"\\u{ord(found[0]):04x}", text)
