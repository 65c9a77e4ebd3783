// What the CUDA text of kernels for Hopper calls beside device.h: TMA copies and the barriers that they complete,
// barriers of some threads, clusters of blocks. TMA copies and MMAs complete when they are issued, so this finds wrong
// values and kernels that never end, but not a missing wait.
#pragma once
#include "device.h"

#include <atomic>
#include <condition_variable>
#include <map>
#include <mutex>

class Barrier;
inline Barrier& barrier_of(const Barrier* barrier, int block_of_cluster);

// An mbarrier (PTX ISA 9.7.13.15) in its 8 bytes: a phase ends when no arrival and no byte is missing.
struct BarrierState {
  uint16_t count, missing;
  int32_t bytes : 31;
  uint32_t phase : 1;
};
static_assert(sizeof(BarrierState) == 8);
void update_barrier(std::atomic<uint64_t>& bits, int arrivals, int bytes);
void wait_for_barrier(std::atomic<uint64_t>& barrier, int parity);

class Barrier {
  std::atomic<uint64_t> bits_;

 public:
  void init(int count) {
    const BarrierState state{uint16_t(count), uint16_t(count), 0, 0};
    uint64_t bits;
    std::memcpy(&bits, &state, 8);
    bits_.store(bits);
  }
  void arrive() { update_barrier(bits_, 1, 0); }
  void arrive(int block_of_cluster) { barrier_of(this, block_of_cluster).arrive(); }
  void expect_transaction(int bytes) { update_barrier(bits_, 0, bytes); }
  void arrive_and_expect_tx(int bytes) { update_barrier(bits_, 1, bytes); }
  void complete(int bytes) { update_barrier(bits_, 0, -bytes); }
  // Returns when the phase of this parity has ended.
  void wait(int parity) { wait_for_barrier(bits_, parity); }
};

// A matrix in global memory of which a TMA copy takes a box, and how the box lies in shared memory: rows of 128, 64 or
// 32 bytes, swizzled by their width or as they are.
struct CUtensorMap {
  uint8_t* data;
  int64_t rows, row_bytes;
  int box_rows, box_bytes, element_bytes;
  int64_t row_stride = row_bytes;
  int64_t outer_strides[2] = {};  // of two more dimensions, of each of which a box takes one
  bool swizzled = true;
};

struct Cluster {
  Cluster(int blocks, int threads) : meet(blocks * threads) {}
  std::barrier<> meet;
  std::vector<uint8_t*> memories;
};
struct NamedBarriers {
  std::mutex mutex;
  std::condition_variable all_here;
  std::map<int, int> here, round;
};
inline thread_local Cluster* cluster;
inline thread_local NamedBarriers* named_barriers;

// The same place in the shared memory of a block of the cluster.
inline void* in_block(const void* here, int block_of_cluster) {
  return cluster->memories[block_of_cluster] + (static_cast<const uint8_t*>(here) - shared_memory);
}
inline Barrier& barrier_of(const Barrier* barrier, int block_of_cluster) {
  return *static_cast<Barrier*>(in_block(barrier, block_of_cluster));
}

namespace tl {
// Lane 8 i + r points to row r of matrix i; a lane's word is elements 2 (lane % 4) and the next of row lane / 4.
void ptx_stmatrix_m8n8_x4(void* row, int word0, int word1, int word2, int word3);
template <int threads>
bool tl_shuffle_elect() {
  return threads == 0 ? threadIdx.x == 0 : threadIdx.x % threads == 0;
}
void __sync_thread_partial(int id, int threads);
void __named_barrier_arrive(int id, int threads);
inline void fence_barrier_init() {}
inline void prefetch_tma_descriptor(const CUtensorMap&) {}
template <int>
void warpgroup_reg_alloc() {}
template <int>
void warpgroup_reg_dealloc() {}
template <int>
void wait_wgmma() {  // .sync.aligned
  meet(warp().meet);
}
template <typename T>
void increase_descriptor_offset(GmmaDescriptor& descriptor, T bytes) {
  descriptor.bits += bytes >> 4;
}

// Calls move(byte in shared memory, byte in global memory or null where the box lies outside) for every byte of a box.
template <typename Move>
void for_box(const CUtensorMap& map, const void* shared, int column, int row, Move move) {
  const uint64_t start = static_cast<const uint8_t*>(shared) - shared_memory;
  for (int r = 0; r < map.box_rows; ++r)
    for (int b = 0; b < map.box_bytes; ++b) {
      uint64_t address = start + r * map.box_bytes + b;
      if (map.swizzled) address ^= (address >> 7 & (map.box_bytes / 16 - 1)) << 4;
      const int64_t at = int64_t(column) * map.element_bytes + b;
      const bool inside = row + r >= 0 && row + r < map.rows && at < map.row_bytes;
      move(shared_memory[address], inside ? &map.data[(row + r) * map.row_stride + at] : nullptr);
    }
}
void tma_load(const CUtensorMap& map, Barrier& barrier, void* to, int column, int row);
void tma_load(CUtensorMap map, Barrier& barrier, void* to, int column, int row, int outer, int outermost = 0);
void tma_load_multicast(const CUtensorMap& map, Barrier& barrier, void* to, uint16_t blocks, int column, int row);
void tma_load_multicast(CUtensorMap map, Barrier& barrier, void* to, uint16_t blocks, int column, int row, int outer,
                        int outermost);
void tma_load(void* to, const void* from, Barrier& barrier, uint32_t bytes);
void tma_store(const CUtensorMap& map, const void* from, int column, int row);
void tma_store(CUtensorMap map, const void* from, int column, int row, int outer, int outermost);
inline void mbarrier_cp_async_arrive_noinc(Barrier& barrier) { barrier.arrive(); }  // copies are done when issued
inline void tma_store_arrive() {}
template <int, bool>
void tma_store_wait() {}

inline void cluster_sync() { meet(cluster->meet); }
void tma_store_cluster(void* to, const void* from, int block_of_cluster, uint32_t bytes, Barrier& barrier);
}  // namespace tl

// Runs the blocks of a cluster, neighbours along x, at the same time.
void launch_clusters(int grid_x, int grid_y, int blocks, int threads, void (*kernel)());
