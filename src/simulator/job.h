// The job file: arguments, launch shape and results, mapped by the Python side and by every worker.
// tilelang_ext/simulator/launch.py mirrors these structs.
#pragma once
#include <stdint.h>

namespace sim {

constexpr uint64_t kMagic = 0x314d4953474e4c54;  // "TLNGSIM1"
constexpr int kMaxBuffers = 32, kMaxFindings = 256, kCounts = 11, kMaxInstructions = 64;

enum Kind : uint32_t {
  kOutOfBounds,
  kRace,
  kUninitialised,
  kDivergence,
  kLimit,
  kOperand,
  kAssertion,
  kOutside,
  kSameValue,
  kKinds
};

struct JobBuffer {
  uint64_t offset, size;
  uint32_t constant, writable;
  char name[64];
};

struct JobFinding {
  uint32_t kind, line, group[3], thread[3];
  uint64_t count, place;
  char file[256], message[512];
};

struct JobInstruction {
  uint64_t count;
  char name[56];
};

struct Job {
  uint64_t magic, file_size, seed, memory_limit;
  uint64_t threadgroup_limit, dynamic_size;  // bytes: what the GPU has, and of the array sized at launch
  uint32_t grid[3], threads[3];
  uint32_t workers, check, buffer_count, done_workers;
  uint64_t counts[kCounts];
  uint64_t threadgroup_memory;
  uint32_t lock, finding_count;
  JobInstruction instructions[kMaxInstructions];
  JobBuffer buffers[kMaxBuffers];
  JobFinding findings[kMaxFindings];
};

}  // namespace sim
