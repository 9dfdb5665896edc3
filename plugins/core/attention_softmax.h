// Online softmax over tiles of keys: one panel of queries against one tile.
//
// Scores are in units of log2: queries were multiplied by softmax_scale * log2(e) when they were packed. A panel keeps
// the largest score so far, the sum of 2^(score - largest) and the sum of the values weighted by it (Milakov and
// Gimelshein, "Online normalizer calculation for softmax"). A NaN score makes its lane NaN, and no other.
#ifndef K25_ATTENTION_SOFTMAX_H
#define K25_ATTENTION_SOFTMAX_H

#include "attention_tile.h"

namespace k25 {
namespace K25_ISA_NS {

constexpr size_t kTileKeys = 64;    // keys of a tile, at most; even
constexpr size_t kDepthChunk = 96;  // of a panel that stay in the first-level cache while all rows of a tile pass

// What the queries of a panel have attended to so far.
struct Panel {
  float* sums;   // [value_width][kPanelLanes], undefined before the first tile
  float* top;    // [kPanelLanes] largest score
  float* total;  // [kPanelLanes] sum of weights
};

K25_INLINE void start_panel(const Panel& panel) {
  for (size_t lane = 0; lane < kPanelLanes; lane += kLanes) {
    store(panel.top + lane, set1(-kInfinity));
    store(panel.total + lane, zero());
  }
}

// Keys [rows][key_stride] over `depth`, values [rows / kStep][value_stride]; lengths in elements of K and V, rows in
// keys.
template <class K, class V = K>
struct KeyTile {
  const typename K::Element* keys;
  size_t key_stride;
  size_t depth;
  const typename V::Element* values;
  size_t value_stride;
  size_t value_width;
  size_t rows;
  bool first;           // of its panel
  const int32_t* seen;  // [kPanelLanes] how many rows each lane sees; null where all see all
  bool values_finite;   // looked at where `seen` is given; values that may be anything must be Float
};

struct TileScratch {
  float scores[kTileKeys][kPanelLanes];
  uint32_t pairs[kTileKeys / 2][kPanelLanes];
  float rescale[kPanelLanes];
};

template <int kVectors>
static void hide_unseen(float* scores, size_t rows, const int32_t* seen) {
  for (int v = 0; v < kVectors; ++v) {
    const I32 limit = load_i32(seen + v * W);
    for (size_t row = 0; row < rows; ++row) {
      float* at = scores + row * kPanelLanes + v * W;
      store(at, set1i(static_cast<int32_t>(row)) < limit ? load(at) : set1(-kInfinity));
    }
  }
}

// The weights of two rows (the second may not exist) are kept as the product takes them, and added as they are kept.
template <class E>
struct Weights;

template <>
struct Weights<Float> {
  static float* of(TileScratch* scratch) { return &scratch->scores[0][0]; }
  K25_INLINE F32 keep(float* to, bool both, F32 even, F32 odd) {
    store(to, even);
    if (!both) return even;
    store(to + kPanelLanes, odd);
    return even + odd;
  }
};

#if K25_HAS_DOT_BF16
template <>
struct Weights<Bfloat16Pairs> {
  static uint32_t* of(TileScratch* scratch) { return &scratch->pairs[0][0]; }
  K25_INLINE F32 keep(uint32_t* to, bool, F32 even, F32 odd) {
    const U32 pairs = bf16_pairs(even, odd);
    memcpy(to, &pairs, sizeof pairs);
    return (F32)(pairs << 16) + (F32)(pairs & 0xffff0000u);
  }
};
#endif

// Scores to weights; updates top and total, writes rescale = 2^(top before - top after).
template <class E, int kVectors>
static void softmax(size_t rows, const Panel& panel, TileScratch* scratch) {
  typename E::Element* weights = Weights<E>::of(scratch);
  F32 top[kVectors], total[kVectors];
  K25_UNROLL
  for (int v = 0; v < kVectors; ++v) top[v] = load(panel.top + v * W);
  for (size_t row = 0; row < rows; ++row) {
    K25_UNROLL
    for (int v = 0; v < kVectors; ++v) top[v] = max(top[v], load(&scratch->scores[row][v * W]));
  }
  K25_UNROLL
  for (int v = 0; v < kVectors; ++v) {
    const F32 before = load(panel.top + v * W);
    store(panel.top + v * W, top[v]);
    top[v] = top[v] == set1(-kInfinity) ? zero() : top[v];  // nothing to see so far: all weights are 0
    const F32 factor = exp2_nonpositive(before - top[v]);
    store(scratch->rescale + v * W, factor);
    total[v] = load(panel.total + v * W) * factor;
  }
  for (size_t row = 0; row < rows; row += 2) {
    const bool both = row + 1 < rows;
    K25_UNROLL
    for (int v = 0; v < kVectors; ++v) {
      const F32 even = exp2_nonpositive(load(&scratch->scores[row][v * W]) - top[v]);
      const F32 odd = both ? exp2_nonpositive(load(&scratch->scores[row + 1][v * W]) - top[v]) : zero();
      total[v] += Weights<E>::keep(weights + row / E::kStep * kPanelLanes + v * W, both, even, odd);
    }
  }
  K25_UNROLL
  for (int v = 0; v < kVectors; ++v) store(panel.total + v * W, total[v]);
}

// sums += weights * values where a value that a lane does not see may be anything: row by row, with a choice.
template <class K, int kVectors>
static void add_seen_values(const KeyTile<K, Float>& tile, const Panel& panel, const TileScratch* scratch) {
  for (size_t column = 0; column < tile.value_width; ++column) {
    for (int v = 0; v < kVectors; ++v) {
      const I32 limit = load_i32(tile.seen + v * W);
      float* sums = panel.sums + column * kPanelLanes + v * W;
      F32 sum = tile.first ? zero() : load(sums) * load(scratch->rescale + v * W);
      for (size_t row = 0; row < tile.rows; ++row) {
        const F32 value = set1(tile.values[row * tile.value_stride + column]);
        const F32 added = fma(load(&scratch->scores[row][v * W]), value, sum);
        sum = set1i(static_cast<int32_t>(row)) < limit ? added : sum;
      }
      store(sums, sum);
    }
  }
}

// One panel [depth][kPanelLanes] of queries against one tile of keys. `between` is called between register tiles.
template <class K, class V, int kVectors, class Between>
static void attend_tile(const typename K::Element* queries, const KeyTile<K, V>& tile, const Panel& panel,
                        TileScratch* scratch, Between&& between) {
  for (size_t depth = 0; depth < tile.depth; depth += kDepthChunk) {
    product<K, kVectors, kAlongDepth>(tile.keys + depth, tile.key_stride, tile.rows, queries + depth * kPanelLanes,
                                      kPanelLanes, smaller(kDepthChunk, tile.depth - depth), &scratch->scores[0][0],
                                      kPanelLanes, depth == 0 ? kZero : kSum, nullptr, between);
  }
  if (tile.seen != nullptr) hide_unseen<kVectors>(&scratch->scores[0][0], tile.rows, tile.seen);
  softmax<V, kVectors>(tile.rows, panel, scratch);
  if constexpr (V::kStep == 1) {
    if (tile.seen != nullptr && !tile.values_finite) return add_seen_values<K, kVectors>(tile, panel, scratch);
  }
  product<V, kVectors, kAlongRows>(tile.values, tile.value_stride, tile.value_width, Weights<V>::of(scratch),
                                   kPanelLanes, divided_up(tile.rows, V::kStep), panel.sums, kPanelLanes,
                                   tile.first ? kZero : kScaledSum, scratch->rescale, between);
}

// As above for a panel of which `vectors` are in use.
template <class K, class V, class Between = Nothing>
static void attend(size_t vectors, const typename K::Element* queries, const KeyTile<K, V>& tile, const Panel& panel,
                   TileScratch* scratch, Between&& between = Between()) {
  switch (vectors) {
    case 1: return attend_tile<K, V, 1>(queries, tile, panel, scratch, between);
    case 2: return attend_tile<K, V, 2>(queries, tile, panel, scratch, between);
#if defined(__AVX512F__)
    case 3: return attend_tile<K, V, 3>(queries, tile, panel, scratch, between);
    default: return attend_tile<K, V, 4>(queries, tile, panel, scratch, between);
#endif
  }
}

}  // namespace K25_ISA_NS
}  // namespace k25
#endif
