// Vectors of 64 bytes from memory that is not aligned to cache lines.
#ifndef K25_LINES_H
#define K25_LINES_H

#include "simd.h"

#if defined(__AVX512BW__)
#define K25_HAS_LINES 1
#else
#define K25_HAS_LINES 0
#endif

#if K25_HAS_LINES
namespace k25 {
namespace K25_ISA_NS {

// Tensors of a shard begin where its header ends, so that a vector lies across two cache lines; loads of such vectors reach
// three quarters of the bandwidth. Here whole lines are read and joined. Of the first and the last line only what belongs to
// the vectors is read.
struct LineReader {
  const char* line;
  __m512i joined, before;
  __mmask32 of_last;

  // Vectors from `at` on, an even address that is no multiple of 64.
  __attribute__((always_inline)) void start(const void* at) {
    const uintptr_t address = reinterpret_cast<uintptr_t>(at), within = address % 64;
    alignas(64) static const uint16_t kLanes[32] = {0,  1,  2,  3,  4,  5,  6,  7,  8,  9,  10, 11, 12, 13, 14, 15,
                                                    16, 17, 18, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 29, 30, 31};
    line = reinterpret_cast<const char*>(address - within);
    joined = _mm512_add_epi16(_mm512_load_si512(kLanes), _mm512_set1_epi16(static_cast<int16_t>(within / 2)));
    of_last = (1u << (within / 2)) - 1;
    before = _mm512_maskz_loadu_epi16(~of_last, line);
  }
  // The next vector, not the last one.
  __attribute__((always_inline)) __m512i next() {
    line += 64;
    return join(_mm512_load_si512(line));
  }
  __attribute__((always_inline)) __m512i last() { return join(_mm512_maskz_loadu_epi16(of_last, line + 64)); }

 private:
  __attribute__((always_inline)) __m512i join(__m512i after) {
    const __m512i found = _mm512_permutex2var_epi16(before, joined, after);
    before = after;
    return found;
  }
};

// Whether `count` vectors from `at` on repay a reader's start.
K25_INLINE bool is_across_lines(const void* at, int64_t count) {
  const uintptr_t within = reinterpret_cast<uintptr_t>(at) % 64;
  return within != 0 && within % 2 == 0 && count >= 16;
}

}  // namespace K25_ISA_NS
}  // namespace k25
#endif
#endif
