// The best tokens of a step that wants no logits: first bounds on every logit, from the head's screen (screen.h), then
// only the logits that can be the largest.
#pragma once

#include <algorithm>
#include <atomic>
#include <utility>
#include <vector>

#include "activations.h"
#include "argmax.h"
#include "linear.h"
#include "plan.h"
#include "screen.h"
#include "workspace.h"

namespace gf {

class HeadScreen {
 public:
  HeadScreen(const Linear& head, Kind kind) : head_(head), kind_(kind) {}

  // The pool is idle.
  void set(const Screen& screen) { screen_ = screen; }

  const Linear& weights() const { return screen_.weights; }

  // Whether the step is screened, which needs what it says of `rows` rows and their split of the head.
  bool plan(const StepInput& step, const Plan& plan) {
    const int rows = int(plan.selected.size());
    const bool possible = !step.logits && rows > 0 && rows <= screen_.max_rows;
    active_ = possible && steps_to_skip_ == 0;
    if (possible && steps_to_skip_ > 0) steps_to_skip_--;
    if (!active_) return false;
    candidate_tiles_ = 0;
    highest_estimate_.assign(size_t(rows) * plan.head.tile_chunks(), {});
    if (inputs_.size() < size_t(rows)) inputs_.resize(size_t(rows));
    upper_bound_.resize(size_t(rows) * head_.tiles());
    if (kind_ == Kind::kBf16) coarse_q_.resize(Kind::kInt8, rows, head_.cols);
    return true;
  }

  bool active() const { return active_; }

  // Row m's inputs, which were normalized into s.row and stored in `exact`.
  void read_row(int m, const Activations& exact, Scratch& s) {
    if (kind_ == Kind::kBf16) coarse_q_.put_row(m, s.row.data(), head_.cols);
    exact.restore(m, head_.cols, s.row.data());
    coarse(exact).restore(m, head_.cols, s.coarse.data());
    inputs_[m].set(screen_, s.row.data(), s.coarse.data(), head_.cols);
  }

  // First phase: each tile's upper bounds, and where the highest estimate is.
  void bound(const Split& split, int chunk, const Activations& exact, const uint8_t* next, const Tuning& tuning,
             Scratch& s) {
    Best* highest = &highest_estimate_[size_t(chunk) * split.rows];
    for_blocks(screen_.weights, split.part(chunk), 2, next, [&](const Split::Part& p, const uint8_t* following) {
      multiply(screen_.weights, p.tile, p.tiles, coarse(exact), p.row, p.rows, s.out.data(), 2 * kLanes, following,
               tuning);
      for (int t = 0; t < p.tiles; t++) {
        const int tile = p.tile + t, first = tile * kLanes;
        estimate(screen_, tile, &inputs_[p.row], p.rows, s.out.data() + t * kLanes, 2 * kLanes);
        for (int m = p.row; m < p.row + p.rows; m++) {
          const float* out = s.out.data() + ((m - p.row) * 2 + t) * kLanes;
          const f32x16 estimates = keep_range(load(out), 0, head_.rows - first);
          const float value = reduce_max(estimates);
          if (value > highest[m].value) highest[m].value = value, highest[m].index = first;
          upper_bound_[size_t(m) * head_.tiles() + tile] = reduce_max(estimates + margin(screen_, tile, inputs_[m]));
        }
      }
    });
  }

  // Second phase: the logits of the tiles whose bounds do not rule them out, of all rows where they do not for one.
  void score_candidates(const Split& split, int chunk, const Activations& exact, const Tuning& tuning, Scratch& s,
                        uint64_t step, Best* best) {
    const Split::Part part = split.part(chunk);
    const std::vector<float>& least = lower_bounds(split, exact, tuning, s, step);
    int candidates = 0;
    for (int tile = part.tile; tile < part.tile + part.tiles; tile++) {
      bool possible = false;
      for (int m = 0; m < part.rows; m++)
        possible |= !(upper_bound_[size_t(m) * head_.tiles() + tile] < least[m]);  // NaN rules nothing out
      if (possible) score_tile(tile, 0, part.rows, exact, tuning, s, best), candidates++;
    }
    candidate_tiles_.fetch_add(candidates, std::memory_order_relaxed);
  }

  // The step has ended: what follows does without where the screen ruled out too little.
  void end() {
    if (active_ && candidate_tiles_ > head_.tiles() / kWorthwhilePart) steps_to_skip_ = kSkippedSteps;
  }

 private:
  static constexpr int kWorthwhilePart = 4;  // a screen that leaves more than 1/4 of the head costs more than it saves;
  static constexpr int kSkippedSteps = 15;   // after such a step so many go without one

  const Activations& coarse(const Activations& exact) const { return kind_ == Kind::kBf16 ? coarse_q_ : exact; }

  // A logit of each row that is known: the best of the tile with the highest estimate. Every thread computes its own.
  const std::vector<float>& lower_bounds(const Split& split, const Activations& exact, const Tuning& tuning, Scratch& s,
                                         uint64_t step) {
    if (std::exchange(s.lower_bound_made, step) == step) return s.lower_bound;
    s.lower_bound.resize(size_t(split.rows));
    for (int m = 0; m < split.rows; m++) {
      Best highest, found;
      for (int chunk = 0; chunk < split.tile_chunks(); chunk++)
        merge(highest, highest_estimate_[size_t(chunk) * split.rows + m]);
      if (highest.index >= 0) score_tile(highest.index / kLanes, m, 1, exact, tuning, s, &found);
      s.lower_bound[m] = found.value + found.nan;
    }
    return s.lower_bound;
  }

  void score_tile(int tile, int row, int rows, const Activations& exact, const Tuning& tuning, Scratch& s, Best* best) {
    multiply(head_, tile, 1, exact, row, rows, s.out.data(), kLanes, head_.pair(tile), tuning);
    for (int m = 0; m < rows; m++)
      update(best[m], s.out.data() + m * kLanes, tile * kLanes, std::min(kLanes, head_.rows - tile * kLanes));
  }

  const Linear head_;
  const Kind kind_;
  Screen screen_{};
  bool active_ = false;
  int steps_to_skip_ = 0;
  std::atomic<int> candidate_tiles_{0};
  std::vector<ScreenInput> inputs_;     // [selected]
  std::vector<float> upper_bound_;      // [selected][tile of the head]
  std::vector<Best> highest_estimate_;  // [chunk of the head's rows][selected]; its index is a tile's first row
  Activations coarse_q_;                // what the screen reads, where the head reads bfloat16
};

}  // namespace gf
