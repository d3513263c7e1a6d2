"""The fused CPU decoder: one C++ call a forward, chosen at load where `unsupported` says None."""

from gpt_fast.ops.cpu.build import BuildError
from gpt_fast.ops.cpu.decoder import CpuDecoder, Pool, unsupported

__all__ = ["BuildError", "CpuDecoder", "Pool", "unsupported"]
