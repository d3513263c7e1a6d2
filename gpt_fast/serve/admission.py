"""From a request's path and body to an Answer in flight, or a refusal that names what is wrong."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple
from urllib.parse import quote

from gpt_fast.llm import Engine
from gpt_fast.serve import messages
from gpt_fast.serve.body import in_words_of, parse_json
from gpt_fast.serve.chat_style import ChatStyle
from gpt_fast.serve.endpoints import CHAT, COMPLETION, ENDPOINTS, RESPONSES, TEMPLATE, Fields
from gpt_fast.serve.exchange import Answer, Incoming, Job, Prompt, Refusal, Reply
from gpt_fast.serve.messages_answer import MessagesAnswer
from gpt_fast.serve.page.assets import chat_page
from gpt_fast.serve.prompt_logprobs import PromptLogprobs, check_entries
from gpt_fast.serve.request import REASONS, ApiRequest, RequestError, check_model, parse_request
from gpt_fast.serve.response import JSON, dump, model_card, model_list
from gpt_fast.serve.tokenize import EncodeChat, count_message_tokens, detokenize, tokenize, tokenizer_info
from gpt_fast.text.grammar import Guide, GuideError, Maker
from gpt_fast.text.tokenizer import PromptTooLong

AT_ONCE: dict[str, Callable[[Engine, Fields, EncodeChat], Fields]] = {
    "tokenize": tokenize,
    "detokenize": detokenize,
    "v1/messages/count_tokens": count_message_tokens,
}
PATHS = ", ".join(["none", *filter(None, ENDPOINTS), "v1/models", *AT_ONCE, "tokenizer_info", "chat"])


class Limits(NamedTuple):
    """What the server allows a request. max_new_tokens and stream: for a native request that does not say."""

    max_new_tokens: int
    stream: bool
    max_waiting: int
    max_seconds: float


class Admit:
    """The doors' Admission over one engine. in_flight: how many sequences run or wait; draining: only those may end."""

    def __init__(
        self, engine: Engine, *, in_flight: Callable[[], int], limits: Limits, model_names: Sequence[str],
        draining: Callable[[], bool],
    ) -> None:  # fmt: skip
        self.engine, self.in_flight, self.limits = engine, in_flight, limits
        self.model_names, self.draining = tuple(model_names), draining
        self.created = int(time.time())
        self.page = chat_page()
        self.style = ChatStyle(engine.chat_template, engine.tokenizer)
        self.guides = Maker(engine.tokenizer, vocab_size=engine.model_config.vocab_size, eos_ids=engine.eos_ids)

    def __call__(self, incoming: Incoming) -> Job | Reply:
        path = incoming.path.strip("/")
        try:
            if incoming.refused is not None:
                raise incoming.refused
            if (asset := self.page.get(path)) is not None:
                return Reply(asset.text, None, content_type=asset.content_type, headers=asset.headers)
            if path.startswith("v1/models"):
                return Reply(self.models(path), None, content_type=JSON)
            if path == "tokenizer_info":
                return Reply(dump(tokenizer_info(self.engine)), None, content_type=JSON)
            if path in AT_ONCE:
                return Reply(
                    dump(AT_ONCE[path](self.engine, self.fields(incoming), self.encode_chat)), None, content_type=JSON
                )
            return self.job(path, incoming)
        except RequestError as error:
            raise refusal(error, anthropic=path.startswith("v1/messages")) from None

    def fields(self, incoming: Incoming) -> Fields:
        """The body's fields, but for those that say nothing."""
        fields = {name: value for name, value in parse_json(incoming.body).items() if value is not None}
        check_model(fields, self.model_names)
        return fields

    def confirm(self, job: Job) -> None:
        """Look for room again: requests that came together were admitted before any of them was in flight."""
        try:
            self.check_room(len(job.prompts))
        except RequestError as error:
            raise refusal(error, anthropic=isinstance(job.answer, MessagesAnswer)) from None

    def models(self, path: str) -> str:
        facts = {"created": self.created, "max_seq_len": self.engine.core.max_seq_len}
        if path == "v1/models":
            return model_list(self.model_names, **facts)
        for name in self.model_names:
            if path in (f"v1/models/{name}", f"v1/models/{quote(name, safe='')}"):
                return dump(model_card(name, **facts))
        allowed = ", ".join(f"v1/models/{name}" for name in self.model_names)
        message = f"path: no such model at {json.dumps(path[:100])} (allowed {allowed})"
        raise RequestError(message, status=404, code="model_not_found")

    def job(self, path: str, incoming: Incoming) -> Job:
        if path not in ENDPOINTS:
            raise RequestError(f"path: nothing at {json.dumps(path[:100])} (allowed {PATHS})", status=404)
        if self.draining():
            raise RequestError("the server is stopping", status=503, code="draining")
        self.check_room(1)  # a server that is full says so before it reads
        request = parse_request(
            ENDPOINTS[path],
            incoming.body,
            model_names=self.model_names,
            max_new_tokens=self.limits.max_new_tokens,
            stream=self.limits.stream,
        )
        with in_words_of(request.names):
            prompts = self.prompts(request)
        self.check_room(len(prompts))
        seconds = min(request.timeout or self.limits.max_seconds, self.limits.max_seconds)
        return Job(self.answer(request, prompts, incoming), prompts, owner=request.owner, seconds=seconds)

    # ---------------------------------------------------------------------------------------- prompts

    def prompts(self, request: ApiRequest) -> list[Prompt]:
        """Every sequence the request needs, n of each prompt, checked against the model."""
        if request.messages:
            rows = [self.chat_tokens(request)]
        else:
            rows = [self.text_tokens(prompt, request) for prompt in request.prompts]
        if request.params.prompt_logprobs is not None:
            param = "logprobs" if request.prompt_logprobs is None else "prompt_logprobs"
            check_entries(rows * request.n, request.params.prompt_logprobs, param)
        return [self.prompt(row, request, choice) for row in rows for choice in range(request.n)]

    def encode_chat(self, fields: Fields) -> list[int]:
        """The prompt of a chat's fields, which nobody answers."""
        return self.chat_tokens(parse_request(CHAT, fields, model_names=self.model_names, max_new_tokens=1))

    def chat_tokens(self, request: ApiRequest) -> list[int]:
        self.style.form(request)  # tools that cannot be are refused before anything is encoded
        try:
            messages = self.style.messages(request)
            return self.engine.encode_chat(messages, request.tools or None, **request.template_options)
        except PromptTooLong as error:
            raise self.too_long("messages", error) from None
        except ValueError as error:  # the template's own refusal: one line, from the operator's checkpoint
            named = next((name for name in TEMPLATE if str(error).startswith(f"{name}:")), "messages")
            raise RequestError(f"{named}: {str(error).removeprefix(f'{named}: ')}", param=named) from None

    def text_tokens(self, prompt: str | tuple[int, ...], request: ApiRequest) -> list[int]:
        if isinstance(prompt, str):
            try:
                return self.engine.encode(prompt, add_bos=request.add_special_tokens, specials=request.parse_special)
            except PromptTooLong as error:
                raise self.too_long("prompt", error) from None
            except ValueError as error:
                raise RequestError(f"prompt: {error}", param="prompt") from None
        vocabulary = self.engine.model_config.vocab_size
        if max(prompt) >= vocabulary:
            message = f"prompt: token id {max(prompt)} is outside the vocabulary (allowed 0..{vocabulary - 1})"
            raise RequestError(message, param="prompt")
        return list(prompt)

    def too_long(self, field: str, error: PromptTooLong) -> RequestError:
        tokens = f"{self.engine.core.max_seq_len} tokens, which are at most {error.allowed} characters"
        message = f"{field}: {error.characters} characters (allowed {tokens})"
        return RequestError(message, param=field, code="context_length_exceeded")

    def guide(self, request: ApiRequest, *, thinking: bool) -> Guide | None:
        """A guide of its own for each sequence. What it costs to compile one is bounded; see grammar_check."""
        try:
            form = self.style.form(request)
            if form is not None and (request.must_call or request.constraint is not None):
                answer = None if request.must_call else request.constraint
                parallel = request.parallel and not request.named
                return self.guides.calls_guide(request.tools, form, parallel=parallel, answer=answer, thinking=thinking)
            return None if request.constraint is None else self.guides.guide(request.constraint, thinking=thinking)
        except GuideError as error:
            where = "tools" if request.must_call else request.constrained_by
            raise RequestError(f"{where}: {error}", param=where) from None

    def prompt(self, tokens: list[int], request: ApiRequest, choice: int) -> Prompt:
        params, room = request.params, self.engine.core.max_seq_len - len(tokens)
        if not tokens:
            raise RequestError("prompt: nothing is left of it as tokens (allowed 1 or more)", param="prompt")
        if room < 1 or (request.limited and params.max_new_tokens > room):
            wanted = f" and {params.max_new_tokens} new ones" if request.limited else ""
            field = request.endpoint.prompt
            message = f"{field}: {len(tokens)} tokens{wanted} (allowed {self.engine.core.max_seq_len} together)"
            raise RequestError(message, param=field, code="context_length_exceeded")
        for name, ids in {"logit_bias": params.logit_bias, "stop_token_ids": params.stop_token_ids}.items():
            outside = [token for token in ids if token >= self.engine.model_config.vocab_size]
            if outside:
                most = self.engine.model_config.vocab_size - 1
                raise RequestError(f"{name}: {outside[0]} is outside the vocabulary (allowed 0..{most})", param=name)
        if choice and params.seed is not None:
            params = dataclasses.replace(params, seed=params.seed + choice)
        limit = min(params.max_new_tokens, room)
        guide = self.guide(request, thinking=self.style.is_thinking(request, tokens))
        params = dataclasses.replace(
            params, max_new_tokens=limit, min_tokens=min(params.min_tokens, limit), guide=guide
        )
        return Prompt(tokens, params)

    def check_room(self, sequences: int) -> None:
        """429 when the waiting line is full; 400 for a request that would not fit an empty server."""
        slots = self.engine.slots
        most = slots + self.limits.max_waiting
        if sequences > most:
            raise RequestError(f"n: {sequences} sequences in all (allowed {most})", param="n")
        if self.in_flight() + sequences > most:
            message = f"too many requests: {slots} slots and {self.limits.max_waiting} places in the queue are taken"
            raise RequestError(message, status=429, code="queue_full")

    # ---------------------------------------------------------------------------------------- answers

    def answer(self, request: ApiRequest, prompts: list[Prompt], incoming: Incoming) -> Answer:
        if not request.endpoint.openai:
            return request.endpoint.answer(stream=request.stream)
        texts = [self.echo(prompt) if request.echo else "" for prompt in request.prompts or ("",)]
        texts = [text for text in texts for _ in range(request.n)]
        options: dict[str, Any] = {
            "model": self.model_names[0],
            "answer_id": incoming.client_id,
            "stamp": incoming.stamp(),
            "stream": request.stream,
            "prompt_tokens": sum(len(prompt.tokens) for prompt in prompts[:: request.n]),
            "choices": texts,
            "n": request.n,
            "include_usage": request.include_usage,
            "continuous_usage": request.continuous_usage,
            "wants_logprobs": request.params.logprobs is not None,
            "token_bytes": partial(self.engine.tokenizer.token_bytes, keep_specials=request.endpoint is COMPLETION),
            "told": self.told(request, prompts, texts),
        }
        if request.endpoint is RESPONSES:
            options["given"] = request.sent
        if request.prompt_only:
            options["prompt_only"] = True
        if request.messages:
            thinking = self.style.is_thinking(request, prompts[0].tokens)
            options["new_parser"] = self.style.parser(request, thinking=thinking)
            options |= {"include_reasoning": request.include_reasoning, "parallel": request.parallel}
        return request.endpoint.answer(**options)

    def told(self, request: ApiRequest, prompts: list[Prompt], texts: list[str]) -> PromptLogprobs | None:
        if request.params.prompt_logprobs is None:
            return None
        return PromptLogprobs.of(
            self.engine.tokenizer,
            [prompt.tokens for prompt in prompts],
            texts=texts,
            echoed=request.params.logprobs if request.echo else None,
            listed=request.prompt_logprobs,
        )

    def echo(self, prompt: str | tuple[int, ...]) -> str:
        """As it came; token ids as their text, special tokens too, as vLLM does."""
        if isinstance(prompt, str):
            return prompt
        return self.engine.tokenizer.decode_bytes(prompt, keep_specials=True).decode("utf-8", "replace")


def refusal(error: RequestError, *, anthropic: bool) -> Refusal:
    retry = (("Retry-After", "1"),) if error.status in (429, 503) else ()
    body = messages.error_body(error.status, error.message) if anthropic else error.body
    return Refusal(error.status, REASONS[error.status], body, headers=error.headers + retry)
