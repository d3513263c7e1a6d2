"""Log-probabilities of given tokens, many rows at a time.

Shapes: B rows, S tokens of a row, C tokens of a chunk, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from gpt_fast.engine.runner import Runner, bucket_of, buckets
from gpt_fast.model.cache import KVCache
from gpt_fast.model.forward import Batch, Forward

TOKENS_PER_FORWARD = 1024  # bounds the logits held at once: rows * chunk * vocabulary


class Score(NamedTuple):
    """Of a row's last tokens: the sum of their log-probabilities, and whether each was the most likely one."""

    logprob: float
    greedy: bool


class Scorer:
    """A model's forward with a KV cache of its own, so that an engine over the same model is not disturbed.

    The model's rope table must reach the cache's max_seq_len (Transformer.setup_rope).
    """

    def __init__(self, forward: Forward, cache: KVCache) -> None:
        self.forward, self.cache, self.device = forward, cache, cache.k_LNHTD.device
        self.rows, self.max_seq_len = cache.slots, cache.max_seq_len
        self.lengths = buckets(cache.max_seq_len, 128)

    @classmethod
    def beside(cls, runner: Runner) -> Scorer:
        """Over the same model as this runner, which is not disturbed, and with a cache like its own."""
        return cls(runner.prefill, runner.cache.another())

    @torch.inference_mode()
    def logits(self, tokens: list[list[int]]) -> Iterator[tuple[int, Tensor]]:
        """(start, float32 logits [B, C, V]) of successive chunks; rows shorter than the longest are padded.

        At most `rows` rows of at most `max_seq_len` tokens each.
        """
        longest = max(map(len, tokens))
        chunk = max(1, TOKENS_PER_FORWARD // len(tokens))
        tokens_BS = torch.tensor([row + [0] * (longest - len(row)) for row in tokens], device=self.device)
        lengths_B = torch.tensor([len(row) for row in tokens], device=self.device)
        positions_S = torch.arange(longest, device=self.device)
        positions_BS = torch.where(positions_S < lengths_B[:, None], positions_S, self.cache.scratch)
        for start in range(0, longest, chunk):
            stop = min(start + chunk, longest)
            length = bucket_of(self.lengths, stop)
            part = slice(start, stop)
            yield start, self.forward(Batch(tokens_BS[:, part], positions_BS[:, part], self.cache, length))

    def score(
        self, rows: list[tuple[list[int], int]], *, done: Callable[[int], object] = lambda count: None
    ) -> list[Score]:
        """Score the last `count` tokens of each (tokens, count), count < len(tokens), longest rows first.

        Any number of rows; each of at most max_seq_len + 1 tokens, for the last one is only predicted. `done` is told
        how many rows each batch finished.
        """
        order = sorted(range(len(rows)), key=lambda i: -len(rows[i][0]))
        scores: list[Score] = [Score(0.0, True)] * len(rows)
        for first in range(0, len(order), self.rows):
            batch = order[first : first + self.rows]
            for index, score in zip(batch, self._score_batch([rows[i] for i in batch]), strict=True):
                scores[index] = score
            done(len(batch))
        return scores

    def _score_batch(self, rows: list[tuple[list[int], int]]) -> list[Score]:
        logprobs = [0.0] * len(rows)
        greedy = [True] * len(rows)
        for start, logits_BCV in self.logits([tokens[:-1] for tokens, _ in rows]):
            stop = start + logits_BCV.shape[1]
            for i, (tokens, count) in enumerate(rows):
                # The logits at position p predict token p + 1.
                begin, end = max(start, len(tokens) - 1 - count), min(stop, len(tokens) - 1)
                if begin < end:
                    logits_CV = logits_BCV[i, begin - start : end - start]
                    target_C = torch.tensor(tokens[begin + 1 : end + 1], device=self.device)
                    logprobs[i] += float(token_logprobs(logits_CV, target_C).double().sum())
                    greedy[i] &= bool((logits_CV.argmax(-1) == target_C).all())
        return [Score(logprob, flag) for logprob, flag in zip(logprobs, greedy, strict=True)]

    def continue_greedily(self, prompts: list[list[int]], count: int) -> list[list[int]]:
        """The `count` most likely next tokens of each prompt, one after another. Prompts of one length."""
        made = [[logits_BCV[:, -1].argmax(-1, keepdim=True) for _, logits_BCV in self.logits(prompts)][-1]]
        start = len(prompts[0])
        for position in range(start, start + count - 1):
            positions_B1 = torch.full_like(made[0], position)
            length = bucket_of(self.lengths, position + 1)
            with torch.inference_mode():
                logits_B1V = self.forward(Batch(made[-1], positions_B1, self.cache, length))
            made.append(logits_B1V[:, -1].argmax(-1, keepdim=True))
        return torch.cat(made, dim=1).tolist()


def token_logprobs(logits_CV: Tensor, target_C: Tensor) -> Tensor:
    return logits_CV.log_softmax(-1).gather(-1, target_C[:, None])[:, 0]
