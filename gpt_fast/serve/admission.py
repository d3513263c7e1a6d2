"""From a request's path and body to an Answer in flight, or a refusal that names what is wrong."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from gpt_fast.config import ConfigError, SamplingParams
from gpt_fast.llm import Engine, TextEvent
from gpt_fast.serve.rounds import Answer, Prompt, Refusal, Reply
from gpt_fast.serve.service import Service

SAMPLING = {field.name for field in dataclasses.fields(SamplingParams)}


class Admit:
    def __init__(self, service: Service, settings: Any, *, model_name: str, drain_file: Path) -> None:
        self.service, self.settings = service, settings
        self.model_name, self.drain_file = model_name, drain_file

    def __call__(self, path: str, body: object) -> Answer | Reply:
        try:
            return self.native(body)
        except ConfigError as error:
            raise Refusal(400, "Bad Request", json.dumps({"error": {"message": str(error), "param": error.key}})) from None

    def native(self, body: Any) -> Answer:
        request = json.loads(bytes(body))
        prompt = request.pop("prompt")
        stream = request.pop("stream", True)
        params = SamplingParams(**{"max_new_tokens": self.settings.max_new_tokens} | request)
        tokens = prompt if isinstance(prompt, list) else self.service.engine.encode(prompt)
        return PlainAnswer(self.service.engine, tokens, params, stream)


class PlainAnswer:
    content_type = "text/plain; charset=utf-8"
    owner = ""

    def __init__(self, engine: Engine, tokens: list[int], params: SamplingParams, stream: bool) -> None:
        self.prompts = [Prompt(tokens, params)]
        self.stream = stream
        self.text = ""

    def push(self, index: int, events: list[TextEvent]) -> str:
        text = "".join(e.text for e in events)
        if self.stream:
            return text
        self.text += text
        return ""

    def end(self) -> str:
        return self.text
