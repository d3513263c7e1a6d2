"""A model of random weights with another's vocabulary and tokenizer: a draft that guesses nothing, or a target of any
size to time drafts on."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import Tensor

from gpt_fast.checkpoint.directory import FORMAT
from gpt_fast.checkpoint.hf_config import load_model_config
from gpt_fast.checkpoint.manifest import install, staging
from gpt_fast.checkpoint.safetensors_file import CheckpointError, TensorSpec, write_bytes, write_weights
from gpt_fast.convert.side_files import read_side_files
from gpt_fast.files import read_json_object
from gpt_fast.model.empty import empty_model

CONFIG = "config.json"


def write_random_model(like: Path, directory: Path, *, layers: int, seed: int = 0) -> Path:
    """Write a bfloat16 checkpoint of `layers` layers to `directory`, everything else as in the checkpoint `like`.

    Returns:
        the directory. CheckpointError when it holds something already, or `like` cannot be read.
    """
    if directory.exists() and any(directory.iterdir()):
        raise CheckpointError(directory, "is not empty")
    values = {**read_json_object(like / CONFIG), "num_hidden_layers": layers}
    with staging(directory) as stage:
        sides = {**read_side_files(like), CONFIG: (json.dumps(values, indent=2) + "\n").encode()}
        files = {name: write_bytes(stage / name, data) for name, data in sides.items()}
        config = load_model_config(stage)
        tensors = empty_model(config).state_dict()
        if config.tie_embeddings:
            tensors.pop("output.weight", None)
        specs = [TensorSpec(name, torch.bfloat16, tuple(tensor.shape)) for name, tensor in tensors.items()]
        generator = torch.Generator().manual_seed(seed)
        files |= write_weights(stage, "model", specs, lambda spec: random_weight(spec, generator), metadata=FORMAT)
        install(stage, directory, files, {"random": seed, "like": like.name})
    return directory


def random_weight(spec: TensorSpec, generator: torch.Generator) -> Tensor:
    """Norms are one, biases zero, matrices as wide as keeps activations of size one."""
    if len(spec.shape) == 1:
        return torch.ones(spec.shape, dtype=spec.dtype) * ("bias" not in spec.name)
    values = torch.randn(spec.shape, generator=generator) * float(spec.shape[-1] ** -0.5)
    return values.to(spec.dtype)
