// What hopper.h declares: compiled once for all programs.
#include "hopper.h"

#include "device.cc"

void update_barrier(std::atomic<uint64_t>& bits, int arrivals, int bytes) {
  uint64_t old = bits.load(), now;
  do {
    BarrierState state;
    std::memcpy(&state, &old, 8);
    state.missing -= arrivals;
    state.bytes += bytes;
    if (state.missing == 0 && state.bytes == 0) {
      state.missing = state.count;
      state.phase ^= 1;
    }
    std::memcpy(&now, &state, 8);
  } while (!bits.compare_exchange_weak(old, now));
  bits.notify_all();
}
void wait_for_barrier(std::atomic<uint64_t>& barrier, int parity) {
  while (true) {
    uint64_t bits = barrier.load();
    BarrierState state;
    std::memcpy(&state, &bits, 8);
    if (int(state.phase) != parity) return;
    barrier.wait(bits);
  }
}

namespace tl {
void ptx_stmatrix_m8n8_x4(void* row, int word0, int word1, int word2, int word3) {
  Warp& w = warp();
  w.pointer[lane()] = row;
  meet(w.meet);
  const int words[4] = {word0, word1, word2, word3};
  for (int i = 0; i < 4; ++i)
    std::memcpy(static_cast<char*>(const_cast<void*>(w.pointer[8 * i + lane() / 4])) + lane() % 4 * 4, &words[i], 4);
  meet(w.meet);
}
void __sync_thread_partial(int id, int threads) {
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
void __named_barrier_arrive(int id, int threads) {
  std::unique_lock lock(named_barriers->mutex);
  if (++named_barriers->here[id] < threads) return;
  named_barriers->here[id] = 0;
  ++named_barriers->round[id];
  named_barriers->all_here.notify_all();
}
void tma_load(const CUtensorMap& map, Barrier& barrier, void* to, int column, int row) {
  for_box(map, to, column, row, [](uint8_t& shared, const uint8_t* global) { shared = global ? *global : 0; });
  barrier.complete(map.box_rows * map.box_bytes);
}
void tma_load(CUtensorMap map, Barrier& barrier, void* to, int column, int row, int outer, int outermost) {
  map.data += outer * map.outer_strides[0] + outermost * map.outer_strides[1];
  tma_load(map, barrier, to, column, row);
}
void tma_load_multicast(const CUtensorMap& map, Barrier& barrier, void* to, uint16_t blocks, int column, int row) {
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
void tma_load_multicast(CUtensorMap map, Barrier& barrier, void* to, uint16_t blocks, int column, int row, int outer,
                        int outermost) {
  map.data += outer * map.outer_strides[0] + outermost * map.outer_strides[1];
  tma_load_multicast(map, barrier, to, blocks, column, row);
}
void tma_load(void* to, const void* from, Barrier& barrier, uint32_t bytes) {
  std::memcpy(to, from, bytes);
  barrier.complete(bytes);
}
void tma_store(const CUtensorMap& map, const void* from, int column, int row) {
  for_box(map, from, column, row, [](uint8_t& shared, uint8_t* global) {
    if (global) *global = shared;
  });
}
void tma_store(CUtensorMap map, const void* from, int column, int row, int outer, int outermost) {
  map.data += outer * map.outer_strides[0] + outermost * map.outer_strides[1];
  tma_store(map, from, column, row);
}
void tma_store_cluster(void* to, const void* from, int block_of_cluster, uint32_t bytes, Barrier& barrier) {
  auto& arrived = barrier_of(&barrier, block_of_cluster);
  arrived.expect_transaction(bytes);
  arrived.arrive();
  std::memcpy(in_block(to, block_of_cluster), from, bytes);
  arrived.complete(bytes);
}
}  // namespace tl

void launch_clusters(int grid_x, int grid_y, int blocks, int threads, void (*kernel)()) {
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
