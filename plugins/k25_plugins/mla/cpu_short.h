// k25.MLA in the absorbed form for few tokens of short contexts: a few heads after the other, from query to output.
//
// The rows of a short context fit the caches, so every few heads read them again; in exchange heads need not wait for one
// another, and kv_b passes in one stream. Lanes are the columns of a row. A token's result in this form depends on its context alone.
#ifndef K25_MLA_CPU_SHORT_H
#define K25_MLA_CPU_SHORT_H

#include "cpu_heads.h"

namespace k25 {
namespace K25_ISA_NS {

constexpr size_t kShortContext = 256;
constexpr size_t kScores = kShortContext + W;
constexpr size_t kHeadsAtOnce = 4;                 // that share the loads of rows
constexpr size_t kKeysAtOnce = W == 16 ? 4 : 2;    // as many sums as registers hold
constexpr size_t kSumVectors = W == 16 ? 4 : 2;

// A few tokens and the rows that they see.
struct Short {
  const MlaCall* call;
  const NewRows* new_rows;  // still to be written, or null
  const int32_t* tokens;
  size_t count;
  const float** rows;  // [count][kShortContext]
  bool failed;
};

K25_INLINE bool is_short(const MlaCall& call, const int32_t* tokens, size_t count) {
  if (count > kTokenTile || call.cache.bfloat16) return false;
  for (size_t t = 0; t < count; ++t) {
    if (context_of(call, static_cast<size_t>(tokens[t])) > kShortContext) return false;
  }
  return true;
}

static void rows_task(void* state, size_t) {
  Short& work = *static_cast<Short*>(state);
  const MlaCall& call = *work.call;
  if (work.new_rows != nullptr) write_new_rows(*work.new_rows);
  for (size_t t = 0; t < work.count; ++t) {
    const size_t token = static_cast<size_t>(work.tokens[t]), context = context_of(call, token);
    for (size_t first = 0; first < context; first += call.block_size) {
      const float* block =
          static_cast<const float*>(call.cache.data) + row_offset(call, static_cast<size_t>(call.sequence_of[token]), first);
      for (size_t i = 0; i < smaller(call.block_size, context - first); ++i) {
        work.rows[t * kShortContext + first + i] = block + i * call.width;
      }
    }
  }
}

// Lines of the rows that come after the attention, asked for meanwhile. They are kept: it takes longer than they would last.
struct Ahead {
  const char* at;
  const char* end;
  size_t bytes;  // at a time
  void operator()() {
    const char* stop = at + bytes < end ? at + bytes : end;
    for (; at < stop; at += 64) __builtin_prefetch(at, 0, 3);
  }
};

// The vector of a row from a column on; past the last column 0.
K25_INLINE F32 row_part(const float* row, size_t column, size_t width) {
  return column + W <= width ? load(row + column) : load_partial(row + column, static_cast<int>(width - column));
}

// scores[h][i] = query[h] . rows[i]; queries are padded with zeros to whole vectors.
static void short_scores(const MlaCall& call, const float* queries, size_t stride, const float* const* rows,
                         size_t context, float* scores, Ahead& ahead) {
  for (size_t first = 0; first < context; first += kKeysAtOnce) {
    F32 total[kHeadsAtOnce][4] = {};
    const float* keys[kKeysAtOnce];
    for (size_t i = 0; i < kKeysAtOnce; ++i) keys[i] = rows[smaller(first + i, context - 1)];
    for (size_t column = 0; column < call.width; column += W) {
      F32 parts[kKeysAtOnce];
      K25_UNROLL
      for (size_t i = 0; i < kKeysAtOnce; ++i) parts[i] = row_part(keys[i], column, call.width);
      K25_UNROLL
      for (size_t h = 0; h < kHeadsAtOnce; ++h) {
        const F32 query = load(queries + h * stride + column);
        K25_UNROLL
        for (size_t i = 0; i < kKeysAtOnce; ++i) total[h][i] = fma(query, parts[i], total[h][i]);
      }
    }
    for (size_t h = 0; h < kHeadsAtOnce; ++h) sum_four(total[h], scores + h * kScores + first);
    ahead();
  }
}

// scores become weights 2^(score - largest); returns their sum.
static float short_softmax(float* scores, size_t context) {
  for (size_t i = context; i < rounded_up(context, W); ++i) scores[i] = -kInfinity;
  F32 top = set1(-kInfinity), total = zero();
  for (size_t i = 0; i < context; i += W) top = max(top, load(scores + i));
  const F32 largest = set1(max_lane(top));
  for (size_t i = 0; i < context; i += W) {
    const F32 weight = exp2_nonpositive(load(scores + i) - largest);
    total += weight;
    store(scores + i, weight);
  }
  return sum(total);
}

// z[h] = sum of weights[h][i] * rows[i] over the first `rank` columns, over totals[h].
static void short_mix(const MlaCall& call, const float* weights, const float* totals, const float* const* rows,
                      size_t context, float* z, Ahead& ahead) {
  for (size_t first = 0; first < call.rank; first += kSumVectors * W) {
    F32 sums[kHeadsAtOnce][kSumVectors] = {};
    const bool is_whole = first + kSumVectors * W <= call.rank;
    for (size_t i = 0; i < context; ++i) {
      F32 parts[kSumVectors];
      K25_UNROLL
      for (size_t v = 0; v < kSumVectors; ++v) {
        const size_t column = first + v * W;
        parts[v] = is_whole ? load(rows[i] + column) : column < call.rank ? row_part(rows[i], column, call.rank) : zero();
      }
      K25_UNROLL
      for (size_t h = 0; h < kHeadsAtOnce; ++h) {
        const F32 weight = set1(weights[h * kScores + i]);
        K25_UNROLL
        for (size_t v = 0; v < kSumVectors; ++v) sums[h][v] = fma(weight, parts[v], sums[h][v]);
      }
      if (i % kKeysAtOnce == 0) ahead();
    }
    for (size_t h = 0; h < kHeadsAtOnce; ++h) {
      for (size_t v = 0; v < kSumVectors && first + v * W < call.rank; ++v) {
        const size_t left = call.rank - first - v * W;
        float* to = z + h * call.rank + first + v * W;
        const F32 mixed = sums[h][v] / totals[h];
        left >= W ? store(to, mixed) : store_partial(to, mixed, static_cast<int>(left));
      }
    }
  }
}

K25_INLINE size_t query_stride(const MlaCall& call) { return rounded_up(call.width, W); }

// What a task needs: of kHeadsAtOnce heads and kTokenTile tokens.
struct ShortSpace {
  float* inner;    // of one head, before and after the attention
  float* scores;   // [heads][kScores]
  float* queries;  // [tokens][heads] rows of query_stride
  float* mixed;    // [tokens][heads][rank]
};

static bool take_space(const MlaCall& call, ShortSpace* space) {
  const size_t inner = rounded_up(larger(absorb_floats(call), out_floats(call)), 16);
  const size_t rows = kTokenTile * kHeadsAtOnce;
  const size_t floats = inner + kHeadsAtOnce * kScores + rows * (query_stride(call) + call.rank);
  float* at = static_cast<float*>(thread_scratch(floats * sizeof(float)));
  if (at == nullptr) return false;
  space->inner = at;
  space->scores = at + inner;
  space->queries = space->scores + kHeadsAtOnce * kScores;
  space->mixed = space->queries + rows * query_stride(call);
  return true;
}

static void attend_heads(const Short& work, size_t t, size_t first_head, size_t heads, const ShortSpace& space) {
  const MlaCall& call = *work.call;
  const size_t stride = query_stride(call), token = static_cast<size_t>(work.tokens[t]);
  const size_t context = context_of(call, token);
  float* queries = space.queries + t * kHeadsAtOnce * stride;
  for (size_t h = 0; h < heads; ++h) {
    float* query = queries + h * stride;
    read_rope(call, token, first_head + h, query + call.rank);
    for (size_t i = call.width; i < stride; ++i) query[i] = 0.0f;
  }
  for (size_t h = heads; h < kHeadsAtOnce; ++h) memset(queries + h * stride, 0, stride * sizeof(float));
  const float* const* rows = work.rows + t * kShortContext;
  const char* values = reinterpret_cast<const char*>(value_rows(call, first_head));
  const size_t bytes = t == 0 ? call.v * call.rank * sizeof(uint16_t) : 0;
  Ahead ahead{values, values + bytes, rounded_up(bytes * kKeysAtOnce / context / 2, 64)};
  short_scores(call, queries, stride, rows, context, space.scores, ahead);
  float totals[kHeadsAtOnce];
  for (size_t h = 0; h < kHeadsAtOnce; ++h) totals[h] = short_softmax(space.scores + h * kScores, context);
  short_mix(call, space.scores, totals, rows, context, space.mixed + t * kHeadsAtOnce * call.rank, ahead);
}

static void short_heads_task(void* state, size_t index) {
  Short& work = *static_cast<Short*>(state);
  const MlaCall& call = *work.call;
  const size_t first = index * kHeadsAtOnce, heads = smaller(kHeadsAtOnce, call.heads - first);
  const size_t stride = query_stride(call);
  ShortSpace space;
  if (!take_space(call, &space)) return __atomic_store_n(&work.failed, true, __ATOMIC_RELAXED);
  for (size_t h = 0; h < heads; ++h) {
    const uint16_t* next = h + 1 < heads ? head_rows(call, first + h + 1) : value_rows(call, first);
    absorb_tokens(call, first + h, work.tokens, work.count, next, space.inner, space.queries + h * stride,
                  kHeadsAtOnce * stride);
  }
  for (size_t t = 0; t < work.count; ++t) attend_heads(work, t, first, heads, space);
  for (size_t h = 0; h < heads; ++h) {
    const uint16_t* next = h + 1 < heads ? value_rows(call, first + h + 1) : head_rows(call, first + heads);
    write_outputs(call, first + h, work.tokens, work.count, space.mixed + h * call.rank, kHeadsAtOnce * call.rank, next,
                  space.inner);
  }
}

static k25_status attend_short(const MlaCall& call, const int32_t* tokens, size_t count, const NewRows* new_rows,
                               Scratch& scratch, k25_message message) {
  const float** rows = static_cast<const float**>(scratch.take(count * kShortContext * sizeof(float*)));
  if (rows == nullptr) return fail(K25_FAILED, message, "k25.MLA: no memory for %zu tokens", count);
  Short work{&call, new_rows, tokens, count, rows, false};
  const Phase phases[] = {{rows_task, 1}, {short_heads_task, divided_up(call.heads, kHeadsAtOnce)}};
  run_phases(call.parallel, phases, &work);
  return work.failed ? fail(K25_FAILED, message, "k25.MLA: no memory for a thread's heads") : K25_OK;
}

}  // namespace K25_ISA_NS
}  // namespace k25
#endif
