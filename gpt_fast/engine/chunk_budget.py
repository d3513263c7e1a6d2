"""How many prompt tokens a step computes beside running streams, learned from how long they wait. Plain Python.

The promise: a stream's token comes at most twice as late as usual while a prompt prefills. The usual wait is learned
for each number of streams, from decode-only steps that follow another decode-only step (the first one after a prefill
is slower, for nothing overlapped with it).
"""

from __future__ import annotations

from bisect import bisect_right

TARGET = 1.8  # of the usual wait; the rest is for what a step takes longer than the one it was predicted from


class ChunkBudget:
    """`learn` after each step, `tokens` before the next. sizes: chunks that cost what they hold, ascending.

    Chunks and decodes are separate forwards here, padded to `sizes`. Even a small chunk reads every weight and launches
    every operator: it holds what the machine computes in that time, by its rate where no stream runs beside.
    """

    def __init__(self, sizes: list[int]) -> None:
        self.sizes = sizes
        self.usual: dict[int, float] = {}  # seconds from token to token, by the number of streams
        self.rate = 0.0  # tokens a second; 0: not known
        self.fixed = 0.0  # seconds that a chunk takes beyond what its tokens do
        self.beside = False  # the last step computed prompt tokens beside streams

    def learn(self, *, prompt_tokens: int, decodes: int, seconds: float) -> None:
        """seconds: from the last step's tokens to this one's, or of the step itself where no stream waited."""
        if not decodes:
            self._alone(prompt_tokens, seconds)
        elif prompt_tokens:
            self._beside(prompt_tokens, decodes, seconds)
        elif not self.beside or decodes not in self.usual:
            self.usual[decodes] = smooth(self.usual.get(decodes, 0.0), seconds)
        self.beside = prompt_tokens > 0 and decodes > 0

    def tokens(self, decodes: int) -> int:
        """Prompt tokens beside so many streams; 0 for a step that is to show what is usual."""
        usual = self.usual.get(decodes)
        if usual is None:
            return 0
        fitting = bisect_right(self.sizes, self._affordable(usual, decodes))
        return self.sizes[max(fitting - 1, 0)]

    def _affordable(self, usual: float, decodes: int) -> float:
        return max((TARGET - 1) * usual, self.fixed) * self.rate

    def _alone(self, prompt_tokens: int, seconds: float) -> None:
        share = min(1.0, prompt_tokens / self.sizes[-1]) if self.rate else 1.0  # a full chunk says what a short cannot
        self.rate += (prompt_tokens / seconds - self.rate) * share

    def _beside(self, prompt_tokens: int, decodes: int, seconds: float) -> None:
        usual = self.usual.get(decodes)
        if usual and self.rate:
            self.fixed = smooth(self.fixed, max(0.0, seconds - usual - prompt_tokens / self.rate))


class JoinedBudget(ChunkBudget):
    """Chunks and decodes are one forward, in which any number of tokens costs what it is.

    A forward of twice the tokens takes at most twice as long, so what a token of prompt or stream took in one below
    the target bounds what more of them take: the steps grow to the target and stop there, whatever part of their time
    is fixed and however attention grows with the context. Where already the fixed part is too much (a long context
    is read whole for any token), prompts still advance by LEAST, of which the last costs next to nothing.
    """

    LEAST = 2

    def __init__(self, sizes: list[int]) -> None:
        """sizes: as of ChunkBudget, of which only the largest matters."""
        super().__init__(list(range(min(self.LEAST, sizes[-1]), sizes[-1] + 1)))
        self.cost = 0.0  # seconds a token; 0: not known

    def _affordable(self, usual: float, decodes: int) -> float:
        return TARGET * usual / self.cost - decodes if self.cost else 0.0

    def _alone(self, prompt_tokens: int, seconds: float) -> None:
        """Chunks without a stream are far longer, which says little about short ones."""

    def _beside(self, prompt_tokens: int, decodes: int, seconds: float) -> None:
        usual, cost = self.usual.get(decodes, 0.0), seconds / (decodes + prompt_tokens)
        if seconds > TARGET * usual:
            self.cost = smooth(self.cost, cost, weight=0.5)  # a context grows
        elif not self.cost or cost < self.cost:  # else only too short a chunk to tell
            self.cost = smooth(self.cost, cost)


def smooth(average: float, value: float, *, weight: float = 0.25) -> float:
    """Exponential moving average; an outlier counts as at most twice the average. average 0 means no value yet."""
    return average + (min(value, 2 * average) - average) * weight if average else value
