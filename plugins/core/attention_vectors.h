// What the attention kernels need beside simd.h: panels of lanes, 2^x, tensors of either float type.
#ifndef K25_ATTENTION_VECTORS_H
#define K25_ATTENTION_VECTORS_H

#include <stddef.h>

#include "k25.h"
#include "simd.h"

#define K25_UNROLL _Pragma("GCC unroll 16")

namespace k25 {
namespace K25_ISA_NS {

// A register tile is kTileRows x up to kPanelVectors vectors; a panel is as many lanes.
#if defined(__AVX512F__)
enum { kPanelVectors = 4, kTileRows = 6 };
#elif defined(__AVX2__)
enum { kPanelVectors = 2, kTileRows = 6 };
#else
enum { kPanelVectors = 2, kTileRows = 4 };
#endif
constexpr size_t kLanes = W;
constexpr size_t kPanelLanes = kLanes * kPanelVectors;
constexpr float kInfinity = __builtin_inff();
constexpr float kLog2E = 1.44269504088896341f;

// 2^x for x <= 0, relative error below 2e-7: 0 below -126 (and for -infinity), NaN where x is NaN.
// A minimax polynomial of the fraction in [-1/2, 1/2] (relative error 9.2e-8), then the exponent.
K25_INLINE F32 exp2_nonpositive(F32 x) {
  x = max(set1(-200.0f), x);
#if defined(__AVX512F__)
  const F32 whole = (F32)_mm512_roundscale_ps((__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
  const F32 shifter = set1(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
  const F32 whole = (x + shifter) - shifter;
#endif
  const F32 fraction = x - whole;
  F32 y = set1(1.326472668e-03f);
  y = fma(y, fraction, set1(9.671512677e-03f));
  y = fma(y, fraction, set1(5.550733745e-02f));
  y = fma(y, fraction, set1(2.402224208e-01f));
  y = fma(y, fraction, set1(6.931469776e-01f));
  y = fma(y, fraction, set1(1.0f));
#if defined(__AVX512F__)
  return (F32)_mm512_scalef_ps((__m512)y, (__m512)whole);
#else
  const F32 kept = max(set1(-126.0f), whole);
  const I32 exponent = (I32)(kept + (shifter + 127.0f)) << 23;  // the low bits of the sum are kept + 127
  const F32 result = y * (F32)exponent;
  return whole < set1(-126.0f) ? zero() : result;
#endif
}

// A dense tensor of float32 or bfloat16.
struct Floats {
  void* data;
  bool bfloat16;
};
K25_INLINE Floats floats_of(const k25_tensor& tensor) { return {tensor.data, tensor.dtype == K25_BFLOAT16}; }
K25_INLINE size_t item_size(const Floats& tensor) { return tensor.bfloat16 ? 2 : 4; }
K25_INLINE char* address_of(const Floats& tensor, size_t offset) {
  return static_cast<char*>(tensor.data) + offset * item_size(tensor);
}

K25_INLINE void widen(const uint16_t* from, size_t count, float* to) {
  size_t i = 0;
  for (; i + kLanes <= count; i += kLanes) store(to + i, load_bf16(from + i));
  for (; i < count; ++i) to[i] = float_of(from[i]);
}
K25_INLINE void read_floats(const Floats& from, size_t offset, size_t count, float* to) {
  if (from.bfloat16) {
    widen(static_cast<const uint16_t*>(from.data) + offset, count, to);
  } else {
    memcpy(to, static_cast<const float*>(from.data) + offset, count * sizeof *to);
  }
}
K25_INLINE void write_floats(const Floats& to, size_t offset, size_t count, const float* from) {
  if (to.bfloat16) {
    uint16_t* bits = static_cast<uint16_t*>(to.data) + offset;
    for (size_t i = 0; i < count; ++i) bits[i] = bf16_of(from[i]);
  } else {
    memcpy(static_cast<float*>(to.data) + offset, from, count * sizeof *from);
  }
}

K25_INLINE size_t divided_up(size_t value, size_t unit) { return (value + unit - 1) / unit; }
K25_INLINE size_t rounded_up(size_t value, size_t unit) { return divided_up(value, unit) * unit; }
K25_INLINE size_t smaller(size_t a, size_t b) { return a < b ? a : b; }
K25_INLINE size_t larger(size_t a, size_t b) { return a > b ? a : b; }

// From one row of a tile to the next, in elements of 4 bytes: whole vectors, and an odd number of cache lines, so that
// a column of the tile spreads over all sets of a cache.
K25_INLINE size_t row_stride(size_t width) { return (divided_up(width, 16) | 1) * 16; }

}  // namespace K25_ISA_NS
}  // namespace k25
#endif
