"""The bytes that a token's spelling stands for: GPT-2's alphabet of bytes, and SentencePiece's marks."""

from __future__ import annotations

import re

SPACE = "▁"  # U+2581, how SentencePiece vocabularies spell a space


def byte_alphabet() -> dict[str, int]:
    """GPT-2's spelling of bytes as printable characters (openai/gpt-2, encoder.py): character -> byte."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = sorted(set(range(256)) - set(printable))
    return {chr(b): b for b in printable} | {chr(256 + n): b for n, b in enumerate(others)}


BYTE_OF = byte_alphabet()


def byte_level_bytes(token: str) -> bytes:
    """A byte-level BPE token's bytes. One with a foreign character is an added token, spelled as it is."""
    return bytes(BYTE_OF[c] for c in token) if all(c in BYTE_OF for c in token) else token.encode()


def sentencepiece_bytes(token: str) -> bytes:
    """A SentencePiece-type token's bytes: <0xAB> is one byte, ▁ a space."""
    byte = re.fullmatch(r"<0x([0-9A-Fa-f]{2})>", token)
    return bytes.fromhex(byte[1]) if byte else token.replace(SPACE, " ").encode()
