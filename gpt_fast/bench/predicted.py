"""How fast N cards would decode: a model of a step's time, fitted to published figures, and what they say besides.

    seconds = bytes of the largest share / bandwidth + kernels * seconds of one + sums * seconds of one

It knows no limit but these: not that arithmetic on integers holds a card back, nor keys and values (few, at the short
contexts that are published). gpt-fast cuts the layers and sums twice in each, every rank has the whole head; this
engine cuts the vocabulary too, for one more sum (the embedding) and a gather of the logits, counted as a sum.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from gpt_fast.config import ModelConfig

# gpt-fast's decode of one stream on A100-80GB cards of 330 W: ranks -> tokens a second.
# NCCL: pytorch.org/blog/accelerating-generative-ai-2, and the README of its time; direct: the README's present table,
# whose sums go from card to card (ENABLE_INTRA_NODE_COMM). github.com/pytorch-labs/gpt-fast
NCCL: Mapping[tuple[str, str], Mapping[int, float]] = {
    ("llama-2-7b", "bf16"): {1: 104.9, 2: 136.3, 4: 168.8, 8: 179.3},
    ("llama-2-70b", "bf16"): {2: 20.5, 4: 34.2, 8: 47.3},
    ("llama-2-70b", "int8"): {1: 19.1},
    ("llama-2-70b", "int4"): {1: 25.3},
}
DIRECT: Mapping[tuple[str, str], Mapping[int, float]] = {
    ("llama-2-7b", "bf16"): {1: 104.9, 2: 168.84, 4: 254.02, 8: 328.43},
    ("llama-3.1-8b", "bf16"): {1: 93.83, 2: 149.10, 4: 217.21, 8: 276.01},
    ("llama-2-70b", "bf16"): {2: 21.32, 4: 38.01, 8: 62.50},
    ("llama-2-70b", "int8"): {8: 80.44},
    ("llama-2-70b", "int4"): {8: 90.77},
}
FITTED = ("llama-2-7b", "bf16")  # what the sums' times are taken from; all else is a check of the model

BITS = {"bf16": 16.0, "int8": 8.0, "int4": 5.0}  # of a linear layer's weight; int4: a scale and a minimum per 32
A100_BANDWIDTH = 1.7e12  # bytes a second that decode can read: gpt-fast's own estimate for these cards
A100_MEMORY = 80e9  # bytes: a larger share does not fit
A100_KERNEL = 4e-6  # what each kernel adds there: 7B's step beyond its bytes, over its kernels
UPSTREAM_KERNELS, OUR_KERNELS = 13.5, 5.0  # a layer, those outside of layers shared out; compiled, and ops/gpu


@dataclass(frozen=True)
class Step:
    """What a rank does for a token: bytes that it reads, layers, sums over ranks, and kernels a layer."""

    nbytes: int
    layers: int
    sums: int
    kernels: float

    @classmethod
    def ours(cls, share: ModelConfig, form: str, size: int) -> Step:
        """share: the largest, of `size` ranks."""
        sums = 2 * share.n_layer + 2 if size > 1 else 0
        return cls(weight_bytes(share, form, rows=share.vocab_size), share.n_layer, sums, OUR_KERNELS)

    @classmethod
    def upstream(cls, share: ModelConfig, form: str, size: int, *, vocabulary: int) -> Step:
        sums = 2 * share.n_layer if size > 1 else 0
        return cls(weight_bytes(share, form, rows=vocabulary), share.n_layer, sums, UPSTREAM_KERNELS)

    def seconds(self, sum_seconds: float) -> float:
        """On A100s; sum_seconds: of one sum."""
        return self.nbytes / A100_BANDWIDTH + self.kernels * self.layers * A100_KERNEL + self.sums * sum_seconds

    def fitted_sum(self, tokens_per_second: float) -> float:
        """Seconds of one sum, if that is all that a published step takes beyond its bytes and kernels."""
        return (1 / tokens_per_second - self.seconds(0.0)) / self.sums


def weight_bytes(share: ModelConfig, form: str, *, rows: int) -> int:
    """Of the layers' matrices and of `rows` rows of the head."""
    heads = 2 * share.n_head + 2 * share.n_kv_head  # of wqkv and wo
    layer = share.dim * (heads * share.head_dim + 3 * share.intermediate_size)
    return int((share.n_layer * layer + rows * share.dim) * BITS[form] / 8)
