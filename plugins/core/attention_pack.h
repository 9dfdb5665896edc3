// Rows to panels and back: queries lie in rows in memory and in lanes in a panel.
#ifndef K25_ATTENTION_PACK_H
#define K25_ATTENTION_PACK_H

#include "attention_tile.h"

namespace k25 {
namespace K25_ISA_NS {

#if defined(__AVX512F__)
// rows[i][j] -> rows[j][i] of 16 x 16.
K25_INLINE void transpose_16(__m512 rows[16]) {
  __m512 t[16];
  K25_UNROLL
  for (int i = 0; i < 16; i += 2) {  // pairs of rows
    t[i] = _mm512_unpacklo_ps(rows[i], rows[i + 1]);
    t[i + 1] = _mm512_unpackhi_ps(rows[i], rows[i + 1]);
  }
  K25_UNROLL
  for (int i = 0; i < 16; i += 4) {  // fours
    rows[i] = _mm512_castpd_ps(_mm512_unpacklo_pd(_mm512_castps_pd(t[i]), _mm512_castps_pd(t[i + 2])));
    rows[i + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(_mm512_castps_pd(t[i]), _mm512_castps_pd(t[i + 2])));
    rows[i + 2] = _mm512_castpd_ps(_mm512_unpacklo_pd(_mm512_castps_pd(t[i + 1]), _mm512_castps_pd(t[i + 3])));
    rows[i + 3] = _mm512_castpd_ps(_mm512_unpackhi_pd(_mm512_castps_pd(t[i + 1]), _mm512_castps_pd(t[i + 3])));
  }
  K25_UNROLL
  for (int i = 0; i < 4; ++i) {  // eights: quarter q of rows[4 g + i] holds column 4 q + i of rows 4 g ...
    const __m512 a = rows[i], b = rows[4 + i], c = rows[8 + i], d = rows[12 + i];
    t[i] = _mm512_shuffle_f32x4(a, b, 0x88);
    t[4 + i] = _mm512_shuffle_f32x4(a, b, 0xdd);
    t[8 + i] = _mm512_shuffle_f32x4(c, d, 0x88);
    t[12 + i] = _mm512_shuffle_f32x4(c, d, 0xdd);
  }
  K25_UNROLL
  for (int i = 0; i < 4; ++i) {
    rows[i] = _mm512_shuffle_f32x4(t[i], t[8 + i], 0x88);
    rows[8 + i] = _mm512_shuffle_f32x4(t[i], t[8 + i], 0xdd);
    rows[4 + i] = _mm512_shuffle_f32x4(t[4 + i], t[12 + i], 0x88);
    rows[12 + i] = _mm512_shuffle_f32x4(t[4 + i], t[12 + i], 0xdd);
  }
}
#endif

// rows[i][j] (i < count <= kLanes, j < width) -> to[j][i], the other lanes 0. Strides in floats.
static void transpose_to_lanes(const float* rows, size_t row_stride, size_t count, size_t width, float* to,
                               size_t to_stride) {
  size_t column = 0;
#if defined(__AVX512F__)
  for (; column + 16 <= width; column += 16) {
    __m512 block[16];
    K25_UNROLL
    for (size_t i = 0; i < 16; ++i) {
      block[i] = i < count ? _mm512_loadu_ps(rows + i * row_stride + column) : _mm512_setzero_ps();
    }
    transpose_16(block);
    K25_UNROLL
    for (size_t i = 0; i < 16; ++i) _mm512_storeu_ps(to + (column + i) * to_stride, block[i]);
  }
#endif
  for (; column < width; ++column) {
    for (size_t i = 0; i < kLanes; ++i) to[column * to_stride + i] = i < count ? rows[i * row_stride + column] : 0.0f;
  }
}

// to_rows[i][j] = lanes[j][i] for i < count <= kLanes, j < width.
static void transpose_from_lanes(const float* lanes, size_t stride, size_t count, size_t width, float* rows,
                                 size_t row_stride) {
  size_t column = 0;
#if defined(__AVX512F__)
  for (; column + 16 <= width; column += 16) {
    __m512 block[16];
    K25_UNROLL
    for (size_t i = 0; i < 16; ++i) block[i] = _mm512_loadu_ps(lanes + (column + i) * stride);
    transpose_16(block);
    for (size_t i = 0; i < count; ++i) _mm512_storeu_ps(rows + i * row_stride + column, block[i]);
  }
#endif
  for (; column < width; ++column) {
    for (size_t i = 0; i < count; ++i) rows[i * row_stride + column] = lanes[column * stride + i];
  }
}

// A panel of float lanes [depth][kPanelLanes] as the product takes it.
K25_INLINE const float* panel_elements(Float, float* panel, size_t, size_t) { return panel; }

#if K25_HAS_DOT_BF16
// In place: two neighbouring depths become one element. An odd depth is filled up with zeros.
K25_INLINE const uint32_t* panel_elements(Bfloat16Pairs, float* panel, size_t depth, size_t vectors) {
  uint32_t* pairs = reinterpret_cast<uint32_t*>(panel);
  for (size_t k = 0; k < depth; k += 2) {
    for (size_t v = 0; v < vectors; ++v) {
      const F32 even = load(panel + k * kPanelLanes + v * W);
      const F32 odd = k + 1 < depth ? load(panel + (k + 1) * kPanelLanes + v * W) : zero();
      const U32 both = bf16_pairs(even, odd);
      memcpy(pairs + k / 2 * kPanelLanes + v * W, &both, sizeof both);
    }
  }
  return pairs;
}
#endif

}  // namespace K25_ISA_NS
}  // namespace k25
#endif
