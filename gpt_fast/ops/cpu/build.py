"""Compile the decoder once with the machine's C++ compiler and keep the shared library in a cache.

The library has a plain C interface and includes no torch headers: it compiles in seconds and fits any torch.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

from gpt_fast.files import replacing

SOURCES = Path(__file__).parent / "src"
FLAGS = (
    "-O3",
    "-std=c++20",
    "-fPIC",
    "-pthread",
    "-ffp-contract=off",
    "-Wall",
    "-Wextra",
    "-Wno-psabi",
    "-Wno-maybe-uninitialized",
)  # gcc 12 raises the last one inside its own AVX-512 header
# Instruction sets, best first: the cpuinfo flags each needs and what the compiler is told.
AVX512_BF16 = (
    "avx512f avx512bw avx512vl avx512dq avx512_vnni avx512_bf16",
    ("-march=x86-64-v4", "-mavx512vnni", "-mavx512bf16"),
)
AVX512 = ("avx512f avx512bw avx512vl avx512dq avx512_vnni", ("-march=x86-64-v4", "-mavx512vnni"))
AVX2_VNNI = ("avx2 fma f16c avx_vnni", ("-march=x86-64-v3", "-mavxvnni"))
AVX2 = ("avx2 fma f16c", ("-march=x86-64-v3",))
ISAS = {"avx512_bf16": AVX512_BF16, "avx512": AVX512, "avx2_vnni": AVX2_VNNI, "avx2": AVX2}


class BuildError(RuntimeError):
    """Why the library cannot be had here: one line."""


def cpuinfo() -> dict[str, str]:
    """What the system says of the first processor; empty where it does not tell."""
    try:
        lines = Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()
    except OSError:
        return {}
    return {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}


def cpu_flags() -> frozenset[str]:
    """The processor's feature flags; empty where the system does not tell."""
    return frozenset(cpuinfo().get("flags", "").split())


def processor() -> str:
    """The processor's name, with the numbers that tell apart what virtual machines give one name."""
    told = cpuinfo()
    numbers = ", ".join(
        f"{key.removeprefix('cpu ')} {told[key]}" for key in ("cpu family", "model", "stepping") if key in told
    )
    return f"{told.get('model name', platform.machine())} ({numbers})" if numbers else platform.machine()


def best_isa(flags: frozenset[str]) -> str | None:
    """The first of ISAS that the processor has."""
    return next((name for name, (needs, _) in ISAS.items() if flags.issuperset(needs.split())), None)


def compiler() -> str | None:
    """$CXX, or the first C++ compiler on the path."""
    names = (os.environ.get("CXX"), "g++", "clang++")
    return next(filter(None, (shutil.which(name) for name in names if name)), None)


def cache_dir() -> Path:
    """$GPT_FAST_CACHE, else gpt_fast under the user's cache directory."""
    if own := os.environ.get("GPT_FAST_CACHE"):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gpt_fast"


def unavailable() -> str | None:
    """Why no library can be built here, or None."""
    if best_isa(cpu_flags()) is None:
        return "the processor has neither AVX-512 VNNI nor AVX2 with FMA and F16C"
    return None if compiler() else "no C++ compiler found (looked for $CXX, g++, clang++)"


def load_library(isa: str | None = None) -> ctypes.CDLL:
    """The compiled decoder for `isa` (default: the best the processor has), built now if the cache lacks it.

    Raises BuildError. Processes may build at once: each writes its own file and renames it into place.
    """
    if reason := unavailable():
        raise BuildError(reason)
    isa = isa or best_isa(cpu_flags())
    assert isa is not None
    path = cache_dir() / f"decoder-{isa}-{source_key(isa)}.so"
    try:
        if not path.exists():
            build(path, isa)
        return ctypes.CDLL(str(path))
    except OSError as error:
        raise BuildError(f"cannot use the cache {path.parent} (set GPT_FAST_CACHE): {error}") from error


def source_key(isa: str) -> str:
    """Hash of all that decides the library's contents: sources, flags, compiler."""
    cxx = compiler()
    version = subprocess.run([str(cxx), "--version"], capture_output=True, text=True, check=True).stdout
    parts = [version, *FLAGS, *ISAS[isa][1]]
    parts += [path.read_text() for path in sorted(SOURCES.rglob("*.h")) + sorted(SOURCES.rglob("*.cpp"))]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def build(path: Path, isa: str) -> None:
    """Compile the decoder to `path`: whole or not at all, for other processes may look for it meanwhile."""
    with replacing(path) as temporary:
        compile_sources(temporary, isa, ["decoder.cpp"], ["-shared"])


def compile_sources(output: Path, isa: str, sources: Sequence[str], extra: Sequence[str]) -> None:
    """Run the compiler; BuildError carries its first error line."""
    command = [str(compiler()), *FLAGS, *ISAS[isa][1], *extra, "-o", str(output), *(str(SOURCES / s) for s in sources)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        first = next((line for line in done.stderr.splitlines() if "error" in line), done.stderr[-300:])
        raise BuildError(f"the C++ compiler failed: {first.strip()}")
