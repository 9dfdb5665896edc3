// What a benchmark of the native kernels is measured against: the machine's peaks.
//
//   g++ -O3 -march=native -shared -fPIC -pthread native_probe.cc -o libk25_probe.so
#include <stddef.h>
#include <stdint.h>

#include <atomic>
#include <thread>
#include <vector>

namespace {

using Task = void (*)(void*, size_t);
using Vector = float __attribute__((vector_size(64)));
using Words = uint64_t __attribute__((vector_size(64)));

// Threads that live no longer than their work: others that waited would take the cores from what is measured next.
void run(int threads, Task task, void* state, size_t count) {
  std::atomic<size_t> next{0};
  const auto work = [&] {
    for (size_t i = next.fetch_add(1); i < count; i = next.fetch_add(1)) task(state, i);
  };
  std::vector<std::thread> others;
  for (int thread = 1; thread < threads; ++thread) others.emplace_back(work);
  work();
  for (std::thread& thread : others) thread.join();
}

constexpr int kSums = 20;
constexpr long kSteps = 4000000;  // 10 ms: starting a thread is of no weight

// Multiply-adds on registers alone: kSums independent sums hide their latency.
void multiply_add(void*, size_t) {
  Vector sums[kSums], factor{}, added{};
#pragma GCC unroll 20
  for (int i = 0; i < kSums; ++i) sums[i] = Vector{} + static_cast<float>(i);
  factor += 0.999f;
  added += 0.001f;
  for (long step = 0; step < kSteps; ++step) {
#pragma GCC unroll 20
    for (int i = 0; i < kSums; ++i) {
      sums[i] = sums[i] * factor + added;
      __asm__ volatile("" : "+x"(sums[i]));
    }
  }
}

struct Region {
  const char* bytes;
  size_t part;
};

void read_part(void* state, size_t index) {
  const Region& region = *static_cast<const Region*>(state);
  const Words* at = reinterpret_cast<const Words*>(region.bytes + index * region.part);
  Words sums[8] = {};
  for (size_t i = 0; i + 8 <= region.part / sizeof(Words); i += 8) {
#pragma GCC unroll 8
    for (size_t lane = 0; lane < 8; ++lane) sums[lane] += at[i + lane];
  }
  for (Words& sum : sums) __asm__ volatile("" : : "x"(sum));
}

}  // namespace

extern "C" {

// float32 multiply-adds on all threads; returns how many FLOP (two for each).
double probe_multiply_add(int threads) {
  run(threads, multiply_add, nullptr, static_cast<size_t>(threads));
  return 2.0 * 16 * kSums * kSteps * threads;
}

// Reads `count` bytes (64-byte aligned); returns how many it read: whole megabytes.
double probe_read(int threads, const void* bytes, size_t count) {
  Region region{static_cast<const char*>(bytes), size_t{1} << 20};
  const size_t parts = count / region.part;
  run(threads, read_part, &region, parts);
  return static_cast<double>(parts * region.part);
}

}  // extern "C"
