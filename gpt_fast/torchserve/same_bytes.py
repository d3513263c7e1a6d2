"""An archive whose bytes depend on its files alone: torch-model-archiver writes times, owners, modes and an order that
differ from one run to the next."""

from __future__ import annotations

import gzip
import json
import os
import tarfile
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path

from gpt_fast.files import replacing

TIME = 315532800  # 1980-01-01, the first that zip knows; no clock
MANIFEST = "MAR-INF/MANIFEST.json"


def rewrite_tgz(path: Path) -> None:
    """The same files under the same names, in a fixed order, owned by nobody in particular, made at no time."""
    with (
        replacing(path) as temporary,
        open(temporary, "wb") as file,
        gzip.GzipFile(filename="", mode="wb", fileobj=file, mtime=TIME) as zipped,
        tarfile.open(fileobj=zipped, mode="w", format=tarfile.PAX_FORMAT) as archive,
    ):
        for name, content in sorted(members(path)):
            entry = tarfile.TarInfo(name)
            entry.size, entry.mtime, entry.mode = len(content), TIME, 0o644
            archive.addfile(entry, BytesIO(content))


def members(path: Path) -> Iterator[tuple[str, bytes]]:
    """Name and content of every file."""
    with tarfile.open(path) as archive:
        for entry in archive:
            if entry.isfile() and (stream := archive.extractfile(entry)):
                content = stream.read()
                yield entry.name, dateless(content) if entry.name.endswith(MANIFEST) else content


def rewrite_folder(path: Path) -> None:
    """The manifest of an archive that was not packed."""
    manifest = path / MANIFEST
    content = dateless(manifest.read_bytes())
    with replacing(manifest) as temporary:
        temporary.write_bytes(content)
        os.chmod(temporary, 0o644)


def dateless(manifest: bytes) -> bytes:
    """TorchServe's manifest with no time when it was made; nobody reads it."""
    values = json.loads(manifest) | {"createdOn": "01/01/1980 00:00:00"}
    return (json.dumps(values, indent=2) + "\n").encode()
