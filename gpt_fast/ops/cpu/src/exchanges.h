// What a rank's share of a step gives the other ranks and takes from them: parts of the sums that make the residual
// stream, its logits, its best tokens. A decoder without a link has the whole model and needs none of it.
//
// Sums are taken in the order of ranks, so that every rank holds the same bytes.
//
//   exchange 0                     embeddings: of this rank's tokens; zeros for the others'
//   2 layer + 1, 2 layer + 2       the layer's attention and feed-forward
//   after those                    logits, some rows at a time, where they are wanted
//   at last                        best tokens
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#include "argmax.h"
#include "link.h"
#include "model.h"
#include "plan.h"
#include "simd.h"

namespace gf {

class Exchanges {
 public:
  Exchanges(const ModelWeights& model, Link* link)
      : layers_(model.n_layer), vocab_(model.vocab), own_{model.vocab_first, model.head.rows}, link_(link) {
    if (link) shares_.resize(size_t(link->ranks()));
  }

  bool alone() const { return !link_; }
  int ranks() const { return link_ ? link_->ranks() : 1; }
  bool ended() const { return link_ && link_->end(); }
  bool has_room(int rows, int dim) const {
    return !link_ || bytes_of(size_t(rows) * size_t(dim)) <= link_->part_bytes();
  }

  // Rows of logits that are exchanged together, at most.
  int logit_rows(bool with_logits) const {
    if (alone() || !with_logits) return INT32_MAX;
    const size_t room = std::min(kLogitBytes, link_->part_bytes() - kOpeningBytes);
    return std::clamp(int(room / sizeof(float)) / vocab_, 1, kLogitRows);
  }

  // A step begins, whose description every rank must have alike. Adds the exchanges' chunks to its plan.
  void begin(Plan& plan, int dim, bool with_logits) {
    if (alone()) return;
    const int values = plan.rows() * dim;
    chunk_values_ = std::max(kSumValues, round_up(values / kSumChunks, kLanes));
    for (Phase sum : {kSumInput, kSumAttention, kSumOutput})
      plan.chunks[sum] = (values + chunk_values_ - 1) / chunk_values_;
    plan.chunks[kGather] = with_logits ? plan.head_rows * ranks() : 0;
    logit_exchanges_ = with_logits ? plan.head_blocks : 0;
    first_ = 1 + link_->reserve(2 * layers_ + 1 + logit_exchanges_ + !plan.selected.empty());
    step_ = fingerprint(plan, with_logits);
    Opening& mine = *reinterpret_cast<Opening*>(link_->part(first_, link_->rank()));
    mine = {step_, own_};
  }

  // ---- Sums

  // This rank's part of a sum, [rows][dim]; null where the rank is alone.
  float* part(int exchange) const { return alone() ? nullptr : floats(first_ + uint32_t(exchange), link_->rank()); }

  // x += the sum of all parts, of a chunk of the n values. The first exchange tells whether all ranks run one step.
  void add_sum(int exchange, int chunk, float* x, int n) {
    const uint32_t number = first_ + uint32_t(exchange);
    if (!link_->meet(number)) return;
    if (exchange == 0 && chunk == 0) read_openings();
    const int first = chunk * chunk_values_, end = std::min(n, first + chunk_values_);
    const int whole = first + (end - first) / kLanes * kLanes;
    for (int i = first; i < whole; i += kLanes) {
      f32x16 sum = load(floats(number, 0) + i);
      for (int rank = 1; rank < ranks(); rank++) sum = sum + load(floats(number, rank) + i);
      store(x + i, load(x + i) + sum);
    }
    for (int i = whole; i < end; i++) {
      float sum = floats(number, 0)[i];
      for (int rank = 1; rank < ranks(); rank++) sum += floats(number, rank)[i];
      x[i] += sum;
    }
  }

  // ---- Logits

  // This rank's logits of a block's row: the first of them.
  float* own_logits(int block, int row) const { return logits(block, row, link_->rank()); }

  // One rank's logits of a block's row, to where they belong among all.
  void gather(int block, int row, int rank, float* all) {
    if (!link_->meet(logit_exchange(block))) return;
    std::memcpy(all + shares_[rank].first, logits(block, row, rank), sizeof(float) * shares_[rank].count);
  }

  // ---- Best tokens

  // The best of this rank's logits of every row, [rows], to the best of all ranks'.
  void merge_best(std::vector<Best>& rows) {
    if (alone() || rows.empty()) return;
    const uint32_t number = logit_exchange(logit_exchanges_);
    for (Best& best : rows)
      if (best.index >= 0) best.index += own_.first;
    std::memcpy(body(number, link_->rank()), rows.data(), rows.size() * sizeof(Best));
    if (!link_->meet(number)) return;
    for (size_t m = 0; m < rows.size(); m++) {
      rows[m] = {};
      for (int rank = 0; rank < ranks(); rank++) merge(rows[m], reinterpret_cast<const Best*>(body(number, rank))[m]);
    }
  }

 private:
  static constexpr size_t kOpeningBytes = 64;
  static constexpr size_t kLogitBytes = 4 << 20;  // of a rank, exchanged together; or a row, where that has more
  static constexpr int kLogitRows = 256;          // which, times the ranks, is less than Pool::kMaxChunks
  static constexpr int kSumValues = 2048, kSumChunks = 1024;  // values to a chunk at least, chunks of a sum at most

  struct Vocabulary {
    int32_t first, count;
  };
  // What the first exchange's parts begin with; the room is left free in the others.
  struct Opening {
    uint64_t step;
    Vocabulary vocabulary;
  };

  static size_t bytes_of(size_t floats) { return kOpeningBytes + sizeof(float) * floats; }
  std::byte* body(uint32_t number, int rank) const { return link_->part(number, rank) + kOpeningBytes; }
  float* floats(uint32_t number, int rank) const { return reinterpret_cast<float*>(body(number, rank)); }

  uint32_t logit_exchange(int block) const { return first_ + uint32_t(2 * layers_ + 1 + block); }
  float* logits(int block, int row, int rank) const {
    const int count = rank == link_->rank() ? own_.count : shares_[rank].count;
    return floats(logit_exchange(block), rank) + size_t(row) * count;
  }

  // Once a step, by one thread, before anyone needs the vocabularies.
  void read_openings() {
    for (int rank = 0; rank < ranks(); rank++) {
      const Opening& theirs = *reinterpret_cast<const Opening*>(link_->part(first_, rank));
      if (theirs.step != step_) link_->end_with(Link::kStepsDiffer);
      shares_[rank] = theirs.vocabulary;
    }
  }

  // FNV-1a over all that decides how a step runs and what it writes.
  uint64_t fingerprint(const Plan& plan, bool with_logits) const {
    uint64_t hash = 0xcbf29ce484222325;
    const auto add = [&hash](int value) { hash = (hash ^ uint32_t(value)) * 0x100000001b3; };
    for (int value : {layers_, vocab_, plan.rows(), int(with_logits)}) add(value);
    for (const Token& token : plan.tokens)
      for (int value : {token.id, token.position, token.slot, token.out}) add(value);
    return hash;
  }

  const int layers_, vocab_;
  const Vocabulary own_;
  Link* const link_;
  std::vector<Vocabulary> shares_;  // [rank]
  uint32_t first_ = 0;              // the number of the step's first exchange
  int logit_exchanges_ = 0, chunk_values_ = kSumValues;
  uint64_t step_ = 0;
};

}  // namespace gf
