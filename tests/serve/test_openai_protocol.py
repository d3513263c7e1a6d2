"""Responses as OpenAI's own client reads them: its types validate them, its decoder splits the streams."""

import json
import math
from dataclasses import dataclass

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from openai._streaming import SSEDecoder
from openai.types import Completion, Model
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from gpt_fast.serve.response import JSON, SSE, ChatAnswer, CompletionAnswer, PlainAnswer, dump, model_card, model_list
from gpt_fast.text.stream import TextStream
from support.examples import examples

ANSWERS = {
    "chat": (ChatAnswer, ChatCompletion, ChatCompletionChunk),
    "completion": (CompletionAnswer, Completion, Completion),
}


@dataclass(frozen=True)
class Event:
    text: str
    token: int | None = 65
    finish_reason: str | None = None
    logprobs: tuple[tuple[int, float], ...] = ()
    prompt_logprobs: tuple[tuple[tuple[int, float], ...], ...] = ()
    stop: str | None = None
    cached_tokens: int = 0


def token_bytes(token):
    return bytes([token % 256])


def make(kind, *, stream, choices=1, n=1, include_usage=False, wants_logprobs=False, echo=""):
    return ANSWERS[kind][0](
        model="gpt-fast",
        stream=stream,
        prompt_tokens=7,
        choices=[echo] * choices,
        n=n,
        include_usage=include_usage,
        wants_logprobs=wants_logprobs,
        token_bytes=token_bytes,
    )


def feed(answer, rounds):
    """Push (choice, events) in order; everything that was sent."""
    return "".join([answer.push(index, events) for index, events in rounds] + [answer.end()])


def frames(sent):
    """The stream's data, by the decoder in OpenAI's client."""
    return [event.data for event in SSEDecoder().iter_bytes(iter([sent.encode()]))]


def chunks(kind, sent):
    *data, last = frames(sent)
    assert last == "[DONE]"
    return [chunk(kind, json.loads(each)) for each in data]


def chunk(kind, value):
    if kind == "chat":
        return ChatCompletionChunk.model_validate(value, strict=True)
    # Completion is also the type of a stream's chunks, and too narrow for them: OpenAI too sends null until the end.
    ended = [choice | {"finish_reason": choice["finish_reason"] or "stop"} for choice in value["choices"]]
    Completion.model_validate(value | {"choices": ended}, strict=True)
    return Completion.construct(**value)


def whole(kind, sent):
    return ANSWERS[kind][1].model_validate(json.loads(sent), strict=True)


def joined(kind, parts, index):
    """A choice of a stream: text, finish reasons, logprob rows."""
    mine = [choice for part in parts for choice in part.choices if choice.index == index]
    texts = [(c.delta.content if kind == "chat" else c.text) or "" for c in mine]
    rows = [c.logprobs for c in mine if c.logprobs]
    return "".join(texts), [c.finish_reason for c in mine if c.finish_reason], rows


def rows_of(kind, logprobs):
    """Logprob rows joined, as plain values."""
    logprobs = [each.model_dump() for each in logprobs]
    names = ["content"] if kind == "chat" else ["tokens", "token_logprobs", "top_logprobs", "text_offset"]
    return {name: [row for each in logprobs for row in each[name]] for name in names}


rates = st.floats(max_value=0.0, allow_nan=False)
lists_of_rates = st.lists(st.tuples(st.integers(0, 255), rates), min_size=1, max_size=3).map(tuple)


@st.composite
def answers(draw):
    """The events of 1..3 choices, each ended, cut into rounds and mixed."""
    count, with_logprobs = draw(st.integers(1, 3)), draw(st.booleans())
    rounds = []
    for index in range(count):
        size = draw(st.integers(0, 5))
        rows = draw(st.lists(lists_of_rates if with_logprobs else st.just(()), min_size=size, max_size=size))
        events = [Event(draw(st.text(max_size=4)), logprobs=row) for row in rows]
        token = draw(st.sampled_from([65, None]))  # None: cut short by its deadline
        logprobs = draw(lists_of_rates) if with_logprobs and token else ()
        events.append(Event(draw(st.text(max_size=4)), token, draw(st.sampled_from(["stop", "length"])), logprobs))
        cut = draw(st.integers(0, len(events) - 1))
        rounds.append([(index, each) for each in (events[:cut], events[cut:-1], events[-1:])])
    order = draw(st.permutations([index for index in range(count) for _ in range(3)]))
    return count, with_logprobs, [rounds[index].pop(0) for index in order]


@examples(500)
@given(kind=st.sampled_from(sorted(ANSWERS)), case=answers(), echo=st.sampled_from(["", "the prompt 🙂"]))
def test_a_stream_adds_up_to_the_whole_answer(kind, case, echo):
    count, with_logprobs, rounds = case
    echo = echo if kind == "completion" else ""
    options = {"choices": count, "wants_logprobs": with_logprobs, "echo": echo}
    answer = whole(kind, feed(make(kind, stream=False, **options), rounds))
    *parts, usage = chunks(kind, feed(make(kind, stream=True, include_usage=True, **options), rounds))
    assert usage.choices == [] and usage.usage == answer.usage and not any(part.usage for part in parts)
    assert answer.usage.completion_tokens == sum(e.token is not None for _, events in rounds for e in events)
    assert answer.usage.prompt_tokens == 7 and answer.usage.total_tokens == 7 + answer.usage.completion_tokens
    assert [choice.index for choice in answer.choices] == list(range(count))
    for index, choice in enumerate(answer.choices):
        text, reasons, logprobs = joined(kind, parts, index)
        assert text == (choice.message.content if kind == "chat" else choice.text)
        assert text == echo + "".join(e.text for at, events in rounds if at == index for e in events)
        assert reasons == [choice.finish_reason]
        assert bool(choice.logprobs) == with_logprobs
        assert not with_logprobs or rows_of(kind, logprobs) == rows_of(kind, [choice.logprobs])
    assert len({part.id for part in [*parts, usage]}) == 1


@examples(300)
@given(
    st.lists(st.binary(max_size=6) | st.text("ab🙂").map(str.encode), min_size=1, max_size=12),
    st.lists(st.text("ab🙂", min_size=1, max_size=3), max_size=2),
)
@example([b"\xf0\x9f", b"\x99\x82\xe2\x80", b"\xa8x\xc2\x85\r\n\ny"], [])
def test_from_token_bytes_to_the_client_streamed_or_not(tokens, stop):
    """One answer through TextStream and all three protocols: the same text, whole characters only, no stop string."""
    stream, events = TextStream(tuple(stop)), []
    for token in tokens:
        events.append(Event(stream.push(token)))
        if stream.stopped:
            break
    events.append(Event(stream.finish(), None, "stop" if stream.stopped else "length"))
    text = "".join(event.text for event in events)
    assert not any(s in text for s in stop)
    rounds = [(0, [event]) for event in events]
    assert feed(PlainAnswer(stream=True), rounds) == feed(PlainAnswer(stream=False), rounds) == text
    for kind in ANSWERS:
        answer = whole(kind, feed(make(kind, stream=False), rounds)).choices[0]
        assert (answer.message.content if kind == "chat" else answer.text) == text
        assert joined(kind, chunks(kind, feed(make(kind, stream=True), rounds)), 0)[0] == text


def test_a_chat_stream_begins_with_the_role_and_ends_with_the_reason():
    rounds = [(0, [Event("a")]), (1, [Event("")]), (0, []), (1, [Event("b"), Event("c")]), (1, [Event("", 2, "stop")]),
              (0, [Event("d", 2, "length")])]  # fmt: skip
    parts = chunks("chat", feed(make("chat", stream=True, choices=2), rounds))
    choices = [part.choices[0] for part in parts]
    seen = [(c.index, c.delta.model_dump(exclude_unset=True), c.finish_reason) for c in choices]
    role = {"role": "assistant", "content": ""}
    assert seen == [
        (0, role, None),
        (0, {"content": "a"}, None),
        (1, role, None),
        (1, {"content": "bc"}, None),
        (1, {}, "stop"),
        (0, {"content": "d"}, None),
        (0, {}, "length"),
    ]
    assert {part.object for part in parts} == {"chat.completion.chunk"}
    assert all(part.id.startswith("chatcmpl-") and part.model == "gpt-fast" for part in parts)
    assert all("usage" not in json.loads(data) for data in frames(feed(make("chat", stream=True), rounds[:1]))[:-1])


def test_names_of_the_objects():
    rounds = [(0, [Event("a", 65, "stop")])]
    chat, completion = (json.loads(feed(make(kind, stream=False), rounds)) for kind in ("chat", "completion"))
    assert (chat["object"], completion["object"]) == ("chat.completion", "text_completion")
    assert chat["id"].startswith("chatcmpl-") and completion["id"].startswith("cmpl-")
    assert chat["choices"][0]["message"] == {"role": "assistant", "content": "a", "refusal": None}
    assert json.loads(frames(feed(make("completion", stream=True), rounds))[0])["object"] == "text_completion"
    assert make("chat", stream=True).content_type == SSE and make("chat", stream=False).content_type == JSON


def test_usage_is_null_until_the_last_chunk():
    sent = feed(
        make("chat", stream=True, include_usage=True),
        [(0, [Event("a")]), (0, [Event("b", 66, "stop", cached_tokens=3)])],
    )
    *parts, usage, done = frames(sent)
    assert all(json.loads(part)["usage"] is None for part in parts) and done == "[DONE]"
    assert json.loads(usage)["choices"] == []
    assert json.loads(usage)["usage"] == {
        "prompt_tokens": 7, "completion_tokens": 2, "total_tokens": 9, "prompt_tokens_details": {"cached_tokens": 3},
    }  # fmt: skip


@pytest.mark.parametrize("kind", ANSWERS)
def test_cached_tokens_are_of_each_prompt_once(kind):
    """Its other choices find all of it in the cache, which says nothing of what earlier requests left there."""
    events = [(index, [Event("a", 65, "stop", cached_tokens=cached)]) for index, cached in enumerate((2, 3, 0, 3))]
    answer = whole(kind, feed(make(kind, stream=False, choices=4, n=2), events))
    assert answer.usage.prompt_tokens_details.cached_tokens == 2


def test_logprobs_of_a_chat():
    event = Event("A", 65, "stop", ((65, -0.5), (65, -0.5), (0xE6, -math.inf)))
    answer = whole("chat", feed(make("chat", stream=False, wants_logprobs=True), [(0, [event])]))
    row = answer.choices[0].logprobs.content[0]
    assert (row.token, row.logprob, row.bytes) == ("A", -0.5, [65])
    assert [(top.token, top.logprob, top.bytes) for top in row.top_logprobs] == [
        ("A", -0.5, [65]),
        ("\ufffd", -9999.0, [0xE6]),
    ]


def test_logprobs_of_a_completion_lie_behind_its_echo():
    events = [Event("", 65, None, ((65, -1.0), (66, -0.5))), Event("AB", 66, "stop", ((66, -0.25), (66, -0.25)))]
    answer = whole("completion", feed(make("completion", stream=False, wants_logprobs=True, echo="Q:"), [(0, events)]))
    assert answer.choices[0].text == "Q:AB"
    assert answer.choices[0].logprobs.model_dump() == {
        "tokens": ["A", "B"],
        "token_logprobs": [-1.0, -0.25],
        "top_logprobs": [{"A": -1.0, "B": -0.5}, {"B": -0.25}],
        "text_offset": [2, 2],
    }


def test_completion_logprobs_keep_parts_of_characters_apart():
    event = Event("", token=0xE6, logprobs=((0xE6, -1.0), (0xE6, -1.0), (0xE7, -2.0)))
    events = [event, Event("x", 65, "stop")]
    answer = json.loads(feed(make("completion", stream=False, wants_logprobs=True), [(0, events)]))
    logprobs = answer["choices"][0]["logprobs"]
    assert logprobs["tokens"] == ["bytes:\\xe6"]
    assert logprobs["top_logprobs"] == [{"bytes:\\xe6": -1.0, "bytes:\\xe7": -2.0}]


@pytest.mark.parametrize("kind", sorted(ANSWERS))
def test_a_failure_is_an_error_event_and_never_looks_complete(kind):
    rounds = [(0, [Event("a")]), (1, [Event("b", -1, "error")]), (0, [Event("", 2, "stop")])]
    sent = feed(make(kind, stream=True, choices=2, include_usage=True), rounds)
    assert json.loads(frames(sent)[-1])["error"]["type"] == "server_error"
    assert "[DONE]" not in sent
    answer = json.loads(feed(make(kind, stream=False, choices=2), rounds))
    assert answer["error"]["type"] == "server_error"
    assert [choice["finish_reason"] for choice in answer["choices"]] == ["stop", "error"]


@given(st.text())
@example("a\u2028b\u2029c\x85d\r\n\x0b\x0c\x1c\x1d\x1e")
def test_json_is_one_line_however_a_client_splits_lines(text):
    line = dump({"text": text})
    assert line.splitlines() == [line]
    assert json.loads(line) == {"text": text}


def test_json_is_strict():
    with pytest.raises(ValueError):
        dump({"logprob": math.nan})


def test_models():
    listed = json.loads(model_list(["gpt-fast"], created=5, max_seq_len=64))
    assert listed["object"] == "list" and listed["data"] == [model_card("gpt-fast", created=5, max_seq_len=64)]
    assert Model.model_validate(listed["data"][0], strict=True).id == "gpt-fast"
