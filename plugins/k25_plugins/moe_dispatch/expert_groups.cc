#include "expert_groups.h"

#include <string.h>

#include "checks.h"

namespace k25 {
namespace {

constexpr const char* kColumns[] = {"gate_proj.weight_packed", "gate_proj.weight_scale", "up_proj.weight_packed",
                                    "up_proj.weight_scale",    "down_proj.weight_packed", "down_proj.weight_scale"};

// The tensors of an expert start in rows that the region has.
k25_status check_row(const int64_t* row, int64_t expert, int64_t word_rows, int64_t scale_rows, int64_t expert_rows,
                     k25_message message) {
  for (int column = 0; column < 6; ++column) {
    const int64_t rows = column % 2 == 0 ? word_rows : scale_rows;
    if (row[column] < 0 || rows > expert_rows || row[column] > expert_rows - rows) {
      return fail(K25_INVALID, message,
                  "k25.MoEDispatch: input table, expert %lld, %s: expected %lld rows that start in 0..%lld, found row "
                  "%lld of %lld",
                  static_cast<long long>(expert), kColumns[column], static_cast<long long>(rows),
                  static_cast<long long>(expert_rows - rows), static_cast<long long>(row[column]),
                  static_cast<long long>(expert_rows));
    }
  }
  return K25_OK;
}

}  // namespace

k25_status group_by_expert(const k25_tensor inputs[6], const k25_moe_dispatch_attributes& attributes, Scratch& scratch,
                           ExpertGroups* found, k25_message message) {
  const int64_t tokens = inputs[1].dims[0], k = inputs[1].dims[1];
  const int64_t experts = inputs[5].dims[0], expert_rows = inputs[3].dims[0];
  const int64_t elements = inputs[0].dims[1] * attributes.intermediate_size;
  const int64_t word_rows = elements / 16, scale_rows = elements / (4 * attributes.group_size);
  const int32_t* ids = static_cast<const int32_t*>(inputs[1].data);
  const float* weights = static_cast<const float*>(inputs[2].data);
  const int64_t* table = static_cast<const int64_t*>(inputs[5].data);

  int64_t* next = static_cast<int64_t*>(scratch.take(sizeof(int64_t) * static_cast<size_t>(experts)));
  found->tokens = static_cast<int32_t*>(scratch.take(sizeof(int32_t) * static_cast<size_t>(tokens * k)));
  found->weights = static_cast<float*>(scratch.take(sizeof(float) * static_cast<size_t>(tokens * k)));
  const int64_t most_groups = experts < tokens * k ? experts : tokens * k;
  found->groups = static_cast<ExpertGroup*>(scratch.take(sizeof(ExpertGroup) * static_cast<size_t>(most_groups)));
  if (next == nullptr || found->tokens == nullptr || found->weights == nullptr || found->groups == nullptr) {
    return fail(K25_FAILED, message, "k25.MoEDispatch: out of memory");
  }

  memset(next, 0, sizeof(int64_t) * static_cast<size_t>(experts));
  for (int64_t index = 0; index < tokens * k; ++index) {
    if (ids[index] < 0 || ids[index] >= experts) {
      return fail(K25_INVALID, message,
                  "k25.MoEDispatch: input expert_ids, token %lld, slot %lld: expected an id in 0..%lld, found %d",
                  static_cast<long long>(index / k), static_cast<long long>(index % k),
                  static_cast<long long>(experts - 1), ids[index]);
    }
    ++next[ids[index]];
  }

  found->group_count = found->pair_count = found->most_pairs = 0;
  for (int64_t expert = 0; expert < experts; ++expert) {
    const int64_t pairs = next[expert];
    const int64_t* row = table + expert * 6;
    if (pairs == 0 || row[0] < 0) {
      next[expert] = -1;
      continue;
    }
    const k25_status status = check_row(row, expert, word_rows, scale_rows, expert_rows, message);
    if (status != K25_OK) return status;
    const auto matrix = [&](int column) {
      return PackedMatrix{static_cast<const int32_t*>(inputs[3].data) + row[column] * 2,
                          static_cast<const uint16_t*>(inputs[4].data) + row[column + 1] * 4};
    };
    found->groups[found->group_count++] = {matrix(0), matrix(2), matrix(4), found->pair_count, pairs};
    next[expert] = found->pair_count;
    found->pair_count += pairs;
    if (pairs > found->most_pairs) found->most_pairs = pairs;
  }

  for (int64_t index = 0; index < tokens * k; ++index) {
    int64_t& at = next[ids[index]];
    if (at < 0) continue;
    found->tokens[at] = static_cast<int32_t>(index / k);
    found->weights[at++] = weights[index];
  }
  return K25_OK;
}

}  // namespace k25
