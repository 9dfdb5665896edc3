// The orders in which activations meet packed INT4 words, so that weights need no shuffling.
//
// Element 8 w + i of a row is nibble i of word w. Shifting a vector of words by 4 i puts nibble i of each word lowest:
//
//   word order   (float32, W lanes) chunks of 8 W elements: vector i, lane w holds element 8 w + i.
//   group order  (bfloat16 pairs, 16 lanes) chunks of 512 elements, 16 groups of 32. Vector (q, i), lane 4 b + s holds
//                elements i and i + 4 (a pair) of word q of group 4 s + b: one lane meets one scale only.
//
// Rows are padded with zeros to whole chunks.
#ifndef K25_INT4_ORDER_H
#define K25_INT4_ORDER_H

#include "simd.h"

namespace k25 {
namespace K25_ISA_NS {

constexpr int kWordChunk = 8 * W;
constexpr int kGroupChunk = 512;

K25_INLINE int64_t word_order(int64_t element) {
  const int64_t chunk = element / kWordChunk, rest = element % kWordChunk;
  return chunk * kWordChunk + rest % 8 * W + rest / 8;
}

K25_INLINE int64_t group_order(int64_t element) {
  const int64_t chunk = element / kGroupChunk, rest = element % kGroupChunk;
  const int64_t group = rest / 32, word = rest % 32 / 8, nibble = rest % 8;
  const int64_t lane = group % 4 * 4 + group / 4;
  return chunk * kGroupChunk + word * 128 + nibble % 4 * 32 + 2 * lane + nibble / 4;
}

// `from` holds `size` elements (float32 or bfloat16), `to` padded(size, kWordChunk).
static void to_word_order(const void* from, bool is_float, int64_t size, float* to) {
  const float* floats = static_cast<const float*>(from);
  const uint16_t* halves = static_cast<const uint16_t*>(from);
  for (int64_t start = 0; start < size; start += kWordChunk) {
    float chunk[kWordChunk] = {};
    const int count = static_cast<int>(size - start < kWordChunk ? size - start : kWordChunk);
    for (int j = 0; j < count; ++j) chunk[j] = is_float ? floats[start + j] : float_of(halves[start + j]);
    for (int i = 0; i < 8; ++i) {
      for (int w = 0; w < W; ++w) to[start + i * W + w] = chunk[8 * w + i];
    }
  }
}

// `to` holds padded(size, kGroupChunk); float32 is rounded to nearest.
static inline void to_group_order(const void* from, bool is_float, int64_t size, uint16_t* to) {
  const float* floats = static_cast<const float*>(from);
  const uint16_t* halves = static_cast<const uint16_t*>(from);
  const int64_t whole = padded(size, kGroupChunk);
  for (int64_t j = 0; j < size; ++j) to[group_order(j)] = is_float ? bf16_of(floats[j]) : halves[j];
  for (int64_t j = size; j < whole; ++j) to[group_order(j)] = 0;
}

}  // namespace K25_ISA_NS
}  // namespace k25
#endif
