"""The ctypes twins of the C++ side's structures, same order and same types (src/layout.h), and the library's functions.

Shapes: B rows, S tokens of a row.
"""

from __future__ import annotations

import ctypes
import functools
from ctypes import POINTER, Structure, c_char_p, c_float, c_int32, c_void_p
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from gpt_fast.ops.cpu import build

if TYPE_CHECKING:
    from gpt_fast.model.forward import Batch

CACHE_TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.int8: 2}
STEP_ERRORS = {
    1: "tokens_BS: a token is outside the vocabulary",
    2: "positions_BS: a position is negative or not below length",
    3: "slots_B: a slot is outside the cache",
    4: "select_B: an index is outside the row",
    5: "tokens_BS: more tokens than the ranks' memory has room for in one step",
}
LINK_ENDED = 6


class Linear(Structure):
    _fields_ = (
        *((name, c_int32) for name in ("format", "rows", "cols", "group")),
        *((name, c_void_p) for name in ("q", "scale", "bias")),
    )


class Screen(Structure):
    _fields_ = (
        ("weights", Linear),
        *((name, c_void_p) for name in ("outliers", "outlier_error", "error_scale", "error_norm", "weight_norm")),
        *((name, c_int32) for name in ("outlier_count", "max_rows")),
        ("outlier_rounding", c_float),
    )


class LayerWeights(Structure):
    _fields_ = (
        *((name, Linear) for name in ("qkv", "out", "gate_up", "down")),
        *((name, c_void_p) for name in ("attention_norm", "ffn_norm", "q_norm", "k_norm")),
        ("window", c_int32),
    )


class ModelWeights(Structure):
    _fields_ = (
        *(
            (name, c_int32)
            for name in (
                "n_layer",
                "dim",
                "n_head",
                "n_kv_head",
                "head_dim",
                "ffn_dim",
                "vocab",
                "rotary_dim",
                "embedding_type",
                "embedding_group",
                "vocab_first",
            )
        ),
        ("norm_eps", c_float),
        *((name, c_void_p) for name in ("embedding", "embedding_scale", "rope", "norm")),
        ("head", Linear),
        ("layers", POINTER(LayerWeights)),
    )


class Fetch(Structure):
    _fields_ = (("hint", c_int32), ("distance", c_int32))


class Tuning(Structure):
    _fields_ = (
        ("one_row", Fetch),
        ("few_rows", Fetch),
        *((name, c_int32) for name in ("both_tiles", "row_block", "chunks_each")),
    )


class StepInput(Structure):
    _fields_ = (
        *((name, c_int32) for name in ("rows", "row_tokens", "length", "positions", "slots", "cache_type")),
        *(
            (name, c_void_p)
            for name in ("tokens", "position", "slot", "select", "k", "v", "k_scale", "v_scale", "logits", "best")
        ),
    )

    @classmethod
    def of(cls, batch: Batch, logits: Tensor, best: Tensor) -> StepInput:
        """The structure for one forward; it holds the tensors it points to. Empty logits are not written."""
        (B, S), cache = batch.tokens_BS.shape, batch.cache
        index = [
            None if t is None else index_tensor(t)
            for t in (batch.tokens_BS, batch.positions_BS, batch.slots_B, batch.select_B)
        ]
        step = cls(
            B,
            S,
            batch.length,
            cache.max_seq_len + 1,
            cache.slots,
            CACHE_TYPES[cache.k_LNHTD.dtype],
            *(None if t is None else t.data_ptr() for t in index),
            cache.k_LNHTD.data_ptr(),
            cache.v_LNHTD.data_ptr(),
            *cache_scales(cache),
            logits.data_ptr(),
            best.data_ptr(),
        )
        step.held = (*index, cache, logits, best)
        return step


class Field(Structure):
    """One of src/layout.h: where a structure's field lies; without a name, the structure as a whole."""

    _fields_ = (("structure", c_char_p), ("name", c_char_p), ("offset", c_int32), ("size", c_int32))


def cache_scales(cache: Any) -> tuple[int | None, int | None]:
    """Addresses of an int8 cache's scales: k_scale_LNHT and v_scale_LNHT, float32, one a (position, head)."""
    if cache.k_LNHTD.dtype != torch.int8:
        return None, None
    return cache.k_scale_LNHT.data_ptr(), cache.v_scale_LNHT.data_ptr()


def index_tensor(t: Tensor) -> Tensor:
    if t.dtype != torch.int64 or t.device.type != "cpu":
        raise ValueError(f"tokens, positions, slots and select must be int64 on the CPU (got {t.dtype} on {t.device})")
    return t.contiguous()


@functools.cache
def load_library(isa: str | None = None) -> ctypes.CDLL:
    """The compiled library with its functions' types set: built or found once a process. Raises build.BuildError."""
    library = build.load_library(isa)
    library.gf_pool_create.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_bool)
    library.gf_pool_create.restype = c_void_p
    library.gf_pool_destroy.argtypes = (c_void_p,)
    library.gf_link_bytes.argtypes = (ctypes.c_int, ctypes.c_size_t)
    library.gf_link_bytes.restype = ctypes.c_size_t
    library.gf_link_create.argtypes = (
        ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_size_t, ctypes.c_double, ctypes.c_int
    )  # fmt: skip
    library.gf_link_create.restype = c_void_p
    library.gf_link_end.argtypes = library.gf_link_destroy.argtypes = library.gf_link_give_up.argtypes = (c_void_p,)
    library.gf_link_end.restype = c_int32
    library.gf_link_meet.argtypes = (c_void_p, ctypes.c_int)
    library.gf_link_meet.restype = ctypes.c_bool
    library.gf_link_send.argtypes = library.gf_link_receive.argtypes = (c_void_p, c_void_p, ctypes.c_uint32)
    library.gf_link_send.restype = library.gf_link_receive.restype = ctypes.c_bool
    library.gf_decoder_create.argtypes = (POINTER(ModelWeights), c_void_p, c_void_p)
    library.gf_decoder_create.restype = c_void_p
    library.gf_decoder_destroy.argtypes = (c_void_p,)
    library.gf_decoder_start.argtypes = (c_void_p, POINTER(StepInput))
    library.gf_decoder_follow.argtypes = (c_void_p, POINTER(StepInput))
    library.gf_decoder_finish.argtypes = (c_void_p, ctypes.c_uint64)
    library.gf_decoder_head_energy.argtypes = (c_void_p, c_void_p)
    library.gf_decoder_set_tuning.argtypes = (c_void_p, POINTER(Tuning))
    library.gf_decoder_set_screen.argtypes = (c_void_p, POINTER(Screen))
    library.gf_screen_build.argtypes = (
        POINTER(Linear), POINTER(Screen), c_void_p, c_void_p, ctypes.c_int, ctypes.c_int
    )  # fmt: skip
    library.gf_screen.argtypes = (POINTER(Linear), POINTER(Screen), c_void_p, c_void_p, c_void_p)
    library.gf_linear.argtypes = (POINTER(Linear), c_void_p, ctypes.c_int, c_void_p, POINTER(Tuning))
    library.gf_layout.argtypes = (POINTER(ctypes.c_int),)
    library.gf_layout.restype = POINTER(Field)
    return library
