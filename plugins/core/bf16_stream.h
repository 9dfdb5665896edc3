// Rows of bfloat16 weights, in place, times a few activations, in the order in which they lie in memory.
//
// A vector of 2 W weights is taken apart into those of even and those of odd index (load_bf16_split), so float32 activations
// lie in *split order*: of each chunk of 2 W first the even, then the odd ones, padded with zeros to whole chunks. Weights are
// never read beyond their row.
//
// One row after the other: four rows side by side, 2 KB apart, are read a quarter slower on a core.
#ifndef K25_BF16_STREAM_H
#define K25_BF16_STREAM_H

#include "simd.h"

namespace k25 {
namespace K25_ISA_NS {

constexpr int kSplitChunk = 2 * W;
// The most activations that a row is multiplied with while it streams by.
constexpr int kStreamTokens = 4;
// How far ahead lines are asked for.
constexpr int kStreamAhead = 4096;

static inline void to_split_order(const void* from, bool is_float, int64_t size, float* to) {
  const float* floats = static_cast<const float*>(from);
  const uint16_t* halves = static_cast<const uint16_t*>(from);
  for (int64_t start = 0; start < size; start += kSplitChunk) {
    float chunk[kSplitChunk] = {};
    const int count = static_cast<int>(size - start < kSplitChunk ? size - start : kSplitChunk);
    for (int j = 0; j < count; ++j) chunk[j] = is_float ? floats[start + j] : float_of(halves[start + j]);
    for (int j = 0; j < W; ++j) {
      to[start + j] = chunk[2 * j];
      to[start + W + j] = chunk[2 * j + 1];
    }
  }
}

// The first `size` values of split order in their own.
static inline void from_split_order(const float* from, int64_t size, float* to) {
  int64_t start = 0;
  for (; start + kSplitChunk <= size; start += kSplitChunk) {
    for (int j = 0; j < W; ++j) {
      to[start + 2 * j] = from[start + j];
      to[start + 2 * j + 1] = from[start + W + j];
    }
  }
  for (int64_t j = start; j < size; ++j) to[j] = from[start + (j - start) % 2 * W + (j - start) / 2];
}

// The last, partial chunk of a row, padded with zeros.
K25_INLINE void load_tail(const uint16_t* from, int64_t count, F32* even, F32* odd) {
  uint16_t lanes[kSplitChunk] = {};
  memcpy(lanes, from, sizeof(uint16_t) * static_cast<size_t>(count));
  load_bf16_split(lanes, even, odd);
}

// Dot products of M activations in split order with one row of `in` weights.
template <int M>
static inline void stream_row(const uint16_t* row, int64_t in, const float* const* x, float* out) {
  constexpr int kChains = W == 16 ? 4 : 2;  // chunks that are summed apart, since a sum takes longer than a chunk
  F32 total[kChains][M];
  for (int chain = 0; chain < kChains; ++chain) {
    for (int m = 0; m < M; ++m) total[chain][m] = zero();
  }
  const auto add = [&](int chain, int64_t column, F32 even, F32 odd) __attribute__((always_inline)) {
    for (int m = 0; m < M; ++m) {
      total[chain][m] = fma(even, load(x[m] + column), total[chain][m]);
      total[chain][m] = fma(odd, load(x[m] + column + W), total[chain][m]);
    }
  };
  const int64_t whole = in / kSplitChunk * kSplitChunk;
  int64_t column = 0;
  for (; column + kChains * kSplitChunk <= whole; column += kChains * kSplitChunk) {
#pragma GCC unroll 4
    for (int chain = 0; chain < kChains; ++chain) {
      const uint16_t* at = row + column + chain * kSplitChunk;
      F32 even, odd;
      load_bf16_split(at, &even, &odd);
      prefetch(reinterpret_cast<const char*>(at) + kStreamAhead);
      add(chain, column + chain * kSplitChunk, even, odd);
    }
  }
  for (; column < whole; column += kSplitChunk) {
    F32 even, odd;
    load_bf16_split(row + column, &even, &odd);
    add(0, column, even, odd);
  }
  if (whole < in) {
    F32 even, odd;
    load_tail(row + whole, in - whole, &even, &odd);
    add(0, whole, even, odd);
  }
  for (int m = 0; m < M; ++m) {
    for (int chain = 1; chain < kChains; ++chain) total[0][m] = total[0][m] + total[chain][m];
    out[m] = sum(total[0][m]);
  }
}

K25_INLINE void stream_row_of(int tokens, const uint16_t* row, int64_t in, const float* const* x, float* out) {
  switch (tokens) {
    case 1: return stream_row<1>(row, in, x, out);
    case 2: return stream_row<2>(row, in, x, out);
    case 3: return stream_row<3>(row, in, x, out);
    default: return stream_row<4>(row, in, x, out);
  }
}

}  // namespace K25_ISA_NS
}  // namespace k25
#endif
