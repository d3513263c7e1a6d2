"""Random inputs for the GPU kernels' tests; every output starts as NaN, so that what a kernel leaves out is seen."""

import torch

from gpt_fast.ops.gpu.layer_cache import LayerCache
from gpt_fast.ops.gpu.pack import GpuLinear, pack_fp8, pack_linear
from gpt_fast.ops.int4 import pack_nibbles

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def poisoned(*shape, dtype=torch.bfloat16):
    return torch.full(shape, float("nan"), dtype=dtype, device=DEVICE)


def normal(*shape, seed, dtype=torch.bfloat16, scale=1.0):
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale).to(DEVICE, dtype)


def weight(kind, rows, columns, *, seed, group=32, dtype=torch.bfloat16) -> GpuLinear:
    """A random weight of outputs near 1 for inputs near 1."""
    generator = torch.Generator().manual_seed(seed)
    size = columns**-0.5
    if kind == "bf16":
        return pack_linear(normal(rows, columns, seed=seed, scale=size, dtype=dtype))
    if kind == "fp8":
        return pack_fp8(normal(rows, columns, seed=seed, scale=size))
    if kind == "int8g":
        q = torch.randint(-127, 128, (rows, columns), generator=generator, dtype=torch.int8)
        scale = (torch.rand(rows, columns // group, generator=generator) * size / 64).half()
        return pack_linear(q.to(DEVICE), scale.to(DEVICE), groupsize=group)
    if kind == "int8":
        q = torch.randint(-127, 128, (rows, columns), generator=generator, dtype=torch.int8)
        return pack_linear(q.to(DEVICE), (torch.rand(rows, generator=generator) * size / 64).to(DEVICE))
    q = torch.randint(0, 16, (rows, columns), generator=generator, dtype=torch.uint8)
    scale = (torch.rand(rows, columns // group, generator=generator) * size / 4).half()
    minimum = (-7.5 * scale.float()).half()
    return pack_linear(pack_nibbles(q).to(DEVICE), scale.to(DEVICE), minimum.to(DEVICE), groupsize=group)


def layer_cache(slots, heads, positions, head_dim, *, seed, dtype=torch.bfloat16) -> LayerCache:
    """Full of numbers; of torch.int8, codes with a scale each."""
    shape = (slots, heads, positions, head_dim)
    if dtype != torch.int8:
        return LayerCache(*(normal(*shape, seed=seed + i, dtype=dtype) for i in range(2)))
    generator = torch.Generator().manual_seed(seed)
    codes = [torch.randint(-127, 128, shape, generator=generator, dtype=torch.int8).to(DEVICE) for _ in range(2)]
    scales = [(torch.rand(shape[:-1], generator=generator) / 64).to(DEVICE) for _ in range(2)]
    return LayerCache(*codes, *scales)
