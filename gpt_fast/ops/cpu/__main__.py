"""`python -m gpt_fast.ops.cpu`: what this machine can build, and what it is tuned to.

With --tune: measure every variant and keep the best. With --sanitize: run the decoder under the sanitizers.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from gpt_fast.ops.cpu import build

SANITIZERS = ("address,undefined", "thread")


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m gpt_fast.ops.cpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--tune",
        action="store_true",
        help="measure every variant on layers of two models' shapes in "
        "each format, print the table and keep the best (a minute or two; nothing else should run)",
    )
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of --tune (default: all cores)")
    parser.add_argument("--rounds", type=int, default=100, help="of --tune, for each variant (default: %(default)s)")
    parser.add_argument("--out", type=Path, help="where --tune writes its table as JSON")
    parser.add_argument("--sanitize", action="store_true", help="build check.cpp with each sanitizer and run it")
    arguments = parser.parse_args()
    print(instruction_sets())
    if reason := build.unavailable():
        print(f"no fused CPU decoder here: {reason}")
        return 1
    isa = build.isas_here()[0]
    print(f"compiler {build.compiler()}, cache {build.cache_dir()}")
    from gpt_fast.ops.cpu import tuning_report

    for line in tuning_report.kept_choices():
        print(line)
    if arguments.tune:
        tuning_report.run(arguments.threads, arguments.rounds, arguments.out)
    return max(sanitize(isa, which) for which in SANITIZERS) if arguments.sanitize else 0


def instruction_sets() -> str:
    """The set that is used, those that are compiled, those the processor has, and all that there are kernels for."""
    supported = build.isas_here()
    compiled = [isa for isa in supported if build.compiler() and build.library_path(isa).exists()]
    return (
        f"{build.processor()}: instruction set {supported[0] if supported else 'none'} is used"
        f" (compiled: {', '.join(compiled) or 'none yet'}; supported here: {', '.join(supported) or 'none'};"
        f" there are kernels for: {', '.join(build.ISAS)})"
    )


def sanitize(isa: str, which: str) -> int:
    """Exit status of src/check.cpp built with -fsanitize=`which`; its report goes to the terminal."""
    with tempfile.TemporaryDirectory() as directory:
        program = Path(directory) / "check"
        flags = ["-O1", "-g", f"-fsanitize={which}", "-fno-sanitize-recover"]
        build.compile_sources(program, isa, ["check.cpp"], flags)
        print(f"-fsanitize={which}", flush=True)
        return subprocess.run([str(program)]).returncode


if __name__ == "__main__":
    sys.exit(main())
