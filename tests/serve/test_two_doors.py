"""Both doors answer alike: one corpus to TorchServe's rounds and to the ASGI door, over engines of the same weights.

Whole answers and refusals are compared byte for byte, streams frame by frame once neighbouring deltas are joined: how
much text a frame carries is a matter of time at either door. Ids and times are blanked. The same corpus also goes to a
real TorchServe and a real `gpt-fast serve`.
"""

from __future__ import annotations

import json
import re
import urllib.error
import urllib.request
import uuid
from collections.abc import Callable
from pathlib import Path

import pytest

from gpt_fast.serve.page.assets import chat_page
from gpt_fast.text.chat import ChatTemplate
from support.asgi_server import AsgiServer
from support.hard_strings import TRL, wheel_member
from support.paths import ROOT
from support.round_server import RoundServer
from support.serve_process import ServeProcess
from support.server import shared_server
from support.tiny_engine import tiny_engine

RECORDED = json.loads((Path(__file__).parent / "client_bodies.json").read_text(encoding="utf-8"))
HELLO = [{"role": "user", "content": "hello"}]
CHAT, COMPLETIONS, MESSAGES, RESPONSES = "/v1/chat/completions", "/v1/completions", "/v1/messages", "/v1/responses"
GOOD = [
    (COMPLETIONS, {"prompt": "a prompt", "max_tokens": 20}),
    (COMPLETIONS, {"prompt": ["a", "b"], "max_tokens": 5, "n": 2, "temperature": 1, "seed": 3, "logprobs": 2}),
    (COMPLETIONS, {"prompt": "a prompt", "max_tokens": 0, "echo": True, "logprobs": 1}),
    (COMPLETIONS, {"prompt": "a prompt", "max_tokens": 20, "stream": True, "stream_options": {"include_usage": True}}),
    (CHAT, {"messages": HELLO, "max_tokens": 20}),
    (CHAT, {"messages": HELLO, "max_tokens": 20, "n": 2, "temperature": 1, "seed": 4, "stream": True}),
    (CHAT, {"messages": HELLO, "max_tokens": 9, "logprobs": True, "top_logprobs": 3}),
    (MESSAGES, {"messages": HELLO, "max_tokens": 20}),
    (MESSAGES, {"messages": HELLO, "max_tokens": 20, "stream": True}),
    (RESPONSES, {"input": "hello", "max_output_tokens": 20}),
    (RESPONSES, {"input": "hello", "max_output_tokens": 20, "stream": True}),
    ("/v1/messages/count_tokens", {"messages": HELLO}),
    ("/tokenize", {"prompt": "hello", "return_token_strs": True}),
    ("/tokenize", {"messages": HELLO}),
    ("/detokenize", {"tokens": [104, 105]}),
    ("/v1/models", None),
    ("/v1/models/gpt-fast", None),
    ("/tokenizer_info", None),
    ("/chat", None),
    *((f"/{path}", None) for path in chat_page() if path.endswith(("/main.js", "/page.css"))),
]
BAD = [
    (COMPLETIONS, b"{"),
    (COMPLETIONS, b'{"prompt": NaN}'),
    (COMPLETIONS, b'{"prompt": "a", "prompt": "b"}'),
    (COMPLETIONS, b"\xff\xfe"),
    (COMPLETIONS, b"[]"),
    (COMPLETIONS, {"prompt": ""}),
    (COMPLETIONS, {"prompt": "x", "temperature": "hot"}),
    (COMPLETIONS, {"prompt": "x", "model": "other"}),
    (CHAT, {"messages": []}),
    (CHAT, {"messages": HELLO, "audio": {}}),
    (CHAT, {"messages": HELLO, "n": 99}),
    (MESSAGES, {"messages": HELLO}),
    (RESPONSES, {"input": 5}),
    ("/tokenize", {}),
    ("/v1/models/other", None),
    ("/v1/nothing", {}),
]
BAD_FOR_THE_TINY = [  # which has fewer tokens, of a byte each
    (COMPLETIONS, {"prompt": [1, 257]}),
    (COMPLETIONS, {"prompt": "x" * 20000}),
]
GROWS = {"text", "content", "delta", "arguments", "partial_json", "thinking", "reasoning", "reasoning_content"}

COUNTS = {"completion_tokens", "total_tokens"}  # of what has come so far


@pytest.fixture(scope="module")
def doors():
    """The addresses of both, TorchServe's first."""
    engines = [tiny_engine(slots=4, max_seq_len=8192) for _ in range(2)]
    for engine in engines:
        engine.chat_template = ChatTemplate(wheel_member(TRL, "trl/chat_templates/qwen2_5.jinja").decode())
    with RoundServer(engines[0]) as rounds, AsgiServer(engines[1]) as asgi:
        yield rounds.url, asgi.url


def ask(url: str, path: str, body: object) -> tuple[int, str, str]:
    """Status, content type and text."""
    data = json.dumps(body).encode() if isinstance(body, dict) else body
    headers = {"X-Request-ID": "one-id", "Content-Type": "application/json"}
    request = urllib.request.Request(url + path, data, headers=headers)
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, answer.headers["content-type"], answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.headers["content-type"], error.read().decode()


def blanked(text: str) -> str:
    """Without what differs from answer to answer."""
    text = re.sub(r'"(call|toolu|msg|fc|rs)_[0-9a-f]{24}"', r'"\1_"', text)
    return re.sub(r'"(created|created_at|sequence_number)": \d+', r'"\1": 0', text)


def uncached(text: str) -> str:
    """Also without what a cache held, which others have filled before."""
    return re.sub(r'"(cached_tokens|cache_read_input_tokens|input_tokens)": \d+', r'"\1": 0', blanked(text))


def told(text: str) -> list[object]:
    """A stream's frames, neighbouring deltas joined."""
    frames: list[object] = []
    parsed: list[list] = []
    for frame in text.split("\n\n"):
        event, _, data = frame.rpartition("data: ")
        parsed.append([event, json.loads(data) if data.startswith("{") else data])
    for value in sorted(parsed, key=choice_of):
        if frames and (both := joined(frames[-1], value)) is not None:
            frames[-1] = both
        else:
            frames.append(value)
    return frames


def choice_of(frame: list) -> int:
    """Choices stream beside each other; what is of none comes last, in its order."""
    choices = frame[1].get("choices") if isinstance(frame[1], dict) else None
    return choices[0]["index"] if choices else 99


def joined(one: object, other: object, key: str = "") -> object:
    """Two values as one whose growing text is that of both; None where they differ in more."""
    if isinstance(one, dict) and isinstance(other, dict) and one.keys() == other.keys():
        parts = {name: joined(one[name], other[name], name) for name in one}
        return None if any(parts[n] is None and not (one[n] is None and other[n] is None) for n in one) else parts
    if isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
        parts = [joined(a, b, key) for a, b in zip(one, other, strict=True)]
        return None if any(part is None for part in parts) else parts
    if (key == "finish_reason" and one is None) or key in COUNTS:
        return other
    if key in GROWS and isinstance(one, str) and isinstance(other, str):
        return one + other
    return one if one == other else None


def check(doors, path: str, body: object, *, blank: Callable[[str], str] = blanked) -> int:
    first, second = (ask(url, path, body) for url in doors)
    assert first[:2] == second[:2]
    if first[1].startswith("text/event-stream"):
        assert told(blank(first[2])) == told(blank(second[2]))
    else:
        assert blank(first[2]) == blank(second[2])
    return first[0]


@pytest.mark.parametrize(("path", "body"), GOOD)
def test_what_is_answered(doors, path, body):
    settings = {"temperature": 0} if path in (COMPLETIONS, CHAT, MESSAGES, RESPONSES) else {}
    assert check(doors, path, body if body is None else settings | body) == 200


@pytest.mark.parametrize(("path", "body"), [*BAD, *BAD_FOR_THE_TINY])
def test_what_is_refused(doors, path, body):
    assert check(doors, path, body) in (400, 404)


@pytest.mark.slow
@pytest.mark.parametrize("recorded", RECORDED, ids=lambda each: each["client"])
def test_what_clients_send(doors, recorded):
    few = {name: 24 for name in ("max_tokens", "max_completion_tokens") if name in recorded["body"]}
    assert check(doors, recorded["path"], recorded["body"] | few | {"seed": 1}) == 200


# ------------------------------------------------------------------------------------------- as users run them


@pytest.fixture(scope="module")
def real_doors(tmp_path_factory):
    """The addresses of a real TorchServe and a real `gpt-fast serve`, of one configuration."""
    server = shared_server()
    asgi = ServeProcess(tmp_path_factory.mktemp("asgi"), "--config", str(ROOT / "model_config.yaml"))
    try:
        yield f"{server.url}/1.0", asgi.ready().url
    finally:
        asgi.end()


def fresh(path: str, body: object) -> object:
    """The request greedy, and its prompt one that neither server's cache has seen: others have used TorchServe."""
    salt = uuid.uuid4().hex
    match body, path:
        case {"prompt": str(prompt)}, "/v1/completions":
            return body | {"prompt": salt + prompt}
        case {"prompt": [str(), *_] as prompts}, "/v1/completions":
            return body | {"prompt": [salt + prompt for prompt in prompts]}
        case {"messages": [*messages]}, "/v1/chat/completions":
            return body | {"messages": [{"role": "system", "content": salt}, *messages]}
        case dict(), "/v1/messages":
            return body | {"system": salt}
        case dict(), "/v1/responses":
            return body | {"instructions": salt}
    return body


@pytest.mark.server
@pytest.mark.model
def test_the_real_doors(real_doors):
    """One test for all of it: both servers are there once."""
    for path, body in GOOD:
        if path in (COMPLETIONS, CHAT, MESSAGES, RESPONSES):
            body = {"temperature": 0} | fresh(path, body)
        assert check(real_doors, path, body, blank=uncached) == 200, (path, body)
    for path, body in BAD:
        assert check(real_doors, path, body, blank=uncached) in (400, 404), (path, body)
    statuses = set()
    for recorded in RECORDED:
        few = {name: 12 for name in ("max_tokens", "max_completion_tokens") if name in recorded["body"]}
        body = recorded["body"] | few | {"temperature": 0}
        statuses.add(check(real_doors, recorded["path"], body, blank=uncached))
    assert statuses == {200, 400}  # the default model's chat template has no tools


def test_joining_finds_a_difference():
    assert told('data: {"text": "a"}\n\ndata: {"text": "b"}') == told('data: {"text": "ab"}')
    assert told('data: {"text": "a"}\n\ndata: {"text": "b", "x": 1}') != told('data: {"text": "ab"}')
