"""What Engine.load and Engine.stream take by name, as editors and type checkers read it.

The fields are those of EngineConfig and of SamplingParams (config.py), which say what they mean, their defaults and
bounds; tests/test_options.py holds the two lists together.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypedDict

from gpt_fast.config import Guide


class EngineOptions(TypedDict, total=False):
    """EngineConfig without checkpoint_path."""

    dtype: str
    kv_cache: str
    kernels: str
    device: str
    max_seq_len: int
    max_num_seqs: int
    kv_cache_gib: float
    prefill_chunk: int
    compile: bool
    compile_prefill: bool
    threads: int
    draft_checkpoint_path: str | None
    speculate: str | None
    speculate_k: int
    quality: Mapping[str, float]


class SamplingOptions(TypedDict, total=False):
    """SamplingParams."""

    max_new_tokens: int
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    seed: int | None
    stop: tuple[str, ...]
    stop_token_ids: tuple[int, ...]
    ignore_eos: bool
    min_tokens: int
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    logit_bias: Mapping[int, float]
    logprobs: int | None
    prompt_logprobs: int | None
    guide: Guide | None
