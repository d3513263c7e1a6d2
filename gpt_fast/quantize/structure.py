"""Which modules of a model are quantized and how: planned for a mode, or read from a file's metadata.

The metadata is a JSON object under "quantization" in the safetensors header:
{"version": 1, "mode": "int4", "groupsize": 32, "source": {...}, "modules": {"layers.0.attention.wqkv": "int4.g32"}}.
`modules` alone decides the structure; mode and groupsize, which people and reports read, must not say otherwise, and
the rest says where the file came from.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from gpt_fast.model.transformer import MoE, Transformer
from gpt_fast.quantize.linear import Int4Linear, Int8Embedding, Int8Linear, Quantized, TiedHead
from gpt_fast.quantize.scheme import QuantizationError, Scheme

VERSION = 1
MODES = ("int8", "int4", "int4-gptq")
EMBEDDING_BESIDE_INT4 = Scheme(8, 32)  # as GGUF's Q8_0


def plan(model: Transformer, *, mode: str, groupsize: int, embedding: str = "auto") -> dict[str, Scheme]:
    """The scheme of every module that `mode` quantizes, by module name, in the model's order.

    All linear layers, experts included, except a mixture's router. embedding "int8" also quantizes the token
    embedding, "keep" leaves it, "auto" quantizes it where the output head shares it. A shared head is what its
    embedding is. int8 is per row; an embedding in an int4 file has a scale per 32 inputs.
    """
    body = Scheme(8, 0) if mode == "int8" else Scheme(4, groupsize)
    tied = model.config.tie_embeddings
    schemes: dict[str, Scheme] = {}
    if embedding == "int8" or (embedding == "auto" and tied):
        schemes["tok_embeddings"] = Scheme(8, 0) if mode == "int8" else EMBEDDING_BESIDE_INT4
    routers = {f"{name}.gate" for name, module in model.named_modules() if isinstance(module, MoE)}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name not in routers and not (tied and name == "output"):
            schemes[name] = body
    return schemes


def parse_metadata(metadata: Mapping[str, Any]) -> dict[str, Scheme]:
    """The schemes a file's metadata states. QuantizationError: another version, or a contradiction in it."""
    if not isinstance(metadata, Mapping) or metadata.get("version") != VERSION:
        got = metadata.get("version") if isinstance(metadata, Mapping) else metadata
        raise QuantizationError(f"quantization metadata: unknown version (got {got!r}, allowed {VERSION})")
    modules = metadata.get("modules")
    if not isinstance(modules, Mapping) or not modules:
        raise QuantizationError(f"quantization metadata: modules must be a non-empty object (got {modules!r})")
    schemes = {name: Scheme.parse(text) for name, text in modules.items()}
    if "mode" in metadata:
        check_mode(metadata["mode"], metadata.get("groupsize"), schemes)
    return schemes


def check_mode(mode: object, groupsize: Any, schemes: Mapping[str, Scheme]) -> None:
    """Every module must be what the mode makes of a linear, or, in an int4 file, int8.g32 (an embedding, a Q8_0)."""
    if mode not in MODES:
        raise QuantizationError(f"quantization metadata: mode: unknown (got {mode!r}, allowed {', '.join(MODES)})")
    body = Scheme(8, groupsize or 0) if mode == "int8" else Scheme(4, groupsize)
    allowed = {body} if mode == "int8" else {body, EMBEDDING_BESIDE_INT4}
    for name, scheme in schemes.items():
        if scheme not in allowed:
            raise QuantizationError(
                f"quantization metadata: {name} is {scheme}, but mode {mode} with groupsize {groupsize} means {body}"
            )


def apply_structure(model: Transformer, metadata: Mapping[str, Any]) -> None:
    """Give the model the quantized modules that its file holds, ready for load_state_dict.

    Tensors of another dtype or shape are for check_stored to refuse. The modules compute in the dtype that
    `model.to(dtype)` gives; before it, in float32.
    """
    apply_schemes(model, parse_metadata(metadata))


def apply_schemes(model: Transformer, schemes: Mapping[str, Scheme]) -> None:
    modules = dict(model.named_modules())
    for name, scheme in schemes.items():
        if name not in modules:
            raise QuantizationError(f"quantization metadata: {name} is {scheme}, but the model has no such module")
        model.set_submodule(name, quantized_like(modules[name], scheme, name=name))
    if model.config.tie_embeddings and isinstance(model.tok_embeddings, Int8Embedding):
        model.set_submodule("output", TiedHead(model.tok_embeddings))


def quantized_like(module: nn.Module, scheme: Scheme, *, name: str) -> Quantized:
    """An empty quantized module of the same sizes, device and dtype. QuantizationError where it cannot be one."""
    if isinstance(module, nn.Embedding) and scheme.bits == 8:
        rows, columns, weight = module.num_embeddings, module.embedding_dim, module.weight
        return Int8Embedding(scheme, rows, columns, dtype=weight.dtype, device=weight.device)
    if not isinstance(module, nn.Linear):
        raise QuantizationError(f"{name}: a {type(module).__name__} cannot be {scheme}")
    if scheme.bits == 4 and module.in_features % 2:
        raise QuantizationError(f"{name}: int4 needs an even number of inputs (got {module.in_features})")
    kind = Int4Linear if scheme.bits == 4 else Int8Linear
    return kind(
        scheme,
        module.in_features,
        module.out_features,
        bias=module.bias is not None,
        dtype=module.weight.dtype,
        device=module.weight.device,
    )


def check_stored(model: Transformer, entries: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]) -> None:
    """Before a load: hold a file's tensors, name -> (dtype, shape), to what its metadata made of the model's modules.

    QuantizationError, naming both: a quantized module's tensors are others than its scheme's, or a module that the
    metadata leaves alone has a scale or integers.
    """
    held: dict[str, dict[str, tuple[torch.dtype, tuple[int, ...]]]] = {}
    for name, entry in entries.items():
        module, _, part = name.rpartition(".")
        if part != "bias":
            held.setdefault(module, {})[part] = entry
    for name, module in model.named_modules():
        got = held.get(name, {})
        if isinstance(module, Quantized):
            scheme, expected = module.scheme, module.scheme.tensors(module.rows, module.columns)
            if got != expected:
                raise QuantizationError(
                    f"{name}: the file holds {shown(got)}, its metadata says {scheme}, which is {shown(expected)}"
                )
        elif "scale" in got or any(not dtype.is_floating_point for dtype, _ in got.values()):
            raise QuantizationError(f"{name}: the file holds {shown(got)}, its metadata does not say it is quantized")


def shown(parts: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]) -> str:
    names = (f"{part} {str(dtype).removeprefix('torch.')} {list(shape)}" for part, (dtype, shape) in parts.items())
    return ", ".join(names) or "nothing"


def stored_tensors(
    model: Transformer, schemes: Mapping[str, Scheme]
) -> dict[str, tuple[torch.dtype | None, tuple[int, ...]]]:
    """Name -> (dtype, shape) of every tensor of the quantized file, in the model's order; dtype None: the source's."""
    tied_head = "output.weight" if model.config.tie_embeddings else None
    stored: dict[str, tuple[torch.dtype | None, tuple[int, ...]]] = {}
    for name, tensor in model.state_dict().items():
        module, _, last = name.rpartition(".")
        if module in schemes and last == "weight":
            for part, spec in schemes[module].tensors(*tensor.shape).items():
                stored[f"{module}.{part}"] = spec
        elif name != tied_head:
            stored[name] = (None, tuple(tensor.shape))
    return stored
