"""A directory of published weights as a conversion job: Hugging Face's, Meta's, or gpt-fast's own model.pth."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gpt_fast.checkpoint.hf_config import model_config_from_hf, passed_over
from gpt_fast.checkpoint.safetensors_file import CheckpointError
from gpt_fast.convert.meta import MetaSource, config_from_params, find_consolidated
from gpt_fast.convert.names import HF_IGNORED, META_IGNORED, hf_candidates, meta_candidates, plain_names
from gpt_fast.convert.run import Job
from gpt_fast.convert.side_files import read_side_files
from gpt_fast.convert.source import RenamedSource, Source, load_torch_file, open_file, open_hf
from gpt_fast.files import read_json_object

LOG = logging.getLogger(__name__)
DOWNLOADED = "download.json"  # what scripts/download.py notes: repository and commit


def open_job(source: Path) -> Job:
    """Read what `source` says about itself.

    Args:
        source: a Hugging Face snapshot, a directory with Meta's consolidated.NN.pth and params.json, or gpt-fast's
            model.pth (the file itself) with config.json beside it.
    Raises:
        CheckpointError, ConfigError: naming the file and, where there is one, the tensor or key.
    """
    directory = source if source.is_dir() else source.parent
    tensors = open_tensors(source)
    config = read_config(directory, tensors)
    model_config = model_config_from_hf(config)
    for key in passed_over(config):
        LOG.warning("%s: %s is passed over: transformers ignores it too", directory / "config.json", key)
    hf_names = any(name.startswith("model.") for name in tensors.infos)
    return Job(
        source=tensors,
        config=config,
        candidates=hf_candidates(model_config) if hf_names else meta_candidates(model_config),
        ignored=HF_IGNORED if hf_names else META_IGNORED,
        side_files=read_side_files(directory),
        origin=read_origin(directory),
    )


def open_tensors(source: Path) -> Source:
    if source.is_file():
        return renamed(open_file(source))
    consolidated = find_consolidated(source)
    has_hf = any(source.glob("model*.safetensors*")) or any(source.glob("pytorch_model*"))
    if consolidated and not has_hf:
        return MetaSource(consolidated)
    if not source.is_dir():
        raise CheckpointError(source, "no such file or directory")
    return renamed(open_hf(source))


def renamed(source: Source) -> Source:
    """The source by plain names, where its own are others."""
    names = plain_names(source.infos)
    return source if all(name == plain for name, plain in names.items()) else RenamedSource(source, names)


def read_config(directory: Path, source: Source) -> dict[str, Any]:
    """config.json, or params.json translated where there is no other."""
    if (directory / "config.json").is_file() or not (directory / "params.json").is_file():
        return read_json_object(directory / "config.json")
    return config_from_params(read_json_object(directory / "params.json"), source)


def read_origin(directory: Path) -> Mapping[str, Any]:
    return read_json_object(directory / DOWNLOADED, optional=True)


def is_gpt_fast_int8(source: Path) -> bool:
    """Whether a .pth holds gpt-fast's int8 linears: each weight with its `scales`."""
    pickled = source.is_file() and source.suffix in (".pth", ".pt")
    return pickled and any(name.endswith(".scales") for name in load_torch_file(source))
