"""What is defined above a kernel that multiplies fp8: one device function an instruction, one a decoded type."""

from __future__ import annotations

from tilelang_ext.formats import E4M3, E4M3_FNUZ, E5M2, E5M2_FNUZ, format_of
from tilelang_ext.passes.operators import ASSERT
from tilelang_ext.rocm.instructions import MatrixInstruction, codes_per_byte, scaled_product

NAMESPACE = "tilelang_ext"

# `halves`, the bits of two halves, from two codes, one in the low byte of each 16 bits of `pair`.
_HALVES = {
    E4M3.dtype: """\
  // E4M3 (bias 7): its bits, read as a half (bias 15), are 2^-8 of the value, subnormals included. 0x7f is NaN.
  const unsigned magnitude = pair & 0x007f007f, nan = (magnitude + 0x00010001) & 0x00800080;
  const half_x2 value = __builtin_bit_cast(half_x2, magnitude << 7) * (half_x2){256, 256};
  const unsigned halves = __builtin_bit_cast(unsigned, value) | (pair & 0x00800080) << 8 | ((nan << 8) - (nan << 2));
""",
    E5M2.dtype: """\
  // E5M2 is the upper byte of a half.
  const unsigned halves = pair << 8;
""",
    E4M3_FNUZ.dtype: """\
  // E4M3 FNUZ (bias 8): its bits, read as a half (bias 15), are 2^-7 of the value. 0x80 is NaN.
  const unsigned magnitude = pair & 0x007f007f, nan = (((pair ^ 0x00800080) + 0x00ff00ff) & 0x01000100) ^ 0x01000100;
  const half_x2 value = __builtin_bit_cast(half_x2, magnitude << 7) * (half_x2){128, 128};
  const unsigned halves = __builtin_bit_cast(unsigned, value) | (pair & 0x00800080) << 8 | ((nan << 7) - (nan << 1));
""",
    E5M2_FNUZ.dtype: """\
  // E5M2 FNUZ (bias 16) is half of the half whose upper byte it is: one off the exponent, or one bit down where that makes a
  // subnormal, whichever is larger. 0x80 is NaN.
  const unsigned magnitude = pair & 0x007f007f, nan = (((pair ^ 0x00800080) + 0x00ff00ff) & 0x01000100) ^ 0x01000100;
  const short_x2 normal = __builtin_bit_cast(short_x2, magnitude << 8) - (short_x2){0x400, 0x400};
  const short_x2 value = __builtin_elementwise_max(normal, __builtin_bit_cast(short_x2, magnitude << 7));
  const unsigned halves = __builtin_bit_cast(unsigned, value) | (pair & 0x00800080) << 8 | ((nan << 7) - (nan << 1));
""",
}
# What a register holds of `halves`. A bfloat is the upper half of a float, which these values leave its lower half zero.
_REGISTERS = {
    "float16": """\
  return halves;
""",
    "bfloat16": """\
  const half_x2 exact = __builtin_bit_cast(half_x2, halves);
  const unsigned low = __builtin_bit_cast(unsigned, static_cast<float>(exact[0]));
  const unsigned high = __builtin_bit_cast(unsigned, static_cast<float>(exact[1]));
  return low >> 16 | (high & 0xffff0000);
""",
}
_NAMES = {E4M3.dtype: "e4m3fn", E5M2.dtype: "e5m2", E4M3_FNUZ.dtype: "e4m3fnuz", E5M2_FNUZ.dtype: "e5m2fnuz"}


def decoder_name(dtype: str, register: str) -> str:
    """Return the function that decodes codes of `dtype` to `register`: name<count>(pointer to values, pointer to codes)."""
    return f"{NAMESPACE}::{_NAMES[dtype]}_to_{register}"


def product_name(instruction: MatrixInstruction, a_dtype: str, b_dtype: str) -> str:
    """Return the function of an instruction: name(pointer to D, to A, to B)."""
    return f"{NAMESPACE}::{_product_function(instruction, a_dtype, b_dtype)}"


def _product_function(instruction: MatrixInstruction, a_dtype: str, b_dtype: str) -> str:
    if "f8f6f4" in instruction.builtin:  # the formats are arguments, not part of the name
        return f"{instruction.builtin}_{_NAMES[a_dtype]}_{_NAMES[b_dtype]}"
    return instruction.builtin


def decoder_text(dtype: str, register: str) -> str:
    """Return the definition of `decoder_name`. Four codes at a time, in their order; the count is a multiple of four."""
    name = f"{_NAMES[dtype]}_to_{register}"
    return _guarded(
        name,
        f"""\
typedef __attribute__((__vector_size__(2 * sizeof(_Float16)))) _Float16 half_x2;
typedef __attribute__((__vector_size__(2 * sizeof(short)))) short short_x2;

__device__ __forceinline__ unsigned {name}_pair(unsigned pair) {{
{_HALVES[dtype]}{_REGISTERS[register]}}}

// `count` codes to {register}, which holds each of their values exactly.
template <int count>
__device__ __forceinline__ void {name}(void* values, const void* codes) {{
#pragma unroll
  for (int i = 0; i < count; i += 4) {{
    unsigned word;
    __builtin_memcpy(&word, static_cast<const char*>(codes) + i, 4);
#pragma unroll
    for (int j = 0; j < 4; j += 2) {{
      const unsigned two = word >> 8 * j;
      const unsigned pair = {name}_pair((two & 0xff) | (two & 0xff00) << 8);
      __builtin_memcpy(static_cast<char*>(values) + 2 * (i + j), &pair, 4);
    }}
  }}
}}
""",
    )


def product_text(instruction: MatrixInstruction, a_dtype: str, b_dtype: str) -> str:
    """Return the definition of `product_name`."""
    name = _product_function(instruction, a_dtype, b_dtype)
    accumulator = instruction.accumulator
    first, second = ("B", "A") if accumulator.exchanged else ("A", "B")
    return _guarded(
        name,
        f"""\
// D += A * B on a 16x16 tile with K = {instruction.K}, by a wave of {accumulator.wave}. Pointers are to a lane's own elements.
__device__ __forceinline__ void {name}(float* d, const void* a, const void* b) {{
  typedef {instruction.operand} operand;
  typedef __attribute__((__vector_size__({accumulator.elements} * sizeof(float)))) float accumulator;
  operand A, B;
  accumulator D;
  __builtin_memcpy(&A, a, sizeof(A));
  __builtin_memcpy(&B, b, sizeof(B));
  __builtin_memcpy(&D, d, sizeof(D));
  D = __builtin_amdgcn_{instruction.builtin}({first}, {second}, D{instruction.arguments});
  __builtin_memcpy(d, &D, sizeof(D));
}}
""",
    )


def scaled_product_name(a_dtype: str, b_dtype: str) -> str:
    """Return the function of a product with scales: name(pointer to D, to A, to B, scale of A, of B), scales as E8M0 bytes."""
    return f"{NAMESPACE}::{_scaled_product_function(a_dtype, b_dtype)}"


def _scaled_product_function(a_dtype: str, b_dtype: str) -> str:
    names = _NAMES | {"uint8": "e2m1"}
    return f"{scaled_product(a_dtype, b_dtype).builtin}_{names[a_dtype]}_{names[b_dtype]}_scaled"


def scaled_product_text(a_dtype: str, b_dtype: str) -> str:
    """Return the definition of `scaled_product_name`."""
    instruction = scaled_product(a_dtype, b_dtype)
    name, accumulator = _scaled_product_function(a_dtype, b_dtype), instruction.accumulator
    a_bytes, b_bytes = (instruction.elements // codes_per_byte(dtype) for dtype in (a_dtype, b_dtype))
    return _guarded(
        name,
        f"""\
// D += A * B on a 16x16 tile with K = {instruction.K}, by a wave of {accumulator.wave}, each 32 of K times the E8M0 scales of
// its row and column. Pointers are to a lane's own elements; its scales are those of row, and column, lane % 16 and of the 32
// of K at lane / 16.
__device__ __forceinline__ void {name}(float* d, const void* a, const void* b, int scale_a, int scale_b) {{
  typedef {instruction.operand} operand;
  typedef __attribute__((__vector_size__({accumulator.elements} * sizeof(float)))) float accumulator;
  operand A = {{}}, B = {{}};
  accumulator D;
  __builtin_memcpy(&A, a, {a_bytes});
  __builtin_memcpy(&B, b, {b_bytes});
  __builtin_memcpy(&D, d, sizeof(D));
  D = __builtin_amdgcn_{instruction.builtin}(B, A, D{instruction.arguments});
  __builtin_memcpy(d, &D, sizeof(D));
}}
""",
    )


def fp8_value_name(dtype: str) -> str:
    """Return the function that converts a value of `dtype` to float: name(value in upstream's type)."""
    return f"{NAMESPACE}::float_of_{_NAMES[dtype]}"


def fp8_code_name(dtype: str) -> str:
    """Return the function that converts a float to `dtype`: to nearest even, saturating; infinity too, as HIP's own do."""
    return f"{NAMESPACE}::{_NAMES[dtype]}_of_float"


def fp8_conversion_text(dtype: str) -> str:
    """Return the definitions of `fp8_value_name` and `fp8_code_name`."""
    format, name = format_of(dtype), _NAMES[dtype]
    carrier = "fp8_e4_t" if format.mantissa_bits == E4M3.mantissa_bits else "fp8_e5_t"
    mantissa, bias, top = format.mantissa_bits, format.bias, format.values.index(format.max)
    if format.has_negative_zero:
        infinity = format.inf_codes[0] if format.inf_codes else 0x80
        nan = f"magnitude > {top} && magnitude != {infinity:#x}"
        infinite = f"magnitude == {infinity:#x} ? __builtin_inff() : " if format.inf_codes else ""
        zero = "true"
    else:
        nan, infinite, zero = "code == 0x80", "", "code != 0"
    return _guarded(
        f"{name}_conversions",
        f"""\
__device__ __forceinline__ float float_of_{name}({carrier} value) {{
  const unsigned code = value.data, magnitude = code & 0x7f;
  if ({nan}) return __builtin_nanf("");
  const unsigned exponent = magnitude >> {mantissa}, mantissa = magnitude & {(1 << mantissa) - 1};
  const int significand = static_cast<int>(exponent ? mantissa + {1 << mantissa} : mantissa);
  const unsigned power = (exponent ? exponent : 1) + {127 - bias - mantissa};
  const float finite = static_cast<float>(significand) * __builtin_bit_cast(float, power << 23);
  const float absolute = {infinite}finite;
  return code & 0x80 ? -absolute : absolute;
}}
__device__ __forceinline__ {carrier} {name}_of_float(float value) {{
  const unsigned bits = __builtin_bit_cast(unsigned, value), magnitude = bits & 0x7fffffff;
  {carrier} result;
  result.data = {format.nan_codes[0]:#x};
  if (magnitude > 0x7f800000) return result;
  unsigned code;
  if (magnitude < {128 - bias}u << 23) {{  // below the smallest normal number: a multiple of the smallest subnormal one
    const unsigned aligned = {127 + 24 - bias - mantissa}u << 23;
    const float sum = __builtin_bit_cast(float, magnitude) + __builtin_bit_cast(float, aligned);
    code = __builtin_bit_cast(unsigned, sum) - aligned;
  }} else {{
    const unsigned odd = (magnitude >> {23 - mantissa}) & 1;
    code = ((magnitude + {(1 << (22 - mantissa)) - 1}u + odd) >> {23 - mantissa}) - {(127 - bias) << mantissa}u;
  }}
  code = code < {top}u ? code : {top}u;
  result.data = static_cast<unsigned char>(bits >> 31 && {zero} ? code | 0x80 : code);
  return result;
}}
""",
        "tl_templates/hip/hip_fp8.h",
    )


def all_reduce_text() -> str:
    """Return the definition of all_reduce<operator, threads, scale, first>(value, workspace, takes part), and of the same for
    `batch` values at a pointer, `stride` apart in the workspace."""
    return _guarded(
        "all_reduce",
        """\
// Combine the values of the threads whose numbers, counted from `first`, differ in the bits from `scale` up to `threads`. Every
// thread of the block must arrive, whether it takes part or not.
template <class Operator, int threads, int scale, int first, int batch, int stride, typename T>
__device__ __forceinline__ void all_reduce(T* x, T* workspace, bool takes_part = true) {
  const int self = static_cast<int>(threadIdx.x) - first;
  for (int offset = threads / 2; offset >= scale; offset /= 2) {
    __syncthreads();
    for (int i = 0; takes_part && i < batch; ++i) workspace[self + i * stride] = x[i];
    __syncthreads();
    for (int i = 0; takes_part && i < batch; ++i) x[i] = Operator()(x[i], workspace[(self ^ offset) + i * stride]);
  }
}
template <class Operator, int threads, int scale, int first, typename T>
__device__ __forceinline__ T all_reduce(T x, T* workspace, bool takes_part = true) {
  all_reduce<Operator, threads, scale, first, 1, 0>(&x, workspace, takes_part);
  return x;
}
""",
    )


def atomic_text(name: str) -> str:
    """Return the definition of what upstream's generator calls for an atomic `name` that returns the value before it."""
    function = f"Atomic{name.capitalize()}Ret"
    return f"""\
#ifndef TILELANG_EXT_{function.upper()}
#define TILELANG_EXT_{function.upper()}
#include <hip/hip_runtime.h>
template <typename T1, typename T2>
__device__ __forceinline__ T1 {function}(T1* address, T2 value, int memory_order = 0) {{
  return atomic{name.capitalize()}(address, static_cast<T1>(value));
}}
#endif
"""


def assert_text() -> str:
    """Return the definition of ASSERT(condition, message): the message is printed, and the kernel ends."""
    return f"""\
#ifndef {ASSERT}  // the simulator reports; a GPU prints and stops
#include <hip/hip_runtime.h>
namespace {NAMESPACE} {{
__device__ __forceinline__ void device_assert(bool condition, const char* message) {{
  if (condition) return;
  printf("Device assert failed: %s BlockIdx=(%d, %d, %d), ThreadIdx=(%d, %d, %d)\\n", message, (int)blockIdx.x,
         (int)blockIdx.y, (int)blockIdx.z, (int)threadIdx.x, (int)threadIdx.y, (int)threadIdx.z);
  __builtin_trap();
}}
}}  // namespace {NAMESPACE}
#define {ASSERT}(condition, message) {NAMESPACE}::device_assert(condition, message)
#endif
"""


def add_pairs_text() -> str:
    """Return add_2 and add_4, atomic sums of so many 16-bit floats by pairs, in their 32-bit words.

    The value is the words, or a pointer to the floats.
    """
    return _guarded(
        "add_pairs",
        """\
template <typename T>
__device__ __forceinline__ void add_2(T* pair, uint1 value) {
  unsigned* word = reinterpret_cast<unsigned*>(pair);
  T added[2], sum[2];
  __builtin_memcpy(added, &value, 4);
  unsigned seen = __atomic_load_n(word, __ATOMIC_RELAXED), old;
  do {
    old = seen;
    __builtin_memcpy(sum, &old, 4);
    for (int i = 0; i < 2; ++i) sum[i] = static_cast<T>(static_cast<float>(sum[i]) + static_cast<float>(added[i]));
    unsigned next;
    __builtin_memcpy(&next, sum, 4);
    seen = atomicCAS(word, old, next);
  } while (seen != old);
}
template <typename T>
__device__ __forceinline__ void add_2(T* pair, const T* from) {
  uint1 value;
  __builtin_memcpy(&value, from, 4);
  add_2(pair, value);
}
template <typename T>
__device__ __forceinline__ void add_4(T* four, uint2 value) {
  add_2(four, make_uint1(value.x));
  add_2(four + 2, make_uint1(value.y));
}
template <typename T>
__device__ __forceinline__ void add_4(T* four, const T* from) {
  add_2(four, from);
  add_2(four + 2, from + 2);
}
""",
    )


def _guarded(name: str, text: str, header: str = "hip/hip_runtime.h") -> str:
    """A kernel with several products has the text several times, and the definition once."""
    guard = f"TILELANG_EXT_{name.upper()}"
    return f"""\
#ifndef {guard}
#define {guard}
#include <{header}>
namespace {NAMESPACE} {{
{text}}}  // namespace {NAMESPACE}
#endif
"""
