#include "parallel.h"

#include <sched.h>

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

struct Region {
  const Phase* phases;
  size_t phase_count;
  void* state;
  alignas(64) size_t arrived;                // lanes
  uint64_t live;                             // a bit for each lane whose ranges may be looked at
  alignas(64) size_t finished[kMaxPhases];  // tasks
  Range ranges[kMaxPhases][kMaxLanes];
};

uint64_t load(const Range& range) { return __atomic_load_n(&range.span, __ATOMIC_ACQUIRE); }

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

// The upper half of the largest range of the others, as `own`, which is empty. False where nothing is left to take.
bool take_half(Range* ranges, uint64_t live, Range& own) {
  for (;;) {
    Range* victim = nullptr;
    uint64_t most = 0, seen = 0;
    for (uint64_t rest = live; rest != 0; rest &= rest - 1) {
      Range& other = ranges[__builtin_ctzll(rest)];
      const uint64_t span = load(other);
      if (left_in(span) <= most) continue;
      most = left_in(span);
      seen = span;
      victim = &other;
    }
    if (victim == nullptr) return false;
    const uint64_t middle = begin_of(seen) + most / 2;
    if (!replace(*victim, seen, span_of(begin_of(seen), middle))) continue;
    __atomic_store_n(&own.span, span_of(middle, end_of(seen)), __ATOMIC_RELEASE);
    return true;
  }
}

// Returns when every task of the phase is finished.
void run_phase(Region& region, size_t phase, size_t lane) {
  const Phase& wanted = region.phases[phase];
  size_t* finished = &region.finished[phase];
  Range* ranges = region.ranges[phase];
  for (int spins = 0; __atomic_load_n(finished, __ATOMIC_ACQUIRE) < wanted.count;) {
    size_t done = 0;
    for (size_t index; take_first(ranges[lane], &index); ++done) wanted.task(region.state, index);
    if (done > 0) __atomic_fetch_add(finished, done, __ATOMIC_RELEASE);
    if (!take_half(ranges, __atomic_load_n(&region.live, __ATOMIC_ACQUIRE), ranges[lane])) wait_a_little(&spins);
  }
}

bool is_finished(const Region& region) {
  const size_t last = region.phase_count - 1;
  return __atomic_load_n(&region.finished[last], __ATOMIC_ACQUIRE) == region.phases[last].count;
}

void run_lane(void* state, size_t) {
  Region& region = *static_cast<Region*>(state);
  if (is_finished(region)) return;
  const size_t lane = __atomic_fetch_add(&region.arrived, 1, __ATOMIC_RELAXED);
  if (lane >= kMaxLanes) return;  // lanes that somebody runs again
  if (lane > 0) {  // the first has every task
    for (size_t phase = 0; phase < region.phase_count; ++phase) region.ranges[phase][lane].span = 0;
    __atomic_fetch_or(&region.live, uint64_t{1} << lane, __ATOMIC_ACQ_REL);
  }
  for (size_t phase = 0; phase < region.phase_count; ++phase) run_phase(region, phase, lane);
}

void run_here(const Phase* phases, size_t phase_count, void* state) {
  for (size_t phase = 0; phase < phase_count; ++phase) {
    for (size_t index = 0; index < phases[phase].count; ++index) phases[phase].task(state, index);
  }
}

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

void run_phases(const k25_parallel* parallel, const Phase* phases, size_t phase_count, void* state) {
  size_t most = 0;
  for (size_t phase = 0; phase < phase_count; ++phase) most = phases[phase].count > most ? phases[phase].count : most;
  while (phase_count > 0 && phases[phase_count - 1].count == 0) --phase_count;
  if (parallel == nullptr || parallel->run == nullptr || most <= 1) return run_here(phases, phase_count, state);
  Region region;  // lanes write what they need of the rest
  region.phases = phases;
  region.phase_count = phase_count;
  region.state = state;
  region.arrived = 0;
  region.live = 1;
  for (size_t phase = 0; phase < phase_count; ++phase) {
    region.finished[phase] = 0;
    region.ranges[phase][0].span = span_of(0, phases[phase].count);
  }
  parallel->run(parallel->context, run_lane, &region, most < kMaxLanes ? most : kMaxLanes);
}

}  // namespace k25
