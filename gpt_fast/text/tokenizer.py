"""Text to token ids and back, by whichever library a checkpoint's vocabulary needs: one face and three rules.

- Text is text. `encode` makes no control token, whatever the text spells, unless it is asked to;
  `encode_with_specials` does, and is for rendered chat templates only.
- Text leaves as bytes. A token's bytes may end inside a character, so decoding UTF-8 is for whoever sees the stream.
- The first token's space. SentencePiece vocabularies write "Hello" as "▁Hello"; the space is dropped where a text
  begins and kept everywhere else. A `Detokenizer` carries that state, so its pushes concatenate to the decoded text.
Errors are TokenizerError: one line naming the file or field.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence

Span = tuple[int, int]


class PromptTooLong(ValueError):
    """A prompt of more characters than its model's tokens can hold: it has no need to be encoded to be refused."""

    def __init__(self, characters: int, allowed: int) -> None:
        self.characters, self.allowed = characters, allowed
        super().__init__(f"{characters} characters (allowed {allowed})")


class TokenizerError(ValueError):
    """A tokenizer that cannot be loaded or a text that cannot be encoded, in one line."""


class Tokenizer(ABC):
    """What the engine and the server use.

    vocab_size: one past the largest id. bos_id: None where the model has none. eos_ids: what ends an answer, as far
    as the tokenizer's own files say (a config.json may know more). control_tokens: the spellings that only a chat
    template may turn into ids; added_tokens: those that any text may. drops_leading_space: the rule of the first
    token's space holds here. characters_per_token: how many of a text one token can stand for at most; None: not
    known, as where a text is shortened before it is cut into tokens.
    """

    vocab_size: int
    bos_id: int | None
    eos_ids: frozenset[int]
    control_tokens: tuple[str, ...]
    added_tokens: tuple[str, ...] = ()
    drops_leading_space: bool
    characters_per_token: int | None = None

    def encode(self, text: str, *, add_bos: bool = True, specials: bool = False) -> list[int]:
        """Ids of a text. add_bos: begin as the model's own tokenizer does. specials: control tokens spelled in it are
        ids, as in transformers; else they are text."""
        return self._encode(check_text(text), specials=specials, add_bos=add_bos)

    def encode_with_specials(self, text: str, *, literal: Sequence[Span] = (), named: Sequence[str] = ()) -> list[int]:
        """Ids of a rendered chat template: control tokens become ids, nothing is added in front.

        literal: sorted, disjoint spans of the text that came from the user; a control token that touches one stays
        text. Such a token is encoded on its own, as transformers does with `sanitize_control_tokens`. named: of
        added_tokens, those that are handled alike.
        """
        ids: list[int] = []
        done = 0
        forged = list(forged_tokens(check_text(text), (*self.control_tokens, *named), literal))
        as_text = {part: self._encode_as_text(part) for part in {text[start:end] for start, end in forged}}
        for start, end in forged:
            ids += self._encode_from(done, text[done:start])
            ids += (
                as_text[text[start:end]]
                if start or text[:end] in named
                else self._encode(text[:end], specials=False, add_bos=False)
            )
            done = end
        return ids + self._encode_from(done, text[done:])

    def _encode_from(self, offset: int, part: str) -> list[int]:
        """Encode a part of a longer text, control tokens included."""
        return self._encode_inside(part, specials=True) if offset else self._encode(part, specials=True, add_bos=False)

    def _encode_as_text(self, token: str) -> list[int]:
        """An added token as text inside a longer one."""
        return self._encode_inside(token, specials=False)

    def _encode_inside(self, part: str, *, specials: bool) -> list[int]:
        """Encode a part past the beginning of a text: no space is put in front."""
        if part and self.drops_leading_space:
            newline = self._encode("\n", specials=specials, add_bos=False)
            ids = self._encode("\n" + part, specials=specials, add_bos=False)
            if ids[: len(newline)] == newline:
                return ids[len(newline) :]
        return self._encode(part, specials=specials, add_bos=False) if part else []

    def detokenizer(self, *, at_start: bool = False, keep_specials: bool = False) -> Detokenizer:
        """A fresh stream of bytes. at_start: it begins a text; else it goes on after a prompt."""
        return Detokenizer(self, at_start=at_start, keep_specials=keep_specials)

    def decode_bytes(self, ids: Iterable[int], *, keep_specials: bool = False) -> bytes:
        """The bytes of a whole text: what a detokenizer at its start would have pushed."""
        stream = self.detokenizer(at_start=True, keep_specials=keep_specials)
        return b"".join(stream.push(token_id) for token_id in ids)

    @abstractmethod
    def decode(self, ids: Iterable[int]) -> str:
        """The reference library's own text for the ids, without control tokens; ids outside the vocabulary: nothing."""

    @abstractmethod
    def token_bytes(self, token_id: int, *, keep_specials: bool = False) -> bytes:
        """One token's bytes inside a text. Nothing for an id without a token, and for a control token unless kept."""

    def first_bytes(self, token_id: int) -> bytes:
        """One token's bytes where a text begins."""
        piece = self.token_bytes(token_id)
        return piece.removeprefix(b" ") if self.drops_leading_space else piece

    def keeps_dropping(self, piece: bytes) -> bool:
        """Whether the text still begins after its first piece left `piece` of itself."""
        return False

    @abstractmethod
    def _encode(self, text: str, *, specials: bool, add_bos: bool) -> list[int]: ...


class Detokenizer:
    """Bytes of a growing token sequence; concatenated pushes are the text."""

    def __init__(self, tokenizer: Tokenizer, *, at_start: bool, keep_specials: bool) -> None:
        self.tokenizer = tokenizer
        self.at_start = at_start
        self.keep_specials = keep_specials

    def push(self, token_id: int) -> bytes:
        """The bytes this token adds; they may end inside a character."""
        inside = self.tokenizer.token_bytes(token_id)
        if not inside:
            return self.tokenizer.token_bytes(token_id, keep_specials=True) if self.keep_specials else b""
        if not self.at_start:
            return inside
        piece = self.tokenizer.first_bytes(token_id)
        self.at_start = self.tokenizer.keeps_dropping(piece)
        return piece


def check_text(text: str) -> str:
    """The text, if it is Unicode text: a lone surrogate has no UTF-8 and so no tokens."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise TokenizerError(f"text: lone surrogate at character {error.start}, allowed Unicode text") from None
    return text


def forged_tokens(text: str, control_tokens: Sequence[str], literal: Sequence[Span]) -> Iterator[Span]:
    """Control tokens (leftmost, longest first) that touch a literal span."""
    starts = [start for start, _ in literal]
    for match in control_pattern(control_tokens).finditer(text) if literal else ():
        before = bisect_left(starts, match.end()) - 1  # the last span that begins before the match ends
        if before >= 0 and literal[before][1] > match.start():
            yield match.span()


def control_pattern(control_tokens: Iterable[str]) -> re.Pattern[str]:
    """Matches any of the tokens, a longer one before a shorter one."""
    longest_first = sorted(filter(None, control_tokens), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)) or "(?!)")  # (?!) never matches
