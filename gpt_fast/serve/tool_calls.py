"""An answer's text to content and tool calls, however it is cut into chunks. No torch here.

A call counts only when it is complete, strict JSON and names a tool of the request; everything else is content. Before
it is complete, a stream may tell of one that has begun: its name, and its arguments so far.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Protocol

from gpt_fast.serve.body import RequestError, check_values, decode_json
from gpt_fast.text.chat import ToolFormat


@dataclass(frozen=True)
class ToolCall:
    """arguments: a JSON object, as text."""

    name: str
    arguments: str


Piece = str | ToolCall  # content, or a call


class CallParser(Protocol):
    """One answer's way to content and calls. The joined pieces are the same for every cutting of the text."""

    @property
    def begun(self) -> tuple[str, str] | None:
        """The call that the text is in: its name, and its arguments as far as they go. A later ToolCall goes on from
        there, unless its text turns out to be content."""

    def push(self, text: str) -> list[Piece]:
        """Take text; what is certain now."""

    def finish(self, *, cut: bool) -> list[Piece]:
        """The rest, at the end of the answer. cut: it ended at a limit: a call that has begun counts as it is."""


def call_parser(form: ToolFormat, names: Iterable[str]) -> CallParser:
    """names: the tools of the request."""
    return MarkedCalls(form, frozenset(names)) if form.before else BareCalls(form, frozenset(names))


class TextOnly:
    """An answer without calls."""

    begun = None

    def push(self, text: str) -> list[Piece]:
        return [text] if text else []

    def finish(self, *, cut: bool) -> list[Piece]:
        return []


class CallProgress:
    """A call's text as it grows: the name, where the arguments begin and, once they are closed, where they end."""

    def __init__(self, form: ToolFormat, names: frozenset[str]) -> None:
        self._header = re.compile(
            rf'\s*\{{\s*"name"\s*:\s*("(?:[^"\\]|\\.)*")\s*,\s*"{form.arguments_key}"\s*:\s*(?=\{{)'
        )
        self._names = names
        self._text = ""
        self._start = self._at = 0
        self._depth, self._in_string, self._escaped = 0, False, False
        self.name: str | None = None
        self.closed = False

    @property
    def begun(self) -> tuple[str, str] | None:
        return None if self.name is None else (self.name, self._text[self._start : self._at])

    def feed(self, text: str) -> None:
        self._text += text
        if self.name is None and (header := self._header.match(self._text)):
            name = json.loads(header[1], strict=False)
            if name in self._names:
                self.name, self._start, self._at = name, header.end(), header.end()
        if self.name is not None:
            self._scan()

    def grown_to(self, text: str) -> None:
        """Feed what a text has more than what was fed."""
        self.feed(text[len(self._text) :])

    def _scan(self) -> None:
        """Walk to the end of the arguments, or of the text."""
        while not self.closed and self._at < len(self._text):
            char = self._text[self._at]
            self._at += 1
            if self._in_string:
                self._in_string = self._escaped or char != '"'
                self._escaped = char == "\\" and not self._escaped
            elif char == '"':
                self._in_string = True
            else:
                self._depth += (char in "{[") - (char in "}]")
                self.closed = self._depth == 0


class MarkedCalls:
    """Calls between marks, anywhere in the text. White space before and after a call is no content."""

    def __init__(self, form: ToolFormat, names: frozenset[str]) -> None:
        self.form, self.names = form, names
        self._held = ""  # white space, and behind it what may become a call
        self._tried = 0  # where in it to look for an end mark: those before stand in a string of the call
        self._last: Piece = ""
        self._progress = CallProgress(form, names)

    @property
    def begun(self) -> tuple[str, str] | None:
        return self._progress.begun

    def push(self, text: str) -> list[Piece]:
        self._held += text
        pieces: list[Piece] = []
        while (start := self._held.find(self.form.before)) >= 0:
            begin = start + len(self.form.before)
            end = self._held.find(self.form.after, max(begin, self._tried))
            if end < 0:
                break
            body = self._held[begin:end]
            call = read_call(body, self.form, self.names)
            if call is None and ends_in_string(body):
                self._tried = end + len(self.form.after)
                continue
            if call:
                pieces += [self._held[:start].rstrip(), call]
                begin = end + len(self.form.after)
            else:  # the mark is text, and what follows it may still hold a call
                pieces.append(self._held[:begin])
            self._keep(begin)
            self._progress = CallProgress(self.form, self.names)
        if start >= 0:
            self._progress.grown_to(self._held[begin:])
        sure = start if start >= 0 else len(self._held) - overlap(self._held, self.form.before)
        sure = len(self._held[:sure].rstrip())
        pieces.append(self._held[:sure])
        self._keep(sure, tried=self._tried - sure)
        return self._given(pieces)

    def finish(self, *, cut: bool) -> list[Piece]:
        """A last call may lack its end mark: some models stop instead."""
        pieces: list[Piece] = []
        if cut and self.begun is not None:
            self._held, pieces = "", [self._held[: self._held.find(self.form.before)].rstrip(), ToolCall(*self.begun)]
        while (begin := self._held.find(self.form.before) + len(self.form.before)) >= len(self.form.before):
            call = read_call(self._held[begin:], self.form, self.names)
            pieces.append(call or self._held[:begin])
            self._keep(len(self._held) if call else begin)
            if not call:  # a string that never ended hid the end marks behind it
                pieces += self.push("")
        last = pieces[-1] if pieces else self._last
        pieces.append("" if self._held.isspace() and isinstance(last, ToolCall) else self._held)
        self._held = ""
        return self._given(pieces)

    def _keep(self, start: int, *, tried: int = 0) -> None:
        self._held, self._tried = self._held[start:], max(0, tried)

    def _given(self, pieces: list[Piece]) -> list[Piece]:
        pieces = [piece for piece in pieces if piece]
        self._last = pieces[-1] if pieces else self._last
        return pieces


class BareCalls:
    """Calls that are the whole answer: one object, or several with semicolons between. Other answers are content."""

    def __init__(self, form: ToolFormat, names: frozenset[str]) -> None:
        self.form, self.names = form, names
        self._held = ""
        self._is_text = False
        self._progress = CallProgress(form, names)

    @property
    def begun(self) -> tuple[str, str] | None:
        return None if self._is_text else self._progress.begun

    def push(self, text: str) -> list[Piece]:
        self._held += text
        self._is_text = self._is_text or self._held.lstrip()[:1] not in ("", "{")
        self._progress.feed("" if self._is_text else text)
        return self._release() if self._is_text else []

    def finish(self, *, cut: bool) -> list[Piece]:
        calls = [read_call(part, self.form, self.names) for part in objects(self._held)]
        found: list[Piece] = [call for call in calls if call]
        if found and len(found) == len(calls):
            return found
        return [ToolCall(*self.begun)] if cut and self.begun is not None and not found else self._release()

    def _release(self) -> list[Piece]:
        text, self._held = self._held, ""
        return [text] if text else []


def read_call(text: str, form: ToolFormat, names: frozenset[str]) -> ToolCall | None:
    """The call that a text spells; None where it is none."""
    try:
        value: Any = decode_json(text)
        check_values({"call": value})
    except RequestError:
        return None
    arguments = value.get(form.arguments_key) if isinstance(value, dict) else None
    if not isinstance(arguments, dict) or not isinstance(value.get("name"), str) or value["name"] not in names:
        return None
    progress = CallProgress(form, names)
    progress.feed(text)  # as the model wrote them, where they come last; a stream told them so
    name, written = progress.begun or (value["name"], json.dumps(arguments, ensure_ascii=False))
    return ToolCall(name, written)


def ends_in_string(text: str) -> bool:
    """Whether a text is the beginning of JSON that breaks off inside a string."""
    try:
        json.JSONDecoder().raw_decode(text.lstrip())
    except json.JSONDecodeError as error:
        return error.msg.startswith("Unterminated string")
    except RecursionError:
        pass
    return False


def objects(text: str) -> list[str]:
    """The JSON values that a text is made of, as text; a rest that is none comes last."""
    parts = []
    while text := text.lstrip(" \t\r\n;"):
        try:
            _, end = json.JSONDecoder().raw_decode(text)
        except (ValueError, RecursionError):
            end = len(text)
        parts.append(text[:end])
        text = text[end:]
    return parts


def overlap(text: str, mark: str) -> int:
    """How many characters at the end of the text the mark may begin with."""
    return next((size for size in range(min(len(mark) - 1, len(text)), 0, -1) if mark.startswith(text[-size:])), 0)
