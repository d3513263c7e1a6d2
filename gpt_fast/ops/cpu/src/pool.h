// A few threads that run a job made of phases, each phase a number of independent chunks.
//
// Each thread has a share of neighbouring chunks, so that it reads memory in one stream and knows where its next one
// begins. A thread that has finished its share steals chunks from the end of others' shares. A phase ends when its
// chunks are done, not when every thread has arrived, so a thread that the system suspends between two chunks delays
// nobody.
// A thread without work spins briefly and then sleeps, so that two waiting threads never fight over one core.
#pragma once

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <thread>
#include <vector>

#include "simd.h"

namespace gf {

// How many pauses take `microseconds`. One takes from 10 to 140 cycles, depending on the processor.
inline int pauses_in(int microseconds) {
  using Clock = std::chrono::steady_clock;
  constexpr int kPauses = 1000;
  auto least = Clock::duration::max();
  for (int i = 0; i < 3; i++) {  // the shortest of three, because the system may suspend this thread meanwhile
    const auto began = Clock::now();
    for (int j = 0; j < kPauses; j++) pause();
    least = std::min(least, Clock::now() - began);
  }
  const double each = std::max(1.0, double(std::chrono::nanoseconds(least).count()) / kPauses);
  return int(microseconds * 1000.0 / each);
}

struct Job {
  virtual int phases() const = 0;
  virtual int chunks(int phase) const = 0;  // 0 skips the phase; at most Pool::kMaxChunks
  virtual void run(int phase, int chunk, int thread) = 0;
  virtual bool again() = 0;  // called after the last phase; true: begin again with the first

 protected:
  ~Job() = default;
};

class Pool {
 public:
  static constexpr int kMaxChunks = 60000;
  static constexpr int kShortSpins = 50;

  // `spins`: how many pauses a thread waits before it sleeps. apart: the user's thread is none of the pool's, which
  // works on its own; otherwise it is the first.
  Pool(int threads, int spins, bool apart = false) : shares_(size_t(threads)), spins_(spins), apart_(apart) {
    for (int i = apart ? 0 : 1; i < threads; i++) workers_.emplace_back([this, i] { work(i); });
  }

  ~Pool() {
    stopping_.store(true);
    wake();
    for (auto& worker : workers_) worker.join();
  }

  int threads() const { return int(shares_.size()); }
  bool apart() const { return apart_; }

  struct Range {
    int first, end;
  };
  // The chunks that a thread begins with.
  Range share(int chunks, int thread) const { return {chunks * thread / threads(), chunks * (thread + 1) / threads()}; }

  // The last job has ended, and the thread that ended it has left it. It may need this core to get there.
  void wait_until_idle() const {
    for (int i = 0; i < kShortSpins; i++) {
      if (idle_.load(std::memory_order_acquire)) return;
      pause();
    }
    idle_.wait(false, std::memory_order_acquire);
  }

  // Begins a job on the idle pool's other threads. Its users take turns.
  void start(Job& job) {
    job_ = &job;
    phase_ = -1;
    idle_.store(false, std::memory_order_relaxed);
    open_next_phase();
  }

  // Works with the others until done(), or until the job has ended. Not where the user's thread is apart.
  template <class F>
  void help_until(F&& done) {
    while (!done()) {
      const uint32_t epoch = epoch_.load(std::memory_order_acquire);
      if (idle_.load(std::memory_order_acquire)) return;
      if (!take_chunks(0, done)) wait_for_change(0, epoch);
    }
  }

 private:
  // What is left of a share, in one word: the next chunk in the low 16 bits, then the end, and in the high 32 bits the
  // phase's serial number, so that a compare-exchange with a value from an earlier phase fails (the ABA problem).
  struct alignas(64) Share {
    std::atomic<uint64_t> left{0};
  };
  static uint64_t pack(uint32_t serial, Range r) {
    return uint64_t(serial) << 32 | uint64_t(r.end) << 16 | uint64_t(r.first);
  }
  static int end_of(uint64_t left) { return int(left >> 16 & 0xffff); }
  static int next_of(uint64_t left) { return int(left & 0xffff); }
  static bool has_chunk(uint64_t left) { return next_of(left) < end_of(left); }

  void work(int thread) {
    for (;;) {
      // The epoch first: what changes after it is seen before a sleep.
      const uint32_t epoch = epoch_.load(std::memory_order_acquire);
      if (stopping_.load()) return;
      if (!take_chunks(thread, [] { return false; })) wait_for_change(thread, epoch);
    }
  }

  // Runs chunks of one phase until none is left or enough(); false: there was none. While a thread has run chunks that
  // it has not yet counted in done_, the phase cannot end, so job_, phase_ and chunks_ do not change.
  template <class F>
  bool take_chunks(int thread, F&& enough) {
    int taken = 0, all = 0;
    for (int chunk; !enough() && (chunk = take(thread)) >= 0; taken++) {
      all = chunks_;
      job_->run(phase_, chunk, thread);
    }
    if (taken > 0 && done_.fetch_add(taken, std::memory_order_acq_rel) + taken == all) open_next_phase();
    return taken > 0;
  }

  // The next chunk of one's own share, else the last one of another's; -1: all are taken.
  int take(int thread) {
    std::atomic<uint64_t>& own = shares_[size_t(thread)].left;
    if (has_chunk(own.load(std::memory_order_relaxed))) {
      const uint64_t left = own.fetch_add(1, std::memory_order_acq_rel);
      if (has_chunk(left)) return next_of(left);
    }
    for (int i = 1; i < threads(); i++) {
      std::atomic<uint64_t>& other = shares_[size_t((thread + i) % threads())].left;
      uint64_t left = other.load(std::memory_order_relaxed);
      while (has_chunk(left))
        if (other.compare_exchange_weak(left, left - (1 << 16), std::memory_order_acq_rel)) return end_of(left) - 1;
    }
    return -1;
  }

  // Only the user, or the thread that finished a phase's last chunk, gets here.
  void open_next_phase() {
    int chunks = 0;
    while (chunks == 0) {
      if (++phase_ == job_->phases()) {
        if (!job_->again()) {
          idle_.store(true, std::memory_order_release);
          idle_.notify_all();
          return wake();
        }
        phase_ = 0;
      }
      chunks = job_->chunks(phase_);
    }
    publish(chunks);
  }

  // A share without chunks keeps its old word, which is empty too. The phase cannot end before the last share is
  // stored; after that store another thread may end it, so nothing here may be read any more.
  void publish(int chunks) {
    const uint32_t serial = ++serial_;
    chunks_ = chunks;
    done_.store(0, std::memory_order_relaxed);
    for (int i = 0; i < threads(); i++) {
      const Range range = share(chunks, i);
      if (range.first < range.end) shares_[size_t(i)].left.store(pack(serial, range), std::memory_order_release);
    }
    wake();
  }

  void wake() {
    epoch_.fetch_add(1);  // sequentially consistent: a sleeper is either seen by notify_all or sees this
    epoch_.notify_all();
  }

  void wait_for_change(int thread, uint32_t seen) {
    const std::atomic<uint64_t>& own = shares_[size_t(thread)].left;
    for (int i = 0; i < spins_; i++) {
      if (has_chunk(own.load(std::memory_order_relaxed)) || epoch_.load(std::memory_order_acquire) != seen) return;
      pause();
    }
    epoch_.wait(seen);
  }

  std::vector<Share> shares_;
  alignas(64) std::atomic<int> done_{0};  // chunks
  alignas(64) std::atomic<uint32_t> epoch_{0};
  std::atomic<bool> idle_{true};
  alignas(64) Job* job_ = nullptr;
  int phase_ = 0, chunks_ = 0;
  uint32_t serial_ = 0;
  const int spins_;
  const bool apart_;
  std::atomic<bool> stopping_{false};
  std::vector<std::thread> workers_;
};

}  // namespace gf
