// One step: what Python asks for, the checks of it, and the queue of the step that runs and the one that waits.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <mutex>
#include <utility>
#include <vector>

namespace gf {

// Filled in by Python (structs.py holds the ctypes twin: same order, same types).
struct StepInput {
  int32_t rows, row_tokens;   // B, S
  int32_t length, positions;  // every real token lies below `length`; `positions` of a slot, the last one scratch
  int32_t slots;              // of the cache
  int32_t cache_type;         // attention.h's CacheType
  const int64_t* tokens;      // [B][S]; null: the best tokens of the step before, which had the same rows
  const int64_t* position;    // [B][S]; positions - 1: padding
  const int64_t* slot;        // [B], or null: row b is slot b
  const int64_t* select;      // [B], or null: logits of every token
  void* k;                    // [layer][slot][kv head][position][head_dim]
  void* v;
  float* k_scale;  // int8 only: [layer][slot][kv head][position]
  float* v_scale;
  float* logits;  // [B][vocab], or [B][S][vocab]; null: only the best are wanted
  int64_t* best;  // [B] or [B][S]: the largest logit's index, the lowest of equals; -1 where none is finite

  int tokens_in_all() const { return rows * row_tokens; }
  float* logits_of(int out, int vocab) const { return logits + size_t(out) * vocab; }
};

enum StepError {
  kFine = 0,
  kBadToken = 1,
  kBadPosition = 2,
  kBadSlot = 3,
  kBadSelect = 4,
  kTooManyTokens = 5,
  kLinkEnded = 6  // the link to the other ranks
};

// A token to compute. `out`: its place among the logits; -1: its logits are not wanted.
struct Token {
  int id, position, slot, out;
};

// The step's tokens without padding, whose logits (zeros) are written here. previous_best: the tokens, where `step` has
// none.
inline StepError read_tokens(const StepInput& step, const std::vector<int64_t>& previous_best, int vocab,
                             std::vector<Token>& tokens) {
  const int64_t* ids = step.tokens ? step.tokens : previous_best.data();
  tokens.clear();
  const int scratch = step.positions - 1;
  for (int i = 0; i < step.tokens_in_all(); i++) {
    const int row = i / step.row_tokens, column = i % step.row_tokens;
    const bool wanted = !step.select || step.select[row] == column;
    if (step.select && (step.select[row] < 0 || step.select[row] >= step.row_tokens)) return kBadSelect;
    const int out = !wanted ? -1 : step.select ? row : i;
    if (step.position[i] == scratch) {
      if (wanted) step.best[out] = 0;
      if (wanted && step.logits) std::memset(step.logits_of(out, vocab), 0, sizeof(float) * vocab);
      continue;
    }
    const int64_t slot = step.slot ? step.slot[row] : row;
    if (ids[i] < 0 || ids[i] >= vocab) return kBadToken;
    if (step.position[i] < 0 || step.position[i] >= std::min(step.length, scratch)) return kBadPosition;
    if (slot < 0 || slot >= step.slots) return kBadSlot;
    tokens.push_back({int(ids[i]), int(step.position[i]), int(slot), out});
  }
  return kFine;
}

// The step that runs, the one that may wait behind it, and how many have begun and ended. The user's thread begins
// steps; whichever thread ends one takes the waiting one on.
class StepQueue {
 public:
  uint64_t begun() const { return begun_; }
  uint64_t ended() const { return ended_.load(std::memory_order_acquire); }

  // Sleeps until `count` steps have ended.
  void wait_for(uint64_t count) const {
    for (uint64_t now; (now = ended()) < count;) ended_.wait(now, std::memory_order_acquire);
  }

  // A step begins while none runs. One without work has ended at once; end() is called for the others.
  void begin(bool has_work) {
    const std::unique_lock<std::mutex> lock(mutex_);
    begun_++;
    running_ = has_work;
    if (!has_work) ended_.store(begun_);
  }

  // Lets a step wait behind the one that runs; false, and nothing changes, where none does.
  bool push(const StepInput& step) {
    const std::unique_lock<std::mutex> lock(mutex_);
    if (!running_) return false;
    waiting_ = step;
    has_waiting_ = true;
    begun_++;
    return true;
  }

  struct Prepared {
    StepError error;
    bool has_work;
  };

  // The running step has ended; true: the one that waited runs now. It is prepared before the end is told, so that the
  // next one finds the waiting place free. prepare: StepInput -> Prepared.
  template <class F>
  bool end(F&& prepare) {
    const std::unique_lock<std::mutex> lock(mutex_);
    const bool waited = std::exchange(has_waiting_, false);
    running_ = false;
    if (waited) {
      const Prepared next = prepare(waiting_);
      error_.store(next.error);
      running_ = next.has_work;
    }
    ended_.fetch_add(waited && !running_ ? 2 : 1, std::memory_order_release);
    ended_.notify_all();
    return running_;
  }

  // The error of a step that had waited, once.
  StepError take_error() { return error_.exchange(kFine); }

 private:
  std::mutex mutex_;  // guards what end() and the user's thread both change
  StepInput waiting_{};
  bool has_waiting_ = false, running_ = false;
  uint64_t begun_ = 0;
  std::atomic<uint64_t> ended_{0};
  std::atomic<StepError> error_{kFine};
};

}  // namespace gf
