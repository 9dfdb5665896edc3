// Blocks of rows of bfloat16 weights, in place, times many activations.
//
// float32 activations lie in split order (bf16_stream.h), bfloat16 ones in their own, both padded with zeros to whole chunks.
// Weights are never read beyond their row.
#ifndef K25_BF16_ROWS_H
#define K25_BF16_ROWS_H

#include "bf16_stream.h"

namespace k25 {
namespace K25_ISA_NS {

constexpr int kPairChunk = 32;

static inline void to_pair_order(const void* from, bool is_float, int64_t size, uint16_t* to) {
  const float* floats = static_cast<const float*>(from);
  const uint16_t* halves = static_cast<const uint16_t*>(from);
  for (int64_t j = 0; j < size; ++j) to[j] = is_float ? bf16_of(floats[j]) : halves[j];
  for (int64_t j = size; j < padded(size, kPairChunk); ++j) to[j] = 0;
}

// Blocks of rows by columns that stay in the L2 cache, sums in memory.

constexpr int kBlockRows = 4;
// Columns of a block, a multiple of every chunk.
constexpr int kBlockColumns = 2048;

// Activations and dot products in float32.
struct FloatRows {
  using Activation = float;
  static constexpr int kChunk = kSplitChunk;
  static constexpr int kTokens = W == 16 ? 4 : 2;

  // sums[m * sum_stride + n * W ...] += the products of columns [start, stop) of N rows with M activations.
  template <int M, int N>
  static void multiply(const uint16_t* rows, int64_t in, int64_t start, int64_t stop, const float* const* x, float* sums,
                       int64_t sum_stride) {
    F32 total[M][N];
    for (int m = 0; m < M; ++m) {
      for (int n = 0; n < N; ++n) total[m][n] = load(sums + m * sum_stride + n * W);
    }
    const int64_t whole = stop <= in ? stop : in / kSplitChunk * kSplitChunk;
    for (int64_t column = start; column < stop; column += kSplitChunk) {
      F32 even[N], odd[N];
      for (int n = 0; n < N; ++n) {
        if (column < whole) {
          load_bf16_split(rows + n * in + column, &even[n], &odd[n]);
        } else {
          load_tail(rows + n * in + column, in - column, &even[n], &odd[n]);
        }
      }
      for (int m = 0; m < M; ++m) {
        const F32 x_even = load(x[m] + column), x_odd = load(x[m] + column + W);
        for (int n = 0; n < N; ++n) {
          total[m][n] = fma(even[n], x_even, total[m][n]);
          total[m][n] = fma(odd[n], x_odd, total[m][n]);
        }
      }
    }
    for (int m = 0; m < M; ++m) {
      for (int n = 0; n < N; ++n) store(sums + m * sum_stride + n * W, total[m][n]);
    }
  }
};

#if K25_HAS_DOT_BF16
// bfloat16 dot products with float32 sums.
struct PairRows {
  using Activation = uint16_t;
  static constexpr int kChunk = kPairChunk;
  static constexpr int kTokens = 6;

  template <int M, int N>
  static void multiply(const uint16_t* rows, int64_t in, int64_t start, int64_t stop, const uint16_t* const* x,
                       float* sums, int64_t sum_stride) {
    F32 total[M][N];
    for (int m = 0; m < M; ++m) {
      for (int n = 0; n < N; ++n) total[m][n] = load(sums + m * sum_stride + n * W);
    }
    const int64_t whole = stop <= in ? stop : in / kPairChunk * kPairChunk;
    for (int64_t column = start; column < whole; column += kPairChunk) {
      BF32 weight[N];
      for (int n = 0; n < N; ++n) weight[n] = load_bf32(rows + n * in + column);
      for (int m = 0; m < M; ++m) {
        const BF32 value = load_bf32(x[m] + column);
        for (int n = 0; n < N; ++n) total[m][n] = dot_bf16(total[m][n], value, weight[n]);
      }
    }
    if (whole < stop) {
      const __mmask32 there = (1u << (in - whole)) - 1;
      for (int n = 0; n < N; ++n) {
        const BF32 weight = (BF32)_mm512_maskz_loadu_epi16(there, rows + n * in + whole);
        for (int m = 0; m < M; ++m) total[m][n] = dot_bf16(total[m][n], load_bf32(x[m] + whole), weight);
      }
    }
    for (int m = 0; m < M; ++m) {
      for (int n = 0; n < N; ++n) store(sums + m * sum_stride + n * W, total[m][n]);
    }
  }
};
#endif

template <class Rows, int N>
K25_INLINE void multiply_rows(int tokens, const uint16_t* rows, int64_t in, int64_t start, int64_t stop,
                              const typename Rows::Activation* const* x, float* sums, int64_t sum_stride) {
  switch (tokens) {
    case 1: return Rows::template multiply<1, N>(rows, in, start, stop, x, sums, sum_stride);
    case 2: return Rows::template multiply<2, N>(rows, in, start, stop, x, sums, sum_stride);
#if defined(__AVX512F__)
    case 3: return Rows::template multiply<3, N>(rows, in, start, stop, x, sums, sum_stride);
    case 4: return Rows::template multiply<4, N>(rows, in, start, stop, x, sums, sum_stride);
#endif
#if K25_HAS_DOT_BF16
    case 5: return Rows::template multiply<5, N>(rows, in, start, stop, x, sums, sum_stride);
    case 6: return Rows::template multiply<6, N>(rows, in, start, stop, x, sums, sum_stride);
#endif
    default: return;
  }
}

// sums [tokens][rows] vectors = activations times `row_count` rows; x[m] are rows padded to Rows::kChunk.
template <class Rows>
static void multiply_block(const uint16_t* rows, int row_count, int64_t in, const typename Rows::Activation* const* x,
                           int tokens, float* sums) {
  const int64_t sum_stride = static_cast<int64_t>(row_count) * W;
  memset(sums, 0, sizeof(float) * static_cast<size_t>(tokens * sum_stride));
  const int64_t whole = padded(in, Rows::kChunk);
  for (int64_t start = 0; start < whole; start += kBlockColumns) {
    const int64_t stop = start + kBlockColumns < whole ? start + kBlockColumns : whole;
    for (int token = 0; token < tokens; token += Rows::kTokens) {
      const int block = tokens - token < Rows::kTokens ? tokens - token : Rows::kTokens;
      float* to = sums + token * sum_stride;
      int row = 0;
      for (; row + kBlockRows <= row_count; row += kBlockRows) {
        multiply_rows<Rows, kBlockRows>(block, rows + row * in, in, start, stop, x + token, to + row * W, sum_stride);
      }
      for (; row < row_count; ++row) {
        multiply_rows<Rows, 1>(block, rows + row * in, in, start, stop, x + token, to + row * W, sum_stride);
      }
    }
  }
}

}  // namespace K25_ISA_NS
}  // namespace k25
#endif
