// What the functions for MXFP4 on Hopper do in PTX, and which the tests do on a CPU.
#include <tl_templates/cuda/barrier.h>
#include <tl_templates/cuda/instruction/mma.h>
#include <tl_templates/cuda/instruction/wgmma.h>
#include <tl_templates/cuda/intrin.h>

namespace tilelang_ext {

__device__ __forceinline__ unsigned times_bfloat16(unsigned pair, unsigned factors) {
  unsigned product;
  asm("mul.rn.bf16x2 %0, %1, %2;" : "=r"(product) : "r"(pair), "r"(factors));
  return product;
}

// Bytes of two words by four selectors, of which one with its highest bit set gives the byte's sign eight times. CUDA's
// function of this purpose clears that bit.
__device__ __forceinline__ unsigned select_bytes(unsigned low, unsigned high, unsigned selectors) {
  unsigned bytes;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(bytes) : "r"(low), "r"(high), "r"(selectors));
  return bytes;
}

__device__ __forceinline__ unsigned address_in_shared(const void* shared) {
  return static_cast<unsigned>(__cvta_generic_to_shared(shared));
}

// The value, in a register: computed here, and not again where it is used.
template <typename Value>
__device__ __forceinline__ Value keep(Value value) {
  if constexpr (sizeof(Value) == 8)
    asm volatile("" : "+l"(value));
  else
    asm volatile("" : "+r"(value));
  return value;
}

// Begins to copy up to 4 bytes, and zeros to the others.
__device__ __forceinline__ void copy_4(void* shared, const void* global, int bytes) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(address_in_shared(shared)), "l"(global),
               "r"(bytes));
}

// Begins to copy 16 bytes, past L1; zeros if they are not `inside`.
__device__ __forceinline__ void copy_16(void* shared, const void* global, bool inside) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address_in_shared(shared)), "l"(global),
               "r"(inside ? 16 : 0));
}

// Closes a group of copies; waits until all but the last kGroups are done; shows them to wgmma too.
__device__ __forceinline__ void close_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

template <int kGroups>
__device__ __forceinline__ void finish_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kGroups) : "memory");
}

template <int kGroups>
__device__ __forceinline__ void wait_for_copies() {
  finish_copies<kGroups>();
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// Arrives when the copies of this thread are done.
__device__ __forceinline__ void arrive_behind_copies(Barrier* barrier) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared.b64 [%0];" ::"r"(address_in_shared(barrier)) : "memory");
}

__device__ __forceinline__ void keep_order_of_memory() { asm volatile("" ::: "memory"); }

// Named barriers from 8 on: upstream takes them from the first on. A turn of a warpgroup begins when that of the one
// before it has ended.
__device__ __forceinline__ void wait_for_turn(int warpgroup) {
  asm volatile("bar.sync %0, 256;" ::"r"(8 + warpgroup) : "memory");
}

__device__ __forceinline__ void give_turn_to(int warpgroup) {
  asm volatile("bar.arrive %0, 256;" ::"r"(8 + warpgroup) : "memory");
}

// Whether it holds in all threads of a warpgroup.
__device__ __forceinline__ bool all_of_warpgroup(int warpgroup, bool holds) {
  unsigned all;
  asm volatile(
      "{\n.reg .pred one, all;\nsetp.ne.u32 one, %1, 0;\nbar.red.and.pred all, %2, 128, one;\nselp.u32 %0, 1, 0, "
      "all;\n}"
      : "=r"(all)
      : "r"(static_cast<unsigned>(holds)), "r"(12 + warpgroup)
      : "memory");
  return all != 0;
}

// Lets the next kernel begin, which waits for this one to end.
__device__ __forceinline__ void let_next_begin() { asm volatile("griddepcontrol.launch_dependents;" ::: "memory"); }

// Begins to bring the line of a byte to the L2 cache.
__device__ __forceinline__ void prefetch(const char* from) { asm volatile("prefetch.global.L2 [%0];" ::"l"(from)); }

}  // namespace tilelang_ext
