"""The fused CPU decoder of a model's shares against the whole model's, with threads as ranks."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gpt_fast.model.forward import Batch
from gpt_fast.model.parallel import Ranks, shard
from gpt_fast.model.transformer import Transformer
from gpt_fast.ops.cpu import CpuDecoder, build
from gpt_fast.ops.cpu.link import Link, RanksLost, memory
from support import cpu_twin, fused_ranks
from support.cpu_models import (
    CPU,
    MAX_SEQ_LEN,
    activations_unrounded,
    assert_rounded_alike,
    new_cache,
    random_tokens,
    run_chunks,
    small_model,
)
from support.cpu_ranks import links, share_decoders, together
from support.examples import examples, rest_slow
from support.paths import SUPPORT
from support.quantized import quantized_model
from support.ranks import run_ranks

pytestmark = pytest.mark.skipif(build.unavailable() is not None, reason="no compiler, or a processor without kernels")

KINDS = fused_ranks.KINDS
SHAPES = {
    "plain": {},
    "tied": dict(tie_embeddings=True),
    "biases": dict(qkv_bias=True, attention_out_bias=True, mlp_bias=True),
    "qk norm, one head a rank": dict(n_head=2, qk_norm=True),
    "window": dict(sliding_window=37, sliding_layers=(1,)),
    "odd dim": dict(dim=70, head_dim=32),
}


@pytest.fixture(autouse=True, scope="module")
def one_torch_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.inference_mode():
        yield
    torch.set_num_threads(before)


def model_of(kind: str, seed: int = 0, **shape: object) -> Transformer:
    """A model whose matrices are of one kind, and can be cut for 2, 3 or 4 ranks as it is shaped."""
    model = small_model(seed, **{"intermediate_size": 384, "vocab_size": 360} | shape)
    if kind == "bfloat16":
        return model
    quantized = quantized_model(model, mode=kind, groupsize=32, embedding="int8").eval()
    quantized.setup_rope(MAX_SEQ_LEN, CPU)
    return quantized


def exact(model: Transformer, kind: str) -> Callable[[Batch], torch.Tensor]:
    """The model's forward, with activations as they are."""
    return cpu_twin.twin(model, weights=kind) if kind == "bfloat16" else model


# ------------------------------------------------------------------------------------------ logits


def assert_shares_compute_the_whole(
    make: Callable[[], Transformer], kind: str, size: int, sizes: list[int], cache_type: torch.dtype = torch.float32
) -> None:
    """`size` ranks give one decoder's logits of a text in chunks of `sizes`, up to rounding; and all the same bytes."""
    whole = CpuDecoder(make(), weights=kind, threads=1)
    tokens_T = random_tokens(whole, sum(sizes))

    def run(share: CpuDecoder) -> torch.Tensor:
        cache = new_cache(share, dtype=cache_type, fill=torch.nan)
        return run_chunks(share.forward, tokens_T, cache, sizes, slot=3)

    first, *others = together([partial(run, share) for share in share_decoders(make, size, weights=kind)])
    assert all(torch.equal(first, other) for other in others)
    expected = run_chunks(whole.forward, tokens_T, new_cache(whole, dtype=cache_type), sizes)
    with activations_unrounded():
        known = run_chunks(exact(make(), kind), tokens_T, new_cache(whole), sizes)
    assert_rounded_alike(first, expected, known)


@pytest.mark.parametrize("kind", rest_slow(KINDS))
@pytest.mark.parametrize("shape", SHAPES)
def test_two_ranks_compute_what_one_decoder_computes(shape: str, kind: str) -> None:
    assert_shares_compute_the_whole(partial(model_of, kind, **SHAPES[shape]), kind, 2, [100, 1, 5, 1, 43])


@pytest.mark.parametrize("size", rest_slow([3, 4]))
@pytest.mark.parametrize("cache_type", [torch.bfloat16, torch.int8])
def test_more_ranks_and_narrow_caches(size: int, cache_type: torch.dtype) -> None:
    make = partial(model_of, "int8", n_head=2 * size, n_kv_head=size)
    assert_shares_compute_the_whole(make, "int8", size, [40, 1, 19], cache_type)


@pytest.mark.parametrize("kind", rest_slow(KINDS))
@pytest.mark.parametrize(
    ("size", "shape"),
    [
        (2, dict(n_head=9, n_kv_head=3, head_dim=32, vocab_size=333, intermediate_size=352)),
        (3, dict(n_head=8, n_kv_head=2, head_dim=32, vocab_size=97, intermediate_size=416)),  # KV heads on two ranks
    ],
)
def test_uneven_shares(size: int, shape: dict[str, int], kind: str) -> None:
    assert_shares_compute_the_whole(partial(model_of, kind, **shape), kind, size, [40, 1, 19])


@pytest.mark.slow
@examples(6)
@given(kind=st.sampled_from(KINDS), isa=st.sampled_from(build.isas_here()), seed=st.integers(0, 99))
def test_a_rows_logits_are_the_same_bits_however_it_is_run(kind: str, isa: str, seed: int) -> None:
    rng = random.Random(seed)
    make = partial(model_of, kind, seed, dim=rng.choice([64, 70, 96]), vocab_size=2 * rng.randint(20, 300))
    tokens_BS = random_tokens(make(), 4, 50, seed=seed)
    batched = Batch(tokens_BS, torch.arange(50).expand(4, 50), None, length=64)  # type: ignore[arg-type]
    found = []
    for threads in (1, 2):
        shares = share_decoders(make, 2, weights=kind, threads=threads, isa=isa)
        sizes = [1] * 5 + [rng.randint(1, 44)]
        sizes.append(50 - sum(sizes))
        found += together([partial(run_pieces, share, tokens_BS[2], [s for s in sizes if s]) for share in shares])
        found += [all_B[2:3] for all_B in together([partial(run_batch, share, batched) for share in shares])]
    assert all(torch.equal(one, found[0]) for one in found)


def run_pieces(share: CpuDecoder, tokens_T: torch.Tensor, sizes: list[int]) -> torch.Tensor:
    return run_chunks(share.forward, tokens_T, new_cache(share, fill=torch.nan), sizes, slot=3)[None]


def run_batch(share: CpuDecoder, batch: Batch) -> torch.Tensor:
    """Its logits on an empty cache of the share's own heads."""
    return share.forward(replace(batch, cache=new_cache(share, fill=torch.nan)))


def test_memory_that_is_short_takes_logits_in_pieces_and_refuses_longer_steps() -> None:
    make = partial(model_of, "int8")  # 96 values and 360 logits a token
    roomy, narrow = (share_decoders(make, 2, weights="int8", part_bytes=size) for size in (1 << 20, 1 << 16))
    batch = Batch(random_tokens(roomy[0], 1, 170), torch.arange(170)[None], None, length=200)  # type: ignore[arg-type]
    first, *others = together([partial(run_batch, share, batch) for share in roomy + narrow])
    assert all(torch.equal(first, other) for other in others)
    longer = Batch(torch.zeros(1, 171).long(), torch.arange(171)[None], None, length=200)  # type: ignore[arg-type]
    for share in narrow:
        with pytest.raises(ValueError, match=r"^tokens_BS: more tokens than the ranks' memory has room for"):
            run_batch(share, longer)


def test_logits_are_written_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    shares = share_decoders(partial(model_of, "bfloat16"), 2, weights="bfloat16")
    never_written = {torch.float32: torch.nan, torch.int64: -9}
    batch = Batch(random_tokens(shares[0], 3, 7), torch.arange(7).expand(3, 7), None, length=7)  # type: ignore[arg-type]
    runs = [partial(share.forward, replace(batch, cache=new_cache(share))) for share in shares]
    monkeypatch.setattr(torch, "empty", lambda shape, dtype: torch.full(shape, never_written[dtype], dtype=dtype))
    assert all(logits.isfinite().all() for logits in together(runs))


# ------------------------------------------------------------------------------------- best tokens, steps ahead


def greedy(share: CpuDecoder, *, leads: bool, best_only: bool, ahead: bool, steps: int = 30) -> torch.Tensor:
    """The tokens [steps, B] of three rows: with `ahead` a step begins before the last has ended. One that does not lead
    begins the same steps, and looks at none before the end."""
    cache = new_cache(share, fill=torch.nan)
    tokens_B1, pending, found = torch.tensor([[3], [200], [7]]), None, []
    for at in range(steps):
        batch = Batch(tokens_B1, torch.full((3, 1), at), cache, length=MAX_SEQ_LEN)
        pending = share.start(batch, after=pending if ahead else None, best_only=best_only)
        found.append(pending)
        if leads and at and ahead:
            found[-2].result()
        if not ahead:
            tokens_B1 = pending.best()
    return torch.stack([step.best() for step in found])


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_ranks_find_one_best_token_however_they_look_for_it(kind: str) -> None:
    make = partial(model_of, kind, vocab_size=4000)  # a head that is worth its screen
    expected = None
    for threads in (1, 2):
        shares = share_decoders(make, 2, weights=kind, threads=threads)
        assert kind != "int8" or all(share.greedy_saves for share in shares)
        for best_only in (False, True):
            for ahead in (False, True):
                calls = [partial(greedy, s, leads=s is shares[0], best_only=best_only, ahead=ahead) for s in shares]
                leader, follower = together(calls)
                assert torch.equal(leader, follower)
                expected = leader if expected is None else expected
                assert torch.equal(leader, expected)


def test_the_best_of_equals_is_the_first_and_nan_is_none() -> None:
    def make() -> Transformer:
        model = model_of("bfloat16", vocab_size=400)
        model.output.weight[5] = model.output.weight[70] = model.output.weight[390] = 30 * model.output.weight[0]
        model.tok_embeddings.weight[300] = torch.nan
        return model

    def step(share: CpuDecoder) -> tuple[torch.Tensor, torch.Tensor]:
        tokens = torch.tensor([*range(40), 300])[:, None]
        batch = Batch(tokens, torch.zeros_like(tokens), new_cache(share, slots=41), length=8)
        began = share.start(batch)
        return began.best(), began.result()

    for best, logits in together([partial(step, share) for share in share_decoders(make, 2, weights="bfloat16")]):
        assert torch.equal(best[:-1], logits[:-1].argmax(-1)) and best[-1] == -1
        assert (best == 5).any()


# ------------------------------------------------------------------------------------------ what rank 0 tells


def test_all_ranks_hear_all_messages_in_order() -> None:
    """Messages that are empty, and one that is longer than the memory for them, which ranks read at their own pace."""
    numbers = random.Random(0)
    sizes = [0, 1, 200_000, *(numbers.randrange(400) for _ in range(2000))]
    messages = [torch.arange(size) * (2**40 + 1) - index for index, size in enumerate(sizes)]
    leader, *others = links(3)

    def tell() -> list[torch.Tensor]:
        for message in messages:
            leader.send(message)
        return messages

    def hear(link: Link) -> list[torch.Tensor]:
        return [link.receive() for _ in messages]

    _, *heard = together([tell, *(partial(hear, link) for link in others)])
    for found in heard:
        assert all(torch.equal(one, other) for one, other in zip(found, messages, strict=True))


def test_a_rank_that_hears_nothing_more_ends_the_link() -> None:
    leader, reader, _ = links(3, seconds=0.5)
    full = torch.zeros(60_000, dtype=torch.int64)
    leader.send(full)
    assert torch.equal(reader.receive(), full)
    reason = "rank 2 did not take part in a step for 0.5 s"
    assert together([partial(lost, partial(leader.send, full)), partial(lost, reader.receive)]) == [reason] * 2


def test_a_rank_that_waits_for_word_is_told_of_the_links_end() -> None:
    leader, other = links(2)
    threading.Timer(0.2, leader.give_up).start()
    assert lost(other.receive) == "the ranks gave up"


# ------------------------------------------------------------------------------------------ what goes wrong


def one_token(share: CpuDecoder, token: int = 3) -> Batch:
    return Batch(torch.tensor([[token]]), torch.tensor([[0]]), new_cache(share), length=8)


def lost(call: Callable[[], object]) -> str:
    """Why the ranks of a call are lost."""
    with pytest.raises(RanksLost) as error:
        call()
    return str(error.value)


def test_a_link_ends_for_all_when_one_does_not_come() -> None:
    all_links = links(3, seconds=0.5)
    together([link.meet for link in all_links])
    reason = "rank 2 did not take part in a step for 0.5 s"
    assert together([partial(lost, link.meet) for link in all_links[:2]]) == [reason] * 2
    assert lost(all_links[2].meet) == reason  # also the one that was late


def test_ranks_that_begin_different_steps_say_so_instead_of_adding_them_up() -> None:
    shares = share_decoders(partial(model_of, "int8"), 2, weights="int8")
    steps = [partial(share.forward, one_token(share, 3 + rank)) for rank, share in enumerate(shares)]
    assert together([partial(lost, step) for step in steps]) == ["ranks began different steps"] * 2


def test_a_step_that_waits_for_a_rank_can_be_told_to_give_up() -> None:
    shares = share_decoders(partial(model_of, "int8"), 2, weights="int8")
    step = shares[1].start(one_token(shares[1]))  # which rank 0 never begins
    shares[0].link.give_up()
    assert lost(step.result) == "the ranks gave up"
    assert [lost(partial(share.start, one_token(share))) for share in shares] == ["the ranks gave up"] * 2


def test_a_step_whose_result_nobody_asks_for_holds_no_rank_up() -> None:
    shares = share_decoders(partial(model_of, "int8"), 2, weights="int8")
    for asked, dropped in (shares, reversed(shares)):
        dropped.start(one_token(dropped))
        assert asked.forward(one_token(asked)).isfinite().all()


def test_a_bad_token_ends_no_link() -> None:
    shares = share_decoders(partial(model_of, "int8"), 2, weights="int8")

    def run(share: CpuDecoder) -> torch.Tensor:
        with pytest.raises(ValueError, match="tokens_BS"):
            share.forward(one_token(share, 360))
        return share.forward(one_token(share, 359))

    first, second = together([partial(run, share) for share in shares])
    assert torch.equal(first, second) and first.isfinite().all()


def test_a_share_needs_a_link_and_only_a_share_takes_one() -> None:
    whole, share = model_of("int8"), model_of("int8")
    shard(share, Ranks(0, 2))
    for model, link in ((share, None), (whole, links(1)[0])):
        with pytest.raises(ValueError, match=r"^link: is for a rank's share"):
            CpuDecoder(model, weights="int8", threads=1, link=link)


# ------------------------------------------------------------------------------------------ processes


@pytest.mark.slow
def test_processes_compute_what_one_decoder_computes(tmp_path: Path) -> None:
    done = run_ranks(3, str(SUPPORT / "fused_ranks.py"), str(tmp_path))
    assert done.returncode == 0, done.stderr
    of_ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(3)]
    assert [found["refused"] for found in of_ranks] == ["rank 1: no room"] * 3
    for kind in KINDS:
        model = fused_ranks.model_of(kind)
        expected, tokens = fused_ranks.logits_and_tokens(CpuDecoder(model, weights=kind, threads=1))
        shares = zip(*(found[kind] for found in of_ranks), strict=True)
        logits, own_tokens = ([one, *others] for one, *others in shares)
        assert all(torch.equal(logits[0], other) for other in logits)
        assert all(torch.equal(own_tokens[0], other) for other in own_tokens)
        with activations_unrounded():
            known = run_chunks(exact(model, kind), random_tokens(model, 60), new_cache(model), [60])
        assert_rounded_alike(logits[0], expected, known)
        assert own_tokens[0].shape == tokens.shape


RANK_1 = "from support.cpu_ranks import meet_for_ever; meet_for_ever({file})"


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_a_process_that_is_killed_or_stopped_holds_nobody_up(how: signal.Signals) -> None:
    file = memory(2)
    link = Link(file, Ranks(0, 2), threads=1, seconds=1.0)
    command = [sys.executable, "-c", RANK_1.format(file=file)]
    path = os.pathsep.join((str(SUPPORT.parents[1]), str(SUPPORT.parent)))
    with subprocess.Popen(command, pass_fds=[file], env=os.environ | {"PYTHONPATH": path}) as other:
        os.close(file)
        try:
            link.meet(5000)  # the first time it is waited for as long as it takes to start
            other.send_signal(how)
            assert lost(partial(link.meet, 10**9)) == "rank 1 did not take part in a step for 1 s"
        finally:
            other.kill()
