#include "parallel.h"

#include <sched.h>

#if defined(__x86_64__) || defined(__i386__)
#include <immintrin.h>
#endif

namespace k25 {
namespace {

// More lanes than the memory of a machine can feed; one that comes when all is done returns at once.
constexpr size_t kMaxLanes = 64;
constexpr size_t kMaxPhases = 4;
// After this many looks the thread that is waited for may have lost its core: give ours up.
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
  alignas(64) size_t lanes;                 // that have come
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

// The upper half of the largest range of the others, as `lane`'s own, which is empty. False where nothing is left to take.
bool take_half(Range* ranges, size_t lane, size_t lanes) {
  for (;;) {
    size_t victim = lanes;
    uint64_t most = 0, seen = 0;
    for (size_t other = 0; other < lanes; ++other) {
      const uint64_t span = load(ranges[other]);
      if (left_in(span) <= most) continue;
      most = left_in(span);
      seen = span;
      victim = other;
    }
    if (victim == lanes) return false;
    const uint64_t middle = begin_of(seen) + most / 2;
    if (!replace(ranges[victim], seen, span_of(begin_of(seen), middle))) continue;
    __atomic_store_n(&ranges[lane].span, span_of(middle, end_of(seen)), __ATOMIC_RELEASE);
    return true;
  }
}

void pause(int* spins) {
#if defined(__x86_64__) || defined(__i386__)
  _mm_pause();
#elif defined(__aarch64__)
  __asm__ __volatile__("yield");
#endif
  if (++*spins < kSpins) return;
  *spins = 0;
  sched_yield();
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
    if (!take_half(ranges, lane, __atomic_load_n(&region.lanes, __ATOMIC_ACQUIRE))) pause(&spins);
  }
}

void run_lane(void* state, size_t) {
  Region& region = *static_cast<Region*>(state);
  const size_t lane = __atomic_fetch_add(&region.lanes, 1, __ATOMIC_ACQ_REL);
  for (size_t phase = 0; phase < region.phase_count; ++phase) run_phase(region, phase, lane);
}

void run_here(const Phase* phases, size_t phase_count, void* state) {
  for (size_t phase = 0; phase < phase_count; ++phase) {
    for (size_t index = 0; index < phases[phase].count; ++index) phases[phase].task(state, index);
  }
}

}  // namespace

void run_phases(const k25_parallel* parallel, const Phase* phases, size_t phase_count, void* state) {
  size_t most = 0;
  for (size_t phase = 0; phase < phase_count; ++phase) most = phases[phase].count > most ? phases[phase].count : most;
  if (parallel == nullptr || parallel->run == nullptr || most <= 1) return run_here(phases, phase_count, state);
  Region region;
  region.phases = phases;
  region.phase_count = phase_count;
  region.state = state;
  region.lanes = 0;
  const size_t lanes = most < kMaxLanes ? most : kMaxLanes;
  for (size_t phase = 0; phase < phase_count; ++phase) {
    region.finished[phase] = 0;
    region.ranges[phase][0].span = span_of(0, phases[phase].count);
    for (size_t lane = 1; lane < lanes; ++lane) region.ranges[phase][lane].span = 0;
  }
  parallel->run(parallel->context, run_lane, &region, lanes);
}

}  // namespace k25
