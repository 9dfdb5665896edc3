// Rows of packed INT4 times many activations: a tile of rows is unpacked once into memory that stays in the L2 cache, and
// multiplied with all of them.
//
// Two kinds. FloatTile: float32 weights in word order, scaled. PairTile (paths with dot_bf16): bfloat16 nibbles - 8 in group
// order, exact, and the scales apart in float32: no rounding of weights.
#ifndef K25_INT4_TILE_H
#define K25_INT4_TILE_H

#include "int4_stream.h"

namespace k25 {
namespace K25_ISA_NS {

constexpr int kTileRows = 32;
constexpr int kTileTokens = 64;
// Registers hold this many tokens by this many rows of sums.
constexpr int kBlockTokens = W == 16 ? 6 : 3;
constexpr int kBlockRows = 4;

// Sums of a panel: [token][row] vectors, over the columns so far.
struct Sums {
  float* data;
  int rows;
  float* at(int token, int row) const { return data + (static_cast<int64_t>(token) * rows + row) * W; }
};

struct FloatTile {
  static constexpr int kColumns = 1024;
  static constexpr int kChunk = kWordChunk;
  using Activation = float;
  float* values;  // [kTileRows][kColumns]

  static size_t bytes() { return sizeof(float) * kTileRows * kColumns; }
  explicit FloatTile(void* memory) : values(static_cast<float*>(memory)) {}

  // Unpack columns [start, start + count) of a row of `in` columns as row `row`; columns beyond `in` are 0.
  void unpack(int row, const int32_t* words, const uint16_t* scales, int64_t in, int64_t words_per_group,
              int64_t start, int count) {
    float* to = values + static_cast<int64_t>(row) * kColumns;
    for (int column = 0; column < count; column += kWordChunk) {
      const int64_t word = (start + column) / 8;
      const int64_t left = in / 8 - word;
      I32 packed;
      F32 scale;
      if (left >= W) {
        packed = load_i32(words + word);
        scale = words_per_group == 4 ? word_scales_32(scales + word / 4) : word_scales(scales, word, words_per_group, W);
      } else {
        int32_t lanes[W] = {};
        memcpy(lanes, words + word, sizeof(int32_t) * static_cast<size_t>(left));
        packed = load_i32(lanes);
        scale = word_scales(scales, word, words_per_group, static_cast<int>(left));
      }
      for (int i = 0; i < 8; ++i) store(to + column + i * W, int4(packed, i) * scale);
    }
  }

  template <int M, int N>
  void multiply(int row, int count, const float* const* x, const Sums& sums, int token) const {
    F32 total[M][N];
    for (int m = 0; m < M; ++m) {
      for (int n = 0; n < N; ++n) total[m][n] = load(sums.at(token + m, row + n));
    }
    const float* weights = values + static_cast<int64_t>(row) * kColumns;
    for (int column = 0; column < count; column += W) {
      F32 weight[N];
      for (int n = 0; n < N; ++n) weight[n] = load(weights + n * kColumns + column);
      for (int m = 0; m < M; ++m) {
        const F32 value = load(x[m] + column);
        for (int n = 0; n < N; ++n) total[m][n] = fma(value, weight[n], total[m][n]);
      }
    }
    for (int m = 0; m < M; ++m) {
      for (int n = 0; n < N; ++n) store(sums.at(token + m, row + n), total[m][n]);
    }
  }
};

#if K25_HAS_DOT_BF16
struct PairTile {
  static constexpr int kColumns = 2048;
  static constexpr int kChunk = kGroupChunk;
  static constexpr int kChunks = kColumns / kGroupChunk;
  using Activation = uint16_t;
  uint16_t* values;  // [kTileRows][kColumns]
  float* scales;     // [kTileRows][kChunks][16]

  static size_t bytes() { return (sizeof(uint16_t) * kColumns + sizeof(float) * kChunks * 16) * kTileRows; }
  explicit PairTile(void* memory)
      : values(static_cast<uint16_t*>(memory)),
        scales(reinterpret_cast<float*>(static_cast<uint16_t*>(memory) + kTileRows * kColumns)) {}

  // As FloatTile's; groups are multiples of 32.
  void unpack(int row, const int32_t* words, const uint16_t* row_scales, int64_t in, int64_t words_per_group,
              int64_t start, int count) {
    // bfloat16 of -8 .. 7, twice: the fifth bit of an index does not count.
    alignas(64) static const uint16_t kValues[32] = {
        0xc100, 0xc0e0, 0xc0c0, 0xc0a0, 0xc080, 0xc040, 0xc000, 0xbf80, 0x0000, 0x3f80, 0x4000,
        0x4040, 0x4080, 0x40a0, 0x40c0, 0x40e0, 0xc100, 0xc0e0, 0xc0c0, 0xc0a0, 0xc080, 0xc040,
        0xc000, 0xbf80, 0x0000, 0x3f80, 0x4000, 0x4040, 0x4080, 0x40a0, 0x40c0, 0x40e0};
    const __m512i table = _mm512_load_si512(kValues);
    const __m512i transposed = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    for (int column = 0; column < count; column += kGroupChunk) {
      const int64_t word = (start + column) / 8;
      const int64_t left = in / 8 - word;
      int32_t tail_words[64];
      uint16_t tail_scales[16];
      const int32_t* from = words + word;
      const uint16_t* scale_from = row_scales + word / 4;
      if (left < 64 || words_per_group != 4) {
        const int64_t there = left < 64 ? left : 64;
        memset(tail_words, 0, sizeof tail_words);
        memcpy(tail_words, from, sizeof(int32_t) * static_cast<size_t>(there));
        for (int group = 0; group < 16; ++group) {
          tail_scales[group] = group * 4 < there ? row_scales[(word + group * 4) / words_per_group] : 0;
        }
        from = tail_words;
        scale_from = tail_scales;
      }
      __m512i z[4];
      for (int s = 0; s < 4; ++s) z[s] = _mm512_loadu_si512(from + 16 * s);
      const __m512i low_01 = _mm512_unpacklo_epi32(z[0], z[1]), low_23 = _mm512_unpacklo_epi32(z[2], z[3]);
      const __m512i high_01 = _mm512_unpackhi_epi32(z[0], z[1]), high_23 = _mm512_unpackhi_epi32(z[2], z[3]);
      const __m512i word_of_group[4] = {
          _mm512_unpacklo_epi64(low_01, low_23), _mm512_unpackhi_epi64(low_01, low_23),
          _mm512_unpacklo_epi64(high_01, high_23), _mm512_unpackhi_epi64(high_01, high_23)};
      uint16_t* to = values + static_cast<int64_t>(row) * kColumns + column;
      for (int q = 0; q < 4; ++q) {
        for (int i = 0; i < 4; ++i) {
          const __m512i at = _mm512_srli_epi32(word_of_group[q], static_cast<unsigned>(4 * i));
          _mm512_store_si512(to + q * 128 + i * 32, _mm512_permutexvar_epi16(at, table));
        }
      }
      const __m256i sixteen = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(scale_from));
      const __m512i wide = _mm512_slli_epi32(_mm512_cvtepu16_epi32(sixteen), 16);
      _mm512_store_si512(scales + (static_cast<int64_t>(row) * kChunks + column / kGroupChunk) * 16,
                         _mm512_permutexvar_epi32(transposed, wide));
    }
  }

  template <int M, int N>
  void multiply(int row, int count, const uint16_t* const* x, const Sums& sums, int token) const {
    const uint16_t* weights = values + static_cast<int64_t>(row) * kColumns;
    for (int column = 0; column < count; column += kGroupChunk) {
      F32 part[M][N];
      for (int m = 0; m < M; ++m) {
        for (int n = 0; n < N; ++n) part[m][n] = zero();
      }
      for (int step = 0; step < kGroupChunk; step += 32) {
        BF32 weight[N];
        for (int n = 0; n < N; ++n) weight[n] = load_bf32(weights + n * kColumns + column + step);
        for (int m = 0; m < M; ++m) {
          const BF32 value = load_bf32(x[m] + column + step);
          for (int n = 0; n < N; ++n) part[m][n] = dot_bf16(part[m][n], value, weight[n]);
        }
      }
      for (int n = 0; n < N; ++n) {
        const F32 scale = load(scales + (static_cast<int64_t>(row + n) * kChunks + column / kGroupChunk) * 16);
        for (int m = 0; m < M; ++m) {
          float* at = sums.at(token + m, row + n);
          store(at, fma(part[m][n], scale, load(at)));
        }
      }
    }
  }
};
#endif

template <class Tile, int N>
K25_INLINE void multiply_rows(const Tile& tile, int row, int count, const typename Tile::Activation* const* x,
                              int tokens, const Sums& sums, int token) {
  static_assert(kBlockTokens <= 6, "one case for each");
  switch (tokens) {
    case 1: return tile.template multiply<1, N>(row, count, x, sums, token);
    case 2: return tile.template multiply<2, N>(row, count, x, sums, token);
    case 3: return tile.template multiply<3, N>(row, count, x, sums, token);
#if defined(__AVX512F__)
    case 4: return tile.template multiply<4, N>(row, count, x, sums, token);
    case 5: return tile.template multiply<5, N>(row, count, x, sums, token);
    case 6: return tile.template multiply<6, N>(row, count, x, sums, token);
#endif
    default: return;
  }
}

// Adds the products of the tile's first `rows` rows and `count` columns with all tokens. A block of tokens stays in the L1
// cache while all rows pass.
template <class Tile>
static void multiply_tile(const Tile& tile, int rows, int count, const typename Tile::Activation* const* x, int tokens,
                          const Sums& sums) {
  for (int token = 0; token < tokens; token += kBlockTokens) {
    const int block = tokens - token < kBlockTokens ? tokens - token : kBlockTokens;
    int row = 0;
    for (; row + kBlockRows <= rows; row += kBlockRows) {
      multiply_rows<Tile, kBlockRows>(tile, row, count, x + token, block, sums, token);
    }
    for (; row < rows; ++row) multiply_rows<Tile, 1>(tile, row, count, x + token, block, sums, token);
  }
}

}  // namespace K25_ISA_NS
}  // namespace k25
#endif
