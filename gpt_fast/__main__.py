"""gpt-fast (and python -m gpt_fast): the package's commands behind one name.

A command's module is imported when it is called: what is listed here costs no torch.
"""

from __future__ import annotations

from argparse import REMAINDER, SUPPRESS
from collections.abc import Sequence
from importlib import import_module
from types import ModuleType
from typing import Any, NamedTuple

import gpt_fast
from gpt_fast.cli.errors import one_line_errors
from gpt_fast.cli.parser import CommandParser

SHELLS = ("bash", "zsh", "tcsh")
COMPLETION = "--print-completion"


class Command(NamedTuple):
    module: str  # has main(argv) and parser()
    help: str


COMMANDS = {
    "serve": Command("serve.__main__", "OpenAI's and Anthropic's APIs on a port, without TorchServe"),
    "batch": Command("batch.__main__", "a file of requests, answered in one go, each once"),
    "chat": Command("chat", "talk with a model on the terminal"),
    "generate": Command("generate", "continue a prompt, with figures; also with a draft, or on many ranks"),
    "pull": Command("pull", "fetch a model from the Hugging Face Hub or its cache, convert and quantize it"),
    "convert": Command("convert.__main__", "published weights, a GGUF or a trained draft into a checkpoint"),
    "quantize": Command("quantize.__main__", "write an int8 or int4 file beside a checkpoint's weights"),
    "eval": Command("eval.__main__", "task scores, or what a quantized file loses"),
    "bench": Command("bench.__main__", "speed of the engine, of a server and of other engines, in turn"),
    "draft": Command("draft.__main__", "prove, judge and time speculation"),
    "archive": Command("torchserve.archive", "build what TorchServe serves"),
    "doctor": Command("torchserve.doctor", "check what TorchServe will be started with"),
}


def main(argv: Sequence[str] | None = None) -> None:
    args = parser().parse_args(argv)
    if args.print_completion:
        with one_line_errors("gpt-fast"):
            print(completion(args.print_completion))
    elif args.command is None:
        parser().print_help()
    else:
        load(COMMANDS[args.command]).main(args.arguments)


def parser() -> CommandParser:
    """Of what stands before a command's own arguments."""
    rows = "\n".join(f"  {name:<10}{command.help}" for name, command in COMMANDS.items())
    flags = CommandParser(
        prog="gpt-fast",
        usage="gpt-fast COMMAND ...    (gpt-fast COMMAND --help: what it takes)",
        description=f"Llama-family models: fetched, quantized, measured and served.\n\ncommands:\n{rows}",
    )
    flags.add_argument("--version", action="version", version=gpt_fast.__version__)
    flags.add_argument(COMPLETION, choices=SHELLS, help="what the shell loads to complete commands and flags")
    flags.add_argument("command", nargs="?", choices=[*COMMANDS], metavar="COMMAND", help=SUPPRESS)
    flags.add_argument("arguments", nargs=REMAINDER, help=SUPPRESS)
    return flags


def load(command: Command) -> ModuleType:
    return import_module(f"gpt_fast.{command.module}")


def completion(shell: str) -> str:
    """A script for `shell` that knows every command with its flags. It imports them all: seconds."""
    import shtab

    whole = CommandParser(prog="gpt-fast", description="gpt-fast")
    # argparse hands add_parser's further options to the class: here to what gives the command's own parser back.
    own: Any = lambda *, prog, made: made  # noqa: E731
    names = whole.add_subparsers(dest="command", parser_class=own)
    for name, command in COMMANDS.items():
        names.add_parser(name, help=command.help, made=load(command).parser())
    return str(shtab.complete(whole, shell=shell))


if __name__ == "__main__":
    main()
