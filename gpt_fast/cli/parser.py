"""The parser of every command: what it takes by default stands in its help, and a mistake is one line."""

from __future__ import annotations

import argparse
from typing import Any, NoReturn


class CommandParser(argparse.ArgumentParser):
    """argparse's, without the usage before an error: a reader wants the mistake, and where to read on."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"formatter_class": HelpFormatter, **options})

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {' '.join(message.split())} (see {self.prog} --help)\n")


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Adds an option's default to its help, where there is one and the help does not say it."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        told, default = action.help or "", action.default
        nothing = default is None or default is False or default in (argparse.SUPPRESS, "", [])
        if nothing or not action.option_strings or "default" in told:
            return told
        shown = " ".join(map(str, default)) if isinstance(default, list | tuple) else str(default)
        return f"{told} (default: {shown.replace('%', '%%')})"
