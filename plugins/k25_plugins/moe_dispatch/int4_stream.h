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

// How far ahead lines are asked for. Measured on one core: words 2 KB ahead 26 GB/s, 4 KB 31 to 33; without the scales,
// whose short stream the hardware does not follow, 19.
constexpr int kPrefetchBytes = 4096;
constexpr int64_t kScaleLineWords = 128;  // that share a line of scales in groups of 32

// R rows that pass side by side, `count` times; each time every one moves on by `step` rows.
template <int R>
struct PackedRows {
  const int32_t* words[R];
  const uint16_t* scales[R];
  int64_t row_words, words_per_group, step;
  int count;

  __attribute__((always_inline)) void next() {
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      words[r] += step * row_words;
      scales[r] += step * (row_words / words_per_group);
    }
  }
  // Scales of the W words at `word`, lines ahead asked for.
  template <bool kGroups32>
  __attribute__((always_inline)) F32 scales_at(int r, int64_t word) const {
    prefetch(reinterpret_cast<const char*>(words[r] + word) + kPrefetchBytes);
    if (!kGroups32) return word_scales(scales[r], word, words_per_group, W);
    const uint16_t* at = scales[r] + word / 4;
    if (word % kScaleLineWords == 0) prefetch(reinterpret_cast<const char*>(at) + kPrefetchBytes / 8);
    return word_scales_32(at);
  }
};

// Calls rows<M, kGroups32>() for the M and the groups at hand.
#define K25_FOR_TOKENS_AND_GROUPS(ROWS, R, TOKENS, GROUPS_32, ...)                                                     \
  switch (TOKENS) {                                                                                                    \
    case 1: return GROUPS_32 ? ROWS<1, R, true>(__VA_ARGS__) : ROWS<1, R, false>(__VA_ARGS__);                         \
    case 2: return GROUPS_32 ? ROWS<2, R, true>(__VA_ARGS__) : ROWS<2, R, false>(__VA_ARGS__);                         \
    case 3: return GROUPS_32 ? ROWS<3, R, true>(__VA_ARGS__) : ROWS<3, R, false>(__VA_ARGS__);                         \
    default: return GROUPS_32 ? ROWS<4, R, true>(__VA_ARGS__) : ROWS<4, R, false>(__VA_ARGS__);                        \
  }

// Dot products of M activations (word order, `x[m]`) with rows: out[(n * R + r) * kStreamTokens + m] for the n-th time.
template <int M, int R, bool kGroups32>
static void int4_rows(PackedRows<R> rows, const float* const* x, float* out) {
  for (int n = 0; n < rows.count; ++n, rows.next(), out += R * kStreamTokens) {
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
    const int64_t whole = rows.row_words / W * W;
    for (int64_t word = 0; word < whole; word += W) {
      I32 packed[R];
      F32 scale[R];
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        packed[r] = load_i32(rows.words[r] + word);
        scale[r] = rows.template scales_at<kGroups32>(r, word);
      }
      chunk(word, packed, scale);
    }
    if (whole < rows.row_words) {
      const int count = static_cast<int>(rows.row_words - whole);
      I32 packed[R];
      F32 scale[R];
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        int32_t lanes[W] = {};
        memcpy(lanes, rows.words[r] + whole, sizeof(int32_t) * static_cast<size_t>(count));
        packed[r] = load_i32(lanes);
        scale[r] = word_scales(rows.scales[r], whole, rows.words_per_group, count);
      }
      chunk(whole, packed, scale);
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
      for (int m = 0; m < M; ++m) out[r * kStreamTokens + m] = sum(total[r][m]);
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
