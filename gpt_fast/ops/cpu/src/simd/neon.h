// simd.h's sixteen lanes as four 128-bit registers. Requires AArch64 with the dot product extension (Armv8.2); uses
// its integer matrix extension (i8mm) where it is there. Results are the same bits as those of simd/avx2.h.
#pragma once

#include <arm_neon.h>

#include "../tuning.h"

namespace gf {

inline constexpr int kVectorRegisters = 8;  // of sixteen lanes

using float16 = __fp16;  // gcc has _Float16 in C++ for Arm from 13 on only

struct f32x16 {
  float32x4_t a, b, c, d;
};
struct i32x16 {
  int32x4_t a, b, c, d;
};

// `f` of each quarter.
template <class Out, class F, class... In>
inline Out quarters(F f, In... v) {
  return {f(v.a...), f(v.b...), f(v.c...), f(v.d...)};
}

template <Hint kHint>
inline void prefetch(const void* p) {
  const char& line = *static_cast<const char*>(p);
  if constexpr (kHint == kToL1) asm volatile("prfm pldl1keep, %0" : : "Q"(line));
  if constexpr (kHint == kToL2) asm volatile("prfm pldl2keep, %0" : : "Q"(line));
  if constexpr (kHint == kOnce) asm volatile("prfm pldl1strm, %0" : : "Q"(line));
}

// Not `yield`, which most Arm cores take for nothing at all.
inline void pause() { asm volatile("isb" : : : "memory"); }

inline f32x16 splat_f(float v) { return {vdupq_n_f32(v), vdupq_n_f32(v), vdupq_n_f32(v), vdupq_n_f32(v)}; }
inline i32x16 splat_i(int32_t v) { return {vdupq_n_s32(v), vdupq_n_s32(v), vdupq_n_s32(v), vdupq_n_s32(v)}; }
inline f32x16 load(const float* p) { return {vld1q_f32(p), vld1q_f32(p + 4), vld1q_f32(p + 8), vld1q_f32(p + 12)}; }
inline i32x16 load_i(const void* p) {  // as bytes, because p need not be aligned as integers are
  const auto* bytes = static_cast<const int8_t*>(p);
  const auto quarter = [&](int i) { return vreinterpretq_s32_s8(vld1q_s8(bytes + 16 * i)); };
  return {quarter(0), quarter(1), quarter(2), quarter(3)};
}
// The first `bytes` (up to 64) bytes at p, the rest zero; memory past them is not touched.
inline i32x16 load_some(const void* p, int bytes) {
  alignas(16) char copy[64] = {};
  std::memcpy(copy, p, size_t(bytes < 64 ? bytes : 64));
  return load_i(copy);
}
inline void store(float* p, f32x16 v) {
  vst1q_f32(p, v.a), vst1q_f32(p + 4, v.b), vst1q_f32(p + 8, v.c), vst1q_f32(p + 12, v.d);
}
inline void store_i(void* p, i32x16 v) {
  auto* bytes = static_cast<int8_t*>(p);
  vst1q_s8(bytes, vreinterpretq_s8_s32(v.a)), vst1q_s8(bytes + 16, vreinterpretq_s8_s32(v.b));
  vst1q_s8(bytes + 32, vreinterpretq_s8_s32(v.c)), vst1q_s8(bytes + 48, vreinterpretq_s8_s32(v.d));
}

inline f32x16 operator+(f32x16 a, f32x16 b) { return quarters<f32x16>(vaddq_f32, a, b); }
inline f32x16 operator-(f32x16 a, f32x16 b) { return quarters<f32x16>(vsubq_f32, a, b); }
inline f32x16 operator*(f32x16 a, f32x16 b) { return quarters<f32x16>(vmulq_f32, a, b); }
inline f32x16 operator/(f32x16 a, f32x16 b) { return quarters<f32x16>(vdivq_f32, a, b); }
inline f32x16 fma(f32x16 a, f32x16 b, f32x16 c) { return quarters<f32x16>(vfmaq_f32, c, a, b); }
// As on x86 the second where either is NaN; FMAX would answer NaN.
inline f32x16 max(f32x16 a, f32x16 b) {
  return quarters<f32x16>([](float32x4_t x, float32x4_t y) { return vbslq_f32(vcgtq_f32(x, y), x, y); }, a, b);
}
inline f32x16 min(f32x16 a, f32x16 b) {
  return quarters<f32x16>([](float32x4_t x, float32x4_t y) { return vbslq_f32(vcltq_f32(x, y), x, y); }, a, b);
}
inline f32x16 abs(f32x16 a) { return quarters<f32x16>(vabsq_f32, a); }
inline float first_lane(f32x16 a) { return vgetq_lane_f32(a.a, 0); }

inline float reduce_add(f32x16 a) {  // in the order of the other instruction sets
  const float32x4_t s = vaddq_f32(vaddq_f32(a.a, a.c), vaddq_f32(a.b, a.d));
  const float32x2_t pair = vadd_f32(vget_low_f32(s), vget_high_f32(s));
  return vget_lane_f32(pair, 0) + vget_lane_f32(pair, 1);
}
inline float reduce_max(f32x16 a) {
  const f32x16 ab = max(a, {a.c, a.d, a.a, a.b});
  const f32x16 s = max(ab, {ab.b, ab.a, ab.d, ab.c});
  float most = vgetq_lane_f32(s.a, 3);
  for (float v : {vgetq_lane_f32(s.a, 2), vgetq_lane_f32(s.a, 1), vgetq_lane_f32(s.a, 0)}) most = v > most ? v : most;
  return most;
}
inline int32_t reduce_add(i32x16 a) { return vaddvq_s32(vaddq_s32(vaddq_s32(a.a, a.c), vaddq_s32(a.b, a.d))); }

inline f32x16 to_float(i32x16 a) { return quarters<f32x16>(vcvtq_f32_s32, a); }
inline f32x16 as_float(i32x16 a) { return quarters<f32x16>(vreinterpretq_f32_s32, a); }
inline i32x16 as_int(f32x16 a) { return quarters<i32x16>(vreinterpretq_s32_f32, a); }
inline i32x16 round_i32(f32x16 a) { return quarters<i32x16>(vcvtnq_s32_f32, a); }
inline f32x16 round_nearest(f32x16 a) { return quarters<f32x16>(vrndnq_f32, a); }
// y * 2^n; zero where n < -126 (the exponent's bits are then zero).
inline f32x16 scale_by_power(f32x16 y, f32x16 n) {
  const i32x16 e = round_i32(max(n, splat_f(-127.0f)) + splat_f(127.0f));
  return y * as_float(quarters<i32x16>([](int32x4_t q) { return vshlq_n_s32(q, 23); }, e));
}

// Lanes first..last-1 of `a`; the others become -inf.
inline f32x16 keep_range(f32x16 a, int first, int last) {
  alignas(16) static constexpr int32_t kLane[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  const int32x4_t from = vdupq_n_s32(first), to = vdupq_n_s32(last);
  const auto quarter = [&](float32x4_t x, int32x4_t lane) {
    return vbslq_f32(vandq_u32(vcgeq_s32(lane, from), vcltq_s32(lane, to)), x, vdupq_n_f32(-__builtin_inff()));
  };
  return quarters<f32x16>(quarter, a, load_i(kLane));
}

inline f32x16 load_f16(const uint16_t* p) {
  const auto quarter = [&](int i) { return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p + 4 * i))); };
  return {quarter(0), quarter(1), quarter(2), quarter(3)};
}
inline i32x16 widen(const uint16_t* p) {  // each to the low half of a lane
  const auto quarter = [&](int i) { return vreinterpretq_s32_u32(vmovl_u16(vld1_u16(p + 4 * i))); };
  return {quarter(0), quarter(1), quarter(2), quarter(3)};
}
inline i32x16 to_high_half(i32x16 a) {
  return quarters<i32x16>([](int32x4_t q) { return vshlq_n_s32(q, 16); }, a);
}
inline f32x16 load_bf16(const uint16_t* p) { return as_float(to_high_half(widen(p))); }
inline f32x16 load_i8(const int8_t* p) {
  const int8x16_t bytes = vld1q_s8(p);
  const int16x8_t low = vmovl_s8(vget_low_s8(bytes)), high = vmovl_s8(vget_high_s8(bytes));
  return to_float({vmovl_s16(vget_low_s16(low)), vmovl_s16(vget_high_s16(low)), vmovl_s16(vget_low_s16(high)),
                   vmovl_s16(vget_high_s16(high))});
}
inline void store_i8(int8_t* p, i32x16 v) {
  const int16x8_t low = vcombine_s16(vqmovn_s32(v.a), vqmovn_s32(v.b));
  const int16x8_t high = vcombine_s16(vqmovn_s32(v.c), vqmovn_s32(v.d));
  vst1q_s8(p, vcombine_s8(vqmovn_s16(low), vqmovn_s16(high)));
}
inline void store_bf16(uint16_t* p, f32x16 v) {  // nearest, ties to even
  const auto rounded = [](float32x4_t x) {
    const uint32x4_t bits = vreinterpretq_u32_f32(x);
    const uint32x4_t odd = vandq_u32(vshrq_n_u32(bits, 16), vdupq_n_u32(1));
    return vshrn_n_u32(vaddq_u32(vaddq_u32(bits, odd), vdupq_n_u32(0x7fff)), 16);
  };
  vst1q_u16(p, vcombine_u16(rounded(v.a), rounded(v.b)));
  vst1q_u16(p + 8, vcombine_u16(rounded(v.c), rounded(v.d)));
}

// Lane i: low[i], and high[i] above it.
inline i32x16 interleave_bf16(const uint16_t* low, const uint16_t* high) {
  return quarters<i32x16>(vorrq_s32, widen(low), to_high_half(widen(high)));
}
// The same of floats that bfloat16 holds exactly.
inline i32x16 pair_exact(f32x16 low, f32x16 high) {
  const auto quarter = [](int32x4_t l, int32x4_t h) {
    return vreinterpretq_s32_u32(vsriq_n_u32(vreinterpretq_u32_s32(h), vreinterpretq_u32_s32(l), 16));
  };
  return quarters<i32x16>(quarter, as_int(low), as_int(high));
}

// Each lane adds the four products of its unsigned bytes of w with its signed bytes of x. Plain NEON multiplies signed
// bytes only: w - 128 is one, and what it lacks, 128 times the sum of x, is the same for every w that meets this x.
inline i32x16 dot4(i32x16 sum, i32x16 w, i32x16 x) {
#if defined(__ARM_FEATURE_MATMUL_INT8)
  const auto quarter = [](int32x4_t s, int32x4_t a, int32x4_t b) {
    return vusdotq_s32(s, vreinterpretq_u8_s32(a), vreinterpretq_s8_s32(b));
  };
#else
  const auto quarter = [](int32x4_t s, int32x4_t a, int32x4_t b) {
    const int8x16_t below = vreinterpretq_s8_u8(veorq_u8(vreinterpretq_u8_s32(a), vdupq_n_u8(128)));
    const int8x16_t bytes = vreinterpretq_s8_s32(b);
    const int32x4_t lacking = vshlq_n_s32(vdotq_s32(vdupq_n_s32(0), vdupq_n_s8(1), bytes), 7);
    return vdotq_s32(vaddq_s32(s, lacking), below, bytes);
  };
#endif
  return quarters<i32x16>(quarter, sum, w, x);
}
inline i32x16 low_nibbles(i32x16 a) { return quarters<i32x16>(vandq_s32, a, splat_i(0x0f0f0f0f)); }
inline i32x16 high_nibbles(i32x16 a) {
  const auto quarter = [](int32x4_t q) { return vreinterpretq_s32_u8(vshrq_n_u8(vreinterpretq_u8_s32(q), 4)); };
  return quarters<i32x16>(quarter, a);
}
// table[i] for each byte i of `index`, all below 16.
inline i32x16 look_up(const uint8_t* table, i32x16 index) {
  const uint8x16_t entries = vld1q_u8(table);
  const auto quarter = [&](int32x4_t q) { return vreinterpretq_s32_u8(vqtbl1q_u8(entries, vreinterpretq_u8_s32(q))); };
  return quarters<i32x16>(quarter, index);
}

inline f32x16 even_bf16(i32x16 a) { return as_float(to_high_half(a)); }
inline f32x16 odd_bf16(i32x16 a) { return as_float(quarters<i32x16>(vandq_s32, a, splat_i(int(0xffff0000)))); }
// Byte 0..3 of each lane, sign-extended.
template <int kByte>
inline f32x16 byte_to_float(i32x16 a) {
  const auto quarter = [](int32x4_t q) { return vshrq_n_s32(vshlq_n_s32(q, 24 - 8 * kByte), 24); };
  return to_float(quarters<i32x16>(quarter, a));
}
// Each lane adds the two products of its bfloat16 pairs.
inline f32x16 dot2_bf16(f32x16 sum, i32x16 w, i32x16 x) {
  sum = fma(even_bf16(w), even_bf16(x), sum);
  return fma(odd_bf16(w), odd_bf16(x), sum);
}

// p[0], p[0], p[1], p[1], ... p[7], p[7]
inline f32x16 load_twice(const float* p) {
  const float32x4_t low = vld1q_f32(p), high = vld1q_f32(p + 4);
  return {vzip1q_f32(low, low), vzip2q_f32(low, low), vzip1q_f32(high, high), vzip2q_f32(high, high)};
}
// Rotates neighbouring pairs (e, o) to (e cos - o sin, o cos + e sin).
inline f32x16 rotate_pairs(f32x16 x, f32x16 cos, f32x16 sin) {
  const uint64x2_t even_sign = vdupq_n_u64(0x80000000);
  const auto quarter = [&](float32x4_t v, float32x4_t c, float32x4_t s) {
    const uint32x4_t other = vreinterpretq_u32_f32(vmulq_f32(vrev64q_f32(v), s));
    return vfmaq_f32(vreinterpretq_f32_u32(veorq_u32(other, vreinterpretq_u32_u64(even_sign))), v, c);
  };
  return quarters<f32x16>(quarter, x, cos, sin);
}

// Lane j of row i becomes lane i of row j: each square of four by four in itself, then the squares change places.
inline void transpose4(int32x4_t (&r)[4]) {
  const int64x2_t low01 = vreinterpretq_s64_s32(vzip1q_s32(r[0], r[1]));
  const int64x2_t high01 = vreinterpretq_s64_s32(vzip2q_s32(r[0], r[1]));
  const int64x2_t low23 = vreinterpretq_s64_s32(vzip1q_s32(r[2], r[3]));
  const int64x2_t high23 = vreinterpretq_s64_s32(vzip2q_s32(r[2], r[3]));
  r[0] = vreinterpretq_s32_s64(vzip1q_s64(low01, low23)), r[1] = vreinterpretq_s32_s64(vzip2q_s64(low01, low23));
  r[2] = vreinterpretq_s32_s64(vzip1q_s64(high01, high23)), r[3] = vreinterpretq_s32_s64(vzip2q_s64(high01, high23));
}
inline void transpose16(i32x16 row[16]) {
  alignas(64) int32_t in[16][16], out[16][16];
  for (int i = 0; i < 16; i++) store_i(in[i], row[i]);
  for (int i = 0; i < 16; i += 4)
    for (int j = 0; j < 16; j += 4) {
      int32x4_t square[4];
      for (int k = 0; k < 4; k++) square[k] = vld1q_s32(&in[i + k][j]);
      transpose4(square);
      for (int k = 0; k < 4; k++) vst1q_s32(&out[j + k][i], square[k]);
    }
  for (int i = 0; i < 16; i++) row[i] = load_i(out[i]);
}

}  // namespace gf
