"""python -m gpt_fast.ops.gpu --compile: what the kernels become for an H200, which needs no GPU to be seen.

Every kernel is compiled for sm_90 at the shapes of Llama-3.1-8B; one line each: registers a thread, bytes of stack
(spills), shared memory, 16-byte loads and other loads of global memory in the main loop, instructions a weight (in
attention: a cached element). The H200 issues 13.8 to 15.5 instructions in the time its memory gives a bf16 weight,
6.9 to 7.8 for int8 and fp8, 3.4 to 3.9 for int4; what needs more is bound by arithmetic.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import tempfile
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gpt_fast.ops.gpu.attention import AttentionWorkspace, attention_launch
from gpt_fast.ops.gpu.gemv import gate_up_launch, linear_launch, qkv_launch
from gpt_fast.ops.gpu.launch import Launch
from gpt_fast.ops.gpu.layer_cache import HeadWorkspace, LayerCache
from gpt_fast.ops.gpu.pack import FP8, GpuLinear
from gpt_fast.ops.gpu.sampler import sample_launches, sampler_workspace

TYPES = {
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.float32: "fp32",
    torch.float64: "fp64",
    FP8: "fp8e4nv",
    torch.uint8: "u8",
    torch.int8: "i8",
    torch.int32: "i32",
    torch.int64: "i64",
}
DIM, HIDDEN, VOCAB, HEADS, KV_HEADS, HEAD_DIM, CONTEXT = 4096, 14336, 128256, 32, 8, 128, 8192
BITS = {"bf16": 16, "int8": 8, "int8g": 8, "int4": 4, "fp8": 8}
INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\d+ )?\s*([A-Z][A-Z0-9_.]+)")


class Case(NamedTuple):
    """A launch, and how many weights one pass of its main loop takes (0: it has none)."""

    name: str
    launch: Launch
    weights: int


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m gpt_fast.ops.gpu", description=__doc__.splitlines()[0])
    parser.add_argument("--compile", action="store_true", required=True, help="compile for sm_90 and report")
    parser.add_argument("--only", default="", metavar="TEXT", help="kernels whose name has this in it")
    only = parser.parse_args().only
    print(f"{'kernel':32} registers    stack   shared  16-byte  other loads  instructions/weight")
    for case in cases():
        if only in case.name:
            print(report(case), flush=True)


def cases() -> Iterator[Case]:
    for kind in ("bf16", "int8", "int8g", "int4", "fp8"):
        for tokens in (1, 5, 16):
            yield from linear_cases(kind, tokens)
    for cached, tokens in product(("bf16", "int8"), (1, 5)):
        index, q = meta(tokens, dtype=torch.int64), meta(tokens, HEADS, HEAD_DIM)
        floats, counts = meta(1, dtype=torch.float32), meta(1, dtype=torch.int32)
        shares = AttentionWorkspace(floats, floats, floats, counts)
        launch = attention_launch(
            q, layer_cache(cached), index, index, shares, q, scale=0.1, splits=32, rows_per_slot=tokens
        )
        yield Case(f"attention {cached} M={tokens}", launch, 2 * HEAD_DIM * launch.constants["POSITIONS"])
    floats, doubles, index = (meta(1, dtype=dtype) for dtype in (torch.float32, torch.float64, torch.int64))
    workspace = sampler_workspace(1, VOCAB, torch.device("meta"))
    logits = meta(1, VOCAB, dtype=torch.float32)
    peaks, choice = sample_launches(logits, floats, index, floats, doubles, workspace, index)
    yield from (Case("sampler: peaks", peaks, 0), Case("sampler: choice", choice, 0))


def linear_cases(kind: str, tokens: int) -> Iterator[Case]:
    x, norm, hidden = meta(tokens, DIM), meta(DIM), meta(tokens, HIDDEN)
    index = meta(tokens, dtype=torch.int64)
    heads = HeadWorkspace(meta(1, dtype=torch.float32), meta(1, dtype=torch.int32))
    rope = meta(CONTEXT, 2, HEAD_DIM // 2, dtype=torch.float32)
    logits = meta(tokens, VOCAB, dtype=torch.float32)
    qkv, q = weight(kind, (HEADS + 2 * KV_HEADS) * HEAD_DIM, DIM), meta(tokens, HEADS, HEAD_DIM)
    launches = {
        "qkv": qkv_launch(x, norm, qkv, rope, index, index, layer_cache("bf16"), None, q, eps=1e-5),
        "qkv to int8": qkv_launch(x, norm, qkv, rope, index, index, layer_cache("int8"), heads, q, eps=1e-5),
        "out": linear_launch(x, None, weight(kind, DIM, DIM), x, x, eps=0.0),
        "gate_up": gate_up_launch(x, norm, weight(kind, 2 * HIDDEN, DIM), hidden, eps=1e-5),
        "down": linear_launch(hidden, None, weight(kind, DIM, HIDDEN), x, x, eps=0.0),
        "head": linear_launch(x, norm, weight(kind, VOCAB, DIM), None, logits, eps=1e-5),
    }
    for name, launch in launches.items():
        step = launch.constants["ROWS"] * launch.constants["COLUMNS"] * launch.arguments["weight"].element_size()
        yield Case(f"{name} {kind} M={tokens}", launch, step * 8 // BITS[kind])


def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def layer_cache(cached: str) -> LayerCache:
    shape = (4, KV_HEADS, CONTEXT + 1, HEAD_DIM)
    if cached == "bf16":
        return LayerCache(meta(*shape), meta(*shape))
    codes, steps = meta(*shape, dtype=torch.int8), meta(*shape[:3], dtype=torch.float32)
    return LayerCache(codes, codes, steps, steps)


def weight(kind: str, rows: int, columns: int) -> GpuLinear:
    scale = meta(rows, columns // 32, dtype=torch.float16)
    if kind == "int8g":
        return GpuLinear(kind, meta(rows, columns, dtype=torch.int8), scale, None, rows, columns, 32)
    if kind == "int4":
        return GpuLinear(kind, meta(rows, columns // 2, dtype=torch.uint8), scale, scale, rows, columns, 32)
    dtype = {"bf16": torch.bfloat16, "int8": torch.int8, "fp8": FP8}[kind]
    scale_N = None if kind == "bf16" else meta(rows, dtype=torch.float32)
    return GpuLinear(kind, meta(rows, columns, dtype=dtype), scale_N, None, rows, columns, 0)


# ------------------------------------------------------------------------------- compile and count


def report(case: Case) -> str:
    compiled = compile_sm90(case.launch)
    usage, sass = disassemble(compiled.asm["cubin"])
    loop = longest_loop(sass)
    wide = sum(bool(re.match(r"LDG\S*128", op)) for op in loop)
    other = sum(op.startswith("LDG") and "128" not in op and "DEPBAR" not in op for op in loop)
    lanes = 32 * case.launch.num_warps
    each = f"{len(loop) * lanes / case.weights:10.2f}" if case.weights else " " * 10
    registers, stack = re.search(r"REG:(\d+)", usage), re.search(r"STACK:(\d+)", usage)
    figures = [int(found[1]) if found else -1 for found in (registers, stack)]
    return f"{case.name:32} {figures[0]:9} {figures[1]:8} {compiled.metadata.shared:8} {wide:8} {other:12} {each}"


def compile_sm90(launch: Launch) -> Any:
    """As Triton would at the first launch on an H200: pointers and multiples of 16 are known to be such."""
    from triton import compile as triton_compile
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    constants, signature, attributes = dict(launch.constants), {}, {}
    for place, name in enumerate(launch.kernel.arg_names):
        value = launch.arguments.get(name)
        signature[name] = type_name(value)
        if value is None or (isinstance(value, int) and value == 1):
            signature[name], constants[name] = "constexpr", constants.get(name, value)
        elif isinstance(value, Tensor) or (isinstance(value, int) and value % 16 == 0):
            attributes[(place,)] = [["tt.divisibility", 16]]
    options = {"num_warps": launch.num_warps, "num_stages": launch.num_stages}
    source = ASTSource(launch.kernel, signature, constants, attributes)
    return triton_compile(source, target=GPUTarget("cuda", 90, 32), options=options)


def type_name(value: object) -> str:
    if isinstance(value, Tensor):
        return "*" + TYPES[value.dtype]
    return "i32" if isinstance(value, int) else "fp32"


def disassemble(cubin: bytes) -> tuple[str, str]:
    """(resource usage, machine code), by the tools in Triton's wheel."""
    import triton.backends.nvidia

    tools = Path(triton.backends.nvidia.__path__[0]) / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        commands = (["cuobjdump", "-res-usage", file.name], ["nvdisasm", "-c", file.name])
        runs = [subprocess.run([tools / c[0], *c[1:]], capture_output=True, text=True, check=True) for c in commands]
    return runs[0].stdout, runs[1].stdout


def longest_loop(sass: str) -> list[str]:
    """The instructions between the label and the branch back to it that enclose most."""
    labels: dict[str, int] = {}
    best = range(0)
    lines = sass.splitlines()
    for number, line in enumerate(lines):
        if label := re.match(r"\s*\.(L_x_\d+):", line):
            labels[label[1]] = number
        jump = re.search(r"BRA.*`\(\.(L_x_\d+)\)", line)
        if jump and number - labels.get(jump[1], number) > len(best):
            best = range(labels[jump[1]], number + 1)
    return [found[1] for number in best if (found := INSTRUCTION.search(lines[number]))]


if __name__ == "__main__":
    main()
