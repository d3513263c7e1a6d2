"""Compiles the grammar on stdin and prints what is wrong with it, in a process that may be stopped at any time.

A few hundred bytes of regular expressions can keep a grammar compiler busy for ever, and nothing but the kernel can
stop it. `check` is the caller's side; it gives the compiler so much processor time and memory and no more.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

COMPILE_SECONDS = 1  # of processor time
COMPILE_BYTES = 1 << 30  # of address space, of which a plain schema takes 30 MB
WALL_SECONDS = 30.0  # a machine may be busy with other things


def check(grammar: str, *, seconds: int = COMPILE_SECONDS) -> str:
    """What is wrong with a grammar, in one line; "" when nothing is. Takes at most `seconds` of processor time."""
    command = [sys.executable, "-P", str(Path(__file__).resolve()), str(seconds)]
    try:
        done = subprocess.run(command, input=grammar.encode(), capture_output=True, timeout=WALL_SECONDS)
    except subprocess.TimeoutExpired:
        return f"not compiled after {WALL_SECONDS:g} s"
    if done.returncode:
        return f"too large to compile (allowed {seconds} s and {COMPILE_BYTES >> 30} GiB)"
    return " ".join(done.stdout.decode("utf-8", "replace").split())


def main(seconds: int) -> None:
    import resource

    from llguidance import LLMatcher

    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
    resource.setrlimit(resource.RLIMIT_AS, (COMPILE_BYTES, COMPILE_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    print(LLMatcher.validate_grammar(sys.stdin.buffer.read().decode()))


if __name__ == "__main__":
    main(int(sys.argv[1]))
