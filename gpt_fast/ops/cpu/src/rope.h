// Rotary position embedding of one head.
#pragma once

#include "simd.h"

namespace gf {

// Rotates the first rotary_dim of x, in neighbouring pairs. table: [positions][2][rotary_dim / 2], cos and sin.
inline void rotate(float* x, const float* table, int rotary_dim, int position) {
  const int pairs = rotary_dim / 2;
  const float* cos = table + size_t(position) * rotary_dim;
  const float* sin = cos + pairs;
  int i = 0;
  for (; i + 8 <= pairs; i += 8)
    store(x + 2 * i, rotate_pairs(load(x + 2 * i), load_twice(cos + i), load_twice(sin + i)));
  for (; i < pairs; i++) {
    const float even = x[2 * i], odd = x[2 * i + 1];
    x[2 * i] = even * cos[i] - odd * sin[i];
    x[2 * i + 1] = odd * cos[i] + even * sin[i];
  }
}

}  // namespace gf
