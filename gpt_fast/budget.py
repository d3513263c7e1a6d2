"""How many prompt tokens a step computes beside running streams, learned from how long they wait. Plain Python.

The promise: a stream's token comes at most twice as late as usual while a prompt prefills. What is usual is known by
the number of streams, from the steps without a prompt; every 32nd step beside a prompt is one of those, to stay true.
"""

from __future__ import annotations

TARGET = 1.8  # of the usual wait; the rest is for what a step takes longer than the one it was judged by
REFRESH = 32  # steps beside a prompt between two without


class ChunkBudget:
    """`learn` after each step, `tokens` before the next. sizes: chunks that cost what they hold, ascending.

    Chunks and decodes are separate forwards here, padded to `sizes`. Either reads every weight, so a chunk takes about
    as long as a decode even when it is small: it holds what the machine computes in that time, by its rate where no
    stream runs beside.
    """

    def __init__(self, sizes: list[int]) -> None:
        self.sizes = sizes
        self.usual: dict[int, float] = {}  # seconds from token to token, by the number of streams
        self.rate = 0.0  # tokens a second; 0: not known
        self.since = 0  # steps beside a prompt since the last without

    def learn(self, *, prompt_tokens: int, decodes: int, seconds: float) -> None:
        """seconds: from the last step's tokens to this one's, or of the step itself where no stream waited."""
        if not decodes:
            self._alone(prompt_tokens, seconds)
        elif prompt_tokens:
            self.since += 1
            self._beside(prompt_tokens, decodes, seconds)
        else:
            self.since = 0
            known = self.usual.get(decodes, seconds)
            self.usual[decodes] = known + (min(seconds, 2 * known) - known) / 4  # a hiccup must not decide

    def tokens(self, decodes: int) -> int:
        """Prompt tokens beside so many streams; 0 for a step that is to show what is usual."""
        usual = self.usual.get(decodes)
        if usual is None or self.since >= REFRESH:
            return 0
        return max((size for size in self.sizes if size <= self._affordable(usual, decodes)), default=self.sizes[0])

    def _affordable(self, usual: float, decodes: int) -> float:
        return (TARGET - 1) * usual * self.rate

    def _alone(self, prompt_tokens: int, seconds: float) -> None:
        share = min(1.0, prompt_tokens / self.sizes[-1]) if self.rate else 1.0  # a full chunk says what a short cannot
        self.rate += (prompt_tokens / seconds - self.rate) * share

    def _beside(self, prompt_tokens: int, decodes: int, seconds: float) -> None:
        """Separate forwards take what they take."""


class JoinedBudget(ChunkBudget):
    """Chunks and decodes are one forward, in which any number of tokens costs what it is.

    A forward of twice the tokens takes at most twice as long, so the rate of one that took less than the target, tokens
    of prompts and streams over seconds, is safe to go by for a longer one; from forward to forward it converges to
    the target without passing it, whatever part of the time is fixed and however attention grows with the context.
    """

    def __init__(self, largest: int) -> None:
        super().__init__(list(range(1, largest + 1)))

    def _affordable(self, usual: float, decodes: int) -> float:
        return TARGET * usual * self.rate - decodes

    def _alone(self, prompt_tokens: int, seconds: float) -> None:
        """Longer chunks at other contexts say little about short ones."""

    def _beside(self, prompt_tokens: int, decodes: int, seconds: float) -> None:
        usual, rate = self.usual.get(decodes), (decodes + prompt_tokens) / seconds
        if usual is None:
            return
        if seconds > TARGET * usual:
            self.rate = max(rate, self.rate / 2)  # at once, but a hiccup must not decide
        else:
            self.rate = max(self.rate, (self.rate + rate) / 2)
