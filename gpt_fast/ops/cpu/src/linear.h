// y = W x for packed weights and a few or many rows of x.
//
// Weights lie in tiles of 16 output rows. Within a tile, a 64-byte vector holds 4 consecutive inputs of each of the
// 16 rows (2 inputs in bfloat16), so one load feeds one dot-product instruction and lane i belongs to row i: no
// horizontal sums. Two neighbouring tiles take turns, 32 inputs each, so that the kernel that multiplies both reads one
// contiguous stream. A block of MR rows of x times NR tiles stays in registers; a loaded weight vector serves MR rows.
//
// Each output is the same sequence of float operations whatever MR and NR are (integer sums are exact, groups are
// added in order), so a row's result does not depend on what it is batched with.
#pragma once

#include <algorithm>
#include <cstdint>

#include "activations.h"
#include "simd.h"
#include "tuning.h"

namespace gf {

enum Format : int32_t { kInt8Row = 0, kInt8Group = 1, kInt4 = 2, kBf16 = 3, kLevels = 4 };

// Filled in by Python (pack.py); the order and types of fields are shared with its ctypes twin.
struct Linear {
  int32_t format;
  int32_t rows;       // outputs
  int32_t cols;       // inputs
  int32_t group;      // inputs that share a scale (kInt4: 32, 64, 128 or 256)
  const uint8_t* q;   // [tile / 2][cols/32][tile % 2] blocks
  const void* scale;  // kInt8Row: float [rows]; kInt8Group: half [tile / 2][cols/32][tile % 2][16];
                      // kInt4: half [tile / 2][cols/group][tile % 2][scale, minimum][16]
                      // kLevels: float [16 tiles()], then int8 [tile / 2][cols/32][tile % 2][16]
  const float* bias;  // float [rows], or null; rows are padded to whole pairs of tiles everywhere

  int tiles() const { return (rows + 2 * kLanes - 1) / (2 * kLanes) * 2; }
  int groups() const { return (cols + kGroup - 1) / kGroup; }
  int scale_groups() const { return (cols + group - 1) / group; }
  int block_bytes() const { return format == kInt4 || format == kLevels ? 256 : format == kBf16 ? 1024 : 512; }
  size_t pair_bytes() const { return size_t(2) * groups() * block_bytes(); }
  const uint8_t* pair(int tile) const { return q + tile / 2 * pair_bytes(); }
};

// What a block of rows prefetches while it computes. A single block streams its weights once: it prefetches a little
// ahead, by the hint and the distance that its processor is best with (tuning.h). Several blocks over the same tiles
// find them in the cache after the first: each prefetches its share of the lines of the next pair of tiles, because
// otherwise only the first block would wait for memory.
struct Prefetch {
  ptrdiff_t distance;  // bytes from the line that is read to the first line to prefetch
  ptrdiff_t stride;    // several blocks: bytes from one prefetched line to the next
  const uint8_t* end;  // a single block: one past the last weight byte of this stream
  ptrdiff_t jump;      // a single block: added to prefetch addresses from `end` on, to reach the next stream
  int32_t hint;        // a single block: the Hint

  static Prefetch single(const Fetch& fetch, const uint8_t* end, const uint8_t* next) {
    return {fetch.distance, 0, end, next - end, fetch.hint};
  }
  static Prefetch shared(ptrdiff_t distance, int block, int blocks) {
    return {distance + 64 * block, 64 * ptrdiff_t(blocks), nullptr, 0, kToL2};
  }
};

// The loop is not unrolled, because so many prefetches at once would hold up the loads after them.
template <Hint kHint>
inline void fetch_lines(const uint8_t* at, int bytes) {
#pragma GCC unroll 1
  for (const uint8_t* end = at + bytes; at < end; at += 64) prefetch<kHint>(at);
}

inline void fetch_lines(int32_t hint, const uint8_t* at, int bytes) {
  switch (hint) {
    case kToL1: return fetch_lines<kToL1>(at, bytes);
    case kToL2: return fetch_lines<kToL2>(at, bytes);
    case kOnce: return fetch_lines<kOnce>(at, bytes);
    default: return;
  }
}

template <bool kShare, int kBytes>
inline void fetch_ahead(const uint8_t* q, const Prefetch& ahead) {
  const uint8_t* at = q + ahead.distance;
  if constexpr (kShare) {
    GF_UNROLL
    for (int i = 0; i < kBytes / 128; i++) prefetch<kToL2>(at + i * ahead.stride);
  } else {
    if (at >= ahead.end) at += ahead.jump;
    fetch_lines(ahead.hint, at, kBytes);
  }
}

// Where a tile's first block lies when pairs of tiles take turns; its next one is two further.
inline size_t block_index(int tile, int groups) { return size_t(tile / 2) * groups * 2 + tile % 2; }

// One class a format: the bytes of a block (16 outputs x 32 inputs), how its vectors are read, and how a block's
// integer sum enters the float sum. fetch_scales: a little ahead for a single block, else of the next pair of tiles.
struct Int8Row {
  static constexpr int kBlock = 512;
  const uint8_t* q;
  const float* row_scale;

  Int8Row(const Linear& w, int tile)
      : q(w.q + block_index(tile, w.groups()) * kBlock),
        row_scale(static_cast<const float*>(w.scale) + tile * kLanes) {}
  static int32_t start(const Activations& x, int row, int g) { return x.offset(row)[g]; }
  void vectors(int j, i32x16& a, i32x16& b) const { a = load_i(q + 128 * j), b = load_i(q + 128 * j + 64); }
  template <bool kShare>
  void fetch_scales(int, const Prefetch&) const {}
  void load_scales(int) {}
  f32x16 add(f32x16 sum, i32x16 block, const Activations& x, int row, int g) const {
    return fma(to_float(block), splat(x.scale(row)[g]), sum);
  }
  f32x16 finish(f32x16 sum) const { return sum * load(row_scale); }
};

struct Int8Group {
  static constexpr int kBlock = 512;
  const uint8_t* q;
  const uint16_t* half;
  int groups;
  f32x16 scale;

  Int8Group(const Linear& w, int tile)
      : q(w.q + block_index(tile, w.groups()) * kBlock),
        half(static_cast<const uint16_t*>(w.scale) + block_index(tile, w.groups()) * kLanes),
        groups(w.groups()) {}
  static int32_t start(const Activations& x, int row, int g) { return x.offset(row)[g]; }
  void vectors(int j, i32x16& a, i32x16& b) const { a = load_i(q + 128 * j), b = load_i(q + 128 * j + 64); }
  // A single block gains nothing by it: scales are a sixteenth of what it reads.
  template <bool kShare>
  void fetch_scales(int g, const Prefetch&) const {
    if constexpr (kShare) prefetch<kToL2>(half + (g + groups) * 2 * kLanes);
  }
  void load_scales(int g) { scale = load_f16(half + g * 2 * kLanes); }
  f32x16 add(f32x16 sum, i32x16 block, const Activations& x, int row, int g) const {
    return fma(to_float(block), scale * splat(x.scale(row)[g]), sum);
  }
  f32x16 finish(f32x16 sum) const { return sum; }
};

// w = scale * q + minimum with q in 0..15: the minimum meets the group's sum of activations.
struct Int4 {
  static constexpr int kBlock = 256;
  const uint8_t* q;
  const uint16_t* half;
  int blocks_per_scale, groups;
  f32x16 scale, minimum;

  Int4(const Linear& w, int tile)
      : q(w.q + block_index(tile, w.groups()) * kBlock),
        half(static_cast<const uint16_t*>(w.scale) + block_index(tile, w.scale_groups()) * 2 * kLanes),
        blocks_per_scale(w.group / kGroup),
        groups(w.groups()) {}
  static int32_t start(const Activations&, int, int) { return 0; }
  void vectors(int j, i32x16& a, i32x16& b) const {
    const i32x16 both = load_i(q + 64 * j);
    a = low_nibbles(both), b = high_nibbles(both);
  }
  const uint16_t* scales(int g) const { return half + g / blocks_per_scale * (4 * kLanes); }
  template <bool kShare>
  void fetch_scales(int g, const Prefetch& ahead) const {
    if constexpr (kShare) prefetch<kToL2>(scales(g + groups));
    else fetch_lines(ahead.hint, reinterpret_cast<const uint8_t*>(scales(g + int(ahead.distance) / (2 * kBlock))), 64);
  }
  void load_scales(int g) { scale = load_f16(scales(g)), minimum = load_f16(scales(g) + kLanes); }
  f32x16 add(f32x16 sum, i32x16 block, const Activations& x, int row, int g) const {
    sum = fma(to_float(block), scale * splat(x.scale(row)[g]), sum);
    return fma(minimum, splat(x.weighted_sum(row)[g]), sum);
  }
  f32x16 finish(f32x16 sum) const { return sum; }
};

// w = row scale * group scale * level[q]: a code names one of 16 levels, closer together about zero as weights are.
// The levels are those of llama.cpp's IQ4_NL, here plus 128.
inline constexpr uint8_t kLevel[16] = {1, 24, 45, 63, 79, 93, 106, 118, 129, 141, 153, 166, 181, 197, 217, 241};

struct Levels {
  static constexpr int kBlock = 256;
  const uint8_t* q;
  const float* row_scale;
  const int8_t* group_scale;
  f32x16 scale;

  Levels(const Linear& w, int tile)
      : q(w.q + block_index(tile, w.groups()) * kBlock),
        row_scale(static_cast<const float*>(w.scale) + tile * kLanes),
        group_scale(group_scales(w, tile)) {}
  static const int8_t* group_scales(const Linear& w, int tile) {
    const auto* after = static_cast<const float*>(w.scale) + size_t(w.tiles()) * kLanes;
    return reinterpret_cast<const int8_t*>(after) + block_index(tile, w.groups()) * kLanes;
  }
  static int32_t start(const Activations& x, int row, int g) { return x.offset(row)[g]; }
  void vectors(int j, i32x16& a, i32x16& b) const {
    const i32x16 both = load_i(q + 64 * j);
    a = look_up(kLevel, low_nibbles(both)), b = look_up(kLevel, high_nibbles(both));
  }
  template <bool kShare>
  void fetch_scales(int, const Prefetch&) const {}
  void load_scales(int g) { scale = load_i8(group_scale + g * 2 * kLanes); }
  f32x16 add(f32x16 sum, i32x16 block, const Activations& x, int row, int g) const {
    return fma(to_float(block), scale * splat(x.scale(row)[g]), sum);
  }
  f32x16 finish(f32x16 sum) const { return sum * load(row_scale); }
};

// Products of `MR` rows of x (from `row`) with `NR` tiles: out[m * stride + 16 n + lane]. One tile at a time reads the
// weights in the order in which they lie; both at once load each input once.
template <class W, int MR, int NR, bool kShare, int kAtOnce>
void multiply_int8(W (&w)[NR], int groups, const Activations& x, int row, float* out, int stride,
                   const Prefetch& ahead) {
  f32x16 sum[MR][NR];
  GF_UNROLL
  for (int m = 0; m < MR; m++) {
    GF_UNROLL
    for (int n = 0; n < NR; n++) sum[m][n] = splat(0.0f);
  }
  const int8_t* xq[MR];
  GF_UNROLL
  for (int m = 0; m < MR; m++) xq[m] = x.q(row + m);
  for (int g = 0; g < groups; g++) {
    GF_UNROLL
    for (int first = 0; first < NR; first += kAtOnce) {
      i32x16 block[MR][kAtOnce];
      GF_UNROLL
      for (int m = 0; m < MR; m++) {
        GF_UNROLL
        for (int n = 0; n < kAtOnce; n++) block[m][n] = splat_i(W::start(x, row + m, g));
      }
      GF_UNROLL
      for (int j = 0; j < 4; j++) {
        i32x16 a[kAtOnce], b[kAtOnce];
        GF_UNROLL
        for (int n = 0; n < kAtOnce; n++) w[first + n].vectors(j, a[n], b[n]);
        GF_UNROLL
        for (int m = 0; m < MR; m++) {
          const i32x16 xa = splat_i(read_as<int32_t>(xq[m] + 8 * j));
          GF_UNROLL
          for (int n = 0; n < kAtOnce; n++) block[m][n] = dot4(block[m][n], a[n], xa);
          const i32x16 xb = splat_i(read_as<int32_t>(xq[m] + 8 * j + 4));
          GF_UNROLL
          for (int n = 0; n < kAtOnce; n++) block[m][n] = dot4(block[m][n], b[n], xb);
        }
      }
      GF_UNROLL
      for (int n = 0; n < kAtOnce; n++) {
        W& tile = w[first + n];
        fetch_ahead<kShare, W::kBlock>(tile.q, ahead);
        tile.template fetch_scales<kShare>(g, ahead);
        tile.load_scales(g);
        GF_UNROLL
        for (int m = 0; m < MR; m++) sum[m][first + n] = tile.add(sum[m][first + n], block[m][n], x, row + m, g);
        tile.q += 2 * W::kBlock;
      }
    }
    GF_UNROLL
    for (int m = 0; m < MR; m++) xq[m] += kGroup;
  }
  GF_UNROLL
  for (int m = 0; m < MR; m++) {
    GF_UNROLL
    for (int n = 0; n < NR; n++) store(out + m * stride + n * kLanes, w[n].finish(sum[m][n]));
  }
}

struct Bf16 {
  static constexpr int kBlock = 1024;
  const uint8_t* q;

  Bf16(const Linear& w, int tile) : q(w.q + block_index(tile, w.groups()) * kBlock) {}
};

template <class W, int MR, int NR, bool kShare>
void multiply_bf16(W (&w)[NR], int groups, const Activations& x, int row, float* out, int stride,
                   const Prefetch& ahead) {
  f32x16 sum[MR][NR];
  GF_UNROLL
  for (int m = 0; m < MR; m++) {
    GF_UNROLL
    for (int n = 0; n < NR; n++) sum[m][n] = splat(0.0f);
  }
  const uint16_t* xb[MR];
  GF_UNROLL
  for (int m = 0; m < MR; m++) xb[m] = x.bf16(row + m);
  for (int g = 0; g < groups; g++) {
    GF_UNROLL
    for (int j = 0; j < kGroup / 2; j++) {
      i32x16 pair[NR];
      GF_UNROLL
      for (int n = 0; n < NR; n++) pair[n] = load_i(w[n].q + 64 * j);
      GF_UNROLL
      for (int m = 0; m < MR; m++) {
        const i32x16 xa = splat_i(read_as<int32_t>(xb[m] + 2 * j));
        GF_UNROLL
        for (int n = 0; n < NR; n++) sum[m][n] = dot2_bf16(sum[m][n], pair[n], xa);
      }
    }
    GF_UNROLL
    for (int n = 0; n < NR; n++) {
      if (kShare) fetch_ahead<kShare, W::kBlock>(w[n].q, ahead);
      else if (n == 0) fetch_ahead<kShare, NR * W::kBlock>(w[n].q, ahead);  // of both tiles, which take turns
      w[n].q += 2 * W::kBlock;
    }
    GF_UNROLL
    for (int m = 0; m < MR; m++) xb[m] += kGroup;
  }
  GF_UNROLL
  for (int m = 0; m < MR; m++) {
    GF_UNROLL
    for (int n = 0; n < NR; n++) store(out + m * stride + n * kLanes, sum[m][n]);
  }
}

template <class W, int MR, int NR, bool kShare, int kAtOnce>
void multiply_block(const Linear& w, int tile, const Activations& x, int row, float* out, int stride,
                    const Prefetch& ahead) {
  const auto run = [&](auto... offset) {
    W at[NR] = {W(w, tile + offset)...};
    if constexpr (W::kBlock == Bf16::kBlock)
      multiply_bf16<W, MR, NR, kShare>(at, w.groups(), x, row, out, stride, ahead);
    else multiply_int8<W, MR, NR, kShare, kAtOnce>(at, w.groups(), x, row, out, stride, ahead);
  };
  if constexpr (NR == 1) run(0);
  else run(0, 1);
}

// The most rows to a block. With 32 registers, two tiles of six rows need 12 integer and 12 float sums; bfloat16 has
// float sums only.
template <class W>
inline constexpr int kWideRowBlock = W::kBlock == Bf16::kBlock ? 8 : 6;
template <class W>
inline constexpr int kMaxRowBlock = kVectorRegisters < 32 ? 2 : kWideRowBlock<W>;

// `rows` (at most MR) as one block; with kShare, one of several.
template <class W, int NR, bool kShare, int kAtOnce, int MR = kMaxRowBlock<W>>
void multiply_some_rows(const Linear& w, int tile, const Activations& x, int row, int rows, float* out, int stride,
                        const Prefetch& ahead) {
  if (rows == MR) return multiply_block<W, MR, NR, kShare, kAtOnce>(w, tile, x, row, out, stride, ahead);
  if constexpr (MR > 1) multiply_some_rows<W, NR, kShare, kAtOnce, MR - 1>(w, tile, x, row, rows, out, stride, ahead);
}

// Any number of rows, in blocks as even as `tuning` and kMaxRowBlock allow (13 = 5 + 4 + 4).
template <class W, int NR>
void multiply_rows(const Linear& w, int tile, const Activations& x, int row, int rows, float* out, int stride,
                   const uint8_t* next, const Tuning& tuning) {
  constexpr ptrdiff_t kFarthest = 64 * 1024;  // what two pairs may take of the level 2 cache
  const int most = std::min(kMaxRowBlock<W>, std::max(1, int(tuning.row_block)));
  const int blocks = (rows + most - 1) / most;
  if (blocks == 1) {
    const Fetch& fetch = rows == 1 ? tuning.one_row : tuning.few_rows;
    const auto ahead = Prefetch::single(fetch, w.pair(tile + 2), next);
    if (rows == 1 && tuning.both_tiles)
      return multiply_some_rows<W, NR, false, NR>(w, tile, x, row, rows, out, stride, ahead);
    return multiply_some_rows<W, NR, false, 1>(w, tile, x, row, rows, out, stride, ahead);
  }
  const ptrdiff_t distance = ptrdiff_t(w.pair_bytes()) > kFarthest ? kFarthest : next - w.pair(tile);
  for (int block = 0; block < blocks; block++) {
    const int now = (rows + blocks - block - 1) / (blocks - block);
    multiply_some_rows<W, NR, true, NR>(w, tile, x, row, now, out, stride, Prefetch::shared(distance, block, blocks));
    row += now, rows -= now, out += size_t(now) * stride;
  }
}

template <class W>
void multiply_tiles(const Linear& w, int tile, int tiles, const Activations& x, int row, int rows, float* out,
                    int stride, const uint8_t* next, const Tuning& tuning) {
  while (tiles > 0) {
    const int now = tile % 2 || tiles == 1 ? 1 : 2;
    const uint8_t* following = tiles == now ? next : w.pair(tile + now);
    if (now == 2) multiply_rows<W, 2>(w, tile, x, row, rows, out, stride, following, tuning);
    else multiply_rows<W, 1>(w, tile, x, row, rows, out, stride, following, tuning);
    tiles -= now, tile += now, out += now * kLanes;
  }
}

// out[r * stride + 16 t + lane] = output 16 (tile + t) + lane of x's row (row + r), bias included. `next` is where the
// weights begin that are wanted afterwards. `tuning` changes the time it takes and nothing else.
inline void multiply(const Linear& w, int tile, int tiles, const Activations& x, int row, int rows, float* out,
                     int stride, const uint8_t* next, const Tuning& tuning) {
  switch (w.format) {
    case kInt8Row: multiply_tiles<Int8Row>(w, tile, tiles, x, row, rows, out, stride, next, tuning); break;
    case kInt8Group: multiply_tiles<Int8Group>(w, tile, tiles, x, row, rows, out, stride, next, tuning); break;
    case kInt4: multiply_tiles<Int4>(w, tile, tiles, x, row, rows, out, stride, next, tuning); break;
    case kLevels: multiply_tiles<Levels>(w, tile, tiles, x, row, rows, out, stride, next, tuning); break;
    default: multiply_tiles<Bf16>(w, tile, tiles, x, row, rows, out, stride, next, tuning); break;
  }
  if (w.bias == nullptr) return;
  for (int r = 0; r < rows; r++)
    for (int i = 0; i < tiles * kLanes; i += kLanes) {
      float* p = out + size_t(r) * stride + i;
      store(p, load(p) + load(w.bias + tile * kLanes + i));
    }
}

}  // namespace gf
