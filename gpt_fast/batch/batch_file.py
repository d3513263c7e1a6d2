"""A batch's input: the lines of a JSONL file, or the rows of a Parquet one as such lines. No torch."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from gpt_fast.batch.lines import LONGEST
from gpt_fast.checkpoint.manifest import hash_file

Row = tuple[int, str]  # its number, from 1, and its text
PARQUET = ".parquet"
BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True)
class Input:
    """A file and what was found in it. last: the number of its last row; count: of rows that are not blank."""

    path: Path
    sha256: str
    last: int
    count: int

    def rows(self) -> Iterator[Row]:
        """All that are not blank, as they were when it was opened."""
        found = parquet_rows(self.path) if is_parquet(self.path) else jsonl_rows(self.path)
        return (row for row in found if row[0] <= self.last)


def open_input(path: Path) -> Input:
    """Read it once, to know what it is and how much. ValueError for a file that is no such input; OSError."""
    sha256 = hash_file(path).sha256
    if is_parquet(path):
        count = parquet_file(path).metadata.num_rows
        return Input(path, sha256, count, count)
    last = count = 0
    for number, _ in jsonl_rows(path):
        last, count = number, count + 1
    return Input(path, sha256, last, count)


def is_parquet(path: Path) -> bool:
    return path.suffix == PARQUET


def jsonl_rows(path: Path) -> Iterator[Row]:
    """Bytes that are no UTF-8 become lone surrogates, which the line's reader refuses."""
    with open(path, "rb") as file:
        for number, line in enumerate(bounded_lines(file), 1):
            line = line.removeprefix(BOM) if number == 1 else line
            if line.strip():
                yield number, line.decode("utf-8", "surrogateescape").strip()


def bounded_lines(file: BinaryIO) -> Iterator[bytes]:
    """Each line, but of one that is too long only the beginning: it is refused by its length."""
    while line := file.readline(LONGEST):
        rest = line
        while not rest.endswith(b"\n") and (rest := file.readline(LONGEST)):
            pass
        yield line


# ------------------------------------------------------------------------------------------ Parquet


def parquet_file(path: Path) -> Any:
    check_pyarrow(path)
    import pyarrow
    import pyarrow.parquet

    try:
        return pyarrow.parquet.ParquetFile(path)
    except pyarrow.ArrowException as error:
        raise ValueError(f"{path}: is no Parquet file: {error}") from None


def check_pyarrow(path: Path) -> None:
    if importlib.util.find_spec("pyarrow") is None:
        raise ValueError(f"{path}: Parquet needs pyarrow (the extra `parquet` has it: pip install 'pyarrow>=18')")


def parquet_rows(path: Path) -> Iterator[Row]:
    number = 0
    for batch in parquet_file(path).iter_batches(batch_size=256):
        for fields in batch.to_pylist():
            number += 1
            yield number, json.dumps(row_object(fields), default=str)


def row_object(fields: dict[str, Any]) -> dict[str, Any]:
    """Without the nulls that a column has where others have a value; a body may be JSON in a column of text."""
    row: dict[str, Any] = without_nulls(fields)
    if isinstance(row.get("body"), str):
        with suppress(ValueError):  # the line's reader says what a body is
            row["body"] = json.loads(row["body"])
    return row


def without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: without_nulls(inner) for name, inner in value.items() if inner is not None}
    return [without_nulls(inner) for inner in value] if isinstance(value, list) else value


# ------------------------------------------------------------------------------------------ the output


def write_parquet(lines: Iterator[str], path: Path) -> None:
    """The answers as columns: id, custom_id, status_code (null for what was no request), body and error as JSON."""
    import pyarrow
    import pyarrow.parquet

    kinds = {name: pyarrow.string() for name in ("id", "custom_id", "status_code", "body", "error")}
    schema = pyarrow.schema(kinds | {"status_code": pyarrow.int32()})
    with pyarrow.parquet.ParquetWriter(path, schema) as writer:
        batch: list[dict[str, Any]] = []
        for line in lines:
            batch.append(columns(json.loads(line)))
            if len(batch) == 1024:
                writer.write_batch(pyarrow.RecordBatch.from_pylist(batch, schema=schema))
                batch = []
        writer.write_batch(pyarrow.RecordBatch.from_pylist(batch, schema=schema))


def columns(told: dict[str, Any]) -> dict[str, Any]:
    response, error = told["response"] or {}, told["error"]
    return {
        "id": told["id"],
        "custom_id": told["custom_id"],
        "status_code": response.get("status_code"),
        "body": None if not response else json.dumps(response["body"], ensure_ascii=False),
        "error": None if error is None else json.dumps(error, ensure_ascii=False),
    }
