"""Weight-only quantization: a transform of a built model, and `python -m gpt_fast.quantize` that makes the files.

A quantized file is portable: it holds plain integers, scales and mins; `pack` lays them out for a device's kernel.
"""

from gpt_fast.quantize.linear import Int4Linear, Int8Embedding, Int8Linear, Quantized, TiedHead, pack
from gpt_fast.quantize.scheme import QuantizationError, Scheme
from gpt_fast.quantize.structure import apply_structure, check_stored, parse_metadata

__all__ = [
    "Int4Linear",
    "Int8Embedding",
    "Int8Linear",
    "QuantizationError",
    "Quantized",
    "Scheme",
    "TiedHead",
    "apply_structure",
    "check_stored",
    "pack",
    "parse_metadata",
]
