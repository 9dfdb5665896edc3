// k25.MLA in the absorbed form, what is of one head: UK_h^T q_nope_h before the attention, UV_h z_h after it. The rows of UK_h
// and UV_h follow each other in kv_b; those of UV_h are read once for up to kTokenTile tokens, those of UK_h for one or for
// kTokenTile.
#ifndef K25_MLA_CPU_HEADS_H
#define K25_MLA_CPU_HEADS_H

#include "bf16_stream.h"
#include "cpu_call.h"

namespace k25 {
namespace K25_ISA_NS {

constexpr size_t kTokenTile = kStreamTokens;  // tokens that share a read of kv_b

K25_INLINE const uint16_t* head_rows(const MlaCall& call, size_t head) {
  return call.kv_b + head * (call.nope + call.v) * call.rank;
}
K25_INLINE const uint16_t* value_rows(const MlaCall& call, size_t head) {
  return head_rows(call, head) + call.nope * call.rank;
}

constexpr int kRowsAtOnce = 4;

K25_INLINE size_t split_stride(const MlaCall& call) { return static_cast<size_t>(padded(call.rank, kSplitChunk)); }

// sums[t] += query[t][d] * rows[d] for kRows rows from d on, every sum in the order of d; sums in split order. The rows pass
// side by side, but lines are asked for in the order of memory, from `asked` on.
template <int kTokens, int kRows>
K25_INLINE void absorb_rows(const MlaCall& call, const float* query, size_t query_stride, const uint16_t* rows,
                            const uint16_t* asked, float* sums) {
  const size_t stride = split_stride(call);
  const char* ahead = reinterpret_cast<const char*>(asked);
  for (size_t column = 0; column < call.rank; column += kSplitChunk) {
    F32 even[kRows], odd[kRows];
    K25_UNROLL
    for (int row = 0; row < kRows; ++row, ahead += 4 * W) {
      const uint16_t* at = rows + row * call.rank + column;
      if (column + kSplitChunk <= call.rank) {
        load_bf16_split(at, &even[row], &odd[row]);
      } else {
        load_tail(at, static_cast<int64_t>(call.rank - column), &even[row], &odd[row]);
      }
      prefetch(ahead);
    }
    K25_UNROLL
    for (int t = 0; t < kTokens; ++t) {
      float* to = sums + t * stride + column;
      F32 even_sum = load(to), odd_sum = load(to + W);
      K25_UNROLL
      for (int row = 0; row < kRows; ++row) {
        const F32 factor = set1(query[t * query_stride + row]);
        even_sum = fma(factor, even[row], even_sum);
        odd_sum = fma(factor, odd[row], odd_sum);
      }
      store(to, even_sum);
      store(to + W, odd_sum);
    }
  }
}

// to[t] = UK^T query[t]: the rows of UK pass once, in their order in memory; what the thread reads after them is `next`.
// `sums` is space for kTokens rows.
template <int kTokens>
static void absorb(const MlaCall& call, const float* query, size_t query_stride, const uint16_t* rows, const uint16_t* next,
                   float* sums, float* to, size_t to_stride) {
  memset(sums, 0, kTokens * split_stride(call) * sizeof(float));
  const size_t rows_ahead = kStreamAhead / sizeof(uint16_t) / call.rank;
  const auto asked = [&](size_t d) {
    return d + rows_ahead < call.nope ? rows + (d + rows_ahead) * call.rank : next + (d + rows_ahead - call.nope) * call.rank;
  };
  size_t d = 0;
  for (; d + kRowsAtOnce <= call.nope; d += kRowsAtOnce) {
    absorb_rows<kTokens, kRowsAtOnce>(call, query + d, query_stride, rows + d * call.rank, asked(d), sums);
  }
  for (; d < call.nope; ++d) absorb_rows<kTokens, 1>(call, query + d, query_stride, rows + d * call.rank, asked(d), sums);
  for (int t = 0; t < kTokens; ++t) {
    from_split_order(sums + t * split_stride(call), static_cast<int64_t>(call.rank), to + t * to_stride);
  }
}

K25_INLINE size_t absorb_floats(const MlaCall& call) { return kTokenTile * (split_stride(call) + call.nope); }

// to[t] = UK^T q_nope of a head and up to kTokenTile tokens; `space` has absorb_floats.
static void absorb_tokens(const MlaCall& call, size_t head, const int32_t* tokens, size_t count, const uint16_t* next,
                          float* space, float* to, size_t stride) {
  float* query = space + kTokenTile * split_stride(call);
  const uint16_t* rows = head_rows(call, head);
  for (size_t t = 0; t < count; ++t) read_nope(call, static_cast<size_t>(tokens[t]), head, query + t * call.nope);
  if (count == kTokenTile) return absorb<kTokenTile>(call, query, call.nope, rows, next, space, to, stride);
  for (size_t t = 0; t < count; ++t) {
    absorb<1>(call, query + t * call.nope, call.nope, rows, t + 1 < count ? rows : next, space, to + t * stride, stride);
  }
}

K25_INLINE size_t out_floats(const MlaCall& call) { return kTokenTile * (split_stride(call) + call.v) + call.v; }

// The outputs UV z of a head and up to kTokenTile tokens, z[t] at mixed + t * stride; what the thread reads after UV is
// `next`; `space` has out_floats.
static void write_outputs(const MlaCall& call, size_t head, const int32_t* tokens, size_t count, const float* mixed,
                          size_t stride, const uint16_t* next, float* space) {
  float* found = space + kTokenTile * split_stride(call);  // [v][tokens]
  float* values = found + kTokenTile * call.v;
  const int64_t rank = static_cast<int64_t>(call.rank);
  const float* z[kTokenTile];
  for (size_t t = 0; t < count; ++t) {
    float* ordered = space + t * split_stride(call);
    to_split_order(mixed + t * stride, true, rank, ordered);
    z[t] = ordered;
  }
  stream_rows_of(static_cast<int>(count), value_rows(call, head), static_cast<int64_t>(call.v), rank, z, next,
                 found);
  for (size_t t = 0; t < count; ++t) {
    if (count > 1) {
      for (size_t i = 0; i < call.v; ++i) values[i] = found[i * count + t];
    }
    write_floats(call.out, (static_cast<size_t>(tokens[t]) * call.heads + head) * call.v, call.v,
                 count > 1 ? values : found);
  }
}

}  // namespace K25_ISA_NS
}  // namespace k25
#endif
