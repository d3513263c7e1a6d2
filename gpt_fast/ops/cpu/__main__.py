"""`python -m gpt_fast.ops.cpu`: what this machine can build. With --sanitize: run the decoder under the sanitizers."""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

from gpt_fast.ops.cpu import build

SANITIZERS = ("address,undefined", "thread")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sanitize", action="store_true", help="build check.cpp with each sanitizer and run it")
    arguments = parser.parse_args()
    if reason := build.unavailable():
        print(f"no fused CPU decoder here: {reason}")
        return 1
    isa = build.best_isa(build.cpu_flags())
    assert isa is not None
    print(f"instruction set {isa}, compiler {build.compiler()}, cache {build.cache_dir()}")
    return max(sanitize(isa, which) for which in SANITIZERS) if arguments.sanitize else 0


def sanitize(isa: str, which: str) -> int:
    """Exit status of check.cpp built with -fsanitize=`which`; its report goes to the terminal."""
    with tempfile.TemporaryDirectory() as directory:
        program = Path(directory) / "check"
        flags = ["-O1", "-g", f"-fsanitize={which}", "-fno-sanitize-recover"]
        build.compile_sources(program, isa, ["check.cpp"], flags)
        print(f"-fsanitize={which}", flush=True)
        return subprocess.run([str(program)]).returncode


if __name__ == "__main__":
    sys.exit(main())
