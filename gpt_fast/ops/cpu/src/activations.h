// Rows of activations in the form the weights want: integers with one scale per 32 inputs, or bfloat16.
//
// Integers: x ~ scale * q, of 8 bits where it does not matter and of 16 where it does. A few inputs are far larger than
// their neighbours (Sun et al., Massive Activations, arXiv:2402.17762), and one scale for all would leave the others
// few of 8 bits' steps. Of a group's eight quads (4 inputs: what a lane of a dot product takes), the even and the odd
// one with the largest value are wide: q = 256 * high + low. The largest of the other quads' values is 127 * scale.
#pragma once

#include <cstdint>

#include "simd.h"

namespace gf {

inline constexpr int kGroup = 32;
inline constexpr int kQuad = 4;

inline int round_up(int n, int multiple) { return (n + multiple - 1) / multiple * multiple; }

enum class Kind { kInt, kBf16 };

// Of an even or an odd quad, the high bytes of q: four in the order of the inputs. place: it is quad 2 place (+ 1).
struct Wide {
  int32_t high, place;
};

// 32 inputs of a row; a line of the cache.
struct alignas(64) Group {
  int8_t low[kGroup];  // the low bytes of q
  Wide even, odd;
  int32_t offset;  // -128 * sum(q): cancels the 128 that int8 weight codes are stored with
  float scale;
  float weighted_sum;  // scale * sum(q): what a group's weight minimum is multiplied by

  int32_t q(int i) const {  // of one input
    const Wide& wide = i / kQuad % 2 ? odd : even;
    return low[i] + (i / kQuad / 2 == wide.place ? 256 * int8_t(wide.high >> (i % kQuad * 8)) : 0);
  }

  void put(f32x16 a, f32x16 b) {
    const float reach = reach_of(largest_of_quad(abs(a)), largest_of_quad(abs(b)));
    const float inverse = reach > 0 ? 127.0f / reach : 0.0f;
    const i32x16 qa = round_i32(a * splat(inverse)), qb = round_i32(b * splat(inverse));
    store_low_bytes(low, qa);
    store_low_bytes(low + kLanes, qb);
    put_high(qa, qb);
    const int32_t sum = reduce_add(qa + qb);
    offset = -128 * sum;
    scale = reach / 127.0f;
    weighted_sum = scale * float(sum);
  }

 private:
  // The value that becomes 127, of the sizes of quads 0..3 and 4..7, four lanes each. Even quads meet in each other's
  // lanes, and odd ones.
  static float reach_of(f32x16 a, f32x16 b) {
    const f32x16 high = max(a, b), low = min(a, b), high2 = swap_half_quads(high), low2 = swap_half_quads(low);
    const f32x16 first = max(high, high2), second = max(min(high, high2), max(low, low2));
    const f32x16 reach = max(second, first * splat(1.0f / 256));  // 16 bits hold 256 times 127
    return first_lane(max(reach, swap_neighbour_quads(reach)));
  }

  // The high bytes of q, all zero but in two quads; where a value is not a number, those of one of them, anything.
  void put_high(i32x16 qa, i32x16 qb) {
    alignas(32) int32_t quad[kGroup / kQuad];
    store_low_bytes(reinterpret_cast<int8_t*>(quad), shift_right<8>(qa + splat_i(128)));
    store_low_bytes(reinterpret_cast<int8_t*>(quad + 4), shift_right<8>(qb + splat_i(128)));
    even = widest(quad), odd = widest(quad + 1);
  }
  static Wide widest(const int32_t* quad) {
    return {quad[0] | quad[2] | quad[4] | quad[6], quad[2] ? 1 : quad[4] ? 2 : quad[6] ? 3 : 0};
  }
};

// `rows` rows of `cols` values; columns are padded with zeros to whole groups.
class Activations {
 public:
  void resize(Kind kind, int rows, int cols) {
    kind_ = kind;
    cols_ = round_up(cols, kGroup);
    const size_t n = size_t(rows) * cols_;
    if (kind == Kind::kBf16) bf16_.resize(n);
    else groups_.resize(n / kGroup);
  }

  int groups() const { return cols_ / kGroup; }
  const Group* row(int row) const { return groups_.data() + size_t(row) * groups(); }
  const uint16_t* bf16(int row) const { return bf16_.data() + size_t(row) * cols_; }

  // Stores group `g` of `row` from its 32 values.
  void put_group(int row, int g, f32x16 a, f32x16 b) {
    if (kind_ == Kind::kInt) return groups_[size_t(row) * groups() + g].put(a, b);
    uint16_t* to = &bf16_[size_t(row) * cols_ + size_t(g) * kGroup];
    store_bf16(to, a);
    store_bf16(to + kLanes, b);
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
    for (int i = 0; i < n; i++) {
      const int g = i / kGroup;
      if (kind_ == Kind::kBf16) out[i] = bf16_to_float(bf16(row)[i]);
      else out[i] = this->row(row)[g].scale * float(this->row(row)[g].q(i % kGroup));
    }
  }

 private:
  static f32x16 load_up_to(const float* p, int n) {
    if (n >= kLanes) return load(p);
    return n <= 0 ? splat(0.0f) : as_float(load_some(p, n * 4));
  }

  Kind kind_ = Kind::kInt;
  int cols_ = 0;
  Buffer<Group> groups_;
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
