"""SHA256SUMS: what an archive's files must be. Written as it is built, in sha256sum's format; checked before it serves.

It tells a damaged or half-edited archive from a whole one; it is no signature.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from pathlib import Path

from gpt_fast.files import write_text

SUMS = "SHA256SUMS"
PACKAGE = "gpt_fast"


def write_sums(root: Path, files: Mapping[str, Path]) -> None:
    """List files, each by its name in the archive, in root/SHA256SUMS."""
    write_text(root / SUMS, "".join(f"{sha256(files[name])}  {name}\n" for name in sorted(files)))


def check_archive(root: Path) -> None:
    """Compare an unpacked archive with its list.

    Raises:
        ValueError: the first file that is missing, differs, or is code that the list does not name; what to do.
    """
    listed = read_sums(root / SUMS)
    code = {path.relative_to(root).as_posix() for path in (root / PACKAGE).rglob("*") if is_ours(path)}
    if unlisted := sorted(code - listed.keys()):
        raise ValueError(refusal(unlisted[0], "is not in the archive's list"))
    for name, digest in listed.items():
        path = root / name
        if not path.is_file():
            raise ValueError(refusal(name, "is in the archive's list and not there"))
        if sha256(path) != digest:
            raise ValueError(refusal(name, "differs from what was archived"))


def sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def is_ours(path: Path) -> bool:
    """A file of the package, and none that Python keeps beside it."""
    return path.is_file() and "__pycache__" not in path.parts


def read_sums(path: Path) -> dict[str, str]:
    """Name -> sha256. ValueError where there is no such list."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        raise ValueError(refusal(SUMS, "cannot be read in the archive")) from None
    found = [re.fullmatch(r"([0-9a-f]{64})  (\S.*)", line) for line in lines]
    sums = {match[2]: match[1] for match in found if match}
    if len(sums) < len(lines) or not sums:
        raise ValueError(refusal(SUMS, "is no list of sha256sum's"))
    return sums


def refusal(name: str, problem: str) -> str:
    return f"{name}: {problem}; build the archive again with: make archive"
