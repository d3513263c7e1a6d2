"""Meta's own releases: consolidated.NN.pth (tensor-parallel shards, joined) and params.json in config.json's form.

How the shards were cut is Meta's model code (github.com/meta-llama/llama): linears by output or by input, the
embedding by width (Llama 1, 2) or by vocabulary (Llama 3), norms repeated in each.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gpt_fast.checkpoint.hf_config import Fields
from gpt_fast.checkpoint.safetensors_file import CheckpointError
from gpt_fast.config import ConfigError
from gpt_fast.convert.source import ROWS, Source, TensorInfo, load_torch_file, take_rows

BY_OUTPUT = re.compile(r"output\.weight|layers\.\d+\.(attention\.w[qkv]|feed_forward\.w[13])\.weight")
BY_INPUT = re.compile(r"layers\.\d+\.(attention\.wo|feed_forward\.w2)\.weight")
EMBEDDING = "tok_embeddings.weight"


def find_consolidated(directory: Path) -> list[Path]:
    """consolidated.00.pth, 01, ... in order; CheckpointError when one in between is absent."""
    files = sorted(directory.glob("consolidated.*.pth"))
    for number, file in enumerate(files):
        if file.name != f"consolidated.{number:02d}.pth":
            raise CheckpointError(
                directory / f"consolidated.{number:02d}.pth", f"no such file, but {file.name} is there"
            )
    return files


class MetaSource(Source):
    """The joined tensors of all shards. Shards are opened for one tensor at a time, so their pages can go."""

    def __init__(self, files: list[Path]) -> None:
        self.path, self.files = files[0], files
        shards = [load_torch_file(file) for file in files]
        for file, tensors in zip(files, shards, strict=True):
            for name in shards[0].keys() ^ tensors.keys():
                raise CheckpointError(file, f"is not in both {files[0].name} and {file.name}", tensor=name)
        width = shards[0]["norm.weight"].shape[0] if "norm.weight" in shards[0] else 0
        self.cuts = {name: cut_dimension(name, tensor, width) for name, tensor in shards[0].items()}
        self.infos = {name: self._info(name, [tensors[name] for tensors in shards]) for name in shards[0]}

    def read(self, name: str, rows: ROWS | None = None) -> Tensor:
        cut = self.cuts[name]
        if cut is None:
            return take_rows(load_torch_file(self.path)[name], rows)
        parts = [load_torch_file(file)[name] for file in self.files]
        return take_rows(parts[0] if len(parts) == 1 else torch.cat(parts, cut), rows)

    def _info(self, name: str, parts: list[Tensor]) -> TensorInfo:
        cut, first = self.cuts[name], parts[0]
        for file, part in zip(self.files, parts, strict=True):
            if part.shape != first.shape or part.dtype != first.dtype:
                problem = f"is {part.dtype} {list(part.shape)}, in {self.path.name} {first.dtype} {list(first.shape)}"
                raise CheckpointError(file, problem, tensor=name)
        shape = list(first.shape)
        if cut is not None:
            shape[cut] *= len(parts)
        return TensorInfo(self.path, first.dtype, tuple(shape))


def cut_dimension(name: str, tensor: Tensor, width: int) -> int | None:
    """The dimension the shards of a tensor are joined along; None: each holds all of it."""
    if name == EMBEDDING:
        return 0 if tensor.shape[-1] == width else 1
    if BY_OUTPUT.fullmatch(name):
        return 0
    return 1 if BY_INPUT.fullmatch(name) else None


def config_from_params(params: Mapping[str, Any], source: Source) -> dict[str, Any]:
    """params.json as a config.json object.

    Meta's file does not state the context length, nor how far Llama 3.1's rope scaling stretches: `max_seq_len`,
    and with `use_scaled_rope` also `rope_scale_factor`, must be added to it. ConfigError says so.
    """
    fields = Fields(params, "params.json: ")
    dim, n_head = fields.integer("dim"), fields.integer("n_heads")
    embedding = source.infos.get(EMBEDDING)
    if embedding is None or len(embedding.shape) != 2:
        raise CheckpointError(source.path, "is missing or no matrix", tensor=EMBEDDING)
    vocab_size = fields.take("vocab_size", -1)
    if "max_seq_len" not in params:
        raise ConfigError("params.json: max_seq_len", "is required: add the length the model was trained for")
    config: dict[str, Any] = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "vocab_size": embedding.shape[0] if vocab_size == -1 else vocab_size,
        "hidden_size": dim,
        "intermediate_size": feed_forward_size(fields, dim),
        "num_hidden_layers": fields.integer("n_layers"),
        "num_attention_heads": n_head,
        "num_key_value_heads": fields.integer("n_kv_heads", n_head),
        "max_position_embeddings": fields.integer("max_seq_len", high=1 << 30),
        "rms_norm_eps": fields.number("norm_eps", low=0.0),
        "rope_theta": fields.number("rope_theta", 10000.0, low=1.0),
        "tie_word_embeddings": "output.weight" not in source.infos,
    }
    if fields.boolean("use_scaled_rope", False):
        config["rope_scaling"] = {
            "rope_type": "llama3",
            "factor": scale_factor(fields),
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        }
    fields.finish(where="params.json", inert=frozenset({"max_batch_size", "model_parallel_size"}))
    return config


def scale_factor(fields: Fields) -> float:
    if fields.values.get("rope_scale_factor") is None:
        problem = "is required with use_scaled_rope: add it (8 in Llama 3.1, 32 in Llama 3.2)"
        raise ConfigError("params.json: rope_scale_factor", problem)
    return fields.number("rope_scale_factor", low=0.0)


def feed_forward_size(fields: Fields, dim: int) -> int:
    """Meta's rule: two thirds of 4 dim, times ffn_dim_multiplier, rounded up to a multiple."""
    size = int(2 * 4 * dim / 3)
    if fields.take("ffn_dim_multiplier", None) is not None:
        size = int(fields.number("ffn_dim_multiplier", low=0.0) * size)
    multiple = fields.integer("multiple_of", 256)
    return -(-size // multiple) * multiple
