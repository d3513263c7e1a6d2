// A few threads that run a job made of phases, each phase a number of independent chunks.
//
// Chunks are handed out by one counter, and a phase ends when its chunks are done, not when every thread has
// arrived: a thread that the system has put aside between two chunks delays nobody, the others take its share.
// A thread without work spins briefly and then sleeps, so that two waiting threads never fight over one core.
#pragma once

#include <atomic>
#include <cstdint>
#include <thread>
#include <vector>

#include "simd.h"

namespace gf {

struct Job {
  virtual int phases() const = 0;
  virtual int chunks(int phase) const = 0;  // 0 skips the phase; at most Pool::kMaxChunks
  virtual void run(int phase, int chunk, int thread) = 0;
  virtual bool again() = 0;  // after the last phase: whether to begin anew with the first

 protected:
  ~Job() = default;
};

class Pool {
 public:
  static constexpr int kMaxChunks = 60000;

  // `spins`: how many pauses a thread waits before it sleeps.
  Pool(int threads, int spins) : spins_(spins) {
    for (int i = 1; i < threads; i++) workers_.emplace_back([this, i] { work(i); });
  }

  ~Pool() {
    stopping_.store(true);
    publish(0);
    for (auto& worker : workers_) worker.join();
  }

  int threads() const { return int(workers_.size()) + 1; }

  // The last job has ended, but the thread that ends it may not be through yet.
  void wait_until_idle() const {
    while (!is_idle(ticket_.load(std::memory_order_acquire))) pause();
  }

  // Begins a job on the idle pool's other threads. Its users take turns.
  void start(Job& job) {
    job_ = &job;
    phase_ = -1;
    open_next_phase();
  }

  // Works with the others until done(), or until the job has ended.
  template <class F>
  void help_until(F&& done) {
    while (!done()) {
      const uint64_t ticket = ticket_.load(std::memory_order_acquire);
      if (is_idle(ticket)) return;
      take_chunk_or_wait(0, ticket);
    }
  }

 private:
  // The ticket packs what a thread must learn at once: which phase (epoch), its chunks, the next one to hand out.
  static uint32_t epoch_of(uint64_t ticket) { return uint32_t(ticket >> 32); }
  static uint32_t chunks_of(uint64_t ticket) { return uint32_t(ticket >> 16) & 0xffff; }
  static uint32_t next_of(uint64_t ticket) { return uint32_t(ticket) & 0xffff; }
  static bool has_chunk(uint64_t ticket) { return next_of(ticket) < chunks_of(ticket); }
  static bool is_idle(uint64_t ticket) { return chunks_of(ticket) == 0; }

  void work(int thread) {
    for (;;) {
      // The ticket first: whoever sees the destructor's ticket sees stopping_ too, and does not sleep on it for ever.
      const uint64_t ticket = ticket_.load(std::memory_order_acquire);
      if (stopping_.load()) return;
      take_chunk_or_wait(thread, ticket);
    }
  }

  // `ticket`: the one the caller looked at. A newer one may be idle, and help_until() would sleep on it for ever.
  void take_chunk_or_wait(int thread, uint64_t ticket) {
    if (!has_chunk(ticket)) return wait_for_change(ticket);
    ticket = ticket_.fetch_add(1, std::memory_order_acq_rel);
    if (!has_chunk(ticket)) return;
    // Holding a chunk keeps the phase open, so job_ and phase_ cannot change under us.
    job_->run(phase_, int(next_of(ticket)), thread);
    if (done_.fetch_add(1, std::memory_order_acq_rel) + 1 == chunks_of(ticket)) open_next_phase();
  }

  // Only the caller, or the thread that finished a phase's last chunk, gets here.
  void open_next_phase() {
    int chunks = 0;
    while (chunks == 0) {
      if (++phase_ == job_->phases()) {
        if (!job_->again()) break;
        phase_ = 0;
      }
      chunks = job_->chunks(phase_);
    }
    publish(chunks);
  }

  void publish(int chunks) {
    const uint32_t epoch = epoch_of(ticket_.load(std::memory_order_relaxed)) + 1;
    done_.store(0, std::memory_order_relaxed);
    // The epoch first: no one can publish the next one before the ticket is out, so it never goes back.
    epoch_.store(epoch);  // sequentially consistent: a sleeper is either seen by notify_all or sees this
    ticket_.store(uint64_t(epoch) << 32 | uint64_t(chunks) << 16, std::memory_order_release);
    epoch_.notify_all();
  }

  void wait_for_change(uint64_t seen) {
    for (int i = 0; i < spins_; i++) {
      if (epoch_of(ticket_.load(std::memory_order_acquire)) != epoch_of(seen)) return;
      pause();
    }
    epoch_.wait(epoch_of(seen));
  }

  alignas(64) std::atomic<uint64_t> ticket_{0};
  alignas(64) std::atomic<uint32_t> done_{0};
  alignas(64) std::atomic<uint32_t> epoch_{0};
  alignas(64) Job* job_ = nullptr;
  int phase_ = 0;
  int spins_;
  std::atomic<bool> stopping_{false};
  std::vector<std::thread> workers_;
};

}  // namespace gf
