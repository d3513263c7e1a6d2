"""The machine's read bandwidth, probed again beside each run: on shared hosts it moves by a factor of two.

Compiled C++ (read_sum.cpp) where there is a compiler, else torch's sum, which may not reach the machine's limit.
"""

from __future__ import annotations

import ctypes
import hashlib
import time
from pathlib import Path
from typing import Protocol

from gpt_fast.bench.sample import Unavailable
from gpt_fast.files import replacing
from gpt_fast.ops.cpu import build

SOURCE = Path(__file__).with_name("read_sum.cpp")
PASSES = 3


class Reader(Protocol):
    """method: how it reads, for the report."""

    method: str

    def read(self) -> float:
        """Seconds to read the buffer once with all threads."""


class Bandwidth:
    """Holds a buffer of `nbytes`, which should be several times the last cache, and reads it with `threads`."""

    def __init__(self, *, nbytes: int, threads: int) -> None:
        self.nbytes = nbytes - nbytes % (512 * threads)
        if self.nbytes <= 0:
            raise Unavailable("bandwidth probe: switched off (--probe_gib 0)")
        try:
            self.reader: Reader = CompiledReader(self.nbytes, threads)
        except build.BuildError:
            self.reader = TorchReader(self.nbytes, threads)

    def method(self) -> str:
        return self.reader.method

    def probe(self) -> float:
        """Bytes a second: the best of a few passes."""
        return self.nbytes / min(self.reader.read() for _ in range(PASSES))


class CompiledReader:
    method = "C++, read-only sum"

    def __init__(self, nbytes: int, threads: int) -> None:
        self.library = load_library()
        self.buffer = (ctypes.c_uint64 * (nbytes // 8))()
        self.threads = threads
        self.library.gf_touch(self.buffer, len(self.buffer), threads)

    def read(self) -> float:
        check = ctypes.c_uint64()
        seconds = self.library.gf_read(self.buffer, len(self.buffer), self.threads, ctypes.byref(check))
        return float(seconds)


class TorchReader:
    method = "torch.sum of int64"

    def __init__(self, nbytes: int, threads: int) -> None:
        import torch

        torch.set_num_threads(threads)
        self.values = torch.ones(nbytes // 8, dtype=torch.int64)

    def read(self) -> float:
        started = time.perf_counter()
        self.values.sum().item()
        return time.perf_counter() - started


def load_library() -> ctypes.CDLL:
    """read_sum.cpp compiled for this processor, from the cache when it is there. Raises build.BuildError."""
    if reason := build.unavailable():
        raise build.BuildError(reason)
    isa = build.isas_here()[0]
    key = hashlib.sha256(SOURCE.read_bytes()).hexdigest()[:16]
    path = build.cache_dir() / f"read_sum-{isa}-{key}.so"
    if not path.exists():
        with replacing(path) as temporary:
            build.compile_sources(temporary, isa, [str(SOURCE)], ["-shared"])
    library = ctypes.CDLL(str(path))
    library.gf_touch.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    library.gf_touch.restype = None
    library.gf_read.argtypes = [*library.gf_touch.argtypes, ctypes.c_void_p]
    library.gf_read.restype = ctypes.c_double
    return library
