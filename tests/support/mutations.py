"""Bytes near valid ones: what a fuzzer tries, as a Hypothesis strategy, so that a find shrinks to a small change."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from hypothesis import strategies as st

from support.paths import ROOT

CORPUS = ROOT / "tests" / "fuzz" / "corpus"
MOST_BYTES = 1 << 16
# What readers trip over: ends of ranges, long numbers, brackets, ends of lines, half of a character.
TELLING = [
    b"", b"\0", b"\xff" * 4, b"\xff" * 8, b"\x80\0\0\0\0\0\0\0", b"\0" * 8, b"\x7f", b"-1", b"0", b"1e999", b"9" * 50,
    b"NaN", b"null", b"true", b'"', b"'", b"{", b"}", b"[[[[", b":", b"=", b"#", b"\\", b"\\u", b"\\\n", b"\n", b"\r",
    b"\t", b"\xc3", b"\xed\xa0\x80", b"\xef\xbb\xbf", b"../", b"/", b"%s", b"&a", b"*a", b"<<: ", b"!!python/object:",
]  # fmt: skip


def corpus(name: str) -> list[bytes]:
    """The committed seeds of a target, and every find that has been made with it."""
    seeds = [path.read_bytes() for path in sorted((CORPUS / name).iterdir())]
    assert seeds, name
    return seeds


def files(*names: str) -> list[bytes]:
    return [(ROOT / Path(name)).read_bytes() for name in names]


@st.composite
def mutated(draw: st.DrawFn, seeds: Sequence[bytes]) -> bytes:
    """A seed with up to six changes: bytes put over it, in it or taken from it, pieces of the seeds moved about."""
    data = draw(st.sampled_from(seeds))
    for _ in range(draw(st.integers(0, 6))):
        at = draw(st.integers(0, len(data)))
        junk = draw(st.sampled_from(TELLING) | st.binary(min_size=1, max_size=8))
        match draw(st.sampled_from(["over", "in", "out", "copy", "cut", "flip"])):
            case "over":
                data = data[:at] + junk + data[at + len(junk) :]
            case "in":
                data = data[:at] + junk + data[at:]
            case "out":
                data = data[:at] + data[at + draw(st.integers(1, 64)) :]
            case "copy":
                other = draw(st.sampled_from(seeds))
                begin = draw(st.integers(0, len(other)))
                data = data[:at] + other[begin : begin + draw(st.integers(1, 200))] + data[at:]
            case "cut":
                data = data[:at]
            case "flip" if data:
                index = min(at, len(data) - 1)
                data = data[:index] + bytes([data[index] ^ 1 << draw(st.integers(0, 7))]) + data[index + 1 :]
    return data[:MOST_BYTES]
