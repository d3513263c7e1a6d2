"""Files are written whole or not at all; a JSON object is read or refused in one line."""

from __future__ import annotations

from pathlib import Path

import pytest

from gpt_fast.config import ConfigError
from gpt_fast.files import read_json_object, replacing, write_json, write_text


def test_a_file_is_there_once_it_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "made" / "a.txt"
    with replacing(path) as temporary:
        temporary.write_text("half")
        assert temporary.parent == path.parent and temporary.name.startswith(".") and not path.exists()
        temporary.write_text("whole")
    assert [p.name for p in path.parent.iterdir()] == ["a.txt"] and path.read_text() == "whole"


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    write_text(path, "old")
    with pytest.raises(RuntimeError, match="disk"), replacing(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError("disk")
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"] and path.read_text() == "old"


def test_two_writers_have_names_of_their_own(tmp_path: Path) -> None:
    with replacing(tmp_path / "a") as first, replacing(tmp_path / "a") as second:
        assert first != second
        first.write_text("1")
        second.write_text("2")


def test_an_object_is_read_as_it_was_written(tmp_path: Path) -> None:
    values = {"b": [1, 2.5, None], "a": {"ü": "é"}}
    write_json(values, tmp_path / "a.json")
    assert read_json_object(tmp_path / "a.json") == values
    assert (tmp_path / "a.json").read_text().startswith('{\n "b": [\n')


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"{", r"is not readable JSON: "),
        (b"", r"is not readable JSON: "),
        (b"\xff", r"is not readable JSON: "),
        (b'{"a": NaN}', r"is not readable JSON: NaN is not a JSON number"),
        (b"[" * 100_000, r"is not readable JSON: "),
        (b"[]", r"must hold one JSON object \(got list\)"),
    ],
)
def test_what_is_no_object_is_refused_in_one_line(content: bytes, problem: str, tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=rf"a\.json: {problem}[^\n]*$"):
        read_json_object(path, optional=True)


def test_an_absent_file_is_an_error_unless_it_may_be(tmp_path: Path) -> None:
    assert read_json_object(tmp_path / "a.json", optional=True) == {}
    with pytest.raises(ConfigError, match=r"a\.json: no such file$"):
        read_json_object(tmp_path / "a.json")
    with pytest.raises(KeyError, match="not converted"):
        read_json_object(tmp_path / "a.json", missing="not converted", error=lambda path, problem: KeyError(problem))
