// Running tasks on the caller's threads.
//
// Each thread works through a range of neighbouring tasks, and one that has none left takes the upper half of the largest
// range that another still has. So a thread streams through memory that lies together as long as tasks of neighbouring index
// do: two cores that take turns at pieces of 16 KB read half as fast as with pieces of 1 MB (bench/read_order.cc).
#ifndef K25_PARALLEL_H
#define K25_PARALLEL_H

#include <stddef.h>
#include <stdint.h>

#include "k25.h"

namespace k25 {

// For loops that wait for another thread: it may be done soon, or have lost its core, to which ours then goes.
void cpu_pause();
void wait_a_little(int* spins);

// task(state, 0) ... task(state, count - 1); fewer than 2^32.
struct Phase {
  k25_task task;
  size_t count;
};

constexpr size_t kMaxPhases = 4;

// All tasks of a phase, in any order, then all of the next: one parallel region, whose threads are woken once. On the
// caller's thread where `parallel` is null.
void run_phases(const k25_parallel* parallel, const Phase* phases, size_t phase_count, void* state);

template <size_t kCount>
inline void run_phases(const k25_parallel* parallel, const Phase (&phases)[kCount], void* state) {
  static_assert(kCount <= kMaxPhases, "as many as a region has room for");
  run_phases(parallel, phases, kCount, state);
}

inline void run_parallel(const k25_parallel* parallel, k25_task task, void* state, size_t count) {
  const Phase phase{task, count};
  run_phases(parallel, &phase, 1, state);
}

// How many neighbouring pieces of `bytes` each, of `pieces` that stream from memory, to put into a task: some eight tasks for a
// thread, so that one which is held up gives the rest away, of at most 256 KB or one piece. Where a task ends a stream is interrupted: 65 MB
// in tasks of 256 KB pass 5 % faster than in tasks of 32 KB.
int64_t pieces_in_task(const k25_parallel* parallel, int64_t pieces, int64_t bytes);

}  // namespace k25
#endif
