// The (token, expert) pairs of a call, grouped by expert.
//
// Legend: T tokens, K experts a token, P pairs.
#ifndef K25_EXPERT_GROUPS_H
#define K25_EXPERT_GROUPS_H

#include "k25.h"
#include "scratch.h"

namespace k25 {

// A projection of one expert, in place: words [out, in / 8], bfloat16 scales [out, in / group].
struct PackedMatrix {
  const int32_t* words;
  const uint16_t* scales;
};

// One expert that is held here and that some token chose; its pairs are first_pair ... first_pair + pair_count - 1.
struct ExpertGroup {
  PackedMatrix gate, up, down;
  int64_t first_pair;
  int64_t pair_count;
};

struct ExpertGroups {
  ExpertGroup* groups;  // by ascending expert
  int64_t group_count;
  int32_t* tokens;  // [P], ascending within a group
  float* weights;   // [P]
  int64_t pair_count;
  int64_t most_pairs;  // of a group
};

// Checks every expert id, and every table row that is used, against the sizes. Memory is taken from `scratch`.
k25_status group_by_expert(const k25_tensor inputs[6], const k25_moe_dispatch_attributes& attributes, Scratch& scratch,
                           ExpertGroups* found, k25_message message);

}  // namespace k25
#endif
