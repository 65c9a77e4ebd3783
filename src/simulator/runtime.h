// The program around a kernel: maps the job file, forks workers, runs every threadgroup, sums the counts.
// Compiled once, as its own object; takes the job file's path as its only argument.
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>
#ifdef __linux__
#include <sys/prctl.h>
#endif

#include "schedule.h"

namespace sim {

Thread* current;
unsigned group_position[3];
Launch launch;
Counts counts;

bool is_own(const void* address) {
  return stacks.contains(address) ||
         size_t((const char*)address - (const char*)simdgroups) < simdgroup_count * sizeof(Simdgroup);
}
unsigned lane() { return current->lane; }
void* buffer(int index) { return (char*)job + job->buffers[index].offset; }

void atomic_access(const volatile void* address, unsigned size, Access kind, const Site* site) {
  ++counts.atomics;
  if (job->check) access(const_cast<const void*>(address), size, kind, Place{nullptr, site});
}

void plain_access(const volatile void* address, unsigned size, Access kind, const Site* site) {
  if (job->check) access(const_cast<const void*>(address), size, kind, Place{nullptr, site});
}

void report_operand(const Site* site, int lane, const char* message) {
  const void* pc = running ? running->pc : __builtin_return_address(0);
  if (job->check) report(kOperand, site, pc, current->simdgroup->threads[lane].position, "%s", message);
}

bool outside(const char* tensor, const char* accesses, const char* shape, unsigned lanes, const Site* site) {
  report_amount(kOutside, site, lanes, "%s: # %s outside %s", tensor, accesses, shape);
  return false;
}

void assertion(bool condition, const char* message, const Site* site) {
  if (!condition) report_amount(kAssertion, site, 1, "%s", message);
}

// Writes a record of 12 bytes, the thread's number among all and the length of the text, and the text.
void print(const char* format, ...) {
  constexpr int kMost = 1 << 16;
  static int printed = 0;
  if (printed++ >= kMost) return;
  struct __attribute__((packed)) {
    uint64_t thread;
    uint32_t size;
    char text[1024];
  } record;
  const uint64_t row = (uint64_t)group_position[2] * launch.grid[1] + group_position[1];
  record.thread = (row * launch.grid[0] + group_position[0]) * 1024 + current->index;
  va_list arguments;
  va_start(arguments, format);
  int size = vsnprintf(record.text, sizeof record.text, format, arguments);
  va_end(arguments);
  if (printed == kMost)
    size = snprintf(record.text, sizeof record.text, "(no more is printed after %d lines)\n", kMost);
  record.size = size < (int)sizeof record.text ? size : sizeof record.text - 1;
  if (write(1, &record, 12 + record.size) < 0) _exit(4);
}

void format(char* to, unsigned long size, const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(to, size, format, arguments);
  va_end(arguments);
}

unsigned long dynamic_size() { return job->dynamic_size; }

static struct {
  const char* name;
  uint64_t count;
} instructions[kMaxInstructions];
static int instruction_count;

void count_instruction(int& slot, const char* name) {
  if (slot < 0) {
    for (slot = 0; slot < instruction_count && strcmp(instructions[slot].name, name);) ++slot;
    if (slot == instruction_count) instructions[instruction_count++].name = name;
  }
  ++instructions[slot].count;
}

static void add_instructions() {
  while (__atomic_exchange_n(&job->lock, 1, __ATOMIC_ACQUIRE)) {
  }
  for (int i = 0; i < instruction_count; ++i) {
    JobInstruction* to = job->instructions;
    while (to->count && strcmp(to->name, instructions[i].name)) ++to;
    strncpy(to->name, instructions[i].name, sizeof to->name - 1);
    to->count += instructions[i].count;
  }
  __atomic_store_n(&job->lock, 0, __ATOMIC_RELEASE);
}

static void add_counts() {
  add_instructions();
  static_assert(sizeof(Counts) == sizeof(Job::counts));
  const unsigned long* mine = (const unsigned long*)&counts;
  for (int i = 0; i < kCounts; ++i) __atomic_fetch_add(&job->counts[i], mine[i], __ATOMIC_RELAXED);
}

static int work(unsigned worker) {
  launch = {{job->grid[0], job->grid[1], job->grid[2]}, {job->threads[0], job->threads[1], job->threads[2]}};
  if (!create_threads()) return 4;
  const uint64_t groups = (uint64_t)launch.grid[0] * launch.grid[1] * launch.grid[2];
  for (uint64_t group = worker; group < groups; group += job->workers) {
    run_threadgroup(group);
    if (is_pending) settle_write();  // before the next one has the memory
  }
  add_counts();
  __atomic_fetch_add(&job->done_workers, 1, __ATOMIC_RELEASE);
  return 0;
}

static void limit_resources() {
  rlimit none{0, 0}, memory{job->memory_limit, job->memory_limit};
  setrlimit(RLIMIT_CORE, &none);
  setrlimit(RLIMIT_AS, &memory);
}

static int run(const char* path) {
  int fd = open(path, O_RDWR);
  struct stat status;
  if (fd < 0 || fstat(fd, &status)) return 4;
  Job* mapped = (Job*)mmap(nullptr, status.st_size, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
  if (mapped == MAP_FAILED || mapped->magic != kMagic) return 4;
  job = mapped;
  limit_resources();
  if (!create_memory(mapped)) return 4;
  if (job->workers == 1) return work(0);
  for (unsigned w = 0; w < job->workers; ++w) {
    pid_t child = fork();
    if (child < 0) return 4;
    if (child) continue;
#ifdef __linux__
    prctl(PR_SET_PDEATHSIG, SIGKILL);
#endif
    _exit(work(w));
  }
  int worst = 0;
  for (unsigned w = 0; w < job->workers; ++w) {
    int s;
    if (wait(&s) < 0) return 4;
    int code = WIFSIGNALED(s) ? 128 + WTERMSIG(s) : WEXITSTATUS(s);
    if (code > worst) worst = code;
  }
  return worst;
}

}  // namespace sim

// ---- callbacks of the instrumented kernel

#define SIM_CALLBACK(size)                                                     \
  extern "C" void __tsan_read##size(void* p) {                                 \
    sim::access(p, size, sim::kRead, {__builtin_return_address(0), nullptr});  \
  }                                                                            \
  extern "C" void __tsan_write##size(void* p) {                                \
    sim::access(p, size, sim::kWrite, {__builtin_return_address(0), nullptr}); \
  }                                                                            \
  extern "C" void __tsan_unaligned_read##size(void* p) {                       \
    sim::access(p, size, sim::kRead, {__builtin_return_address(0), nullptr});  \
  }                                                                            \
  extern "C" void __tsan_unaligned_write##size(void* p) {                      \
    sim::access(p, size, sim::kWrite, {__builtin_return_address(0), nullptr}); \
  }
SIM_CALLBACK(1)
SIM_CALLBACK(2)
SIM_CALLBACK(4)
SIM_CALLBACK(8)
SIM_CALLBACK(16)

extern "C" void* __tsan_memcpy(void* to, const void* from, size_t size) {
  sim::access(from, size, sim::kRead, {__builtin_return_address(0), nullptr});
  sim::access(to, size, sim::kWrite, {__builtin_return_address(0), nullptr});
  return memcpy(to, from, size);
}
extern "C" void* __tsan_memmove(void* to, const void* from, size_t size) {
  sim::access(from, size, sim::kRead, {__builtin_return_address(0), nullptr});
  sim::access(to, size, sim::kWrite, {__builtin_return_address(0), nullptr});
  return memmove(to, from, size);
}
extern "C" void* __tsan_memset(void* to, int value, size_t size) {
  sim::access(to, size, sim::kWrite, {__builtin_return_address(0), nullptr});
  return memset(to, value, size);
}
extern "C" void __tsan_init() {}

// An index past the end of an array of known size; the checker passes the place and the index.
struct BoundsPlace {
  const char* file;
  uint32_t line, column;
};
extern "C" void __ubsan_handle_out_of_bounds(BoundsPlace* place, uintptr_t index) {
  sim::Site site{place->file, "", place->line, place->column};
  sim::report(sim::kOutOfBounds, &site, sim::current->position, "index %ld is past the end of the array", (long)index);
}

int main(int count, char** arguments) { return count == 2 ? sim::run(arguments[1]) : 4; }
