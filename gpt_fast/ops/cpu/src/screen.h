// Which rows of a matrix can hold the largest output, told from half its bytes: an exact greedy token without the whole
// head. (Two-stage search of maximum inner products, with a bound in place of a guess.)
//
// A 4-bit copy of the matrix is multiplied in its place: w = w4 + e, so w x = w4 x + e x. Some inputs are far larger
// than the others, nearly always the same (Sun et al., Massive Activations, arXiv:2402.17762): for those, the focus, e
// is kept, and their share of e x computed. The rest of it is at most |rest of e| |rest of x| (Cauchy-Schwarz). A row
// whose bound lies below an output that is already known cannot be the largest; the others are computed as ever, so
// that the winner, and the lowest of equals, is the same as without the copy.
#pragma once

#include <algorithm>
#include <cmath>
#include <memory>
#include <utility>
#include <vector>

#include "activations.h"
#include "linear.h"

namespace gf {

// Filled in by build_screen; the order and types of fields are shared with its ctypes twin (structs.py).
struct Screen {
  Linear weights;          // kLevels; no rows: there is no screen
  const int32_t* focus;    // [focused] inputs
  int8_t* left;            // [tile][focused][16]: e of the focus, in units of its row's `unit`
  float* unit;             // [tile][16]
  float* radius;           // [tile][16]: at least |rest of e|; infinite where the row is not finite
  float* norm;             // [tile]: the largest |w| of its finite rows
  int32_t focused;
  int32_t most_rows;       // of x; more are not worth it
  float left_error;        // the most by which an entry of `left` is off
};

// At least the square root of a sum of n squares, whatever rounding took from it.
inline float norm_above(float squares, int n) { return std::sqrt(squares) * (1 + float(n + 8) * 0x1p-23f) + 1e-17f; }

// ---- Making it: a tile's rows are the lanes.

// w[i][lane]: 32 inputs of a tile's rows.
inline void unpack_group(const Linear& w, int tile, int g, float (*out)[kLanes]) {
  const size_t block = block_index(tile, w.groups()) + 2 * size_t(g);
  const uint8_t* q = w.q + block * w.block_bytes();
  for (int i = 0; i < kGroup; i++)
    for (int lane = 0; lane < kLanes; lane++) {
      if (w.format == kBf16) {
        out[i][lane] = bf16_to_float(read_as<uint16_t>(q + (i / 2 * kLanes + lane) * 4 + i % 2 * 2));
        continue;
      }
      const float scale = w.format == kInt8Row ? static_cast<const float*>(w.scale)[tile * kLanes + lane]
                                               : float(static_cast<const _Float16*>(w.scale)[block * kLanes + lane]);
      out[i][lane] = scale * float(int(q[(i / 4 * kLanes + lane) * 4 + i % 4]) - 128);
    }
}

// What the copy of a tile leaves: e of the focus, and of each row the squares of the other e and of w.
struct Leftover {
  std::vector<float> focus;  // [focused][16]
  float rest[kLanes] = {}, size[kLanes] = {};
};

// The scales of a tile's groups: the largest weight of a group becomes the first level.
inline void screen_scales(const float (*w)[kLanes], const Screen& s, int tile) {
  const int groups = s.weights.groups();
  float* row_scale = static_cast<float*>(const_cast<void*>(s.weights.scale)) + tile * kLanes;
  int8_t* group_scale = const_cast<int8_t*>(Levels::group_scales(s.weights, tile));
  for (int lane = 0; lane < kLanes; lane++) {
    std::vector<float> largest(size_t(groups), 0.0f);
    float all = 0;
    for (int i = 0; i < groups * kGroup; i++)
      if (std::abs(w[i][lane]) > std::abs(largest[i / kGroup])) largest[i / kGroup] = w[i][lane];
    for (float v : largest) all = std::max(all, std::abs(v));
    const float level = kLevel[0] - 128.0f;
    row_scale[lane] = std::isfinite(all) ? all / (127 * -level) : 0;  // else the radius will be infinite
    const float inverse = row_scale[lane] > 0 ? 1 / (level * row_scale[lane]) : 0;
    for (int g = 0; g < groups; g++)
      group_scale[g * 2 * kLanes + lane] =
          inverse == 0 ? 0 : int8_t(std::min(127.0f, std::max(-127.0f, std::nearbyint(largest[g] * inverse))));
  }
}

// The copy of a group of inputs. place: where an input is in the focus, or -1.
inline void screen_group(const float (*w)[kLanes], const Screen& s, int tile, int g, const int* place, Leftover& out) {
  const size_t block = block_index(tile, s.weights.groups()) + 2 * size_t(g);
  const float* row_scale = static_cast<const float*>(s.weights.scale) + tile * kLanes;
  const int8_t* group_scale = Levels::group_scales(s.weights, tile) + g * 2 * kLanes;
  float scale[kLanes], inverse[kLanes], between[15];
  for (int i = 0; i < 15; i++) between[i] = (kLevel[i] + kLevel[i + 1]) / 2.0f - 128;
  for (int lane = 0; lane < kLanes; lane++) {
    scale[lane] = row_scale[lane] * group_scale[lane];
    inverse[lane] = scale[lane] != 0 ? 1 / scale[lane] : 0;
  }
  uint32_t codes[kGroup / 8][kLanes] = {};
  for (int i = 0; i < kGroup; i++) {
    float error[kLanes];
    const int shift = i % 4 * 8 + i / 4 % 2 * 4;
    for (int lane = 0; lane < kLanes; lane++) {
      const float v = w[i][lane], level = v * inverse[lane];
      int32_t code = 0;
      for (int k = 0; k < 15; k++) code += level > between[k];
      codes[i / 8][lane] |= uint32_t(code) << shift;
      error[lane] = v - scale[lane] * (kLevel[code] - 128.0f);
      out.size[lane] += v * v;
    }
    const int k = place[g * kGroup + i];
    if (k >= 0) std::copy(error, error + kLanes, &out.focus[size_t(k) * kLanes]);
    for (int lane = 0; k < 0 && lane < kLanes; lane++) out.rest[lane] += error[lane] * error[lane];
  }
  std::memcpy(const_cast<uint8_t*>(s.weights.q) + block * Levels::kBlock, codes, sizeof codes);
}

inline void finish_tile(const Leftover& from, Screen& s, int tile) {
  s.norm[tile] = 0;
  for (int lane = 0; lane < kLanes; lane++) {
    float largest = 0;
    for (int k = 0; k < s.focused; k++) largest = std::max(largest, std::abs(from.focus[size_t(k) * kLanes + lane]));
    const int n = s.weights.cols;
    const float radius = norm_above(from.rest[lane], n), norm = norm_above(from.size[lane], n);
    const bool finite = std::isfinite(radius) && std::isfinite(norm);  // what follows of other rows does not matter
    const float unit = finite ? largest / 127 : 0, inverse = unit > 0 ? 1 / unit : 0;
    s.unit[tile * kLanes + lane] = unit;
    s.radius[tile * kLanes + lane] = finite ? radius : INFINITY;
    s.norm[tile] = std::max(s.norm[tile], finite ? norm : 0);
    for (int k = 0; k < s.focused; k++) {
      const float error = finite ? from.focus[size_t(k) * kLanes + lane] : 0;
      const float left = std::min(127.0f, std::max(-127.0f, std::nearbyint(error * inverse)));
      s.left[(size_t(tile) * s.focused + k) * kLanes + lane] = int8_t(left);
      s.left_error = std::max(s.left_error, std::abs(error - left * unit));
    }
  }
}

// Fills in `tiles` tiles of s, whose arrays have their sizes and whose focus is chosen, and raises its one figure.
inline void build_screen(const Linear& w, Screen& s, int tile, int tiles) {
  std::vector<int> place(size_t(w.groups()) * kGroup, -1);
  for (int k = 0; k < s.focused; k++) place[s.focus[k]] = k;
  const std::unique_ptr<float[][kLanes]> inputs(new float[size_t(w.groups()) * kGroup][kLanes]);
  for (const int end = tile + tiles; tile < end; tile++) {
    Leftover leftover{std::vector<float>(size_t(s.focused) * kLanes)};
    for (int g = 0; g < w.groups(); g++) unpack_group(w, tile, g, &inputs[g * kGroup]);
    screen_scales(inputs.get(), s, tile);
    for (int g = 0; g < w.groups(); g++) screen_group(&inputs[g * kGroup], s, tile, g, place.data(), leftover);
    finish_tile(leftover, s, tile);
  }
}

// ---- Using it.

// What the bounds of all rows have of one x.
struct Glance {
  std::vector<float> focus;  // [focused]: x there
  float rest;                // |x| elsewhere
  float gap;                 // a row's |w| times this, and
  float slack;               // this, are what rounding may do

  // exact: x as the matrix's own product sees it; coarse: as the copy's does, overwritten; both dequantized, [n].
  void take(const Screen& s, const float* exact, float* coarse, int n) {
    float size = 0, apart = 0, focused = 0, other = 0;
    for (int i = 0; i < n; i++) size += coarse[i] * coarse[i];
    for (int i = 0; i < n; i++) apart += (exact[i] - coarse[i]) * (exact[i] - coarse[i]);
    focus.resize(size_t(s.focused));
    for (int k = 0; k < s.focused; k++) {
      focus[k] = std::exchange(coarse[s.focus[k]], 0.0f);
      focused += std::abs(focus[k]);
    }
    for (int i = 0; i < n; i++) other += coarse[i] * coarse[i];
    rest = norm_above(other, n);  // never 0: an infinite radius times it must be infinite
    // Each of the two products is a sum of n terms, rounded as often; |w4| is at most |w| + |e|.
    gap = 3 * float(n + 64) * 0x1p-23f * norm_above(size, n) + norm_above(apart, n);
    slack = s.left_error * focused * 1.0001f;
  }
};

template <int R>
void estimate_rows(const Screen& s, int tile, const Glance* x, float* product, int stride) {
  const int8_t* left = s.left + size_t(tile) * s.focused * kLanes;
  const float* focus[R];
  f32x16 sum[R];
  GF_UNROLL
  for (int r = 0; r < R; r++) focus[r] = x[r].focus.data(), sum[r] = splat(0.0f);
  for (int k = 0; k < s.focused; k++) {
    const f32x16 e = load_i8(left + k * kLanes);
    GF_UNROLL
    for (int r = 0; r < R; r++) sum[r] = fma(e, splat(focus[r][k]), sum[r]);
  }
  const f32x16 unit = load(s.unit + tile * kLanes);
  GF_UNROLL
  for (int r = 0; r < R; r++) store(product + r * stride, fma(sum[r], unit, load(product + r * stride)));
}

// The outputs of a tile as copy and focus have them, in place of the copy's products of `rows` x.
inline void estimate(const Screen& s, int tile, const Glance* x, int rows, float* product, int stride) {
  for (; rows >= 4; rows -= 4, x += 4, product += 4 * stride) estimate_rows<4>(s, tile, x, product, stride);
  for (; rows >= 2; rows -= 2, x += 2, product += 2 * stride) estimate_rows<2>(s, tile, x, product, stride);
  if (rows) estimate_rows<1>(s, tile, x, product, stride);
}

// At most so far above the estimates lie the outputs.
inline f32x16 margin(const Screen& s, int tile, const Glance& x) {
  return fma(load(s.radius + tile * kLanes), splat(x.rest), splat(s.norm[tile] * x.gap + x.slack));
}

}  // namespace gf
