"""Whole decode steps without the host: tokens, positions and stop checks stay on the device, several steps a replay.

Shapes: B rows, N steps of a replay, E end-of-sequence ids.

The host only launches replays and reads, one replay late, what they wrote: no step waits for it. After Hugging Face's
asynchronous batching (transformers #43960) and vLLM's asynchronous scheduling (#32951): run on, drop what was too much.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from gpt_fast.ops.gpu.capture import Captured
from gpt_fast.ops.gpu.decoder import GpuDecoder, Inputs
from gpt_fast.ops.gpu.linear import MAX_TOKENS
from gpt_fast.sampling import uniform
from gpt_fast.scheduler import NO_TOKEN

if TYPE_CHECKING:
    from gpt_fast.cache import KVCache

ENDED = -2  # in the output: the row had ended before this step
UNWRITTEN = -3  # in the ring: the device has not been here

Wait = Callable[[], object]


class Row(NamedTuple):
    """One sequence to go on with: `token` stands at `position` and is not computed yet.

    limit: prompt and answer together, in tokens. eos: whether end-of-sequence ids end it. seed and position decide
    the draws, as in gpt_fast.sampling.
    """

    slot: int
    token: int
    position: int
    limit: int
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    eos: bool = True

    @property
    def room(self) -> int:
        """Tokens until the limit."""
        return self.limit - self.position - 1


class State(NamedTuple):
    """What a step reads and leaves for the next. A row that has ended stands at `scratch`, where it harms nobody."""

    inputs: Inputs
    limit_B: Tensor  # int64
    eos_B: Tensor  # bool
    temperature_B: Tensor  # float32
    top_k_B: Tensor  # int64
    top_p_B: Tensor  # float32
    seed_B: Tensor  # int64

    @classmethod
    def empty(cls, rows: int, device: torch.device) -> State:
        types = (torch.int64, torch.bool, torch.float32, torch.int64, torch.float32, torch.int64)
        return cls(Inputs.empty(rows, device), *(torch.zeros(rows, dtype=t, device=device) for t in types))

    def load(self, rows: Sequence[Row], scratch: int) -> None:
        """Put rows in place; those that are missing have ended."""
        ended = Row(slot=0, token=0, position=scratch, limit=0)
        filled = [*rows, *[ended] * (len(self.limit_B) - len(rows))]
        lengths = [1 if row.position == scratch else row.position + 1 for row in filled]
        columns = {
            self.inputs.tokens_M: [row.token for row in filled],
            self.inputs.positions_M: [row.position for row in filled],
            self.inputs.slots_M: [row.slot for row in filled],
            self.inputs.lengths_M: lengths,
            self.limit_B: [row.limit for row in filled],
            self.eos_B: [row.eos for row in filled],
            self.temperature_B: [row.temperature for row in filled],
            self.top_k_B: [row.top_k for row in filled],
            self.top_p_B: [row.top_p for row in filled],
            self.seed_B: [row.seed for row in filled],
        }
        for tensor, values in columns.items():
            host = torch.tensor(values, dtype=tensor.dtype)
            tensor.copy_(host.pin_memory() if tensor.is_cuda else host, non_blocking=True)


def advance_reference(sampled_B: Tensor, state: State, eos_E: Tensor, out_B: Tensor, *, scratch: int) -> None:
    """Note what was sampled, and set every row to its next token or, where it has ended, to `scratch`."""
    tokens_B, positions_B, _, lengths_B = state.inputs
    live_B = positions_B != scratch
    hit_B = (sampled_B[:, None] == eos_E).any(1) & state.eos_B
    ended_B = hit_B | (sampled_B == NO_TOKEN) | (positions_B + 2 >= state.limit_B)
    goes_on_B = live_B & ~ended_B
    out_B.copy_(torch.where(live_B, sampled_B, ENDED))
    tokens_B.copy_(torch.where(goes_on_B, sampled_B, 0))
    positions_B.copy_(torch.where(goes_on_B, positions_B + 1, scratch))
    lengths_B.copy_(torch.where(goes_on_B, positions_B + 1, 1))


# -------------------------------------------------------------------------------------------- readback


def start_copy(target: Tensor, source: Tensor) -> Wait:
    """Begin to copy; the function that waits until it has ended."""
    target.copy_(source, non_blocking=True)
    if not source.is_cuda:
        return lambda: None
    event = torch.cuda.Event(blocking=True)  # the waiting thread sleeps: its core belongs to the service
    event.record()
    return event.synchronize


class Ring:
    """Results on their way from the device to the host: `depth` buffers in pinned memory, first in, first out.

    A buffer is read only after its copy has ended, and written only after it was read: RuntimeError otherwise.
    """

    def __init__(
        self, shape: tuple[int, ...], *, pinned: bool, depth: int = 3,
        copy: Callable[[Tensor, Tensor], Wait] = start_copy,
    ) -> None:  # fmt: skip
        self.free = deque(torch.empty(shape, dtype=torch.int64, pin_memory=pinned) for _ in range(depth))
        self.busy: deque[tuple[Tensor, Wait]] = deque()
        self.copy = copy

    @property
    def pending(self) -> int:
        return len(self.busy)

    def publish(self, source: Tensor) -> None:
        """Begin to bring `source` over; the device may change it in its next kernel."""
        if not self.free:
            raise RuntimeError("ring: every buffer waits to be read")
        target = self.free.popleft().fill_(UNWRITTEN)
        self.busy.append((target, self.copy(target, source)))

    def wait(self) -> None:
        """Until the oldest result is here."""
        self.busy[0][1]()

    def take(self) -> list[list[int]]:
        """The oldest result."""
        self.wait()
        target, _ = self.busy.popleft()
        values = target.tolist()
        self.free.append(target)
        if any(UNWRITTEN in row for row in values):
            raise RuntimeError("ring: read before it was written")
        return values


# -------------------------------------------------------------------------------------------- the loop


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
            advance_reference(self.sampled_B, state, self.eos_E, out_B, scratch=self.cache.scratch)
