// One call of k25.MLA on the CPU: its sizes, its values checked, where a position lies in the cache, rotations.
#ifndef K25_MLA_CPU_CALL_H
#define K25_MLA_CPU_CALL_H

#include <math.h>

#include "attention_softmax.h"
#include "attention_pack.h"
#include "checks.h"
#include "parallel.h"
#include "scratch.h"

namespace k25 {
namespace K25_ISA_NS {

struct MlaCall {
  size_t tokens, heads, nope, rope, v, rank, width;
  size_t sequences, table_width, blocks, block_size;
  float scale_log2;
  Floats q, latent, cache, out;  // cache is the one that is written
  const uint16_t* kv_b;
  const int32_t *positions, *query_start, *block_table;
  const float* inv_freq;
  const float *cosines, *sines;  // [tokens][rope / 2]
  const int32_t* sequence_of;    // [tokens]
  bool pairs;                    // bf16 dot products
  const k25_parallel* parallel;
};

K25_INLINE MlaCall mla_call(const k25_tensor inputs[7], const k25_mla_attributes& attributes,
                            const k25_tensor outputs[2], const k25_cpu_options* options) {
  MlaCall call{};
  const k25_tensor &cache = inputs[2], &table = inputs[6];
  call.tokens = static_cast<size_t>(inputs[0].dims[0]);
  call.heads = static_cast<size_t>(attributes.num_heads);
  call.nope = static_cast<size_t>(attributes.qk_nope_head_dim);
  call.rope = 2 * static_cast<size_t>(attributes.inv_freq_count);
  call.v = static_cast<size_t>(attributes.v_head_dim);
  call.width = static_cast<size_t>(cache.dims[2]);
  call.rank = call.width - call.rope;
  call.sequences = static_cast<size_t>(table.dims[0]);
  call.table_width = static_cast<size_t>(table.dims[1]);
  call.blocks = static_cast<size_t>(cache.dims[0]);
  call.block_size = static_cast<size_t>(cache.dims[1]);
  call.scale_log2 = attributes.softmax_scale * kLog2E;
  call.q = floats_of(inputs[0]);
  call.latent = floats_of(inputs[1]);
  call.cache = floats_of(outputs[1]);
  call.out = floats_of(outputs[0]);
  call.kv_b = static_cast<const uint16_t*>(inputs[3].data);
  call.positions = static_cast<const int32_t*>(inputs[4].data);
  call.query_start = static_cast<const int32_t*>(inputs[5].data);
  call.block_table = static_cast<const int32_t*>(table.data);
  call.inv_freq = attributes.inv_freq;
  call.pairs = K25_HAS_DOT_BF16 && options->mode == K25_FAST && call.cache.bfloat16;
  call.parallel = options->parallel;
  return call;
}

K25_INLINE size_t first_token(const MlaCall& call, size_t sequence) {
  return static_cast<size_t>(call.query_start[sequence]);
}
K25_INLINE size_t context_of(const MlaCall& call, size_t token) {
  return static_cast<size_t>(call.positions[token]) + 1;
}

// The first element of a position's row in the cache.
K25_INLINE size_t row_offset(const MlaCall& call, size_t sequence, size_t position) {
  const int32_t block = call.block_table[sequence * call.table_width + position / call.block_size];
  return (static_cast<size_t>(block) * call.block_size + position % call.block_size) * call.width;
}

static k25_status check_query_start(const MlaCall& call, k25_message message) {
  const int32_t* starts = call.query_start;
  const size_t last = call.sequences;
  if (starts[0] != 0 || starts[last] < 0 || static_cast<size_t>(starts[last]) != call.tokens) {
    return fail(K25_INVALID, message,
                "k25.MLA: input query_start: expected the first value 0 and the last %zu (tokens), found %d and %d",
                call.tokens, starts[0], starts[last]);
  }
  for (size_t sequence = 0; sequence < last; ++sequence) {
    if (starts[sequence + 1] < starts[sequence]) {
      return fail(K25_INVALID, message,
                  "k25.MLA: input query_start: expected ascending values, found %d after %d at %zu",
                  starts[sequence + 1], starts[sequence], sequence + 1);
    }
  }
  return K25_OK;
}

static k25_status check_sequence(const MlaCall& call, size_t sequence, k25_message message) {
  const size_t limit = call.table_width * call.block_size;
  size_t longest = 0;
  for (size_t token = first_token(call, sequence); token < first_token(call, sequence + 1); ++token) {
    const int32_t position = call.positions[token];
    if (position < 0 || static_cast<size_t>(position) >= limit) {
      return fail(K25_INVALID, message,
                  "k25.MLA: input positions, token %zu: expected 0 to %zu (block_table has %zu blocks of %zu for a "
                  "sequence), found %d",
                  token, limit - 1, call.table_width, call.block_size, position);
    }
    longest = larger(longest, context_of(call, token));
  }
  for (size_t entry = 0; entry < divided_up(longest, call.block_size); ++entry) {
    const int32_t block = call.block_table[sequence * call.table_width + entry];
    if (block < 0 || static_cast<size_t>(block) >= call.blocks) {
      return fail(K25_INVALID, message,
                  "k25.MLA: input block_table, sequence %zu, entry %zu: expected 0 to %zu (cache has %zu blocks), "
                  "found %d",
                  sequence, entry, call.blocks - 1, call.blocks, block);
    }
  }
  return K25_OK;
}

// Every value that indexes memory. Entries of the block table that no token reaches are not looked at.
static k25_status check_values(const MlaCall& call, k25_message message) {
  k25_status status = check_query_start(call, message);
  for (size_t sequence = 0; status == K25_OK && sequence < call.sequences; ++sequence) {
    status = check_sequence(call, sequence, message);
  }
  return status;
}

// Pairs (a, b) -> (a cos - b sin, a sin + b cos) of one token; `to` may be `from`.
K25_INLINE void rotate(const MlaCall& call, size_t token, const float* from, float* to) {
  const float *cosine = call.cosines + token * (call.rope / 2), *sine = call.sines + token * (call.rope / 2);
  for (size_t i = 0; i < call.rope / 2; ++i) {
    const float a = from[2 * i], b = from[2 * i + 1];
    to[2 * i] = a * cosine[i] - b * sine[i];
    to[2 * i + 1] = a * sine[i] + b * cosine[i];
  }
}

constexpr size_t kRotationTokens = 32;  // of one task

struct Rotations {
  const MlaCall* call;
  float *cosines, *sines;
};

// The angle is rounded to float32, as the reference rounds it, its sine and cosine once more.
static void rotation_task(void* state, size_t index) {
  const Rotations& rotations = *static_cast<const Rotations*>(state);
  const MlaCall& call = *rotations.call;
  const size_t half = call.rope / 2, first = index * kRotationTokens;
  for (size_t token = first; token < smaller(first + kRotationTokens, call.tokens); ++token) {
    for (size_t i = 0; i < half; ++i) {
      const double angle = static_cast<float>(call.positions[token]) * call.inv_freq[i];
      rotations.cosines[token * half + i] = static_cast<float>(::cos(angle));
      rotations.sines[token * half + i] = static_cast<float>(::sin(angle));
    }
  }
}

struct NewRows {
  Rotations* rotations;
  float* row;  // space for one
};

static size_t rotation_tasks(const MlaCall& call) { return divided_up(call.tokens, kRotationTokens); }

// The new rows, latent then rotated key, in the cache's dtype. One thread: it is a copy, and if two tokens share a
// place against the rules, the later wins, always.
static void write_new_rows(const MlaCall& call, float* row) {
  for (size_t token = 0; token < call.tokens; ++token) {
    read_floats(call.latent, token * call.width, call.width, row);
    rotate(call, token, row + call.rank, row + call.rank);
    const size_t sequence = static_cast<size_t>(call.sequence_of[token]);
    write_floats(call.cache, row_offset(call, sequence, static_cast<size_t>(call.positions[token])), call.width, row);
  }
}

// Rotations and new rows of few tokens.
static void write_new_rows(const NewRows& rows) {
  const MlaCall& call = *rows.rotations->call;
  for (size_t index = 0; index < rotation_tasks(call); ++index) rotation_task(rows.rotations, index);
  write_new_rows(call, rows.row);
}

// `count` values from `first` on of the query of one head of a token.
K25_INLINE void read_q(const MlaCall& call, size_t token, size_t head, size_t first, size_t count, float* to) {
  read_floats(call.q, (token * call.heads + head) * (call.nope + call.rope) + first, count, to);
}

// What is not rotated of the query of one head, in units of log2: [nope].
K25_INLINE void read_nope(const MlaCall& call, size_t token, size_t head, float* to) {
  read_q(call, token, head, 0, call.nope, to);
  for (size_t i = 0; i < call.nope; ++i) to[i] *= call.scale_log2;
}

// The rest, rotated, in units of log2: [rope].
K25_INLINE void read_rope(const MlaCall& call, size_t token, size_t head, float* to) {
  read_q(call, token, head, call.nope, call.rope, to);
  rotate(call, token, to, to);
  for (size_t i = 0; i < call.rope; ++i) to[i] *= call.scale_log2;
}

constexpr int kLinesAtOnce = 18;  // a tile has some 140 register tiles and up to 2304 lines

// Asks for the rows of the tile that comes next, a few cache lines at a time between register tiles.
struct NextTile {
  const MlaCall* call;
  size_t sequence, position, end;
  const char* at = nullptr;
  const char* row_end = nullptr;
  void operator()() {
    for (int line = 0; line < kLinesAtOnce; ++line, at += 64) {
      if (at >= row_end) {
        if (position >= end) return;
        at = address_of(call->cache, row_offset(*call, sequence, position++));
        row_end = at + call->width * item_size(call->cache);
      }
      __builtin_prefetch(at, 0, 3);
    }
  }
};

// Positions [first, first + rows) of a sequence as float32 [rows][stride].
K25_INLINE void read_rows(const MlaCall& call, size_t sequence, size_t first, size_t rows, float* to, size_t stride) {
  for (size_t row = 0; row < rows; ++row) {
    read_floats(call.cache, row_offset(call, sequence, first + row), call.width, to + row * stride);
  }
}

}  // namespace K25_ISA_NS
}  // namespace k25
#endif
