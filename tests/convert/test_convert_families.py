"""Every family converts, and the engine's logits are transformers': float32, within 1e-4, the same argmax."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from gpt_fast.convert.hf import open_job
from gpt_fast.convert.run import convert
from gpt_fast.load.checkpoint import load_checkpoint
from support.tiny_models import FAMILIES, logits, save

pytestmark = pytest.mark.slow

POSITIONS = 1000


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_transformers(family: str, tmp_path: Path) -> None:
    reference = save(family, tmp_path / "hf")
    convert(open_job(tmp_path / "hf"), tmp_path / "out", progress=False)
    loaded = load_checkpoint(tmp_path / "out", device="cpu")
    tokens = torch.randint(0, loaded.config.vocab_size, (1, POSITIONS), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        want = reference(tokens).logits
    check_same(logits(loaded, tokens), want)
    check_same(logits(loaded, tokens, steps=60), want)


def check_same(got: torch.Tensor, want: torch.Tensor) -> None:
    assert (got - want).abs().max().item() < 1e-4
    assert torch.equal(got.argmax(-1), want.argmax(-1))
