// Functions on floats that C lacks, for kernels of target c: values are stored as their codes and computed in float.
// The code generator appends decode_<dtype> and encode_<dtype> for each dtype that the kernel uses.

#include <stddef.h>
#include <vector>

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC optimize("O3")  // the loops of a product take minutes without
#endif

namespace tilelang_ext {

template <typename To, typename From>
inline To bit_cast(From x) {
  static_assert(sizeof(To) == sizeof(From), "a bit cast keeps the size");
  To y;
  memcpy(&y, &x, sizeof(y));
  return y;
}

// The magnitude of x, not NaN, rounded to nearest even at MANTISSA bits with exponent bias BIAS, and not clamped. Below
// the smallest normal number the code counts multiples of the smallest subnormal, which is one unit of `aligned`.
template <int MANTISSA, int BIAS>
inline uint32_t round_magnitude(float x) {
  const uint32_t a = bit_cast<uint32_t>(x) & 0x7fffffffu;
  const uint32_t smallest_normal = uint32_t(128 - BIAS) << 23;
  if (BIAS != 127 && a < smallest_normal) {
    const uint32_t aligned = uint32_t(127 + 24 - BIAS - MANTISSA) << 23;
    return bit_cast<uint32_t>(bit_cast<float>(a) + bit_cast<float>(aligned)) - aligned;
  }
  const uint32_t odd = (a >> (23 - MANTISSA)) & 1u;
  return ((a + (1u << (22 - MANTISSA)) - 1u + odd) >> (23 - MANTISSA)) - (uint32_t(127 - BIAS) << MANTISSA);
}

// TOP is what a magnitude past the format becomes: the largest finite code, or infinity in the IEEE formats.
template <int MANTISSA, int BIAS, uint32_t TOP, uint32_t NOT_A_NUMBER, uint32_t SIGN, bool NEGATIVE_ZERO>
inline uint32_t encode(float x) {
  if (x != x) return NOT_A_NUMBER;
  const uint32_t rounded = round_magnitude<MANTISSA, BIAS>(x);
  const uint32_t code = rounded < TOP ? rounded : TOP;
  const bool negative = bit_cast<uint32_t>(x) >> 31 && (NEGATIVE_ZERO || code != 0);
  return negative ? code | SIGN : code;
}

// The nearest power of two of |x|; a tie goes up.
inline uint8_t encode_power_of_two(float x) {
  const uint32_t a = bit_cast<uint32_t>(x) & 0x7fffffffu;
  if (a >= 0x7f800000u) return 255;
  if (a < 0x00600000u) return 0;  // 2^-127 is a subnormal float
  const uint32_t code = (a + 0x00400000u) >> 23;
  return uint8_t(code < 254u ? code : 254u);
}

// A float that rounds to any narrower type as x does: truncated, with the last bit set if anything was cut off.
inline float round_to_odd(double x) {
  const float nearest = float(x);
  if (double(nearest) == x || x != x || nearest - nearest != 0.0f) return nearest;
  uint32_t bits = bit_cast<uint32_t>(nearest);
  const double magnitude = x < 0 ? -x : x;
  if (double(bit_cast<float>(bits & 0x7fffffffu)) > magnitude) --bits;
  return bit_cast<float>(bits | 1u);
}

inline float decode_float16(uint16_t code) {
  const uint32_t magnitude = uint32_t(code & 0x7fffu) << 13;
  // Half's exponent bias is 112 less than float's; the multiplication also normalises subnormals.
  const uint32_t scaled = bit_cast<uint32_t>(bit_cast<float>(magnitude) * bit_cast<float>(uint32_t(127 + 112) << 23));
  const uint32_t value = magnitude >= 0x0f800000u ? magnitude | 0x7f800000u : scaled;
  return bit_cast<float>(value | uint32_t(code & 0x8000u) << 16);
}

inline float decode_bfloat16(uint16_t code) { return bit_cast<float>(uint32_t(code) << 16); }

// This thread's memory for the arrays of a kernel that are too large for its stack; kept until the thread ends.
inline void* workspace(size_t bytes, size_t offset) {
  static thread_local std::vector<char> memory;
  if (memory.size() < bytes) memory.resize(bytes);
  return memory.data() + offset;
}

}  // namespace tilelang_ext
