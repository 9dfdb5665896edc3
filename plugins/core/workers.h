// Threads of the library's own, for those who ask for them (k25_set_session_threads).
#ifndef K25_WORKERS_H
#define K25_WORKERS_H

#include <stddef.h>
#include <stdint.h>

#include "k25.h"

namespace k25 {

// Runs lane(state, 0) on the calling thread and, at the same time, lane(state, n) on worker n, n < `threads`, for those that
// come before ours is done: each at most once. Returns when all have returned. Workers are started when they are first
// wanted and stay awake for a moment afterwards. False, and nothing done, where another thread is
// being served or the system refuses every worker.
bool run_on_workers(int32_t threads, k25_task lane, void* state);

}  // namespace k25
#endif
