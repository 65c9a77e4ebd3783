// Runs the threads of one threadgroup: each simdgroup to its next barrier, its lanes in a seeded circular order.
#pragma once
#include <string.h>

#include "fiber.h"
#include "memory.h"

namespace sim {

enum State : uint8_t { kDone, kRunning, kWaiting, kAtBarrier };

// What a lane waits for.
struct Call {
  const Site* site;
  Operation operation;
  Needs needs;
  const void* pc;  // where the program continues
};

// The line of the kernel's text; code inlined from a header counts as the line that calls it.
inline uint32_t line_of(const void* pc, const Site* site) {
  uint32_t line = 0;
  const char* file;
  find_line(pc, &line, &file);
  return line ? line : site->_M_line;
}

// Whether two calls are the same operation of the text; the compiler may have duplicated it, so addresses may differ.
inline bool same_call(const Call& a, const Call& b) {
  return a.site == b.site && a.operation == b.operation &&
         (a.pc == b.pc || line_of(a.pc, a.site) == line_of(b.pc, b.site));
}

struct Simdgroup {
  int index, size;     // its number in the threadgroup, its lanes
  int alive, arrived;  // lanes that have not returned; of these, those waiting or at the threadgroup barrier
  int held;            // of the arrived lanes, those at the threadgroup barrier
  bool mixed;          // the waiting lanes came to different operations: lane_calls holds them, not call
  Call call, lane_calls[kLanes];
  uint8_t state[kLanes];
  uint8_t order[kLanes];  // in which the lanes run
  Meeting meeting;
  Thread threads[kLanes];
};

inline Simdgroup* simdgroups;
inline int simdgroup_count;
inline Context scheduler;
inline Stacks stacks;
inline unsigned barrier_flags;
inline const Call* running;  // the operation that runs now, or null

struct Random {  // splitmix64
  uint64_t state;
  uint64_t next() {
    uint64_t z = (state += 0x9e3779b97f4a7c15);
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9;
    z = (z ^ (z >> 27)) * 0x94d049bb133111eb;
    return z ^ (z >> 31);
  }
  template <class T>
  void shuffle(T* items, int count) {
    for (int i = count - 1; i > 0; --i) {
      int j = int(next() % uint64_t(i + 1));
      T t = items[i];
      items[i] = items[j];
      items[j] = t;
    }
  }
};

// Continues the next lane that can run, or the scheduler when there is none.
__attribute__((always_inline)) inline void leave(Simdgroup* s, Thread* self) {
  Thread* next = self->next;
  for (int i = 0; i < s->size; ++i, next = next->next) {
    if (s->state[next->lane] != kRunning) continue;
    if (next == self) return;
    current = next;
    switch_context(&self->context, &next->context);
    return;
  }
  switch_context(&self->context, &scheduler);
}

inline void release(Simdgroup* s, LaneMask mask) {
  for (int lane = 0; lane < s->size; ++lane)
    if (mask >> lane & 1) {
      s->state[lane] = kRunning;
      --s->arrived;
    }
}

// The mask of all lanes of a simdgroup.
constexpr LaneMask kFullMask = ~LaneMask(0) >> (64 - kLanes);

inline LaneMask full_mask(const Simdgroup* s) { return kFullMask >> (kLanes - s->size); }

inline void run_operation(Simdgroup* s, LaneMask mask, const Call& call) {
  const LaneMask all = call.needs == kAllLanes ? kFullMask : full_mask(s);
  if (job->check && mask != all && call.needs != kAnyLanes)
    report(kDivergence, call.site, call.pc, s->threads[__builtin_ctzl(mask)].position,
           SIM_WAVE " operation reached by %d of %d lanes; lane %d is missing", __builtin_popcountl(mask),
           call.needs == kAllLanes ? kLanes : s->size, __builtin_ctzl(~mask & all));
  s->meeting.mask = mask;
  running = &call;
  call.operation(s->meeting);
  running = nullptr;
}

// Gives every waiting lane its own record of the operation that it waits for.
__attribute__((noinline)) inline void split(Simdgroup* s) {
  for (int lane = 0; lane < s->size; ++lane)
    if (s->state[lane] == kWaiting) s->lane_calls[lane] = s->call;
  s->mixed = true;
}

// The lanes came to different places: the earliest operation in the text runs with the lanes that are there.
__attribute__((noinline)) inline void resolve_divergence(Simdgroup* s) {
  if (!s->mixed) split(s);
  const Call* first = nullptr;
  uint32_t first_line = 0;
  for (int lane = 0; lane < s->size; ++lane) {
    if (s->state[lane] != kWaiting) continue;
    const Call* call = &s->lane_calls[lane];
    const uint32_t line = line_of(call->pc, call->site);
    if (!first || line < first_line || (line == first_line && call->site->_M_column < first->site->_M_column)) {
      first = call;
      first_line = line;
    }
  }
  const Call call = *first;
  LaneMask mask = 0;
  for (int lane = 0; lane < s->size; ++lane)
    if (s->state[lane] == kWaiting && same_call(s->lane_calls[lane], call)) mask |= LaneMask(1) << lane;
  run_operation(s, mask, call);
  release(s, mask);
}

// All lanes that have not returned have arrived: releases lanes, unless all are at the threadgroup barrier.
inline void settle(Simdgroup* s) {
  if (s->held == s->alive) return;
  if (s->mixed || s->held) return resolve_divergence(s);
  LaneMask mask = full_mask(s);
  if (s->alive == s->size) {
    run_operation(s, mask, s->call);
    memset(s->state, kRunning, s->size);
    s->arrived = 0;
    return;
  }
  for (int lane = 0; lane < s->size; ++lane)
    if (s->state[lane] != kWaiting) mask &= ~(LaneMask(1) << lane);
  run_operation(s, mask, s->call);
  release(s, mask);
}

void meet(Operation operation, void* frame, const Site* site, Needs needs) {
  const Call call{site, operation, needs, __builtin_return_address(0)};
  Thread* self = current;
  Simdgroup* s = self->simdgroup;
  const int lane = self->lane;
  s->meeting.frames[lane] = frame;
  if (s->arrived == s->held) {
    s->call = call;
    s->mixed = false;
  } else if (s->mixed || !same_call(s->call, call)) {
    if (!s->mixed) split(s);
    s->lane_calls[lane] = call;
  }
  s->state[lane] = kWaiting;
  if (++s->arrived == s->alive) settle(s);
  if (s->state[lane] != kRunning) leave(s, self);
}

void threadgroup_barrier(unsigned memory, const Site* site) {
  Thread* self = current;
  Simdgroup* s = self->simdgroup;
  self->site = site;
  self->pc = __builtin_return_address(0);
  s->state[self->lane] = kAtBarrier;
  ++s->held;
  ++s->arrived;
  barrier_flags = memory;
  if (s->arrived == s->alive) settle(s);
  leave(s, self);
}

void simdgroup_barrier(unsigned memory, const Site* site) {
  struct Frame {
    unsigned memory;
  } frame{memory};
  meet(
      [](const Meeting& m) {
        const Frame* f = static_cast<const Frame*>(m.frames[__builtin_ctzl(m.mask)]);
        ++counts.simdgroup_barriers;
        order_simdgroup(current->simdgroup->index, f->memory);
      },
      &frame, site, kLiveLanes);
}

void order_lanes(const Meeting& m) {
  const Simdgroup* s = current->simdgroup;
  if (__builtin_popcountl(m.mask) == s->alive) order_simdgroup(s->index, kDevice | kThreadgroup);
}

// What a fiber runs: the kernel, once for each threadgroup that it is started for.
inline void fiber_main() {
  sim_kernel();
  Thread* self = current;
  Simdgroup* s = self->simdgroup;
  s->state[self->lane] = kDone;
  --s->alive;
  if (s->alive && s->arrived == s->alive) settle(s);
  leave(s, self);
  __builtin_trap();
}

// Whether two threads wait at the same barrier of the text; instantiations of a template count as one.
inline bool same_barrier(const Thread& a, const Thread& b) {
  if (a.pc == b.pc) return true;
  const Site *s = a.site, *t = b.site;
  return s->_M_line == t->_M_line && s->_M_column == t->_M_column && !strcmp(s->_M_file_name, t->_M_file_name) &&
         line_of(a.pc, s) == line_of(b.pc, t);
}

// Releases the threads when all have arrived at a barrier or returned; false when all have returned.
inline bool pass_barrier(unsigned total) {
  const Thread *first = nullptr, *other = nullptr;
  unsigned waiting = 0;
  for (int i = 0; i < simdgroup_count; ++i) {
    Simdgroup* s = &simdgroups[i];
    waiting += s->held;
    for (int lane = 0; lane < s->size; ++lane) {
      if (s->state[lane] != kAtBarrier) continue;
      if (!first) first = &s->threads[lane];
      if (!same_barrier(s->threads[lane], *first)) other = &s->threads[lane];
    }
  }
  if (!waiting) return false;
  if (job->check && waiting != total)
    report(kDivergence, first->site, first->pc, first->position,
           SIM_BARRIER " reached by %u of %u threads; the others have returned", waiting, total);
  if (job->check && other)
    report(kDivergence, other->site, other->pc, other->position,
           SIM_BARRIER " here while thread (%u, %u, %u) waits at line %u", first->position[0], first->position[1],
           first->position[2], line_of(first->pc, first->site));
  ++counts.barriers;
  order_threadgroup(barrier_flags);
  for (int i = 0; i < simdgroup_count; ++i) {
    Simdgroup* s = &simdgroups[i];
    for (int lane = 0; lane < s->size; ++lane)
      if (s->state[lane] == kAtBarrier) s->state[lane] = kRunning;
    s->held = s->arrived = 0;
  }
  return true;
}

inline void run_threadgroup(uint64_t group) {
  group_position[0] = group % launch.grid[0];
  group_position[1] = group / launch.grid[0] % launch.grid[1];
  group_position[2] = group / launch.grid[0] / launch.grid[1];
  const unsigned total = launch.threads[0] * launch.threads[1] * launch.threads[2];
  begin_threadgroup(group);
  Random random{job->seed * 0x9e3779b97f4a7c15 + group};
  int order[1024 / kLanes];
  for (int i = 0; i < simdgroup_count; ++i) {
    Simdgroup* s = &simdgroups[i];
    order[i] = i;
    s->alive = s->size;
    s->arrived = s->held = 0;
    for (int lane = 0; lane < s->size; ++lane) {
      s->order[lane] = lane;
      s->state[lane] = kRunning;
      stacks.start(&s->threads[lane].context, i * kLanes + lane, fiber_main);
    }
    random.shuffle(s->order, s->size);
    for (int p = 0; p < s->size; ++p) s->threads[s->order[p]].next = &s->threads[s->order[(p + 1) % s->size]];
  }
  do {
    random.shuffle(order, simdgroup_count);
    for (int i = 0; i < simdgroup_count; ++i) {
      Simdgroup* s = &simdgroups[order[i]];
      for (int p = 0; p < s->size; ++p) {
        Thread* t = &s->threads[s->order[p]];
        if (s->state[t->lane] != kRunning) continue;
        current = t;
        switch_context(&scheduler, &t->context);
        break;
      }
    }
  } while (pass_barrier(total));
}

inline bool create_threads() {
  const unsigned total = launch.threads[0] * launch.threads[1] * launch.threads[2];
  simdgroup_count = (total + kLanes - 1) / kLanes;
  simdgroups = static_cast<Simdgroup*>(calloc(simdgroup_count, sizeof(Simdgroup)));
  if (!simdgroups || !stacks.allocate(simdgroup_count * kLanes)) return false;
  for (unsigned i = 0; i < total; ++i) {
    Simdgroup* s = &simdgroups[i / kLanes];
    Thread* t = &s->threads[i % kLanes];
    s->index = i / kLanes;
    s->size = i % kLanes + 1;
    t->simdgroup = s;
    t->lane = i % kLanes;
    t->index = i;
    t->position[0] = i % launch.threads[0];
    t->position[1] = i / launch.threads[0] % launch.threads[1];
    t->position[2] = i / launch.threads[0] / launch.threads[1];
  }
  return true;
}

}  // namespace sim
