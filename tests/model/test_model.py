"""The fast forward equals the slow reference, however a sequence is cut up, placed and accompanied.

Shapes: B rows, S tokens of a row, V vocabulary.
"""

import math
import random
import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from gpt_fast.config import ModelConfig, RopeScaling
from gpt_fast.model.cache import KVCache
from gpt_fast.model.forward import Batch
from gpt_fast.model.rope import rope_table
from gpt_fast.ops.linear_compiled import for_one_token
from support.examples import examples
from support.reference import reference_logits

CPU = torch.device("cpu")
TOLERANCE = 1e-4
MAX_SEQ_LEN = 64


@st.composite
def architectures(draw):
    """Options of a tiny model: every switch of ModelConfig."""
    n_kv_head, group, layers = draw(st.integers(1, 3)), draw(st.integers(1, 3)), draw(st.integers(1, 3))
    head_dim = draw(st.sampled_from([4, 8]))
    options = dict(
        n_layer=layers,
        n_kv_head=n_kv_head,
        n_head=n_kv_head * group,
        head_dim=head_dim,
        dim=draw(st.sampled_from([16, 24])),
        intermediate_size=draw(st.sampled_from([16, 40])),
        rope_base=draw(st.sampled_from([100.0, 10000.0, 500000.0])),
        rope_dim=draw(st.sampled_from([0, 2, 4])),
        norm_eps=draw(st.sampled_from([1e-6, 1e-5])),
    )
    for switch in ("tie_embeddings", "qkv_bias", "attention_out_bias", "mlp_bias", "qk_norm"):
        options[switch] = draw(st.booleans())
    if draw(st.booleans()):
        options["sliding_window"] = draw(st.integers(1, 20))
        options["sliding_layers"] = tuple(draw(st.sets(st.integers(0, layers - 1))))
    if draw(st.booleans()):
        options["n_expert"] = draw(st.integers(1, 4))
        options["n_expert_per_token"] = draw(st.integers(1, options["n_expert"]))
    return options


def stale_cache(config, *, slots, max_seq_len=MAX_SEQ_LEN, fill=50.0):
    """A cache whose every position holds large leftovers: what earlier requests leave behind."""
    cache = KVCache(config, slots=slots, max_seq_len=max_seq_len, dtype=torch.float32, device=CPU)
    generator = torch.Generator().manual_seed(1)
    for buffer in (cache.k_LNHTD, cache.v_LNHTD):
        buffer.copy_(torch.randn(buffer.shape, generator=generator) * fill)
    return cache


def padded(rows, starts, size, scratch):
    """Tokens and positions [B, size] of rows that start at their own positions; padding sits at scratch."""
    tokens = torch.tensor([row + [0] * (size - len(row)) for row in rows])
    positions = torch.tensor(
        [[s + i if i < len(row) else scratch for i in range(size)] for row, s in zip(rows, starts, strict=True)]
    )
    return tokens, positions


def whole(model, tokens, **cache_options):
    """Logits [S, V] of one prompt in a single prefill in slot 0."""
    cache = stale_cache(model.config, slots=1, **cache_options)
    tokens_BS, positions_BS = padded([tokens], [0], len(tokens), cache.scratch)
    return model(Batch(tokens_BS, positions_BS, cache, length=cache.max_seq_len))[0]


def in_random_company(model, prompts, rng, *, slots=6):
    """Logits [S, V] of each prompt, computed in steps of random rows, row order, chunk sizes, paddings, buckets."""
    cache = stale_cache(model.config, slots=slots)
    slot_of = rng.sample(range(slots), len(prompts)) if rng.random() < 0.7 else list(range(len(prompts)))
    done, logits = [0] * len(prompts), [[] for _ in prompts]
    while pending := [i for i, p in enumerate(prompts) if done[i] < len(p)]:
        chosen = rng.sample(pending, rng.randint(1, len(pending)))
        if slot_of == list(range(len(prompts))) and rng.random() < 0.5:
            chosen = pending  # rows in slot order, so that the view without a copy is used while nobody has left
        most = 1 if rng.random() < 0.3 else rng.randint(1, 20)
        rows = [prompts[i][done[i] : done[i] + rng.randint(1, most)] for i in chosen]
        size = max(map(len, rows)) + rng.choice([0, 0, 3])
        pad = rng.choice([0, 0, 2])
        tokens_BS, positions_BS = padded(rows + [[]] * pad, [done[i] for i in chosen] + [0] * pad, size, cache.scratch)
        slots_B = [slot_of[i] for i in chosen]
        in_order = slots_B == list(range(len(chosen))) and len(chosen) + pad <= slots
        needed = max(done[i] + len(row) for i, row in zip(chosen, rows, strict=True))
        out = model(
            Batch(
                tokens_BS,
                positions_BS,
                cache,
                length=rng.choice([needed, (needed + MAX_SEQ_LEN) // 2, MAX_SEQ_LEN]),
                slots_B=None if in_order else torch.tensor(slots_B + [slots_B[0]] * pad),
            ),
        )
        for i, row, row_SV in zip(chosen, rows, out[: len(chosen)], strict=True):
            logits[i].append(row_SV[: len(row)])
            done[i] += len(row)
    return [torch.cat(parts) for parts in logits]


def prompts_of(rng, count, vocab, longest=MAX_SEQ_LEN):
    return [[rng.randrange(vocab) for _ in range(rng.randint(1, longest))] for _ in range(count)]


# ---------------------------------------------------------------------------------- one forward


@pytest.mark.slow
@given(options=architectures(), seed=st.integers(0, 1000))
@examples(30)
def test_any_architecture_equals_the_reference(tiny_model, options, seed):
    model = tiny_model(seed=seed, max_seq_len=MAX_SEQ_LEN, vocab_size=23, **options)
    tokens = [random.Random(seed).randrange(23) for _ in range(14)]
    expected = reference_logits(model.state_dict(), model.config, tokens)
    assert expected.std() > 0.1  # a difference would show
    torch.testing.assert_close(whole(model, tokens).double(), expected, atol=TOLERANCE, rtol=0)


@pytest.mark.slow
@given(options=architectures(), seed=st.integers(0, 1000))
@examples(60)
def test_any_schedule_of_steps_gives_the_same_logits(tiny_model, options, seed):
    rng = random.Random(seed)
    model = tiny_model(seed=seed, max_seq_len=MAX_SEQ_LEN, vocab_size=23, **options)
    prompts = prompts_of(rng, rng.randint(1, 5), 23)
    for tokens, actual in zip(prompts, in_random_company(model, prompts, rng), strict=True):
        torch.testing.assert_close(actual, whole(model, tokens), atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("chunk", [1, 7, 16, 64])
def test_step_by_step_and_chunked_prefill_at_every_length(tiny_model, chunk):
    model = tiny_model(max_seq_len=MAX_SEQ_LEN, sliding_window=9, sliding_layers=(1,))
    tokens = prompts_of(random.Random(0), 1, 97)[0] * 64
    tokens = tokens[:MAX_SEQ_LEN]
    cache, parts = stale_cache(model.config, slots=1), []
    for start in range(0, len(tokens), chunk):
        row = tokens[start : start + chunk]
        tokens_BS, positions_BS = padded([row], [start], len(row), cache.scratch)
        parts.append(model(Batch(tokens_BS, positions_BS, cache, length=start + len(row)))[0])
    torch.testing.assert_close(torch.cat(parts), whole(model, tokens), atol=TOLERANCE, rtol=0)


def test_select_returns_the_asked_tokens_logits(tiny_model):
    model = tiny_model(max_seq_len=MAX_SEQ_LEN)
    rows = [[5, 6, 7, 8], [9, 10], [11]]
    tokens_BS, positions_BS = padded(rows, [0, 0, 0], 4, MAX_SEQ_LEN)
    everything = model(Batch(tokens_BS, positions_BS, stale_cache(model.config, slots=3), length=16))
    select_B = torch.tensor([3, 1, 0])
    selected = model(Batch(tokens_BS, positions_BS, stale_cache(model.config, slots=3), length=16, select_B=select_B))
    assert selected.shape == (3, 97) and selected.dtype == torch.float32
    torch.testing.assert_close(selected, everything[torch.arange(3), select_B], atol=1e-5, rtol=0)


# ------------------------------------------------------------------------------ what may not matter


def test_stale_positions_and_other_slots_change_nothing(tiny_model):
    """What a cache held before, in this slot past the row's end or in other slots, never reaches the logits."""
    model = tiny_model(max_seq_len=MAX_SEQ_LEN)
    prompts = prompts_of(random.Random(3), 3, 97, longest=40)
    outs = []
    for fill in (0.0, 1.0, 1e4):
        cache = stale_cache(model.config, slots=6, fill=fill)
        tokens_BS, positions_BS = padded(prompts, [0] * 3, 40, cache.scratch)
        out = model(Batch(tokens_BS, positions_BS, cache, length=MAX_SEQ_LEN, slots_B=torch.tensor([4, 0, 2])))
        outs.append([row[: len(p)] for row, p in zip(out, prompts, strict=True)])
    for other in outs[1:]:
        for expected, actual in zip(outs[0], other, strict=True):
            torch.testing.assert_close(actual, expected, atol=0, rtol=0)


@pytest.mark.parametrize("where", ["scratch", "other slots", "past the bucket"])
def test_not_a_number_outside_what_is_read_does_not_leak(tiny_model, where):
    """NaN past a row's end but inside its bucket does spread (0 * NaN): a slot that may hold NaN must be cleared."""
    model = tiny_model(max_seq_len=MAX_SEQ_LEN)
    tokens = prompts_of(random.Random(4), 1, 97, longest=16)[0]
    cache = stale_cache(model.config, slots=3)
    poisoned = {
        "scratch": (slice(None), slice(None), slice(None), cache.scratch),
        "other slots": (slice(None), [0, 2]),
        "past the bucket": (slice(None), slice(None), slice(None), slice(16, None)),
    }[where]
    cache.k_LNHTD[poisoned] = float("nan")
    cache.v_LNHTD[poisoned] = float("nan")
    tokens_BS, positions_BS = padded([tokens, []], [0, 0], len(tokens), cache.scratch)
    out = model(Batch(tokens_BS, positions_BS, cache, length=16, slots_B=torch.tensor([1, 1])))
    torch.testing.assert_close(out[0], whole(model, tokens), atol=TOLERANCE, rtol=0)


def test_a_row_of_not_a_number_leaves_its_neighbours_alone(tiny_model):
    model = tiny_model(max_seq_len=MAX_SEQ_LEN, n_expert=3, n_expert_per_token=2)
    tokens = [5, 6, 7]
    alone = whole(model, tokens)
    model.tok_embeddings.weight[96] = float("nan")
    cache = stale_cache(model.config, slots=2)
    tokens_BS, positions_BS = padded([tokens, [96, 96, 96]], [0, 0], 3, cache.scratch)
    out = model(Batch(tokens_BS, positions_BS, cache, length=16))
    assert out[1].isnan().all()
    torch.testing.assert_close(out[0], alone, atol=TOLERANCE, rtol=0)


@given(seed=st.integers(0, 1000))
@examples(20)
def test_a_copied_prefix_is_as_good_as_a_computed_one(tiny_model, seed):
    rng = random.Random(seed)
    model = tiny_model(max_seq_len=MAX_SEQ_LEN)
    tokens = [rng.randrange(97) for _ in range(rng.randint(2, MAX_SEQ_LEN))]
    shared = rng.randint(1, len(tokens) - 1)
    cache = stale_cache(model.config, slots=3)
    first = padded([tokens[:shared]], [0], shared, cache.scratch)
    model(Batch(*first, cache, length=MAX_SEQ_LEN, slots_B=torch.tensor([2])))
    cache.copy_prefix(source=2, target=1, length=shared)
    rest = padded([tokens[shared:]], [shared], len(tokens) - shared, cache.scratch)
    out = model(Batch(*rest, cache, length=MAX_SEQ_LEN, slots_B=torch.tensor([1])))[0]
    torch.testing.assert_close(out, whole(model, tokens)[shared:], atol=TOLERANCE, rtol=0)


# ----------------------------------------------------------------------------------- compiled


@pytest.mark.slow
def test_compiled_equals_eager(tiny_model, fresh_compiler):
    model = tiny_model(max_seq_len=MAX_SEQ_LEN, n_layer=1, sliding_window=9, sliding_layers=(0,))
    compiled = torch.compile(model)
    rng = random.Random(5)
    with torch.inference_mode():
        for _ in range(3):
            prompts = [[rng.randrange(97) for _ in range(8)] for _ in range(2)]
            tokens_BS, positions_BS = padded(prompts, [0, 0], 8, MAX_SEQ_LEN)
            caches = [stale_cache(model.config, slots=2) for _ in range(2)]
            outs = [
                f(Batch(tokens_BS, positions_BS, c, length=16)) for f, c in zip((model, compiled), caches, strict=True)
            ]
            torch.testing.assert_close(outs[1], outs[0], atol=TOLERANCE, rtol=0)
            keys = [c.k_LNHTD[..., :16, :] for c in caches]
            torch.testing.assert_close(keys[1], keys[0], atol=1e-5, rtol=0)


@pytest.mark.slow
def test_compiled_decode_of_one_token_equals_eager(tiny_model, fresh_compiler):
    model, twin = (tiny_model(max_seq_len=MAX_SEQ_LEN, n_layer=1, qkv_bias=True) for _ in range(2))
    for_one_token(twin)
    compiled = torch.compile(twin, fullgraph=True)
    caches = [stale_cache(model.config, slots=1) for _ in range(2)]
    with torch.inference_mode():
        for position, token in enumerate((5, 96, 0, 41)):
            inputs = torch.tensor([[token]]), torch.tensor([[position]])
            outs = [f(Batch(*inputs, c, length=16)) for f, c in zip((model, compiled), caches, strict=True)]
            torch.testing.assert_close(outs[1], outs[0], atol=TOLERANCE, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.int8])
def test_compiled_decode_allocates_nothing_as_large_as_a_layers_cache(tiny_model, fresh_compiler, dtype):
    """Attention costs what is used: a write must not copy the slots."""
    from torch._inductor.utils import run_and_get_code  # loads the compiler: 1.5 s for every collection otherwise

    model = tiny_model(max_seq_len=5000)
    cache = KVCache(model.config, slots=2, max_seq_len=5000, dtype=dtype, device=torch.device("cpu"))
    batch = Batch(torch.tensor([[5]]), torch.tensor([[3]]), cache, length=16)
    with torch.inference_mode(), torch._inductor.config.patch(force_disable_caches=True):
        _, codes = run_and_get_code(torch.compile(model, fullgraph=True), batch)
    shapes = re.findall(r"empty_strided_cpu\(\(([^)]*)\)", "".join(codes))
    assert shapes
    assert max(math.prod(map(int, re.findall(r"\d+", shape))) for shape in shapes) < cache.k_LNHTD[0, 0].numel()


# ------------------------------------------------------------------------------------- rotary

LONG = tuple(1.0 + i / 2 for i in range(16))
SHORT = tuple(1.0 + i / 8 for i in range(16))
# fmt: off
SCALINGS = {
    "linear": dict(factor=4.0),
    "llama3": dict(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position=64),
    "llama3 wide": dict(
        kind="llama3", factor=32.0, low_freq_factor=1.5, high_freq_factor=9.0, original_max_position=512
    ),
    "yarn": dict(factor=4.0, original_max_position=128),
    "yarn sharp": dict(kind="yarn", factor=16.0, original_max_position=256, beta_fast=8.0, beta_slow=2.0),
    "yarn given": dict(kind="yarn", factor=4.0, original_max_position=128, attention_factor=1.7),
    "longrope": dict(factor=8.0, original_max_position=64, short_factor=SHORT, long_factor=LONG),
    "longrope given": dict(
        kind="longrope", factor=8.0, original_max_position=64, short_factor=SHORT, long_factor=LONG,
        attention_factor=1.3,
    ),
}
# fmt: on
THEIR_NAMES = {"original_max_position": "original_max_position_embeddings"}


@pytest.mark.parametrize("positions", [48, 480])
@pytest.mark.parametrize("name", SCALINGS)
def test_rope_scaling_equals_transformers(name, positions):
    options = {"kind": name, **SCALINGS[name]}
    theirs = {THEIR_NAMES.get(k, k): list(v) if isinstance(v, tuple) else v for k, v in options.items() if k != "kind"}
    theirs |= {"rope_type": options["kind"], "rope_theta": 10000.0}
    llama = LlamaConfig(hidden_size=64, num_attention_heads=2, max_position_embeddings=512, rope_parameters=theirs)
    frequency_E, scale = ROPE_INIT_FUNCTIONS[options["kind"]](llama, CPU, seq_len=positions)
    config = ModelConfig(
        vocab_size=8,
        n_layer=1,
        n_head=2,
        n_kv_head=2,
        dim=64,
        head_dim=32,
        intermediate_size=8,
        max_position=512,
        rope_base=10000.0,
        rope_scaling=RopeScaling(**{**options, "attention_factor": scale}),
    )
    angle_PE = torch.arange(positions + 1).double()[:, None] * frequency_E.double()
    expected = torch.stack((angle_PE.cos(), angle_PE.sin()), dim=1) * scale
    torch.testing.assert_close(rope_table(config, positions + 1).double(), expected, atol=2e-4, rtol=0)


def test_rope_scaling_reaches_the_logits(tiny_model):
    scaling = RopeScaling(kind="yarn", factor=4.0, original_max_position=16, attention_factor=1.4)
    model = tiny_model(max_seq_len=MAX_SEQ_LEN, rope_scaling=scaling, rope_dim=4)
    tokens = prompts_of(random.Random(6), 1, 97, longest=20)[0]
    pairs_PE = rope_table(model.config, 2)[1]  # at position 1 the angle is the frequency itself
    frequencies = torch.atan2(pairs_PE[1].double(), pairs_PE[0].double()).tolist()
    expected = reference_logits(model.state_dict(), model.config, tokens, frequencies=frequencies, rope_scale=1.4)
    torch.testing.assert_close(whole(model, tokens).double(), expected, atol=TOLERANCE, rtol=0)
