"""A batch's line: a request of OpenAI's batch files, or its body alone; and the line of its answer. No torch."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from gpt_fast.serve.body import MAX_BODY, RequestError, parse_json, short
from gpt_fast.serve.endpoints import ENDPOINTS
from gpt_fast.serve.response import dump

URLS = {f"/{path}": path for path in ENDPOINTS if path}
BARE = {"prompt": "v1/completions", "messages": "v1/chat/completions"}  # what a body alone is for, by a field of it
MAX_ID = 512  # characters
KNOWN = ("custom_id", "method", "url", "body")
NOT_HERE = {"stream": False, "timeout": None}  # fields that say when an answer comes, and the values that do not


class LineError(ValueError):
    """A line that is no request. code: as OpenAI's batches name the error."""

    def __init__(self, code: str, message: str, custom_id: str | None = None) -> None:
        super().__init__(message)
        self.code, self.custom_id = code, custom_id


@dataclass(frozen=True)
class Line:
    """A request: where it is posted and what."""

    custom_id: str
    path: str
    body: dict[str, Any]


@dataclass(frozen=True)
class Names:
    """What a line's answer is called: the same whenever it is made. input_sha256: of the file; number: from 1."""

    input_sha256: str
    number: int

    @property
    def stem(self) -> str:
        return hashlib.sha256(f"{self.input_sha256}/{self.number}".encode()).hexdigest()[:32]

    def seed(self, base: int) -> int:
        """For a request without one: another for each line and each base."""
        return int.from_bytes(hashlib.sha256(f"{base}/{self.number}".encode()).digest()[:6], "big")


def parse_line(text: str, number: int, defaults: Mapping[str, Any]) -> Line:
    """Read one line. defaults: fields of the bodies that do not have them. LineError."""
    fields = read_object(text)
    custom_id = fields.pop("custom_id", None)
    if custom_id is None:
        custom_id = f"line-{number}"
    if not isinstance(custom_id, str) or not 0 < len(custom_id) <= MAX_ID:
        got = f"got {short(custom_id)}, allowed a string of 1..{MAX_ID} characters"
        raise LineError("invalid_custom_id", f"custom_id: is no name ({got})")
    try:
        path, body = read_request(fields)
        body = {**defaults, **body}
        check_body(body)
    except LineError as error:
        error.custom_id = custom_id
        raise
    return Line(custom_id, path, body)


def read_object(text: str) -> dict[str, Any]:
    try:
        text.encode("utf-8")
        return parse_json(text)
    except UnicodeEncodeError:
        raise LineError("invalid_json_line", "not UTF-8 (allowed one JSON object a line)") from None
    except RequestError as error:
        raise LineError("invalid_json_line", error.message.removeprefix("body: ")) from None


def read_request(fields: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """Path and body of what a line holds beside its custom_id."""
    if "url" not in fields and "body" not in fields:
        for name, path in BARE.items():
            if name in fields:
                return path, fields
        raise LineError("invalid_line", "url and body are required, or prompt, or messages")
    for name in fields:
        if name not in KNOWN:
            raise LineError("invalid_line", f"{name[:60]}: unknown field (allowed {', '.join(KNOWN)})")
    method, url, body = fields.get("method", "POST"), fields.get("url"), fields.get("body")
    if method != "POST":
        raise LineError("invalid_method", f"method: not for a batch (got {short(method)}, allowed POST)")
    if not isinstance(url, str) or url not in URLS:
        raise LineError("invalid_url", f"url: not for a batch (got {short(url)}, allowed {', '.join(URLS)})")
    if not isinstance(body, dict):
        raise LineError("invalid_body", f"body: must be an object (got {short(body)})")
    return URLS[url], body


def check_body(body: Mapping[str, Any]) -> None:
    for name, allowed in NOT_HERE.items():
        if body.get(name) not in (None, allowed):
            raise LineError("invalid_body", f"{name}: not in a batch (got {short(body[name])}, leave it out)")


def answer_line(names: Names, custom_id: str, *, status: int, body: str) -> str:
    """The output's line of a request that was answered, or refused as a server does. body: JSON."""
    head = f'{{"id": "batch_req_{names.stem}", "custom_id": {dump(custom_id)}'
    response = f'{{"status_code": {status}, "request_id": "req_{names.stem}", "body": {body}}}'
    return f'{head}, "response": {response}, "error": null}}'


def error_line(names: Names, error: LineError) -> str:
    """The output's line of what is no request."""
    told = {
        "id": f"batch_req_{names.stem}",
        "custom_id": error.custom_id or f"line-{names.number}",
        "response": None,
        "error": {"code": error.code, "message": f"line {names.number}: {error}"},
    }
    return dump(told)


def failed(line: str) -> bool:
    """Whether an output's line tells of an error."""
    told = json.loads(line)
    return told["error"] is not None or told["response"]["status_code"] != 200


LONGEST = 2 * MAX_BODY  # bytes read of a line: what is longer is refused as too large
