// Causal grouped-query attention over one slot of the cache, a chunk of 64 keys at a time.
//
// A query's result is defined as: for each chunk that it may see, its own maximum, sum of exponentials and weighted
// values; these partial results merged in order within each part of four chunks, then the parts in order (merging as
// flash attention does, arXiv:2205.14135). Chunks and parts start at multiples of 64 and 256 whoever asks, so decode
// (parts shared out among threads), verification and prefill (many queries to a chunk) give the same bits. Keys are
// transposed so that lanes are keys: no horizontal sums.
//
// What is multiplied are 32-bit words (see Floats and Pairs): a float32 cache as it is; a narrower one as pairs of
// bfloat16, of two neighbouring dimensions of a key, of two neighbouring positions of the values. One instruction
// multiplies and adds a pair. Queries and weights are rounded to bfloat16 for it; sums stay float32.
#pragma once

#include <cmath>
#include <cstdint>
#include <type_traits>

#include "simd.h"

namespace gf {

inline constexpr int kChunk = 64;
inline constexpr int kPart = 4;  // chunks
inline constexpr int kQueryBlock = 4;

enum class CacheType : int32_t { kFloat = 0, kBf16 = 1, kInt8 = 2 };
inline constexpr CacheType kCacheTypes[] = {CacheType::kFloat, CacheType::kBf16, CacheType::kInt8};

// One slot and KV head of one layer: keys and values [position][head_dim]; int8 ones with a scale a position.
template <class T>
struct Slot {
  const T* k;
  const T* v;
  const float* k_scale;  // null unless T is int8_t
  const float* v_scale;
};

struct Floats {
  using Vector = f32x16;
  static constexpr int kEach = 1;  // elements of a word
  static Vector load(const float* p) { return gf::load(p); }
  static void store(float* p, Vector v) { gf::store(p, v); }
  static Vector splat(const float* p) { return gf::splat(*p); }
  static f32x16 add_product(f32x16 sum, Vector a, Vector b) { return fma(a, b, sum); }
};

struct Pairs {
  using Vector = i32x16;
  static constexpr int kEach = 2;
  static Vector load(const float* p) { return load_i(p); }
  static void store(float* p, Vector v) { store_i(p, v); }
  static Vector splat(const float* p) { return splat_i(read_as<int32_t>(p)); }
  static f32x16 add_product(f32x16 sum, Vector a, Vector b) { return dot2_bf16(sum, a, b); }
};

template <class T>
using WordsOf = std::conditional_t<std::is_same_v<T, float>, Floats, Pairs>;

// Queries as the cache's type wants them: [head_dim / WordsOf<T>::kEach] words.
inline void store_query(float* p, const float* x, float scale, int head_dim, CacheType type) {
  auto* half = reinterpret_cast<uint16_t*>(p);
  for (int d = 0; d < head_dim; d += kLanes) {
    const f32x16 v = load(x + d) * splat(scale);
    if (type == CacheType::kFloat) store(p + d, v);
    else store_bf16(half + d, v);
  }
}

// Stores one head's key or value, and its scale where the type has one.
inline void store_head(float* p, float*, const float* x, int head_dim) {
  for (int d = 0; d < head_dim; d += kLanes) store(p + d, load(x + d));
}
inline void store_head(uint16_t* p, float*, const float* x, int head_dim) {
  for (int d = 0; d < head_dim; d += kLanes) store_bf16(p + d, load(x + d));
}
inline void store_head(int8_t* p, float* scale, const float* x, int head_dim) {
  f32x16 top = splat(0.0f);
  for (int d = 0; d < head_dim; d += kLanes) top = max(top, abs(load(x + d)));
  const float largest = reduce_max(top), inverse = largest > 0 ? 127.0f / largest : 0.0f;
  *scale = largest / 127.0f;
  for (int d = 0; d < head_dim; d += kLanes) store_i8(p + d, round_i32(load(x + d) * splat(inverse)));
}

// The running result of one query: `o` is the sum of values weighted by exp2(score - max), `sum` the weights' sum.
struct Partial {
  float* max;
  float* sum;
  float* o;  // [head_dim]
};

inline void merge(const Partial& into, const Partial& next, int head_dim) {
  if (*next.max == -INFINITY) return;
  const bool rises = *next.max > *into.max;
  const float less = exp2_one(rises ? *into.max - *next.max : *next.max - *into.max);
  const float keep = rises ? less : 1.0f, gain = rises ? 1.0f : less;
  *into.max = rises ? *next.max : *into.max;
  *into.sum = *into.sum * keep + *next.sum * gain;
  for (int d = 0; d < head_dim; d += kLanes)
    store(into.o + d, fma(load(into.o + d), splat(keep), load(next.o + d) * splat(gain)));
}

inline void clear(const Partial& p, int head_dim) {
  *p.max = -INFINITY, *p.sum = 0.0f;
  for (int d = 0; d < head_dim; d += kLanes) store(p.o + d, splat(0.0f));
}

// A thread's working memory.
struct AttentionScratch {
  Buffer<float> keys;    // words [head_dim / each][64]
  Buffer<float> values;  // words [64 / each][head_dim]
  Buffer<float> scores;  // [query][64]
  Buffer<float> state;   // [query][head_dim + 16]: merged so far
  Buffer<float> part;    // this part's
  Buffer<float> chunk;   // this chunk's

  void resize(int head_dim, int queries) {
    keys.resize(size_t(head_dim) * kChunk);
    values.resize(size_t(head_dim) * kChunk);
    scores.resize(size_t(queries) * kChunk);
    for (auto* partials : {&state, &part, &chunk}) partials->resize(size_t(queries) * (head_dim + kLanes));
  }
};

inline Partial partial_at(float* base, int index, int head_dim) {
  float* p = base + size_t(index) * (head_dim + kLanes);
  return {p + head_dim, p + head_dim + 1, p};
}

// keys[d][0..63] = k[0..n-1][d], a word each; keys past n are zero.
inline void transpose_keys(const float* k, int n, int head_dim, float* keys) {
  for (int first = 0; first < n; first += kLanes)
    for (int d = 0; d < head_dim; d += kLanes) {
      i32x16 row[16];
      for (int i = 0; i < 16; i++) row[i] = first + i < n ? load_i(k + size_t(first + i) * head_dim + d) : splat_i(0);
      transpose16(row);
      for (int i = 0; i < 16; i++) store_i(keys + (d + i) * kChunk + first, row[i]);
    }
}

inline void transpose_keys(const uint16_t* k, int n, int head_dim, float* keys) {
  for (int first = 0; first < n; first += kLanes)
    for (int d = 0; d < head_dim; d += 2 * kLanes) {
      const int dims = head_dim - d < 2 * kLanes ? head_dim - d : 2 * kLanes;
      i32x16 row[16];
      for (int i = 0; i < 16; i++)
        row[i] = first + i < n ? load_some(k + size_t(first + i) * head_dim + d, 2 * dims) : splat_i(0);
      transpose16(row);
      for (int i = 0; i < dims / 2; i++) store_i(keys + (d / 2 + i) * kChunk + first, row[i]);
    }
}

inline void transpose_keys(const int8_t* k, int n, int head_dim, float* keys) {
  for (int first = 0; first < n; first += kLanes)
    for (int d = 0; d < head_dim; d += 4 * kLanes) {
      const int dims = head_dim - d < 4 * kLanes ? head_dim - d : 4 * kLanes;
      i32x16 row[16];
      for (int i = 0; i < 16; i++)
        row[i] = first + i < n ? load_some(k + size_t(first + i) * head_dim + d, dims) : splat_i(0);
      transpose16(row);
      for (int i = 0; i < dims / 4; i++) {
        float* out = keys + (d / 2 + 2 * i) * kChunk + first;
        store_i(out, pair_exact(byte_to_float<0>(row[i]), byte_to_float<1>(row[i])));
        store_i(out + kChunk, pair_exact(byte_to_float<2>(row[i]), byte_to_float<3>(row[i])));
      }
    }
}

inline i32x16 pair_rows(const uint16_t* low, const uint16_t* high) { return interleave_bf16(low, high); }
inline i32x16 pair_rows(const int8_t* low, const int8_t* high) { return pair_exact(load_i8(low), load_i8(high)); }

// Sixteen dimensions of a word of the values: of position i, or of positions 2i and 2i + 1. The last pair's second may
// lie past the n positions that count: its weight is zero, so the first stands in (unwritten memory may be NaN).
template <class T>
struct ValueRows {
  using Words = WordsOf<T>;
  const T* v;
  int n, head_dim;

  typename Words::Vector at(int i, int d) const {
    const T* row = v + size_t(i) * Words::kEach * head_dim + d;
    if constexpr (Words::kEach == 1) return load(row);
    else return pair_rows(row, 2 * i + 1 < n ? row + head_dim : row);
  }
};

// The same, unpacked once for many queries.
template <class W>
struct UnpackedValues {
  using Words = W;
  const float* words;
  int n, head_dim;

  typename W::Vector at(int i, int d) const { return W::load(words + size_t(i) * head_dim + d); }
};

// Multiplies the first n of 64 scores (or weights) by the scales of their keys (or values).
inline void apply_scales(float* scores, const float* scale, int n) {
  for (int i = 0; i < n; i += kLanes) store(scores + i, load(scores + i) * as_float(load_some(scale + i, 4 * (n - i))));
}

// Memory to prefetch during a chunk: two ranges, a few lines at each call, because a burst of prefetches would hold up
// the loads after it.
struct PrefetchRanges {
  const char* at;
  const char* second;
  int left, second_left, each;  // lines: of the ranges, and to a call

  void fetch() {
    for (int i = 0; i < each; i++) {
      if (left == 0) {
        if (second_left == 0) return;
        at = second, left = second_left, second_left = 0;
      }
      prefetch<kToL2>(at), at += 64, left--;
    }
  }
};

// scores[q][first..first+16*V) of Q queries: their products with V vectors of transposed keys. `words` make a head.
template <class W, int Q, int V>
void score_some(const float* const* q, const float* keys, int first, int words, float* scores, PrefetchRanges& ahead) {
  f32x16 sum[Q][V];
  GF_UNROLL
  for (int i = 0; i < Q; i++) {
    GF_UNROLL
    for (int j = 0; j < V; j++) sum[i][j] = splat(0.0f);
  }
  for (int d = 0; d < words; d++) {
    ahead.fetch();
    typename W::Vector k[V];
    GF_UNROLL
    for (int j = 0; j < V; j++) k[j] = W::load(keys + d * kChunk + first + j * kLanes);
    GF_UNROLL
    for (int i = 0; i < Q; i++) {
      const typename W::Vector x = W::splat(q[i] + d);
      GF_UNROLL
      for (int j = 0; j < V; j++) sum[i][j] = W::add_product(sum[i][j], x, k[j]);
    }
  }
  GF_UNROLL
  for (int i = 0; i < Q; i++) {
    GF_UNROLL
    for (int j = 0; j < V; j++) store(scores + i * kChunk + first + j * kLanes, sum[i][j]);
  }
}

template <class W, int Q>
void score(const float* const* q, const float* keys, int n, int head_dim, float* scores, PrefetchRanges& ahead) {
  const int words = head_dim / W::kEach;
  if (n > 2 * kLanes) return score_some<W, Q, 4>(q, keys, 0, words, scores, ahead);
  score_some<W, Q, 2>(q, keys, 0, words, scores, ahead);
}

// Softmax of one query's scores within a chunk, not yet divided by the sum: scores become weights. Only keys
// first..last-1 count; false: there are none.
inline bool softmax_chunk(float* scores, int first, int last, int n, const Partial& out) {
  if (first >= last) {
    *out.max = -INFINITY, *out.sum = 0.0f;
    return false;
  }
  f32x16 top = splat(-INFINITY);
  for (int i = 0; i < n; i += kLanes) {
    const f32x16 s = keep_range(load(scores + i), first - i, last - i);
    store(scores + i, s);
    top = max(top, s);
  }
  *out.max = reduce_max(top);
  f32x16 sum = splat(0.0f);
  for (int i = 0; i < n; i += kLanes) {
    const f32x16 p = exp2(load(scores + i) - splat(*out.max));
    store(scores + i, p);
    sum = sum + p;
  }
  *out.sum = reduce_add(sum);
  return true;
}

// The first n of 64 weights, rounded where they are multiplied in pairs: word i has those of positions 2i and 2i + 1.
template <class W>
void to_words(float* weights, int n) {
  if constexpr (W::kEach == 2)
    for (int i = 0; i < n; i += kLanes) store_bf16(reinterpret_cast<uint16_t*>(weights) + i, load(weights + i));
}

// o[q][d..d+16*V) = sum over keys of weight * value, for Q queries.
template <int Q, int V, class Values>
void sum_values(const float* weights, const Values& values, const Partial* out, int d, PrefetchRanges& ahead) {
  using W = typename Values::Words;
  f32x16 sum[Q][V];
  GF_UNROLL
  for (int i = 0; i < Q; i++) {
    GF_UNROLL
    for (int j = 0; j < V; j++) sum[i][j] = splat(0.0f);
  }
  for (int t = 0; t < (values.n + W::kEach - 1) / W::kEach; t++) {
    ahead.fetch();
    typename W::Vector value[V];
    GF_UNROLL
    for (int j = 0; j < V; j++) value[j] = values.at(t, d + j * kLanes);
    GF_UNROLL
    for (int i = 0; i < Q; i++) {
      const typename W::Vector p = W::splat(weights + i * kChunk + t);
      GF_UNROLL
      for (int j = 0; j < V; j++) sum[i][j] = W::add_product(sum[i][j], p, value[j]);
    }
  }
  GF_UNROLL
  for (int i = 0; i < Q; i++) {
    GF_UNROLL
    for (int j = 0; j < V; j++) store(out[i].o + d + j * kLanes, sum[i][j]);
  }
}

template <int Q, class Values>
void sum_all_values(const float* weights, const Values& values, const Partial* out, PrefetchRanges& ahead) {
  int d = 0;
  for (; d + 4 * kLanes <= values.head_dim; d += 4 * kLanes) sum_values<Q, 4>(weights, values, out, d, ahead);
  for (; d < values.head_dim; d += kLanes) sum_values<Q, 1>(weights, values, out, d, ahead);
}

// The queries of one KV head that attend to one slot.
struct Queries {
  int count;
  const float* const* q;  // [count] as store_query leaves them, already scaled by log2(e) / sqrt(head_dim)
  const int* position;    // [count]
  int window;             // 0: all earlier positions
  int last_position() const {
    int last = 0;
    for (int i = 0; i < count; i++) last = position[i] > last ? position[i] : last;
    return last;
  }
  int first_seen() const {
    int first = position[0];
    for (int i = 0; i < count; i++) first = position[i] < first ? position[i] : first;
    return window == 0 || first < window ? 0 : first - window + 1;
  }
};

// A chunk of the slot: its first position, its length, transposed keys, values, and scales or nulls.
template <class Values>
struct Chunk {
  int start, n;
  const float* keys;
  Values values;
  const float* k_scale;
  const float* v_scale;
};

// Q queries (from `at`) against a chunk.
template <int Q, class Values>
void attend_block(const Queries& x, int at, const Chunk<Values>& chunk, PrefetchRanges& ahead, float* scores,
                  const Partial* out) {
  using W = typename Values::Words;
  const int start = chunk.start, n = chunk.n;
  score<W, Q>(x.q + at, chunk.keys, n, chunk.values.head_dim, scores, ahead);
  GF_UNROLL
  for (int i = 0; i < Q; i++) {
    float* row = scores + i * kChunk;
    if (chunk.k_scale) apply_scales(row, chunk.k_scale, n);
    const int position = x.position[at + i];
    const int first = x.window == 0 ? 0 : position - x.window + 1 - start;
    const int last = position + 1 - start < n ? position + 1 - start : n;
    if (!softmax_chunk(row, first < 0 ? 0 : first, last, n, out[i]))
      for (int j = 0; j < n; j++) row[j] = 0.0f;
    else if (chunk.v_scale) apply_scales(row, chunk.v_scale, n);
    to_words<W>(row, n);
  }
  sum_all_values<Q>(scores, chunk.values, out, ahead);
}

template <class Values>
void attend_blocks(const Queries& x, const Chunk<Values>& chunk, PrefetchRanges& ahead, float* all_scores,
                   const Partial* out) {
  for (int at = 0; at < x.count; at += kQueryBlock) {
    float* scores = all_scores + size_t(at) * kChunk;
    switch (x.count - at) {
      case 1: attend_block<1>(x, at, chunk, ahead, scores, out + at); break;
      case 2: attend_block<2>(x, at, chunk, ahead, scores, out + at); break;
      case 3: attend_block<3>(x, at, chunk, ahead, scores, out + at); break;
      default: attend_block<4>(x, at, chunk, ahead, scores, out + at); break;
    }
  }
}

// One chunk's partial result of every query. Reads no key or value past the last query's position. The following chunk,
// which is prefetched, lies `next` elements after the slot's first.
template <class T>
void attend_chunk(const Queries& x, int index, const Slot<T>& slot, ptrdiff_t next, int head_dim,
                  AttentionScratch& scratch, const Partial* out) {
  using W = WordsOf<T>;
  const int start = index * kChunk;
  const int left = x.last_position() + 1 - start, n = left < kChunk ? left : kChunk;
  const ValueRows<T> rows{slot.v + size_t(start) * head_dim, n, head_dim};
  transpose_keys(slot.k + size_t(start) * head_dim, n, head_dim, scratch.keys.data());
  const float* k_scale = slot.k_scale ? slot.k_scale + start : nullptr;
  const float* v_scale = slot.v_scale ? slot.v_scale + start : nullptr;
  const float* keys = scratch.keys.data();
  float* scores = scratch.scores.data();
  const int lines = int(n * head_dim * sizeof(T)) / 64, blocks = (x.count + kQueryBlock - 1) / kQueryBlock;
  const int loops = blocks * (head_dim + n) / W::kEach;
  // With a few queries a chunk takes little time and most items are short: this chunk's own values are prefetched
  // first.
  const auto* keys_then = reinterpret_cast<const char*>(slot.k + next);
  const auto* values_then = reinterpret_cast<const char*>(slot.v + next);
  const int each = (2 * lines + loops - 1) / loops;
  PrefetchRanges ahead = blocks == 1
                             ? PrefetchRanges{reinterpret_cast<const char*>(rows.v), keys_then, lines, lines, each}
                             : PrefetchRanges{keys_then, values_then, lines, lines, each};
  const auto run = [&](const auto& values) {
    using V = std::decay_t<decltype(values)>;
    attend_blocks(x, Chunk<V>{start, n, keys, values, k_scale, v_scale}, ahead, scores, out);
  };
  if (W::kEach == 1 || x.count <= 2 * kQueryBlock) return run(rows);
  float* words = scratch.values.data();
  for (int t = 0; t < (n + W::kEach - 1) / W::kEach; t++)
    for (int d = 0; d < head_dim; d += kLanes) W::store(words + size_t(t) * head_dim + d, rows.at(t, d));
  run(UnpackedValues<W>{words, n, head_dim});
}

}  // namespace gf
