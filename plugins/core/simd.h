// Vectors of float for one code path: W lanes of F32 and I32, which take + - * & | << >> as they are (vector extensions of
// GCC and Clang). Everything is in the path's own namespace: no inline function is shared between paths.
//
//   path             W    dot_bf16 (K25_HAS_DOT_BF16)
//   portable         4    no     SSE2 or NEON through the compiler
//   avx2             8    no
//   avx512          16    no
//   avx512_bf16     16    yes
#ifndef K25_SIMD_H
#define K25_SIMD_H

#include <stdint.h>
#include <string.h>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#define K25_INLINE static inline __attribute__((always_inline, unused))

namespace k25 {
namespace K25_ISA_NS {

#if defined(__AVX512F__)
constexpr int W = 16;
#elif defined(__AVX2__)
constexpr int W = 8;
#else
constexpr int W = 4;
#endif

#if defined(__AVX512BF16__)
#define K25_HAS_DOT_BF16 1
#else
#define K25_HAS_DOT_BF16 0
#endif

typedef float F32 __attribute__((vector_size(4 * W)));
typedef int32_t I32 __attribute__((vector_size(4 * W)));
typedef uint32_t U32 __attribute__((vector_size(4 * W)));

// The least multiple of `chunk` that is not below `size`.
K25_INLINE int64_t padded(int64_t size, int64_t chunk) { return (size + chunk - 1) / chunk * chunk; }

K25_INLINE F32 set1(float value) { return value - F32{}; }
K25_INLINE I32 set1i(int32_t value) { return value - I32{}; }
K25_INLINE F32 zero() { return F32{}; }

K25_INLINE F32 load(const float* from) {
  F32 value;
  memcpy(&value, from, sizeof value);
  return value;
}
K25_INLINE I32 load_i32(const void* from) {
  I32 value;
  memcpy(&value, from, sizeof value);
  return value;
}
K25_INLINE void store(float* to, F32 value) { memcpy(to, &value, sizeof value); }

// The first `count` < W lanes; the others are 0.
K25_INLINE F32 load_partial(const float* from, int count) {
  float lanes[W] = {};
  for (int lane = 0; lane < count; ++lane) lanes[lane] = from[lane];
  return load(lanes);
}
K25_INLINE void store_partial(float* to, F32 value, int count) {
  float lanes[W];
  store(lanes, value);
  for (int lane = 0; lane < count; ++lane) to[lane] = lanes[lane];
}

// a * b + c, fused where the path has it.
K25_INLINE F32 fma(F32 a, F32 b, F32 c) {
#if defined(__AVX512F__)
  return (F32)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__AVX2__)
  return (F32)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
  return a * b + c;  // -ffp-contract=fast
#endif
}

// Of each lane; where one is NaN, b.
K25_INLINE F32 max(F32 a, F32 b) {
#if defined(__AVX512F__)
  return (F32)_mm512_max_ps((__m512)a, (__m512)b);
#elif defined(__AVX2__)
  return (F32)_mm256_max_ps((__m256)a, (__m256)b);
#else
  return a > b ? a : b;
#endif
}
K25_INLINE F32 min(F32 a, F32 b) {
#if defined(__AVX512F__)
  return (F32)_mm512_min_ps((__m512)a, (__m512)b);
#elif defined(__AVX2__)
  return (F32)_mm256_min_ps((__m256)a, (__m256)b);
#else
  return a < b ? a : b;
#endif
}

// Over the lanes, always in the same order: neighbours first.
#if defined(__AVX2__)
K25_INLINE __m256 eight_of(F32 value) {
#if defined(__AVX512F__)
  const __m256 low = _mm512_castps512_ps256((__m512)value);
  return _mm256_add_ps(low, _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd((__m512)value), 1)));
#else
  return (__m256)value;
#endif
}
#endif
K25_INLINE float sum(F32 value) {
#if defined(__AVX2__)
  const __m256 lanes = eight_of(value);
  const __m256 pairs = _mm256_add_ps(lanes, _mm256_movehdup_ps(lanes));
  const __m256 fours = _mm256_add_ps(pairs, _mm256_permute_ps(pairs, 2));
  return _mm_cvtss_f32(_mm_add_ss(_mm256_castps256_ps128(fours), _mm256_extractf128_ps(fours, 1)));
#else
  return (value[0] + value[1]) + (value[2] + value[3]);
#endif
}
// As sum() of each of four, cheaper.
K25_INLINE void sum_four(const F32 (&values)[4], float* to) {
#if defined(__AVX2__)
  const __m256 first = _mm256_hadd_ps(eight_of(values[0]), eight_of(values[1]));
  const __m256 second = _mm256_hadd_ps(eight_of(values[2]), eight_of(values[3]));
  const __m256 fours = _mm256_hadd_ps(first, second);
  _mm_storeu_ps(to, _mm_add_ps(_mm256_castps256_ps128(fours), _mm256_extractf128_ps(fours, 1)));
#else
  for (int i = 0; i < 4; ++i) to[i] = sum(values[i]);
#endif
}
K25_INLINE float max_lane(F32 value) {
  float lanes[W];
  store(lanes, value);
  float found = lanes[0];
  for (int lane = 1; lane < W; ++lane) found = lanes[lane] > found ? lanes[lane] : found;
  return found;
}

// bfloat16 is the upper half of a float: exact.
K25_INLINE float float_of(uint16_t bits) {
  const uint32_t wide = static_cast<uint32_t>(bits) << 16;
  float value;
  memcpy(&value, &wide, sizeof value);
  return value;
}
// Nearest, ties to even; a NaN stays one.
K25_INLINE uint16_t bf16_of(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return static_cast<uint16_t>((bits >> 16) | 0x40u);
  return static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

// W values in their order.
K25_INLINE F32 load_bf16(const uint16_t* from) {
#if defined(__AVX512F__)
  const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
  return (F32)_mm512_slli_epi32(wide, 16);
#elif defined(__AVX2__)
  const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
  return (F32)_mm256_slli_epi32(wide, 16);
#else
  U32 wide;
  for (int lane = 0; lane < W; ++lane) wide[lane] = static_cast<uint32_t>(from[lane]) << 16;
  return (F32)wide;
#endif
}
K25_INLINE void store_bf16(uint16_t* to, F32 value) {
#if K25_HAS_DOT_BF16
  const __m256bh narrow = _mm512_cvtneps_pbh((__m512)value);  // flushes denormals, which the other paths keep
  memcpy(to, &narrow, sizeof narrow);
#else
  float lanes[W];
  store(lanes, value);
  for (int lane = 0; lane < W; ++lane) to[lane] = bf16_of(lanes[lane]);
#endif
}

// 2 W values as they lie in memory: those of even and those of odd index. Cheaper than in their order.
K25_INLINE void load_bf16_split(const uint16_t* from, F32* even, F32* odd) {
  const U32 pairs = (U32)load_i32(from);
  *even = (F32)(pairs << 16);
  *odd = (F32)(pairs & 0xffff0000u);
}

// Element `index` (0..7) of each of W packed INT4 words as a float: nibble - 8, exact.
K25_INLINE F32 int4(I32 words, int index) {
#if defined(__AVX512F__)
  const __m512 values = _mm512_setr_ps(-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7);
  const __m512i at = _mm512_srli_epi32((__m512i)words, static_cast<unsigned>(4 * index));
  return (F32)_mm512_permutexvar_ps(at, values);  // looks at the lowest four bits only
#else
  const U32 nibbles = ((U32)words >> (4 * index)) & 15u;
  return __builtin_convertvector((I32)nibbles, F32) - 8.0f;
#endif
}

// A line of weights, which pass once a step: they leave the outer caches to what the step uses again, its code included
// (prefetchnta; a decode step of 230 MB takes 3 to 4 % less than with lines that stay where memory is slow, 1 % where it is
// fast).
K25_INLINE void prefetch(const void* from) { __builtin_prefetch(from, 0, 0); }

// e^x within 2 units in the last place; below -87.3 it becomes 0, above 88.7 infinity; NaN stays NaN.
// x = n ln 2 + r with |r| <= ln 2 / 2; e^r by its Taylor polynomial of degree 7 (error below 2^-26), times 2^n by halves.
K25_INLINE F32 exp(F32 x) {
  const F32 clamped = min(set1(89.0f), max(set1(-104.0f), x));
  const F32 shifter = set1(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
  const F32 shifted = fma(clamped, set1(1.44269504088896341f), shifter);
  const F32 n = shifted - shifter;
  F32 r = fma(n, set1(-0.693359375f), clamped);  // ln 2 in two parts, the first exact in few bits
  r = fma(n, set1(2.12194440e-4f), r);
  F32 p = set1(1.0f / 5040);
  p = fma(p, r, set1(1.0f / 720));
  p = fma(p, r, set1(1.0f / 120));
  p = fma(p, r, set1(1.0f / 24));
  p = fma(p, r, set1(1.0f / 6));
  p = fma(p, r, set1(0.5f));
  p = fma(p, r, set1(1.0f));
  p = fma(p, r, set1(1.0f));
  const I32 exponent = __builtin_convertvector(n, I32);
  const I32 half = exponent >> 1;
  const F32 scale_1 = (F32)((half + 127) << 23);
  const F32 scale_2 = (F32)((exponent - half + 127) << 23);
  const F32 result = p * scale_1 * scale_2;
  return x != x ? x : result;
}

K25_INLINE F32 sigmoid(F32 x) { return 1.0f / (1.0f + exp(-x)); }
K25_INLINE F32 silu(F32 x) { return x * sigmoid(x); }

#if K25_HAS_DOT_BF16
typedef __m512bh BF32;  // 32 bfloat16
K25_INLINE BF32 load_bf32(const uint16_t* from) {
  return (BF32)_mm512_loadu_si512(reinterpret_cast<const void*>(from));
}
// Adds the products of pairs (2 i, 2 i + 1) to lane i. Denormals count as 0.
K25_INLINE F32 dot_bf16(F32 total, BF32 a, BF32 b) { return (F32)_mm512_dpbf16_ps((__m512)total, a, b); }
#endif

}  // namespace K25_ISA_NS
}  // namespace k25
#endif
