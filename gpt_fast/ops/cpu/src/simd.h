// Sixteen lanes of float or int32, whatever registers the machine has. All arithmetic of the decoder is written
// against these few functions, so one body serves every instruction set. Products are fused only where `fma` says
// so (build with -ffp-contract=off): that is what makes a row's result the same bits in every kernel.
//
// simd/ holds one file an instruction set, and nothing outside it knows any. Such a file defines f32x16 and i32x16,
// kVectorRegisters, float16, the functions that simd/avx512.h has, prefetch<Hint>() and pause(); build.py's table names
// it too.
#pragma once

#include <cstdint>
#include <cstring>
#include <new>
#include <vector>

namespace gf {

inline constexpr int kLanes = 16;

// Before a loop over registers: gcc keeps an array in registers only where the loops over it are unrolled early.
#define GF_UNROLL _Pragma("GCC unroll 16")

// A vector whose first element starts a cache line, so that 64-byte loads never straddle two.
template <class T>
struct LineAllocator {
  using value_type = T;
  LineAllocator() = default;
  template <class U>
  LineAllocator(const LineAllocator<U>&) {}
  T* allocate(size_t n) { return static_cast<T*>(::operator new(n * sizeof(T), std::align_val_t(64))); }
  void deallocate(T* p, size_t) { ::operator delete(p, std::align_val_t(64)); }
  bool operator==(const LineAllocator&) const { return true; }
};
template <class T>
using Buffer = std::vector<T, LineAllocator<T>>;

template <class T>
inline T read_as(const void* p) {
  T value;
  std::memcpy(&value, p, sizeof value);
  return value;
}

inline float bf16_to_float(uint16_t bits) {
  const uint32_t wide = uint32_t(bits) << 16;
  return read_as<float>(&wide);
}

inline uint16_t float_to_bf16(float value) {  // nearest, ties to even
  const uint32_t bits = read_as<uint32_t>(&value);
  return uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

}  // namespace gf

#if defined(__AVX512F__) && defined(__AVX512VNNI__)
#include "simd/avx512.h"
#elif defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#include "simd/avx2.h"
#elif defined(__aarch64__) && defined(__ARM_FEATURE_DOTPROD)
#include "simd/neon.h"
#else
#error "no file of simd/ is for the instruction set that the compiler was told"
#endif

namespace gf {

inline f32x16 splat(float v) { return splat_f(v); }
inline f32x16 operator-(f32x16 a) { return splat(0.0f) - a; }

// 2^x for x <= 128; exactly 0 for x <= -150 (a masked score is -inf). Relative error below 2e-7.
inline f32x16 exp2(f32x16 x) {
  x = max(x, splat(-150.0f));
  const f32x16 n = round_nearest(x);
  const f32x16 f = x - n;
  f32x16 y = splat(1.5403530e-4f);
  y = fma(y, f, splat(1.3333558e-3f));
  y = fma(y, f, splat(9.6181291e-3f));
  y = fma(y, f, splat(5.5504109e-2f));
  y = fma(y, f, splat(2.4022651e-1f));
  y = fma(y, f, splat(6.9314718e-1f));
  y = fma(y, f, splat(1.0f));
  return scale_by_power(y, n);
}

inline float exp2_one(float x) { return first_lane(exp2(splat(x))); }

inline f32x16 silu(f32x16 x) { return x / (splat(1.0f) + exp2(min(x * splat(-1.44269504f), splat(126.0f)))); }

}  // namespace gf
