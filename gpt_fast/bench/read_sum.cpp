// The rate at which this machine reads memory: the sum of a buffer larger than every cache, once, by all threads.
// Plain loops over independent accumulators, which the compiler turns into the widest loads the processor has.
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <thread>
#include <vector>

namespace {

uint64_t sum(const uint64_t* values, size_t count) {
  constexpr size_t lanes = 64;  // eight 64-byte loads in flight
  uint64_t totals[lanes] = {};
  for (size_t i = 0; i + lanes <= count; i += lanes)
    for (size_t j = 0; j < lanes; ++j) totals[j] += values[i + j];
  uint64_t total = 0;
  for (uint64_t lane : totals) total += lane;
  return total;
}

template <typename Work>
void in_parallel(int threads, Work work) {
  std::vector<std::thread> others;
  for (int t = 1; t < threads; ++t) others.emplace_back(work, t);
  work(0);
  for (auto& thread : others) thread.join();
}

}  // namespace

extern "C" void gf_touch(uint64_t* values, size_t count, int threads) {
  const size_t share = count / threads;
  in_parallel(threads, [=](int t) {
    for (size_t i = t * share; i < (t + 1) * share; ++i) values[i] = i;
  });
}

// Seconds for one pass; `check` gets the sum, so that no pass can be left out.
extern "C" double gf_read(const uint64_t* values, size_t count, int threads, uint64_t* check) {
  const size_t share = count / threads;
  std::vector<uint64_t> totals(threads * 8);  // a cache line apart
  const auto started = std::chrono::steady_clock::now();
  in_parallel(threads, [&](int t) { totals[t * 8] = sum(values + t * share, share); });
  const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - started;
  *check = 0;
  for (uint64_t total : totals) *check += total;
  return seconds.count();
}
