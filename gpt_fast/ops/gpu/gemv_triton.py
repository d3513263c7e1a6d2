"""Triton kernels of gemv.py. One program holds ROWS rows of the weight and streams over K.

Shapes: M tokens (1, or TOKENS = 16 of which `tokens` are real), N the program's rows, K inputs of a step of the loop,
W 32-bit words, C chunks of four words (one 16-byte load of one thread), S shares of K, one a warp.

How far from float64 (u = 2^-24; "of |x w|": of the sum of |x w|, the norm's weight included;
tests/ops_gpu/test_gpu_bounds.py):
- Every product: (32 + K/64) u of |x w|, from float32 sums. int4 sums q * scale, or (128 + q) * scale, and zero apart,
  so that each counts with its own size.
- int8 and int4 for one token: 0.52/32512 of a chunk's largest |x|, times its |w| (of int4: q * scale), because x is
  rounded to that step.
- Several tokens after a norm: 2^-8 (bfloat16) of |x w|, because tensor cores want x in its own dtype again.
- int4 for nine tokens or more: 2^-7 of |x| (|q - 8| scale + |center| + |w|), because weights are rounded to bfloat16.
- A norm multiplies all that by its rsqrt, and adds 2^-18 of the result. silu(gate) * up: 1.1 |up| times gate's error,
  |silu(gate)| times up's. RoPE: the errors of a pair added up. A written int8: half a step more; outputs round once.

RMSNorm's weight is applied to x as it streams by, its rsqrt after the product, from the sum of squares gathered on the
way: no pass over x comes first. Weights are read once, so they leave the cache first.
"""

from __future__ import annotations

import triton
import triton.language as tl

# ------------------------------------------------------------------------------------ the products


@triton.jit
def dots(
    x, norm, weight, scale, zero, rows_N, tokens, k, eps,
    KIND: tl.constexpr, NORM: tl.constexpr, GROUP: tl.constexpr, TOKENS: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr, SHARES: tl.constexpr, EVEN: tl.constexpr, NATIVE: tl.constexpr,
):  # fmt: skip
    """norm(x) times rows_N of the weight: float32 [TOKENS, ROWS]. COLUMNS elements of `weight` a row and step."""
    if TOKENS == 16 and KIND == "int4":
        out_MN = dots_dequantized(
            x, norm, weight, scale, zero, rows_N, tokens, k, eps,
            NORM, GROUP, TOKENS, ROWS, COLUMNS, SHARES, EVEN, NATIVE,
        )  # fmt: skip
    elif TOKENS > 1 and GROUP > 0:
        out_MN = dots_groups(
            x, norm, weight, scale, zero, rows_N, tokens, k, eps,
            KIND, NORM, GROUP, TOKENS, ROWS, COLUMNS, SHARES, EVEN, NATIVE,
        )  # fmt: skip
    elif TOKENS > 1:
        out_MN = dots_tensor_cores(
            x, norm, weight, rows_N, tokens, k, eps, NORM, TOKENS, ROWS, COLUMNS, SHARES, EVEN, NATIVE
        )
    elif KIND == "int8" or KIND == "int8g" or KIND == "int4":
        out_MN = dots_planes(
            x, norm, weight, scale, zero, rows_N, k, eps, KIND, NORM, GROUP, ROWS, COLUMNS, EVEN, NATIVE
        )[None, :]
    else:
        out_MN = dots_float(x, norm, weight, rows_N, k, eps, NORM, ROWS, COLUMNS, EVEN)[None, :]
    if KIND == "int8" or KIND == "fp8":
        out_MN *= tl.load(scale + rows_N)[None, :]
    return out_MN


@triton.jit
def dots_float(
    x, norm, weight, rows_N, k, eps, NORM: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, EVEN: tl.constexpr
):
    """One token, float32 products. A thread adds up each 16-byte load first, which keeps one sum for it."""
    LOAD: tl.constexpr = 128 // weight.dtype.element_ty.primitive_bitwidth
    row_N = weight + rows_N.to(tl.int64) * k
    sum_NC = tl.zeros((ROWS, COLUMNS // LOAD), tl.float32)
    squares_K = tl.zeros((COLUMNS,), tl.float32)
    for start in range(0, k, COLUMNS):
        at_K = start + tl.arange(0, COLUMNS)
        inside_K = (at_K < k) | EVEN
        w_NK = tl.load(row_N[:, None] + at_K[None, :], inside_K[None, :], 0.0, eviction_policy="evict_first")
        x_K = tl.load(x + at_K, inside_K, 0.0).to(tl.float32)
        if NORM:
            squares_K += x_K * x_K
            x_K *= tl.load(norm + at_K, inside_K, 0.0).to(tl.float32)
        product_NK = w_NK.to(tl.float32) * x_K[None, :]
        sum_NC += tl.sum(tl.reshape(product_NK, (ROWS, COLUMNS // LOAD, LOAD)), 2)
    out_N = tl.sum(sum_NC, 1)
    if NORM:
        out_N *= tl.rsqrt(tl.sum(squares_K, 0) / k + eps)
    return out_N


@triton.jit
def dots_planes(
    x, norm, weight, scale, zero, rows_N, k, eps, KIND: tl.constexpr, NORM: tl.constexpr, GROUP: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, EVEN: tl.constexpr, NATIVE: tl.constexpr,
):  # fmt: skip
    """One token against integers: x as 16-bit fixed point in two int8 planes, a scale a chunk; integer dot products.

    `weight` is seen as int32 words of 4 (int8) or 8 (int4) inputs, COLUMNS of them a step.
    """
    PER_WORD: tl.constexpr = 8 if KIND == "int4" else 4
    CHUNKS: tl.constexpr = COLUMNS // 4
    words = k // (4 * PER_WORD) * 4  # so written, the compiler sees that rows start at 16 bytes
    row_N = weight + rows_N.to(tl.int64) * words
    sum_NC = tl.zeros((ROWS, CHUNKS), tl.float32)
    squares_W = tl.zeros((COLUMNS,), tl.float32)
    for start in range(0, words, COLUMNS):
        at_W = start + tl.arange(0, COLUMNS)
        inside_W = (at_W < words) | EVEN
        w_NW = tl.load(row_N[:, None] + at_W[None, :], inside_W[None, :], 0, eviction_policy="evict_first")
        if KIND != "int4":
            a0, a1, a2, a3, squares_a = load_four(x, norm, at_W * 4, inside_W, NORM)
            inverse_W, scale_C = plane_scale(largest(a0, a1, a2, a3), CHUNKS)
            high_W, low_W = planes(a0, a1, a2, a3, inverse_W)
            dot_NW = dp4a(w_NW, low_W[None, :], dp4a(w_NW, high_W[None, :], 0, NATIVE) << 8, NATIVE)
            squares_W += squares_a
        else:
            first_W = at_W // 4 * 32 + at_W % 4 * 4
            a0, a1, a2, a3, squares_a = load_four(x, norm, first_W, inside_W, NORM)
            b0, b1, b2, b3, squares_b = load_four(x, norm, first_W + 16, inside_W, NORM)
            both_W = tl.maximum(largest(a0, a1, a2, a3), largest(b0, b1, b2, b3))
            inverse_W, scale_C = plane_scale(both_W, CHUNKS)
            high_a, low_a = planes(a0, a1, a2, a3, inverse_W)
            high_b, low_b = planes(b0, b1, b2, b3, inverse_W)
            even_NW, odd_NW = w_NW & 0x0F0F0F0F, (w_NW >> 4) & 0x0F0F0F0F
            dot_NW = dp4a(even_NW, high_a[None, :], dp4a(odd_NW, high_b[None, :], 0, NATIVE), NATIVE) << 8
            dot_NW = dp4a(even_NW, low_a[None, :], dp4a(odd_NW, low_b[None, :], dot_NW, NATIVE), NATIVE)
            squares_W += squares_a + squares_b
        part_NC = tl.sum(tl.reshape(dot_NW, (ROWS, CHUNKS, 4)), 2).to(tl.float32) * scale_C[None, :]
        if GROUP > 0:
            chunk_C = start // 4 + tl.arange(0, CHUNKS)
            group_NC = rows_N[:, None] * (k // GROUP) + (chunk_C // (GROUP // (4 * PER_WORD)))[None, :]
            inside_C = ((chunk_C * 4 < words) | EVEN)[None, :]
            part_NC *= tl.load(scale + group_NC, inside_C, 0.0).to(tl.float32)
        if KIND == "int4":
            total_W = (a0 + a1) + (a2 + a3) + ((b0 + b1) + (b2 + b3))
            total_C = tl.sum(tl.reshape(total_W, (CHUNKS, 4)), 1)
            part_NC += tl.load(zero + group_NC, inside_C, 0.0).to(tl.float32) * total_C[None, :]
        sum_NC += part_NC
    out_N = tl.sum(sum_NC, 1)
    if NORM:
        out_N *= tl.rsqrt(tl.sum(squares_W, 0) / k + eps)
    return out_N


@triton.jit
def load_four(x, norm, first_W, inside_W, NORM: tl.constexpr):
    """Four neighbouring inputs from each first_W, times the norm's weight, and their sum of squares before it."""
    x0 = tl.load(x + first_W, inside_W, 0.0).to(tl.float32)
    x1 = tl.load(x + first_W + 1, inside_W, 0.0).to(tl.float32)
    x2 = tl.load(x + first_W + 2, inside_W, 0.0).to(tl.float32)
    x3 = tl.load(x + first_W + 3, inside_W, 0.0).to(tl.float32)
    squares = (x0 * x0 + x1 * x1) + (x2 * x2 + x3 * x3)
    if NORM:
        x0 *= tl.load(norm + first_W, inside_W, 0.0).to(tl.float32)
        x1 *= tl.load(norm + first_W + 1, inside_W, 0.0).to(tl.float32)
        x2 *= tl.load(norm + first_W + 2, inside_W, 0.0).to(tl.float32)
        x3 *= tl.load(norm + first_W + 3, inside_W, 0.0).to(tl.float32)
    return x0, x1, x2, x3, squares


@triton.jit
def largest(a, b, c, d):
    return tl.maximum(tl.maximum(tl.abs(a), tl.abs(b)), tl.maximum(tl.abs(c), tl.abs(d)))


@triton.jit
def plane_scale(largest_W, CHUNKS: tl.constexpr):
    """What to multiply x by before rounding, by word, and what one step of the result is worth, by chunk.

    The largest of a chunk becomes 127 * 256, the most that two int8 planes hold.
    """
    step_C = tl.maximum(tl.max(tl.reshape(largest_W, (CHUNKS, 4)), 1), 1e-30) * (1 / 32512)
    inverse_C4 = tl.broadcast_to(tl.expand_dims(1 / step_C, 1), (CHUNKS, 4))
    return tl.reshape(inverse_C4, (CHUNKS * 4,)), step_C


@triton.jit
def planes(a, b, c, d, inverse):
    """round(value * inverse) of four inputs as high * 256 + low, both int8, packed four a word."""
    a, b, c, d = low_bits(a * inverse), low_bits(b * inverse), low_bits(c * inverse), low_bits(d * inverse)
    low = (a & 0xFF) | ((b & 0xFF) << 8) | ((c & 0xFF) << 16) | (d << 24)
    a, b, c, d = (a + 128) >> 8, (b + 128) >> 8, (c + 128) >> 8, (d + 128) >> 8
    return (a & 0xFF) | ((b & 0xFF) << 8) | ((c & 0xFF) << 16) | (d << 24), low


@triton.jit
def low_bits(value):
    """A 32-bit word whose low 16 bits are the rounded value's: adding 1.5 * 2^23 puts it there, with no conversion."""
    return (value + 12582912.0).to(tl.int32, bitcast=True)


@triton.jit
def dp4a(a, b, c, NATIVE: tl.constexpr):
    """c + the dot product of the four int8 of a and of b: one instruction on NVIDIA, shifts elsewhere."""
    if NATIVE:
        return tl.inline_asm_elementwise(
            "dp4a.s32.s32 $0, $1, $2, $3;", "=r,r,r,r", [a, b, c], dtype=tl.int32, is_pure=True, pack=1
        )
    for byte in tl.static_range(4):
        c += ((a << (24 - 8 * byte)) >> 24) * ((b << (24 - 8 * byte)) >> 24)
    return c


@triton.jit
def dots_tensor_cores(
    x, norm, weight, rows_N, tokens, k, eps, NORM: tl.constexpr, TOKENS: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr, SHARES: tl.constexpr, EVEN: tl.constexpr, NATIVE: tl.constexpr,
):  # fmt: skip
    """Two to sixteen tokens: weights become x's dtype, tensor cores multiply, each share of K sums for itself."""
    PART: tl.constexpr = COLUMNS // SHARES
    row_N = weight + rows_N.to(tl.int64) * k
    sum_SNM = tl.zeros((SHARES, ROWS, TOKENS), tl.float32)
    squares_M = tl.zeros((TOKENS,), tl.float32)
    for start in range(0, k, COLUMNS):
        at_SK = start + tl.arange(0, SHARES)[:, None] * PART + tl.arange(0, PART)[None, :]
        inside_SK = (at_SK < k) | EVEN
        inside_S1K = inside_SK[:, None, :]
        w_SNK = tl.load(row_N[None, :, None] + at_SK[:, None, :], inside_S1K, 0.0, eviction_policy="evict_first")
        x_SKM, part_M = load_tokens(x, norm, at_SK, inside_SK, tokens, k, NORM, TOKENS)
        sum_SNM = dot(w_SNK, x_SKM, sum_SNM, NATIVE)
        squares_M += part_M
    return shares_added(sum_SNM, squares_M, k, eps, NORM)


@triton.jit
def dots_groups(
    x, norm, weight, scale, zero, rows_N, tokens, k, eps,
    KIND: tl.constexpr, NORM: tl.constexpr, GROUP: tl.constexpr, TOKENS: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr, SHARES: tl.constexpr, EVEN: tl.constexpr, NATIVE: tl.constexpr,
):  # fmt: skip
    """As dots_tensor_cores, against codes in groups: a share is of one group, whose scale multiplies what it sums.

    So tensor cores see the codes, exact in x's dtype, and scales stay float32. For int4 a step holds COLUMNS bytes: the
    inputs of their low halves, then those of their high halves; zero multiplies the sum of a group's inputs, which a
    product with ones is.
    """
    PART: tl.constexpr = COLUMNS // SHARES
    PER_BYTE: tl.constexpr = 2 if KIND == "int4" else 1
    OFFSET: tl.constexpr = 128 if NATIVE and x.dtype.element_ty == tl.bfloat16 else 0  # see codes
    columns = k // PER_BYTE
    row_N = weight + rows_N.to(tl.int64) * columns
    sum_SNM = tl.zeros((SHARES, ROWS, TOKENS), tl.float32)
    squares_M = tl.zeros((TOKENS,), tl.float32)
    ones_SNK = tl.full((SHARES, ROWS, PART), 1.0, tl.float32)
    for start in range(0, columns, COLUMNS):
        first_S = start + tl.arange(0, SHARES) * PART
        at_SK = first_S[:, None] + tl.arange(0, PART)[None, :]
        inside_SK = (at_SK < columns) | EVEN
        inside_S1K = inside_SK[:, None, :]
        w_SNK = tl.load(row_N[None, :, None] + at_SK[:, None, :], inside_S1K, 0, eviction_policy="evict_first")
        group_SN = rows_N[None, :] * (k // GROUP) + (first_S * PER_BYTE // GROUP)[:, None]
        inside_S1 = ((first_S < columns) | EVEN)[:, None]
        scale_SN = tl.load(scale + group_SN, inside_S1, 0.0).to(tl.float32)
        none_SNM = tl.zeros((SHARES, ROWS, TOKENS), tl.float32)
        if KIND == "int4":
            input_SK = at_SK // 16 * 32 + at_SK % 16
            x_SKM, low_M = load_tokens(x, norm, input_SK, inside_SK, tokens, k, NORM, TOKENS)
            part_SNM = dot(codes(w_SNK, 0, x_SKM.dtype, NATIVE), x_SKM, none_SNM, NATIVE)
            total_SNM = dot(ones_SNK, x_SKM, none_SNM, NATIVE)
            x_SKM, high_M = load_tokens(x, norm, input_SK + 16, inside_SK, tokens, k, NORM, TOKENS)
            part_SNM = dot(codes(w_SNK, 4, x_SKM.dtype, NATIVE), x_SKM, part_SNM, NATIVE)
            total_SNM = dot(ones_SNK, x_SKM, total_SNM, NATIVE)
            zero_SN = tl.load(zero + group_SN, inside_S1, 0.0).to(tl.float32) - OFFSET * scale_SN
            sum_SNM = zero_SN[:, :, None] * total_SNM + sum_SNM
            sum_SNM = scale_SN[:, :, None] * part_SNM + sum_SNM
            squares_M += low_M + high_M
        else:
            x_SKM, part_M = load_tokens(x, norm, at_SK, inside_SK, tokens, k, NORM, TOKENS)
            sum_SNM = scale_SN[:, :, None] * dot(w_SNK, x_SKM, none_SNM, NATIVE) + sum_SNM
            squares_M += part_M
    return shares_added(sum_SNM, squares_M, k, eps, NORM)


@triton.jit
def dots_dequantized(
    x, norm, weight, scale, zero, rows_N, tokens, k, eps, NORM: tl.constexpr, GROUP: tl.constexpr, TOKENS: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, SHARES: tl.constexpr, EVEN: tl.constexpr, NATIVE: tl.constexpr,
):  # fmt: skip
    """int4 for more than eight tokens, whose sums would cost more to scale than the weights: these become x's dtype.

    (q - 8) * scale + center, so that the center is small and q - 8 exact.
    """
    PART: tl.constexpr = COLUMNS // SHARES
    OFFSET: tl.constexpr = 128 if NATIVE and x.dtype.element_ty == tl.bfloat16 else 0  # see codes
    columns = k // 2
    row_N = weight + rows_N.to(tl.int64) * columns
    sum_SNM = tl.zeros((SHARES, ROWS, TOKENS), tl.float32)
    squares_M = tl.zeros((TOKENS,), tl.float32)
    for start in range(0, columns, COLUMNS):
        at_SK = start + tl.arange(0, SHARES)[:, None] * PART + tl.arange(0, PART)[None, :]
        inside_SK = (at_SK < columns) | EVEN
        inside_S1K = inside_SK[:, None, :]
        w_SNK = tl.load(row_N[None, :, None] + at_SK[:, None, :], inside_S1K, 0, eviction_policy="evict_first")
        at_SC = start // 16 + tl.arange(0, SHARES)[:, None] * (PART // 16) + tl.arange(0, PART // 16)[None, :]
        group_SNC = rows_N[None, :, None] * (k // GROUP) + (at_SC // (GROUP // 32))[:, None, :]
        inside_S1C = ((at_SC * 16 < columns) | EVEN)[:, None, :]
        scale_SNC = tl.load(scale + group_SNC, inside_S1C, 0.0).to(tl.float32)
        center_SNC = tl.load(zero + group_SNC, inside_S1C, 0.0).to(tl.float32) + 8 * scale_SNC
        scale_SNK, center_SNK = sixteen(scale_SNC.to(x.dtype.element_ty)), sixteen(center_SNC.to(x.dtype.element_ty))
        for SHIFT in tl.static_range(0, 8, 4):
            input_SK = at_SK // 16 * 32 + at_SK % 16 + 4 * SHIFT
            x_SKM, part_M = load_tokens(x, norm, input_SK, inside_SK, tokens, k, NORM, TOKENS)
            code_SNK = codes(w_SNK, SHIFT, x_SKM.dtype, NATIVE) - (OFFSET + 8.0)
            sum_SNM = dot(code_SNK * scale_SNK + center_SNK, x_SKM, sum_SNM, NATIVE)
            squares_M += part_M
    return shares_added(sum_SNM, squares_M, k, eps, NORM)


@triton.jit
def dot(a, b, c, NATIVE: tl.constexpr):
    """c + a @ b. Triton's interpreter knows no bfloat16."""
    if NATIVE:
        return tl.dot(a.to(b.dtype), b, c, input_precision="ieee")
    return tl.dot(a.to(tl.float32), b.to(tl.float32), c)


@triton.jit
def codes(w, SHIFT: tl.constexpr, dtype: tl.constexpr, NATIVE: tl.constexpr):
    """q of each byte's bits SHIFT..SHIFT+3 in x's dtype; 128 + q where that is bfloat16 and NATIVE.

    bfloat16 of 128 + q is 0x4300 + q: two byte permutations make it of four bytes, with no conversion.
    """
    if not NATIVE:
        return ((w >> SHIFT) & 15).to(tl.float32)
    if dtype == tl.bfloat16:
        q = tl.inline_asm_elementwise(
            "{ .reg .b32 t; and.b32 t, $3, 7; shr.b32 t, $2, t; and.b32 t, t, 0x0f0f0f0f;"
            " prmt.b32 $0, t, 0x43434343, 0x4140; prmt.b32 $1, t, 0x43434343, 0x4342; }",
            "=r,=r,r,r",
            [w, tl.full(w.shape, SHIFT, tl.uint8)],
            dtype=tl.bfloat16,
            is_pure=True,
            pack=4,
        )
        return q
    return ((w >> SHIFT) & 15).to(dtype)


@triton.jit
def sixteen(value_SNC):
    """Each chunk's value for each of its bytes."""
    S: tl.constexpr = value_SNC.shape[0]
    N: tl.constexpr = value_SNC.shape[1]
    C: tl.constexpr = value_SNC.shape[2]
    return tl.reshape(tl.broadcast_to(tl.expand_dims(value_SNC, 3), (S, N, C, 16)), (S, N, C * 16))


@triton.jit
def load_tokens(x, norm, at_SK, inside_SK, tokens, k, NORM: tl.constexpr, TOKENS: tl.constexpr):
    """x of every token, times the norm's weight, in x's dtype, [S, K, M]; and each token's sum of squares."""
    token_M = tl.arange(0, TOKENS)
    inside_SKM = inside_SK[:, :, None] & (token_M < tokens)[None, None, :]
    x_SKM = tl.load(x + token_M[None, None, :] * k + at_SK[:, :, None], inside_SKM, 0.0)
    squares_M = tl.zeros((TOKENS,), tl.float32)
    if NORM:
        wide_SKM = x_SKM.to(tl.float32)
        squares_M = tl.sum(tl.sum(wide_SKM * wide_SKM, 1), 0)
        x_SKM = (wide_SKM * tl.load(norm + at_SK, inside_SK, 0.0).to(tl.float32)[:, :, None]).to(x_SKM.dtype)
    return x_SKM, squares_M


@triton.jit
def shares_added(sum_SNM, squares_M, k, eps, NORM: tl.constexpr):
    """The shares' sums as [M, N], times the norm's rsqrt."""
    out_MN = tl.trans(tl.sum(sum_SNM, 0))
    if NORM:
        out_MN *= tl.rsqrt(squares_M / k + eps)[:, None]
    return out_MN


# ------------------------------------------------------------------------------------- the kernels


@triton.jit
def linear_residual_kernel(
    x, norm, weight, scale, zero, residual, out, tokens, n, k, eps,
    KIND: tl.constexpr, NORM: tl.constexpr, GROUP: tl.constexpr, TOKENS: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr, SHARES: tl.constexpr, EVEN: tl.constexpr, NATIVE: tl.constexpr, RESIDUAL: tl.constexpr,
):  # fmt: skip
    """out = [residual +] [norm](x) W^T: output and down projections, and the head. Error: as the top says."""
    rows_N = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    out_MN = dots(
        x, norm, weight, scale, zero, tl.minimum(rows_N, n - 1), tokens, k, eps,
        KIND, NORM, GROUP, TOKENS, ROWS, COLUMNS, SHARES, EVEN, NATIVE,
    )  # fmt: skip
    token_M = tl.arange(0, TOKENS)
    inside_MN = (token_M < tokens)[:, None] & (rows_N < n)[None, :]
    at_MN = token_M[:, None] * n + rows_N[None, :]
    if RESIDUAL:
        out_MN += tl.load(residual + at_MN, inside_MN, 0.0).to(tl.float32)
    tl.store(out + at_MN, out_MN.to(out.dtype.element_ty), inside_MN)


@triton.jit
def norm_gate_up_silu_kernel(
    x, norm, weight, scale, zero, out, tokens, n, k, eps,
    KIND: tl.constexpr, NORM: tl.constexpr, GROUP: tl.constexpr, TOKENS: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr, SHARES: tl.constexpr, EVEN: tl.constexpr, NATIVE: tl.constexpr,
):  # fmt: skip
    """out[i] = silu(row 2i) * row 2i+1, which is computed once, here, and not by every row of the down projection.

    Error: as the top says.
    """
    rows_N = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    both_MN = dots(
        x, norm, weight, scale, zero, tl.minimum(rows_N, n - 1), tokens, k, eps,
        KIND, NORM, GROUP, TOKENS, ROWS, COLUMNS, SHARES, EVEN, NATIVE,
    )  # fmt: skip
    gate_MI, up_MI = tl.split(tl.reshape(both_MN, (TOKENS, ROWS // 2, 2)))
    token_M = tl.arange(0, TOKENS)
    column_I = tl.program_id(0) * (ROWS // 2) + tl.arange(0, ROWS // 2)
    inside_MI = (token_M < tokens)[:, None] & (column_I < n // 2)[None, :]
    out_MI = gate_MI * tl.sigmoid(gate_MI) * up_MI
    tl.store(out + token_M[:, None] * (n // 2) + column_I[None, :], out_MI.to(out.dtype.element_ty), inside_MI)


@triton.jit
def norm_qkv_rope_write_kernel(
    x, norm, weight, scale, zero, cos_sin, positions, slots, k_cache, v_cache, k_scale, v_scale, heads, arrived, out_q,
    tokens, k, eps, slot_stride, head_stride, q_heads, kv_heads,
    HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr, ROTARY: tl.constexpr, SCALED: tl.constexpr,
    KIND: tl.constexpr, NORM: tl.constexpr, GROUP: tl.constexpr, TOKENS: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr, SHARES: tl.constexpr, EVEN: tl.constexpr, NATIVE: tl.constexpr,
):  # fmt: skip
    """Rows of one head: rotate neighbouring pairs of queries and keys, then queries to out_q, the rest to the cache.

    SCALED: the last program of a head to finish quantizes all of it; the others leave their rows in `heads`.
    Error: as the top says.
    """
    rows_N = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    out_MN = dots(
        x, norm, weight, scale, zero, rows_N, tokens, k, eps,
        KIND, NORM, GROUP, TOKENS, ROWS, COLUMNS, SHARES, EVEN, NATIVE,
    )  # fmt: skip
    head = tl.program_id(0) * ROWS // HEAD_DIM
    token_M = tl.arange(0, TOKENS)
    inside_M = token_M < tokens
    position_M = tl.load(positions + token_M, inside_M, 0).to(tl.int64)
    element_N = rows_N % HEAD_DIM
    if head < q_heads + kv_heads:
        even_ME, odd_ME = tl.split(tl.reshape(out_MN, (TOKENS, ROWS // 2, 2)))
        pair_E = tl.program_id(0) * ROWS % HEAD_DIM // 2 + tl.arange(0, ROWS // 2)
        angle_ME = cos_sin + position_M[:, None] * ROTARY + pair_E[None, :]
        rotates_ME = inside_M[:, None] & (pair_E < ROTARY // 2)[None, :]
        cos_ME = tl.load(angle_ME, rotates_ME, 1.0)
        sin_ME = tl.load(angle_ME + ROTARY // 2, rotates_ME, 0.0)
        rotated = tl.join(even_ME * cos_ME - odd_ME * sin_ME, odd_ME * cos_ME + even_ME * sin_ME)
        out_MN = tl.reshape(rotated, (TOKENS, ROWS))
    if head < q_heads:
        at_MN = token_M[:, None] * (q_heads * HEAD_DIM) + rows_N[None, :]
        tl.store(out_q + at_MN, out_MN.to(out_q.dtype.element_ty), inside_M[:, None])
    else:
        slot_M = tl.load(slots + token_M, inside_M, 0).to(tl.int64)
        kv_head = (head - q_heads) % kv_heads
        at_M = slot_M * slot_stride + kv_head * head_stride + position_M * HEAD_DIM
        cache = k_cache if head < q_heads + kv_heads else v_cache
        if SCALED:
            held_M = ((head - q_heads) * tokens + token_M) * HEAD_DIM
            tl.store(heads + held_M[:, None] + element_N[None, :], out_MN, inside_M[:, None])
            tl.debug_barrier()  # every thread's part is written before one thread says so
            if tl.atomic_add(arrived + head - q_heads, 1, sem="acq_rel") == HEAD_DIM // ROWS - 1:
                steps = k_scale if head < q_heads + kv_heads else v_scale
                write_int8(heads + held_M, cache + at_M, steps + at_M // HEAD_DIM, inside_M, HEAD_DIM, WIDTH)
                tl.store(arrived + head - q_heads, 0)  # ready for the next launch
        else:
            tl.store(cache + at_M[:, None] + element_N[None, :], out_MN.to(cache.dtype.element_ty), inside_M[:, None])


@triton.jit
def write_int8(from_M, to_M, to_step_M, inside_M, HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr):
    """A head of every token: its largest is 127 steps; the step goes to to_step_M. NaN or infinity make the step NaN.

    Read past the L1, which knows no other program.
    """
    element_D = tl.arange(0, WIDTH)
    inside_MD = inside_M[:, None] & (element_D < HEAD_DIM)[None, :]
    x_MD = tl.load(from_M[:, None] + element_D[None, :], inside_MD, 0.0, cache_modifier=".cg")
    step_M = tl.maximum(tl.div_rn(tl.max(tl.abs(x_MD), 1), 127.0), 1.1754943508222875e-38) + tl.sum(x_MD * 0.0, 1)
    q_MD = low_bits(tl.div_rn(x_MD, step_M[:, None])).to(tl.int8)
    tl.store(to_M[:, None] + element_D[None, :], q_MD, inside_MD)
    tl.store(to_step_M, step_M, inside_M)
