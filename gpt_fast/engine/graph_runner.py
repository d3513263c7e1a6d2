"""BurstRunner: several decode steps at a time on a GPU, each begun before the last one's tokens are read.

Where only plain decodes are planned, the rows live on the device (ops/gpu/graph.py) and the host reads one replay late;
anything else (prompts, penalties, logprobs, a guide) is an ordinary step. The device knows when a row ends just as the
scheduler does; what a stop the device does not know leaves behind is dropped by the scheduler, and in the cache lies
behind what its slot is said to hold.
"""

from __future__ import annotations

from typing import Any

from gpt_fast.engine.runner import Runner, bucket_of, buckets
from gpt_fast.ops.gpu.decoder import GpuDecoder
from gpt_fast.ops.gpu.graph import DecodeLoop
from gpt_fast.ops.gpu.linear import MAX_TOKENS
from gpt_fast.ops.gpu.state import Row
from gpt_fast.request import SampledToken, Sequence, StepPlan
from gpt_fast.sampling import needs_edit

STEPS = 4  # a replay: more spare the host's gaps between replays, fewer let a new request in sooner


class BurstRunner(Runner):
    """A Runner whose decodes, where all rows are plain, bring up to `steps` tokens each."""

    def __init__(self, *, decoder: GpuDecoder, steps: int = STEPS, **options: Any) -> None:
        super().__init__(**options)
        sizes = buckets(min(self.cache.slots, MAX_TOKENS), 1)
        self.loops = {
            size: DecodeLoop(decoder, self.cache, rows=size, steps=steps, eos_ids=self.eos_ids) for size in sizes
        }
        self.loop: DecodeLoop | None = None  # the one under way
        self.stands: dict[Sequence, tuple[int, int]] = {}  # its column of each sequence, and `computed` when it is next

    def warm_up(self) -> None:
        super().warm_up()
        for loop in self.loops.values():
            loop.warm_up()

    def run(self, plan: StepPlan) -> dict[str, list[SampledToken]]:
        decodes = list(plan.decodes)
        others = plan.chunks or plan.copies or plan.clears
        if others or not 0 < len(decodes) <= max(self.loops) or not all(map(is_plain, decodes)):
            return super().run(plan)
        return self.burst(decodes)

    def burst(self, sequences: list[Sequence]) -> dict[str, list[SampledToken]]:
        """Tokens of each, at least one; the next replay is under way when these are here."""
        loop = self.loops[bucket_of(list(self.loops), len(sequences))]
        stand = all(self.stands.get(s, (0, -1))[1] == s.computed for s in sequences)
        if loop is not self.loop or not loop.ring.pending or not stand:
            self.loop = loop
            loop.begin([row_of(s, self.cache.max_seq_len) for s in sequences])
            loop.launch()
            self.stands = {s: (column, s.computed) for column, s in enumerate(sequences)}
        loop.launch()
        tokens = loop.read()
        columns = {s: self.stands[s][0] for s in sequences}
        self.stands = {s: (column, s.computed + len(tokens[column])) for s, column in columns.items()}
        return {s.id: [SampledToken(token) for token in tokens[column]] for s, column in columns.items()}


def is_plain(sequence: Sequence) -> bool:
    """Whether the device can go on with it alone."""
    params = sequence.params
    return params.logprobs is None and params.min_p == 0 and not needs_edit(params, len(sequence.output))


def row_of(sequence: Sequence, max_seq_len: int) -> Row:
    params = sequence.params
    limit = min(len(sequence.prompt) + params.max_new_tokens, max_seq_len)
    return Row(
        slot=sequence.slot, token=sequence.output[-1], position=sequence.computed, limit=limit,
        temperature=params.temperature, top_k=params.top_k, top_p=params.top_p, seed=sequence.seed,
        eos=not params.ignore_eos,
    )  # fmt: skip
