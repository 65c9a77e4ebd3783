/*!
 * \file prelude_formats.cc
 * \brief Narrow floats to half or float and back, by bits; every one is tested for all codes.
 *
 * How a text is written: see prelude_table.h.
 */
#include "prelude_table.h"

namespace tilelang_ext {
namespace metal {

std::vector<Helper> FormatHelpers() {
  return {
      // ---- narrow floats to half or float: exact, by bits ------------------------------------------------------
      {"e4m3fn_to_half", {}, R"(
// E4M3 (bias 7): its bits, read as a half (bias 15), are 2^-8 of the value, subnormals included. 0x7f is NaN.
inline half$ e4m3fn_to_half(uchar$ code) {
  ushort$ magnitude = ushort$(code & uchar$(0x7f));
  ushort$ bits = as_type<ushort$>(half$(as_type<half$>(ushort$(magnitude << ushort$(7))) * half$(256)));
  bits = select(bits, ushort$(0x7e00), magnitude == ushort$(0x7f));
  return as_type<half$>(ushort$(bits | (ushort$(code & uchar$(0x80)) << ushort$(8))));
}
)"},
      {"e5m2_to_half", {}, R"(
// E5M2 is the upper byte of a half.
inline half$ e5m2_to_half(uchar$ code) { return as_type<half$>(ushort$(ushort$(code) << ushort$(8))); }
)"},
      {"e4m3fnuz_to_half", {}, R"(
// E4M3 FNUZ (bias 8): as E4M3 with 2^-7. 0x80 is NaN; no -0.
inline half$ e4m3fnuz_to_half(uchar$ code) {
  ushort$ magnitude = ushort$(code & uchar$(0x7f));
  ushort$ bits = as_type<ushort$>(half$(as_type<half$>(ushort$(magnitude << ushort$(7))) * half$(128)));
  bits = ushort$(bits | (ushort$(code & uchar$(0x80)) << ushort$(8)));
  return as_type<half$>(select(bits, ushort$(0x7e00), code == uchar$(0x80)));
}
)"},
      {"e5m2fnuz_to_half", {}, R"(
// E5M2 FNUZ (bias 16): the exponent of a half is one less; the two lowest exponents are half's subnormals. 0x80 is NaN.
inline half$ e5m2fnuz_to_half(uchar$ code) {
  ushort$ magnitude = ushort$(code & uchar$(0x7f));
  ushort$ subnormal = ushort$(magnitude << ushort$(7));
  ushort$ normal = ushort$((magnitude << ushort$(8)) - ushort$(0x400));
  ushort$ bits = select(subnormal, normal, magnitude >= ushort$(8));
  bits = ushort$(bits | (ushort$(code & uchar$(0x80)) << ushort$(8)));
  return as_type<half$>(select(bits, ushort$(0x7e00), code == uchar$(0x80)));
}
)"},
      {"e8m0_to_float", {}, R"(
// E8M0: the exponent field of a float; 0 is the subnormal 2^-127, 255 is NaN.
inline float$ e8m0_to_float(uchar$ code) {
  uint$ bits = select(uint$(code) << uint$(23), uint$(0x00400000), code == uchar$(0));
  return as_type<float$>(select(bits, uint$(0x7fc00000), code == uchar$(255)));
}
)"},
      {"e2m1_to_half", {}, R"(
// E2M1 (bias 1), one code a lane: its bits, read as a half, are 2^-14 of the value.
inline half$ e2m1_to_half(uchar$ code) {
  ushort$ magnitude = ushort$(code & uchar$(7));
  ushort$ bits = as_type<ushort$>(half$(as_type<half$>(ushort$(magnitude << ushort$(9))) * half$(16384)));
  return as_type<half$>(ushort$(bits | (ushort$(code & uchar$(8)) << ushort$(12))));
}
)"},
      {"unpack_e2m1x2", {}, R"(
// Two E2M1 codes a byte, the earlier one in the low nibble.
inline uchar2 unpack_e2m1x2(uchar packed) { return uchar2(packed & 15, packed >> 4); }
)"},
      {"unpack_e2m1x4", {}, R"(
inline uchar4 unpack_e2m1x4(ushort packed) {
  return uchar4((ushort4(packed) >> ushort4(0, 4, 8, 12)) & ushort4(15));
}
)"},

      // ---- float to narrow floats: round to nearest even, saturate ---------------------------------------------
      {"round_to_minifloat", {}, R"(
// |x| rounded to nearest even at MANTISSA bits with exponent bias BIAS, not clamped. Below the smallest normal number
// the code counts multiples of the smallest subnormal.
template <int MANTISSA, int BIAS>
inline uint$ round_to_minifloat(float$ x) {
  uint$ a = as_type<uint$>(x) & uint$(0x7fffffff);
  uint$ odd = (a >> uint$(23 - MANTISSA)) & uint$(1);
  uint$ normal = (a + uint$((1 << (22 - MANTISSA)) - 1) + odd) >> uint$(23 - MANTISSA);
  float$ scaled = min(as_type<float$>(a), float$(1.0f)) * float$(1 << (BIAS - 1 + MANTISSA));
  return select(normal - uint$((127 - BIAS) << MANTISSA), uint$(rint(scaled)), a < uint$((128 - BIAS) << 23));
}
)"},
      {"float_to_e4m3fn", {"round_to_minifloat", "is_nan"}, R"(
inline uchar$ float_to_e4m3fn(float$ x) {
  uint$ code = select(min(round_to_minifloat<3, 7>(x), uint$(0x7e)), uint$(0x7f), is_nan(x));
  return uchar$(code | ((as_type<uint$>(x) >> uint$(24)) & uint$(0x80)));
}
)"},
      {"float_to_e5m2", {"round_to_minifloat", "is_nan"}, R"(
inline uchar$ float_to_e5m2(float$ x) {
  uint$ code = select(min(round_to_minifloat<2, 15>(x), uint$(0x7b)), uint$(0x7f), is_nan(x));
  return uchar$(code | ((as_type<uint$>(x) >> uint$(24)) & uint$(0x80)));
}
)"},
      {"float_to_e4m3fnuz", {"round_to_minifloat", "is_nan"}, R"(
inline uchar$ float_to_e4m3fnuz(float$ x) {
  uint$ code = min(round_to_minifloat<3, 8>(x), uint$(0x7f));
  code = select(code | ((as_type<uint$>(x) >> uint$(24)) & uint$(0x80)), uint$(0), code == uint$(0));
  return uchar$(select(code, uint$(0x80), is_nan(x)));
}
)"},
      {"float_to_e5m2fnuz", {"round_to_minifloat", "is_nan"}, R"(
inline uchar$ float_to_e5m2fnuz(float$ x) {
  uint$ code = min(round_to_minifloat<2, 16>(x), uint$(0x7f));
  code = select(code | ((as_type<uint$>(x) >> uint$(24)) & uint$(0x80)), uint$(0), code == uint$(0));
  return uchar$(select(code, uint$(0x80), is_nan(x)));
}
)"},
      {"float_to_e8m0", {"is_nan"}, R"(
// The nearest power of two of |x|; a tie goes up.
inline uchar$ float_to_e8m0(float$ x) {
  uint$ a = as_type<uint$>(x) & uint$(0x7fffffff);
  uint$ code = min((a + uint$(0x00400000)) >> uint$(23), uint$(254));
  code = select(code, uint$(0), a < uint$(0x00600000));  // 2^-127 is a subnormal float
  return uchar$(select(code, uint$(255), a >= uint$(0x7f800000)));
}
)"},
      {"float_to_e2m1", {"round_to_minifloat"}, R"(
inline uchar$ float_to_e2m1(float$ x) {
  uint$ code = min(round_to_minifloat<1, 1>(x), uint$(7));
  return uchar$(code | ((as_type<uint$>(x) >> uint$(28)) & uint$(8)));
}
)"},
      {"pack_e2m1x2", {}, R"(
inline uchar pack_e2m1x2(uchar2 code) { return uchar(code.x | (code.y << 4)); }
)"},
      {"pack_e2m1x4", {}, R"(
inline ushort pack_e2m1x4(uchar4 code) {
  return ushort(code.x | (code.y << 4) | (code.z << 8) | (code.w << 12));
}
)"},
  };
}

}  // namespace metal
}  // namespace tilelang_ext
