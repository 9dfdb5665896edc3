// Rows of packed INT4 times a few activations: each word is read once, unpacked in registers, nothing is stored.
#ifndef K25_INT4_STREAM_H
#define K25_INT4_STREAM_H

#include "expert_groups.h"
#include "int4_order.h"

namespace k25 {
namespace K25_ISA_NS {

// The most activations that a row is multiplied with at a time.
constexpr int kStreamTokens = 4;

// Scales of W words that start at `word`, one for each word; `count` words are there.
K25_INLINE F32 word_scales(const uint16_t* scales, int64_t word, int64_t words_per_group, int count) {
  float lanes[W] = {};
  for (int lane = 0; lane < count; ++lane) lanes[lane] = float_of(scales[(word + lane) / words_per_group]);
  return load(lanes);
}

// The same for groups of 32, four words each, and all W words there; `scales` is that of the first.
K25_INLINE F32 word_scales_32(const uint16_t* scales) {
#if defined(__AVX512F__)
  const __m512i pick = _mm512_setr_epi32(0, 0, 0, 0, 0x10000, 0x10000, 0x10000, 0x10000, 0x20000, 0x20000, 0x20000,
                                         0x20000, 0x30000, 0x30000, 0x30000, 0x30000);
  const __m128i four = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(scales));
  return (F32)_mm512_maskz_permutexvar_epi16(0xaaaaaaaau, pick, _mm512_castsi128_si512(four));
#elif defined(__AVX2__)
  return (F32)_mm256_setr_m128(_mm_set1_ps(float_of(scales[0])), _mm_set1_ps(float_of(scales[1])));
#else
  return set1(float_of(scales[0]));
#endif
}

// How far ahead lines are asked for: of what a thread reads, in the order in which it reads it, also where one expert's rows
// end and another's begin. Measured with 32 rows of 256 bytes from each of four experts in turn, two cores: 43 to 46 GB/s with
// 4 KB ahead in the same matrix, 49 to 53 with 8 KB ahead in this order.
constexpr int kPrefetchBytes = 8192;
constexpr int64_t kScaleLineWords = 128;  // that share a line of scales in groups of 32

// The most rows of a call, sides together.
constexpr int kStreamRows = 32;

// R rows that pass side by side, `count` times; each time every one moves on by `step` rows. The product of the n-th row of
// side r with activation m goes to out[m * kStreamRows + n * step + out_at[r]].
template <int R>
struct PackedRows {
  int64_t row_words, words_per_group;
  int step, count;
  const int32_t* words[R];
  const uint16_t* scales[R];
  const int32_t* next_words[R];  // what the thread reads after these rows
  const uint16_t* next_scales[R];
  int out_at[R];

  __attribute__((always_inline)) int64_t row_scales() const { return row_words / words_per_group; }
  // What is asked for while side r passes for the n-th time.
  __attribute__((always_inline)) const int32_t* words_ahead(int n, int r) const {
    const int64_t ahead = n + steps_ahead();
    return ahead < count ? words[r] + ahead * step * row_words : next_words[r] + (ahead - count) * step * row_words;
  }
  __attribute__((always_inline)) const uint16_t* scales_ahead(int n, int r) const {
    const int64_t ahead = n + steps_ahead();
    return ahead < count ? scales[r] + ahead * step * row_scales() : next_scales[r] + (ahead - count) * step * row_scales();
  }
  // Side r of a matrix begins with a row.
  void start(int r, const int32_t* matrix_words, const uint16_t* matrix_scales, int64_t row) {
    words[r] = matrix_words + row * row_words;
    scales[r] = matrix_scales + row * row_scales();
  }
  void go_on(int r, const int32_t* matrix_words, const uint16_t* matrix_scales, int64_t row) {
    next_words[r] = matrix_words + row * row_words;
    next_scales[r] = matrix_scales + row * row_scales();
  }

 private:
  __attribute__((always_inline)) int64_t steps_ahead() const {
    return (kPrefetchBytes / 4 + step * row_words - 1) / (step * row_words);
  }
};

// Rows of a side whose sums over lanes are made together, four sums at a time.
template <int M, int R>
constexpr int kSumRows = R * M % 4 == 0 ? 1 : R * M % 2 == 0 ? 2 : 4;

// Writes the sums of rows n to n + `count` of each side, count at most kSumRows; totals[row][r][m].
template <int M, int R>
K25_INLINE void write_sums(const PackedRows<R>& rows, int n, int count, F32 (&totals)[kSumRows<M, R>][R][M], float* out) {
  constexpr int kSums = kSumRows<M, R> * R * M;
  float found[kSums];
  F32* flat = &totals[0][0][0];
  for (int row = count; row < kSumRows<M, R>; ++row) {
    for (int i = 0; i < R * M; ++i) flat[row * R * M + i] = zero();
  }
#pragma GCC unroll 8
  for (int i = 0; i < kSums; i += 4) {
    const F32 four[4] = {flat[i], flat[i + 1], flat[i + 2], flat[i + 3]};
    sum_four(four, found + i);
  }
  for (int row = 0; row < count; ++row) {
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
      for (int m = 0; m < M; ++m) {
        out[m * kStreamRows + (n + row) * rows.step + rows.out_at[r]] = found[(row * R + r) * M + m];
      }
    }
  }
}

// Calls rows<M, kGroups32>() for the M and the groups at hand.
#define K25_FOR_TOKENS_AND_GROUPS(ROWS, R, TOKENS, GROUPS_32, ...)                                                     \
  switch (TOKENS) {                                                                                                    \
    case 1: return GROUPS_32 ? ROWS<1, R, true>(__VA_ARGS__) : ROWS<1, R, false>(__VA_ARGS__);                         \
    case 2: return GROUPS_32 ? ROWS<2, R, true>(__VA_ARGS__) : ROWS<2, R, false>(__VA_ARGS__);                         \
    case 3: return GROUPS_32 ? ROWS<3, R, true>(__VA_ARGS__) : ROWS<3, R, false>(__VA_ARGS__);                         \
    default: return GROUPS_32 ? ROWS<4, R, true>(__VA_ARGS__) : ROWS<4, R, false>(__VA_ARGS__);                        \
  }

// Dot products of M activations (word order, `x[m]`) with rows.
template <int M, int R, bool kGroups32>
static void int4_rows(const PackedRows<R>& rows, const float* const* x, float* out) {
  constexpr int kBlock = kSumRows<M, R>;
  F32 totals[kBlock][R][M];
  for (int n = 0; n < rows.count; ++n) {
    F32 total[R][M];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
      for (int m = 0; m < M; ++m) total[r][m] = zero();
    }
    const auto chunk = [&](int64_t word, int r, I32 packed, F32 scale) __attribute__((always_inline)) {
      F32 part[M];
#pragma GCC unroll 8
      for (int m = 0; m < M; ++m) part[m] = zero();
#pragma GCC unroll 8
      for (int i = 0; i < 8; ++i) {
        const F32 value = int4(packed, i);
#pragma GCC unroll 8
        for (int m = 0; m < M; ++m) part[m] = fma(value, load(x[m] + word * 8 + i * W), part[m]);
      }
#pragma GCC unroll 8
      for (int m = 0; m < M; ++m) total[r][m] = fma(part[m], scale, total[r][m]);
    };
    const int64_t whole = rows.row_words / W * W;
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const int32_t* words = rows.words[r] + n * rows.step * rows.row_words;
      const uint16_t* scales = rows.scales[r] + n * rows.step * rows.row_scales();
      const int32_t* words_ahead = rows.words_ahead(n, r);
      const uint16_t* scales_ahead = rows.scales_ahead(n, r);
      for (int64_t word = 0; word < whole; word += W) {
        prefetch(words_ahead + word);
        if (kGroups32 && word % kScaleLineWords == 0) prefetch(scales_ahead + word / 4);
        chunk(word, r, load_i32(words + word),
              kGroups32 ? word_scales_32(scales + word / 4) : word_scales(scales, word, rows.words_per_group, W));
      }
      if (whole < rows.row_words) {
        const int count = static_cast<int>(rows.row_words - whole);
        int32_t lanes[W] = {};
        memcpy(lanes, words + whole, sizeof(int32_t) * static_cast<size_t>(count));
        chunk(whole, r, load_i32(lanes), word_scales(scales, whole, rows.words_per_group, count));
      }
#pragma GCC unroll 8
      for (int m = 0; m < M; ++m) totals[n % kBlock][r][m] = total[r][m];
    }
    if (n % kBlock == kBlock - 1 || n + 1 == rows.count) {
      write_sums<M, R>(rows, n - n % kBlock, n % kBlock + 1, totals, out);
    }
  }
}

template <int R>
K25_INLINE void int4_rows_of(int tokens, const PackedRows<R>& rows, const float* const* x, float* out) {
  K25_FOR_TOKENS_AND_GROUPS(int4_rows, R, tokens, rows.words_per_group == 4, rows, x, out)
}

}  // namespace K25_ISA_NS
}  // namespace k25
#endif
