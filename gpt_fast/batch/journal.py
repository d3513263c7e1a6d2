"""What a batch has done, kept beside its output until it is whole: kill -9 costs what was in flight, no more.

ANSWERS.jsonl.partial holds a line that says of which batch it is, then each answer as it came: its row's number, the
rest's CRC-32 and the output's line. Lines are only appended; what was cut or damaged at the end is made again.
"""

from __future__ import annotations

import fcntl
import json
import os
import time
import zlib
from array import array
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from gpt_fast.batch.batch_file import is_parquet, write_parquet
from gpt_fast.files import replacing

SYNC_SECONDS = 5.0  # a machine that loses its power loses as much
NONE = -1


class Journal:
    """One batch's answers. Use as a context manager; one process at a time."""

    def __init__(self, output: Path, batch: Mapping[str, Any], *, last: int) -> None:
        """Take up where the batch stopped, or begin it.

        Args:
            batch: what must be the same for its answers to go together. last: the largest number of a row.

        Raises:
            ValueError: the output is there already, another process writes it, or it was begun as another batch.
        """
        self.output, self.path = output, output.with_name(f"{output.name}.partial")
        self._offsets = array("q", [NONE]) * (last + 1)  # of each row's answer in the file
        self.done = 0
        if output.exists() and not self.path.exists():
            raise ValueError(f"{output}: is there already; remove it, or name another --output")
        output.parent.mkdir(parents=True, exist_ok=True)
        self._file: BinaryIO = open(self.path, "a+b")  # noqa: SIM115 (closed by __exit__)
        try:
            self._take_up(dict(batch))
        except BaseException:
            self._file.close()
            raise
        self._synced = time.monotonic()

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def __contains__(self, number: int) -> bool:
        return self._offsets[number] != NONE

    def add(self, number: int, line: str) -> bool:
        """Keep a row's answer. False where there is one: it is the same."""
        if number in self:
            return False
        data = line.encode("utf-8")
        self._offsets[number] = self._file.tell()
        self._file.write(b"%d %08x %s\n" % (number, zlib.crc32(data), data))
        self._file.flush()  # to the system, which keeps it though we are killed
        self.done += 1
        if time.monotonic() - self._synced > SYNC_SECONDS:
            self.sync()
        return True

    def sync(self) -> None:
        """Wait until it is on the disk."""
        os.fsync(self._file.fileno())
        self._synced = time.monotonic()

    def lines(self) -> Iterator[str]:
        """The answers in their rows' order."""
        for offset in self._offsets:
            if offset != NONE:
                self._file.seek(offset)
                yield self._file.readline().rstrip(b"\n").split(b" ", 2)[2].decode("utf-8")
        self._file.seek(0, os.SEEK_END)

    def finish(self) -> None:
        """Write the output, whole or not at all, and forget the rest."""
        self.sync()
        with replacing(self.output) as temporary:
            if is_parquet(self.output):
                write_parquet(self.lines(), temporary)
            else:
                with open(temporary, "w", encoding="utf-8", newline="\n") as file:
                    file.writelines(f"{line}\n" for line in self.lines())
            with open(temporary, "rb") as file:
                os.fsync(file.fileno())
        self.path.unlink()

    # ---------------------------------------------------------------------------------------- taking up

    def _take_up(self, batch: dict[str, Any]) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ValueError(f"{self.output}: another process is writing it") from None
        if not self.path.exists():  # whoever had it has finished since we opened it
            raise ValueError(f"{self.output}: another process has just written it")
        self._file.seek(0)
        head = self._file.readline()
        if not head.endswith(b"\n"):  # new, or cut before its first line was whole
            self._file.truncate(0)
            self._file.write(json.dumps(batch).encode() + b"\n")
            self._file.flush()
            return
        self._check(head, batch)
        end = self._file.tell()
        for line in self._file:
            number = self._number(line)
            if number is None:
                break
            if number not in self:
                self._offsets[number] = end
                self.done += 1
            end += len(line)
        self._file.truncate(end)
        self._file.seek(0, os.SEEK_END)

    def _check(self, head: bytes, now: dict[str, Any]) -> None:
        try:
            before = dict(json.loads(head))
        except (ValueError, TypeError):
            raise ValueError(f"{self.path}: is damaged, or no batch's; remove it to begin anew") from None
        other = [name for name in now | before if before.get(name) != now.get(name)]
        if other:
            name = other[0]
            values = f"got {json.dumps(now.get(name))}, begun with {json.dumps(before.get(name))}"
            raise ValueError(f"{self.path}: is of another batch: {name} differs ({values}); remove it to begin anew")

    def _number(self, line: bytes) -> int | None:
        """Of a whole line's row; None for one that was cut or damaged."""
        number, _, rest = line.partition(b" ")
        crc, _, data = rest.partition(b" ")
        if not (line.endswith(b"\n") and number.isdigit() and int(number) < len(self._offsets)):
            return None
        return int(number) if crc == b"%08x" % zlib.crc32(data[:-1]) else None
