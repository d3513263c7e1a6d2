"""Small random models and steps for the CPU decoder's tests."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol
from unittest import mock

import torch
from torch import Tensor

from gpt_fast.config import ModelConfig
from gpt_fast.model.cache import KVCache
from gpt_fast.model.forward import Batch
from gpt_fast.model.transformer import Transformer
from support import cpu_twin

CPU = torch.device("cpu")


class HasConfig(Protocol):
    """A model, or a decoder of one: a rank's share has its own heads only."""

    config: ModelConfig


MAX_SEQ_LEN = 200


def small_model(seed: int = 0, **changes: Any) -> Transformer:
    """A two-layer float32 model with nothing left at a neutral value (norm weights, biases)."""
    shape: dict[str, Any] = dict(
        vocab_size=301,
        n_layer=2,
        n_head=4,
        n_kv_head=2,
        dim=96,
        head_dim=64,
        intermediate_size=136,
        max_position=MAX_SEQ_LEN,
    )
    torch.manual_seed(seed)
    model = Transformer(ModelConfig(**(shape | changes))).eval()
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.data.uniform_(0.5, 1.5)
    model.setup_rope(MAX_SEQ_LEN, CPU)
    return model


def new_cache(model: HasConfig, *, slots: int = 4, dtype: torch.dtype = torch.float32, fill: float = 0.0) -> KVCache:
    cache = KVCache(model.config, slots=slots, max_seq_len=MAX_SEQ_LEN, dtype=dtype, device=CPU)
    for buffer in cache.buffers():
        if buffer.is_floating_point():
            buffer.fill_(fill)
    return cache


def random_tokens(model: HasConfig, *shape: int, seed: int = 1) -> Tensor:
    return torch.randint(0, model.config.vocab_size, shape, generator=torch.Generator().manual_seed(seed))


def run_chunks(
    forward: Callable[..., Tensor], tokens_T: Tensor, cache: KVCache, sizes: list[int], slot: int = 0
) -> Tensor:
    """Logits [T, V] of one sequence fed in chunks of the given sizes."""
    out, at = [], 0
    for size in sizes:
        positions = torch.arange(at, at + size)[None]
        out.append(
            forward(
                Batch(tokens_T[None, at : at + size], positions, cache, length=at + size, slots_B=torch.tensor([slot]))
            )[0]
        )
        at += size
    return torch.cat(out)


def relative_error(got: Tensor, expected: Tensor) -> float:
    return ((got.double() - expected.double()).norm() / expected.double().norm()).item()


@contextmanager
def activations_unrounded() -> Iterator[None]:
    """The decoder's twin computes with activations as they are."""
    with mock.patch.object(cpu_twin, "round_activations", lambda x, weights: x):
        yield


def assert_rounded_alike(got: Tensor, expected: Tensor, exact: Tensor) -> None:
    """`got` and `expected` round alike what `exact` does not round, but take their sums in other orders.

    A sum that differs in its last bit can round a number to the next code. That moves all that follows from it, so
    which roundings agree is chance. Where none does, errors are independent and sqrt(2) times as far from each other
    as from `exact`; and in any case both are equally far from that: of the twin, with every activation jittered by
    2e-4 of itself, to within 1.5 % over 150 rows.
    """
    far = relative_error(expected, exact)
    assert relative_error(got, exact) < 1.05 * far
    assert relative_error(got, expected) < 1.5 * far
