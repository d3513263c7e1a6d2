"""gpt-fast: one name before all commands, help that says defaults, mistakes in one line, completion."""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Iterator

import pytest

import gpt_fast
from gpt_fast.__main__ import COMMANDS, completion, load, main
from support.paths import ROOT


def ended(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[object, str, str]:
    with pytest.raises(SystemExit) as end:
        main(words)
    return end.value.code, *capsys.readouterr()


def actions(parser: argparse.ArgumentParser) -> Iterator[tuple[argparse.ArgumentParser, argparse.Action]]:
    for action in parser._actions:
        yield parser, action
        if isinstance(action, argparse._SubParsersAction):
            for inner in action.choices.values():
                yield from actions(inner)


def test_help_lists_every_command_and_imports_none() -> None:
    code = "import sys; sys.modules['torch'] = None; from gpt_fast.__main__ import main; main(['--help'])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert [line.split()[0] for line in done.stdout.splitlines() if line.startswith("  ") and "--" not in line][
        : len(COMMANDS)
    ] == [*COMMANDS]


def test_what_is_no_command_and_the_version(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, error = ended(capsys, "generat")
    assert status == 2 and out == "" and error.count("\n") == 1 and "'generat'" in error and "'generate'" in error
    assert ended(capsys, "--version") == (0, f"{gpt_fast.__version__}\n", "")
    main([])
    assert capsys.readouterr().out.startswith("usage: gpt-fast COMMAND")


@pytest.mark.slow
@pytest.mark.parametrize("name", COMMANDS)
def test_every_flag_is_explained_with_its_default(name: str) -> None:
    for parser, action in actions(load(COMMANDS[name]).parser()):
        assert parser.prog.startswith(f"gpt-fast {name}")
        if not action.option_strings or isinstance(action, argparse._HelpAction):
            continue
        assert action.help, action.option_strings
        default = action.default
        if default not in (None, False, "", [], argparse.SUPPRESS):
            shown = " ".join(map(str, default)) if isinstance(default, list | tuple) else str(default)
            told = " ".join(parser.format_help().split())
            assert f"(default: {shown}" in told or f"default: {shown.split('/')[0]}" in told, action.option_strings


@pytest.mark.slow
@pytest.mark.parametrize("name", COMMANDS)
def test_a_mistake_is_one_line(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    status, out, error = ended(capsys, name, "--no_such_flag")
    assert (status, out, error.count("\n")) == (2, "", 1), error
    assert error.startswith(f"gpt-fast {name}") and "usage:" not in error and "--help" in error


@pytest.mark.slow
def test_completion_knows_commands_and_their_flags() -> None:
    script = completion("bash")
    assert subprocess.run(["bash", "-n"], input=script, text=True, timeout=60).returncode == 0
    for word in (*COMMANDS, "--checkpoint_path", "--draft_for", "--calibration_tasks"):
        assert word in script
