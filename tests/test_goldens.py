"""The default model decodes the tokens that transformers decodes from the same GGUF (scripts/make_goldens.py)."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from gpt_fast.config import SamplingParams
from gpt_fast.llm import Engine
from support.paths import ROOT

GOLDENS = json.loads((ROOT / "tests" / "data/goldens.json").read_text(encoding="utf-8"))["prompts"]
pytestmark = pytest.mark.model


@pytest.fixture(scope="module")
def engine(default_checkpoint: Path) -> Engine:
    return Engine.load(str(default_checkpoint), dtype="float32", device="cpu", max_seq_len=2048, max_num_seqs=8)


def test_the_tokenizer_gives_the_same_prompts(engine):
    for golden in GOLDENS.values():
        assert engine.tokenizer.encode_with_specials(golden["text"]) == golden["prompt"]


def test_greedy_tokens_together(engine):
    """All prompts at once, 5 to 1,500 tokens: neither batching nor chunked prefill changes a token."""
    params = SamplingParams(max_new_tokens=64, ignore_eos=True)
    answers = engine.generate([g["prompt"] for g in GOLDENS.values()], [params] * len(GOLDENS))
    for name, golden, answer in zip(GOLDENS, GOLDENS.values(), answers, strict=True):
        assert list(answer.tokens) == golden["tokens"], name


@pytest.mark.parametrize("name", ["short", "emoji"])
def test_greedy_tokens_alone(engine, name):
    answer = engine.generate([GOLDENS[name]["prompt"]], [SamplingParams(max_new_tokens=64, ignore_eos=True)])[0]
    assert list(answer.tokens) == GOLDENS[name]["tokens"]
