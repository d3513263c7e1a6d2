"""Which path a GPU takes, and that nothing CUDA-only is imported on the way there: ROCm, no Triton, other shapes."""

from __future__ import annotations

import ast
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from gpt_fast.config import ConfigError, EngineConfig, ModelConfig
from gpt_fast.load import path as load_path
from support.paths import ROOT

CUDA_ONLY = {"triton", "cuda", "cupy", "pycuda", "pynvml", "flash_attn", "flashinfer", "apex", "xformers"}
KERNELS = {"attention_triton", "ceilings_triton", "gemv_triton", "sampler_triton", "state_triton"}
HIDE = """
import sys, torch
class Refuse:
    def find_spec(self, name, *_):
        if name.split(".")[0] in {names}:
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Refuse())
torch.version.hip = "6.4"
"""


class OnCuda(nn.Module):
    """A model as the choice of a path sees it, on a GPU that need not be there."""

    def __init__(self, **changes):
        super().__init__()
        sizes = dict(
            vocab_size=64, n_layer=1, n_head=2, n_kv_head=1, dim=64, head_dim=32, intermediate_size=64, max_position=64
        )
        self.config = ModelConfig(**(sizes | changes))
        self.tok_embeddings = nn.Embedding(64, 64, device="meta")
        self.norm = SimpleNamespace(weight=SimpleNamespace(device=torch.device("cuda"), dtype=torch.bfloat16))


def chosen(model, **options):
    config = EngineConfig(checkpoint_path="x", **options)
    return load_path.choose_path(config, SimpleNamespace(model=model, quantization=None), 1)


@pytest.fixture
def rocm(monkeypatch):
    monkeypatch.setattr(torch.version, "hip", "6.4")


@pytest.fixture
def hopper(monkeypatch):
    """All that is asked about the device, answered as an H200 would."""
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(load_path, "find_spec", lambda name: object())
    monkeypatch.setattr("gpt_fast.ops.gpu.decoder.find_spec", lambda name: object())


def test_rocm_decodes_compiled_and_says_why(rocm, monkeypatch):
    monkeypatch.setattr(load_path, "find_spec", lambda name: object())
    path = chosen(OnCuda())
    assert path.name == "compiled decode (ROCm: the fused GPU kernels are CUDA's)"
    assert path.decode is not path.prefill and path.warm_up


def test_without_triton_operators_are_all_there_is(rocm, monkeypatch):
    monkeypatch.setattr(load_path, "find_spec", lambda name: None)
    assert chosen(OnCuda()).name == "plain (ROCm: the fused GPU kernels are CUDA's)"


@pytest.mark.parametrize(
    ("changes", "options", "name"),
    [
        (dict(qk_norm=True), {}, "compiled decode (qk_norm: the GPU decoder has none)"),
        (dict(qk_norm=True), dict(kernels="plain"), "plain (kernels: plain)"),
        (dict(qk_norm=True), dict(compile=True, compile_prefill=True), "compiled decode and prefill (qk_norm: "),
        (dict(n_expert=4, n_expert_per_token=2), {}, "plain (n_expert=4"),
        ({}, dict(kernels="plain", compile=True), "compiled decode (kernels: plain)"),
        ({}, dict(kv_cache="float32"), "compiled decode (kv_cache=float32: "),
    ],
)
def test_what_no_kernel_takes_on_a_cuda_device(hopper, changes, options, name):
    assert chosen(OnCuda(**changes), **options).name.startswith(name)


def test_experts_are_never_compiled(hopper):
    with pytest.raises(ConfigError, match="a mixture of experts is not compiled"):
        chosen(OnCuda(n_expert=4, n_expert_per_token=2), compile=True)


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({}, "fused GPU decoder"),
        (dict(compile=True), "fused GPU decoder"),
        (dict(compile=True, compile_prefill=True), "fused GPU decoder, compiled prefill"),
        (dict(kv_cache="int8"), "fused GPU decoder"),
    ],
)
def test_compile_never_costs_the_fused_kernels(hopper, monkeypatch, options, name):
    decoder = SimpleNamespace(prefill=None)
    monkeypatch.setattr("gpt_fast.ops.gpu.decoder.GpuDecoder", lambda model: decoder)
    path = chosen(OnCuda(), **options)
    assert path.name == name and path.decode is decoder
    assert (decoder.prefill is not None) == ("prefill" in name)


@pytest.mark.slow
def test_everything_imports_without_triton_on_rocm():
    """In a process of its own, where importing what only CUDA has fails."""
    files = [path.relative_to(ROOT) for path in (ROOT / "gpt_fast").rglob("*.py") if path.stem not in KERNELS]
    names = [".".join(path.with_suffix("").parts) for path in files if path.name != "__main__.py"]
    code = HIDE.replace("{names}", repr(CUDA_ONLY)) + "\n".join(f"import {name}" for name in names)
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


def top_level_imports(path):
    """Roots and last parts of what a module imports when it is imported itself."""
    nodes = list(ast.parse(path.read_text(encoding="utf-8")).body)
    while nodes:
        node = nodes.pop()
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [str(node.module), *(alias.name for alias in node.names)]
        else:
            nested = (ast.FunctionDef, ast.AsyncFunctionDef)
            nodes += [] if isinstance(node, nested) or is_type_checking(node) else list(ast.iter_child_nodes(node))
            continue
        yield from (part for name in names for part in (name.split(".")[0], name.split(".")[-1]))


def is_type_checking(node):
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def test_no_module_needs_cuda_to_be_imported():
    """Kernels' own modules may import Triton; they are imported where they are launched."""
    wrong = {}
    for path in sorted((ROOT / "gpt_fast").rglob("*.py")):
        allowed = {"triton"} if path.stem in KERNELS else set()
        if needed := set(top_level_imports(path)) & ((CUDA_ONLY | KERNELS) - allowed):
            wrong[str(path.relative_to(ROOT))] = needed
    assert not wrong
