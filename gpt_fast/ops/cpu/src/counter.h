// A counter in memory that processes share: one moves it on, the others wait for it, briefly spinning or asleep.
#pragma once

#include <atomic>
#include <chrono>
#include <cstdint>
#include <thread>

#if defined(__linux__)
#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace gf {

// Begins as zeros. Values are compared by their distance, so a counter may wrap around.
struct alignas(64) Counter {
  std::atomic<uint32_t> value{0};
  std::atomic<uint32_t> sleepers{0};

  bool reached(uint32_t target) const { return int32_t(value.load(std::memory_order_acquire) - target) >= 0; }

  void move_to(uint32_t to) {
    value.store(to);  // sequentially consistent: a sleeper is either seen here or sees this
    if (sleepers.load() > 0) wake();
  }

  // Sleeps unless it has reached the target, for `time` at most, so that other things that may happen are noticed.
  void sleep_until(uint32_t target, std::chrono::milliseconds time) {
    sleepers.fetch_add(1);
    const uint32_t seen = value.load();
    if (int32_t(seen - target) < 0) sleep_while(seen, time);
    sleepers.fetch_sub(1);
  }

 private:
#if defined(__linux__)
  void wake() { syscall(SYS_futex, &value, FUTEX_WAKE, INT32_MAX, nullptr, nullptr, 0); }
  void sleep_while(uint32_t seen, std::chrono::milliseconds time) {
    const timespec limit{time.count() / 1000, time.count() % 1000 * 1000000};
    syscall(SYS_futex, &value, FUTEX_WAIT, seen, &limit, nullptr, 0);
  }
#else
  void wake() {}
  void sleep_while(uint32_t, std::chrono::milliseconds) { std::this_thread::sleep_for(std::chrono::microseconds(100)); }
#endif
};
static_assert(std::atomic<uint32_t>::is_always_lock_free && sizeof(Counter) == 64);

}  // namespace gf
