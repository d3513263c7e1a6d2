"""Log-probabilities of a prompt's tokens: OpenAI's `echo` with `logprobs`, vLLM's `prompt_logprobs`. No torch here."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, repeat
from typing import Any

from gpt_fast.request import Logprobs
from gpt_fast.serve.body import RequestError
from gpt_fast.text.stream import TextStream
from gpt_fast.text.tokenizer import Tokenizer

MAX_ENTRIES = 1 << 17  # of one answer: some ten MB of JSON
UNKNOWN: Logprobs = ()  # of a prompt's first token, and of those that a deadline cut off


@dataclass(frozen=True)
class PromptLogprobs:
    """What an answer tells of its prompts' tokens.

    ids: of each choice's prompt; offsets: where in the echoed text each token's text begins.
    echoed: alternatives beside each echoed token, listed: in vLLM's list of all; None where that was not asked for.
    name: a token as text.
    """

    ids: Sequence[Sequence[int]]
    offsets: Sequence[Sequence[int]]
    echoed: int | None
    listed: int | None
    name: Callable[[int], str]

    @classmethod
    def of(
        cls,
        tokenizer: Tokenizer,
        ids: Sequence[Sequence[int]],
        *,
        texts: Sequence[str],
        echoed: int | None,
        listed: int | None,
    ) -> PromptLogprobs:
        """texts: what is echoed of each."""

        def name(token: int) -> str:
            return token_name(tokenizer.token_bytes(token, keep_specials=True))

        offsets = [] if echoed is None else [text_offsets(tokenizer, *each) for each in zip(ids, texts, strict=True)]
        return cls(ids, offsets, echoed, listed, name)

    def echo(self, index: int, rows: Sequence[Logprobs]) -> list[tuple[int, Logprobs, int]]:
        """(token, its log-probabilities, offset) of a choice's echoed tokens."""
        if self.echoed is None:
            return []
        found = self._rows(index, rows, self.echoed)
        return [(token, row, offset) for (token, row), offset in zip(found, self.offsets[index], strict=True)]

    def listing(self, index: int, rows: Sequence[Logprobs]) -> dict[str, Any]:
        """vLLM's `prompt_logprobs`: an object of token ids for each token. rank: None beyond those asked for."""
        if self.listed is None:
            return {}
        found = self._rows(index, rows, self.listed)
        return {"prompt_logprobs": [entries(row, self.name) if row else None for _, row in found]}

    def _rows(self, index: int, rows: Sequence[Logprobs], best: int) -> Iterator[tuple[int, Logprobs]]:
        for token, row in zip(self.ids[index], chain([UNKNOWN], rows, repeat(UNKNOWN)), strict=False):
            yield token, row[: 1 + best]


def entries(row: Logprobs, name: Callable[[int], str]) -> dict[str, Any]:
    ranks = {token: rank for rank, (token, _) in enumerate(row[1:], start=1)}
    return {
        str(token): {"logprob": logprob, "rank": ranks.get(token), "decoded_token": name(token)}
        for token, logprob in row
    }


def text_offsets(tokenizer: Tokenizer, tokens: Sequence[int], text: str) -> list[int]:
    """Where in their text each token's own begins, in characters; a part of a character begins where that does.

    What the tokenizer put before the text (BOS) is no part of it.
    """
    detokenizer, stream, offsets = tokenizer.detokenizer(at_start=True, keep_specials=True), TextStream(), []
    for token in tokens:
        offsets.append(stream.decoded)
        stream.push(detokenizer.push(token))
    before = (
        stream.decoded - len(text) if tokenizer.decode_bytes(tokens, keep_specials=True).endswith(text.encode()) else 0
    )
    return [max(offset - before, 0) for offset in offsets]


def check_entries(prompts: Sequence[Sequence[int]], best: int, param: str) -> None:
    """best: alternatives beside each token. RequestError where they are too many for one answer."""
    count = sum(map(len, prompts)) * (1 + best)
    if count > MAX_ENTRIES:
        message = f"{param}: {count} log-probabilities of prompts' tokens (allowed {MAX_ENTRIES}: send fewer prompts)"
        raise RequestError(message, param=param)


def token_name(data: bytes) -> str:
    """A token's text; of a part of a character its bytes, as OpenAI writes them: tokens are told by name."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)
