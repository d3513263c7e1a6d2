"""Fixtures the tests share (tiny random models, an engine core over one), and what holds for every test."""

import os
import re
import signal

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported: tiny tensors gain nothing from threads

from pathlib import Path

import pytest
import torch
from hypothesis import settings

from support.examples import register_profiles
from support.reaper import watch_this_process

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported: GPU kernels in its interpreter

register_profiles()
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))


def pytest_configure():
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as a shell's background jobs have it
        signal.signal(signal.SIGINT, signal.default_int_handler)
    watch_this_process()


MODULE_MARKS = re.compile(r"^pytestmark = (\[$.*?^\]|[^\n]+)", re.MULTILINE | re.DOTALL)


def pytest_ignore_collect(collection_path, config):
    """A module whose tests are all deselected (-m "not slow and ...") is not imported: some take seconds."""
    expression = config.option.markexpr
    if collection_path.suffix != ".py" or not re.fullmatch(r"not \w+( and not \w+)*", expression):
        return None
    own = MODULE_MARKS.search(collection_path.read_text(encoding="utf-8"))
    marks = set(re.findall(r"pytest\.mark\.(\w+)", own[1])) if own else set()
    return True if marks & set(re.findall(r"not (\w+)", expression)) else None


TINY = {
    "vocab_size": 97,
    "n_layer": 2,
    "n_head": 4,
    "n_kv_head": 2,
    "dim": 32,
    "head_dim": 8,
    "intermediate_size": 48,
    "max_position": 128,
}


@pytest.fixture(scope="session")
def tiny_model():
    """tiny_model(seed=0, max_seq_len=128, **options): a float32 Transformer of random weights, rope table made."""
    from gpt_fast.config import ModelConfig
    from gpt_fast.model.transformer import Transformer

    def build(*, seed=0, max_seq_len=128, **options):
        config = ModelConfig(**{**TINY, **options})
        model = Transformer(config).eval().requires_grad_(False)
        generator = torch.Generator().manual_seed(seed)
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if "norm" in name:
                parameter.copy_(1 + 0.2 * noise)
            elif "embeddings" in name:
                parameter.copy_(noise * config.dim**-0.5 * 3)
            else:
                parameter.copy_(noise * parameter.shape[-1] ** -0.5)
        model.setup_rope(max_seq_len, torch.device("cpu"))
        return model

    return build


@pytest.fixture(scope="session")
def make_core():
    """make_core(model, slots=4, max_seq_len=128, prefill_chunk=16, eos_ids=(1,), reuse_prefix=True): an EngineCore."""
    from gpt_fast.engine.chunk_budget import ChunkBudget
    from gpt_fast.engine.core import EngineCore
    from gpt_fast.engine.runner import Runner, chunk_sizes
    from gpt_fast.model.cache import KVCache

    def build(model, *, slots=4, max_seq_len=128, prefill_chunk=16, eos_ids=(1,), reuse_prefix=True):
        cache = KVCache(
            model.config, slots=slots, max_seq_len=max_seq_len, dtype=torch.float32, device=torch.device("cpu")
        )
        budget = ChunkBudget(chunk_sizes(prefill_chunk))
        runner = Runner(
            decode=model, prefill=model, cache=cache, eos_ids=eos_ids, prefill_chunk=prefill_chunk, budget=budget
        )
        return EngineCore(runner, reuse_prefix=reuse_prefix)

    return build


@pytest.fixture
def one_torch_thread():
    """Many small models: a second thread would only wait."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def fresh_compiler():
    """No graphs of other tests, and as many of one function as load/path.py allows: both are the process's own."""
    import torch._dynamo

    torch._dynamo.reset()
    with torch._dynamo.config.patch(recompile_limit=64):
        yield


@pytest.fixture(scope="session")
def default_checkpoint():
    """The default model's directory; `make model` puts it there."""
    directory = Path(__file__).parents[1] / "checkpoints" / "HuggingFaceTB" / "SmolLM2-135M-Instruct"
    assert (directory / "model.safetensors").is_file(), "run `make model` first"
    return directory


@pytest.fixture(scope="module")
def browser():
    """A headless Chromium, for tests with support.browser's NEEDS_CHROMIUM.

    It ends with its module: until then this thread counts as inside an event loop, so no test can start one.
    """
    from support.browser import chromium

    with chromium() as started:
        yield started


@pytest.fixture
def tabs(browser, tmp_path):
    """Pages in it: support.browser.Tabs. What no page may do has not happened when the test ends."""
    from support.browser import Tabs

    tabs = Tabs(browser, tmp_path / "pictures")
    yield tabs
    tabs.close()
    assert not tabs.wrongs
