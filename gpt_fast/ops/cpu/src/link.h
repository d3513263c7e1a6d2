// Where the ranks of one machine meet: shared memory in which each leaves its part of a sum for the others to read.
//
// Exchanges are numbered, alike on every rank. In each a rank writes its part, says that it has arrived, waits until
// all have, and reads theirs. Parts of neighbouring exchanges lie apart, in two areas that take turns: who has arrived
// at an exchange has read all of the one before, so that nobody still reads what the next one overwrites, and one wait
// an exchange is enough.
//
// A thread that waits spins briefly and then sleeps, for the rank it waits for may need the core. A rank that does not
// arrive in time ends the link for all, for good: nobody spins for ever.
#pragma once

#include <atomic>
#include <chrono>
#include <cstddef>
#include <cstdint>

#include "counter.h"
#include "simd.h"

namespace gf {

class Link {
 public:
  static constexpr int kMaxRanks = 63;
  // Why a link has ended: 1 + r, because rank r did not arrive in time; or one of these.
  enum End : int32_t { kOpen = 0, kGivenUp = -1, kStepsDiffer = -2 };

  // All that ranks share; its memory begins as zeros.
  static size_t bytes(int ranks, size_t part_bytes) { return sizeof(Shared) + 2 * size_t(ranks) * part_bytes; }

  // memory: of bytes(), the same one for every rank. part_bytes: a multiple of 64. seconds: how long a rank is waited
  // for; spins: how many pauses of that without sleep.
  Link(void* memory, int rank, int ranks, size_t part_bytes, double seconds, int spins)
      : shared_(static_cast<Shared*>(memory)),
        parts_(static_cast<std::byte*>(memory) + sizeof(Shared)),
        part_bytes_(part_bytes),
        rank_(rank),
        ranks_(ranks),
        spins_(spins),
        patience_(seconds) {}

  int rank() const { return rank_; }
  int ranks() const { return ranks_; }
  std::chrono::duration<double> patience() const { return patience_; }
  size_t part_bytes() const { return part_bytes_; }

  // The number before those of the next `count` exchanges. Whoever begins a step takes them.
  uint32_t reserve(int count) {
    const uint32_t before = reserved_;
    reserved_ += uint32_t(count);
    return before;
  }

  // A rank's part of an exchange. One's own may be written once all ranks have met at the exchange before.
  std::byte* part(uint32_t exchange, int rank) const {
    return parts_ + (size_t(exchange & 1) * size_t(ranks_) + size_t(rank)) * part_bytes_;
  }

  // Leaves one's own part to the others and waits for theirs; false: the link has ended. Any of a rank's threads may
  // call it, and all do that read parts.
  bool meet(uint32_t exchange) {
    arrive(exchange);
    for (int rank = 0; rank < ranks_; rank++)
      if (!has_arrived(rank, exchange) && !wait_for(rank, exchange)) return false;
    return !end();
  }

  int32_t end() const { return shared_->end.load(std::memory_order_relaxed); }

  // Every rank gives up, as soon as it looks; the first reason stays.
  void end_with(int32_t reason) {
    int32_t open = kOpen;
    shared_->end.compare_exchange_strong(open, reason);
  }

 private:
  using Clock = std::chrono::steady_clock;
  static constexpr std::chrono::seconds kStart{600};      // for a rank's first arrival: it may still load its weights
  static constexpr std::chrono::milliseconds kSleep{20};  // at a time, so that a link's end is noticed

  struct Shared {
    alignas(64) std::atomic<int32_t> end{kOpen};
    Counter arrived[kMaxRanks];  // at which exchange; the number wraps around after some days
  };
  static_assert(sizeof(Shared) % 4096 == 0);

  bool has_arrived(int rank, uint32_t exchange) const { return shared_->arrived[rank].reached(exchange); }

  void arrive(uint32_t exchange) {
    Counter& mine = shared_->arrived[rank_];
    if (mine.value.load(std::memory_order_relaxed) != exchange) mine.move_to(exchange);
  }

  bool wait_for(int rank, uint32_t exchange) {
    for (int i = 0; i < spins_; i++) {
      if (has_arrived(rank, exchange)) return true;
      pause();
    }
    Counter& theirs = shared_->arrived[rank];
    const bool is_new = theirs.value.load(std::memory_order_relaxed) == 0;
    const auto limit = Clock::now() + std::chrono::duration_cast<Clock::duration>(is_new ? kStart : patience_);
    while (!has_arrived(rank, exchange)) {
      if (end()) return false;
      if (Clock::now() > limit) return end_with(1 + rank), false;
      theirs.sleep_until(exchange, kSleep);
    }
    return true;
  }

  Shared* const shared_;
  std::byte* const parts_;
  const size_t part_bytes_;
  const int rank_, ranks_, spins_;
  const std::chrono::duration<double> patience_;
  uint32_t reserved_ = 0;
};

}  // namespace gf
