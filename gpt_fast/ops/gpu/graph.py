"""Whole decode steps without the host: tokens, positions and stop checks stay on the device, several steps a replay.

Shapes: B rows, N steps of a replay, E end-of-sequence ids. State and stop checks: state.py; readback: ring.py.

The host only launches replays and reads, one replay late, what they wrote: no step waits for it. After Hugging Face's
asynchronous batching (transformers #43960) and vLLM's asynchronous scheduling (#32951): run on, drop what was too much.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

import torch

from gpt_fast.ops.gpu.capture import Captured
from gpt_fast.ops.gpu.decoder import GpuDecoder
from gpt_fast.ops.gpu.linear import MAX_TOKENS
from gpt_fast.ops.gpu.ring import Ring
from gpt_fast.ops.gpu.state import ENDED, Row, State, advance
from gpt_fast.sampling import uniform

if TYPE_CHECKING:
    from gpt_fast.cache import KVCache


class DecodeLoop:
    """Decodes up to `rows` sequences of one cache, `steps` tokens a replay. One run at a time.

    After a run: `host_seconds`, what this thread did for it (waiting not counted), and `tokens`, what came of it.
    """

    def __init__(
        self, decoder: GpuDecoder, cache: KVCache, *, rows: int, steps: int, eos_ids: Iterable[int],
        ring: Ring | None = None,
    ) -> None:  # fmt: skip
        device = decoder.device
        self.decoder, self.cache, self.steps = decoder, cache, steps
        self.state = State.empty(rows, device)
        self.eos_E = torch.tensor(sorted(eos_ids), dtype=torch.int64, device=device)
        self.sampled_B = torch.zeros(rows, dtype=torch.int64, device=device)
        self.uniform_NB = torch.zeros(steps, rows, dtype=torch.float64, device=device)
        self.out_NB = torch.zeros(steps, rows, dtype=torch.int64, device=device)
        self.ring = ring or Ring((steps, rows), pinned=device.type == "cuda")
        self.graphs: dict[tuple[int, bool], Captured] = {}
        self.host_seconds, self.tokens = 0.0, 0

    @torch.inference_mode()
    def warm_up(self) -> None:
        """Capture every replay there can be."""
        self.state.load([], self.cache.scratch)
        for reach in self.decoder.reaches(len(self.sampled_B), self.cache.max_seq_len):
            for greedy in (True, False):
                self.graph(reach, greedy)

    @torch.inference_mode()
    def run(self, rows: Sequence[Row]) -> Iterator[list[list[int]]]:
        """The tokens of each row, a list for each replay, until all have ended.

        NO_TOKEN ends a row whose logits were not numbers. What the engine would say step by step, token for token.
        """
        if not 0 < len(rows) <= len(self.sampled_B):
            raise ValueError(f"rows: got {len(rows)} (allowed 1..{len(self.sampled_B)})")
        if bad := next((row for row in rows if row.room < 1 or row.limit > self.cache.max_seq_len), None):
            raise ValueError(f"row: no room or more than {self.cache.max_seq_len} positions (got {bad})")
        if len(self.sampled_B) > MAX_TOKENS and [row.slot for row in rows] != list(range(len(rows))):
            raise ValueError(f"row: of more than {MAX_TOKENS} rows, row i must be slot i")
        if not self.graphs:
            self.warm_up()
        self.host_seconds, self.tokens = 0.0, 0
        self.state.load(rows, self.cache.scratch)
        greedy, end = all(row.temperature == 0 for row in rows), max(row.position for row in rows) + 1
        running = True
        for _ in range(-(-max(row.room for row in rows) // self.steps)):
            end += self.steps
            self.launch(min(end, self.cache.max_seq_len), greedy)
            if self.ring.pending > 1:  # one replay late
                running = self.is_running(tokens := self.read(len(rows)))
                yield tokens
            if not running:
                break
        while self.ring.pending:
            tokens = self.read(len(rows))
            if any(tokens):
                yield tokens

    def is_running(self, tokens: list[list[int]]) -> bool:
        """Whether some row had all its steps: then it may have more."""
        return any(len(row) == self.steps for row in tokens)

    def launch(self, length: int, greedy: bool) -> None:
        started = time.perf_counter()
        self.graph(self.decoder.reach(len(self.sampled_B), length), greedy).replay()
        self.ring.publish(self.out_NB)
        self.host_seconds += time.perf_counter() - started

    def read(self, rows: int) -> list[list[int]]:
        """The oldest replay's tokens of the first `rows` rows."""
        self.ring.wait()
        started = time.perf_counter()
        by_step = self.ring.take()
        tokens = [[token for token in column if token != ENDED] for column in zip(*by_step, strict=True)][:rows]
        self.tokens += sum(map(len, tokens))
        self.host_seconds += time.perf_counter() - started
        return tokens

    def graph(self, reach: int, greedy: bool) -> Captured:
        if (reach, greedy) not in self.graphs:
            self.graphs[reach, greedy] = Captured(lambda: self.replay(reach, greedy), self.decoder.device)
        return self.graphs[reach, greedy]

    def replay(self, reach: int, greedy: bool) -> None:
        """What a graph holds: `steps` tokens of every row."""
        state, positions_B = self.state, self.state.inputs.positions_M
        if not greedy:  # all draws at once: their hash is many small kernels
            next_NB = positions_B + torch.arange(1, self.steps + 1, device=positions_B.device)[:, None]
            self.uniform_NB.copy_(uniform(state.seed_B, next_NB))
        for out_B, uniform_B in zip(self.out_NB, self.uniform_NB, strict=True):
            logits_BV = self.decoder.step(state.inputs, self.cache, reach=reach)
            self.decoder.ops.sample(
                logits_BV, state.temperature_B, state.top_k_B, state.top_p_B, uniform_B, self.workspace, self.sampled_B
            )
            advance(self.sampled_B, state, self.eos_E, out_B, scratch=self.cache.scratch)
