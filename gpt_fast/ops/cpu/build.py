"""Compile the decoder once with the machine's C++ compiler and keep the shared library in a cache.

The library has a plain C interface and includes no torch headers: it compiles in seconds and fits any torch.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import re
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from gpt_fast.cli.places import cache
from gpt_fast.files import replacing

SOURCES = Path(__file__).parent / "src"
LIBRARY_SOURCE = "decoder.cpp"
INCLUDE = re.compile(r'^#include "(.+)"', re.MULTILINE)
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


class InstructionSet(NamedTuple):
    """One that src/simd/ has a file for."""

    machines: tuple[str, ...]  # as platform.machine() spells them
    features: frozenset[str]  # that the processor must have, as /proc/cpuinfo spells them
    options: tuple[str, ...]  # of the compiler


X86 = ("x86_64", "AMD64")
AVX512_VNNI = frozenset({"avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512_vnni"})
AVX2 = frozenset({"avx2", "fma", "f16c"})
ARM = ("aarch64",)
DOT_PRODUCT = frozenset({"asimd", "asimddp"})
ISAS = {  # best first
    "avx512_bf16": InstructionSet(
        X86, AVX512_VNNI | {"avx512_bf16"}, ("-march=x86-64-v4", "-mavx512vnni", "-mavx512bf16")
    ),
    "avx512": InstructionSet(X86, AVX512_VNNI, ("-march=x86-64-v4", "-mavx512vnni")),
    "avx2_vnni": InstructionSet(X86, AVX2 | {"avx_vnni"}, ("-march=x86-64-v3", "-mavxvnni")),
    "avx2": InstructionSet(X86, AVX2, ("-march=x86-64-v3",)),
    "neon_i8mm": InstructionSet(ARM, DOT_PRODUCT | {"i8mm"}, ("-march=armv8.2-a+dotprod+i8mm",)),
    "neon": InstructionSet(ARM, DOT_PRODUCT, ("-march=armv8.2-a+dotprod",)),
}


class BuildError(RuntimeError):
    """Why the library cannot be had here: one line."""


def cpuinfo() -> dict[str, str]:
    """What the system says of the first processor; empty where it does not tell."""
    try:
        lines = Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()
    except OSError:
        return {}
    return {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}


def cpu_features() -> frozenset[str]:
    """The processor's features; empty where the system does not tell."""
    info = cpuinfo()
    return frozenset(info.get("flags", info.get("Features", "")).split())  # "Features" on Arm


def processor() -> str:
    """The processor's name, with the numbers that tell apart what virtual machines give one name."""
    info = cpuinfo()
    x86, arm = ("cpu family", "model", "stepping"), ("CPU implementer", "CPU part", "CPU variant", "CPU revision")
    numbers = ", ".join(
        f"{key[4:] if key[:3].lower() == 'cpu' else key} {info[key]}" for key in x86 + arm if key in info
    )
    return f"{info.get('model name', platform.machine())} ({numbers})" if numbers else platform.machine()


def supported_isas(machine: str, features: frozenset[str]) -> list[str]:
    """The names of ISAS that a processor has, best first."""
    return [name for name, isa in ISAS.items() if machine in isa.machines and features >= isa.features]


def isas_here() -> list[str]:
    """Of this machine's processor."""
    return supported_isas(platform.machine(), cpu_features())


def compiler() -> str | None:
    """$CXX, or the first C++ compiler on the path."""
    names = (os.environ.get("CXX"), "g++", "clang++")
    return next(filter(None, (shutil.which(name) for name in names if name)), None)


def cache_dir() -> Path:
    return cache()


def unavailable() -> str | None:
    """Why no library can be built here, or None."""
    if not isas_here():
        known = [name for name, isa in ISAS.items() if platform.machine() in isa.machines]
        return f"this {platform.machine()} processor has none of the instruction sets {', '.join(known or ISAS)}"
    return None if compiler() else "no C++ compiler found (looked for $CXX, g++, clang++)"


def load_library(isa: str | None = None) -> ctypes.CDLL:
    """The compiled decoder for `isa` (default: the best the processor has), built now if the cache lacks it.

    Raises BuildError. Processes may build at once: each writes its own file and renames it into place.
    """
    if reason := unavailable():
        raise BuildError(reason)
    isa = isa or isas_here()[0]
    path = library_path(isa)
    try:
        if not path.exists():
            build(path, isa)
        return ctypes.CDLL(str(path))
    except OSError as error:
        raise BuildError(f"cannot use the cache {path.parent} (set GPT_FAST_CACHE): {error}") from error


def library_path(isa: str) -> Path:
    """Where the library of these sources, options and compiler is kept, built or not."""
    return cache_dir() / f"decoder-{isa}-{source_key(isa)}.so"


def source_key(isa: str) -> str:
    """Hash of all that decides the library's contents: the sources that it is made of, options, compiler."""
    cxx = compiler()
    version = subprocess.run([str(cxx), "--version"], capture_output=True, text=True, check=True).stdout
    parts = [version, *FLAGS, *ISAS[isa].options, *(path.read_text() for path in sources_of(LIBRARY_SOURCE))]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def sources_of(name: str) -> list[Path]:
    """A source and the headers that it includes, whichever instruction set, in a fixed order."""
    found, left = set(), [SOURCES / name]
    while left:
        path = left.pop().resolve()
        if path not in found:
            found.add(path)
            left += [path.parent / include for include in INCLUDE.findall(path.read_text())]
    return sorted(found)


def build(path: Path, isa: str) -> None:
    """Compile the decoder to `path`: whole or not at all, for other processes may look for it meanwhile."""
    with replacing(path) as temporary:
        compile_sources(temporary, isa, [LIBRARY_SOURCE], ["-shared"])


def compile_sources(output: Path, isa: str, sources: Sequence[str], extra: Sequence[str]) -> None:
    """Run the compiler; BuildError carries its first error line."""
    command = [
        str(compiler()),
        *FLAGS,
        *ISAS[isa].options,
        *extra,
        "-o",
        str(output),
        *(str(SOURCES / s) for s in sources),
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        first = next((line for line in done.stderr.splitlines() if "error" in line), done.stderr[-300:])
        raise BuildError(f"the C++ compiler failed: {first.strip()}")
