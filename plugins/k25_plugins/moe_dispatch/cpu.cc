// k25.MoEDispatch on a CPU. Words and scales are read in place; experts that nobody chose are not touched.
//
// One parallel region of three phases: activations into the order of the words; gate and up of (expert, block of rows); down
// of a block of rows over all experts, by ascending expert, so that each output has one writer and one order of sums.
// An expert of few tokens is streamed (int4_stream.h), one of many is unpacked tile by tile (int4_tile.h).
//
// Legend: T tokens, H hidden, I expert width, P (token, expert) pairs.
#include <initializer_list>

#include "checks.h"
#include "expert_groups.h"
#include "int4_fixed.h"
#include "int4_tile.h"
#include "kernels.h"
#include "parallel.h"
#include "scratch.h"

namespace k25 {
namespace K25_ISA_NS {
namespace {

constexpr int kRows = 16;             // of gate and up in a task
constexpr int kDownRows = kTileRows;  // of down in a task
constexpr int kPrepareTokens = 8;     // in a task

int64_t divided_up(int64_t size, int64_t by) { return (size + by - 1) / by; }

// How activations lie: for float32 (int4_order.h: word order), for bfloat16 dot products (group order), as 16-bit numbers
// (int4_fixed.h).
enum Form { kWords, kPairs, kFixed, kForms };

int64_t form_bytes(Form form, int64_t size) {
#if K25_HAS_FIXED
  if (form == kFixed) return padded(size, kFixedChunk) / kFixedChunk * static_cast<int64_t>(sizeof(FixedChunk));
#endif
  return form == kPairs ? 2 * padded(size, kGroupChunk) : 4 * padded(size, kWordChunk);
}

void to_form(Form form, const void* from, bool is_float, int64_t size, char* to) {
#if K25_HAS_FIXED
  if (form == kFixed) return to_fixed_order(from, is_float, size, reinterpret_cast<FixedChunk*>(to));
#endif
  if (form == kPairs) return to_group_order(from, is_float, size, reinterpret_cast<uint16_t*>(to));
  to_word_order(from, is_float, size, reinterpret_cast<float*>(to));
}

struct Call {
  const void* x;
  void* y;
  bool is_float;
  Form few, many;  // for experts of few and of many tokens
  int64_t tokens, hidden, intermediate, words_per_group;
  ExpertGroups groups;

  char* forms[kForms];  // x: [T] rows of form_bytes, or null
  char* inner;          // [P] rows of inner_bytes, in the form of the expert's group
  int64_t inner_bytes;

  int64_t gate_blocks, down_blocks;          // of an expert; of all
  int64_t gate_task_blocks, down_task_blocks;  // that follow one another in a task
  int32_t no_memory;  // set by any task
};

bool is_streamed(const ExpertGroup& group) { return group.pair_count <= kStreamTokens; }
Form form_of(const Call& call, const ExpertGroup& group) { return is_streamed(group) ? call.few : call.many; }

template <class T>
T* x_row(const Call& call, Form form, int64_t token) {
  return reinterpret_cast<T*>(call.forms[form] + token * form_bytes(form, call.hidden));
}
template <class T>
T* inner_row(const Call& call, int64_t pair) {
  return reinterpret_cast<T*>(call.inner + pair * call.inner_bytes);
}

void prepare(Call& call, int64_t block) {
  const int64_t stop = (block + 1) * kPrepareTokens < call.tokens ? (block + 1) * kPrepareTokens : call.tokens;
  const int64_t row_bytes = call.hidden * (call.is_float ? 4 : 2);
  for (int64_t token = block * kPrepareTokens; token < stop; ++token) {
    const void* row = static_cast<const char*>(call.x) + token * row_bytes;
    for (Form form : {kWords, kPairs, kFixed}) {
      if (call.forms[form] != nullptr) to_form(form, row, call.is_float, call.hidden, x_row<char>(call, form, token));
    }
  }
}

// inner = silu(gate) * up of rows [first, first + count) of a pair, in the form in which down reads it.
void write_inner(Call& call, const ExpertGroup& group, int64_t pair, int64_t first, int count, const float* gate,
                 const float* up) {
  const Form form = form_of(call, group);
  alignas(64) float values[kRows];
  for (int row = 0; row < kRows; row += W) store(values + row, silu(load(gate + row)) * load(up + row));
#if K25_HAS_FIXED
  if (form == kFixed) return write_fixed(values, first, inner_row<FixedChunk>(call, pair));
#endif
  for (int row = 0; row < count; ++row) {
    if (form == kPairs) {
      inner_row<uint16_t>(call, pair)[group_order(first + row)] = bf16_of(values[row]);
    } else {
      inner_row<float>(call, pair)[word_order(first + row)] = values[row];
    }
  }
}

// Dot products of rows with the activations of a streamed group, row(m) of which lies in the form for few tokens.
template <int R, class Row>
K25_INLINE void stream_rows([[maybe_unused]] const Call& call, int tokens, const PackedRows<R>& rows, Row row, float* found) {
#if K25_HAS_FIXED
  if (call.few == kFixed) {
    const FixedChunk* x[kStreamTokens];
    for (int m = 0; m < tokens; ++m) x[m] = reinterpret_cast<const FixedChunk*>(row(m));
    return fixed_rows_of<R>(tokens, rows, x, found);
  }
#endif
  const float* x[kStreamTokens];
  for (int m = 0; m < tokens; ++m) x[m] = reinterpret_cast<const float*>(row(m));
  int4_rows_of<R>(tokens, rows, x, found);
}

// Gate and up of few tokens, a row of each at a time: they share the loads of the activations.
void stream_gate(Call& call, const ExpertGroup& group, int64_t first, int64_t stop) {
  const int tokens = static_cast<int>(group.pair_count), count = static_cast<int>(stop - first);
  const auto x = [&](int m) { return x_row<char>(call, call.few, call.groups.tokens[group.first_pair + m]); };
  const bool is_end = stop == call.intermediate && &group + 1 < call.groups.groups + call.groups.group_count;
  const ExpertGroup& follows = is_end ? (&group)[1] : group;
  PackedRows<2> rows{};
  rows.row_words = call.hidden / 8;
  rows.words_per_group = call.words_per_group;
  rows.step = 1;
  rows.count = count;
  for (int side = 0; side < 2; ++side) {
    const PackedMatrix& matrix = side == 0 ? group.gate : group.up;
    const PackedMatrix& next = side == 0 ? follows.gate : follows.up;
    rows.start(side, matrix.words, matrix.scales, first);
    rows.go_on(side, next.words, next.scales, is_end ? 0 : stop);
    rows.out_at[side] = side * kRows;
  }
  static_assert(kStreamRows == 2 * kRows, "gate and up of a task");
  float found[kStreamTokens * kStreamRows];
  if (count < kRows) memset(found, 0, sizeof found);
  stream_rows<2>(call, tokens, rows, x, found);
  for (int m = 0; m < tokens; ++m) {
    const float* gates = found + m * kStreamRows;
    write_inner(call, group, group.first_pair + m, first, count, gates, gates + kRows);
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
      memory.x[m] = x_row<const typename Tile::Activation>(call, call.many, call.groups.tokens[group.first_pair + pair + m]);
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

bool gate(Call& call, int64_t block) {
  const ExpertGroup& group = call.groups.groups[block / call.gate_blocks];
  const int64_t first = block % call.gate_blocks * kRows;
  const int64_t stop = first + kRows < call.intermediate ? first + kRows : call.intermediate;
  if (is_streamed(group)) {
    stream_gate(call, group, first, stop);
    return true;
  }
#if K25_HAS_DOT_BF16
  if (call.many == kPairs) return tile_gate<PairTile>(call, group, first, stop);
#endif
  return tile_gate<FloatTile>(call, group, first, stop);
}

// totals [T][kDownRows] += weight * down(inner), for the rows [first, stop).
void stream_down(const Call& call, const ExpertGroup& group, int64_t first, int64_t stop, float* totals) {
  const int tokens = static_cast<int>(group.pair_count);
  const auto x = [&](int m) { return inner_row<char>(call, group.first_pair + m); };
  const int count = static_cast<int>(stop - first);  // even: hidden is a multiple of 8
  const bool is_last = &group == call.groups.groups + call.groups.group_count - 1;
  const PackedMatrix& follows = is_last ? call.groups.groups[0].down : (&group)[1].down;
  PackedRows<2> rows{};
  rows.row_words = call.intermediate / 8;
  rows.words_per_group = call.words_per_group;
  rows.step = 2;
  rows.count = count / 2;
  for (int side = 0; side < 2; ++side) {
    rows.start(side, group.down.words, group.down.scales, first + side);
    rows.go_on(side, follows.words, follows.scales, (is_last ? stop : first) + side);
    rows.out_at[side] = side;
  }
  static_assert(kStreamRows == kDownRows, "rows of a task");
  float found[kStreamTokens * kStreamRows];
  stream_rows<2>(call, tokens, rows, x, found);
  for (int m = 0; m < tokens; ++m) {
    const int64_t pair = group.first_pair + m;
    float* total = totals + call.groups.tokens[pair] * kDownRows;
    for (int row = 0; row < count; ++row) {
      total[row] += call.groups.weights[pair] * found[m * kStreamRows + row];
    }
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
    for (int m = 0; m < tokens; ++m) memory.x[m] = inner_row<const typename Tile::Activation>(call, group.first_pair + start + m);
    multiply_matrices<Tile>(matrices, 1, first, rows, call.intermediate, call.words_per_group, memory, tokens);
    for (int m = 0; m < tokens; ++m) {
      const int64_t pair = group.first_pair + start + m;
      float* total = totals + call.groups.tokens[pair] * kDownRows;
      for (int row = 0; row < rows; ++row) {
        total[row] += call.groups.weights[pair] * sum(load(memory.sums.at(m, row)));
      }
    }
  }
}

void write_y(const Call& call, int64_t first, int64_t stop, const float* totals) {
  for (int64_t token = 0; token < call.tokens; ++token) {
    const float* total = totals + token * kDownRows;
    const int64_t at = token * call.hidden + first;
    if (call.is_float) {
      memcpy(static_cast<float*>(call.y) + at, total, sizeof(float) * static_cast<size_t>(stop - first));
    } else {
      for (int64_t row = 0; row < stop - first; ++row) static_cast<uint16_t*>(call.y)[at + row] = bf16_of(total[row]);
    }
  }
}

template <class Tile>
bool down(Call& call, int64_t block) {
  const int64_t first = block * kDownRows;
  const int64_t stop = first + kDownRows < call.hidden ? first + kDownRows : call.hidden;
  const size_t total_bytes = sizeof(float) * static_cast<size_t>(call.tokens) * kDownRows;
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

void note(Call& call, bool had_memory) {
  if (!had_memory) __atomic_store_n(&call.no_memory, 1, __ATOMIC_RELAXED);
}

void prepare_task(void* state, size_t index) { prepare(*static_cast<Call*>(state), static_cast<int64_t>(index)); }

void gate_task(void* state, size_t index) {
  Call& call = *static_cast<Call*>(state);
  const int64_t first = static_cast<int64_t>(index) * call.gate_task_blocks, all = call.gate_blocks * call.groups.group_count;
  const int64_t stop = first + call.gate_task_blocks < all ? first + call.gate_task_blocks : all;
  for (int64_t block = first; block < stop; ++block) note(call, gate(call, block));
}

void down_task(void* state, size_t index) {
  Call& call = *static_cast<Call*>(state);
  const int64_t first = static_cast<int64_t>(index) * call.down_task_blocks;
  const int64_t stop = first + call.down_task_blocks < call.down_blocks ? first + call.down_task_blocks : call.down_blocks;
  for (int64_t block = first; block < stop; ++block) {
#if K25_HAS_DOT_BF16
    if (call.many == kPairs) {
      note(call, down<PairTile>(call, block));
      continue;
    }
#endif
    note(call, down<FloatTile>(call, block));
  }
}

// Blocks in a task: several where they only stream by, one where there is more to compute.
void share_out(Call& call, const k25_parallel* parallel) {
  call.gate_blocks = divided_up(call.intermediate, kRows);
  call.down_blocks = divided_up(call.hidden, kDownRows);
  call.gate_task_blocks = call.down_task_blocks = 1;
  for (int64_t index = 0; index < call.groups.group_count; ++index) {
    if (!is_streamed(call.groups.groups[index])) return;
  }
  const int64_t count = call.groups.group_count;
  if (count == 0) return;
  call.gate_task_blocks = pieces_in_task(parallel, call.gate_blocks * count, kRows * call.hidden);
  call.down_task_blocks = pieces_in_task(parallel, call.down_blocks, kDownRows * call.intermediate / 2 * count);
}

bool take_memory(Call& call, Scratch& scratch) {
  bool wanted[kForms] = {};
  for (int64_t index = 0; index < call.groups.group_count; ++index) {
    wanted[form_of(call, call.groups.groups[index])] = true;
  }
  for (Form form : {kWords, kPairs, kFixed}) {
    if (!wanted[form]) continue;
    call.forms[form] = static_cast<char*>(scratch.take(static_cast<size_t>(call.tokens * form_bytes(form, call.hidden))));
    if (call.forms[form] == nullptr) return false;
    const int64_t inner_bytes = padded(form_bytes(form, call.intermediate), 64);
    if (inner_bytes > call.inner_bytes) call.inner_bytes = inner_bytes;
  }
  const size_t inner_bytes = static_cast<size_t>(call.groups.pair_count * call.inner_bytes);
  call.inner = static_cast<char*>(scratch.take(inner_bytes));
  if (call.inner == nullptr) return false;
  const bool fits = call.intermediate % kWordChunk == 0 && (!wanted[kPairs] || call.intermediate % kGroupChunk == 0);
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
  const bool fast = options->mode == K25_FAST;
  call.few = K25_HAS_FIXED && fast ? kFixed : kWords;
  call.many = K25_HAS_DOT_BF16 && fast && attributes->group_size % 32 == 0 ? kPairs : kWords;
  const k25_status status = group_by_expert(inputs, *attributes, scratch, &call.groups, message);
  if (status != K25_OK) return status;
  if (!take_memory(call, scratch)) return fail(K25_FAILED, message, "k25.MoEDispatch: out of memory");
  share_out(call, options->parallel);
  const Phase phases[] = {
      {prepare_task, static_cast<size_t>(divided_up(call.tokens, kPrepareTokens))},
      {gate_task, static_cast<size_t>(divided_up(call.gate_blocks * call.groups.group_count, call.gate_task_blocks))},
      {down_task, static_cast<size_t>(divided_up(call.down_blocks, call.down_task_blocks))},
  };
  run_phases(options->parallel, phases, &call);
  if (call.no_memory != 0) return fail(K25_FAILED, message, "k25.MoEDispatch: out of memory");
  return K25_OK;
}

}  // namespace K25_ISA_NS
}  // namespace k25
