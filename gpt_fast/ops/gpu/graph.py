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
from gpt_fast.ops.gpu.gemv import MAX_TOKENS
from gpt_fast.ops.gpu.ring import Ring
from gpt_fast.ops.gpu.sampler import sampler_workspace
from gpt_fast.ops.gpu.state import ENDED, Row, State, advance
from gpt_fast.sampling import uniform

if TYPE_CHECKING:
    from gpt_fast.model.cache import KVCache


class DecodeLoop:
    """Decodes up to `rows` sequences of one cache, `steps` tokens a replay. One run at a time.

    After a run: `host_seconds`, what this thread did for it (waiting not counted), and `tokens`, what came of it.
    """

    def __init__(
        self,
        decoder: GpuDecoder,
        cache: KVCache,
        *,
        rows: int,
        steps: int,
        eos_ids: Iterable[int],
        ring: Ring | None = None,
    ) -> None:
        device = decoder.device
        self.decoder, self.cache, self.steps = decoder, cache, steps
        self.state = State.empty(rows, device)
        self.eos_E = torch.tensor(sorted(eos_ids), dtype=torch.int64, device=device)
        self.sampled_B = torch.zeros(rows, dtype=torch.int64, device=device)
        self.uniform_NB = torch.zeros(steps, rows, dtype=torch.float64, device=device)
        self.out_NB = torch.zeros(steps, rows, dtype=torch.int64, device=device)
        self.workspace = sampler_workspace(rows, decoder.config.vocab_size, device)
        self.ring = ring or Ring((steps, rows), pinned=device.type == "cuda")
        self.graphs: dict[tuple[int, bool], Captured] = {}
        self.host_seconds, self.tokens = 0.0, 0
        self.rows, self.greedy = 0, True  # of what is under way
        self.end, self.left = 0, 0  # positions its next replay may read up to; steps until its longest row is full

    @torch.inference_mode()
    def warm_up(self) -> None:
        """Capture every replay there can be."""
        self.state.load([], self.cache.scratch)
        for reach in self.decoder.reaches(len(self.sampled_B), 1, self.cache.max_seq_len):
            for greedy in (True, False):
                self.graph(reach, greedy)

    def run(self, rows: Sequence[Row]) -> Iterator[list[list[int]]]:
        """The tokens of each row, a list for each replay, until all have ended; as `begin`, `launch` and `read` say."""
        self.begin(rows)
        while self.launch() or self.ring.pending:
            if self.ring.pending > 1 or self.done:  # one replay late
                tokens = self.read()
                if any(tokens):
                    yield tokens

    @torch.inference_mode()
    def begin(self, rows: Sequence[Row]) -> None:
        """Go on with these rows; what is under way for others is forgotten.

        Raises ValueError for too many rows, or one without room for a token.
        """
        if not 0 < len(rows) <= len(self.sampled_B):
            raise ValueError(f"rows: got {len(rows)} (allowed 1..{len(self.sampled_B)})")
        if bad := next((row for row in rows if row.room < 1 or row.limit > self.cache.max_seq_len), None):
            raise ValueError(f"row: no room or more than {self.cache.max_seq_len} positions (got {bad})")
        if len(self.sampled_B) > MAX_TOKENS and [row.slot for row in rows] != list(range(len(rows))):
            raise ValueError(f"row: of more than {MAX_TOKENS} rows, row i must be slot i")
        while self.ring.pending:
            self.ring.take()
        if not self.graphs:
            self.warm_up()
        self.host_seconds, self.tokens = 0.0, 0
        self.state.load(rows, self.cache.scratch)
        self.rows, self.greedy = len(rows), all(row.temperature == 0 for row in rows)
        self.end, self.left = max(row.position for row in rows) + 1, max(row.room for row in rows)

    @property
    def done(self) -> bool:
        """Whether no further replay can bring a token."""
        return self.left <= 0

    @torch.inference_mode()
    def launch(self) -> bool:
        """Begin the next replay and its way to the host, without waiting; False where nothing is left to do."""
        if self.done:
            return False
        started = time.perf_counter()
        self.end, self.left = self.end + self.steps, self.left - self.steps
        reach = self.decoder.reach(len(self.sampled_B), 1, min(self.end, self.cache.max_seq_len))
        self.graph(reach, self.greedy).replay()
        self.ring.publish(self.out_NB)
        self.host_seconds += time.perf_counter() - started
        return True

    def read(self) -> list[list[int]]:
        """The tokens of each row from the oldest replay that was not read yet; waits until it has ended.

        What the engine would say step by step, token for token; NO_TOKEN ends a row whose logits were not numbers.
        """
        self.ring.wait()
        started = time.perf_counter()
        by_step = self.ring.take()
        columns = list(zip(*by_step, strict=True))[: self.rows]
        tokens = [[token for token in column if token != ENDED] for column in columns]
        if all(len(row) < self.steps for row in tokens):  # every row has ended
            self.left = 0
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
