// Operations in which the lanes of a simdgroup meet, and barriers.
#pragma once
#include "../engine.h"
#include "math.h"

namespace metal {

enum class mem_flags : unsigned {
  mem_none = 0,
  mem_device = 1,
  mem_threadgroup = 2,
  mem_texture = 4,
  mem_threadgroup_imageblock = 8
};
SIM_FN constexpr mem_flags operator|(mem_flags a, mem_flags b) { return mem_flags(unsigned(a) | unsigned(b)); }

SIM_FN inline void threadgroup_barrier(mem_flags flags, SIM_SITE) { sim::threadgroup_barrier(unsigned(flags), site); }
SIM_FN inline void simdgroup_barrier(mem_flags flags, SIM_SITE) { sim::simdgroup_barrier(unsigned(flags), site); }

// Each lane receives the value of the lane that `source(own lane, its argument)` names, or keeps its `fill`.
template <class T>
struct shuffle_frame {
  T in, out;
  int argument;
};
template <class T, class Source>
SIM_FN inline T shuffle(T value, T fill, int argument, Source, const sim::Site* site) {
  using Frame = shuffle_frame<T>;
  Frame frame{value, fill, argument};
  sim::meet_with(frame, site, sim::kLiveLanes, [](const sim::Meeting& m) {
    ++sim::counts.shuffles;
    sim::each_lane<Frame>(m, [&](Frame& f, int lane) {
      const int source = Source()(lane, f.argument);
      if (source >= 0 && source < sim::kLanes && (m.mask >> source & 1))
        f.out = static_cast<Frame*>(m.frames[source])->in;
    });
  });
  return frame.out;
}
struct from_lane {
  int operator()(int, int n) const { return n; }
};
struct from_below {
  int operator()(int lane, int n) const { return lane - n; }
};
struct from_above {
  int operator()(int lane, int n) const { return lane + n; }
};
struct from_xor {
  int operator()(int lane, int n) const { return lane ^ n; }
};
struct from_below_around {
  int operator()(int lane, int n) const { return (lane - n) & 31; }
};
struct from_above_around {
  int operator()(int lane, int n) const { return (lane + n) & 31; }
};

template <class T>
SIM_FN inline T simd_shuffle(T v, ushort lane, SIM_SITE) {
  return shuffle(v, v, lane, from_lane(), site);
}
template <class T>
SIM_FN inline T simd_broadcast(T v, ushort lane, SIM_SITE) {
  return shuffle(v, v, lane, from_lane(), site);
}
template <class T>
SIM_FN inline T simd_shuffle_xor(T v, ushort mask, SIM_SITE) {
  return shuffle(v, v, mask, from_xor(), site);
}
template <class T>
SIM_FN inline T simd_shuffle_up(T v, ushort delta, SIM_SITE) {
  return shuffle(v, v, delta, from_below(), site);
}
template <class T>
SIM_FN inline T simd_shuffle_down(T v, ushort delta, SIM_SITE) {
  return shuffle(v, v, delta, from_above(), site);
}
template <class T>
SIM_FN inline T simd_shuffle_and_fill_up(T v, T fill, ushort delta, SIM_SITE) {
  return shuffle(v, fill, delta, from_below(), site);
}
template <class T>
SIM_FN inline T simd_shuffle_and_fill_down(T v, T fill, ushort delta, SIM_SITE) {
  return shuffle(v, fill, delta, from_above(), site);
}
template <class T>
SIM_FN inline T simd_shuffle_rotate_up(T v, ushort delta, SIM_SITE) {
  return shuffle(v, v, delta, from_below_around(), site);
}
template <class T>
SIM_FN inline T simd_shuffle_rotate_down(T v, ushort delta, SIM_SITE) {
  return shuffle(v, v, delta, from_above_around(), site);
}

// The same within four lanes.
template <class Source>
struct in_quad {
  int operator()(int lane, int n) const {
    const int source = Source()(lane & 3, n);
    return source < 0 || source > 3 ? -1 : (lane & ~3) + source;
  }
};
struct from_quad_below_around {
  int operator()(int lane, int n) const { return (lane - n) & 3; }
};
struct from_quad_above_around {
  int operator()(int lane, int n) const { return (lane + n) & 3; }
};
template <class T>
SIM_FN inline T quad_shuffle(T v, ushort lane, SIM_SITE) {
  return shuffle(v, v, lane, in_quad<from_lane>(), site);
}
template <class T>
SIM_FN inline T quad_broadcast(T v, ushort lane, SIM_SITE) {
  return shuffle(v, v, lane, in_quad<from_lane>(), site);
}
template <class T>
SIM_FN inline T quad_shuffle_xor(T v, ushort mask, SIM_SITE) {
  return shuffle(v, v, mask, in_quad<from_xor>(), site);
}
template <class T>
SIM_FN inline T quad_shuffle_up(T v, ushort delta, SIM_SITE) {
  return shuffle(v, v, delta, in_quad<from_below>(), site);
}
template <class T>
SIM_FN inline T quad_shuffle_down(T v, ushort delta, SIM_SITE) {
  return shuffle(v, v, delta, in_quad<from_above>(), site);
}
template <class T>
SIM_FN inline T quad_shuffle_rotate_up(T v, ushort delta, SIM_SITE) {
  return shuffle(v, v, delta, in_quad<from_quad_below_around>(), site);
}
template <class T>
SIM_FN inline T quad_shuffle_rotate_down(T v, ushort delta, SIM_SITE) {
  return shuffle(v, v, delta, in_quad<from_quad_above_around>(), site);
}

// Folds in lane order, over groups of `width` lanes. kAll gives every lane the whole; the others a prefix, with or
// without the lane itself.
enum class Scan { kAll, kInclusive, kExclusive };
template <Scan scan, int width = sim::kLanes, class T, class Fold>
SIM_FN inline T reduce(T value, T identity, Fold, const sim::Site* site) {
  struct Frame {
    T value, identity;
  } frame{value, identity};
  sim::meet_with(frame, site, sim::kLiveLanes, [](const sim::Meeting& m) {
    ++sim::counts.reductions;
    T total[sim::kLanes / width];
    unsigned begun = 0;
    sim::each_lane<Frame>(m, [&](Frame& f, int lane) {
      const int group = lane / width;
      const bool first = !(begun >> group & 1);
      const T own = f.value, before = first ? f.identity : total[group];
      total[group] = first ? own : T(Fold()(before, own));
      begun |= 1u << group;
      f.value = scan == Scan::kExclusive ? before : total[group];
    });
    if constexpr (scan == Scan::kAll)
      sim::each_lane<Frame>(m, [&](Frame& f, int lane) { f.value = total[lane / width]; });
  });
  return frame.value;
}
#define SIM_REDUCE(name, scan, width, identity, expression)                                                       \
  template <class T>                                                                                              \
  SIM_FN inline T name(T v, SIM_SITE) {                                                                           \
    return reduce<Scan::scan, width>(v, T(identity), [](const T& a, const T& b) { return T(expression); }, site); \
  }
SIM_REDUCE(simd_sum, kAll, 32, 0, a + b)
SIM_REDUCE(simd_product, kAll, 32, 1, a* b)
SIM_REDUCE(simd_min, kAll, 32, 0, min(a, b))
SIM_REDUCE(simd_max, kAll, 32, 0, max(a, b))
SIM_REDUCE(simd_and, kAll, 32, 0, a& b)
SIM_REDUCE(simd_or, kAll, 32, 0, a | b)
SIM_REDUCE(simd_xor, kAll, 32, 0, a ^ b)
SIM_REDUCE(quad_sum, kAll, 4, 0, a + b)
SIM_REDUCE(quad_product, kAll, 4, 1, a* b)
SIM_REDUCE(quad_min, kAll, 4, 0, min(a, b))
SIM_REDUCE(quad_max, kAll, 4, 0, max(a, b))
SIM_REDUCE(quad_and, kAll, 4, 0, a& b)
SIM_REDUCE(quad_or, kAll, 4, 0, a | b)
SIM_REDUCE(quad_xor, kAll, 4, 0, a ^ b)
SIM_REDUCE(quad_prefix_inclusive_sum, kInclusive, 4, 0, a + b)
SIM_REDUCE(quad_prefix_exclusive_sum, kExclusive, 4, 0, a + b)
SIM_REDUCE(quad_prefix_inclusive_product, kInclusive, 4, 1, a* b)
SIM_REDUCE(quad_prefix_exclusive_product, kExclusive, 4, 1, a* b)
SIM_REDUCE(simd_prefix_inclusive_sum, kInclusive, 32, 0, a + b)
SIM_REDUCE(simd_prefix_exclusive_sum, kExclusive, 32, 0, a + b)
SIM_REDUCE(simd_prefix_inclusive_product, kInclusive, 32, 1, a* b)
SIM_REDUCE(simd_prefix_exclusive_product, kExclusive, 32, 1, a* b)
#undef SIM_REDUCE
SIM_FN inline bool simd_any(bool v, SIM_SITE) {
  return reduce<Scan::kAll>(v, false, [](bool a, bool b) { return a || b; }, site);
}
SIM_FN inline bool simd_all(bool v, SIM_SITE) {
  return reduce<Scan::kAll>(v, true, [](bool a, bool b) { return a && b; }, site);
}
SIM_FN inline bool quad_any(bool v, SIM_SITE) {
  return reduce<Scan::kAll, 4>(v, false, [](bool a, bool b) { return a || b; }, site);
}
SIM_FN inline bool quad_all(bool v, SIM_SITE) {
  return reduce<Scan::kAll, 4>(v, true, [](bool a, bool b) { return a && b; }, site);
}
template <class T>
SIM_FN inline T simd_broadcast_first(T v, SIM_SITE) {
  return reduce<Scan::kAll>(v, v, [](const T& a, const T&) { return a; }, site);
}

struct os_log {  // says nothing here
  constexpr os_log(const char*, const char*) {}
  template <class... A>
  SIM_FN void log(A...) const {}
  template <class... A>
  SIM_FN void log_debug(A...) const {}
};

struct simd_vote {
  ulong bits;
  SIM_FN explicit constexpr operator ulong() const { return bits; }
};
SIM_FN inline simd_vote simd_ballot(bool v, SIM_SITE) {
  const ulong bit = v ? 1ul << sim::lane() : 0;
  return {reduce<Scan::kAll>(bit, 0ul, [](ulong a, ulong b) { return a | b; }, site)};
}

}  // namespace metal

SIM_FN inline ushort __metal_get_thread_index_in_simdgroup(ushort) { return sim::lane(); }
