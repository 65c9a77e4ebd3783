// What a translated kernel sees of the run time: its thread, meetings of lanes, barriers, threadgroup memory.
// No standard header is included here or in the shim: a kernel compiles in a fraction of a second, with any libc.
#pragma once

namespace std {
struct source_location {  // the shape __builtin_source_location() asks for
  struct __impl {
    const char* _M_file_name;
    const char* _M_function_name;
    unsigned _M_line;
    unsigned _M_column;
  };
};
}  // namespace std

namespace sim {

using Site = std::source_location::__impl;  // where in the source a collective was called
#define SIM_SITE const ::sim::Site* site = __builtin_source_location()

#ifdef SIM_LANES  // HIP: a wave is 32 or 64 lanes, and these are its words
constexpr int kLanes = SIM_LANES;
#define SIM_WAVE "wave"
#define SIM_SHARED "LDS"
#define SIM_BARRIER "barrier"
#else
constexpr int kLanes = 32;
#define SIM_WAVE "simdgroup"
#define SIM_SHARED "threadgroup"
#define SIM_BARRIER "threadgroup_barrier"
#endif
using LaneMask = unsigned long;

// Where a suspended fiber continues.
struct Context {
  void *pc, *sp, *fp;
#ifdef __aarch64__
  void* lr;
#endif
};

struct Simdgroup;

struct Thread {
  Context context;
  Simdgroup* simdgroup;
  Thread* next;          // the next to run: a circular list per simdgroup
  unsigned lane, index;  // in the simdgroup, in the threadgroup
  unsigned position[3];  // in the threadgroup
  const Site* site;      // the threadgroup barrier that it waits at, and its place in the program
  const void* pc;
};

struct Launch {
  unsigned grid[3], threads[3];  // threadgroups; threads per threadgroup
};

struct Counts {
  unsigned long mma, device_read, device_written, constant_read, threadgroup_read, threadgroup_written, barriers,
      simdgroup_barriers, shuffles, reductions, atomics;
};

extern Thread* current;
extern unsigned group_position[3];
extern Launch launch;
extern Counts counts;

// The running thread's lane: a call, so that checks do not see a read; constant as long as the thread lives.
__attribute__((const)) unsigned lane();

// The lanes that meet at one operation: frames[lane] is the lane's operand struct on its own stack.
struct Meeting {
  void* frames[kLanes];
  LaneMask mask;
};
using Operation = void (*)(const Meeting&);

// Which lanes an operation needs: those that are there, all that have not returned (otherwise a finding), or all.
enum Needs { kAnyLanes, kLiveLanes, kAllLanes };

// Waits for the other lanes of the simdgroup; the last to come runs `operation` for all of them.
void meet(Operation operation, void* frame, const Site* site, Needs needs);

// Reports a fault that an operation sees in the operand of `lane`.
void report_operand(const Site* site, int lane, const char* message);

// Counts accesses that a guard of the text turned into 0 or dropped: `lanes` elements of a tensor.
bool outside(const char* tensor, const char* accesses, const char* shape, unsigned lanes, SIM_SITE);

// Reports that the kernel's own assertion fails.
void assertion(bool condition, const char* message, SIM_SITE);

// Prints what the kernel prints, as printf; whoever started the run shows it, thread by thread.
void print(const char* format, ...);
void format(char* to, unsigned long size, const char* format, ...);  // snprintf

// Counts an instruction by name, which is a literal.
void count_instruction(int& slot, const char* name);

enum Memory : unsigned { kNone = 0, kDevice = 1, kThreadgroup = 2 };
void threadgroup_barrier(unsigned memory, const Site* site);
void simdgroup_barrier(unsigned memory, const Site* site);
// Where lanes run in lockstep: what they access before all of them meet comes before what they access after it.
void order_lanes(const Meeting& m);

// The threadgroup's array number `slot` (assigned on first use); the same address for each of its threads.
void* threadgroup_array(int& slot, const char* name, unsigned long size, unsigned long align);
// Bytes of the array whose size the launch gives.
unsigned long dynamic_size();

enum Access : unsigned { kRead = 1, kWrite = 2, kAtomic = 4, kAtomicLoad = 5, kAtomicStore = 6, kAtomicUpdate = 7 };
// Checks an access that the shim performs.
void plain_access(const volatile void* address, unsigned size, Access kind, const Site* site);
// Checks and counts an atomic access; the caller performs it.
void atomic_access(const volatile void* address, unsigned size, Access kind, const Site* site);

// The argument bound to [[buffer(index)]].
void* buffer(int index);

template <class Array, unsigned Align, class Tag>
__attribute__((always_inline, nodebug)) inline Array& threadgroup_alloc(const char* name, Tag) {
  static int slot = -1;  // one per declaration and instantiation, since each has its own lambda as Tag
  return *static_cast<Array*>(
      threadgroup_array(slot, name, sizeof(Array), Align > alignof(Array) ? Align : alignof(Array)));
}

template <class Frame, class Body>
__attribute__((always_inline, nodebug)) inline void meet_with(Frame& frame, const Site* site, Needs needs, Body body) {
  meet(body, &frame, site, needs);
}

template <class Frame, class Visit>
__attribute__((always_inline, nodebug)) inline void each_lane(const Meeting& m, Visit visit) {
  for (int lane = 0; lane < kLanes; ++lane)
    if (m.mask >> lane & 1) visit(*static_cast<Frame*>(m.frames[lane]), lane);
}

}  // namespace sim

extern "C" void sim_kernel();  // the entry point, called once per thread
