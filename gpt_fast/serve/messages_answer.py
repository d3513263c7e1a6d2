"""The answer of Anthropic's Messages API: a message of blocks, or the events that build one. No torch here."""

from __future__ import annotations

import json
from typing import Any

from gpt_fast.serve.messages import error_body
from gpt_fast.serve.reasoning import Reasoning
from gpt_fast.serve.response import FAILED, ChatAnswer, Choice, Row, dump
from gpt_fast.serve.stamp import Stamp
from gpt_fast.serve.tool_calls import Piece, ToolCall

Fields = dict[str, Any]


class MessagesAnswer(ChatAnswer):
    """A stream is message_start, ping, each block's start, deltas and stop, then message_delta and message_stop."""

    prefix = "msg_"

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.blocks = 0  # begun
        self.open = ""  # the kind of block that is being written, if it is one of text

    def streamed(self, index: int, choice: Choice, text: str, logprobs: list[Row]) -> str:
        frames = [] if choice.begun else [frame("message_start", message=self.message(choice, [])), frame("ping")]
        choice.begun = True
        pieces = self.pieces(choice, text)
        return "".join(frames + [part for piece in pieces for part in self.write(piece)])

    def write(self, piece: Piece | Reasoning) -> list[str]:
        if isinstance(piece, str):
            return [*self.opened("text"), self.delta_of({"type": "text_delta", "text": piece})]
        if isinstance(piece, Reasoning):
            return [*self.opened("thinking"), self.delta_of({"type": "thinking_delta", "thinking": piece.text})]
        return [
            *self.close(),
            self.start({**call_block(piece, self.stamp), "input": {}}),
            self.delta_of({"type": "input_json_delta", "partial_json": piece.arguments}),
            self.stop(),
        ]

    def opened(self, kind: str) -> list[str]:
        """A block of this kind is open from here on."""
        if self.open == kind:
            return []
        frames = [*self.close(), self.start(text_block(kind, ""))]
        self.open = kind
        return frames

    def start(self, block: Fields) -> str:
        self.blocks += 1
        return frame("content_block_start", index=self.blocks - 1, content_block=block)

    def delta_of(self, delta: Fields) -> str:
        return frame("content_block_delta", index=self.blocks - 1, delta=delta)

    def stop(self) -> str:
        return frame("content_block_stop", index=self.blocks - 1)

    def close(self) -> list[str]:
        was_open, self.open = self.open, ""
        return [self.stop()] if was_open else []

    def end(self) -> str:
        (choice,) = self.choices
        if choice.finish_reason == "error":
            return self.broken(FAILED["message"] or "") if self.stream else self.error_body(FAILED["message"] or "")
        if not self.stream:
            content = blocks(self.pieces(choice, choice.text), self.stamp)
            return dump(self.message(choice, content, **ending(choice)))
        usage = {"output_tokens": choice.tokens}
        last = [frame("message_delta", delta=ending(choice), usage=usage), frame("message_stop")]
        return "".join(self.close() + last)

    def message(self, choice: Choice, content: list[Fields], **ending: str | None) -> Fields:
        usage = {
            "input_tokens": self.prompt_tokens - self.cached_tokens,
            "cache_read_input_tokens": self.cached_tokens,
            "cache_creation_input_tokens": 0,
            "output_tokens": choice.tokens if ending else 0,
        }
        return {
            "id": self.head["id"],
            "type": "message",
            "role": "assistant",
            "model": self.model,
            "content": content,
            "stop_reason": None,
            "stop_sequence": None,
            **ending,
            "usage": usage,
        }

    def error_body(self, message: str) -> str:
        return error_body(500, message)

    def broken(self, message: str) -> str:
        return f"event: error\ndata: {error_body(500, message)}\n\n" if self.stream else ""


def ending(choice: Choice) -> dict[str, str | None]:
    if choice.finish_reason == "length":
        reason = "max_tokens"
    elif choice.calls:
        reason = "tool_use"
    else:
        reason = "end_turn" if choice.stop is None else "stop_sequence"
    return {"stop_reason": reason, "stop_sequence": choice.stop if reason == "stop_sequence" else None}


def blocks(pieces: list[Piece | Reasoning], stamp: Stamp) -> list[Fields]:
    """The content of a whole message: neighbouring text is one block."""
    content: list[Fields] = []
    for piece in pieces:
        if isinstance(piece, ToolCall):
            content.append({**call_block(piece, stamp), "input": json.loads(piece.arguments)})
            continue
        kind, text = ("thinking", piece.text) if isinstance(piece, Reasoning) else ("text", piece)
        if content and content[-1]["type"] == kind:
            content[-1][kind] += text
        else:
            content.append(text_block(kind, text))
    return content


def text_block(kind: str, text: str) -> Fields:
    return {"type": kind, kind: text} | ({"signature": ""} if kind == "thinking" else {})


def call_block(call: ToolCall, stamp: Stamp) -> Fields:
    return {"type": "tool_use", "id": stamp.new_id("toolu"), "name": call.name}


def frame(kind: str, **fields: Any) -> str:
    return f"event: {kind}\ndata: {dump({'type': kind, **fields})}\n\n"
