// What device.h declares: compiled once for all programs.
#include "device.h"

void meet(std::barrier<>& barrier) { barrier.arrive_and_wait(); }
int __shfl_sync(uint32_t, int value, int source) {
  Warp& w = warp();
  w.a[lane()][0] = value;
  meet(w.meet);
  value = w.a[source][0];
  meet(w.meet);
  return value;
}
float decode(uint bits, int exponent_bits, int mantissa_bits, bool e4m3) {
  const int largest = (1 << exponent_bits) - 1, bias = largest / 2;
  const int exponent = (bits >> mantissa_bits) & largest, mantissa = bits & ((1 << mantissa_bits) - 1);
  const float sign = (bits >> (exponent_bits + mantissa_bits)) & 1 ? -1.0f : 1.0f;
  if (e4m3 && exponent == largest && mantissa == 7) return NAN;
  if (!e4m3 && exponent == largest) return mantissa ? NAN : sign * INFINITY;
  if (exponent == 0) return sign * std::ldexp(float(mantissa), 1 - bias - mantissa_bits);
  return sign * std::ldexp(float((1 << mantissa_bits) + mantissa), exponent - bias - mantissa_bits);
}
uint half_bits(float value) {
  const uint sign = std::signbit(value) ? 0x8000 : 0;
  if (std::isnan(value)) return sign | 0x7e00;
  if (std::isinf(value)) return sign | 0x7c00;
  const float magnitude = std::fabs(value);
  const int exponent = magnitude < std::ldexp(1.0f, -14) ? -15 : std::ilogb(magnitude);
  const int least = exponent == -15 ? -24 : exponent - 10;  // of the mantissa's last bit
  const uint bits = uint(exponent + 15) * 1024 + (uint(std::ldexp(magnitude, -least)) & 1023);
  if (half_value(bits) != magnitude) std::abort();
  return sign | bits;
}
uint __byte_perm(uint x, uint y, uint selector) {
  const uint64_t bytes = uint64_t(y) << 32 | x;
  uint result = 0;
  for (int i = 0; i < 4; ++i) result |= uint(bytes >> ((selector >> (4 * i) & 7) * 8) & 0xff) << (8 * i);
  return result;
}
uint e4m3_code(float value) {
  const uint sign = std::signbit(value) ? 0x80 : 0;
  if (std::isnan(value)) return 0x7f;
  const float magnitude = std::min(std::fabs(value), 448.0f);
  const int least = std::max(magnitude == 0 ? -9 : std::ilogb(magnitude) - 3, -9);  // of the mantissa's last bit
  const uint units = uint(std::nearbyint(std::ldexp(magnitude, -least)));
  return sign | (units + 8 * uint(least + 9));
}
void AtomicAdd(float* sum, float value) {
  std::atomic_ref<float> shared(*sum);
  for (float old = shared; !shared.compare_exchange_weak(old, old + value);) {
  }
}

namespace tl {
int warp_reduce_max(int value) {
  Warp& w = warp();
  w.a[lane()][0] = value;
  meet(w.meet);
  for (const auto& of_lane : w.a) value = std::max(value, int(of_lane[0]));
  meet(w.meet);
  return value;
}
float warp_reduce_sum(float value) {
  Warp& w = warp();
  std::memcpy(&w.a[lane()][0], &value, 4);
  meet(w.meet);
  float sum = 0;
  for (const auto& of_lane : w.a) {
    std::memcpy(&value, &of_lane[0], 4);
    sum += value;
  }
  meet(w.meet);
  return sum;
}
}  // namespace tl

void launch(int grid_x, int grid_y, int threads, void (*kernel)()) {
  for (int y = 0; y < grid_y; ++y)
    for (int x = 0; x < grid_x; ++x) {
      alignas(1024) static uint8_t memory[kSharedBytes];
      std::memset(memory, 0xff, kSharedBytes);  // NaN in every format
      Block own(threads);
      std::vector<std::thread> running;
      for (int t = 0; t < threads; ++t)
        running.emplace_back([=, &own] {
          block = &own;
          shared_memory = memory;
          threadIdx.x = t;
          blockIdx.x = x;
          blockIdx.y = y;
          kernel();
        });
      for (std::thread& thread : running) thread.join();
    }
}
int run_on_files(Tensor* tensors, int count, void (*run)()) {
  for (int i = 0; i < count; ++i) {
    tensors[i].bytes = static_cast<char*>(::operator new(tensors[i].size));
    FILE* file = std::fopen(tensors[i].name, "rb");
    if (!file || std::fread(tensors[i].bytes, 1, tensors[i].size, file) != tensors[i].size) std::abort();
    std::fclose(file);
  }
  run();
  for (int i = 0; i < count; ++i) {
    FILE* file = std::fopen(tensors[i].name, "wb");
    if (!file || std::fwrite(tensors[i].bytes, 1, tensors[i].size, file) != tensors[i].size) std::abort();
    std::fclose(file);
    ::operator delete(tensors[i].bytes);
  }
  return 0;
}
