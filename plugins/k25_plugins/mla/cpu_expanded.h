// k25.MLA in the expanded form: for many query tokens of one sequence. Lanes are tokens, a task is one head.
//
//     k_h = [UK_h c | k_rope],  v_h = UV_h c,  out_h = softmax(q_h . k_h) v_h
//
// Keys and values of one tile of the context exist at a time; every query of a span of up to kSpanTokens tokens passes
// over the tile before the next is made, so memory depends on neither the context nor its square.
//
// In fast mode over a bfloat16 cache, keys and values are made with bf16 dot products, which is exact but for the order
// of the sums (latents and kv_b are bfloat16 as they are), and weights times values too, both rounded. Scores stay
// float32.
#ifndef K25_MLA_CPU_EXPANDED_H
#define K25_MLA_CPU_EXPANDED_H

#include "cpu_call.h"

namespace k25 {
namespace K25_ISA_NS {

constexpr size_t kSpanTokens = 2048;
constexpr size_t kExpandChunk = 128;  // of the rank: a chunk of a weight panel stays in the first-level cache

// Consecutive tokens of one sequence.
struct Span {
  size_t sequence, first, count, context;
};

struct Expansion {
  const MlaCall* call;
  const Span* spans;
  size_t span_count;
  bool failed;
};

// Floats in one task's memory.
struct ExpandedSizes {
  size_t key_stride, value_stride, panels, key_panels, value_panels;
  size_t weights, queries, sums, rows, keys, values, value_pairs, total;
};

K25_INLINE ExpandedSizes expanded_sizes(const MlaCall& call, size_t tokens) {
  ExpandedSizes sizes{};
  const size_t wide = rounded_up(call.nope, kLanes), query = call.nope + call.rope;
  sizes.key_stride = row_stride(larger(wide, query));
  sizes.value_stride = row_stride(rounded_up(call.v, kLanes));
  sizes.panels = divided_up(tokens, kPanelLanes);
  sizes.key_panels = divided_up(call.nope, kPanelLanes);
  sizes.value_panels = divided_up(call.v, kPanelLanes);
  sizes.weights = (sizes.key_panels + sizes.value_panels) * call.rank * kPanelLanes;
  sizes.queries = sizes.panels * query * kPanelLanes;
  sizes.sums = sizes.panels * (call.v + 2) * kPanelLanes;
  sizes.rows = kTileKeys * row_stride(call.width);
  sizes.keys = kTileKeys * sizes.key_stride;
  sizes.values = kTileKeys * sizes.value_stride;
  sizes.value_pairs = call.pairs ? sizes.values / 2 : 0;
  const size_t transposed = kLanes * row_stride(larger(larger(call.rank, query), call.v));
  sizes.total = sizes.weights + sizes.queries + sizes.sums + sizes.rows + sizes.keys + sizes.values +
                sizes.value_pairs + rounded_up(sizeof(TileScratch) / sizeof(float), 16) + transposed;
  return sizes;
}

// Rows [count][rank] of kv_b as panels of lanes: [count / kPanelLanes][rank][kPanelLanes].
static void pack_weights(const MlaCall& call, const uint16_t* rows, size_t count, float* to, float* space) {
  const size_t stride = row_stride(call.rank);
  for (size_t row = 0; row < count; row += kLanes) {
    const size_t lanes = smaller(kLanes, count - row);
    for (size_t lane = 0; lane < lanes; ++lane) {
      widen(rows + (row + lane) * call.rank, call.rank, space + lane * stride);
    }
    float* panel = to + row / kPanelLanes * call.rank * kPanelLanes + row % kPanelLanes;
    transpose_to_lanes(space, stride, lanes, call.rank, panel, kPanelLanes);
  }
}

static void pack_queries(const MlaCall& call, const Span& span, size_t head, float* to, float* space) {
  const size_t width = call.nope + call.rope, stride = row_stride(width);
  for (size_t token = 0; token < span.count; token += kLanes) {
    const size_t lanes = smaller(kLanes, span.count - token);
    for (size_t lane = 0; lane < lanes; ++lane) {
      read_nope(call, span.first + token + lane, head, space + lane * stride);
      read_rope(call, span.first + token + lane, head, space + lane * stride + call.nope);
    }
    float* panel = to + token / kPanelLanes * width * kPanelLanes + token % kPanelLanes;
    transpose_to_lanes(space, stride, lanes, width, panel, kPanelLanes);
  }
}

template <class E, int kVectors>
static void expand_panel(const MlaCall& call, const typename E::Element* latents, size_t rows,
                         const typename E::Element* weights, float* to, size_t stride) {
  const size_t depth = call.rank / E::kStep;
  for (size_t r = 0; r < depth; r += kExpandChunk) {
    product<E, kVectors, kAlongDepth>(latents + r, row_stride(call.width), rows, weights + r * kPanelLanes, kPanelLanes,
                                      smaller(kExpandChunk, depth - r), to, stride, r == 0 ? kZero : kSum);
  }
}

// to[row][i] = sum over r of latents[row][r] * weights(i, r), i < width rounded up to whole vectors.
template <class E>
static void expand_rows(const MlaCall& call, const typename E::Element* latents, size_t rows,
                        const typename E::Element* weights, size_t width, float* to, size_t stride) {
  for (size_t lane = 0; lane < width; lane += kPanelLanes) {
    switch (divided_up(smaller(kPanelLanes, width - lane), kLanes)) {
      case 1: expand_panel<E, 1>(call, latents, rows, weights, to + lane, stride); break;
      case 2: expand_panel<E, 2>(call, latents, rows, weights, to + lane, stride); break;
#if defined(__AVX512F__)
      case 3: expand_panel<E, 3>(call, latents, rows, weights, to + lane, stride); break;
      default: expand_panel<E, 4>(call, latents, rows, weights, to + lane, stride); break;
#endif
    }
    weights += call.rank * kPanelLanes;
  }
}

K25_INLINE bool all_finite(const float* rows, size_t count, size_t width, size_t stride) {
  float sum = 0.0f;  // x - x is 0 or NaN
  for (size_t row = 0; row < count; ++row) {
    for (size_t i = 0; i < width; ++i) sum += rows[row * stride + i] - rows[row * stride + i];
  }
  return sum == 0.0f;
}

// How many rows of a tile each token of a panel sees; false where all see all of them, or where none sees any.
struct Sight {
  int32_t seen[kPanelLanes];
  size_t lanes;
  bool none, all;
};
K25_INLINE Sight sight_of(const MlaCall& call, const Span& span, size_t panel, size_t first_key, size_t rows) {
  Sight sight;
  sight.lanes = smaller(kPanelLanes, span.count - panel * kPanelLanes);
  sight.none = sight.all = true;
  for (size_t lane = 0; lane < kPanelLanes; ++lane) {
    sight.seen[lane] = static_cast<int32_t>(rows);
    if (lane >= sight.lanes) continue;
    const size_t context = context_of(call, span.first + panel * kPanelLanes + lane);
    const size_t seen = context <= first_key ? 0 : smaller(context - first_key, rows);
    sight.seen[lane] = static_cast<int32_t>(seen);
    sight.none = sight.none && seen == 0;
    sight.all = sight.all && seen == rows;
  }
  return sight;
}

// Sums over totals, back in rows, in the output's dtype.
static void write_span(const MlaCall& call, const Span& span, size_t head, size_t panel_index, const Panel& panel,
                       float* space) {
  const size_t lanes = smaller(kPanelLanes, span.count - panel_index * kPanelLanes), stride = row_stride(call.v);
  for (size_t lane = 0; lane < lanes; lane += kLanes) {
    const F32 total = load(panel.total + lane);
    for (size_t i = 0; i < call.v; ++i) {
      float* at = panel.sums + i * kPanelLanes + lane;
      store(at, load(at) / total);
    }
    const size_t count = smaller(kLanes, lanes - lane);
    transpose_from_lanes(panel.sums + lane, kPanelLanes, count, call.v, space, stride);
    for (size_t i = 0; i < count; ++i) {
      const size_t token = span.first + panel_index * kPanelLanes + lane + i;
      write_floats(call.out, (token * call.heads + head) * call.v, call.v, space + i * stride);
    }
  }
}

// The memory of one task.
struct SpanSpace {
  ExpandedSizes sizes;
  float *key_weights, *value_weights, *queries, *sums, *latents, *keys, *values, *value_pairs, *transposed;
  TileScratch* scratch;
};

K25_INLINE SpanSpace span_space(const MlaCall& call, const Span& span, float* space) {
  SpanSpace parts{};
  parts.sizes = expanded_sizes(call, span.count);
  parts.key_weights = space;
  parts.value_weights = space + parts.sizes.key_panels * call.rank * kPanelLanes;
  parts.queries = space + parts.sizes.weights;
  parts.sums = parts.queries + parts.sizes.queries;
  parts.latents = parts.sums + parts.sizes.sums;
  parts.keys = parts.latents + parts.sizes.rows;
  parts.values = parts.keys + parts.sizes.keys;
  parts.value_pairs = parts.values + parts.sizes.values;
  parts.scratch = reinterpret_cast<TileScratch*>(parts.value_pairs + parts.sizes.value_pairs);
  parts.transposed = parts.value_pairs + parts.sizes.value_pairs + rounded_up(sizeof(TileScratch) / sizeof(float), 16);
  return parts;
}

K25_INLINE Panel span_panel(const MlaCall& call, const SpanSpace& space, size_t panel) {
  float* at = space.sums + panel * (call.v + 2) * kPanelLanes;
  return {at + 2 * kPanelLanes, at, at + kPanelLanes};
}

// Keys and values of positions [first, first + count) for one head, from latents as they are read.
K25_INLINE void make_tile(Float, const MlaCall& call, size_t sequence, size_t first, size_t count,
                          const SpanSpace& space) {
  const size_t row = row_stride(call.width);
  read_rows(call, sequence, first, count, space.latents, row);
  expand_rows<Float>(call, space.latents, count, space.key_weights, call.nope, space.keys, space.sizes.key_stride);
  expand_rows<Float>(call, space.latents, count, space.value_weights, call.v, space.values, space.sizes.value_stride);
  for (size_t i = 0; i < count; ++i) {
    memcpy(space.keys + i * space.sizes.key_stride + call.nope, space.latents + i * row + call.rank,
           call.rope * sizeof(float));
  }
}

#if K25_HAS_DOT_BF16
K25_INLINE void make_tile(Bfloat16Pairs, const MlaCall& call, size_t sequence, size_t first, size_t count,
                          const SpanSpace& space) {
  const size_t row = row_stride(call.width), stride = space.sizes.value_stride;
  uint32_t* latents = reinterpret_cast<uint32_t*>(space.latents);
  const uint32_t* key_weights = reinterpret_cast<const uint32_t*>(space.key_weights);
  const uint32_t* value_weights = reinterpret_cast<const uint32_t*>(space.value_weights);
  for (size_t i = 0; i < count; ++i) {
    const size_t offset = row_offset(call, sequence, first + i);
    memcpy(latents + i * row, address_of(call.cache, offset), call.rank * sizeof(uint16_t));
  }
  expand_rows<Bfloat16Pairs>(call, latents, count, key_weights, call.nope, space.keys, space.sizes.key_stride);
  expand_rows<Bfloat16Pairs>(call, latents, count, value_weights, call.v, space.values, stride);
  for (size_t i = 0; i < count; ++i) {
    const size_t offset = row_offset(call, sequence, first + i) + call.rank;
    read_floats(call.cache, offset, call.rope, space.keys + i * space.sizes.key_stride + call.nope);
  }
  for (size_t i = 0; i < count; i += 2) {
    for (size_t column = 0; column < call.v; column += kLanes) {
      const F32 odd = i + 1 < count ? load(space.values + (i + 1) * stride + column) : zero();
      const U32 both = bf16_pairs(load(space.values + i * stride + column), odd);
      memcpy(space.value_pairs + i / 2 * stride + column, &both, sizeof both);
    }
  }
}

K25_INLINE void pair_weights(const MlaCall& call, const SpanSpace& space) {
  for (size_t panel = 0; panel < space.sizes.key_panels + space.sizes.value_panels; ++panel) {
    panel_elements(Bfloat16Pairs(), space.key_weights + panel * call.rank * kPanelLanes, call.rank, kPanelVectors);
  }
}
#endif

static void attend_span(const MlaCall& call, const Span& span, size_t head, float* memory) {
  const SpanSpace space = span_space(call, span, memory);
  const ExpandedSizes& sizes = space.sizes;
  const size_t query_width = call.nope + call.rope;
  const uint16_t* rows = call.kv_b + head * (call.nope + call.v) * call.rank;
  pack_weights(call, rows, call.nope, space.key_weights, space.transposed);
  pack_weights(call, rows + call.nope * call.rank, call.v, space.value_weights, space.transposed);
  pack_queries(call, span, head, space.queries, space.transposed);
#if K25_HAS_DOT_BF16
  const bool pairs = call.pairs && call.rank % 2 == 0;
  if (pairs) pair_weights(call, space);
#endif
  for (size_t panel = 0; panel < sizes.panels; ++panel) start_panel(span_panel(call, space, panel));
  for (size_t first = 0; first < span.context; first += kTileKeys) {
    const size_t count = smaller(kTileKeys, span.context - first);
#if K25_HAS_DOT_BF16
    if (pairs) make_tile(Bfloat16Pairs(), call, span.sequence, first, count, space);
    if (!pairs)
#endif
      make_tile(Float(), call, span.sequence, first, count, space);
    const bool finite = all_finite(space.values, count, call.v, sizes.value_stride);
    for (size_t panel = 0; panel < sizes.panels; ++panel) {
      const Sight sight = sight_of(call, span, panel, first, count);
      if (sight.none) continue;
      const float* queries = space.queries + panel * query_width * kPanelLanes;
      const size_t vectors = divided_up(sight.lanes, kLanes);
      const int32_t* seen = sight.all ? nullptr : sight.seen;
#if K25_HAS_DOT_BF16
      if (pairs && (sight.all || finite)) {
        const KeyTile<Float, Bfloat16Pairs> tile{
            space.keys, sizes.key_stride, query_width, reinterpret_cast<const uint32_t*>(space.value_pairs),
            sizes.value_stride, call.v, count, first == 0, seen, finite};
        attend(vectors, queries, tile, span_panel(call, space, panel), space.scratch);
        continue;
      }
#endif
      const KeyTile<Float> tile{space.keys, sizes.key_stride, query_width, space.values, sizes.value_stride,
                                call.v,     count,            first == 0,  seen,         finite};
      attend(vectors, queries, tile, span_panel(call, space, panel), space.scratch);
    }
  }
  for (size_t panel = 0; panel < sizes.panels; ++panel) {
    write_span(call, span, head, panel, span_panel(call, space, panel), space.transposed);
  }
}

static void span_task(void* state, size_t index) {
  Expansion& expansion = *static_cast<Expansion*>(state);
  const MlaCall& call = *expansion.call;
  const Span& span = expansion.spans[index / call.heads];
  float* space = static_cast<float*>(thread_scratch(expanded_sizes(call, span.count).total * sizeof(float)));
  if (space == nullptr) return __atomic_store_n(&expansion.failed, true, __ATOMIC_RELAXED);
  attend_span(call, span, index % call.heads, space);
}

static k25_status attend_expanded(const MlaCall& call, const Span* spans, size_t count, k25_message message) {
  Expansion expansion{&call, spans, count, false};
  run_parallel(call.parallel, span_task, &expansion, count * call.heads);
  if (!__atomic_load_n(&expansion.failed, __ATOMIC_RELAXED)) return K25_OK;
  return fail(K25_FAILED, message, "k25.MLA: no memory for the keys and values of a tile");
}

}  // namespace K25_ISA_NS
}  // namespace k25
#endif
