// Running tasks on the caller's threads.
#ifndef K25_PARALLEL_H
#define K25_PARALLEL_H

#include <stddef.h>
#include <stdint.h>

#include "k25.h"

namespace k25 {

// All tasks, in any order; on the caller's thread where `parallel` is null.
void run_parallel(const k25_parallel* parallel, k25_task task, void* state, size_t count);

// All tasks, *started* in the order of their index: a task may wait (`wait_for`) for what tasks of smaller index do, which
// makes one parallel region of several dependent phases. No deadlock: whatever a task waits for is done or being done.
void run_in_order(const k25_parallel* parallel, k25_task task, void* state, size_t count);

// A count of finished tasks, zero at first, on a cache line of its own.
struct alignas(64) Counter {
  int32_t value;
};
void arrive(Counter* counter);
void wait_for(const Counter* counter, int32_t count);

}  // namespace k25
#endif
