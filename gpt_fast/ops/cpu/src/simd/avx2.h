// simd.h's sixteen lanes as two 256-bit registers. Requires AVX2, FMA and F16C; uses AVX-VNNI where it is there.
#pragma once

#include <immintrin.h>

#include "x86.h"

namespace gf {

inline constexpr int kVectorRegisters = 8;  // of sixteen lanes

struct f32x16 {
  __m256 lo, hi;
};
struct i32x16 {
  __m256i lo, hi;
};

inline __m256i load256(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
inline __m128i load128(const void* p) { return _mm_loadu_si128(static_cast<const __m128i*>(p)); }

inline f32x16 splat_f(float v) { return {_mm256_set1_ps(v), _mm256_set1_ps(v)}; }
inline i32x16 splat_i(int32_t v) { return {_mm256_set1_epi32(v), _mm256_set1_epi32(v)}; }
inline f32x16 load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
inline i32x16 load_i(const void* p) { return {load256(p), load256(static_cast<const char*>(p) + 32)}; }
// The first `bytes` (up to 64) bytes at p, the rest zero; memory past them is not touched.
inline i32x16 load_some(const void* p, int bytes) {
  alignas(32) char copy[64] = {};
  std::memcpy(copy, p, size_t(bytes < 64 ? bytes : 64));
  return load_i(copy);
}
inline void store(float* p, f32x16 v) { _mm256_storeu_ps(p, v.lo), _mm256_storeu_ps(p + 8, v.hi); }
inline void store_i(void* p, i32x16 v) {
  _mm256_storeu_si256(static_cast<__m256i*>(p), v.lo);
  _mm256_storeu_si256(static_cast<__m256i*>(p) + 1, v.hi);
}

inline f32x16 operator+(f32x16 a, f32x16 b) { return {_mm256_add_ps(a.lo, b.lo), _mm256_add_ps(a.hi, b.hi)}; }
inline f32x16 operator-(f32x16 a, f32x16 b) { return {_mm256_sub_ps(a.lo, b.lo), _mm256_sub_ps(a.hi, b.hi)}; }
inline f32x16 operator*(f32x16 a, f32x16 b) { return {_mm256_mul_ps(a.lo, b.lo), _mm256_mul_ps(a.hi, b.hi)}; }
inline f32x16 operator/(f32x16 a, f32x16 b) { return {_mm256_div_ps(a.lo, b.lo), _mm256_div_ps(a.hi, b.hi)}; }
inline f32x16 fma(f32x16 a, f32x16 b, f32x16 c) {
  return {_mm256_fmadd_ps(a.lo, b.lo, c.lo), _mm256_fmadd_ps(a.hi, b.hi, c.hi)};
}
inline f32x16 max(f32x16 a, f32x16 b) { return {_mm256_max_ps(a.lo, b.lo), _mm256_max_ps(a.hi, b.hi)}; }
inline f32x16 min(f32x16 a, f32x16 b) { return {_mm256_min_ps(a.lo, b.lo), _mm256_min_ps(a.hi, b.hi)}; }
inline f32x16 abs(f32x16 a) {
  const __m256 sign = _mm256_set1_ps(-0.0f);
  return {_mm256_andnot_ps(sign, a.lo), _mm256_andnot_ps(sign, a.hi)};
}
inline float first_lane(f32x16 a) { return _mm256_cvtss_f32(a.lo); }

inline float reduce_add(f32x16 a) {
  __m256 s = _mm256_add_ps(a.lo, a.hi);
  s = _mm256_add_ps(s, _mm256_permute2f128_ps(s, s, 1));
  s = _mm256_add_ps(s, _mm256_permute_ps(s, 0x4e));
  return _mm256_cvtss_f32(_mm256_add_ps(s, _mm256_permute_ps(s, 0xb1)));
}
inline float reduce_max(f32x16 a) {
  __m256 s = _mm256_max_ps(a.lo, a.hi);
  s = _mm256_max_ps(s, _mm256_permute2f128_ps(s, s, 1));
  s = _mm256_max_ps(s, _mm256_permute_ps(s, 0x4e));
  return _mm256_cvtss_f32(_mm256_max_ps(s, _mm256_permute_ps(s, 0xb1)));
}
inline int32_t reduce_add(i32x16 a) {
  __m256i s = _mm256_add_epi32(a.lo, a.hi);
  s = _mm256_add_epi32(s, _mm256_permute2x128_si256(s, s, 1));
  s = _mm256_add_epi32(s, _mm256_shuffle_epi32(s, 0x4e));
  return _mm256_extract_epi32(_mm256_add_epi32(s, _mm256_shuffle_epi32(s, 0xb1)), 0);
}

inline f32x16 to_float(i32x16 a) { return {_mm256_cvtepi32_ps(a.lo), _mm256_cvtepi32_ps(a.hi)}; }
inline f32x16 as_float(i32x16 a) { return {_mm256_castsi256_ps(a.lo), _mm256_castsi256_ps(a.hi)}; }
inline i32x16 round_i32(f32x16 a) { return {_mm256_cvtps_epi32(a.lo), _mm256_cvtps_epi32(a.hi)}; }
inline f32x16 round_nearest(f32x16 a) {
  constexpr int how = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
  return {_mm256_round_ps(a.lo, how), _mm256_round_ps(a.hi, how)};
}
// y * 2^n; zero where n < -126 (the exponent's bits are then zero).
inline f32x16 scale_by_power(f32x16 y, f32x16 n) {
  const i32x16 e = round_i32(max(n, splat_f(-127.0f)) + splat_f(127.0f));
  return y * as_float({_mm256_slli_epi32(e.lo, 23), _mm256_slli_epi32(e.hi, 23)});
}

// Lanes first..last-1 of `a`; the others become -inf.
inline f32x16 keep_range(f32x16 a, int first, int last) {
  const __m256 inf = _mm256_set1_ps(-__builtin_inff());
  const auto half = [&](__m256 x, __m256i lane) {
    const __m256i from = _mm256_cmpgt_epi32(lane, _mm256_set1_epi32(first - 1));
    const __m256i below = _mm256_cmpgt_epi32(_mm256_set1_epi32(last), lane);
    return _mm256_blendv_ps(inf, x, _mm256_castsi256_ps(_mm256_and_si256(from, below)));
  };
  return {half(a.lo, _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7)),
          half(a.hi, _mm256_setr_epi32(8, 9, 10, 11, 12, 13, 14, 15))};
}

inline f32x16 load_f16(const uint16_t* p) { return {_mm256_cvtph_ps(load128(p)), _mm256_cvtph_ps(load128(p + 8))}; }
inline f32x16 load_bf16(const uint16_t* p) {
  const auto half = [](const uint16_t* q) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(load128(q)), 16));
  };
  return {half(p), half(p + 8)};
}
inline f32x16 load_i8(const int8_t* p) {
  const __m128i bytes = load128(p);
  return to_float({_mm256_cvtepi8_epi32(bytes), _mm256_cvtepi8_epi32(_mm_srli_si128(bytes, 8))});
}
inline void store_i8(int8_t* p, i32x16 a) {
  const __m256i words = _mm256_permute4x64_epi64(_mm256_packs_epi32(a.lo, a.hi), 0xd8);
  const __m128i bytes = _mm_packs_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), bytes);
}
inline void store_bf16(uint16_t* p, f32x16 a) {  // nearest, ties to even
  const auto half = [](__m256 x) {
    const __m256i bits = _mm256_castps_si256(x);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    return _mm256_srli_epi32(_mm256_add_epi32(_mm256_add_epi32(bits, odd), _mm256_set1_epi32(0x7fff)), 16);
  };
  const __m256i words = _mm256_packus_epi32(half(a.lo), half(a.hi));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm256_permute4x64_epi64(words, 0xd8));
}

// Lane i: low[i], and high[i] above it.
inline i32x16 interleave_bf16(const uint16_t* low, const uint16_t* high) {
  const auto half = [](const uint16_t* a, const uint16_t* b) {
    return _mm256_or_si256(_mm256_cvtepu16_epi32(load128(a)), _mm256_slli_epi32(_mm256_cvtepu16_epi32(load128(b)), 16));
  };
  return {half(low, high), half(low + 8, high + 8)};
}
// The same of floats that bfloat16 holds exactly.
inline i32x16 pair_exact(f32x16 low, f32x16 high) {
  const auto half = [](__m256 a, __m256 b) {
    return _mm256_blend_epi16(_mm256_srli_epi32(_mm256_castps_si256(a), 16), _mm256_castps_si256(b), 0xaa);
  };
  return {half(low.lo, high.lo), half(low.hi, high.hi)};
}

// Each lane adds the four products of its unsigned bytes of w with its signed bytes of x. Without VNNI even and odd
// bytes are multiplied as 16-bit numbers, because the byte instruction saturates.
inline __m256i dot4_half(__m256i sum, __m256i w, __m256i x) {
#if defined(__AVXVNNI__)
  return _mm256_dpbusd_avx_epi32(sum, w, x);
#else
  const __m256i even =
      _mm256_madd_epi16(_mm256_and_si256(w, _mm256_set1_epi16(255)), _mm256_srai_epi16(_mm256_slli_epi16(x, 8), 8));
  const __m256i odd = _mm256_madd_epi16(_mm256_srli_epi16(w, 8), _mm256_srai_epi16(x, 8));
  return _mm256_add_epi32(sum, _mm256_add_epi32(even, odd));
#endif
}
inline i32x16 dot4(i32x16 sum, i32x16 w, i32x16 x) {
  return {dot4_half(sum.lo, w.lo, x.lo), dot4_half(sum.hi, w.hi, x.hi)};
}
inline i32x16 low_nibbles(i32x16 a) {
  const __m256i mask = _mm256_set1_epi8(15);
  return {_mm256_and_si256(a.lo, mask), _mm256_and_si256(a.hi, mask)};
}
inline i32x16 high_nibbles(i32x16 a) { return low_nibbles({_mm256_srli_epi32(a.lo, 4), _mm256_srli_epi32(a.hi, 4)}); }
// table[i] for each byte i of `index`, all below 16.
inline i32x16 look_up(const uint8_t* table, i32x16 index) {
  const __m256i entries = _mm256_broadcastsi128_si256(load128(table));
  return {_mm256_shuffle_epi8(entries, index.lo), _mm256_shuffle_epi8(entries, index.hi)};
}

inline f32x16 even_bf16(i32x16 a) { return as_float({_mm256_slli_epi32(a.lo, 16), _mm256_slli_epi32(a.hi, 16)}); }
inline f32x16 odd_bf16(i32x16 a) {
  const __m256i mask = _mm256_set1_epi32(int(0xffff0000));
  return as_float({_mm256_and_si256(a.lo, mask), _mm256_and_si256(a.hi, mask)});
}
// Byte 0..3 of each lane, sign-extended.
template <int kByte>
inline f32x16 byte_to_float(i32x16 a) {
  const auto half = [](__m256i x) { return _mm256_srai_epi32(_mm256_slli_epi32(x, 24 - 8 * kByte), 24); };
  return to_float({half(a.lo), half(a.hi)});
}
// Each lane adds the two products of its bfloat16 pairs.
inline f32x16 dot2_bf16(f32x16 sum, i32x16 w, i32x16 x) {
  sum = fma(even_bf16(w), even_bf16(x), sum);
  return fma(odd_bf16(w), odd_bf16(x), sum);
}

// p[0], p[0], p[1], p[1], ... p[7], p[7]
inline f32x16 load_twice(const float* p) {
  const __m256 x = _mm256_loadu_ps(p);
  return {_mm256_permutevar8x32_ps(x, _mm256_setr_epi32(0, 0, 1, 1, 2, 2, 3, 3)),
          _mm256_permutevar8x32_ps(x, _mm256_setr_epi32(4, 4, 5, 5, 6, 6, 7, 7))};
}
// Rotates neighbouring pairs (e, o) to (e cos - o sin, o cos + e sin).
inline f32x16 rotate_pairs(f32x16 x, f32x16 cos, f32x16 sin) {
  const auto half = [](__m256 v, __m256 c, __m256 s) {
    return _mm256_fmaddsub_ps(v, c, _mm256_mul_ps(_mm256_permute_ps(v, 0xb1), s));
  };
  return {half(x.lo, cos.lo, sin.lo), half(x.hi, cos.hi, sin.hi)};
}

// Lane j of row i becomes lane i of row j.
inline void transpose16(i32x16 row[16]) {
  alignas(32) int32_t in[16][16], out[16][16];
  for (int i = 0; i < 16; i++) store_i(in[i], row[i]);
  for (int i = 0; i < 16; i++)
    for (int j = 0; j < 16; j++) out[j][i] = in[i][j];
  for (int i = 0; i < 16; i++) row[i] = load_i(out[i]);
}

}  // namespace gf
