// One forward of the whole model: the phases of every layer, run by the pool without leaving C++.
//
//   normalize x -> qkv heads (+ bias, norm, rotation, cache write) -> attention -> merge + quantize -> out rows + x
//   normalize x -> gate and up rows (+ SiLU, quantize) -> down rows + x;        at the end: normalize -> head rows
//
// Where only best tokens are wanted, a screen may tell first which of the head's rows can hold them (screen.h).
//
// x stays float32. Padding tokens are dropped before the first layer.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <memory>
#include <mutex>
#include <utility>
#include <vector>

#include "activations.h"
#include "attention.h"
#include "linear.h"
#include "pool.h"
#include "screen.h"

namespace gf {

// ---- What Python passes in (decoder.py holds the ctypes twins: same order, same types).

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
  float norm_eps;
  const void* embedding;         // [vocab][dim]
  const float* embedding_scale;  // int8: [vocab][ceil(dim / group)]
  const float* rope;      // [positions][2][rotary_dim / 2]: cos, sin
  const float* norm;
  Linear head;
  const LayerWeights* layers;
};

struct StepInput {
  int32_t rows, row_tokens;   // B, S
  int32_t length, positions;  // every real token lies below `length`; `positions` of a slot, the last one scratch
  int32_t slots;              // of the cache
  int32_t cache_type;         // attention.h's CacheType
  const int64_t* tokens;     // [B][S]; null: the best tokens of the step before, which had the same rows
  const int64_t* position;   // [B][S]; positions - 1: padding
  const int64_t* slot;       // [B], or null: row b is slot b
  const int64_t* select;     // [B], or null: logits of every token
  void* k;                   // [layer][slot][kv head][position][head_dim]
  void* v;
  float* k_scale;  // int8 only: [layer][slot][kv head][position]
  float* v_scale;
  float* logits;             // [B][vocab], or [B][S][vocab]; null: only the best are wanted
  int64_t* best;             // [B] or [B][S]: the largest logit's index, the lowest of equals; -1 where none is finite
};

enum StepError { kFine = 0, kBadToken = 1, kBadPosition = 2, kBadSlot = 3, kBadSelect = 4 };

// ---- How a matrix product is cut into chunks of work.

struct Split {
  int tiles, tiles_each, rows, rows_each;

  // `unit` tiles belong together. About `chunks` of them: small enough to share out evenly, large enough to stream.
  static Split make(int tiles, int unit, int rows, int cols, int chunks) {
    Split s{tiles, 0, rows, 0};
    const int fit = 256 * 1024 / cols / 24 * 24;  // rows of x that stay in the level 2 cache
    s.rows_each = std::min(rows, std::max(fit, 48));
    s.tiles_each = unit * std::max(1, std::min(tiles / unit / chunks, 1024 / unit));
    while (s.chunks() > Pool::kMaxChunks) s.tiles_each *= 2;
    return s;
  }
  int tile_chunks() const { return (tiles + tiles_each - 1) / tiles_each; }
  int chunks() const { return rows == 0 ? 0 : tile_chunks() * ((rows + rows_each - 1) / rows_each); }
  struct Part {
    int tile, tiles, row, rows;
  };
  Part part(int chunk) const {
    const int tile = chunk % tile_chunks() * tiles_each, row = chunk / tile_chunks() * rows_each;
    return {tile, std::min(tiles_each, tiles - tile), row, std::min(rows_each, rows - row)};
  }
};

class Decoder final : public Job {
 public:
  Decoder(const ModelWeights& model, Pool& pool)
      : model_(model), layers_(model.layers, model.layers + model.n_layer), pool_(pool),
        kind_(model.head.format == kBf16 ? Kind::kBf16 : Kind::kInt8) {
    scratch_.resize(size_t(pool.threads()));
    for (int i = 0; i < pool.threads(); i++) scratch_[i].thread = i;
  }

  // Begins a step on the pool's other threads; all earlier ones were finished. What `input` points to must live until
  // this one is.
  StepError start(const StepInput& input) {
    input_ = input;
    const StepError error = prepare();
    if (error != kFine) return error;
    started_++;
    if (tokens_.empty()) {
      finished_.store(started_);
      return kFine;
    }
    running_ = true;
    pool_.start(*this);
    return kFine;
  }

  // Begins a step as soon as the one before has ended, whose best tokens it takes.
  StepError follow(const StepInput& input) {
    const std::unique_lock<std::mutex> lock(queue_);
    if (running_) {
      queued_ = input;
      has_queued_ = true;
      started_++;
      return kFine;
    }
    pool_.wait_until_idle();
    return start(input);
  }

  // The squares of the head's inputs, summed over the last step's tokens: [dim]. The pool is idle.
  void head_energy(float* out) {
    std::fill(out, out + model_.dim, 0.0f);
    for (int m = 0; m < int(selected_.size()); m++) {
      normal_q_.restore(m, model_.dim, scratch_[0].row.data());
      for (int i = 0; i < model_.dim; i++) out[i] += scratch_[0].row[i] * scratch_[0].row[i];
    }
  }

  // From the next step on. The pool is idle.
  void set_screen(const Screen& screen) { screen_ = screen; }
  void set_tuning(const Tuning& tuning) { tuning_ = tuning; }

  // Helps until the first `count` steps have ended: their logits and best tokens are there.
  StepError finish(uint64_t count) {
    pool_.help_until([&] { return finished_.load(std::memory_order_acquire) >= count; });
    if (count == started_) pool_.wait_until_idle();
    return failed_.exchange(kFine);
  }

  // ---- Job

  // A step has ended. The one that waits is taken before anyone is told, so that another finds its place free.
  bool again() override {
    choose_best();
    const std::unique_lock<std::mutex> lock(queue_);
    const bool waited = std::exchange(has_queued_, false);
    if (waited) {
      input_ = queued_;
      failed_.store(prepare());
    }
    running_ = waited && failed_.load() == kFine && !tokens_.empty();
    finished_.fetch_add(waited && !running_ ? 2 : 1, std::memory_order_release);
    return running_;
  }

  int phases() const override { return model_.n_layer * kLayerPhases + kLastPhases; }

  int chunks(int phase) const override {
    return chunks_[phase / kLayerPhases < model_.n_layer ? phase % kLayerPhases
                                                         : kLayerPhases + phase % kLayerPhases];
  }

  void run(int phase, int chunk, int thread) override {
    const int index = phase / kLayerPhases;
    Scratch& s = scratch_[thread];
    if (index == model_.n_layer) {
      switch (phase % kLayerPhases) {
        case kNormalizeSelected: return normalize_selected(chunk, s);
        case kScreen: return screen(chunk, s);
        default: return screened_ ? survivors(chunk, s) : head(chunk, s);
      }
    }
    const LayerWeights& w = layers_[index];
    switch (phase % kLayerPhases) {
      case kQkv: return qkv(w, index, chunk, s);
      case kAttend: return attend(w, index, chunk, s);
      case kOut: return out(w, index, chunk, s);
      case kGateUp: return gate_up(w, index, chunk, s);
      case kDown: return down(w, index + 1, chunk, s);
      default: return make_shared_inputs(phase, chunk, s);
    }
  }

 private:
  enum LayerPhase { kNormalizeAttention, kQkv, kAttend, kMerge, kOut, kNormalizeFfn, kGateUp, kDown, kLayerPhases };
  enum LastPhase { kNormalizeSelected, kScreen, kHead, kLastPhases };

  struct Token {
    int id, position, slot, out;  // `out`: its place among the logits; -1: not wanted
  };

  // The largest of some logits and where it is, the lowest of equals; `poison` is NaN if one of them is.
  struct Best {
    float value = -INFINITY, poison = 0;
    int index = -1;
  };

  // Neighbouring tokens of one slot, whose queries read the cache together.
  struct Span {
    int first, count;
  };

  // One KV head of one span: `part_count` parts of the cache from `first_part`. They are all when `whole`; else each
  // part's result is stored, to be merged when all are there.
  struct Item {
    Span span;
    int kv_head, first_part, part_count;
    bool whole;
  };

  struct Scratch {
    int thread = 0;
    Buffer<float> out, row, coarse;
    Activations input;  // of few rows, see input()
    uint64_t made = 0;
    std::vector<float> floor;  // [selected], see floors()
    uint64_t floors_made = 0;
    AttentionScratch attention;
    std::vector<const float*> q;
    std::vector<int> position;
    std::vector<Partial> state, part, chunk;
  };

  static constexpr int kRowBlock = 48;        // rows whose products are finished before going on
  static constexpr int kSpanTokens = 16;      // tokens of a slot attended together
  static constexpr int kItemsEach = 4;        // of the attention to a thread, where there is that much to share out
  static constexpr int kFewRows = 4;          // rows to a chunk of the small phases
  static constexpr int kVain = 4;             // a screen that leaves more than this part of the head was in vain,
  static constexpr int kRest = 15;            // and as many steps do without

  // ---- Setting up

  StepError prepare() {
    const StepError error = collect_tokens();
    if (error != kFine || tokens_.empty()) return error;
    plan();
    embed();
    return kFine;
  }

  StepError collect_tokens() {
    const int64_t* ids = input_.tokens ? input_.tokens : chosen_.data();
    tokens_.clear();
    const int all = input_.rows * input_.row_tokens, scratch = input_.positions - 1;
    for (int i = 0; i < all; i++) {
      const int row = i / input_.row_tokens, column = i % input_.row_tokens;
      const bool wanted = !input_.select || input_.select[row] == column;
      if (input_.select && (input_.select[row] < 0 || input_.select[row] >= input_.row_tokens)) return kBadSelect;
      const int out = !wanted ? -1 : input_.select ? row : i;
      if (input_.position[i] == scratch) {
        if (wanted) input_.best[out] = 0;
        if (wanted && input_.logits) std::memset(logits(out), 0, sizeof(float) * model_.vocab);
        continue;
      }
      const int64_t slot = input_.slot ? input_.slot[row] : row;
      if (ids[i] < 0 || ids[i] >= model_.vocab) return kBadToken;
      if (input_.position[i] < 0 || input_.position[i] >= std::min(input_.length, scratch)) return kBadPosition;
      if (slot < 0 || slot >= input_.slots) return kBadSlot;
      tokens_.push_back({int(ids[i]), int(input_.position[i]), int(slot), out});
    }
    return kFine;
  }

  void plan() {
    const int rows = int(tokens_.size()), chunks = pool_.threads() * tuning_.chunks_each;
    selected_.clear();
    for (int i = 0; i < rows; i++)
      if (tokens_[i].out >= 0) selected_.push_back(i);
    plan_attention();
    const int head_tiles = model_.head_dim / kLanes;
    qkv_split_ = {heads() * head_tiles, head_tiles, rows, std::min(rows, kRowBlock)};
    out_split_ = Split::make(layers_[0].out.tiles(), 2, rows, layers_[0].out.cols, chunks);
    gate_up_split_ = Split::make(layers_[0].gate_up.tiles(), 4, rows, model_.dim, chunks);
    down_split_ = Split::make(layers_[0].down.tiles(), 2, rows, layers_[0].down.cols, chunks);
    head_split_ = Split::make(model_.head.tiles(), 2, int(selected_.size()), model_.dim, chunks);
    best_.assign(selected_.size() * head_split_.tile_chunks(), {});
    plan_screen(int(selected_.size()));
    const int row_chunks = few() ? 0 : (rows + kFewRows - 1) / kFewRows;
    chunks_[kNormalizeAttention] = chunks_[kNormalizeFfn] = chunks_[kMerge] = row_chunks;
    planned_++;
    chunks_[kQkv] = qkv_split_.chunks();
    chunks_[kAttend] = int(items_.size());
    chunks_[kOut] = out_split_.chunks();
    chunks_[kGateUp] = gate_up_split_.chunks();
    chunks_[kDown] = down_split_.chunks();
    chunks_[kLayerPhases + kNormalizeSelected] = (int(selected_.size()) + kFewRows - 1) / kFewRows;
    chunks_[kLayerPhases + kScreen] = screened_ ? head_split_.chunks() : 0;
    chunks_[kLayerPhases + kHead] = head_split_.chunks();
    resize_buffers(rows);
  }

  void plan_screen(int rows) {
    const bool possible = !input_.logits && rows > 0 && rows <= screen_.most_rows;
    screened_ = possible && rest_ == 0;
    if (possible && rest_ > 0) rest_--;
    if (!screened_) return;
    looked_ = 0;
    guess_.assign(best_.size(), {});
    if (glance_.size() < size_t(rows)) glance_.resize(size_t(rows));
    upper_.resize(size_t(rows) * model_.head.tiles());
    if (kind_ == Kind::kBf16) coarse_q_.resize(Kind::kInt8, rows, model_.dim);
  }

  void resize_buffers(int rows) {
    const int dim = model_.dim, heads_dim = model_.n_head * model_.head_dim;
    if (rows <= capacity_) return resize_partials();
    capacity_ = rows;
    x_.resize(size_t(rows) * dim);
    q_.resize(size_t(rows) * heads_dim);
    attended_.resize(size_t(rows) * heads_dim);
    normal_q_.resize(kind_, rows, dim);
    attended_q_.resize(kind_, rows, heads_dim);
    hidden_q_.resize(kind_, rows, model_.ffn_dim);
    for (auto& s : scratch_) resize_scratch(s, rows);
    resize_partials();
  }

  void resize_scratch(Scratch& s, int rows) {
    const int queries = std::min(rows, kSpanTokens) * group();
    s.out.resize(size_t(std::min(rows, kRowBlock)) * std::max(model_.head_dim, 4 * kLanes));
    const int widest = round_up(std::max(model_.dim, model_.n_head * model_.head_dim), kGroup);
    s.row.resize(size_t(widest));
    s.coarse.resize(size_t(widest));
    s.input.resize(kind_, kFewRows, widest);
    s.attention.resize(model_.head_dim, queries);
    s.q.resize(size_t(queries));
    s.position.resize(size_t(queries));
    s.state.resize(size_t(queries));
    s.part.resize(size_t(queries));
    s.chunk.resize(size_t(queries));
    for (int i = 0; i < queries; i++) {
      s.state[i] = partial_at(s.attention.state.data(), i, model_.head_dim);
      s.chunk[i] = partial_at(s.attention.chunk.data(), i, model_.head_dim);
    }
  }

  void resize_partials() {
    const size_t needed = size_t(split_tokens_) * model_.n_head * split_parts_ * (model_.head_dim + kLanes);
    if (partials_.size() < needed) partials_.resize(needed);
  }

  // Spans and items, in an order that does not matter to the result. What is longer than a thread's share is split.
  void plan_attention() {
    spans_.clear();
    items_.clear();
    split_tokens_ = split_parts_ = 0;
    split_index_.assign(tokens_.size(), -1);
    const int rows = int(tokens_.size());
    int64_t work = 0;
    for (int first = 0; first < rows;) {
      int count = 1;
      while (first + count < rows && count < kSpanTokens && tokens_[first + count].slot == tokens_[first].slot) count++;
      spans_.push_back({first, count});
      work += int64_t(count) * parts(spans_.back()) * model_.n_kv_head;
      first += count;
    }
    const int64_t share = std::max<int64_t>(1, work / (kItemsEach * pool_.threads()));
    for (const Span& span : spans_) add_items(span, share);
  }

  int parts(const Span& span) const {
    int last = 0;
    for (int i = 0; i < span.count; i++) last = std::max(last, tokens_[span.first + i].position);
    return last / (kChunk * kPart) + 1;
  }

  void add_items(const Span& span, int64_t share) {
    const int all = parts(span), pieces = int(std::min<int64_t>(all, (int64_t(all) * span.count + share - 1) / share));
    const bool whole = pieces == 1;
    if (!whole) {
      for (int i = 0; i < span.count; i++) split_index_[span.first + i] = split_tokens_++;
      split_parts_ = std::max(split_parts_, all);
    }
    const int each = (all + pieces - 1) / pieces;
    for (int head = 0; head < model_.n_kv_head; head++)
      for (int part = 0; part < all; part += each)
        items_.push_back({span, head, part, std::min(each, all - part), whole});
  }

  int heads() const { return model_.n_head + 2 * model_.n_kv_head; }
  int group() const { return model_.n_head / model_.n_kv_head; }

  // ---- Phases

  void embed() {
    const auto* full = static_cast<const float*>(model_.embedding);
    const auto* half = static_cast<const uint16_t*>(model_.embedding);
    switch (model_.embedding_type) {
      case 0: return embed_from(full, [](float v) { return v; });
      case 1: return embed_from(half, [](uint16_t v) { return bf16_to_float(v); });
      case 2: return embed_from(half, [](uint16_t v) { return float(read_as<_Float16>(&v)); });
      default: return embed_int8();
    }
  }

  void embed_int8() {
    embed_from(static_cast<const int8_t*>(model_.embedding), [](int8_t v) { return float(v); });
    const int group = model_.embedding_group, groups = (model_.dim + group - 1) / group;
    for (size_t i = 0; i < tokens_.size(); i++)
      for (int d = 0; d < model_.dim; d++)
        x_[i * model_.dim + d] *= model_.embedding_scale[size_t(tokens_[i].id) * groups + d / group];
  }

  template <class T, class F>
  void embed_from(const T* table, F&& to_float) {
    for (size_t i = 0; i < tokens_.size(); i++) {
      const T* from = table + size_t(tokens_[i].id) * model_.dim;
      std::transform(from, from + model_.dim, x_.data() + i * model_.dim, to_float);
    }
  }

  // What a product reads is made of x or of the attention's results. Many rows: in a phase of their own, shared out.
  // Few: by every thread for itself when it first needs them, for that takes less time than waiting for each other.
  bool few() const { return tokens_.size() <= kFewRows; }

  const Activations& input(int layer, LayerPhase made_in, const Activations& shared, Scratch& s) {
    if (!few()) return shared;
    const int phase = layer * kLayerPhases + made_in;
    const uint64_t wanted = planned_ << 32 | uint64_t(phase);
    if (std::exchange(s.made, wanted) != wanted)
      for (int m = 0; m < int(tokens_.size()); m++) make_input(phase, m, s.input, s);
    return s.input;
  }

  void make_shared_inputs(int phase, int chunk, Scratch& s) {
    Activations& out = phase % kLayerPhases == kMerge ? attended_q_ : normal_q_;
    for (int m = chunk * kFewRows; m < std::min(int(tokens_.size()), (chunk + 1) * kFewRows); m++)
      make_input(phase, m, out, s);
  }

  void make_input(int phase, int row, Activations& out, Scratch& s) {
    const LayerWeights& w = layers_[phase / kLayerPhases];
    if (phase % kLayerPhases != kMerge)
      return normalize(phase % kLayerPhases == kNormalizeFfn ? w.ffn_norm : w.attention_norm, row, row, out, s);
    const int width = model_.n_head * model_.head_dim;
    const float* attended = attended_.data() + size_t(row) * width;
    if (split_index_[row] >= 0) attended = merge_token(row, s);
    out.put_row(row, attended, width);
  }

  void normalize_selected(int chunk, Scratch& s) {
    const int rows = int(selected_.size());
    for (int m = chunk * kFewRows; m < std::min(rows, (chunk + 1) * kFewRows); m++) {
      normalize(model_.norm, selected_[m], m, normal_q_, s);
      if (screened_) glance(m, s);
    }
  }

  // What the screen reads of the row that was normalized last.
  void glance(int m, Scratch& s) {
    if (kind_ == Kind::kBf16) coarse_q_.put_row(m, s.row.data(), model_.dim);
    normal_q_.restore(m, model_.dim, s.row.data());
    coarse().restore(m, model_.dim, s.coarse.data());
    glance_[m].take(screen_, s.row.data(), s.coarse.data(), model_.dim);
  }

  const Activations& coarse() const { return kind_ == Kind::kBf16 ? coarse_q_ : normal_q_; }

  void normalize(const float* weight, int from, int to, Activations& out, Scratch& s) {
    norm_row(x_.data() + size_t(from) * model_.dim, weight, model_.dim, model_.norm_eps, s.row.data());
    out.put_row(to, s.row.data(), model_.dim);
  }

  // One head's query, key or value of some rows.
  void qkv(const LayerWeights& w, int layer, int chunk, Scratch& s) {
    const Split::Part part = qkv_split_.part(chunk);
    const int D = model_.head_dim, row = part.row, head = part.tile * kLanes / D;
    const uint8_t* next = upcoming(w.qkv, qkv_split_, w.out, out_split_, chunk, s.thread);
    const Activations& from = input(layer, kNormalizeAttention, normal_q_, s);
    multiply(w.qkv, part.tile, part.tiles, from, row, part.rows, s.out.data(), D, next, tuning_);
    for (int m = 0; m < part.rows; m++) {
      float* x = s.out.data() + size_t(m) * D;
      const Token& token = tokens_[row + m];
      if (head < model_.n_head) {
        if (w.q_norm) norm_row(x, w.q_norm, D, model_.norm_eps, x);
        rotate(x, token.position);
        float* q = q_.data() + (size_t(row + m) * model_.n_head + head) * D;
        store_query(q, x, 1.44269504f / std::sqrt(float(D)), D, CacheType(input_.cache_type));  // exp2 for exp
      } else if (head < model_.n_head + model_.n_kv_head) {
        if (w.k_norm) norm_row(x, w.k_norm, D, model_.norm_eps, x);
        rotate(x, token.position);
        write_cache(input_.k, input_.k_scale, layer, token, head - model_.n_head, x);
      } else {
        write_cache(input_.v, input_.v_scale, layer, token, head - model_.n_head - model_.n_kv_head, x);
      }
    }
  }

  void rotate(float* x, int position) const {
    const int pairs = model_.rotary_dim / 2;
    const float* cos = model_.rope + size_t(position) * model_.rotary_dim;
    const float* sin = cos + pairs;
    int i = 0;
    for (; i + 8 <= pairs; i += 8)
      store(x + 2 * i, rotate_pairs(load(x + 2 * i), load_twice(cos + i), load_twice(sin + i)));
    for (; i < pairs; i++) {
      const float even = x[2 * i], odd = x[2 * i + 1];
      x[2 * i] = even * cos[i] - odd * sin[i];
      x[2 * i + 1] = odd * cos[i] + even * sin[i];
    }
  }

  // The first position of a slot's KV head, counted in positions.
  size_t cache_position(int layer, int slot, int kv_head) const {
    return ((size_t(layer) * input_.slots + slot) * model_.n_kv_head + kv_head) * input_.positions;
  }

  // Calls f with a null pointer of the cache's element type.
  template <class F>
  void with_cache_type(F&& f) const {
    switch (CacheType(input_.cache_type)) {
      case CacheType::kFloat: return f(static_cast<float*>(nullptr));
      case CacheType::kBf16: return f(static_cast<uint16_t*>(nullptr));
      case CacheType::kInt8: return f(static_cast<int8_t*>(nullptr));
    }
  }

  void write_cache(void* cache, float* scale, int layer, const Token& token, int kv_head, const float* x) const {
    const size_t at = cache_position(layer, token.slot, kv_head) + token.position;
    with_cache_type([&](auto* type) {
      store_head(static_cast<decltype(type)>(cache) + at * model_.head_dim, scale ? scale + at : nullptr, x,
                 model_.head_dim);
    });
  }

  void attend(const LayerWeights& w, int layer, int chunk, Scratch& s) {
    const Item& item = items_[chunk];
    const size_t at = cache_position(layer, tokens_[item.span.first].slot, item.kv_head);
    with_cache_type([&](auto* type) {
      using T = std::remove_pointer_t<decltype(type)>;
      const size_t first = at * model_.head_dim;
      const bool scaled = input_.k_scale != nullptr;
      attend_item(w, item, Slot<T>{static_cast<T*>(input_.k) + first, static_cast<T*>(input_.v) + first,
                                   scaled ? input_.k_scale + at : nullptr, scaled ? input_.v_scale + at : nullptr},
                  (first_position(layer, chunk + 1) - ptrdiff_t(at)) * model_.head_dim, s);
    });
  }

  // Where an item begins in the cache: the one this thread will probably take next.
  ptrdiff_t first_position(int layer, int chunk) const {
    const Item& item = items_[std::min(chunk, int(items_.size()) - 1)];
    const size_t at = cache_position(layer, tokens_[item.span.first].slot, item.kv_head);
    return ptrdiff_t(at) + item.first_part * kPart * kChunk;
  }

  Queries gather_queries(const Item& item, int window, Scratch& s) const {
    const int D = model_.head_dim, G = group();
    for (int i = 0; i < item.span.count * G; i++) {
      const int token = item.span.first + i / G, head = item.kv_head * G + i % G;
      s.q[i] = q_.data() + (size_t(token) * model_.n_head + head) * D;
      s.position[i] = tokens_[token].position;
    }
    return {item.span.count * G, s.q.data(), s.position.data(), window};
  }

  template <class T>
  void attend_item(const LayerWeights& w, const Item& item, const Slot<T>& slot, ptrdiff_t next_item, Scratch& s) {
    const int D = model_.head_dim, G = group();
    const Queries queries = gather_queries(item, w.window, s);
    for (int i = 0; item.whole && i < queries.count; i++) clear(s.state[i], D);
    for (int part = item.first_part; part < item.first_part + item.part_count; part++) {
      for (int i = 0; i < queries.count; i++)
        s.part[i] = item.whole ? partial_at(s.attention.part.data(), i, D)
                               : stored_partial(item.span.first + i / G, item.kv_head * G + i % G, part);
      const bool last = part + 1 == item.first_part + item.part_count;
      attend_part(queries, part, slot, last ? next_item : ptrdiff_t(part + 1) * kPart * kChunk * D, s);
      for (int i = 0; item.whole && i < queries.count; i++) merge(s.state[i], s.part[i], D);
    }
    for (int i = 0; item.whole && i < queries.count; i++) {
      const int token = item.span.first + i / G, head = item.kv_head * G + i % G;
      finish_query(s.state[i], attended_.data() + (size_t(token) * model_.n_head + head) * D);
    }
  }

  // All queries' results of a part: in s.part.
  template <class T>
  void attend_part(const Queries& queries, int part, const Slot<T>& slot, ptrdiff_t next_part, Scratch& s) {
    const int D = model_.head_dim;
    const int first = std::max(part * kPart, queries.first_seen() / kChunk);
    const int end = std::min((part + 1) * kPart, queries.last_position() / kChunk + 1);
    for (int i = 0; first >= end && i < queries.count; i++) *s.part[i].max = -INFINITY;
    for (int chunk = first; chunk < end; chunk++) {
      const ptrdiff_t next = chunk + 1 == end ? next_part : ptrdiff_t(chunk + 1) * kChunk * D;
      attend_chunk(queries, chunk, slot, next, D, s.attention, (chunk == first ? s.part : s.chunk).data());
      for (int i = 0; chunk > first && i < queries.count; i++) merge(s.part[i], s.chunk[i], D);
    }
  }

  Partial stored_partial(int token, int head, int part) {
    const int index = (split_index_[token] * model_.n_head + head) * split_parts_ + part;
    return partial_at(partials_.data(), index, model_.head_dim);
  }

  void finish_query(const Partial& p, float* out) const {
    const f32x16 inverse = splat(1.0f / *p.sum);
    for (int d = 0; d < model_.head_dim; d += kLanes) store(out + d, load(p.o + d) * inverse);
  }

  // All heads of a token from the partial results of its parts: in s.row.
  const float* merge_token(int token, Scratch& s) {
    const int parts = tokens_[token].position / (kChunk * kPart) + 1, D = model_.head_dim;
    const Partial total = s.state[0];
    for (int head = 0; head < model_.n_head; head++) {
      clear(total, D);
      for (int part = 0; part < parts; part++) merge(total, stored_partial(token, head, part), D);
      finish_query(total, s.row.data() + head * D);
    }
    return s.row.data();
  }

  void out(const LayerWeights& w, int layer, int chunk, Scratch& s) {
    const Activations& from = input(layer, kMerge, attended_q_, s);
    add_product(w.out, out_split_, from, chunk, s, w.gate_up, gate_up_split_);
  }

  // x += product: the output and down projections.
  void add_product(const Linear& w, const Split& split, const Activations& from, int chunk, Scratch& s,
                   const Linear& then, const Split& then_split) {
    const uint8_t* next = upcoming(w, split, then, then_split, chunk, s.thread);
    for_blocks(w, split.part(chunk), 2, next, [&](const Split::Part& p, const uint8_t* following) {
      multiply(w, p.tile, p.tiles, from, p.row, p.rows, s.out.data(), 2 * kLanes, following, tuning_);
      const int first = p.tile * kLanes, n = std::min(p.tiles * kLanes, w.rows - first);
      for (int m = 0; m < p.rows; m++) {
        const float* out = s.out.data() + size_t(m) * 2 * kLanes;
        float* x = x_.data() + size_t(p.row + m) * model_.dim + first;
        for (int i = 0; i < n; i++) x[i] += out[i];
      }
    });
  }

  void down(const LayerWeights& w, int next_layer, int chunk, Scratch& s) {
    const bool last = next_layer == model_.n_layer;
    const Linear& head = screened_ ? screen_.weights : model_.head;
    add_product(w.down, down_split_, hidden_q_, chunk, s, last ? head : layers_[next_layer].qkv,
                last ? head_split_ : qkv_split_);
  }

  // silu(gate) * up of 32 hidden values at a time, which are one group of the down projection's input.
  void gate_up(const LayerWeights& w, int layer, int chunk, Scratch& s) {
    const Activations& from = input(layer, kNormalizeFfn, normal_q_, s);
    const uint8_t* next = upcoming(w.gate_up, gate_up_split_, w.down, down_split_, chunk, s.thread);
    for_blocks(w.gate_up, gate_up_split_.part(chunk), 4, next, [&](const Split::Part& p, const uint8_t* following) {
      multiply(w.gate_up, p.tile, p.tiles, from, p.row, p.rows, s.out.data(), 4 * kLanes, following, tuning_);
      for (int m = 0; m < p.rows; m++) {
        const float* out = s.out.data() + size_t(m) * 4 * kLanes;
        const f32x16 a = silu(load(out)) * load(out + kLanes);
        const f32x16 b = silu(load(out + 2 * kLanes)) * load(out + 3 * kLanes);
        hidden_q_.put_group(p.row + m, p.tile / 4, a, b);
      }
    });
  }

  void head(int chunk, Scratch& s) {
    const uint8_t* next = upcoming(model_.head, head_split_, layers_[0].qkv, qkv_split_, chunk, s.thread);
    Best* best = &best_[size_t(chunk % head_split_.tile_chunks()) * selected_.size()];
    for_blocks(model_.head, head_split_.part(chunk), 2, next, [&](const Split::Part& p, const uint8_t* following) {
      multiply(model_.head, p.tile, p.tiles, normal_q_, p.row, p.rows, s.out.data(), 2 * kLanes, following, tuning_);
      const int first = p.tile * kLanes, n = std::min(p.tiles * kLanes, model_.vocab - first);
      for (int m = p.row; m < p.row + p.rows; m++) {
        const float* out = s.out.data() + size_t(m - p.row) * 2 * kLanes;
        if (input_.logits) std::memcpy(logits(tokens_[selected_[m]].out) + first, out, sizeof(float) * n);
        look(out, first, n, best[m]);
      }
    });
  }

  // What each tile's logits are at most, and a guess at the best.
  void screen(int chunk, Scratch& s) {
    const Screen& screen = screen_;
    const uint8_t* next = upcoming(screen.weights, head_split_, layers_[0].qkv, qkv_split_, chunk, s.thread);
    Best* guess = &guess_[size_t(chunk) * selected_.size()];
    for_blocks(screen.weights, head_split_.part(chunk), 2, next, [&](const Split::Part& p, const uint8_t* following) {
      multiply(screen.weights, p.tile, p.tiles, coarse(), p.row, p.rows, s.out.data(), 2 * kLanes, following, tuning_);
      for (int t = 0; t < p.tiles; t++) {
        const int tile = p.tile + t, first = tile * kLanes;
        gf::estimate(screen, tile, &glance_[p.row], p.rows, s.out.data() + t * kLanes, 2 * kLanes);
        for (int m = p.row; m < p.row + p.rows; m++) {
          const float* out = s.out.data() + ((m - p.row) * 2 + t) * kLanes;
          const f32x16 likely = keep_range(load(out), 0, model_.vocab - first);
          const float value = reduce_max(likely);
          if (value > guess[m].value) guess[m].value = value, guess[m].index = first;
          upper_[size_t(m) * model_.head.tiles() + tile] = reduce_max(likely + margin(screen, tile, glance_[m]));
        }
      }
    });
  }

  // The logits that the screen has not ruled out: of all rows where it has not for one.
  void survivors(int chunk, Scratch& s) {
    const Split::Part part = head_split_.part(chunk);
    Best* best = &best_[size_t(chunk) * selected_.size()];
    const std::vector<float>& least = floors(s);
    int looked = 0;
    for (int tile = part.tile; tile < part.tile + part.tiles; tile++) {
      bool alive = false;
      for (int m = 0; m < part.rows; m++)
        alive |= !(upper_[size_t(m) * model_.head.tiles() + tile] < least[m]);  // NaN rules nothing out
      if (alive) look_at_tile(tile, 0, part.rows, s, best), looked++;
    }
    looked_.fetch_add(looked, std::memory_order_relaxed);
  }

  // A logit of each row that is known: the best of the tile that was guessed. Every thread asks for itself.
  const std::vector<float>& floors(Scratch& s) {
    if (std::exchange(s.floors_made, planned_) == planned_) return s.floor;
    s.floor.resize(selected_.size());
    for (int i = 0; i < int(selected_.size()); i++) {
      Best guess, found;
      for (int chunk = 0; chunk < head_split_.tile_chunks(); chunk++) {
        const Best& part = guess_[size_t(chunk) * selected_.size() + i];
        if (part.value > guess.value) guess = part;
      }
      if (guess.index >= 0) look_at_tile(guess.index / kLanes, i, 1, s, &found);
      s.floor[i] = found.value + found.poison;
    }
    return s.floor;
  }

  void look_at_tile(int tile, int row, int rows, Scratch& s, Best* best) {
    multiply(model_.head, tile, 1, normal_q_, row, rows, s.out.data(), kLanes, model_.head.pair(tile), tuning_);
    for (int m = 0; m < rows; m++)
      look(s.out.data() + m * kLanes, tile * kLanes, std::min(kLanes, model_.vocab - tile * kLanes), best[m]);
  }

  float* logits(int out) const { return input_.logits + size_t(out) * model_.vocab; }

  // Up to 32 logits from `first`.
  static void look(const float* out, int first, int n, Best& best) {
    f32x16 top = splat(-INFINITY), poison = splat(0.0f);
    for (int i = 0; i < n; i += kLanes) {
      const f32x16 v = keep_range(load(out + i), 0, n - i);
      top = max(top, v);
      poison = fma(max(splat(-3e38f), v), splat(0.0f), poison);  // the maximum of a number and NaN is the second
    }
    const float value = reduce_max(top);
    best.poison += reduce_add(poison);
    if (value > best.value) best.value = value, best.index = first + int(std::find(out, out + n, value) - out);
  }

  void choose_best() {
    if (screened_ && looked_ > model_.head.tiles() / kVain) rest_ = kRest;
    const size_t rows = selected_.size();
    chosen_.assign(size_t(input_.rows) * input_.row_tokens, 0);
    for (size_t m = 0; m < rows; m++) {
      Best total;
      for (int chunk = 0; chunk < head_split_.tile_chunks(); chunk++) {
        const Best& part = best_[chunk * rows + m];
        total.poison += part.poison;
        if (part.value > total.value) total.value = part.value, total.index = part.index;
      }
      const int out = tokens_[selected_[m]].out;
      input_.best[out] = total.poison == 0 ? total.index : -1;
      chosen_[out] = std::max<int64_t>(input_.best[out], 0);  // a row without a best token is not asked for again
    }
  }

  // Calls run(part, weights wanted next) for `unit` tiles and kRowBlock rows at a time.
  template <class F>
  static void for_blocks(const Linear& w, const Split::Part& all, int unit, const uint8_t* next, F&& run) {
    const int end = all.tile + all.tiles, end_row = all.row + all.rows;
    for (int tile = all.tile; tile < end; tile += unit) {
      const uint8_t* following = tile + unit < end ? w.pair(tile + unit) : next;
      for (int row = all.row; row < end_row; row += kRowBlock)
        run({tile, std::min(unit, end - tile), row, std::min(kRowBlock, end_row - row)}, following);
    }
  }

  // Where the weights begin that a thread will probably want after `chunk`: on in its share, then its next share.
  const uint8_t* upcoming(const Linear& w, const Split& split, const Linear& then, const Split& then_split, int chunk,
                          int thread) const {
    const Pool::Range mine = pool_.share(split.chunks(), thread);
    if (mine.first <= chunk && chunk + 1 < mine.end) return w.pair(split.part(chunk + 1).tile);
    return then.pair(then_split.part(pool_.share(then_split.chunks(), thread).first).tile);
  }

  ModelWeights model_;
  Screen screen_{};  // of the head
  Tuning tuning_;
  std::vector<LayerWeights> layers_;
  Pool& pool_;
  Kind kind_;
  StepInput input_{};

  std::mutex queue_;  // guards the step that waits and whether one runs
  StepInput queued_{};
  bool has_queued_ = false, running_ = false;
  std::atomic<StepError> failed_{kFine};  // of a step that had waited
  uint64_t started_ = 0, planned_ = 0;
  std::atomic<uint64_t> finished_{0};

  std::vector<Token> tokens_;
  std::vector<int> selected_;     // tokens whose logits are wanted
  std::vector<int> split_index_;  // token -> its place in partials_, or -1
  std::vector<Span> spans_;
  std::vector<Item> items_;
  std::vector<Best> best_;        // [chunk of the head's rows][selected]
  bool screened_ = false;
  int rest_ = 0;                  // steps to do without a screen
  std::atomic<int> looked_{0};    // tiles that the screen left
  std::vector<Glance> glance_;    // [selected]
  std::vector<float> upper_;      // [selected][tile of the head]
  std::vector<Best> guess_;       // as best_; its index is a tile's first row
  std::vector<int64_t> chosen_;   // of the last step, in the order of its logits
  int split_tokens_ = 0, split_parts_ = 0, capacity_ = 0;
  int chunks_[kLayerPhases + kLastPhases] = {};
  Split qkv_split_{}, out_split_{}, gate_up_split_{}, down_split_{}, head_split_{};

  Buffer<float> x_, q_, attended_, partials_;
  Activations normal_q_, attended_q_, hidden_q_, coarse_q_;
  std::vector<Scratch> scratch_;
};

}  // namespace gf
