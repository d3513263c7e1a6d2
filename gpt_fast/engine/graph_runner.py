"""GraphRunner: several decode steps at a time on a GPU, each begun before the last one's tokens are read.

Where only plain decodes are planned, the rows live on the device (ops/gpu/graph.py) and the host reads one replay late;
anything else (prompts, penalties, logprobs, a guide) is an ordinary step. The device knows when a row ends just as the
scheduler does, but for stop strings: it may decode past one, and the scheduler drops those tokens; their cache entries
lie beyond the slot's valid length.
"""

from __future__ import annotations

from typing import Any

from gpt_fast.engine.runner import Runner, bucket_of, buckets
from gpt_fast.ops.gpu.decoder import GpuDecoder
from gpt_fast.ops.gpu.gemv import MAX_TOKENS
from gpt_fast.ops.gpu.graph import DecodeLoop
from gpt_fast.ops.gpu.state import Row
from gpt_fast.request import Request, SampledToken, StepPlan
from gpt_fast.sampling import needs_edit

STEPS = 4  # a replay: more spare the host's gaps between replays, fewer let a new request in sooner


class GraphRunner(Runner):
    """A Runner whose decodes, where all rows are plain, bring up to `steps` tokens each."""

    def __init__(self, *, decoder: GpuDecoder, steps: int = STEPS, **options: Any) -> None:
        super().__init__(**options)
        sizes = buckets(min(self.cache.slots, MAX_TOKENS), 1)
        self.loops = {
            size: DecodeLoop(decoder, self.cache, rows=size, steps=steps, eos_ids=self.eos_ids) for size in sizes
        }
        self.loop: DecodeLoop | None = None  # the one under way
        self.places: dict[Request, tuple[int, int]] = {}  # its column of each request, and `computed` when it is next

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

    def burst(self, requests: list[Request]) -> dict[str, list[SampledToken]]:
        """Tokens of each, at least one; the next replay is under way when these are here."""
        loop = self.loops[bucket_of(list(self.loops), len(requests))]
        continues = all(self.places.get(r, (0, -1))[1] == r.computed for r in requests)
        if loop is not self.loop or not loop.ring.pending or not continues:
            self.loop = loop
            loop.begin([row_of(r, self.cache.max_seq_len) for r in requests])
            loop.launch()
            self.places = {r: (column, r.computed) for column, r in enumerate(requests)}
        loop.launch()
        tokens = loop.read()
        columns = {r: self.places[r][0] for r in requests}
        self.places = {r: (column, r.computed + len(tokens[column])) for r, column in columns.items()}
        return {r.id: [SampledToken(token) for token in tokens[column]] for r, column in columns.items()}


def is_plain(request: Request) -> bool:
    """Whether the device can go on with it alone."""
    params = request.params
    return params.logprobs is None and params.min_p == 0 and not needs_edit(params, len(request.output))


def row_of(request: Request, max_seq_len: int) -> Row:
    params = request.params
    limit = min(len(request.prompt) + params.max_new_tokens, max_seq_len)
    return Row(
        slot=request.slot,
        token=request.output[-1],
        position=request.computed,
        limit=limit,
        temperature=params.temperature,
        top_k=params.top_k,
        top_p=params.top_p,
        seed=request.seed,
        eos=not params.ignore_eos,
    )
