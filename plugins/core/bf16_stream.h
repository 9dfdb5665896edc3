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

// A row's weights, 2 W at a time, as load_bf16_split has them; kAcrossLines: lines.h. `ahead` is asked for meanwhile.
template <bool kAcrossLines>
struct RowReader {
  const uint16_t* at;
  const char* ahead;
  __attribute__((always_inline)) explicit RowReader(const uint16_t* row)
      : at(row), ahead(reinterpret_cast<const char*>(row) + kStreamAhead) {}
  __attribute__((always_inline)) void next(F32* even, F32* odd) {
    load_bf16_split(at, even, odd);
    prefetch(ahead);
    at += kSplitChunk;
    ahead += sizeof(uint16_t) * kSplitChunk;
  }
  __attribute__((always_inline)) void last(F32* even, F32* odd) { load_bf16_split(at, even, odd); }
};

#if K25_HAS_LINES
template <>
struct RowReader<true> {
  LineReader lines;
  const char* ahead;
  __attribute__((always_inline)) explicit RowReader(const uint16_t* row) {
    lines.start(row);
    ahead = lines.line + kStreamAhead;
  }
  __attribute__((always_inline)) void next(F32* even, F32* odd) {
    prefetch(ahead);
    ahead += 64;
    split(lines.next(), even, odd);
  }
  __attribute__((always_inline)) void last(F32* even, F32* odd) { split(lines.last(), even, odd); }
  static __attribute__((always_inline)) void split(__m512i weights, F32* even, F32* odd) {
    *even = (F32)((U32)weights << 16);
    *odd = (F32)((U32)weights & 0xffff0000u);
  }
};
#endif

// The products of a row with M activations, lane by lane. kIsLast: nothing may be read after it.
template <int M, bool kIsLast, class Reader>
K25_INLINE void add_row(Reader& reader, const uint16_t* row, int64_t in, const float* const* x, F32* totals) {
  constexpr int kChains = W == 16 ? 4 : 2;  // chunks that are summed apart, since a sum takes longer than a chunk
  F32 total[kChains][M];
  for (int chain = 0; chain < kChains; ++chain) {
    for (int m = 0; m < M; ++m) total[chain][m] = zero();
  }
  F32 even, odd;
  const auto add = [&](int chain, int64_t column) __attribute__((always_inline)) {
    for (int m = 0; m < M; ++m) {
      total[chain][m] = fma(even, load(x[m] + column), total[chain][m]);
      total[chain][m] = fma(odd, load(x[m] + column + W), total[chain][m]);
    }
  };
  int64_t column = 0;
  int64_t left = in / kSplitChunk;
  for (; left > kChains; left -= kChains) {
#pragma GCC unroll 4
    for (int chain = 0; chain < kChains; ++chain, column += kSplitChunk) {
      reader.next(&even, &odd);
      add(chain, column);
    }
  }
#pragma GCC unroll 4
  for (int chain = 0; chain < kChains; ++chain) {
    if (chain < left) {
      kIsLast && chain + 1 == left ? reader.last(&even, &odd) : reader.next(&even, &odd);
      add(chain, column + chain * kSplitChunk);
    }
  }
  column += left * kSplitChunk;
  if (column < in) {
    load_tail(row + column, in - column, &even, &odd);
    add(0, column);
  }
  for (int m = 0; m < M; ++m) {
    for (int chain = 1; chain < kChains; ++chain) total[0][m] = total[0][m] + total[chain][m];
    totals[m] = total[0][m];
  }
}

template <int M, bool kAcrossLines>
static void stream_rows_from(const uint16_t* rows, int64_t count, int64_t in, const float* const* x, const uint16_t* next,
                             float* out) {
  constexpr int kBlock = M == 4 ? 1 : M == 2 ? 2 : 4;  // rows whose sums over lanes are made together, four at a time
  const bool goes_on = in % kSplitChunk == 0;           // where a row ends, the next one begins
  const int64_t own = next == nullptr ? count : count - (kStreamAhead / 2 + in - 1) / in;  // rows that ask for these rows
  RowReader<kAcrossLines> reader(rows);
  for (int64_t first = 0; first < count; first += kBlock) {
    F32 totals[kBlock * M];
    const int block = static_cast<int>(count - first < kBlock ? count - first : kBlock);
    for (int r = block; r < kBlock; ++r) {
      for (int m = 0; m < M; ++m) totals[r * M + m] = zero();
    }
    for (int r = 0; r < block; ++r) {
      const int64_t n = first + r;
      const uint16_t* row = rows + n * in;
      if (!goes_on) reader = RowReader<kAcrossLines>(row);
      if (n >= own) reader.ahead = reinterpret_cast<const char*>(next + (n - own) * in);
      if (goes_on && n + 1 < count) {
        add_row<M, false>(reader, row, in, x, totals + r * M);
      } else {
        add_row<M, true>(reader, row, in, x, totals + r * M);
      }
    }
    float found[kBlock * M];
    for (int four = 0; four < kBlock * M; four += 4) {
      const F32 values[4] = {totals[four], totals[four + 1], totals[four + 2], totals[four + 3]};
      sum_four(values, found + four);
    }
    memcpy(out + first * M, found, sizeof(float) * static_cast<size_t>(block * M));
  }
}

// out[row][m]: dot products of `count` rows of `in` weights, which lie together, with M activations in split order. `next` is
// what the thread reads after them, or null: what lies behind them.
template <int M>
static inline void stream_rows(const uint16_t* rows, int64_t count, int64_t in, const float* const* x, const uint16_t* next,
                               float* out) {
#if K25_HAS_LINES
  const int64_t chunks = in / kSplitChunk;
  if (is_across_lines(rows, in % kSplitChunk == 0 ? count * chunks : chunks)) {
    return stream_rows_from<M, true>(rows, count, in, x, next, out);
  }
#endif
  stream_rows_from<M, false>(rows, count, in, x, next, out);
}

K25_INLINE void stream_rows_of(int tokens, const uint16_t* rows, int64_t count, int64_t in, const float* const* x,
                               const uint16_t* next, float* out) {
  switch (tokens) {
    case 1: return stream_rows<1>(rows, count, in, x, next, out);
    case 2: return stream_rows<2>(rows, count, in, x, next, out);
    case 3: return stream_rows<3>(rows, count, in, x, next, out);
    default: return stream_rows<4>(rows, count, in, x, next, out);
  }
}

}  // namespace K25_ISA_NS
}  // namespace k25
#endif
