// What the machine can read, as the mark that the kernels are measured against.
#include <pthread.h>
#include <sched.h>
#include <stdint.h>
#include <time.h>

#include "k25.h"

namespace {

using Words = uint64_t __attribute__((vector_size(64)));

enum { kVectors = 8, kMostThreads = 256 };
constexpr size_t kStep = kVectors * sizeof(Words);
// Pieces are dealt out as threads ask for them, so that one which loses its core for a while holds nobody up.
constexpr size_t kPiece = size_t{1} << 20;

struct Stream {
  const char* bytes;
  size_t pieces;
  alignas(64) size_t next;
  alignas(64) int waiting;
  alignas(64) int go;
};

__attribute__((always_inline)) inline void read_all(Stream& stream) {
  for (;;) {
    const size_t piece = __atomic_fetch_add(&stream.next, 1, __ATOMIC_RELAXED);
    if (piece >= stream.pieces) return;
    const char* at = stream.bytes + piece * kPiece;
    Words sums[kVectors] = {};
    for (const char* end = at + kPiece; at != end; at += kStep) {
      __builtin_prefetch(at + 8 * kStep);
      __builtin_prefetch(at + 8 * kStep + 256);
      for (int i = 0; i < kVectors; ++i) {
        Words words;
        __builtin_memcpy(&words, at + i * sizeof(Words), sizeof words);
        sums[i] |= words;
      }
    }
    for (Words& sum : sums) __asm__ volatile("" : : "m"(sum));
  }
}

#if defined(K25_X86)
// Wider loads keep more of memory's requests under way.
__attribute__((target("avx512f"))) void read_wide(Stream& stream) { read_all(stream); }
#endif

void read_pieces(Stream& stream) {
#if defined(K25_X86)
  if (k25_isa_best() >= K25_ISA_AVX512) return read_wide(stream);
#endif
  read_all(stream);
}

void* wait_and_read(void* state) {
  Stream& stream = *static_cast<Stream*>(state);
  __atomic_fetch_add(&stream.waiting, 1, __ATOMIC_ACQ_REL);
  while (__atomic_load_n(&stream.go, __ATOMIC_ACQUIRE) == 0) sched_yield();
  read_pieces(stream);
  return nullptr;
}

double now() {
  timespec time;
  clock_gettime(CLOCK_MONOTONIC, &time);
  return static_cast<double>(time.tv_sec) + 1e-9 * static_cast<double>(time.tv_nsec);
}

}  // namespace

extern "C" double k25_read_bandwidth(const void* data, size_t bytes, int32_t threads) {
  if (data == nullptr || bytes < kPiece || threads < 1 || threads > kMostThreads) return 0.0;
  Stream stream{static_cast<const char*>(data), bytes / kPiece, 0, 0, 0};
  pthread_t others[kMostThreads];
  int started = 0;  // fewer than asked for where the system has no more
  while (started < threads - 1 && pthread_create(&others[started], nullptr, wait_and_read, &stream) == 0) ++started;
  while (__atomic_load_n(&stream.waiting, __ATOMIC_ACQUIRE) < started) sched_yield();
  const double begin = now();
  __atomic_store_n(&stream.go, 1, __ATOMIC_RELEASE);
  read_pieces(stream);
  for (int i = 0; i < started; ++i) pthread_join(others[i], nullptr);
  return static_cast<double>(stream.pieces * kPiece) / (now() - begin);
}
