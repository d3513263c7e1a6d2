"""Engine: text in, text out, over one checkpoint. The library's front door; the TorchServe package uses it too.

from gpt_fast import Engine
engine = Engine.load("checkpoints/HuggingFaceTB/SmolLM2-135M-Instruct")
for text in engine.stream("The capital of France is", max_new_tokens=32):
    print(text, end="", flush=True)
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from typing import Any, Unpack

from gpt_fast.config import ConfigError, EngineConfig, SamplingParams
from gpt_fast.engine.fixed_choice import speculator_of
from gpt_fast.engine.scheduler import Load
from gpt_fast.load.engine import Parts, load_parts
from gpt_fast.options import EngineOptions, SamplingOptions
from gpt_fast.request import NO_TOKEN, Logprobs, Request, TokenEvent
from gpt_fast.speculative.speculator import Totals
from gpt_fast.text.stream import TextStream
from gpt_fast.text.tokenizer import PromptTooLong, Tokenizer


@dataclass(frozen=True)
class TextEvent:
    """What one decoded token brought a request: `text` is complete UTF-8 and past every stop string's reach.

    `finish_reason` comes with the request's last event: "stop", "length", or "error" where the model overflowed;
    `stop` is the stop string that ended it, if one did. `prompt_logprobs`, of the prompt's tokens behind the first,
    come with the first event where they were asked for. `cached_tokens`: of the prompt, found in the cache.
    """

    request_id: str
    text: str
    token: int | None  # None: the request ended without one
    finish_reason: str | None = None
    logprobs: Logprobs = ()
    prompt_logprobs: tuple[Logprobs, ...] = ()
    stop: str | None = None
    cached_tokens: int = 0


@dataclass(frozen=True)
class Completion:
    """A whole answer. `tokens` includes the end-of-sequence token when the model ended it."""

    text: str
    tokens: tuple[int, ...]
    finish_reason: str


class Engine:
    """An EngineCore with its tokenizer. One thread at a time may use it."""

    def __init__(self, parts: Parts) -> None:
        self.core = parts.core
        self.tokenizer = parts.tokenizer
        self.model_config = parts.model_config
        self.chat_template = parts.chat_template
        self.description = parts.description
        self._texts: dict[str, _RequestText] = {}
        self._ids = itertools.count()

    @classmethod
    def load(cls, checkpoint_path: str | PathLike[str], **options: Unpack[EngineOptions]) -> Engine:
        """Load and warm up a converted checkpoint.

        Args:
            checkpoint_path: its directory, or one weights file in it.
            options: EngineConfig's other fields.

        Raises:
            ConfigError: an option is out of its bounds, or cannot be had here.
            CheckpointError: the files are not a whole, undamaged checkpoint.
        """
        return cls(load_parts(EngineConfig(checkpoint_path=str(checkpoint_path), **options)))

    # -------------------------------------------------------------------------------- the prompt

    @property
    def max_characters(self) -> int | None:
        """More of a prompt never fits a slot, whatever it says; None: not known."""
        most = self.tokenizer.characters_per_token
        return None if most is None else self.core.max_seq_len * most

    def encode(self, prompt: str, *, add_bos: bool = True, specials: bool = False) -> list[int]:
        """Token ids of a plain prompt. specials: special tokens spelled in it are tokens; else they are text.

        PromptTooLong for a text that no number of tokens within a slot can hold; it is not encoded.
        """
        if self.max_characters is not None and len(prompt) > self.max_characters:
            raise PromptTooLong(len(prompt), self.max_characters)
        return self.tokenizer.encode(prompt, add_bos=add_bos, specials=specials)

    def encode_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        **options: Any,
    ) -> list[int]:
        """Token ids of a conversation, by the checkpoint's own chat template, ready for the assistant's answer.

        options: ChatTemplate.render's, such as chat_template_kwargs and continue_final_message. PromptTooLong as above.
        """
        if self.chat_template is None:
            raise ConfigError("messages", "this checkpoint has no chat template")
        return self.chat_template.encode(
            self.tokenizer, list(messages), max_characters=self.max_characters, tools=tools, **options
        )

    # -------------------------------------------------------------------------------- many requests

    def add(self, request_id: str, prompt: list[int], params: SamplingParams, *, owner: str = "") -> Request:
        """Queue a request. ValueError when the prompt does not fit, or the id is in use."""
        request = self.core.add(request_id, prompt, params, owner=owner)
        self._texts[request_id] = _RequestText(self.tokenizer, request)
        return request

    def abort(self, request_id: str) -> None:
        """Drop a request wherever it is; unknown ids are ignored, for it may just have ended."""
        self.core.abort(request_id)
        self._texts.pop(request_id, None)

    def step(self) -> list[TextEvent]:
        """One step of everything that runs; the text it produced."""
        events = []
        for event in self.core.step():
            if event.request_id in self._texts:  # a stop string may have ended it earlier in this step
                events.append(self._text_event(event))
        return events

    @property
    def idle(self) -> bool:
        return self.core.idle

    @property
    def slots(self) -> int:
        """How many requests run together."""
        return self.core.slots

    @property
    def eos_ids(self) -> list[int]:
        """The tokens that end an answer."""
        return self.core.eos_ids

    def load_figures(self) -> Load:
        """What runs and waits now."""
        return self.core.load()

    def speculation_totals(self) -> Totals | None:
        """What speculation did so far; None for an engine without it."""
        speculator = speculator_of(self.core)
        return speculator.totals if speculator else None

    def check_integrity(self) -> None:
        """Raise RuntimeError unless slots and requests agree. Cheap; for whenever the engine falls idle."""
        self.core.check_integrity()

    def _text_event(self, event: TokenEvent) -> TextEvent:
        state = self._texts[event.request_id]
        text, stopped = state.push(event)
        reason = "stop" if stopped else event.finish_reason
        if reason is not None:
            self.abort(event.request_id)
        token = None if event.token == NO_TOKEN else event.token
        told = state.take_prompt_logprobs()
        stop, cached = state.stream.stop, state.request.reused
        return TextEvent(event.request_id, text, token, reason, event.logprobs, told, stop, cached)

    # -------------------------------------------------------------------------------- one request

    def stream(self, prompt: str | list[int], **sampling: Unpack[SamplingOptions]) -> Iterator[str]:
        """The answer's text as it is decoded. Leaving the loop early drops the request.

        Args:
            prompt: text, or token ids as `encode` and `encode_chat` give them.
            sampling: SamplingParams' fields.

        Raises:
            ConfigError: a field of `sampling` is out of its bounds.
            ValueError: the prompt is empty or leaves no room for an answer.
        """
        for event in self.events(prompt, SamplingParams(**sampling)):
            if event.text:
                yield event.text

    def events(self, prompt: str | list[int], params: SamplingParams) -> Iterator[TextEvent]:
        """The answer, a token an event. Leaving the loop early drops the request."""
        request_id = f"local-{next(self._ids)}"
        self.add(request_id, self.encode(prompt) if isinstance(prompt, str) else prompt, params)
        try:
            while request_id in self._texts:
                yield from (event for event in self.step() if event.request_id == request_id)
        finally:
            self.abort(request_id)

    def generate(self, prompts: Sequence[str | list[int]], params: Sequence[SamplingParams]) -> list[Completion]:
        """Answer all prompts together; rows are independent requests with their own sampling and stop."""
        ids = [f"local-{next(self._ids)}" for _ in prompts]
        for request_id, prompt, row in zip(ids, prompts, params, strict=True):
            self.add(request_id, self.encode(prompt) if isinstance(prompt, str) else prompt, row)
        events: dict[str, list[TextEvent]] = {request_id: [] for request_id in ids}
        while any(request_id in self._texts for request_id in ids):
            for event in self.step():
                events[event.request_id].append(event)
        return [completion(events[request_id]) for request_id in ids]


def completion(events: Sequence[TextEvent]) -> Completion:
    """Fold a request's events into its answer."""
    reason = events[-1].finish_reason or "length"
    return Completion("".join(e.text for e in events), tuple(e.token for e in events if e.token is not None), reason)


class _RequestText:
    """One request's way from token ids to text: bytes, then UTF-8, then stop strings."""

    def __init__(self, tokenizer: Tokenizer, request: Request) -> None:
        self.request = request
        self.detokenizer = tokenizer.detokenizer()
        self.stream = TextStream(request.params.stop)
        self.silent = {NO_TOKEN, *request.params.stop_token_ids}  # tokens that are no part of the text

    def push(self, event: TokenEvent) -> tuple[str, bool]:
        """The text that may leave now, and whether a stop string was met."""
        text = "" if event.token in self.silent else self.stream.push(self.detokenizer.push(event.token))
        if event.finish_reason is not None and not self.stream.stopped:
            text += self.stream.finish()
        return text, self.stream.stopped

    def take_prompt_logprobs(self) -> tuple[Logprobs, ...]:
        """All at its first event, then none."""
        taken, self.request.prompt_logprobs = tuple(self.request.prompt_logprobs), []
        return taken
