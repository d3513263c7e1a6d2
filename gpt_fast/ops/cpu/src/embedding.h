// Rows of the embedding table, whatever it is stored as, as float32.
#pragma once

#include <algorithm>
#include <vector>

#include "model.h"
#include "step.h"

namespace gf {

template <class T, class F>
void embed_as(const T* table, int dim, int row, float* x, F&& to_float) {
  const T* from = table + size_t(row) * dim;
  std::transform(from, from + dim, x, to_float);
}

inline void embed_int8(const ModelWeights& model, int row, float* x) {
  embed_as(static_cast<const int8_t*>(model.embedding), model.dim, row, x, [](int8_t v) { return float(v); });
  const int group = model.embedding_group, groups = (model.dim + group - 1) / group;
  for (int d = 0; d < model.dim; d++) x[d] *= model.embedding_scale[size_t(row) * groups + d / group];
}

inline void embed_row(const ModelWeights& model, int row, float* x) {
  const auto* full = static_cast<const float*>(model.embedding);
  const auto* half = static_cast<const uint16_t*>(model.embedding);
  switch (model.embedding_type) {
    case 0: return embed_as(full, model.dim, row, x, [](float v) { return v; });
    case 1: return embed_as(half, model.dim, row, x, [](uint16_t v) { return bf16_to_float(v); });
    case 2: return embed_as(half, model.dim, row, x, [](uint16_t v) { return float(read_as<float16>(&v)); });
    default: return embed_int8(model, row, x);
  }
}

// x: [tokens][dim]; zeros for tokens of other ranks.
inline void embed(const ModelWeights& model, const std::vector<Token>& tokens, float* x) {
  for (const Token& token : tokens) {
    const int row = token.id - model.vocab_first;
    if (row >= 0 && row < model.head.rows) {
      embed_row(model, row, x);
    } else {
      std::fill(x, x + model.dim, 0.0f);
    }
    x += model.dim;
  }
}

}  // namespace gf
