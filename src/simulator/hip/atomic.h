// Atomics: real ones, because workers share device memory.
#pragma once
#include "../engine.h"

#define __HIP_MEMORY_SCOPE_SINGLETHREAD 1
#define __HIP_MEMORY_SCOPE_WAVEFRONT 2
#define __HIP_MEMORY_SCOPE_WORKGROUP 3
#define __HIP_MEMORY_SCOPE_AGENT 4
#define __HIP_MEMORY_SCOPE_SYSTEM 5

#define SIM_ATOMIC(name, expression)                                                                    \
  template <class T>                                                                                    \
  inline T name(T* address, T y, SIM_SITE) {                                                            \
    sim::atomic_access(address, sizeof(T), sim::kAtomicUpdate, site);                                   \
    T x, next;                                                                                          \
    __atomic_load(address, &x, __ATOMIC_RELAXED);                                                       \
    do {                                                                                                \
      next = expression;                                                                                \
    } while (!__atomic_compare_exchange(address, &x, &next, true, __ATOMIC_RELAXED, __ATOMIC_RELAXED)); \
    return x;                                                                                           \
  }
SIM_ATOMIC(atomicAdd, x + y)
SIM_ATOMIC(unsafeAtomicAdd, x + y)
SIM_ATOMIC(atomicSub, x - y)
SIM_ATOMIC(atomicMax, x < y ? y : x)
SIM_ATOMIC(atomicMin, y < x ? y : x)
SIM_ATOMIC(atomicAnd, x& y)
SIM_ATOMIC(atomicOr, x | y)
SIM_ATOMIC(atomicXor, x ^ y)
SIM_ATOMIC(atomicExch, y)
#undef SIM_ATOMIC
template <class T>
inline T atomicCAS(T* address, T expected, T desired, SIM_SITE) {
  sim::atomic_access(address, sizeof(T), sim::kAtomicUpdate, site);
  __atomic_compare_exchange(address, &expected, &desired, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED);
  return expected;
}

// clang's own builtins of these names are for AMD targets alone.
#define __hip_atomic_load sim::atomic_load
#define __hip_atomic_store sim::atomic_store
namespace sim {
template <class T>
inline T atomic_load(T* address, int, int, SIM_SITE) {
  atomic_access(address, sizeof(T), kAtomicLoad, site);
  T value;
  __atomic_load(address, &value, __ATOMIC_RELAXED);
  return value;
}
template <class T>
inline void atomic_store(T* address, T value, int, int, SIM_SITE) {
  atomic_access(address, sizeof(T), kAtomicStore, site);
  __atomic_store(address, &value, __ATOMIC_RELAXED);
}
}  // namespace sim
