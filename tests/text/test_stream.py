"""TextStream: what leaves is what a whole decode would give, cut at the first stop string, however tokens are cut."""

import itertools

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from gpt_fast.text.stream import TextStream, borders
from support.examples import examples
from support.work import bounded_lines

HARD_TEXT = "naïve e\u0301 👩‍👩‍👧‍👦 🏴󠁧󠁢󠁳󠁣󠁴󠁿 汉字かな \u200f\ufffd\x00\r\n"


def reference(data: bytes, stop: tuple[str, ...]) -> tuple[str, bool]:
    """The text to be released, from the whole decode: cut before the stop that ends first, the longest of those."""
    text = data.decode("utf-8", "replace")
    ends = [(text.index(s) + len(s), -len(s)) for s in stop if s in text]
    if not ends:
        return text, False
    end, minus_length = min(ends)
    return text[: end + minus_length], True


def released(chunks: list[bytes], stop: tuple[str, ...]) -> tuple[list[str], bool]:
    stream = TextStream(stop)
    texts = []
    for chunk in chunks:
        texts.append(stream.push(chunk))
        if stream.stopped:
            break
    return [*texts, stream.finish()], stream.stopped


def cut(data: bytes, at: list[int]) -> list[bytes]:
    marks = [0, *sorted(at), len(data)]
    return [data[a:b] for a, b in itertools.pairwise(marks)]


def cuts(data: bytes) -> st.SearchStrategy[list[bytes]]:
    return st.lists(st.integers(0, len(data)), max_size=12).map(lambda at: cut(data, at))


few_letters = st.text("ab", min_size=1, max_size=6)
texts = st.one_of(st.text(), st.text("ab🙂汉\ufffd", max_size=40))
raw_bytes = st.one_of(
    texts.map(str.encode),
    st.binary(max_size=40),
    # leads, continuations, surrogates and overlong forms: where decoders differ in how much they replace
    st.lists(st.sampled_from([b"\xf0", b"\x9f", b"\x99\x82", b"\xed\xa0", b"\xe0\x80", b"\xc0", b"a"])).map(b"".join),
)
stops = st.lists(st.one_of(few_letters, st.text("ab🙂汉\ufffd", min_size=1, max_size=5)), max_size=4).map(tuple)


@examples(1000)
@given(st.data())
def test_released_text_is_the_whole_decode_cut_at_the_first_stop(data):
    raw, stop = data.draw(raw_bytes), data.draw(stops)
    parts, stopped = released(data.draw(cuts(raw)), stop)
    assert ("".join(parts), stopped) == reference(raw, stop)
    for part in parts:
        part.encode("utf-8")  # each chunk is text by itself


@examples(500)
@given(st.data())
def test_overlapping_stops_over_two_letters(data):
    raw = data.draw(st.text("ab", max_size=60)).encode()
    stop = tuple(data.draw(st.lists(few_letters, min_size=1, max_size=4)))
    parts, stopped = released(data.draw(cuts(raw)), stop)
    assert ("".join(parts), stopped) == reference(raw, stop)
    assert not any(s in "".join(parts) for s in stop)


@given(st.text())
@example(HARD_TEXT)
def test_byte_by_byte_no_replacement_character_that_the_text_does_not_have(text):
    parts, _ = released([bytes([b]) for b in text.encode()], ())
    assert "".join(parts) == text


@examples(500)
@given(text=texts, stop=stops)
def test_as_much_leaves_as_can(text, stop):
    """Held back is only what may still become a stop string, and bytes that may still become a character."""
    stream, gone, known = TextStream(stop), "", ""
    for char in text:
        for byte in char.encode():
            gone += stream.push(bytes([byte]))
        if stream.stopped:
            return
        known += char
        begun = [s[:n] for s in stop for n in range(len(s)) if known.endswith(s[:n])]
        assert known == gone + max(begun, key=len, default="")


@pytest.mark.parametrize(
    ("chunks", "stop", "want"),
    [
        ([b"aa", b"ab"], ("aab",), "a"),  # a matcher that starts anew after a mismatch misses this one
        ([b"xab", b"c"], ("ab", "bc"), "x"),
        ([b"x", b"bc"], ("ab", "bc"), "x"),
        ([b"ab", b"cd"], ("abcd", "bc"), "a"),  # "bc" is complete first: the answer does not depend on the chunks
        ([b"abcd"], ("abcd", "bc"), "a"),
        ([b"xyz"], ("z", "yz"), "x"),  # both complete at once: neither may be left in the text
        ([b"\xe6\xb1", b"\x89!"], ("汉",), ""),
        ([b"a\xf0\x9f\x99", b"\x82b"], ("🙂b",), "a"),
        ([b"User", b": hi"], ("\nUser:",), "User: hi"),
        ([b"a\n", b"User", b"x"], ("\nUser:",), "a\nUserx"),
        ([b"a", b"\n\nUs"], ("\nUser:",), "a\n\nUs"),  # half a stop string at the end is text
        ([b"ok\xf0\x9f"], (), "ok\ufffd"),
    ],
)
def test_examples(chunks, stop, want):
    assert "".join(released(chunks, stop)[0]) == want


def test_text_before_a_stop_string_leaves_at_once():
    stream = TextStream(("END",))
    assert [stream.push(b) for b in (b"one E", b"N", b"V", b"END more")] == ["one ", "", "ENV", ""]
    assert stream.stopped
    assert stream.push(b"later") == stream.finish() == ""


def test_decoded_counts_the_characters_before_each_token():
    stream, offsets = TextStream(("zz",)), []
    for token in (b"ab", b"\xf0\x9f", b"\x99\x82", b"z", b"c"):
        offsets.append(stream.decoded)
        stream.push(token)
    assert offsets == [0, 2, 2, 3, 4]


@pytest.mark.slow
def test_a_long_hostile_text_with_long_stop_strings_is_fast():
    """A check of every suffix against every stop would compare 40 million times here."""
    stop = tuple("a" * (255 - n) + "b" + "a" * n for n in range(16))
    stream = TextStream(stop)
    with bounded_lines(20 * len(stop) * 10_000):
        text = "".join(stream.push(b"a") for _ in range(10_000)) + stream.finish()
    assert text == "a" * 10_000


@given(few_letters)
def test_borders_by_definition(text):
    for end, size in enumerate(borders(text), start=1):
        prefix = text[:end]
        assert size == max(n for n in range(end) if prefix.endswith(prefix[:n]))
