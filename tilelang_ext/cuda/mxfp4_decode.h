// MXFP4 codes and scales in registers.
namespace tilelang_ext {

// Two codes as bfloat16 whose lowest exponent bits and highest mantissa bit are the code's are 2^-126 of their value.
// Times a power of two that contains 2^126 they are exact, for subnormal codes too. That power is finite for scale
// bytes up to 128.
constexpr unsigned kMagnitudes = 0x01c001c0, kSigns = 0x80008000, kLargestFolded = 128;

__device__ __forceinline__ unsigned both(unsigned bfloat16_exponent) { return bfloat16_exponent * 0x00800080; }

// 2^(scale - 127), of which 2^-127 is subnormal, and NaN for 255: both have the highest bit of the mantissa.
__device__ __forceinline__ unsigned power_of(unsigned scale) {
  return both(scale) | (((scale + 1) & 0xff) < 2 ? 0x00400040 : 0);
}

__device__ __forceinline__ unsigned byte_of(unsigned word, int at) { return select_bytes(word, 0, 0x4440 | at); }

__device__ __forceinline__ bool any_larger(unsigned scales) {  // than kLargestFolded, of four bytes
  return (scales & ((scales & 0x7f7f7f7f) + 0x7f7f7f7f) & 0x80808080) != 0;
}

}  // namespace tilelang_ext
