// One forward of the whole model: the phases of every layer, run by the pool without leaving C++.
//
//   normalize x -> qkv heads (+ bias, norm, rotation, cache write) -> attention -> merge + quantize -> out rows + x
//   normalize x -> gate and up rows (+ SiLU, quantize) -> down rows + x;        at the end: normalize -> head rows
//
// Where only best tokens are wanted, a screen may tell first which of the head's rows can hold them (head_screen.h).
//
// x stays float32. Padding tokens are dropped before the first layer (step.h). Where the model is shared out to ranks,
// what is added to x is first left to the others as a part of a sum, which a phase of its own takes (exchanges.h).
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <memory>
#include <tuple>
#include <utility>
#include <vector>

#include "activations.h"
#include "argmax.h"
#include "attend.h"
#include "cache_view.h"
#include "embedding.h"
#include "exchanges.h"
#include "head_screen.h"
#include "linear.h"
#include "model.h"
#include "plan.h"
#include "pool.h"
#include "rope.h"
#include "step.h"
#include "workspace.h"

namespace gf {

class Decoder final : public Job {
 public:
  // link: to the other ranks, where `model` is a rank's share.
  Decoder(const ModelWeights& model, Pool& pool, std::shared_ptr<Link> link = nullptr)
      : model_(model),
        layers_(model.layers, model.layers + model.n_layer),
        pool_(pool),
        kind_(model.head.format == kBf16 ? Kind::kBf16 : Kind::kInt8),
        link_(std::move(link)),
        exchanges_(model, link_.get()),
        work_(pool.threads()),
        screen_(model.head, kind_) {}

  // Begins a step on the pool's other threads; all earlier ones were finished. What `input` points to must live until
  // this one is.
  StepError start(const StepInput& input) {
    const StepError error = prepare(input);
    if (error != kFine) return error;
    queue_.begin(has_work());
    if (has_work()) pool_.start(*this);
    return kFine;
  }

  // Begins a step as soon as the one before has ended, whose best tokens it takes.
  StepError follow(const StepInput& input) {
    if (queue_.push(input)) return kFine;
    pool_.wait_until_idle();
    return start(input);
  }

  // Helps, or waits where the pool is apart, until the first `count` steps have ended: their logits and best tokens are
  // there.
  StepError finish(uint64_t count) {
    const bool all = count == queue_.begun();
    if (!pool_.apart()) pool_.help_until([&] { return queue_.ended() >= count; });
    if (all) pool_.wait_until_idle();
    if (!all) queue_.wait_for(count);
    const StepError error = queue_.take_error();
    return error == kFine && exchanges_.ended() ? kLinkEnded : error;
  }

  // The squares of the head's inputs, summed over the last step's tokens: [dim]. The pool is idle.
  void head_energy(float* out) {
    std::fill(out, out + model_.dim, 0.0f);
    float* row = work_.scratch[0].row.data();
    for (int m = 0; m < selected(); m++) {
      work_.normal_q.restore(m, model_.dim, row);
      for (int i = 0; i < model_.dim; i++) out[i] += row[i] * row[i];
    }
  }

  // From the next step on. The pool is idle.
  void set_screen(const Screen& screen) { screen_.set(screen); }
  void set_tuning(const Tuning& tuning) { tuning_ = tuning; }

  // ---- Job

  bool again() override {
    choose_best();
    return queue_.end([&](const StepInput& next) {
      const StepError error = prepare(next);
      return StepQueue::Prepared{error, error == kFine && has_work()};
    });
  }

  int phases() const override { return first_block_phase() + plan_.head_blocks * kBlockPhases; }

  int chunks(int phase) const override { return plan_.chunks[kind_of(phase)]; }

  void run(int phase, int chunk, int thread) override {
    const int layer = phase / kLayerPhases;
    Scratch& s = work_.scratch[thread];
    if (exchanges_.ended()) return;  // nothing that is computed now means anything
    switch (kind_of(phase)) {
      case kSumInput: return add_sum(2 * layer, chunk);
      case kSumAttention: return add_sum(2 * layer + 1, chunk);
      case kSumOutput: return add_sum(2 * model_.n_layer, chunk);
      case kQkv: return qkv(layer, chunk, s);
      case kAttend: return attention(layer).attend(chunk, s.attention);
      case kOut: return out(layer, chunk, s);
      case kGateUp: return gate_up(layer, chunk, s);
      case kDown: return down(layer, chunk, s);
      case kNormalizeSelected: return normalize_selected(chunk, s);
      case kScreen: return screen(chunk, s);
      case kHead: return screen_.active() ? score_candidates(chunk, s) : head(block_of(phase), chunk, s);
      case kGather: return gather(block_of(phase), chunk);
      default: return make_shared_inputs(phase, chunk, s);
    }
  }

 private:
  // ---- Before and after a step

  StepError prepare(const StepInput& input) {
    input_ = input;
    if (exchanges_.ended()) return kLinkEnded;
    const StepError error = read_tokens(input_, next_tokens_, model_.vocab, plan_.tokens);
    if (error != kFine || !has_work()) return error;
    if (!exchanges_.has_room(plan_.rows(), model_.dim)) return kTooManyTokens;
    plan_.make(model_, layers_[0], tuning_, pool_.threads(), exchanges_.logit_rows(input_.logits));
    exchanges_.begin(plan_, model_.dim, input_.logits);
    plan_.chunks[kScreen] = screen_.plan(input_, plan_) ? plan_.head.chunks() : 0;
    cache_ = CacheView::of(input_, model_.n_kv_head, model_.head_dim);
    best_.assign(plan_.selected.size() * plan_.head.tile_chunks(), {});
    work_.resize(model_, kind_, plan_);
    float* part = exchanges_.part(0);
    embed(model_, plan_.tokens, part ? part : work_.x.data());
    if (part) std::fill(work_.x.begin(), work_.x.begin() + values(), 0.0f);
    return kFine;
  }

  bool has_work() const { return !plan_.tokens.empty(); }
  int selected() const { return int(plan_.selected.size()); }
  int values() const { return plan_.rows() * model_.dim; }  // of x

  void choose_best() {
    screen_.end();
    row_best_.assign(plan_.selected.size(), {});
    for (int m = 0; m < selected(); m++)
      for (int chunk = 0; chunk < plan_.head.tile_chunks(); chunk++)
        merge(row_best_[m], best_[size_t(chunk) * plan_.selected.size() + m]);
    exchanges_.merge_best(row_best_);
    next_tokens_.assign(size_t(input_.tokens_in_all()), 0);
    for (int m = 0; m < selected(); m++) {
      const int out = plan_.tokens[plan_.selected[m]].out;
      input_.best[out] = row_best_[m].nan == 0 ? row_best_[m].index : -1;
      next_tokens_[out] = std::max<int64_t>(input_.best[out], 0);  // a row without a best token is not asked for again
    }
  }

  // ---- Inputs of the products
  //
  // What a product reads is made of x or of the attention's results. Many rows: in a phase of their own, shared out.
  // Few: by every thread for itself when it first needs them, for that takes less time than waiting for each other.

  Phase kind_of(int phase) const {
    const int end = model_.n_layer * kLayerPhases, blocks = first_block_phase();
    if (phase < end) return Phase(phase % kLayerPhases);
    return Phase(phase < blocks ? kLayerPhases + phase - end : kHead + (phase - blocks) % kBlockPhases);
  }
  int first_block_phase() const { return model_.n_layer * kLayerPhases + kLastPhases; }
  int block_of(int phase) const { return (phase - first_block_phase()) / kBlockPhases; }

  const Activations& input(int layer, Phase made_in, const Activations& shared, Scratch& s) {
    if (!plan_.few_rows()) return shared;
    const int phase = layer * kLayerPhases + made_in;
    const uint64_t wanted = plan_.serial << 32 | uint64_t(phase);
    if (std::exchange(s.input_made, wanted) != wanted)
      for (int m = 0; m < plan_.rows(); m++) make_input(phase, m, s.input, s);
    return s.input;
  }

  void make_shared_inputs(int phase, int chunk, Scratch& s) {
    Activations& out = kind_of(phase) == kMerge ? work_.attended_q : work_.normal_q;
    for (int m = Plan::first_row(chunk); m < Plan::end_row(chunk, plan_.rows()); m++) make_input(phase, m, out, s);
  }

  void make_input(int phase, int row, Activations& out, Scratch& s) {
    const int layer = phase / kLayerPhases;
    const LayerWeights& w = layers_[layer];
    const Phase kind = kind_of(phase);
    if (kind != kMerge) return normalize(kind == kNormalizeFfn ? w.ffn_norm : w.attention_norm, row, row, out, s);
    const float* attended = work_.attended.data() + size_t(row) * model_.attention_dim();
    if (plan_.attention.split_index[row] >= 0) {
      attention(layer).merge_parts(row, s.attention, s.row.data());
      attended = s.row.data();
    }
    out.put_row(row, attended, model_.attention_dim());
  }

  void normalize_selected(int chunk, Scratch& s) {
    for (int m = Plan::first_row(chunk); m < Plan::end_row(chunk, selected()); m++) {
      normalize(model_.norm, plan_.selected[m], m, work_.normal_q, s);
      if (screen_.active()) screen_.read_row(m, work_.normal_q, s);
    }
  }

  void normalize(const float* weight, int from, int to, Activations& out, Scratch& s) {
    norm_row(work_.x.data() + size_t(from) * model_.dim, weight, model_.dim, model_.norm_eps, s.row.data());
    out.put_row(to, s.row.data(), model_.dim);
  }

  // ---- Attention

  // One head's query, key or value of some rows.
  void qkv(int layer, int chunk, Scratch& s) {
    const LayerWeights& w = layers_[layer];
    const Split::Part part = plan_.qkv.part(chunk);
    const int D = model_.head_dim, row = part.row, head = part.tile * kLanes / D;
    const uint8_t* next = upcoming(w.qkv, plan_.qkv, w.out, plan_.out, chunk, s.thread);
    const Activations& from = input(layer, kNormalizeAttention, work_.normal_q, s);
    multiply(w.qkv, part.tile, part.tiles, from, row, part.rows, s.out.data(), D, next, tuning_);
    for (int m = 0; m < part.rows; m++) store_head_of(w, layer, row + m, head, s.out.data() + size_t(m) * D);
  }

  // x: the row's query, key or value, as `head` says; changed.
  void store_head_of(const LayerWeights& w, int layer, int row, int head, float* x) {
    const int D = model_.head_dim, key = head - model_.n_head, value = key - model_.n_kv_head;
    const Token& token = plan_.tokens[row];
    if (value >= 0) return cache_.write_value(cache_.first(layer, token.slot, value) + token.position, x);
    const float* norm = key < 0 ? w.q_norm : w.k_norm;
    if (norm) norm_row(x, norm, D, model_.norm_eps, x);
    rotate(x, model_.rope, model_.rotary_dim, token.position);
    if (key >= 0) return cache_.write_key(cache_.first(layer, token.slot, key) + token.position, x);
    float* q = work_.q.data() + (size_t(row) * model_.n_head + head) * D;
    store_query(q, x, 1.44269504f / std::sqrt(float(D)), D, cache_.type);  // exp2 for exp
  }

  LayerAttention attention(int layer) {
    return LayerAttention(model_, plan_, cache_, layer, layers_[layer].window, work_.q.data(), work_.attended.data(),
                          work_.partials.data());
  }

  void out(int layer, int chunk, Scratch& s) {
    const LayerWeights& w = layers_[layer];
    float* part = exchanges_.part(2 * layer + 1);
    add_product(w.out, plan_.out, input(layer, kMerge, work_.attended_q, s), part, chunk, s, w.gate_up, plan_.gate_up);
  }

  // x += product, or with a part of a sum, [rows][dim], part = product: the output and down projections.
  void add_product(const Linear& w, const Split& split, const Activations& from, float* part, int chunk, Scratch& s,
                   const Linear& then, const Split& then_split) {
    const uint8_t* next = upcoming(w, split, then, then_split, chunk, s.thread);
    for_blocks(w, split.part(chunk), 2, next, [&](const Split::Part& p, const uint8_t* following) {
      multiply(w, p.tile, p.tiles, from, p.row, p.rows, s.out.data(), 2 * kLanes, following, tuning_);
      const int first = p.tile * kLanes, n = std::min(p.tiles * kLanes, w.rows - first);
      for (int m = 0; m < p.rows; m++) {
        const float* out = s.out.data() + size_t(m) * 2 * kLanes;
        const size_t at = size_t(p.row + m) * model_.dim + first;
        if (part) {
          std::memcpy(part + at, out, sizeof(float) * n);
          continue;
        }
        float* x = work_.x.data() + at;
        for (int i = 0; i < n; i++) x[i] += out[i];
      }
    });
  }

  void add_sum(int exchange, int chunk) { exchanges_.add_sum(exchange, chunk, work_.x.data(), values()); }

  // ---- Feed-forward

  // silu(gate) * up of 32 hidden values at a time, which are one group of the down projection's input.
  void gate_up(int layer, int chunk, Scratch& s) {
    const LayerWeights& w = layers_[layer];
    const Activations& from = input(layer, kNormalizeFfn, work_.normal_q, s);
    const uint8_t* next = upcoming(w.gate_up, plan_.gate_up, w.down, plan_.down, chunk, s.thread);
    for_blocks(w.gate_up, plan_.gate_up.part(chunk), 4, next, [&](const Split::Part& p, const uint8_t* following) {
      multiply(w.gate_up, p.tile, p.tiles, from, p.row, p.rows, s.out.data(), 4 * kLanes, following, tuning_);
      for (int m = 0; m < p.rows; m++) {
        const float* out = s.out.data() + size_t(m) * 4 * kLanes;
        const f32x16 a = silu(load(out)) * load(out + kLanes);
        const f32x16 b = silu(load(out + 2 * kLanes)) * load(out + 3 * kLanes);
        work_.hidden_q.put_group(p.row + m, p.tile / 4, a, b);
      }
    });
  }

  void down(int layer, int chunk, Scratch& s) {
    const bool last = layer + 1 == model_.n_layer;
    const Linear& head = screen_.active() ? screen_.weights() : model_.head;
    add_product(layers_[layer].down, plan_.down, work_.hidden_q, exchanges_.part(2 * layer + 2), chunk, s,
                last ? head : layers_[layer + 1].qkv, last ? plan_.head : plan_.qkv);
  }

  // ---- The head

  void head(int block, int chunk, Scratch& s) {
    const uint8_t* next = upcoming(model_.head, plan_.head, layers_[0].qkv, plan_.qkv, chunk, s.thread);
    Best* best = &best_[size_t(chunk % plan_.head.tile_chunks()) * plan_.selected.size()];
    Split::Part part = plan_.head.part(chunk);
    std::tie(part.row, part.rows) = plan_.rows_of(block, part);
    for_blocks(model_.head, part, 2, next, [&](const Split::Part& p, const uint8_t* following) {
      multiply(model_.head, p.tile, p.tiles, work_.normal_q, p.row, p.rows, s.out.data(), 2 * kLanes, following,
               tuning_);
      const int first = p.tile * kLanes, n = std::min(p.tiles * kLanes, model_.head.rows - first);
      for (int m = p.row; m < p.row + p.rows; m++) {
        const float* out = s.out.data() + size_t(m - p.row) * 2 * kLanes;
        if (input_.logits) std::memcpy(own_logits(block, m) + first, out, sizeof(float) * n);
        update(best[m], out, first, n);
      }
    });
  }

  float* logits_of(int m) const { return input_.logits_of(plan_.tokens[plan_.selected[m]].out, model_.vocab); }
  float* own_logits(int block, int m) const {
    return exchanges_.alone() ? logits_of(m) : exchanges_.own_logits(block, m - block * plan_.head_rows);
  }

  // One row's logits of one rank.
  void gather(int block, int chunk) {
    const int row = chunk / exchanges_.ranks(), m = block * plan_.head_rows + row;
    if (m < selected()) exchanges_.gather(block, row, chunk % exchanges_.ranks(), logits_of(m));
  }

  void screen(int chunk, Scratch& s) {
    const uint8_t* next = upcoming(screen_.weights(), plan_.head, layers_[0].qkv, plan_.qkv, chunk, s.thread);
    screen_.bound(plan_.head, chunk, work_.normal_q, next, tuning_, s);
  }

  void score_candidates(int chunk, Scratch& s) {
    Best* best = &best_[size_t(chunk) * plan_.selected.size()];
    screen_.score_candidates(plan_.head, chunk, work_.normal_q, tuning_, s, plan_.serial, best);
  }

  // Where the weights begin that a thread will probably want after `chunk`: the next of its share, or else where its
  // share of the product after this one begins.
  const uint8_t* upcoming(const Linear& w, const Split& split, const Linear& then, const Split& then_split, int chunk,
                          int thread) const {
    const Pool::Range mine = pool_.share(split.chunks(), thread);
    if (mine.first <= chunk && chunk + 1 < mine.end) return w.pair(split.part(chunk + 1).tile);
    return then.pair(then_split.part(pool_.share(then_split.chunks(), thread).first).tile);
  }

  ModelWeights model_;
  std::vector<LayerWeights> layers_;
  Tuning tuning_;
  Pool& pool_;
  Kind kind_;

  const std::shared_ptr<Link> link_;
  Exchanges exchanges_;
  StepQueue queue_;
  StepInput input_{};
  CacheView cache_{};
  Plan plan_;
  Workspace work_;
  HeadScreen screen_;
  std::vector<Best> best_;            // [chunk of the head's rows][selected]
  std::vector<Best> row_best_;        // [selected], of all ranks
  std::vector<int64_t> next_tokens_;  // the best of the last step, in the order of its logits
};

}  // namespace gf
