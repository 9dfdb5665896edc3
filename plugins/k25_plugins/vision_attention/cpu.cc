// k25.VisionAttention on the CPU: every patch sees every patch. A task is one head and kBlockPanels panels of queries;
// keys and values of the head pass tile by tile, so memory does not grow with the number of patches.
#include "attention_pack.h"
#include "attention_softmax.h"
#include "checks.h"
#include "kernels.h"
#include "parallel.h"
#include "scratch.h"

namespace k25 {
namespace K25_ISA_NS {
namespace {

constexpr size_t kBlockPanels = 8;

struct VisionCall {
  size_t patches, heads, width;  // of a head
  float scale_log2;
  Floats q, k, v, out;
  bool pairs;
  bool failed;
};

// From an element of a patch and head.
K25_INLINE size_t offset_of(const VisionCall& call, size_t patch, size_t head) {
  return (patch * call.heads + head) * call.width;
}

// Tiles of keys and values as the products take them.
struct TileSpace {
  float* keys;    // [kTileKeys][row_stride(width)]
  float* values;  // the same
};

K25_INLINE KeyTile<Float> packed_tile(Float, const VisionCall& call, size_t head, size_t first, size_t rows,
                                      const TileSpace& space) {
  const size_t stride = row_stride(call.width);
  for (size_t row = 0; row < rows; ++row) {
    read_floats(call.k, offset_of(call, first + row, head), call.width, space.keys + row * stride);
    read_floats(call.v, offset_of(call, first + row, head), call.width, space.values + row * stride);
  }
  return {space.keys, stride, call.width, space.values, stride, call.width, rows, first == 0, nullptr, true};
}

#if K25_HAS_DOT_BF16
// Keys in pairs of depths, values in pairs of rows, both rounded to bfloat16.
K25_INLINE KeyTile<Bfloat16Pairs> packed_tile(Bfloat16Pairs, const VisionCall& call, size_t head, size_t first,
                                              size_t rows, const TileSpace& space) {
  const size_t stride = row_stride(call.width), depth = divided_up(call.width, 2);
  uint32_t* keys = reinterpret_cast<uint32_t*>(space.keys);
  uint32_t* values = reinterpret_cast<uint32_t*>(space.values);
  float *even = space.values + kTileKeys * stride, *odd = even + stride;
  for (size_t row = 0; row < rows; ++row) {
    even[2 * depth - 1] = 0.0f;
    read_floats(call.k, offset_of(call, first + row, head), call.width, even);
    uint16_t* to = reinterpret_cast<uint16_t*>(keys + row * stride);
    for (size_t i = 0; i < 2 * depth; i += kLanes) store_bf16(to + i, load(even + i));
  }
  for (size_t row = 0; row < rows; row += 2) {
    read_floats(call.v, offset_of(call, first + row, head), call.width, even);
    if (row + 1 < rows) {
      read_floats(call.v, offset_of(call, first + row + 1, head), call.width, odd);
    } else {
      memset(odd, 0, stride * sizeof(float));
    }
    for (size_t i = 0; i < call.width; i += kLanes) {
      const U32 both = bf16_pairs(load(even + i), load(odd + i));
      memcpy(values + row / 2 * stride + i, &both, sizeof both);
    }
  }
  return {keys, stride, depth, values, stride, call.width, rows, first == 0, nullptr, true};
}
#endif

struct VisionSizes {
  size_t panel, queries, sums, tile, scratch, total;
};
K25_INLINE VisionSizes vision_sizes(const VisionCall& call) {
  VisionSizes sizes{};
  sizes.panel = (call.width + 2) * kPanelLanes;
  sizes.queries = kBlockPanels * call.width * kPanelLanes;
  sizes.sums = kBlockPanels * sizes.panel;
  sizes.tile = kTileKeys * row_stride(call.width);
  sizes.scratch = rounded_up(sizeof(TileScratch) / sizeof(float), 16);
  sizes.total = sizes.queries + sizes.sums + 2 * sizes.tile + sizes.scratch + (kLanes + 2) * row_stride(call.width);
  return sizes;
}

K25_INLINE Panel panel_at(float* sums) { return {sums + 2 * kPanelLanes, sums, sums + kPanelLanes}; }

// Queries of `count` <= kPanelLanes patches, in units of log2: [width][kPanelLanes].
static void pack_panel(const VisionCall& call, size_t head, size_t first, size_t count, float* to, float* rows) {
  const size_t stride = row_stride(call.width);
  for (size_t lane = 0; lane < count; lane += kLanes) {
    const size_t lanes = smaller(kLanes, count - lane);
    for (size_t i = 0; i < lanes; ++i) {
      float* row = rows + i * stride;
      read_floats(call.q, offset_of(call, first + lane + i, head), call.width, row);
      for (size_t d = 0; d < call.width; ++d) row[d] *= call.scale_log2;
    }
    transpose_to_lanes(rows, stride, lanes, call.width, to + lane, kPanelLanes);
  }
}

static void write_panel(const VisionCall& call, size_t head, size_t first, size_t count, const Panel& panel,
                        float* rows) {
  const size_t stride = row_stride(call.width);
  for (size_t lane = 0; lane < count; lane += kLanes) {
    const F32 total = load(panel.total + lane);
    for (size_t d = 0; d < call.width; ++d) {
      float* at = panel.sums + d * kPanelLanes + lane;
      store(at, load(at) / total);
    }
    const size_t lanes = smaller(kLanes, count - lane);
    transpose_from_lanes(panel.sums + lane, kPanelLanes, lanes, call.width, rows, stride);
    for (size_t i = 0; i < lanes; ++i) {
      write_floats(call.out, offset_of(call, first + lane + i, head), call.width, rows + i * stride);
    }
  }
}

template <class E>
static void attend_block(const VisionCall& call, size_t head, size_t first, float* space) {
  const VisionSizes sizes = vision_sizes(call);
  float* queries = space;
  float* sums = queries + sizes.queries;
  TileScratch* scratch = reinterpret_cast<TileScratch*>(sums + sizes.sums);
  float* keys = sums + sizes.sums + sizes.scratch;
  const TileSpace tiles{keys, keys + sizes.tile};
  float* rows = keys + 2 * sizes.tile;
  const size_t end = smaller(first + kBlockPanels * kPanelLanes, call.patches);
  const size_t panels = divided_up(end - first, kPanelLanes);
  const typename E::Element* lanes[kBlockPanels];
  for (size_t panel = 0; panel < panels; ++panel) {
    const size_t patch = first + panel * kPanelLanes, count = smaller(kPanelLanes, end - patch);
    float* at = queries + panel * call.width * kPanelLanes;
    pack_panel(call, head, patch, count, at, rows);
    lanes[panel] = panel_elements(E(), at, call.width, divided_up(count, kLanes));
    start_panel(panel_at(sums + panel * sizes.panel));
  }
  for (size_t key = 0; key < call.patches; key += kTileKeys) {
    const KeyTile<E> tile = packed_tile(E(), call, head, key, smaller(kTileKeys, call.patches - key), tiles);
    for (size_t panel = 0; panel < panels; ++panel) {
      const size_t count = smaller(kPanelLanes, end - first - panel * kPanelLanes);
      attend(divided_up(count, kLanes), lanes[panel], tile, panel_at(sums + panel * sizes.panel), scratch);
    }
  }
  for (size_t panel = 0; panel < panels; ++panel) {
    const size_t patch = first + panel * kPanelLanes;
    write_panel(call, head, patch, smaller(kPanelLanes, end - patch), panel_at(sums + panel * sizes.panel), rows);
  }
}

void block_task(void* state, size_t index) {
  VisionCall& call = *static_cast<VisionCall*>(state);
  const size_t blocks = divided_up(call.patches, kBlockPanels * kPanelLanes);
  const size_t head = index / blocks, first = index % blocks * kBlockPanels * kPanelLanes;
  float* space = static_cast<float*>(thread_scratch(vision_sizes(call).total * sizeof(float)));
  if (space == nullptr) return __atomic_store_n(&call.failed, true, __ATOMIC_RELAXED);
#if K25_HAS_DOT_BF16
  if (call.pairs) return attend_block<Bfloat16Pairs>(call, head, first, space);
#endif
  attend_block<Float>(call, head, first, space);
}

}  // namespace

k25_status vision_attention(const k25_tensor inputs[3], const k25_vision_attention_attributes* attributes,
                            const k25_tensor outputs[1], const k25_cpu_options* options, k25_message message) {
  VisionCall call{};
  call.patches = static_cast<size_t>(inputs[0].dims[0]);
  call.heads = static_cast<size_t>(attributes->num_heads);
  call.width = static_cast<size_t>(inputs[0].dims[1]) / call.heads;
  call.scale_log2 = attributes->softmax_scale * kLog2E;
  call.q = floats_of(inputs[0]);
  call.k = floats_of(inputs[1]);
  call.v = floats_of(inputs[2]);
  call.out = floats_of(outputs[0]);
  call.pairs = K25_HAS_DOT_BF16 && options->mode == K25_FAST;
  run_parallel(options->parallel, block_task, &call,
               call.heads * divided_up(call.patches, kBlockPanels * kPanelLanes));
  if (!__atomic_load_n(&call.failed, __ATOMIC_RELAXED)) return K25_OK;
  return fail(K25_FAILED, message, "k25.VisionAttention: no memory for the tiles of a thread");
}

}  // namespace K25_ISA_NS
}  // namespace k25
