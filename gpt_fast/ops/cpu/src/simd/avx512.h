// simd.h's sixteen lanes as one 512-bit register. Requires F, BW, VL, DQ and VNNI; uses BF16 where it is there.
#pragma once

#include <immintrin.h>

#include "x86.h"

namespace gf {

inline constexpr int kVectorRegisters = 32;  // of sixteen lanes

struct f32x16 {
  __m512 r;
};
struct i32x16 {
  __m512i r;
};

inline f32x16 splat_f(float v) { return {_mm512_set1_ps(v)}; }
inline i32x16 splat_i(int32_t v) { return {_mm512_set1_epi32(v)}; }
inline f32x16 load(const float* p) { return {_mm512_loadu_ps(p)}; }
inline i32x16 load_i(const void* p) { return {_mm512_loadu_si512(p)}; }
// The first `bytes` (up to 64) bytes at p, the rest zero; memory past them is not touched.
inline i32x16 load_some(const void* p, int bytes) {
  return {_mm512_maskz_loadu_epi8(bytes >= 64 ? ~0ull : (1ull << bytes) - 1, p)};
}
inline void store(float* p, f32x16 v) { _mm512_storeu_ps(p, v.r); }
inline void store_i(void* p, i32x16 v) { _mm512_storeu_si512(p, v.r); }

inline f32x16 operator+(f32x16 a, f32x16 b) { return {_mm512_add_ps(a.r, b.r)}; }
inline f32x16 operator-(f32x16 a, f32x16 b) { return {_mm512_sub_ps(a.r, b.r)}; }
inline f32x16 operator*(f32x16 a, f32x16 b) { return {_mm512_mul_ps(a.r, b.r)}; }
inline f32x16 operator/(f32x16 a, f32x16 b) { return {_mm512_div_ps(a.r, b.r)}; }
inline f32x16 fma(f32x16 a, f32x16 b, f32x16 c) { return {_mm512_fmadd_ps(a.r, b.r, c.r)}; }
inline f32x16 max(f32x16 a, f32x16 b) { return {_mm512_max_ps(a.r, b.r)}; }
inline f32x16 min(f32x16 a, f32x16 b) { return {_mm512_min_ps(a.r, b.r)}; }
inline f32x16 abs(f32x16 a) { return {_mm512_abs_ps(a.r)}; }
inline float reduce_add(f32x16 a) { return _mm512_reduce_add_ps(a.r); }
inline float reduce_max(f32x16 a) { return _mm512_reduce_max_ps(a.r); }
inline int32_t reduce_add(i32x16 a) { return _mm512_reduce_add_epi32(a.r); }
inline float first_lane(f32x16 a) { return _mm512_cvtss_f32(a.r); }

inline f32x16 to_float(i32x16 a) { return {_mm512_cvtepi32_ps(a.r)}; }
inline i32x16 round_i32(f32x16 a) { return {_mm512_cvtps_epi32(a.r)}; }
inline f32x16 round_nearest(f32x16 a) {
  return {_mm512_roundscale_ps(a.r, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
}
inline f32x16 scale_by_power(f32x16 y, f32x16 n) { return {_mm512_scalef_ps(y.r, n.r)}; }

// Lanes first..last-1 of `a`; the others become -inf.
inline f32x16 keep_range(f32x16 a, int first, int last) {
  const uint32_t below_last = last >= 16 ? 0xffff : last <= 0 ? 0 : (1u << last) - 1;
  const uint32_t below_first = first >= 16 ? 0xffff : first <= 0 ? 0 : (1u << first) - 1;
  return {_mm512_mask_mov_ps(_mm512_set1_ps(-__builtin_inff()), __mmask16(below_last & ~below_first), a.r)};
}

inline f32x16 load_f16(const uint16_t* p) {
  return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))};
}
inline f32x16 load_bf16(const uint16_t* p) {
  const __m256i narrow = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(narrow), 16))};
}
inline f32x16 load_i8(const int8_t* p) {
  return {_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))))};
}
inline void store_i8(int8_t* p, i32x16 a) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(a.r));
}
inline void store_bf16(uint16_t* p, f32x16 a) {  // nearest, ties to even
#if defined(__AVX512BF16__)
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), (__m256i)_mm512_cvtneps_pbh(a.r));
#else
  const __m512i bits = _mm512_castps_si512(a.r);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(bits, odd), _mm512_set1_epi32(0x7fff));
  const __m256i narrow = _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrow);
#endif
}
// Lane i: low[i], and high[i] above it.
inline i32x16 interleave_bf16(const uint16_t* low, const uint16_t* high) {
  const auto wide = [](const uint16_t* p) {
    return _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  };
  return {_mm512_or_si512(wide(low), _mm512_slli_epi32(wide(high), 16))};
}
// The same of floats that bfloat16 holds exactly.
inline i32x16 pair_exact(f32x16 low, f32x16 high) {
  const __m512i below = _mm512_srli_epi32(_mm512_castps_si512(low.r), 16);
  return {_mm512_mask_blend_epi16(0xaaaaaaaa, below, _mm512_castps_si512(high.r))};
}

// Each lane adds the four products of its unsigned bytes of w with its signed bytes of x.
inline i32x16 dot4(i32x16 sum, i32x16 w, i32x16 x) { return {_mm512_dpbusd_epi32(sum.r, w.r, x.r)}; }
inline i32x16 low_nibbles(i32x16 a) { return {_mm512_and_si512(a.r, _mm512_set1_epi8(15))}; }
inline i32x16 high_nibbles(i32x16 a) { return {_mm512_and_si512(_mm512_srli_epi32(a.r, 4), _mm512_set1_epi8(15))}; }
// table[i] for each byte i of `index`, all below 16.
inline i32x16 look_up(const uint8_t* table, i32x16 index) {
  const __m128i entries = _mm_loadu_si128(reinterpret_cast<const __m128i*>(table));
  return {_mm512_shuffle_epi8(_mm512_broadcast_i32x4(entries), index.r)};
}

inline f32x16 even_bf16(i32x16 a) { return {_mm512_castsi512_ps(_mm512_slli_epi32(a.r, 16))}; }
inline f32x16 odd_bf16(i32x16 a) {
  return {_mm512_castsi512_ps(_mm512_and_si512(a.r, _mm512_set1_epi32(int(0xffff0000))))};
}
// Byte 0..3 of each lane, sign-extended.
template <int kByte>
inline f32x16 byte_to_float(i32x16 a) {
  return {_mm512_cvtepi32_ps(_mm512_srai_epi32(_mm512_slli_epi32(a.r, 24 - 8 * kByte), 24))};
}
// Each lane adds the two products of its bfloat16 pairs.
inline f32x16 dot2_bf16(f32x16 sum, i32x16 w, i32x16 x) {
#if defined(__AVX512BF16__)
  return {_mm512_dpbf16_ps(sum.r, (__m512bh)w.r, (__m512bh)x.r)};
#else
  sum = fma(even_bf16(w), even_bf16(x), sum);
  return fma(odd_bf16(w), odd_bf16(x), sum);
#endif
}

inline f32x16 as_float(i32x16 a) { return {_mm512_castsi512_ps(a.r)}; }

// p[0], p[0], p[1], p[1], ... p[7], p[7]
inline f32x16 load_twice(const float* p) {
  const __m512i index = _mm512_set_epi32(7, 7, 6, 6, 5, 5, 4, 4, 3, 3, 2, 2, 1, 1, 0, 0);
  return {_mm512_permutexvar_ps(index, _mm512_castps256_ps512(_mm256_loadu_ps(p)))};
}
// Rotates neighbouring pairs (e, o) to (e cos - o sin, o cos + e sin).
inline f32x16 rotate_pairs(f32x16 x, f32x16 cos, f32x16 sin) {
  return {_mm512_fmaddsub_ps(x.r, cos.r, _mm512_mul_ps(_mm512_permute_ps(x.r, 0xB1), sin.r))};
}

// Lane j of row i becomes lane i of row j.
inline void transpose16(i32x16 row[16]) {
  __m512i a[16], b[16];
  for (int i = 0; i < 16; i += 2) {
    a[i] = _mm512_unpacklo_epi32(row[i].r, row[i + 1].r);
    a[i + 1] = _mm512_unpackhi_epi32(row[i].r, row[i + 1].r);
  }
  for (int i = 0; i < 16; i += 4) {
    b[i] = _mm512_unpacklo_epi64(a[i], a[i + 2]);
    b[i + 1] = _mm512_unpackhi_epi64(a[i], a[i + 2]);
    b[i + 2] = _mm512_unpacklo_epi64(a[i + 1], a[i + 3]);
    b[i + 3] = _mm512_unpackhi_epi64(a[i + 1], a[i + 3]);
  }
  for (int i = 0; i < 4; i++) {
    a[i] = _mm512_shuffle_i32x4(b[i], b[i + 4], 0x88);
    a[i + 4] = _mm512_shuffle_i32x4(b[i], b[i + 4], 0xdd);
    a[i + 8] = _mm512_shuffle_i32x4(b[i + 8], b[i + 12], 0x88);
    a[i + 12] = _mm512_shuffle_i32x4(b[i + 8], b[i + 12], 0xdd);
  }
  for (int i = 0; i < 4; i++) {
    row[i].r = _mm512_shuffle_i32x4(a[i], a[i + 8], 0x88);
    row[i + 8].r = _mm512_shuffle_i32x4(a[i], a[i + 8], 0xdd);
    row[i + 4].r = _mm512_shuffle_i32x4(a[i + 4], a[i + 12], 0x88);
    row[i + 12].r = _mm512_shuffle_i32x4(a[i + 4], a[i + 12], 0xdd);
  }
}

}  // namespace gf
