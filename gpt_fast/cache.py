"""The KV cache: one contiguous slot a sequence, allocated once.

Shapes: L layers, N slots, H KV heads, T positions of a slot, D head_dim, B rows, S tokens of a row.
A slot has one position more than it can use: padding rows and padding tokens write there (`scratch`), so every
forward has the same shapes whatever is running.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from gpt_fast.config import ModelConfig


class KVCache(nn.Module):
    """k_LNHTD and v_LNHTD, plus the reads and writes that attention needs.

    `dtype` is the element type of the cache; `max_seq_len` the usable positions of a slot.
    """

    k_LNHTD: Tensor
    v_LNHTD: Tensor

    def __init__(
        self, config: ModelConfig, *, slots: int, max_seq_len: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        super().__init__()
        shape = (config.n_layer, slots, config.n_kv_head, max_seq_len + 1, config.head_dim)
        self.config = config
        self.max_seq_len = max_seq_len
        self.slots = slots
        self.register_buffer("k_LNHTD", torch.zeros(shape, dtype=dtype, device=device), persistent=False)
        self.register_buffer("v_LNHTD", torch.zeros(shape, dtype=dtype, device=device), persistent=False)

    @property
    def scratch(self) -> int:
        """The position that padding writes to; no mask ever lets a real token read it."""
        return self.max_seq_len

    @property
    def nbytes(self) -> int:
        return 2 * self.k_LNHTD.numel() * self.k_LNHTD.element_size()

    def write(self, layer: int, slots_B: Tensor, positions_BS: Tensor, k_BSHD: Tensor, v_BSHD: Tensor) -> None:
        """Store this step's keys and values at (slot, position) of each token."""
        rows_B1 = slots_B[:, None]
        # Advanced indices around the head slice put [B, S] first: the target view is [B, S, H, D].
        self.k_LNHTD[layer][rows_B1, :, positions_BS] = k_BSHD.to(self.k_LNHTD.dtype)
        self.v_LNHTD[layer][rows_B1, :, positions_BS] = v_BSHD.to(self.v_LNHTD.dtype)

    def read(self, layer: int, slots_B: Tensor | None, rows: int, length: int) -> tuple[Tensor, Tensor]:
        """The first `length` positions of each row's slot: two [B, H, length, D].

        slots_B None means rows are slots 0..rows-1, which costs no copy.
        """
        k_NHTD, v_NHTD = self.k_LNHTD[layer, :, :, :length], self.v_LNHTD[layer, :, :, :length]
        if slots_B is None:
            return k_NHTD[:rows], v_NHTD[:rows]
        return k_NHTD[slots_B], v_NHTD[slots_B]

    def clear(self, slot: int) -> None:
        """Zero a slot; what ended in NaN must not reach its next sequence."""
        self.k_LNHTD[:, slot] = 0
        self.v_LNHTD[:, slot] = 0

    def copy_prefix(self, *, source: int, target: int, length: int) -> None:
        """Give slot `target` the first `length` positions of slot `source` (a shared prompt prefix)."""
        self.k_LNHTD[:, target, :, :length] = self.k_LNHTD[:, source, :, :length]
        self.v_LNHTD[:, target, :, :length] = self.v_LNHTD[:, source, :, :length]
