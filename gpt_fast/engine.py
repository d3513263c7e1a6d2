"""The engine: add and abort requests, step. Token ids in, token events out; text belongs to llm.py.

Shapes: B rows (requests), S tokens of a row, V vocabulary.
"""

from __future__ import annotations

import itertools
import random
import time
from collections.abc import Iterable
from typing import Protocol

import torch
from torch import Tensor

from gpt_fast.cache import KVCache
from gpt_fast.config import SamplingParams
from gpt_fast.sampling import edit_logits, needs_edit, sample, sampling_tensors, uniform
from gpt_fast.scheduler import NO_TOKEN, Chunk, SampledToken, Scheduler, Sequence, StepPlan, TokenEvent


class Forward(Protocol):
    """A model's step: Transformer itself, compiled, or a fused twin. See Transformer.forward."""

    def __call__(
        self,
        tokens_BS: Tensor,
        positions_BS: Tensor,
        cache: KVCache,
        *,
        length: int,
        slots_B: Tensor | None = None,
        select_B: Tensor | None = None,
    ) -> Tensor: ...


def buckets(limit: int, smallest: int) -> list[int]:
    """smallest, doubled until it reaches limit, which ends the list."""
    sizes = []
    while smallest < limit:
        sizes.append(smallest)
        smallest *= 2
    return [*sizes, limit]


def bucket_of(sizes: list[int], value: int) -> int:
    return next(size for size in sizes if size >= value)


class Runner:
    """Executes step plans: pads to the fixed bucket shapes, calls the model, samples. Owns the KV cache.

    decode and prefill are forwards of the same model; they differ only in how they are compiled.
    """

    def __init__(
        self, *, decode: Forward, prefill: Forward, cache: KVCache, eos_ids: Iterable[int], prefill_chunk: int
    ) -> None:
        self.decode, self.prefill, self.cache = decode, prefill, cache
        self.eos_ids = sorted(eos_ids)
        self.device = cache.k_LNHTD.device
        self.rows = buckets(cache.slots, 1)
        self.chunks = buckets(prefill_chunk, 16)
        self.lengths = buckets(cache.max_seq_len, 128)

    @torch.inference_mode()
    def run(self, plan: StepPlan) -> dict[str, list[SampledToken]]:
        """Do what the plan says; the sampled tokens by request id."""
        for slot in plan.clears:
            self.cache.clear(slot)
        for copy in plan.copies:
            self.cache.copy_prefix(source=copy.source, target=copy.target, length=copy.length)
        sampled: dict[str, list[SampledToken]] = {}
        for chunk in plan.chunks:
            logits_BV = self._prefill(chunk)
            if chunk.last:
                sampled |= self._sample([chunk.sequence], logits_BV)
        if plan.decodes:
            sampled |= self._sample(list(plan.decodes), self._decode(plan.decodes))
        return sampled

    @torch.inference_mode()
    def warm_up(self) -> None:
        """Run every kind of step once, so that nothing compiles or allocates for a request.

        Two lengths and two sizes are enough for a compiler to learn that they vary. Rows that are slots 0, 1, ... take
        a path of their own (`slots_B` None), so every size runs both in and out of slot order.
        """
        last, ends = self.cache.slots - 1, (self.lengths[0], self.lengths[-1])
        for rows in self.rows:
            for slots, length in itertools.product((list(range(rows)), [last] * rows), ends):
                self._forward(self.decode, [[0]] * rows, [self.cache.scratch] * rows, slots, 1, length)
        for size in self.chunks:
            for slot, length in itertools.product((0, last), ends):
                self._forward(self.prefill, [[0]], [self.cache.scratch], [slot], size, length)

    def _prefill(self, chunk: Chunk) -> Tensor:
        sequence, count = chunk.sequence, chunk.count
        tokens = sequence.tokens(sequence.computed, sequence.computed + count)
        length = bucket_of(self.lengths, sequence.computed + count)
        size = bucket_of(self.chunks, count)
        return self._forward(self.prefill, [tokens], [sequence.computed], [sequence.slot], size, length)

    def _decode(self, sequences: Iterable[Sequence]) -> Tensor:
        rows = [([s.output[-1]], s.computed, s.slot) for s in sequences]
        tokens, starts, slots = (list(column) for column in zip(*rows, strict=True))
        length = bucket_of(self.lengths, max(starts) + 1)
        return self._forward(self.decode, tokens, starts, slots, 1, length)

    def _forward(
        self, forward: Forward, tokens: list[list[int]], starts: list[int], slots: list[int], size: int, length: int
    ) -> Tensor:
        """Logits [B, V] of each row's last token; rows start at their own position and are padded to one shape."""
        scratch, real = self.cache.scratch, len(tokens)
        pad = bucket_of(self.rows, real) - real
        tokens_BS = [row + [0] * (size - len(row)) for row in tokens] + [[0] * size] * pad
        positions_BS = [
            [min(start + i, scratch) if i < len(row) else scratch for i in range(size)]
            for row, start in zip(tokens, starts, strict=True)
        ] + [[scratch] * size] * pad
        select_B = [len(row) - 1 for row in tokens] + [0] * pad
        slots_B = slots + [slots[0]] * pad
        in_order = slots == list(range(real))
        logits_BV = forward(
            self._tensor(tokens_BS),
            self._tensor(positions_BS),
            self.cache,
            length=length,
            slots_B=None if in_order else self._tensor(slots_B),
            select_B=self._tensor(select_B),
        )
        return logits_BV[:real]

    def _tensor(self, values: list) -> Tensor:
        return torch.tensor(values, dtype=torch.int64, device=self.device)

    def _sample(self, sequences: list[Sequence], logits_BV: Tensor) -> dict[str, list[SampledToken]]:
        """One token a sequence, keyed to the position it will take."""
        edited_BV = logits_BV
        if any(needs_edit(s.params, len(s.output)) for s in sequences):
            rows = [
                edit_logits(row_V, s.params, prompt=s.prompt, output=s.output, eos_ids=self.eos_ids)
                if needs_edit(s.params, len(s.output))
                else row_V
                for s, row_V in zip(sequences, logits_BV, strict=True)
            ]
            edited_BV = torch.stack(rows)
        params = sampling_tensors([s.params for s in sequences], self.device)
        uniform_B = None
        if params is not None:
            uniform_B = uniform(self._tensor([s.seed for s in sequences]), self._tensor([s.length for s in sequences]))
        tokens = sample(edited_BV, params, uniform_B).tolist()
        return {
            s.id: [SampledToken(token, top_logprobs(logits_V, token, s.params.logprobs))]
            for s, token, logits_V in zip(sequences, tokens, logits_BV, strict=True)
        }


def top_logprobs(logits_V: Tensor, token: int, best: int | None) -> tuple[tuple[int, float], ...]:
    """The chosen token's log-probability and the `best` highest, of the model's own distribution; () for None."""
    if best is None or token == NO_TOKEN:
        return ()
    logprobs_V = logits_V.log_softmax(-1)
    values, ids = logprobs_V.topk(best)
    return ((token, float(logprobs_V[token])), *zip(ids.tolist(), values.tolist(), strict=True))


class EngineCore:
    """Continuous batching over one model. One thread owns it: add, abort and step are never called together."""

    def __init__(self, runner: Runner, *, reuse_prefix: bool = True) -> None:
        self.runner = runner
        self.scheduler = Scheduler(
            slots=runner.cache.slots,
            max_seq_len=runner.cache.max_seq_len,
            eos_ids=runner.eos_ids,
            reuse_prefix=reuse_prefix,
        )
        self.chunk_beside_decode = runner.chunks[0]
        self.decode_seconds = 0.0
        self.prefill_seconds_per_token = 0.0

    @property
    def max_seq_len(self) -> int:
        return self.scheduler.max_seq_len

    @property
    def idle(self) -> bool:
        return self.scheduler.idle

    def add(self, request_id: str, prompt: list[int], params: SamplingParams, *, owner: str = "") -> Sequence:
        """Queue a request.

        ValueError when the prompt does not fit a slot, a token is not in the vocabulary or the id is in use.
        """
        vocabulary = range(self.runner.cache.config.vocab_size)
        for key, tokens in (("prompt", prompt), ("logit_bias", params.logit_bias)):
            if (outside := next((t for t in tokens if t not in vocabulary), None)) is not None:
                raise ValueError(f"{key}: no such token (got {outside}, allowed 0..{vocabulary[-1]})")
        seed = random.getrandbits(63) if params.seed is None else params.seed
        sequence = Sequence(request_id, prompt, params, seed, owner)
        self.scheduler.add(sequence)
        return sequence

    def abort(self, request_id: str) -> bool:
        """Drop a request at once, wherever it is; False when it is unknown (it may just have ended)."""
        return self.scheduler.abort(request_id)

    def step(self) -> list[TokenEvent]:
        """Advance everything by one step; the tokens it produced."""
        plan = self.scheduler.schedule(chunk=self.runner.chunks[-1], chunk_beside_decode=self.chunk_beside_decode)
        if not plan:
            return []
        started = time.perf_counter()
        sampled = self.runner.run(plan)
        self._measure(plan, time.perf_counter() - started)
        return self.scheduler.commit(plan, sampled)

    def _measure(self, plan: StepPlan, seconds: float) -> None:
        """Size the chunk that runs beside decodes so that it costs about as much as the decodes themselves."""
        prompt_tokens = sum(chunk.count for chunk in plan.chunks)
        if plan.decodes and not prompt_tokens:
            self.decode_seconds = smooth(self.decode_seconds, seconds)
        elif prompt_tokens and not plan.decodes:
            self.prefill_seconds_per_token = smooth(self.prefill_seconds_per_token, seconds / prompt_tokens)
        if self.decode_seconds and self.prefill_seconds_per_token:
            affordable = self.decode_seconds / self.prefill_seconds_per_token
            fitting = [size for size in self.runner.chunks if size <= affordable]
            self.chunk_beside_decode = fitting[-1] if fitting else self.runner.chunks[0]


def smooth(average: float, value: float) -> float:
    """Exponential moving average over about eight values; the first value starts it."""
    return value if average == 0.0 else average + (value - average) / 8
