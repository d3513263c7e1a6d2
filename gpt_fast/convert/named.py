"""The checkpoint that a user's --checkpoint_path means, made where it must be.

A converted directory or a weights file in one is taken as it is; a GGUF and a directory as it was published are
converted once, into the cache; ORG/NAME and ORG/NAME:QUANT are models that `gpt-fast pull` put on this machine.
"""

from __future__ import annotations

import hashlib
import json
import re
import sys
from collections.abc import Mapping
from pathlib import Path

from gpt_fast.checkpoint.choice import choose_weights
from gpt_fast.checkpoint.directory import converted_files, index_of
from gpt_fast.checkpoint.manifest import MANIFEST
from gpt_fast.cli.places import cache, home, in_checkout
from gpt_fast.cli.progress import Bar
from gpt_fast.config import ConfigError
from gpt_fast.convert.published import convert_published
from gpt_fast.convert.quantized import describe
from gpt_fast.files import locked, read_json_object
from gpt_fast.quantize.structure import MODES

CHECKPOINT_HELP = "a checkpoint's directory or weights file, a GGUF, a Hugging Face directory, or a pulled ORG/NAME"
HUB_NAME = re.compile(r"(\w[\w.-]*/\w[\w.-]*?)(?::(\w[\w.-]*))?")
QUANT = re.compile(rf"({'|'.join(sorted(MODES, key=len, reverse=True))})(?:\.g(\d+))?")
UNCONVERTED = ("config.json", "params.json")
GROUPSIZE = 32  # of int4 where none is said, as with gpt-fast quantize


def checkpoint_to_serve(
    name: str,
    *,
    quality: Mapping[str, float] | None = None,
    kv_cache: str = "auto",
    dtype: str = "auto",
    quiet: bool = False,
) -> Path:
    """The weights file to serve of what is named (checkpoint.choice); unless quiet, which one is said on stderr."""
    choice = choose_weights(converted(name), quality, kv_cache=kv_cache, dtype=dtype)
    if choice.told and not quiet:
        print(choice.told, file=sys.stderr, flush=True)
    return choice.weights


def converted(name: str) -> Path:
    """The converted directory, or the weights file, that `name` means.

    Raises:
        CheckpointError, ConfigError: one line; a path that looks like a checkpoint's own is left for who opens it.
    """
    path = Path(name)
    if path.suffix == ".gguf" and path.is_file() and not converted_files(path.parent):
        return convert_once(path)
    if path.is_dir():
        unconverted = not (path / MANIFEST).is_file() and any((path / config).is_file() for config in UNCONVERTED)
        return convert_once(path) if unconverted else path
    if path.exists() or index_of(path).is_file() or not HUB_NAME.fullmatch(name):
        return path
    return pulled(name) or refuse(name)


def refuse(name: str) -> Path:
    if Path(name).suffix in (".safetensors", ".gguf", ".pth", ".pt", ".bin"):
        return Path(name)  # a file that is not there: find_weights says so, and what lies beside it
    problem = f"no such file, directory or pulled model: `gpt-fast pull {name}` fetches one from the Hub"
    raise ConfigError("checkpoint_path", problem, got=name)


# ------------------------------------------------------------------------------------------ what was pulled


def pulled(name: str) -> Path | None:
    """Where `gpt-fast pull NAME` put it: its directory, or with :QUANT that file or directory; None: nowhere."""
    match = HUB_NAME.fullmatch(name)
    if match is None:
        return None
    for directory in (root / match[1] for root in roots()):
        if match[2] is None and (directory / MANIFEST).is_file():
            return directory
        if match[2] is not None and (found := of_tag(directory, match[2])):
            return found
    return None


def roots() -> list[Path]:
    """Folders of checkpoints by ORG/NAME: here, in the checkout, in the cache."""
    return [Path("checkpoints"), home() / "checkpoints", cache() / "checkpoints"]


def root_to_pull_to() -> Path:
    """The checkout's or the current directory's checkpoints/ where there is one, else the cache's."""
    here = home() / "checkpoints"
    return here if in_checkout() or here.is_dir() else cache() / "checkpoints"


def of_tag(directory: Path, tag: str) -> Path | None:
    """What :TAG is of a pulled model: a quantized file of its checkpoint, or the checkpoint of that GGUF."""
    if mode := read_quant(tag):
        weights = directory / f"model_{describe(*mode)}.safetensors"
        return weights if weights.is_file() or index_of(weights).is_file() else None
    made = directory / tag.upper()
    return made if (made / MANIFEST).is_file() else None


def read_quant(tag: str) -> tuple[str, int] | None:
    """Mode and group size of int8, int4, int4.g64, int4-gptq, ...; None: no mode of ours, so a GGUF's."""
    match = QUANT.fullmatch(tag)
    return None if match is None else (match[1], int(match[2] or GROUPSIZE))


# ------------------------------------------------------------------------------------------ conversion


def convert_once(source: Path) -> Path:
    """The checkpoint of a GGUF or a published directory in the cache, made unless it is there of the same files."""
    state = state_of(source)
    key = hashlib.sha256(str(source.resolve()).encode()).hexdigest()[:12]
    out_dir = cache() / "checkpoints" / "converted" / f"{source.resolve().stem}-{key}"
    convert_into(out_dir, source, {"path": str(source.resolve()), "state": state})
    return out_dir


def convert_into(out_dir: Path, source: Path, origin: Mapping[str, str], *, dtype: str = "keep") -> bool:
    """Convert unless `out_dir` was made of the same origin; whether it had to be. One process at a time does it."""
    wanted = dict(origin) | ({} if dtype == "keep" else {"dtype": dtype})
    with locked(out_dir.with_name(f".{out_dir.name}.lock")):
        if read_json_object(out_dir / MANIFEST, optional=True).get("source") == wanted:
            return False
        print(f"converting {source} once, into {out_dir}", file=sys.stderr, flush=True)
        with Bar("blocks") as bar:
            convert_published(source, out_dir, dtype=dtype, origin=wanted, progress=bar)
    return True


def state_of(source: Path) -> str:
    """Changes when a file of it does, by size or time."""
    files = [source] if source.is_file() else sorted(path for path in source.iterdir() if path.is_file())
    stats = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    return hashlib.sha256(json.dumps(stats).encode()).hexdigest()[:16]
