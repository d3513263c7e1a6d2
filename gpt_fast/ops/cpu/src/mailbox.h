// What rank 0 tells the other ranks of its machine, in order: numbers in a ring of shared memory that all may read.
#pragma once

#include <algorithm>
#include <chrono>
#include <cstddef>
#include <cstdint>

#include "counter.h"
#include "link.h"

namespace gf {

class Mailbox {
 public:
  static constexpr uint32_t kRoom = 1 << 16;  // numbers that some rank has not read yet, at most

  static size_t bytes() { return sizeof(Shared); }

  // memory: of bytes(), zeros at first, the same for every rank. link: theirs; the mailbox ends with it.
  Mailbox(void* memory, Link& link) : shared_(static_cast<Shared*>(memory)), link_(link) {}

  // Rank 0: returns when all numbers are there for the others; false: the link has ended.
  bool send(const int64_t* numbers, uint32_t count) {
    for (uint32_t done = 0; done < count;) {
      if (link_.end()) return false;
      const uint32_t n = std::min(count - done, room());
      for (uint32_t i = 0; i < n; i++) shared_->ring[(at_ + i) % kRoom] = numbers[done + i];
      if (n > 0) shared_->written.move_to(at_ += n);
      if ((done += n) < count && !wait_for_room()) return false;
    }
    return !link_.end();
  }

  // The others: returns with the next numbers, however long they take; false: the link has ended.
  bool receive(int64_t* numbers, uint32_t count) {
    for (uint32_t done = 0; done < count;) {
      while (!shared_->written.reached(at_ + 1)) {
        if (link_.end()) return false;
        shared_->written.sleep_until(at_ + 1, kSleep);
      }
      const uint32_t n = std::min(count - done, shared_->written.value.load(std::memory_order_acquire) - at_);
      for (uint32_t i = 0; i < n; i++) numbers[done + i] = shared_->ring[(at_ + i) % kRoom];
      shared_->read[link_.rank()].move_to(at_ += n);
      done += n;
    }
    return true;
  }

 private:
  using Clock = std::chrono::steady_clock;
  static constexpr std::chrono::milliseconds kSleep{1000};  // at a time: an idle rank uses next to no processor

  struct Shared {
    Counter written, read[Link::kMaxRanks];
    int64_t ring[kRoom];
  };

  // Who has read least, of all others.
  int slowest() const {
    int found = 1;
    for (int rank = 2; rank < link_.ranks(); rank++)
      if (unread(rank) > unread(found)) found = rank;
    return found;
  }
  uint32_t unread(int rank) const { return at_ - shared_->read[rank].value.load(std::memory_order_acquire); }
  uint32_t room() const { return link_.ranks() == 1 ? kRoom : kRoom - unread(slowest()); }

  // As long as a rank is waited for in a step; then the link ends.
  bool wait_for_room() {
    const auto limit = Clock::now() + std::chrono::duration_cast<Clock::duration>(link_.patience());
    while (room() == 0) {
      const int rank = slowest();
      if (link_.end()) return false;
      if (Clock::now() > limit) return link_.end_with(1 + rank), false;
      shared_->read[rank].sleep_until(at_ - kRoom + 1, std::chrono::milliseconds(20));
    }
    return true;
  }

  Shared* const shared_;
  Link& link_;
  uint32_t at_ = 0;  // numbers that this rank has written, or read
};

}  // namespace gf
