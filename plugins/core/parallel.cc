#include "parallel.h"

#include <sched.h>

#if defined(__x86_64__) || defined(__i386__)
#include <immintrin.h>
#endif

namespace k25 {
namespace {

// More lanes than any machine this is meant for has cores; one that finds no task left returns at once.
constexpr size_t kMaxLanes = 64;
// After this many looks the thread that is waited for may have lost its core: give ours up.
constexpr int kSpins = 4000;

struct Tickets {
  alignas(64) size_t next;
  size_t count;
  k25_task task;
  void* state;
};

void lane(void* state, size_t) {
  Tickets& tickets = *static_cast<Tickets*>(state);
  for (;;) {
    const size_t index = __atomic_fetch_add(&tickets.next, 1, __ATOMIC_RELAXED);
    if (index >= tickets.count) return;
    tickets.task(tickets.state, index);
  }
}

}  // namespace

void run_parallel(const k25_parallel* parallel, k25_task task, void* state, size_t count) {
  if (parallel != nullptr && parallel->run != nullptr && count > 1) {
    parallel->run(parallel->context, task, state, count);
    return;
  }
  for (size_t index = 0; index < count; ++index) task(state, index);
}

void run_in_order(const k25_parallel* parallel, k25_task task, void* state, size_t count) {
  Tickets tickets{0, count, task, state};
  run_parallel(parallel, lane, &tickets, count < kMaxLanes ? count : kMaxLanes);
}

void arrive(Counter* counter) { __atomic_fetch_add(&counter->value, 1, __ATOMIC_RELEASE); }

void wait_for(const Counter* counter, int32_t count) {
  int spins = 0;
  while (__atomic_load_n(&counter->value, __ATOMIC_ACQUIRE) < count) {
#if defined(__x86_64__) || defined(__i386__)
    _mm_pause();
#elif defined(__aarch64__)
    __asm__ __volatile__("yield");
#endif
    if (++spins >= kSpins) {
      sched_yield();
      spins = 0;
    }
  }
}

}  // namespace k25
