#include "workers.h"

#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <time.h>
#include <unistd.h>

#include <initializer_list>

#include "parallel.h"

#if defined(__x86_64__) || defined(__i386__)
#include <immintrin.h>
#endif

namespace k25 {
namespace {

constexpr int32_t kMostWorkers = 63;
// How long a worker looks for the next call before it sleeps: operators of a decode step are 1 to 30 us apart, steps 100 to
// 200, and waking a thread takes 4 to 10.
constexpr int64_t kAwakeNanoseconds = 200000;
constexpr int kLooks = 32;  // between two looks at the clock; then others may have the core
constexpr int64_t kLostNanoseconds = 30000;  // between two looks: somebody had it
constexpr int64_t kCalmNanoseconds = 20000000;

// Calls are numbered. A worker writes down which call it is about to join, then looks whether that call is still open; the
// caller closes it, then looks who has written. So nobody is inside when the next call is written. Where every worker has
// come and gone there is nothing to close. Cores that share no cache need some 250 ns for a line: one line tells a worker all
// about a call, and each has a line of its own to answer on.
struct Pool {
  alignas(64) uint64_t call;
  uint64_t open;  // call and threads of the one that may be joined (open_word), or 0
  k25_task lane;
  void* state;
  uint64_t float_control;  // of the caller: rounding, and what becomes of denormals
  alignas(64) int32_t busy;
  int32_t started;
  bool is_full;  // the system refused another thread
  alignas(64) int32_t sleepers;
  pthread_mutex_t mutex;
  pthread_cond_t changed;
};
Pool pool = {0, 0, nullptr, nullptr, 0, 0, 0, false, 0, PTHREAD_MUTEX_INITIALIZER, PTHREAD_COND_INITIALIZER};

// Twice the number of the last call that a worker has looked at, and 1 while it is inside.
struct alignas(64) Answer {
  uint64_t word;
};
Answer answers[kMostWorkers + 1];

constexpr uint64_t inside(uint64_t call) { return 2 * call + 1; }
constexpr uint64_t outside(uint64_t call) { return 2 * call; }
constexpr uint64_t open_word(uint64_t call, int32_t threads) { return call << 8 | static_cast<uint64_t>(threads); }

uint64_t float_control() {
#if defined(__x86_64__) || defined(__i386__)
  return _mm_getcsr();
#elif defined(__aarch64__)
  uint64_t value;
  __asm__ volatile("mrs %0, fpcr" : "=r"(value));
  return value;
#else
  return 0;
#endif
}

void set_float_control([[maybe_unused]] uint64_t value) {
#if defined(__x86_64__) || defined(__i386__)
  _mm_setcsr(static_cast<uint32_t>(value));
#elif defined(__aarch64__)
  __asm__ volatile("msr fpcr, %0" : : "r"(value));
#endif
}

// A child has the caller's thread alone: workers are started anew when they are wanted.
void forget_workers() {
  pool.open = 0;
  for (Answer& answer : answers) answer.word = 0;
  pool.busy = 0;
  pool.sleepers = 0;
  pool.started = 0;
  pool.is_full = false;
  pool.mutex = PTHREAD_MUTEX_INITIALIZER;
  pool.changed = PTHREAD_COND_INITIALIZER;
}

int64_t now() {
  timespec time;
  clock_gettime(CLOCK_MONOTONIC, &time);
  return static_cast<int64_t>(time.tv_sec) * 1000000000 + time.tv_nsec;
}

// A line that this thread is going to write, without waiting for it.
void get_ready_to_write([[maybe_unused]] const void* line) {
#if defined(__x86_64__)
  __asm__ volatile("prefetchw %0" : : "m"(*static_cast<const char*>(line)));
#else
  __builtin_prefetch(line, 1);
#endif
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
uint64_t call_after(uint64_t seen, const Answer& answer, int64_t* sleep_until) {
  int64_t last = now();
  for (const int64_t until = last + kAwakeNanoseconds; last < until && last >= *sleep_until;) {
    for (int look = 0; look < kLooks; ++look) {
      const uint64_t call = __atomic_load_n(&pool.call, __ATOMIC_ACQUIRE);
      if (call != seen) return call;
      get_ready_to_write(&answer);  // the caller has read it
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
#if defined(__linux__)
  cpu_set_t cores;  // of the process: the first caller may be tied to one
  if (sched_getaffinity(getpid(), sizeof cores, &cores) == 0) sched_setaffinity(0, sizeof cores, &cores);
#endif
  int64_t sleep_until = 0;
  uint64_t* answer = &answers[number].word;
  for (uint64_t seen = 0;;) {
    seen = call_after(seen, answers[number], &sleep_until);
    __atomic_exchange_n(answer, inside(seen), __ATOMIC_SEQ_CST);
    const uint64_t open = __atomic_load_n(&pool.open, __ATOMIC_SEQ_CST);
    if (open >> 8 == seen && static_cast<uint64_t>(number) < (open & 255)) {
      set_float_control(pool.float_control);
      pool.lane(pool.state, static_cast<size_t>(number));
    }
    __atomic_store_n(answer, outside(seen), __ATOMIC_RELEASE);
  }
  return nullptr;
}

// Fewer than asked for where the system has no more. Signals are for the threads of the program, but for those of faults.
void start(int32_t threads) {
  const int32_t wanted = threads - 1 < kMostWorkers ? threads - 1 : kMostWorkers;
  if (pool.started >= wanted || pool.is_full) return;
  static bool is_first = true;
  if (is_first) pthread_atfork(nullptr, nullptr, forget_workers);
  is_first = false;
  sigset_t all, before;
  sigfillset(&all);
  for (const int fault : {SIGSEGV, SIGBUS, SIGFPE, SIGILL, SIGTRAP, SIGABRT, SIGSYS}) sigdelset(&all, fault);
  pthread_sigmask(SIG_SETMASK, &all, &before);
  for (; pool.started < wanted; ++pool.started) {
    pthread_t thread;
    if (pthread_create(&thread, nullptr, work, reinterpret_cast<void*>(intptr_t{pool.started} + 1)) != 0) {
      pool.is_full = true;
      break;
    }
    pthread_detach(thread);
  }
  pthread_sigmask(SIG_SETMASK, &before, nullptr);
}

void wake_all() {
  pthread_mutex_lock(&pool.mutex);
  pthread_cond_broadcast(&pool.changed);
  pthread_mutex_unlock(&pool.mutex);
}

bool have_all_left(uint64_t call, int32_t lanes) {
  for (int32_t number = 1; number < lanes; ++number) {
    if (__atomic_load_n(&answers[number].word, __ATOMIC_ACQUIRE) != outside(call)) return false;
  }
  return true;
}

}  // namespace

bool run_on_workers(int32_t threads, k25_task lane, void* state) {
  if (__atomic_exchange_n(&pool.busy, 1, __ATOMIC_ACQUIRE) != 0) return false;
  start(threads);
  if (pool.started == 0) {
    __atomic_store_n(&pool.busy, 0, __ATOMIC_RELEASE);
    return false;
  }
  const int32_t lanes = threads - 1 < pool.started ? threads : pool.started + 1;
  const uint64_t call = pool.call + 1;
  pool.lane = lane;
  pool.state = state;
  pool.float_control = float_control();
  __atomic_store_n(&pool.open, open_word(call, lanes), __ATOMIC_RELEASE);
  __atomic_store_n(&pool.call, call, __ATOMIC_RELEASE);
  // One that falls asleep at this moment may miss this call, not the next: no reason to wait until it sees ours.
  if (__atomic_load_n(&pool.sleepers, __ATOMIC_RELAXED) > 0) wake_all();
  lane(state, 0);
  if (!have_all_left(call, lanes)) {
    __atomic_exchange_n(&pool.open, 0, __ATOMIC_SEQ_CST);
    for (int32_t number = 1; number < lanes; ++number) {
      for (int spins = 0; __atomic_load_n(&answers[number].word, __ATOMIC_SEQ_CST) == inside(call);) wait_a_little(&spins);
    }
  }
  __atomic_store_n(&pool.busy, 0, __ATOMIC_RELEASE);
  return true;
}

}  // namespace k25
