// The memory that a step's phases hand to each other, and each thread's own. It grows with the largest step.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "activations.h"
#include "attend.h"
#include "model.h"
#include "plan.h"

namespace gf {

// One thread's.
struct Scratch {
  int thread = 0;
  Buffer<float> out;  // of a product
  Buffer<float> row, coarse;
  Activations input;        // of few rows, see Decoder::input
  uint64_t input_made = 0;  // for which step and phase
  ItemScratch attention;
  std::vector<float> lower_bound;  // [selected], see HeadScreen::lower_bounds
  uint64_t lower_bound_made = 0;   // for which step

  void resize(const ModelWeights& model, Kind kind, int rows) {
    out.resize(size_t(std::min(rows, kRowBlock)) * std::max(model.head_dim, 4 * kLanes));
    const int widest = round_up(std::max(model.dim, model.attention_dim()), kGroup);
    row.resize(size_t(widest));
    coarse.resize(size_t(widest));
    input.resize(kind, kFewRows, widest);
    attention.resize(model.head_dim, std::min(rows, kSpanTokens) * model.queries_per_kv_head());
  }
};

struct Workspace {
  Buffer<float> x;                             // [row][dim]: the residual stream
  Buffer<float> q, attended;                   // [row][n_head][head_dim]
  Buffer<float> partials;                      // of rows whose attention is split, [row][n_head][part]
  Activations normal_q, attended_q, hidden_q;  // inputs of the products
  std::vector<Scratch> scratch;

  explicit Workspace(int threads) : scratch(size_t(threads)) {
    for (int i = 0; i < threads; i++) scratch[i].thread = i;
  }

  void resize(const ModelWeights& model, Kind kind, const Plan& plan) {
    if (plan.rows() > capacity_) resize_rows(model, kind, plan.rows());
    const AttentionPlan& split = plan.attention;
    const size_t needed = size_t(split.split_tokens) * model.n_head * split.split_parts * (model.head_dim + kLanes);
    if (partials.size() < needed) partials.resize(needed);
  }

 private:
  int capacity_ = 0;

  void resize_rows(const ModelWeights& model, Kind kind, int rows) {
    capacity_ = rows;
    x.resize(size_t(rows) * model.dim);
    q.resize(size_t(rows) * model.attention_dim());
    attended.resize(size_t(rows) * model.attention_dim());
    normal_q.resize(kind, rows, model.dim);
    attended_q.resize(kind, rows, model.attention_dim());
    hidden_q.resize(kind, rows, model.ffn_dim);
    for (Scratch& s : scratch) s.resize(model, kind, rows);
  }
};

}  // namespace gf
