// Memory of a launch and its checks: bounds, initialisation and order of every access, by address range.
//
// Each byte that can be shared has two records, its last write and its reads since, as 64-bit words that name the
// thread and its moment. A moment is (group, barriers passed by the group, barriers passed by the simdgroup): an access
// is ordered after another if it is by the same thread, past a threadgroup barrier, or past a barrier of the simdgroup
// that both belong to. No order exists between threadgroups.
#pragma once
#include <dlfcn.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include "engine.h"
#include "job.h"

namespace sim {

inline Job* job;

// ---- findings

struct Line {  // one instrumented access; the table is appended to the kernel's assembly
  int32_t pc;  // relative to the entry itself
  int32_t line;
  int32_t file;
};
extern "C" const Line sim_lines[];
extern "C" const char* const sim_files[];
extern "C" const int32_t sim_line_count;

inline void find_line(const void* pc, uint32_t* line, const char** file) {
  for (int i = 0; i < sim_line_count; ++i) {
    const char* place = (const char*)&sim_lines[i].pc + sim_lines[i].pc;
    if (place != pc) continue;
    *line = sim_lines[i].line;
    *file = sim_files[sim_lines[i].file];
    return;
  }
}

inline void add_finding(Kind kind, uint64_t place, uint32_t line, const char* file, const unsigned* thread,
                        uint64_t amount, const char* format, va_list arguments) {
  while (__atomic_exchange_n(&job->lock, 1, __ATOMIC_ACQUIRE)) {
  }
  JobFinding* f = nullptr;
  for (uint32_t i = 0; i < job->finding_count; ++i)
    if (job->findings[i].kind == kind && job->findings[i].place == place) f = &job->findings[i];
  if (!f && job->finding_count < kMaxFindings) {
    f = &job->findings[job->finding_count];
    f->kind = kind;
    f->place = place;
    f->line = line;
    for (int i = 0; i < 3; ++i) f->group[i] = group_position[i], f->thread[i] = thread[i];
    strncpy(f->file, file, sizeof f->file - 1);
    vsnprintf(f->message, sizeof f->message, format, arguments);
    __atomic_store_n(&job->finding_count, job->finding_count + 1, __ATOMIC_RELEASE);
  }
  if (f) f->count += amount;
  __atomic_store_n(&job->lock, 0, __ATOMIC_RELEASE);
}

__attribute__((noinline, cold)) inline void report(Kind kind, const Site* site, const unsigned* thread,
                                                   const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  add_finding(kind, site ? (uint64_t)site->_M_line << 32 | site->_M_column : 0, site ? site->_M_line : 0,
              site ? site->_M_file_name : "", thread, 1, format, arguments);
  va_end(arguments);
}

// The same for an operation of which the place in the program is known too: the kernel's own line comes first.
__attribute__((noinline, cold)) inline void report(Kind kind, const Site* site, const void* pc, const unsigned* thread,
                                                   const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  uint32_t line = 0;
  const char* file = "";
  find_line(pc, &line, &file);
  if (!line) line = site->_M_line, file = site->_M_file_name;
  add_finding(kind, (uint64_t)line << 32 | site->_M_column, line, file, thread, 1, format, arguments);
  va_end(arguments);
}

// The same for something that is `amount` of its kind.
__attribute__((noinline, cold)) inline void report_amount(Kind kind, const Site* site, uint64_t amount,
                                                          const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  add_finding(kind, (uint64_t)site->_M_line << 32 | site->_M_column, site->_M_line, site->_M_file_name,
              current->position, amount, format, arguments);
  va_end(arguments);
}

// An access's place is the return address into the kernel, or, for atomics, the site of the call.
struct Place {
  const void* pc;
  const Site* site;
};

__attribute__((noinline, cold)) inline void report(Kind kind, Place place, const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  uint32_t line = place.site ? place.site->_M_line : 0;
  const char* file = place.site ? place.site->_M_file_name : "";
  if (!place.site) find_line(place.pc, &line, &file);
  uint64_t key = line ? line : (uint64_t)place.pc;
  add_finding(kind, key, line, file, current->position, 1, format, arguments);
  va_end(arguments);
}

// ---- order

constexpr int kThreadBits = 10, kSimdBits = 10, kBarrierBits = 14, kGroupBits = 25;
enum Who : uint64_t { kOneThread, kManyLanes, kManySimdgroups, kManyGroups };

union Record {
  uint64_t word;
  struct {
    uint64_t valid : 1, atomic : 1, who : 2,
        thread : kThreadBits, simd_barriers : kSimdBits, barriers : kBarrierBits, group : kGroupBits, unused : 1;
  };
};

struct Shadow {
  Record write, reads;
};

enum Space { kDeviceSpace, kThreadgroupSpace, kSpaces };
struct Moment {
  Record group[kSpaces];  // group and barriers passed, per memory
  uint64_t simd_barriers[kSpaces][1024 / kLanes];
};
inline Moment now;

inline void order_threadgroup(unsigned memory) {
  if (memory & kDevice) now.group[kDeviceSpace].barriers++;
  if (memory & kThreadgroup) now.group[kThreadgroupSpace].barriers++;
}

inline void order_simdgroup(int simdgroup, unsigned memory) {
  if (memory & kDevice) now.simd_barriers[kDeviceSpace][simdgroup]++;
  if (memory & kThreadgroup) now.simd_barriers[kThreadgroupSpace][simdgroup]++;
}

inline Record stamp(Space space) {
  Record r = now.group[space];
  r.thread = current->index;
  r.simd_barriers = now.simd_barriers[space][current->index / kLanes];
  return r;
}

inline bool ordered(Record before, Record after) {
  if (!before.valid) return true;
  if (before.group != after.group) return false;
  if (before.who == kManyGroups) return false;
  if (before.barriers != after.barriers) return true;
  if (before.who == kManySimdgroups) return false;
  if (before.thread / kLanes != after.thread / kLanes) return false;
  if (before.simd_barriers != after.simd_barriers) return true;
  return before.who == kOneThread && before.thread == after.thread;
}

inline Record join_reads(Record before, Record read) {
  if (ordered(before, read)) return read;
  read.atomic &= before.atomic;
  if (before.who == kManyGroups || before.group != read.group)
    read.who = kManyGroups;
  else if (before.who == kManySimdgroups || before.thread / kLanes != read.thread / kLanes)
    read.who = kManySimdgroups;
  else
    read.who = kManyLanes;
  return read;
}

// ---- regions

inline const char *device_base, *device_end;
inline Shadow* device_shadow;  // as long as the job file; pages of constant buffers are never touched

constexpr size_t kArena = 1 << 20, kRedZone = 256;
struct Array {
  const char* name;
  size_t offset, size;
};
inline char* arena;
inline Shadow* arena_shadow;
inline Array arrays[128];
inline int slot_count, array_of_slot[128], array_count;
inline size_t arena_used, arena_asked;

inline void begin_threadgroup(uint64_t group) {
  if (job->check) memset(arena, 0xff, arena_used);  // not-a-number in every format
  array_count = 0;
  arena_used = kRedZone;
  arena_asked = 0;
  memset(array_of_slot, 0xff, sizeof array_of_slot);
  Record r{};
  r.valid = 1;
  r.group = group;
  memset(&now, 0, sizeof now);
  now.group[0] = now.group[1] = r;
}

void* threadgroup_array(int& slot, const char* name, unsigned long size, unsigned long align) {
  if (slot < 0) slot = slot_count++;
  int& index = array_of_slot[slot];
  if (index < 0) {
    if (align < 16) align = 16;
    index = array_count++;
    arena_used = (arena_used + align - 1) / align * align;
    arrays[index] = {name, arena_used, size};
    if (arena_used + size + kRedZone > kArena) {
      report(kLimit, Place{}, SIM_SHARED " array '%s' of %lu bytes does not fit", name, size);
      _exit(3);
    }
    arena_used += size + kRedZone;
    arena_asked += size;
    if (arena_asked > job->threadgroup_memory) job->threadgroup_memory = arena_asked;
    if (arena_asked > job->threadgroup_limit && job->check)
      report(kLimit, Place{}, SIM_SHARED " memory of %zu bytes; the limit is %zu", arena_asked,
             size_t(job->threadgroup_limit));
  }
  return arena + arrays[index].offset;
}

inline bool create_memory(Job* mapped) {
  job = mapped;
  device_base = (const char*)job;
  device_end = device_base + job->file_size;
  auto reserve = [](size_t size, int visible) {
    void* p = mmap(nullptr, size, PROT_READ | PROT_WRITE, visible | MAP_ANON | MAP_NORESERVE, -1, 0);
    return p == MAP_FAILED ? nullptr : p;
  };
  arena = (char*)reserve(kArena, MAP_PRIVATE);
  if (!job->check) return arena;
  arena_shadow = (Shadow*)reserve(kArena * sizeof(Shadow), MAP_PRIVATE);
  device_shadow = (Shadow*)reserve(job->file_size * sizeof(Shadow), MAP_SHARED);
  return arena && arena_shadow && device_shadow;
}

// ---- accesses

inline const char* const kVerb[] = {"", "read", "write", "", "", "atomic load", "atomic store", "atomic update"};

// What an access is not ordered after; a plain write is told apart, since another write of its value does no harm.
inline const char kPlainWrite[] = "a write", kAtomicWrite[] = "a write", kAnyRead[] = "a read";

// Orders one access against the records of its bytes; says what is wrong, or null.
inline const char* order_access(Shadow* shadow, size_t size, Access access, Space space) {
  Record mine = stamp(space);
  mine.atomic = (access & kAtomic) != 0;
  const char* wrong = nullptr;
  for (size_t i = 0; i < size; ++i) {
    Record write{__atomic_load_n(&shadow[i].write.word, __ATOMIC_RELAXED)};
    Record reads{__atomic_load_n(&shadow[i].reads.word, __ATOMIC_RELAXED)};
    if (space == kThreadgroupSpace) {  // records of another group are stale here
      if (write.group != mine.group) write = {};
      if (reads.group != mine.group) reads = {};
    }
    if (!ordered(write, mine) && !(mine.atomic && write.atomic)) {
      const char* kind = write.atomic ? kAtomicWrite : kPlainWrite;
      if (!wrong || wrong == kPlainWrite) wrong = kind;
    }
    if (!(access & kWrite)) {
      __atomic_store_n(&shadow[i].reads.word, join_reads(reads, mine).word, __ATOMIC_RELAXED);
    } else {
      if (!ordered(reads, mine) && !(mine.atomic && reads.atomic)) wrong = kAnyRead;
      __atomic_store_n(&shadow[i].write.word, mine.word, __ATOMIC_RELAXED);
      __atomic_store_n(&shadow[i].reads.word, 0, __ATOMIC_RELAXED);
    }
  }
  return wrong;
}

// An access that is not ordered after another.
struct Unordered {
  const char* address;
  size_t size;
  Access access;
  Place place;
  const char *memory, *name;
  size_t at;  // its first byte in that memory
};

// A write that is not ordered after other writes, until it has happened: then it is seen whether it changed anything.
struct PendingWrite {
  Unordered write;
  Thread* thread;
  unsigned group[3];
  char* before;  // what stood there
  size_t capacity;
};
inline PendingWrite pending;
inline bool is_pending;

inline void report_race(const Unordered& a, const char* wrong) {
  if (wrong == kPlainWrite && a.access == kWrite) {
    if (a.size > pending.capacity) {  // of a fill or a copy of many elements
      pending.before = (char*)realloc(pending.before, a.size);
      pending.capacity = a.size;
    }
    pending.write = a;
    pending.thread = current;
    memcpy(pending.group, group_position, sizeof group_position);
    memcpy(pending.before, a.address, a.size);
    is_pending = true;
    return;
  }
  report(kRace, a.place, "%s of %zu bytes at byte %zu of %s '%s' is not ordered after %s by another thread",
         kVerb[a.access], a.size, a.at, a.memory, a.name, wrong);
}

// Judges the pending write, which has happened by now.
__attribute__((noinline, cold)) inline void settle_write() {
  is_pending = false;
  const Unordered& a = pending.write;
  Thread* const thread = current;
  unsigned group[3];
  memcpy(group, group_position, sizeof group);
  current = pending.thread;
  memcpy(group_position, pending.group, sizeof group);
  if (memcmp(pending.before, a.address, a.size))
    report(kRace, a.place, "write of %zu bytes at byte %zu of %s '%s' is not ordered after a write by another thread",
           a.size, a.at, a.memory, a.name);
  else
    report(kSameValue, a.place,
           "write of the value that another thread has written, in no order, at byte %zu of %s '%s'", a.at, a.memory,
           a.name);
  current = thread;
  memcpy(group_position, group, sizeof group);
}

// The bytes of an access within an array that ends at `end`. The word of an atomic may reach past the end of an array
// of smaller elements: what lies there it leaves as it is.
inline size_t size_within(size_t offset, size_t size, Access access, size_t end) {
  return (access & kAtomic) && offset < end && offset + size > end ? end - offset : size;
}

inline void access_threadgroup(size_t offset, size_t size, Access access, Place place) {
  if (access & kRead) counts.threadgroup_read += size;
  if (access & kWrite) counts.threadgroup_written += size;
  const Array* array = nullptr;
  for (int i = 0; i < array_count; ++i)
    if (offset >= arrays[i].offset && offset < arrays[i].offset + arrays[i].size + kRedZone) array = &arrays[i];
  if (array) size = size_within(offset, size, access, array->offset + array->size);
  if (!array || offset + size > array->offset + array->size) {
    if (!array) array = &arrays[0];  // below the first
    report(kOutOfBounds, place, "%s of %zu bytes at byte %ld of " SIM_SHARED " array '%s' of %zu bytes", kVerb[access],
           size, long(offset) - long(array->offset), array->name, array->size);
    return;
  }
  Shadow* shadow = arena_shadow + offset;
  if (access & kRead)
    for (size_t i = 0; i < size; ++i)
      if (!shadow[i].write.valid || shadow[i].write.group != now.group[0].group) {
        report(kUninitialised, place,
               "%s of %zu bytes at byte %zu of " SIM_SHARED " array '%s' that nobody has written", kVerb[access], size,
               offset - array->offset, array->name);
        break;
      }
  if (const char* wrong = order_access(shadow, size, access, kThreadgroupSpace))
    report_race({arena + offset, size, access, place, SIM_SHARED " array", array->name, offset - array->offset}, wrong);
}

inline void access_device(const char* address, size_t size, Access access, Place place) {
  const size_t offset = address - device_base;
  static int last = 0;  // the buffer found last
  const JobBuffer* buffer = &job->buffers[last];
  if (offset - buffer->offset >= buffer->size || offset + size > buffer->offset + buffer->size) {
    int nearest = 0;
    uint64_t distance = ~0ull;
    for (unsigned i = 0; i < job->buffer_count; ++i) {
      const JobBuffer* b = &job->buffers[i];
      uint64_t d = offset < b->offset             ? b->offset - offset
                   : offset < b->offset + b->size ? 0
                                                  : offset - b->offset - b->size + 1;
      if (d < distance) distance = d, nearest = i;
    }
    last = nearest;
    buffer = &job->buffers[last];
    size = size_within(offset, size, access, buffer->offset + buffer->size);
    if (offset < buffer->offset || offset + size > buffer->offset + buffer->size) {
      report(kOutOfBounds, place, "%s of %zu bytes at byte %ld of buffer '%s' of %lu bytes", kVerb[access], size,
             long(offset) - long(buffer->offset), buffer->name, (unsigned long)buffer->size);
      return;
    }
  }
  if (buffer->constant) {
    counts.constant_read += size;
    return;
  }
  if (access & kRead) counts.device_read += size;
  if (access & kWrite) counts.device_written += size;
  if (!buffer->writable) return;
  if (const char* wrong = order_access(device_shadow + offset, size, access, kDeviceSpace))
    report_race({address, size, access, place, "buffer", buffer->name, offset - size_t(buffer->offset)}, wrong);
}

bool is_own(const void* address);  // in a thread's stack or in the structures of the scheduler

#ifdef __linux__
extern "C" __attribute__((weak)) const char __executable_start[], _end[];  // by the linker
#endif

// Whether an address lies in the program's own image.
inline bool in_program(const char* address) {
#ifdef __linux__
  if (__executable_start && address >= __executable_start && address < _end) return true;
#endif
  static uintptr_t known_page = 0;
  Dl_info info;
  if ((uintptr_t)address >> 12 != known_page && !dladdr(address, &info)) return false;
  known_page = (uintptr_t)address >> 12;
  return true;
}

// Checks an access to neither device nor threadgroup memory: it must lie in a thread's stack or in the program.
inline void access_other(const char* address, size_t size, Access access, Place place) {
  if (is_own(address) || in_program(address)) return;
  report(kOutOfBounds, place, "%s of %zu bytes at %p, which is no memory of this launch", kVerb[access], size,
         (void*)address);
}

inline void access(const void* pointer, size_t size, Access kind, Place place) {
  const char* address = static_cast<const char*>(pointer);
  if (is_pending) settle_write();
  if (size_t(address - arena) < kArena) return access_threadgroup(address - arena, size, kind, place);
  if (address >= device_base && address < device_end) return access_device(address, size, kind, place);
  access_other(address, size, kind, place);
}

}  // namespace sim
