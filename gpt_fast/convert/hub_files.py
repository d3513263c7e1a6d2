"""A repository's files that conversion can use, from the Hugging Face Hub or from its cache on this machine."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

from gpt_fast.checkpoint.side_names import is_side_file
from gpt_fast.cli.hub import why_unreachable

WEIGHTS = (
    r"model(-\d+-of-\d+)?\.safetensors(\.index\.json)?",
    r"pytorch_model(-\d+-of-\d+)?\.bin(\.index\.json)?",
    r"consolidated\.\d+\.pth|params\.json",
)
GGUF = re.compile(r"(?:.*[.-])?([A-Za-z0-9_]+)\.gguf")  # NAME-Q4_0.gguf, NAME.Q4_0.gguf


class Snapshot(NamedTuple):
    """Files of one commit, as they lie in the Hub's cache."""

    directory: Path
    names: list[str]
    commit: str

    @property
    def nbytes(self) -> int:
        return sum((self.directory / name).stat().st_size for name in self.names)


def choose_files(names: Iterable[str]) -> list[str]:
    """The files to fetch: config, tokenizer, and the first kind of weights there is."""
    names = list(names)
    for pattern in WEIGHTS:
        weights = [name for name in names if re.fullmatch(pattern, name)]
        if any(name.endswith((".safetensors", ".bin", ".pth")) for name in weights):
            return sorted({*weights, *(name for name in names if name == "config.json" or is_side_file(name))})
    if tags := sorted(gguf_tags(names)):
        raise ValueError(f"holds GGUF files only: say which (allowed {', '.join(f':{tag}' for tag in tags)})")
    raise ValueError(f"no weights at the top of the repository (got {', '.join(sorted(names)) or 'no files'})")


def choose_gguf(names: Iterable[str], tag: str) -> list[str]:
    """The one GGUF of that tag, in upper case as file names spell it or not."""
    tags = gguf_tags(names)
    if tag.upper() not in tags:
        held = ", ".join(f":{name}" for name in sorted(tags)) or "no GGUF"
        raise ValueError(f":{tag}: no such quantization (got {tag}, the repository has {held}; of any weights: :int8, "
                         ":int4, :int4.g64, :int4-gptq)")  # fmt: skip
    return [tags[tag.upper()]]


def gguf_tags(names: Iterable[str]) -> dict[str, str]:
    """Tag -> file, of the GGUFs at the top that are whole; parts (NAME-00001-of-00003.gguf) have digits for a tag."""
    found = {match[1].upper(): name for name in names if "/" not in name and (match := GGUF.fullmatch(name))}
    return {tag: name for tag, name in found.items() if not tag.isdigit()}


def fetch(repo: str, choose: Callable[[Iterable[str]], list[str]], *, revision: str | None = None) -> Snapshot:
    """What `choose` takes of the repository's names, in the Hub's cache; what is there already is not fetched again.

    Without a network it is what the cache has of the repository.
    Raises:
        ValueError: in one line: not in the cache and no Hub, or what `choose` refuses.
        HfHubHTTPError and its bases: what the Hub answered.
    """
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.constants import HF_HUB_CACHE
    from huggingface_hub.errors import LocalEntryNotFoundError

    problem = why_unreachable()
    try:
        if problem is not None:
            directory = Path(snapshot_download(repo, revision=revision, local_files_only=True))
            names = chosen(repo, choose, (p.relative_to(directory).as_posix() for p in directory.rglob("*")))
        else:
            info = HfApi().model_info(repo, revision=revision)
            names = chosen(repo, choose, (sibling.rfilename for sibling in info.siblings or ()))
            directory = Path(snapshot_download(repo, revision=revision, allow_patterns=names))
    except LocalEntryNotFoundError:
        raise ValueError(f"{repo}: is not in the cache ({HF_HUB_CACHE}), and {problem or 'the Hub failed'}") from None
    return Snapshot(directory, names, directory.name)


def chosen(repo: str, choose: Callable[[Iterable[str]], list[str]], names: Iterable[str]) -> list[str]:
    try:
        return choose(names)
    except ValueError as error:
        raise ValueError(f"{repo}: {error}") from None
