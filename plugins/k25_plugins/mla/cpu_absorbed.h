// k25.MLA in the absorbed form: for few query tokens. Lanes are the heads of one token.
//
//     query_h = [UK_h^T q_nope_h | q_rope_h],  z_h = softmax(query_h . rows) latents,  out_h = UV_h z_h
//
// A latent row is key and value of all heads at once: each is read once (short contexts: cpu_short.h). The context of a
// token is cut into splits, a task each, whose sums are merged in their order; the cut depends on the length of the context
// alone, so a token's result in this form depends neither on threads nor on what else is in the batch.
//
// The new rows of few tokens are rotated and written beside UK_h^T q_nope_h, which does not need them.
#ifndef K25_MLA_CPU_ABSORBED_H
#define K25_MLA_CPU_ABSORBED_H

#include "cpu_heads.h"

namespace k25 {
namespace K25_ISA_NS {

constexpr size_t kShortestSplit = 256, kGoodSplit = 1024, kMostSplits = 32;
constexpr size_t kWaveBytes = size_t{48} << 20;  // of queries and sums of the tokens that are on their way together

// Eight splits where that makes them of good length: short ones cost merging, long ones leave threads without work.
K25_INLINE size_t split_length(size_t context) {
  const size_t eighth = smaller(rounded_up(divided_up(context, 8), kTileKeys), kGoodSplit);
  const size_t least = rounded_up(divided_up(context, kMostSplits), kTileKeys);
  return larger(kShortestSplit, larger(eighth, least));
}
K25_INLINE size_t split_count(size_t context) { return divided_up(context, split_length(context)); }

// Tokens that are computed together, and what they need.
struct Wave {
  const MlaCall* call;
  const int32_t* tokens;  // [count], indices into the batch
  size_t count;
  size_t panels;              // of heads
  const size_t* first_split;  // [count + 1]
  const NewRows* new_rows;    // of all tokens of the call, where they are still to be written
  float* queries;             // [count][heads][rank], absorbed
  float* mixed;               // [count][heads][rank], z
  float* sums;                // [splits][panels] partial sums, panel_floats each
  bool failed;
};

K25_INLINE size_t panel_floats(const MlaCall& call) { return (call.rank + 2) * kPanelLanes; }
K25_INLINE Panel wave_panel(const Wave& wave, size_t split, size_t panel) {
  float* at = wave.sums + (split * wave.panels + panel) * panel_floats(*wave.call);
  return {at + 2 * kPanelLanes, at, at + kPanelLanes};
}
K25_INLINE size_t panel_heads(const MlaCall& call, size_t panel) {
  return smaller(kPanelLanes, call.heads - panel * kPanelLanes);
}

// Absorbed queries of one head, all tokens of the wave.
static void absorb_head(Wave& wave, size_t head) {
  const MlaCall& call = *wave.call;
  float* space = static_cast<float*>(thread_scratch(absorb_floats(call) * sizeof(float)));
  if (space == nullptr) return __atomic_store_n(&wave.failed, true, __ATOMIC_RELAXED);
  for (size_t first = 0; first < wave.count; first += kTokenTile) {
    const uint16_t* next = head_rows(call, first + kTokenTile < wave.count ? head : head + 1);
    absorb_tokens(call, head, wave.tokens + first, smaller(kTokenTile, wave.count - first), next, space,
                  wave.queries + (first * call.heads + head) * call.rank, call.heads * call.rank);
  }
}

// The heads, and before them the new rows where they are still to be written.
static void absorb_task(void* state, size_t index) {
  Wave& wave = *static_cast<Wave*>(state);
  if (wave.new_rows == nullptr) return absorb_head(wave, index);
  index == 0 ? write_new_rows(*wave.new_rows) : absorb_head(wave, index - 1);
}

// The tile as the products take it, keys and values at once: where they lie, or, in other dtypes and across blocks, a copy.
K25_INLINE KeyTile<Float> latent_tile(Float, const MlaCall& call, size_t sequence, size_t first, size_t rows,
                                      float* space) {
  if (!call.cache.bfloat16 && first / call.block_size == (first + rows - 1) / call.block_size) {
    const float* at = static_cast<const float*>(call.cache.data) + row_offset(call, sequence, first);
    return {at, call.width, call.width, at, call.width, call.rank, rows, false, nullptr, true};
  }
  const size_t stride = row_stride(call.width);
  read_rows(call, sequence, first, rows, space, stride);
  return {space, stride, call.width, space, stride, call.rank, rows, false, nullptr, true};
}

#if K25_HAS_DOT_BF16
// Pairs of a row are pairs of depths as they lie in the cache; the values need pairs of rows.
K25_INLINE KeyTile<Bfloat16Pairs> latent_tile(Bfloat16Pairs, const MlaCall& call, size_t sequence, size_t first,
                                              size_t rows, float* space) {
  const size_t depth = divided_up(call.width, 2), stride = row_stride(depth), value_stride = row_stride(call.rank);
  uint32_t* keys = reinterpret_cast<uint32_t*>(space);
  uint32_t* values = keys + kTileKeys * stride;
  for (size_t row = 0; row < rows; ++row) {
    keys[row * stride + depth - 1] = 0;
    memcpy(keys + row * stride, address_of(call.cache, row_offset(call, sequence, first + row)), 2 * call.width);
  }
  for (size_t row = 0; row < rows; row += 2) {
    const uint16_t* even = reinterpret_cast<const uint16_t*>(keys + row * stride);
    const uint16_t* odd = reinterpret_cast<const uint16_t*>(keys + (row + 1) * stride);
    uint32_t* to = values + row / 2 * value_stride;
    for (size_t column = 0; column < call.rank; ++column) {
      uint16_t below, above = 0;
      memcpy(&below, even + column, sizeof below);
      if (row + 1 < rows) memcpy(&above, odd + column, sizeof above);
      to[column] = static_cast<uint32_t>(below) | static_cast<uint32_t>(above) << 16;
    }
  }
  return {keys, stride, depth, values, value_stride, call.rank, rows, false, nullptr, true};
}
#endif

K25_INLINE size_t latent_tile_floats(const MlaCall& call) {
  return kTileKeys * (row_stride(call.width) + row_stride(call.rank));
}

template <class E>
static void attend_split(const Wave& wave, size_t token_index, size_t split, size_t panel_index, float* space) {
  const MlaCall& call = *wave.call;
  const size_t token = static_cast<size_t>(wave.tokens[token_index]), context = context_of(call, token);
  const size_t sequence = static_cast<size_t>(call.sequence_of[token]);
  const size_t heads = panel_heads(call, panel_index), vectors = divided_up(heads, kLanes);
  TileScratch* scratch = reinterpret_cast<TileScratch*>(space);
  float* panel_space = space + rounded_up(sizeof(TileScratch) / sizeof(float), 16);
  float* tile_space = panel_space + call.width * kPanelLanes;
  const size_t first_head = panel_index * kPanelLanes;
  const float* queries = wave.queries + (token_index * call.heads + first_head) * call.rank;
  float* ropes = tile_space;  // until the first tile
  for (size_t lane = 0; lane < heads; lane += kLanes) {
    const size_t count = smaller(kLanes, heads - lane);
    for (size_t i = 0; i < count; ++i) read_rope(call, token, first_head + lane + i, ropes + i * call.rope);
    transpose_to_lanes(queries + lane * call.rank, call.rank, count, call.rank, panel_space + lane, kPanelLanes);
    transpose_to_lanes(ropes, call.rope, count, call.rope, panel_space + call.rank * kPanelLanes + lane, kPanelLanes);
  }
  const typename E::Element* lanes = panel_elements(E(), panel_space, call.width, vectors);
  const Panel panel = wave_panel(wave, wave.first_split[token_index] + split, panel_index);
  start_panel(panel);
  const size_t begin = split * split_length(context), end = smaller(begin + split_length(context), context);
  for (size_t first = begin; first < end; first += kTileKeys) {
    KeyTile<E> tile = latent_tile(E(), call, sequence, first, smaller(kTileKeys, end - first), tile_space);
    tile.first = first == begin;
    NextTile next{&call, sequence, first + kTileKeys, smaller(first + 2 * kTileKeys, end)};
    attend(vectors, lanes, tile, panel, scratch, next);
  }
}

// One split of one token and panel. Tasks are numbered split by split, panel by panel.
static void attend_task(void* state, size_t index) {
  Wave& wave = *static_cast<Wave*>(state);
  const MlaCall& call = *wave.call;
  const size_t split = index / wave.panels;
  size_t low = 0, high = wave.count;  // the token that has it
  while (high - low > 1) {
    const size_t middle = (low + high) / 2;
    (wave.first_split[middle] <= split ? low : high) = middle;
  }
  const size_t floats = sizeof(TileScratch) / sizeof(float) + 16 + call.width * kPanelLanes + latent_tile_floats(call);
  float* space = static_cast<float*>(thread_scratch(floats * sizeof(float)));
  if (space == nullptr) return __atomic_store_n(&wave.failed, true, __ATOMIC_RELAXED);
#if K25_HAS_DOT_BF16
  if (call.pairs) {
    return attend_split<Bfloat16Pairs>(wave, low, split - wave.first_split[low], index % wave.panels, space);
  }
#endif
  attend_split<Float>(wave, low, split - wave.first_split[low], index % wave.panels, space);
}

constexpr size_t kMergeColumns = 64;

// z of one token, panel and kMergeColumns of the rank: the splits' sums, each times 2^(its top - the largest), over the
// same sum of totals.
static void merge_task(void* state, size_t index) {
  const Wave& wave = *static_cast<const Wave*>(state);
  const MlaCall& call = *wave.call;
  const size_t chunks = divided_up(call.rank, kMergeColumns);
  const size_t column = index % chunks * kMergeColumns, columns = smaller(kMergeColumns, call.rank - column);
  const size_t panel_index = index / chunks % wave.panels, token = index / chunks / wave.panels;
  const size_t first = wave.first_split[token], end = wave.first_split[token + 1];
  const size_t heads = panel_heads(call, panel_index);
  float lanes[kMergeColumns][kLanes];
  for (size_t lane = 0; lane < heads; lane += kLanes) {
    F32 top = set1(-kInfinity), total = zero();
    for (size_t split = first; split < end; ++split) {
      top = max(top, load(wave_panel(wave, split, panel_index).top + lane));
    }
    top = top == set1(-kInfinity) ? zero() : top;
    for (size_t row = 0; row < columns; ++row) store(lanes[row], zero());
    for (size_t split = first; split < end; ++split) {
      const Panel part = wave_panel(wave, split, panel_index);
      const F32 factor = exp2_nonpositive(load(part.top + lane) - top);
      total = fma(factor, load(part.total + lane), total);
      const float* sums = part.sums + column * kPanelLanes + lane;
      for (size_t row = 0; row < columns; ++row) {
        store(lanes[row], fma(factor, load(sums + row * kPanelLanes), load(lanes[row])));
      }
    }
    for (size_t row = 0; row < columns; ++row) store(lanes[row], load(lanes[row]) / total);
    float* to = wave.mixed + (token * call.heads + panel_index * kPanelLanes + lane) * call.rank + column;
    transpose_from_lanes(&lanes[0][0], kLanes, smaller(kLanes, heads - lane), columns, to, call.rank);
  }
}

// Outputs of one head, all tokens of the wave.
static void out_task(void* state, size_t head) {
  Wave& wave = *static_cast<Wave*>(state);
  const MlaCall& call = *wave.call;
  float* space = static_cast<float*>(thread_scratch(out_floats(call) * sizeof(float)));
  if (space == nullptr) return __atomic_store_n(&wave.failed, true, __ATOMIC_RELAXED);
  for (size_t first = 0; first < wave.count; first += kTokenTile) {
    const uint16_t* next = value_rows(call, first + kTokenTile < wave.count ? head : head + 1);
    write_outputs(call, head, wave.tokens + first, smaller(kTokenTile, wave.count - first),
                  wave.mixed + (first * call.heads + head) * call.rank, call.heads * call.rank, next, space);
  }
}

K25_INLINE size_t wave_token_floats(const MlaCall& call, size_t panels, size_t context) {
  return call.heads * 2 * call.rank + split_count(context) * panels * panel_floats(call);
}

static bool run_wave(Wave& wave, float* space) {
  const MlaCall& call = *wave.call;
  wave.queries = space;
  wave.mixed = wave.queries + wave.count * call.heads * call.rank;
  wave.sums = wave.mixed + wave.count * call.heads * call.rank;
  wave.failed = false;
  const Phase phases[] = {
      {absorb_task, call.heads + (wave.new_rows == nullptr ? 0 : 1)},
      {attend_task, wave.first_split[wave.count] * wave.panels},
      {merge_task, wave.count * wave.panels * divided_up(call.rank, kMergeColumns)},
      {out_task, call.heads},
  };
  run_phases(call.parallel, phases, &wave);
  return !__atomic_load_n(&wave.failed, __ATOMIC_RELAXED);
}

struct WaveSize {
  size_t count, floats;
};

// How many of the next tokens fit a wave, at least one, and where their splits begin.
static WaveSize next_wave(const MlaCall& call, const int32_t* tokens, size_t left, size_t* first_split) {
  const size_t panels = divided_up(call.heads, kPanelLanes);
  WaveSize size{0, 0};
  first_split[0] = 0;
  for (; size.count < left; ++size.count) {
    const size_t context = context_of(call, static_cast<size_t>(tokens[size.count]));
    const size_t more = wave_token_floats(call, panels, context);
    if (size.count > 0 && (size.floats + more) * sizeof(float) > kWaveBytes) break;
    size.floats += more;
    first_split[size.count + 1] = first_split[size.count] + split_count(context);
  }
  return size;
}

// Attends for the given tokens, as many at a time as fit the memory of a wave. `new_rows` are those that are still to be
// written, or null.
static k25_status attend_absorbed(const MlaCall& call, const int32_t* tokens, size_t count, const NewRows* new_rows,
                                  Scratch& scratch, k25_message message) {
  size_t* first_split = static_cast<size_t*>(scratch.take((count + 1) * sizeof(size_t)));
  if (first_split == nullptr) return fail(K25_FAILED, message, "k25.MLA: no memory for %zu tokens", count);
  size_t most = 0;
  for (size_t begin = 0; begin < count;) {
    const WaveSize size = next_wave(call, tokens + begin, count - begin, first_split);
    most = larger(most, size.floats * sizeof(float));
    begin += size.count;
  }
  float* space = static_cast<float*>(scratch.take(most));
  if (space == nullptr) return fail(K25_FAILED, message, "k25.MLA: no memory: %zu bytes of partial sums", most);
  const size_t panels = divided_up(call.heads, kPanelLanes);
  for (size_t begin = 0; begin < count;) {
    const WaveSize size = next_wave(call, tokens + begin, count - begin, first_split);
    Wave wave{&call, tokens + begin, size.count, panels, first_split, begin == 0 ? new_rows : nullptr,
              nullptr, nullptr, nullptr, false};
    if (!run_wave(wave, space)) return fail(K25_FAILED, message, "k25.MLA: no memory for a thread's tiles");
    begin += size.count;
  }
  return K25_OK;
}

}  // namespace K25_ISA_NS
}  // namespace k25
#endif
