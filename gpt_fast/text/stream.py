"""Bytes to text that may leave: incremental UTF-8, and stop strings held back until they cannot complete."""

from __future__ import annotations

import codecs


class TextStream:
    """The text of one answer, released as soon as nothing that follows can change it.

    Everything released, joined, is the answer's bytes decoded as a whole (errors="replace"), cut before the stop
    string that completes first (of those that complete at the same character, the longest): however the bytes were
    cut into tokens. Costs a few steps for each character and stop string, whatever their length.
    """

    def __init__(self, stop: tuple[str, ...] = ()) -> None:
        self.stop: str | None = None  # the stop string that ended the text
        self.decoded = 0  # characters decoded so far: where the next token's text begins, before any cut
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._matchers = [_Matcher(text) for text in stop]
        self._held = ""

    @property
    def stopped(self) -> bool:
        return self.stop is not None

    def push(self, token_bytes: bytes) -> str:
        """Take one token's bytes; the text that can leave now. Nothing leaves after a stop."""
        return self._release(self._decoder.decode(token_bytes))

    def finish(self) -> str:
        """The rest, at the end of the sequence: half a character is replaced, half a stop string is text."""
        text = self._release(self._decoder.decode(b"", final=True))
        rest, self._held = self._held, ""
        return text + rest

    def _release(self, text: str) -> str:
        if self.stopped:
            return ""
        self.decoded += len(text)
        if not self._matchers:
            return text
        begin = len(self._held)
        pending = self._held + text
        for end, char in enumerate(text, start=begin + 1):
            complete = [m.text for m in self._matchers if m.advance(char)]
            if complete:
                self.stop, self._held = max(complete, key=len), ""
                return pending[: end - len(self.stop)]
        cut = len(pending) - max((m.matched for m in self._matchers), default=0)
        self._held = pending[cut:]
        return pending[:cut]


class _Matcher:
    """How many characters of one stop string the text ends with, by Knuth, Morris and Pratt (1977)."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.matched = 0
        self._borders = borders(text)

    def advance(self, char: str) -> bool:
        """Take the next character; true when it completes the string, after which the matcher is spent."""
        while self.matched and self.text[self.matched] != char:
            self.matched = self._borders[self.matched - 1]
        if self.text[self.matched] == char:
            self.matched += 1
        return self.matched == len(self.text)


def borders(text: str) -> list[int]:
    """For each prefix of text, the length of its longest proper prefix that is also its suffix."""
    table, size = [0] * len(text), 0
    for index in range(1, len(text)):
        while size and text[index] != text[size]:
            size = table[size - 1]
        size += text[index] == text[size]
        table[index] = size
    return table
