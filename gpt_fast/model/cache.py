"""The KV cache: one contiguous slot a request, allocated once.

Shapes: L layers, N slots, H KV heads, T positions of a slot, D head_dim, B rows, S tokens of a row.
A slot has one position more than it can use: padding rows and padding tokens write there (`scratch`), so every
forward has the same shapes whatever is running.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from gpt_fast.config import ModelConfig
from gpt_fast.model import huge_pages


class KVCache(nn.Module):
    """k_LNHTD and v_LNHTD, plus the reads and writes that attention needs.

    `dtype` is the element type of the cache; `max_seq_len` the usable positions of a slot. An int8 cache has a float32
    scale for each (position, head) beside it, k_scale_LNHT and v_scale_LNHT; attention sees floats either way.
    """

    k_LNHTD: Tensor
    v_LNHTD: Tensor
    k_scale_LNHT: Tensor | None
    v_scale_LNHT: Tensor | None

    def __init__(
        self, config: ModelConfig, *, slots: int, max_seq_len: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        super().__init__()
        shape = (config.n_layer, slots, config.n_kv_head, max_seq_len + 1, config.head_dim)
        self.config = config
        self.max_seq_len = max_seq_len
        self.slots = slots
        for name in ("k", "v"):
            elements = huge_pages.zeros(shape, dtype=dtype, device=device)
            scales = torch.zeros(shape[:-1], device=device) if dtype == torch.int8 else None
            self.register_buffer(f"{name}_LNHTD", elements, persistent=False)
            self.register_buffer(f"{name}_scale_LNHT", scales, persistent=False)

    @property
    def scratch(self) -> int:
        """The position that padding writes to; no mask ever lets a real token read it."""
        return self.max_seq_len

    @property
    def nbytes(self) -> int:
        return sum(buffer.nbytes for buffer in self.buffers())

    def another(self) -> KVCache:
        """An empty cache of the same shape."""
        own = self.k_LNHTD
        return KVCache(self.config, slots=self.slots, max_seq_len=self.max_seq_len, dtype=own.dtype, device=own.device)

    def write(self, layer: int, slots_B: Tensor, positions_BS: Tensor, k_BSHD: Tensor, v_BSHD: Tensor) -> None:
        """Store this step's keys and values at (slot, position) of each token."""
        # Advanced indices around the head slice put [B, S] first: the target view is [B, S, H, D]. The layer is one of
        # them, for a compiler writes in place to the whole buffer, but copies all of a view that it writes to.
        at = (torch.full_like(slots_B, layer)[:, None], slots_B[:, None], slice(None), positions_BS)
        for x_BSHD, held, scale in (k_BSHD, self.k_LNHTD, self.k_scale_LNHT), (v_BSHD, self.v_LNHTD, self.v_scale_LNHT):
            if scale is not None:
                x_BSHD, scale[at] = quantize_heads(x_BSHD)
            held[at] = x_BSHD.to(held.dtype)

    def read(self, layer: int, slots_B: Tensor | None, rows: int, length: int) -> tuple[Tensor, Tensor]:
        """The first `length` positions of each row's slot: two [B, H, length, D].

        slots_B None means rows are slots 0..rows-1, which costs no copy.
        """
        chosen = slice(rows) if slots_B is None else slots_B
        k_BHTD, v_BHTD = (x_LNHTD[layer, :, :, :length][chosen] for x_LNHTD in (self.k_LNHTD, self.v_LNHTD))
        if self.k_scale_LNHT is None or self.v_scale_LNHT is None:
            return k_BHTD, v_BHTD
        k_scale_BHT, v_scale_BHT = (s[layer, :, :, :length][chosen] for s in (self.k_scale_LNHT, self.v_scale_LNHT))
        return k_BHTD * k_scale_BHT[..., None], v_BHTD * v_scale_BHT[..., None]

    def clear(self, slot: int) -> None:
        """Zero a slot that a request left with NaN, which spreads even from positions that a mask hides (0 * NaN)."""
        for buffer in self.buffers():
            buffer[:, slot] = 0

    def remove_nan(self, slot: int, length: int) -> None:
        """As `clear`, of the first `length` positions, but keep what is finite."""
        for buffer in self.buffers():
            if buffer.is_floating_point():
                buffer[:, slot, :, :length].nan_to_num_(0.0, 0.0, 0.0)

    def copy_prefix(self, *, source: int, target: int, length: int) -> None:
        """Give slot `target` the first `length` positions of slot `source` (a shared prompt prefix)."""
        for buffer in self.buffers():
            buffer[:, target, :, :length] = buffer[:, source, :, :length]


def quantize_heads(x_BSHD: Tensor) -> tuple[Tensor, Tensor]:
    """Integers in -127..127, still as floats, and the scale_BSH to multiply them by: a head's largest |x| / 127.

    The scale of a head with NaN or infinity is NaN or infinity, so that it reads back as NaN.
    """
    x_BSHD = x_BSHD.float()
    scale_BSH = (x_BSHD.abs().amax(-1) / 127).clamp(min=torch.finfo(torch.float32).tiny)  # zeros stay zeros
    return (x_BSHD / scale_BSH[..., None]).round(), scale_BSH
