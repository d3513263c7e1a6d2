// Causal grouped-query attention over one slot of the cache, a chunk of 64 keys at a time.
//
// A query's result is defined as: for each chunk that it may see, its own maximum, sum of exponentials and weighted
// values; then these partial results merged in the order of the chunks (as flash attention does, arXiv:2205.14135).
// Chunks start at multiples of 64 whoever asks, so decode (chunks shared out among threads), verification and prefill
// (many queries to a chunk) give the same bits. Keys are turned so that lanes are keys: no horizontal sums.
#pragma once

#include <cmath>
#include <cstdint>

#include "simd.h"

namespace gf {

inline constexpr int kChunk = 64;
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

inline f32x16 load_value(const float* p) { return load(p); }
inline f32x16 load_value(const uint16_t* p) { return load_bf16(p); }
inline f32x16 load_value(const int8_t* p) { return load_i8(p); }

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
  const float top = *into.max > *next.max ? *into.max : *next.max;
  const float keep = exp2_one(*into.max - top), gain = exp2_one(*next.max - top);
  *into.max = top;
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
  Buffer<float> keys;    // [head_dim][64]
  Buffer<float> values;  // [64][head_dim]
  Buffer<float> scores;  // [query][64]
  Buffer<float> state;   // [query][head_dim + 16]: merged so far
  Buffer<float> chunk;   // [query][head_dim + 16]: this chunk's

  void resize(int head_dim, int queries) {
    keys.resize(size_t(head_dim) * kChunk);
    values.resize(size_t(head_dim) * kChunk);
    scores.resize(size_t(queries) * kChunk);
    state.resize(size_t(queries) * (head_dim + kLanes));
    chunk.resize(size_t(queries) * (head_dim + kLanes));
  }
};

inline Partial partial_at(float* base, int index, int head_dim) {
  float* p = base + size_t(index) * (head_dim + kLanes);
  return {p + head_dim, p + head_dim + 1, p};
}

// keys[d][0..63] = k[0..n-1][d]; keys past n are zero.
inline void turn_keys(const float* k, int n, int head_dim, float* keys) {
  for (int first = 0; first < n; first += kLanes)
    for (int d = 0; d < head_dim; d += kLanes) {
      i32x16 row[16];
      for (int i = 0; i < 16; i++)
        row[i] = first + i < n ? load_i(k + size_t(first + i) * head_dim + d) : splat_i(0);
      transpose16(row);
      for (int i = 0; i < 16; i++) store_i(keys + (d + i) * kChunk + first, row[i]);
    }
}

inline void turn_keys(const uint16_t* k, int n, int head_dim, float* keys) {
  for (int first = 0; first < n; first += kLanes)
    for (int d = 0; d < head_dim; d += 2 * kLanes) {  // pairs of bfloat16 are turned as one 32-bit lane
      const int dims = head_dim - d < 2 * kLanes ? head_dim - d : 2 * kLanes;
      i32x16 row[16];
      for (int i = 0; i < 16; i++)
        row[i] = first + i < n ? load_some(k + size_t(first + i) * head_dim + d, 2 * dims) : splat_i(0);
      transpose16(row);
      for (int i = 0; i < dims / 2; i++) {
        store(keys + (d + 2 * i) * kChunk + first, even_bf16(row[i]));
        store(keys + (d + 2 * i + 1) * kChunk + first, odd_bf16(row[i]));
      }
    }
}

inline void turn_keys(const int8_t* k, int n, int head_dim, float* keys) {
  for (int first = 0; first < n; first += kLanes)
    for (int d = 0; d < head_dim; d += 4 * kLanes) {
      const int dims = head_dim - d < 4 * kLanes ? head_dim - d : 4 * kLanes;
      i32x16 row[16];
      for (int i = 0; i < 16; i++)
        row[i] = first + i < n ? load_some(k + size_t(first + i) * head_dim + d, dims) : splat_i(0);
      transpose16(row);
      for (int i = 0; i < dims / 4; i++) {
        float* out = keys + (d + 4 * i) * kChunk + first;
        store(out, byte_to_float<0>(row[i]));
        store(out + kChunk, byte_to_float<1>(row[i]));
        store(out + 2 * kChunk, byte_to_float<2>(row[i]));
        store(out + 3 * kChunk, byte_to_float<3>(row[i]));
      }
    }
}

// Multiplies the first n of 64 scores or weights by their keys' or values' scales.
inline void apply_scales(float* scores, const float* scale, int n) {
  for (int i = 0; i < n; i += kLanes)
    store(scores + i, load(scores + i) * as_float(load_some(scale + i, 4 * (n - i))));
}

// Memory to fetch during a loop, so many bytes an iteration: a burst of prefetches would hold up everything else.
struct Ahead {
  const char* from;  // null: nothing
  int bytes;

  void fetch(int iteration) const {
    if (!from) return;
    for (int at = 0; at < bytes; at += 64) prefetch(from + size_t(iteration) * bytes + at);
  }
};

// scores[q][first..first+16*V) of Q queries: their products with V vectors of turned keys.
template <int Q, int V>
void score_some(const float* const* q, const float* keys, int first, int head_dim, float* scores, const Ahead& ahead) {
  f32x16 sum[Q][V];
  for (auto& s : sum)
    for (auto& v : s) v = splat(0.0f);
  for (int d = 0; d < head_dim; d++) {
    ahead.fetch(d);
    f32x16 k[V];
    for (int j = 0; j < V; j++) k[j] = load(keys + d * kChunk + first + j * kLanes);
    for (int i = 0; i < Q; i++) {
      const f32x16 x = splat(q[i][d]);
      for (int j = 0; j < V; j++) sum[i][j] = fma(x, k[j], sum[i][j]);
    }
  }
  for (int i = 0; i < Q; i++)
    for (int j = 0; j < V; j++) store(scores + i * kChunk + first + j * kLanes, sum[i][j]);
}

template <int Q>
void score(const float* const* q, const float* keys, int n, int head_dim, float* scores, const Ahead& ahead) {
  if (n > 2 * kLanes) return score_some<Q, 4>(q, keys, 0, head_dim, scores, ahead);
  score_some<Q, 2>(q, keys, 0, head_dim, scores, ahead);
}

// Turns one query's scores into weights; only keys first..last-1 of the chunk count. False: none does.
inline bool weigh(float* scores, int first, int last, int n, const Partial& out) {
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

// o[q][d..d+16*V) = sum over keys of weight * value, for Q queries.
template <int Q, int V, class T>
void weigh_values(const float* weights, const T* v, int n, int head_dim, const Partial* out, int d,
                  const Ahead& ahead) {
  f32x16 sum[Q][V];
  for (auto& s : sum)
    for (auto& x : s) x = splat(0.0f);
  for (int t = 0; t < n; t++) {
    ahead.fetch(t);
    f32x16 value[V];
    for (int j = 0; j < V; j++) value[j] = load_value(v + size_t(t) * head_dim + d + j * kLanes);
    for (int i = 0; i < Q; i++) {
      const f32x16 p = splat(weights[i * kChunk + t]);
      for (int j = 0; j < V; j++) sum[i][j] = fma(p, value[j], sum[i][j]);
    }
  }
  for (int i = 0; i < Q; i++)
    for (int j = 0; j < V; j++) store(out[i].o + d + j * kLanes, sum[i][j]);
}

template <int Q, class T>
void weigh_all_values(const float* weights, const T* v, int n, int head_dim, const Partial* out, const Ahead& ahead) {
  int d = 0;
  for (; d + 4 * kLanes <= head_dim; d += 4 * kLanes)
    weigh_values<Q, 4>(weights, v, n, head_dim, out, d, d == 0 ? ahead : Ahead{});
  for (; d < head_dim; d += kLanes) weigh_values<Q, 1>(weights, v, n, head_dim, out, d, d == 0 ? ahead : Ahead{});
}

// The queries of one KV head that look at one slot.
struct Queries {
  int count;
  const float* const* q;    // [count][head_dim], already scaled by log2(e) / sqrt(head_dim)
  const int* position;      // [count]
  int window;               // 0: all earlier positions
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

// A chunk of the slot: its first position, its length, turned keys, values, and scales or nulls.
template <class T>
struct Chunk {
  int start, n;
  const float* keys;
  const T* v;
  const float* k_scale;
  const float* v_scale;
  Ahead values, next_keys;  // fetched beside the first queries
};

// Q queries (from `at`) against a chunk.
template <int Q, class T>
void attend_block(const Queries& x, int at, const Chunk<T>& chunk, int head_dim, float* scores, const Partial* out) {
  const int start = chunk.start, n = chunk.n;
  score<Q>(x.q + at, chunk.keys, n, head_dim, scores, at == 0 ? chunk.values : Ahead{});
  for (int i = 0; i < Q; i++) {
    if (chunk.k_scale) apply_scales(scores + i * kChunk, chunk.k_scale, n);
    const int position = x.position[at + i];
    const int first = x.window == 0 ? 0 : position - x.window + 1 - start;
    const int last = position + 1 - start < n ? position + 1 - start : n;
    if (!weigh(scores + i * kChunk, first < 0 ? 0 : first, last, n, out[i]))
      for (int j = 0; j < n; j++) scores[i * kChunk + j] = 0.0f;
    else if (chunk.v_scale) apply_scales(scores + i * kChunk, chunk.v_scale, n);
  }
  weigh_all_values<Q>(scores, chunk.v, n, head_dim, out, at == 0 ? chunk.next_keys : Ahead{});
}

template <class T>
void attend_blocks(const Queries& x, const Chunk<T>& chunk, int head_dim, float* all_scores, const Partial* out) {
  for (int at = 0; at < x.count; at += kQueryBlock) {
    float* scores = all_scores + size_t(at) * kChunk;
    switch (x.count - at) {
      case 1: attend_block<1>(x, at, chunk, head_dim, scores, out + at); break;
      case 2: attend_block<2>(x, at, chunk, head_dim, scores, out + at); break;
      case 3: attend_block<3>(x, at, chunk, head_dim, scores, out + at); break;
      default: attend_block<4>(x, at, chunk, head_dim, scores, out + at); break;
    }
  }
}

// One chunk's partial result of every query. Reads no key or value past the last query's position. `next_keys` is
// where the following chunk's keys lie, to be fetched meanwhile.
template <class T>
void attend_chunk(const Queries& x, int index, const Slot<T>& slot, const T* next_keys, int head_dim,
                  AttentionScratch& scratch, const Partial* out) {
  const int start = index * kChunk;
  const int left = x.last_position() + 1 - start, n = left < kChunk ? left : kChunk;
  const T* v = slot.v + size_t(start) * head_dim;
  turn_keys(slot.k + size_t(start) * head_dim, n, head_dim, scratch.keys.data());
  const float* k_scale = slot.k_scale ? slot.k_scale + start : nullptr;
  const float* v_scale = slot.v_scale ? slot.v_scale + start : nullptr;
  const float* keys = scratch.keys.data();
  float* scores = scratch.scores.data();
  const Ahead next{reinterpret_cast<const char*>(next_keys), int(head_dim * sizeof(T))};
  if (x.count <= 2 * kQueryBlock) {
    const Ahead values{reinterpret_cast<const char*>(v), int(n * sizeof(T))};
    return attend_blocks(x, Chunk<T>{start, n, keys, v, k_scale, v_scale, values, next}, head_dim, scores, out);
  }
  float* wide = scratch.values.data();  // many queries: convert the values once
  for (int i = 0; i < n * head_dim; i += kLanes) store(wide + i, load_value(v + i));
  attend_blocks(x, Chunk<float>{start, n, keys, wide, k_scale, v_scale, {}, next}, head_dim, scores, out);
}

}  // namespace gf
