"""Triton kernels of sampler.py.

Shapes: V vocabulary, C logits of a program's chunk, P peaks (each the largest logit of an eighth of a chunk), S logits
looked at together by the program that decides.

A token's weight is exp((logit - best) / temperature) in 40-bit fixed point: sums of integers are exact, so neither
the order in which programs finish nor a row's neighbours change a token. A draw 2^-20 or more inside a token's part of
the float64 distribution gets that token (tests/ops_gpu/test_gpu_bounds.py). "Cost" is the bit pattern of (best - logit)
/ temperature, an integer that sorts as the number does: the best token costs 0.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def peaks_kernel(logits, peak, best, best_at, vocab, chunks, CHUNK: tl.constexpr):
    """The largest logits of a chunk and of its eighths; NaN counts as infinite, which `choose` refuses."""
    row, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    at_C = chunk * CHUNK + tl.arange(0, CHUNK)
    logit_C = tl.load(logits + row * vocab + at_C, at_C < vocab, float("-inf"))
    logit_C = tl.where(logit_C != logit_C, float("inf"), logit_C)
    best_8 = tl.max(tl.reshape(logit_C, (8, CHUNK // 8)), 1)
    tl.store(peak + (row * chunks + chunk) * 8 + tl.arange(0, 8), best_8)
    largest = tl.max(logit_C, 0)
    tl.store(best + row * chunks + chunk, largest)
    tl.store(best_at + row * chunks + chunk, tl.min(tl.where(logit_C == largest, at_C, vocab), 0))


@triton.jit
def sample_kernel(
    logits, temperatures, top_ks, top_ps, uniforms, peak, best, best_at, mass, candidate, candidate_id, found, arrived,
    out, vocab, chunks,
    CHUNK: tl.constexpr, CHUNKS: tl.constexpr, CAPACITY: tl.constexpr, FAST_K: tl.constexpr,
):  # fmt: skip
    """Each program weighs its chunk and hands on what may be kept; the last one of a row chooses its token."""
    row, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    logits, mass, candidate, candidate_id = (
        logits + row * vocab,
        mass + row * chunks,
        candidate + row * CAPACITY,
        candidate_id + row * CAPACITY,
    )
    temperature = tl.load(temperatures + row)
    greedy = temperature == 0
    sharpness = 1 / tl.maximum(tl.where(greedy, 1.0, temperature), 1e-30)  # finite, so that the best token costs 0
    top_k, top_p = tl.load(top_ks + row).to(tl.int32), tl.load(top_ps + row)
    each_c = tl.arange(0, CHUNKS)
    best_c = tl.load(best + row * chunks + each_c, each_c < chunks, float("-inf"))
    largest = tl.max(best_c, 0)
    fine = (largest > float("-inf")) & (largest < float("inf"))
    cuts = (top_k > 0) | (top_p < 1)
    if fine & (not greedy):
        at_C = chunk * CHUNK + tl.arange(0, CHUNK)
        logit_C = tl.load(logits + at_C, at_C < vocab, float("-inf"))
        cost_C = cost(logit_C, largest, sharpness)
        tl.store(mass + chunk, tl.sum(weight(cost_C), 0))
        if cuts:
            wanted = tl.where((top_k > 0) & (top_k < FAST_K), top_k, FAST_K)
            bound = cost_of_peak(peak + row * chunks * 8, chunks, wanted, largest, sharpness, CHUNKS)
            chosen_C = (cost_C <= bound) & (at_C < vocab)
            place_C = tl.cumsum(chosen_C.to(tl.int32), 0) - 1
            place_C += tl.atomic_add(found + row, tl.sum(chosen_C.to(tl.int32), 0))
            tl.store(candidate + place_C, logit_C, chosen_C & (place_C < CAPACITY))
            tl.store(candidate_id + place_C, at_C, chosen_C & (place_C < CAPACITY))
    tl.debug_barrier()  # every thread's part is written before one thread says so
    if tl.atomic_add(arrived + row, 1, sem="acq_rel") == chunks - 1:
        token = tl.full((), -1, tl.int32)
        if fine & greedy:
            at_c = tl.load(best_at + row * chunks + each_c, each_c < chunks, 0)
            token = tl.min(tl.where(best_c == largest, at_c, vocab), 0)
        elif fine & cuts:
            token = choose(
                logits, candidate, candidate_id, tl.atomic_add(found + row, 0), mass, chunks, vocab, largest,
                sharpness, top_k, top_p, tl.load(uniforms + row), CHUNKS, CAPACITY,
            )  # fmt: skip
        elif fine:
            token = choose_of_all(
                logits, mass, chunks, vocab, largest, sharpness, tl.load(uniforms + row), CHUNK, CHUNKS
            )
        tl.store(out + row, token.to(out.dtype.element_ty))
        tl.store(found + row, 0)  # ready for the next launch
        tl.store(arrived + row, 0)


@triton.jit
def cost(logit, largest, sharpness):
    return ((largest - logit) * sharpness).to(tl.int32, bitcast=True)


@triton.jit
def weight(cost):
    return (tl.exp(-cost.to(tl.float32, bitcast=True)) * 1099511627776.0).to(tl.int64)


@triton.jit
def cost_of_peak(peak, chunks, wanted, largest, sharpness, CHUNKS: tl.constexpr):
    """A cost which at least `wanted` peaks do not exceed, so that many tokens do not either; 16 steps come close.

    Where there are fewer peaks it is 110's, past which weights are 0.
    """
    at_P = tl.arange(0, CHUNKS * 8)
    cost_P = cost(tl.load(peak + at_P, at_P < chunks * 8, float("-inf")), largest, sharpness)
    below = tl.full((), -1, tl.int32)
    bound = tl.full((), 0x42DC0000, tl.int32)
    for _ in range(16):
        middle = below + (bound - below) // 2
        enough = tl.sum((cost_P <= middle).to(tl.int32), 0) >= wanted
        bound = tl.where(enough, middle, bound)
        below = tl.where(enough, below, middle)
    return bound


@triton.jit
def choose_of_all(logits, mass, chunks, vocab, largest, sharpness, uniform, CHUNK: tl.constexpr, CHUNKS: tl.constexpr):
    """The token at which the row's cumulative weight passes uniform * total: first its chunk, then its place there."""
    each_c = tl.arange(0, CHUNKS)
    mass_c = tl.load(mass + each_c, each_c < chunks, 0, cache_modifier=".cg")
    up_to_c = tl.cumsum(mass_c, 0)
    target = uniform * tl.sum(mass_c, 0).to(tl.float64)
    chunk = tl.sum((up_to_c.to(tl.float64) <= target).to(tl.int32), 0)
    before = tl.sum(tl.where(each_c < chunk, mass_c, 0), 0)
    at_C = chunk * CHUNK + tl.arange(0, CHUNK)
    weight_C = weight(cost(tl.load(logits + at_C, at_C < vocab, float("-inf")), largest, sharpness))
    passed_C = (tl.cumsum(weight_C, 0) + before).to(tl.float64) <= target
    return tl.minimum(chunk * CHUNK + tl.sum(passed_C.to(tl.int32), 0), vocab - 1)


@triton.jit
def choose(
    logits, candidate, candidate_id, found, mass, chunks, vocab, largest, sharpness, top_k, top_p, uniform,
    CHUNKS: tl.constexpr, CAPACITY: tl.constexpr,
):  # fmt: skip
    """A token of those that top_k, then top_p keep, from the candidates if they hold all that is kept.

    Else from the whole row, which one program reads some eighty times: slow, and rare in trained models.
    """
    each_c = tl.arange(0, CHUNKS)
    total = tl.sum(tl.load(mass + each_c, each_c < chunks, 0, cache_modifier=".cg"), 0)
    held = tl.minimum(found, CAPACITY)
    _, held_mass = measure(candidate, candidate_id, held, largest, sharpness, 0x42DC0000, vocab, vocab, False)
    enough = held_mass.to(tl.float64) >= top_p.to(tl.float64) * total.to(tl.float64)
    enough = (enough & (top_p < 1)) | ((top_k > 0) & (held >= top_k))
    if enough & (found <= CAPACITY):
        token = choose_from(
            candidate, candidate_id, held, vocab, largest, sharpness, top_k, top_p, uniform, total, False
        )
    else:
        token = choose_from(logits, candidate_id, vocab, vocab, largest, sharpness, top_k, top_p, uniform, total, True)
    return token


@triton.jit
def choose_from(
    values, ids, size, vocab, largest, sharpness, top_k, top_p, uniform, total,
    WHOLE: tl.constexpr,
):  # fmt: skip
    k = tl.where(top_k > 0, top_k, vocab)
    if (top_k > 0) & (top_p < 1):  # top_p's share is of what top_k keeps
        _, _, total = keep(values, ids, size, vocab, largest, sharpness, k, float("inf"), WHOLE)
    share = top_p.to(tl.float64) * total.to(tl.float64)
    need = tl.where(top_p < 1, share, float("inf"))
    bound, tie, kept = keep(values, ids, size, vocab, largest, sharpness, k, need, WHOLE)
    target = uniform * kept.to(tl.float64)
    before = tl.full((), -1, tl.int32)
    token = vocab - 1
    while token - before > 1:  # the lowest id at which the cumulative weight passes the target
        middle = (before + token) // 2
        _, passed = measure(values, ids, size, largest, sharpness, bound, tie, middle, WHOLE)
        reached = passed.to(tl.float64) > target
        token = tl.where(reached, middle, token)
        before = tl.where(reached, before, middle)
    return token


@triton.jit
def keep(values, ids, size, vocab, largest, sharpness, k, need, WHOLE: tl.constexpr):
    """The cheapest tokens until there are k or their mass is `need`: the cost they end at, the last id kept of those
    at that cost, and the mass."""
    below = tl.full((), -1, tl.int32)
    bound = tl.full((), 0x42DC0000, tl.int32)
    while bound - below > 1:
        middle = below + (bound - below) // 2
        count, mass = measure(values, ids, size, largest, sharpness, middle, vocab, vocab, WHOLE)
        enough = (count >= k) | (mass.to(tl.float64) >= need)
        bound = tl.where(enough, middle, bound)
        below = tl.where(enough, below, middle)
    fewer, less = measure(values, ids, size, largest, sharpness, bound - 1, vocab, vocab, WHOLE)
    each = tl.maximum(weight(bound), 1).to(tl.float64)
    room = tl.minimum((k - fewer).to(tl.float64), (need - less.to(tl.float64)) / each)
    count, kept = measure(values, ids, size, largest, sharpness, bound, vocab, vocab, WHOLE)
    tie = vocab - 1
    if (count - fewer).to(tl.float64) > room:  # too many: the lowest id by which the ties fill what room there is
        before = tl.full((), -1, tl.int32)
        while tie - before > 1:
            middle = (before + tie) // 2
            count, _ = measure(values, ids, size, largest, sharpness, bound, middle, vocab, WHOLE)
            filled = (count - fewer).to(tl.float64) >= room
            tie = tl.where(filled, middle, tie)
            before = tl.where(filled, before, middle)
        _, kept = measure(values, ids, size, largest, sharpness, bound, tie, vocab, WHOLE)
    return bound, tie, kept


@triton.jit
def measure(values, ids, size, largest, sharpness, bound, tie, limit, WHOLE: tl.constexpr):
    """How many tokens up to id `limit` cost less than bound, or just that with an id up to `tie`; and their mass."""
    STEP: tl.constexpr = 2048 if WHOLE else 512
    count = tl.full((), 0, tl.int32)
    mass = tl.full((), 0, tl.int64)
    for start in range(0, size, STEP):
        at_S = start + tl.arange(0, STEP)
        cost_S = cost(tl.load(values + at_S, at_S < size, float("-inf")), largest, sharpness)
        id_S = at_S
        if not WHOLE:
            id_S = tl.load(ids + at_S, at_S < size, 0)
        chosen_S = (cost_S < bound) | ((cost_S == bound) & (id_S <= tie))
        chosen_S = chosen_S & (id_S <= limit) & (at_S < size)
        count += tl.sum(chosen_S.to(tl.int32), 0)
        mass += tl.sum(tl.where(chosen_S, weight(cost_S), 0), 0)
    return count, mass
