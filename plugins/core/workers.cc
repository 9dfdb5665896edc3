#include "workers.h"

#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <time.h>

#include "parallel.h"

namespace k25 {
namespace {

constexpr int32_t kMostWorkers = 63;
// How long a worker looks for the next call before it sleeps: operators of a decode step are 1 to 30 us apart, and waking
// a thread takes 4 to 10.
constexpr int64_t kAwakeNanoseconds = 60000;
constexpr int kLooks = 32;  // between two looks at the clock; then others may have the core
constexpr int64_t kLostNanoseconds = 30000;  // between two looks: somebody had it
constexpr int64_t kCalmNanoseconds = 20000000;

// Calls are numbered. `open` is the number of the one that may be joined, or 0. A worker counts itself in before it looks,
// and the caller closes before it counts, so nobody is inside when the next call is written.
struct Pool {
  alignas(64) uint64_t call;
  alignas(64) uint64_t open;
  int32_t threads;
  k25_task task;
  void* state;
  size_t count;
  alignas(64) size_t next;  // ticket
  alignas(64) int32_t inside;
  alignas(64) int32_t busy;
  int32_t sleepers;
  int32_t started;
  pthread_mutex_t mutex;
  pthread_cond_t changed;
};
Pool pool = {0, 0, 0, nullptr, nullptr, 0, 0, 0, 0, 0, 0, PTHREAD_MUTEX_INITIALIZER, PTHREAD_COND_INITIALIZER};

void run_tickets() {
  for (;;) {
    const size_t index = __atomic_fetch_add(&pool.next, 1, __ATOMIC_RELAXED);
    if (index >= pool.count) return;
    pool.task(pool.state, index);
  }
}

int64_t now() {
  timespec time;
  clock_gettime(CLOCK_MONOTONIC, &time);
  return static_cast<int64_t>(time.tv_sec) * 1000000000 + time.tv_nsec;
}

uint64_t call_asleep(uint64_t seen) {
  pthread_mutex_lock(&pool.mutex);
  __atomic_fetch_add(&pool.sleepers, 1, __ATOMIC_SEQ_CST);
  while (__atomic_load_n(&pool.call, __ATOMIC_SEQ_CST) == seen) pthread_cond_wait(&pool.changed, &pool.mutex);
  __atomic_fetch_sub(&pool.sleepers, 1, __ATOMIC_SEQ_CST);
  pthread_mutex_unlock(&pool.mutex);
  return __atomic_load_n(&pool.call, __ATOMIC_ACQUIRE);
}

// The call after `seen`. Who looks for it uses up its share of a core that others want too, and then loses the core in the
// middle of its work; so a worker that has lost it sleeps at once for a while.
uint64_t call_after(uint64_t seen, int64_t* sleep_until) {
  int64_t last = now();
  for (const int64_t until = last + kAwakeNanoseconds; last < until && last >= *sleep_until;) {
    for (int look = 0; look < kLooks; ++look) {
      const uint64_t call = __atomic_load_n(&pool.call, __ATOMIC_ACQUIRE);
      if (call != seen) return call;
      cpu_pause();
    }
    sched_yield();
    const int64_t time = now();
    if (time - last > kLostNanoseconds) *sleep_until = time + kCalmNanoseconds;
    last = time;
  }
  return call_asleep(seen);
}

void* work(void* argument) {
  const int32_t number = static_cast<int32_t>(reinterpret_cast<intptr_t>(argument));
  int64_t sleep_until = 0;
  for (uint64_t seen = 0;;) {
    seen = call_after(seen, &sleep_until);
    __atomic_fetch_add(&pool.inside, 1, __ATOMIC_SEQ_CST);
    if (__atomic_load_n(&pool.open, __ATOMIC_SEQ_CST) == seen && number < pool.threads) run_tickets();
    __atomic_fetch_sub(&pool.inside, 1, __ATOMIC_RELEASE);
  }
  return nullptr;
}

// Fewer than asked for where the system has no more. Signals are for the threads of the program.
void start(int32_t threads) {
  const int32_t wanted = threads - 1 < kMostWorkers ? threads - 1 : kMostWorkers;
  if (pool.started >= wanted) return;
  sigset_t all, before;
  sigfillset(&all);
  pthread_sigmask(SIG_SETMASK, &all, &before);
  for (; pool.started < wanted; ++pool.started) {
    pthread_t thread;
    if (pthread_create(&thread, nullptr, work, reinterpret_cast<void*>(intptr_t{pool.started} + 1)) != 0) break;
    pthread_detach(thread);
  }
  pthread_sigmask(SIG_SETMASK, &before, nullptr);
}

}  // namespace

bool run_on_workers(int32_t threads, k25_task task, void* state, size_t count) {
  if (__atomic_exchange_n(&pool.busy, 1, __ATOMIC_ACQUIRE) != 0) return false;
  start(threads);
  pool.threads = threads;
  pool.task = task;
  pool.state = state;
  pool.count = count;
  pool.next = 0;
  const uint64_t call = pool.call + 1;
  __atomic_store_n(&pool.open, call, __ATOMIC_SEQ_CST);
  __atomic_store_n(&pool.call, call, __ATOMIC_SEQ_CST);
  if (__atomic_load_n(&pool.sleepers, __ATOMIC_SEQ_CST) > 0) {
    pthread_mutex_lock(&pool.mutex);
    pthread_cond_broadcast(&pool.changed);
    pthread_mutex_unlock(&pool.mutex);
  }
  run_tickets();
  __atomic_store_n(&pool.open, 0, __ATOMIC_SEQ_CST);
  for (int spins = 0; __atomic_load_n(&pool.inside, __ATOMIC_SEQ_CST) != 0;) wait_a_little(&spins);
  __atomic_store_n(&pool.busy, 0, __ATOMIC_RELEASE);
  return true;
}

}  // namespace k25
