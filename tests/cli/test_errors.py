"""How commands end on a user's mistake."""

import argparse
import errno
import os

import pytest

from gpt_fast.cli.errors import at_least, http_url, one_line_errors, refuse_useless
from gpt_fast.config import ConfigError


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ConfigError("dtype", "unknown value", got="int3"), "error: dtype: unknown value (got 'int3')"),
        (ValueError("two\n  lines"), "error: two lines"),
        (OSError(errno.ENOENT, os.strerror(errno.ENOENT), "x.json"), "error: x.json: No such file or directory"),
        (OSError("no file in it"), "error: no file in it"),
    ],
)
def test_a_mistake_is_one_line_and_status_2(error, line, capsys):
    with pytest.raises(SystemExit, match=r"^2$"), one_line_errors():
        raise error
    assert capsys.readouterr() == ("", line + "\n")


def test_a_fault_of_ours_keeps_its_traceback_unless_named(capsys):
    with pytest.raises(RuntimeError), one_line_errors():
        raise RuntimeError("a bug")
    with pytest.raises(SystemExit), one_line_errors("bench", also=(RuntimeError,)):
        raise RuntimeError("the target's")
    assert capsys.readouterr().err == "bench: the target's\n"
    with pytest.raises(SystemExit, match=r"^130$"), one_line_errors():
        raise KeyboardInterrupt


def test_types_name_what_they_got_and_allow():
    assert at_least(0)("0") == 0 and at_least(-1)("-1") == -1 and http_url("http://h:1/x") == "http://h:1/x"
    for value in ("0", "x", "1.5", ""):
        with pytest.raises(argparse.ArgumentTypeError, match=rf"got '{value}', allowed 1 or more"):
            at_least(1)(value)
    with pytest.raises(argparse.ArgumentTypeError, match="got 'localhost:80'"):
        http_url("localhost:80")


def test_a_flag_without_effect_is_refused_even_at_its_default():
    parser = argparse.ArgumentParser()
    parser.add_argument("--mode", default="a")
    parser.add_argument("--size", type=int, default=8)
    refuse_useless(parser, ["--mode", "b"], ["size"], why="--mode b has none")
    with pytest.raises(ValueError, match="--size: has no effect: --mode b has none"):
        refuse_useless(parser, ["--mode", "b", "--size", "8"], ["size"], why="--mode b has none")
