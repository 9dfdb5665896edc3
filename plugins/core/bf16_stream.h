// Rows of bfloat16 weights, in place, times a few activations, in the order in which they lie in memory.
//
// A vector of 2 W weights is taken apart into those of even and those of odd index (load_bf16_split), so float32 activations
// lie in *split order*: of each chunk of 2 W first the even, then the odd ones, padded with zeros to whole chunks. Weights are
// never read beyond their row.
//
// One row after the other: four rows side by side, 2 KB apart, are read a quarter slower on a core.
#ifndef K25_BF16_STREAM_H
#define K25_BF16_STREAM_H

#include "lines.h"

namespace k25 {
namespace K25_ISA_NS {

constexpr int kSplitChunk = 2 * W;
// The most activations that a row is multiplied with while it streams by.
constexpr int kStreamTokens = 4;
// How far ahead lines are asked for. Measured on one core, rows of 2 KB of a mapped file: 2 KB ahead 29 GB/s, 4 KB 31, 8 KB 35.
constexpr int kStreamAhead = 8192;

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

// A row's weights, 2 W at a time, as load_bf16_split has them; kAcrossLines: lines.h.
template <bool kAcrossLines>
struct RowReader {
  const uint16_t* at;
  __attribute__((always_inline)) explicit RowReader(const uint16_t* row) : at(row) {}
  __attribute__((always_inline)) void next(F32* even, F32* odd) {
    load_bf16_split(at, even, odd);
    prefetch(reinterpret_cast<const char*>(at) + kStreamAhead);
    at += kSplitChunk;
  }
  __attribute__((always_inline)) void last(F32* even, F32* odd) { load_bf16_split(at, even, odd); }
};

#if K25_HAS_LINES
template <>
struct RowReader<true> {
  LineReader lines;
  __attribute__((always_inline)) explicit RowReader(const uint16_t* row) { lines.start(row); }
  __attribute__((always_inline)) void next(F32* even, F32* odd) {
    prefetch(lines.line + kStreamAhead);
    split(lines.next(), even, odd);
  }
  __attribute__((always_inline)) void last(F32* even, F32* odd) { split(lines.last(), even, odd); }
  static __attribute__((always_inline)) void split(__m512i weights, F32* even, F32* odd) {
    *even = (F32)((U32)weights << 16);
    *odd = (F32)((U32)weights & 0xffff0000u);
  }
};
#endif

template <int M, bool kAcrossLines>
K25_INLINE void stream_row_from(const uint16_t* row, int64_t in, const float* const* x, float* out) {
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
  RowReader<kAcrossLines> reader(row);
  F32 even, odd;
  int64_t column = 0;
  int64_t left = in / kSplitChunk;
  for (; left > kChains; left -= kChains) {
#pragma GCC unroll 4
    for (int chain = 0; chain < kChains; ++chain, column += kSplitChunk) {
      reader.next(&even, &odd);
      add(chain, column, even, odd);
    }
  }
#pragma GCC unroll 4
  for (int chain = 0; chain < kChains; ++chain) {
    if (chain >= left) break;
    chain + 1 < left ? reader.next(&even, &odd) : reader.last(&even, &odd);
    add(chain, column, even, odd);
    column += kSplitChunk;
  }
  if (column < in) {
    load_tail(row + column, in - column, &even, &odd);
    add(0, column, even, odd);
  }
  for (int m = 0; m < M; ++m) {
    for (int chain = 1; chain < kChains; ++chain) total[0][m] = total[0][m] + total[chain][m];
    out[m] = sum(total[0][m]);
  }
}

// Dot products of M activations in split order with one row of `in` weights.
template <int M>
static inline void stream_row(const uint16_t* row, int64_t in, const float* const* x, float* out) {
#if K25_HAS_LINES
  if (is_across_lines(row, in / kSplitChunk)) return stream_row_from<M, true>(row, in, x, out);
#endif
  stream_row_from<M, false>(row, in, x, out);
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
