// A model's weights as Python describes them (structs.py holds the ctypes twins: same order, same types).
#pragma once

#include <cstdint>

#include "linear.h"

namespace gf {

struct LayerWeights {
  Linear qkv, out, gate_up, down;  // gate_up: tiles of 16 gate rows and 16 up rows take turns
  const float* attention_norm;
  const float* ffn_norm;
  const float* q_norm;  // [head_dim] or null
  const float* k_norm;
  int32_t window;  // 0: none
};

struct ModelWeights {
  int32_t n_layer, dim, n_head, n_kv_head, head_dim, ffn_dim, vocab, rotary_dim;
  int32_t embedding_type;   // 0 float32, 1 bfloat16, 2 float16, 3 int8
  int32_t embedding_group;  // int8: neighbours that share a scale
  int32_t vocab_first;      // of a rank's share: its embedding and head are of head.rows tokens from this one on
  float norm_eps;
  const void* embedding;         // [head.rows][dim]
  const float* embedding_scale;  // int8: [head.rows][ceil(dim / group)]
  const float* rope;             // [positions][2][rotary_dim / 2]: cos, sin
  const float* norm;
  Linear head;
  const LayerWeights* layers;

  int heads() const { return n_head + 2 * n_kv_head; }  // of the qkv projection
  int queries_per_kv_head() const { return n_head / n_kv_head; }
  int attention_dim() const { return n_head * head_dim; }
};

}  // namespace gf
