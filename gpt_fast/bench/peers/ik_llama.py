"""ik_llama.cpp (github.com/ikawrakow/ik_llama.cpp) by its own tools; weights repacked at load."""

from __future__ import annotations

from gpt_fast.bench.peers import PeerOptions
from gpt_fast.bench.peers.llama_build import Dialect, LlamaBuild

NAME = "ik_llama.cpp"


def load(options: PeerOptions) -> LlamaBuild:
    return LlamaBuild(
        Dialect(
            NAME,
            decode=("-p", "0", "-n", "0", "-gp", "{prompt},{new}"),
            bench=("-rtr", "1"),
            batched=("-rtr",),
        ),
        folder=options.need_path(NAME),
        gguf=options.need_gguf(NAME),
        threads=options.threads,
        kv_bytes=options.kv_bytes(2),
    )
