// A step's KV cache: where a slot's head of a layer begins, and what a key or a value is stored as.
#pragma once

#include <cstdint>
#include <type_traits>

#include "attention.h"
#include "step.h"

namespace gf {

struct CacheView {
  void *k, *v;               // [layer][slot][kv head][position][head_dim]
  float *k_scale, *v_scale;  // int8: [layer][slot][kv head][position]; else null
  CacheType type;
  int slots, positions, kv_heads, head_dim;

  static CacheView of(const StepInput& step, int kv_heads, int head_dim) {
    return {step.k,     step.v,         step.k_scale, step.v_scale, CacheType(step.cache_type),
            step.slots, step.positions, kv_heads,     head_dim};
  }

  // The first position of a slot's KV head, counted in positions of the whole cache.
  size_t first(int layer, int slot, int kv_head) const {
    return ((size_t(layer) * slots + slot) * kv_heads + kv_head) * positions;
  }

  // Calls f with a null pointer of the element type.
  template <class F>
  void with_element(F&& f) const {
    switch (type) {
      case CacheType::kFloat: return f(static_cast<float*>(nullptr));
      case CacheType::kBf16: return f(static_cast<uint16_t*>(nullptr));
      case CacheType::kInt8: return f(static_cast<int8_t*>(nullptr));
    }
  }

  // The keys and values from `at`, the first position of a slot's KV head.
  template <class T>
  Slot<T> slot(size_t at) const {
    return {static_cast<const T*>(k) + at * head_dim, static_cast<const T*>(v) + at * head_dim,
            k_scale ? k_scale + at : nullptr, v_scale ? v_scale + at : nullptr};
  }

  void write_key(size_t at, const float* x) const { write(k, k_scale, at, x); }
  void write_value(size_t at, const float* x) const { write(v, v_scale, at, x); }

 private:
  void write(void* to, float* scale, size_t at, const float* x) const {
    with_element([&](auto* type) {
      store_head(static_cast<decltype(type)>(to) + at * head_dim, scale ? scale + at : nullptr, x, head_dim);
    });
  }
};

}  // namespace gf
