"""Check what TorchServe will be started with, before it is: settings, Java, checkpoint, safety, the machine.

One line per problem; exit code 1 when there is one.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from gpt_fast.cli.errors import one_line_errors
from gpt_fast.cli.parser import CommandParser
from gpt_fast.cli.places import home, nearest
from gpt_fast.serve import frontend_keys
from gpt_fast.serve.model_config import problems_of
from gpt_fast.serve.startup_check import check_properties
from gpt_fast.torchserve.archive import checkpoint_of, config_text, resolve_model
from gpt_fast.torchserve.java import find_java, java_version
from gpt_fast.torchserve.posture import check_posture


def check_config(config: Path, model: str) -> list[str]:
    """TorchServe and the handler can use the yaml's keys, and the checkpoint it names is there."""
    try:
        text = config_text(config, resolve_model(model, home()))
        problems = problems_of(frontend_keys.parse(text), root=home())
        path = checkpoint_of(text, home())
    except (ValueError, OSError) as error:
        return [str(error)]
    if path.exists():
        return problems
    return [*problems, f"handler.checkpoint_path: no such file or directory (got {path}, allowed a checkpoint)"]


def weights_of(config: Path, model: str) -> Path:
    """The weights file of a yaml that `check_config` has nothing against."""
    path = checkpoint_of(config_text(config, resolve_model(model, home())), home())
    return path / "model.safetensors" if path.is_dir() else path


def check_java() -> list[str]:
    try:
        home = find_java()
    except ValueError as error:
        return [str(error)]
    print(f"doctor: Java {java_version(Path(home) / 'bin' / 'java')} at {home}")
    return []


def main(argv: Sequence[str] | None = None) -> None:
    """Ends the process with status 1 where there is a problem."""
    with one_line_errors("doctor"):
        sys.exit(run(parser().parse_args(argv)))


def parser() -> CommandParser:
    flags = CommandParser(prog="gpt-fast doctor", description=(__doc__ or "").partition("\n")[0])
    flags.add_argument("--config", type=Path, default=nearest("model_config.yaml"), help="the yaml to serve with")
    flags.add_argument("--model", default="", help="the checkpoint to serve instead of the yaml's")
    flags.add_argument("--properties", type=Path, default=nearest("deploy/config.properties"), help="its settings")
    flags.add_argument("--run-dir", type=Path, default=home() / ".run", help="of the instance")
    return flags


def run(args: argparse.Namespace) -> int:
    """Print every problem; the exit status."""
    properties = args.properties.read_text(encoding="latin-1")
    problems = [*check_properties(properties), *check_java(), *check_config(args.config, args.model)]
    if not problems:  # what could not start needs no more advice
        problems = check_posture(
            properties,
            run_dir=args.run_dir,
            lock=home() / "requirements.lock",
            checkpoint=weights_of(args.config, args.model),
            user=os.geteuid(),
        )
    for problem in problems:
        print(f"doctor: {problem}", file=sys.stderr)
    print(f"doctor: {len(problems)} problem(s)")
    return 1 if problems else 0
