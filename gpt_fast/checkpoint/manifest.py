"""manifest.json: size and sha256 of every file of a converted checkpoint, so that a damaged one is not served."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from gpt_fast.checkpoint.safetensors_file import CheckpointError, FileRecord, write_bytes
from gpt_fast.files import read_json_object, replacing

MANIFEST = "manifest.json"
VERSION = 1


def hash_file(path: Path) -> FileRecord:
    """In large pieces, beside which other threads run."""
    digest, piece = hashlib.sha256(), memoryview(bytearray(1 << 23))
    with open(path, "rb", buffering=0) as file:
        while count := file.readinto(piece):
            digest.update(piece[:count])
        return FileRecord(os.fstat(file.fileno()).st_size, digest.hexdigest())


def read_manifest(directory: Path) -> dict[str, FileRecord]:
    """The files' records. CheckpointError when the manifest is absent (an unfinished conversion) or malformed."""
    path = directory / MANIFEST
    missing = "no such file: the checkpoint was not converted, or not to the end"
    values = read_json_object(path, missing=missing, error=CheckpointError)
    files = values.get("files")
    if values.get("version") != VERSION or not isinstance(files, dict):
        raise CheckpointError(path, f"must hold version {VERSION} and files")
    return {name: read_record(path, name, record) for name, record in files.items()}


def read_record(path: Path, name: str, record: object) -> FileRecord:
    if not is_inner_name(name) or not isinstance(record, dict) or record.keys() != {"size", "sha256"}:
        raise CheckpointError(path, f"bad entry for {name!r}")
    size, digest = record["size"], record["sha256"]
    if not isinstance(size, int) or not isinstance(digest, str) or not re.fullmatch(r"[0-9a-f]{64}", digest):
        raise CheckpointError(path, f"bad entry for {name!r}")
    return FileRecord(size, digest)


def is_plain_name(name: object) -> bool:
    """A file of the same directory: no separators, no way up."""
    return isinstance(name, str) and name not in ("", ".", "..") and not re.search(r"[/\\\0]", name)


def is_inner_name(name: object) -> bool:
    """A file of the same directory or of a folder in it."""
    return isinstance(name, str) and all(is_plain_name(part) for part in name.split("/"))


def verify_manifest(directory: Path, names: list[str] | None = None, *, content: bool = True) -> None:
    """Compare files (all, unless named) with the manifest: size, and with `content` their sha256 too.

    Raises:
        CheckpointError: naming the first file that is absent, unlisted or different.
    """
    records = read_manifest(directory)
    for name in records if names is None else names:
        path = directory / name
        if name not in records:
            raise CheckpointError(path, f"is not in {MANIFEST}: convert or quantize again")
        if not path.is_file():
            raise CheckpointError(path, f"no such file, but {MANIFEST} lists it")
        if path.stat().st_size != records[name].size:
            problem = (
                f"is not the file that was written (got {path.stat().st_size} bytes, {records[name].size} written)"
            )
            raise CheckpointError(path, problem)
        if content and hash_file(path) != records[name]:
            raise CheckpointError(path, f"its sha256 differs from {MANIFEST}'s: the file is damaged or was changed")


def write_manifest(directory: Path, files: Mapping[str, FileRecord], source: Mapping[str, Any]) -> None:
    """source: what the checkpoint was made from."""
    listed = {name: files[name]._asdict() for name in sorted(files)}
    text = json.dumps({"version": VERSION, "source": dict(source), "files": listed}, indent=1) + "\n"
    with replacing(directory / MANIFEST) as temporary:
        write_bytes(temporary, text.encode())


def add_to_manifest(directory: Path, files: Mapping[str, FileRecord]) -> None:
    """Record files added to a converted checkpoint (a quantized one, say)."""
    records = read_manifest(directory) | dict(files)
    source = read_json_object(directory / MANIFEST, error=CheckpointError).get("source", {})
    write_manifest(directory, records, source)


@contextmanager
def staging(directory: Path) -> Iterator[Path]:
    """A temporary directory inside `directory` (made if absent), removed at the end whatever happens."""
    made = not directory.exists()
    directory.mkdir(parents=True, exist_ok=True)
    stage = Path(tempfile.mkdtemp(prefix=".writing-", dir=directory))
    try:
        yield stage
    finally:
        shutil.rmtree(stage, ignore_errors=True)
        if made and not any(directory.iterdir()):
            directory.rmdir()


def install(stage: Path, directory: Path, files: Mapping[str, FileRecord], source: Mapping[str, Any]) -> None:
    """Rename staged files to their final names and write the manifest last.

    The old manifest goes first, so a crash in between leaves a directory that does not load, never a mixture.
    Files of an earlier conversion that this one did not write are removed.
    """
    old = [] if not (directory / MANIFEST).is_file() else [*read_manifest(directory)]
    (directory / MANIFEST).unlink(missing_ok=True)
    for name in files:
        (directory / name).parent.mkdir(exist_ok=True)
        os.replace(stage / name, directory / name)
    for name in old:
        if name not in files:
            remove(directory / name, directory)
    write_manifest(directory, files, source)


def remove(path: Path, directory: Path) -> None:
    """A file of an earlier conversion, and its folder inside `directory` with the last one in it."""
    path.unlink(missing_ok=True)
    if path.parent != directory and path.parent.is_dir() and not any(path.parent.iterdir()):
        path.parent.rmdir()
