"""gpt_fast.generate with a draft: it proposes as asked, says how often that was right, and changes no text."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from gpt_fast import generate
from gpt_fast.engine.fixed_choice import speculator_of
from gpt_fast.llm import Engine
from gpt_fast.speculative.costs import Choice
from gpt_fast.speculative.speculator import Totals
from support.quantized import random_model, small_config, write_checkpoint

Said = Callable[..., str]
TINY = ["--device", "cpu", "--dtype", "float32", "--num_samples", "2", "--max_new_tokens", "40", "--temperature", "0"]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """A target, and another model of its vocabulary that agrees with it by chance only."""
    folder, config = tmp_path_factory.mktemp("generate"), small_config(vocab_size=257)
    models = [random_model(config, seed=seed) for seed in (0, 1)]
    return [write_checkpoint(folder / str(i), model, tokenizer=True) for i, model in enumerate(models)]


@pytest.fixture
def said(capsys: pytest.CaptureFixture[str]) -> Said:
    def run(*arguments: object) -> str:
        generate.main([str(a) for a in arguments])
        return capsys.readouterr().out

    return run


def texts_of(shown: str) -> list[str]:
    """Every sample's text, of every row."""
    rows = re.findall(r"^--- row \d+\n(.*?)(?=\n--- row |\nTime for)", shown, re.M | re.S)
    alone = re.findall(r"^(?:Prompt length: \d+|Bandwidth achieved: \S+ GB/s)\n(.*?)\nTime for", shown, re.M | re.S)
    assert rows or alone
    return rows or alone


def figures(shown: str) -> tuple[list[float], float, list[tuple[float, int]]]:
    """Shares of blocks, mean accepted, and of each position (share accepted, proposals evaluated)."""
    shares = re.search(r"^Acceptance probs: \[(.*)\]$", shown, re.M)
    mean = re.search(r"^Mean Accepted: (\S+)$", shown, re.M)
    places = re.search(r"^Acceptance by position: (.*)$", shown, re.M)
    assert shares and mean and places
    found = re.findall(r"(\d+): (\S+) of (\d+)", places[1])
    assert [int(i) for i, _, _ in found] == list(range(1, len(found) + 1))
    return [float(s) for s in shares[1].split(", ")], float(mean[1]), [(float(a), int(n)) for _, a, n in found]


@pytest.mark.slow
@pytest.mark.parametrize("batch_size", [1, 3])
def test_a_draft_that_is_the_target_is_always_right(checkpoints: list[Path], batch_size: int, said: Said) -> None:
    flags = ["--checkpoint_path", checkpoints[0], *TINY, "--batch_size", batch_size]
    shown = said(*flags, "--draft_checkpoint_path", checkpoints[0], "--speculate_k", 3)
    shares, mean, places = figures(shown)
    assert [share for share, _ in places] == [1.0] * 3 and shares[0] == 0.0
    # 39 tokens after the prompt's: nine blocks of four, one of two proposals and their token
    assert shares == [0.0, 0.0, 0.1, 0.9] and mean == pytest.approx(2.9)
    assert [count for _, count in places] == [20 * batch_size, 20 * batch_size, 18 * batch_size]
    assert texts_of(shown) == texts_of(said(*flags))


@pytest.mark.slow
def test_a_draft_that_is_never_right_proposes_in_every_step(checkpoints: list[Path], said: Said) -> None:
    """The controller would have left it alone, and said nothing of it."""
    target, draft = checkpoints
    flags = ["--checkpoint_path", target, *TINY, "--batch_size", 2]
    shown = said(*flags, "--draft_checkpoint_path", draft, "--speculate", "draft", "--speculate_k", 4)
    shares, mean, places = figures(shown)
    assert shares[0] > 0.8 and len(shares) <= 5 and mean < 0.5
    steps = places[0][1]  # of two rows, two samples, 39 tokens each, the last of which needs no proposals
    assert steps * (1 + mean) == pytest.approx(4 * 38, abs=4 * 4)
    assert texts_of(shown) == texts_of(said(*flags))


@pytest.mark.slow
def test_plain_and_speculative_speed_stand_side_by_side(checkpoints: list[Path], said: Said) -> None:
    shown = said("--checkpoint_path", checkpoints[0], *TINY, "--draft_checkpoint_path", checkpoints[0])
    speculative = re.search(r"^Average tokens/sec: (\S+)$", shown, re.M)
    compared = re.search(r"^Plain tokens/sec: (\S+); speculative: (\S+) times as fast$", shown, re.M)
    assert speculative and compared
    assert float(compared[2]) == pytest.approx(float(speculative[1]) / float(compared[1]), rel=0.02)
    alone = said("--checkpoint_path", checkpoints[0], *TINY)
    assert "Plain tokens/sec" not in alone and "Accept" not in alone


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flags", "always"), [([], True), (["--speculate", "draft"], True), (["--speculate", "auto"], False)]
)
def test_only_auto_leaves_it_to_what_pays(checkpoints: list[Path], flags: list[str], always: bool) -> None:
    named = ["--checkpoint_path", str(checkpoints[0]), "--draft_checkpoint_path", str(checkpoints[1])]
    args = generate.parse_args([*named, "--speculate_k", "3", *flags])
    engine = Engine.load(
        args.checkpoint_path,
        draft_checkpoint_path=args.draft_checkpoint_path,
        speculate=args.speculate,
        speculate_k=args.speculate_k,
        device="cpu",
    )
    speculator = speculator_of(engine.core)
    assert speculator is not None
    with generate.drafting(engine, args):
        assert speculator.always == (Choice("draft", 3) if always else None)
    assert speculator.always is None


def test_no_proposal_is_said_in_words() -> None:
    assert generate.acceptance(Totals()).startswith("Acceptance: nothing was proposed: ")


@pytest.mark.model
def test_the_default_models_int4_form_is_a_good_draft_of_it(default_checkpoint: Path, said: Said) -> None:
    draft = default_checkpoint / "model_int4.g32.safetensors"
    source = default_checkpoint / "model.safetensors"
    flags = ["--checkpoint_path", source, "--dtype", "bfloat16", "--temperature", 0, "--batch_size", 2]
    flags += ["--num_samples", 1, "--max_new_tokens", 60, "--device", "cpu", "--prompt", "The capital of France is"]
    shown = said(*flags, "--draft_checkpoint_path", draft, "--speculate_k", 4)
    _, mean, places = figures(shown)
    assert mean > 2 and all(share > 0.6 for share, _ in places)
    assert texts_of(shown) == texts_of(said(*flags))
