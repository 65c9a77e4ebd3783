// Operations in which the lanes of a wave meet, and barriers.
#pragma once
#include "launch.h"
#include "standard.h"

namespace sim {

// Each lane receives the value of lane `source`; 0, and a finding, where that lane does not exist.
template <class T>
inline T shuffle(T value, int source, const Site* site) {
  struct Frame {
    T in, out;
    int source;
    const Site* site;
  } frame{value, T(), source, site};
  meet_with(frame, site, kAnyLanes, [](const Meeting& m) {
    ++counts.shuffles;
    order_lanes(m);  // of AMD they run in lockstep
    each_lane<Frame>(m, [&](Frame& f, int lane) {
      if (f.source >= 0 && f.source < kLanes && m.mask >> f.source & 1)
        f.out = static_cast<Frame*>(m.frames[f.source])->in;
      else
        report_operand(f.site, lane, "a shuffle reads a lane that is not there");
    });
  });
  return frame.out;
}

// Every lane receives fold(of all values, in lane order).
template <class T, class Fold>
inline T fold_lanes(T value, Fold, const Site* site) {
  struct Frame {
    T value;
  } frame{value};
  meet_with(frame, site, kAnyLanes, [](const Meeting& m) {
    ++counts.reductions;
    T total = static_cast<Frame*>(m.frames[__builtin_ctzl(m.mask)])->value;
    bool first = true;
    each_lane<Frame>(m, [&](Frame& f, int) {
      if (!first) total = Fold()(total, f.value);
      first = false;
    });
    each_lane<Frame>(m, [&](Frame& f, int) { f.value = total; });
  });
  return frame.value;
}

// Votes of a whole group: two barriers, so that the next vote cannot begin before every thread has read this one.
inline int group_votes;
inline int count_votes(bool vote, const Site* site) {
  if (!current->index) group_votes = 0;
  threadgroup_barrier(kDevice | kThreadgroup, site);
  group_votes += vote;
  threadgroup_barrier(kDevice | kThreadgroup, site);
  const int votes = group_votes;
  threadgroup_barrier(kDevice | kThreadgroup, site);
  return votes;
}

}  // namespace sim

// Widths divide the wave into parts; a source past the end of a lane's part (before its start, for __shfl_up) is the
// lane itself, as in HIP's own amd_warp_functions.h.
template <class T>
inline T __shfl(T value, int source, int width = warpSize, SIM_SITE) {
  const int lane = sim::lane();
  return sim::shuffle(value, (source & (width - 1)) + (lane & ~(width - 1)), site);
}
template <class T>
inline T __shfl_up(T value, unsigned delta, int width = warpSize, SIM_SITE) {
  const int lane = sim::lane(), source = lane - int(delta);
  return sim::shuffle(value, source < (lane & ~(width - 1)) ? lane : source, site);
}
template <class T>
inline T __shfl_down(T value, unsigned delta, int width = warpSize, SIM_SITE) {
  const int lane = sim::lane();
  return sim::shuffle(value, (lane & (width - 1)) + int(delta) >= width ? lane : lane + int(delta), site);
}
template <class T>
inline T __shfl_xor(T value, int mask, int width = warpSize, SIM_SITE) {
  const int lane = sim::lane(), source = lane ^ mask;
  return sim::shuffle(value, source >= ((lane + width) & ~(width - 1)) ? lane : source, site);
}

inline unsigned long __ballot(int vote, SIM_SITE) {
  const unsigned long bit = vote ? 1ul << sim::lane() : 0;
  return sim::fold_lanes(bit, [](unsigned long a, unsigned long b) { return a | b; }, site);
}
inline int __any(int vote, SIM_SITE) {
  return sim::fold_lanes(vote != 0, [](bool a, bool b) { return a || b; }, site);
}
inline int __all(int vote, SIM_SITE) {
  return sim::fold_lanes(vote != 0, [](bool a, bool b) { return a && b; }, site);
}
inline unsigned __lane_id() { return sim::lane(); }

constexpr int __builtin_amdgcn_wavefrontsize() { return warpSize; }
template <class T>
inline T __builtin_amdgcn_readfirstlane(T value, SIM_SITE) {
  return sim::fold_lanes(value, [](T a, T) { return a; }, site);
}
template <class T>
inline T __builtin_amdgcn_readlane(T value, int lane, SIM_SITE) {
  return sim::shuffle(value, lane & (warpSize - 1), site);
}
inline int __builtin_amdgcn_ds_bpermute(int address, int value, SIM_SITE) {
  return sim::shuffle(value, address / 4 & (warpSize - 1), site);
}
inline int __builtin_amdgcn_mbcnt_lo(unsigned mask, unsigned base) {
  const unsigned lane = sim::lane();
  return base + __builtin_popcount(mask & (lane < 32 ? (1u << lane) - 1 : ~0u));
}
inline int __builtin_amdgcn_mbcnt_hi(unsigned mask, unsigned base) {
  const unsigned lane = sim::lane();
  return base + (lane < 32 ? 0 : __builtin_popcount(mask & ((1u << (lane - 32)) - 1)));
}

inline void __syncthreads(SIM_SITE) { sim::threadgroup_barrier(sim::kDevice | sim::kThreadgroup, site); }
inline void __builtin_amdgcn_s_barrier(SIM_SITE) { sim::threadgroup_barrier(sim::kDevice | sim::kThreadgroup, site); }
inline void __builtin_amdgcn_wave_barrier(SIM_SITE) { sim::simdgroup_barrier(sim::kDevice | sim::kThreadgroup, site); }
inline int __syncthreads_count(int vote, SIM_SITE) { return sim::count_votes(vote, site); }
inline int __syncthreads_and(int vote, SIM_SITE) { return !sim::count_votes(!vote, site); }
inline int __syncthreads_or(int vote, SIM_SITE) { return sim::count_votes(vote, site) != 0; }
// Fences and scheduling hints: no operation, since barriers alone order accesses here and nothing runs ahead.
inline void __threadfence() {}
inline void __threadfence_block() {}
template <class... A>
inline void __builtin_amdgcn_fence(int, A...) {}
inline void __builtin_amdgcn_s_waitcnt(int) {}
inline void __builtin_amdgcn_s_setprio(int) {}
inline void __builtin_amdgcn_sched_barrier(int) {}
inline void __builtin_amdgcn_sched_group_barrier(int, int, int) {}
inline void __builtin_amdgcn_iglp_opt(int) {}
