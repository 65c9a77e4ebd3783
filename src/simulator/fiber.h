// Fibers. Each has its own stack; a switch saves only where to continue, and the compiler spills what is live.
// The inlined switch jumps instead of returning, so lanes in step keep the branch predictors warm.
#pragma once
#include <stdint.h>
#include <stdlib.h>
#include <sys/mman.h>

#include "engine.h"

#ifdef __APPLE__
#define SIM_X18  // the platform's register
#else
#define SIM_X18 "x18",
#endif

namespace sim {

__attribute__((always_inline)) inline void switch_context(Context* from, Context* to) {
#if defined(__x86_64__)
  asm volatile(
      "leaq 1f(%%rip), %%rax\n\t"
      "movq %%rax, 0(%%rdi)\n\t"
      "movq %%rsp, 8(%%rdi)\n\t"
      "movq %%rbp, 16(%%rdi)\n\t"
      "movq 8(%%rsi), %%rsp\n\t"
      "movq 16(%%rsi), %%rbp\n\t"
      "jmpq *0(%%rsi)\n"
      "1:\n"
      : "+D"(from), "+S"(to)
      :
      : "rax", "rbx", "rcx", "rdx", "r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15", "xmm0", "xmm1", "xmm2",
        "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8", "xmm9", "xmm10", "xmm11", "xmm12", "xmm13", "xmm14", "xmm15",
        "cc", "memory");
#elif defined(__aarch64__)
  register Context* x0 asm("x0") = from;
  register Context* x1 asm("x1") = to;
  asm volatile(
      "adr x9, 1f\n\t"
      "mov x10, sp\n\t"
      "stp x9, x10, [x0]\n\t"
      "stp x29, x30, [x0, #16]\n\t"
      "ldp x9, x10, [x1]\n\t"
      "ldp x29, x30, [x1, #16]\n\t"
      "mov sp, x10\n\t"
      "br x9\n"
      "1:\n\t"
      "hint #36\n"  // a landing pad where branch targets are enforced
      : "+r"(x0), "+r"(x1)
      :
      : "x2", "x3", "x4", "x5", "x6", "x7", "x8", "x9", "x10", "x11", "x12", "x13", "x14", "x15", "x16", "x17",
        SIM_X18 "x19", "x20", "x21", "x22", "x23", "x24", "x25", "x26", "x27", "x28", "v0", "v1", "v2", "v3", "v4",
        "v5", "v6", "v7", "v8", "v9", "v10", "v11", "v12", "v13", "v14", "v15", "v16", "v17", "v18", "v19", "v20",
        "v21", "v22", "v23", "v24", "v25", "v26", "v27", "v28", "v29", "v30", "v31", "cc", "memory");
#else
#error "the simulator runs on x86-64 and arm64"
#endif
}

// One mapping for all stacks. The lowest page of each is a guard; tops are staggered so that the same local of 32
// lanes does not fall into one cache set.
class Stacks {
 public:
  static constexpr size_t kSize = 1 << 20, kGuard = 16 << 10;

  bool allocate(int count) {
    size_ = kSize * count;
    void* p = mmap(nullptr, size_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANON | MAP_NORESERVE, -1, 0);
    if (p == MAP_FAILED) return false;
    base_ = static_cast<char*>(p);
    for (int i = 0; i < count; ++i) mprotect(base_ + i * kSize, kGuard, PROT_NONE);
    return true;
  }
  bool contains(const void* p) const { return size_t((const char*)p - base_) < size_; }

  void start(Context* context, int index, void (*body)()) {
    char* top = base_ + (index + 1) * kSize - 64 - (index % 64) * 1088;
    top = (char*)((uintptr_t)top & ~uintptr_t(63));
    *context = {};
    context->pc = (void*)body;
#ifdef __x86_64__
    top -= 8;  // as after a call
    *(void**)top = nullptr;
#endif
    context->sp = top;
  }

 private:
  char* base_ = nullptr;
  size_t size_ = 0;
};

}  // namespace sim
