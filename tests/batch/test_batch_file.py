"""A file's rows: numbered as an editor numbers lines; Parquet's as the lines they stand for."""

import json

import pyarrow
import pyarrow.parquet
import pytest

from gpt_fast.batch.batch_file import open_input, write_parquet
from gpt_fast.batch.lines import LONGEST, LineError, Names, answer_line, error_line, parse_line

CHAT = {"messages": [{"role": "user", "content": "Hi"}, {"role": "user", "content": "é", "name": "b"}]}


def test_lines_are_numbered_and_blank_ones_left_out(tmp_path):
    path = tmp_path / "in.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"a": 1}\r\n\n   \n\xff\n' + b"x" * (2 * LONGEST + 5) + b"\nlast")
    given = open_input(path)
    rows = list(given.rows())
    assert [number for number, _ in rows] == [1, 4, 5, 6]
    assert (given.last, given.count) == (6, 4)
    assert [text for _, text in rows[:2]] == ['{"a": 1}', "\udcff"]
    assert len(rows[2][1]) == LONGEST and rows[3][1] == "last"


def test_what_is_appended_meanwhile_is_not_read(tmp_path):
    path = tmp_path / "in.jsonl"
    path.write_text("a\nb\n")
    given = open_input(path)
    with open(path, "a") as file:
        file.write("c\n")
    assert [text for _, text in given.rows()] == ["a", "b"]


@pytest.mark.parametrize("as_text", [False, True])
def test_parquet_rows_are_the_lines_they_stand_for(tmp_path, as_text):
    path = tmp_path / "in.parquet"
    bodies = [CHAT, {"prompt": "x", "max_tokens": 3}]
    table = {
        "custom_id": ["a", None],
        "method": ["POST", "POST"],
        "url": ["/v1/chat/completions", "/v1/completions"],
        "body": [json.dumps(body) for body in bodies] if as_text else bodies,
    }
    pyarrow.parquet.write_table(pyarrow.table(table), path)
    given = open_input(path)
    assert given.count == given.last == 2
    lines = [parse_line(text, number, {}) for number, text in given.rows()]
    assert [(line.custom_id, line.path, line.body) for line in lines] == [
        ("a", "v1/chat/completions", CHAT), ("line-2", "v1/completions", bodies[1]),
    ]  # fmt: skip


def test_bare_columns(tmp_path):
    path = tmp_path / "in.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"prompt": ["x", None], "seed": [1, 2]}), path)
    (first, second) = open_input(path).rows()
    assert parse_line(first[1], 1, {}).body == {"prompt": "x", "seed": 1}
    with pytest.raises(LineError, match="url and body are required"):
        parse_line(second[1], 2, {})


def test_what_is_no_parquet_is_one_line(tmp_path):
    path = tmp_path / "in.parquet"
    path.write_text("hello")
    with pytest.raises(ValueError, match="is no Parquet file"):
        open_input(path)


def test_answers_as_columns(tmp_path):
    names, path = Names("ab" * 32, 1), tmp_path / "out.parquet"
    refused = error_line(names, LineError("invalid_line", "no"))
    write_parquet(iter([answer_line(names, "a", status=200, body='{"x": "é"}'), refused]), path)
    good, bad = pyarrow.parquet.read_table(path).to_pylist()
    assert (good["custom_id"], good["status_code"], good["error"]) == ("a", 200, None)
    assert json.loads(good["body"]) == {"x": "é"}
    assert (bad["custom_id"], bad["status_code"], bad["body"]) == ("line-1", None, None)
    assert json.loads(bad["error"])["code"] == "invalid_line"
