"""Small random models and steps for the CPU decoder's tests."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from gpt_fast.cache import KVCache
from gpt_fast.config import ModelConfig
from gpt_fast.model import Transformer

CPU = torch.device("cpu")
MAX_SEQ_LEN = 200


def small_model(seed: int = 0, **changes: Any) -> Transformer:
    """A two-layer float32 model with nothing left at a neutral value (norm weights, biases)."""
    shape: dict[str, Any] = dict(vocab_size=301, n_layer=2, n_head=4, n_kv_head=2, dim=96, head_dim=64,
                                 intermediate_size=136, max_position=MAX_SEQ_LEN)
    torch.manual_seed(seed)
    model = Transformer(ModelConfig(**(shape | changes))).eval()
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.data.uniform_(0.5, 1.5)
    model.setup_rope(MAX_SEQ_LEN, CPU)
    return model


class Int8Cache(KVCache):
    """A cache of int8 elements with a float32 scale a (position, head): max|x| / 127."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.k_scale_LNHT = torch.full(self.k_LNHTD.shape[:-1], torch.nan)
        self.v_scale_LNHT = self.k_scale_LNHT.clone()

    def write(self, layer: int, slots_B: Tensor, positions_BS: Tensor, k_BSHD: Tensor, v_BSHD: Tensor) -> None:
        rows_B1 = slots_B[:, None]
        for x, codes, scales in ((k_BSHD, self.k_LNHTD, self.k_scale_LNHT), (v_BSHD, self.v_LNHTD, self.v_scale_LNHT)):
            scale_BSH1 = x.abs().amax(-1, keepdim=True) / 127
            codes[layer][rows_B1, :, positions_BS] = (x / scale_BSH1).round().to(torch.int8)
            scales[layer][rows_B1, :, positions_BS] = scale_BSH1[..., 0]

    def read(self, layer: int, slots_B: Tensor | None, rows: int, length: int) -> tuple[Tensor, Tensor]:
        assert slots_B is not None
        k, v = super().read(layer, slots_B, rows, length)
        k_scale, v_scale = (s[layer][slots_B, :, :length, None] for s in (self.k_scale_LNHT, self.v_scale_LNHT))
        return k * k_scale, v * v_scale


def new_cache(model: Transformer, *, slots: int = 4, dtype: torch.dtype = torch.float32, fill: float = 0.0) -> KVCache:
    kind = Int8Cache if dtype == torch.int8 else KVCache
    cache = kind(model.config, slots=slots, max_seq_len=MAX_SEQ_LEN, dtype=dtype, device=CPU)
    cache.k_LNHTD.fill_(0 if dtype == torch.int8 else fill)
    cache.v_LNHTD.fill_(0 if dtype == torch.int8 else fill)
    return cache


def random_tokens(model: Transformer, *shape: int, seed: int = 1) -> Tensor:
    return torch.randint(0, model.config.vocab_size, shape, generator=torch.Generator().manual_seed(seed))


def run_chunks(
    forward: Callable[..., Tensor], tokens_T: Tensor, cache: KVCache, sizes: list[int], slot: int = 0
) -> Tensor:
    """Logits [T, V] of one sequence fed in chunks of the given sizes."""
    out, at = [], 0
    for size in sizes:
        positions = torch.arange(at, at + size)[None]
        out.append(forward(tokens_T[None, at : at + size], positions, cache, length=at + size,
                           slots_B=torch.tensor([slot]))[0])
        at += size
    return torch.cat(out)


def relative_error(got: Tensor, expected: Tensor) -> float:
    return ((got.double() - expected.double()).norm() / expected.double().norm()).item()
