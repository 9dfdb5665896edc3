// Runs phases on threads of several kinds and checks what core/parallel.h and core/workers.h promise. Prints what is wrong.
#include <stdio.h>
#include <stdlib.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <thread>
#include <vector>

#include "parallel.h"

namespace {

struct Check {
  std::vector<size_t> counts;
  std::vector<std::vector<std::atomic<int>>> done;     // of each phase and task
  std::vector<std::atomic<size_t>> finished;           // tasks of each phase
  std::atomic<int> wrong{0};
  explicit Check(const std::vector<size_t>& wanted) : counts(wanted), finished(wanted.size()) {
    for (size_t count : counts) done.emplace_back(count);
  }
};

int errors = 0;
void fail(const char* what, size_t a, size_t b) {
  printf("%s: %zu %zu\n", what, a, b);
  ++errors;
}

template <size_t kPhase>
void task(void* state, size_t index) {
  Check& check = *static_cast<Check*>(state);
  for (size_t before = 0; before < kPhase; ++before) {
    if (check.finished[before].load() != check.counts[before]) check.wrong++;
  }
  check.done[kPhase][index]++;
  for (volatile int work = 0; work < 20; work = work + 1) {
  }
  check.finished[kPhase]++;
}
const k25_task kTasks[] = {task<0>, task<1>, task<2>, task<3>};

void run_and_look(const k25_parallel* parallel, const std::vector<size_t>& counts) {
  Check check(counts);
  k25::Phase phases[4];
  for (size_t phase = 0; phase < counts.size(); ++phase) phases[phase] = {kTasks[phase], counts[phase]};
  k25::run_phases(parallel, phases, counts.size(), &check);
  if (check.wrong != 0) fail("a task began before the phase before it was finished", counts.size(), 0);
  for (size_t phase = 0; phase < counts.size(); ++phase) {
    for (size_t index = 0; index < counts[phase]; ++index) {
      if (check.done[phase][index] != 1) fail("a task was not run once", phase, index);
    }
  }
}

// Tasks in any order on new threads.
void on_threads(void* context, k25_task wanted, void* state, size_t count) {
  const size_t threads = *static_cast<size_t*>(context);
  std::atomic<size_t> next{0};
  std::vector<std::thread> running;
  for (size_t thread = 0; thread < threads; ++thread) {
    running.emplace_back([&] {
      for (size_t index; (index = next++) < count;) wanted(state, count - 1 - index);
    });
  }
  for (std::thread& thread : running) thread.join();
}

std::atomic<size_t> refused{0};
void on_own_thread(void*, k25_task wanted, void* state, size_t count) {
  refused++;
  for (size_t index = 0; index < count; ++index) wanted(state, index);
}
k25_parallel on_workers(size_t threads) { return {on_own_thread, nullptr, static_cast<int32_t>(threads)}; }

void look_at_pieces(const k25_parallel* parallel) {
  for (const int64_t pieces : {1, 7, 320, 32000}) {
    for (const int64_t bytes : {1, 64, 2048, 300000}) {
      const int64_t found = k25::pieces_in_task(parallel, pieces, bytes);
      if (found < 1 || (found > 1 && found * bytes > 262144)) {
        fail("pieces in a task", static_cast<size_t>(found), static_cast<size_t>(bytes));
      }
    }
  }
}

// Whether a thread of the pool takes part, within a second.
struct Company {
  pthread_t caller;
  std::atomic<bool> found{false};
};
void look_for_company(void* state, size_t) {
  Company& company = *static_cast<Company*>(state);
  if (!pthread_equal(pthread_self(), company.caller)) company.found = true;
  usleep(500);
}
bool has_company(int32_t threads) {
  Company company{pthread_self()};
  const k25_parallel parallel{nullptr, nullptr, threads};
  for (int round = 0; round < 500 && !company.found; ++round) k25::run_parallel(&parallel, look_for_company, &company, 4);
  return company.found;
}

// Tasks that follow one another in one thread's hands.
void* owner_of[4096];
void note_owner(void*, size_t index) {
  static thread_local int self;
  owner_of[index] = &self;
  for (volatile int work = 0; work < 2000; work = work + 1) {
  }
}

}  // namespace

int main(int argc, char** argv) {
  const int rounds = argc > 1 ? atoi(argv[1]) : 20;
  const std::vector<std::vector<size_t>> all = {
      {1}, {2}, {1000}, {0, 5}, {5, 0}, {0, 0}, {1, 1, 1}, {3, 1, 200}, {65, 63, 64, 7}, {1, 500, 1, 2}};
  for (int round = 0; round < rounds; ++round) {
    for (const std::vector<size_t>& counts : all) {
      run_and_look(nullptr, counts);
      for (size_t threads : {1, 2, 5}) {
        const k25_parallel fresh{on_threads, &threads, 0}, kept = on_workers(threads);
        const k25_parallel alone{nullptr, nullptr, static_cast<int32_t>(threads)};
        run_and_look(&alone, counts);
        run_and_look(&fresh, counts);
        run_and_look(&kept, counts);
      }
    }
    if (round == rounds / 2) usleep(5000);  // workers fall asleep, and must be woken
  }
  // Two callers at the same time: one is served, the other goes on without.
  std::vector<std::thread> callers;
  for (int caller = 0; caller < 2; ++caller) {
    callers.emplace_back([&] {
      const k25_parallel kept = on_workers(3), alone{nullptr, nullptr, 3};
      for (int round = 0; round < 20 * rounds; ++round) run_and_look(round % 2 == 0 ? &kept : &alone, {40, 3});
    });
  }
  for (std::thread& caller : callers) caller.join();
  for (const int32_t threads : {0, 1, 2, 64}) {
    const k25_parallel parallel{nullptr, nullptr, threads};
    look_at_pieces(&parallel);
  }
  look_at_pieces(nullptr);
  if (!has_company(2)) fail("no thread of the pool takes part", 2, 0);
  // A forked child has none of the threads, and starts its own.
  for (const size_t wanted : {3, 6}) {
    const pid_t child = fork();
    if (child == 0) {
      alarm(20);
      const k25_parallel kept = on_workers(wanted);
      for (int round = 0; round < 50; ++round) run_and_look(&kept, {40, 3});
      _exit(errors == 0 && has_company(static_cast<int32_t>(wanted)) ? 0 : 1);
    }
    int status = 0;
    waitpid(child, &status, 0);
    if (status != 0) fail("a forked child", static_cast<size_t>(status), wanted);
  }
  size_t two = 2;
  const k25_parallel pair{on_threads, &two, 0};
  k25::run_parallel(&pair, note_owner, nullptr, 4096);
  size_t changes = 0;
  for (size_t index = 1; index < 4096; ++index) changes += owner_of[index] != owner_of[index - 1];
  if (changes > 64) fail("neighbouring tasks go from thread to thread", changes, 4096);
  if (errors == 0) printf("ok: %zu calls refused\n", refused.load());
  return errors == 0 ? 0 : 1;
}
