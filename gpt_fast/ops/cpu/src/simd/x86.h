// What every x86 instruction set shares: fetching ahead, and waiting without taking the core from its other thread.
#pragma once

#include <immintrin.h>

#include "../tuning.h"

namespace gf {

using float16 = _Float16;

// As assembly: gcc takes a function of nothing but prefetches for one without effect, and drops it.
template <Hint kHint>
inline void prefetch(const void* p) {
  const char& line = *static_cast<const char*>(p);
  if constexpr (kHint == kToL1) asm volatile("prefetcht0 %0" : : "m"(line));
  if constexpr (kHint == kToL2) asm volatile("prefetcht1 %0" : : "m"(line));
  if constexpr (kHint == kOnce) asm volatile("prefetchnta %0" : : "m"(line));
}

inline void pause() { _mm_pause(); }

}  // namespace gf
