"""One layer's part of the KV cache, as the kernels read and write it.

Shapes: N slots, H KV heads, T positions of a slot, D head_dim, M tokens.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    from gpt_fast.model.cache import KVCache


class LayerCache(NamedTuple):
    """Keys and values; int8 ones have a float32 scale for each (position, head), as gpt_fast.model.cache.KVCache."""

    k_NHTD: Tensor
    v_NHTD: Tensor
    k_scale_NHT: Tensor | None = None
    v_scale_NHT: Tensor | None = None

    @classmethod
    def of(cls, cache: KVCache, layer: int) -> LayerCache:
        scales = (cache.k_scale_LNHT, cache.v_scale_LNHT)
        return cls(cache.k_LNHTD[layer], cache.v_LNHTD[layer], *(None if s is None else s[layer] for s in scales))

    def arguments(self) -> dict[str, Tensor | int]:
        """What a kernel is told. ValueError for a layout it does not know.

        A scale lies where its head's first element does, in units of heads, so that one offset serves both.
        """
        head_dim, strides = self.k_NHTD.shape[-1], self.k_NHTD.stride()
        if strides != self.v_NHTD.stride() or not self.k_NHTD[0, 0].is_contiguous():
            raise ValueError("k_cache, v_cache: each head's positions must be contiguous, in both alike")
        k_scale, v_scale = self.k_scale_NHT, self.v_scale_NHT
        for scale in (k_scale, v_scale):
            if scale is not None and tuple(head_dim * stride for stride in scale.stride()) != strides[:3]:
                raise ValueError("k_scale, v_scale: must be laid out as the cache is")
        return {
            "k_cache": self.k_NHTD,
            "v_cache": self.v_NHTD,
            "k_scale": self.k_NHTD if k_scale is None else k_scale,
            "v_scale": self.v_NHTD if v_scale is None else v_scale,
            "slot_stride": strides[0],
            "head_stride": strides[1],
        }

    def read(self, slot: int, length: int) -> tuple[Tensor, Tensor]:
        """The first `length` positions of a slot: two [H, length, D] in the scales' or the cache's own precision."""
        k_HTD, v_HTD = self.k_NHTD[slot, :, :length], self.v_NHTD[slot, :, :length]
        if self.k_scale_NHT is None or self.v_scale_NHT is None:
            return k_HTD, v_HTD
        return (k_HTD * self.k_scale_NHT[slot, :, :length, None], v_HTD * self.v_scale_NHT[slot, :, :length, None])

    def write(self, slots_M: Tensor, positions_M: Tensor, k_MHD: Tensor, v_MHD: Tensor) -> None:
        """Put one token's keys and values at each place, as KVCache.write does."""
        from gpt_fast.model.cache import quantize_heads

        for x_MHD, held, scale in (k_MHD, self.k_NHTD, self.k_scale_NHT), (v_MHD, self.v_NHTD, self.v_scale_NHT):
            if scale is not None:
                x_MHD, scale_MH = quantize_heads(x_MHD)
                scale[slots_M, :, positions_M] = scale_MH
            held[slots_M, :, positions_M] = x_MHD.to(held.dtype)


class HeadWorkspace(NamedTuple):
    """What the programs of a head pass to the one that quantizes it: an int8 scale needs the whole head."""

    heads: Tensor  # float32 [tokens * 2 * KV heads * head_dim]
    arrived: Tensor  # int32 [2 * KV heads], 0 between calls


def head_workspace(tokens: int, kv_heads: int, head_dim: int, device: torch.device) -> HeadWorkspace:
    """For up to `tokens` tokens a call."""
    heads = torch.empty(tokens * 2 * kv_heads * head_dim, dtype=torch.float32, device=device)
    return HeadWorkspace(heads, torch.zeros(2 * kv_heads, dtype=torch.int32, device=device))
