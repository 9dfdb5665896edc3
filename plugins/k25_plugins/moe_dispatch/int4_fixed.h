// Rows of packed INT4 times a few activations in whole numbers (AVX2 and up): half the instructions of float32, or fewer.
//
// An activation is its block's scale times a whole number of 16 bits; a block is the eight elements that meet one word. The
// largest of a block is 32639 = 127 * 256 + 127, so that a number is two signed bytes, 256 high + low. Products with nibbles
// are summed exactly over a block, and float32 takes over: one conversion, the block's scale, the group's scale. What a
// block rounds is at most 2^-16 of its largest element, less than bfloat16 (2^-9 of each) does.
#ifndef K25_INT4_FIXED_H
#define K25_INT4_FIXED_H

#include "int4_stream.h"

#if defined(__AVX2__)
#define K25_HAS_FIXED 1
#else
#define K25_HAS_FIXED 0
#endif

#if K25_HAS_FIXED
namespace k25 {
namespace K25_ISA_NS {

constexpr int kFixedChunk = 8 * W;  // elements
constexpr float kFixedMost = 32639.0f;
// Below it a block counts as zero: its scale would be no normal number.
constexpr float kFixedLeast = 1e-30f;

// Of W words: byte b of lane w belongs to element 2 b (even) or 2 b + 1 (odd) of word w.
struct alignas(64) FixedChunk {
  I32 high_even, high_odd, low_even, low_odd;
  I32 offset;  // -8 times the sum of the block: nibbles are 8 too large
  F32 scale;
};

K25_INLINE I32 rounded_to_whole(F32 x) {
#if defined(__AVX512F__)
  return (I32)_mm512_cvtps_epi32((__m512)x);
#else
  return (I32)_mm256_cvtps_epi32((__m256)x);
#endif
}

// start + a . x + b . y, four products of bytes to a lane: nibbles 0 to 15 in a and b, signed bytes in x and y.
K25_INLINE I32 add_products(I32 start, I32 a, I32 x, I32 b, I32 y) {
#if defined(__AVX512VNNI__)
  return (I32)_mm512_dpbusd_epi32(_mm512_dpbusd_epi32((__m512i)start, (__m512i)a, (__m512i)x), (__m512i)b, (__m512i)y);
#elif defined(__AVX512BW__)  // four products of at most 15 * 128 fit 16 bits
  const __m512i pairs = _mm512_add_epi16(_mm512_maddubs_epi16((__m512i)a, (__m512i)x),
                                         _mm512_maddubs_epi16((__m512i)b, (__m512i)y));
  return start + (I32)_mm512_madd_epi16(pairs, _mm512_set1_epi16(1));
#else
  const __m256i pairs = _mm256_add_epi16(_mm256_maddubs_epi16((__m256i)a, (__m256i)x),
                                         _mm256_maddubs_epi16((__m256i)b, (__m256i)y));
  return start + (I32)_mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
#endif
}

K25_INLINE I32 bytes_of(I32 a, I32 b, I32 c, I32 d) {
  return (a & 255) | (b & 255) << 8 | (c & 255) << 16 | d << 24;
}

// x[i], lane w: element i of block w. A block with an element that is not finite gets the scale NaN.
K25_INLINE FixedChunk fixed_chunk(const F32 (&x)[8]) {
  F32 most = zero(), nothing = zero();
  for (int i = 0; i < 8; ++i) {
    most = max((F32)((I32)x[i] & 0x7fffffff), most);
    nothing = nothing + x[i] * 0.0f;
  }
  const F32 factor = most >= kFixedLeast ? kFixedMost / most : zero();
  const I32 is_finite = nothing == zero();
  I32 number[8], high[8], total{};
  for (int i = 0; i < 8; ++i) {
    number[i] = rounded_to_whole(x[i] * factor) & is_finite;
    high[i] = (number[i] + 128) >> 8;  // the low byte is signed
    total += number[i];
  }
  FixedChunk chunk;
  chunk.high_even = bytes_of(high[0], high[2], high[4], high[6]);
  chunk.high_odd = bytes_of(high[1], high[3], high[5], high[7]);
  chunk.low_even = bytes_of(number[0], number[2], number[4], number[6]);
  chunk.low_odd = bytes_of(number[1], number[3], number[5], number[7]);
  chunk.offset = total * -8;
  chunk.scale = most / kFixedMost + nothing;
  return chunk;
}

// `to` holds padded(size, kFixedChunk) / kFixedChunk chunks.
static inline void to_fixed_order(const void* from, bool is_float, int64_t size, FixedChunk* to) {
  alignas(64) float words[kWordChunk];
  static_assert(kWordChunk == kFixedChunk, "the same words");
  for (int64_t start = 0; start < size; start += kFixedChunk, ++to) {
    const int64_t count = size - start < kFixedChunk ? size - start : kFixedChunk;
    to_word_order(static_cast<const char*>(from) + start * (is_float ? 4 : 2), is_float, count, words);
    F32 x[8];
    for (int i = 0; i < 8; ++i) x[i] = load(words + i * W);
    *to = fixed_chunk(x);
  }
}

// Sixteen elements from `first` on, a multiple of 16, of a row of chunks: two blocks.
static inline void write_fixed(const float* values, int64_t first, FixedChunk* to) {
  F32 x[8];
  for (int i = 0; i < 8; ++i) {
    x[i] = zero();
    x[i][0] = values[i];
    x[i][1] = values[8 + i];
  }
  const FixedChunk blocks = fixed_chunk(x);
  char* chunk = reinterpret_cast<char*>(to + first / kFixedChunk) + first % kFixedChunk / 8 * sizeof(int32_t);
  const char* lanes = reinterpret_cast<const char*>(&blocks);
  for (size_t at = 0; at < sizeof blocks; at += sizeof(I32)) memcpy(chunk + at, lanes + at, 2 * sizeof(int32_t));
}

// Loads that rows share are made once: the compiler would rather make them anew in each instruction, and loads are what these
// loops wait for.
#if defined(__AVX512F__)
K25_INLINE void keep_in_registers(I32& value) { __asm__("" : "+v"(value)); }
K25_INLINE void keep_in_registers(FixedChunk& chunk) {
  __asm__("" : "+v"(chunk.high_even), "+v"(chunk.high_odd), "+v"(chunk.low_even), "+v"(chunk.low_odd));
  __asm__("" : "+v"(chunk.offset), "+v"(chunk.scale));
}
#else
K25_INLINE void keep_in_registers(I32&) {}
K25_INLINE void keep_in_registers(FixedChunk&) {}
#endif

// Dot products of M activations with rows, as int4_rows.
template <int M, int R, bool kGroups32>
static void fixed_rows(const PackedRows<R>& rows, const FixedChunk* const* x, float* out) {
  constexpr int64_t kLineVectors = kScaleLineWords / W;  // that share a line of scales
  constexpr int kBlock = kSumRows<M, R>;
  const I32 nibble = set1i(0x0f0f0f0f);
  const int64_t whole = rows.row_words / W, left = rows.row_words % W;
  const int64_t step_words = rows.step * rows.row_words, step_scales = rows.step * rows.row_scales();
  const int32_t* words[R];
  const uint16_t* scales[R];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
    words[r] = rows.words[r];
    scales[r] = rows.scales[r];
  }
  F32 totals[kBlock][R][M];
  for (int n = 0; n < rows.count; ++n) {
    F32 total[R][M], scale[R];
    I32 packed[R];
    const FixedChunk* at[M];
    const int32_t* words_ahead[R];
    const uint16_t* scales_ahead[R];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      words_ahead[r] = rows.words_ahead(n, r);
      scales_ahead[r] = rows.scales_ahead(n, r);
    }
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) {
      at[m] = x[m];
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) total[r][m] = zero();
    }
    const auto add = [&]() __attribute__((always_inline)) {
      I32 even[R], odd[R];
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        even[r] = packed[r] & nibble;
        odd[r] = (packed[r] >> 4) & nibble;
      }
#pragma GCC unroll 8
      for (int m = 0; m < M; ++m) {
        FixedChunk chunk = *at[m]++;
        keep_in_registers(chunk);
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) {
          const I32 high = add_products(I32{}, even[r], chunk.high_even, odd[r], chunk.high_odd);
          const I32 low = add_products(chunk.offset, even[r], chunk.low_even, odd[r], chunk.low_odd);
          const F32 sum = __builtin_convertvector((high << 8) + low, F32);
          total[r][m] = fma(sum * chunk.scale, scale[r], total[r][m]);
        }
      }
    };
    for (int64_t vector = 0; vector < whole;) {
      const int64_t stop = vector + kLineVectors < whole ? vector + kLineVectors : whole;
#pragma GCC unroll 8
      for (int r = 0; r < R && kGroups32; ++r) prefetch(scales_ahead[r] + vector * (W / 4));
      for (; vector < stop; ++vector) {
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) {
          prefetch(words_ahead[r] + vector * W);
          packed[r] = load_i32(words[r] + vector * W);
          keep_in_registers(packed[r]);
          scale[r] = kGroups32 ? word_scales_32(scales[r] + vector * (W / 4))
                               : word_scales(scales[r], vector * W, rows.words_per_group, W);
        }
        add();
      }
    }
    if (left > 0) {
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        int32_t lanes[W] = {};
        memcpy(lanes, words[r] + whole * W, sizeof(int32_t) * static_cast<size_t>(left));
        packed[r] = load_i32(lanes);
        scale[r] = word_scales(scales[r], whole * W, rows.words_per_group, static_cast<int>(left));
      }
      add();
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      words[r] += step_words;
      scales[r] += step_scales;
#pragma GCC unroll 8
      for (int m = 0; m < M; ++m) totals[n % kBlock][r][m] = total[r][m];
    }
    if (n % kBlock == kBlock - 1 || n + 1 == rows.count) {
      write_sums<M, R>(rows, n - n % kBlock, n % kBlock + 1, totals, out);
    }
  }
}

template <int R>
K25_INLINE void fixed_rows_of(int tokens, const PackedRows<R>& rows, const FixedChunk* const* x, float* out) {
  K25_FOR_TOKENS_AND_GROUPS(fixed_rows, R, tokens, rows.words_per_group == 4, rows, x, out)
}

}  // namespace K25_ISA_NS
}  // namespace k25
#endif
#endif
