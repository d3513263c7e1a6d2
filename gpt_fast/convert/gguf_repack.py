"""GGUF's block formats as our stored tensors, without loss: nibbles, bytes and float16 scales are moved, not rounded.

Shapes: N rows, K columns, G = K/32 blocks of a row.

The formats (github.com/ggml-org/ggml, ggml-quants.c), each block 32 weights of a row: Q4_0 is float16 d and 16 bytes
(low nibbles are weights 0..15, high ones 16..31), w = (q - 8) d; Q4_1 has float16 d and m first, w = q d + m; Q8_0 is
float16 d and 32 int8, w = q d.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from gpt_fast.config import ModelConfig
from gpt_fast.convert.gguf import GgufSource
from gpt_fast.convert.names import Piece, Recipe, gguf_candidates, half_to_interleaved
from gpt_fast.convert.run import choose
from gpt_fast.convert.source import row_count
from gpt_fast.ops.int4 import pack_nibbles
from gpt_fast.quantize.rtn import dequantize_weight
from gpt_fast.quantize.scheme import QuantizationError, Scheme

BLOCK = 32
Parts = dict[str, Tensor]


def repack_q4_0(blocks_NGB: Tensor) -> Parts:
    scale_NG = float16_at(blocks_NGB, 0)
    return {"weight": pack_halves(blocks_NGB[..., 2:]), "scale": scale_NG, "min": -8 * scale_NG}


def repack_q4_1(blocks_NGB: Tensor) -> Parts:
    scale_NG, min_NG = float16_at(blocks_NGB, 0), float16_at(blocks_NGB, 2)
    return {"weight": pack_halves(blocks_NGB[..., 4:]), "scale": scale_NG, "min": min_NG}


def repack_q8_0(blocks_NGB: Tensor) -> Parts:
    q_NK = blocks_NGB[..., 2:].contiguous().view(torch.int8).flatten(-2)
    return {"weight": q_NK, "scale": float16_at(blocks_NGB, 0)}


def float16_at(blocks_NGB: Tensor, byte: int) -> Tensor:
    return blocks_NGB[..., byte : byte + 2].contiguous().view(torch.float16)[..., 0]


def pack_halves(bytes_NGB: Tensor) -> Tensor:
    """GGUF's nibbles (a block's first half low, its second high) in our order."""
    return pack_nibbles(torch.cat((bytes_NGB & 0xF, bytes_NGB >> 4), dim=-1).flatten(-2))


REPACK: Mapping[str, Callable[[Tensor], Parts]] = {"Q4_0": repack_q4_0, "Q4_1": repack_q4_1, "Q8_0": repack_q8_0}
SCHEMES = {"Q4_0": Scheme(4, BLOCK), "Q4_1": Scheme(4, BLOCK), "Q8_0": Scheme(8, BLOCK)}


class GgufBlocks:
    """The quantized weights of one GGUF file, as the modules of our model hold them."""

    def __init__(self, source: GgufSource, config: ModelConfig) -> None:
        self.source, self.config = source, config
        half_split = source.metadata.get("general.architecture") != "llama"
        self.candidates = gguf_candidates(config, half_split=half_split)

    def schemes(self, modules: list[str]) -> dict[str, Scheme]:
        """The scheme of each module that the file holds in blocks; those it holds as floats are left out.

        QuantizationError: a block format that cannot be moved without loss, or two different ones in one module.
        """
        found = {}
        for module in modules:
            kinds = {self.source.tensors[piece.name].block for piece in self._recipe(module)}
            if all(kind.plain is not None for kind in kinds):
                continue
            names = sorted(kind.name for kind in kinds)
            schemes = {SCHEMES.get(name) for name in names}
            if None in schemes or len(schemes) > 1:
                raise QuantizationError(
                    f"{module}: {' and '.join(names)} in {self.source.path.name} cannot be repacked without loss "
                    "(allowed Q4_0, Q4_1, Q8_0)"
                )
            found[module] = next(scheme for scheme in schemes if scheme is not None)
        return found

    def parts(self, module: str) -> Parts:
        """The stored tensors of one module of `schemes`."""
        pieces = [self._piece(piece) for piece in self._recipe(module)]
        return {part: torch.cat([piece[part] for piece in pieces]) for part in pieces[0]}

    def _recipe(self, module: str) -> Recipe:
        return choose(self.source, f"{module}.weight", self.candidates[f"{module}.weight"])

    def _piece(self, piece: Piece) -> Parts:
        block, shape, offset = self.source.tensors[piece.name]
        first, last = piece.rows or (0, row_count(shape))
        width = shape[-1] // BLOCK * block.nbytes
        flat = torch.frombuffer(
            self.source.mapping, dtype=torch.uint8, count=(last - first) * width, offset=offset + first * width
        )
        parts = REPACK[block.name](flat.view(last - first, -1, block.nbytes))
        if not piece.rope_heads:
            return parts
        return {
            part: half_to_interleaved(tensor, piece.rope_heads, self.config.rotary_dim)
            for part, tensor in parts.items()
        }


def check_same_weight(parts: Parts, scheme: Scheme, weight_NK: Tensor, *, name: str, gguf: str) -> None:
    """The repacked tensors must be the checkpoint's own weight, value for value in its dtype."""
    if not torch.equal(dequantize_weight(parts, scheme).to(weight_NK.dtype), weight_NK):
        raise QuantizationError(f"{name}: {gguf} holds other values than the checkpoint: it was not converted from it")
