"""The answer of OpenAI's Responses API: a response of items, or the events that build one. No torch here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gpt_fast.serve.reasoning import Reasoning
from gpt_fast.serve.response import FAILED, ChatAnswer, Choice, Row, dump
from gpt_fast.serve.tool_calls import Piece, ToolCall

Fields = dict[str, Any]


class ResponsesAnswer(ChatAnswer):
    """given: the client's own fields, which the response repeats.

    A stream is response.created and in_progress, then each item's events, then response.completed, incomplete or
    failed; all are numbered.
    """

    prefix = "resp_"

    def __init__(self, *, given: Mapping[str, Any], **options: Any) -> None:
        super().__init__(**options)
        self.given = given
        self.number = 0
        self.items: list[Fields] = []
        self.text: Fields | None = None  # the item that is being written, if it is one of text
        self.rows: list[Row] = []  # log-probabilities that no delta has carried yet

    def streamed(self, index: int, choice: Choice, text: str, logprobs: list[Row]) -> str:
        frames = []
        if not choice.begun:
            choice.begun = True
            frames = [self.state("created", "in_progress"), self.state("in_progress", "in_progress")]
        self.rows += logprobs
        pieces = self.pieces(choice, text)
        return "".join(frames + [part for piece in pieces for part in self.write(piece)])

    def end(self) -> str:
        (choice,) = self.choices
        status = {"length": "incomplete", "error": "failed"}.get(choice.finish_reason or "", "completed")
        if not self.stream:
            self.rows = choice.logprobs
            for piece in self.pieces(choice, choice.text):
                self.write(piece)
        frames = self.close("incomplete" if status == "incomplete" else "completed")
        if not self.stream:
            return dump(self.response(status))
        return "".join([*frames, self.state(status, status)])

    # ---------------------------------------------------------------------------------------- items

    def write(self, piece: Piece | Reasoning) -> list[str]:
        if isinstance(piece, ToolCall):
            return self.close("completed") + self.call(piece)
        kind, text = ("reasoning", piece.text) if isinstance(piece, Reasoning) else ("message", piece)
        frames: list[str] = []
        if self.text is None or self.text["type"] != kind:
            frames = self.close("completed") + self.open(kind)
        return [*frames, self.grow(text)]

    def open(self, kind: str) -> list[str]:
        """Begin a message, or the reasoning before it."""
        item: Fields = {"id": self.stamp.new_id("msg"), "type": "message", "status": "in_progress", "role": "assistant"}
        part: Fields = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
        if kind == "reasoning":
            item = {"id": self.stamp.new_id("rs"), "type": "reasoning", "status": "in_progress", "summary": []}
            part = {"type": "reasoning_text", "text": ""}
        self.text = item | {"content": [part]}
        self.items.append(self.text)
        added = self.of_item("response.output_item.added", item=item | {"content": []})
        return [added, self.of_part("response.content_part.added", part=part)]

    def grow(self, text: str) -> str:
        """More of what is being written."""
        part, rows = self.items[-1]["content"][0], self.content_rows()
        part["text"] += text
        if part["type"] == "reasoning_text":
            return self.of_part("response.reasoning_text.delta", delta=text)
        part["logprobs"] += rows
        return self.of_part("response.output_text.delta", delta=text, logprobs=rows)

    def close(self, status: str) -> list[str]:
        """End what is being written, if there is something."""
        item, self.text = self.text, None
        if item is None:
            return []
        part, item["status"] = item["content"][0], status
        said = {name: part[name] for name in ("text", "logprobs") if name in part}
        return [
            self.of_part(f"response.{part['type']}.done", **said),
            self.of_part("response.content_part.done", part=part),
            self.of_item("response.output_item.done", item=item),
        ]

    def call(self, call: ToolCall) -> list[str]:
        item = {
            "id": self.stamp.new_id("fc"),
            "type": "function_call",
            "status": "completed",
            "call_id": self.stamp.new_id("call"),
            "name": call.name,
            "arguments": call.arguments,
        }
        self.items.append(item)
        arguments, where = "response.function_call_arguments", {"item_id": item["id"]}
        return [
            self.of_item("response.output_item.added", item=item | {"status": "in_progress", "arguments": ""}),
            self.of_item(f"{arguments}.delta", **where, delta=call.arguments),
            self.of_item(f"{arguments}.done", **where, name=call.name, arguments=call.arguments),
            self.of_item("response.output_item.done", item=item),
        ]

    def content_rows(self) -> list[Fields]:
        rows, self.rows = self.rows, []
        return (self.logprobs(rows) or {"content": []})["content"]  # type: ignore[no-any-return]

    # ---------------------------------------------------------------------------------------- events

    def of_part(self, kind: str, **fields: Any) -> str:
        return self.of_item(kind, item_id=self.items[-1]["id"], content_index=0, **fields)

    def of_item(self, kind: str, **fields: Any) -> str:
        return self.event(kind, output_index=len(self.items) - 1, **fields)

    def state(self, kind: str, status: str) -> str:
        return self.event(f"response.{kind}", response=self.response(status))

    def event(self, kind: str, **fields: Any) -> str:
        number, self.number = self.number, self.number + 1
        return f"event: {kind}\ndata: {dump({'type': kind, 'sequence_number': number, **fields})}\n\n"

    def broken(self, message: str) -> str:
        if not self.stream:
            return ""
        return self.event("error", code="server_error", message=message, param=None)

    # ---------------------------------------------------------------------------------------- the response

    def response(self, status: str) -> Fields:
        given = self.given
        failed = {"code": "server_error", "message": FAILED["message"]} if status == "failed" else None
        return {
            "id": self.head["id"],
            "object": "response",
            "created_at": self.head["created"],
            "status": status,
            "error": failed,
            "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
            "model": self.model,
            "output": self.items,
            "usage": None if status == "in_progress" else self.usage_of(self.choices[0]),
            "store": False,
            "background": False,
            "previous_response_id": None,
            "truncation": "disabled",
            "metadata": given.get("metadata") or {},
            "instructions": given.get("instructions"),
            "max_output_tokens": given.get("max_output_tokens"),
            "parallel_tool_calls": given.get("parallel_tool_calls") is not False,
            "reasoning": {"effort": None, "summary": None} | (given.get("reasoning") or {}),
            "temperature": 1.0 if given.get("temperature") is None else given["temperature"],
            "top_p": 1.0 if given.get("top_p") is None else given["top_p"],
            "top_logprobs": given.get("top_logprobs") or 0,
            "text": {"format": {"type": "text"}} | (given.get("text") or {}),
            "tool_choice": given.get("tool_choice") or "auto",
            "tools": [TOOL | tool for tool in given.get("tools") or ()],
            "user": given.get("user"),
        }

    def usage_of(self, choice: Choice) -> Fields:
        return {
            "input_tokens": self.prompt_tokens,
            "input_tokens_details": {"cached_tokens": self.cached_tokens, "cache_write_tokens": 0},
            "output_tokens": choice.tokens,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": self.prompt_tokens + choice.tokens,
        }


TOOL: Fields = {"description": None, "parameters": None, "strict": None}
