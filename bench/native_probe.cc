// What a benchmark of the native kernels is measured against, and with: the machine's peaks and a pool of threads.
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

// Threads that wait for work, spinning: what a call costs is its kernel, not the pool.
class Pool {
 public:
  explicit Pool(int threads) {
    for (int i = 1; i < threads; ++i) threads_.emplace_back([this] { wait(); });
  }
  ~Pool() {
    stop_ = true;
    generation_.fetch_add(1);
    for (std::thread& thread : threads_) thread.join();
  }
  void run(Task task, void* state, size_t count) {
    task_ = task;
    state_ = state;
    count_ = count;
    next_ = 0;
    busy_ = static_cast<int>(threads_.size());
    generation_.fetch_add(1);
    work();
    while (busy_.load() > 0) __builtin_ia32_pause();
  }

 private:
  void work() {
    for (size_t i = next_.fetch_add(1); i < count_; i = next_.fetch_add(1)) task_(state_, i);
  }
  void wait() {
    for (int seen = 0;;) {
      int spins = 0;
      while (generation_.load() == seen) {
        __builtin_ia32_pause();
        if (++spins > 100000) std::this_thread::yield();
      }
      ++seen;
      if (stop_) return;
      work();
      busy_.fetch_sub(1);
    }
  }
  std::vector<std::thread> threads_;
  std::atomic<int> generation_{0}, busy_{0};
  std::atomic<size_t> next_{0};
  size_t count_ = 0;
  Task task_ = nullptr;
  void* state_ = nullptr;
  bool stop_ = false;
};

constexpr int kSums = 20;
constexpr long kSteps = 400000;

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

void* probe_pool(int threads) { return new Pool(threads); }
void probe_pool_free(void* pool) { delete static_cast<Pool*>(pool); }
// The `run` of a k25_parallel whose context is a pool.
void probe_run(void* pool, Task task, void* state, size_t count) { static_cast<Pool*>(pool)->run(task, state, count); }

// float32 multiply-adds on all threads of the pool; returns how many FLOP (two for each).
double probe_multiply_add(void* pool, int threads) {
  static_cast<Pool*>(pool)->run(multiply_add, nullptr, static_cast<size_t>(threads));
  return 2.0 * 16 * kSums * kSteps * threads;
}

// Reads `count` bytes (64-byte aligned); returns how many it read: whole megabytes.
double probe_read(void* pool, const void* bytes, size_t count) {
  Region region{static_cast<const char*>(bytes), size_t{1} << 20};
  const size_t parts = count / region.part;
  static_cast<Pool*>(pool)->run(read_part, &region, parts);
  return static_cast<double>(parts * region.part);
}

}  // extern "C"
