"""llama.cpp (github.com/ggml-org/llama.cpp): a build's own tools, or the llama-cpp-python package."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from gpt_fast.bench.peers import PeerOptions
from gpt_fast.bench.peers.llama_build import Dialect, LlamaBuild
from gpt_fast.bench.recorder import record
from gpt_fast.bench.sample import Case, Description, Sample, Target, Unavailable

NAME = "llama.cpp"


def load(options: PeerOptions) -> Target:
    gguf = options.need_gguf(NAME)
    if options.path is None:
        return LlamaPackage(gguf, options)
    return LlamaBuild(
        Dialect(NAME, decode=("-p", "0", "-n", "{new}", "-d", "{prompt}")),
        folder=options.path,
        gguf=gguf,
        threads=options.threads,
        kv_bytes=options.kv_bytes(2),
    )


class LlamaPackage:
    """llama-cpp-python: the same token ids as ours, argmax in numpy, one row."""

    def __init__(self, gguf: Path, options: PeerOptions) -> None:
        try:
            import llama_cpp
        except ImportError:
            raise Unavailable(f"{NAME}: give {NAME}=FOLDER of a build, or pip install llama-cpp-python") from None
        started = time.perf_counter()
        self.model: Any = llama_cpp.Llama(
            str(gguf),
            n_ctx=options.max_seq_len,
            n_batch=512,
            n_threads=options.threads,
            n_threads_batch=options.threads,
            verbose=False,
        )
        facts = {"llama-cpp-python": llama_cpp.__version__, "gguf": gguf.name}
        self.description = Description(gguf.stat().st_size, options.kv_bytes(2), time.perf_counter() - started, facts)

    def describe(self) -> Description:
        return self.description

    def run(self, case: Case) -> Sample:
        if case.rows > 1:
            raise Unavailable(f"{NAME}: the package decodes one row: batches need --peer {NAME}=FOLDER of a build")
        self.model.reset()
        return record(case, lambda: self._feed(case.prompts()[0]), lambda token: self._feed([token]))

    def _feed(self, tokens: list[int]) -> int:
        self.model.eval(tokens)
        return int(self.model.scores[self.model.n_tokens - 1].argmax())
