// k25.MLA on the CPU: new rows into the cache, then the absorbed form for few query tokens, the expanded one for many.
// Absorbed, a few tokens of short contexts take a few heads after the other, others one part of a context after the other. Which
// form a token takes depends on the call: a few tokens, or many, are equal but for rounding.
#include "cpu_absorbed.h"
#include "cpu_expanded.h"
#include "cpu_short.h"
#include "kernels.h"

namespace k25 {
namespace K25_ISA_NS {
namespace {

// Multiplications of either form for one sequence. Absorbed, every token passes kv_b; expanded, every row of the
// context does, once for each span.
bool expanded_is_cheaper(const MlaCall& call, size_t sequence, size_t* context) {
  const size_t first = first_token(call, sequence), end = first_token(call, sequence + 1);
  double pairs = 0.0;
  *context = 0;
  for (size_t token = first; token < end; ++token) {
    pairs += static_cast<double>(context_of(call, token));
    if (context_of(call, token) > *context) *context = context_of(call, token);
  }
  const double count = static_cast<double>(end - first);
  const double spans = static_cast<double>(divided_up(end - first, kSpanTokens));
  const double lanes = static_cast<double>(rounded_up(end - first, kLanes)) / count;
  const double kv_b = static_cast<double>((call.nope + call.v) * call.rank);
  const double absorbed = count * kv_b + pairs * static_cast<double>(call.width + call.rank);
  const double expanded = spans * static_cast<double>(*context) * kv_b +
                          lanes * pairs * static_cast<double>(call.nope + call.rope + call.v);
  return expanded < absorbed;
}

struct Work {
  int32_t* absorbed;
  size_t absorbed_count;
  Span* spans;
  size_t span_count;
};

void add_spans(const MlaCall& call, size_t sequence, Work& work) {
  const size_t end = first_token(call, sequence + 1);
  for (size_t first = first_token(call, sequence); first < end; first += kSpanTokens) {
    Span span{sequence, first, smaller(kSpanTokens, end - first), 0};
    for (size_t token = first; token < first + span.count; ++token) {
      if (context_of(call, token) > span.context) span.context = context_of(call, token);
    }
    work.spans[work.span_count++] = span;
  }
}

void divide(const MlaCall& call, int32_t* sequence_of, Work& work) {
  for (size_t sequence = 0; sequence < call.sequences; ++sequence) {
    const size_t first = first_token(call, sequence), end = first_token(call, sequence + 1);
    for (size_t token = first; token < end; ++token) sequence_of[token] = static_cast<int32_t>(sequence);
    size_t context = 0;
    if (first == end) continue;
    if (expanded_is_cheaper(call, sequence, &context)) {
      add_spans(call, sequence, work);
    } else {
      for (size_t token = first; token < end; ++token) {
        work.absorbed[work.absorbed_count++] = static_cast<int32_t>(token);
      }
    }
  }
}

}  // namespace

k25_status mla(const k25_tensor inputs[7], const k25_mla_attributes* attributes, const k25_tensor outputs[2],
               const k25_cpu_options* options, k25_message message) {
  MlaCall call = mla_call(inputs, *attributes, outputs, options);
  k25_status status = check_values(call, message);
  if (status != K25_OK) return status;
  Scratch scratch;
  const size_t angles = call.tokens * (call.rope / 2) * sizeof(float);
  Rotations rotations{&call, static_cast<float*>(scratch.take(angles)), static_cast<float*>(scratch.take(angles))};
  int32_t* sequence_of = static_cast<int32_t*>(scratch.take(call.tokens * sizeof(int32_t)));
  float* row = static_cast<float*>(scratch.take(call.width * sizeof(float)));
  Work work{static_cast<int32_t*>(scratch.take(call.tokens * sizeof(int32_t))), 0,
            static_cast<Span*>(scratch.take(call.tokens * sizeof(Span))), 0};
  if (rotations.cosines == nullptr || rotations.sines == nullptr || sequence_of == nullptr || row == nullptr ||
      work.absorbed == nullptr || work.spans == nullptr) {
    return fail(K25_FAILED, message, "k25.MLA: no memory for %zu tokens", call.tokens);
  }
  call.cosines = rotations.cosines;
  call.sines = rotations.sines;
  call.sequence_of = sequence_of;
  divide(call, sequence_of, work);
  if (call.cache.data != inputs[2].data) {
    memcpy(call.cache.data, inputs[2].data, call.blocks * call.block_size * call.width * item_size(call.cache));
  }
  const NewRows new_rows{&rotations, row};
  const bool is_later = work.span_count == 0 && rotation_tasks(call) == 1;
  if (!is_later) {
    run_parallel(call.parallel, rotation_task, &rotations, rotation_tasks(call));
    write_new_rows(call, row);
  }
  if (work.span_count > 0) status = attend_expanded(call, work.spans, work.span_count, message);
  if (status == K25_OK && work.absorbed_count > 0) {
    const NewRows* later = is_later ? &new_rows : nullptr;
    const auto attend_tokens = is_short(call, work.absorbed, work.absorbed_count) ? attend_short : attend_absorbed;
    status = attend_tokens(call, work.absorbed, work.absorbed_count, later, scratch, message);
  }
  return status;
}

}  // namespace K25_ISA_NS
}  // namespace k25
