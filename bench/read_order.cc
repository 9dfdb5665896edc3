// In which order do threads read memory fast? The measurements behind the order of work of the native kernels.
//
//     c++ -O3 -std=c++17 -march=native -pthread bench/read_order.cc -o build/read_order && build/read_order [threads]
//
// Reads 256 MB in pieces that the threads take in turns, in a few orders, interleaved; best and median of the rounds in GB/s, and
// as shares of the first. Needs AVX-512.
#include <immintrin.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <thread>
#include <vector>

namespace {

constexpr size_t kBytes = size_t{256} << 20;
constexpr int kRounds = 15;

struct Order {
  const char* name;
  size_t piece;    // bytes that a thread takes at a time
  size_t streams;  // equal parts of a piece that are read side by side
  size_t offset;   // of every vector to its cache line
};

constexpr Order kOrders[] = {
    {"pieces of 1 MB", size_t{1} << 20, 1, 0},
    {"pieces of 256 KB", size_t{256} << 10, 1, 0},
    {"pieces of 64 KB", size_t{64} << 10, 1, 0},
    {"pieces of 16 KB", size_t{16} << 10, 1, 0},
    {"pieces of 1 MB, rows of 2 KB, four side by side", size_t{1} << 20, 4, 0},
    {"pieces of 1 MB, vectors across two lines", size_t{1} << 20, 1, 40},
};

void read(const char* at, size_t bytes) {
  __m512i sum = _mm512_setzero_si512();
  for (size_t i = 0; i < bytes; i += 64) {
    _mm_prefetch(at + i + 4096, _MM_HINT_T0);
    sum = _mm512_or_si512(sum, _mm512_loadu_si512(at + i));
  }
  __asm__ volatile("" : : "v"(sum));
}

void read_side_by_side(const char* at, size_t bytes, size_t streams) {
  constexpr size_t kRow = 2048;
  __m512i sum = _mm512_setzero_si512();
  for (size_t block = 0; block < bytes; block += kRow * streams) {
    for (size_t column = 0; column < kRow; column += 64) {
      for (size_t stream = 0; stream < streams; ++stream) {
        const char* line = at + block + stream * kRow + column;
        _mm_prefetch(line + 8192, _MM_HINT_T0);
        sum = _mm512_or_si512(sum, _mm512_loadu_si512(line));
      }
    }
  }
  __asm__ volatile("" : : "v"(sum));
}

double gigabytes_a_second(const Order& order, const char* data, int threads) {
  std::atomic<size_t> next{0};
  std::atomic<int> waiting{threads};
  const auto work = [&] {
    for (--waiting; waiting > 0;) _mm_pause();
    for (size_t piece; (piece = next++) < kBytes / order.piece;) {
      const char* at = data + piece * order.piece + order.offset;
      order.streams == 1 ? read(at, order.piece) : read_side_by_side(at, order.piece, order.streams);
    }
  };
  std::vector<std::thread> others;
  for (int thread = 1; thread < threads; ++thread) others.emplace_back(work);
  while (waiting > 1) _mm_pause();
  const auto start = std::chrono::steady_clock::now();
  work();
  for (std::thread& other : others) other.join();
  return kBytes / std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count() / 1e9;
}

}  // namespace

int main(int argc, char** argv) {
  const int threads = argc > 1 ? atoi(argv[1]) : 2;
  char* data = static_cast<char*>(aligned_alloc(size_t{2} << 20, kBytes + (size_t{2} << 20)));
  if (data == nullptr || threads < 1) return 1;
  madvise(data, kBytes, MADV_HUGEPAGE);
  memset(data, 1, kBytes + (size_t{1} << 20));
  std::vector<double> found[std::size(kOrders)];
  for (int round = 0; round < kRounds; ++round) {
    for (size_t order = 0; order < std::size(kOrders); ++order) {
      found[order].push_back(gigabytes_a_second(kOrders[order], data, threads));
    }
  }
  for (std::vector<double>& rates : found) std::sort(rates.begin(), rates.end());
  for (size_t order = 0; order < std::size(kOrders); ++order) {
    const double best = found[order].back(), median = found[order][kRounds / 2];
    printf("%-50s best %5.1f GB/s (%3.0f %%)  median %5.1f (%3.0f %%)\n", kOrders[order].name, best,
           100 * best / found[0].back(), median, 100 * median / found[0][kRounds / 2]);
  }
  free(data);
}
