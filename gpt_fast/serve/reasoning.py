"""An answer's reasoning apart from its content: what stands between <think> and </think>, however the text is cut.

Templates of models that think either open it in the prompt (DeepSeek-R1, QwQ) or leave it to the model (Qwen3). White
space around the marks belongs to neither side. No torch here.
"""

from __future__ import annotations

from dataclasses import dataclass

from gpt_fast.serve.tool_calls import CallParser, Piece, overlap

OPEN, CLOSE = "<think>", "</think>"


@dataclass(frozen=True)
class Reasoning:
    text: str


class ReasoningParser:
    """Reasoning, then what `content` makes of the rest. begun: the prompt opened it already."""

    def __init__(self, content: CallParser, *, begun: bool) -> None:
        self._content = content
        self._state = "inside" if begun else "before"
        self._held = ""
        self._fresh = True  # nothing has left of the part that the text is in

    @property
    def begun(self) -> tuple[str, str] | None:
        return self._content.begun

    def push(self, text: str) -> list[Piece | Reasoning]:
        self._held += text
        pieces: list[Piece | Reasoning] = []
        if self._state == "before":
            start = self._held.lstrip()
            if start.startswith(OPEN):
                self._state, self._held = "inside", start.removeprefix(OPEN)
            elif not OPEN.startswith(start):
                self._state, self._fresh = "content", False
        if self._state == "inside":
            pieces += self._reasoning()
        if self._state == "content":
            self._held = self._held.lstrip() if self._fresh else self._held
            self._fresh = self._fresh and not self._held
            text, self._held = self._held, ""
            pieces += self._content.push(text) if text else []
        return pieces

    def finish(self, *, cut: bool) -> list[Piece | Reasoning]:
        """The rest: of reasoning that never ended, or of what only looked like its beginning."""
        held, self._held = self._held, ""
        if self._state == "inside":
            return self._given(held.rstrip())
        rest: list[Piece | Reasoning] = list(self._content.push(held)) if held else []
        return rest + list(self._content.finish(cut=cut))

    def _reasoning(self) -> list[Piece | Reasoning]:
        """What is certain of the reasoning; white space at its end may be the mark's."""
        self._held = self._held.lstrip() if self._fresh else self._held
        end = self._held.find(CLOSE)
        if end < 0:
            sure = len(self._held[: len(self._held) - overlap(self._held, CLOSE)].rstrip())
            text, self._held = self._held[:sure], self._held[sure:]
            return self._given(text)
        pieces = self._given(self._held[:end].rstrip())
        self._state, self._fresh, self._held = "content", True, self._held[end + len(CLOSE) :]
        return pieces

    def _given(self, text: str) -> list[Piece | Reasoning]:
        self._fresh = self._fresh and not text
        return [Reasoning(text)] if text else []
