"""A manifest for checkpoints that tests make by other means than conversion."""

from __future__ import annotations

from pathlib import Path

from gpt_fast.checkpoint.manifest import MANIFEST, hash_file, write_manifest


def list_files(directory: Path) -> None:
    """Write the manifest of every file now in the directory (its own and hidden names apart)."""
    names = [p.name for p in directory.iterdir() if p.is_file() and p.name != MANIFEST and not p.name.startswith(".")]
    write_manifest(directory, {name: hash_file(directory / name) for name in names}, {})
