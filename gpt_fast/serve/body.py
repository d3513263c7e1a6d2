"""A request's body: strict JSON, one object, bounded in bytes and depth; and the error every refusal is made of."""

from __future__ import annotations

import json
import math
import re
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

MAX_BODY = 1 << 20  # bytes; TorchServe's own limit answers first where it is lower
MAX_DEPTH = 64  # lists and objects inside one another
MAX_DIGITS = 40
LONG, ZEROS = b"0" * (MAX_DIGITS + 1), bytes.maketrans(b"123456789", b"0" * 9)  # whether a text has such a number
SURROGATE = re.compile(r"\\u[dD][89a-fA-F]|[\ud800-\udfff]")  # half a character, or the escape of one
GZIP = b"\x1f\x8b"
REASONS = {
    400: "Bad Request",
    401: "Unauthorized",
    403: "Forbidden",
    404: "Not Found",
    405: "Method Not Allowed",
    408: "Request Timeout",
    413: "Content Too Large",
    429: "Too Many Requests",
    503: "Service Unavailable",
}


class RequestError(Exception):
    """A refused request: an HTTP status and OpenAI's error object. What the client sent is shown shortened."""

    def __init__(
        self,
        message: str,
        *,
        param: str | None = None,
        status: int = 400,
        code: str | None = None,
        headers: tuple[tuple[str, str], ...] = (),
    ) -> None:
        self.message, self.param = middle_cut(message, 600), middle_cut(param, 100) if param else None
        self.status, self.code, self.headers = status, code, headers
        super().__init__(self.message)

    @property
    def body(self) -> str:
        kind = "invalid_request_error" if self.status < 429 else "overloaded_error"
        error = {"message": self.message, "type": kind, "param": self.param, "code": self.code}
        return json.dumps({"error": error})


@contextmanager
def in_words_of(names: Mapping[str, str]) -> Iterator[None]:
    """Refusals name what the client sent. names: a path of ours, as `messages[1].content`, to the client's; what is
    below it goes along."""
    try:
        yield
    except RequestError as error:
        ours = error.param or ""
        path = max((name for name in names if is_below(ours, name)), key=len, default=None)
        if path is None:
            raise
        theirs, message = names[path] + ours.removeprefix(path), error.message
        if message.startswith(f"{ours}:"):
            message = theirs + message.removeprefix(ours)
        raise RequestError(message, param=theirs, status=error.status, code=error.code) from None


def is_below(path: str, name: str) -> bool:
    return path.startswith(name) and path[len(name) :][:1] in ("", ".", "[")


def parse_json(body: object) -> dict[str, Any]:
    """A request's body as TorchServe hands it over: bytes, or text or a dict where it decoded them itself."""
    if isinstance(body, bytes | bytearray):
        if len(body) > MAX_BODY:
            raise too_large(len(body))
        try:
            body = unpacked(bytes(body)).decode("utf-8-sig")  # a byte order mark says nothing more
        except UnicodeDecodeError:
            raise RequestError("body: not UTF-8 (allowed JSON in UTF-8, as it is or packed by gzip)") from None
    if body is None:  # TorchServe takes apart what says it is a form, as `curl -d` does
        raise RequestError("body: missing, or sent as a form (allowed JSON, with Content-Type: application/json)")
    value = decode_json(body) if isinstance(body, str) else body
    if not isinstance(value, dict):
        raise RequestError(f"body: must be a JSON object (got {json_kind(value)})")
    if isinstance(body, str) and not SURROGATE.search(body):
        check_depth(value)
    elif (size := check_values(value)) > MAX_BODY and value is body:
        raise too_large(size)
    return value


def unpacked(body: bytes) -> bytes:
    """The body without gzip, which its first bytes tell; nothing larger than a body may be is unpacked."""
    if not body.startswith(GZIP):
        return body
    stream = zlib.decompressobj(wbits=31)  # 31: gzip's own header
    try:
        text = stream.decompress(body, MAX_BODY + 1)
    except zlib.error:
        raise RequestError("body: not gzip, though it begins so (allowed JSON, as it is or packed by gzip)") from None
    if len(text) > MAX_BODY:
        raise RequestError(f"body: more than {MAX_BODY} bytes once unpacked (allowed {MAX_BODY})", status=413)
    if not stream.eof or stream.unused_data:
        raise RequestError("body: gzip that is cut short or goes on (allowed one whole stream)")
    return text


def decode_json(text: str) -> object:
    """Strict JSON: numbers are finite and no longer than any field needs, no key is there twice. It may hold what is no
    text, which only an escape can spell."""
    if len(text) > MAX_BODY:
        raise too_large(len(text))
    # A list of a hundred thousand token ids is read with Python's lock held: a call for each would take five times.
    long = LONG in text.encode("utf-8", "surrogatepass").translate(ZEROS)
    hooks: dict[str, Any] = {"parse_constant": refuse_constant, "parse_float": finite, "object_pairs_hook": unique_keys}
    try:
        return json.loads(text, parse_int=whole if long else None, **hooks)
    except RecursionError:
        raise RequestError(f"body: nested too deeply (allowed {MAX_DEPTH})") from None
    except json.JSONDecodeError as error:
        raise RequestError(f"body: not JSON at character {error.pos} (allowed one JSON object)") from None


def check_values(value: dict[str, Any]) -> int:
    """What JSON's grammar lets through, and TorchServe's own decoding: all text must be text, all numbers finite.

    Returns the bytes the value takes as JSON.
    """
    try:
        size = len(json.dumps(value, ensure_ascii=False, allow_nan=False).encode("utf-8"))
    except UnicodeEncodeError:
        raise RequestError("body: holds a lone surrogate, which is not text (allowed Unicode text)") from None
    except RecursionError:
        raise RequestError(f"body: nested too deeply (allowed {MAX_DEPTH})") from None
    except ValueError:
        raise RequestError("body: holds a number that is not finite (allowed finite numbers)") from None
    except TypeError:
        raise RequestError("body: holds a value that is not JSON (allowed one JSON object)") from None
    check_depth(value)
    return size


def check_depth(value: dict[str, Any]) -> None:
    level: list[Any] = [value]
    for _ in range(MAX_DEPTH):
        level = [child for each in level for child in inside(each) if isinstance(child, dict | list)]
    if level:
        raise RequestError(f"body: nested too deeply (allowed {MAX_DEPTH})")


def inside(container: dict[str, Any] | list[Any]) -> Any:
    return container.values() if isinstance(container, dict) else container


def too_large(size: int) -> RequestError:
    return RequestError(f"body: {size} bytes (allowed {MAX_BODY})", status=413)


def whole(digits: str) -> int:
    if len(digits) > MAX_DIGITS:
        raise RequestError(f"body: holds a number of {len(digits)} digits (allowed {MAX_DIGITS})")
    return int(digits)


def finite(digits: str) -> float:
    value = float(digits)
    if not math.isfinite(value):
        raise RequestError("body: holds a number that is not finite (allowed finite numbers)")
    return value


def refuse_constant(name: str) -> None:
    raise RequestError(f"body: {name} is not JSON (allowed finite numbers)")


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for name, value in pairs:
        if name in values:
            raise RequestError(f"body: the key {short(name)} is there twice (allowed once)")
        values[name] = value
    return values


# ------------------------------------------------------------------------------------------- for error messages


def expect(value: object, name: str, kind: type, allowed: str) -> None:
    """Raise unless the value is of this JSON type; a boolean is no number."""
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise RequestError(f"{name}: must be {allowed} (got {short(value)})", param=name)


def json_kind(value: object) -> str:
    """What JSON calls a value of this type."""
    names = {bool: "true or false", int: "a number", float: "a number", str: "a string", list: "an array"}
    return next((name for kind, name in names.items() if isinstance(value, kind)), "what is no JSON")


def short(value: object) -> str:
    """The value as an error message shows it."""
    text = json.dumps(value, default=str)
    return text if len(text) <= 60 else text[:57] + "..."


def middle_cut(text: str, limit: int) -> str:
    return text if len(text) <= limit else f"{text[: limit // 2]}...{text[-limit // 2 :]}"
