// Rows of activations in the form the weights want: int8 with one scale per 32 inputs, or bfloat16.
//
// int8: x ~ scale * q with scale = max|x| / 127 over the group (as llama.cpp's Q8 blocks). The group's sum of q is
// kept too: it is what turns unsigned weight codes into signed ones, and what a weight minimum is multiplied by.
#pragma once

#include <cstdint>

#include "simd.h"

namespace gf {

inline constexpr int kGroup = 32;

inline int round_up(int n, int multiple) { return (n + multiple - 1) / multiple * multiple; }

enum class Kind { kInt8, kBf16 };

// `rows` rows of `cols` values; columns are padded with zeros to whole groups.
class Activations {
 public:
  void resize(Kind kind, int rows, int cols) {
    kind_ = kind;
    cols_ = round_up(cols, kGroup);
    const size_t n = size_t(rows) * cols_;
    if (kind == Kind::kBf16) {
      bf16_.resize(n);
      return;
    }
    q_.resize(n);
    scale_.resize(n / kGroup);
    offset_.resize(n / kGroup);
    weighted_sum_.resize(n / kGroup);
  }

  int groups() const { return cols_ / kGroup; }
  const int8_t* q(int row) const { return q_.data() + size_t(row) * cols_; }
  const float* scale(int row) const { return scale_.data() + size_t(row) * groups(); }
  // -128 * sum(q): cancels the 128 that int8 weight codes are stored with.
  const int32_t* offset(int row) const { return offset_.data() + size_t(row) * groups(); }
  // scale * sum(q): what a group's weight minimum is multiplied by.
  const float* weighted_sum(int row) const { return weighted_sum_.data() + size_t(row) * groups(); }
  const uint16_t* bf16(int row) const { return bf16_.data() + size_t(row) * cols_; }

  // Stores group `g` of `row` from its 32 values.
  void put_group(int row, int g, f32x16 a, f32x16 b) {
    const size_t at = size_t(row) * cols_ + size_t(g) * kGroup;
    if (kind_ == Kind::kBf16) {
      store_bf16(&bf16_[at], a);
      store_bf16(&bf16_[at + kLanes], b);
      return;
    }
    const float largest = reduce_max(max(abs(a), abs(b)));
    const float inverse = largest > 0 ? 127.0f / largest : 0.0f;
    const i32x16 qa = round_i32(a * splat(inverse)), qb = round_i32(b * splat(inverse));
    store_i8(&q_[at], qa);
    store_i8(&q_[at + kLanes], qb);
    const int32_t sum = reduce_add(qa) + reduce_add(qb);
    const size_t group = at / kGroup;
    scale_[group] = largest / 127.0f;
    offset_[group] = -128 * sum;
    weighted_sum_[group] = scale_[group] * float(sum);
  }

  // Stores a row of `n` values (n <= cols; the rest of the last group is zero).
  void put_row(int row, const float* x, int n) {
    for (int g = 0; g < groups(); g++) {
      const int left = n - g * kGroup;
      const float* p = x + g * kGroup;
      put_group(row, g, load_up_to(p, left), load_up_to(p + kLanes, left - kLanes));
    }
  }

  // The first `n` values of a row, as the products see them.
  void restore(int row, int n, float* out) const {
    for (int i = 0; i < n; i++)
      out[i] = kind_ == Kind::kBf16 ? bf16_to_float(bf16(row)[i]) : scale(row)[i / kGroup] * float(q(row)[i]);
  }

 private:
  static f32x16 load_up_to(const float* p, int n) {
    if (n >= kLanes) return load(p);
    return n <= 0 ? splat(0.0f) : as_float(load_some(p, n * 4));
  }

  Kind kind_ = Kind::kInt8;
  int cols_ = 0;
  Buffer<int8_t> q_;
  Buffer<float> scale_, weighted_sum_;
  Buffer<int32_t> offset_;
  Buffer<uint16_t> bf16_;
};

// RMSNorm of one row into `x`'s row `to`; `buffer` holds `n` floats rounded up to a group.
inline void norm_row(const float* x, const float* weight, int n, float eps, float* buffer) {
  f32x16 sum = splat(0.0f);
  int i = 0;
  for (; i + kLanes <= n; i += kLanes) sum = fma(load(x + i), load(x + i), sum);
  float total = reduce_add(sum);
  for (; i < n; i++) total += x[i] * x[i];
  const float inverse = 1.0f / __builtin_sqrtf(total / float(n) + eps);
  for (i = 0; i + kLanes <= n; i += kLanes) store(buffer + i, load(x + i) * splat(inverse) * load(weight + i));
  for (; i < n; i++) buffer[i] = x[i] * inverse * weight[i];
}

}  // namespace gf
