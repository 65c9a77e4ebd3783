// Inline assembly of TileLang's templates, as functions of its mnemonics, and what it does: loads that bypass
// registers.
#pragma once
#include "types.h"
#include "wave.h"

namespace sim {

// Loads from device memory straight to LDS are in flight until the wave waits for them: what they bring is in LDS only
// then. A barrier does not wait for them (LLVM's "User Guide for AMDGPU Backend", memory model: release at work-group
// scope).
struct InFlight {
  static constexpr int kMost = 63;  // vmcnt has six bits
  struct Load {
    char* to;
    uint4 value;
    int size;
    const Site* site;
  } loads[kMost];
  int count;

  void land_all_but(int n) {
    int done = 0;
    for (; done < count - n; ++done) {
      const Load& load = loads[done];
      plain_access(load.to, load.size, kWrite, load.site);
      __builtin_memcpy(load.to, &load.value, load.size);
    }
    count -= done;
    for (int i = 0; i < count; ++i) loads[i] = loads[i + done];
  }
};
inline InFlight in_flight[1024];  // by thread
inline void begin_thread() { in_flight[current->index].count = 0; }

template <class T>
inline void load_to_lds(unsigned long lds_base, unsigned offset, const int (&resource)[4], const Site* site) {
  // A buffer resource: 48 bits of address, then the number of bytes that may be read (CDNA 3 ISA, "Buffer Resource").
  const unsigned long base = (unsigned)resource[0] | ((unsigned long)resource[1] & 0xffff) << 32;
  const char* from = reinterpret_cast<const char*>(base) + offset;
  InFlight& mine = in_flight[current->index];
  if (mine.count == InFlight::kMost) mine.land_all_but(InFlight::kMost - 1);
  InFlight::Load& load = mine.loads[mine.count++];
  // M0 is the first lane's place; the others follow.
  load = {reinterpret_cast<char*>(reinterpret_cast<T*>(lds_base) + lane()), {}, sizeof(T), site};
  if (offset + sizeof(T) <= (unsigned)resource[2]) {
    plain_access(from, sizeof(T), kRead, site);
    __builtin_memcpy(&load.value, from, sizeof(T));
  }
}

inline void asm_s_waitcnt_vmcnt(int n) { in_flight[current->index].land_all_but(n); }
inline void asm_s_waitcnt_lgkmcnt(int) {}  // accesses to LDS are in order
inline void asm_s_barrier(SIM_SITE) { threadgroup_barrier(kDevice | kThreadgroup, site); }
inline void asm_s_mov_b32(unsigned) {}  // of M0, which loads set themselves
inline void asm_s_add_u32(unsigned) {}
template <class V>
inline void asm_s_mov_b32_buffer_load_dword(unsigned long lds_base, unsigned offset, V resource, SIM_SITE) {
  const int words[4] = {resource[0], resource[1], resource[2], resource[3]};
  load_to_lds<int>(lds_base, offset, words, site);
}
template <class V>
inline void asm_s_mov_b32_buffer_load_dwordx4(unsigned long lds_base, unsigned offset, V resource, SIM_SITE) {
  const int words[4] = {resource[0], resource[1], resource[2], resource[3]};
  load_to_lds<uint4>(lds_base, offset, words, site);
}

}  // namespace sim

// gfx950's transposing reads of LDS.
template <class P>
inline auto __builtin_amdgcn_ds_read_tr16_b64_v4f16(P p, SIM_SITE) {
  sim::report_operand(site, sim::lane(), "ds_read_b64_tr_b16 is not simulated");
  return decltype(*p + *p){};
}
template <class P>
inline auto __builtin_amdgcn_ds_read_tr8_b64_v2i32(P p, SIM_SITE) {
  sim::report_operand(site, sim::lane(), "ds_read_b64_tr_b8 is not simulated");
  return decltype(*p + *p){};
}
