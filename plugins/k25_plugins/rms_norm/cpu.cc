// k25.RMSNorm on a CPU: x / sqrt(mean(x^2) + eps), rounded to the dtype of x, times the bfloat16 weight. Float32 in any mode.
#include <math.h>

#include "kernels.h"
#include "parallel.h"
#include "simd.h"

namespace k25 {
namespace K25_ISA_NS {
namespace {

constexpr int64_t kTaskElements = 16384;  // at least, in a task: smaller ones cost more than they take
constexpr int kSums = 4;

struct Call {
  const void* x;
  const uint16_t* weight;
  void* y;
  bool is_float;
  int64_t rows, size, task_rows;
  float eps;
};

// The first `count` lanes from element `at`; the others are 0.
K25_INLINE F32 values_at(const float* from, int64_t at, int count) {
  return count == W ? load(from + at) : load_partial(from + at, count);
}
K25_INLINE F32 values_at(const uint16_t* from, int64_t at, int count) {
  if (count == W) return load_bf16(from + at);
  uint16_t lanes[W] = {};
  for (int lane = 0; lane < count; ++lane) lanes[lane] = from[at + lane];
  return load_bf16(lanes);
}

K25_INLINE void write_at(float* to, int64_t at, int count, F32 normed, F32 weight) {
  const F32 value = normed * weight;
  if (count == W) return store(to + at, value);
  store_partial(to + at, value, count);
}
K25_INLINE void write_at(uint16_t* to, int64_t at, int count, F32 normed, F32 weight) {
  uint16_t lanes[W];
  store_bf16(lanes, normed);
  store_bf16(lanes, load_bf16(lanes) * weight);
  memcpy(to + at, lanes, static_cast<size_t>(count) * sizeof lanes[0]);
}

// Lane by lane in kSums sums, so the order is that of the row alone.
template <class T>
float mean_square(const T* x, int64_t size) {
  F32 sums[kSums] = {};
  int64_t at = 0;
  for (; at + kSums * W <= size; at += kSums * W) {
    for (int part = 0; part < kSums; ++part) {
      const F32 value = values_at(x, at + part * W, W);
      sums[part] = fma(value, value, sums[part]);
    }
  }
  for (; at < size; at += W) {
    const F32 value = values_at(x, at, static_cast<int>(size - at < W ? size - at : W));
    sums[0] = fma(value, value, sums[0]);
  }
  return sum((sums[0] + sums[1]) + (sums[2] + sums[3])) / static_cast<float>(size);
}

template <class T>
void norm_row(const Call& call, int64_t row) {
  const T* x = static_cast<const T*>(call.x) + row * call.size;
  T* y = static_cast<T*>(call.y) + row * call.size;
  const F32 scale = set1(1.0f / sqrtf(mean_square(x, call.size) + call.eps));
  for (int64_t at = 0; at < call.size; at += W) {
    const int count = static_cast<int>(call.size - at < W ? call.size - at : W);
    write_at(y, at, count, values_at(x, at, count) * scale, values_at(call.weight, at, count));
  }
}

void rows_task(void* state, size_t index) {
  const Call& call = *static_cast<Call*>(state);
  const int64_t first = static_cast<int64_t>(index) * call.task_rows;
  const int64_t stop = first + call.task_rows < call.rows ? first + call.task_rows : call.rows;
  for (int64_t row = first; row < stop; ++row) call.is_float ? norm_row<float>(call, row) : norm_row<uint16_t>(call, row);
}

}  // namespace

k25_status rms_norm(const k25_tensor inputs[2], const k25_rms_norm_attributes* attributes, const k25_tensor outputs[1],
                    const k25_cpu_options* options, k25_message) {
  Call call{};
  call.x = inputs[0].data;
  call.weight = static_cast<const uint16_t*>(inputs[1].data);
  call.y = outputs[0].data;
  call.is_float = inputs[0].dtype == K25_FLOAT32;
  call.size = inputs[1].dims[0];
  call.eps = attributes->eps;
  call.rows = 1;
  for (int axis = 0; axis + 1 < inputs[0].rank; ++axis) call.rows *= inputs[0].dims[axis];
  call.task_rows = kTaskElements / call.size + 1;
  run_parallel(options->parallel, rows_task, &call,
               static_cast<size_t>((call.rows + call.task_rows - 1) / call.task_rows));
  return K25_OK;
}

}  // namespace K25_ISA_NS
}  // namespace k25
