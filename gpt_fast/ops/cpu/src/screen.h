// Which rows of a matrix can hold the largest output, told from half its bytes: an exact greedy token without the whole
// head. (Two-stage search of maximum inner products, with a proven bound in place of an approximate first stage.)
//
// A 4-bit copy of the matrix is multiplied in its place: w = w4 + e, so w x = w4 x + e x. Some inputs are far larger
// than the others, nearly always the same (Sun et al., Massive Activations, arXiv:2402.17762): for those, the outliers,
// e is kept, and their share of e x computed. The rest of it is at most |rest of e| |rest of x| (Cauchy-Schwarz). A row
// whose upper bound lies below an output that is already known cannot be the largest; the others, the candidates, are
// computed as without the copy, so that the winner, and the lowest of equals, is the same.
#pragma once

#include <algorithm>
#include <cmath>
#include <utility>
#include <vector>

#include "activations.h"
#include "linear.h"

namespace gf {

// Filled in by screen_build.h; the order and types of fields are shared with its ctypes twin (structs.py).
struct Screen {
  Linear weights;           // kLevels; no rows: there is no screen
  const int32_t* outliers;  // [outlier_count] inputs
  int8_t* outlier_error;    // [tile][outlier_count][16]: e of the outliers, in units of its row's `error_scale`
  float* error_scale;       // [tile][16]
  float* error_norm;        // [tile][16]: at least |rest of e|; infinite where the row is not finite
  float* weight_norm;       // [tile]: the largest |w| of its finite rows
  int32_t outlier_count;
  int32_t max_rows;        // of x; screening more costs more than it saves
  float outlier_rounding;  // the most by which an outlier's error is off
};

// At least the square root of a sum of n squares, whatever rounding took from it.
inline float norm_above(float squares, int n) { return std::sqrt(squares) * (1 + float(n + 8) * 0x1p-23f) + 1e-17f; }

// One x, as the bounds of all rows need it. Rounding moves an output by at most |w| relative_rounding + rounding.
struct ScreenInput {
  std::vector<float> outliers;  // [outlier_count]: x there
  float rest_norm;              // |x| elsewhere
  float relative_rounding;
  float rounding;

  // exact: x as the matrix's own product sees it; coarse: as the copy's does, overwritten; both dequantized, [n].
  void set(const Screen& s, const float* exact, float* coarse, int n) {
    float size = 0, apart = 0, outlier_size = 0, rest = 0;
    for (int i = 0; i < n; i++) size += coarse[i] * coarse[i];
    for (int i = 0; i < n; i++) apart += (exact[i] - coarse[i]) * (exact[i] - coarse[i]);
    outliers.resize(size_t(s.outlier_count));
    for (int k = 0; k < s.outlier_count; k++) {
      outliers[k] = std::exchange(coarse[s.outliers[k]], 0.0f);
      outlier_size += std::abs(outliers[k]);
    }
    for (int i = 0; i < n; i++) rest += coarse[i] * coarse[i];
    rest_norm = norm_above(rest, n);  // never 0: an infinite error norm times it must be infinite
    // Each of the two products is a sum of n terms, rounded as often; |w4| is at most |w| + |e|.
    relative_rounding = 3 * float(n + 64) * 0x1p-23f * norm_above(size, n) + norm_above(apart, n);
    rounding = s.outlier_rounding * outlier_size * 1.0001f;
  }
};

template <int R>
void estimate_rows(const Screen& s, int tile, const ScreenInput* x, float* product, int stride) {
  const int8_t* error = s.outlier_error + size_t(tile) * s.outlier_count * kLanes;
  const float* outliers[R];
  f32x16 sum[R];
  GF_UNROLL
  for (int r = 0; r < R; r++) outliers[r] = x[r].outliers.data(), sum[r] = splat(0.0f);
  for (int k = 0; k < s.outlier_count; k++) {
    const f32x16 e = load_i8(error + k * kLanes);
    GF_UNROLL
    for (int r = 0; r < R; r++) sum[r] = fma(e, splat(outliers[r][k]), sum[r]);
  }
  const f32x16 scale = load(s.error_scale + tile * kLanes);
  GF_UNROLL
  for (int r = 0; r < R; r++) store(product + r * stride, fma(sum[r], scale, load(product + r * stride)));
}

// Adds the outliers' errors to the copy's products of `rows` x with a tile: the estimates of its outputs.
inline void estimate(const Screen& s, int tile, const ScreenInput* x, int rows, float* product, int stride) {
  for (; rows >= 4; rows -= 4, x += 4, product += 4 * stride) estimate_rows<4>(s, tile, x, product, stride);
  for (; rows >= 2; rows -= 2, x += 2, product += 2 * stride) estimate_rows<2>(s, tile, x, product, stride);
  if (rows) estimate_rows<1>(s, tile, x, product, stride);
}

// How far the outputs may lie from the estimates.
inline f32x16 margin(const Screen& s, int tile, const ScreenInput& x) {
  return fma(load(s.error_norm + tile * kLanes), splat(x.rest_norm),
             splat(s.weight_norm[tile] * x.relative_rounding + x.rounding));
}

}  // namespace gf
