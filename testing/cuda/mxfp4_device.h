// What mxfp4_device.h of the package does in PTX, on a CPU, and what the functions behind it call beside hopper.h.
#define __device__
#define __forceinline__ inline

inline constexpr struct {
  int x = 1;
} gridDim;

inline unsigned __shfl_xor_sync(unsigned, unsigned value, int lanes) {
  Warp& w = warp();
  w.a[lane()][0] = value;
  meet(w.meet);
  value = w.a[lane() ^ lanes][0];
  meet(w.meet);
  return value;
}
inline bool __all_sync(unsigned, bool holds) {
  Warp& w = warp();
  w.a[lane()][0] = holds;
  meet(w.meet);
  for (const auto& of_lane : w.a) holds = holds && of_lane[0];
  meet(w.meet);
  return holds;
}
inline float __uint_as_float(unsigned bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}
template <typename Choose>
unsigned bytewise(unsigned a, unsigned b, Choose choose) {
  unsigned result = 0;
  for (int i = 0; i < 32; i += 8) result |= choose(a >> i & 0xff, b >> i & 0xff) << i;
  return result;
}
inline unsigned __vmaxu4(unsigned a, unsigned b) {
  return bytewise(a, b, [](unsigned x, unsigned y) { return max(x, y); });
}
inline unsigned __vminu4(unsigned a, unsigned b) {
  return bytewise(a, b, [](unsigned x, unsigned y) { return min(x, y); });
}

namespace tilelang_ext {

inline unsigned times_bfloat16(unsigned pair, unsigned factors) {
  unsigned result = 0;
  for (int i = 0; i < 32; i += 16)
    result |= unsigned(bfloat16_t(bfloat16_value(pair >> i & 0xffff) * bfloat16_value(factors >> i & 0xffff)).bits)
              << i;
  return result;
}
inline unsigned select_bytes(unsigned low, unsigned high, unsigned selectors) {
  const uint64_t bytes = uint64_t(high) << 32 | low;
  unsigned result = 0;
  for (int i = 0; i < 4; ++i) {
    const unsigned selector = selectors >> (4 * i), byte = bytes >> ((selector & 7) * 8) & 0xff;
    result |= (selector & 8 ? (byte & 0x80 ? 0xffu : 0u) : byte) << (8 * i);
  }
  return result;
}
template <typename Value>
inline Value keep(Value value) {
  return value;
}
inline void check_begin(const void* global, int multiple) {
  if (reinterpret_cast<uintptr_t>(global) % multiple) std::abort();
}
inline void copy_4(void* shared, const void* global, int bytes) {
  check_begin(global, 4);
  std::memset(shared, 0, 4);
  std::memcpy(shared, global, bytes);
}
inline void copy_16(void* shared, const void* global, bool inside) {
  check_begin(global, 16);
  inside ? void(std::memcpy(shared, global, 16)) : void(std::memset(shared, 0, 16));
}
inline void close_copies() {}
template <int>
inline void finish_copies() {}
template <int>
inline void wait_for_copies() {}
inline void arrive_behind_copies(Barrier* barrier) { barrier->arrive(); }
inline void keep_order_of_memory() {}
inline void prefetch(const char*) {}
inline void let_next_begin() {}
inline void wait_for_turn(int warpgroup) { tl::__sync_thread_partial(8 + warpgroup, 256); }
inline void give_turn_to(int warpgroup) {
  std::lock_guard lock(named_barriers->mutex);
  if (++named_barriers->here[8 + warpgroup] == 256) {
    named_barriers->here[8 + warpgroup] = 0;
    ++named_barriers->round[8 + warpgroup];
    named_barriers->all_here.notify_all();
  }
}
inline std::atomic<bool> some_do_not[4];
inline bool all_of_warpgroup(int warpgroup, bool holds) {
  if (!holds) some_do_not[warpgroup] = true;
  tl::__sync_thread_partial(12 + warpgroup, 128);
  const bool all = !some_do_not[warpgroup];
  tl::__sync_thread_partial(12 + warpgroup, 128);
  some_do_not[warpgroup] = false;
  tl::__sync_thread_partial(12 + warpgroup, 128);
  return all;
}

}  // namespace tilelang_ext
