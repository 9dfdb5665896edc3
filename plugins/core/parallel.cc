#include "parallel.h"

#include <sched.h>

#include "workers.h"

#if defined(__x86_64__) || defined(__i386__)
#include <immintrin.h>
#endif

namespace k25 {
namespace {

// More lanes than the memory of a machine can feed; one that comes when all is done returns at once.
constexpr size_t kMaxLanes = 64;
// Looks before the core is given up.
constexpr int kSpins = 2000;

// Tasks [begin, end) that nobody has begun, in one word, so that its owner and thieves agree on it: begin in the upper half.
// A value names tasks that are left, so one that has come back is as good as one that stayed.
struct alignas(64) Range {
  uint64_t span;
};

constexpr uint64_t span_of(uint64_t begin, uint64_t end) { return begin << 32 | end; }
constexpr uint64_t begin_of(uint64_t span) { return span >> 32; }
constexpr uint64_t end_of(uint64_t span) { return span & 0xffffffffu; }
constexpr uint64_t left_in(uint64_t span) { return end_of(span) - begin_of(span); }

// What one thread has. Cores that share no cache need some 250 ns for a line, so `done` is written by its lane alone, which
// need not own the line to write it, and lies apart from what others write.
struct Lane {
  Range ranges[kMaxPhases];
  alignas(64) uint64_t done[kMaxPhases];  // tasks; not of the last phase
};

struct Region {
  const Phase* phases;
  size_t phase_count;
  void* state;
  alignas(64) uint64_t live;  // a bit for each lane that may be looked at
  size_t arrived;             // lanes, where they are not numbered from the start
  bool is_drained;            // no task is left to begin
  Lane lanes[kMaxLanes];      // live ones are written
};

uint64_t load(const Range& range) { return __atomic_load_n(&range.span, __ATOMIC_ACQUIRE); }
uint64_t live_lanes(const Region& region) { return __atomic_load_n(&region.live, __ATOMIC_ACQUIRE); }

bool replace(Range& range, uint64_t& seen, uint64_t wanted) {
  return __atomic_compare_exchange_n(&range.span, &seen, wanted, false, __ATOMIC_ACQ_REL, __ATOMIC_ACQUIRE);
}

// The first task of a range.
bool take_first(Range& range, size_t* index) {
  uint64_t seen = load(range);
  while (left_in(seen) > 0) {
    if (!replace(range, seen, span_of(begin_of(seen) + 1, end_of(seen)))) continue;
    *index = begin_of(seen);
    return true;
  }
  return false;
}

// The upper half of the largest range of the others, for `lane`, whose own is empty. False where nothing is left to take.
bool take_half(Region& region, size_t phase, size_t lane) {
  for (const uint64_t live = live_lanes(region);;) {
    Range* victim = nullptr;
    uint64_t most = 0, seen = 0;
    for (uint64_t rest = live; rest != 0; rest &= rest - 1) {
      Range& other = region.lanes[__builtin_ctzll(rest)].ranges[phase];
      const uint64_t span = load(other);
      if (left_in(span) <= most) continue;
      most = left_in(span);
      seen = span;
      victim = &other;
    }
    if (victim == nullptr) return false;
    const uint64_t middle = begin_of(seen) + most / 2;
    if (!replace(*victim, seen, span_of(begin_of(seen), middle))) continue;
    __atomic_store_n(&region.lanes[lane].ranges[phase].span, span_of(middle, end_of(seen)), __ATOMIC_RELEASE);
    return true;
  }
}

bool is_finished(const Region& region, size_t phase) {
  uint64_t done = 0;
  for (uint64_t rest = live_lanes(region); rest != 0; rest &= rest - 1) {
    done += __atomic_load_n(&region.lanes[__builtin_ctzll(rest)].done[phase], __ATOMIC_ACQUIRE);
  }
  return done == region.phases[phase].count;
}

// Returns when every task of the phase is finished; in the last phase when every one is begun, since whoever has begun one
// does not leave before it is done. `done` are those that this lane has finished already.
void run_phase(Region& region, size_t phase, size_t lane, uint64_t done) {
  const Phase& wanted = region.phases[phase];
  for (int spins = 0;;) {
    for (size_t index; take_first(region.lanes[lane].ranges[phase], &index); ++done) wanted.task(region.state, index);
    if (take_half(region, phase, lane)) continue;
    if (phase + 1 == region.phase_count) break;
    __atomic_store_n(&region.lanes[lane].done[phase], done, __ATOMIC_RELEASE);
    if (is_finished(region, phase)) return;
    wait_a_little(&spins);
  }
  if (!__atomic_load_n(&region.is_drained, __ATOMIC_RELAXED)) __atomic_store_n(&region.is_drained, true, __ATOMIC_RELAXED);
}

// The first lane has its first task already: it begins while the others are still on their way.
void run_lane(void* state, size_t lane) {
  Region& region = *static_cast<Region*>(state);
  if (lane == 0) region.phases[0].task(region.state, 0);
  for (size_t phase = 0; phase < region.phase_count; ++phase) run_phase(region, phase, lane, lane == 0 && phase == 0 ? 1 : 0);
}

// The tasks of each phase to the lanes, neighbours to one; those of the first lane are rounded up, and it has begun one.
void share_out(Region& region, size_t lanes) {
  for (size_t phase = 0; phase < region.phase_count; ++phase) {
    const size_t count = region.phases[phase].count;
    for (size_t lane = 0; lane < lanes; ++lane) {
      const uint64_t begin = (count * lane + lanes - 1) / lanes, end = (count * (lane + 1) + lanes - 1) / lanes;
      region.lanes[lane].ranges[phase].span = span_of(lane == 0 && phase == 0 ? 1 : begin, end);
      region.lanes[lane].done[phase] = 0;
    }
  }
  region.live = lanes == 64 ? ~uint64_t{0} : (uint64_t{1} << lanes) - 1;
}

// A lane on a thread that nobody knew of before: the first has every task, the others take theirs from it.
void run_next_lane(void* state, size_t) {
  Region& region = *static_cast<Region*>(state);
  if (__atomic_load_n(&region.is_drained, __ATOMIC_RELAXED)) return;
  const size_t lane = __atomic_fetch_add(&region.arrived, 1, __ATOMIC_RELAXED);
  if (lane >= kMaxLanes) return;  // lanes that somebody runs again
  if (lane > 0) {
    for (size_t phase = 0; phase < region.phase_count; ++phase) {
      region.lanes[lane].ranges[phase].span = 0;
      region.lanes[lane].done[phase] = 0;
    }
    __atomic_fetch_or(&region.live, uint64_t{1} << lane, __ATOMIC_ACQ_REL);
  }
  run_lane(state, lane);
}

void run_here(const Phase* phases, size_t phase_count, void* state) {
  for (size_t phase = 0; phase < phase_count; ++phase) {
    for (size_t index = 0; index < phases[phase].count; ++index) phases[phase].task(state, index);
  }
}

size_t smaller(size_t a, size_t b) { return a < b ? a : b; }

}  // namespace

void cpu_pause() {
#if defined(__x86_64__) || defined(__i386__)
  _mm_pause();
#elif defined(__aarch64__)
  __asm__ __volatile__("yield");
#endif
}

void wait_a_little(int* spins) {
  cpu_pause();
  if (++*spins < kSpins) return;
  *spins = 0;
  sched_yield();
}

int64_t pieces_in_task(const k25_parallel* parallel, int64_t pieces, int64_t bytes) {
  constexpr int64_t kTasksOfThread = 8, kUnknownThreads = 8, kFewestBytes = 16384, kMostBytes = 262144;
  const int64_t threads = parallel == nullptr ? 1 : parallel->threads > 1 ? parallel->threads : kUnknownThreads;
  const int64_t most = bytes < kMostBytes ? kMostBytes / bytes : 1;
  const int64_t fewest = kFewestBytes / bytes + 1 < most ? kFewestBytes / bytes + 1 : most;
  const int64_t wanted = pieces / (kTasksOfThread * threads);
  return wanted < fewest ? fewest : wanted > most ? most : wanted;
}

void run_phases(const k25_parallel* parallel, const Phase* phases, size_t phase_count, void* state) {
  if (parallel == nullptr) return run_here(phases, phase_count, state);
  // A single task that the others would wait for is done before they are called.
  for (; phase_count > 0 && phases->count <= 1; ++phases, --phase_count) run_here(phases, 1, state);
  while (phase_count > 0 && phases[phase_count - 1].count == 0) --phase_count;
  if (phase_count == 0) return;
  size_t most = 0;
  for (size_t phase = 0; phase < phase_count; ++phase) most = phases[phase].count > most ? phases[phase].count : most;
  Region region;
  region.phases = phases;
  region.phase_count = phase_count;
  region.state = state;
  region.arrived = 0;
  region.is_drained = false;
  if (parallel->threads > 1) {
    const size_t lanes = smaller(smaller(most, kMaxLanes), static_cast<size_t>(parallel->threads));
    share_out(region, lanes);
    if (run_on_workers(static_cast<int32_t>(lanes), run_lane, &region)) return;
  }
  if (parallel->run == nullptr) return run_here(phases, phase_count, state);
  share_out(region, 1);
  parallel->run(parallel->context, run_next_lane, &region, smaller(most, kMaxLanes));
}

}  // namespace k25
