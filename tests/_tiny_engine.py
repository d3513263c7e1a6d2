"""A real engine small enough for any test: random weights, a tokenizer whose tokens are bytes."""

from __future__ import annotations

import torch

from gpt_fast.cache import KVCache
from gpt_fast.config import ModelConfig
from gpt_fast.engine import EngineCore, Runner
from gpt_fast.llm import Engine
from gpt_fast.load import Parts
from gpt_fast.model import Transformer

EOS = 256


class ByteTokenizer:
    """Token i < 256 is the byte i; 256 ends a sequence."""

    vocab_size = 257
    bos_id = None
    eos_ids = frozenset({EOS})

    def encode(self, text: str, *, add_bos: bool = True) -> list[int]:
        return list(text.encode("utf-8"))

    def encode_with_specials(self, text: str) -> list[int]:
        return self.encode(text)

    def detokenizer(self) -> ByteDetokenizer:
        return ByteDetokenizer()


class ByteDetokenizer:
    def push(self, token: int) -> bytes:
        return bytes([token]) if token < 256 else b""


def tiny_config() -> ModelConfig:
    return ModelConfig(
        vocab_size=257, n_layer=2, n_head=4, n_kv_head=2, dim=32, head_dim=8, intermediate_size=48, max_position=256
    )


def tiny_engine(*, slots: int = 4, max_seq_len: int = 128) -> Engine:
    torch.manual_seed(0)
    config = tiny_config()
    model = Transformer(config).eval()
    model.setup_rope(max_seq_len, torch.device("cpu"))
    cache = KVCache(
        config, slots=slots, max_seq_len=max_seq_len, dtype=torch.float32, device=torch.device("cpu")
    )
    runner = Runner(decode=model, prefill=model, cache=cache, eos_ids={EOS}, prefill_chunk=32)
    runner.warm_up()
    return Engine(Parts(EngineCore(runner), ByteTokenizer(), config, None, {}))
