"""Other engines, and other builds of ours, as targets: `--peer NAME[=PATH]`. Each says what it needs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

from gpt_fast.bench.sample import Target, Unavailable

# Name -> (module, what PATH is). A module has load(options) -> Target.
PEERS = {
    "llama.cpp": ("llama_cpp", "the folder of its llama-bench; without: the llama-cpp-python package"),
    "ik_llama.cpp": ("ik_llama", "the folder of its llama-bench"),
    "transformers": ("hf_transformers", ""),
    "openvino": ("openvino_genai", ""),
    "gpt-fast": ("upstream", "a checkout of meta-pytorch/gpt-fast"),
    "build": ("checkout", "another checkout of this repository"),
}


@dataclass(frozen=True)
class PeerOptions:
    """path: NAME=PATH's. gguf: the weights, for peers that read GGUF. checkpoint: ours, for those that do not.

    max_seq_len: positions that a row needs. kv_elements: of one position over all layers, None where not known.
    engine: what Engine.load is given where our own engine is the target.
    """

    path: Path | None
    gguf: Path | None
    checkpoint: Path
    threads: int
    max_seq_len: int
    kv_elements: int | None = None
    engine: dict[str, Any] = field(default_factory=dict)

    def need_path(self, name: str) -> Path:
        if self.path is None:
            raise Unavailable(f"{name}: give --peer {name}=PATH ({PEERS[name][1]})")
        return self.path

    def need_gguf(self, name: str) -> Path:
        if self.gguf is None or not self.gguf.is_file():
            raise Unavailable(f"{name}: reads GGUF: give --gguf FILE with the same weights (got {self.gguf})")
        return self.gguf

    def kv_bytes(self, per_element: int) -> int | None:
        return None if self.kv_elements is None else self.kv_elements * per_element


def load_peer(name: str, options: PeerOptions) -> Target:
    """Raises Unavailable with one line that says what to install or give."""
    module: Any = import_module(f"gpt_fast.bench.peers.{PEERS[name][0]}")
    load: Callable[[PeerOptions], Target] = module.load
    return load(options)
