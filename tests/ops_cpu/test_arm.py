"""Arm's kernels on a machine that is none: cross-compiled, and run under user-mode emulation."""

from __future__ import annotations

import platform
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from gpt_fast.ops.cpu import build

COMPILER, EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64"
ISAS = [name for name, isa in build.ISAS.items() if isa.machines == build.ARM]
CORES = {"neon": "neoverse-n1", "neon_i8mm": "max"}  # as the emulator names them: the first has no i8mm
# What the other sets compute too, the same bits of it: AVX-512 multiplies bfloat16 in instructions of its own.
REFERENCE = "avx2"
OPTIONS = ["-O2", "-static"]

pytestmark = [
    pytest.mark.skipif(platform.machine() in build.ARM, reason="Arm: its own tests run here"),
    pytest.mark.skipif(
        shutil.which(COMPILER) is None, reason=f"no {COMPILER} (Debian: apt-get install g++-aarch64-linux-gnu)"
    ),
]


@pytest.mark.slow
@pytest.mark.parametrize("isa", ISAS)
def test_nothing_in_the_cross_compile_is_warned_of(isa: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", COMPILER)
    build.compile_sources(tmp_path / "decoder.so", isa, [build.LIBRARY_SOURCE], ["-fsyntax-only", "-Werror"])


@pytest.mark.nightly
@pytest.mark.slow
@pytest.mark.skipif(shutil.which(EMULATOR) is None, reason=f"no {EMULATOR} (Debian: apt-get install qemu-user)")
@pytest.mark.skipif(REFERENCE not in build.isas_here(), reason=f"no {REFERENCE} to compare with")
@pytest.mark.parametrize("isa", ISAS)
def test_an_emulated_arm_computes_the_bits_of_x86(isa: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build.compile_sources(tmp_path / "reference", REFERENCE, ["check.cpp"], OPTIONS)
    expected = run([str(tmp_path / "reference")])
    monkeypatch.setenv("CXX", COMPILER)
    build.compile_sources(tmp_path / "check", isa, ["check.cpp"], OPTIONS)
    got = run([EMULATOR, "-cpu", CORES[isa], str(tmp_path / "check")])
    assert len(re.findall(r"fine, logits [0-9a-f]{8}", expected)) == 12  # formats by caches
    assert got == expected


def run(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout
