// Rows of the embedding table, whatever it is stored as, as float32.
#pragma once

#include <algorithm>
#include <vector>

#include "model.h"
#include "step.h"

namespace gf {

template <class T, class F>
void embed_as(const T* table, int dim, const std::vector<Token>& tokens, float* x, F&& to_float) {
  for (size_t i = 0; i < tokens.size(); i++) {
    const T* from = table + size_t(tokens[i].id) * dim;
    std::transform(from, from + dim, x + i * dim, to_float);
  }
}

inline void embed_int8(const ModelWeights& model, const std::vector<Token>& tokens, float* x) {
  embed_as(static_cast<const int8_t*>(model.embedding), model.dim, tokens, x, [](int8_t v) { return float(v); });
  const int group = model.embedding_group, groups = (model.dim + group - 1) / group;
  for (size_t i = 0; i < tokens.size(); i++)
    for (int d = 0; d < model.dim; d++)
      x[i * model.dim + d] *= model.embedding_scale[size_t(tokens[i].id) * groups + d / group];
}

// x: [tokens][dim]
inline void embed(const ModelWeights& model, const std::vector<Token>& tokens, float* x) {
  const auto* full = static_cast<const float*>(model.embedding);
  const auto* half = static_cast<const uint16_t*>(model.embedding);
  switch (model.embedding_type) {
    case 0: return embed_as(full, model.dim, tokens, x, [](float v) { return v; });
    case 1: return embed_as(half, model.dim, tokens, x, [](uint16_t v) { return bf16_to_float(v); });
    case 2: return embed_as(half, model.dim, tokens, x, [](uint16_t v) { return float(read_as<_Float16>(&v)); });
    default: return embed_int8(model, tokens, x);
  }
}

}  // namespace gf
