// Making a screen (screen.h): the 4-bit copy of a matrix and what it leaves. A tile's rows are the lanes.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>
#include <memory>
#include <vector>

#include "linear.h"
#include "screen.h"

namespace gf {

// Where a copy's codes and scales are written: the memory that Screen::weights reads.
struct ScreenMemory {
  uint8_t* q;
  float* row_scale;
  int8_t* group_scale;

  static ScreenMemory of(const Linear& weights, uint8_t* q, void* scale) {
    float* rows = static_cast<float*>(scale);
    return {q, rows, reinterpret_cast<int8_t*>(rows + size_t(weights.tiles()) * kLanes)};
  }
};

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
                                               : float(static_cast<const float16*>(w.scale)[block * kLanes + lane]);
      out[i][lane] = scale * float(int(q[(i / 4 * kLanes + lane) * 4 + i % 4]) - 128);
    }
}

// What the copy of a tile leaves: e of the outliers, and of each row the squares of the other e and of w.
struct TileErrors {
  std::vector<float> outliers;  // [outlier_count][16]
  float rest[kLanes] = {}, size[kLanes] = {};
};

// The scales of a tile's groups: the largest weight of a group becomes the first level.
inline void write_scales(const float (*w)[kLanes], int tile, int groups, const ScreenMemory& memory) {
  float* row_scale = memory.row_scale + tile * kLanes;
  int8_t* group_scale = memory.group_scale + block_index(tile, groups) * kLanes;
  for (int lane = 0; lane < kLanes; lane++) {
    std::vector<float> largest(size_t(groups), 0.0f);
    float all = 0;
    for (int i = 0; i < groups * kGroup; i++)
      if (std::abs(w[i][lane]) > std::abs(largest[i / kGroup])) largest[i / kGroup] = w[i][lane];
    for (float v : largest) all = std::max(all, std::abs(v));
    const float level = kLevel[0] - 128.0f;
    row_scale[lane] = std::isfinite(all) ? all / (127 * -level) : 0;  // else the error norm will be infinite
    const float inverse = row_scale[lane] > 0 ? 1 / (level * row_scale[lane]) : 0;
    for (int g = 0; g < groups; g++)
      group_scale[g * 2 * kLanes + lane] =
          inverse == 0 ? 0 : int8_t(std::min(127.0f, std::max(-127.0f, std::nearbyint(largest[g] * inverse))));
  }
}

// The codes of a group of inputs, once its scales are written. outlier: an input's place among them, or -1.
inline void write_codes(const float (*w)[kLanes], int tile, int groups, int g, const int* outlier,
                        const ScreenMemory& memory, TileErrors& out) {
  const size_t block = block_index(tile, groups) + 2 * size_t(g);
  const float* row_scale = memory.row_scale + tile * kLanes;
  const int8_t* group_scale = memory.group_scale + block * kLanes;
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
    const int k = outlier[g * kGroup + i];
    if (k >= 0) std::copy(error, error + kLanes, &out.outliers[size_t(k) * kLanes]);
    for (int lane = 0; k < 0 && lane < kLanes; lane++) out.rest[lane] += error[lane] * error[lane];
  }
  std::memcpy(memory.q + block * Levels::kBlock, codes, sizeof codes);
}

inline void write_errors(const TileErrors& from, Screen& s, int tile) {
  s.weight_norm[tile] = 0;
  for (int lane = 0; lane < kLanes; lane++) {
    float largest = 0;
    for (int k = 0; k < s.outlier_count; k++)
      largest = std::max(largest, std::abs(from.outliers[size_t(k) * kLanes + lane]));
    const int n = s.weights.cols;
    const float error_norm = norm_above(from.rest[lane], n), weight_norm = norm_above(from.size[lane], n);
    const bool finite = std::isfinite(error_norm) && std::isfinite(weight_norm);  // else no bound rules the row out
    const float scale = finite ? largest / 127 : 0, inverse = scale > 0 ? 1 / scale : 0;
    s.error_scale[tile * kLanes + lane] = scale;
    s.error_norm[tile * kLanes + lane] = finite ? error_norm : INFINITY;
    s.weight_norm[tile] = std::max(s.weight_norm[tile], finite ? weight_norm : 0);
    for (int k = 0; k < s.outlier_count; k++) {
      const float error = finite ? from.outliers[size_t(k) * kLanes + lane] : 0;
      const float code = std::min(127.0f, std::max(-127.0f, std::nearbyint(error * inverse)));
      s.outlier_error[(size_t(tile) * s.outlier_count + k) * kLanes + lane] = int8_t(code);
      s.outlier_rounding = std::max(s.outlier_rounding, std::abs(error - code * scale));
    }
  }
}

// Fills in `tiles` tiles of s and of its copy's memory, and raises s.outlier_rounding. All else of s is set.
inline void build_screen(const Linear& w, Screen& s, const ScreenMemory& memory, int tile, int tiles) {
  const int groups = w.groups();
  std::vector<int> outlier(size_t(groups) * kGroup, -1);
  for (int k = 0; k < s.outlier_count; k++) outlier[s.outliers[k]] = k;
  const std::unique_ptr<float[][kLanes]> inputs(new float[size_t(groups) * kGroup][kLanes]);
  for (const int end = tile + tiles; tile < end; tile++) {
    TileErrors errors{std::vector<float>(size_t(s.outlier_count) * kLanes)};
    for (int g = 0; g < groups; g++) unpack_group(w, tile, g, &inputs[g * kGroup]);
    write_scales(inputs.get(), tile, groups, memory);
    for (int g = 0; g < groups; g++) write_codes(&inputs[g * kGroup], tile, groups, g, outlier.data(), memory, errors);
    write_errors(errors, s, tile);
  }
}

}  // namespace gf
