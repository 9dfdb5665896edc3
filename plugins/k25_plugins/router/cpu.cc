// k25.Router on a CPU: the best experts of each token by sigmoid + bias, and their sigmoids as weights. Float32 in any mode.
#include <math.h>

#include "checks.h"
#include "kernels.h"
#include "parallel.h"
#include "scratch.h"
#include "simd.h"

namespace k25 {
namespace K25_ISA_NS {
namespace {

constexpr int64_t kTaskScores = 8192;  // at least, in a task
constexpr float kSmallestTotal = 1e-20f;

struct Call {
  const float* logits;
  const float* bias;
  int32_t* ids;
  float* weights;
  int64_t tokens, experts, top_k, task_tokens;
  bool is_normalised;
  float factor;
  int32_t no_memory;
};

void sigmoids(const float* logits, int64_t count, float* scores) {
  int64_t at = 0;
  for (; at + W <= count; at += W) store(scores + at, sigmoid(load(logits + at)));
  const int left = static_cast<int>(count - at);
  if (left > 0) store_partial(scores + at, sigmoid(load_partial(logits + at, left)), left);
}

// In the order of choice: NaN before everything, and of equals the first that came.
K25_INLINE bool is_better(float a, float b) { return a > b || (isnan(a) && !isnan(b)); }

// The best so far, best first, in ids and `best` [top_k].
void choose(const Call& call, const float* scores, int32_t* ids, float* best) {
  int64_t found = 0;
  for (int64_t expert = 0; expert < call.experts; ++expert) {
    const float score = scores[expert] + call.bias[expert];
    if (found == call.top_k && !is_better(score, best[found - 1])) continue;
    int64_t place = found < call.top_k ? found++ : found - 1;
    for (; place > 0 && is_better(score, best[place - 1]); --place) {
      best[place] = best[place - 1];
      ids[place] = ids[place - 1];
    }
    best[place] = score;
    ids[place] = static_cast<int32_t>(expert);
  }
}

void weigh(const Call& call, const float* scores, const int32_t* ids, float* weights) {
  float total = 0.0f;
  for (int64_t place = 0; place < call.top_k; ++place) total += scores[ids[place]];
  const float divisor = call.is_normalised ? total + kSmallestTotal : 1.0f;
  for (int64_t place = 0; place < call.top_k; ++place) weights[place] = scores[ids[place]] / divisor * call.factor;
}

void tokens_task(void* state, size_t index) {
  Call& call = *static_cast<Call*>(state);
  float* scores = static_cast<float*>(thread_scratch(sizeof(float) * static_cast<size_t>(call.experts + call.top_k)));
  if (scores == nullptr) return __atomic_store_n(&call.no_memory, 1, __ATOMIC_RELAXED);
  const int64_t first = static_cast<int64_t>(index) * call.task_tokens;
  const int64_t stop = first + call.task_tokens < call.tokens ? first + call.task_tokens : call.tokens;
  for (int64_t token = first; token < stop; ++token) {
    int32_t* ids = call.ids + token * call.top_k;
    sigmoids(call.logits + token * call.experts, call.experts, scores);
    choose(call, scores, ids, scores + call.experts);
    weigh(call, scores, ids, call.weights + token * call.top_k);
  }
}

}  // namespace

k25_status router(const k25_tensor inputs[2], const k25_router_attributes* attributes, const k25_tensor outputs[2],
                  const k25_cpu_options* options, k25_message message) {
  Call call{};
  call.logits = static_cast<const float*>(inputs[0].data);
  call.bias = static_cast<const float*>(inputs[1].data);
  call.ids = static_cast<int32_t*>(outputs[0].data);
  call.weights = static_cast<float*>(outputs[1].data);
  call.tokens = inputs[0].dims[0];
  call.experts = inputs[0].dims[1];
  call.top_k = attributes->top_k;
  call.is_normalised = attributes->normalise != 0;
  call.factor = attributes->scaling_factor;
  call.task_tokens = kTaskScores / call.experts + 1;
  run_parallel(options->parallel, tokens_task, &call,
               static_cast<size_t>((call.tokens + call.task_tokens - 1) / call.task_tokens));
  return call.no_memory == 0 ? K25_OK : fail(K25_FAILED, message, "k25.Router: out of memory");
}

}  // namespace K25_ISA_NS
}  // namespace k25
