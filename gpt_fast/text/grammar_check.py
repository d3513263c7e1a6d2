"""Compiles the grammar on stdin and prints what is wrong with it, in a process that may be stopped at any time.

A grammar in GBNF it also converts.

A few hundred bytes of regular expressions can keep a grammar compiler busy for ever, and nothing but the kernel can
stop it. `check` is the caller's side; it gives the compiler so much processor time and memory and no more.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

COMPILE_SECONDS = 1  # of processor time
COMPILE_BYTES = 1 << 30  # of address space, of which a plain schema takes 30 MB
WALL_SECONDS = 30.0  # a machine may be busy with other things


class Checked(NamedTuple):
    """problem: what is wrong, in one line, "" when nothing is. grammar: as the compiler takes it."""

    problem: str
    grammar: str


def check(grammar: str, *, gbnf: bool = False, seconds: int = COMPILE_SECONDS) -> Checked:
    """Compile a grammar, given as GBNF or as the compiler takes it. Takes at most `seconds` of processor time."""
    command = [sys.executable, "-P", str(Path(__file__).resolve()), str(seconds), str(int(gbnf))]
    try:
        done = subprocess.run(command, input=grammar.encode(), capture_output=True, timeout=WALL_SECONDS)
    except subprocess.TimeoutExpired:
        return Checked(f"not compiled after {WALL_SECONDS:g} s", grammar)
    if done.returncode:
        return Checked(f"too large to compile (allowed {seconds} s and {COMPILE_BYTES >> 30} GiB)", grammar)
    problem, compiled = json.loads(done.stdout)
    return Checked(" ".join(problem.split()), compiled)


def main(seconds: int, gbnf: int) -> None:
    import resource

    from llguidance import LLMatcher

    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
    resource.setrlimit(resource.RLIMIT_AS, (COMPILE_BYTES, COMPILE_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    grammar, problem = sys.stdin.buffer.read().decode(), ""
    if gbnf:
        from llguidance.gbnf_to_lark import gbnf_to_lark

        try:
            grammar = LLMatcher.grammar_from_lark(gbnf_to_lark(grammar))
        except RecursionError:
            problem = "GBNF: nested too deeply"
        except Exception as error:  # the library raises plain Exception
            problem = f"GBNF: {error}"
    print(json.dumps([problem or LLMatcher.validate_grammar(grammar), grammar]))


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
