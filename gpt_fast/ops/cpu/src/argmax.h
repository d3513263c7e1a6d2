// The largest of a row's logits: found in pieces, by whichever thread computes them, and merged.
#pragma once

#include <algorithm>
#include <cmath>

#include "simd.h"

namespace gf {

// The largest of some logits and its index, the lowest of equals. nan: 0, or NaN where one of them is.
struct Best {
  float value = -INFINITY, nan = 0;
  int index = -1;
};

// Up to 32 logits, whose indices begin at `first`.
inline void update(Best& best, const float* logits, int first, int n) {
  f32x16 top = splat(-INFINITY), nan = splat(0.0f);
  for (int i = 0; i < n; i += kLanes) {
    const f32x16 v = keep_range(load(logits + i), 0, n - i);
    top = max(top, v);
    nan = fma(max(splat(-3e38f), v), splat(0.0f), nan);  // the maximum of a number and NaN is the second
  }
  const float value = reduce_max(top);
  best.nan += reduce_add(nan);
  if (value > best.value) best.value = value, best.index = first + int(std::find(logits, logits + n, value) - logits);
}

// `next` has higher indices.
inline void merge(Best& best, const Best& next) {
  best.nan += next.nan;
  if (next.value > best.value) best.value = next.value, best.index = next.index;
}

}  // namespace gf
