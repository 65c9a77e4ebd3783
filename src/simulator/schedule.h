// Runs the threads of one threadgroup: simdgroup by simdgroup to its next barrier, lanes in a seeded ring.
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
  bool needs_all;
};

struct Simdgroup {
  int index, size;     // lanes that exist
  int alive, arrived;  // not returned; of these, waiting or at the barrier
  int held;            // of the arrived, those at the threadgroup's barrier
  bool mixed;          // the waiting lanes came to different places: see lane_calls, not call
  Call call, lane_calls[kLanes];
  uint8_t state[kLanes];
  uint8_t order[kLanes];  // of running
  Meeting meeting;
  Thread threads[kLanes];
};

inline Simdgroup* simdgroups;
inline int simdgroup_count;
inline Context scheduler;
inline Stacks stacks;
inline unsigned barrier_flags;

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

inline void release(Simdgroup* s, unsigned mask) {
  for (int lane = 0; lane < s->size; ++lane)
    if (mask >> lane & 1) {
      s->state[lane] = kRunning;
      --s->arrived;
    }
}

inline unsigned full_mask(const Simdgroup* s) { return s->size == 32 ? ~0u : (1u << s->size) - 1; }

inline void run_operation(Simdgroup* s, unsigned mask, const Call& call) {
  const unsigned all = call.needs_all ? ~0u : full_mask(s);
  if (job->check && mask != all)
    report(kDivergence, call.site, s->threads[__builtin_ctz(mask)].position,
           "simdgroup operation reached by %d of %d lanes; lane %d is missing", __builtin_popcount(mask),
           call.needs_all ? kLanes : s->size, __builtin_ctz(~mask & all));
  s->meeting.mask = mask;
  call.operation(s->meeting);
}

// From here on every lane's own call is known.
__attribute__((noinline)) inline void split(Simdgroup* s) {
  for (int lane = 0; lane < s->size; ++lane)
    if (s->state[lane] == kWaiting) s->lane_calls[lane] = s->call;
  s->mixed = true;
}

// The lanes came to different places: the earliest operation in the text runs with the lanes that are there.
__attribute__((noinline)) inline void resolve_divergence(Simdgroup* s) {
  if (!s->mixed) split(s);
  const Call* first = nullptr;
  for (int lane = 0; lane < s->size; ++lane) {
    if (s->state[lane] != kWaiting) continue;
    const Call* call = &s->lane_calls[lane];
    if (!first || call->site->_M_line < first->site->_M_line ||
        (call->site->_M_line == first->site->_M_line && call->site->_M_column < first->site->_M_column))
      first = call;
  }
  const Call call = *first;
  unsigned mask = 0;
  for (int lane = 0; lane < s->size; ++lane)
    if (s->state[lane] == kWaiting && s->lane_calls[lane].site == call.site &&
        s->lane_calls[lane].operation == call.operation)
      mask |= 1u << lane;
  run_operation(s, mask, call);
  release(s, mask);
}

// Everybody alive has arrived somewhere: release lanes, unless all are at the threadgroup barrier.
inline void settle(Simdgroup* s) {
  if (s->held == s->alive) return;
  if (s->mixed || s->held) return resolve_divergence(s);
  unsigned mask = full_mask(s);
  if (s->alive == s->size) {
    run_operation(s, mask, s->call);
    memset(s->state, kRunning, s->size);
    s->arrived = 0;
    return;
  }
  for (int lane = 0; lane < s->size; ++lane)
    if (s->state[lane] != kWaiting) mask &= ~(1u << lane);
  run_operation(s, mask, s->call);
  release(s, mask);
}

void meet(Operation operation, void* frame, const Site* site, bool needs_all_lanes) {
  Thread* self = current;
  Simdgroup* s = self->simdgroup;
  const int lane = self->lane;
  s->meeting.frames[lane] = frame;
  if (s->arrived == s->held) {
    s->call = {site, operation, needs_all_lanes};
    s->mixed = false;
  } else if (s->mixed || s->call.site != site || s->call.operation != operation) {
    if (!s->mixed) split(s);
    s->lane_calls[lane] = {site, operation, needs_all_lanes};
  }
  s->state[lane] = kWaiting;
  if (++s->arrived == s->alive) settle(s);
  if (s->state[lane] != kRunning) leave(s, self);
}

void threadgroup_barrier(unsigned memory, const Site* site) {
  Thread* self = current;
  Simdgroup* s = self->simdgroup;
  self->site = site;
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
        const Frame* f = static_cast<const Frame*>(m.frames[__builtin_ctz(m.mask)]);
        ++counts.simdgroup_barriers;
        order_simdgroup(current->simdgroup->index, f->memory);
      },
      &frame, site, false);
}

// A fiber's life: the kernel once for each threadgroup it is started for.
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

// One place of the text, in whatever instantiation of a template.
inline bool same_place(const Site* a, const Site* b) {
  return a == b ||
         (a->_M_line == b->_M_line && a->_M_column == b->_M_column && !strcmp(a->_M_file_name, b->_M_file_name));
}

// All simdgroups stand at a barrier or are done.
inline bool pass_barrier(unsigned total) {
  const Thread *first = nullptr, *other = nullptr;
  unsigned waiting = 0;
  for (int i = 0; i < simdgroup_count; ++i) {
    Simdgroup* s = &simdgroups[i];
    waiting += s->held;
    for (int lane = 0; lane < s->size; ++lane) {
      if (s->state[lane] != kAtBarrier) continue;
      if (!first) first = &s->threads[lane];
      if (!same_place(s->threads[lane].site, first->site)) other = &s->threads[lane];
    }
  }
  if (!waiting) return false;
  if (job->check && waiting != total)
    report(kDivergence, first->site, first->position,
           "threadgroup_barrier reached by %u of %u threads; the others have returned", waiting, total);
  if (job->check && other)
    report(kDivergence, other->site, other->position,
           "threadgroup_barrier here while thread (%u, %u, %u) waits at line %u", first->position[0],
           first->position[1], first->position[2], first->site->_M_line);
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
