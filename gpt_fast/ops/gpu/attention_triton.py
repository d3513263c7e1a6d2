"""Triton kernel of attention.py.

Shapes: Q queries of one program (the tokens of a slot times the query heads of a KV head, padded), T positions of a
step of the loop, D head_dim.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def decode_attention_kernel(
    q, k_cache, v_cache, k_scale, v_scale, slots, lengths, partial, best, total, arrived, out, scale, splits, rows,
    q_heads, kv_heads, slot_stride, head_stride,
    ROWS: tl.constexpr, GROUP: tl.constexpr, QUERIES: tl.constexpr, HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr,
    POSITIONS: tl.constexpr, SCALED: tl.constexpr, NATIVE: tl.constexpr,
):  # fmt: skip
    """Program (i, s): share s of the positions that the i-th (slot, KV head) reads. The last to finish combines all.

    How far from float64, as a part of the weighted sum of |v| (u = 2^-24; tests/ops_gpu/test_gpu_bounds.py): 2 (D + 8)
    u of the largest scaled sum of |q k| from float32 scores; (32 + T/64) u from float32 sums over T positions; 2^-8
    where q is bfloat16, because tensor cores want the weights in it. The same over int8: codes are exact in bfloat16.
    """
    first_row = tl.program_id(0) // kv_heads * ROWS
    kv_head, split = tl.program_id(0) % kv_heads, tl.program_id(1)
    query_Q = tl.arange(0, QUERIES)
    row_Q = first_row + query_Q // GROUP
    real_Q = query_Q < ROWS * GROUP
    at_Q = row_Q * q_heads + kv_head * GROUP + query_Q % GROUP
    element_D = tl.arange(0, WIDTH)
    at_QD = at_Q[:, None] * HEAD_DIM + element_D[None, :]
    real_QD = real_Q[:, None] & (element_D < HEAD_DIM)[None, :]
    length_Q = tl.load(lengths + row_Q, real_Q, 0).to(tl.int32)
    longest = tl.max(length_Q, 0)
    share = tl.cdiv(tl.cdiv(longest, splits), POSITIONS) * POSITIONS
    cache = tl.load(slots + first_row).to(tl.int64) * slot_stride + kv_head * head_stride
    q_QD = tl.load(q + at_QD, real_QD, 0.0)
    best_Q, total_Q, sum_QD = attend(
        q_QD, k_cache + cache, v_cache + cache, k_scale + cache // HEAD_DIM, v_scale + cache // HEAD_DIM, length_Q,
        split * share, tl.minimum(longest, split * share + share), scale,
        QUERIES, HEAD_DIM, WIDTH, POSITIONS, SCALED, NATIVE,
    )  # fmt: skip
    if splits > 1:
        place = split * rows * q_heads
        tl.store(best + place + at_Q, best_Q, real_Q)
        tl.store(total + place + at_Q, total_Q, real_Q)
        tl.store(partial + place.to(tl.int64) * HEAD_DIM + at_QD, sum_QD, real_QD)
        tl.debug_barrier()  # every thread's part is written before one thread says so
        if tl.atomic_add(arrived + tl.program_id(0), 1, sem="acq_rel") == splits - 1:
            total_Q, sum_QD = combine(
                partial, best, total, at_Q, at_QD, real_Q, real_QD, splits, rows * q_heads, QUERIES, HEAD_DIM, WIDTH
            )
            tl.store(out + at_QD, (sum_QD / tl.where(real_Q, total_Q, 1.0)[:, None]).to(out.dtype.element_ty), real_QD)
            tl.store(arrived + tl.program_id(0), 0)  # ready for the next launch
    else:
        tl.store(out + at_QD, (sum_QD / tl.where(real_Q, total_Q, 1.0)[:, None]).to(out.dtype.element_ty), real_QD)


@triton.jit
def attend(
    q_QD, k_cache, v_cache, k_scale, v_scale, length_Q, begin, end, scale,
    QUERIES: tl.constexpr, HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr, POSITIONS: tl.constexpr, SCALED: tl.constexpr,
    NATIVE: tl.constexpr,
):  # fmt: skip
    """Positions begin..end-1: each query's largest score (base 2), its sum of weights, its weighted sum of values.

    SCALED: integers, exact in q's dtype; a position's two scales multiply its scores and its weights instead.
    """
    best_Q = tl.full((QUERIES,), float("-inf"), tl.float32)
    total_Q = tl.zeros((QUERIES,), tl.float32)
    sum_QD = tl.zeros((QUERIES, WIDTH), tl.float32)
    element_D = tl.arange(0, WIDTH)
    for start in range(begin, end, POSITIONS):
        position_T = start + tl.arange(0, POSITIONS)
        inside_TD = (position_T < end)[:, None] & (element_D < HEAD_DIM)[None, :]
        at_TD = position_T[:, None] * HEAD_DIM + element_D[None, :]
        k_TD = tl.load(k_cache + at_TD, inside_TD, 0)
        v_TD = tl.load(v_cache + at_TD, inside_TD, 0)
        score_QT = product(q_QD, tl.trans(k_TD), NATIVE) * (scale * 1.4426950408889634)
        if SCALED:
            score_QT *= tl.load(k_scale + position_T, position_T < end, 0.0)[None, :]
        score_QT = tl.where(position_T[None, :] < length_Q[:, None], score_QT, float("-inf"))
        now_Q = tl.maximum(best_Q, tl.max(score_QT, 1))
        finite_Q = tl.where(now_Q == float("-inf"), 0.0, now_Q)  # a query that reads nothing here
        weight_QT = tl.exp2(score_QT - finite_Q[:, None])
        keep_Q = tl.exp2(best_Q - finite_Q)
        total_Q = total_Q * keep_Q + tl.sum(weight_QT, 1)
        if SCALED:
            weight_QT *= tl.load(v_scale + position_T, position_T < end, 0.0)[None, :]
        sum_QD = sum_QD * keep_Q[:, None] + product(weight_QT.to(q_QD.dtype), v_TD, NATIVE)
        best_Q = now_Q
    return best_Q, total_Q, sum_QD


@triton.jit
def combine(
    partial, best, total, at_Q, at_QD, real_Q, real_QD, splits, stride,
    QUERIES: tl.constexpr, HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """The shares of every split, rescaled to the best score among them. Past the L1, which knows no other program."""
    best_Q = tl.full((QUERIES,), float("-inf"), tl.float32)
    total_Q = tl.zeros((QUERIES,), tl.float32)
    sum_QD = tl.zeros((QUERIES, WIDTH), tl.float32)
    for split in range(splits):
        place = split * stride
        part_Q = tl.load(best + place + at_Q, real_Q, 0.0, cache_modifier=".cg")
        now_Q = tl.maximum(best_Q, part_Q)
        finite_Q = tl.where(now_Q == float("-inf"), 0.0, now_Q)
        old_Q, new_Q = tl.exp2(best_Q - finite_Q), tl.exp2(part_Q - finite_Q)
        total_Q = total_Q * old_Q + tl.load(total + place + at_Q, real_Q, 0.0, cache_modifier=".cg") * new_Q
        part_QD = tl.load(partial + place.to(tl.int64) * HEAD_DIM + at_QD, real_QD, 0.0, cache_modifier=".cg")
        sum_QD = sum_QD * old_Q[:, None] + part_QD * new_Q[:, None]
        best_Q = now_Q
    return total_Q, sum_QD


@triton.jit
def product(a, b, NATIVE: tl.constexpr):
    """a @ b. Triton's interpreter knows no bfloat16."""
    if NATIVE:
        return tl.dot(a, b.to(a.dtype), input_precision="ieee")
    return tl.dot(a.to(tl.float32), b.to(tl.float32))
