// k25.Linear on a CPU: y = x W^T, W bfloat16 [out, in] as stored, read in place.
//
// One token: rows stream by once, float32 products. More: blocks of rows that stay in the cache, with bfloat16 dot products
// where the mode and the path allow. Not for narrow matrices, which cost little: a router has one output for each expert, and
// chooses by small differences. One parallel region: activations into the order of the weights, then blocks of rows.
#include "bf16_rows.h"
#include "checks.h"
#include "kernels.h"
#include "parallel.h"
#include "scratch.h"

namespace k25 {
namespace K25_ISA_NS {
namespace {

constexpr int kPanelTokens = 64;
constexpr int kMostRows = 32;        // of a task with many tokens
constexpr int64_t kNarrow = 384;     // outputs up to which products are float32 in any mode
constexpr int kPrepareTokens = 8;    // in a task
constexpr int64_t kRowsAtOnce = 64;  // of sums that are not written as they are

struct Call {
  const void* x;
  const uint16_t* weight;
  void* y;
  bool is_float, use_pairs, is_streamed;
  int64_t tokens, in, out, rows, x_bytes;
  char* prepared_x;  // [tokens] rows of x_bytes
  int32_t no_memory;
};

void prepare(const Call& call, int64_t first, int64_t stop) {
  for (int64_t token = first; token < stop; ++token) {
    const void* from = static_cast<const char*>(call.x) + token * call.in * (call.is_float ? 4 : 2);
    char* to = call.prepared_x + token * call.x_bytes;
    if (call.use_pairs) {
      to_pair_order(from, call.is_float, call.in, reinterpret_cast<uint16_t*>(to));
    } else {
      to_split_order(from, call.is_float, call.in, reinterpret_cast<float*>(to));
    }
  }
}

template <class T>
void pointers(const Call& call, int64_t first, int tokens, const T** x) {
  for (int m = 0; m < tokens; ++m) x[m] = reinterpret_cast<const T*>(call.prepared_x + (first + m) * call.x_bytes);
}

void write(const Call& call, int64_t token, int64_t row, float value) {
  const int64_t at = token * call.out + row;
  if (call.is_float) {
    static_cast<float*>(call.y)[at] = value;
  } else {
    static_cast<uint16_t*>(call.y)[at] = bf16_of(value);
  }
}

void stream(const Call& call, int64_t first, int64_t stop) {
  const float* x[1] = {reinterpret_cast<const float*>(call.prepared_x)};
  if (call.is_float) {
    return stream_rows<1>(call.weight + first * call.in, stop - first, call.in, x, nullptr,
                          static_cast<float*>(call.y) + first);
  }
  float found[kRowsAtOnce];
  for (int64_t row = first; row < stop; row += kRowsAtOnce) {
    const int64_t count = stop - row < kRowsAtOnce ? stop - row : kRowsAtOnce;
    stream_rows<1>(call.weight + row * call.in, count, call.in, x, nullptr, found);
    for (int64_t i = 0; i < count; ++i) write(call, 0, row + i, found[i]);
  }
}

template <class Rows>
bool multiply(const Call& call, int64_t first, int64_t stop) {
  const typename Rows::Activation* x[kPanelTokens];
  const int rows = static_cast<int>(stop - first);
  float* sums = static_cast<float*>(thread_scratch(sizeof(float) * kPanelTokens * kMostRows * W));
  if (sums == nullptr) return false;
  for (int64_t token = 0; token < call.tokens; token += kPanelTokens) {
    const int tokens = static_cast<int>(call.tokens - token < kPanelTokens ? call.tokens - token : kPanelTokens);
    pointers(call, token, tokens, x);
    multiply_block<Rows>(call.weight + first * call.in, rows, call.in, x, tokens, sums);
    for (int m = 0; m < tokens; ++m) {
      for (int row = 0; row < rows; ++row) {
        write(call, token + m, first + row, sum(load(sums + (static_cast<int64_t>(m) * rows + row) * W)));
      }
    }
  }
  return true;
}

void prepare_task(void* state, size_t index) {
  const Call& call = *static_cast<Call*>(state);
  const int64_t first = static_cast<int64_t>(index) * kPrepareTokens;
  prepare(call, first, first + kPrepareTokens < call.tokens ? first + kPrepareTokens : call.tokens);
}

void rows_task(void* state, size_t index) {
  Call& call = *static_cast<Call*>(state);
  const int64_t first = static_cast<int64_t>(index) * call.rows;
  const int64_t stop = first + call.rows < call.out ? first + call.rows : call.out;
  if (call.is_streamed) return stream(call, first, stop);
#if K25_HAS_DOT_BF16
  const bool done = call.use_pairs ? multiply<PairRows>(call, first, stop) : multiply<FloatRows>(call, first, stop);
#else
  const bool done = multiply<FloatRows>(call, first, stop);
#endif
  if (!done) __atomic_store_n(&call.no_memory, 1, __ATOMIC_RELAXED);
}

}  // namespace

k25_status linear(const k25_tensor inputs[2], const k25_tensor outputs[1], const k25_cpu_options* options,
                  k25_message message) {
  Scratch scratch;
  Call call{};
  call.x = inputs[0].data;
  call.weight = static_cast<const uint16_t*>(inputs[1].data);
  call.y = outputs[0].data;
  call.is_float = inputs[0].dtype == K25_FLOAT32;
  call.out = inputs[1].dims[0];
  call.in = inputs[1].dims[1];
  call.tokens = 1;
  for (int axis = 0; axis + 1 < inputs[0].rank; ++axis) call.tokens *= inputs[0].dims[axis];
  call.is_streamed = call.tokens == 1;
  call.use_pairs = K25_HAS_DOT_BF16 && options->mode == K25_FAST && !call.is_streamed && call.out > kNarrow;
  call.x_bytes = padded(call.use_pairs ? 2 * padded(call.in, kPairChunk) : 4 * padded(call.in, kSplitChunk), 64);
  call.prepared_x = static_cast<char*>(scratch.take(static_cast<size_t>(call.tokens * call.x_bytes)));
  if (call.prepared_x == nullptr) return fail(K25_FAILED, message, "k25.Linear: out of memory");
  call.rows = call.is_streamed ? pieces_in_task(options->parallel, call.out, 2 * call.in) : kMostRows;
  const Phase phases[] = {
      {prepare_task, static_cast<size_t>((call.tokens + kPrepareTokens - 1) / kPrepareTokens)},
      {rows_task, static_cast<size_t>((call.out + call.rows - 1) / call.rows)},
  };
  run_phases(options->parallel, phases, &call);
  return call.no_memory == 0 ? K25_OK : fail(K25_FAILED, message, "k25.Linear: out of memory");
}

}  // namespace K25_ISA_NS
}  // namespace k25
