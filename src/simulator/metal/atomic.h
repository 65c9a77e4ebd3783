// Atomics: real ones, because workers share device memory.
#pragma once
#include "../engine.h"
#include "types.h"

namespace metal {

enum memory_order { memory_order_relaxed };

template <class T>
struct atomic {
  T value;
};

template <class T>
SIM_FN inline T atomic_load_explicit(const volatile atomic<T>* a, memory_order, SIM_SITE) {
  sim::atomic_access(a, sizeof(T), sim::kAtomicLoad, site);
  T r;
  __atomic_load(&a->value, &r, __ATOMIC_RELAXED);
  return r;
}
template <class T, class U>
SIM_FN inline void atomic_store_explicit(volatile atomic<T>* a, U v, memory_order, SIM_SITE) {
  sim::atomic_access(a, sizeof(T), sim::kAtomicStore, site);
  T t = T(v);
  __atomic_store(&a->value, &t, __ATOMIC_RELAXED);
}
template <class T, class U>
SIM_FN inline T atomic_exchange_explicit(volatile atomic<T>* a, U v, memory_order, SIM_SITE) {
  sim::atomic_access(a, sizeof(T), sim::kAtomicUpdate, site);
  T t = T(v), r;
  __atomic_exchange(&a->value, &t, &r, __ATOMIC_RELAXED);
  return r;
}
template <class T, class U>
SIM_FN inline bool atomic_compare_exchange_weak_explicit(volatile atomic<T>* a, T* expected, U desired, memory_order,
                                                         memory_order, SIM_SITE) {
  sim::atomic_access(a, sizeof(T), sim::kAtomicUpdate, site);
  T t = T(desired);
  return __atomic_compare_exchange(&a->value, expected, &t, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED);
}
#define SIM_FETCH(name, expression)                                                                       \
  template <class T, class U>                                                                             \
  SIM_FN inline T atomic_fetch_##name##_explicit(volatile atomic<T>* a, U v, memory_order, SIM_SITE) {    \
    sim::atomic_access(a, sizeof(T), sim::kAtomicUpdate, site);                                           \
    const T y = T(v);                                                                                     \
    T x, next;                                                                                            \
    __atomic_load(&a->value, &x, __ATOMIC_RELAXED);                                                       \
    do {                                                                                                  \
      next = T(expression);                                                                               \
    } while (!__atomic_compare_exchange(&a->value, &x, &next, true, __ATOMIC_RELAXED, __ATOMIC_RELAXED)); \
    return x;                                                                                             \
  }
SIM_FETCH(add, x + y)
SIM_FETCH(sub, x - y)
SIM_FETCH(min, y < x ? y : x)
SIM_FETCH(max, x < y ? y : x)
SIM_FETCH(and, x& y)
SIM_FETCH(or, x | y)
SIM_FETCH(xor, x ^ y)
#undef SIM_FETCH

}  // namespace metal

using atomic_int = metal::atomic<int>;
using atomic_uint = metal::atomic<uint>;
using atomic_float = metal::atomic<float>;
using atomic_bool = metal::atomic<bool>;
using atomic_ulong = metal::atomic<ulong>;
namespace metal {
using ::atomic_bool;
using ::atomic_float;
using ::atomic_int;
using ::atomic_uint;
using ::atomic_ulong;
}  // namespace metal
