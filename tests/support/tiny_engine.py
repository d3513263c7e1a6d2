"""A real engine small enough for any test: random weights, a tokenizer whose tokens are bytes."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from gpt_fast.config import ModelConfig
from gpt_fast.engine.chunk_budget import ChunkBudget
from gpt_fast.engine.core import EngineCore
from gpt_fast.engine.runner import Runner, chunk_sizes
from gpt_fast.llm import Engine
from gpt_fast.load.engine import Parts
from gpt_fast.model.cache import KVCache
from gpt_fast.model.transformer import Transformer
from gpt_fast.text.chat import ChatTemplate
from gpt_fast.text.tokenizer import Tokenizer

EOS = 256
TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}<assistant>"


class ByteTokenizer(Tokenizer):
    """Token i < 256 is the byte i; 256 ends a sequence."""

    vocab_size = 257
    bos_id = None
    eos_ids = frozenset({EOS})
    control_tokens = ()
    drops_leading_space = False

    def _encode(self, text: str, *, specials: bool, add_bos: bool) -> list[int]:
        return list(text.encode("utf-8"))

    def decode(self, ids: Iterable[int]) -> str:
        return bytes(i for i in ids if i < EOS).decode("utf-8", "replace")

    def token_bytes(self, token_id: int, *, keep_specials: bool = False) -> bytes:
        return bytes([token_id]) if token_id < EOS else b""


def tiny_config() -> ModelConfig:
    return ModelConfig(
        vocab_size=257, n_layer=2, n_head=4, n_kv_head=2, dim=32, head_dim=8, intermediate_size=48, max_position=256
    )


def tiny_engine(*, slots: int = 4, max_seq_len: int = 128) -> Engine:
    torch.manual_seed(0)
    config = tiny_config()
    model = Transformer(config).eval()
    model.setup_rope(max_seq_len, torch.device("cpu"))
    cache = KVCache(config, slots=slots, max_seq_len=max_seq_len, dtype=torch.float32, device=torch.device("cpu"))
    runner = Runner(
        decode=model, prefill=model, cache=cache, eos_ids={EOS}, prefill_chunk=32, budget=ChunkBudget(chunk_sizes(32))
    )
    runner.warm_up()
    return Engine(Parts(EngineCore(runner), ByteTokenizer(), config, ChatTemplate(TEMPLATE), {}))
