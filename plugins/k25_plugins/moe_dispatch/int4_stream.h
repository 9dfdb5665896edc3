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

// The same for groups of 32, four words each, and all W words there.
K25_INLINE F32 word_scales_32(const uint16_t* scales, int64_t word) {
#if defined(__AVX512F__)
  const __m512i pick = _mm512_setr_epi32(0, 0, 0, 0, 0x10000, 0x10000, 0x10000, 0x10000, 0x20000, 0x20000, 0x20000,
                                         0x20000, 0x30000, 0x30000, 0x30000, 0x30000);
  const __m128i four = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(scales + word / 4));
  return (F32)_mm512_maskz_permutexvar_epi16(0xaaaaaaaau, pick, _mm512_castsi128_si512(four));
#elif defined(__AVX2__)
  return (F32)_mm256_setr_m128(_mm_set1_ps(float_of(scales[word / 4])), _mm_set1_ps(float_of(scales[word / 4 + 1])));
#else
  return set1(float_of(scales[word / 4]));
#endif
}

// How far ahead lines are asked for. Measured: 2 KB reach 26 GB/s on one core, 4 to 8 KB 30.
constexpr int kPrefetchBytes = 6144;

// Dot products of M activations (word order, `x[m]`) with R rows, each a pointer to its words and scales.
// out[r * kStreamTokens + m]; `words` is the number of words of a row.
template <int M, int R>
static void int4_rows(const int32_t* const (&rows)[R], const uint16_t* const (&scales)[R], int64_t words,
                      int64_t words_per_group, const float* const* x, float* out) {
  F32 total[R][M];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) total[r][m] = zero();
  }
  const auto chunk = [&](int64_t word, const I32 (&packed)[R], const F32 (&scale)[R]) __attribute__((always_inline)) {
    F32 part[R][M];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
      for (int m = 0; m < M; ++m) part[r][m] = zero();
    }
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) {
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        const F32 value = int4(packed[r], i);
#pragma GCC unroll 8
        for (int m = 0; m < M; ++m) part[r][m] = fma(value, load(x[m] + word * 8 + i * W), part[r][m]);
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
      for (int m = 0; m < M; ++m) total[r][m] = fma(part[r][m], scale[r], total[r][m]);
    }
  };
  const int64_t whole = words / W * W;
  for (int64_t word = 0; word < whole; word += W) {
    I32 packed[R];
    F32 scale[R];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      packed[r] = load_i32(rows[r] + word);
      prefetch(reinterpret_cast<const char*>(rows[r] + word) + kPrefetchBytes);
      scale[r] = words_per_group == 4 ? word_scales_32(scales[r], word) : word_scales(scales[r], word, words_per_group, W);
    }
    chunk(word, packed, scale);
  }
  if (whole < words) {
    const int count = static_cast<int>(words - whole);
    I32 packed[R];
    F32 scale[R];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      int32_t lanes[W] = {};
      memcpy(lanes, rows[r] + whole, sizeof(int32_t) * static_cast<size_t>(count));
      packed[r] = load_i32(lanes);
      scale[r] = word_scales(scales[r], whole, words_per_group, count);
    }
    chunk(whole, packed, scale);
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) out[r * kStreamTokens + m] = sum(total[r][m]);
  }
}

template <int R>
K25_INLINE void int4_rows_of(int tokens, const int32_t* const (&rows)[R], const uint16_t* const (&scales)[R],
                             int64_t words, int64_t words_per_group, const float* const* x, float* out) {
  switch (tokens) {
    case 1: return int4_rows<1, R>(rows, scales, words, words_per_group, x, out);
    case 2: return int4_rows<2, R>(rows, scales, words, words_per_group, x, out);
    case 3: return int4_rows<3, R>(rows, scales, words, words_per_group, x, out);
    default: return int4_rows<4, R>(rows, scales, words, words_per_group, x, out);
  }
}

}  // namespace K25_ISA_NS
}  // namespace k25
#endif
