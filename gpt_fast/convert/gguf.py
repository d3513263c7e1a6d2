"""GGUF files: a bounds-checked reader, dequantization, and their metadata in config.json's form.

The format (github.com/ggml-org/ggml, docs/gguf.md): magic, version, counts, typed key-value pairs, tensor entries
(name, dimensions innermost first, type, offset), then aligned data. Block formats are undone by the `gguf` package.
"""

from __future__ import annotations

import math
import mmap
import os
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gpt_fast.checkpoint.hf_config import Fields, model_config_from_hf
from gpt_fast.checkpoint.safetensors_file import CheckpointError
from gpt_fast.config import ConfigError
from gpt_fast.convert.names import GGUF_IGNORED, gguf_candidates
from gpt_fast.convert.run import Job, json_bytes
from gpt_fast.convert.source import ROWS, Source, TensorInfo, row_count, take_rows

SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9


class Block(NamedTuple):
    name: str
    elements: int
    nbytes: int
    plain: torch.dtype | None = None  # stored as it is


BLOCKS = {
    0: Block("F32", 1, 4, torch.float32),
    1: Block("F16", 1, 2, torch.float16),
    2: Block("Q4_0", 32, 18),
    3: Block("Q4_1", 32, 20),
    8: Block("Q8_0", 32, 34),
    12: Block("Q4_K", 256, 144),
    14: Block("Q6_K", 256, 210),
    30: Block("BF16", 1, 2, torch.bfloat16),
}


class GgufTensor(NamedTuple):
    block: Block
    shape: tuple[int, ...]  # outermost first
    offset: int  # from the start of the file

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) // self.block.elements * self.block.nbytes


class GgufSource(Source):
    """A GGUF file's metadata and tensors. `read` gives float32, whatever the file holds.

    Raises:
        CheckpointError: naming the file, and the key or tensor that is cut off, unknown or out of bounds.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with open(path, "rb") as file:
                self.size = os.fstat(file.fileno()).st_size
                if self.size < 24:
                    raise CheckpointError(path, f"is truncated: {self.size} bytes are no GGUF header")
                self.mapping = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        except OSError as error:
            raise CheckpointError(path, f"cannot be read: {error.strerror}") from None
        reader = HeaderReader(path, self.mapping)
        tensor_count, key_count = reader.start()
        self.metadata = reader.pairs(key_count)
        self.tensors = reader.tensors(tensor_count, read_alignment(path, self.metadata), self.size)
        self.infos = {name: TensorInfo(path, torch.float32, t.shape) for name, t in self.tensors.items()}

    def read(self, name: str, rows: ROWS | None = None) -> Tensor:
        block, shape, offset = self.tensors[name]
        if len(shape) == 1:
            return take_rows(self._matrix(block, offset, 1, shape[0])[0], rows)
        first, last = rows or (0, row_count(shape))
        columns = shape[-1]
        start = offset + first * (columns // block.elements * block.nbytes)
        matrix = self._matrix(block, start, last - first, columns)
        return matrix if rows else matrix.view(shape)

    def _matrix(self, block: Block, offset: int, rows: int, columns: int) -> Tensor:
        if block.plain is None:
            return dequantize(self.mapping, offset, rows, columns, block)
        plain = torch.frombuffer(self.mapping, dtype=block.plain, count=rows * columns, offset=offset)
        return plain.view(rows, columns).to(torch.float32)


def dequantize(mapping: mmap.mmap, offset: int, rows: int, columns: int, block: Block) -> Tensor:
    """float32 [rows, columns] of a block format."""
    try:
        import numpy as np
        from gguf import GGMLQuantizationType, quants
    except ImportError:
        raise ConfigError("gguf", f"{block.name} needs the gguf package: pip install 'gguf>=0.17'") from None
    width = columns // block.elements * block.nbytes
    data = np.frombuffer(mapping, dtype=np.uint8, count=rows * width, offset=offset).reshape(rows, width)
    return torch.from_numpy(quants.dequantize(data, GGMLQuantizationType[block.name]))


def read_alignment(path: Path, metadata: Mapping[str, Any]) -> int:
    alignment = metadata.get("general.alignment", 32)
    if not isinstance(alignment, int) or alignment < 8 or alignment & (alignment - 1) or alignment > 1 << 20:
        raise CheckpointError(path, f"general.alignment must be a power of two (got {alignment!r})")
    return alignment


class HeaderReader:
    """A cursor over the header; every read is checked against the file's end before it is made."""

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self.path, self.data, self.position = path, data, 0

    def start(self) -> tuple[int, int]:
        if self.take(4, "magic") != b"GGUF":
            raise CheckpointError(self.path, "is not a GGUF file")
        version = self.scalar("I", "version")
        if version not in (2, 3):
            raise CheckpointError(self.path, f"unknown GGUF version (got {version}, allowed 2, 3, little endian)")
        return self.scalar("Q", "tensor count"), self.scalar("Q", "key count")

    def take(self, count: int, what: str) -> bytes:
        if count > len(self.data) - self.position:
            raise CheckpointError(self.path, f"is truncated or corrupt: {what} needs {count} bytes at {self.position}")
        self.position += count
        return self.data[self.position - count : self.position]

    def scalar(self, code: str, what: str) -> Any:
        return struct.unpack("<" + code, self.take(struct.calcsize(code), what))[0]

    def string(self, what: str) -> str:
        data = self.take(self.scalar("Q", what), what)
        try:
            return data.decode("utf-8")
        except UnicodeDecodeError:
            raise CheckpointError(self.path, f"{what} is not UTF-8") from None

    def pairs(self, count: int) -> dict[str, Any]:
        metadata: dict[str, Any] = {}
        for number in range(count):
            key = self.string(f"key {number}")
            if key in metadata:
                raise CheckpointError(self.path, f"key {key} occurs twice")
            metadata[key] = self.value(self.scalar("I", f"key {key}"), f"key {key}")
        return metadata

    def value(self, kind: int, what: str) -> Any:
        if kind == STRING:
            return self.string(what)
        if kind == ARRAY:
            return self.array(what)
        if kind not in SCALARS:
            raise CheckpointError(self.path, f"{what} has unknown type {kind}")
        return self.scalar(SCALARS[kind], what)

    def array(self, what: str) -> list[Any]:
        kind, count = self.scalar("I", what), self.scalar("Q", what)
        if kind == STRING:
            return [self.string(what) for _ in range(count)]
        if kind not in SCALARS:
            raise CheckpointError(self.path, f"{what} is an array of unknown type {kind}")
        size = struct.calcsize("<" + SCALARS[kind])
        return list(struct.unpack(f"<{count}{SCALARS[kind]}", self.take(count * size, what)))

    def tensors(self, count: int, alignment: int, size: int) -> dict[str, GgufTensor]:
        entries: dict[str, GgufTensor] = {}
        for number in range(count):
            name = self.string(f"name of tensor {number}")
            if name in entries:
                raise CheckpointError(self.path, "occurs twice", tensor=name)
            entries[name] = self.tensor_entry(name)
        start = -(-self.position // alignment) * alignment
        placed = {name: entry._replace(offset=start + entry.offset) for name, entry in entries.items()}
        for name, entry in placed.items():
            if entry.offset % alignment or entry.offset + entry.nbytes > size:
                problem = (
                    f"is cut off or out of bounds: bytes {entry.offset} to {entry.offset + entry.nbytes} of {size}"
                )
                raise CheckpointError(self.path, problem, tensor=name)
        return placed

    def tensor_entry(self, name: str) -> GgufTensor:
        what = f"entry of tensor {name}"
        dimensions = self.scalar("I", what)
        if not 1 <= dimensions <= 4:
            raise CheckpointError(self.path, f"has {dimensions} dimensions (allowed 1..4)", tensor=name)
        shape = struct.unpack(f"<{dimensions}Q", self.take(8 * dimensions, what))[::-1]
        kind, offset = self.scalar("I", what), self.scalar("Q", what)
        if kind not in BLOCKS:
            allowed = ", ".join(block.name for block in BLOCKS.values())
            raise CheckpointError(self.path, f"has unknown type {kind} (allowed {allowed})", tensor=name)
        if shape[-1] % BLOCKS[kind].elements or not all(shape):
            raise CheckpointError(self.path, f"{list(shape)} does not divide into blocks", tensor=name)
        return GgufTensor(BLOCKS[kind], shape, offset)


# ------------------------------------------------------------------------------------------ the config

LLAMA_LIKE = ("llama", "qwen2", "qwen3", "phi3")
INERT_KEYS = frozenset(("attention.layer_norm_epsilon", "rope.scaling.finetuned", "vocab_size", "tensor_data_layout"))


def config_from_gguf(source: GgufSource) -> dict[str, Any]:
    """The metadata as a config.json object. An unknown architecture or key of its section is an error naming it."""
    name = source.metadata.get("general.architecture")
    if name not in LLAMA_LIKE:
        raise ConfigError("general.architecture", "unknown architecture", got=name, allowed=", ".join(LLAMA_LIKE))
    prefix = f"{name}."
    section = {key[len(prefix) :]: value for key, value in source.metadata.items() if key.startswith(prefix)}
    fields = Fields(section, prefix)
    config = gguf_sizes(source, fields)
    config |= gguf_family(name, fields, source.infos)
    config |= gguf_rope(source, fields, config)
    fields.finish(where="GGUF metadata", inert=INERT_KEYS)
    return config | gguf_token_ids(source.metadata)[0]


def gguf_sizes(source: GgufSource, fields: Fields) -> dict[str, Any]:
    embedding = source.infos.get("token_embd.weight")
    if embedding is None:
        raise CheckpointError(source.path, "is missing", tensor="token_embd.weight")
    n_head, dim = fields.integer("attention.head_count"), fields.integer("embedding_length")
    head_dim = fields.integer("attention.key_length", dim // n_head)
    fields.fixed("attention.value_length", head_dim)
    return {
        "hidden_act": "silu",
        "vocab_size": embedding.shape[0],
        "hidden_size": dim,
        "intermediate_size": fields.integer("feed_forward_length"),
        "num_hidden_layers": fields.integer("block_count"),
        "num_attention_heads": n_head,
        "num_key_value_heads": fields.integer("attention.head_count_kv", n_head),
        "head_dim": head_dim,
        "max_position_embeddings": fields.integer("context_length", high=1 << 30),
        "rms_norm_eps": round_float32(fields.number("attention.layer_norm_rms_epsilon", low=0.0)),
        "tie_word_embeddings": "output.weight" not in source.infos,
    }


def gguf_family(name: str, fields: Fields, tensors: Mapping[str, TensorInfo]) -> dict[str, Any]:
    """Architecture and options. GGUF's "llama" is Llama, Mistral and Mixtral; experts and a window tell which."""
    experts, window = fields.take("expert_count", 0), fields.take("attention.sliding_window", 0)
    if name in ("qwen2", "qwen3"):
        fields.fixed("attention.sliding_window", 0)
    if name == "llama":
        name = "mixtral" if experts else "mistral" if window else "llama"
    config: dict[str, Any] = {
        "architectures": [name.title() + "ForCausalLM"],
        "model_type": name,
    }
    if name in ("mistral", "mixtral", "phi3"):
        config["sliding_window"] = window or None
    if name in ("llama", "qwen3"):
        config["attention_bias"] = "blk.0.attn_q.bias" in tensors
    if name == "llama":
        config["mlp_bias"] = "blk.0.ffn_down.bias" in tensors
    if name == "mixtral":
        config |= {"num_local_experts": experts, "num_experts_per_tok": fields.integer("expert_used_count")}
    return config


def round_float32(value: float) -> float:
    """The shortest decimal that is this float32: 9.999999747378752e-06 was written as 1e-05."""
    for digits in range(1, 10):
        short = float(f"{value:.{digits}g}")
        if struct.pack("<f", short) == struct.pack("<f", value):
            return short
    return value


def gguf_rope(source: GgufSource, fields: Fields, sizes: Mapping[str, Any]) -> dict[str, Any]:
    """Base, rotated part of a head, and scaling."""
    head_dim = sizes["head_dim"]
    config: dict[str, Any] = {"rope_theta": round_float32(fields.number("rope.freq_base", 10000.0, low=1.0))}
    rotary_dim = fields.integer("rope.dimension_count", head_dim)
    if rotary_dim != head_dim:
        config["partial_rotary_factor"] = rotary_dim / head_dim
    scaling = gguf_rope_scaling(source, fields, max_position=sizes["max_position_embeddings"])
    if scaling and "original_max_position_embeddings" in scaling:  # Phi-3 reads it there only
        config["original_max_position_embeddings"] = scaling["original_max_position_embeddings"]
    return config | ({"rope_scaling": scaling} if scaling else {})


def gguf_rope_scaling(source: GgufSource, fields: Fields, *, max_position: int) -> dict[str, Any] | None:
    """`rope.scaling.*`, or the per-frequency divisors that llama.cpp stores as tensors (Llama 3.1, Phi-3).

    Where the type is absent it is linear, as in llama.cpp. What would multiply or mix the ways to stretch is refused.
    """
    kind = fields.take("rope.scaling.type", "linear")
    original = fields.integer("rope.scaling.original_context_length", max_position, high=1 << 30)
    attention = fields.number("rope.scaling.attn_factor", 1.0, low=0.0)
    factor = fields.number("rope.scale_linear", 1.0, low=-1e-9)  # its name in old files
    factor = round_float32(fields.number("rope.scaling.factor", factor, low=-1e-9)) or 1.0
    for key in ("yarn_ext_factor", "yarn_attn_factor"):
        fields.fixed(f"rope.scaling.{key}", 1)
    betas = {name: fields.number(f"rope.scaling.yarn_{name}", default, low=0.0)
             for name, default in (("beta_fast", 32.0), ("beta_slow", 1.0))}  # fmt: skip
    if "rope_factors_long.weight" in source.infos or "rope_freqs.weight" in source.infos:
        if factor != 1.0:
            raise ConfigError(fields.prefix + "rope.scaling.factor", "stands beside factor tensors", got=factor)
        single = "rope_freqs.weight" in source.infos
        names = ("rope_freqs.weight",) * 2 if single else ("rope_factors_short.weight", "rope_factors_long.weight")
        short, long = (read_divisors(source, name) for name in names)
        return {
            "rope_type": "longrope",
            "short_factor": short,
            "long_factor": long,
            "original_max_position_embeddings": original,
            "attention_factor": round_float32(attention),
        }
    fields.fixed("rope.scaling.attn_factor", 1)
    if kind == "none" or (factor == 1.0 and kind == "linear"):
        return None
    if kind == "linear":
        return {"rope_type": "linear", "factor": factor}
    if kind == "yarn":
        return {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": original, **betas}
    raise ConfigError(fields.prefix + "rope.scaling.type", "is not supported without its factor tensors", got=kind)


def read_divisors(source: GgufSource, name: str) -> list[float]:
    if name not in source.infos:
        raise CheckpointError(source.path, "is missing", tensor=name)
    return [round_float32(value) for value in source.read(name).flatten().tolist()]


def gguf_token_ids(metadata: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """(for config.json, for generation_config.json): the ids that begin and end a text."""
    ids = {name: metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("bos", "eos", "eot", "eom", "padding")}
    config = {"bos_token_id": ids["bos"], "eos_token_id": ids["eos"], "pad_token_id": ids["padding"]}
    ends = list(dict.fromkeys(ids[name] for name in ("eos", "eot", "eom") if ids[name] is not None))
    generation = {"bos_token_id": ids["bos"], "eos_token_id": ends or None, "pad_token_id": ids["padding"]}
    return (
        {key: value for key, value in config.items() if value is not None},
        {key: value for key, value in generation.items() if value is not None},
    )


def tokenizer_config(metadata: Mapping[str, Any], max_position: int) -> dict[str, Any]:
    tokens = metadata.get("tokenizer.ggml.tokens", [])

    def spelled(kind: str) -> str | None:
        token_id = metadata.get(f"tokenizer.ggml.{kind}_token_id")
        return tokens[token_id] if isinstance(token_id, int) and 0 <= token_id < len(tokens) else None

    values = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": spelled("bos"),
        "eos_token": spelled("eos"),
        "unk_token": spelled("unknown"),
        "pad_token": spelled("padding"),
        "add_bos_token": metadata.get("tokenizer.ggml.add_bos_token"),
        "add_eos_token": metadata.get("tokenizer.ggml.add_eos_token"),
        "model_max_length": max_position,
        "clean_up_tokenization_spaces": False,
    }
    return {key: value for key, value in values.items() if value is not None}


def gguf_job(path: Path, *, make_tokenizer: Callable[[Mapping[str, Any]], bytes]) -> Job:
    """A conversion of one GGUF file with everything it says. make_tokenizer: tokenizer.json from the metadata."""
    source = GgufSource(path)
    config = config_from_gguf(source)
    generation = gguf_token_ids(source.metadata)[1]
    model_config = model_config_from_hf(config, generation=generation)
    half_split = source.metadata["general.architecture"] != "llama"
    side_files = {
        "generation_config.json": json_bytes(generation),
        "tokenizer.json": make_tokenizer(source.metadata),
        "tokenizer_config.json": json_bytes(tokenizer_config(source.metadata, model_config.max_position)),
    }
    template = source.metadata.get("tokenizer.chat_template")
    if isinstance(template, str):
        side_files["chat_template.jinja"] = template.encode()
    return Job(
        source=source,
        config=config,
        candidates=gguf_candidates(model_config, half_split=half_split),
        ignored=GGUF_IGNORED,
        side_files=side_files,
        origin={"gguf": path.name},
    )


__all__ = ["GgufSource", "config_from_gguf", "gguf_job"]
