// The one matrix product of the attention kernels, in register tiles:
//
//     C[m][lane] = start + sum over k of A(m, k) * B[k][lane]
//
// Lanes are queries (or the heads of one query): B is a panel of up to kPanelLanes of them, k by k. A is what lies in
// rows in memory (keys, values, latents), read one element at a time into all lanes, so that neither scores nor sums
// are transposed or added across lanes. `Float` multiplies float32, `Bfloat16Pairs` two neighbouring k at once.
#ifndef K25_ATTENTION_TILE_H
#define K25_ATTENTION_TILE_H

#include "attention_vectors.h"

namespace k25 {
namespace K25_ISA_NS {

struct Float {
  typedef float Element;  // one k
  typedef F32 Operand;
  enum { kStep = 1 };
  K25_INLINE Operand everywhere(const float* at) { return set1(*at); }
  K25_INLINE Operand lanes(const float* at) { return load(at); }
  K25_INLINE F32 add(F32 sum, Operand a, Operand b) { return fma(a, b, sum); }
};

#if K25_HAS_DOT_BF16
// Both rounded to bfloat16, lane by lane: `even` in the low half.
K25_INLINE U32 bf16_pairs(F32 even, F32 odd) {
  const __m512i low = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh((__m512)even));
  const __m512i high = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh((__m512)odd));
  return (U32)_mm512_or_si512(low, _mm512_slli_epi32(high, 16));
}

struct Bfloat16Pairs {
  typedef uint32_t Element;  // bfloat16 of an even k (low half) and of the next
  typedef BF32 Operand;
  enum { kStep = 2 };
  K25_INLINE Operand everywhere(const uint32_t* at) {
    return (BF32)_mm512_set1_epi32(static_cast<int>(*at));
  }
  K25_INLINE Operand lanes(const uint32_t* at) {
    return (BF32)_mm512_loadu_si512(at);
  }
  K25_INLINE F32 add(F32 sum, Operand a, Operand b) { return dot_bf16(sum, a, b); }
};
#endif

// What C holds before the products are added: nothing, a sum, or a sum to be multiplied by `scale` of each lane.
enum Start { kZero, kSum, kScaledSum };

template <class E, int kRows, int kVectors>
K25_INLINE void tile(const typename E::Element* a, size_t a_row, size_t a_step, const typename E::Element* b,
                     size_t b_stride, size_t depth, float* c, size_t c_stride, Start start, const float* scale) {
  F32 sum[kRows][kVectors];
  K25_UNROLL
  for (int row = 0; row < kRows; ++row) {
    K25_UNROLL
    for (int v = 0; v < kVectors; ++v) {
      sum[row][v] = zero();
      if (start != kZero) sum[row][v] = load(c + row * c_stride + v * W);
      if (start == kScaledSum) sum[row][v] *= load(scale + v * W);
    }
  }
  for (size_t k = 0; k < depth; ++k) {
    typename E::Operand lanes[kVectors];
    K25_UNROLL
    for (int v = 0; v < kVectors; ++v) lanes[v] = E::lanes(b + v * W);
    K25_UNROLL
    for (int row = 0; row < kRows; ++row) {
      const typename E::Operand element = E::everywhere(a + row * a_row);
      K25_UNROLL
      for (int v = 0; v < kVectors; ++v) sum[row][v] = E::add(sum[row][v], element, lanes[v]);
    }
    a += a_step;
    b += b_stride;
  }
  K25_UNROLL
  for (int row = 0; row < kRows; ++row) {
    K25_UNROLL
    for (int v = 0; v < kVectors; ++v) store(c + row * c_stride + v * W, sum[row][v]);
  }
}

enum Layout { kAlongDepth, kAlongRows };  // what neighbours in A are: keys lie along k, values along m

struct Nothing {
  void operator()() const {}
};

// `between` is called between tiles.
template <class E, int kVectors, Layout kLayout, class Between = Nothing>
static void product(const typename E::Element* a, size_t a_stride, size_t rows, const typename E::Element* b,
                    size_t b_stride, size_t depth, float* c, size_t c_stride, Start start,
                    const float* scale = nullptr, Between&& between = Between()) {
  const size_t a_row = kLayout == kAlongDepth ? a_stride : 1, a_step = kLayout == kAlongDepth ? 1 : a_stride;
  size_t row = 0;
  for (; row + kTileRows <= rows; row += kTileRows) {
    tile<E, kTileRows, kVectors>(a + row * a_row, a_row, a_step, b, b_stride, depth, c + row * c_stride, c_stride,
                                 start, scale);
    between();
  }
  for (; row + 2 <= rows; row += 2) {
    tile<E, 2, kVectors>(a + row * a_row, a_row, a_step, b, b_stride, depth, c + row * c_stride, c_stride, start,
                         scale);
  }
  if (row < rows) {
    tile<E, 1, kVectors>(a + row * a_row, a_row, a_step, b, b_stride, depth, c + row * c_stride, c_stride, start,
                         scale);
  }
}

}  // namespace K25_ISA_NS
}  // namespace k25
#endif
