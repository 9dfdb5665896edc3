// k25.MoEDispatch on a CPU. Words and scales are read in place; experts that nobody chose are not touched.
//
// One parallel region of three phases: activations into the order of the words; gate and up of (expert, block of rows); down
// of a block of rows over all experts, by ascending expert, so that each output has one writer and one order of sums.
// An expert of few tokens is streamed (int4_stream.h), one of many is unpacked tile by tile (int4_tile.h).
//
// Legend: T tokens, H hidden, I expert width, P (token, expert) pairs.
#include "checks.h"
#include "expert_groups.h"
#include "int4_tile.h"
#include "kernels.h"
#include "parallel.h"
#include "scratch.h"

namespace k25 {
namespace K25_ISA_NS {
namespace {

constexpr int kRows = 16;  // of gate and up in a task
constexpr int kMaxDownRows = kTileRows;
constexpr int kPrepareTokens = 8;  // in a task

struct Call {
  const void* x;
  void* y;
  bool is_float;
  bool use_pairs;  // bfloat16 dot products for experts of many tokens
  int64_t tokens, hidden, intermediate, words_per_group;
  ExpertGroups groups;
  int down_rows;

  float* x_words;     // [T][x_words_stride] word order, or null
  uint16_t* x_pairs;  // [T][x_pairs_stride] group order, or null
  char* inner;        // [P] rows of inner_bytes: word order, or group order where the group is multiplied so
  int64_t x_words_stride, x_pairs_stride, inner_bytes;

  int64_t prepare_tasks, gate_blocks, gate_tasks;
  Counter prepared, gated;
  int32_t no_memory;  // set by any task
};

bool is_streamed(const ExpertGroup& group) { return group.pair_count <= kStreamTokens; }
bool has_pairs(const Call& call, const ExpertGroup& group) { return call.use_pairs && !is_streamed(group); }

float* inner_words(const Call& call, int64_t pair) {
  return reinterpret_cast<float*>(call.inner + pair * call.inner_bytes);
}
uint16_t* inner_pairs(const Call& call, int64_t pair) {
  return reinterpret_cast<uint16_t*>(call.inner + pair * call.inner_bytes);
}

void prepare(Call& call, int64_t block) {
  const int64_t stop = (block + 1) * kPrepareTokens < call.tokens ? (block + 1) * kPrepareTokens : call.tokens;
  const int64_t row_bytes = call.hidden * (call.is_float ? 4 : 2);
  for (int64_t token = block * kPrepareTokens; token < stop; ++token) {
    const void* row = static_cast<const char*>(call.x) + token * row_bytes;
    if (call.x_words != nullptr) {
      to_word_order(row, call.is_float, call.hidden, call.x_words + token * call.x_words_stride);
    }
    if (call.x_pairs != nullptr) {
      to_group_order(row, call.is_float, call.hidden, call.x_pairs + token * call.x_pairs_stride);
    }
  }
}

// inner = silu(gate) * up of rows [first, first + count) of a pair, into the order in which down reads it.
void write_inner(Call& call, const ExpertGroup& group, int64_t pair, int64_t first, int count, const float* gate,
                 const float* up) {
  alignas(64) float values[kRows];
  for (int row = 0; row < kRows; row += W) store(values + row, silu(load(gate + row)) * load(up + row));
  for (int row = 0; row < count; ++row) {
    if (has_pairs(call, group)) {
      inner_pairs(call, pair)[group_order(first + row)] = bf16_of(values[row]);
    } else {
      inner_words(call, pair)[word_order(first + row)] = values[row];
    }
  }
}

// Gate and up of few tokens, a row or two of each at a time.
void stream_gate(Call& call, const ExpertGroup& group, int64_t first, int64_t stop) {
  const float* x[kStreamTokens];
  const int tokens = static_cast<int>(group.pair_count);
  for (int m = 0; m < tokens; ++m) {
    x[m] = call.x_words + call.groups.tokens[group.first_pair + m] * call.x_words_stride;
  }
  const int64_t words = call.hidden / 8, scale_count = words / call.words_per_group;
  float gate[kStreamTokens][kRows] = {}, up[kStreamTokens][kRows] = {};
  int64_t row = first;
  // Two rows of each share the loads of two activations; one activation is bound by memory, more need the registers.
  for (; W == 16 && tokens == 2 && row + 2 <= stop; row += 2) {
    const int32_t* rows[4];
    const uint16_t* scales[4];
    for (int r = 0; r < 4; ++r) {
      const PackedMatrix& matrix = r < 2 ? group.gate : group.up;
      rows[r] = matrix.words + (row + r % 2) * words;
      scales[r] = matrix.scales + (row + r % 2) * scale_count;
    }
    float found[4 * kStreamTokens];
    int4_rows_of<4>(tokens, rows, scales, words, call.words_per_group, x, found);
    for (int m = 0; m < tokens; ++m) {
      for (int r = 0; r < 2; ++r) {
        gate[m][row - first + r] = found[r * kStreamTokens + m];
        up[m][row - first + r] = found[(2 + r) * kStreamTokens + m];
      }
    }
  }
  for (; row < stop; ++row) {
    const int32_t* rows[2] = {group.gate.words + row * words, group.up.words + row * words};
    const uint16_t* scales[2] = {group.gate.scales + row * scale_count, group.up.scales + row * scale_count};
    float found[2 * kStreamTokens];
    int4_rows_of<2>(tokens, rows, scales, words, call.words_per_group, x, found);
    for (int m = 0; m < tokens; ++m) {
      gate[m][row - first] = found[m];
      up[m][row - first] = found[kStreamTokens + m];
    }
  }
  for (int m = 0; m < tokens; ++m) {
    write_inner(call, group, group.first_pair + m, first, static_cast<int>(stop - first), gate[m], up[m]);
  }
}

// What a task needs: a tile, sums, pointers to the activations of its tokens, and `extra_bytes` more.
template <class Tile>
struct TileMemory {
  char* tile;
  Sums sums;
  float* extra;
  const typename Tile::Activation* x[kTileTokens];

  explicit TileMemory(int rows, size_t extra_bytes) : sums{nullptr, rows}, extra(nullptr) {
    const size_t tile_bytes = Tile::bytes();
    const size_t sum_bytes = sizeof(float) * kTileTokens * kTileRows * W;
    tile = static_cast<char*>(thread_scratch(tile_bytes + sum_bytes + extra_bytes));
    if (tile == nullptr) return;
    sums.data = reinterpret_cast<float*>(tile + tile_bytes);
    extra = reinterpret_cast<float*>(tile + tile_bytes + sum_bytes);
  }
};

template <class Tile>
struct Activations;
template <>
struct Activations<FloatTile> {
  static const float* x(const Call& call, int64_t token) { return call.x_words + token * call.x_words_stride; }
  static const float* inner(const Call& call, int64_t pair) { return inner_words(call, pair); }
};
#if K25_HAS_DOT_BF16
template <>
struct Activations<PairTile> {
  static const uint16_t* x(const Call& call, int64_t token) { return call.x_pairs + token * call.x_pairs_stride; }
  static const uint16_t* inner(const Call& call, int64_t pair) { return inner_pairs(call, pair); }
};
#endif

// Rows [first, first + rows) of each matrix, as rows 0, rows, ... of the tile, times x[0 .. tokens).
template <class Tile>
void multiply_matrices(const PackedMatrix* const* matrices, int matrix_count, int64_t first, int rows, int64_t in,
                       int64_t words_per_group, TileMemory<Tile>& memory, int tokens) {
  Tile tile(memory.tile);
  memset(memory.sums.data, 0, sizeof(float) * static_cast<size_t>(tokens) * memory.sums.rows * W);
  const int64_t words = in / 8, scale_count = words / words_per_group;
  const typename Tile::Activation* x[kTileTokens];
  const int64_t whole = padded(in, Tile::kChunk);
  for (int64_t start = 0; start < whole; start += Tile::kColumns) {
    const int count = static_cast<int>(whole - start < Tile::kColumns ? whole - start : Tile::kColumns);
    for (int index = 0; index < matrix_count; ++index) {
      for (int row = 0; row < rows; ++row) {
        tile.unpack(index * rows + row, matrices[index]->words + (first + row) * words,
                    matrices[index]->scales + (first + row) * scale_count, in, words_per_group, start, count);
      }
    }
    for (int m = 0; m < tokens; ++m) x[m] = memory.x[m] + start;
    multiply_tile(tile, matrix_count * rows, count, x, tokens, memory.sums);
  }
}

template <class Tile>
bool tile_gate(Call& call, const ExpertGroup& group, int64_t first, int64_t stop) {
  const int rows = static_cast<int>(stop - first);
  TileMemory<Tile> memory(2 * rows, 0);
  if (memory.tile == nullptr) return false;
  const PackedMatrix* matrices[2] = {&group.gate, &group.up};
  for (int64_t pair = 0; pair < group.pair_count; pair += kTileTokens) {
    const int tokens = static_cast<int>(group.pair_count - pair < kTileTokens ? group.pair_count - pair : kTileTokens);
    for (int m = 0; m < tokens; ++m) {
      memory.x[m] = Activations<Tile>::x(call, call.groups.tokens[group.first_pair + pair + m]);
    }
    multiply_matrices<Tile>(matrices, 2, first, rows, call.hidden, call.words_per_group, memory, tokens);
    for (int m = 0; m < tokens; ++m) {
      float gate[kRows] = {}, up[kRows] = {};
      for (int row = 0; row < rows; ++row) {
        gate[row] = sum(load(memory.sums.at(m, row)));
        up[row] = sum(load(memory.sums.at(m, rows + row)));
      }
      write_inner(call, group, group.first_pair + pair + m, first, rows, gate, up);
    }
  }
  return true;
}

bool gate(Call& call, int64_t task) {
  const ExpertGroup& group = call.groups.groups[task / call.gate_blocks];
  const int64_t first = task % call.gate_blocks * kRows;
  const int64_t stop = first + kRows < call.intermediate ? first + kRows : call.intermediate;
  if (is_streamed(group)) {
    stream_gate(call, group, first, stop);
    return true;
  }
#if K25_HAS_DOT_BF16
  if (call.use_pairs) return tile_gate<PairTile>(call, group, first, stop);
#endif
  return tile_gate<FloatTile>(call, group, first, stop);
}

// totals [T][kMaxDownRows] += weight * down(inner), for the rows [first, stop).
void stream_down(const Call& call, const ExpertGroup& group, int64_t first, int64_t stop, float* totals) {
  const float* x[kStreamTokens];
  const int tokens = static_cast<int>(group.pair_count);
  for (int m = 0; m < tokens; ++m) x[m] = inner_words(call, group.first_pair + m);
  const int64_t words = call.intermediate / 8, scale_count = words / call.words_per_group;
  const auto add = [&](int64_t row, const float* found) {
    for (int m = 0; m < tokens; ++m) {
      const int64_t pair = group.first_pair + m;
      totals[call.groups.tokens[pair] * kMaxDownRows + row - first] += call.groups.weights[pair] * found[m];
    }
  };
  int64_t row = first;
  float found[2 * kStreamTokens];
  for (; row + 2 <= stop; row += 2) {
    const int32_t* rows[2] = {group.down.words + row * words, group.down.words + (row + 1) * words};
    const uint16_t* scales[2] = {group.down.scales + row * scale_count, group.down.scales + (row + 1) * scale_count};
    int4_rows_of<2>(tokens, rows, scales, words, call.words_per_group, x, found);
    add(row, found);
    add(row + 1, found + kStreamTokens);
  }
  if (row < stop) {
    const int32_t* rows[1] = {group.down.words + row * words};
    const uint16_t* scales[1] = {group.down.scales + row * scale_count};
    int4_rows_of<1>(tokens, rows, scales, words, call.words_per_group, x, found);
    add(row, found);
  }
}

template <class Tile>
void tile_down(const Call& call, const ExpertGroup& group, int64_t first, int64_t stop, TileMemory<Tile>& memory,
               float* totals) {
  const int rows = static_cast<int>(stop - first);
  const PackedMatrix* matrices[1] = {&group.down};
  for (int64_t start = 0; start < group.pair_count; start += kTileTokens) {
    const int64_t left = group.pair_count - start;
    const int tokens = static_cast<int>(left < kTileTokens ? left : kTileTokens);
    for (int m = 0; m < tokens; ++m) memory.x[m] = Activations<Tile>::inner(call, group.first_pair + start + m);
    multiply_matrices<Tile>(matrices, 1, first, rows, call.intermediate, call.words_per_group, memory, tokens);
    for (int m = 0; m < tokens; ++m) {
      const int64_t pair = group.first_pair + start + m;
      float* total = totals + call.groups.tokens[pair] * kMaxDownRows;
      for (int row = 0; row < rows; ++row) {
        total[row] += call.groups.weights[pair] * sum(load(memory.sums.at(m, row)));
      }
    }
  }
}

void write_y(const Call& call, int64_t first, int64_t stop, const float* totals) {
  for (int64_t token = 0; token < call.tokens; ++token) {
    const float* total = totals + token * kMaxDownRows;
    const int64_t at = token * call.hidden + first;
    if (call.is_float) {
      memcpy(static_cast<float*>(call.y) + at, total, sizeof(float) * static_cast<size_t>(stop - first));
    } else {
      for (int64_t row = 0; row < stop - first; ++row) static_cast<uint16_t*>(call.y)[at + row] = bf16_of(total[row]);
    }
  }
}

template <class Tile>
bool down(Call& call, int64_t task) {
  const int64_t first = task * call.down_rows;
  const int64_t stop = first + call.down_rows < call.hidden ? first + call.down_rows : call.hidden;
  const size_t total_bytes = sizeof(float) * static_cast<size_t>(call.tokens) * kMaxDownRows;
  TileMemory<Tile> memory(static_cast<int>(stop - first), total_bytes);
  if (memory.tile == nullptr) return false;
  float* totals = memory.extra;
  memset(totals, 0, total_bytes);
  for (int64_t index = 0; index < call.groups.group_count; ++index) {
    const ExpertGroup& group = call.groups.groups[index];
    if (is_streamed(group)) {
      stream_down(call, group, first, stop, totals);
    } else {
      tile_down<Tile>(call, group, first, stop, memory, totals);
    }
  }
  write_y(call, first, stop, totals);
  return true;
}

void run_task(void* state, size_t index) {
  Call& call = *static_cast<Call*>(state);
  int64_t task = static_cast<int64_t>(index);
  bool done = true;
  if (task < call.prepare_tasks) {
    prepare(call, task);
    arrive(&call.prepared);
    return;
  }
  task -= call.prepare_tasks;
  if (task < call.gate_tasks) {
    wait_for(&call.prepared, static_cast<int32_t>(call.prepare_tasks));
    done = gate(call, task);
    if (!done) __atomic_store_n(&call.no_memory, 1, __ATOMIC_RELAXED);
    arrive(&call.gated);
    return;
  }
  wait_for(&call.gated, static_cast<int32_t>(call.gate_tasks));
  task -= call.gate_tasks;
#if K25_HAS_DOT_BF16
  done = call.use_pairs ? down<PairTile>(call, task) : down<FloatTile>(call, task);
#else
  done = down<FloatTile>(call, task);
#endif
  if (!done) __atomic_store_n(&call.no_memory, 1, __ATOMIC_RELAXED);
}

bool take_memory(Call& call, Scratch& scratch) {
  bool streamed = false, tiled = false;
  for (int64_t index = 0; index < call.groups.group_count; ++index) {
    (is_streamed(call.groups.groups[index]) ? streamed : tiled) = true;
  }
  const bool words = streamed || (tiled && !call.use_pairs), pairs = tiled && call.use_pairs;
  call.x_words_stride = padded(call.hidden, kWordChunk);
  call.x_pairs_stride = padded(call.hidden, kGroupChunk);
  const int64_t words_bytes = words ? 4 * padded(call.intermediate, kWordChunk) : 0;
  const int64_t pairs_bytes = pairs ? 2 * padded(call.intermediate, kGroupChunk) : 0;
  call.inner_bytes = padded(words_bytes > pairs_bytes ? words_bytes : pairs_bytes, 64);
  const size_t tokens = static_cast<size_t>(call.tokens), pair_count = static_cast<size_t>(call.groups.pair_count);
  const size_t inner_bytes = pair_count * static_cast<size_t>(call.inner_bytes);
  call.x_words = nullptr;
  call.x_pairs = nullptr;
  if (words) call.x_words = static_cast<float*>(scratch.take(4 * tokens * static_cast<size_t>(call.x_words_stride)));
  if (pairs) call.x_pairs = static_cast<uint16_t*>(scratch.take(2 * tokens * static_cast<size_t>(call.x_pairs_stride)));
  call.inner = static_cast<char*>(scratch.take(inner_bytes));
  if ((words && call.x_words == nullptr) || (pairs && call.x_pairs == nullptr) || call.inner == nullptr) return false;
  const bool fits = call.intermediate % kWordChunk == 0 && (!pairs || call.intermediate % kGroupChunk == 0);
  if (!fits) memset(call.inner, 0, inner_bytes);  // the padding
  return true;
}

}  // namespace

k25_status moe_dispatch(const k25_tensor inputs[6], const k25_moe_dispatch_attributes* attributes,
                        const k25_tensor outputs[1], const k25_cpu_options* options, k25_message message) {
  Scratch scratch;
  Call call{};
  call.x = inputs[0].data;
  call.y = outputs[0].data;
  call.is_float = inputs[0].dtype == K25_FLOAT32;
  call.tokens = inputs[0].dims[0];
  call.hidden = inputs[0].dims[1];
  call.intermediate = attributes->intermediate_size;
  call.words_per_group = attributes->group_size / 8;
  call.use_pairs = K25_HAS_DOT_BF16 && options->mode == K25_FAST && attributes->group_size % 32 == 0;
  const k25_status status = group_by_expert(inputs, *attributes, scratch, &call.groups, message);
  if (status != K25_OK) return status;
  if (!take_memory(call, scratch)) return fail(K25_FAILED, message, "k25.MoEDispatch: out of memory");
  call.down_rows = call.groups.most_pairs <= kStreamTokens ? kRows : kMaxDownRows;
  call.prepare_tasks = (call.tokens + kPrepareTokens - 1) / kPrepareTokens;
  call.gate_blocks = (call.intermediate + kRows - 1) / kRows;
  call.gate_tasks = call.gate_blocks * call.groups.group_count;
  const int64_t down_tasks = (call.hidden + call.down_rows - 1) / call.down_rows;
  run_in_order(options->parallel, run_task, &call,
               static_cast<size_t>(call.prepare_tasks + call.gate_tasks + down_tasks));
  if (call.no_memory != 0) return fail(K25_FAILED, message, "k25.MoEDispatch: out of memory");
  return K25_OK;
}

}  // namespace K25_ISA_NS
}  // namespace k25
