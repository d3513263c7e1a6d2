"""Weights files that are nearly what they should be: read, or refused in one line; never a crash, never much memory."""

from __future__ import annotations

import resource
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given

from gpt_fast.checkpoint.safetensors_file import CheckpointError, SafetensorsFile
from gpt_fast.config import ConfigError
from gpt_fast.convert.gguf import GgufSource
from gpt_fast.convert.source import TorchSource
from support.examples import examples
from support.mutations import corpus, mutated

MOST_GROWTH = 256 << 10  # KiB: the files have some kilobytes


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("weights") / "file"


def read_or_refuse(open_it: Callable[[Path], object], path: Path, data: bytes) -> None:
    path.unlink(missing_ok=True)  # a mapping of the last one may still be there
    path.write_bytes(data)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        open_it(path)
    except (CheckpointError, ConfigError) as error:
        assert "\n" not in str(error) and len(str(error)) < 2000
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < MOST_GROWTH


def all_of_safetensors(path: Path) -> None:
    file = SafetensorsFile(path)
    for name in file.entries:
        file.tensor(name).sum()


def all_of_gguf(path: Path) -> None:
    source = GgufSource(path)
    for name in source.infos:
        source.read(name).sum()


def all_of_pth(path: Path) -> None:
    source = TorchSource(path, None)
    for name in source.infos:
        source.read(name).sum()


@pytest.mark.parametrize(
    ("open_it", "kind"), [(all_of_safetensors, "safetensors"), (all_of_gguf, "gguf"), (all_of_pth, "pth")]
)
def test_the_corpus_and_every_find(open_it, kind, path):
    for data in corpus(kind):
        read_or_refuse(open_it, path, data)


def test_a_files_own_names_move_no_cursor():
    assert str(CheckpointError("a\x1b[2J", "b\nc", tensor="\u202ed")) == "a\\x1b[2J: tensor \\u202ed: b\\nc"


@examples(600)
@given(data=mutated(corpus("safetensors")))
def test_safetensors(path, data):
    read_or_refuse(all_of_safetensors, path, data)


@examples(400)
@given(data=mutated(corpus("gguf")))
def test_gguf(path, data):
    read_or_refuse(all_of_gguf, path, data)


@examples(300)
@given(data=mutated(corpus("pth")))
def test_pth(path, data):
    read_or_refuse(all_of_pth, path, data)
