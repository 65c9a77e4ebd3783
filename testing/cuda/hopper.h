// What the CUDA text of kernels for Hopper calls beside device.h: TMA copies and the barriers that they complete,
// barriers of some threads, clusters of blocks. TMA copies and MMAs complete when they are issued, so this finds wrong
// values and kernels that never end, but not a missing wait.
#include "device.h"

#include <atomic>
#include <condition_variable>
#include <map>
#include <mutex>

class Barrier;
inline Barrier& barrier_of(const Barrier* barrier, int block_of_cluster);

// An mbarrier (PTX ISA 9.7.13.15) in its 8 bytes: a phase ends when no arrival and no byte is missing.
class Barrier {
  struct State {
    uint16_t count, missing;
    int32_t bytes : 31;
    uint32_t phase : 1;
  };
  static_assert(sizeof(State) == 8);
  std::atomic<uint64_t> bits_;
  template <typename Change>
  void update(Change change) {
    uint64_t old = bits_.load(), now;
    do {
      State state;
      std::memcpy(&state, &old, 8);
      change(state);
      if (state.missing == 0 && state.bytes == 0) {
        state.missing = state.count;
        state.phase ^= 1;
      }
      std::memcpy(&now, &state, 8);
    } while (!bits_.compare_exchange_weak(old, now));
    bits_.notify_all();
  }

 public:
  void init(int count) {
    const State state{uint16_t(count), uint16_t(count), 0, 0};
    uint64_t bits;
    std::memcpy(&bits, &state, 8);
    bits_.store(bits);
  }
  void arrive() {
    update([](State& state) { --state.missing; });
  }
  void arrive(int block_of_cluster) { barrier_of(this, block_of_cluster).arrive(); }
  void expect_transaction(int bytes) {
    update([=](State& state) { state.bytes += bytes; });
  }
  void arrive_and_expect_tx(int bytes) {
    update([=](State& state) {
      state.bytes += bytes;
      --state.missing;
    });
  }
  void complete(int bytes) {
    update([=](State& state) { state.bytes -= bytes; });
  }
  // Returns when the phase of this parity has ended.
  void wait(int parity) {
    while (true) {
      uint64_t bits = bits_.load();
      State state;
      std::memcpy(&state, &bits, 8);
      if (int(state.phase) != parity) return;
      bits_.wait(bits);
    }
  }
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
inline void ptx_stmatrix_m8n8_x4(void* row, int word0, int word1, int word2, int word3) {
  Warp& w = warp();
  w.pointer[lane()] = row;
  w.meet.arrive_and_wait();
  const int words[4] = {word0, word1, word2, word3};
  for (int i = 0; i < 4; ++i)
    std::memcpy(static_cast<char*>(const_cast<void*>(w.pointer[8 * i + lane() / 4])) + lane() % 4 * 4, &words[i], 4);
  w.meet.arrive_and_wait();
}
template <int threads>
bool tl_shuffle_elect() {
  return threads == 0 ? threadIdx.x == 0 : threadIdx.x % threads == 0;
}
inline void __sync_thread_partial(int id, int threads) {
  std::unique_lock lock(named_barriers->mutex);
  const int round = named_barriers->round[id];
  if (++named_barriers->here[id] == threads) {
    named_barriers->here[id] = 0;
    ++named_barriers->round[id];
    named_barriers->all_here.notify_all();
  } else {
    named_barriers->all_here.wait(lock, [&] { return named_barriers->round[id] != round; });
  }
}
inline void __named_barrier_arrive(int id, int threads) {
  std::unique_lock lock(named_barriers->mutex);
  if (++named_barriers->here[id] < threads) return;
  named_barriers->here[id] = 0;
  ++named_barriers->round[id];
  named_barriers->all_here.notify_all();
}
inline void fence_barrier_init() {}
inline void prefetch_tma_descriptor(const CUtensorMap&) {}
template <int>
void warpgroup_reg_alloc() {}
template <int>
void warpgroup_reg_dealloc() {}
template <int>
void wait_wgmma() {  // .sync.aligned
  warp().meet.arrive_and_wait();
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
inline void tma_load(const CUtensorMap& map, Barrier& barrier, void* to, int column, int row) {
  for_box(map, to, column, row, [](uint8_t& shared, const uint8_t* global) { shared = global ? *global : 0; });
  barrier.complete(map.box_rows * map.box_bytes);
}
inline void tma_load(CUtensorMap map, Barrier& barrier, void* to, int column, int row, int outer, int outermost = 0) {
  map.data += outer * map.outer_strides[0] + outermost * map.outer_strides[1];
  tma_load(map, barrier, to, column, row);
}
inline void tma_load_multicast(const CUtensorMap& map, Barrier& barrier, void* to, uint16_t blocks, int column, int row) {
  uint8_t* const own = shared_memory;
  for (int block_of_cluster = 0; blocks >> block_of_cluster; ++block_of_cluster) {
    if (!(blocks >> block_of_cluster & 1)) continue;
    void* there = in_block(to, block_of_cluster);
    Barrier& arrived = barrier_of(&barrier, block_of_cluster);
    shared_memory = cluster->memories[block_of_cluster];
    tma_load(map, arrived, there, column, row);
    shared_memory = own;
  }
}
inline void tma_load_multicast(
    CUtensorMap map, Barrier& barrier, void* to, uint16_t blocks, int column, int row, int outer, int outermost) {
  map.data += outer * map.outer_strides[0] + outermost * map.outer_strides[1];
  tma_load_multicast(map, barrier, to, blocks, column, row);
}
inline void tma_load(void* to, const void* from, Barrier& barrier, uint32_t bytes) {
  std::memcpy(to, from, bytes);
  barrier.complete(bytes);
}
inline void tma_store(const CUtensorMap& map, const void* from, int column, int row) {
  for_box(map, from, column, row, [](uint8_t& shared, uint8_t* global) {
    if (global) *global = shared;
  });
}
inline void tma_store(CUtensorMap map, const void* from, int column, int row, int outer, int outermost) {
  map.data += outer * map.outer_strides[0] + outermost * map.outer_strides[1];
  tma_store(map, from, column, row);
}
inline void tma_store_arrive() {}
template <int, bool>
void tma_store_wait() {}

inline void cluster_sync() { cluster->meet.arrive_and_wait(); }
inline void tma_store_cluster(void* to, const void* from, int block_of_cluster, uint32_t bytes, Barrier& barrier) {
  auto& arrived = barrier_of(&barrier, block_of_cluster);
  arrived.expect_transaction(bytes);
  arrived.arrive();
  std::memcpy(in_block(to, block_of_cluster), from, bytes);
  arrived.complete(bytes);
}
}  // namespace tl

// Runs the blocks of a cluster, neighbours along x, at the same time.
template <typename Kernel>
void launch_clusters(int grid_x, int grid_y, int blocks, int threads, Kernel kernel) {
  constexpr int bytes = kSharedBytes + 4096;  // barriers last
  auto* memory = static_cast<uint8_t*>(std::aligned_alloc(1024, blocks * bytes));
  for (int y = 0; y < grid_y; ++y)
    for (int x = 0; x < grid_x; x += blocks) {
      std::memset(memory, 0xff, blocks * bytes);  // NaN in every format
      Cluster own(blocks, threads);
      std::vector<std::unique_ptr<Block>> own_blocks;
      std::vector<NamedBarriers> own_barriers(blocks);
      for (int b = 0; b < blocks; ++b) {
        own.memories.push_back(memory + b * bytes);
        own_blocks.push_back(std::make_unique<Block>(threads));
      }
      std::vector<std::thread> running;
      for (int t = 0; t < blocks * threads; ++t)
        running.emplace_back([&, t] {
          const int b = t / threads;
          cluster = &own;
          block = own_blocks[b].get();
          named_barriers = &own_barriers[b];
          shared_memory = own.memories[b];
          threadIdx.x = t % threads;
          blockIdx.x = x + b;
          blockIdx.y = y;
          kernel();
        });
      for (std::thread& thread : running) thread.join();
    }
  std::free(memory);
}
